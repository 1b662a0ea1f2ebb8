"""history.csv, a row an epoch, and steps.csv, a row every few steps: no times, written the same on every rerun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

if TYPE_CHECKING:
    from anneal.training.data import Batch
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
        the weights were changing. Without the L1 and L2 penalties.
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

    train_eval_loss, train_eval_accuracy
        Plain cross entropy and accuracy of a fixed sample of the training split at its end, as it is stored: without
        augmentation, mixing or dropout, by the same weights as ``val_loss``, and so to be compared with it.
    val_average_loss, val_average_accuracy
        As ``val_loss`` and ``val_accuracy``, by the averaged weights.
    norm_gap
        Median over batch norm layers of the distance between running and batch statistics, in standard deviations.
    norm_small_scales
        Share of the scales of batch norm layers that are nearly zero.

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
    train_eval_loss: float | None = None
    train_eval_accuracy: float | None = None
    val_average_loss: float | None = None
    val_average_accuracy: float | None = None
    norm_gap: float | None = None
    norm_small_scales: float | None = None


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

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the rows so far."""
        return {"rows": [asdict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.rows = [Epoch(**row) for row in state_dict["rows"]]


@dataclass(frozen=True)
class Step:
    """A row of steps.csv; a step that was skipped has none.

    Parameters
    ----------
    step
        Optimizer steps made by its end, from 1.
    loss
        Mean over the samples of its whole window, on all devices, as they were trained on; without the L1 and L2 penalties.
    lr
        Its learning rate.
    grad_norm
        Norm of its gradient before clipping.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float


MOST_STEPS = 1000
"""Most rows of steps.csv."""


def step_interval(total_steps: int) -> int:
    """Return the smallest k for which every k-th step of a run, its first among them, makes at most `MOST_STEPS` rows.

    >>> step_interval(1000), step_interval(1001), step_interval(4221)
    (1, 2, 5)
    """
    return -(-total_steps // MOST_STEPS)


class Steps(pl.Callback):
    """Collect a row every `step_interval` optimizer steps, and log the rows of an epoch at its end.

    Within an epoch the figures stay where they were computed; several processes reduce the epoch's losses in one call.

    Parameters
    ----------
    total_steps
        Of the planned run.
    """

    def __init__(self, total_steps: int) -> None:
        self.every = step_interval(total_steps)
        self.rows: list[Step] = []
        self.before: tuple[int, torch.Tensor] | None = None
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.known: list[tuple[int, float]] = []

    def on_train_batch_start(  # type: ignore[override]
        self,
        trainer: pl.Trainer,
        pl_module: TrainingModule,
        batch: Batch,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Keep the epoch's sum of losses as a window that gets a row begins."""
        if (
            trainer.global_step % self.every == 0
            and batch_idx % pl_module.plan[trainer.current_epoch].accumulation == 0
        ):
            self.before = trainer.global_step, pl_module.loss_sum.clone()

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: pl.Trainer,
        pl_module: TrainingModule,
        outputs: Any,  # noqa: ARG002
        batch: Batch,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Take the figures of the step, if this microbatch made it."""
        step = trainer.global_step
        if self.before is None or self.before[0] == step:
            return
        if pl_module.skipped:
            self.before = None
            return
        plan = pl_module.plan[trainer.current_epoch]
        samples = plan.window_samples(batch_idx // plan.accumulation)
        self.losses.append((pl_module.loss_sum - self.before[1]) / samples)
        self.norms.append(pl_module.norm)
        self.known.append((step, pl_module.rate))
        self.before = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Read the epoch's figures out, and log them."""
        if not self.known:
            return
        losses, norms = torch.stack(self.losses), torch.stack(self.norms)
        if pl_module.plan.world_size > 1:
            losses = trainer.strategy.reduce(losses, reduce_op="sum")
        rows = [
            Step(step, loss, lr, norm)
            for (step, lr), loss, norm in zip(self.known, losses.tolist(), norms.tolist(), strict=True)
        ]
        self.rows += rows
        self.losses, self.norms, self.known = [], [], []
        if trainer.logger is not None:
            for row in rows:
                values = {"step/loss": row.loss, "step/lr": row.lr, "step/grad_norm": row.grad_norm}
                trainer.logger.log_metrics(values, row.step)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: TrainingModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        """Add the rows so far, and the figures of an epoch that has not ended: losses those of each process."""
        losses = torch.stack([*self.losses, pl_module.loss_sum.new_zeros(())])
        checkpoint["steps"] = {
            "rows": [asdict(row) for row in self.rows],
            "losses": trainer.strategy.all_gather(losses).reshape(-1, len(losses)).cpu(),
            "norms": [norm.cpu() for norm in self.norms],
            "known": [list(known) for known in self.known],
        }

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: TrainingModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]  # noqa: ARG002
        """Take up what `on_save_checkpoint` added."""
        state, device = checkpoint["steps"], trainer.strategy.root_device
        by_process = state["losses"].to(device)
        self.rows = [Step(**row) for row in state["rows"]]
        self.losses = list(by_process[trainer.global_rank % len(by_process)][:-1])
        self.norms = [norm.to(device) for norm in state["norms"]]
        self.known = [(step, rate) for step, rate in state["known"]]


def as_csv(rows: Sequence[Any]) -> str:
    """Return rows, at least one, as CSV text; floats in the shortest form that reads back as the same number.

    >>> print(as_csv([Step(1, 2.5, 0.1, 3.0), Step(3, 2.25, 0.05, 1e-7)]), end="")
    step,loss,lr,grad_norm
    1,2.5,0.1,3.0
    3,2.25,0.05,1e-07

    What is None is an empty cell.

    >>> as_csv([Epoch(1, 10, 0.1, 2.0, 0.25, 1.5, 0.5, 3.0, 32, update_ratio=0.01)]).splitlines()[1]
    '1,10,0.1,2.0,0.25,1.5,0.5,3.0,32,0.01,,,,,,,,,,,'
    """
    lines = [",".join(field.name for field in fields(rows[0]))]
    lines += [",".join("" if value is None else str(value) for value in asdict(row).values()) for row in rows]
    return "\n".join(lines) + "\n"
