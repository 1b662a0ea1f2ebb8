"""A mean of the weights along the run, evaluated beside the newest weights after each epoch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from anneal.models.build import Classifier
from anneal.models.recalibration import recalibrate
from anneal.schedules import averaged_steps
from anneal.training.best import Kept, rank

if TYPE_CHECKING:
    from anneal.training.data import Batch
    from anneal.training.module import TrainingModule

Tensors = list[torch.Tensor]


def ema_decay(number: int, *, decay: float, warmup: bool) -> float:
    """Return the decay for the ``number``-th weights that an exponential moving average takes in, from 1.

    With ``warmup`` it is ``min(decay, (1 + t) / (10 + t))``, so that the mean of a run's beginning is not that of its
    first weights: it reaches back over about a tenth of the steps made so far, until ``decay`` is less.

    >>> [round(ema_decay(t, decay=0.9, warmup=True), 3) for t in (1, 2, 10, 80, 81)]
    [0.182, 0.25, 0.55, 0.9, 0.9]
    """
    return min(decay, (1 + number) / (10 + number)) if warmup else decay


def _ema(mean: Tensors, newest: Tensors, number: int, *, decay: float, warmup: bool) -> None:
    get_ema_multi_avg_fn(ema_decay(number, decay=decay, warmup=warmup))(mean, newest, number - 1)


def _plain(mean: Tensors, newest: Tensors, number: int, **_: Any) -> None:
    # mean + (newest - mean) / number; torch's own type for the number is a tensor, which a GPU would have to read back.
    get_swa_multi_avg_fn()(mean, newest, number - 1)


AVERAGES: dict[str, Callable[..., None]] = {"ema": _ema, "swa": _plain, "polyak": _plain}
"""``averaging.name`` to what takes the ``number``-th weights, from the second on, into the mean, in place."""


class Averaging(pl.Callback):
    """Average the weights, and measure the average on the validation split beside the newest weights.

    The average is a second network; the one in training is never touched. All floating-point parameters are averaged.
    Buffers are not: they are the newest, and batch normalisation's running statistics, which belong to other weights,
    are recalibrated before each evaluation. What is measured is what is exported. Every process computes the same average
    of the same weights, without a word between them.

    Parameters
    ----------
    name, arguments
        Of the section ``averaging``: a key of `AVERAGES`, and its block.
    epoch_steps
        Optimizer steps of each epoch.
    restore_best
        See `anneal.training.best.Kept`.
    calibration
        Returns the images that batch normalisation is recalibrated on, uint8 batches (N, H, W, C); None leaves it the
        running statistics of the newest weights.
    """

    def __init__(
        self,
        name: str,
        arguments: dict[str, Any],
        *,
        epoch_steps: Sequence[int],
        restore_best: bool = True,
        calibration: Callable[[], Iterable[torch.Tensor]] | None = None,
    ) -> None:
        self.name = name
        self.arguments = arguments
        self.steps = averaged_steps(name, arguments, epoch_steps)
        self.calibration = calibration
        self.kept = Kept(restore_best)
        self.number = 0
        self.step = -1
        self.average: Classifier
        self.mean: Tensors = []
        self.newest: Tensors = []

    def setup(self, trainer: pl.Trainer, pl_module: TrainingModule, stage: str) -> None:  # type: ignore[override]  # noqa: ARG002
        """Make room for the average, before a checkpoint is read."""
        self.average = copy.deepcopy(pl_module.classifier).requires_grad_(False).eval()

    def on_train_start(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Find the tensors on the device that the run is on."""
        self.average.to(pl_module.device)
        pairs = zip(self.average.parameters(), pl_module.classifier.parameters(), strict=True)
        floating = [(mean, newest.detach()) for mean, newest in pairs if newest.is_floating_point()]
        self.mean, self.newest = [mean for mean, _ in floating], [newest for _, newest in floating]
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: TrainingModule, *_: Any) -> None:  # type: ignore[override]
        """Take the weights in, if this microbatch ended a step that counts and was not skipped."""
        step, before = trainer.global_step, self.step
        self.step = step
        if step != before and step in self.steps and not pl_module.skipped:
            self.take()

    @torch.no_grad()
    def take(self) -> None:
        """Take the newest weights into the average."""
        self.number += 1
        if self.number == 1:
            torch._foreach_copy_(self.mean, self.newest)
        else:
            AVERAGES[self.name](self.mean, self.newest, self.number, **self.arguments)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Give the average its buffers, and start the sums."""
        if not self.number:
            return
        with torch.no_grad():
            for buffer, newest in zip(self.average.buffers(), pl_module.classifier.buffers(), strict=True):
                buffer.copy_(newest)
        for mine, its in zip(self.average.modules(), pl_module.classifier.modules(), strict=True):
            if isinstance(mine, _BatchNorm):  # statistics of layers that are frozen are not recalibrated
                mine.track_running_stats = bool(its.track_running_stats)
        if self.calibration is not None:
            with trainer.precision_plugin.forward_context():
                recalibrate(self.average, (images.to(pl_module.device) for images in self.calibration()))
        self.loss = torch.zeros_like(pl_module.loss_sum)
        self.correct = torch.zeros_like(pl_module.correct)
        self.seen = 0

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: pl.Trainer,
        pl_module: TrainingModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Batch,
        *_: Any,
    ) -> None:
        """Add up plain cross entropy and right answers of the average on the batch that the newest weights just had."""
        if not self.number:
            return
        with trainer.precision_plugin.forward_context():
            logits = self.average(batch.images).float()
        self.loss += F.cross_entropy(logits, batch.labels, reduction="sum")
        self.correct += (logits.argmax(1) == batch.labels).sum()
        self.seen += len(batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Add the figures to the epoch's, and keep the average if it is the best so far."""
        if not self.number:
            return
        loss = float(self.loss) / self.seen
        figures = {"val_average/loss": loss, "val_average/accuracy": float(self.correct) / self.seen}
        pl_module.extras.update(figures)
        if math.isfinite(loss):
            self.kept.offer(rank(figures, "val_average"), trainer, self.average)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: plain numbers and tensors."""
        return {"number": self.number, "average": self.average.state_dict(), "kept": self.kept.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.number = state_dict["number"]
        self.average.load_state_dict(state_dict["average"])
        self.kept.load_state_dict(state_dict["kept"])
