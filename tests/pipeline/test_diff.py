"""What `anneal diff` finds between the runs that a real pipeline left."""

from __future__ import annotations

import json
import os

import pytest

from anneal.comparison import Comparison, compare
from anneal.tracking.records import read_runs
from tests.pipeline.conftest import Clone
from tests.test_tracking import FOREIGN, sqlite


def test_what_the_first_run_left(digits: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)

    def diff(*names: str) -> Comparison:
        return compare(*read_runs(sqlite(digits.path), "anneal", names))

    members = diff("train@a", "train@b")
    assert [change.key for change in members.params] == ["seed"]
    assert not (members.data or members.code or members.environment or members.notes)
    assert [change.key for change in members.outs] == ["models/*"]
    assert "val/loss" in [change.key for change in members.metrics]

    whole = diff("latest", "latest")
    stages = {"preprocess", "augment", "train@a", "train@b", "train@c", "diagnose", "evaluate", "report"}
    assert set(whole.a["stages"]) == stages == set(whole.same["environment"])
    assert not whole.differs and not whole.notes
    assert {"data/processed", "models/a", "reports/report.html"} <= set(whole.same["outs"])
    assert whole.same["data"]["counts.train"] == "1259"


def test_the_environment_is_on_record(digits: Clone) -> None:
    (run,) = read_runs(sqlite(digits.path), "anneal", ["evaluate"])
    assert {"environment.json", "packages.txt", "git.json", "torch.txt"} <= set(run.files)
    assert json.loads(run.files["git.json"])["commit"] == run.commit
    variables = json.loads(run.files["environment.json"])["variables"]
    assert "OMP_NUM_THREADS" not in variables  # the tracking process has it, the stage had it not
    assert variables.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")
