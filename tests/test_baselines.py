"""What a predictor has to beat."""

from __future__ import annotations

import json

import numpy as np
import pytest

from anneal import baselines as module
from anneal.baselines import baselines, fit_linear, pixels
from anneal.store import Store
from tests.tiny_project import CLASSES, COUNTS, write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("baselines"))


def of_test(store: Store, exported: np.ndarray | None = None) -> dict:
    labels = store.split("test").labels
    right = np.eye(len(CLASSES))[labels] if exported is None else exported
    return baselines(store, {"test": labels}, {"test": right}, num_resamples=100, seed=0)


def test_classes_that_differ_in_brightness_are_linear(store: Store) -> None:
    found = of_test(store)
    assert found["majority_class"]["test"]["accuracy"] == pytest.approx(14 / 41)
    linear = found["linear"]
    assert linear["test"]["accuracy"] > 0.8
    low, high = linear["test"]["accuracy_ci"]
    assert low <= linear["test"]["accuracy"] <= high
    assert linear["images"] == COUNTS["train"] and linear["features"] == 8 * 8 * 3


def test_the_gain_is_of_the_predictor_over_the_linear_classifier(store: Store) -> None:
    labels = store.split("test").labels
    found = of_test(store, np.eye(len(CLASSES))[(labels + 1) % len(CLASSES)])
    gain = found["linear"]["gain"]["test"]
    assert gain["accuracy_b"] == 0 and gain["accuracy_verdict"] == "worse"
    assert gain["accuracy_a"] == found["linear"]["test"]["accuracy"]


def test_the_same_again_gives_the_same_bytes(store: Store) -> None:
    assert json.dumps(of_test(store)) == json.dumps(of_test(store))


def test_its_cost_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WORK", 8 * 8 * 3 * len(CLASSES) * 7)
    monkeypatch.setattr(module, "LEAST_IMAGES", 1)
    fitted = fit_linear(store, seed=0)
    assert fitted is not None and fitted[1] == 7


def test_a_class_that_was_not_drawn_has_no_probability(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_IMAGES", 2)
    for seed in range(20):
        fitted = fit_linear(store, seed=seed)
        if fitted is not None:
            probabilities = fitted[0](store.split("val"))
            assert (probabilities > 0).any(axis=0).sum() == 2
            np.testing.assert_allclose(probabilities.sum(axis=1), 1)
        else:
            return  # both images had one class
    pytest.fail("two images of one class were never drawn")


def test_pixels_are_averaged() -> None:
    images = np.zeros((2, 40, 20, 3), np.uint8)
    images[:, :20] = 255
    rows = pixels(images)
    assert rows.shape == (2, 16 * 16 * 3)
    assert rows.reshape(2, 3, 16, 16)[:, :, :8].min() == 1 and rows.reshape(2, 3, 16, 16)[:, :, 8:].max() == 0
