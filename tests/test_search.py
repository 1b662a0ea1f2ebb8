"""`anneal search`: ranges, storage shared by processes, and real trials that are killed, resumed and pruned."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from anneal import cli, params, recipe, tracking
from anneal.params import ParamsError, UserError
from anneal.preprocess import build_store
from anneal.recipe import json_schema
from anneal.search import run
from anneal.search.config import SearchConfig
from anneal.search.run import plan, shared
from anneal.search.space import Key, never_applies, replaced, search_space, suggest
from anneal.sources import open_source
from anneal.store import fresh_folder
from anneal.studies.base import base_recipe

ROOT = Path(__file__).resolve().parents[1]
VALUES = params.read_yaml(ROOT / "params.yaml")
SCHEMA = json_schema()

LIMIT = 150
"""Training images."""

RANGES = {
    "optimizer.name": ["SGD", "Adam"],
    "optimizer.SGD.lr": {"low": 0.01, "high": 0.3, "log": True},
    "optimizer.Adam.lr": {"low": 1e-3, "high": 1e-2, "log": True},
    "model.mlp.hidden": [[8], [16, 8]],
    "augment.policy": ["none", "light"],
}


def section(**changes: Any) -> dict[str, Any]:
    return {**VALUES["search"], **changes}


def space(ranges: dict[str, Any], values: dict[str, Any] = VALUES) -> list[Key]:
    config = params.parse({"search": section(ranges=ranges)}, {"search": SearchConfig})["search"]
    return search_space(config, values, SCHEMA)


def faults(ranges: dict[str, Any]) -> list[str]:
    with pytest.raises(ParamsError) as caught:
        space(ranges)
    return caught.value.faults


# ---- ranges ---------------------------------------------------------------------------------------------------------


def test_what_params_yaml_ships_can_be_searched() -> None:
    _, keys, base = plan(VALUES)
    assert "optimizer.SGD.lr" in [key.name for key in keys]
    assert "optimizer.Muon.lr" not in [key.name for key in keys], "its block is not chosen"
    assert base["evaluate"]["splits"] == ["val"] and base["hardware"]["devices"] == 1


@pytest.mark.parametrize(
    ("ranges", "fault"),
    [
        ({"optimizer.SGD.lrr": {"low": 0.1, "high": 1.0}}, "search.ranges.optimizer.SGD.lrr: unknown key; did you mean 'optimizer.SGD.lr'?"),
        ({"optimiser.SGD.lr": {"low": 0.1, "high": 1.0}}, "unknown key; did you mean 'optimizer'?"),
        ({"optimizer": ["SGD", "Adam"]}, "search.ranges.optimizer: unknown key"),
        ({"seed": [0, 1]}, "cannot be searched: all trials have the same"),
        ({"preprocess.size": [8, 16]}, "run `dvc repro augment`"),
        ({"augment.copies.balance": [True, False]}, "cannot be searched: copies are written before"),
        ({"evaluate.bootstrap": [10, 20]}, "training does not read it"),
        ({"regularization.dropout": {"low": 0.0, "high": 1.5}}, "search.ranges.regularization.dropout.high: found 1.5, allowed: a number >= 0"),
        ({"optimizer.name": ["SGD", "Adm"]}, "search.ranges.optimizer.name[1]: found \"Adm\""),
        ({"trainer.epochs": {"low": 1.5, "high": 3}}, "search.ranges.trainer.epochs.low: found 1.5, allowed: a whole number >= 1"),
        ({"trainer.early_stopping": [None, {"patienc": 1}]}, "search.ranges.trainer.early_stopping[1]: found a mapping, allowed: a mapping with patience, min_delta | null"),
        ({"trainer.early_stopping": [None, {"patience": 1}], "trainer.early_stopping.patience": [1, 2]}, "found beside trainer.early_stopping"),
        ({"optimizer.SGD.lr": {"low": 1.0, "high": 0.1}}, "search.ranges.optimizer.SGD.lr.high: found 0.1 with low 1.0"),
        ({"optimizer.SGD.momentum": {"low": 0.0, "high": 0.9, "log": True}}, "found 0.0 with log: true, allowed: a number > 0"),
        ({"regularization.dropout": {"low": 0.0, "high": 0.5, "step": 0.2}}, "step: found 0.2, allowed: a number that divides"),
        ({"trainer.epochs": {"low": 5, "high": 15, "step": 2.5}}, "search.ranges.trainer.epochs.step: found 2.5, allowed: a whole number"),
        ({"optimizer.name": ["SGD"]}, "allowed: a list of two or more values"),
        ({"optimizer.name": ["SGD", "SGD"]}, "found \"SGD\" twice"),
    ],
)  # fmt: skip
def test_faults_name_key_and_reason(ranges: dict[str, Any], fault: str) -> None:
    found = faults(ranges)
    assert len(found) == 1 and fault in found[0], found
    assert found[0].startswith("search")


def test_kinds_of_keys_and_when_they_apply() -> None:
    keys = {
        key.name: key
        for key in space(
            {
                "optimizer.LARS.lr": {"low": 1, "high": 10},
                "optimizer.name": ["SGD", "LARS"],
                "trainer.epochs": {"low": 2, "high": 8, "log": True},
                "regularization.dropout": {"low": 0, "high": 0.5, "step": 0.1},
                "model.norm.batch.momentum": {"low": 0.01, "high": 0.5},
                "schedule.warmup.length": {"low": 0.0, "high": 0.2},
                "optimizer.sam.rho": {"low": 0.0, "high": 0.1},
                "schedule.step.gamma": {"low": 0.1, "high": 0.5},
            }
        )
    }
    assert next(iter(keys)) == "optimizer.name", "first, since others depend on it"
    kinds = {name: key.kind for name, key in keys.items()}
    assert kinds["trainer.epochs"] == "int" and kinds["optimizer.LARS.lr"] == kinds["regularization.dropout"] == "float"
    (epochs,) = space({"trainer.epochs": {"low": 2.0, "high": 8.0, "step": 2.0}})
    assert epochs.kind == "int", "the key takes no fractions, however its ends are written"
    assert keys["optimizer.LARS.lr"].when == (("optimizer.name", "LARS"),)
    assert keys["model.norm.batch.momentum"].when == (("model.norm.name", "batch"),)
    assert keys["schedule.warmup.length"].when == keys["optimizer.sam.rho"].when == ()
    idle = [name for name, key in keys.items() if never_applies(key, list(keys.values()), VALUES)]
    assert idle == ["schedule.step.gamma"], "the norm is chosen by auto"


def test_a_key_that_the_member_overrides_is_refused() -> None:
    values = replaced(VALUES, {"ensemble.members.a": {"optimizer": {"SGD": {"lr": 0.1}}}})
    with pytest.raises(UserError, match=r"ensemble\.members\.a overrides it"):
        plan(values)
    values = replaced(VALUES, {"search.ranges": {"optimizer.AdamW.lr": {"low": 0.1, "high": 0.2}}})
    with pytest.raises(UserError, match="no key that applies"):
        plan(values)


# ---- bookkeeping, without training ----------------------------------------------------------------------------------


def trials_of(
    folder: Path, total: int, pruning: str = "none", seed: int = 0, sampler: str = "TPE", storage: Any = None
) -> Any:
    from anneal.search.trials import Trials, open_storage, open_study

    keys = space({name: values for name, values in RANGES.items() if name.startswith("optimizer")})
    study = open_study(
        storage or open_storage(f"sqlite:///{folder}/search.db"),
        "s",
        folder=folder / "s",
        metric="val/accuracy",
        sampler=sampler,
        pruning=pruning,
        epochs=4,
        seed=seed,
        asked={"a": 1},
    )
    return Trials(study, folder / "s", keys, VALUES, total)


def made_up(chosen: dict[str, Any], epoch: int = 4) -> float:
    """A smooth function of the values in the place of a training: here it is who takes up what that counts."""
    lr = chosen.get("optimizer.SGD.lr", chosen.get("optimizer.Adam.lr", 0.0))
    return epoch / 4 * (1 - abs(lr - 0.05)) - 0.1 * (chosen["optimizer.name"] == "Adam")


def run_made_up(folder: Path, total: int, **options: Any) -> list[Any]:
    trials = trials_of(folder, total, **options)
    while (claim := trials.claim()) is not None:
        stopped = any(trials.report(claim, epoch, made_up(claim.chosen, epoch)) for epoch in range(1, 5))
        trials.end(claim, "pruned" if stopped else "complete", value=None if stopped else made_up(claim.chosen))
    return trials.all()


def seen(trials: list[Any]) -> list[tuple[Any, ...]]:
    return [(t.number, t.params, t.state, t.intermediate_values, t.values) for t in trials]


@pytest.mark.parametrize(("sampler", "pruning"), [("TPE", "median"), ("random", "hyperband")])
def test_one_process_gives_the_same_trials(tmp_path: Path, sampler: str, pruning: str) -> None:
    from optuna.storages import InMemoryStorage

    whole = run_made_up(tmp_path / "a", 14, sampler=sampler, pruning=pruning, storage=InMemoryStorage())
    storage = InMemoryStorage()
    for total in (3, 12, 14):
        found = run_made_up(tmp_path / "b", total, sampler=sampler, pruning=pruning, storage=storage)
        assert len(found) == total
    assert seen(found) == seen(whole)
    assert {"PRUNED", "COMPLETE"} == {t.state.name for t in whole}
    assert len({json.dumps(t.params, sort_keys=True) for t in whole}) == 14
    other = run_made_up(tmp_path / "c", 3, sampler=sampler, seed=1, storage=InMemoryStorage())
    assert seen(other) != seen(whole[:3])


def test_what_a_killed_process_left_is_taken_up(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, 2)
    left = trials.claim()
    assert trials.report(left, 1, 0.5) is False
    assert trials_of(tmp_path, 1).claim() is None, "who holds it is there"
    left.lock.release()  # as the end of the process does
    again = trials_of(tmp_path, 1).claim()
    assert again.resumed and again.number == left.number == 0 and again.chosen == left.chosen
    assert trials.report(again, 1, 0.5) is False
    assert dict(trials.frozen(again.trial).intermediate_values) == {1: 0.5}


def test_a_decision_stands_when_its_epoch_comes_again(tmp_path: Path) -> None:
    from optuna.storages import InMemoryStorage

    decided: dict[int, list[bool]] = {}
    for again in (False, True):
        trials = trials_of(tmp_path / str(again), 20, pruning="hyperband", storage=InMemoryStorage())
        while (claim := trials.claim()) is not None:
            answers = []
            for epoch in range(1, 5):
                answers.append(trials.report(claim, epoch, made_up(claim.chosen, epoch)))
                if again:  # each epoch a second time, as after a kill
                    assert trials.report(claim, epoch, made_up(claim.chosen, epoch)) == answers[-1]
                if answers[-1]:
                    break
            trials.end(claim, "pruned" if answers[-1] else "complete", value=None if answers[-1] else 0.5)
            assert decided.setdefault(claim.number, answers) == answers
    assert any(answers[-1] for answers in decided.values())


PROCESS = """
import sys
from pathlib import Path
from tests.test_search import share_of
print("here", flush=True)
sys.stdin.readline()
print(*share_of(Path(sys.argv[1])))
"""


def share_of(folder: Path) -> list[int]:
    """Run trials of a study of eight until there are no more, and return which it was."""
    trials = trials_of(folder, 8)
    numbers = []
    while (claim := trials.claim()) is not None:
        time.sleep(0.05)
        trials.report(claim, 1, made_up(claim.chosen, 1))
        trials.end(claim, "complete", value=made_up(claim.chosen))
        numbers.append(claim.number)
    return numbers


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    """Both begin at the same moment, on a storage that is not there yet."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "here\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        own = share_of(tmp_path)
        others = [int(word) for word in other.communicate()[0].split()]
    assert sorted(own + others) == list(range(8))
    assert own and others, "each had its share"
    found = trials_of(tmp_path, 8).all()
    assert [t.number for t in found] == list(range(8)) and all(t.state.name == "COMPLETE" for t in found)


def test_another_question_is_another_study(tmp_path: Path) -> None:
    from anneal.search.trials import load_study, open_storage, open_study

    trials_of(tmp_path, 1)
    storage = open_storage(f"sqlite:///{tmp_path}/search.db")
    with pytest.raises(UserError, match=r"search s: a: found 2, but the study began with 1; allowed: .*--fresh"):
        open_study(
            storage,
            "s",
            folder=tmp_path / "s",
            metric="val/accuracy",
            sampler="TPE",
            pruning="none",
            epochs=4,
            seed=0,
            asked={"a": 2},
        )
    with pytest.raises(UserError, match=r"no study 't'.*there are s"):
        load_study(storage, "t")


def test_a_loss_is_made_small_and_an_accuracy_large(tmp_path: Path) -> None:
    """And the pruners leave five trials, and a tenth of a run, alone, as docs/search.md says."""
    from optuna.pruners import HyperbandPruner, MedianPruner

    from anneal.search.trials import open_storage, open_study

    storage = open_storage(f"sqlite:///{tmp_path}/search.db")
    options: dict[str, Any] = {"folder": tmp_path / "s", "sampler": "random", "epochs": 30, "seed": 0, "asked": {}}
    loss = open_study(storage, "loss", metric="val/loss", pruning="median", **options)
    accuracy = open_study(storage, "accuracy", metric="val/accuracy", pruning="hyperband", **options)
    assert (loss.direction.name, accuracy.direction.name) == ("MINIMIZE", "MAXIMIZE")
    assert isinstance(loss.pruner, MedianPruner) and isinstance(accuracy.pruner, HyperbandPruner)
    assert (loss.pruner._n_startup_trials, loss.pruner._n_warmup_steps) == (5, 3)


def test_a_study_that_another_process_deleted(tmp_path: Path) -> None:
    from anneal.search.trials import forget, open_storage

    trials = trials_of(tmp_path, 2)
    claim = trials.claim()
    forget(open_storage(f"sqlite:///{tmp_path}/search.db"), "s", tmp_path / "of another machine")
    for call in (lambda: trials.report(claim, 1, 0.5), lambda: trials.frozen(claim.trial), trials.claim, trials.all):
        with pytest.raises(UserError, match="the study is gone: another process deleted it, with --fresh"):
            call()


@pytest.mark.parametrize(
    ("uri", "fault"),
    [
        ("sqlite:///:memory:", "allowed: sqlite:///FILE"),
        ("sqlite:////dev/null/folder/search.db", "search.storage: cannot open sqlite:////dev/null/folder"),
        (
            "postgresql+nodriver://me:verysecret@host/db",
            r"search\.storage: cannot open postgresql\+nodriver://me:\*\*\*@host",
        ),
        ("no address", "search.storage: cannot open"),
    ],
)
def test_a_storage_that_cannot_be_opened(uri: str, fault: str) -> None:
    from anneal.search.trials import open_storage

    with pytest.raises(UserError, match=fault) as caught:
        open_storage(uri)
    assert "verysecret" not in str(caught.value)


# ---- real trials ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Processed digits, a few of them, whose test split cannot be read, and a policy that changes nothing."""
    from anneal.augment import compile_policy, policy_to_json

    root = tmp_path_factory.mktemp("data")
    quick = base_recipe(VALUES, {}, current=False)
    with fresh_folder(root / "processed") as folder:
        build_store(
            open_source(str(ROOT / "data/digits.zip"), "auto"),
            folder,
            seed=0,
            num_workers=0,
            **quick["preprocess"],
            **quick["split"],
            **{name: quick["data"][name] for name in ("max_rejected", "max_pixels")},
            limit=LIMIT,
        )
    for file in (root / "processed/test").iterdir():
        file.write_bytes(b"damaged")
    (root / "augmented").mkdir()
    text = policy_to_json(compile_policy("none", height=8, width=8, channels=1))
    (root / "augmented/policy.json").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def project(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a recipe of a few quick epochs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    shutil.copy(ROOT / "params.schema.json", tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / ".dvc").mkdir()
    quick = base_recipe(VALUES, {}, current=False)
    values = replaced(
        {name: quick[name] for name in VALUES},
        {
            "data.limit": LIMIT,
            "model": {**VALUES["model"], "name": "mlp", "norm": {**VALUES["model"]["norm"], "name": "none"}},
            "init.zero_last": False,
            "trainer.epochs": 3,
            "ensemble": {**VALUES["ensemble"], "members": {"a": {"seed": 0}}},
            "evaluate.tta.views": ["identity"],
            "hardware.checkpoint_every": "4 steps",
            "search": section(trials=3, pruner="none", ranges=RANGES),
        },
    )
    write_params(values)
    return tmp_path


def write_params(values: dict[str, Any]) -> None:
    from ruamel.yaml import YAML

    with open("params.yaml", "w", encoding="utf-8") as file:
        YAML().dump(values, file)


def change(**changes: Any) -> None:
    values = params.read_yaml("params.yaml")
    write_params(replaced(values, {name.replace("__", "."): value for name, value in changes.items()}))


def stored(study: str = "default") -> list[Any]:
    from anneal.search.trials import counted, load_study, open_storage

    return counted(load_study(open_storage("sqlite:///.anneal/search.db"), study).get_trials())


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process, for the seconds that another takes to begin."""
    from anneal.search.worker import train

    monkeypatch.setattr(run.Worker, "train", lambda _, job, report: train(job, report))


@pytest.fixture
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave MLflow out: what its process costs, another test pays."""

    @contextmanager
    def study_run(*_: Any, **__: Any) -> Iterator[tracking.Run]:
        yield tracking.Run()

    monkeypatch.setattr(tracking, "study_run", study_run)


def undisturbed(trial: Any, folder: Path) -> list[float]:
    """Train the values of a trial again, in this process and in one go, and return its figures by epoch."""
    from anneal.search.worker import train

    _, _, base = plan(params.load())
    chosen = trial.user_attrs["chosen"]
    job = {
        "number": trial.number,
        "folder": str(folder),
        "recipe": replaced(base, chosen),
        "store": "data/processed",
        "augmented": "data/augmented",
        "policy": "augment.policy" in chosen,
    }
    answer = train(job, lambda *_: False)
    assert answer["end"] == "complete"
    return [epoch["val/accuracy"] for epoch in answer["epochs"]]


@pytest.mark.usefixtures("untracked")
def test_stopped_resumed_and_written(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from anneal.search.worker import train

    def stopped(_: Any, job: dict[str, Any], report: Any) -> dict[str, Any]:
        """Train in this process, up to the second epoch of trial 1."""

        def reported(epoch: int, figures: Mapping[str, float]) -> bool:
            if (job["number"], epoch) == (1, 2):
                raise run.Stopped("the training of trial 1 was stopped")
            return bool(report(epoch, figures))

        return train(job, reported)

    with monkeypatch.context() as patched:
        patched.setattr(run.Worker, "train", stopped)
        with pytest.raises(UserError, match=r"trial 1 was stopped; `anneal search` goes on from its checkpoint"):
            cli.main(["search"])
    left = stored()[1]
    assert left.state.name == "RUNNING" and list(left.intermediate_values) == [1]
    monkeypatch.setattr(run.Worker, "train", lambda _, job, report: train(job, report))
    assert cli.main(["search"]) == 0
    out, err = capfd.readouterr()
    assert "trial 1: taken up again where it was stopped" in err
    assert "resuming train@trial 1 at " in err, "from a checkpoint"
    assert "trial 2: val/accuracy 0." in err and "best 0." in err and "left" in err
    found = stored()
    assert [(t.number, t.state.name) for t in found] == [(i, "COMPLETE") for i in range(3)]
    resumed = found[1]
    assert resumed.params == left.params
    again = undisturbed(resumed, tmp_path_factory.mktemp("again"))
    assert resumed.intermediate_values == dict(enumerate(again, 1)), "as if it had never been stopped"
    assert resumed.values == [max(again)]
    assert not list((project / ".anneal/search/default").glob("trial-*")), "what only a resumed trial needs is gone"

    folder = project / "studies/search/default"
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert [row["state"] for row in rows(folder / "trials.csv")] == ["COMPLETE"] * 3
    assert len(rows(folder / "curves.csv")) == 9
    best = max(found, key=lambda t: (t.values[0], -t.user_attrs["other"], -t.number))
    text = (project / "recipes/default.yaml").read_text(encoding="utf-8")
    assert text.startswith(
        f"# Found by anneal search default: the best of 3 trials on digits.zip, val/accuracy {best.values[0]:.4f}"
    )
    assert "anneal recipe default" in out and f"{best.values[0]:.4f}" in out
    assert "default" in recipe.shipped()
    asked = shared(*plan(params.load()))
    recipe.apply("default")
    values = params.load()
    assert shared(*plan(values)) == asked, "its keys are those that are searched, so that the study can go on"
    for name, value in best.user_attrs["chosen"].items():
        assert params.flatten(values).get(name, value) == value
    assert f"{best.values[0]:.4f}" in "\n".join(run.show(values))


@pytest.mark.long
@pytest.mark.usefixtures("in_process")
def test_killed_and_tracked(project: Path, tmp_path_factory: pytest.TempPathFactory, capfd: Any) -> None:
    """A real search with kill -9 in the middle of a trial, gone on with, and what MLflow has of it."""
    change(trainer__epochs=12)  # long enough to be hit in the middle
    command = [sys.executable, "-m", "anneal.cli", "search"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    states = project / ".anneal/search/default"
    end = time.monotonic() + 120
    while not list(states.glob("trial-*/state/*.ckpt")) and first.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    said = first.communicate()[1].decode()
    assert "Traceback" not in said and "xperimental" not in said
    (left,) = [trial for trial in stored() if trial.state.name == "RUNNING"]

    assert cli.main(["search"]) == 0
    err = capfd.readouterr().err
    assert f"trial {left.number}: taken up again where it was stopped" in err
    assert f"resuming train@trial {left.number} at " in err, "from a checkpoint"
    found = stored()
    assert [(t.number, t.state.name) for t in found] == [(i, "COMPLETE") for i in range(3)]
    resumed = found[left.number]
    assert left.intermediate_values.items() <= resumed.intermediate_values.items()
    again = undisturbed(resumed, tmp_path_factory.mktemp("again"))
    assert resumed.intermediate_values == dict(enumerate(again, 1)), "as if it had never been killed"

    parent, children = mlflow_runs(project)
    best = max(found, key=lambda t: (t.values[0], -t.user_attrs["other"], -t.number))
    assert parent.info.run_name == "search default" and parent.info.status == "FINISHED"
    assert parent.data.metrics["best/val/accuracy"] == best.values[0]
    assert sorted(child.info.run_name for child in children) == ["trial 0", "trial 1", "trial 2"], "once each"
    for child in children:
        trial = found[int(child.data.tags["trial"])]
        assert child.data.tags["state"] == "COMPLETE"
        assert child.data.params["optimizer.name"] == trial.user_attrs["chosen"]["optimizer.name"]
        assert child.data.metrics["best/val/accuracy"] == trial.values[0]
        assert {"val/accuracy", "val/loss"} <= child.data.metrics.keys()


def mlflow_runs(project: Path) -> tuple[Any, list[Any]]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    (parent,) = [run for run in runs if "study.key" in run.data.tags]
    return parent, [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


@pytest.mark.usefixtures("in_process", "untracked")
def test_diverged_pruned_and_failed(project: Path, capfd: Any) -> None:
    change(
        search__ranges={"optimizer.SGD.lr": [0.05, 1e30], "batch.microbatch": [16, 24]},
        search__sampler="random",
        search__trials=8,
        trainer__epochs=1,
    )
    assert cli.main(["search"]) == 0
    err = capfd.readouterr().err
    found = stored()
    kinds = set()
    for trial in found:
        chosen, state = trial.user_attrs["chosen"], trial.state.name
        if chosen["batch.microbatch"] == 24:
            assert state == "FAIL" and "batch.microbatch: found 24" in trial.user_attrs["reason"]
        elif chosen["optimizer.SGD.lr"] == 1e30:
            assert state == "PRUNED" and trial.user_attrs["reason"].startswith("training diverged")
        else:
            assert state == "COMPLETE"
        kinds.add(state)
    assert kinds == {"FAIL", "PRUNED", "COMPLETE"}
    assert "failed: batch.microbatch: found 24" in err and "pruned: training diverged" in err
    assert recipe.shipped()["default"].startswith("Found by anneal search")

    change(search__ranges={"batch.microbatch": [24, 20]}, search__study="other", search__trials=20)
    with pytest.raises(UserError, match=r"10 trials in a row failed alike: batch\.microbatch: found "):
        cli.main(["search"])
    assert len(stored("other")) == 10


@pytest.mark.usefixtures("untracked")
def test_a_value_that_is_no_number_is_a_failure(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(search__metric="val/loss")
    epoch = {"val/loss": 0.5, "val/accuracy": 0.5, "val_average/loss": math.nan, "val_average/accuracy": 0.1}
    answer = {"end": "complete", "best_epoch": 1, "weights": "ema", "epochs": [{"epoch": 1, "step": 9, **epoch}]}
    monkeypatch.setattr(run.Worker, "train", lambda *_: answer)
    with pytest.raises(UserError, match="3 trials in a row failed alike: val/loss is nan in epoch 1"):
        cli.main(["search"])
    assert [trial.state.name for trial in stored()] == ["FAIL"] * 3


def test_what_is_refused_before_anything_runs(project: Path) -> None:
    (project / "recipes/mine.yaml").write_text("# by hand\noptimizer: {name: SGD}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"recipes/mine\.yaml: found a recipe that is not of this search.*--force"):
        cli.main(["search", "--study", "mine"])
    with pytest.raises(UserError, match=r"search\.study"):
        cli.main(["search", "--study", "../x"])
    with pytest.raises(UserError, match=r"search\.trials: found 0, allowed: a whole number >= 1"):
        cli.main(["search", "--trials", "0"])
    with pytest.raises(UserError, match=r"--jobs: found 0"):
        cli.main(["search", "--jobs", "0"])
    with pytest.raises(UserError, match="no study 'default'"):
        cli.main(["search", "--show"])
    lock = {"stages": {"augment": {"params": {"params.yaml": {"seed": 0, "augment": {"policy": "strong"}}}}}}
    (project / "dvc.lock").write_text(json.dumps(lock), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"data/augmented: made with another augment than params\.yaml has; run `dvc repro"
    ):
        cli.main(["search"])
    (project / "dvc.lock").unlink()
    (project / "data/augmented/policy.json").unlink()
    with pytest.raises(UserError, match="run `dvc repro augment` first"):
        cli.main(["search"])
    assert not (project / "studies").exists()
    assert (project / "recipes/mine.yaml").read_text(encoding="utf-8").startswith("# by hand")


@pytest.mark.long
def test_two_searches_at_once(project: Path) -> None:
    """Two real searches and two jobs in one of them, with pruning: every trial once, all of them complete or pruned."""
    change(search__trials=9, search__pruner="median")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    commands = [[], ["--jobs", "2"]]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "anneal.cli", "search", *more], stderr=subprocess.PIPE, text=True, env=environment
        )
        for more in commands
    ]
    for process in both:
        err = process.communicate()[1]
        assert process.returncode == 0, err
    found = stored()
    assert [t.number for t in found] == list(range(9))
    assert {t.state.name for t in found} <= {"COMPLETE", "PRUNED"}
    _, children = mlflow_runs(project)
    assert len(children) == 9
    assert len(rows(project / "studies/search/default/trials.csv")) == 9


def test_a_checkpoint_is_one_of_the_same_code() -> None:
    from anneal.search.worker import CODE

    deps = params.read_yaml(ROOT / "dvc.yaml")["stages"]["train"]["do"]["deps"]
    assert {f"src/anneal/{name}" for name in CODE} == {dep for dep in deps if dep.startswith("src/")}


def test_the_command_has_the_options_of_the_page() -> None:
    page = (ROOT / "docs/search.md").read_text(encoding="utf-8")
    parser = cli._parser()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    options = {name for action in commands.choices["search"]._actions for name in action.option_strings} - {
        "-h",
        "--help",
    }
    assert options == {
        word.split()[0] for word in page.split("`") if word.startswith("--") and word.split()[0] in options
    }


def test_suggested_values_are_rounded_and_conditional() -> None:
    import optuna

    keys = space({name: RANGES[name] for name in RANGES if name.startswith("optimizer")})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        chosen = suggest(keys, study.ask(), VALUES)
        block = chosen["optimizer.name"]
        assert set(chosen) == {"optimizer.name", f"optimizer.{block}.lr"}
        lr = chosen[f"optimizer.{block}.lr"]
        assert lr == float(f"{lr:.4g}") and 1e-3 <= lr <= 0.3
