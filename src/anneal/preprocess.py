"""Decode, resize, split, and the statistics of the training split (centre, standardise, PCA, ZCA)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from anneal.params import Strict

Fit = Literal["crop", "pad", "stretch"]
Interpolation = Literal["nearest", "area", "bilinear", "bicubic", "lanczos"]
Normalize = Literal["none", "scale", "center", "center_image", "standardize", "standardize_pixel", "pca", "zca"]


class SplitConfig(Strict):
    """Section ``split``: fractions held out, per class, where the source brings no split of its own."""

    val: Annotated[float, Field(gt=0, lt=1)]
    test: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _leaves_training_data(self) -> SplitConfig:
        if self.val + self.test >= 1:
            raise ValueError(
                f"val: found val + test = {self.val + self.test:g}, allowed: a sum < 1, or nothing is left to train on"
            )
        return self


class PreprocessConfig(Strict):
    """Section ``preprocess``: the geometry of the stored images and the statistics that the model's first layer applies."""

    size: Annotated[int, Field(ge=1, le=4096)]
    fit: Fit
    interpolation: Interpolation
    normalize: Normalize
