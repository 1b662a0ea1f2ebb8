"""Initial weights: one draw a parameter, keyed by its name; two ways to fit them to training images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from anneal.models.layers import Custom, KeyedRandom, ResidualBlock
from anneal.params import UserError, nearest
from anneal.seeding import seed_for

GAINS: dict[str, float] = {
    "linear": 1.0,
    "ReLU": 1.4142135624,
    "LeakyReLU": 1.4141428570,
    "PReLU": 1.3719886811,
    "ReLU6": 1.4142135651,
    "ELU": 1.2451983007,
    "CELU": 1.2451983007,
    "SELU": 1.0000000000,
    "GELU": 1.5335304412,
    "SiLU": 1.6765324703,
    "Mish": 1.4868475813,
    "Softplus": 1.0418668355,
    "Hardswish": 1.7366572128,
    "Tanh": 1.5925374197,
    "Hardtanh": 1.3920361404,
    "Softsign": 2.3375333631,
    "Sigmoid": 1.8462285453,
    "Hardsigmoid": 1.8978404247,
    "LogSigmoid": 1.0418668355,
    "Tanhshrink": 2.3383675301,
    "Softshrink": 1.5443605283,
    "Hardshrink": 1.0157963547,
}
"""``1 / sqrt(E f(z)^2)`` for z ~ N(0, 1): what keeps the signal's power through an activation f, sqrt(2) for ReLU."""

HEAD: dict[str, Any] = {"mode": "fan_in", "gain": 1.0}
"""Arguments that the head has in place of the chosen ones, in laws that have them."""

RANK = 1e-9
"""Variance of a component of patches, over that of the first, below which it is rounding and no part of the images."""

CHUNK = 32
"""Images whose patches lie in memory at once."""


@dataclass(frozen=True)
class Weight:
    """What a law may know of a weight.

    Parameters
    ----------
    shape
        (out, in / groups[, kernel height, kernel width]).
    groups
        Of a convolution; as many as channels in a depthwise one.
    gain
        See `GAINS`; 1 for the head, which no activation follows.
    generator
        Source of the draw, of this weight alone.
    """

    shape: tuple[int, ...]
    groups: int
    gain: float
    generator: torch.Generator

    @property
    def fan_in(self) -> int:
        """Inputs behind each output: channels of a group x kernel area."""
        return math.prod(self.shape[1:])

    @property
    def fan_out(self) -> int:
        """Outputs before each input: channels of a group x kernel area.

        torch.nn.init takes the channels of all groups, which is ``groups`` times too many.
        """
        return self.shape[0] // self.groups * math.prod(self.shape[2:])

    def fan(self, mode: str) -> int:
        """Return ``fan_in`` or ``fan_out``."""
        return self.fan_in if mode == "fan_in" else self.fan_out


# ---- laws: each returns float32, contiguous, of the weight's shape --------------------------------------------------


def zeros(weight: Weight) -> torch.Tensor:
    """Return zeros: every unit of a layer is the same and stays so."""
    return torch.zeros(weight.shape)


def constant(weight: Weight, *, value: float) -> torch.Tensor:
    """Return ``value`` everywhere: every unit of a layer is the same and stays so."""
    return torch.full(weight.shape, value)


def normal(weight: Weight, *, std: float) -> torch.Tensor:
    """Draw N(0, std^2), whatever the size of the layer."""
    return torch.empty(weight.shape).normal_(0.0, std, generator=weight.generator)


def truncated_normal(weight: Weight, *, std: float) -> torch.Tensor:
    """Draw N(0, std^2) under the condition that it is within 2 std: its own standard deviation is 0.880 std."""
    empty = torch.empty(weight.shape)
    return nn.init.trunc_normal_(empty, 0.0, std, -2.0 * std, 2.0 * std, generator=weight.generator)


def uniform(weight: Weight, *, limit: float) -> torch.Tensor:
    """Draw U(-limit, limit), whatever the size of the layer."""
    return torch.empty(weight.shape).uniform_(-limit, limit, generator=weight.generator)


def xavier_normal(weight: Weight, *, gain: float | str) -> torch.Tensor:
    """Draw N(0, std^2) with ``std = gain * sqrt(2 / (fan_in + fan_out))`` (Glorot & Bengio 2010).

    Parameters
    ----------
    weight
        What is drawn.
    gain
        A number, or ``auto``: that of the activation.
    """
    return normal(weight, std=_gain(weight, gain) * math.sqrt(2.0 / (weight.fan_in + weight.fan_out)))


def xavier_uniform(weight: Weight, *, gain: float | str) -> torch.Tensor:
    """Draw U(-a, a) with ``a = gain * sqrt(6 / (fan_in + fan_out))``: the variance of `xavier_normal`."""
    return uniform(weight, limit=_gain(weight, gain) * math.sqrt(6.0 / (weight.fan_in + weight.fan_out)))


def kaiming_normal(weight: Weight, *, mode: str) -> torch.Tensor:
    """Draw N(0, std^2) with ``std = gain / sqrt(fan)``, the gain that of the activation (He et al. 2015).

    Parameters
    ----------
    weight
        What is drawn.
    mode
        ``fan_in`` keeps the power of the signal going forward, ``fan_out`` that of the gradient going back.
    """
    return normal(weight, std=weight.gain / math.sqrt(weight.fan(mode)))


def kaiming_uniform(weight: Weight, *, mode: str) -> torch.Tensor:
    """Draw U(-a, a) with ``a = gain * sqrt(3 / fan)``: the variance of `kaiming_normal`."""
    return uniform(weight, limit=weight.gain * math.sqrt(3.0 / weight.fan(mode)))


def orthogonal(weight: Weight, *, gain: float | str) -> torch.Tensor:
    """Draw a matrix (out, fan_in) of orthonormal rows, or columns where it is taller than wide, times ``gain``.

    Uniformly over all such matrices, for each group of a convolution apart (Saxe et al. 2014).

    Parameters
    ----------
    weight
        What is drawn.
    gain
        A number, or ``auto``: that of the activation.
    """
    rows = weight.shape[0] // weight.groups
    shape = (weight.groups, rows, weight.fan_in)
    draw = torch.empty(shape, dtype=torch.float64).normal_(generator=weight.generator)
    tall = rows >= weight.fan_in
    q, r = torch.linalg.qr(draw if tall else draw.mT)
    # With the signs of r's diagonal q is unique, and uniform (Mezzadri 2007).
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return (_gain(weight, gain) * (q if tall else q.mT)).reshape(weight.shape).float().contiguous()


def _gain(weight: Weight, gain: float | str) -> float:
    return weight.gain if isinstance(gain, str) else gain


LAWS: dict[str, Callable[..., torch.Tensor]] = {
    "zeros": zeros,
    "constant": constant,
    "normal": normal,
    "truncated_normal": truncated_normal,
    "uniform": uniform,
    "xavier_normal": xavier_normal,
    "xavier_uniform": xavier_uniform,
    "kaiming_normal": kaiming_normal,
    "kaiming_uniform": kaiming_uniform,
    "orthogonal": orthogonal,
}
"""``init.name`` to ``law(weight, **arguments)``."""


# ---- fitted to images -----------------------------------------------------------------------------------------------


@torch.no_grad()
def lsuv(network: nn.Module, images: torch.Tensor, *, tolerance: float, max_iterations: int) -> None:
    """Scale each convolution and linear layer, in forward order, until its output has variance 1 (Mishkin & Matas 2016).

    Layer-sequential unit-variance initialisation, of weights that are already drawn. A layer is scaled, its bias with it,
    before the layers behind it are looked at, so that one forward pass serves all; and since it is linear one scaling
    mostly brings it within any tolerance. A layer whose output is 0 stays as it is.

    Parameters
    ----------
    network
        Changed in place: weights and biases alone.
    images
        What the network sees: floating point (N, C, H, W).
    tolerance
        Difference from 1 that is near enough.
    max_iterations
        Most times that a layer is scaled.
    """
    rehearsal = rehearsal_of(network)
    names: dict[nn.Module, str] = {
        layer: name
        for name, layer in rehearsal.named_modules()
        # A weight that is computed from others, as by weight_norm, has no scale of its own to set.
        if isinstance(layer, nn.Conv2d | nn.Linear) and isinstance(layer.weight, nn.Parameter)
    }
    factors: dict[str, float] = {}

    def scale(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        name = names[layer]
        if name in factors:  # called twice in a forward pass
            return output
        factors[name] = 1.0
        for _ in range(max_iterations):
            variance = float(output.double().var(correction=0))
            if not 0.0 < variance < math.inf or abs(variance - 1.0) <= tolerance:
                break
            # Rounded, since the last digits of a variance depend on the processor.
            factor = float(f"{variance**-0.5:.5g}")
            factors[name] *= factor
            output = output * factor
        return output

    for layer in names:
        layer.register_forward_hook(scale)
    with torch.random.fork_rng(devices=[]):
        rehearsal(images)
    for name, factor in factors.items():
        for parameter in network.get_submodule(name).parameters(recurse=False):
            parameter.mul_(factor)


DATA_LAWS: dict[str, Callable[..., None]] = {"lsuv": lsuv}
"""``init.name`` to ``law(network, images, **arguments)``, called on an orthogonal draw of gain 1."""


def whitening_filters(
    images: torch.Tensor,
    kernel_size: tuple[int, int],
    *,
    eps: float,
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return filters whose responses to patches of images are uncorrelated and of about the same variance.

    ``filter_i = u_i / sqrt(l_i + eps * mean(l))`` with eigenvectors u and eigenvalues l of the patches' covariance, the
    largest first (Coates & Ng 2012): a response's variance is ``l_i / (l_i + eps * mean(l))``. Each eigenvector's sign
    is fixed; components that the images do not have (grey images in three channels) are left out.

    Parameters
    ----------
    images
        Floating point (N, C, H, W).
    kernel_size
        Height and width of a patch.
    eps
        Fraction of the mean eigenvalue that is added to each: what keeps faint components, which are mostly noise, from
        being blown up.
    padding
        Zeros above and beside the images; none takes patches that lie inside.
    dilation
        Distance of a patch's pixels.

    Returns
    -------
    tuple
        Filters, float64 (K, C, *kernel_size) with ``K <= C * height * width``; and the mean patch,
        float64 (C, *kernel_size). K is 0 where all patches are alike.

    Examples
    --------
    >>> images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> filters, mean = whitening_filters(images, (2, 2), eps=1e-6)
    >>> responses = F.conv2d(images.double(), filters)
    >>> responses.var((0, 2, 3)).round(decimals=2).unique()
    tensor([1.], dtype=torch.float64)
    """
    size = images.shape[1] * math.prod(kernel_size)
    count, total, products = 0, torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    for part in images.double().split(CHUNK):
        patches = F.unfold(part, kernel_size, dilation=dilation, padding=padding).mT.reshape(-1, size)
        count += len(patches)
        total += patches.sum(0)
        products += patches.mT @ patches
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - mean.outer(mean))
    values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1).mT
    # A variance far below the mean's square is rounding too: images of one colour.
    present = values > RANK * torch.maximum(values[0], mean.square().sum())
    # The sign of a sum that no symmetry of an eigenvector makes 0.
    signs = (vectors @ (1.0 / torch.arange(1.0, size + 1.0, dtype=torch.float64))).sign()
    filters = vectors * (signs / (values + eps * values.mean()).sqrt().clamp(min=1e-30)).unsqueeze(1)
    return filters[present].reshape(-1, images.shape[1], *kernel_size), mean.reshape(-1, *kernel_size)


@torch.no_grad()
def whiten_first(network: nn.Module, images: torch.Tensor, *, eps: float) -> None:
    """Set the first convolution to whitening filters, as many as it has channels for.

    First each filter once, the strongest components first, then each with the opposite sign, so that an activation such
    as ReLU loses neither half. Channels that are left over stay as they are. A bias becomes that of the centred patch.

    Parameters
    ----------
    network
        Changed in place.
    images
        What the network sees: floating point (N, C, H, W).
    eps
        See `whitening_filters`.

    Raises
    ------
    UserError
        There is no such convolution, or the images are all of one colour.
    """
    conv = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if conv is None or conv.groups != 1 or conv.in_channels != images.shape[1]:
        raise UserError(
            "init.whiten_first: found true for a network without a first convolution over the channels of the image, "
            "allowed: false"
        )
    (height, width), (down, across) = conv.kernel_size, conv.dilation
    reach = (down * (height - 1), across * (width - 1))
    fits = images.shape[2] > reach[0] and images.shape[3] > reach[1]
    padding = (0, 0) if fits else (reach[0] // 2, reach[1] // 2)
    filters, mean = whitening_filters(images, (height, width), eps=eps, padding=padding, dilation=(down, across))
    if not len(filters):
        raise UserError(
            "init.whiten_first: found true for training images of a single colour, which have nothing to whiten, "
            "allowed: false"
        )
    filters = torch.cat([filters, -filters])[: conv.out_channels]
    conv.weight[: len(filters)] = filters.float()
    if conv.bias is not None:
        conv.bias[: len(filters)] = -(filters * mean).sum((1, 2, 3)).float()


def rehearsal_of(network: nn.Module) -> nn.Module:
    """Return a copy that acts as in training, on batch statistics, but draws nothing at random."""
    rehearsal = copy.deepcopy(network).train()
    for module in rehearsal.modules():
        # A network from elsewhere holds its layers; only what draws itself is set at rest.
        if isinstance(module, KeyedRandom | _DropoutNd) and not isinstance(module, Custom):
            module.eval()
    return rehearsal


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one CPU thread, so that no bit of the initial weights depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- the whole network ----------------------------------------------------------------------------------------------


@torch.no_grad()
def initialize(
    network: nn.Module,
    name: str,
    arguments: Mapping[str, Any],
    *,
    zero_last: bool,
    activation: str,
    seed: int,
    whiten_eps: float | None = None,
    images: torch.Tensor | None = None,
) -> None:
    """Set every parameter of a network in place.

    Weights of convolutions and linear layers follow the law. The head, which no activation follows, has gain 1 in laws
    that know a gain and fan_in in those that know a mode, so that the first logits are of order 1; in the others it is
    drawn as every layer. Biases are 0, scales of norm layers 1. Each weight is drawn from a generator of its own, keyed by
    (seed, its name): adding a layer leaves the draws of the others as they were. Then the first convolution is whitened,
    the branches' ends are zeroed, and last a law of `DATA_LAWS` scales what is there.

    A network by import path (`anneal.models.layers.Custom`) keeps what it drew itself: its authors chose it. Whitening and
    `DATA_LAWS` change it even so.

    Parameters
    ----------
    network
        As `anneal.models.build.build_network` returns it, on the CPU.
    name, arguments
        A key of `LAWS` or `DATA_LAWS`, and the law's arguments.
    zero_last
        Start each residual branch at zero, by the last layer in it: its norm's scale, or its convolution's weight where
        the branch ends in a convolution (Goyal et al. 2017; Zhang et al. 2019).
    activation
        A key of `GAINS`.
    seed
        Of the recipe or the member.
    whiten_eps
        ``eps`` of `whiten_first`; None leaves the first convolution to the law.
    images
        What the network sees, normalised training images (N, C, H, W); whitening and `DATA_LAWS` need them.

    Raises
    ------
    UserError
        No such law, or nothing to whiten.
    """
    known = [*LAWS, *DATA_LAWS]
    if name not in known:
        raise UserError(f"init.name: found {name}, allowed: {' | '.join(known)}{nearest(name, known)}")
    law, given = (LAWS[name], arguments) if name in LAWS else (orthogonal, {"gain": 1.0})
    with _one_thread():
        if not isinstance(network, Custom):
            _draw(network, law, given, activation=activation, seed=seed)
        if whiten_eps is not None:
            assert images is not None, "whitening needs images"
            whiten_first(network, images, eps=whiten_eps)
        if zero_last:
            for module in network.modules():
                if isinstance(module, ResidualBlock):
                    module.last.state_dict()["weight"].zero_()  # a buffer where it is frozen
        if name in DATA_LAWS:
            assert images is not None, f"{name} needs images"
            DATA_LAWS[name](network, images, **arguments)


def _draw(
    network: nn.Module, law: Callable[..., torch.Tensor], arguments: Mapping[str, Any], *, activation: str, seed: int
) -> None:
    for prefix, module in network.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if kind == "bias":
                parameter.zero_()
            elif parameter.ndim == 1:
                # Layer scale and PReLU say what they start at; all others are scales of norm layers.
                parameter.fill_(getattr(module, "init", 1.0))
            else:
                assert isinstance(module, nn.Conv2d | nn.Linear), f"no initial value for {prefix}.{kind}"
                is_head = prefix == "head"
                weight = Weight(
                    shape=tuple(parameter.shape),
                    groups=module.groups if isinstance(module, nn.Conv2d) else 1,
                    gain=GAINS["linear" if is_head else activation],
                    generator=torch.Generator().manual_seed(seed_for(seed, "init", f"{prefix}.{kind}")),
                )
                own = {key: HEAD.get(key, value) if is_head else value for key, value in arguments.items()}
                # Drawn apart and copied: filling in place would depend on the parameter's memory format.
                parameter.copy_(law(weight, **own))
