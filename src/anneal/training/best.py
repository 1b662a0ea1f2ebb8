"""The weights that are exported: those of the best epoch, chosen on the validation split, or of the last."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import nn

if TYPE_CHECKING:
    from anneal.training.module import Figures, TrainingModule

Rank = tuple[float, float]


def rank(figures: Figures, measured: str = "val") -> Rank:
    """Return what epochs are compared by, larger is better: validation accuracy, then the lower validation loss.

    Parameters
    ----------
    figures
        Of an epoch.
    measured
        Whose figures count: ``val`` for the newest weights, ``val_average`` for averaged ones.

    Examples
    --------
    >>> rank({"val/accuracy": 0.9, "val/loss": 0.3}) > rank({"val/accuracy": 0.9, "val/loss": 0.4})
    True
    """
    return figures[f"{measured}/accuracy"], -figures[f"{measured}/loss"]


@dataclass
class Kept:
    """A copy, on the CPU, of the weights of the best epoch so far, the earliest among equals; or of the last epoch.

    Parameters
    ----------
    restore_best
        The best epoch; False: the last.
    rank
        Of its epoch; None before the first.
    epoch
        From 1; 0 before the first.
    weights
        State dict; empty in all processes but the first.
    """

    restore_best: bool
    rank: Rank | None = None
    epoch: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def offer(self, this: Rank, trainer: pl.Trainer, network: nn.Module) -> None:
        """Copy the network's weights if they are to be kept."""
        if self.restore_best and self.rank is not None and this <= self.rank:
            return
        self.rank = this
        self.epoch = trainer.current_epoch + 1
        if trainer.is_global_zero:
            state = network.state_dict()
            self.weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: plain numbers and tensors."""
        return {"rank": None if self.rank is None else list(self.rank), "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        found = state_dict["rank"]
        self.rank = None if found is None else (found[0], found[1])
        self.epoch = state_dict["epoch"]
        self.weights = dict(state_dict["weights"])


class BestWeights(pl.Callback):
    """Keep the newest weights of the best epoch, or of the last, in memory.

    Parameters
    ----------
    restore_best
        See `Kept`.
    """

    def __init__(self, *, restore_best: bool = True) -> None:
        self.kept = Kept(restore_best)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Copy the weights if they are to be kept."""
        self.kept.offer(rank(pl_module.figures), trainer, pl_module.classifier)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return self.kept.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.kept.load_state_dict(state_dict)


def exported(raw: Kept, average: Kept | None, export: str) -> str:
    """Return which weights are exported: ``raw`` or ``average``.

    Parameters
    ----------
    raw, average
        What each kept; None, or an epoch of 0, where no average was made.
    export
        ``raw``, ``average``, or ``best``: that with the higher rank at the epoch it kept; among equals ``raw``.

    Examples
    --------
    >>> raw, average = Kept(True, rank=(0.9, -0.30), epoch=4), Kept(True, rank=(0.9, -0.29), epoch=5)
    >>> exported(raw, average, "best"), exported(raw, None, "best"), exported(raw, average, "raw")
    ('average', 'raw', 'raw')
    """
    if average is None or average.rank is None or export == "raw":
        return "raw"
    assert raw.rank is not None
    return "average" if export == "average" or average.rank > raw.rank else "raw"
