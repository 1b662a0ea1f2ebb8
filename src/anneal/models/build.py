"""From plain values to a network, and from a folder of a trained member back to its classifier."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from anneal.models.config import conflicts
from anneal.models.convnet import ConvNet
from anneal.models.layers import KeyedRandom, Style
from anneal.models.mlp import MLP
from anneal.models.normalization import Normalization
from anneal.models.resnet import ResNet
from anneal.params import UserError, nearest
from anneal.seeding import seed_for


def _mlp(in_channels: int, num_classes: int, *, height: int, width: int, **arguments: Any) -> nn.Module:
    return MLP(in_channels * height * width, num_classes, **arguments)


NETWORKS: dict[str, Callable[..., nn.Module]] = {"resnet": ResNet, "convnet": ConvNet, "mlp": _mlp}
"""``model.name`` to its builder."""


class Classifier(nn.Module):
    """Normalisation and network: uint8 images (N, H, W, C) to logits (N, num_classes)."""

    def __init__(self, normalization: Normalization, network: nn.Module) -> None:
        super().__init__()
        self.normalization = normalization
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 (N, num_classes), from images in 0..255, uint8 or floating point (N, H, W, C)."""
        return self.network(self.normalization(images))


def build_network(
    name: str,
    *,
    arguments: Mapping[str, Any],
    num_classes: int,
    in_channels: int,
    height: int,
    width: int,
    activation: str = "ReLU",
    norm: str = "batch",
    norm_position: str = "before",
    norm_arguments: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
) -> nn.Module:
    """Build a network from plain values, its weights in channels_last memory and not yet initialised.

    Parameters
    ----------
    name, arguments
        A key of `NETWORKS`, and the block of that name in params.yaml.
    num_classes
        Number of logits.
    in_channels, height, width
        Geometry of the images.
    activation, norm, norm_position, norm_arguments
        See `anneal.models.layers.Style`.
    dropout, stochastic_depth
        Chances, in [0, 1).

    Returns
    -------
    nn.Module
        float32 (N, in_channels, height, width) to logits (N, num_classes).

    Raises
    ------
    UserError
        A name is unknown, or settings conflict.
    """
    if name not in NETWORKS:
        raise UserError(f"model.name: found {name}, allowed: {' | '.join(NETWORKS)}{nearest(name, NETWORKS)}")
    _refuse(conflicts(name, arguments=arguments, height=height, width=width, stochastic_depth=stochastic_depth))
    style = Style(activation, norm, norm_position, norm_arguments or {})
    keywords = {**arguments, "style": style, "dropout": dropout}
    if name == "resnet":
        keywords["stochastic_depth"] = stochastic_depth
    if name == "mlp":
        keywords.update(height=height, width=width)
    return NETWORKS[name](in_channels, num_classes, **keywords).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_classifier(
    architecture: Mapping[str, Any],
    normalization: Mapping[str, Any],
    statistics: Mapping[str, npt.NDArray[np.floating]] | None,
) -> Classifier:
    """Build the normalisation layer and the network behind it.

    Parameters
    ----------
    architecture
        Arguments of `build_network`.
    normalization
        ``kind``, ``height``, ``width`` and ``channels`` of `Normalization`.
    statistics
        Arrays of statistics.npz; None leaves room for a state dict's.

    Raises
    ------
    UserError
        Settings conflict, or the statistics do not fit.
    """
    _refuse(
        conflicts(
            architecture["name"],
            arguments=architecture["arguments"],
            height=normalization["height"],
            width=normalization["width"],
            normalize=normalization["kind"],
        )
    )
    layer = Normalization(statistics=statistics, **normalization)
    return Classifier(layer, build_network(**architecture))


def _refuse(faults: list[str]) -> None:
    if faults:
        raise UserError("\n".join(faults))


def load_classifier(folder: Path | str) -> tuple[Classifier, dict[str, Any]]:
    """Load a trained member.

    Parameters
    ----------
    folder
        Holds model.json and weights.safetensors.

    Returns
    -------
    tuple
        The classifier, in evaluation mode and channels_last memory, and the values of model.json.

    Raises
    ------
    UserError
        A file is missing or does not fit the other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        model = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "weights.safetensors")
    except FileNotFoundError:
        raise UserError(f"{folder}: no trained member here; run `dvc repro train@{folder.name}` first") from None
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged ({error}); run `dvc checkout` or train again") from None
    classifier = build_classifier(model["architecture"], model["normalization"], None)
    try:
        classifier.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: weights.safetensors does not fit model.json ({reason}); train again") from None
    return classifier.eval(), model


def key_randomness(network: nn.Module, seed: int, epoch: int, microbatch: int) -> None:
    """Key every random layer before a forward pass: by its technique, its name in ``network``, and the microbatch.

    Parameters
    ----------
    network
        Any module; names count from it, so pass the same one each time.
    seed, epoch, microbatch
        ``microbatch`` counts over all devices within the epoch.
    """
    for name, module in network.named_modules():
        if isinstance(module, KeyedRandom):
            module.key = seed_for(seed, module.technique, name, epoch, microbatch)


def count_parameters(network: nn.Module) -> int:
    """Return the number of trainable values in a network; buffers do not count."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
