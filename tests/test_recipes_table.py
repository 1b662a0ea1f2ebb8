"""docs/recipes.md: the table is that of the results, and the figures in it are means and spreads by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from anneal.params import UserError
from tests.test_recipe import ours

ROOT = Path(__file__).resolve().parents[1]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_recipes", ROOT / "bench" / "recipes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load()
ACCURACIES = {"a": 0.9, "b": 0.92, "seed2": 0.97}


def figures(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "macro_accuracy": accuracy - 0.1, "accuracy_ci": [accuracy - 0.01, accuracy + 0.01]}


def result(members: int = 2) -> dict[str, Any]:
    seconds = {"preprocess": 60.0, "train@a": 120.0, "train@b": 180.0, "evaluate": 30.0, "train@seed2": 600.0}
    pipeline = ["preprocess", *(f"train@{name}" for name in list(ACCURACIES)[:members]), "evaluate"]
    found = bench.summary(
        "digits",
        {kind: figures(0.95) for kind in bench.KINDS},
        {name: figures(accuracy) for name, accuracy in ACCURACIES.items()},
        seconds,
        pipeline,
    )
    return found | {"commit": "0" * 12, "machine": {"cores": 2}}


def test_the_table_of_the_page_is_that_of_the_results() -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    assert page == bench.with_table(page, bench.table(bench.results())), "run `python bench/recipes.py --table`"
    assert page.count(bench.BEGIN) == page.count(bench.END) == 1


def test_results_and_page_name_recipes_that_are_there() -> None:
    names = ours()
    measured = {found["recipe"] for found in bench.results()}
    assert measured and measured <= names
    page = bench.PAGE.read_text(encoding="utf-8")
    for name in names:
        assert f"anneal recipe {name}" in page and f"bench/recipes.py {name}" in page, name


def test_mean_and_spread_are_over_the_seeds_and_the_time_is_the_pipelines() -> None:
    found = result()
    accuracies = list(ACCURACIES.values())
    assert found["single"]["n"] == 3
    assert found["single"]["accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-5)
    assert found["single"]["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1), abs=1e-5)
    assert found["single"]["minutes"] == pytest.approx((2 + 3 + 10) / 3)
    # The third member is there for the spread alone.
    assert found["pipeline"]["members"] == 2 and found["pipeline"]["minutes"] == pytest.approx(1 + 2 + 3 + 0.5)
    row = bench.table([found]).splitlines()[2]
    assert "0.9300 ± 0.0361 (n = 3)" in row and "0.9500 (0.9400 to 0.9600)" in row and "| 6.5 (2 cores) |" in row


def test_a_recipe_of_one_member_shows_no_ensemble() -> None:
    cells = bench.table([result(members=1)]).splitlines()[2].split(" | ")
    assert cells[0] == "| `digits` (1 member)" and cells[3] == ""


def test_further_members_are_like_the_first_with_seeds_of_their_own() -> None:
    members = {"a": {"seed": 0, "optimizer": {"name": "AdamW"}}, "b": None}
    values = {"seed": 5, "ensemble": {"members": members}}
    assert bench.further_members(values, [0, 1, 5]) == {"seed1": {"seed": 1, "optimizer": {"name": "AdamW"}}}
    assert bench.further_members(values, [0]) == {}


def test_only_the_part_between_the_marks_is_replaced() -> None:
    page = f"before\n{bench.BEGIN}old\n{bench.END}after\n"
    assert bench.with_table(page, "new\n") == f"before\n{bench.BEGIN}new\n{bench.END}after\n"


class Killed(Exception):
    """What ends the script in the middle."""


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A clone whose stages are stand-ins, since real ones take minutes: what it holds, and what it ran."""
    own = {"late": {"seed": 1}, "early": {"seed": 0}}
    found: dict[str, Any] = {"members": own, "ran": [], "stop_at": None}

    def command(folder: Path, *words: str) -> Any:
        return type("Done", (), {"stdout": "0" * 12 + "\n"})

    def set_value(folder: Path, key: str, value: Any) -> None:
        assert key == "ensemble.members"
        found["members"] = dict(value)

    def run_stage(folder: Path, stage: str) -> float:
        if stage == found["stop_at"]:
            raise Killed
        found["ran"].append(stage)
        if stage == "evaluate":
            test = {kind: figures(0.9) for kind in bench.KINDS}
            test["members"] = {name: figures(0.8) for name in found["members"]}
            bench.write_json(folder / "reports" / "metrics.json", {"test": test})
        return 60.0

    def make_clone(folder: Path) -> Path:
        return folder / "anneal"

    def read_yaml(path: Path) -> dict[str, Any]:
        return {"seed": 0, "data": {"path": "data/digits.zip"}, "ensemble": {"members": own}}

    for name, function in {"command": command, "set_value": set_value, "run_stage": run_stage}.items():
        monkeypatch.setattr(bench, name, function)
    monkeypatch.setattr(bench, "make_clone", make_clone)
    monkeypatch.setattr(bench, "point_to_data", lambda *_: None)
    monkeypatch.setattr(bench.params, "read_yaml", read_yaml)
    return found


def test_killed_and_started_again_goes_on_in_the_same_order(clone: dict[str, Any], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"seeds": [0, 1, 2], "data": None, "folder": tmp_path / "kept"}
    for stage in ("train@early", "evaluate", "train@seed2", None):
        clone["stop_at"] = stage
        if stage is not None:
            with pytest.raises(Killed):
                bench.measure("digits", **arguments)
    found = bench.measure("digits", **arguments)
    stages = ["preprocess", "augment", "train@late", "train@early", "diagnose", "evaluate", "report"]
    assert clone["ran"] == [*stages, "train@seed2", "evaluate"]
    assert list(clone["members"]) == ["late", "early", "seed2"]
    assert found["single"]["n"] == 3 and found["pipeline"]["members"] == 2


def test_every_set_of_seeds_has_figures_of_its_own(clone: dict[str, Any], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"data": None, "folder": tmp_path / "kept"}
    for seeds in ([2, 3], [2], [2, 3]):
        found = bench.measure("digits", seeds=seeds, **arguments)
        assert set(found["members"]) == {"late", "early", *(f"seed{seed}" for seed in seeds)}
    assert clone["ran"].count("train@seed3") == 1
    with pytest.raises(UserError, match=r"--data: found elsewhere, but .* was begun with data/digits.zip"):
        bench.measure("digits", seeds=[2], data="elsewhere", folder=tmp_path / "kept")
