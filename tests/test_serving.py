"""The exported predictor on arrays, files, folders and archives."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from anneal import views
from anneal.evaluation import evaluate, write_reports
from anneal.params import UserError
from anneal.serving import Predictor, load_predictor, predictions_table, print_predictions
from anneal.store import open_store
from tests.tiny_project import CLASSES, COUNTS, write_member, write_store


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    store = write_store(root)
    members = {name: write_member(root, store, name, seed) for seed, name in enumerate("ab")}
    found = evaluate(
        store,
        members,
        splits=["val", "test"],
        tta_views=["identity", "five_crop"],
        average="logit",
        combine="vote",
        calibrate="temperature",
        num_resamples=100,
        seed=0,
    )
    write_reports(found, root / "reports")
    return root


@pytest.fixture(scope="module")
def predictor(project: Path) -> Predictor:
    return load_predictor(project)


@pytest.fixture(scope="module")
def expected(project: Path) -> dict[str, np.ndarray]:
    """Probabilities in predictions.parquet by source."""
    rows = pyarrow.parquet.read_table(project / "reports/predictions.parquet").to_pylist()
    return {row["source"]: np.array([row[f"prob_{name}"] for name in CLASSES]) for row in rows}


def test_it_knows_what_it_was_trained_on(predictor: Predictor) -> None:
    assert predictor.classes == CLASSES
    assert (predictor.height, predictor.width, predictor.channels) == (8, 8, 3)
    assert predictor.calibration["temperature"] != 1.0
    assert predictor.parsed_views == [("identity", {}), ("five_crop", {"fraction": 0.875, "resize": True})]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "files"])
def test_files_get_the_probabilities_that_evaluate_wrote(
    kind: str, project: Path, predictor: Predictor, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    raw = project / "raw"
    originals = sorted(path for path in raw.rglob("*.png") if not path.name.startswith("train"))
    paths: list[Path] = [raw]
    if kind == "files":
        paths = originals
    elif kind == "zip":
        paths = [tmp_path / "raw.zip"]
        with zipfile.ZipFile(paths[0], "w") as archive:
            for path in originals:
                archive.write(path, path.relative_to(raw))
    elif kind != "folder":
        paths = [tmp_path / f"raw.{kind}"]
        with tarfile.open(paths[0], "w:gz" if kind.endswith("gz") else "w") as tar:
            tar.add(raw, ".")
    prefix = f"{raw if kind in ('folder', 'files') else paths[0]}/"
    found = {p.source.removeprefix(prefix): p for p in predictor.predict_files(paths)}
    assert set(found) >= set(expected) and len(expected) == COUNTS["val"] + COUNTS["test"]
    for source, probabilities in expected.items():
        result = found[source].probabilities
        assert result is not None
        np.testing.assert_allclose(result, probabilities, atol=1e-6)


@pytest.mark.parametrize(
    ("combine", "calibrate", "average", "select"),
    [
        ("weighted", "vector", "logit", "none"),
        ("greedy", "temperature", "probability", "greedy"),
        ("logit_mean", "none", "log_probability", "none"),
        ("vote", "vector", "probability", "none"),
        ("probability_mean", "temperature", "logit", "greedy"),
    ],
)
def test_whatever_evaluate_exports_is_predicted_exactly(
    combine: str, calibrate: str, average: str, select: str, project: Path, tmp_path: Path
) -> None:
    (tmp_path / "models").symlink_to(project / "models")
    store = open_store(project / "data/processed")
    found = evaluate(
        store,
        {name: tmp_path / "models" / name for name in "ab"},
        splits=["test"],
        tta_views=["hflip", {"shifts": {"pixels": 1}}, {"five_crop": {"resize": False}}, {"augment": {"n": 2}}],
        average=average,
        select=select,
        combine=combine,
        calibrate=calibrate,
        num_resamples=100,
        seed=0,
    )
    write_reports(found, tmp_path / "reports")
    predictor = load_predictor(tmp_path)
    split = store.split("test")
    np.testing.assert_array_equal(predictor.predict(split.take(np.arange(len(split)))), found.exported["test"])
    assert views.entries_of(predictor.parsed_views) == found.predictor["views"] and found.predictor["views"] != [
        "identity"
    ]
    assert (predictor.combine, predictor.average) == (combine, average)
    assert (predictor.weights is not None) == (combine in ("weighted", "greedy"))
    assert predictor.weights is None or (
        min(predictor.weights) > 0 and len(predictor.weights) == len(predictor.classifiers)
    )


def test_the_size_of_a_batch_does_not_matter(
    project: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = open_store(project / "data/processed").split("test")
    images = split.take(np.arange(len(split)))
    whole = predictor.predict(images)
    monkeypatch.setattr(views, "batch_size", lambda *_: 7)
    np.testing.assert_allclose(predictor.predict(images), whole, atol=1e-6)
    assert len(list(predictor.predict_files([project / "raw"]))) == sum(COUNTS.values())
    assert predictor.predict(images[:0]).shape == (0, 3)


def test_what_cannot_be_used_is_named_and_the_rest_goes_on(
    project: Path, predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = project / "raw/cat/test-00.png"
    shutil.copy(good, tmp_path / "good.png")
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.zip").write_bytes(b"PK\3\4 nothing")
    os.mkfifo(tmp_path / "pipe.jpg")
    results = list(predictor.predict_files([tmp_path, tmp_path / "broken.zip", tmp_path / "missing.png"]))
    errors = {Path(p.source).name: p.error for p in results if p.error}
    assert set(errors) == {"half.png", "notes.txt", "broken.zip", "pipe.jpg", "missing.png"}
    assert [Path(p.source).name for p in results if p.probabilities is not None] == ["good.png"]
    assert "no image in a known format" in str(errors["notes.txt"])
    assert "regular file" in str(errors["pipe.jpg"])
    assert errors["missing.png"] == "No such file or directory"

    with pytest.raises(UserError, match="5 of 6 files could not be used"):
        print_predictions(predictor, [tmp_path, tmp_path / "missing.png"])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1 and printed.out.rstrip().endswith("good.png")
    assert len(printed.err.splitlines()) == 5 and "Traceback" not in printed.err
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no files found"):
        print_predictions(predictor, [tmp_path / "empty"])
    with pytest.raises(UserError, match="1 of 1 files could not be used"):
        print_predictions(predictor, [tmp_path / "pipe.jpg"])


def test_a_damaged_archive_is_named(project: Path, predictor: Predictor, tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar.gz"
    with tarfile.open(whole, "w:gz") as tar:
        tar.add(project / "raw", ".")
    (tmp_path / "cut.tar.gz").write_bytes(whole.read_bytes()[:3000])
    (result,) = predictor.predict_files([tmp_path / "cut.tar.gz"])
    assert result.error is not None and "damaged" in result.error


def test_a_table(project: Path, predictor: Predictor) -> None:
    predictions = list(predictor.predict_files([project / "raw/cat/test-00.png"]))
    probabilities = predictions[0].probabilities
    assert probabilities is not None
    best, second, _ = np.argsort(-probabilities)
    (line,) = predictions_table(predictions, CLASSES)
    assert line.split("  ")[0].strip() == CLASSES[best] and f"{probabilities[best]:.4f}" in line
    (line,) = predictions_table(predictions, CLASSES, top=2)
    assert line.index(f"{probabilities[best]:.4f}") < line.rindex(f"{probabilities[second]:.4f}")
    (line,) = predictions_table(predictions, CLASSES, top=99)
    assert all(name in line for name in CLASSES)


def test_csv_holds_every_probability_in_full(
    project: Path, predictor: Predictor, expected: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    path = project / "raw/dog, big/test-01.png"
    print_predictions(predictor, [path], csv=True)
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert list(row) == ["source", "predicted", *(f"prob_{name}" for name in CLASSES)]
    found = np.array([float(row[f"prob_{name}"]) for name in CLASSES])
    assert row["predicted"] == CLASSES[found.argmax()] and row["source"] == str(path)
    np.testing.assert_allclose(found, expected["dog, big/test-01.png"], atol=1e-6)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_images_of_another_shape_or_type_are_refused(predictor: Predictor) -> None:
    for images in (np.zeros((1, 9, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3))):
        with pytest.raises(UserError, match=r"allowed: uint8 \(N, 8, 8, 3\)"):
            predictor.predict(images)


def test_nothing_exported_and_members_that_differ(project: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no exported predictor"):
        load_predictor(tmp_path)
    shutil.copytree(project / "reports", tmp_path / "reports")
    with pytest.raises(UserError, match="no trained member here"):
        load_predictor(tmp_path)
    shutil.copytree(project / "models", tmp_path / "models")
    model = json.loads((tmp_path / "models/b/model.json").read_text())
    (tmp_path / "models/b/model.json").write_text(json.dumps({**model, "classes": ["x", "y", "z"]}))
    with pytest.raises(UserError, match="models/b: was trained on other data"):
        load_predictor(tmp_path)


def test_a_predictor_that_cannot_be_used_is_said_in_a_line(project: Path, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(project / "models")
    path = tmp_path / "reports/evaluation/predictor.json"
    path.parent.mkdir(parents=True)
    good = json.loads((project / "reports/evaluation/predictor.json").read_text())
    for change, reason in (
        ({"combine": "weighted", "weights": [1.0]}, "it has 1 weights for 2 members"),
        ({"combine": "weighted"}, "TypeError"),
        ({"combine": "best"}, "it names no way to average, combine or calibrate: logit, best, "),
        ({"calibration": {"kind": "platt"}}, "combine or calibrate: logit, vote, platt"),
        ({"members": []}, "it names no member"),
        ({"calibration": {"kind": "vector"}}, "KeyError: 'scale'"),
        ({"calibration": {"kind": "vector", "scale": [1.0] * 9, "bias": [0.0] * 9}}, "ValueError"),
        ({"calibration": {"kind": "temperature", "temperature": 0.0}}, "give no numbers"),
        ({"combine": "weighted", "weights": [0.0, 0.0]}, "ValueError"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=rf"predictor.json: damaged \(.*{reason}"):
            load_predictor(tmp_path)
    # As earlier versions wrote it.
    old = {key: value for key, value in good.items() if key != "calibration"} | {"temperature": 2.0}
    path.write_text(json.dumps(old))
    assert load_predictor(tmp_path).calibration == {"kind": "temperature", "temperature": 2.0}


def test_serving_needs_no_training_code() -> None:
    code = (
        "import sys, anneal.serving\n"
        "names = ('pytorch_lightning', 'mlflow', 'albumentations', 'sklearn', 'anneal.training')\n"
        "print([n for n in names if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
