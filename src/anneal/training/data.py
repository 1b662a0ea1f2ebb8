"""The processed data set as Lightning's data module: uint8 batches straight from the memory map, augmented by key."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from anneal.augment import apply_policy, policy_from_json, seed_policy, transform_names
from anneal.batching import MicrobatchSampler, RunPlan
from anneal.params import UserError
from anneal.processes import end_with_parent
from anneal.store import Images, Labels, Split, Store, open_store
from anneal.training.interruption import GRACE, SIGNALS

EVAL_BYTES = 32 * 2**20
"""Most float32 input bytes of a validation batch; a figure's value does not depend on it beyond rounding."""

WORKER_PAYS = 100e-6
"""Seconds a sample, from which on loader processes win over loading in the trainer itself."""


class Batch:
    """One microbatch.

    Parameters
    ----------
    images
        uint8 (N, H, W, C).
    labels
        int64 (N,).
    epoch, microbatch
        Its key.
    """

    __slots__ = ("epoch", "images", "labels", "microbatch")

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, epoch: int, microbatch: int) -> None:
        self.images = images
        self.labels = labels
        self.epoch = epoch
        self.microbatch = microbatch

    def __len__(self) -> int:
        return len(self.labels)

    # A class with `to` and `pin_memory` is moved by one call; a tuple is searched for tensors at every step.
    def to(self, device: torch.device, **options: Any) -> Batch:
        """Return the batch on another device."""
        if self.images.device == device:
            return self
        return Batch(self.images.to(device, **options), self.labels.to(device, **options), self.epoch, self.microbatch)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.epoch, self.microbatch)


class MicrobatchDataset(Dataset[Batch]):
    """Training samples by whole microbatches: the real ones, and behind them the augmented copies.

    Parameters
    ----------
    splits
        The parts, numbered through.
    policy
        Compiled augmentation, or None.
    seed
        Of the augmentation, which is drawn from (seed, "augment", epoch, microbatch) in whichever process fetches.
    sampling
        ``shuffle``: an epoch has each sample once; ``balanced``: each class as often.
    """

    def __init__(self, splits: list[Split], policy: Any, seed: int, sampling: str = "shuffle") -> None:
        self.splits = splits
        self.policy = policy
        self.seed = seed
        self.balanced = sampling == "balanced"
        self.labels: Labels = np.concatenate([split.labels for split in splits])
        self.first = len(splits[0])

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Images:
        """Return images uint8 (N, H, W, C) at ``index``, as they are stored."""
        if len(self.splits) == 1 or index.max() < self.first:
            return self.splits[0].take(index)
        images = np.empty((len(index), *self.splits[0].shards[0].shape[1:]), np.uint8)
        extra = index >= self.first
        images[~extra] = self.splits[0].take(index[~extra])
        images[extra] = self.splits[1].take(index[extra] - self.first)
        return images

    def __getitems__(self, keyed: list[Any]) -> Batch:
        """Return one microbatch for ``[(epoch, microbatch), index, ...]``."""
        (epoch, microbatch), *rest = keyed
        index = np.array(rest, np.int64)
        images = self.take(index)
        if self.policy is not None:
            seed_policy(self.policy, self.seed, epoch, microbatch)
            images = apply_policy(self.policy, images)
        return Batch(torch.from_numpy(images), torch.from_numpy(self.labels[index]), epoch, microbatch)


class EvaluationDataset(Dataset[Batch]):
    """A split in its own order, cut into batches; item ``i`` is a whole batch."""

    def __init__(self, split: Split, batch_size: int) -> None:
        self.split = split
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __getitem__(self, i: int) -> Batch:
        index = np.arange(i * self.batch_size, min((i + 1) * self.batch_size, len(self.split)))
        return Batch(torch.from_numpy(self.split.take(index)), torch.from_numpy(self.split.labels[index]), 0, i)


class StoreDataModule(pl.LightningDataModule):
    """Training microbatches and validation batches of a store.

    Parameters
    ----------
    store
        The processed data set.
    train
        What `training_set` returns.
    plan
        How each epoch falls into microbatches.
    seed
        Of the order.
    num_workers
        Loader processes; ``auto``: those that pay on this machine. The batches do not depend on it.
    """

    def __init__(
        self, store: Store, train: MicrobatchDataset, plan: RunPlan, seed: int, num_workers: int | str = "auto"
    ) -> None:
        super().__init__()
        self.store = store
        self.train = train
        self.plan = plan
        self.seed = seed
        self.num_workers = num_workers
        self.position = (0, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return where the run is: its epoch, from 0, and the forward passes of it that each process has made."""
        return {"position": list(self.position)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin where another run was."""
        epoch, number = state_dict["position"]
        self.position = (epoch, number)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of this process's microbatches."""
        assert self.trainer is not None
        labels = self.train.labels if self.train.balanced else None
        sampler = MicrobatchSampler(self.plan, self.seed, self.trainer.global_rank, labels, start=self.position)
        # Lightning asks for the loader of a resumed run before it has set its own count.
        sampler.set_epoch(max(self.position[0], self.trainer.current_epoch))
        workers = self.num_workers
        if isinstance(workers, str):
            workers = workers_that_pay(self.train, self.plan[0].microbatch, max(1, self.trainer.num_devices))
        options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
        return DataLoader(
            self.train,
            batch_sampler=sampler,
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=_serve_to_the_end,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            **options,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of the validation split; every process runs over all of it, so all decide alike."""
        info = self.store.info
        per_image = info.height * info.width * info.channels * 4
        size = max(1, min(1024, EVAL_BYTES // per_image))
        data = EvaluationDataset(self.store.split("val"), size)
        return DataLoader(data, batch_size=None, num_workers=0)


def _serve_to_the_end(worker: int) -> None:  # noqa: ARG001
    """Have a loader process end with its trainer, and not before: the trainer still finishes its step after a signal.

    Ctrl-C, and the signals of many schedulers, reach all processes at once.
    """
    end_with_parent(signal.SIGKILL)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        # Ignored for good it would keep a trainer waiting that ends its loaders by it.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, _leave_later)


def _leave_later(signum: int, frame: Any) -> None:  # noqa: ARG001
    signal.signal(signum, signal.SIG_DFL)
    signal.alarm(round(GRACE) + 2)


def _as_it_is(batch: Any) -> Any:
    return batch


def training_set(
    store_path: Path, augmented: Path, seed: int, sampling: str = "shuffle"
) -> tuple[Store, MicrobatchDataset, list[str]]:
    """Open what a member trains on.

    Parameters
    ----------
    store_path
        The processed data set.
    augmented
        Folder of ``policy.json`` and, where minority classes got copies, ``extra/``.
    seed
        Of the augmentation.
    sampling
        ``batch.sampling``.

    Returns
    -------
    tuple
        The store, its training set, and the names of the policy's transforms.

    Raises
    ------
    UserError
        There is no store, or no policy.
    """
    store = open_store(store_path)
    splits = [store.split("train")]
    if (augmented / "extra" / "labels.npy").exists():
        splits.append(Store(augmented, store.info).split("extra"))
    try:
        # What is not even text is no policy either, and says so.
        policy = policy_from_json((augmented / "policy.json").read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        raise UserError(f"{augmented}: no policy.json here; run `dvc repro augment` first") from None
    names = transform_names(policy)
    return store, MicrobatchDataset(splits, policy if names else None, seed, sampling), names


def workers_that_pay(
    data: MicrobatchDataset, microbatch: int, num_devices: int, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Return the number of loader processes for this machine: 0 where loading a sample is cheap, else the cores.

    The time of one sample is measured on two small microbatches, the first of which warms the caches.
    """
    keyed: list[Any] = [(0, 0), *range(min(microbatch, 32, len(data)))]
    data.__getitems__(keyed)
    start = clock()
    data.__getitems__(keyed)
    if (clock() - start) / (len(keyed) - 1) < WORKER_PAYS:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_devices)
