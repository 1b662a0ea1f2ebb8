"""The weights at the end of some epochs, which make an ensemble of one run (Huang et al. 2017)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

if TYPE_CHECKING:
    from anneal.training.module import TrainingModule


class Snapshots(pl.Callback):
    """Keep copies, on the CPU of the first process, of the newest weights at the end of some epochs.

    Parameters
    ----------
    epochs
        From 1.
    """

    def __init__(self, epochs: Collection[int]) -> None:
        self.epochs = frozenset(epochs)
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Copy the weights, with the running statistics that were just evaluated, if this epoch is one of them."""
        epoch = trainer.current_epoch + 1
        if epoch in self.epochs and trainer.is_global_zero:
            state = pl_module.classifier.state_dict()
            self.weights[epoch] = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: plain numbers and tensors."""
        return {"weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.weights = dict(state_dict["weights"])
