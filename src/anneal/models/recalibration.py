"""Batch normalisation's running statistics anew: a plain mean over batches that all see the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from anneal.models.norms import SyncedBatchNorm
from anneal.seeding import generator
from anneal.store import Store


def tracking_norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norm layers of a network that keep running statistics of their input, by their paths.

    >>> list(tracking_norms(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.GroupNorm(1, 3))))
    ['1']
    """
    return {n: m for n, m in network.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}


def recalibrate(network: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Set running statistics to the plain mean over batches of the batches' own means and variances.

    While training, running statistics are a moving mean over steps whose weights were others. These are those of the
    weights as they are: of each channel the mean over the batches of its mean and of its unbiased variance (Ioffe & Szegedy
    2015, section 3.1; PreciseBN of Wu & Johnson 2021, section 3). All layers are done in one pass, in which each normalises by
    the statistics of the batch, as in training: so a deep layer sees what it saw there. Nothing is drawn at random
    (dropout and its like are off), nothing is said to other processes, and weights, modes and ``num_batches_tracked`` stay.

    Parameters
    ----------
    network
        Whose batch norm layers are meant; frozen ones and those without running statistics stay as they are.
    batches
        What the network takes, on its device: uint8 images (N, H, W, C) for a `anneal.models.build.Classifier`. Each counts
        the same, whatever its size; none leaves the statistics as they were.

    Examples
    --------
    >>> norm = nn.BatchNorm1d(1)
    >>> recalibrate(norm, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])])
    >>> norm.running_mean, norm.running_var
    (tensor([3.5000]), tensor([5.]))
    """
    layers = list(tracking_norms(network).values())
    if not layers:
        return
    with torch.no_grad(), _normalising_by_batch(network, layers):
        for number, batch in enumerate(batches):
            for layer in layers if number == 0 else ():
                layer.reset_running_stats()
                layer.momentum = None  # a plain mean over all that it sees, however often a pass calls it
            network(batch)


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


@contextmanager
def _normalising_by_batch(network: nn.Module, layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Evaluate, but with ``layers`` that normalise by the batch of this process; settings and counts come back at the end."""
    modes = [(module, module.training) for module in network.modules()]
    counts = [None if m.num_batches_tracked is None else m.num_batches_tracked.clone() for m in layers]
    momenta = [layer.momentum for layer in layers]
    together = [m for m in network.modules() if isinstance(m, SyncedBatchNorm) and m.together]
    try:
        network.eval()
        for layer in layers:
            layer.train()
        for layer in together:
            layer.together = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer in together:
            layer.together = True
        for layer, momentum, count in zip(layers, momenta, counts, strict=True):
            layer.momentum = momentum
            if layer.num_batches_tracked is not None and count is not None:
                layer.num_batches_tracked.copy_(count)
