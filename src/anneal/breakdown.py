"""What each step of the prediction earned, as tables: views, averaging, members, weights, calibration.

Every table is a list of rows with the same keys. Predictions are log-probabilities, float64, as in `anneal.ensemble`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from anneal import metrics
from anneal.ensemble import COMBINE, Floats, combined, diversity, subsets
from anneal.metrics import Integers
from anneal.significance import NO_GAIN, Comparison, compare_all

Row = dict[str, Any]

AVERAGINGS = {"probability": "probability", "logit": "logit", "log_probability": "logit"}
"""Ways to average, of the grid, to those that differ: of logits and of log-probabilities is one, normalised."""

MEANS = {"probability": COMBINE["probability_mean"], "logit": COMBINE["logit_mean"]}
"""What averages in the ways that differ."""

MOST_SUBSETS = 32
"""Subsets of a size behind a point of the curve over the number of members."""

CURVE_ROWS = 200
"""Largest number of points of a risk-coverage curve that is written."""


EXPORTED = "tta"
"""Label of the exported predictor's views, where they are more than the image itself."""


@dataclass(frozen=True)
class Candidate:
    """One kind of predictor in the grid, on one split: networks that stand alone, or groups of them that are combined.

    Parameters
    ----------
    name
        ``single``, ``ema``, ``snapshots``, ``soup_greedy``, ...
    members
        Names of the members behind it; of a soup those that went into it.
    groups
        Indices of the networks of each predictor, G of them: ``[[0], [1]]`` for two networks that stand alone.
    plain
        Log-probabilities of the networks without views, float64 (M, N, K).
    averaged
        Label of a set of views, to way to average, a key of `MEANS`, to the log-probabilities of the networks over these
        views, float64 (M, N, K).
    costs
        Label of a set of views to the forward passes of a network under them, in those of a stored image.
    """

    name: str
    members: Sequence[str]
    groups: Sequence[Sequence[int]]
    plain: Floats
    averaged: Mapping[str, Mapping[str, Floats]]
    costs: Mapping[str, float]

    def predicted(self, way: str = "probability", views: str | None = None) -> Floats:
        """Return what its predictors say, float64 (G, N, K), views and networks averaged in the same way, a key of `MEANS`."""
        of_networks = self.plain if views is None else self.averaged[views][way]
        return np.stack([MEANS[way](of_networks[list(group)]) for group in self.groups])

    @property
    def size(self) -> float:
        """Networks of a predictor, on average."""
        return sum(len(group) for group in self.groups) / len(self.groups)


def together(members: Candidate) -> Candidate:
    """Return the ensemble of all networks of a candidate."""
    return replace(members, name="ensemble", groups=[range(len(members.plain))])


def split_tables(
    split: str,
    labels: Integers,
    candidates: Sequence[Candidate],
    *,
    combine: str,
    shares: Sequence[float] | None,
    weigh: Callable[[Sequence[int]], Sequence[float] | None],
    averaged: Floats,
    uncalibrated: Floats,
    exported: Floats | None,
    classes: Sequence[str],
    num_resamples: int,
    seed: int,
) -> dict[str, list[Row]]:
    """Return all tables of a split.

    Parameters
    ----------
    split
        Its name.
    labels
        int64 (N,).
    candidates
        First the members, ``single``, then whatever could stand in their place; the ensemble of the members is added.
    combine, shares
        How the members become one; see `anneal.ensemble.combined`.
    weigh
        See `member_gains`.
    averaged
        The members under the exported predictor's views, float64 (M, N, K).
    uncalibrated, exported
        The members combined, float64 (N, K), and the same calibrated; None where nothing was.
    classes
        K names.
    num_resamples, seed
        Of the bootstrap.

    Returns
    -------
    dict
        Name of a file to its rows: ``grid``, ``comparisons``, ``risk_coverage``, ``classwise``, and for two members or more
        ``ensemble``, ``ensemble_members``, ``ensemble_diversity``.
    """
    members = candidates[0]
    final = np.exp(uncalibrated if exported is None else exported)
    pairs = _pairs(candidates, combine, shares, averaged, uncalibrated, exported)
    drawn: dict[str, int] = {"num_resamples": num_resamples, "seed": seed}
    kinds = [*candidates, together(members)] if len(members.plain) > 1 else candidates
    tables = {
        "grid": grid(split, kinds, labels, **drawn),
        "comparisons": comparisons(split, pairs, labels, **drawn),
        "risk_coverage": coverage_curve(split, final, labels),
        "classwise": calibration_by_class(split, classes, final, labels),
    }
    if len(members.members) > 1:
        simple = combine if combine in COMBINE else "probability_mean"
        tables["ensemble"] = size_curve(split, averaged, labels, combine=simple, **drawn)
        tables["ensemble_members"] = member_gains(
            split, members.members, averaged, labels, combine=combine, weigh=weigh, **drawn
        )
        tables["ensemble_diversity"] = pairs_of_members(split, members.members, averaged, labels)
    return tables


def _pairs(
    candidates: Sequence[Candidate],
    combine: str,
    shares: Sequence[float] | None,
    averaged: Floats,
    uncalibrated: Floats,
    exported: Floats | None,
) -> list[tuple[str, str, Floats, Floats]]:
    """Return what is compared: names as in metrics.json, and predictions. What is switched off is not compared with itself."""
    members = candidates[0]
    plain, names = members.plain, list(members.members)
    several, with_views = len(names) > 1, EXPORTED in members.averaged
    ensemble = combined(plain, combine, shares)
    final = uncalibrated if exported is None else exported
    pairs = []
    if with_views:
        pairs.append(("single", "tta", plain, averaged))
    if several:
        pairs.append(("single", "ensemble", plain, ensemble))
    if several and with_views:
        pairs.append(("tta", "uncalibrated", averaged, uncalibrated))
        pairs.append(("ensemble", "uncalibrated", ensemble, uncalibrated))
    if several and combine != "probability_mean":
        pairs.append(("probability_mean", "uncalibrated", COMBINE["probability_mean"](averaged), uncalibrated))
    if exported is not None:
        pairs.append(("uncalibrated", "ensemble_tta", uncalibrated, exported))
    if several or with_views or exported is not None:
        pairs.append(("single", "ensemble_tta", plain, final))
    if several:
        pairs += [(f"members/{name}", "ensemble_tta", plain[i], final) for i, name in enumerate(names)]
    for other in candidates[1:]:
        is_soup = other.name.startswith("soup_")
        same = plain if is_soup else plain[[names.index(name) for name in other.members]]
        pairs.append(("single", other.name, same, other.predicted()))
        if is_soup:
            pairs.append(("ensemble", other.name, ensemble, other.predicted()))
    return pairs


def grid(split: str, candidates: Sequence[Candidate], labels: Integers, *, num_resamples: int, seed: int) -> list[Row]:
    """Return the figures of every kind of predictor, with and without views, under every way to average.

    Figures of a kind are means over its predictors. Members of an ensemble are averaged in the same way as the views.

    Returns
    -------
    list of dict
        Rows of ``split``, ``predictor``, ``views`` (``none``, or a label), ``averaging`` (None where nothing is averaged),
        ``accuracy``, ``nll``, ``ece``, ``forward_passes`` an image, and the columns `anneal.significance.GAIN_KEYS`: what
        the row gains over the one without views that averages members in its way.
    """
    rows: list[Row] = []
    pairs: list[tuple[Floats, Floats]] = []
    gaining: list[list[Row]] = []  # the rows of each pair

    def add(kind: Candidate, views: str | None, averaging: str | None, predictions: Floats) -> Row:
        row = {"split": split, "predictor": kind.name, "views": views or "none", "averaging": averaging}
        cost = kind.size * (1 if views is None else kind.costs[views])
        figures = metrics.mean([_short(p, labels) for p in predictions])
        rows.append({**row, **figures, "forward_passes": round(cost, 6), **NO_GAIN})
        return rows[-1]

    for kind in candidates:
        plain = {way: np.exp(kind.predicted(way)) for way in MEANS}
        for averaging in [None] if kind.size == 1 else AVERAGINGS:
            add(kind, None, averaging, plain[AVERAGINGS[averaging or "probability"]])
        for views in kind.averaged:
            seen = {way: np.exp(kind.predicted(way, views)) for way in MEANS}
            of_way: dict[str, list[Row]] = {way: [] for way in MEANS}
            for averaging, way in AVERAGINGS.items():
                of_way[way].append(add(kind, views, averaging, seen[way]))
            pairs += [(plain[way], seen[way]) for way in MEANS]
            gaining += list(of_way.values())
    found = compare_all(pairs, labels, num_resamples=num_resamples, seed=seed)
    for gain, of_pair in zip(found, gaining, strict=True):
        for row in of_pair:
            row.update(gain.as_gain())
    return rows


def _short(probabilities: Floats, labels: Integers) -> dict[str, float]:
    return {
        "accuracy": metrics.accuracy(probabilities, labels),
        "nll": metrics.nll(probabilities, labels),
        "ece": metrics.ece(probabilities, labels),
    }


COMPARISON_KEYS = ["split", "a", "b", *(field.name for field in fields(Comparison))]
"""Columns of the comparisons, of which there may be none."""


# ---- comparisons ---------------------------------------------------------------------------------------------------------


def comparisons(
    split: str,
    pairs: Sequence[tuple[str, str, Floats, Floats]],
    labels: Integers,
    *,
    num_resamples: int,
    seed: int,
) -> list[Row]:
    """Return what each predictor gains over another: ``split``, ``a``, ``b``, and the fields of `Comparison`, b - a.

    Parameters
    ----------
    split
        Its name.
    pairs
        Name of a, name of b, and the log-probabilities of both, (N, K), or (M, N, K) for the mean of M.
    labels
        int64 (N,).
    num_resamples, seed
        Of the bootstrap.
    """
    probabilities = [(np.exp(p_a), np.exp(p_b)) for _, _, p_a, p_b in pairs]
    found = compare_all(probabilities, labels, num_resamples=num_resamples, seed=seed)
    return [
        {"split": split, "a": a, "b": b, **comparison.as_dict()}
        for (a, b, _, _), comparison in zip(pairs, found, strict=True)
    ]


# ---- the ensemble --------------------------------------------------------------------------------------------------------


def size_curve(
    split: str, predictions: Floats, labels: Integers, *, combine: str, num_resamples: int, seed: int
) -> list[Row]:
    """Return how the ensemble grows: figures of ensembles of 1 to M members, means over subsets of each size.

    Parameters
    ----------
    split
        Its name.
    predictions
        Of the members, float64 (M, N, K).
    labels
        int64 (N,).
    combine
        A key of `COMBINE`.
    num_resamples
        Of the bootstrap.
    seed
        Of the bootstrap, and of the draw where a size has more than `MOST_SUBSETS` subsets.

    Returns
    -------
    list of dict
        Rows of ``split``, ``members``, ``subsets``, ``accuracy``, ``accuracy_low`` and ``accuracy_high`` (the extremes),
        ``nll``, ``ece``, and the columns `anneal.significance.GAIN_KEYS`: what it gains over one member fewer.
    """
    count = len(predictions)
    rows: list[Row] = []
    by_size: list[Floats] = []
    for size in range(1, count + 1):
        chosen = subsets(count, size, most=MOST_SUBSETS, seed=seed)
        by_size.append(np.exp(np.stack([COMBINE[combine](predictions[list(some)]) for some in chosen])))
        values = [_short(p, labels) for p in by_size[-1]]
        mean = metrics.mean(values)
        rows.append(
            {
                "split": split,
                "members": size,
                "subsets": len(chosen),
                "accuracy": mean["accuracy"],
                "accuracy_low": min(value["accuracy"] for value in values),
                "accuracy_high": max(value["accuracy"] for value in values),
                "nll": mean["nll"],
                "ece": mean["ece"],
                **NO_GAIN,
            }
        )
    pairs = list(pairwise(by_size))
    for row, gain in zip(rows[1:], compare_all(pairs, labels, num_resamples=num_resamples, seed=seed), strict=True):
        row.update(gain.as_gain())
    return rows


def member_gains(
    split: str,
    names: Sequence[str],
    predictions: Floats,
    labels: Integers,
    *,
    combine: str,
    weigh: Callable[[Sequence[int]], Sequence[float] | None],
    num_resamples: int,
    seed: int,
) -> list[Row]:
    """Return what each member adds: the whole ensemble against that without the member, with a paired interval.

    Parameters
    ----------
    split
        Its name.
    names
        M of them, two or more.
    predictions
        float64 (M, N, K).
    labels
        int64 (N,).
    combine
        A key of `COMBINE` or of `anneal.ensemble.FITTED`.
    weigh
        Returns the weights of the members with these indices; None where ``combine`` has none.
    num_resamples, seed
        Of the bootstrap.

    Returns
    -------
    list of dict
        Rows of ``split``, ``member``, ``weight``, and the fields of `Comparison`: a without the member, b with it.
    """
    everyone = list(range(len(names)))
    weights = weigh(everyone)
    whole = np.exp(combined(predictions, combine, weights))
    pairs = []
    for index in everyone:
        rest = [other for other in everyone if other != index]
        pairs.append((np.exp(combined(predictions[rest], combine, weigh(rest))), whole))
    gains = compare_all(pairs, labels, num_resamples=num_resamples, seed=seed)
    shares = [1 / len(names)] * len(names) if weights is None else weights
    return [
        {"split": split, "member": name, "weight": share, **gain.as_dict()}
        for name, share, gain in zip(names, shares, gains, strict=True)
    ]


def pairs_of_members(split: str, names: Sequence[str], predictions: Floats, labels: Integers) -> list[Row]:
    """Return how alike the members are, a row a pair: ``split``, ``a``, ``b``, and the fields of `anneal.ensemble.Pair`."""
    classes = predictions.argmax(axis=2)
    rows = []
    for first, second in subsets(len(names), 2, most=10**6, seed=0):
        pair = diversity(classes[first], classes[second], labels)
        rows.append(
            {
                "split": split,
                "a": names[first],
                "b": names[second],
                "disagreement": pair.disagreement,
                "double_fault": pair.double_fault,
                "q_statistic": pair.q_statistic,
            }
        )
    return rows


# ---- calibration ---------------------------------------------------------------------------------------------------------


def calibration_by_class(split: str, classes: Sequence[str], probabilities: Floats, labels: Integers) -> list[Row]:
    """Return each class's share, its mean probability and its calibration error.

    Returns
    -------
    list of dict
        Rows of ``split``, ``class``, ``images``, ``share``, ``mean_probability``, ``ece``; probabilities (N, K), not logs.
    """
    counts = np.bincount(labels, minlength=len(classes))
    errors = metrics.classwise_ece(probabilities, labels)
    means = probabilities.mean(axis=0)
    return [
        {
            "split": split,
            "class": name,
            "images": int(counts[index]),
            "share": float(counts[index] / len(labels)),
            "mean_probability": float(means[index]),
            "ece": float(errors[index]),
        }
        for index, name in enumerate(classes)
    ]


def coverage_curve(split: str, probabilities: Floats, labels: Integers) -> list[Row]:
    """Return the risk-coverage curve, at most `CURVE_ROWS` of its points, the last with all images.

    Returns
    -------
    list of dict
        Rows of ``split``, ``coverage`` (share of the images), ``confidence`` (that of the least confident of them), ``risk``
        (share of mistakes among them) and ``accuracy``.
    """
    risks = metrics.risk_coverage(probabilities, labels)
    confidence = -np.sort(-probabilities.max(axis=1))
    total = len(labels)
    counts = np.unique(np.ceil(np.linspace(0, total, min(CURVE_ROWS, total) + 1)[1:] - 1e-9).astype(np.int64))
    return [
        {
            "split": split,
            "coverage": float(n / total),
            "confidence": float(confidence[n - 1]),
            "risk": float(risks[n - 1]),
            "accuracy": float(1 - risks[n - 1]),
        }
        for n in counts
    ]
