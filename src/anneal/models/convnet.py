"""A plain convolutional network in the manner of VGG."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from anneal.models.layers import Dropout, Style, close_stage


class ConvNet(nn.Module):
    """Stages of 3x3 convolutions and 2x2 max-pooling, mean over the image, dropout, linear head (Simonyan & Zisserman 2015).

    Parameters
    ----------
    in_channels, num_classes
        Channels of the image, number of logits.
    widths
        Channels of each stage; each stage ends in halving the resolution.
    depth
        Convolutions in each stage.
    style
        Activation and norm.
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
        depth: int,
        style: Style,
        dropout: float = 0.0,
        spatial_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels = in_channels
        self.stages = nn.Sequential()
        for width in widths:
            stage: OrderedDict[str, nn.Module] = OrderedDict()
            for index in range(depth):
                stage[f"conv{index}"] = nn.Conv2d(channels, width, 3, 1, 1, bias=style.bias)
                stage.update((f"{name}{index}", layer) for name, layer in style.follow(width))
                channels = width
            stage["pool"] = nn.MaxPool2d(2)
            self.stages.append(close_stage(nn.Sequential(stage), spatial_dropout))
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes) from (N, in_channels, H, W)."""
        return self.head(self.dropout(self.stages(x).mean((2, 3))))
