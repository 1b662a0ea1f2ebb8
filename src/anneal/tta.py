"""Which views help: a greedy choice on validation, and what each view costs and earns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from anneal import calibration, metrics
from anneal.ensemble import Floats
from anneal.metrics import Integers
from anneal.significance import NO_GAIN, compare_all
from anneal.views import average_views

Combine = Callable[[Floats], Floats]
"""Members' log-probabilities, float64 (M, N, K), into one: (N, K)."""

TOGETHER = "chosen"
"""Row of the table for the views of the exported predictor together."""

DIGITS = 9
"""Likelihoods that agree to as many decimals count as equal, so that a view which changes nothing is not chosen."""


def averaged(by_view: Floats, weights: Sequence[int], average: str, chosen: Sequence[int]) -> Floats:
    """Return each member's mean over the chosen views: log-probabilities, float64 (M, N, K).

    Parameters
    ----------
    by_view
        Log-probabilities, float64 (M, E, N, K), of M members under E views.
    weights
        E numbers: the images that each view stands for.
    average
        A key of `anneal.views.AVERAGE`.
    chosen
        Indices of views.
    """
    picked = list(chosen)
    return np.stack([average_views(member[picked], [weights[i] for i in picked], average) for member in by_view])


def select_greedy(
    by_view: Floats,
    labels: Integers,
    *,
    weights: Sequence[int],
    costs: Sequence[float],
    average: str,
    combine: Combine,
    calibrate: bool,
    start: int = 0,
) -> list[int]:
    """Return the views that lower the negative log-likelihood, best first, from the view ``start`` on.

    In each round the view joins that lowers the likelihood of all chosen views together most, the cheaper one where two do
    alike; it ends where none lowers it. With ``calibrate`` each set is judged at the temperature that suits it best, since
    averaging also softens, which calibration gives for nothing (Molchanov et al. 2020, "Greedy policy search").

    Parameters
    ----------
    by_view, weights, average
        As for `averaged`, on the validation split.
    labels
        int64 (N,).
    costs
        E costs in forward passes, which settle ties.
    combine
        How members become one.
    calibrate
        Whether a temperature is fitted to each set.
    start
        Index of the identity.

    Returns
    -------
    list of int
        Indices of views, ``start`` first.
    """

    def loss(chosen: Sequence[int]) -> float:
        values = combine(averaged(by_view, weights, average, chosen))
        return round(metrics.nll(_probabilities(values, values if calibrate else None, labels), labels), DIGITS)

    chosen = [start]
    left = [index for index in range(by_view.shape[1]) if index != start]
    best = loss(chosen)
    while left:
        found, _, index = min((loss([*chosen, index]), costs[index], index) for index in left)
        if found >= best:
            break
        best = found
        chosen.append(index)
        left.remove(index)
    return chosen


def table(
    names: Sequence[str],
    by_view: Mapping[str, Floats],
    labels: Mapping[str, Integers],
    *,
    weights: Sequence[int],
    costs: Sequence[float],
    chosen: Sequence[int],
    average: str,
    combine: Combine,
    calibrate: bool,
    splits: Sequence[str],
    num_resamples: int,
    seed: int,
    start: int = 0,
) -> list[dict[str, Any]]:
    """Return what each view costs and earns, a row a view, and a last row for the chosen ones together.

    Parameters
    ----------
    names
        E labels of views.
    by_view, labels
        Split to log-probabilities, float64 (M, E, N, K), and to labels; ``val`` is there where ``calibrate`` is.
    weights, costs, average, combine, start
        As for `select_greedy`.
    chosen
        Indices of the exported predictor's views, in order.
    calibrate
        Whether the predictor of each row has a temperature of its own, fitted on ``val``.
    splits
        Those of the columns.
    num_resamples, seed
        Of the bootstrap behind the intervals.

    Returns
    -------
    list of dict
        ``view``, ``images`` that it stands for, ``passes`` that it costs, ``chosen``: its place among the exported
        predictor's views or none; and for each split ``<split>_accuracy``, ``_nll`` and ``_ece`` of the view alone, and
        what adding it to the identity gains, ``<split>_`` and the columns `anneal.significance.GAIN_KEYS`. In the last row
        both are of the chosen views together.
    """

    def predicted(indices: Sequence[int]) -> dict[str, Floats]:
        combined = {name: combine(averaged(of, weights, average, indices)) for name, of in by_view.items()}
        fitted = combined["val"] if calibrate else None
        return {name: _probabilities(combined[name], fitted, labels.get("val")) for name in splits}

    plain = predicted([start])
    rows: list[dict[str, Any]] = []
    pairs: dict[str, list[tuple[Floats, Floats]]] = {split: [] for split in splits}
    together = [(TOGETHER, list(chosen))] if list(chosen) != [start] else []
    for name, indices in [*((name, [index]) for index, name in enumerate(names)), *together]:
        is_view = name != TOGETHER
        own = predicted(indices)
        added = predicted([start, *indices]) if is_view and indices != [start] else own
        row: dict[str, Any] = {
            "view": name,
            "images": sum(weights[i] for i in indices),
            "passes": round(sum(costs[i] for i in indices), 6),
            "chosen": chosen.index(indices[0]) + 1 if is_view and indices[0] in chosen else None,
        }
        for split in splits:
            of = labels[split]
            row |= {f"{split}_{key}": getattr(metrics, key)(own[split], of) for key in ("accuracy", "nll", "ece")}
            row |= {f"{split}_{key}": value for key, value in NO_GAIN.items()}
            pairs[split].append((plain[split], added[split]))
        rows.append(row)
    for split in splits:
        gains = compare_all(pairs[split], labels[split], num_resamples=num_resamples, seed=seed)
        for row, gain in zip(rows, gains, strict=True):
            if row["view"] != names[start]:
                row.update({f"{split}_{key}": value for key, value in gain.as_gain().items()})
    return rows


def _probabilities(values: Floats, fitted: Floats | None, labels: Integers | None) -> Floats:
    """Return log-probabilities as probabilities, at the temperature that suits ``fitted`` and its labels where it is given."""
    if fitted is None:
        return np.exp(values)
    assert labels is not None
    return np.exp(calibration.apply_temperature(values, calibration.fit_temperature(fitted, labels)))
