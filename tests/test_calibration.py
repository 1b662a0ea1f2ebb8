"""Temperature scaling."""

from __future__ import annotations

import numpy as np
import pytest

from anneal import metrics
from anneal.calibration import LIMITS, apply_temperature, fit_temperature
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
