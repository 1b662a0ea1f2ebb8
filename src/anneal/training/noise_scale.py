"""The gradient noise scale of each epoch (McCandlish et al. 2018): how large a batch is large enough."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from anneal.batching import balanced_order
from anneal.models.build import key_randomness
from anneal.models.layers import KeyedRandom
from anneal.seeding import generator, seed_for
from anneal.training.module import frozen_statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anneal.training.data import MicrobatchDataset
    from anneal.training.module import TrainingModule

SHARE = 8
"""At most one in so many samples of the training split is measured, so that a small split stays quick."""

RECENT = 5
"""Epochs behind the critical batch size."""

Estimate = tuple[float, float]
"""Squared norm of the gradient of the whole split, and trace of the covariance of the gradients of its samples."""


def sample_sizes(num_samples: int, *, num_microbatches: int, microbatch: int) -> tuple[int, int]:
    """Return how many microbatches are measured, and of how many samples each; of nothing to measure (0, 0).

    The recipe's own numbers, but no more than an eighth of the training split, at least two samples a microbatch, and no
    sample twice.

    >>> sample_sizes(54_000, num_microbatches=8, microbatch=128), sample_sizes(1_280, num_microbatches=8, microbatch=32)
    ((8, 128), (8, 20))
    """
    size = max(2, min(microbatch, num_samples // SHARE // num_microbatches))
    number = min(num_microbatches, num_samples // size)
    return (number, size) if number >= 2 else (0, 0)


def estimate(
    mean_of_squares: float, square_of_mean: float, *, num_microbatches: int, size: int, num_samples: int
) -> Estimate:
    """Return unbiased estimates from microbatches that were drawn from a split without putting back.

    With g_1 ... g_n the mean gradients of n microbatches of b samples, g their mean and N the samples of the split::

        trace       = b n / (n - 1) (mean |g_i|^2 - |g|^2)
        gradient_sq = |g|^2 - trace (1 / (n b) - 1 / N)

    For N without end these are the estimators of McCandlish et al. 2018, appendix A.1, with B_small = b and
    B_big = n b; 1 / N is what drawing without putting back saves. The covariance has N - 1 below its sum.

    Parameters
    ----------
    mean_of_squares, square_of_mean
        mean |g_i|^2 and |g|^2.
    num_microbatches, size, num_samples
        n, at least 2; b; and N.

    Returns
    -------
    tuple
        gradient_sq, which may come out below 0 where noise drowns the gradient, and trace.

    Examples
    --------
    Two microbatches of one sample each, with the gradients 1 and 3, of a split of two:

    >>> estimate(5.0, 4.0, num_microbatches=2, size=1, num_samples=2)
    (4.0, 2.0)
    """
    trace = size * num_microbatches / (num_microbatches - 1) * (mean_of_squares - square_of_mean)
    return square_of_mean - trace * (1 / (num_microbatches * size) - 1 / num_samples), trace


def noise_scale(estimates: Sequence[Estimate]) -> float | None:
    """Return tr(Sigma) / |G|^2 in samples, each a mean over ``estimates``; None where there is no gradient left to see.

    A ratio of means and not a mean of ratios: the estimate of |G|^2 may come close to 0, and so far off that one epoch
    would outweigh all others.

    >>> noise_scale([(4.0, 2.0), (0.0, 6.0)]), noise_scale([(-1.0, 2.0)])
    (2.0, None)
    """
    gradient_sq = sum(square for square, _ in estimates)
    trace = sum(trace for _, trace in estimates)
    return trace / gradient_sq if gradient_sq > 0 and trace >= 0 else None


def gradient_squares(
    losses: Iterable[torch.Tensor], weights: Sequence[nn.Parameter], scale: float = 1.0
) -> tuple[float, float, int]:
    """Return mean |g_i|^2 and |g|^2 of the gradients of losses, and their number.

    Parameters
    ----------
    losses
        Scalars, one a microbatch, computed as they are asked for; ``.grad`` of the weights and hooks on it are left alone.
    weights
        What the losses are differentiated by.
    scale
        What the losses were multiplied by, to keep small 16-bit gradients from vanishing.
    """
    total: list[torch.Tensor] | None = None
    squares: list[torch.Tensor] = []
    for loss in losses:
        gradients = list(torch.autograd.grad(loss, list(weights), materialize_grads=True))
        squares.append(nn.utils.get_total_norm(gradients).square())
        if total is None:
            total = gradients
        else:
            torch._foreach_add_(total, gradients)
    assert total is not None
    number = len(squares)
    square_of_mean = nn.utils.get_total_norm(total).square() / number**2
    mean_of_squares, square = torch.stack([torch.stack(squares).mean(), square_of_mean]).tolist()
    return mean_of_squares / scale**2, square / scale**2, number


class NoiseScale(pl.Callback):
    """Measure the noise scale at the end of each epoch's training, on the same samples every time.

    Gradients of the loss that is trained on, without penalties, which have no noise, and without augmentation and mixing;
    dropout and stochastic depth draw the same in every epoch. Batch normalisation sees a microbatch, as in training. Under
    balanced sampling the samples are drawn as in an epoch, those of a small class perhaps more than once.
    Nothing of the training is touched: random states, running statistics, ``.grad``, modes and keys stay as they are.
    Every process computes the same, without a word between them.

    Parameters
    ----------
    train
        Training samples.
    num_microbatches, microbatch
        See `sample_sizes`.
    seed
        Of the sample and of dropout's draws.
    """

    def __init__(self, train: MicrobatchDataset, *, num_microbatches: int, microbatch: int, seed: int) -> None:
        self.train = train
        number, size = sample_sizes(len(train), num_microbatches=num_microbatches, microbatch=microbatch)
        if train.balanced:
            order = balanced_order(train.labels, seed_for(seed, "noise_scale"), 0)
        else:
            order = generator(seed, "noise_scale").permutation(len(train))
        self.index: np.ndarray = order[: number * size].reshape(number, size)
        self.seed = seed_for(seed, "noise_scale")
        self.estimates: list[Estimate] = []

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: pl.Trainer,
        pl_module: TrainingModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Measure after the epoch's last microbatch: what comes later is too late for the epoch's figures."""
        if not pl_module.plan[trainer.current_epoch].ends_epoch(batch_idx) or not len(self.index):
            return
        plugin = trainer.precision_plugin
        scaler = getattr(plugin, "scaler", None)
        found = self.measure(
            pl_module, context=plugin.forward_context, scale=float(scaler.get_scale()) if scaler is not None else 1.0
        )
        if not all(map(math.isfinite, found)):
            return
        self.estimates = [*self.estimates, found][-RECENT:]
        figures = {
            "noise_scale": noise_scale([found]),
            "noise_scale/gradient_sq": found[0],
            "noise_scale/trace": found[1],
            "noise_scale/critical_batch": noise_scale(self.estimates),
        }
        pl_module.extras.update({name: value for name, value in figures.items() if value is not None})

    def measure(
        self, module: TrainingModule, *, context: Callable[[], Any] | None = None, scale: float = 1.0
    ) -> Estimate:
        """Return this moment's estimate.

        Parameters
        ----------
        module
            In training mode; stays as it is.
        context
            Mixed precision, as a function that returns a context.
        scale
            See `gradient_squares`.
        """
        classifier = module.classifier

        def losses() -> Iterator[torch.Tensor]:
            for i, index in enumerate(self.index):
                key_randomness(classifier, self.seed, 0, i)
                images = torch.from_numpy(self.train.take(index)).to(module.device)
                labels = torch.from_numpy(self.train.labels[index]).to(module.device)
                with context() if context is not None else torch.enable_grad():
                    loss = module.summed_loss(classifier(images), labels)
                yield loss * (scale / len(index))

        with torch.enable_grad(), frozen_statistics(classifier), kept_keys(classifier), kept_buffers(classifier):
            mean_of_squares, square_of_mean, number = gradient_squares(losses(), module.weights, scale)
        return estimate(
            mean_of_squares,
            square_of_mean,
            num_microbatches=number,
            size=self.index.shape[1],
            num_samples=len(self.train),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the newest estimates."""
        return {"estimates": [list(pair) for pair in self.estimates]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.estimates = [(square, trace) for square, trace in state_dict["estimates"]]


@contextmanager
def kept_buffers(network: nn.Module) -> Iterator[None]:
    """Give buffers their values back at the end, whatever layer writes them in training."""
    kept = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


@contextmanager
def kept_keys(network: nn.Module) -> Iterator[None]:
    """Give random layers their keys back at the end."""
    keys = [(layer, layer.key) for layer in network.modules() if isinstance(layer, KeyedRandom)]
    try:
        yield
    finally:
        for layer, key in keys:
            layer.key = key
