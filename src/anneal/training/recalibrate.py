"""The callback that recalibrates batch normalisation before each validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from anneal.models.recalibration import recalibrate, recalibration_batches
from anneal.store import Store

if TYPE_CHECKING:
    from anneal.training.module import TrainingModule


class Recalibration(pl.Callback):
    """Recalibrate batch normalisation before each validation, so that what is validated is what is exported.

    Training is as without: running statistics have no part in it. Every process computes the same, without a word between
    them.

    Parameters
    ----------
    store, seed, images, microbatch
        See `anneal.models.recalibration.recalibration_batches`.
    """

    def __init__(self, store: Store, *, seed: int, images: int, microbatch: int) -> None:
        self.store = store
        self.seed = seed
        self.images = images
        self.microbatch = microbatch

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: pl.Trainer,
        pl_module: TrainingModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Replace the running statistics after the epoch's last microbatch, so that whatever is measured then sees them."""
        if not pl_module.plan[trainer.current_epoch].ends_epoch(batch_idx):
            return
        batches = recalibration_batches(self.store, self.seed, self.images, self.microbatch)
        with trainer.precision_plugin.forward_context():
            recalibrate(pl_module.classifier, (images.to(pl_module.device) for images in batches))
