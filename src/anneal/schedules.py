"""Learning-rate schedules: pure functions of the optimizer step that return a factor of the peak rate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from anneal.params import Strict, UserError

LENGTH = r"^[0-9]+(\.[0-9]+)? (epochs?|steps?)$"
Length = Annotated[float, Field(ge=0, le=1)] | Annotated[str, Field(pattern=LENGTH)]
"""A fraction of the run, or text such as ``5 epochs`` and ``300 steps``."""

LengthField = Annotated[
    Length, Field(json_schema_extra={"allowed": "a fraction of the run from 0 to 1 | N epochs | N steps"})
]
Fraction = Annotated[float, Field(ge=0, le=1)]
Gamma = Annotated[float, Field(gt=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class WarmupConfig(Strict):
    """``schedule.warmup``: a rise from ``start`` times the curve's first value to that value."""

    length: LengthField
    start: Fraction
    shape: Literal["linear", "exponential"]

    @model_validator(mode="after")
    def _exponential_needs_a_start(self) -> WarmupConfig:
        if self.shape == "exponential" and self.start == 0:
            raise ValueError("start: found 0 with shape exponential, allowed: a number > 0, e.g. 0.01")
        return self


class StepConfig(Strict):
    """``schedule.step``: multiply by ``gamma`` every ``every``."""

    every: LengthField
    gamma: Gamma


class MultistepConfig(Strict):
    """``schedule.multistep``: multiply by ``gamma`` at each of ``milestones``, counted from the start of the run."""

    milestones: Annotated[list[LengthField], Field(min_length=1)]
    gamma: Gamma


class ExponentialConfig(Strict):
    """``schedule.exponential``: fall steadily, by ``gamma`` in each ``every``."""

    every: LengthField
    gamma: Gamma


class InverseTimeConfig(Strict):
    """``schedule.inverse_time``: 1 / (1 + t / ``timescale``)."""

    timescale: LengthField


class InverseSqrtConfig(Strict):
    """``schedule.inverse_sqrt``: 1 / sqrt(1 + t / ``timescale``)."""

    timescale: LengthField


class PolynomialConfig(Strict):
    """``schedule.polynomial``: (1 - t) to the power of ``power``."""

    power: Annotated[float, Field(gt=0)]


class CosineRestartsConfig(Strict):
    """``schedule.cosine_restarts``: a cosine in each cycle; each is ``multiplier`` times as long, its peak ``decay`` times as high."""

    cycle: LengthField
    multiplier: Annotated[float, Field(ge=1)]
    decay: Gamma


class OneCycleConfig(Strict):
    """``schedule.one_cycle``: rise from ``start`` in the first ``rise`` of the run, then fall to ``end``; momentum goes against it."""

    rise: Annotated[float, Field(gt=0, lt=1)]
    start: Fraction
    end: Fraction
    shape: Literal["cosine", "linear"]
    momentum: Annotated[list[Momentum], Field(min_length=2, max_length=2)] | None


class CyclicConfig(Strict):
    """``schedule.cyclic``: a triangle from ``low`` to the peak and back in each ``cycle``."""

    cycle: LengthField
    low: Fraction
    decay: Gamma


class TrapezoidConfig(Strict):
    """``schedule.trapezoid``: stay at the peak, and fall to 0 in the last ``decay`` of the run."""

    decay: LengthField
    shape: Literal["linear", "cosine", "sqrt"]


class PlateauConfig(Strict):
    """``schedule.plateau``: multiply by ``gamma`` when the validation loss has not fallen for ``patience`` epochs."""

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


# ---- pure functions -------------------------------------------------------------------------------------------------


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


def cosine(step: int, total_steps: int) -> float:
    """Return ``(1 + cos(pi step / total_steps)) / 2``, from 1 at step 0 to 0 at ``total_steps`` (Loshchilov & Hutter 2017).

    >>> [round(cosine(s, 4), 4) for s in range(5)]
    [1.0, 0.8536, 0.5, 0.1464, 0.0]
    """
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / max(1, total_steps))))


CURVES: dict[str, Callable[..., float]] = {"constant": constant, "step": step, "cosine": cosine}
"""Name to ``curve(step, total_steps, **arguments)``: steps count from the end of the warm-up; 1 is the peak rate."""

SCALINGS: dict[str, Callable[[float], float]] = {
    "none": lambda _: 1.0,
    "linear": lambda ratio: ratio,
    "sqrt": math.sqrt,
}
"""Name to the factor of the rate at a given ratio of batch size to reference size."""


def factor(
    step: int,
    losses: Sequence[float] = (),  # noqa: ARG001
    *,
    name: str,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
    floor: float = 0.0,
    arguments: Mapping[str, Any] | None = None,
) -> float:
    """Return the factor of the peak rate at one optimizer step.

    While ``step < warmup_steps`` the factor rises linearly from ``warmup_start``; it would be 1 at ``warmup_steps``
    (Goyal et al. 2017). From there the curve ``name`` runs over the steps left. A curve ``c`` that ends at 0 is lifted
    to ``floor + (1 - floor) c`` where it is a cosine, and cut at ``floor`` elsewhere.

    Parameters
    ----------
    step
        Optimizer step, the first is 0; beyond ``total_steps`` the cosine stays at its end.
    losses
        Validation loss of each epoch so far, which plateau reads.
    name
        A key of `CURVES`.
    total_steps
        Optimizer steps in the whole run, warm-up included.
    warmup_steps
        Steps of linear warm-up; 0 for none.
    warmup_start
        Factor at step 0 of the warm-up, in [0, 1].
    floor
        Smallest factor after the warm-up, in [0, 1].
    arguments
        Arguments of the curve, lengths in steps: for ``step`` ``every`` and ``gamma``.

    Raises
    ------
    KeyError
        No such curve.

    Examples
    --------
    >>> [round(factor(s, name="cosine", total_steps=6, warmup_steps=2, warmup_start=0.5), 3) for s in range(6)]
    [0.5, 0.75, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup_steps:
        return warmup_start + (1.0 - warmup_start) * step / warmup_steps
    value = CURVES[name](step - warmup_steps, total_steps - warmup_steps, **(arguments or {}))
    return floor + (1.0 - floor) * value if name == "cosine" else max(floor, value)


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
    """
    if isinstance(length, str):
        match = re.fullmatch(LENGTH, length)
        if match is None:
            raise UserError(
                f"schedule: found length {length!r}, allowed: a fraction from 0 to 1, 'N epochs' or 'N steps'"
            )
        number, unit = length.split()
        return math.floor(
            (_epochs_in_steps(float(number), steps_per_epoch) if unit.startswith("epoch") else float(number)) + 0.5
        )
    if not 0 <= length <= 1:
        raise UserError(
            f"schedule: found length {length}, allowed: a fraction from 0 to 1; "
            f"for a number of epochs write '{length:g} epochs'"
        )
    return math.floor(length * total_steps + 0.5)


def _epochs_in_steps(epochs: float, steps_per_epoch: int | Sequence[int]) -> float:
    if isinstance(steps_per_epoch, int):
        return epochs * steps_per_epoch
    whole = min(int(epochs), len(steps_per_epoch))
    rest = steps_per_epoch[min(whole, len(steps_per_epoch) - 1)]
    return sum(steps_per_epoch[:whole]) + (epochs - whole) * rest


def factor_arguments(
    schedule: Mapping[str, Any], *, total_steps: int, steps_per_epoch: int | Sequence[int]
) -> dict[str, Any]:
    """Return the keyword arguments of `factor` for the section ``schedule`` and the length of the run.

    A length longer than the run is allowed where it makes sense (a step that never comes), and refused for the warm-up.

    Raises
    ------
    UserError
        The warm-up does not end within the run, or a ``step`` every 0 steps.

    Examples
    --------
    >>> schedule = {"name": "step", "warmup": {"length": "2 steps", "start": 0.1}, "floor": 0.0,
    ...             "step": {"every": 0.5, "gamma": 0.1}}
    >>> factor_arguments(schedule, total_steps=10, steps_per_epoch=5)["arguments"]
    {'every': 5, 'gamma': 0.1}
    """
    warmup = schedule["warmup"]["length"]
    warmup_steps = length_in_steps(warmup, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    if warmup_steps >= total_steps > 1:
        raise UserError(
            f"schedule.warmup.length: found {warmup}, {warmup_steps} of the run's {total_steps} steps, "
            f"allowed: less than the run, e.g. 0.05"
        )
    arguments = dict(schedule.get(schedule["name"]) or {})
    if "every" in arguments:
        every = length_in_steps(arguments["every"], total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        if every < 1:
            raise UserError(
                f"schedule.{schedule['name']}.every: found {arguments['every']}, 0 of the run's {total_steps} steps, "
                f"allowed: at least 1 step"
            )
        arguments["every"] = every
    return {
        "name": schedule["name"],
        "total_steps": total_steps,
        "warmup_steps": min(warmup_steps, max(0, total_steps - 1)),
        "warmup_start": schedule["warmup"]["start"],
        "floor": schedule["floor"],
        "arguments": arguments,
    }


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
