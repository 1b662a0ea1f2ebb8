"""The network of airbench94: high accuracy on small images in little time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from anneal.models.layers import Dropout, Style, close_stage

KERNEL = 2
"""Side of the first convolution."""


class Airbench(nn.Module):
    """A 2x2 convolution, stages of two 3x3 convolutions, maximum over the image, dropout, scaled linear head (Jordan 2024).

    The first convolution has no padding and twice as many filters as its patches have numbers: room for the patches'
    principal directions and their negatives, so that it can start by whitening them. Each stage pools right after its
    first convolution, before norm and activation, which are then a quarter of the work.

    Parameters
    ----------
    in_channels, num_classes
        Channels of the image, number of logits.
    widths
        Channels of each stage; each stage halves the resolution.
    style
        Activation and norm; the paper's are GELU and batch.
    scale
        Factor of the logits, which keeps the first ones small.
    dropout
        Chance that a feature of the head's input is dropped.
    spatial_dropout
        Chance that a channel is dropped at the end of each stage.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        widths: Sequence[int],
        style: Style,
        scale: float = 1 / 9,
        dropout: float = 0.0,
        spatial_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels = 2 * in_channels * KERNEL**2
        conv = nn.Conv2d(in_channels, channels, KERNEL)
        self.stem = nn.Sequential(OrderedDict(conv=conv, activation=style.activate()))
        self.stages = nn.Sequential()
        for width in widths:
            stage: OrderedDict[str, nn.Module] = OrderedDict()
            stage["conv1"] = nn.Conv2d(channels, width, 3, 1, 1, bias=style.bias)
            stage["pool"] = nn.MaxPool2d(2)
            stage.update((f"{name}1", layer) for name, layer in style.follow(width))
            stage["conv2"] = nn.Conv2d(width, width, 3, 1, 1, bias=style.bias)
            stage.update((f"{name}2", layer) for name, layer in style.follow(width))
            self.stages.append(close_stage(nn.Sequential(stage), spatial_dropout))
            channels = width
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(channels, num_classes, bias=False)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes) from (N, in_channels, H, W)."""
        features = self.stages(self.stem(x)).amax((2, 3))
        return self.head(self.dropout(features)) * self.scale
