"""The most confident errors, the most confused pairs, their pictures, and all that is written beside the figures."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anneal.evaluation import Evaluation, evaluate
from anneal.inspection import (
    Inspection,
    calibrated,
    exported_probabilities,
    inspect,
    inspection_metrics,
    mean_image,
    write_inspection,
)
from anneal.label_errors import EXPORTED, examine
from anneal.mistakes import confident_errors, confused_pairs
from anneal.models.build import load_classifier
from anneal.reporting.mistakes import AGAINST, FOR, overlay, save_image
from anneal.serving import load_predictor
from anneal.store import open_store, write_json
from tests.tiny_project import CLASSES, COUNTS, write_member, write_store

FILES = {"mistakes.json", "label_errors.json", "near_duplicates.json", "robustness.csv", "robustness.png"}


def test_errors_come_by_confidence_and_right_answers_not_at_all() -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(4), 200)
    labels = random.integers(0, 4, 200)
    errors = confident_errors(probabilities, labels)
    assert set(errors) == set(np.flatnonzero(probabilities.argmax(axis=1) != labels))
    assert (np.diff(probabilities[errors].max(axis=1)) <= 0).all()
    assert not len(confident_errors(np.eye(4), np.arange(4)))


def test_confused_pairs_are_counted_by_hand() -> None:
    guesses = [1, 1, 1, 0, 2, 2, 0, 0, 1]
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    confidence = np.array([0.5, 0.9, 0.7, 0.9, 0.6, 0.8, 0.8, 0.9, 0.9])
    probabilities = np.full((9, 3), 0.0)
    probabilities[np.arange(9), guesses] = confidence
    pairs = confused_pairs(probabilities, labels)
    assert [(p.actual, p.predicted, p.count) for p in pairs] == [(0, 1, 3), (1, 0, 2), (0, 2, 1), (1, 2, 1)]
    assert pairs[0].share == pytest.approx(3 / 5) and pairs[0].examples.tolist() == [1, 2, 0]


# ---- pictures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size"), [((8, 8, 1), (128, 128)), ((28, 28, 3), (140, 140)), ((600, 300, 3), (128, 256))]
)
def test_small_images_are_enlarged_by_whole_pixels(
    tmp_path: Path, shape: tuple[int, int, int], size: tuple[int, int]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    save_image(image, tmp_path / "x.png")
    picture = Image.open(tmp_path / "x.png")
    assert picture.size == size
    if shape[0] < 128:
        factor = size[0] // shape[1]
        np.testing.assert_array_equal(np.asarray(picture).reshape(*size[::-1], -1)[::factor, ::factor], image)


def test_the_overlay_is_orange_for_blue_against_and_grey_elsewhere() -> None:
    attribution = np.zeros((8, 8))
    attribution[0, 0], attribution[7, 7] = 1.0, -1.0
    picture = overlay(np.full((8, 8, 1), 100, np.uint8), attribution).astype(int)
    assert np.abs(picture[0, 0] - FOR).max() < 40 and np.abs(picture[7, 7] - AGAINST).max() < 40
    assert np.ptp(picture[3, 3]) == 0
    assert np.ptp(overlay(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8)))) == 0


# ---- files --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    store = write_store(root)
    for seed, name in enumerate("ab"):
        write_member(root, store, name, seed)
    return root


def evaluated(root: Path, splits: list[str]) -> Evaluation:
    return evaluate(
        open_store(root / "data/processed"),
        {name: root / "models" / name for name in "ab"},
        splits=splits,
        tta_views=["identity"],
        average="probability",
        combine="probability_mean",
        calibrate="temperature",
        num_resamples=100,
        seed=0,
    )


def inspected(root: Path, found: Evaluation, **changes: Any) -> Inspection:
    arguments: dict[str, Any] = {
        "mistakes": 3,
        "label_errors": 1000,
        "near_duplicates": True,
        "robustness": {"corruptions": ["noise", "contrast"], "images": 20},
        "seed": 0,
    }
    folders = {name: root / "models" / name for name in "ab"}
    return inspect(found, open_store(root / "data/processed"), folders, **{**arguments, **changes})


@pytest.fixture(scope="module")
def found(project: Path) -> Evaluation:
    return evaluated(project, ["val", "test"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_file_is_there_names_its_pictures_and_repeats(project: Path, found: Evaluation, tmp_path: Path) -> None:
    for name in "xy":
        write_inspection(inspected(project, found), tmp_path / name)
    written = files(tmp_path / "x")
    assert written == files(tmp_path / "y")
    assert written.keys() >= FILES
    named = set()

    def collect(value: Any, key: str = "") -> None:
        if isinstance(value, dict):
            for name, child in value.items():
                collect(child, name)
        elif isinstance(value, list):
            for child in value:
                collect(child, key)
        elif key in ("picture", "pictures", "saliency", "train_picture") and value:
            named.add(value)

    for name in FILES:
        if name.endswith(".json"):
            collect(json.loads(written[name]))
    assert named == {name for name in written if "/" in name}
    assert all(Image.open(tmp_path / "x" / name).format == "PNG" for name in named)


def test_mistakes_say_what_the_figures_say(project: Path, found: Evaluation) -> None:
    said = inspected(project, found).json["mistakes"]
    accuracy = found.figures["test"]["ensemble_tta"]["accuracy"]
    assert (said["split"], said["images"]) == ("test", COUNTS["test"])
    assert 1 - said["count"] / said["images"] == pytest.approx(accuracy)
    assert sum(pair["count"] for pair in said["confused"]) == said["count"]
    assert len(said["errors"]) == 3
    for error in said["errors"]:
        row = found.predictions["test"].sources.index(error["source"])
        probabilities = found.exported["test"][row]
        assert error["probability"] == probabilities.max() > error["probability_of_label"]
        assert error["probability_of_label"] == probabilities[CLASSES.index(error["label"])]
        assert error["source"].startswith(error["label"])


def test_validation_alone_reads_no_test_data_and_leaves_the_costly_parts_out(project: Path, tmp_path: Path) -> None:
    found = evaluated(project, ["val"])
    store = open_store(project / "data/processed")
    hidden = tmp_path / "test"
    (store.path / "test").rename(hidden)
    try:
        said = inspected(project, found)
    finally:
        hidden.rename(store.path / "test")
    assert said.json["mistakes"]["split"] == "val"
    assert list(said.json["near_duplicates"]["splits"]) == ["val"]
    assert not {"train", "test"} & set(said.json["label_errors"]["splits"])
    assert "robustness" not in said.csv


def test_what_is_switched_off_has_no_file(project: Path, found: Evaluation) -> None:
    said = inspected(project, found, mistakes=0, label_errors=0, near_duplicates=False, robustness=None)
    assert not said.json and not said.csv and not said.images
    without_pictures = inspected(project, found, mistakes=0)
    assert not without_pictures.images and "mistakes" not in without_pictures.json
    assert all(item["picture"] is None for item in without_pictures.json["label_errors"]["items"])


def test_corruptions_start_from_the_exported_predictor(project: Path, found: Evaluation) -> None:
    store = open_store(project / "data/processed")
    split = store.split("test")
    images = split.take(np.arange(len(split)))
    classifiers = [load_classifier(project / "models" / name, folded=True)[0] for name in "ab"]
    ours = exported_probabilities(classifiers, images, found.predictor)
    np.testing.assert_allclose(ours, found.exported["test"], atol=1e-9)
    write_json(project / "reports/evaluation/predictor.json", found.predictor)
    np.testing.assert_allclose(ours, load_predictor(project).predict(images), atol=1e-9)
    _, rows = inspected(project, found, robustness={"corruptions": ["noise", "jpeg"], "images": 10**6}).csv[
        "robustness"
    ]
    clean = [row["accuracy"] for row in rows if row["severity"] == 0]
    assert clean == [found.figures["test"]["ensemble_tta"]["accuracy"]] * 2


def test_without_its_views_the_exported_predictor_is_otherwise_itself(project: Path) -> None:
    """Weights, combination and calibration are those of predictor.json."""
    networks = [load_classifier(project / "models" / name, folded=True)[0] for name in "ab"]
    images = open_store(project / "data/processed").split("test").take(range(20))
    plain = {"average": "probability", "combine": "weighted", "calibration": {"kind": "none"}}
    alone = exported_probabilities(networks[:1], images, {**plain, "combine": "probability_mean"})
    first = exported_probabilities(networks, images, {**plain, "weights": [1.0, 0.0]})
    np.testing.assert_allclose(first, alone, atol=1e-12)
    halves = exported_probabilities(networks, images, {**plain, "weights": [0.5, 0.5]})
    assert np.abs(halves - alone).max() > 1e-3
    cooled = {**plain, "weights": [1.0, 0.0], "calibration": {"kind": "temperature", "temperature": 2.0}}
    expected = np.sqrt(alone) / np.sqrt(alone).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(exported_probabilities(networks, images, cooled), expected, atol=1e-9)


def test_a_predictor_that_is_too_sure_of_itself_does_not_doubt_the_labels(found: Evaluation) -> None:
    random = np.random.default_rng(0)
    confidence = np.clip(1 - random.exponential(0.2, 4000), 0.2, 0.9999)
    labels, right = random.integers(0, 2, 4000), random.random(4000) < confidence
    logits = np.log(confidence / (1 - confidence) * 3) * np.where(right == (labels == 1), 1, -1)
    sure = np.stack([1 / (1 + np.exp(4 * logits)), 1 / (1 + np.exp(-4 * logits))], axis=1)
    halves = {"val": slice(0, 2000), "test": slice(2000, 4000)}
    parts = {name: replace(found.predictions[name], labels=labels[rows]) for name, rows in halves.items()}
    exported = {name: sure[rows] for name, rows in halves.items()}
    described = {**found.predictor, "calibration": {"asked": "none", "kind": "none"}}
    unfitted = replace(found, exported=exported, predictions=parts, predictor=described)
    doubted = examine(exported["test"], parts["test"].labels, EXPORTED)
    assert doubted is not None and doubted.shown
    judged = examine(calibrated(unfitted)["test"], parts["test"].labels, EXPORTED)
    assert judged is not None and not judged.shown
    assert calibrated(replace(unfitted, exported={"test": exported["test"]})) == {}
    assert calibrated(found) is found.exported


def test_metrics_for_mlflow(project: Path, found: Evaluation) -> None:
    said = inspected(project, found)
    values = inspection_metrics(said)
    rows = [row for row in said.csv["robustness"][1] if row["severity"] > 0]
    assert len(rows) == 10
    assert values["test/corrupted_accuracy"] == pytest.approx(sum(row["accuracy"] for row in rows) / 10)
    assert values["val/near_duplicates"] == said.json["near_duplicates"]["splits"]["val"]["share"]
    judged = said.json["label_errors"]["splits"]
    assert {name for name in values if name.endswith("labels")} == {f"{split}/suspected_labels" for split in judged}
    assert all(0 <= value <= 1 for value in values.values())
    assert inspection_metrics(Inspection()) == {}


def test_the_csv_lists_hold_all_rows(project: Path, found: Evaluation, tmp_path: Path) -> None:
    write_inspection(inspected(project, found), tmp_path)
    for name in ("label_errors", "near_duplicates"):
        with open(tmp_path / f"{name}.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        said = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert [row["source"] for row in rows] == [item["source"] for item in said.get("items", said.get("pairs"))]


def test_the_mean_image_is_that_of_the_training_split(project: Path) -> None:
    split = open_store(project / "data/processed").split("train")
    np.testing.assert_allclose(mean_image(split), split.take(np.arange(len(split))).mean(axis=0))
