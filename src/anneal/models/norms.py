"""Normalisation layers between the weights: one law, for images (N, C, H, W) and for vectors (N, C)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from anneal.params import UserError


class _GhostBatchNorm(_BatchNorm):
    """Batch normalisation whose statistics are those of groups of ``ghost`` samples (Hoffer et al. 2017).

    The running statistics take in the mean over the groups, once a forward pass. A group is never smaller than ``ghost``:
    what a batch has left over joins its last one, so that a batch of fewer than two groups is normalised as a whole.
    """

    def __init__(self, channels: int, *, ghost: int, **arguments: Any) -> None:
        super().__init__(channels, **arguments)
        self.ghost = ghost

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, C[, H, W]) normalised by group in training, by the running statistics when evaluating."""
        groups = len(x) // self.ghost
        if not self.training or groups < 2:
            return super().forward(x)
        self._check_input_dim(x)
        running = [self.running_mean, self.running_var] if self.track_running_stats else [None, None]
        mean, var = (None if buffer is None else torch.zeros_like(buffer) for buffer in running)
        parts, seen = [], 0
        for part in x.split([self.ghost] * (groups - 1) + [len(x) - self.ghost * (groups - 1)]):
            seen += len(part)
            # With this momentum the buffers hold the mean over the groups so far, each by its number of samples.
            weight = len(part) / seen
            parts.append(F.batch_norm(part, mean, var, self.weight, self.bias, True, weight, self.eps))
        if self.num_batches_tracked is not None and mean is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            for buffer, newest in zip(running, (mean, var), strict=True):
                assert buffer is not None and newest is not None
                buffer.lerp_(newest, momentum)
        return torch.cat(parts)

    def extra_repr(self) -> str:
        """Name the group's size in the module's print-out."""
        return f"{super().extra_repr()}, ghost={self.ghost}"


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """`_GhostBatchNorm` of images (N, C, H, W)."""


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    """`_GhostBatchNorm` of vectors (N, C)."""


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel, as in ConvNeXt (Ba et al. 2016; Liu et al. 2022).

    Over all of an image it would be group normalisation with one group.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, C, H, W) in channels_last memory, where the channels of a pixel lie side by side."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _batch(plain: type[_BatchNorm], ghostly: type[_GhostBatchNorm]) -> Callable[..., nn.Module]:
    def layer(channels: int, *, ghost: int | None = None, **arguments: Any) -> nn.Module:
        return plain(channels, **arguments) if ghost is None else ghostly(channels, ghost=ghost, **arguments)

    return layer


def _group(channels: int, *, groups: int, **arguments: Any) -> nn.Module:
    if channels % groups:
        divisors = [n for n in range(1, channels + 1) if channels % n == 0]
        near = min(divisors, key=lambda n: abs(n - groups))
        raise UserError(
            f"model.norm.group.groups: found {groups} for a layer of {channels} channels, allowed: a number that "
            f"divides them; nearest {near}"
        )
    return nn.GroupNorm(groups, channels, **arguments)


def _layer(cls: type[nn.LayerNorm]) -> Callable[..., nn.Module]:
    def layer(channels: int, *, affine: bool = True, **arguments: Any) -> nn.Module:
        return cls(channels, elementwise_affine=affine, **arguments)

    return layer


def _instance(channels: int, **arguments: Any) -> nn.Module:
    # Equal to torch.nn.InstanceNorm2d, and unlike it in keeping channels_last memory.
    return nn.GroupNorm(channels, channels, **arguments)


def _none(channels: int) -> nn.Module:  # noqa: ARG001
    return nn.Identity()


NORMS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "batch": (_batch(nn.BatchNorm2d, GhostBatchNorm2d), _batch(nn.BatchNorm1d, GhostBatchNorm1d)),
    "group": (_group, _group),
    "layer": (_layer(LayerNorm2d), _layer(nn.LayerNorm)),
    "instance": (_instance, _instance),
    "none": (_none, _none),
}
"""``model.norm.name`` to its layer for images (N, C, H, W) and for vectors (N, C), each called with C and arguments."""
