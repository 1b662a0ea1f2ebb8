"""Normalisation layers between the weights: one law, for images (N, C, H, W) and for vectors (N, C)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce
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


class SyncedBatchNorm(_BatchNorm):
    """Batch normalisation by the samples of all processes, on CPUs too (torch's own SyncBatchNorm needs GPUs).

    Forward pass, gradients and running statistics are those of one process with the samples of all: sums are added up over
    processes, and so are their gradients. Mean first, then the squares about it, which keeps the variance exact where it is
    small beside the mean. Without a process group, and with one process, it is torch's layer.

    Every process must make every pass in the same order. ``together`` set to False makes each normalise by its own samples.
    """

    def __init__(self, channels: int, **arguments: Any) -> None:
        super().__init__(channels, **arguments)
        self.together = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, C[, H, W]) normalised by all processes' samples in training, which may differ in N."""
        if not (self.training and self.together and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        self._check_input_dim(x)
        values, others, shape = x.float(), [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        # A microbatch that only keeps its process in step has momentum 0: it is normalised, but nobody learns of it.
        counts = float(self.momentum != 0)
        number = values.new_tensor([counts * x.numel() / x.shape[1]])
        *sums, number = all_reduce(torch.cat([values.sum(others) * counts, number])).split([x.shape[1], 1])
        mean = sums[0] / number
        centered = values - mean.view(shape)
        var = all_reduce(centered.square().sum(others) * counts) / number
        if self.track_running_stats:
            self._track(mean.detach(), (var * (number / (number - 1))).detach())
        scale = torch.rsqrt(var + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        y = centered * scale.view(shape)
        return (y if self.bias is None else y + self.bias.view(shape)).to(x.dtype)

    def _track(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var, momentum)

    def extra_repr(self) -> str:
        """Say so in the module's print-out."""
        return f"{super().extra_repr()}, sync=True"


class SyncedBatchNorm2d(SyncedBatchNorm, nn.BatchNorm2d):
    """`SyncedBatchNorm` of images (N, C, H, W)."""


class SyncedBatchNorm1d(SyncedBatchNorm, nn.BatchNorm1d):
    """`SyncedBatchNorm` of vectors (N, C)."""


class FrozenBatchNorm(_BatchNorm):
    """Batch normalisation by its running statistics in training too; nothing of it is trained.

    As torchvision's FrozenBatchNorm2d; state dicts are those of torch's batch norm layers. Scale and shift are buffers, so
    that no optimizer, penalty or unfreezing finds them.
    """

    def __init__(self, channels: int, **arguments: Any) -> None:
        super().__init__(channels, **arguments)
        # It has running statistics, and tracks none: what updates, recalibrates or measures them passes it over.
        self.track_running_stats = False
        for name in ("weight", "bias"):
            value = self._parameters.pop(name)
            self.register_buffer(name, None if value is None else value.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, C[, H, W]) normalised by the running statistics."""
        self._check_input_dim(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        """Say so in the module's print-out."""
        return f"{super().extra_repr()}, frozen=True"


class FrozenBatchNorm2d(FrozenBatchNorm, nn.BatchNorm2d):
    """`FrozenBatchNorm` of images (N, C, H, W)."""


class FrozenBatchNorm1d(FrozenBatchNorm, nn.BatchNorm1d):
    """`FrozenBatchNorm` of vectors (N, C)."""


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel, as in ConvNeXt (Ba et al. 2016; Liu et al. 2022).

    Over all of an image it would be group normalisation with one group.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, C, H, W) in channels_last memory, where the channels of a pixel lie side by side."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _batch(
    plain: type[_BatchNorm],
    ghostly: type[_GhostBatchNorm],
    synced: type[SyncedBatchNorm],
    frozen_at: type[FrozenBatchNorm],
) -> Callable[..., nn.Module]:
    def layer(
        channels: int, *, ghost: int | None = None, sync: bool = False, frozen: bool = False, **arguments: Any
    ) -> nn.Module:
        if ghost is not None:
            return ghostly(channels, ghost=ghost, **arguments)
        return (frozen_at if frozen else synced if sync else plain)(channels, **arguments)

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
    "batch": (
        _batch(nn.BatchNorm2d, GhostBatchNorm2d, SyncedBatchNorm2d, FrozenBatchNorm2d),
        _batch(nn.BatchNorm1d, GhostBatchNorm1d, SyncedBatchNorm1d, FrozenBatchNorm1d),
    ),
    "group": (_group, _group),
    "layer": (_layer(LayerNorm2d), _layer(nn.LayerNorm)),
    "instance": (_instance, _instance),
    "none": (_none, _none),
}
"""``model.norm.name`` to its layer for images (N, C, H, W) and for vectors (N, C), each called with C and arguments."""
