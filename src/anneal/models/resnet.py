"""Residual networks, for small and for larger images: basic, bottleneck, preactivation and wide."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from anneal.models.layers import Dropout, ResidualBlock, StochasticDepth, Style, close_stage


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions beside a shortcut, activated after the sum (He et al. 2016a).

    ``y = act(x + norm(conv(act(norm(conv(x))))))``. With the norm after the activation each convolution is followed by
    activation and norm, and the sum by nothing: ``y = x + norm(act(conv(norm(act(conv(x))))))``. Where the shape changes
    the shortcut is a 1x1 convolution with a norm.
    """

    kernels: ClassVar[tuple[int, ...]] = (3, 3)
    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        style: Style,
        drop_rate: float = 0.0,
        block_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        assert not block_dropout, "only preactivation blocks have dropout within"
        self.after = style.after
        out_channels = channels * self.expansion
        before = in_channels
        for number, kernel in enumerate(self.kernels, start=1):
            width = out_channels if number == len(self.kernels) else channels
            step = stride if number - 1 == self.kernels.index(3) else 1
            self.add_module(f"conv{number}", nn.Conv2d(before, width, kernel, step, kernel // 2, bias=style.bias))
            self.add_module(f"norm{number}", style.normalize(width))
            self.add_module(f"activation{number}", style.activate())
            before = width
        self.drop = StochasticDepth(drop_rate)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=style.norm == "none")
            self.shortcut = nn.Sequential(conv, style.normalize(out_channels))

    @property
    def last(self) -> nn.Module:
        """The layer that ends the branch: the last norm, or the last convolution where the norm has no scale."""
        norm = self.get_submodule(f"norm{len(self.kernels)}")
        has_scale = getattr(norm, "weight", None) is not None
        return norm if has_scale else self.get_submodule(f"conv{len(self.kernels)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, channels x expansion, H / stride, W / stride) from (N, in_channels, H, W)."""
        branch, count = x, len(self.kernels)
        for number in range(1, count + 1):
            conv, norm, activation = (self._modules[f"{name}{number}"] for name in ("conv", "norm", "activation"))
            assert conv is not None and norm is not None and activation is not None
            branch = conv(branch)
            if self.after:
                branch = norm(activation(branch))
            elif number < count:
                branch = activation(norm(branch))
            else:
                return activation(self.shortcut(x) + self.drop(norm(branch)))
        return self.shortcut(x) + self.drop(branch)


class Bottleneck(BasicBlock):
    """A 1x1, a 3x3 and a 1x1 convolution, the last four times as wide, beside a shortcut (He et al. 2016a).

    `BasicBlock` with one convolution more. The 3x3 convolution has the stride.
    """

    kernels = (1, 3, 1)
    expansion = 4


class PreactivationBlock(ResidualBlock):
    """Two 3x3 convolutions, each after norm and activation, beside a shortcut that nothing alters (He et al. 2016b).

    ``y = x + conv(act(norm(conv(act(norm(x))))))``. Where the shape changes the shortcut is a 1x1 convolution of
    ``act(norm(x))``. With the norm after the activation, ``norm(act(x))`` stands for ``act(norm(x))``. ``block_dropout`` drops
    features before the second convolution (Zagoruyko & Komodakis 2016).
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        style: Style,
        drop_rate: float = 0.0,
        block_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.after = style.after
        self.norm1 = style.normalize(in_channels)
        self.activation1 = style.activate()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=style.bias)
        self.norm2 = style.normalize(channels)
        self.activation2 = style.activate()
        self.dropout = Dropout(block_dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=style.bias)
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

    def _prepare(self, x: torch.Tensor, norm: nn.Module, activation: nn.Module) -> torch.Tensor:
        return norm(activation(x)) if self.after else activation(norm(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, channels, H / stride, W / stride) from (N, in_channels, H, W)."""
        prepared = self._prepare(x, self.norm1, self.activation1)
        shortcut = x if self.shortcut is None else self.shortcut(prepared)
        branch = self._prepare(self.conv1(prepared), self.norm2, self.activation2)
        return shortcut + self.drop(self.conv2(self.dropout(branch)))


BLOCKS: dict[str, type[BasicBlock] | type[PreactivationBlock]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
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
        Channels and number of blocks of each stage; each stage after the first halves the resolution. Bottleneck blocks
        put out four times as many channels.
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
    spatial_dropout
        Chance that a channel is dropped at the end of each stage.
    stem_width
        Channels of the stem; None: those of the first stage.
    block_dropout
        Chance that a feature within a preactivation block is dropped.
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
        spatial_dropout: float = 0.0,
        stem_width: int | None = None,
        block_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        ends_open = block == "preactivation"
        kernel, stride = (3, 1) if stem == "small" else (7, 2)
        channels = stem_width or widths[0]
        self.stem = nn.Sequential()
        self.stem.add_module("conv", nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=style.bias))
        # The first preactivation block brings its own norm and activation.
        for name, layer in [] if ends_open else style.follow(channels):
            self.stem.add_module(name, layer)
        if stem == "large":
            self.stem.add_module("pool", nn.MaxPool2d(3, 2, 1))

        cls, total, count = BLOCKS[block], sum(depths), 0
        self.stages = nn.Sequential()
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = []
            for position in range(depth):
                count += 1
                step = 2 if index > 0 and position == 0 else 1
                drop_rate = stochastic_depth * count / total
                blocks.append(cls(channels, width, step, style, drop_rate, block_dropout))
                channels = width * cls.expansion
            self.stages.append(close_stage(nn.Sequential(*blocks), spatial_dropout))

        self.end = nn.Sequential(OrderedDict(style.follow(channels) if ends_open else []))
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes) from (N, in_channels, H, W)."""
        features = self.end(self.stages(self.stem(x))).mean((2, 3))
        return self.head(self.dropout(features))


def preact_resnet(in_channels: int, num_classes: int, **arguments: Any) -> ResNet:
    """Return a `ResNet` of preactivation blocks (He et al. 2016b)."""
    return ResNet(in_channels, num_classes, block="preactivation", **arguments)


def wide_resnet(
    in_channels: int, num_classes: int, *, depth: int, width: int, block_dropout: float = 0.0, **arguments: Any
) -> ResNet:
    """Return WRN-depth-width: three stages of preactivation blocks, ``width`` times as wide (Zagoruyko & Komodakis 2016).

    Parameters
    ----------
    in_channels, num_classes
        Channels of the image, number of logits.
    depth
        Convolutions on the way through: 6 n + 4 for n blocks a stage.
    width
        Stages of 16, 32 and 64 channels are so many times as wide.
    block_dropout
        Chance that a feature before the second convolution of a block is dropped.
    arguments
        ``style``, ``dropout``, ``stochastic_depth`` and ``spatial_dropout`` of `ResNet`.
    """
    assert depth % 6 == 4, depth
    return ResNet(
        in_channels,
        num_classes,
        widths=[16 * width, 32 * width, 64 * width],
        depths=[(depth - 4) // 6] * 3,
        block="preactivation",
        stem_width=16,
        block_dropout=block_dropout,
        **arguments,
    )
