"""Which trainings a plan needs, what of them is there, and what a checkout for an experiment holds."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from anneal import params
from anneal.experiments import checkout, job, plan, run
from anneal.experiments.plan import Inputs, RunCache, make_plan, recipe_and_seeds, with_members
from anneal.params import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """params.yaml as shipped."""
    return params.load(ROOT / "params.yaml", ROOT / "params.schema.json")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with the pipeline's files, one commit and a dvc.lock; small modules stand for the code."""
    root = tmp_path / "repository"
    for name in ("dvc.yaml", "params.yaml", "data/digits.zip", ".dvcignore"):
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (root / ".gitignore").write_text("/.anneal/\n/.dvc/cache/\n/.dvc/config.local\n")
    stages = YAML(typ="safe").load((root / "dvc.yaml").read_text())["stages"]
    for block in stages.values():
        for dep in block.get("do", block)["deps"]:
            path = root / dep
            if dep.startswith(("src/", "stages/")) and not path.exists():
                path = path if path.suffix else path / "module.py"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"# {dep}\n")
    (root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        subprocess.run(["git", *identity, *command], cwd=root, check=True)
    monkeypatch.chdir(root)
    return root


# ---- seeds ----------------------------------------------------------------------------------------------------------


def test_the_recipes_own_members_come_first(values: dict[str, Any]) -> None:
    base, members = recipe_and_seeds(values, 2)
    assert base == values and members == {"a": {"seed": 0}, "b": {"seed": 1}}
    assert list(recipe_and_seeds(values, 5)[1].items())[3:] == [("s3", {"seed": 3}), ("s4", {"seed": 4})]
    alone = values | {"ensemble": {**values["ensemble"], "members": {"x": None, "s0": {"seed": 7}}}}
    assert recipe_and_seeds(alone, 4)[1] == {"x": None, "s0": {"seed": 7}, "s1": {"seed": 1}, "s2": {"seed": 2}}


def test_members_of_different_recipes_are_refused_but_for_one_of_them(values: dict[str, Any]) -> None:
    members = {"a": {"seed": 0}, "b": {"seed": 4, "optimizer": {"name": "AdamW"}}}
    mixed = values | {"ensemble": {**values["ensemble"], "members": members}}
    with pytest.raises(UserError, match=r"ensemble.members.b: changes optimizer beside the seed.*--member b"):
        recipe_and_seeds(mixed, 2)
    base, chosen = recipe_and_seeds(mixed, 2, "b")
    assert base["optimizer"]["name"] == "AdamW" and base["optimizer"]["SGD"] == values["optimizer"]["SGD"]
    assert base["seed"] == values["seed"]  # which the split is drawn by
    assert chosen == {"b": {"seed": 4}, "s0": {"seed": 0}}
    with pytest.raises(UserError, match="no member 'c'"):
        recipe_and_seeds(mixed, 2, "c")
    with pytest.raises(UserError, match=r"^seeds: found 0"):
        recipe_and_seeds(values, 0)


def test_an_experiment_is_not_shown_test_and_registers_nothing(values: dict[str, Any]) -> None:
    from anneal import recipe

    changed = params.merge(values, {"registry": {"name": "mine"}, "evaluate": {"tta": {"select": "greedy"}}})
    found = with_members(changed, {"a": {"seed": 0}})
    assert found["evaluate"]["splits"] == ["val"] and found["evaluate"]["tta"]["select"] == "none"
    assert found["registry"]["name"] is None and found["ensemble"]["members"] == {"a": {"seed": 0}}
    recipe.validate(found)
    assert set(plan.CHEAP) <= set(values["evaluate"])


# ---- plans ----------------------------------------------------------------------------------------------------------


def test_what_has_a_result_is_not_planned_again(repository: Path, values: dict[str, Any]) -> None:
    _, members = recipe_and_seeds(values, 2)
    other = params.merge(values, {"regularization": {"label_smoothing": 0.0}})
    variants = {"full recipe": values, "no label smoothing": other}
    first = make_plan(variants, members)
    assert [one.variant for one in first.todo] == list(variants) and first.trainings == 4
    assert len({key for keys in first.keys.values() for key in keys.values()}) == 4
    assert first.seeds == {"a": 0, "b": 1}

    done = first.keys["full recipe"]["a"]
    job.keep(repository, done, {"plain": np.zeros(1)}, {"name": "x"})
    second = make_plan(variants, members)
    assert second.keys == first.keys and second.trainings == 3
    assert list(second.todo[0].keys) == ["b"]
    assert set(second.todo[0].values["ensemble"]["members"]) == {"b"}

    # More seeds add theirs and leave the others as they are.
    more = make_plan(variants, recipe_and_seeds(values, 3)[1])
    assert {**more.keys["full recipe"]} == {**first.keys["full recipe"], "c": more.keys["full recipe"]["c"]}
    # What changes no result changes no key; code and data do.
    machine = params.merge(values, {"hardware": {"num_workers": 2}, "evaluate": {"bootstrap": 500}})
    assert make_plan({"full recipe": machine}, members).keys["full recipe"] == first.keys["full recipe"]
    (repository / "stages/train.py").write_text("# another\n")
    assert make_plan(variants, members).trainings == 4


def test_seeds_are_shared_out_where_there_are_fewer_variants_than_jobs(
    repository: Path, values: dict[str, Any]
) -> None:
    _, members = recipe_and_seeds(values, 5)
    found = make_plan({"full recipe": values}, members, jobs=2)
    assert [list(one.keys) for one in found.todo] == [["a", "c", "s4"], ["b", "s3"]]
    assert len({one.name for one in found.todo}) == 2
    both = make_plan({"full recipe": values, "x": params.merge(values, {"trainer": {"epochs": 2}})}, members, jobs=2)
    assert [len(one.keys) for one in both.todo] == [5, 5]
    # What has ended does not rename the others, whose checkouts hold half a training.
    for key in found.todo[1].keys.values():
        job.keep(repository, key, {"plain": np.zeros(1)}, {})
    assert [one.name for one in make_plan({"full recipe": values}, members, jobs=2).todo] == [found.todo[0].name]
    for key in both.todo[0].keys.values():
        job.keep(repository, key, {"plain": np.zeros(1)}, {})
    again = make_plan({"full recipe": values, "x": params.merge(values, {"trainer": {"epochs": 2}})}, members, jobs=2)
    assert [one.name for one in again.todo] == [both.todo[1].name]


def test_the_run_cache_is_read_as_dvc_writes_it(repository: Path, values: dict[str, Any]) -> None:
    inputs = Inputs(repository)
    folder = repository / ".dvc/cache"
    given = with_members(values, {"a": {"seed": 0}})

    def entry(stage: str, member: str = "", **written: str) -> None:
        block = inputs.stages[stage]
        made = {"data/processed": "1100", "data/augmented": "2200"}
        deps = [{"path": path, "md5": md5 or made[path]} for path, md5 in inputs.deps(stage, given, member).items()]
        read = {
            name.replace("${key}", member): plan.at(given, *name.replace("${key}", member).split("."))
            for name in block["params"]
        }
        outs = [{"path": path, "md5": md5} for path, md5 in written.items()]
        path = folder / "runs" / "ab" / f"{stage}{member}" / "0123"
        path.parent.mkdir(parents=True)
        with path.open("w") as file:
            said = {
                "cmd": block["cmd"].replace("${key}", member),
                "deps": deps,
                "params": {"params.yaml": read},
                "outs": outs,
            }
            YAML().dump(said, file)
        for md5 in written.values():
            (folder / "files/md5" / md5[:2]).mkdir(parents=True, exist_ok=True)
            (folder / "files/md5" / md5[:2] / md5[2:]).write_text("")

    def holds(changes: dict[str, Any] | None = None, member: str = "a") -> bool:
        changed = with_members(params.merge(values, changes or {}), {member: {"seed": 0}})
        return RunCache(plan.cache_folder(repository), inputs).holds(changed, member)

    assert not holds()
    entry("preprocess", **{"data/processed": "1100"})
    entry("augment", **{"data/augmented": "2200"})
    assert not holds()
    entry("train", "a", **{"models/a": "3300"})
    assert holds()
    assert not holds({"regularization": {"label_smoothing": 0.0}})
    assert not holds({"preprocess": {"normalize": "scale"}})
    assert not holds(member="b")
    assert holds({"evaluate": {"tta": {"views": ["identity", "hflip"]}}})  # read by evaluate alone
    (folder / "files/md5/33/00").unlink()
    assert not holds()


def test_refusals(repository: Path, values: dict[str, Any]) -> None:
    plan.check_repository(values)
    (repository / "src/anneal/new.py").write_text("")
    with pytest.raises(UserError, match=r"src/anneal/new.py: not tracked by git.*git add src/anneal/new.py"):
        plan.check_repository(values)
    (repository / "src/anneal/new.py").unlink()

    def of_data(path: str) -> dict[str, Any]:
        return params.merge(values, {"data": {"path": path}})

    with pytest.raises(UserError, match=r"data.path: found ../pictures, which a checkout.*allowed: an absolute path"):
        plan.check_repository(of_data("../pictures"))
    (repository / "data/mine").mkdir()
    with pytest.raises(
        UserError, match=r"data.path: found data/mine, which neither git nor DVC tracks.*dvc add data/mine"
    ):
        plan.check_repository(of_data("data/mine"))
    (repository / "data/mine.dvc").write_text("outs:\n- path: mine\n")
    plan.check_repository(of_data("data/mine"))
    plan.check_repository(of_data("/somewhere/else"))

    # A folder of which git tracks a part alone: the checkout would have less, and nobody would notice.
    (repository / "data/part").mkdir()
    (repository / "data/part/README.txt").write_text("pictures\n")
    subprocess.run(["git", "add", "-f", "data/part/README.txt"], check=True)
    plan.check_repository(of_data("data/part"))
    (repository / "data/part/a.png").write_text("")
    with pytest.raises(UserError, match=r"data.path: found data/part, of which git does not track data/part/a.png"):
        plan.check_repository(of_data("data/part"))
    (repository / "data/part/sub").mkdir()
    (repository / "data/part/a.png").rename(repository / "data/part/sub/a.png")
    (repository / "data/part/sub.dvc").write_text("outs:\n- path: sub\n")
    subprocess.run(["git", "add", "-f", "data/part/sub.dvc"], check=True)
    plan.check_repository(of_data("data/part"))

    start = params.merge(values, {"model": {"start_from": {"path": "pretrained/a"}}})
    (repository / "pretrained/a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"model.start_from.path: found pretrained/a, which neither git nor DVC"):
        plan.check_repository(start)
    (repository / "pretrained/a.dvc").write_text("outs:\n- path: a\n")
    plan.check_repository(start)
    assert "pretrained/a.dvc" in checkout.files(repository, start)

    (repository / "dvc.lock").unlink()
    with pytest.raises(UserError, match=r"dvc.lock: no such file; train the recipe itself first: make repro"):
        plan.check_repository(values)


def test_a_repository_without_a_commit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    with pytest.raises(UserError, match="no commit yet"):
        plan.check_repository(values)


# ---- checkouts ------------------------------------------------------------------------------------------------------


def test_a_checkout_holds_what_git_tracks_with_the_changes_of_the_workspace(
    repository: Path, values: dict[str, Any]
) -> None:
    (repository / "stages/train.py").write_text("# changed and not committed\n")
    (repository / "notes.txt").write_text("not tracked")
    changed = params.merge(values, {"regularization": {"label_smoothing": 0.0}, "averaging": {"name": "ema"}})
    todo = make_plan({"no label smoothing": changed}, {"a": {"seed": 0}, "s9": {"seed": 9}}).todo[0]
    before = subprocess.run(["git", "status", "--porcelain"], check=True, capture_output=True).stdout
    folder = (plan.FOLDER / todo.name).absolute()
    made = checkout.prepare(todo, folder, repository)
    assert (made / "stages/train.py").read_text() == "# changed and not committed\n"
    assert (made / "data/digits.zip").exists() and (made / "dvc.lock").exists() and not (made / "notes.txt").exists()
    written = params.read_yaml(made / "params.yaml")
    assert written == todo.values
    assert "# of everything random" in (made / "params.yaml").read_text()  # comments stay
    assert f"dir = {repository / '.dvc/cache'}" in (made / ".dvc/config.local").read_text()
    status = subprocess.run(["git", "status", "--porcelain"], cwd=made, check=True, capture_output=True, text=True)
    assert {line[3:] for line in status.stdout.splitlines()} <= {"stages/train.py", "params.yaml", ".dvc/config.local"}
    # The workspace was not touched, and a checkout that is there is gone on with.
    assert subprocess.run(["git", "status", "--porcelain"], check=True, capture_output=True).stdout == before
    (made / "half-trained").write_text("")
    checkout.prepare(todo, folder, repository)
    assert (made / "half-trained").exists()
    # One that was not complete is made anew.
    (folder / checkout.READY).unlink()
    checkout.prepare(todo, folder, repository)
    assert not (made / "half-trained").exists()
    assert json.loads((folder / checkout.READY).read_text())["keys"] == dict(todo.keys)


def test_an_experiment_is_committed_with_files_that_are_new_and_without_the_users_git_settings(
    repository: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "src/anneal/new.py").write_text("# added and not committed\n")
    subprocess.run(["git", "add", "src/anneal/new.py"], check=True)
    secret = repository / ".dvc/config.local"
    secret.write_text("['remote \"s3\"']\n    url = s3://x\n    secret_access_key = hush%\n")
    secret.chmod(0o600)
    hooks = repository.parent / "hooks"
    hooks.mkdir()
    (hooks / "prepare-commit-msg").write_text("#!/bin/sh\nexit 1\n")
    (hooks / "prepare-commit-msg").chmod(0o755)
    settings = {"commit.gpgsign": "true", "gpg.program": "/bin/false", "core.hooksPath": str(hooks)}
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(settings)))
    for i, (key, value) in enumerate(settings.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{i}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{i}", value)

    todo = make_plan({"full recipe": values}, {"a": {"seed": 0}}).todo[0]
    folder = (plan.FOLDER / todo.name).absolute()
    made = checkout.prepare(todo, folder, repository)
    copied = made / ".dvc/config.local"
    assert "secret_access_key = hush%" in copied.read_text() and not copied.stat().st_mode & 0o077
    reference = checkout.save(todo.name, made)
    checkout.fetch(todo.name, made, repository)
    held = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", reference], check=True, capture_output=True, text=True
    )
    assert {"src/anneal/new.py", "params.yaml", "dvc.lock"} <= set(held.stdout.split())
    assert ".dvc/config.local" not in held.stdout


def test_the_cache_is_where_dvc_has_it(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan.cache_folder(repository) == repository / ".dvc/cache"
    everywhere = repository.parent / "settings"
    everywhere.mkdir()
    (everywhere / "config").write_text("[cache]\n    dir = /caches/all\n")
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(everywhere))
    assert plan.cache_folder(repository) == Path("/caches/all")
    (repository / ".dvc/config").write_text("[cache]\n    dir = ../../own\n")
    assert plan.cache_folder(repository) == repository.parent / "own"


def test_one_call_at_a_time(repository: Path, values: dict[str, Any]) -> None:
    """A second one would work in the first one's checkouts, and remove them."""
    found = make_plan({"full recipe": values}, {"a": {"seed": 0}})
    folder = plan.FOLDER / found.todo[0].name
    checkout.prepare(found.todo[0], folder.absolute(), repository)
    plan.FOLDER.mkdir(parents=True, exist_ok=True)
    taken = checkout.claim(plan.FOLDER)
    with pytest.raises(UserError, match="another `anneal ablate` or `anneal seeds` runs in this repository"):
        run.run_plan(found, values, jobs=1, title="ablate")
    assert (folder / checkout.READY).exists()
    run.os.close(taken)


def test_what_ended_after_its_call_was_killed_is_collected(repository: Path, values: dict[str, Any]) -> None:
    members = {"a": {"seed": 0}}
    found = make_plan({"full recipe": values, "x": params.merge(values, {"trainer": {"epochs": 2}})}, members)
    folders = [(plan.FOLDER / one.name).absolute() for one in found.todo]
    for one, folder in zip(found.todo, folders, strict=True):
        checkout.prepare(one, folder, repository)
    checkout.save(found.todo[0].name, folders[0] / "checkout")
    job.keep(repository, found.todo[0].keys["a"], {"plain": np.zeros(1)}, {})
    run.collect_ended()
    assert not folders[0].exists() and folders[1].exists()  # the other one is gone on with
    listed = subprocess.run(["git", "for-each-ref", "refs/exps"], check=True, capture_output=True, text=True).stdout
    assert found.todo[0].name in listed


def test_the_variables_of_an_experiment(repository: Path) -> None:
    found = checkout.environment("x", repository, repository)
    assert found["DVC_ROOT"] == str(repository) and found["DVC_EXP_NAME"] == "x"
    assert len(found["DVC_EXP_BASELINE_REV"]) == 40


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a: 1  # one\nb: {c: 1.0, d: [1, 2]}\n", {"a": 2, "b": {"c": 1.0, "d": [1]}}),
        ("a: 1\nb: {c: 1}\n", {"a": True, "b": {}}),
        ("a: {}\n", {"a": {"b": None}, "c": 1e-5}),
    ],
)
def test_params_are_written_as_they_are_meant(text: str, values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    checkout.write_params(path, values)
    read = params.read_yaml(path)
    assert read == values and type(read["a"]) is type(values["a"])


# ---- progress -------------------------------------------------------------------------------------------------------


def test_the_estimate(repository: Path, values: dict[str, Any]) -> None:
    _, members = recipe_and_seeds(values, 3)
    found = make_plan({"a": values, "b": params.merge(values, {"trainer": {"epochs": 3}})}, members)
    said = run.estimate(found, 2, 60.0)
    assert said == "2 variants x 3 seeds = 6 trainings; 6 to train in 2 experiments, 2 at once: about 3 min"
    assert run.estimate(found, 1, 60.0).endswith("1 at once: about 7 min")
    assert run.estimate(found, 2, None).endswith("how long that takes shows once the first training has ended")
    for key in (key for keys in found.keys.values() for key in keys.values()):
        job.keep(repository, key, {"plain": np.zeros(1)}, {})
    again = make_plan({"a": values, "b": params.merge(values, {"trainer": {"epochs": 3}})}, members)
    assert run.estimate(again, 2, 60.0).endswith("6 of them with results from before: nothing to train")


def test_jobs(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert run.default_jobs(values) == 4
    assert run.default_jobs(params.merge(values, {"trainer": {"threads": 2}})) == 8
    assert run.default_jobs(params.merge(values, {"hardware": {"accelerator": "gpu"}})) == 1
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert run.default_jobs(values) == 2
    assert run.check_jobs(3, values) == 3
    with pytest.raises(UserError, match="--jobs: found 0"):
        run.check_jobs(0, values)


def test_the_reason_of_a_failure() -> None:
    log = "Running stage 'train@a':\n> exec python\nerror: training diverged: loss NaN\nERROR: failed to reproduce\n"
    assert run.reason_in(log) == "training diverged: loss NaN"
    assert run.reason_in("one\nERROR: disk\n") == "ERROR: disk"
    assert run.reason_in("") == "it ended without a word"
