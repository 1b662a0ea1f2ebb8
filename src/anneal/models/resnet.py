"""Residual networks of basic blocks, for small and for larger images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from anneal.models.layers import Dropout, StochasticDepth, Style


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, activated after the sum (He et al. 2016a).

    ``y = act(x + norm(conv(act(norm(conv(x))))))``. With the norm after the activation each convolution is followed by
    activation and norm, and the sum by nothing: ``y = x + norm(act(conv(norm(act(conv(x))))))``. Where the shape changes
    the shortcut is a 1x1 convolution with a norm.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, style: Style, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.after = style.after
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=style.bias)
        self.norm1 = style.normalize(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=style.bias)
        self.norm2 = style.normalize(channels)
        self.activation = style.activate()
        self.drop = StochasticDepth(drop_rate)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=style.norm == "none")
            self.shortcut = nn.Sequential(conv, style.normalize(channels))

    @property
    def last(self) -> nn.Module:
        """The layer that ends the branch: the second norm, or the second convolution where there is no norm."""
        return self.conv2 if isinstance(self.norm2, nn.Identity) else self.norm2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, channels, H / stride, W / stride) from (N, in_channels, H, W)."""
        if self.after:
            branch = self.norm1(self.activation(self.conv1(x)))
            branch = self.norm2(self.activation(self.conv2(branch)))
            return self.shortcut(x) + self.drop(branch)
        branch = self.activation(self.norm1(self.conv1(x)))
        branch = self.norm2(self.conv2(branch))
        return self.activation(self.shortcut(x) + self.drop(branch))


class PreactivationBlock(nn.Module):
    """Two 3x3 convolutions, each after norm and activation, beside a shortcut that nothing alters (He et al. 2016b).

    ``y = x + conv(act(norm(conv(act(norm(x))))))``. Where the shape changes the shortcut is a 1x1 convolution of
    ``act(norm(x))``. With the norm after the activation, ``norm(act(x))`` stands for ``act(norm(x))``.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, style: Style, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.after = style.after
        self.norm1 = style.normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=style.bias)
        self.norm2 = style.normalize(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=style.bias)
        self.activation = style.activate()
        self.drop = StochasticDepth(drop_rate)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=style.bias)

    @property
    def last(self) -> nn.Module:
        """The layer that ends the branch: the second convolution.

        Not the norm before it: zero there would leave the activation without a gradient, and the branch dead.
        """
        return self.conv2

    def _prepare(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return norm(self.activation(x)) if self.after else self.activation(norm(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, channels, H / stride, W / stride) from (N, in_channels, H, W)."""
        prepared = self._prepare(x, self.norm1)
        shortcut = x if self.shortcut is None else self.shortcut(prepared)
        branch = self.conv2(self._prepare(self.conv1(prepared), self.norm2))
        return shortcut + self.drop(branch)


BLOCKS: dict[str, type[BasicBlock] | type[PreactivationBlock]] = {
    "basic": BasicBlock,
    "preactivation": PreactivationBlock,
}
"""``model.resnet.block`` to its class."""


class ResNet(nn.Module):
    """Stem, stages of residual blocks, mean over the image, dropout, linear head.

    Parameters
    ----------
    in_channels, num_classes
        Channels of the image, number of logits.
    widths, depths
        Channels and number of blocks of each stage; each stage after the first halves the resolution.
    style
        Activation and norm.
    stem
        ``small``: a 3x3 convolution; ``large``: a 7x7 convolution of stride 2 and 3x3 max-pooling of stride 2.
    block
        A key of `BLOCKS`.
    dropout
        Chance that a feature of the head's input is dropped.
    stochastic_depth
        Chance that the last block's branch is dropped; block l of L has l / L of it (Huang et al. 2016).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        style: Style,
        stem: str = "small",
        block: str = "basic",
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        ends_open = block == "preactivation"
        kernel, stride = (3, 1) if stem == "small" else (7, 2)
        self.stem = nn.Sequential()
        self.stem.add_module("conv", nn.Conv2d(in_channels, widths[0], kernel, stride, kernel // 2, bias=style.bias))
        # The first preactivation block brings its own norm and activation.
        for name, layer in [] if ends_open else style.follow(widths[0]):
            self.stem.add_module(name, layer)
        if stem == "large":
            self.stem.add_module("pool", nn.MaxPool2d(3, 2, 1))

        total, count, channels = sum(depths), 0, widths[0]
        self.stages = nn.Sequential()
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = []
            for position in range(depth):
                count += 1
                step = 2 if index > 0 and position == 0 else 1
                blocks.append(BLOCKS[block](channels, width, step, style, stochastic_depth * count / total))
                channels = width
            self.stages.append(nn.Sequential(*blocks))

        self.end = nn.Sequential(OrderedDict(style.follow(channels) if ends_open else []))
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes) from (N, in_channels, H, W)."""
        features = self.end(self.stages(self.stem(x))).mean((2, 3))
        return self.head(self.dropout(features))
