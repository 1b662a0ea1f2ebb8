"""Temperature and vector scaling, and when they are kept."""

from __future__ import annotations

import numpy as np
import pytest

from anneal import metrics
from anneal.calibration import (
    KINDS,
    LIMITS,
    apply,
    apply_temperature,
    apply_vector,
    choose,
    fit_temperature,
    fit_vector,
)
from anneal.ensemble import log_softmax


def drawn(temperature: float, num_images: int = 20000) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions that are right once divided by ``temperature``, and labels drawn from the right ones."""
    random = np.random.default_rng(0)
    logits = 2 * random.normal(size=(num_images, 5))
    labels = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
    return log_softmax(logits * temperature), labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_is_found_again(temperature: float) -> None:
    predictions, labels = drawn(temperature)
    found = fit_temperature(predictions, labels)
    assert found == pytest.approx(temperature, rel=0.03)
    before, after = (np.exp(p) for p in (predictions, apply_temperature(predictions, found)))
    np.testing.assert_array_equal(before.argmax(axis=1), after.argmax(axis=1))
    if temperature != 1.0:
        assert metrics.nll(after, labels) < metrics.nll(before, labels)
        assert metrics.ece(after, labels) < 0.5 * metrics.ece(before, labels)


def test_it_is_the_best_of_a_grid() -> None:
    predictions, labels = drawn(2.5, num_images=3000)

    def loss(temperature: float) -> float:
        return metrics.nll(np.exp(apply_temperature(predictions, temperature)), labels)

    grid = np.geomspace(0.5, 10, 400)
    assert fit_temperature(predictions, labels) == pytest.approx(grid[np.argmin([loss(t) for t in grid])], rel=0.02)


def test_no_mistake_on_validation_does_not_mean_certainty() -> None:
    labels = np.arange(180) % 10
    predictions = log_softmax(6.0 * np.eye(10)[labels])
    found = fit_temperature(predictions, labels)
    assert LIMITS[0] < found < 1
    # One image in 181, spread evenly over the ten classes, is what it concedes.
    p = np.exp(apply_temperature(predictions, found))
    assert 1 - p.max() == pytest.approx(0.9 / 181, rel=0.01)


def test_a_hopeless_predictor_ends_at_the_limit() -> None:
    labels = np.arange(100) % 2
    wrong = log_softmax(50.0 * np.eye(2)[1 - labels])
    assert fit_temperature(wrong, labels) == pytest.approx(LIMITS[1])


def test_scale_and_bias_are_found_again() -> None:
    random = np.random.default_rng(1)
    logits = 2 * random.normal(size=(20000, 4))
    labels = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
    bias = np.array([0.5, -0.5, 1.0, -1.0])
    # One scale for all: with several, log-probabilities, which are logits less a constant an image, cannot give them back.
    predictions = log_softmax((logits - bias) / 1.5)
    found_scale, found_bias = fit_vector(predictions, labels)
    np.testing.assert_allclose(found_scale, 1.5, rtol=0.06)
    np.testing.assert_allclose(found_bias, bias, atol=0.12)
    temperature = apply_temperature(predictions, fit_temperature(predictions, labels))
    after, truth = np.exp(apply_vector(predictions, found_scale, found_bias)), np.exp(log_softmax(logits))
    assert metrics.nll(after, labels) < metrics.nll(truth, labels) < metrics.nll(np.exp(temperature), labels)
    assert metrics.accuracy(after, labels) > metrics.accuracy(np.exp(temperature), labels)


def test_vector_scaling_is_the_logistic_regression_of_two_classes() -> None:
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(2)
    x = random.normal(size=5000)
    labels = (random.random(5000) < 1 / (1 + np.exp(-(3 * x + 1)))).astype(np.int64)
    predictions = log_softmax(np.stack([np.zeros(5000), x], axis=1))
    after = np.exp(apply_vector(predictions, *fit_vector(predictions, labels)))
    features = predictions  # a scale for each class's log-probability and one bias between them: the same family
    expected = LogisticRegression(C=1e9, tol=1e-10, max_iter=10000).fit(features, labels).predict_proba(features)
    # The smoothed targets concede one image in 5001.
    np.testing.assert_allclose(after, expected, atol=2e-3)
    assert metrics.nll(after, labels) == pytest.approx(metrics.nll(expected, labels), abs=1e-5)


def test_the_vector_is_at_the_optimum_of_its_loss() -> None:
    predictions, labels = drawn(2.5, num_images=400)
    scale, bias = fit_vector(predictions, labels)
    targets = np.full((400, 5), 1 / 401 / 5)
    targets[np.arange(400), labels] += 400 / 401

    def loss(moved_scale: np.ndarray, moved_bias: np.ndarray) -> float:
        return float(-(targets * apply_vector(predictions, moved_scale, moved_bias)).sum(axis=1).mean())

    for step in np.concatenate([0.01 * np.eye(5), -0.01 * np.eye(5)]):
        assert loss(scale, bias) <= loss(scale + step, bias) and loss(scale, bias) <= loss(scale, bias + step)


def test_a_class_without_images_keeps_a_probability() -> None:
    predictions, labels = drawn(1.0, num_images=200)
    labels = np.where(labels == 4, 0, labels)
    after = np.exp(apply_vector(predictions, *fit_vector(predictions, labels)))
    assert after[:, 4].min() > 0 and np.isfinite(np.log(after)).all()


def test_a_class_that_val_lacks_is_not_ruled_out() -> None:
    """Cross-validation cannot see what a bias against it does to other splits."""
    predictions, labels = drawn(1.0, num_images=400)
    known = labels != 4
    fitted, why = choose(predictions[known], labels[known], "vector")
    assert fitted["kind"] != "vector" and why["left_out"] == "vector: 1 of 5 classes have no image in val"
    after = apply(predictions, fitted).argmax(axis=1)
    assert (after == predictions.argmax(axis=1)).all()
    assert "left_out" not in choose(predictions, labels, "vector")[1]


@pytest.mark.parametrize("most", ["temperature", "vector"])
def test_what_helps_is_kept(most: str) -> None:
    predictions, labels = drawn(3.0, num_images=500)
    fitted, why = choose(predictions, labels, most)
    assert fitted["kind"] == why["kind"] == "temperature"  # one number is all that is wrong
    assert fitted["temperature"] == fit_temperature(predictions, labels)
    losses = why["cross_validated_nll"]
    assert list(losses) == ["none", "temperature", "vector"][: 2 + (most == "vector")]
    assert losses["none"] == pytest.approx(metrics.nll(np.exp(predictions), labels))
    assert losses["temperature"] < losses["none"] - why["standard_error"]["temperature"]
    np.testing.assert_array_equal(apply(predictions, fitted), apply_temperature(predictions, fitted["temperature"]))


def test_a_vector_is_kept_where_classes_differ() -> None:
    predictions, labels = drawn(1.0, num_images=2000)
    skewed = log_softmax(predictions + np.array([2.0, 0, 0, 0, -1.0]))
    fitted, why = choose(skewed, labels, "vector")
    assert why == {**why, "asked": "vector", "kind": "vector", "num_images": 2000}
    assert metrics.nll(np.exp(apply(skewed, fitted)), labels) < metrics.nll(np.exp(skewed), labels)


def test_what_does_not_help_is_left_out() -> None:
    """Of right predictions on few images, a fitted temperature is on average worse on others, and mostly not kept."""
    kept, fitted_loss, kept_loss = 0, [], []
    for trial in range(20):
        random = np.random.default_rng(trial)
        logits = 3 * random.normal(size=(1060, 5))
        labels = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
        predictions = log_softmax(logits)
        fitted, _ = choose(predictions[:60], labels[:60], "vector")
        kept += fitted["kind"] != "none"
        always = KINDS["vector"](predictions[:60], labels[:60])
        for losses, way in ((fitted_loss, always), (kept_loss, fitted)):
            losses.append(metrics.nll(np.exp(apply(predictions[60:], way)), labels[60:]))
    assert kept <= 4
    assert np.mean(kept_loss) < np.mean(fitted_loss) - 0.02


def test_one_image_calibrates_nothing() -> None:
    predictions = log_softmax(np.array([[2.0, 0.0]]))
    fitted, why = choose(predictions, np.array([0]), "vector")
    assert fitted == {"kind": "none"} and why["num_images"] == 1
    np.testing.assert_array_equal(apply(predictions, fitted), predictions)
