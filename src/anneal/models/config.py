"""The ``model`` and ``init`` sections of params.yaml; imports no torch, so that checking params is quick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from anneal.params import Strict

Activation = Literal["ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Mish", "Tanh", "Sigmoid"]
Stem = Literal["small", "large"]
Block = Literal["basic", "preactivation"]
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
    block: Block = "basic"

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


def halvings(name: str, arguments: Mapping[str, Any]) -> int:
    """Return how often a network halves the resolution of its input, from the block of its ``name``.

    >>> halvings("resnet", {"widths": [64, 128], "depths": [2, 2], "stem": "large"})
    3
    """
    if name == "resnet":
        return len(arguments["widths"]) - 1 + (2 if arguments.get("stem") == "large" else 0)
    return len(arguments["widths"]) if name == "convnet" else 0


def conflicts(
    name: str,
    *,
    arguments: Mapping[str, Any],
    height: int,
    width: int,
    normalize: str = "scale",
    norm: str = "batch",
    stochastic_depth: float = 0.0,
    microbatch: int | None = None,
) -> list[str]:
    """Say which settings cannot work together, one line each; an empty list where all do.

    Parameters
    ----------
    name, arguments
        ``model.name`` and the block of that name.
    height, width
        Pixels of the stored images.
    normalize
        ``preprocess.normalize``.
    norm
        ``model.norm.name``.
    stochastic_depth
        ``regularization.stochastic_depth``.
    microbatch
        ``batch.microbatch``; None leaves it unchecked.

    Examples
    --------
    >>> for fault in conflicts("mlp", arguments={"hidden": []}, height=8, width=8, stochastic_depth=0.1):
    ...     print(fault)
    regularization.stochastic_depth: found 0.1 with model.name mlp, allowed: 0, or model.name: resnet, which has residual branches to drop
    """
    faults: list[str] = []
    if stochastic_depth and name != "resnet":
        faults.append(
            f"regularization.stochastic_depth: found {stochastic_depth:g} with model.name {name}, "
            f"allowed: 0, or model.name: resnet, which has residual branches to drop"
        )
    if normalize == "pca" and name != "mlp":
        faults.append(
            f"preprocess.normalize: found pca with model.name {name}, which needs images and not components, "
            f"allowed: zca, which whitens and stays an image, or model.name: mlp"
        )
    times, side = halvings(name, arguments), min(height, width)
    most = side.bit_length() - 1
    if times > most:
        if arguments.get("stem") == "large" and most < 2:
            faults.append(
                f"model.{name}.stem: found large, which divides the resolution by 4, for images of {height}x{width} "
                f"pixels, allowed: small"
            )
        else:
            stages = len(arguments["widths"])
            faults.append(
                f"model.{name}.widths: found {stages} stages, which halve the resolution {times} times, for images of "
                f"{height}x{width} pixels, allowed: at most {stages - times + most} stages, or preprocess.size >= {2**times}"
            )
    elif microbatch == 1 and norm == "batch" and (name == "mlp" or (name == "resnet" and side >> times == 1)):
        faults.append(
            "batch.microbatch: found 1, where batch normalisation sees a single value a channel, allowed: 2 or more, "
            "or model.norm.name: none"
        )
    return faults
