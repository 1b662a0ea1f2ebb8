"""A fully connected network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from anneal.models.layers import Dropout, Style


class MLP(nn.Module):
    """Flattened image, hidden linear layers, dropout, linear head.

    Parameters
    ----------
    in_features, num_classes
        Numbers of an image, number of logits.
    hidden
        Widths of the hidden layers; none makes it a linear classifier.
    style
        Activation and norm.
    dropout
        Chance that a feature of the head's input is dropped.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, hidden: Sequence[int], style: Style, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.hidden = nn.Sequential()
        features = in_features
        for width in hidden:
            layer: OrderedDict[str, nn.Module] = OrderedDict()
            layer["linear"] = nn.Linear(features, width, bias=style.bias)
            layer.update(style.follow(width, vector=True))
            self.hidden.append(nn.Sequential(layer))
            features = width
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(features, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes) from (N, C, H, W)."""
        return self.head(self.dropout(self.hidden(x.flatten(1))))
