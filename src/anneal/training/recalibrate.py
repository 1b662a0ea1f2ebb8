"""Which images running statistics are estimated on anew, and the callback that does so before each validation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from anneal.models.recalibration import recalibrate
from anneal.seeding import generator
from anneal.store import Store

if TYPE_CHECKING:
    from anneal.training.module import TrainingModule


def recalibration_batches(store: Store, seed: int, images: int, microbatch: int) -> Iterator[torch.Tensor]:
    """Yield training images as they are stored, without augmentation: the same in every epoch and on every device.

    Parameters
    ----------
    store
        The processed data set.
    seed
        Of the recipe or the member; which images are drawn depends on it alone.
    images
        How many are wanted: rounded down to whole batches, at least one, and no more than the training split has.
    microbatch
        Images of a batch: what batch normalisation sees in training. A split that has fewer is one batch.

    Yields
    ------
    torch.Tensor
        uint8 (microbatch, H, W, C).
    """
    split = store.split("train")
    size = min(microbatch, len(split))
    number = max(1, min(images, len(split)) // size)
    index = generator(seed, "recalibrate").permutation(len(split))[: number * size]
    for rows in index.reshape(number, size):
        yield torch.from_numpy(split.take(rows))


class Recalibration(pl.Callback):
    """Recalibrate batch normalisation before each validation, so that what is validated is what is exported.

    Training is as without: running statistics have no part in it. Every process computes the same, without a word between
    them.

    Parameters
    ----------
    store, seed, images, microbatch
        See `recalibration_batches`.
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
