"""Predictions into reports/metrics.json: each predictor's figures with intervals, and their names in MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anneal import metrics
from anneal.ensemble import Floats, combined
from anneal.predicting import Predictions
from anneal.store import Labels


def split_figures(
    members: Sequence[str],
    found: Predictions,
    *,
    combine: str,
    shares: Sequence[float] | None,
    exported: Floats,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return one split's entry of metrics.json.

    ``members``: each alone; ``single`` and ``tta``: the members' mean, without and with views; ``ensemble`` and
    ``ensemble_tta``: the members combined, without and with views, the latter calibrated, which makes it the exported
    predictor; ``uncalibrated``: that without the calibration.

    Parameters
    ----------
    members
        M names.
    found
        Their predictions.
    combine, shares
        See `anneal.ensemble.combined`.
    exported
        Probabilities of the exported predictor, float64 (N, K).
    num_resamples, seed
        Of the bootstrap.
    """
    count = len(members)
    predictors = [
        *np.exp(found.plain),
        *np.exp(found.averaged),
        np.exp(combined(found.plain, combine, shares)),
        exported,
        np.exp(combined(found.averaged, combine, shares)),
    ]
    values = [metrics.figures(p, found.labels) for p in predictors]
    resampled = metrics.bootstrap(predictors, found.labels, num_resamples=num_resamples, seed=seed)
    num_images = len(found.labels)
    each = [metrics.with_intervals(v, r, num_images) for v, r in zip(values, resampled, strict=True)]
    single, tta = (
        metrics.with_intervals(
            metrics.mean(values[chosen]), metrics.mean(resampled[chosen]), num_images, is_mean=count > 1
        )
        for chosen in (slice(0, count), slice(count, 2 * count))
    )
    ensemble, ensemble_tta, uncalibrated = each[2 * count :]
    return {
        "members": dict(zip(members, each[:count], strict=True)),
        "single": single,
        "tta": tta,
        "ensemble": ensemble,
        "ensemble_tta": ensemble_tta,
        "uncalibrated": uncalibrated,
    }


def absent(labels: Labels, classes: Sequence[str]) -> list[str]:
    """Return the names of the classes that no image has.

    >>> absent(np.array([0, 2]), ["cat", "dog", "fox"])
    ['dog']
    """
    counts = np.bincount(labels, minlength=len(classes))
    return [name for name, count in zip(classes, counts, strict=True) if not count]


def tracked(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics.json as MLflow's metrics: ``test/accuracy`` is the exported predictor's, others ``test/ensemble/accuracy``.

    The ends of the exported predictor's intervals are ``test/accuracy_ci_low`` and ``test/accuracy_ci_high``.
    """
    flat: dict[str, float] = {}
    for split, of_split in figures.items():
        groups = {f"members/{name}/": values for name, values in of_split["members"].items()}
        groups |= {f"{name}/": of_split[name] for name in ("single", "tta", "ensemble", "uncalibrated")}
        groups[""] = of_split["ensemble_tta"]
        for prefix, values in groups.items():
            for name, value in values.items():
                if not isinstance(value, list):
                    flat[f"{split}/{prefix}{name}"] = value
                elif not prefix:
                    flat[f"{split}/{name}_low"], flat[f"{split}/{name}_high"] = value
    return flat


HEADLINE = (
    *("accuracy", "macro_accuracy", "macro_f1", "nll", "ece"),
    *("single/accuracy", "tta/accuracy", "ensemble/accuracy"),
)
"""Metrics by which runs are compared."""


def headline(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of `HEADLINE`, of every split: a column of the runs table each."""
    return {name: value for name, value in tracked(figures).items() if name.split("/", 1)[1] in HEADLINE}
