"""Progress of a run on stderr: a bar on a terminal, a plain line every few seconds elsewhere, a line an epoch on both."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

import pytorch_lightning as pl

if TYPE_CHECKING:
    from anneal.batching import RunPlan
    from anneal.training.module import TrainingModule

BAR_EVERY = 0.2
"""Seconds between two updates of the bar: reading the loss waits for the device."""

LINE_EVERY = 5.0
"""Seconds between two lines where stderr is no terminal."""


def clock_text(seconds: float) -> str:
    """Return a duration as ``1:05`` or ``2:03:04``.

    >>> clock_text(65), clock_text(7384)
    ('1:05', '2:03:04')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress(pl.Callback):
    """Show epoch, step, loss, accuracy, images a second and the time left.

    Parameters
    ----------
    name
        Of the member, before each line.
    plan
        How each epoch falls into steps.
    stream
        Where to; stderr by default.
    clock
        Seconds of a monotonic clock.
    """

    def __init__(
        self,
        name: str,
        plan: RunPlan,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.plan = plan
        self.epochs = len(plan)
        self.samples_before = [0, *itertools.accumulate(epoch.samples_per_epoch for epoch in plan.epochs)]
        self.steps_before = [0, *itertools.accumulate(plan.epoch_steps)]
        self.stream = stream or sys.stderr
        self.clock = clock
        self.terminal = self.stream.isatty()
        self.every = BAR_EVERY if self.terminal else LINE_EVERY
        self.bar: Any = None
        self.next_update = float("inf")
        self.started = 0.0
        self.before = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Start the clock."""
        if not trainer.is_global_zero:
            return
        self.started = self.clock()
        # A resumed run has images behind it that no time of its own went into.
        epoch = trainer.current_epoch
        steps = trainer.global_step - self.steps_before[epoch]
        self.before = self.samples_before[epoch] + steps * self.plan[epoch].size
        self.next_update = self.started + self.every
        if self.terminal:
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.plan.total_steps,
                file=self.stream,
                leave=False,
                dynamic_ncols=True,
                bar_format="{desc} |{bar}| {postfix}",
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: TrainingModule, *_: Any) -> None:  # type: ignore[override]
        """Show where the run is, at most every `every` seconds, and what it has to say at once."""
        if pl_module.notice is not None:
            if trainer.is_global_zero:
                self.write(f"{self.name}: {pl_module.notice}")
            pl_module.notice = None
        now = self.clock()
        if now < self.next_update:
            return
        self.next_update = now + self.every
        epoch, step = trainer.current_epoch, trainer.global_step
        plan = self.plan[epoch]
        in_epoch = step - self.steps_before[epoch]
        seen = max(1, pl_module.num_seen)
        loss, accuracy = float(pl_module.loss_sum) / seen, float(pl_module.correct) / seen
        images = self.samples_before[epoch] + pl_module.num_seen * plan.world_size
        elapsed = max(now - self.started, 1e-9)
        made = max(1, images - self.before)
        left = elapsed * (self.samples_before[-1] - images) / made
        head = f"{self.name}: epoch {epoch + 1}/{self.epochs}"
        rest = (
            f"step {in_epoch}/{plan.steps_per_epoch}  loss {loss:.3f}  accuracy {accuracy:.3f}  "
            f"{made / elapsed:,.0f} images/s  {clock_text(max(left, 0))} left"
        )
        if self.bar is None:
            self.write(f"{head}  {rest}")
        else:
            self.bar.n = step
            self.bar.set_description_str(head, refresh=False)
            self.bar.postfix = rest
            self.bar.refresh()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Say how the epoch ended."""
        if not trainer.is_global_zero:
            return
        f = pl_module.figures
        done, now = trainer.current_epoch + 1, self.clock()
        rate = (self.samples_before[done] - self.before) / max(now - self.started, 1e-9)
        left = (self.samples_before[-1] - self.samples_before[done]) / max(rate, 1e-9)
        self.write(
            f"{self.name}: epoch {done}/{self.epochs}  train loss {f['train/loss']:.3f} accuracy "
            f"{f['train/accuracy']:.3f}  val loss {f['val/loss']:.3f} accuracy {f['val/accuracy']:.3f}  "
            f"{rate:,.0f} images/s  {clock_text(left)} left"
        )
        self.next_update = now + self.every

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Remove the bar."""
        self.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Remove the bar."""
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def write(self, line: str) -> None:
        """Write a line, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)
