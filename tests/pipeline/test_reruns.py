"""What runs again, and that it gives the same bytes."""

from __future__ import annotations

import ast
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from anneal import params
from anneal.params import UNTRACKED, flatten
from anneal.training.sections import SECTIONS
from tests.chaos.attack import copy
from tests.pipeline.conftest import ROOT, Clone, make_clone, make_small
from tests.test_architecture import STAGES

NAMES = ("Null", "eins", "Zwei", "drei", "vier", "fünf", "Ähre", "été", "ñandú", "z z")
"""Classes whose order and bytes differ between locales."""


def write_pictures(folder: Path, *, backwards: bool) -> None:
    """Write twenty digits a class, the last of them first where ``backwards``, which changes their order on the disk."""
    with zipfile.ZipFile(ROOT / "data/digits.zip") as archive:
        files: dict[str, list[str]] = {}
        for name in sorted(archive.namelist()):
            if name.endswith(".png"):
                files.setdefault(Path(name).parent.name, []).append(name)
        chosen = [(NAMES[int(label)], name) for label, names in files.items() for name in names[:20]]
        for label, name in reversed(chosen) if backwards else chosen:
            (folder / label).mkdir(parents=True, exist_ok=True)
            (folder / label / Path(name).name).write_bytes(archive.read(name))


def test_a_rerun_elsewhere_writes_the_same_lock(small: Clone, tmp_path: Path) -> None:
    """In another folder, at another time, in another locale and so on; nothing but params, data and code may count."""
    clone = make_small(make_clone(tmp_path / "another one"))
    clone.set(hardware__num_workers=2, hardware__checkpoint_every="1 steps")
    environment = {"LC_ALL": "C", "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "1"}
    done = clone.run("sh", "-c", "umask 077; exec dvc repro", **environment)
    assert {name.split("@")[0] for name in clone.ran(done)} == set(STAGES)
    assert clone.lock == small.lock


def test_files_in_another_order_give_the_same_data(tmp_path: Path) -> None:
    """Nor does the order count in which files were made, with names that locales sort and write differently."""
    locks = []
    for backwards, locale in ((False, "C.UTF-8"), (True, "C")):
        clone = make_small(make_clone(tmp_path / locale))
        write_pictures(clone.path / "data/pictures", backwards=backwards)
        clone.set(data__path="data/pictures")
        clone.repro("preprocess", LC_ALL=locale)
        locks.append(clone.lock)
    assert locks[0] == locks[1]


def sections_read(stage: str) -> set[str]:
    """Sections that a stage's own code names: keys of `values[...]` and of the classes given to `params.parse`."""
    files = [ROOT / "stages" / f"{stage}.py"]
    if stage == "diagnose":  # it hands whole recipes over
        files.append(ROOT / "src/anneal/diagnosis/curves.py")
    known = set(params.load(ROOT / "params.yaml", ROOT / "params.schema.json"))
    found: set[str] = set()
    for node in [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & known
    if stage == "train":
        found |= set(SECTIONS)
    return found - set(UNTRACKED)


def listed(stage: str) -> set[str]:
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    block = stages[stage].get("do", stages[stage])
    return {name.split(".")[0] for name in block["params"]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_lists_what_it_reads(stage: str) -> None:
    """Stages name sections as keys; what tracking alone reads (registry) and whole members come on top."""
    words = {"data", "augment", "train", "evaluate", "preprocess"}  # names of stages and splits too
    assert sections_read(stage) - words <= listed(stage)
    if stage != "report":  # it prints every section
        assert listed(stage) - sections_read(stage) <= {"ensemble", "registry"}


def other(value: Any) -> Any:
    """Return a value that differs; it need not be valid, since nothing runs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "changed"


def test_each_key_touches_just_the_stages_that_list_it(small: Clone) -> None:
    from dvc.dependency.param import ParamsDependency
    from dvc.repo import Repo

    file = small.path / "params.yaml"
    text = file.read_text(encoding="utf-8")
    blocks = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    values = params.read_yaml(file)
    checked = 0
    try:
        with Repo(str(small.path)) as repo:
            # What `dvc status` asks of params, without its look at every file.
            watched = [(getattr(stage, "name", ""), dep) for stage in repo.index.stages for dep in stage.deps]
            watched = [(name.split("@")[0], dep) for name, dep in watched if isinstance(dep, ParamsDependency)]
            assert not any(dep.status() for _, dep in watched)
            # Every ninth: a file is written and read for each, and there are hundreds.
            for key, value in list(flatten(values).items())[::9]:
                # Changing these changes dvc.yaml's own templates, that is which stages there are.
                # And the names of ranges are themselves keys, with dots.
                if key == "data.path" or key.startswith(("ensemble.members", "search.ranges")):
                    continue
                tree = deepcopy(values)
                *parents, leaf = key.split(".")
                node = tree
                for parent in parents:
                    node = node[parent]
                node[leaf] = other(value)
                with file.open("w", encoding="utf-8") as out:
                    YAML(typ="safe").dump(tree, out)
                section = key.split(".")[0]
                expected = {
                    name
                    for name, block in blocks.items()
                    if any(key == p or key.startswith(f"{p}.") for p in block.get("do", block)["params"])
                }
                assert bool(expected) == (section not in UNTRACKED), key
                assert {name for name, dep in watched if dep.status()} == expected, key
                checked += 1
    finally:
        file.write_text(text, encoding="utf-8")
    assert checked > 20
    assert small.ran(small.repro()) == []


def test_editing_one_key_runs_the_right_stages(small: Clone, tmp_path: Path) -> None:
    fresh = copy(small, tmp_path, {})
    fresh.set(optimizer__SGD__lr=0.02)
    assert fresh.ran(fresh.repro()) == ["train@a", "diagnose", "evaluate", "report"]
    fresh.set(hardware__num_workers=2, tracking__experiment="other")
    assert fresh.ran(fresh.repro()) == []


@pytest.mark.long
def test_adding_and_removing_a_member_trains_no_other(small: Clone, tmp_path: Path) -> None:
    fresh = copy(small, tmp_path, {})
    fresh.set(ensemble__members={"a": {"seed": 0}, "b": {"seed": 1}})
    assert fresh.ran(fresh.repro()) == ["train@b", "diagnose", "evaluate", "report"]
    # A removed member is no longer read, though its folder stays until `anneal prune`.
    fresh.set(ensemble__members={"b": {"seed": 1}})
    fresh.repro()
    assert set(fresh.json("reports/metrics.json")["val"]["members"]) == {"b"}
    history = fresh.path / "models/a/history.csv"
    before = history.read_bytes()
    history.write_bytes(before + b"\n")
    lock = fresh.lock
    assert "kept models/a" in fresh.run("anneal", "prune").stdout
    assert history.exists()
    (fresh.path / "dvc.lock").write_bytes(lock)
    history.write_bytes(before)
    assert "removed models/a" in fresh.run("anneal", "prune").stdout
    assert [path.name for path in (fresh.path / "models").iterdir() if path.is_dir()] == ["b"]
    assert b"train@a" not in fresh.lock
    assert "train@b" not in fresh.ran(fresh.repro())
    assert fresh.run("anneal", "prune").stdout == ""


@pytest.mark.long
def test_changed_data_runs_again(fresh: Clone, tmp_path: Path) -> None:
    fresh.repro("augment")
    with zipfile.ZipFile(fresh.path / "data/digits.zip") as old:
        names = [n for n in old.namelist() if n.endswith(".png")]
        with zipfile.ZipFile(tmp_path / "new.zip", "w") as new:
            for name in names[:-1]:
                new.writestr(name, old.read(name))
    (tmp_path / "new.zip").replace(fresh.path / "data/digits.zip")
    assert fresh.ran(fresh.repro("augment"))[0] == "preprocess"


@pytest.mark.long
def test_experiments_and_the_queue_run_their_own_code(fresh: Clone) -> None:
    """`dvc exp run --temp` and `dvc queue` run, in a checkout of their own, and track into the same store."""
    fresh.repro("train@a")
    fresh.run("git", "add", "dvc.lock")
    fresh.run("git", "commit", "-qm", "first run")
    fresh.run("dvc", "exp", "run", "--temp", "-n", "warmer", "-S", "optimizer.SGD.lr=0.2", "train@a")
    fresh.run("dvc", "exp", "run", "--queue", "-n", "queued", "-S", "optimizer.name=AdamW", "train@a")
    # The worker would keep a pipe open until it has waited in vain for another experiment.
    fresh.run("sh", "-c", "dvc queue start >/dev/null 2>&1")
    for _ in range(100):
        status = fresh.run("dvc", "queue", "status").stdout
        if "Success" in status or "Failed" in status:
            break
        fresh.run("sleep", "2")
    assert "Success" in status, status + fresh.run("dvc", "queue", "logs", "queued", check=False).stdout
    shown = fresh.run("dvc", "exp", "show", "--csv", "--no-pager").stdout
    assert "warmer" in shown
    assert "queued" in shown
    assert not (fresh.path / ".dvc/tmp/exps/mlflow.db").exists()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{fresh.path}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000)
    names = {run.data.tags.get("DVC_EXP_NAME") for run in runs}
    assert {"warmer", "queued"} <= names
