"""What real pipeline runs leave in MLflow: one parent, one child a stage execution, never a duplicate."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.conftest import EPOCHS, Clone
from tests.test_browser import check_pages
from tests.test_tracking import children, parents, sqlite

STAGES = ["augment", "diagnose", "evaluate", "preprocess", "report"]


def count_by_stage(clone: Clone) -> Counter[str]:
    return Counter(run.data.tags["stage"] for run in children(sqlite(clone.path)))


def test_one_parent_with_the_headline_and_a_child_a_stage(digits: Clone) -> None:
    (parent,) = parents(sqlite(digits.path))
    assert count_by_stage(digits) == {**dict.fromkeys(STAGES, 1), "train": 3}
    metrics = digits.json("reports/metrics.json")
    assert parent.data.metrics["test/accuracy"] == metrics["test"]["ensemble_tta"]["accuracy"]
    assert parent.data.params["optimizer.SGD.lr"] == "0.05"
    for run in children(sqlite(digits.path)):
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["mlflow.source.git.commit"]


def test_learning_curves_are_whole(digits: Clone) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(sqlite(digits.path))
    (parent,) = parents(sqlite(digits.path))
    assert len(client.get_metric_history(parent.info.run_id, "curve/val_loss")) == EPOCHS
    assert "curve/" not in parent.data.tags["mlflow.note.content"]
    for run in children(sqlite(digits.path), "train"):
        for metric in ("train/loss", "val/loss", "train/accuracy", "val/accuracy", "lr", "grad_norm"):
            history = client.get_metric_history(run.info.run_id, metric)
            assert len(history) == EPOCHS, metric
            assert len({point.step for point in history}) == EPOCHS, metric


def test_outs_are_tagged_with_the_hashes_of_dvc_lock(digits: Clone) -> None:
    from ruamel.yaml import YAML

    locked = YAML(typ="safe").load(digits.lock)["stages"]
    (run,) = [r for r in children(sqlite(digits.path), "train") if r.data.tags["member"] == "b"]
    (out,) = locked["train@b"]["outs"]
    assert run.data.tags["out.models/b"] == out["md5"]


def test_the_report_in_mlflow_says_when_and_where(digits: Clone, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    (run,) = children(sqlite(digits.path), "report")
    copy = MlflowClient(sqlite(digits.path)).download_artifacts(run.info.run_id, "report.html", str(tmp_path))
    text = Path(copy).read_text(encoding="utf-8")
    out = (digits.path / "reports/report.html").read_text(encoding="utf-8")
    before, execution = text.split('<section id="execution">')
    assert before.split("</nav>")[1].strip() == out.split("</nav>")[1].split("</body>")[0].strip()
    for label in ("preprocess", "augment", "train a", "train b", "train c", "diagnose", "evaluate"):
        assert f"<td>{label}</td>" in execution
    assert re.search(r"<td>train a</td><td[^>]*>([0-9]+ min )?[0-9.]+ s</td><td[^>]*>[0-9,]+</td>", execution)
    assert "test set used by 1 recipe" in execution
    assert run.data.tags["mlflow.source.git.commit"] in execution
    assert "processor" in execution and "torch" in execution


def test_the_logged_predictor_gives_the_figures_of_evaluate(digits: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow
    import numpy as np
    import pyarrow.parquet

    from anneal.store import open_store

    monkeypatch.chdir(digits.path)
    mlflow.set_tracking_uri(sqlite(digits.path))
    (parent,) = parents(sqlite(digits.path))
    model: Any = mlflow.pyfunc.load_model(parent.data.tags["predictor.uri"])
    split = open_store("data/processed").split("test")
    probabilities = model.predict(split.take(np.arange(len(split))))
    table = pyarrow.parquet.read_table("reports/predictions.parquet").to_pylist()
    expected = {row["source"]: row for row in table if row["split"] == "test"}
    for sample, row in zip(split.samples(), probabilities, strict=True):
        for name, value in zip(map(str, range(10)), row, strict=True):
            assert abs(expected[sample.source][f"prob_{name}"] - value) < 1e-6


def test_a_cached_stage_adds_no_run_and_a_forced_one_adds_an_attempt(small: Clone) -> None:
    small.repro()
    before, recipes = count_by_stage(small), len(parents(sqlite(small.path)))
    small.repro()
    assert count_by_stage(small) == before
    small.repro("--force", "-s", "diagnose")
    after = count_by_stage(small)
    assert after == before + Counter({"diagnose": 1})
    found = children(sqlite(small.path), "diagnose")
    attempts = [(run.data.tags["mlflow.parentRunId"], run.data.tags["attempt"]) for run in found]
    assert len(set(attempts)) == len(attempts)
    assert len(parents(sqlite(small.path))) == recipes


def test_a_person_finds_the_run_in_the_browser(digits: Clone, tmp_path: Path) -> None:
    out = Path(os.environ.get("ANNEAL_SCREENSHOTS", tmp_path)) / "digits"
    out.mkdir(parents=True, exist_ok=True)
    check_pages(
        sqlite(digits.path),
        out,
        headline="test/accuracy",
        child="train a",
        curve="val/loss",
        preview="augmentation/overview.png",
    )
