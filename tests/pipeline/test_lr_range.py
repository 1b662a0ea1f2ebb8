"""`anneal lr-range` and `lr: auto` on a real pipeline: nothing but studies/ and MLflow changes, and no test image is read."""

from __future__ import annotations

import csv
import hashlib
import shutil
from pathlib import Path

import pytest

from tests.pipeline.conftest import Clone
from tests.pipeline.test_bad_input import fails
from tests.test_tracking import children, sqlite


def hashes(clone: Clone) -> dict[str, str]:
    """Every file that DVC or git could notice."""
    found = {}
    for path in sorted(clone.path.rglob("*")):
        name = path.relative_to(clone.path)
        left_out = (
            name.parts[0] in (".git", "studies")
            or name.name.startswith("mlflow.db")
            or name.parts[:2] == (".dvc", "tmp")
            or "__pycache__" in name.parts
        )
        if path.is_file() and not left_out:
            found[name.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.long
def test_the_command_reads_no_test_image_and_writes_no_out(small: Clone, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    clone = Clone(tmp_path / "anneal")
    shutil.copytree(small.path, clone.path)
    for file in (clone.path / "data/processed/test").iterdir():
        file.chmod(0o644)
        file.write_bytes(b"damaged")
    before = hashes(clone)
    done = clone.run("anneal", "lr-range", "--steps", "60")
    assert "suggestion" in done.stdout and "optimizer.SGD.lr: " in done.stdout
    assert hashes(clone) == before
    folder = clone.path / "studies/lr-range"
    assert sorted(path.name for path in folder.iterdir()) == ["a.csv", "a.png"]
    rows = list(csv.DictReader((folder / "a.csv").read_text(encoding="utf-8").splitlines()))
    (run,) = children(sqlite(clone.path), "lr-range")
    client = MlflowClient(sqlite(clone.path))
    for metric in ("lr", "loss", "smoothed"):
        points = client.get_metric_history(run.info.run_id, metric)
        assert [float(row[metric]) for row in rows] == [point.value for point in sorted(points, key=lambda p: p.step)]
    suggestion = run.data.metrics["lr_suggestion"]
    assert f"optimizer.SGD.lr: {suggestion:g} " in done.stdout
    assert {f.path for f in client.list_artifacts(run.info.run_id)} >= {"lr-range.png", "a.csv"}
    assert run.data.tags["member"] == "a" and run.info.status == "FINISHED"

    # A range in which nothing descends.
    refused = clone.run("anneal", "lr-range", "--stop", "1e-9", "--start", "1e-12", check=False)
    assert refused.returncode == 1 and "never descends" in refused.stdout and "Traceback" not in refused.stderr
    assert hashes(clone) == before


@pytest.mark.long
def test_auto_in_the_train_stage(small: Clone, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    clone = Clone(tmp_path / "anneal")
    shutil.copytree(small.path, clone.path)
    clone.set(optimizer__SGD__lr="auto", ensemble__members={"a": {"seed": 0}, "b": {"seed": 1}})
    done = clone.repro("train")
    for member in ("a", "b"):
        lr = clone.json(f"models/{member}/model.json")["lr"]
        assert f"{member}: learning rate {lr:g} from a range test over " in done.stderr + done.stdout
        run = max(
            children(sqlite(clone.path), "train"), key=lambda r: (r.data.tags["member"] == member, r.info.start_time)
        )
        assert run.data.metrics["peak_lr"] == lr
        assert "lr-range.png" in {f.path for f in MlflowClient(sqlite(clone.path)).list_artifacts(run.info.run_id)}
    first = clone.lock
    clone.repro("-f", "-s", "train@a")
    assert clone.lock == first


def test_what_is_missing_is_said(fresh: Clone) -> None:
    assert "run `dvc repro augment` first" in fails(fresh, "anneal", "lr-range")
    assert "nobody" in fails(fresh, "anneal", "lr-range", "--member", "nobody")
