"""Networks for ``model.name: tests.custom_models.networks:...``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH = 4


class Small(nn.Module):
    """Layers of kinds that anneal's own networks lack, written as such modules often are: with ``view``."""

    def __init__(self, num_classes: int, in_chans: int, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, width, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.token = nn.Parameter(torch.randn(1, 4 * width))
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes)."""
        x = self.pool(torch.relu(self.conv(x)))
        return self.fc(self.drop(x.view(len(x), -1) + self.token))


def small_or_large(num_classes: int, in_channels: int, *, large: bool) -> nn.Module:
    """Return a network as a function would, of channels by another name."""
    return Small(num_classes, in_channels, width=16 if large else 4)


def anything(**settings: Any) -> nn.Module:
    """Return a network from arguments whose names the signature does not say."""
    return Small(settings["classes"], settings["channels"])


def no_module(num_classes: int) -> int:
    """Return what is no network."""
    return num_classes


def features(in_chans: int) -> nn.Module:
    """Return a network with another number of outputs."""
    return Small(5, in_chans)


def lazy(num_classes: int) -> nn.Module:
    """Return a network whose weights are drawn in its first forward pass."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def normed(num_classes: int, in_chans: int) -> nn.Module:
    """Return a network with running statistics of two kinds and a weight that is computed from others."""
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(in_chans, 8, 3, padding=1))
    return nn.Sequential(
        conv,
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.InstanceNorm2d(8, track_running_stats=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


class Frozen(nn.Module):
    """A head on features without a gradient."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes)."""
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)


class Gate(nn.Module):
    """The square root of how far an image is from being brighter than ``most``, in training: NaN where it is."""

    def __init__(self, most: float, always: bool) -> None:
        super().__init__()
        self.most = most
        self.always = always

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return images (N, C, H, W) times the root."""
        if not (self.training or self.always):
            return x
        return x * (self.most - x.mean((1, 2, 3), keepdim=True)).sqrt()


def gated(num_classes: int, in_chans: int, most: float = 2.0, always: bool = False) -> nn.Module:
    """Return a network with a `Gate` inside its first block."""
    return nn.Sequential(
        nn.Sequential(nn.Identity(), Gate(most, always)),
        nn.Conv2d(in_chans, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


class Cusp(nn.Module):
    """A network whose outputs are finite, and whose gradient is that of a square root at 0."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes)."""
        x = self.conv(x).mean((2, 3))
        return self.head(x + (0 * x).sqrt())


def untrainable(num_classes: int, in_chans: int) -> nn.Module:
    """Return a network without anything to train."""
    return Small(num_classes, in_chans).requires_grad_(False)


def broken() -> nn.Module:
    """Fail as code does."""
    raise RuntimeError("out of ideas")
