"""The shipped recipe, as a newcomer runs it."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

from anneal.training.dynamics import Layer
from anneal.training.history import COLUMNS
from tests.pipeline.conftest import EPOCHS, Clone, make_clone

FIGURES = {"accuracy", "accuracy_ci", "macro_accuracy", "macro_f1", "top5", "nll", "brier", "ece"}


def test_digits_reach_their_accuracy(digits: Clone) -> None:
    metrics = digits.json("reports/metrics.json")
    assert set(metrics) == {"val", "test"}
    for split in metrics.values():
        assert set(split) >= {"members", "single", "tta", "ensemble", "ensemble_tta"}
        assert set(split["members"]) == {"a", "b", "c"}
        for figures in (split["single"], split["ensemble_tta"], *split["members"].values()):
            assert set(figures) >= FIGURES
            low, high = figures["accuracy_ci"]
            assert 0 <= low <= figures["accuracy"] <= high <= 1
    assert metrics["test"]["ensemble_tta"]["accuracy"] >= 0.9


@pytest.mark.long
def test_the_shipped_recipe_reaches_its_accuracy(tmp_path: Path) -> None:
    clone = make_clone(tmp_path)
    clone.repro()
    assert clone.json("reports/metrics.json")["test"]["ensemble_tta"]["accuracy"] >= 0.985


def test_every_out_is_there(digits: Clone) -> None:
    for name in (
        "data/processed/dataset.json",
        "data/augmented/policy.json",
        "models/a/weights.safetensors",
        "models/a/model.json",
        "models/c/history.csv",
        "models/c/steps.csv",
        "models/c/layers.csv",
        "models/c/initial.csv",
        "reports/data.json",
        "reports/diagnosis.json",
        "reports/initial.csv",
        "reports/learning_rate.csv",
        "reports/predictions.parquet",
        "reports/evaluation/predictor.json",
        "reports/report.html",
    ):
        assert (digits.path / name).stat().st_size > 0, name
    assert list((digits.path / "reports/augmentation").glob("*.png"))
    assert list((digits.path / "reports/preprocessing").glob("*.png"))
    with (digits.path / "models/a/history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert len(rows) == EPOCHS
    with (digits.path / "models/a/steps.csv").open() as file:
        steps = list(csv.DictReader(file))
    assert list(steps[0]) == ["step", "loss", "lr", "grad_norm"]
    assert len(steps) <= 1000 and steps[0]["step"] == "1"
    with (digits.path / "models/a/layers.csv").open() as file:
        layers = list(csv.DictReader(file))
    assert list(layers[0]) == [field.name for field in fields(Layer)]
    assert {int(row["epoch"]) for row in layers} == set(range(EPOCHS + 1))


def test_git_stays_clean_but_for_the_lock(digits: Clone) -> None:
    status = digits.run("git", "status", "--porcelain").stdout.splitlines()
    assert status == ["?? dvc.lock"]


def test_a_second_run_runs_nothing(digits: Clone) -> None:
    before = digits.lock
    done = digits.repro()
    assert digits.ran(done) == []
    assert "Data and pipelines are up to date." in done.stdout + done.stderr
    assert digits.lock == before


def test_dvc_shows_metrics_and_plots(digits: Clone) -> None:
    shown = digits.run("dvc", "metrics", "show").stdout
    assert "reports/metrics.json" in shown
    assert "test.ensemble_tta.accuracy" in shown
    page = digits.run("dvc", "plots", "show", "-o", str(digits.path.parent / "plots")).stdout.strip()
    html = (digits.path.parent / "plots" / "index.html").read_text(encoding="utf-8")
    assert page.endswith("index.html")
    for title in ("loss", "accuracy", "confusion"):
        assert title in html.lower()


def test_dvc_shows_what_differs_between_experiments(digits: Clone, tmp_path: Path) -> None:
    """A copy, whose commit is one experiment and whose changed files are the other; DVC compares files, not runs."""
    copy = Clone(tmp_path / "anneal")
    shutil.copytree(digits.path, copy.path, ignore=shutil.ignore_patterns("mlruns", "mlflow.db*", "__pycache__"))
    copy.run("git", "add", "-A")
    copy.run("git", "commit", "-qm", "lock")
    for name in ("reports/curves.csv", "reports/evaluation/reliability.csv", "reports/evaluation/confusion.csv"):
        file = copy.path / name
        header, first, *rest = file.read_text(encoding="utf-8").splitlines()
        changed = ",".join("7" if cell in "0123456789" else cell for cell in first.split(","))
        file.unlink()  # DVC may have linked it to its cache
        file.write_text("\n".join([header, changed, *rest[:-1]]) + "\n", encoding="utf-8")
    found = json.loads(copy.run("dvc", "plots", "diff", "HEAD", "--json").stdout)["data"]
    titles = {
        *("loss (mean of the members)", "accuracy (mean of the members)", "learning rate (mean of the members)"),
        *("confusion of the exported predictor", "reliability of the exported predictor"),
    }
    assert set(found) >= titles
    for title in titles:
        revisions = {revision for plot in found[title] for revision in plot["revisions"]}
        assert revisions == {"HEAD", "workspace"}, title


def test_summary(digits: Clone) -> None:
    out = digits.run("anneal", "summary").stdout
    accuracy = digits.json("reports/metrics.json")["test"]["ensemble_tta"]["accuracy"]
    assert f"{accuracy:.4f}" in out
    assert "make ui" in out
    assert "params.yaml" in out


def test_check_prints_the_resolved_recipe(digits: Clone) -> None:
    out = digits.run("anneal", "check").stdout
    counts = digits.json("data/processed/dataset.json")["counts"]
    assert f"{counts['train']:,} train" in out
    assert f"{-(-counts['train'] // 32)} steps an epoch" in out
    assert "peak rate 0.05" in out


def test_nothing_carries_a_path_or_a_host(digits: Clone) -> None:
    """Outs are a function of deps and params: no absolute path stands in them."""
    for folder in ("data/processed", "data/augmented", "models", "reports"):
        for path in sorted((digits.path / folder).rglob("*")):
            if path.is_file():
                assert str(digits.path).encode() not in path.read_bytes(), path
