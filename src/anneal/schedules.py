"""Learning-rate schedules: pure functions of the optimizer step that return a factor of the peak rate."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from anneal.params import LENGTH, Length, ParamsError, Strict, UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
Gamma = Annotated[float, Field(gt=0, le=1)]
Momentum = Annotated[float, Field(gt=0, lt=1)]


class WarmupConfig(Strict):
    """``schedule.warmup``: a rise from ``start`` times the curve's first value to that value."""

    length: Length
    start: Fraction
    shape: Literal["linear", "exponential"]

    @model_validator(mode="after")
    def _exponential_needs_a_start(self) -> WarmupConfig:
        if self.shape == "exponential" and self.start == 0:
            raise ValueError("start: found 0 with shape exponential, allowed: a number > 0, e.g. 0.01")
        return self


class StepConfig(Strict):
    """``schedule.step``: multiply by ``gamma`` every ``every``."""

    every: Length
    gamma: Gamma


class MultistepConfig(Strict):
    """``schedule.multistep``: multiply by ``gamma`` at each of ``milestones``, counted from the start of the run."""

    milestones: Annotated[list[Length], Field(min_length=1)]
    gamma: Gamma


class ExponentialConfig(Strict):
    """``schedule.exponential``: fall steadily, by ``gamma`` in each ``every``."""

    every: Length
    gamma: Gamma


class InverseTimeConfig(Strict):
    """``schedule.inverse_time``: 1 / (1 + t / ``timescale``)."""

    timescale: Length


class InverseSqrtConfig(Strict):
    """``schedule.inverse_sqrt``: 1 / sqrt(1 + t / ``timescale``)."""

    timescale: Length


class PolynomialConfig(Strict):
    """``schedule.polynomial``: (1 - t) to the power of ``power``."""

    power: Annotated[float, Field(gt=0)]


class CosineRestartsConfig(Strict):
    """``schedule.cosine_restarts``: a cosine in each cycle, ``multiplier`` times as long and ``decay`` times as high as the last.

    A fraction in ``cycle`` is one of the run without its warm-up, so that whole cycles fit.
    """

    cycle: Length
    multiplier: Annotated[float, Field(ge=1)]
    decay: Gamma


class OneCycleConfig(Strict):
    """``schedule.one_cycle``: rise from ``start`` in the first ``rise`` of the run, then fall to ``end``; momentum against it."""

    rise: Annotated[float, Field(gt=0, lt=1)]
    start: Fraction
    end: Fraction
    shape: Literal["cosine", "linear"]
    momentum: Annotated[list[Momentum], Field(min_length=2, max_length=2)] | None

    @model_validator(mode="after")
    def _momentum_runs_against_the_rate(self) -> OneCycleConfig:
        if self.momentum is not None and self.momentum[0] < self.momentum[1]:
            raise ValueError(
                f"momentum: found {self.momentum}, allowed: [at the low rate, at the peak], the first no smaller, e.g. "
                f"[0.95, 0.85]"
            )
        return self


class CyclicConfig(Strict):
    """``schedule.cyclic``: a triangle from ``low`` to the peak and back in each ``cycle`` (as for cosine_restarts)."""

    cycle: Length
    low: Fraction
    decay: Gamma


class TrapezoidConfig(Strict):
    """``schedule.trapezoid``: stay at the peak, and fall to 0 in the last ``decay`` of the run."""

    decay: Length
    shape: Literal["linear", "cosine", "sqrt"]


class PlateauConfig(Strict):
    """``schedule.plateau``: multiply by ``gamma`` after more than ``patience`` epochs without a lower validation loss."""

    patience: Annotated[int, Field(ge=1)]
    cooldown: Annotated[int, Field(ge=0)]
    gamma: Annotated[float, Field(gt=0, lt=1)]
    min_delta: Annotated[float, Field(ge=0)]


class ScheduleConfig(Strict):
    """Section ``schedule``: the curve after the warm-up, never below ``floor`` times the peak rate."""

    name: Literal[
        "constant",
        "step",
        "multistep",
        "exponential",
        "inverse_time",
        "inverse_sqrt",
        "linear",
        "polynomial",
        "cosine",
        "cosine_restarts",
        "one_cycle",
        "cyclic",
        "trapezoid",
        "plateau",
    ]
    warmup: WarmupConfig
    floor: Fraction
    step: StepConfig
    multistep: MultistepConfig
    exponential: ExponentialConfig
    inverse_time: InverseTimeConfig
    inverse_sqrt: InverseSqrtConfig
    polynomial: PolynomialConfig
    cosine_restarts: CosineRestartsConfig
    one_cycle: OneCycleConfig
    cyclic: CyclicConfig
    trapezoid: TrapezoidConfig
    plateau: PlateauConfig


# ---- curves: pure functions of the steps since the warm-up ----------------------------------------------------------

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "sqrt": lambda x: 1.0 - math.sqrt(x),
}
"""Name to what is left of a fall from 1 to 0 at the point x of it, in [0, 1]."""


def constant(step: int, total_steps: int) -> float:  # noqa: ARG001
    """Return 1 at every step.

    >>> constant(70, 100)
    1.0
    """
    return 1.0


def step(step: int, total_steps: int, *, every: int, gamma: float) -> float:  # noqa: ARG001
    """Return ``gamma ** (step // every)``: a drop by ``gamma`` each ``every`` steps.

    >>> [step(s, 6, every=2, gamma=0.1) for s in (0, 1, 2, 3)]
    [1.0, 1.0, 0.1, 0.1]
    """
    return float(gamma ** (step // every))


def multistep(step: int, total_steps: int, *, milestones: Sequence[int], gamma: float) -> float:  # noqa: ARG001
    """Return ``gamma`` to the power of the number of ``milestones``, in steps, that are reached (He et al. 2016).

    >>> [multistep(s, 6, milestones=[2, 4], gamma=0.5) for s in range(6)]
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """
    return float(gamma ** sum(milestone <= step for milestone in milestones))


def exponential(step: int, total_steps: int, *, every: float, gamma: float) -> float:  # noqa: ARG001
    """Return ``gamma ** (step / every)``: the fall of `step`, spread evenly.

    >>> [round(exponential(s, 6, every=2, gamma=0.25), 4) for s in range(4)]
    [1.0, 0.5, 0.25, 0.125]
    """
    return float(gamma ** (step / every))


def inverse_time(step: int, total_steps: int, *, timescale: float) -> float:  # noqa: ARG001
    """Return ``1 / (1 + step / timescale)``: the 1/t decay under which SGD converges (Robbins & Monro 1951).

    >>> [round(inverse_time(s, 6, timescale=2), 4) for s in range(5)]
    [1.0, 0.6667, 0.5, 0.4, 0.3333]
    """
    return 1.0 / (1.0 + step / timescale)


def inverse_sqrt(step: int, total_steps: int, *, timescale: float) -> float:  # noqa: ARG001
    """Return ``1 / sqrt(1 + step / timescale)``, which needs no end of the run (Vaswani et al. 2017; Zhai et al. 2022).

    >>> [round(inverse_sqrt(s, 6, timescale=1), 4) for s in (0, 3, 8)]
    [1.0, 0.5, 0.3333]
    """
    return 1.0 / math.sqrt(1.0 + step / timescale)


def linear(step: int, total_steps: int) -> float:
    """Return ``1 - step / total_steps``, from 1 at step 0 to 0 at ``total_steps``.

    >>> [linear(s, 4) for s in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return SHAPES["linear"](_share(step, total_steps))


def polynomial(step: int, total_steps: int, *, power: float) -> float:
    """Return ``(1 - step / total_steps) ** power``: above 1 it falls early, below 1 late (Chen et al. 2017).

    >>> [polynomial(s, 4, power=2) for s in range(5)]
    [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """
    return float((1.0 - _share(step, total_steps)) ** power)


def cosine(step: int, total_steps: int) -> float:
    """Return ``(1 + cos(pi step / total_steps)) / 2``, from 1 at step 0 to 0 at the end (Loshchilov & Hutter 2017).

    >>> [round(cosine(s, 4), 4) for s in range(5)]
    [1.0, 0.8536, 0.5, 0.1464, 0.0]
    """
    return SHAPES["cosine"](_share(step, total_steps))


def cosine_restarts(step: int, total_steps: int, *, cycle: float, multiplier: float, decay: float) -> float:  # noqa: ARG001
    """Return a cosine from the peak to 0 in each cycle, then start again: SGDR (Loshchilov & Hutter 2017).

    Parameters
    ----------
    cycle
        Steps of the first cycle; need not be whole.
    multiplier
        Length of a cycle over that of the one before, at least 1.
    decay
        Peak of a cycle over that of the one before.

    Examples
    --------
    >>> [round(cosine_restarts(s, 6, cycle=2, multiplier=2.0, decay=0.5), 4) for s in range(6)]
    [1.0, 0.5, 0.5, 0.4268, 0.25, 0.0732]
    """
    number, at, length = *divmod(float(step), cycle), cycle
    if multiplier > 1:
        number, at = 0, float(step)
        while at >= length:
            number, at, length = number + 1, at - length, length * multiplier
    return float(decay**number * SHAPES["cosine"](at / length))


def one_cycle(
    step: int,
    total_steps: int,
    *,
    rise: float,
    start: float,
    end: float,
    shape: str,
    momentum: Sequence[float] | None = None,  # noqa: ARG001
) -> float:
    """Return one rise from ``start`` to 1 and one longer fall to ``end`` (Smith & Topin 2018).

    Parameters
    ----------
    rise
        Share of the steps in which it rises, in (0, 1).
    start, end
        Factors of the first step and at ``total_steps``.
    shape
        ``cosine`` (fastai's form) or ``linear`` (the paper's), of both parts.
    momentum
        Read by `momentum_at` alone.

    Examples
    --------
    >>> [round(one_cycle(s, 4, rise=0.5, start=0.2, end=0.0, shape="linear"), 4) for s in range(5)]
    [0.2, 0.6, 1.0, 0.5, 0.0]
    """
    return _there_and_back(_share(step, total_steps), (start, 1.0, end), rise=rise, shape=shape)


def cyclic(step: int, total_steps: int, *, cycle: float, low: float, decay: float) -> float:  # noqa: ARG001
    """Return a triangle from ``low`` to 1 and back in each ``cycle`` of steps (Smith 2017).

    Each triangle is ``decay`` times as high above ``low`` as the one before: 1 is Smith's ``triangular``, 0.5 his
    ``triangular2``. ``cycle`` need not be whole.

    >>> [cyclic(s, 8, cycle=4, low=0.5, decay=0.5) for s in range(8)]
    [0.5, 0.75, 1.0, 0.75, 0.5, 0.625, 0.75, 0.625]
    """
    number, at = divmod(float(step), cycle)
    height = decay**number * (1.0 - abs(2.0 * at / cycle - 1.0))
    return float(height + low * (1.0 - height))


def trapezoid(step: int, total_steps: int, *, decay: int, shape: str) -> float:
    """Return 1 until the last ``decay`` steps, in which it falls to 0: warm-up, stable, decay (Hu et al. 2024).

    Parameters
    ----------
    decay
        Steps of the fall, at most ``total_steps``.
    shape
        ``linear``, ``cosine`` or ``sqrt`` (``1 - sqrt(x)``, Haegele et al. 2024).

    Examples
    --------
    >>> [trapezoid(s, 5, decay=2, shape="linear") for s in range(6)]
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    return SHAPES[shape](min(1.0, max(0.0, (step - (total_steps - decay)) / decay)))


CURVES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "step": step,
    "multistep": multistep,
    "exponential": exponential,
    "inverse_time": inverse_time,
    "inverse_sqrt": inverse_sqrt,
    "linear": linear,
    "polynomial": polynomial,
    "cosine": cosine,
    "cosine_restarts": cosine_restarts,
    "one_cycle": one_cycle,
    "cyclic": cyclic,
    "trapezoid": trapezoid,
}
"""Name to ``curve(step, total_steps, **arguments)``: steps count from the end of the warm-up; 1 is the peak rate.

The one other schedule, plateau, is `plateau_factor`: a function of the validation losses, not of the step."""

LIFTED = frozenset({"linear", "polynomial", "cosine", "cosine_restarts", "one_cycle", "trapezoid"})
"""Curves whose end is at or near 0 by design: a floor lifts the whole curve, where others are cut at it."""

RISING = frozenset({"one_cycle", "cyclic"})
"""Curves that begin low, and so are a warm-up by themselves."""

SCALINGS: dict[str, Callable[[float], float]] = {
    "none": lambda _: 1.0,
    "linear": lambda ratio: ratio,
    "sqrt": math.sqrt,
}
"""Name to the factor of the rate at a given ratio of batch size to reference size."""


def _share(step: int, total_steps: int) -> float:
    return min(1.0, step / max(1, total_steps))


def _there_and_back(x: float, values: tuple[float, float, float], *, rise: float, shape: str) -> float:
    """Return the value at x in [0, 1] on the way from the first value to the second, at ``rise``, and on to the third."""
    first, middle, last = values
    start, goal, at = (first, middle, x / rise) if x < rise else (middle, last, (x - rise) / (1.0 - rise))
    left = SHAPES[shape](min(1.0, at))
    return start * left + goal * (1.0 - left)


def plateau_factor(
    losses: Sequence[float], *, patience: int, cooldown: int, gamma: float, min_delta: float = 0.0
) -> float:
    """Return ``gamma`` to the power of how often the losses have stalled; torch's ReduceLROnPlateau as a pure function.

    A loss is better where it is below the best so far by more than ``min_delta``. After more than ``patience`` epochs
    in a row that are not, the factor falls; the next ``cooldown`` epochs then do not count.

    Parameters
    ----------
    losses
        Validation loss of each epoch so far.
    patience, cooldown
        In epochs.
    gamma
        In (0, 1).
    min_delta
        In units of the loss.

    Examples
    --------
    >>> losses = [2.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    >>> [plateau_factor(losses[:n], patience=1, cooldown=0, gamma=0.5) for n in range(8)]
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """
    value, best, stalled, resting = 1.0, math.inf, 0, 0
    for loss in losses:
        if loss < best - min_delta:
            best, stalled = loss, 0
        else:
            stalled += 1
        if resting:
            resting, stalled = resting - 1, 0
        if stalled > patience:
            value, stalled, resting = value * gamma, 0, cooldown
    return value


# ---- a schedule: warm-up, curve and floor ---------------------------------------------------------------------------


def factor(
    step: int,
    losses: Sequence[float] = (),
    *,
    name: str,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
    warmup_shape: str = "linear",
    floor: float = 0.0,
    arguments: Mapping[str, Any] | None = None,
    swa: Mapping[str, Any] | None = None,
) -> float:
    """Return the factor of the peak rate at one optimizer step.

    While ``step < warmup_steps`` the factor rises from ``warmup_start`` times the curve's first value to that value,
    which it reaches at ``warmup_steps`` (Goyal et al. 2017). From there the curve ``name`` runs over the steps left. A
    curve ``c`` of `LIFTED` is lifted to ``floor + (1 - floor) c``; others are cut at ``floor``.

    Parameters
    ----------
    step
        Optimizer step, the first is 0; beyond ``total_steps`` a curve that has an end stays there.
    losses
        Validation loss of each epoch so far, which plateau reads.
    name
        A key of `CURVES`, or ``plateau``.
    total_steps
        Optimizer steps in the whole run, warm-up included.
    warmup_steps
        Steps of warm-up; 0 for none.
    warmup_start
        Share of the curve's first value at step 0 of the warm-up, in [0, 1].
    warmup_shape
        ``linear``: ``start + (1 - start) x``, or ``exponential``: ``start (1 / start) ** x``, x from 0 to 1.
    floor
        Smallest factor after the warm-up, in [0, 1].
    arguments
        Arguments of the curve, lengths in steps, as `factor_arguments` gives them.
    swa
        Arguments of `swa_factor`, which takes the curve's place from its first cycle on.

    Raises
    ------
    KeyError
        No such curve.

    Examples
    --------
    >>> [round(factor(s, name="cosine", total_steps=6, warmup_steps=2, warmup_start=0.5), 3) for s in range(6)]
    [0.5, 0.75, 1.0, 0.854, 0.5, 0.146]
    """
    since = max(0, step - warmup_steps)
    if name == "plateau":
        value = plateau_factor(losses if step >= warmup_steps else (), **(arguments or {}))
    else:
        value = CURVES[name](since, total_steps - warmup_steps, **(arguments or {}))
    value = floor + (1.0 - floor) * value if name in LIFTED else max(floor, value)
    if swa is not None and step >= swa["edges"][0]:
        value = max(floor, swa_factor(step, **swa))
    if step >= warmup_steps:
        return value
    if warmup_shape == "exponential":
        return value * float(warmup_start ** (1.0 - step / warmup_steps))
    return value * (warmup_start + (1.0 - warmup_start) * step / warmup_steps)


def momentum_at(
    step: int,
    *,
    name: str,
    total_steps: int,
    warmup_steps: int = 0,
    arguments: Mapping[str, Any] | None = None,
    **_: Any,
) -> float | None:
    """Return the momentum at one optimizer step, or None where the schedule leaves it as it is.

    With one_cycle and ``momentum: [high, low]`` it runs against the rate: high through the warm-up, low at the peak,
    high again at the end (Smith & Topin 2018), in the shape of the rate.

    Parameters
    ----------
    step, name, total_steps, warmup_steps, arguments
        As for `factor`, whose other arguments are taken and not used.

    Examples
    --------
    >>> cycle = {"rise": 0.5, "start": 0.1, "end": 0.0, "shape": "linear", "momentum": [0.95, 0.85]}
    >>> [round(momentum_at(s, name="one_cycle", total_steps=4, arguments=cycle), 4) for s in range(4)]
    [0.95, 0.9, 0.85, 0.9]
    """
    values = arguments or {}
    if name != "one_cycle" or values.get("momentum") is None:
        return None
    high, low = values["momentum"]
    x = _share(max(0, step - warmup_steps), total_steps - warmup_steps)
    return _there_and_back(x, (high, low, high), rise=values["rise"], shape=values["shape"])


# ---- weight averaging -------------------------------------------------------------------------


def swa_epochs(epochs: int, *, start: float, cycle: int) -> list[int]:
    """Return the epochs, counted from 1, at whose end stochastic weight averaging takes the weights in.

    Whole cycles that end with the run: ``start`` is rounded to whole epochs (halves up), and what does not make a cycle
    comes before the first.

    Parameters
    ----------
    epochs
        Of the run.
    start
        Fraction of the run, in [0, 1).
    cycle
        Epochs of a cycle.

    Examples
    --------
    >>> swa_epochs(12, start=0.75, cycle=1), swa_epochs(12, start=0.4, cycle=3), swa_epochs(2, start=0.75, cycle=1)
    ([10, 11, 12], [9, 12], [])
    """
    number = (epochs - math.floor(start * epochs + 0.5)) // cycle
    return [epochs - cycle * i for i in reversed(range(number))]


def averaged_steps(name: str, arguments: Mapping[str, Any], epoch_steps: Sequence[int]) -> range | frozenset[int]:
    """Return the optimizer steps, counted from 1, after which an average of the weights takes them in.

    ``ema``: all; ``polyak``: those after ``start`` of the run, rounded to whole steps (halves up); ``swa``: the last of
    each of `swa_epochs`.

    Parameters
    ----------
    name, arguments
        Of the section ``averaging``, and its block as plain values.
    epoch_steps
        Optimizer steps of each epoch.

    Examples
    --------
    >>> averaged_steps("polyak", {"start": 0.5}, [3, 3]), sorted(averaged_steps("swa", {"start": 0, "cycle": 1}, [3, 3]))
    (range(4, 7), [3, 6])
    """
    total = sum(epoch_steps)
    if name == "swa":
        ends = swa_epochs(len(epoch_steps), start=arguments["start"], cycle=arguments["cycle"])
        return frozenset(sum(epoch_steps[:epoch]) for epoch in ends)
    return range(math.floor(arguments["start"] * total + 0.5) + 1 if name == "polyak" else 1, total + 1)


def swa_factor(step: int, *, edges: Sequence[int], lr: float, low: float) -> float:
    """Return the factor within a cycle: from nearly ``lr`` down to ``lr low`` at its last step (Izmailov et al. 2018).

    With n the steps of the cycle and i = 1 ... n within it: ``lr ((1 - i / n) + low i / n)``. With ``low`` 1 it is constant.

    Parameters
    ----------
    step
        At least the first of ``edges``; beyond the last the factor is that of the end of a cycle.
    edges
        First step of each cycle, and the end of the last.
    lr, low
        Of ``averaging.swa``.

    Examples
    --------
    >>> [round(swa_factor(s, edges=[4, 8, 10], lr=0.5, low=0.2), 3) for s in range(4, 10)]
    [0.4, 0.3, 0.2, 0.1, 0.3, 0.1]
    """
    cycle = bisect.bisect_right(edges, step) - 1
    if cycle == len(edges) - 1:
        return lr * low
    share = (step - edges[cycle] + 1) / (edges[cycle + 1] - edges[cycle])
    return lr * (1.0 - share + low * share)


# ---- from the section to steps --------------------------------------------------------------------------------------


def length_in_steps(length: float | str, *, total_steps: int, steps_per_epoch: int | Sequence[int]) -> int:
    """Return a length of the schedule in optimizer steps, rounded to the nearest (halves up).

    Parameters
    ----------
    length
        A fraction of the run in [0, 1], ``"5 epochs"`` or ``"300 steps"``.
    total_steps
        Optimizer steps in the whole run.
    steps_per_epoch
        Optimizer steps in an epoch; one number an epoch where they differ, the last then goes on for ever.

    Raises
    ------
    UserError
        ``length`` is none of these.

    Examples
    --------
    >>> length_in_steps(0.05, total_steps=200, steps_per_epoch=10)
    10
    >>> length_in_steps("1.5 epochs", total_steps=200, steps_per_epoch=10)
    15
    >>> length_in_steps("3 epochs", total_steps=30, steps_per_epoch=[10, 10, 5, 5])
    25
    """
    return math.floor(_steps(length, total_steps, steps_per_epoch) + 0.5)


def _steps(length: float | str, total_steps: int, steps_per_epoch: int | Sequence[int]) -> float:
    if isinstance(length, str):
        match = re.fullmatch(LENGTH, length)
        if match is None:
            raise UserError(
                f"schedule: found length {length!r}, allowed: a fraction from 0 to 1, 'N epochs' or 'N steps'"
            )
        number, unit = length.split()
        return _epochs_in_steps(float(number), steps_per_epoch) if unit.startswith("epoch") else float(number)
    if not 0 <= length <= 1:
        raise UserError(
            f"schedule: found length {length}, allowed: a fraction from 0 to 1; "
            f"for a number of epochs write '{length:g} epochs'"
        )
    return length * total_steps


def _epochs_in_steps(epochs: float, steps_per_epoch: int | Sequence[int]) -> float:
    if isinstance(steps_per_epoch, int):
        return epochs * steps_per_epoch
    whole = min(int(epochs), len(steps_per_epoch))
    rest = steps_per_epoch[min(whole, len(steps_per_epoch) - 1)]
    return sum(steps_per_epoch[:whole]) + (epochs - whole) * rest


LENGTHS = {
    "step": "every",
    "exponential": "every",
    "inverse_time": "timescale",
    "inverse_sqrt": "timescale",
    "trapezoid": "decay",
    "cosine_restarts": "cycle",
    "cyclic": "cycle",
}
"""The key of each curve that holds a length; beside them multistep has its milestones, and one_cycle a share."""

WHOLE = frozenset({"step", "trapezoid"})
"""Curves whose length is a whole number of steps."""


def factor_arguments(
    schedule: Mapping[str, Any],
    *,
    total_steps: int,
    steps_per_epoch: int | Sequence[int],
    swa: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the keyword arguments of `factor` and `momentum_at` for the section ``schedule`` and a run's length.

    The warm-up, milestones and the lengths of `WHOLE` become whole steps. Others stay unrounded, so that a short run has
    room for its ``timescale``, and as many cycles as were asked for fill the run to its end. A fraction is one of the
    whole run; that of ``cycle`` is one of the run without its warm-up.
    Milestones count from the start of the run, and are given to the curve as from the end of the warm-up. A length
    beyond the run is allowed where it makes sense: a step that never comes.

    Parameters
    ----------
    schedule
        The section, as plain values.
    total_steps
        Optimizer steps in the whole run.
    steps_per_epoch
        Optimizer steps in an epoch; one number an epoch where they differ.
    swa
        The block ``averaging.swa`` where that is on and sets the rate, as plain values.

    Raises
    ------
    ParamsError
        A length that the run has no room for, or that is no step at all; all that are found.

    Examples
    --------
    >>> schedule = {"name": "step", "warmup": {"length": "2 steps", "start": 0.1, "shape": "linear"}, "floor": 0.0,
    ...             "step": {"every": 0.5, "gamma": 0.1}}
    >>> factor_arguments(schedule, total_steps=10, steps_per_epoch=5)["arguments"]
    {'every': 5, 'gamma': 0.1}
    """
    name, warmup = schedule["name"], schedule["warmup"]
    warmup_steps = length_in_steps(warmup["length"], total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    if warmup_steps >= total_steps > 1:
        raise ParamsError(
            [
                f"schedule.warmup.length: found {warmup['length']}, {warmup_steps} of the run's {total_steps} steps, "
                f"allowed: less than the run, e.g. 0.05"
            ]
        )
    warmup_steps = min(warmup_steps, max(0, total_steps - 1))
    arguments = dict(schedule.get(name) or {})
    left = total_steps - warmup_steps

    def whole(length: float | str) -> int:
        return length_in_steps(length, total_steps=total_steps, steps_per_epoch=steps_per_epoch)

    faults: list[str] = []
    key = LENGTHS.get(name)
    if key is not None:
        found = arguments[key]
        steps = _steps(found, left if key == "cycle" else total_steps, steps_per_epoch)
        steps = math.floor(steps + 0.5) if name in WHOLE else round(steps, 6)
        arguments[key] = steps
        if steps < (2 if key == "cycle" else 1 if name in WHOLE else 1e-6):
            faults.append(
                f"schedule.{name}.{key}: found {found}, {steps:g} of the run's {total_steps} steps, allowed: "
                + ("at least 2 steps" if key == "cycle" else "at least 1 step")
            )
        elif name == "trapezoid" and steps > left:
            faults.append(
                f"schedule.trapezoid.decay: found {found}, {steps} steps, but the warm-up leaves {left} of the run's "
                f"{total_steps}, allowed: at most {left} steps"
            )
    elif name == "multistep":
        points = [whole(milestone) for milestone in arguments["milestones"]]
        for i, (found, point) in enumerate(zip(arguments["milestones"], points, strict=True)):
            least = points[i - 1] if i else warmup_steps
            if not least < point < total_steps:
                after = f"after milestone {i}" if i else "after the warm-up"
                faults.append(
                    f"schedule.multistep.milestones[{i}]: found {found}, step {point} of the run's {total_steps}, "
                    f"allowed: {after} (step {least}) and before the end of the run"
                )
        arguments["milestones"] = [point - warmup_steps for point in points]
    elif name == "one_cycle" and not 1 <= arguments["rise"] * left <= left - 1:
        faults.append(
            f"schedule.one_cycle.rise: found {arguments['rise']}, {arguments['rise'] * left:g} of the {left} steps that "
            f"the warm-up leaves, allowed: at least 1 step of rise and 1 of fall"
        )
    if faults:
        raise ParamsError(faults)
    return {
        "name": name,
        "total_steps": total_steps,
        "warmup_steps": warmup_steps,
        "warmup_start": warmup["start"],
        "warmup_shape": warmup["shape"],
        "floor": schedule["floor"],
        "arguments": arguments,
        **({} if swa is None else {"swa": _swa_arguments(total_steps, steps_per_epoch, **swa)}),
    }


def _swa_arguments(
    total_steps: int, steps_per_epoch: int | Sequence[int], *, start: float, lr: float, cycle: int, low: float
) -> dict[str, Any] | None:
    lengths = (
        [steps_per_epoch] * (total_steps // steps_per_epoch) if isinstance(steps_per_epoch, int) else steps_per_epoch
    )
    ends = swa_epochs(len(lengths), start=start, cycle=cycle)
    if not ends:
        return None
    return {"edges": [sum(lengths[:epoch]) for epoch in (ends[0] - cycle, *ends)], "lr": lr, "low": low}


def schedule_faults(
    schedule: Mapping[str, Any],
    *,
    total_steps: int,
    steps_per_epoch: int | Sequence[int],
    scaling: str = "none",
    size: int = 1,
    reference_size: int = 1,
    early_stopping: int | None = None,
) -> list[str]:
    """Return what is wrong with the section ``schedule`` in a given run, and beside the other sections.

    Parameters
    ----------
    schedule, total_steps, steps_per_epoch
        As for `factor_arguments`.
    scaling, size, reference_size
        Of the section ``batch``.
    early_stopping
        Patience of ``trainer.early_stopping``, in epochs; None where it is off.

    Returns
    -------
    list of str
        One line a fault: key, what was found, what is allowed.
    """
    try:
        arguments = factor_arguments(schedule, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    except ParamsError as error:
        return error.faults
    faults: list[str] = []
    warms_up = arguments["warmup_steps"] or schedule["name"] in RISING
    if scaling == "linear" and size > reference_size and not warms_up:
        faults.append(
            f"batch.lr_scaling: found linear, which makes the rate of batch.size {size} {size / reference_size:g} times "
            f"that of reference_size {reference_size}, with no warm-up, without which training may diverge (Goyal et "
            f"al. 2017); allowed: with schedule.warmup.length 0.05 or '5 epochs', or lr_scaling none | sqrt"
        )
    if schedule["name"] == "plateau" and early_stopping is not None:
        patience = schedule["plateau"]["patience"]
        if early_stopping <= patience + 1:
            faults.append(
                f"trainer.early_stopping.patience: found {early_stopping}, which stops the run before a rate that "
                f"schedule.plateau lowers after {patience + 1} epochs can help; allowed: at least {patience + 2}"
            )
    return faults


def scaled_rate(lr: float, *, scaling: str, size: int, reference_size: int) -> float:
    """Return the learning rate for a batch of ``size``, where ``lr`` is the one that suits ``reference_size``.

    ``linear``: ``lr size / reference_size`` (Goyal et al. 2017, for SGD); ``sqrt``: ``lr sqrt(size / reference_size)``
    (Krizhevsky 2014; Malladi et al. 2022, for Adam); ``none``: ``lr``.

    >>> scaled_rate(0.1, scaling="linear", size=256, reference_size=128)
    0.2
    >>> scaled_rate(0.1, scaling="sqrt", size=512, reference_size=128)
    0.2
    """
    return lr * SCALINGS[scaling](size / reference_size)


# ---- seen before training -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """What a member's rate will do.

    Parameters
    ----------
    arguments
        Of `factor` and `momentum_at`.
    peak
        Rate at factor 1; None where a range test is yet to find it: then rates are drawn in units of their peaks.
    epoch_steps
        Optimizer steps of each epoch.
    """

    arguments: Mapping[str, Any]
    peak: float | None
    epoch_steps: Sequence[int]


def course_panels(members: Mapping[str, Course], points: int = 500) -> list[dict[str, Any]]:
    """Return the rate, and the momentum if it cycles, as plain values for `anneal.reporting.lines.from_values`.

    Plateau, which the validation decides, is drawn as if the loss kept falling. Members that are alike share a line.

    Parameters
    ----------
    members
        Name to its course.
    points
        Most points of a line, its first and last step among them.
    """
    alike: list[tuple[list[str], Course]] = []
    for name, course in members.items():
        for names, other in alike:
            if course == other:
                names.append(name)
                break
        else:
            alike.append(([name], course))
    unknown = any(course.peak is None for _, course in alike)
    rates, momenta = [], []
    for names, course in alike:
        peak = 1.0 if unknown or course.peak is None else course.peak
        last = sum(course.epoch_steps) - 1
        steps = sorted({round(i * last / max(1, min(points, last + 1) - 1)) for i in range(min(points, last + 1))})
        line = {"label": ", ".join(names) if len(members) > 1 else "", "x": steps}
        rates.append({**line, "y": [peak * factor(step, **course.arguments) for step in steps]})
        if momentum_at(0, **course.arguments) is not None:
            momenta.append({**line, "y": [momentum_at(step, **course.arguments) for step in steps]})
    swa = [", then swa" if course.arguments.get("swa") else "" for _, course in alike]
    kinds = list(
        dict.fromkeys(f"{course.arguments['name']}{then}" for (_, course), then in zip(alike, swa, strict=True))
    )
    lengths = {steps for _, course in alike for steps in course.epoch_steps}
    epochs = f" ({lengths.pop()} an epoch)" if len(lengths) == 1 else ""
    axis = {"x_label": f"optimizer step{epochs}"}
    panel = {
        "title": ", ".join(kinds).replace("plateau", "plateau, as if the validation loss kept falling"),
        "y_label": "learning rate" + " / peak rate" * unknown,
        "lines": rates,
        **axis,
    }
    return [panel, {"title": "momentum", "y_label": "momentum", "lines": momenta, **axis}] if momenta else [panel]
