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

from anneal.models.airbench import Airbench
from anneal.models.config import RESIDUAL, conflicts, is_custom
from anneal.models.convnet import ConvNet
from anneal.models.convnext import ConvNeXt
from anneal.models.custom import construct
from anneal.models.folding import fold
from anneal.models.layers import Custom, GaussianNoise, KeyedRandom, Style
from anneal.models.mlp import MLP
from anneal.models.normalization import Normalization
from anneal.models.resnet import ResNet, preact_resnet, wide_resnet
from anneal.params import UserError, nearest
from anneal.seeding import generator, seed_for


def _mlp(in_channels: int, num_classes: int, *, height: int, width: int, **arguments: Any) -> nn.Module:
    return MLP(in_channels * height * width, num_classes, **arguments)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet": ResNet,
    "preact_resnet": preact_resnet,
    "wide_resnet": wide_resnet,
    "convnext": ConvNeXt,
    "airbench": Airbench,
    "convnet": ConvNet,
    "mlp": _mlp,
}
"""``model.name`` to its builder."""


class Classifier(nn.Module):
    """Normalisation and network: uint8 images (N, H, W, C) to logits (N, num_classes).

    Parameters
    ----------
    normalization, network
        The two.
    input_noise
        Standard deviation of the noise between them in training; 0: none.
    """

    def __init__(self, normalization: Normalization, network: nn.Module, input_noise: float = 0.0) -> None:
        super().__init__()
        self.normalization = normalization
        self.noise = GaussianNoise(input_noise)
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 (N, num_classes), from images in 0..255, uint8 or floating point (N, H, W, C)."""
        return self.network(self.noise(self.normalization(images)))


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
    spatial_dropout: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """Build a network from plain values, its weights in channels_last memory and not yet initialised.

    Parameters
    ----------
    name, arguments
        A key of `NETWORKS`, and the block of that name in params.yaml. Or ``package.module:callable`` and its arguments:
        to build such a network runs the code that it names; see `custom_network`.
    num_classes
        Number of logits.
    in_channels, height, width
        Geometry of the images.
    activation, norm, norm_position, norm_arguments
        See `anneal.models.layers.Style`.
    dropout, stochastic_depth, spatial_dropout
        Chances, in [0, 1).
    seed
        Of the initial weights of a network by import path, which draws them itself.

    Returns
    -------
    nn.Module
        float32 (N, in_channels, height, width) to logits (N, num_classes).

    Raises
    ------
    UserError
        A name is unknown, or settings conflict.
    """
    if name not in NETWORKS and not is_custom(name):
        raise UserError(
            f"model.name: found {name}, allowed: {' | '.join(NETWORKS)} | package.module:callable{nearest(name, NETWORKS)}"
        )
    _refuse(
        conflicts(
            name,
            arguments=arguments,
            height=height,
            width=width,
            norm=norm,
            norm_position=norm_position,
            norm_arguments=norm_arguments,
            dropout=dropout,
            stochastic_depth=stochastic_depth,
            spatial_dropout=spatial_dropout,
        )
    )
    if is_custom(name):
        shape = (in_channels, height, width)
        return custom_network(name, arguments, num_classes=num_classes, shape=shape, seed=seed)
    style = Style(activation, norm, norm_position, norm_arguments or {})
    keywords = {**arguments, "style": style, "dropout": dropout}
    if name in RESIDUAL:
        keywords["stochastic_depth"] = stochastic_depth
    if name == "mlp":
        keywords.update(height=height, width=width)
    else:
        keywords["spatial_dropout"] = spatial_dropout
    return NETWORKS[name](in_channels, num_classes, **keywords).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def custom_network(
    path: str, arguments: Mapping[str, Any], *, num_classes: int, shape: tuple[int, int, int], seed: int
) -> Custom:
    """Build a network that ``package.module:callable`` returns, with the initial weights that it draws itself.

    It draws them under a seed of its own; torch's global generator is left as it was.

    Parameters
    ----------
    path, arguments
        The callable and its arguments; see `anneal.models.custom.call_arguments` for those that are added.
    num_classes
        Number of logits.
    shape
        (C, H, W) of an image.
    seed
        Of the initial weights.

    Raises
    ------
    UserError
        The callable cannot be called so, returns no module, or one whose output is not (N, num_classes).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "init", path))
        module = construct(path, arguments, num_classes=num_classes, in_channels=shape[0])
        if not isinstance(module, nn.Module):
            raise UserError(f"model.name: {path} returned {type(module).__name__}, allowed: a torch.nn.Module")
        network = Custom(module)
        try:
            # Lazy layers draw their weights here.
            with torch.no_grad():
                output = network.eval()(torch.zeros(2, *shape))
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"model.name: {path} cannot take images of (N, {', '.join(map(str, shape))}): "
                f"{type(error).__name__}: {reason}"
            ) from error
    found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if found != (2, num_classes):
        raise UserError(
            f"model.name: {path} makes {found} of 2 images, allowed: (2, {num_classes}), a logit a class; give it its "
            f"number of classes in model.custom"
        )
    if not count_parameters(network):
        raise UserError(f"model.name: {path} has no trainable parameters, allowed: a network with some")
    return network.train()


def build_classifier(
    architecture: Mapping[str, Any],
    normalization: Mapping[str, Any],
    statistics: Mapping[str, npt.NDArray[np.floating]] | None,
    *,
    input_noise: float = 0.0,
    seed: int = 0,
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
    input_noise
        See `Classifier`.
    seed
        As for `build_network`.

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
    return Classifier(layer, build_network(**architecture, seed=seed), input_noise)


def _refuse(faults: list[str]) -> None:
    if faults:
        raise UserError("\n".join(faults))


def load_classifier(
    folder: Path | str, *, folded: bool = False, file: str = "weights.safetensors"
) -> tuple[Classifier, dict[str, Any]]:
    """Load a trained member.

    Where model.json names a network by import path, that code is run.

    Parameters
    ----------
    folder
        Holds model.json and weights.safetensors.
    folded
        Whether batch norm layers are folded into the layers before them, where they can be: the same logits, sooner.
    file
        Of the weights, below the folder: those that are exported, or an average.

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
        weights = load_file(folder / file)
    except FileNotFoundError:
        raise UserError(f"{folder}: no trained member here; run `dvc repro train@{folder.name}` first") from None
    except (ValueError, RecursionError, SafetensorError) as error:  # no JSON or not even text; no safetensors
        raise UserError(f"{folder}: damaged ({error}); run `dvc checkout` or train again") from None
    try:
        classifier = build_classifier(model["architecture"], model["normalization"], None)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{folder}: model.json is damaged, or of another version ({reason}); run `dvc checkout` or train again"
        ) from None
    try:
        classifier.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: {file} does not fit model.json ({reason}); train again") from None
    classifier.eval()
    return (fold_norms(classifier) if folded else classifier), model


def fold_norms(classifier: Classifier) -> Classifier:
    """Fold batch norm layers of a classifier in evaluation mode into the layers before them, and return it."""
    classifier.network = fold(classifier.network, classifier.normalization(_example(classifier.normalization)))
    return classifier


def _example(normalization: Normalization) -> torch.Tensor:
    """Return two images of noise, uint8 (2, H, W, C), always the same."""
    shape = (2, normalization.height, normalization.width, normalization.channels)
    return torch.from_numpy(generator(0, "example").integers(0, 256, shape, "uint8"))


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


def count_macs(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the multiplications of weights with activations behind one prediction, which convolutions and linear layers do.

    Other layers, and products of activations with each other (attention), do not count.

    Parameters
    ----------
    network
        Takes float32 (1, *shape) on the device of its parameters; left as it was.
    shape
        Of one sample, without the batch.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        total += (inputs[0] if transposed else output).numel() * weight[0].numel()

    layers = [m for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    modes = [(module, module.training) for module in network.modules()]
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, *shape, device=device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return total
