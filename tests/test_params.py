"""params.yaml: every kind of fault is one line that names the key, what was found and what is allowed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from anneal import params, recipe
from anneal.optimizers.config import OptimizerConfig
from anneal.params import ParamsError, UserError
from anneal.schedules import ScheduleConfig

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = " | ".join(get_args(OptimizerConfig.model_fields["name"].annotation))
SCHEDULES = " | ".join(get_args(ScheduleConfig.model_fields["name"].annotation))


@pytest.fixture
def values() -> dict[str, Any]:
    return params.load(ROOT / "params.yaml", ROOT / "params.schema.json")


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(values)
    node = tree
    *parents, leaf = path.split(".")
    for key in parents:
        node = node[key]
    node[leaf] = value
    return tree


def faults_of(values: dict[str, Any]) -> list[str]:
    faults = params.schema_faults(values, recipe.json_schema())
    if not faults:
        try:
            recipe.validate(values)
        except ParamsError as error:
            faults = error.faults
    return faults


def test_the_shipped_file_is_valid(values: dict[str, Any]) -> None:
    assert faults_of(values) == []


def test_schema_is_current() -> None:
    text = (ROOT / "params.schema.json").read_text(encoding="utf-8")
    assert text == recipe.schema_text(), "run `make schema`"


def test_first_line_names_the_schema() -> None:
    first = (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=params.schema.json"


def test_every_key_has_a_comment() -> None:
    for line in (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines():
        opens_a_block = line.rstrip().endswith(":")
        is_a_member = line.endswith("}") and "{seed:" in line
        assert not line.strip() or opens_a_block or is_a_member or "#" in line, f"no comment: {line}"


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("optimzer", {}, "optimzer: unknown key; did you mean 'optimizer'?"),
        ("optimizer.SGD.momentun", 0.9, "optimizer.SGD.momentun: unknown key; did you mean 'momentum'?"),
        ("loss.name", "cross", 'loss.name: found "cross", allowed: cross_entropy | focal | binary_cross_entropy'),
        ("schedule.name", "cosinus", f"schedule.name: found \"cosinus\", allowed: {SCHEDULES}; did you mean 'cosine'?"),
        ("optimizer.name", "SDG", f"optimizer.name: found \"SDG\", allowed: {OPTIMIZERS}; did you mean 'SGD'?"),
        (
            "optimizer.SGD.lr",
            "fast",
            'optimizer.SGD.lr: found "fast", allowed: a number > 0 | auto (found by a range test before training)',
        ),
        ("optimizer.SGD.lr", float("nan"), "optimizer.SGD.lr: found NaN, allowed: a finite number"),
        ("optimizer.SGD.lr", float("inf"), "optimizer.SGD.lr: found Infinity, allowed: a finite number"),
        ("batch.size", 0, "batch.size: found 0, allowed: a whole number >= 1"),
        ("batch.size", 12.5, "batch.size: found 12.5, allowed: a whole number >= 1"),
        ("batch.size", True, "batch.size: found true, allowed: a whole number >= 1"),
        (
            "batch.microbatch",
            100,
            "batch.microbatch: found 100, which does not divide size 32, allowed: a divisor of size, nearest 32",
        ),
        ("split.val", 0.9, "split.val: found val + test = 1.1, allowed: a sum < 1, or nothing is left to train on"),
        (
            "schedule.warmup.length",
            "5 apochs",
            'schedule.warmup.length: found "5 apochs", allowed: a fraction of the run from 0 to 1 | N epochs | N steps',
        ),
        (
            "optimizer.SGD.momentum",
            0,
            "optimizer.SGD.nesterov: found true with momentum 0, allowed: momentum > 0, or nesterov: false",
        ),
        (
            "evaluate.splits",
            ["tset"],
            "evaluate.splits[0]: found \"tset\", allowed: train | val | test; did you mean 'test'?",
        ),
        ("evaluate.splits", [], "evaluate.splits: found [], allowed: a list of at least 1"),
        ("ensemble.members", {}, "ensemble.members: found an empty mapping, allowed: a mapping of at least 1"),
        (
            "ensemble.members",
            {"a b": None},
            'ensemble.members: found the name "a b", allowed: names matching ^[A-Za-z0-9_-]+$',
        ),
        ("ensemble.members", {"a": {"sed": 1}}, "ensemble.members.a.sed: unknown key; did you mean 'seed'?"),
        (
            "ensemble.members",
            {"a": {"optimizer": {"SGD": {"lr": -1}}}},
            "ensemble.members.a.optimizer.SGD.lr: found -1, allowed: a number > 0",
        ),
        (
            "trainer.early_stopping",
            {"patience": 0},
            "trainer.early_stopping.patience: found 0, allowed: a whole number >= 1",
        ),
        ("data", None, "data: found null, allowed: a mapping with path, format, limit, max_rejected, max_pixels"),
        ("seed", 1.0, "seed: found 1.0, allowed: a valid integer"),
    ],
)
def test_faults(values: dict[str, Any], path: str, value: Any, fault: str) -> None:
    assert faults_of(changed(values, path, value)) == [fault]


def test_all_faults_at_once(values: dict[str, Any]) -> None:
    tree = changed(changed(values, "batch.size", -1), "optimizer.SGD.lr", 0)
    del tree["loss"]
    assert len(faults_of(tree)) == 3


def test_missing_section_and_key(values: dict[str, Any]) -> None:
    del values["loss"], values["data"]["path"]
    assert faults_of(values) == ["data.path: missing", "loss: missing; every section must be present"] or faults_of(
        values
    ) == ["loss: missing; every section must be present", "data.path: missing"]


def test_null_and_empty_members_are_fine(values: dict[str, Any]) -> None:
    assert faults_of(changed(values, "ensemble.members", {"a": None, "b": {}})) == []


def test_member_merges(values: dict[str, Any]) -> None:
    tree = changed(values, "ensemble.members", {"a": {"seed": 7, "optimizer": {"name": "AdamW"}}})
    merged = params.member(tree, "a")
    assert merged["seed"] == 7
    assert merged["optimizer"]["name"] == "AdamW"
    assert merged["optimizer"]["SGD"] == values["optimizer"]["SGD"]
    assert values["seed"] == 0
    with pytest.raises(ParamsError, match=r"no member 'z'; there are a"):
        params.member(tree, "z")
    with pytest.raises(ParamsError, match=r"ensemble\.members\.a\.data: a member cannot override this"):
        params.member(changed(values, "ensemble.members", {"a": {"data": {}}}), "a")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: 1\na: 2\n", 'line 2, column 1: found duplicate key "a"'),
        ("a: [1\n", "expected ',' or ']'"),
        ("- 1\n", "expected a mapping of sections"),
        ("", "expected a mapping of sections, found null"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
    ],
)
def test_unreadable_yaml(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        params.read_yaml(path)
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_is_read_as_dvc_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("a: 5e-4\nb: off\nc: 1_0\n")
    assert params.read_yaml(path)["a"] == 0.0005
    assert params.read_yaml(path)["b"] == "off"


def test_checking_imports_nothing_heavy() -> None:
    code = (
        "import sys; from anneal import params, recipe; recipe.validate(params.load()); "
        "print([m for m in ('torch', 'mlflow', 'albumentations', 'sklearn', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_stage_stops_before_any_work(tmp_path: Path) -> None:
    """A fault in a section that the stage does not read stops it too, with one line and exit code 1."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8").replace("bootstrap: 1000", "bootstrp: 1000")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "params.schema.json").write_text((ROOT / "params.schema.json").read_text(encoding="utf-8"))
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    run = subprocess.run(
        [sys.executable, "-m", "stages.preprocess"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.splitlines() == [
        "error: params.yaml: evaluate.bootstrp: unknown key; did you mean 'bootstrap'?",
        "error: params.yaml: evaluate.bootstrap: missing",
    ]
    assert not (tmp_path / "data").exists()


def test_schema_is_json(values: dict[str, Any]) -> None:
    schema = json.loads((ROOT / "params.schema.json").read_text(encoding="utf-8"))
    assert set(schema["properties"]) == set(values)
