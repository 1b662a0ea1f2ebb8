"""The learning-rate range test: raise the rate from step to step of a trial run, and read off which rates train."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.seed import isolate_rng

from anneal.batching import BatchConfig
from anneal.models.config import InitConfig, ModelConfig
from anneal.optimizers.config import NO_RATE, OptimizerConfig
from anneal.params import UserError
from anneal.schedules import ScheduleConfig
from anneal.training.config import AveragingConfig, HardwareConfig, LossConfig, RegularizationConfig, TrainerConfig
from anneal.training.interruption import interruptible
from anneal.training.lr_curve import LRRange, exponential_rates, read_curve, smoothing_weight
from anneal.training.machine import global_settings, quiet
from anneal.training.module import Diverged, TrainingModule
from anneal.training.progress import BAR_EVERY, LINE_EVERY
from anneal.training.setup import set_up

START, STOP, NUM_STEPS = 1e-5, 10.0, 100
"""Range and length of the test behind ``lr: auto``: 16 steps for each factor of ten.

The valley rule counts steps, so a long flat stretch at rates where nothing trains would draw its suggestion down.
"""

FEWEST_STEPS = 40
"""Of a test: with fewer, smoothing over a tenth of them leaves the noise in."""

BLOW_UP = 4.0
"""The test ends where the smoothed loss exceeds its minimum so many times, as in fastai."""


def lr_range(
    *,
    name: str,
    store: Path,
    augmented: Path,
    seed: int,
    model: ModelConfig,
    init: InitConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    batch: BatchConfig,
    loss: LossConfig,
    regularization: RegularizationConfig,
    averaging: AveragingConfig,
    trainer: TrainerConfig,
    hardware: HardwareConfig,
    start: float = START,
    stop: float = STOP,
    num_steps: int = NUM_STEPS,
) -> LRRange:
    """Train a copy of a member for some steps at an exponentially rising rate, and judge the curve (Smith 2017).

    All is as in the member's own run (data and its order, augmentation, mixing, network and its initial weights, batch
    and accumulation, penalties, precision, the optimizer's other arguments and its factors by layer) but for the rate:
    no warm-up and no schedule, with the batch and the momentum that the run begins with. It runs in one process on one
    device, without validation, starts the next epoch where one is shorter than the test, and ends early where the
    smoothed loss exceeds `BLOW_UP` times its minimum or the loss is not finite. It writes nothing and leaves torch's
    random state, threads and switches as they were; the same arguments give the same curve on the same machine.

    Parameters
    ----------
    name
        Of the member, for progress lines.
    store, augmented, seed, model, init, optimizer, schedule, batch, loss, regularization, averaging, trainer, hardware
        As for `anneal.training.fit.fit`; the optimizer's ``lr`` and the batch's ``lr_scaling`` have no part in it.
    start, stop
        Lowest and highest rate, 0 < start < stop.
    num_steps
        Optimizer steps from the one to the other, at least `FEWEST_STEPS`.

    Raises
    ------
    UserError
        The settings do not fit the data or the machine, the range is none, or the optimizer has no rate to test.
    KeyboardInterrupt
        Stopped by Ctrl-C or SIGTERM.
    """
    if not 0 < start < stop < math.inf:
        raise UserError(f"learning rates: found {start:g} to {stop:g}, allowed: 0 < start < stop")
    if num_steps < FEWEST_STEPS:
        raise UserError(f"steps: found {num_steps}, allowed: at least {FEWEST_STEPS}")
    if optimizer.name in NO_RATE:
        raise UserError(
            f"optimizer.name: found {optimizer.name}, {NO_RATE[optimizer.name]}: "
            f"there is no one rate to test; allowed: another optimizer"
        )
    rates = exponential_rates(start, stop, num_steps)
    threads = torch.get_num_threads()
    try:
        with isolate_rng(), quiet(), interruptible(), global_settings():
            setup = set_up(
                store=store,
                augmented=augmented,
                seed=seed,
                model=model,
                init=init,
                optimizer=at_rate_one(optimizer),
                schedule=schedule.model_copy(update={"name": "constant"}),
                batch=batch.model_copy(
                    update={"lr_scaling": "none", "growth": batch.growth.model_copy(update={"at": []})}
                ),
                loss=loss,
                regularization=regularization,
                averaging=averaging,
                trainer=trainer.model_copy(update={"on_nan": "stop"}),
                hardware=hardware.model_copy(update={"devices": 1, "num_nodes": 1}),
            )
            if setup.module.freezing is not None and setup.module.freezing.wakes:
                setup.module.freezing = None  # the rate is that of the layers that learn in the end
            setup.module.factor_at = lambda step, losses: rates[step]  # noqa: ARG005
            sweep = Sweep(name, num_steps)
            runner = setup.trainer(
                [sweep],
                max_epochs=-1,
                max_steps=num_steps,
                limit_val_batches=0,
                # One process whatever launched this one.
                plugins=[LightningEnvironment()],
            )
            try:
                runner.fit(setup.module, datamodule=setup.data_module())
            except Diverged:
                pass
            finally:
                sweep.close()
    finally:
        torch.set_num_threads(threads)
    return read_curve(sweep.rates, sweep.losses, num_steps)


def at_rate_one(optimizer: OptimizerConfig) -> OptimizerConfig:
    """Return the section with 1 for the rate of the chosen optimizer, so that factors are rates."""
    block = getattr(optimizer, optimizer.name)
    changed = {**block, "lr": 1.0} if isinstance(block, dict) else block.model_copy(update={"lr": 1.0})
    return optimizer.model_copy(update={optimizer.name: changed})


def found_rate(result: LRRange, key: str) -> float:
    """Return the suggestion of a test.

    Raises
    ------
    UserError
        There is none; it names ``key`` of params.yaml and says why.
    """
    if result.suggestion is None:
        raise UserError(
            f"params.yaml: {key}: found auto, but the range test from {START:g} to {STOP:g} found no rate: "
            f"{result.reason}; allowed: a number; `anneal lr-range` draws the curve"
        )
    return result.suggestion


class Sweep(pl.Callback):
    """Record rate and loss of each optimizer step, and stop where the loss blows up.

    Parameters
    ----------
    name
        Of the member, before each line.
    num_steps
        Of the test.
    stream
        Where progress goes; stderr by default.
    """

    def __init__(self, name: str, num_steps: int, stream: TextIO | None = None) -> None:
        self.name = name
        self.num_steps = num_steps
        self.weight = smoothing_weight(num_steps)
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.lowest = math.inf
        self.average = 0.0
        self.before = (0.0, 0)
        self.steps = 0
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.next_line = time.monotonic() + (BAR_EVERY if self.terminal else LINE_EVERY)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Begin anew, as the module's sums do."""
        self.before = (0.0, 0)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: TrainingModule, *_: Any) -> None:  # type: ignore[override]
        """Take the loss of the step that this microbatch ended, if it ended one."""
        if trainer.global_step == self.steps:
            return
        self.steps = trainer.global_step
        now = float(pl_module.loss_sum), pl_module.num_seen
        loss = (now[0] - self.before[0]) / (now[1] - self.before[1])
        self.before = now
        if not math.isfinite(loss):
            trainer.should_stop = True
            return
        self.rates.append(pl_module.rate)
        self.losses.append(loss)
        self.average = self.weight * self.average + (1.0 - self.weight) * loss
        smoothed = self.average / (1.0 - self.weight ** len(self.losses))
        self.lowest = min(self.lowest, smoothed)
        if smoothed > BLOW_UP * self.lowest:
            trainer.should_stop = True
        self.show(loss)

    def show(self, loss: float) -> None:
        """Say how far the test is, once in a while."""
        now = time.monotonic()
        if now < self.next_line:
            return
        self.next_line = now + (BAR_EVERY if self.terminal else LINE_EVERY)
        line = (
            f"{self.name}: range test  step {self.steps}/{self.num_steps}  rate {self.rates[-1]:.2e}  loss {loss:.3f}"
        )
        print(f"\r{line}" if self.terminal else line, end="" if self.terminal else "\n", file=self.stream, flush=True)

    def close(self) -> None:
        """Clear the line."""
        if self.terminal:
            print("\r\033[K", end="", file=self.stream, flush=True)
