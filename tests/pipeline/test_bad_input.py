"""Mistakes end in one line with the fix and exit code 1, without a traceback and without half an out."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.conftest import Clone


def fails(clone: Clone, *command: str, **env: str) -> str:
    done = clone.run(*command, check=False, **env)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def no_half_outs(clone: Clone) -> None:
    left = [p for p in clone.path.rglob("*.tmp") if ".dvc" not in p.parts and ".git" not in p.parts]
    assert left == []


def test_missing_data_path(fresh: Clone) -> None:
    fresh.set(data__path="data/nothing-here")
    for command in (("anneal", "check"), ("python", "-m", "stages.preprocess")):
        error = fails(fresh, *command)
        assert "data/nothing-here" in error
        assert "data.path" in error
    assert not (fresh.path / "data/processed").exists()


def test_empty_folder(fresh: Clone) -> None:
    (fresh.path / "data/empty").mkdir()
    fresh.set(data__path="data/empty")
    for command in (("anneal", "check"), ("python", "-m", "stages.preprocess")):
        assert "data/empty" in fails(fresh, *command)
    assert not (fresh.path / "data/processed").exists()


def test_unknown_model(fresh: Clone) -> None:
    file = fresh.path / "params.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("name: resnet ", "name: resent "), encoding="utf-8")
    for command in (("anneal", "check"), ("python", "-m", "stages.preprocess"), ("python", "-m", "stages.train", "a")):
        error = fails(fresh, *command)
        assert 'model.name: found "resent", allowed: resnet | preact_resnet | ' in error
        assert error.endswith("; did you mean 'resnet'?")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch__size": 4096, "batch__microbatch": 4096}, ("batch.size", "4096", "200")),
        ({"hardware__devices": 3, "hardware__accelerator": "cpu"}, ("batch", "3")),
        pytest.param({"preprocess__normalize": "pca"}, ("pca", "zca"), marks=pytest.mark.long),
        pytest.param(
            {"model__resnet__widths": [8] * 6, "model__resnet__depths": [1] * 6},
            ("model.resnet",),
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"model__name": "mlp", "regularization__stochastic_depth": 0.1},
            ("stochastic_depth",),
            marks=pytest.mark.long,
        ),
    ],
)
def test_conflicts(small: Clone, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    file = small.path / "params.yaml"
    before = file.read_text(encoding="utf-8")
    try:
        small.set(**changes)
        for command in (("anneal", "check"), ("python", "-m", "stages.train", "a")):
            if "preprocess__normalize" in changes and command[0] == "python":
                continue  # the store at hand is not whitened
            error = fails(small, *command)
            for word in words:
                assert word in error
    finally:
        file.write_text(before, encoding="utf-8")
    no_half_outs(small)


def test_a_run_that_diverges(small: Clone) -> None:
    from tests.test_tracking import children, sqlite

    file = small.path / "params.yaml"
    before = file.read_text(encoding="utf-8")
    member = {path: path.read_bytes() for path in (small.path / "models/a").rglob("*") if path.is_file()}
    try:
        small.set(optimizer__SGD__lr=1e30, schedule__warmup__length=0.0)
        error = fails(small, "python", "-m", "stages.train", "a")
    finally:
        file.write_text(before, encoding="utf-8")
        shutil.rmtree(small.path / ".anneal/train", ignore_errors=True)
    assert re.search(
        r"error: training diverged: the (loss|norm of the gradient) is (nan|inf) \(not finite first: the ", error
    )
    assert re.search(r" in epoch 1, step \d, at learning rate [\d.]+e\+\d\d; lower optimizer\.SGD\.lr", error)
    assert member == {path: path.read_bytes() for path in (small.path / "models/a").rglob("*") if path.is_file()}
    newest = max(children(sqlite(small.path), "train"), key=lambda run: run.info.start_time)
    assert newest.info.status == "FAILED"
    no_half_outs(small)


def test_policy_with_a_mistyped_argument(fresh: Clone) -> None:
    fresh.set(augment__policy=[{"HorizontalFlip": {"prob": 0.5}}])
    error = fails(fresh, "anneal", "check")
    assert "augment.policy" in error
    assert "prob" in error
    fresh.set(augment__policy=[{"HorizontalFlp": {"p": 0.5}}])
    assert "HorizontalFlip" in fails(fresh, "anneal", "check")


@pytest.mark.long
def test_unwritable_tracking_store_does_not_stop_training(fresh: Clone) -> None:
    """A path below a file can be created by nobody, not even by root."""
    fresh.set(tracking__uri="sqlite:///params.yaml/mlflow.db", trainer__epochs=1)
    done = fresh.repro("train@a")
    assert (fresh.path / "models/a/weights.safetensors").exists()
    assert "tracking" in done.stderr.lower()
    assert "goes on" in done.stderr


def test_member_that_is_not_there(fresh: Clone) -> None:
    assert "no member 'z'; there are a" in fails(fresh, "python", "-m", "stages.train", "z")


def test_stage_without_its_input(fresh: Clone) -> None:
    assert "dvc repro" in fails(fresh, "python", "-m", "stages.train", "a")
    assert "dvc repro" in fails(fresh, "anneal", "summary")
    fails(fresh, "anneal", "predict", "data/digits.zip")


@pytest.mark.parametrize(
    ("stage", "ballast"),
    [
        pytest.param("preprocess", 250_000, id="preprocess's spool"),
        pytest.param("preprocess", 135_000, id="preprocess's shard"),  # the spool takes 115,008 bytes
        pytest.param("train", 250_000, id="train"),
    ],
)
def test_full_disk(small: Clone, stage: str, ballast: int, tmp_path: Path) -> None:
    """A real file system of 256 KiB that fills up."""
    mount = tmp_path / "full"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], check=False)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs rights that this user lacks")
    try:
        out = {"preprocess": "data", "train": "models"}[stage]
        clone = Clone(mount / "anneal")
        clone.path.mkdir()
        for name in ("stages", "src", "dvc.yaml", "params.yaml", "params.schema.json", "data", "models"):
            if name != out:
                (clone.path / name).symlink_to(small.path / name)
        (clone.path / out).mkdir()
        for path in (small.path / out).iterdir():
            if path.name not in ("processed", "a"):
                (clone.path / out / path.name).symlink_to(path)
        (mount / "ballast").write_bytes(b"x" * ballast)
        command = ["python", "-m", f"stages.{stage}"] + (["a"] if stage == "train" else [])
        error = fails(clone, *command, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
        assert "disk is full" in error
        left = [p for p in (clone.path / out).rglob("*") if p.is_file() and not p.is_symlink()]
        assert left == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)
