"""history.csv: one row an epoch, without times, written the same on every rerun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import pytorch_lightning as pl

if TYPE_CHECKING:
    from anneal.training.module import TrainingModule


@dataclass(frozen=True)
class Epoch:
    """A row of history.csv.

    Parameters
    ----------
    epoch
        From 1.
    step
        Optimizer steps made by its end.
    lr
        Learning rate of its last step.
    train_loss, train_accuracy
        Means over its training samples, as they were trained on: augmented, mixed, label-smoothed, with dropout, while
        the weights were changing. Without the L1 penalty.
    val_loss, val_accuracy
        Plain cross entropy and accuracy of the validation split at its end.
    grad_norm
        Mean over its steps of the gradient's norm before clipping.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    grad_norm: float


class History(pl.Callback):
    """Collect a row at the end of each validation."""

    def __init__(self) -> None:
        self.rows: list[Epoch] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Append the epoch's row."""
        figures = {name.replace("/", "_"): value for name, value in pl_module.figures.items()}
        self.rows.append(Epoch(epoch=trainer.current_epoch + 1, step=trainer.global_step, **figures))


def as_csv(rows: Sequence[Epoch]) -> str:
    """Return rows as CSV text; floats in the shortest form that reads back as the same number.

    >>> print(as_csv([Epoch(1, 10, 0.1, 2.0, 0.25, 1.5, 0.5, 3.0)]), end="")
    epoch,step,lr,train_loss,train_accuracy,val_loss,val_accuracy,grad_norm
    1,10,0.1,2.0,0.25,1.5,0.5,3.0
    """
    lines = [",".join(field.name for field in fields(Epoch))]
    lines += [",".join(repr(value) for value in asdict(row).values()) for row in rows]
    return "\n".join(lines) + "\n"
