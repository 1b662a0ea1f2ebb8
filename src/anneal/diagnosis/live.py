"""What is certain while a run still goes on: rules that training reads at the end of each epoch.

A module of its own: a change here trains again, while a threshold of `anneal.diagnosis.rules` runs ``diagnose`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal, get_args

LiveName = Literal["diverging", "dead_at_start"]
"""What ``trainer.stop_on`` may hold."""

NAMES: tuple[LiveName, ...] = get_args(LiveName)

BLOWN_UP = 3.0
"""Loss of a step over that of the first, from which on a run has blown up."""

NOT_BACK = 1.0
"""Median loss of the newest steps over that of the first, or of chance if that is less, from which on a run that has blown up
did not come back."""

KNOWS = 0.5
"""Median loss of the newest steps over that of chance, below which a run has not diverged, however low the first step's was, as that
of a network that was trained before is."""

NEWEST = 5
"""Fewest steps that are read for the newest loss; a tenth of all where that is more."""

NO_GRADIENT = 1e-9
"""Gradient of a hidden layer over that of the logits, up to which nothing reaches it: rounding of float32, and then some."""

SAME = 1e-6
"""Difference between a layer's units up to which they are the same: some roundings of float32."""

Row = Mapping[str, Any]
"""A row of initial.csv: ``layer``, ``kind``, ``grad_norm``, ``spread``, ``closed``, and others; None for an empty cell."""


def diverged(step_losses: Sequence[float], chance: float = math.inf) -> dict[str, float | None] | None:
    """Return the figures of a run that has diverged, None for any other.

    A loss that is no number; or one that rose above `BLOWN_UP` times that of the first step, in a run whose newest steps are,
    at `NOT_BACK` times the loss of the first step or of chance, hardly better than these. A network that was trained before starts
    far below chance and may be worse for a while: it has diverged where it is above `KNOWS` times chance.

    Parameters
    ----------
    step_losses
        Of the run so far, the first step's first.
    chance
        Loss of a network that knows nothing; infinite where that is not known.

    Examples
    --------
    >>> diverged([2.3, 2.1, 7.5, 1.7, 1.2, 1.1, 1.0, 0.9])
    >>> diverged([2.3, 9.1, 55.0, 2.4, 2.3, 2.4, 2.3])
    {'first_loss': 2.3, 'highest_loss': 55.0, 'highest_loss_step': 3.0, 'newest_loss': 2.4}
    >>> diverged([0.05, 0.9, 0.2, 0.1], chance=2.3)
    """
    if not step_losses:
        return None
    first, newest = step_losses[0], median(step_losses[-max(NEWEST, len(step_losses) // 10) :])
    broken = next((i for i, loss in enumerate(step_losses) if not math.isfinite(loss)), None)
    highest = max(range(len(step_losses)), key=lambda i: step_losses[i]) if broken is None else broken
    known = chance if math.isfinite(chance) else first
    bad = max(min(first, known), KNOWS * known)
    if broken is None and (step_losses[highest] <= BLOWN_UP * first or newest < NOT_BACK * bad):
        return None
    return {
        "first_loss": _number(first),
        "highest_loss": _number(step_losses[highest]),
        "highest_loss_step": float(highest + 1),
        "newest_loss": _number(newest),
    }


def dead_at_start(initial: Sequence[Row]) -> dict[str, float | None] | None:
    """Return the figures of a network that cannot learn from its initial weights, None for any other.

    No gradient reaches any of its hidden layers; or in one of them all units are the same, and stay the same (Goodfellow et
    al. 2016, 8.4).

    Parameters
    ----------
    initial
        Rows of initial.csv, in forward order.

    Examples
    --------
    >>> head = {"layer": "head", "kind": "linear", "grad_norm": 0.9, "spread": 1.0, "closed": False}
    >>> dead_at_start([{**head, "layer": "1", "grad_norm": 0.1}, head])
    >>> dead_at_start([{**head, "layer": "1", "grad_norm": 0.0}, head])
    {'largest_hidden_gradient': 0.0, 'least_difference_of_units': 1.0, 'hidden_layers': 1.0}
    """
    layers = [row for row in initial if row["kind"] in ("conv", "linear")]
    if len(layers) < 2 or not layers[-1]["grad_norm"]:
        return None
    head = float(layers[-1]["grad_norm"])
    hidden = [row for row in layers[:-1] if row["grad_norm"] is not None and not row["closed"]]
    gradients = [float(row["grad_norm"]) / head for row in hidden]
    spreads = [float(row["spread"]) for row in hidden if row["spread"] is not None]
    if not gradients or not all(map(math.isfinite, gradients)):
        return None
    if max(gradients) > NO_GRADIENT and min(spreads, default=math.inf) > SAME:
        return None
    return {
        "largest_hidden_gradient": max(gradients),
        "least_difference_of_units": _number(min(spreads, default=math.inf)),
        "hidden_layers": float(len(hidden)),
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
