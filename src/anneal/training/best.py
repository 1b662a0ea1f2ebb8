"""The weights of the best epoch, chosen on the validation split."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch

if TYPE_CHECKING:
    from anneal.training.module import Figures, TrainingModule


def rank(figures: Figures) -> tuple[float, float]:
    """Return what epochs are compared by, larger is better: validation accuracy, then the lower validation loss.

    >>> rank({"val/accuracy": 0.9, "val/loss": 0.3}) > rank({"val/accuracy": 0.9, "val/loss": 0.4})
    True
    """
    return figures["val/accuracy"], -figures["val/loss"]


class BestWeights(pl.Callback):
    """Keep a copy of the weights of the best epoch so far in memory; among equals the earliest stays."""

    def __init__(self) -> None:
        self.best: tuple[float, float] | None = None
        self.epoch = 0
        self.weights: dict[str, torch.Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Copy the weights where this epoch is the best."""
        this = rank(pl_module.figures)
        if self.best is not None and this <= self.best:
            return
        self.best = this
        self.epoch = trainer.current_epoch + 1
        if trainer.is_global_zero:
            state = pl_module.classifier.state_dict()
            self.weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
