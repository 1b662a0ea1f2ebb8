"""The mistakes of a predictor: its most confident errors, and the classes that it confuses most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anneal.metrics import Floats, Integers, predicted

MOST_PAIRS = 10
"""Pairs of classes that are listed, at most."""

EXAMPLES = 4
"""Images of a pair that are shown, at most."""


@dataclass(frozen=True)
class Pair:
    """Two classes that are confused: ``count`` images of ``actual`` were taken for ``predicted``.

    Parameters
    ----------
    actual, predicted
        Labels.
    count
        How many images.
    share
        The same as a fraction of the images of ``actual``.
    examples
        int64 (n,), indices of at most `EXAMPLES` of them, the most confident first.
    """

    actual: int
    predicted: int
    count: int
    share: float
    examples: Integers


def confident_errors(probabilities: Floats, labels: Integers) -> Integers:
    """Return the indices of all images whose most probable class is not their label, the most confident first.

    Parameters
    ----------
    probabilities
        float64 (N, K).
    labels
        int64 (N,).

    Examples
    --------
    >>> confident_errors(np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]]), np.array([1, 1, 1]))
    array([1, 0])
    """
    wrong = np.flatnonzero(predicted(probabilities) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")]


def confused_pairs(probabilities: Floats, labels: Integers) -> list[Pair]:
    """Return the pairs of classes that are confused most often, by falling count, at most `MOST_PAIRS`.

    Parameters
    ----------
    probabilities, labels
        As for `confident_errors`.

    Examples
    --------
    >>> pairs = confused_pairs(np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]]), np.array([1, 1, 1]))
    >>> [(pair.actual, pair.predicted, pair.count) for pair in pairs]
    [(1, 0, 2)]
    """
    errors = confident_errors(probabilities, labels)
    totals = np.bincount(labels, minlength=probabilities.shape[1])
    codes = labels[errors] * probabilities.shape[1] + predicted(probabilities)[errors]
    kinds, counts = np.unique(codes, return_counts=True)
    pairs = []
    for which in np.argsort(-counts, kind="stable")[:MOST_PAIRS]:
        actual, taken_for = divmod(int(kinds[which]), probabilities.shape[1])
        count = int(counts[which])
        examples = errors[codes == kinds[which]][:EXAMPLES]
        pairs.append(Pair(actual, taken_for, count, float(count / totals[actual]), examples))
    return pairs
