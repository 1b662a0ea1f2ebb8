"""Combining members."""

from __future__ import annotations

import numpy as np
import pytest

from anneal import metrics
from anneal.ensemble import (
    COMBINE,
    FITTED,
    combined,
    diversity,
    fit_weights,
    greedy_weights,
    log_softmax,
    logit_mean,
    probability_mean,
    subsets,
    vote,
    weighted_mean,
)


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


# ---- weights --------------------------------------------------------------------------------------------------------


def members(
    quality: list[float], num_images: int = 400, classes: int = 4, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities of members that know the label so well, with noise of their own, and labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, num_images)
    noise = random.normal(size=(len(quality), num_images, classes))
    return log_softmax(noise + np.array(quality)[:, None, None] * np.eye(classes)[labels]), labels


def loss(log_probabilities: np.ndarray, weights: list[float], labels: np.ndarray) -> float:
    return metrics.nll(np.exp(weighted_mean(log_probabilities, weights)), labels)


def test_a_weighted_mean_by_definition() -> None:
    log_probabilities = log_softmax(predictions())
    p = np.exp(log_probabilities)
    found = np.exp(weighted_mean(log_probabilities, [0.5, 0.5, 0.0]))
    np.testing.assert_allclose(found, (p[0] + p[1]) / 2, atol=1e-12)
    np.testing.assert_array_equal(
        weighted_mean(log_probabilities, [0.5, 0.5, 0.0]), weighted_mean(log_probabilities[:2], [0.5, 0.5])
    )
    equal = weighted_mean(log_probabilities, [1 / 3] * 3)
    np.testing.assert_allclose(equal, probability_mean(log_probabilities), atol=1e-12)
    np.testing.assert_array_equal(combined(log_probabilities, "weighted", [1 / 3] * 3), equal)
    np.testing.assert_array_equal(combined(log_probabilities, "vote"), vote(log_probabilities))
    np.testing.assert_array_equal(weighted_mean(log_probabilities[:1], [1.0]), log_probabilities[0])


def test_weights_are_the_best_on_the_simplex() -> None:
    log_probabilities, labels = members([2.0, 1.5, 0.5, 0.0])
    weights = fit_weights(log_probabilities, labels)
    assert sum(weights) == pytest.approx(1) and min(weights) >= 0 and np.argmax(weights) == 0 and weights[3] == 0
    reached = loss(log_probabilities, weights, labels)
    random = np.random.default_rng(0)
    for concentration in (0.3, 1.0, 3.0):
        for other in random.dirichlet([concentration] * 4, 300):
            assert reached <= loss(log_probabilities, list(other), labels) + 1e-6
    near = np.clip(np.array(weights) + 0.02 * random.normal(size=(300, 4)), 0, None)
    for other in near / near.sum(axis=1, keepdims=True):
        assert reached <= loss(log_probabilities, list(other), labels) + 1e-6


@pytest.mark.parametrize("name", FITTED)
def test_a_useless_member_gets_no_weight_and_a_twin_changes_nothing(name: str) -> None:
    log_probabilities, labels = members([2.0, 1.8, 1.9])
    wrong = np.stack([*log_probabilities, log_softmax(-5 * np.eye(4)[labels])])
    assert FITTED[name](wrong, labels)[3] == 0
    twins = np.concatenate([log_probabilities, log_probabilities])
    assert loss(twins, FITTED[name](twins, labels), labels) == pytest.approx(
        loss(log_probabilities, FITTED[name](log_probabilities, labels), labels), abs=2e-3
    )
    assert FITTED[name](log_probabilities[:1], labels) == [1.0]


def test_the_greedy_selection_step_by_step() -> None:
    """Two members of equal worth on different images: the best, then the other, then none that helps."""
    own = np.array([[0.9, 0.9, 0.2], [0.2, 0.2, 0.9], [0.1, 0.1, 0.1]])
    log_probabilities = np.log(np.stack([own, 1 - own], axis=2))
    labels = np.zeros(3, np.int64)
    weights = greedy_weights(log_probabilities, labels)

    counts, history = np.array([1, 0, 0]), []
    for _ in range(100):
        losses = [-np.log(np.tensordot(counts + e, own, 1) / (counts.sum() + 1)).mean() for e in np.eye(3)]
        before = -np.log(np.tensordot(counts, own, 1) / counts.sum()).mean()
        if min(losses) >= before:
            break
        counts = counts + np.eye(3, dtype=np.int64)[int(np.argmin(losses))]
        history.append(counts)
    np.testing.assert_allclose(weights, counts / counts.sum())
    assert weights[0] > weights[1] > 0 == weights[2]
    assert loss(log_probabilities, weights, labels) == pytest.approx(
        loss(log_probabilities, fit_weights(log_probabilities, labels), labels), abs=5e-3
    )


def test_zero_likelihoods_do_not_stop_a_fit() -> None:
    certain = log_softmax(np.stack([1e4 * np.eye(3), 1e4 * np.eye(3)[[1, 0, 2]]]))
    labels = np.array([0, 1, 2])
    for fit in FITTED.values():
        weights = fit(certain, labels)
        assert np.isfinite(weights).all() and weights[0] == pytest.approx(1, abs=1e-3)


# ---- diversity ------------------------------------------------------------------------------------------------------


def test_diversity_by_definition() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 500)
    one, two = (np.where(random.random(500) < 0.7, labels, random.integers(0, 3, 500)) for _ in range(2))
    found = diversity(one, two, labels)
    hit, other = one == labels, two == labels
    counts = [(hit & other).sum(), (~hit & ~other).sum(), (hit & ~other).sum(), (~hit & other).sum()]
    ratio = counts[0] * counts[1] / (counts[2] * counts[3])
    assert found.q_statistic == pytest.approx((ratio - 1) / (ratio + 1))  # Yule's Q by the odds ratio
    assert found.disagreement == pytest.approx((one != two).mean())
    assert found.double_fault == pytest.approx(counts[1] / 500)
    assert diversity(one, one, labels).disagreement == 0 and diversity(one, one, labels).q_statistic == 1
    assert diversity(labels, labels, labels).q_statistic is None


def test_subsets_are_all_or_as_many_as_asked() -> None:
    assert len(subsets(6, 3, most=20, seed=0)) == 20
    drawn = subsets(12, 6, most=30, seed=0)
    assert len(set(drawn)) == 30 == len(drawn) and all(len(set(some)) == 6 for some in drawn)
    assert drawn == subsets(12, 6, most=30, seed=0) != subsets(12, 6, most=30, seed=1)
