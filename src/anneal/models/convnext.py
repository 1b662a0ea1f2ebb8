"""ConvNeXt, for small and for larger images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from anneal.models.layers import Dropout, LayerScale, ResidualBlock, StochasticDepth, Style, close_stage


class ConvNeXtBlock(ResidualBlock):
    """A depthwise convolution, a norm and an inverted bottleneck of two 1x1 convolutions beside a shortcut.

    ``y = x + scale * project(act(expand(norm(depthwise(x)))))``, four times as wide in between (Liu et al. 2022).
    """

    def __init__(self, channels: int, style: Style, kernel: int, layer_scale: float, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels, channels, kernel, padding=kernel // 2, groups=channels, bias=style.bias_counts
        )
        self.norm = style.normalize(channels)
        self.expand = nn.Conv2d(channels, 4 * channels, 1)
        self.activation = style.activate()
        self.project = nn.Conv2d(4 * channels, channels, 1)
        self.scale = LayerScale(channels, layer_scale) if layer_scale else nn.Identity()
        self.drop = StochasticDepth(drop_rate)

    @property
    def last(self) -> nn.Module:
        """The layer that ends the branch: the layer scale, or the last convolution where there is none."""
        return self.scale if isinstance(self.scale, LayerScale) else self.project

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, channels, H, W) from the same."""
        branch = self.project(self.activation(self.expand(self.norm(self.depthwise(x)))))
        return x + self.drop(self.scale(branch))


class ConvNeXt(nn.Module):
    """Patches, stages of depthwise residual blocks, mean over the image, norm, dropout, linear head (Liu et al. 2022).

    A norm and a 2x2 convolution of stride 2 stand between stages.

    Parameters
    ----------
    in_channels, num_classes
        Channels of the image, number of logits.
    widths, depths
        Channels and number of blocks of each stage; each stage after the first halves the resolution.
    style
        Activation and norm; the paper's are GELU and layer.
    stem
        Side in pixels of the patches that the first convolution takes; it divides the resolution by as much.
    kernel
        Side of the depthwise convolutions, odd.
    layer_scale
        First value of the factor of each channel of a branch; 0: no such factors.
    dropout
        Chance that a feature of the head's input is dropped.
    stochastic_depth
        Chance that the last block's branch is dropped; block l of L has l / L of it.
    spatial_dropout
        Chance that a channel is dropped at the end of each stage.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        style: Style,
        stem: int = 4,
        kernel: int = 7,
        layer_scale: float = 1e-6,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        spatial_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, widths[0], stem, stem, bias=style.bias_counts)
        self.stem = nn.Sequential(OrderedDict(conv=conv, norm=style.normalize(widths[0])))
        total, count, channels = sum(depths), 0, widths[0]
        self.stages = nn.Sequential()
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            stage = nn.Sequential()
            if index > 0:
                stage.add_module("norm", style.normalize(channels))
                stage.add_module("conv", nn.Conv2d(channels, width, 2, 2))
            for position in range(depth):
                count += 1
                drop_rate = stochastic_depth * count / total
                stage.add_module(f"{position}", ConvNeXtBlock(width, style, kernel, layer_scale, drop_rate))
            self.stages.append(close_stage(stage, spatial_dropout))
            channels = width
        self.norm = style.normalize(channels, vector=True)
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes) from (N, in_channels, H, W)."""
        features = self.stages(self.stem(x)).mean((2, 3))
        return self.head(self.dropout(self.norm(features)))
