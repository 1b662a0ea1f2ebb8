"""Combining members."""

from __future__ import annotations

import numpy as np
import pytest

from anneal.ensemble import COMBINE, log_softmax, logit_mean, probability_mean, vote


def predictions(members: int = 3, images: int = 50, classes: int = 4, seed: int = 0) -> np.ndarray:
    return 3 * np.random.default_rng(seed).normal(size=(members, images, classes))


@pytest.mark.parametrize("name", COMBINE)
def test_results_are_distributions_in_any_order_of_members(name: str) -> None:
    log_probabilities = log_softmax(predictions())
    result = COMBINE[name](log_probabilities)
    assert result.shape == (50, 4) and result.dtype == np.float64
    np.testing.assert_allclose(np.exp(result).sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(COMBINE[name](log_probabilities[[2, 0, 1]]), result, atol=1e-12)


@pytest.mark.parametrize("name", COMBINE)
def test_one_member_and_equal_members_change_nothing(name: str) -> None:
    log_probabilities = log_softmax(predictions(members=1))
    np.testing.assert_array_equal(COMBINE[name](log_probabilities), log_probabilities[0])
    twice = COMBINE[name](np.repeat(log_probabilities, 2, axis=0))
    np.testing.assert_array_equal(twice.argmax(axis=1), log_probabilities[0].argmax(axis=1))


def test_log_softmax_takes_extreme_logits() -> None:
    result = log_softmax(np.array([[1e4, 0.0, -1e4]], np.float32))
    np.testing.assert_allclose(result, [[0, -1e4, -2e4]])
    np.testing.assert_allclose(COMBINE["probability_mean"](np.stack([result, result])), result)


def test_means_by_definition() -> None:
    logits = predictions()
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.exp(probability_mean(log_softmax(logits))), p.mean(axis=0), atol=1e-12)
    mean = np.exp(logits.mean(axis=0))
    np.testing.assert_allclose(
        np.exp(logit_mean(log_softmax(logits))), mean / mean.sum(axis=1, keepdims=True), atol=1e-12
    )


def test_a_majority_wins_whatever_the_probabilities() -> None:
    p = np.array([[[0.51, 0.49, 0.0]], [[0.51, 0.49, 0.0]], [[0.0, 1.0, 0.0]]]) + 1e-9
    result = np.exp(vote(np.log(p / p.sum(axis=-1, keepdims=True))))
    assert p.mean(axis=0).argmax() == 1 and result.argmax() == 0
    np.testing.assert_allclose(result[0], [(2 + 0.34) / 4, (1 + 0.66) / 4, 0], atol=1e-8)


def test_a_tie_goes_to_the_larger_mean_probability() -> None:
    p = np.array([[[0.6, 0.4]], [[0.1, 0.9]]])
    assert vote(np.log(p)).argmax() == 1
