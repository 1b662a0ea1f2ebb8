"""The schedule in MLflow, drawn before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl

from anneal.schedules import Course, course_panels
from anneal.training.module import TrainingModule, has_momentum

Draw = Callable[[str, Sequence[Mapping[str, Any]]], None]
"""Called with the name of a picture and its panels as plain values."""


class ScheduleCurve(pl.Callback):
    """Draw what the rate (and the momentum, where it cycles) will be at each step, as ``schedule.png``.

    Parameters
    ----------
    draw
        Such as `anneal.tracking.Run.picture`.
    """

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def on_train_start(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Draw, in the first process alone."""
        if trainer.is_global_zero:
            course = Course(pl_module.schedule_arguments, pl_module.peak_rate, pl_module.plan.epoch_steps)
            rate, *momentum = course_panels({"": course})
            cycles = any(has_momentum(group) for optimizer in trainer.optimizers for group in optimizer.param_groups)
            self.draw("schedule.png", [rate, *momentum] if cycles else [rate])
