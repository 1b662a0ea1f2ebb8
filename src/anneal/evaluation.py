"""Every member, view and split into figures."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from anneal.params import Strict

View = str | dict[str, Any]


class TTAConfig(Strict):
    """``evaluate.tta``: the views of an image whose predictions are averaged."""

    views: Annotated[list[View], Field(min_length=1)]
    average: Literal["probability", "logit"]


class EvaluateConfig(Strict):
    """Section ``evaluate``."""

    splits: Annotated[list[Literal["train", "val", "test"]], Field(min_length=1)]
    tta: TTAConfig
    calibration: Literal["none", "temperature"]
    bootstrap: Annotated[int, Field(ge=100)]
