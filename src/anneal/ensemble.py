"""Members' predictions into one.

Predictions travel as log-probabilities, float64, so that nothing underflows and a mean of logits needs no logits:
they differ from log-probabilities by a constant an image, which the softmax takes out again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, StringConstraints

from anneal.params import MEMBER_SECTIONS, Strict
from anneal.seeding import generator

MemberName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


def _member_schema(schema: dict[str, Any]) -> None:
    """Name the sections that a member may override, so that a mistyped one is a fault."""
    option = {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: {"type": "integer"} if name == "seed" else {"type": "object"} for name in MEMBER_SECTIONS},
    }
    members = schema["properties"]["members"]
    members["additionalProperties"] = {"anyOf": [option, {"type": "null"}]}
    members["propertyNames"] = {"pattern": "^[A-Za-z0-9_-]+$"}
    members.pop("patternProperties", None)


class EnsembleConfig(Strict):
    """Section ``ensemble``: who trains, and how their predictions combine."""

    model_config = {"json_schema_extra": _member_schema}

    members: Annotated[dict[MemberName, dict[str, Any] | None], Field(min_length=1)]
    combine: Literal["probability_mean", "logit_mean", "vote", "weighted", "greedy"]


Floats = npt.NDArray[np.float64]


def log_softmax(logits: npt.NDArray[np.floating]) -> Floats:
    """Return logits (..., K) as log-probabilities, float64.

    >>> np.exp(log_softmax(np.array([0.0, 0.0])))
    array([0.5, 0.5])
    """
    values = np.asarray(logits, np.float64)
    values = values - values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def probability_mean(log_probabilities: Floats) -> Floats:
    """Return the mean of the probabilities over the first axis (Lakshminarayanan et al. 2017).

    Parameters
    ----------
    log_probabilities
        float64 (M, N, K): of M members, or views, on N images.

    Returns
    -------
    ndarray
        Log-probabilities, float64 (N, K); so in every function here.
    """
    if len(log_probabilities) == 1:
        return log_probabilities[0]
    return log_softmax(np.logaddexp.reduce(log_probabilities, axis=0))


def logit_mean(log_probabilities: Floats) -> Floats:
    """Return the softmax of the mean logits, which is the normalised geometric mean of the probabilities.

    Sharper than `probability_mean`; one member that is sure that it is not a class can veto it.
    """
    if len(log_probabilities) == 1:
        return log_probabilities[0]
    return log_softmax(log_probabilities.mean(axis=0))


def vote(log_probabilities: Floats) -> Floats:
    """Return the shares of the members' votes, the members' mean probability counting as one more vote.

    The extra vote breaks ties and cannot turn a majority, and it keeps the likelihood of a class without votes finite.
    One member alone is returned as it is.
    """
    if len(log_probabilities) == 1:
        return log_probabilities[0]
    classes = log_probabilities.shape[-1]
    votes = (log_probabilities.argmax(axis=-1)[..., None] == np.arange(classes)).sum(axis=0)
    with np.errstate(divide="ignore"):
        return log_softmax(np.logaddexp(np.log(votes), probability_mean(log_probabilities)))


COMBINE: dict[str, Callable[[Floats], Floats]] = {
    "probability_mean": probability_mean,
    "logit_mean": logit_mean,
    "vote": vote,
}
"""``ensemble.combine`` without weights; the first two also average views."""


# ---- weights -----------------------------------------------------------------------------------------------------------

SMALLEST_WEIGHT = 1e-3
"""A fitted weight below this is none: its member need not be run."""

MOST_DRAWS = 100
"""Members that a greedy selection may hold, one counted as often as it was drawn."""


def weighted_mean(log_probabilities: Floats, weights: Sequence[float]) -> Floats:
    """Return the weighted mean of the probabilities over the first axis, M weights from 0 that sum to 1.

    A member without weight is as good as not there: to the last bit the result is that without it.
    """
    shares = np.asarray(weights, np.float64)
    there = np.flatnonzero(shares)
    if len(there) == 1:
        return log_probabilities[there[0]]
    return log_softmax(np.logaddexp.reduce(log_probabilities[there] + np.log(shares[there])[:, None, None], axis=0))


def fit_weights(log_probabilities: Floats, labels: npt.NDArray[np.int64]) -> list[float]:
    """Return the weights, from 0 and of sum 1, of the mean of the probabilities with the least negative log-likelihood.

    The problem is convex; it is solved by expectation maximisation (Dempster et al. 1977), members as the components of
    a mixture, until the likelihood is within 1e-7 of the best. Weights below `SMALLEST_WEIGHT` are then set to 0.

    Parameters
    ----------
    log_probabilities
        float64 (M, N, K), of the members on the validation split.
    labels
        int64 (N,).
    """
    own = _likelihoods(log_probabilities, labels)
    weights = np.full(len(own), 1 / len(own))
    for _ in range(10_000):
        # The mean of own / mixture is the gradient; its largest entry less 1 bounds what is left to gain.
        gradient = (own / (weights @ own)).mean(axis=1)
        if gradient.max() - 1 < 1e-7:
            break
        weights = weights * gradient
        weights /= weights.sum()
    weights[weights < SMALLEST_WEIGHT] = 0.0
    return [float(w) for w in weights / weights.sum()]


def greedy_weights(log_probabilities: Floats, labels: npt.NDArray[np.int64]) -> list[float]:
    """Return the weights of a greedy selection with replacement (Caruana et al. 2004).

    From the member with the least negative log-likelihood on, the member is added that lowers the likelihood of the mean
    probability most, again and again, one more than once if need be, until none does: the start and the end keep a small
    validation split from being fitted to. The weight of a member is its share of the selection.

    Parameters
    ----------
    log_probabilities, labels
        As in `fit_weights`.
    """
    own = _likelihoods(log_probabilities, labels)
    counts = np.zeros(len(own), np.int64)
    total, best = np.zeros(own.shape[1]), np.inf
    while counts.sum() < MOST_DRAWS:
        losses = -np.log((total + own) / (counts.sum() + 1)).mean(axis=1)
        chosen = int(losses.argmin())
        if not losses[chosen] < best - 1e-12:
            break
        best, total = losses[chosen], total + own[chosen]
        counts[chosen] += 1
    return [float(w) for w in counts / counts.sum()]


FITTED: dict[str, Callable[[Floats, npt.NDArray[np.int64]], list[float]]] = {
    "weighted": fit_weights,
    "greedy": greedy_weights,
}
"""``ensemble.combine`` with weights that are fitted on validation."""


def combined(log_probabilities: Floats, combine: str, weights: Sequence[float] | None = None) -> Floats:
    """Return members' predictions as one, by ``ensemble.combine`` and, where it fits some, the weights.

    Parameters
    ----------
    log_probabilities
        float64 (M, N, K).
    combine
        A key of `COMBINE` or of `FITTED`.
    weights
        M of them, for a key of `FITTED`.
    """
    if combine in COMBINE:
        return COMBINE[combine](log_probabilities)
    assert weights is not None
    return weighted_mean(log_probabilities, weights)


def _likelihoods(log_probabilities: Floats, labels: npt.NDArray[np.int64]) -> Floats:
    """Return the probability of each label: float64 (M, N), none below 2.2e-16, as in `anneal.metrics.nll`."""
    return np.clip(np.exp(log_probabilities[:, np.arange(len(labels)), labels]), np.finfo(np.float64).eps, 1.0)


# ---- what members are to each other --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """How alike two predictors are.

    Parameters
    ----------
    disagreement
        Share of the images to which they give different classes.
    double_fault
        Share of the images that both get wrong.
    q_statistic
        Yule's Q of their hits, -1 to 1: 1, they miss the same images; 0, independent ones. None where it is 0 / 0.
    """

    disagreement: float
    double_fault: float
    q_statistic: float | None


def diversity(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> Pair:
    """Compare the classes that two predictors give, each int64 (N,) (Kuncheva & Whitaker 2003).

    >>> diversity(np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([0, 0, 0]))
    Pair(disagreement=0.3333333333333333, double_fault=0.3333333333333333, q_statistic=1.0)
    """
    hit, other = first == labels, second == labels
    both, neither = int((hit & other).sum()), int((~hit & ~other).sum())
    one, two = int((hit & ~other).sum()), int((~hit & other).sum())
    scale = both * neither + one * two
    return Pair(
        disagreement=float((first != second).mean()),
        double_fault=neither / len(labels),
        q_statistic=(both * neither - one * two) / scale if scale else None,
    )


def subsets(members: int, size: int, *, most: int, seed: int) -> list[tuple[int, ...]]:
    """Return all subsets of ``size`` of ``members`` indices, or ``most`` of them, drawn by key, where there are more.

    >>> subsets(3, 2, most=10, seed=0)
    [(0, 1), (0, 2), (1, 2)]
    """
    if comb(members, size) <= most:
        return list(combinations(range(members), size))
    random = generator(seed, "subsets", members, size)
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < most:
        drawn[tuple(sorted(int(i) for i in random.choice(members, size, replace=False)))] = None
    return list(drawn)
