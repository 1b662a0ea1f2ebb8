"""The ``model`` and ``init`` sections of params.yaml; imports no torch, so that checking params is quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from anneal.params import Strict

Activation = Literal["ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Mish", "Tanh", "Sigmoid"]
Stem = Literal["small", "large"]
Width = Annotated[int, Field(ge=1, le=4096)]


class BatchNormConfig(Strict):
    """``model.norm.batch``: arguments of torch.nn.BatchNorm2d."""

    momentum: Annotated[float, Field(gt=0, le=1)]
    eps: Annotated[float, Field(gt=0)]


class NormConfig(Strict):
    """``model.norm``: the normalisation layer, before or after the activation."""

    name: Literal["batch", "none"]
    position: Literal["before", "after"]
    batch: BatchNormConfig


class MLPConfig(Strict):
    """``model.mlp``: widths of the hidden layers."""

    hidden: Annotated[list[Width], Field(max_length=20)]


class ConvNetConfig(Strict):
    """``model.convnet``: VGG-like; each stage is ``depth`` 3x3 convolutions and a 2x2 max-pooling."""

    widths: Annotated[list[Width], Field(min_length=1, max_length=8)]
    depth: Annotated[int, Field(ge=1, le=8)]


class ResNetConfig(Strict):
    """``model.resnet``: basic blocks; each stage after the first halves the resolution."""

    widths: Annotated[list[Width], Field(min_length=1, max_length=8)]
    depths: Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(min_length=1, max_length=8)]
    stem: Stem

    @model_validator(mode="after")
    def _a_depth_for_each_width(self) -> ResNetConfig:
        if len(self.widths) != len(self.depths):
            raise ValueError(
                f"depths: found {len(self.depths)} stages, allowed: {len(self.widths)}, one for each of widths"
            )
        return self


class ModelConfig(Strict):
    """Section ``model``: the architecture, and one block of arguments for each choice."""

    name: Literal["resnet", "convnet", "mlp"]
    activation: Activation
    norm: NormConfig
    resnet: ResNetConfig
    convnet: ConvNetConfig
    mlp: MLPConfig


class KaimingNormalConfig(Strict):
    """``init.kaiming_normal``: He et al. 2015."""

    mode: Literal["fan_in", "fan_out"]


class InitConfig(Strict):
    """Section ``init``: the law of the initial weights."""

    name: Literal["kaiming_normal"]
    zero_last: bool
    kaiming_normal: KaimingNormalConfig
