"""Section ``search`` of params.yaml; imports no optuna."""

from __future__ import annotations

import json
import math
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from anneal.params import Strict

Number = int | float


class Range(Strict):
    """``search.ranges.KEY``: numbers from ``low`` to ``high``, both included."""

    low: Number
    high: Number
    log: bool = False
    step: Annotated[Number, Field(gt=0)] | None = None

    @property
    def fault(self) -> str:
        """What is wrong with the numbers together, an empty string where nothing is."""
        if self.low >= self.high:
            return f"high: found {self.high} with low {self.low}, allowed: a number > low"
        if self.log and self.low <= 0:
            return f"low: found {self.low} with log: true, allowed: a number > 0"
        if self.step is None:
            return ""
        count = (self.high - self.low) / self.step
        if self.log or not math.isclose(count, round(count), abs_tol=1e-6):
            allowed = "no step with log: true" if self.log else "a number that divides high - low"
            return f"step: found {self.step}, allowed: {allowed}"
        return ""


Choices = Annotated[list[JsonValue], Field(min_length=2, json_schema_extra={"allowed": "a list of two or more values"})]


class SearchConfig(Strict):
    """Section ``search``: which keys `anneal search` varies and how; tracked by no stage."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,60}$")]
    storage: Annotated[str, Field(min_length=1)]
    sampler: Literal["TPE", "random"]
    pruner: Literal["none", "median", "hyperband"]
    trials: Annotated[int, Field(ge=1)]
    metric: Literal["val/accuracy", "val/loss"]
    ranges: dict[str, Range | Choices]

    @model_validator(mode="after")
    def _possible(self) -> SearchConfig:
        for key, values in self.ranges.items():
            if isinstance(values, Range):
                if values.fault:
                    raise ValueError(f"ranges.{key}.{values.fault}")
                continue
            texts = [json.dumps(value, sort_keys=True) for value in values]
            if twice := next((text for text in texts if texts.count(text) > 1), None):
                raise ValueError(f"ranges.{key}: found {twice} twice, allowed: choices that differ")
        return self
