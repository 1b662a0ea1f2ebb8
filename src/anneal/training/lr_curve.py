"""Reading the curve of a learning-rate range test: which rates train, and which one to take."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

CLEAR = 8.0
"""Standard deviations of the smoothed curve's noise by which the loss has to fall: 1 in 500 curves of pure noise does."""


@dataclass(frozen=True)
class LRRange:
    """What a range test saw.

    Parameters
    ----------
    rates
        Learning rate of each optimizer step, rising.
    losses
        Mean over the samples of each step of what is trained on, without penalties, before the step moves the weights;
        finite.
    smoothed
        `smooth` of the losses.
    num_steps
        Steps that the test was to have; it has fewer where the loss blew up.
    suggestion
        Peak learning rate, to three significant digits; None where the curve shows none.
    reason
        Why there is no suggestion; empty where there is one.
    descent
        Rates between which nine tenths of the descent lie, and where the smoothed loss is lowest; None without descent.
    steepest
        Rate at which the smoothed loss falls fastest by the logarithm of the rate; None without descent.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    num_steps: int
    suggestion: float | None = None
    reason: str = ""
    descent: tuple[float, float] | None = None
    steepest: float | None = None

    def panels(self) -> list[dict[str, Any]]:
        """Return the picture of the test as plain values, for `anneal.reporting.lines.from_values`."""
        marks = {} if self.suggestion is None else {f"suggestion {self.suggestion:g}": self.suggestion}
        # The blow-up would flatten all else.
        finite = self.smoothed or [0.0]
        low, top = min(self.losses, default=0.0), max(self.losses[: max(1, len(self.losses) // 4)], default=1.0)
        room = 0.1 * (top - min(low, *finite)) or 1.0
        return [
            {
                "lines": [
                    {"label": "loss of a step", "x": self.rates, "y": self.losses, "style": ".", "colour": 1},
                    {"label": "smoothed", "x": self.rates, "y": self.smoothed, "colour": 0},
                ],
                "x_label": "learning rate",
                "y_label": "training loss",
                "log_x": True,
                "marks": marks,
                "y_limits": (low - room, top + 3 * room),
            }
        ]


def exponential_rates(start: float, stop: float, num_steps: int) -> list[float]:
    """Return rates from ``start`` to ``stop``, each the same multiple of the one before.

    >>> [round(rate, 4) for rate in exponential_rates(0.001, 1.0, 4)]
    [0.001, 0.01, 0.1, 1.0]
    """
    return [start * (stop / start) ** (i / (num_steps - 1)) for i in range(num_steps)]


def smooth(losses: Sequence[float], weight: float) -> list[float]:
    """Return the exponential moving average of a curve with bias correction (Kingma & Ba 2015, section 3).

    Parameters
    ----------
    losses
        Values by step.
    weight
        Of the past, in [0, 1): about ``1 / (1 - weight)`` values count.

    Examples
    --------
    >>> smooth([1.0, 1.0, 4.0], 0.5)
    [1.0, 1.0, 2.7142857142857144]
    """
    total, values = 0.0, []
    for i, loss in enumerate(losses, 1):
        total = weight * total + (1.0 - weight) * loss
        values.append(total / (1.0 - weight**i))
    return values


def smoothing_weight(num_steps: int) -> float:
    """Return the weight with which a test of so many steps is smoothed: over a tenth of it, whatever its length.

    >>> smoothing_weight(100)
    0.9
    """
    return 1.0 - 10.0 / num_steps


def valley(losses: Sequence[float]) -> int:
    """Return the index of the learning rate to take, by fastai's ``valley`` rule.

    The longest strictly falling subsequence of the curve (its points need not be neighbours) is the valley; of several
    equally long ones the first to end counts. The rule goes back as many points as it has from where it ends, and from
    there half of them forward: ``end - n + n // 3 + n // 6`` for ``n`` points.

    Parameters
    ----------
    losses
        Smoothed losses at rates that rise by the same factor, at least one.

    Examples
    --------
    >>> valley([3.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 9.0])
    3
    """
    lengths: list[int] = []
    for i, loss in enumerate(losses):
        lengths.append(1 + max((lengths[j] for j in range(i) if losses[j] > loss), default=0))
    longest = max(lengths)
    if longest == 1:
        return 0
    return max(0, lengths.index(longest) - longest + longest // 3 + longest // 6)


def noise(losses: Sequence[float]) -> float:
    """Return the standard deviation of a curve about its trend, from the mean difference of neighbours.

    >>> round(noise([1.0, 2.0, 1.0, 2.0, 1.0]), 3)
    0.886
    """
    differences = [abs(b - a) for a, b in itertools.pairwise(losses)]
    return statistics.fmean(differences) * math.sqrt(math.pi) / 2.0 if differences else 0.0


def read_curve(rates: Sequence[float], losses: Sequence[float], num_steps: int) -> LRRange:
    """Judge the curve of a range test.

    As fastai does, the rule leaves out the first tenth of the steps, over which smoothing has yet to begin, and the last
    five points. There is no suggestion where

    - the smoothed loss does not fall below its level over the first tenth by `CLEAR` standard deviations of its noise,
      and by a thousandth,
    - it is lowest at the highest rates, so that the best may lie beyond, or
    - it fell by a quarter of the whole within the first tenth, so that the best may lie below.

    Parameters
    ----------
    rates, losses
        Of the steps that the test took; the losses are finite.
    num_steps
        Steps that it was to take.
    """
    weight = smoothing_weight(num_steps)
    smoothed = smooth(losses, weight)
    seen = LRRange(list(rates), list(losses), smoothed, num_steps)
    tenth, end = num_steps // 10, len(losses) - 5
    if end <= tenth + 2:
        where = f"at a rate of {rates[-1]:.3g}" if rates else "at the first step"
        return replace(
            seen, reason=f"the loss blew up {where}, {len(losses)} of {num_steps} steps into it; start lower"
        )
    level, lowest = smoothed[tenth - 1], min(smoothed[tenth:])
    last = tenth + smoothed[tenth:].index(lowest)
    spread = noise(losses[:last])
    # The level lags: it is the mean over the tenth, half of what the loss fell by its end.
    if losses[0] - level > max((losses[0] - lowest) / 8.0, CLEAR / 2.0 * spread):
        return replace(seen, reason=f"the loss falls already at the lowest rates, from {rates[0]:.3g} on; start lower")
    clear = max(CLEAR * spread * math.sqrt((1.0 - weight) / (1.0 + weight)), 1e-3 * level)
    if not level - lowest > clear:
        reason = (
            f"the loss never descends: smoothed it is {level:.4g} at the lowest rates and {lowest:.4g} at its lowest, no "
            f"more apart than the noise of the curve can make them ({clear:.2g})"
        )
        return replace(seen, reason=reason)
    first = max(i for i in range(tenth - 1, last) if smoothed[i] > level - 0.1 * (level - lowest))
    steepest = min(range(first, last), key=lambda i: smoothed[i + 1] - smoothed[i])
    seen = replace(seen, descent=(rates[first], rates[last]), steepest=rates[steepest])
    if last >= end and len(losses) == num_steps:
        return replace(seen, reason=f"the loss still falls at the highest rates, up to {rates[-1]:.3g}; stop higher")
    suggestion = rates[tenth + valley(smoothed[tenth:end])]
    return replace(seen, suggestion=float(f"{suggestion:.3g}"))
