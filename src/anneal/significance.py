"""Two predictors on the same images: by how much they differ, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from anneal.metrics import Floats, Integers, nll_by_image, resamples

LEVEL = 0.05
"""One minus the confidence of an interval, and what a p value is held against."""

NO_DIFFERENCE = "no difference shown"

MOST_SUMS = 20_000
"""Largest number of possible sums of which `sign_flip_p` counts each; beyond, their distribution is taken as normal."""


@dataclass(frozen=True)
class Comparison:
    """What predictor b does better or worse than predictor a.

    Parameters
    ----------
    num_images
        N, of which ``only_a`` are right by a alone and ``only_b`` by b alone; of a mean of predictors: right by more of them.
    accuracy_a, accuracy_b, nll_a, nll_b
        Fractions of 1, and nats.
    accuracy_difference, accuracy_low, accuracy_high, nll_difference, nll_low, nll_high
        b - a, with the ends of its paired 95 % interval.
    mcnemar_p
        Exact, two-sided; see `sign_flip_p`.
    accuracy_verdict, nll_verdict
        What b is: ``better``, ``worse``, or ``no difference shown``.
    """

    num_images: int
    accuracy_a: float
    accuracy_b: float
    accuracy_difference: float
    accuracy_low: float
    accuracy_high: float
    only_a: int
    only_b: int
    mcnemar_p: float
    accuracy_verdict: str
    nll_a: float
    nll_b: float
    nll_difference: float
    nll_low: float
    nll_high: float
    nll_verdict: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in order."""
        return asdict(self)

    def as_gain(self) -> dict[str, Any]:
        """Return what b gains over a, of the accuracy and of the likelihood, positive where b is better, as `GAIN_KEYS`."""
        values = (
            *(self.accuracy_difference, self.accuracy_low, self.accuracy_high, self.mcnemar_p, self.accuracy_verdict),
            *(0.0 - self.nll_difference, 0.0 - self.nll_high, 0.0 - self.nll_low, self.nll_verdict),
        )
        return dict(zip(GAIN_KEYS, values, strict=True))


GAIN_KEYS = (
    *("accuracy_gain", "accuracy_gain_low", "accuracy_gain_high", "mcnemar_p", "accuracy_verdict"),
    *("nll_gain", "nll_gain_low", "nll_gain_high", "nll_verdict"),
)
"""Columns of a gain in a table; all are None in a row that is what the others are compared with."""

NO_GAIN: dict[str, Any] = dict.fromkeys(GAIN_KEYS)


def compare(p_a: Floats, p_b: Floats, labels: Integers, *, num_resamples: int = 1000, seed: int = 0) -> Comparison:
    """Compare two predictors image by image.

    The intervals are percentile intervals of the bootstrap over images, the same draws for both (Efron 1979), as in
    `anneal.metrics.bootstrap`. The test is McNemar's, exact (McNemar 1947). With few images on which the two differ the
    interval is too narrow, so a difference of the accuracy counts as shown where the interval leaves 0 out and p is below
    0.05 as well.

    Parameters
    ----------
    p_a, p_b
        Probabilities, float64 (N, K); or (M, N, K), where the mean of the figures of M predictors is meant.
    labels
        int64 (N,).
    num_resamples, seed
        Of the bootstrap.

    Examples
    --------
    >>> right, wrong = np.tile([0.9, 0.1], (20, 1)), np.tile([0.2, 0.8], (20, 1))
    >>> found = compare(wrong, right, np.zeros(20, np.int64))
    >>> found.accuracy_difference, found.only_b, f"{found.mcnemar_p:.1e}", found.accuracy_verdict
    (1.0, 20, '1.9e-06', 'better')
    """
    return compare_all([(p_a, p_b)], labels, num_resamples=num_resamples, seed=seed)[0]


def compare_all(
    pairs: Sequence[tuple[Floats, Floats]], labels: Integers, *, num_resamples: int = 1000, seed: int = 0
) -> list[Comparison]:
    """Return what `compare` says of each pair of predictors on the same images, which are drawn once for all of them.

    Parameters
    ----------
    pairs
        a and b of each comparison, as `compare` takes them.
    labels, num_resamples, seed
        As for `compare`.
    """
    sides = [(_by_image(a, labels), _by_image(b, labels)) for a, b in pairs]
    differences = [np.stack(_differences(a, b), axis=1) for a, b in sides]
    drawn: list[list[Floats]] = [[] for _ in pairs]
    for counts in resamples(len(labels), num_resamples, seed):
        weights = counts.astype(np.float64)
        # One product a pair: in a wider one, the last bits would depend on what else is compared.
        for own, difference in zip(drawn, differences, strict=True):
            own.append(weights @ difference)
    ends = [np.quantile(np.concatenate(own) / len(labels), [LEVEL / 2, 1 - LEVEL / 2], axis=0) for own in drawn]
    return [_comparison(a, b, low_high) for (a, b), low_high in zip(sides, ends, strict=True)]


ByImage = tuple[Integers, Floats]
"""Hits and negative log-likelihoods of M predictors, each (M, N)."""


def _differences(a: ByImage, b: ByImage) -> tuple[Floats, Floats]:
    """Return b - a of the accuracy and of the likelihood, each (N,)."""
    return _signed(a, b) / (len(a[0]) * len(b[0])), b[1].mean(axis=0) - a[1].mean(axis=0)


def _signed(a: ByImage, b: ByImage) -> Integers:
    # In whole numbers, so that equal is equal: of M and M' predictors, M' x hits of the ones against M x hits of the others.
    return b[0].sum(axis=0) * len(a[0]) - a[0].sum(axis=0) * len(b[0])


def _comparison(a: ByImage, b: ByImage, ends: Floats) -> Comparison:
    signed = _signed(a, b)
    p = sign_flip_p(signed)
    accuracy_difference, nll_difference = (values.mean() for values in _differences(a, b))
    (accuracy_low, nll_low), (accuracy_high, nll_high) = ends
    return Comparison(
        num_images=len(signed),
        accuracy_a=float(a[0].mean()),
        accuracy_b=float(b[0].mean()),
        accuracy_difference=float(accuracy_difference),
        accuracy_low=float(accuracy_low),
        accuracy_high=float(accuracy_high),
        only_a=int((signed < 0).sum()),
        only_b=int((signed > 0).sum()),
        mcnemar_p=p,
        accuracy_verdict=verdict(accuracy_low, accuracy_high, p),
        nll_a=float(a[1].mean()),
        nll_b=float(b[1].mean()),
        nll_difference=float(nll_difference),
        nll_low=float(nll_low),
        nll_high=float(nll_high),
        nll_verdict=verdict(-nll_high, -nll_low, paired_t_p(_differences(a, b)[1])),
    )


def verdict(low: float, high: float, p: float = 0.0) -> str:
    """Return what a difference with this interval, where more is better, shows.

    >>> verdict(0.001, 0.004), verdict(-0.001, 0.004), verdict(0.001, 0.004, p=0.2)
    ('better', 'no difference shown', 'no difference shown')
    """
    if not (low > 0 or high < 0) or not p < LEVEL:  # so that NaN shows nothing
        return NO_DIFFERENCE
    return "better" if low > 0 else "worse"


def paired_t_p(differences: Floats) -> float:
    """Return the two-sided p value of Student's t test that paired differences (N,) have mean 0; NaN for fewer than two.

    A bootstrap alone takes few images for too certain: of one it makes an interval of width 0.

    >>> round(paired_t_p(np.array([1.0, 2.0, 3.0])), 3), paired_t_p(np.zeros(3)), paired_t_p(np.ones(3))
    (0.074, 1.0, 0.0)
    """
    from scipy.special import stdtr

    if len(differences) < 2:
        return math.nan
    mean, spread = abs(float(differences.mean())), float(differences.std(ddof=1))
    if spread == 0:
        return 0.0 if mean else 1.0
    return float(2 * stdtr(len(differences) - 1, -mean / (spread / math.sqrt(len(differences)))))


def p_value(p: float) -> str:
    """Return a p value in words; below 0.0001 its size says nothing more.

    >>> p_value(0.0312), p_value(1e-9)
    ('p = 0.031', 'p < 0.0001')
    """
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def wording(found: Comparison) -> str:
    """Return a comparison's accuracy in words, in points of a per cent, never without its interval.

    >>> right, wrong = np.tile([0.9, 0.1], (20, 1)), np.tile([0.2, 0.8], (20, 1))
    >>> wording(compare(wrong, right, np.zeros(20, np.int64)))
    'better by 100.00 points (95 % interval +100.00 to +100.00; McNemar p < 0.0001)'
    >>> wording(compare(right, right, np.zeros(20, np.int64)))
    'no difference shown: +0.00 points (95 % interval +0.00 to +0.00; McNemar p = 1)'
    """
    low, high, points = (100 * x for x in (found.accuracy_low, found.accuracy_high, found.accuracy_difference))
    evidence = f"(95 % interval {low:+.2f} to {high:+.2f}; McNemar {p_value(found.mcnemar_p)})"
    if found.accuracy_verdict == NO_DIFFERENCE:
        return f"{NO_DIFFERENCE}: {points:+.2f} points {evidence}"
    return f"{found.accuracy_verdict} by {abs(points):.2f} points {evidence}"


def sign_flip_p(differences: Integers) -> float:
    """Return the exact two-sided p value of the sum of differences, had each as well had the other sign.

    For differences of -1, 0 and 1, of two predictors, that is McNemar's exact test, a sign test on the images on which they
    differ; whole numbers beyond carry it over to means of predictors (Fisher's randomisation test). Without any difference
    it is 1. Exact up to `MOST_SUMS` sums; beyond, which takes means of many predictors, by the normal distribution.

    Parameters
    ----------
    differences
        int64 (N,), one an image.

    Examples
    --------
    >>> round(sign_flip_p(np.array([1, 1, 1, 1, 1, 0, 0])), 6)
    0.0625
    """
    from scipy.stats import binom, norm

    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    unit = int(np.gcd.reduce(sizes)) if sizes.size else 1
    if (sizes // unit) @ counts > MOST_SUMS:
        deviations = differences.sum() / np.sqrt((sizes.astype(np.float64) ** 2) @ counts)
        return float(2 * norm.sf(abs(deviations)))
    chances = np.ones(1)  # of the sums -total, -total + 2, ..., total, in that unit
    for size, count in zip(sizes // unit, counts, strict=True):
        flips = np.zeros(size * count + 1)
        flips[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, flips)
    total = len(chances) - 1
    sums = np.arange(-total, total + 1, 2)
    extreme = np.abs(sums) >= abs(int(differences.sum()) // unit)
    return min(1.0, float(f"{chances[extreme].sum():.12g}"))  # without the last digits, which depend on the machine


def _by_image(probabilities: Floats, labels: Integers) -> ByImage:
    """Return hits and negative log-likelihoods, each (M, N), of (M, N, K) or of (N, K) as one predictor."""
    several: npt.NDArray[np.float64] = probabilities if probabilities.ndim == 3 else probabilities[None]
    hits = (several.argmax(axis=2) == labels).astype(np.int64)
    return hits, np.stack([nll_by_image(p, labels) for p in several])
