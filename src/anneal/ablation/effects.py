"""Two variants over the same seeds and the same images: the difference, its intervals, and how many seeds would show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from anneal.metrics import Floats, Integers, resamples
from anneal.significance import LEVEL, NO_DIFFERENCE, compare, p_value, sign_flip_p

POWER = 0.8
"""Chance of seeing a difference that is there, which `seeds_needed` plans for."""

MOST_SEEDS = 1000
"""Where `seeds_needed` gives up."""


@dataclass(frozen=True)
class Effect:
    """What b has over a, positive where b is better; fractions of 1.

    Parameters
    ----------
    difference
        Mean over seeds of the accuracy's difference, seed by seed.
    seeds
        Pairs of trainings.
    spread
        Standard deviation of the difference over seeds; None with one.
    seeds_low, seeds_high
        95 % interval by Student's t over seeds: other seeds, the same images. None with one.
    images
        Pairs of predictions; 0 where images were not compared.
    images_low, images_high
        95 % bootstrap interval over images: other images, the same trainings.
    p
        McNemar's test over images, exact; of several seeds its extension to their means (`anneal.significance.sign_flip_p`).
    verdict
        ``better`` and ``worse`` where both intervals leave 0 out and p is below 0.05, else ``no difference shown``.
    """

    difference: float
    seeds: int
    spread: float | None
    seeds_low: float | None
    seeds_high: float | None
    images: int
    images_low: float | None
    images_high: float | None
    p: float | None
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in order."""
        return asdict(self)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval over seeds, with one seed that over images; None where there is neither."""
        if self.seeds_low is not None and self.seeds_high is not None:
            return self.seeds_low, self.seeds_high
        if self.images_low is not None and self.images_high is not None:
            return self.images_low, self.images_high
        return None


def t_interval(values: Sequence[float], *, least_spread: float = 0.0) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean by Student's t; None for fewer than two values.

    ``least_spread`` is the least standard deviation that is believed: two accuracies on the same 100 images are often equal by
    chance.

    >>> low, high = t_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf(1 - LEVEL / 2, len(values) - 1)) * max(stdev(values), least_spread) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def effect(a: Floats, b: Floats, labels: Integers, *, by_seed: bool = True) -> Effect:
    """Compare two variants, seed by seed and image by image.

    Parameters
    ----------
    a, b
        Log-probabilities, float (M, N, K): of the same M seeds in the same order; where ``by_seed`` is false, of any number
        each, whose means are compared over images alone.
    labels
        int64 (N,).
    by_seed
        Whether seeds are pairs.

    Examples
    --------
    >>> labels = np.zeros(40, np.int64)
    >>> right, wrong = np.log([[0.9, 0.1]] * 40), np.log([[0.2, 0.8]] * 40)
    >>> found = effect(np.stack([wrong, wrong]), np.stack([right, right]), labels)
    >>> found.difference, round(found.seeds_low, 3), found.verdict
    (1.0, 0.775, 'better')
    """
    over_images = compare(np.exp(a.astype(np.float64)), np.exp(b.astype(np.float64)), labels)
    if not by_seed:
        return _effect([over_images.accuracy_difference], over_images.accuracy_low, over_images.accuracy_high,
                       over_images.mcnemar_p, len(labels))  # fmt: skip
    differences = [float(y - x) for x, y in zip(accuracies(a, labels), accuracies(b, labels), strict=True)]
    return _effect(differences, over_images.accuracy_low, over_images.accuracy_high, over_images.mcnemar_p, len(labels))


def interaction(full: Floats, one: Floats, other: Floats, both: Floats, labels: Integers) -> Effect:
    """Return what two techniques earn together beyond the sum of what each earns alone.

    With ``f`` the accuracy of the full recipe, ``a`` and ``b`` without the one and the other, ``ab`` without both, that is
    ``(f - ab) - (f - a) - (f - b) = a + b - f - ab``: below 0 where they do in part the same, above where they need each
    other.

    Parameters
    ----------
    full, one, other, both
        Log-probabilities, float (M, N, K), of the same seeds: with all, without the one, without the other, without both.
    labels
        int64 (N,).
    """
    hits = [(x.argmax(axis=2) == labels).astype(np.int64) for x in (full, one, other, both)]
    each = hits[1] + hits[2] - hits[0] - hits[3]
    per_image = each.sum(axis=0)
    drawn = np.concatenate([counts.astype(np.float64) @ per_image for counts in resamples(len(labels), 1000, 0)])
    low, high = np.quantile(drawn / (len(labels) * len(each)), [LEVEL / 2, 1 - LEVEL / 2])
    return _effect([float(x) for x in each.mean(axis=1)], float(low), float(high), sign_flip_p(per_image), len(labels))


def _effect(differences: Sequence[float], low: float, high: float, p: float, images: int) -> Effect:
    over_seeds = t_interval(differences, least_spread=1 / images)
    mean = fmean(differences)
    shown = not low <= 0 <= high and p < LEVEL
    if over_seeds is not None:
        shown = shown and not over_seeds[0] <= 0 <= over_seeds[1]
    return Effect(
        difference=mean,
        seeds=len(differences),
        spread=stdev(differences) if len(differences) > 1 else None,
        seeds_low=over_seeds[0] if over_seeds else None,
        seeds_high=over_seeds[1] if over_seeds else None,
        images=images,
        images_low=low,
        images_high=high,
        p=p,
        verdict=("better" if mean > 0 else "worse") if shown else NO_DIFFERENCE,
    )


def accuracies(log_probabilities: Floats, labels: Integers) -> Floats:
    """Return the accuracy of each of M predictors: float64 (M,), of (M, N, K)."""
    return np.asarray((log_probabilities.argmax(axis=2) == labels).mean(axis=1), dtype=np.float64)


def seeds_needed(difference: float, spread: float) -> int | None:
    """Return the pairs of trainings of which four in five such studies would show a difference of this size.

    That is the smallest n with ``(t(0.975, n - 1) + t(0.8, n - 1)) x spread / sqrt(n) <= abs(difference)``, the usual plan
    of a paired t test (Cohen 1988, ch. 2).

    Parameters
    ----------
    difference, spread
        Mean and standard deviation of the difference over seeds.

    Returns
    -------
    int or None
        None where there is no difference to see, or more than `MOST_SEEDS` would be needed.

    Examples
    --------
    >>> seeds_needed(0.01, 0.01), seeds_needed(0.01, 0.02), seeds_needed(0.0, 0.01)
    (10, 34, None)
    """
    from scipy.stats import t

    if difference == 0 or spread > abs(difference) * MOST_SEEDS:
        return None
    for count in range(2, MOST_SEEDS + 1):
        quantiles = float(t.ppf(1 - LEVEL / 2, count - 1) + t.ppf(POWER, count - 1))
        if quantiles * spread / math.sqrt(count) <= abs(difference):
            return count
    return None


def points(value: float) -> str:
    """Return a difference in points of a per cent.

    >>> points(0.0123), points(-0.00001)
    ('+1.23', '+0.00')
    """
    return f"{round(100 * value, 2) + 0.0:+.2f}"


def in_words(found: Effect, words: Mapping[str, str]) -> str:
    """Say what an effect shows, never without its intervals.

    Parameters
    ----------
    found
        The effect.
    words
        What ``better``, ``worse`` and ``no difference shown`` are called here.
    """
    evidence = []
    if found.seeds_low is not None and found.seeds_high is not None:
        evidence.append(f"{points(found.seeds_low)} to {points(found.seeds_high)} over {found.seeds} seeds")
    if found.images_low is not None and found.images_high is not None:
        evidence.append(f"{points(found.images_low)} to {points(found.images_high)} over {found.images:,} images")
    if found.p is not None:
        evidence.append(f"McNemar {p_value(found.p)}")
    return f"{words[found.verdict]}: {points(found.difference)} points (95 % intervals {'; '.join(evidence)})"
