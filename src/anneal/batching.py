"""Effective batch, microbatches and accumulation; which randomness belongs to which microbatch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from anneal.params import ParamsError, Strict
from anneal.seeding import generator

Key = tuple[int, int]
"""(epoch, microbatch): what all randomness of a microbatch is drawn from, whichever process computes it."""


GrowthPoint = Annotated[
    Annotated[float, Field(gt=0, lt=1)] | Annotated[str, Field(pattern=r"^[1-9][0-9]* epochs?$")],
    Field(json_schema_extra={"allowed": "a fraction of the run between 0 and 1 | N epochs, N whole"}),
]
"""Where the batch grows: always at the start of an epoch, never of the first."""


class GrowthConfig(Strict):
    """``batch.growth``: multiply the batch by ``factor`` at each point of ``at`` (Smith et al. 2018); an empty list is off."""

    at: list[GrowthPoint]
    factor: Annotated[int, Field(ge=2)]


class BatchConfig(Strict):
    """Section ``batch``: samples an optimizer step (``size``) and a forward pass (``microbatch``)."""

    size: Annotated[int, Field(ge=1)]
    microbatch: Annotated[int, Field(ge=1)]
    lr_scaling: Literal["none", "linear", "sqrt"]
    reference_size: Annotated[int, Field(ge=1)]
    growth: GrowthConfig
    sampling: Literal["shuffle", "balanced"]
    noise_microbatches: Annotated[int, Field(ge=8)] | Annotated[Literal[0], Field(json_schema_extra={"allowed": "0"})]

    @model_validator(mode="after")
    def _whole_accumulation(self) -> BatchConfig:
        if self.size % self.microbatch:
            (best,) = _nearest(_divisors(self.size), self.microbatch)
            raise ValueError(
                f"microbatch: found {self.microbatch}, which does not divide size {self.size}, "
                f"allowed: a divisor of size, nearest {best}"
            )
        return self


@dataclass(frozen=True)
class BatchPlan:
    """How an epoch falls into windows (the samples of one optimizer step) and windows into microbatches.

    All microbatches of an epoch are numbered from 0, over all devices. The last window holds what is left; it is cut
    into microbatches of nearly equal size, so that none of them is too small for BatchNorm. A last window of a single
    sample is left out: its gradient is noise, and BatchNorm needs two.

    Parameters
    ----------
    size
        Samples of a whole window.
    microbatch
        Samples of a whole microbatch; divides ``size``.
    world_size
        Processes that share a window.
    num_samples
        Samples of the training split.
    accumulation
        Microbatches that each process computes for one optimizer step.
    steps_per_epoch
        Optimizer steps of an epoch.
    microbatches_per_epoch
        Microbatches of an epoch, over all processes.
    rounds_per_epoch
        Forward passes that each process makes in an epoch.
    """

    size: int
    microbatch: int
    world_size: int
    num_samples: int
    accumulation: int
    steps_per_epoch: int
    microbatches_per_epoch: int
    rounds_per_epoch: int

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch trains on."""
        last = self.steps_per_epoch - 1
        return last * self.size + self.window_samples(last)

    def window_of(self, microbatch: int) -> int:
        """Return the optimizer step of the epoch, from 0, that a microbatch belongs to."""
        return min(microbatch // (self.size // self.microbatch), self.steps_per_epoch - 1)

    def ends_epoch(self, number: int) -> bool:
        """Return whether a process's forward pass of the epoch, from 0, is its last."""
        return number + 1 >= self.rounds_per_epoch

    def window_samples(self, window: int) -> int:
        """Return the number of samples of a window."""
        return min(self.size, self.num_samples - window * self.size)

    def bounds(self, window: int) -> list[tuple[int, int]]:
        """Return where each microbatch of a window starts and ends in the epoch's order."""
        samples = self.window_samples(window)
        parts = _parts(samples, self.microbatch)
        edges = [window * self.size + samples * i // parts for i in range(parts + 1)]
        return list(itertools.pairwise(edges))


def _parts(samples: int, microbatch: int) -> int:
    """Return into how many microbatches a window is cut: no more than leave each two samples, where whole ones do."""
    parts = -(-samples // microbatch)
    return min(parts, max(1, samples // 2)) if microbatch > 1 else parts


def plan(*, size: int, microbatch: int, devices: int, num_nodes: int, num_samples: int) -> BatchPlan:
    """Work out accumulation and the lengths of an epoch.

    Parameters
    ----------
    size, microbatch
        Samples of an optimizer step and of a forward pass.
    devices, num_nodes
        Processes on each node, and nodes.
    num_samples
        Samples of the training split.

    Raises
    ------
    ParamsError
        The training split is smaller than a batch, or the batch does not divide over microbatches and devices.

    Examples
    --------
    >>> p = plan(size=64, microbatch=16, devices=2, num_nodes=1, num_samples=200)
    >>> p.accumulation, p.steps_per_epoch, p.microbatches_per_epoch, p.rounds_per_epoch
    (2, 4, 13, 7)
    """
    if size > num_samples:
        raise ParamsError(
            [
                f"batch.size: found {size}, but the training split has {num_samples} images; allowed: at most {num_samples}"
            ]
        )
    world_size = devices * num_nodes
    if size % (microbatch * world_size):
        raise ParamsError([_indivisible(size, microbatch, devices, num_nodes, num_samples)])
    per_window = size // microbatch
    windows, rest = divmod(num_samples, size)
    if rest == 1:
        rest = 0
    last = _parts(rest, microbatch)
    return BatchPlan(
        size=size,
        microbatch=microbatch,
        world_size=world_size,
        num_samples=num_samples,
        accumulation=per_window // world_size,
        steps_per_epoch=windows + bool(rest),
        microbatches_per_epoch=windows * per_window + last,
        rounds_per_epoch=windows * per_window // world_size + -(-last // world_size),
    )


def _indivisible(size: int, microbatch: int, devices: int, num_nodes: int, num_samples: int) -> str:
    """Say which value of which key, nearest to what was found, would make the accumulation whole."""
    together = microbatch * devices * num_nodes
    sizes = [n for n in (size // together * together, -(-size // together) * together) if 0 < n <= num_samples]
    parts = [m for m in _divisors(size) if size % (m * devices * num_nodes) == 0]
    counts = [n for n in _divisors(size) if size % (microbatch * n * num_nodes) == 0]
    choices = {
        "batch.size": sizes,
        "batch.microbatch": _nearest(parts, microbatch),
        "hardware.devices": _nearest(counts, devices),
    }
    text = "; ".join(f"{key} {' or '.join(map(str, values))}" for key, values in choices.items() if values)
    return (
        f"batch.size: found {size}, which batch.microbatch {microbatch} x {devices} devices x {num_nodes} nodes = "
        f"{together} does not divide; nearest valid: {text or 'fewer hardware.num_nodes'}"
    )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _nearest(values: list[int], target: int) -> list[int]:
    return sorted(values, key=lambda value: (abs(value - target), -value))[:1]


@dataclass(frozen=True)
class RunPlan:
    """The plans of all epochs of a run; they differ where the batch grows.

    Parameters
    ----------
    epochs
        One plan an epoch, at least one.
    """

    epochs: tuple[BatchPlan, ...]

    def __getitem__(self, epoch: int) -> BatchPlan:
        """Return the plan of an epoch, counted from 0; past the end that of the last."""
        return self.epochs[min(epoch, len(self.epochs) - 1)]

    def __len__(self) -> int:
        return len(self.epochs)

    @property
    def grows(self) -> bool:
        """Whether the batch has several sizes in the run."""
        return self.epochs[0] != self.epochs[-1]

    @property
    def world_size(self) -> int:
        """Processes that share a window."""
        return self.epochs[0].world_size

    @property
    def epoch_steps(self) -> list[int]:
        """Optimizer steps of each epoch."""
        return [plan.steps_per_epoch for plan in self.epochs]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return sum(self.epoch_steps)


def plan_run(
    *,
    size: int,
    microbatch: int,
    devices: int,
    num_nodes: int,
    num_samples: int,
    epochs: int,
    growth_at: Sequence[float | str] = (),
    growth_factor: int = 2,
) -> RunPlan:
    """Work out the plans of all epochs.

    Parameters
    ----------
    size, microbatch, devices, num_nodes, num_samples
        As for `plan`; ``size`` is that of the first epoch.
    epochs
        Of the run.
    growth_at
        Points of the run from which on ``size`` is multiplied by ``growth_factor`` (once more at each): fractions of
        ``epochs`` rounded to whole epochs, at least one, or ``"5 epochs"``.
    growth_factor
        At least 2.

    Raises
    ------
    ParamsError
        As for `plan`; or a batch grows beyond the training split, or after the end of the run.

    Examples
    --------
    >>> run = plan_run(size=8, microbatch=8, devices=1, num_nodes=1, num_samples=32, epochs=4, growth_at=[0.5])
    >>> run.epoch_steps, run[3].accumulation
    ([4, 4, 2, 2], 2)
    """
    starts = [_whole_epochs(point, epochs) for point in growth_at]
    plans: dict[int, BatchPlan] = {}
    for grown in sorted({sum(start <= epoch for start in starts) for epoch in range(epochs)}):
        try:
            plans[grown] = plan(
                size=size * growth_factor**grown,
                microbatch=microbatch,
                devices=devices,
                num_nodes=num_nodes,
                num_samples=num_samples,
            )
        except ParamsError:
            if not grown:
                raise
            most = max(n for n in range(grown) if size * growth_factor**n <= num_samples)
            raise ParamsError(
                [
                    f"batch.growth.at: found {len(growth_at)} points, which by factor {growth_factor} make batch.size {size} "
                    f"into {size * growth_factor**grown}, but the training split has {num_samples} images; allowed: "
                    f"at most {most} points"
                ]
            ) from None
    return RunPlan(tuple(plans[sum(start <= epoch for start in starts)] for epoch in range(epochs)))


def _whole_epochs(point: float | str, epochs: int) -> int:
    """Return the epoch, from 0, at whose start the batch grows; a fraction is rounded (halves up), but neither to the first nor past the last."""
    if not isinstance(point, str):
        return max(1, min(epochs - 1, math.floor(point * epochs + 0.5)))
    start = int(point.split()[0])
    if start >= epochs > 1:
        raise ParamsError(
            [
                f"batch.growth.at: found {point!r}, but the run ends after {epochs} epochs; allowed: at most "
                f"{epochs - 1} epochs, or a fraction of the run such as 0.5"
            ]
        )
    return start


def devices_that_divide(available: int, *, size: int, microbatch: int, num_nodes: int = 1) -> int:
    """Return the largest number of devices, at most ``available``, over which a batch divides; at least 1.

    >>> devices_that_divide(4, size=96, microbatch=32)
    3
    """
    return max((n for n in range(1, available + 1) if size % (microbatch * n * num_nodes) == 0), default=1)


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the samples in an epoch: a permutation, int64 (num_samples,), of (seed, "order", epoch)."""
    return generator(seed, "order", epoch).permutation(num_samples)


def balanced_order(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return the samples of an epoch in which each class comes up as often, int64 (len(labels),).

    Each class goes through its samples in one random order after another, from epoch to epoch: none comes up again before
    all of its class have. Where the classes do not divide the epoch, some come up once more, in turns, so that over the
    run they stay within one of each other. The orders are drawn from (seed, "balanced", class, round), and where the
    samples stand in the epoch is that of `epoch_order`.

    Parameters
    ----------
    labels
        Of all training samples, int64 (N,), N >= 1. A class without samples has no part.
    seed, epoch
        Key of the draws; all that an epoch needs, so one can begin anywhere.

    Examples
    --------
    >>> labels = np.array([0, 0, 0, 0, 0, 1])
    >>> np.bincount(labels[balanced_order(labels, seed=0, epoch=0)])
    array([3, 3])
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    # The n-th sample of the run is of class n modulo their number.
    first, last = epoch * len(labels), (epoch + 1) * len(labels)
    drawn = []
    for i, own in enumerate(members):
        start, stop = (-((i - place) // len(members)) for place in (first, last))
        rounds = range(start // len(own), -(-stop // len(own)))
        label = int(labels[own[0]])
        orders = [own[generator(seed, "balanced", label, number).permutation(len(own))] for number in rounds]
        skipped = rounds.start * len(own)
        drawn.append(np.concatenate([own[:0], *orders])[start - skipped : stop - skipped])
    return np.concatenate(drawn)[epoch_order(len(labels), seed, epoch)]


def most_repeats(labels: np.ndarray) -> float:
    """Return how often an epoch of `balanced_order` has each sample of the smallest class, on average.

    >>> most_repeats(np.array([0, 0, 0, 0, 0, 1]))
    3.0
    """
    _, counts = np.unique(labels, return_counts=True)
    return float(len(labels) / (len(counts) * counts.min()))


class MicrobatchSampler:
    """The batch sampler of one process: yields ``[(epoch, microbatch), index, index, ...]`` for each forward pass.

    In each round of a window process ``rank`` of ``world_size`` takes the ``rank``-th microbatch, so the samples of a
    window do not depend on the number of processes. Where the last window has fewer microbatches than a round has
    processes, those left over get its first microbatch again under a number past the epoch's last: it weighs nothing in
    the gradient, but keeps all processes in step.

    Parameters
    ----------
    run
        The plans of all epochs.
    seed
        Of the order, which is new in every epoch.
    rank
        Of this process, below the plans' ``world_size``.
    labels
        Of the training samples, for the order of `balanced_order`; None takes that of `epoch_order`, each sample once.
    start
        An epoch, and forward passes of this process that it leaves out at that epoch's beginning: a resumed run has made
        them.
    """

    def __init__(
        self,
        run: RunPlan,
        seed: int,
        rank: int = 0,
        labels: np.ndarray | None = None,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.run = run
        self.seed = seed
        self.rank = rank
        self.labels = labels
        self.start = start
        self.epoch = 0

    @property
    def sampler(self) -> MicrobatchSampler:
        """Itself: Lightning tells the epoch to ``batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.run[self.epoch].rounds_per_epoch

    def __iter__(self) -> Iterator[list[Key | int]]:
        epoch, plan = self.epoch, self.run[self.epoch]
        if self.labels is None:
            order = epoch_order(plan.num_samples, self.seed, epoch)
        else:
            order = balanced_order(self.labels, self.seed, epoch)
        per_window = plan.size // plan.microbatch
        made = self.start[1] if epoch == self.start[0] else 0
        # Those made are whole windows.
        for window in range(made // plan.accumulation, plan.steps_per_epoch):
            bounds = plan.bounds(window)
            for first in range(0, len(bounds), plan.world_size):
                i = first + self.rank
                start, stop = bounds[i] if i < len(bounds) else bounds[0]
                yield [(epoch, window * per_window + i), *order[start:stop].tolist()]
