"""Training images as they are stored, evaluated beside the validation split: curves that compare like with like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from anneal.seeding import generator
from anneal.training.data import EVAL_BYTES

if TYPE_CHECKING:
    from anneal.models.config import ModelConfig
    from anneal.store import Split
    from anneal.training.config import LossConfig, RegularizationConfig
    from anneal.training.module import TrainingModule

BATCH = 256
"""Most images of a forward pass: small, so that several processes have something to share."""


def images_to_evaluate(most: int, *, num_train: int, num_val: int) -> int:
    """Return how many training images are evaluated: ``most``, but no more than either split has.

    As many as the validation split has are about as precise as it is, and cost as much as it does.

    >>> images_to_evaluate(2000, num_train=54_000, num_val=6_000), images_to_evaluate(2000, num_train=1_280, num_val=144)
    (2000, 144)
    """
    return min(most, num_train, num_val)


def stratified_sample(labels: npt.NDArray[np.int64], size: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the indices of a sample in which each class has its share, to within one image, in rising order.

    Each class is shuffled and its images are spread evenly over 0..1; the sample is the ``size`` lowest. So a smaller
    sample is part of a larger one.

    Parameters
    ----------
    labels
        int64 (N,).
    size
        At most N.
    seed
        Of the draw, which is keyed by (seed, "train_eval").

    Examples
    --------
    >>> labels = np.repeat([0, 1, 2], [60, 30, 10])
    >>> np.bincount(labels[stratified_sample(labels, 20, seed=0)]).tolist()
    [12, 6, 2]
    """
    order = generator(seed, "train_eval").permutation(len(labels))
    counts = np.bincount(labels)
    place = np.empty(len(labels))
    for label in np.flatnonzero(counts):
        own = order[labels[order] == label]
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
    # Ties, between classes of one size, go by the shuffled order.
    lowest = order[np.argsort(place[order], kind="stable")[:size]]
    return np.sort(lowest)


def measured_on(
    *,
    transforms: Sequence[str],
    model: ModelConfig,
    regularization: RegularizationConfig,
    loss: LossConfig,
    sampling: str,
    images: int,
) -> str:
    """Say what a run's training and validation figures are measured on, in one line.

    Parameters
    ----------
    transforms
        Names of the policy's transforms.
    model, regularization, loss
        Sections of the member.
    sampling
        ``batch.sampling``.
    images
        Number of training images that are evaluated as they are stored; 0: none.
    """
    mixes = [name for name in ("mixup", "cutmix") if (mix := getattr(regularization, name)).alpha and mix.probability]
    rates = ("label_smoothing", "dropout", "spatial_dropout", "stochastic_depth", "input_noise")
    values = {key: getattr(regularization, key) for key in rates}
    values["block_dropout"] = model.arguments.get("block_dropout") if model.name == "wide_resnet" else None
    train = [
        f"augmented ({', '.join(transforms)})" if transforms else "as stored",
        *([f"mixed ({', '.join(mixes)})"] if mixes else []),
        *(f"{key.replace('_', ' ')} {value:g}" for key, value in values.items() if value),
        *([loss.name.replace("_", " ")] if loss.name != "cross_entropy" else []),
        *([f"class weights {loss.class_weights}"] if loss.class_weights != "none" else []),
        *([f"{sampling} classes"] if sampling != "shuffle" else []),
        "weights still changing",
    ]
    plain = "as stored, plain cross entropy, weights at the epoch's end"
    parts = [f"train/*: {', '.join(train)}"]
    if images:
        parts.append(f"train_eval/*: {images} training images {plain}")
    return " | ".join([*parts, f"val/*: {plain}"])


class TrainEvaluation(pl.Callback):
    """Measure plain cross entropy and accuracy of the same training images after each epoch, as validation measures its own.

    As they are stored, in evaluation mode, by the weights that have just been validated. Nothing is drawn in an epoch, and
    nothing of the training is touched. Processes share the batches; each sums a batch alike, so the figures do not depend
    on their number.

    Parameters
    ----------
    split
        Training images, without augmented copies.
    size
        How many of them, at least 1.
    seed
        Of the sample.
    """

    def __init__(self, split: Split, *, size: int, seed: int) -> None:
        self.split = split
        self.index = stratified_sample(np.asarray(split.labels), size, seed)
        height, width, channels = split.shards[0].shape[1:]
        batch = max(1, min(BATCH, EVAL_BYTES // (height * width * channels * 4)))
        self.batches = np.split(self.index, range(batch, size, batch))

    # The module's own hook of this name, which gathers the epoch's figures, comes after those of all callbacks.
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Add ``train_eval/loss`` and ``train_eval/accuracy`` to the epoch's figures."""
        with trainer.precision_plugin.forward_context():
            sums = self.sums(pl_module.classifier, pl_module.val_loss, trainer.global_rank, trainer.world_size)
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        loss, correct = (sums / len(self.index)).tolist()
        pl_module.extras.update({"train_eval/loss": loss, "train_eval/accuracy": correct})

    def sums(self, classifier: nn.Module, like: torch.Tensor, rank: int = 0, world_size: int = 1) -> torch.Tensor:
        """Return the sum of the cross entropy and the number of right answers of the batches of one process, shape (2,).

        Parameters
        ----------
        classifier
            In evaluation mode.
        like
            Whose type and device the sums have.
        rank, world_size
            Process, and number of processes.
        """
        sums = like.new_zeros(2)
        for index in self.batches[rank::world_size]:
            labels = torch.from_numpy(self.split.labels[index]).to(like.device)
            logits = classifier(torch.from_numpy(self.split.take(index)).to(like.device)).float()
            sums[0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1] += (logits.argmax(1) == labels).sum()
        return sums
