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
    batch_size
        Samples of its optimizer steps.
    update_ratio
        Median over layers of the norm of its last update over the norm of the weights.
    update_cosine
        Cosine between its last two updates.
    rate_low, rate_median, rate_high
        5th, 50th and 95th percentile over parameters of the effective rate of its last step: what the optimizer
        multiplies a gradient by.
    noise_scale
        Gradient noise scale at its end, in samples (McCandlish et al. 2018).

    What was not measured, or does not exist, is None: an empty cell.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    grad_norm: float
    batch_size: int
    update_ratio: float | None = None
    update_cosine: float | None = None
    rate_low: float | None = None
    rate_median: float | None = None
    rate_high: float | None = None
    noise_scale: float | None = None


COLUMNS = [field.name for field in fields(Epoch)]


class History(pl.Callback):
    """Collect a row at the end of each validation."""

    def __init__(self) -> None:
        self.rows: list[Epoch] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Append the epoch's row."""
        figures = {name.replace("/", "_"): value for name, value in pl_module.figures.items()}
        known = {name: value for name, value in figures.items() if name in COLUMNS}
        self.rows.append(Epoch(epoch=trainer.current_epoch + 1, step=trainer.global_step, **known))  # type: ignore[arg-type]


def as_csv(rows: Sequence[Epoch]) -> str:
    """Return rows as CSV text; floats in the shortest form that reads back as the same number.

    >>> print(as_csv([Epoch(1, 10, 0.1, 2.0, 0.25, 1.5, 0.5, 3.0, 32, update_ratio=0.01)]), end="")
    epoch,step,lr,train_loss,train_accuracy,val_loss,val_accuracy,grad_norm,batch_size,update_ratio,update_cosine,rate_low,rate_median,rate_high,noise_scale
    1,10,0.1,2.0,0.25,1.5,0.5,3.0,32,0.01,,,,,
    """
    lines = [",".join(COLUMNS)]
    lines += [",".join("" if value is None else repr(value) for value in asdict(row).values()) for row in rows]
    return "\n".join(lines) + "\n"
