"""Studies: every grid is valid and independent of params.yaml, and a tiny one runs end to end, is resumed, repeats."""

from __future__ import annotations

import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from anneal import cli, params
from anneal.conflicts import check_recipe
from anneal.params import ParamsError, UserError
from anneal.recipe import validate
from anneal.reporting.lines import Line, draw_panels
from anneal.studies import catalog
from anneal.studies.base import base_recipe
from anneal.studies.catalog import DIGITS_TRAIN, STUDIES
from anneal.studies.rates import exponents
from anneal.studies.run import run_study
from anneal.studies.study import Point, Result, Study, against, differs

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = ("model", "init", "optimizer", "schedule", "batch", "regularization", "trainer", "preprocess", "hardware")

every_study = pytest.mark.parametrize("study", STUDIES.values(), ids=list(STUDIES))


def values() -> dict[str, Any]:
    return params.read_yaml(ROOT / "params.yaml")


def points_of(study: Study, recipe: Mapping[str, Any], num_train: int = DIGITS_TRAIN) -> list[Point]:
    return study.grid(recipe, num_train)


# ---- every study, without training ----------------------------------------------------------------------------------


@every_study
@pytest.mark.parametrize("current", [False, True])
def test_every_point_is_a_valid_recipe(study: Study, current: bool) -> None:
    base = base_recipe(values(), study.base, current=current)
    points = points_of(study, base)
    assert len({point.label for point in points}) == len(points) > 3
    for point in points:
        checked = validate(params.merge(base, point.overrides))
        check_recipe(num_train=DIGITS_TRAIN, **{name: getattr(checked, name) for name in TOGETHER})
        assert checked.evaluate.splits == ["val"]
        assert checked.hardware.devices == 1


def changed_leaves(value: Any) -> Any:
    """Change every leaf, to something that no longer validates."""
    if isinstance(value, Mapping) and value:
        return {key: changed_leaves(item) for key, item in value.items()}
    return ["changed", value]


@every_study
def test_a_study_on_digits_does_not_depend_on_the_recipe(study: Study) -> None:
    """Whatever params.yaml says: what may differ are blocks that no point chooses, and what has no part in a run."""
    base = base_recipe(values(), study.base, current=False)
    other = base_recipe(changed_leaves(values()), study.base, current=False)
    recipes = [params.merge(base, point.overrides) for point in points_of(study, base)]
    chosen = {
        "model": {"convnet"},
        "model.norm": {recipe["model"]["norm"]["name"] for recipe in recipes},
        **{name: {recipe[name]["name"] for recipe in recipes} for name in ("init", "optimizer", "schedule")},
    }
    apart = ("evaluate.", "registry.", "tracking.", "ensemble.combine")
    mine, theirs = params.flatten(base), params.flatten(other)
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) == theirs.get(key) or key.startswith(apart):
            continue
        *parents, block = key.split(".")[: 3 if key.startswith("model.norm.") else 2]
        section = ".".join(parents)
        assert section in chosen and block not in chosen[section] and block != "name", (
            f"{key} has a part in study {study.name}, and is params.yaml's: give it in src/anneal/studies/base.py"
        )


def made_up(study: Study, seeds: int) -> list[Result]:
    """Results as a study's functions get them: one point diverged at once, one later, all others learned."""
    base = base_recipe(values(), study.base, current=False)
    results = []
    for i, point in enumerate(points_of(study, base)):
        for seed in range(seeds):
            end = 0.1 + 0.01 * ((7 * i + seed) % 5)
            epochs = [
                {
                    "epoch": n,
                    "step": 10 * n,
                    "train/loss": end + 1 / n,
                    "val/loss": end + 1.1 / n,
                    "val/accuracy": 0.9,
                    "noise_scale": 5.0 + n,
                    "noise_scale/trace": 6.0,
                    "noise_scale/gradient_sq": 1.0 - (n % 2),
                }
                for n in (1, 2)
            ]
            steps = [(n, 0.1, 2.3 - 0.1 * n - 0.001 * i) for n in range(1, 20)]
            if i == 1:
                results.append(Result(point, seed, [], [], 10, "training diverged: the loss is nan"))
            elif i == 2:
                results.append(Result(point, seed, epochs[:1], steps, 10, "training diverged: the loss is inf"))
            else:
                results.append(Result(point, seed, epochs, steps, 10, "", 1000.0 + i))
    return results


@every_study
def test_every_study_draws_and_concludes_whatever_diverged(study: Study, tmp_path: Path) -> None:
    results = made_up(study, 2)
    panels = study.draw(results)
    draw_panels(panels, tmp_path / "figure.png", study.question)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert any(line.label for panel in panels for line in panel.lines)
    assert len(study.conclude(results)) > 3
    alone = made_up(study, 1)
    assert study.draw(alone)
    for line in study.conclude(alone):
        assert "higher by" not in line and "lower by" not in line, "one run shows no difference"


def test_digits_train_is_what_the_split_leaves() -> None:
    from anneal.preprocess import planned_classes
    from anneal.sources import open_source

    base = base_recipe(values(), {}, current=False)
    source = open_source(str(ROOT / base["data"]["path"]), "auto")
    planned = planned_classes(source, val=base["split"]["val"], test=base["split"]["test"], limit=None)
    assert sum(planned["train"].values()) == DIGITS_TRAIN


def test_every_study_is_estimated_well_below_five_minutes() -> None:
    for study in STUDIES.values():
        runs, seconds = catalog.estimate(study, values(), seeds=3)
        assert runs >= 12
        assert seconds <= 150, study.name


def test_points_that_come_to_the_same_recipe_share_a_run() -> None:
    base = base_recipe(values(), STUDIES["momentum"].base, current=False)
    points = points_of(STUDIES["momentum"], base)
    assert len(points) == 10
    assert len(catalog.distinct(base, points)) == 8  # momentum 0.9, with Nesterov and without, at both kinds of rate


# ---- what is said of results ----------------------------------------------------------------------------------------


def result(lr: float, seed: int, losses: list[float], stopped: str = "", peak: float = 0.0) -> Result:
    epochs = [{"epoch": i + 1, "step": i + 1, "train/loss": x, "val/loss": x} for i, x in enumerate(losses)]
    steps = [(1, lr, 2.3), (2, lr, peak), *((i + 3, lr, x) for i, x in enumerate(losses))]
    return Result(Point(str(lr), {}, {"lr": lr}), seed, epochs, steps, 10, stopped)


def test_diverged() -> None:
    assert result(1, 0, [], "training diverged: the loss is nan").diverged
    assert result(1, 0, [2.4, 2.4], peak=3.5).diverged
    assert not result(1, 0, [2.29, 2.29], peak=2.31).diverged, "a rate that is too low"
    assert not result(1, 0, [1.0, 0.5], peak=3.5).diverged, "it came back"
    assert result(1, 0, [0.5], "training diverged").final("val/loss") == math.inf


def test_a_line_over_rates_stands_still_where_runs_diverged() -> None:
    results = [result(0.1, seed, [0.2 + 0.1 * seed]) for seed in range(3)]
    results += [result(10.0, seed, [], "training diverged") for seed in range(3)]
    line = against(results, "lr", lambda r: r.final("val/loss"), ceiling=3.0)
    assert line == Line("", [0.1, 10.0], [pytest.approx(0.3), 3.0], [0.2, 3.0], [0.4, 3.0], style=".-")


def test_differs_needs_two_pairs_that_ended() -> None:
    assert "no difference shown" in differs({0: 1.0}, {0: 0.1})
    assert "no difference shown" in differs({0: math.inf, 1: 1.0}, {0: 0.1, 1: 0.1})
    assert differs({0: 0.1, 1: 0.1}, {0: 1.0, 1: 1.0}) == "lower by 0.900 (95 % interval 0.900 to 0.900)"


def test_the_best_rates_follow_a_power_of_the_batch() -> None:
    best = {(size, 0): 0.01 * size**0.5 for size in (8, 32, 128)}
    assert exponents(best) == {0: pytest.approx(0.5)}


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the shipped digits, as the working directory."""
    for name in ("params.yaml", "params.schema.json", "recipes", "data/digits.zip"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def anneal(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "anneal.cli", *arguments],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_speed(path: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows(path)]


def test_list(project: Path) -> None:
    out = anneal(project, "study").stdout
    for name, study in STUDIES.items():
        assert f"  {name} " in out
        assert study.question in out
    assert out.count("runs, about") == len(STUDIES)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["lr-by-optimiser"], "did you mean 'lr-by-optimizer'?"),
        (["lr", "--seeds", "0"], "--seeds: found 0, allowed: a whole number >= 1"),
        (["lr", "--current"], "run `dvc repro augment` first"),
    ],
)
def test_refused_in_one_line(project: Path, arguments: list[str], fault: str) -> None:
    done = anneal(project, "study", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert fault in done.stderr
    assert not (project / "studies").exists()


def test_without_digits(project: Path) -> None:
    (project / "data/digits.zip").unlink()
    with pytest.raises(UserError, match=r"git checkout data/digits\.zip"):
        run_study(STUDIES["lr"], values())


def test_current_needs_a_number_as_rate() -> None:
    found = params.merge(values(), {"optimizer": {"SGD": {"lr": "auto"}}})
    with pytest.raises(UserError, match=r"optimizer\.SGD\.lr: found auto, allowed for a study: a number"):
        base_recipe(found, {}, current=True)


def test_current_keeps_the_recipe_but_for_its_length() -> None:
    found = params.merge(values(), {"regularization": {"label_smoothing": 0.3}, "hardware": {"devices": 4}})
    base = base_recipe(found, STUDIES["lr"].base, current=True)
    assert base["regularization"]["label_smoothing"] == 0.3
    assert base["model"] == found["model"]
    assert base["trainer"]["epochs"] < found["trainer"]["epochs"]
    assert base["hardware"]["devices"] == 1


def test_a_bad_grid_is_refused_before_anything_runs(project: Path) -> None:
    broken = Study("broken", "?", lambda *_: [Point("x", {"batch": {"size": 4096, "microbatch": 4096}})], list, list)  # type: ignore[arg-type, list-item]
    with pytest.raises(ParamsError, match=r"batch.size: found 4096"):
        run_study(broken, values())
    assert not (project / "studies/broken").exists()


def mlflow_runs(project: Path) -> tuple[list[Any], list[Any]]:
    """Return the studies' runs and the runs below them."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = list(client.search_runs(experiments, order_by=["attributes.start_time ASC"]))
    return (
        [run for run in found if "study.key" in run.data.tags],
        [run for run in found if "mlflow.parentRunId" in run.data.tags],
    )


def test_killed_resumed_repeated_and_untracked(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project / "studies/lr"
    command = [sys.executable, "-m", "anneal.cli", "study", "lr", "--seeds", "1"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not list(folder.glob("runs/*.json")) and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = {path.name: path.read_bytes() for path in folder.glob("runs/*.json")}
    assert 1 <= len(kept) < 6
    assert not (folder / "results.csv").exists()

    cli.main(["study", "lr", "--seeds", "1"])
    out, err = capsys.readouterr()
    assert f"lr: {len(kept)} runs are there from before" in err
    assert f"lr: {6 - len(kept)} runs, about" in err
    assert "epoch" not in err, "what a run says of itself"
    assert all((folder / "runs" / name).read_bytes() == content for name, content in kept.items())
    assert "- rate 0.03: training loss 0." in out
    assert "1 of 1 diverged" in out
    table = without_speed(folder / "results.csv")
    assert [row["point"] for row in table] == [f"lr {lr}" for lr in ("0.0003", "0.003", "0.03", "0.15", "0.3", "3")]
    assert [row["diverged"] for row in table][:4] == ["false"] * 4
    assert table[-1]["diverged"] == "true"
    assert float(table[2]["val_loss"]) < 0.5 < float(table[0]["val_loss"])
    curves = rows(folder / "curves.csv")
    assert {row["epoch"] for row in curves} == {str(epoch) for epoch in range(1, 9)}
    figure = (folder / "figure.png").read_bytes()
    assert figure[:4] == b"\x89PNG"
    assert "lowest mean validation loss at rate 0." in (folder / "conclusions.txt").read_text(encoding="utf-8")
    for name in ("data/processed", "data/augmented", "models", "reports"):
        assert not (project / name).exists()

    (parent,), children = mlflow_runs(project)
    assert parent.info.run_name == "study lr"
    assert parent.info.status == "FINISHED"
    assert {"stage": "study", "study": "lr"}.items() <= parent.data.tags.items()
    assert "lowest mean validation loss" in parent.data.tags["mlflow.note.content"]
    assert parent.data.params["model.name"] == "convnet"
    assert parent.data.metrics["study/runs"] == 6
    names = {path.name for path in (project / "mlruns").rglob("*") if path.is_file()}
    assert {"figure.png", "results.csv", "curves.csv", "conclusions.txt"} <= names
    assert sorted(run.info.run_name for run in children) == sorted(f"{row['point']} · seed 0" for row in table)
    for run in children:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert set(run.data.params) == {"seed", "optimizer.SGD.lr"}
        row = next(row for row in table if row["point"] == run.data.tags["point"])
        assert run.data.metrics["val/loss"] == float(row["val_loss"])
        assert "step/loss" in run.data.metrics

    cli.main(["study", "lr", "--seeds", "1"])
    assert "6 runs are there from before" in capsys.readouterr().err
    assert [len(runs) for runs in mlflow_runs(project)] == [1, 6], "the same study is one run, however often"
    assert (folder / "figure.png").read_bytes() == figure

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    cli.main(["study", "lr", "--seeds", "1", "--fresh"])
    assert "from before" not in capsys.readouterr().err
    assert without_speed(folder / "results.csv") == table
    assert rows(folder / "curves.csv") == curves
    assert (folder / "figure.png").read_bytes() == figure
