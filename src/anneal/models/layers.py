"""Layers that the architectures share: activations, normalisation layers, and layers with randomness of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from anneal.models.norms import NORMS
from anneal.params import UserError, nearest

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "PReLU": nn.PReLU,
    "ReLU6": nn.ReLU6,
    "ELU": nn.ELU,
    "CELU": nn.CELU,
    "SELU": nn.SELU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Mish": nn.Mish,
    "Softplus": nn.Softplus,
    "Hardswish": nn.Hardswish,
    "Tanh": nn.Tanh,
    "Hardtanh": nn.Hardtanh,
    "Softsign": nn.Softsign,
    "Sigmoid": nn.Sigmoid,
    "Hardsigmoid": nn.Hardsigmoid,
    "LogSigmoid": nn.LogSigmoid,
    "Tanhshrink": nn.Tanhshrink,
    "Softshrink": nn.Softshrink,
    "Hardshrink": nn.Hardshrink,
}
"""``model.activation`` to its layer: every elementwise one of torch.nn that needs no argument and draws nothing at random."""


@dataclass(frozen=True)
class Style:
    """What stands around each convolution or linear layer of a network: activation and norm, by name.

    Parameters
    ----------
    activation
        A key of `ACTIVATIONS`.
    norm, norm_arguments
        A key of `anneal.models.norms.NORMS`, and the arguments of its layer beside the number of channels.
    norm_position
        ``before`` (Ioffe & Szegedy 2015) or ``after`` the activation (Mishkin et al. 2017).

    Raises
    ------
    UserError
        A name is unknown.
    """

    activation: str = "ReLU"
    norm: str = "batch"
    norm_position: str = "before"
    norm_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, value, choices in (
            ("model.activation", self.activation, ACTIVATIONS),
            ("model.norm.name", self.norm, NORMS),
            ("model.norm.position", self.norm_position, ("before", "after")),
        ):
            if value not in choices:
                raise UserError(f"{key}: found {value}, allowed: {' | '.join(choices)}{nearest(value, choices)}")

    @property
    def after(self) -> bool:
        """Whether norm layers follow the activation; without norm layers there is no such order."""
        return self.norm_position == "after" and self.norm != "none"

    @property
    def bias(self) -> bool:
        """Whether weight layers need a bias: not where a norm layer, which has its own, follows at once."""
        return self.norm == "none" or self.after

    @property
    def bias_counts(self) -> bool:
        """Whether a bias right before a norm layer has an effect: not where each channel has its own mean taken off."""
        return self.norm not in ("batch", "instance")

    def activate(self) -> nn.Module:
        """Return an activation layer."""
        return ACTIVATIONS[self.activation]()

    def normalize(self, channels: int, *, vector: bool = False) -> nn.Module:
        """Return a norm layer for (N, channels, H, W), or for (N, channels) where it is a ``vector``."""
        return NORMS[self.norm][vector](channels, **self._arguments)

    def follow(self, channels: int, *, vector: bool = False) -> list[tuple[str, nn.Module]]:
        """Return the norm and the activation, with their names and in their order, for (N, channels[, H, W])."""
        pair = [("norm", self.normalize(channels, vector=vector)), ("activation", self.activate())]
        return pair[::-1] if self.after else pair

    @property
    def _arguments(self) -> Mapping[str, Any]:
        return {} if self.norm == "none" else self.norm_arguments


class ResidualBlock(nn.Module):
    """A block that adds a branch to its input."""

    @property
    def last(self) -> nn.Module:
        """The layer that ends the branch: where its ``weight`` is 0, so is the branch, and the layer still learns."""
        raise NotImplementedError


class LayerScale(nn.Module):
    """A learned factor for each channel of (N, C, H, W), all ``init`` at first (Touvron et al. 2021)."""

    def __init__(self, channels: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.full((channels,), init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` times the factors."""
        return x * self.weight.view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Name the size in the module's print-out."""
        return f"{len(self.weight)}, init={self.init}"


class KeyedRandom(nn.Module):
    """A layer that draws at random in training, from a generator that belongs to it and to the microbatch alone.

    The state is one number, ``key``: each forward pass at one key draws the same, on any process, so a second pass over
    the same microbatch sees the same network and nothing random needs saving. Without a key (None) the draws come from
    torch's global generator, as torch's own layers do.

    Parameters
    ----------
    rate
        How much: a chance below 1 where something is dropped, a standard deviation where noise is added. At 0 the layer
        draws nothing.
    """

    technique: ClassVar[str]

    def __init__(self, rate: float) -> None:
        super().__init__()
        assert rate >= 0, rate
        self.rate = rate
        self.key: int | None = None

    def _generator(self, x: torch.Tensor) -> torch.Generator | None:
        """Return the generator of this forward pass, on the device of ``x``; None is torch's global one."""
        return None if self.key is None else torch.Generator(x.device).manual_seed(self.key)

    def _keep(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return ones that were kept and zeros that were dropped, over the chance of being kept, so the mean stays."""
        assert self.rate < 1, self.rate
        kept = torch.empty(shape, dtype=x.dtype, device=x.device)
        return kept.bernoulli_(1.0 - self.rate, generator=self._generator(x)).div_(1.0 - self.rate)

    def extra_repr(self) -> str:
        """Name the rate in the module's print-out."""
        return f"rate={self.rate}"


class Dropout(KeyedRandom):
    """Zero each element of the input with chance ``rate`` in training (Srivastava et al. 2014)."""

    technique = "dropout"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` with elements dropped and the others divided by ``1 - rate``; ``x`` itself when evaluating."""
        return x * self._keep(x, tuple(x.shape)) if self.training and self.rate else x


class SpatialDropout(KeyedRandom):
    """Zero whole channels of each sample with chance ``rate`` in training (Tompson et al. 2015).

    Neighbouring pixels of a feature map say nearly the same, so that to drop single ones takes hardly anything away.
    """

    technique = "spatial_dropout"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, C, H, W) with channels dropped and the others divided by ``1 - rate``; ``x`` itself when evaluating."""
        if not (self.training and self.rate):
            return x
        return x * self._keep(x, (*x.shape[:2], 1, 1))


def close_stage(stage: nn.Sequential, spatial_dropout: float) -> nn.Sequential:
    """Return the stage with a `SpatialDropout` at its end, at rate 0 without; all other layers keep their names."""
    if spatial_dropout:
        stage.add_module("spatial_dropout", SpatialDropout(spatial_dropout))
    return stage


class GaussianNoise(KeyedRandom):
    """Add Gaussian noise of standard deviation ``rate`` to the input in training.

    To first order in ``rate ** 2`` this is a penalty on the derivatives of the network by its input, Tikhonov's
    regularisation (Bishop 1995): for half the squared error, ``rate ** 2 / 2 * sum((dy / dx) ** 2)``.
    """

    technique = "input_noise"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` with noise on each element; ``x`` itself when evaluating."""
        if not (self.training and self.rate):
            return x
        noise = torch.empty(x.shape, dtype=x.dtype, device=x.device).normal_(generator=self._generator(x))
        return torch.add(x, noise, alpha=self.rate)


class StochasticDepth(KeyedRandom):
    """Zero a residual branch with chance ``rate``, sample by sample, in training (Huang et al. 2016)."""

    technique = "stochastic_depth"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` with samples dropped and the others divided by ``1 - rate``; ``x`` itself when evaluating."""
        if not (self.training and self.rate):
            return x
        return x * self._keep(x, (len(x),) + (1,) * (x.ndim - 1))


class Custom(KeyedRandom):
    """A network from elsewhere, whose own random layers draw from torch's global generators.

    With a key those are seeded for the pass in training, and left as they were, so its draws belong to the microbatch too.
    """

    technique = "custom"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(1.0)  # Whether it draws at all is not known.
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the module's output for (N, C, H, W), contiguous, as modules that call ``view`` expect."""
        # Not contiguous(), which leaves the strides of one channel as they are: convolutions then go on in channels_last.
        x = x.flatten().view(x.shape)
        if self.key is None or not self.training:
            return self.module(x)
        # manual_seed seeds every GPU that this process sees.
        with torch.random.fork_rng(list(range(torch.cuda.device_count())) if x.is_cuda else []):
            torch.manual_seed(self.key)
            return self.module(x)

    def extra_repr(self) -> str:
        """Nothing to name."""
        return ""
