"""Optimizers by torch's names, and parameter groups."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from anneal.params import Strict

Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(ge=0)]


class SGDConfig(Strict):
    """``optimizer.SGD``: arguments of torch.optim.SGD."""

    lr: Rate
    momentum: Fraction = 0.0
    nesterov: bool = False
    weight_decay: Decay = 0.0

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: found true with momentum 0, allowed: momentum > 0, or nesterov: false")
        return self


class AdamConfig(Strict):
    """``optimizer.Adam`` and ``optimizer.AdamW``: arguments of torch.optim.Adam and AdamW."""

    lr: Rate
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Decay = 0.0


class OptimizerConfig(Strict):
    """Section ``optimizer``: the rule, and one block of arguments for each choice."""

    name: Literal["SGD", "Adam", "AdamW"]
    decay_exempt: list[Literal["bias", "norm"]]
    SGD: SGDConfig
    Adam: AdamConfig
    AdamW: AdamConfig
