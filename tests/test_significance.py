"""Two predictors on the same images: closed forms, and how often an interval holds the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from anneal import metrics, significance
from anneal.significance import (
    GAIN_KEYS,
    NO_DIFFERENCE,
    Comparison,
    compare,
    compare_all,
    sign_flip_p,
    verdict,
    wording,
)


def predictor(hits: np.ndarray, confidence: float = 0.9) -> np.ndarray:
    """Return probabilities of two classes, the first the label, right where ``hits`` says so."""
    right = np.where(hits, confidence, 1 - confidence)
    return np.stack([right, 1 - right], axis=-1)


def compared(a: np.ndarray, b: np.ndarray, **options: int) -> Comparison:
    return compare(predictor(a), predictor(b), np.zeros(a.shape[-1], np.int64), **options)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (1, 1), (2, 9), (30, 12), (400, 500), (1, 300)])
def test_mcnemar_is_the_exact_binomial(only_a: int, only_b: int) -> None:
    hits_a = np.array([True] * (only_a + 5) + [False] * (only_b + 7))
    hits_b = np.array([False] * only_a + [True] * 5 + [True] * only_b + [False] * 7)
    found = compared(hits_a, hits_b, num_resamples=100)
    assert (found.only_a, found.only_b) == (only_a, only_b)
    expected = binomtest(only_b, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert found.mcnemar_p == pytest.approx(expected, rel=1e-9, abs=0)
    assert found.accuracy_difference == pytest.approx((only_b - only_a) / len(hits_a))


def test_of_means_it_is_the_sum_over_all_signs() -> None:
    differences = np.array([3, -1, 2, 0, 2, 1, -3])
    sums = [(differences * signs).sum() for signs in np.array(np.meshgrid(*[[-1, 1]] * 7)).reshape(7, -1).T]
    expected = np.mean(np.abs(sums) >= abs(differences.sum()))
    assert sign_flip_p(differences) == pytest.approx(expected, abs=1e-12)
    assert sign_flip_p(6 * differences) == pytest.approx(expected, abs=1e-12)


def test_of_means_of_many_it_is_nearly_the_normal_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(0).integers(-9, 11, 400)
    exact = sign_flip_p(differences)
    monkeypatch.setattr(significance, "MOST_SUMS", 100)
    normal = sign_flip_p(differences)
    assert normal != exact and normal == pytest.approx(exact, rel=0.05)


def test_several_comparisons_are_each_of_them() -> None:
    random = np.random.default_rng(2)
    labels = np.zeros(150, np.int64)
    a, b, c = (predictor(random.random(150) < share, 0.8) for share in (0.6, 0.8, 0.7))
    found = compare_all([(a, b), (np.stack([a, b]), c)], labels, num_resamples=200, seed=3)
    assert found == [
        compare(a, b, labels, num_resamples=200, seed=3),
        compare(np.stack([a, b]), c, labels, num_resamples=200, seed=3),
    ]
    assert compare_all([], labels) == []
    gain = found[0].as_gain()
    assert tuple(gain) == GAIN_KEYS
    assert gain["accuracy_gain"] == found[0].accuracy_difference and gain["nll_gain"] == -found[0].nll_difference
    assert gain["nll_gain_low"] < gain["nll_gain"] < gain["nll_gain_high"]


def test_a_mean_of_predictors_counts_the_mean_of_their_figures() -> None:
    random = np.random.default_rng(0)
    labels = np.zeros(200, np.int64)
    members, other = predictor(random.random((3, 200)) < 0.8), predictor(random.random(200) < 0.9)
    found = compare(members, other, labels, num_resamples=500)
    mean = np.mean([metrics.accuracy(p, labels) for p in members])
    assert found.accuracy_a == pytest.approx(mean) and found.accuracy_b == metrics.accuracy(other, labels)
    assert found.accuracy_difference == pytest.approx(found.accuracy_b - mean)
    assert found.nll_difference == pytest.approx(
        metrics.nll(other, labels) - np.mean([metrics.nll(p, labels) for p in members])
    )
    # The same member three times is that member.
    same = compare(np.repeat(members[:1], 3, axis=0), other, labels, num_resamples=500)
    alone = compare(members[0], other, labels, num_resamples=500)
    for name, value in alone.as_dict().items():
        assert getattr(same, name) == (value if isinstance(value, str) else pytest.approx(value, abs=1e-12)), name


def test_a_predictor_is_no_better_than_itself_and_the_other_way_round_is_the_opposite() -> None:
    random = np.random.default_rng(1)
    a, b = random.random(300) < 0.8, random.random(300) < 0.9
    same = compared(a, a)
    assert (same.accuracy_low, same.accuracy_high, same.nll_low, same.nll_high, same.mcnemar_p) == (0, 0, 0, 0, 1)
    assert same.accuracy_verdict == same.nll_verdict == NO_DIFFERENCE
    forth, back = compared(a, b), compared(b, a)
    assert (forth.accuracy_verdict, back.accuracy_verdict) == ("better", "worse")
    assert (forth.nll_verdict, back.nll_verdict) == ("better", "worse")
    assert forth.accuracy_low == pytest.approx(-back.accuracy_high, abs=1e-12) and forth.mcnemar_p == back.mcnemar_p
    assert compared(a, b) == forth != compared(a, b, seed=1)


def test_the_interval_is_paired() -> None:
    """Two predictors that miss nearly the same images are told apart where unpaired intervals overlap widely."""
    a = np.arange(1000) >= 200
    b = np.arange(1000) >= 188
    found = compared(a, b)
    assert found.accuracy_verdict == "better" and found.accuracy_low > 0
    unpaired = metrics.with_intervals(
        {"accuracy": 0.8},
        metrics.bootstrap([predictor(a)], np.zeros(1000, np.int64), num_resamples=300, seed=0)[0],
        1000,
    )
    assert unpaired["accuracy_ci"][1] > found.accuracy_b


def test_few_differing_images_show_nothing_whatever_the_interval_says() -> None:
    a, b = np.ones(100, bool), np.ones(100, bool)
    a[:5] = False
    found = compared(a, b)
    assert found.accuracy_low > 0 and found.mcnemar_p == pytest.approx(2 * 0.5**5)
    assert found.accuracy_verdict == NO_DIFFERENCE
    assert wording(found) == "no difference shown: +5.00 points (95 % interval +1.00 to +10.00; McNemar p = 0.062)"
    assert verdict(math.nan, math.nan) == verdict(0.1, 0.2, math.nan) == NO_DIFFERENCE
    assert verdict(-0.1, 0.0) == verdict(0.0, 0.1) == NO_DIFFERENCE and verdict(-0.2, -0.1) == "worse"


@pytest.mark.parametrize("num_images", [1, 3])
def test_few_images_say_nothing_of_the_likelihood(num_images: int) -> None:
    """Of one image the bootstrap's interval has no width, of three it is far too narrow."""
    labels = np.zeros(num_images, np.int64)
    a = np.tile([0.5, 0.5], (num_images, 1))
    p = np.linspace(0.55, 0.9, num_images)
    found = compare(a, np.stack([p, 1 - p], axis=1), labels)
    assert found.nll_high < 0 and found.nll_verdict == NO_DIFFERENCE


@pytest.mark.parametrize("gain", [0.0, 0.05])
def test_intervals_hold_the_truth_about_95_times_in_100(gain: float) -> None:
    held = shown = 0
    for trial in range(200):
        random = np.random.default_rng(trial)
        common = random.random(400) < 0.75
        # Each of the two is right on a tenth of the other images, b on ``gain`` of all more: the truth is ``gain``.
        kind = random.choice(4, 400, p=[0.1, 0.1 + gain, 0.8 - gain, 0.0])
        a, b = (
            np.where(kind == 0, True, np.where(kind == 1, False, common)),
            np.where(kind == 1, True, np.where(kind == 0, False, common)),
        )
        found = compared(a, b, num_resamples=300, seed=trial)
        held += found.accuracy_low <= gain <= found.accuracy_high
        shown += found.accuracy_verdict != NO_DIFFERENCE
    assert 180 <= held <= 199
    assert shown <= 15 if gain == 0 else shown >= 80
