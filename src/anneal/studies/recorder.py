"""What a study keeps of a run while it trains."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from anneal.training.history import History

if TYPE_CHECKING:
    from anneal.training.data import Batch
    from anneal.training.module import TrainingModule

MOST_POINTS = 60
"""Most points of a run's training curve."""


class Recorder(History):
    """Collect figures of each epoch, the training loss along the way, and the speed.

    Unlike a fit's own result it is there for a run that diverged, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[dict[str, float]] = []
        self.steps: list[tuple[int, float, float]] = []
        self.seconds = 0.0
        self.images = 0
        self._before: tuple[float, int] = (0.0, 0)
        self._started = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: TrainingModule, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]  # noqa: ARG002
        """Start the clock with an epoch's first microbatch."""
        if batch_idx == 0:
            self._before = (0.0, 0)
            self._started = time.perf_counter()

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: Any,
        pl_module: TrainingModule,
        outputs: Any,  # noqa: ARG002
        batch: Batch,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Take a point of the curve, and the time after an epoch's last microbatch."""
        plan = pl_module.plan[trainer.current_epoch]
        every = -(-pl_module.plan.total_steps // MOST_POINTS)
        ends = plan.ends_epoch(batch_idx)
        step_made = ends or (batch_idx + 1) % plan.accumulation == 0
        if step_made and (trainer.global_step == 1 or trainer.global_step % every == 0):
            loss, seen = float(pl_module.loss_sum), pl_module.num_seen
            if seen > self._before[1]:
                mean = (loss - self._before[0]) / (seen - self._before[1])
                self.steps.append((trainer.global_step, pl_module.rate, mean))
            self._before = (loss, seen)
        # The first epoch warms up; it counts where it is the only one.
        if ends and (trainer.current_epoch > 0 or len(pl_module.plan) == 1):
            self.seconds += time.perf_counter() - self._started
            self.images += plan.samples_per_epoch

    def on_validation_end(self, trainer: Any, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Keep the epoch's figures by their names in MLflow."""
        epoch = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        self.epochs.append({**epoch, **{name: float(value) for name, value in pl_module.figures.items()}})

    @property
    def images_per_second(self) -> float | None:
        """Images a second of training, loading included and validation not."""
        return self.images / self.seconds if self.seconds > 0 else None
