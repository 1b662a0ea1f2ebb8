"""Learning-rate schedules: pure functions of the optimizer step that return a factor of the peak rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from anneal.params import Strict

Length = Annotated[float, Field(ge=0, le=1)] | Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)? (epochs?|steps?)$")]
"""A fraction of the run, or text such as ``5 epochs`` and ``300 steps``."""

LengthField = Annotated[
    Length, Field(json_schema_extra={"allowed": "a fraction of the run from 0 to 1 | N epochs | N steps"})
]


class WarmupConfig(Strict):
    """``schedule.warmup``: linear rise from ``start`` times the peak rate."""

    length: LengthField
    start: Annotated[float, Field(ge=0, le=1)]


class StepConfig(Strict):
    """``schedule.step``: multiply by ``gamma`` every ``every``."""

    every: LengthField
    gamma: Annotated[float, Field(gt=0, le=1)]


class ScheduleConfig(Strict):
    """Section ``schedule``: the curve after the warm-up, never below ``floor`` times the peak rate."""

    name: Literal["constant", "step", "cosine"]
    warmup: WarmupConfig
    floor: Annotated[float, Field(ge=0, le=1)]
    step: StepConfig
