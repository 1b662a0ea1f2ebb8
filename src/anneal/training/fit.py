"""Train one member of the ensemble, from the processed data set to its three files."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.strategies import DDPStrategy

from anneal.batching import BatchConfig, BatchPlan, devices_that_divide, plan
from anneal.models.build import Classifier, build_classifier, count_parameters
from anneal.models.config import InitConfig, ModelConfig, conflicts
from anneal.models.initialization import initialize
from anneal.optimizers import OptimizerConfig
from anneal.params import ParamsError, UserError
from anneal.schedules import ScheduleConfig, factor_arguments, scaled_rate
from anneal.store import DatasetInfo, fresh_folder, write_json, write_text
from anneal.training.best import BestWeights
from anneal.training.config import AveragingConfig, HardwareConfig, LossConfig, RegularizationConfig, TrainerConfig
from anneal.training.data import MicrobatchDataset, StoreDataModule, training_set
from anneal.training.history import Epoch, History, as_csv
from anneal.training.logger import FunctionLogger, Write
from anneal.training.module import TrainingModule
from anneal.training.progress import Progress

QUIET = (
    # The loader decides by measurement how many workers pay.
    ".*does not have many workers.*",
    # Every rank validates everything, so that there is nothing to bring together.
    ".*sync_dist=True.*",
    # Lightning 2.6 asks torch in a way that torch has since deprecated.
    ".*isinstance\\(treespec, LeafSpec\\).*",
)
"""Warnings of Lightning that ask nothing of the user."""


@dataclass(frozen=True)
class FitResult:
    """How a run went.

    Parameters
    ----------
    rows
        history.csv.
    best_epoch
        Whose weights were exported, from 1.
    threads
        CPU threads of each process, which decide the last bits of a result.
    devices
        Processes on each node.
    accelerator
        ``cpu``, ``gpu`` or ``mps``.
    num_parameters
        Trainable values of the network.
    is_main
        Whether this process wrote the files; of several only the first does.
    """

    rows: list[Epoch]
    best_epoch: int
    threads: int
    devices: int
    accelerator: str
    num_parameters: int
    is_main: bool


def fit(
    *,
    name: str,
    store: Path,
    augmented: Path,
    out: Path,
    seed: int,
    model: ModelConfig,
    init: InitConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    batch: BatchConfig,
    loss: LossConfig,
    regularization: RegularizationConfig,
    averaging: AveragingConfig,  # noqa: ARG001
    trainer: TrainerConfig,
    hardware: HardwareConfig,
    log: Write | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
) -> FitResult:
    """Train a member and write ``weights.safetensors``, ``model.json`` and ``history.csv``.

    The weights are those of the epoch with the highest validation accuracy; among equals the lower validation loss wins,
    then the earlier epoch. All three files are a function of the data, the sections and the seed (and in the last bits
    of the CPU threads and the processor); ``hardware`` has no part in them beyond rounding.

    Parameters
    ----------
    name
        Of the member, for progress lines.
    store
        Folder of the processed data set.
    augmented
        Folder of policy.json and, optionally, ``extra/``.
    out
        Folder to write; it appears only once the run has ended well.
    seed
        Of everything random.
    model, init, optimizer, schedule, batch, loss, regularization, averaging, trainer
        Sections of the member.
    hardware
        What the machine has.
    log
        Called once an epoch with metrics and the number of optimizer steps.
    callbacks
        Further Lightning callbacks.

    Raises
    ------
    UserError
        The settings do not fit the data or the machine, or training diverged.
    KeyboardInterrupt
        Stopped by Ctrl-C or SIGTERM; nothing was written.
    """
    accelerator, devices = resolve_devices(hardware, batch)
    check_precision(trainer.precision, accelerator)
    data_set, train, transforms = training_set(store, augmented, seed)
    batches = plan(
        size=batch.size,
        microbatch=batch.microbatch,
        devices=devices,
        num_nodes=hardware.num_nodes,
        num_samples=len(train),
    )
    threads = set_threads(trainer.threads, devices if accelerator == "cpu" else 1)
    info = data_set.info
    faults = conflicts(
        model.name,
        arguments=getattr(model, model.name).model_dump(),
        height=info.height,
        width=info.width,
        normalize=info.normalize,
        norm=model.norm.name,
        stochastic_depth=regularization.stochastic_depth,
        microbatch=batch.microbatch,
    )
    if faults:
        raise ParamsError(faults)
    architecture = architecture_of(model, info, regularization)
    normalization = {
        "kind": info.normalize,
        "height": info.height,
        "width": info.width,
        "channels": info.channels,
    }
    classifier = build_classifier(architecture, normalization, data_set.statistics())
    initialize(
        classifier.network,
        init.name,
        getattr(init, init.name).model_dump(),
        zero_last=init.zero_last,
        activation=model.activation,
        seed=seed,
    )
    module = training_module(
        classifier,
        batches,
        info,
        train,
        seed=seed,
        optimizer=optimizer,
        schedule=schedule,
        batch=batch,
        loss=loss,
        regularization=regularization,
        epochs=trainer.epochs,
    )
    history, best = History(), BestWeights()
    own: list[pl.Callback] = [history, best, Progress(name, batches, trainer.epochs), *callbacks]
    if trainer.early_stopping is not None:
        stopping = trainer.early_stopping
        own.append(
            EarlyStopping("val/loss", patience=stopping.patience, min_delta=stopping.min_delta, check_finite=False)
        )
    with quiet(), interruptible(), global_settings():
        runner = pl.Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=hardware.num_nodes,
            strategy=strategy_for(batches.world_size),
            precision=trainer.precision,
            max_epochs=trainer.epochs,
            accumulate_grad_batches=batches.accumulation,
            deterministic=trainer.deterministic,
            benchmark=False,
            logger=FunctionLogger(log) if log is not None else False,
            callbacks=own,
            log_every_n_steps=batches.rounds_per_epoch,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        runner.fit(module, datamodule=StoreDataModule(data_set, train, batches, seed, hardware.num_workers))
    if runner.is_global_zero:
        values = {
            "architecture": architecture,
            "normalization": normalization,
            "classes": info.classes,
            "preprocessing": {"size": info.height, "fit": info.fit, "interpolation": info.interpolation},
            "num_parameters": count_parameters(classifier.network),
            "best_epoch": best.epoch,
            "augmentation": transforms,
        }
        write_member(out, best.weights, values, history.rows)
    return FitResult(
        rows=history.rows,
        best_epoch=best.epoch,
        threads=threads,
        devices=devices,
        accelerator=accelerator,
        num_parameters=count_parameters(classifier.network),
        is_main=runner.is_global_zero,
    )


def architecture_of(model: ModelConfig, info: DatasetInfo, regularization: RegularizationConfig) -> dict[str, Any]:
    """Return the arguments of `anneal.models.build.build_network`, plain values as model.json holds them."""
    norm = model.norm
    return {
        "name": model.name,
        "arguments": getattr(model, model.name).model_dump(),
        "num_classes": len(info.classes),
        "in_channels": info.channels,
        "height": info.height,
        "width": info.width,
        "activation": model.activation,
        "norm": norm.name,
        "norm_position": norm.position,
        "norm_arguments": getattr(norm, norm.name).model_dump() if hasattr(norm, norm.name) else {},
        "dropout": regularization.dropout,
        "stochastic_depth": regularization.stochastic_depth,
    }


def training_module(
    classifier: Classifier,
    batches: BatchPlan,
    info: DatasetInfo,
    train: MicrobatchDataset,
    *,
    seed: int,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    batch: BatchConfig,
    loss: LossConfig,
    regularization: RegularizationConfig,
    epochs: int,
) -> TrainingModule:
    """Return the LightningModule that the sections describe."""
    arguments = getattr(optimizer, optimizer.name).model_dump()
    arguments["lr"] = scaled_rate(
        arguments["lr"], scaling=batch.lr_scaling, size=batch.size, reference_size=batch.reference_size
    )
    # Literal totals: to read Lightning's estimate in configure_optimizers costs the loader's state on a resume.
    total_steps = batches.steps_per_epoch * epochs
    return TrainingModule(
        classifier,
        batches,
        seed=seed,
        num_classes=len(info.classes),
        optimizer={"name": optimizer.name, "arguments": arguments, "decay_exempt": optimizer.decay_exempt},
        schedule=factor_arguments(
            schedule.model_dump(), total_steps=total_steps, steps_per_epoch=batches.steps_per_epoch
        ),
        label_smoothing=regularization.label_smoothing,
        l1=regularization.l1,
        mixup_alpha=regularization.mixup.alpha,
        cutmix_alpha=regularization.cutmix.alpha,
        class_weights=CLASS_WEIGHTS[loss.class_weights](train.labels, len(info.classes)),
        gradient_clip=regularization.gradient_clip,
    )


def balanced_weights(labels: np.ndarray, num_classes: int) -> torch.Tensor:
    """Return weights inverse to the class counts, float32 (num_classes,), whose mean over ``labels`` is 1.

    A class without samples has weight 0.

    >>> balanced_weights(np.array([0, 0, 0, 1]), 3).tolist()
    [0.6666666865348816, 2.0, 0.0]
    """
    counts = np.bincount(labels, minlength=num_classes)
    present = np.count_nonzero(counts)
    weights = np.divide(len(labels), present * counts, out=np.zeros(num_classes), where=counts > 0)
    return torch.from_numpy(weights.astype(np.float32))


CLASS_WEIGHTS: dict[str, Any] = {"none": lambda labels, num_classes: None, "balanced": balanced_weights}  # noqa: ARG005
"""``loss.class_weights`` to a function of the training labels and the number of classes."""


def write_member(out: Path, weights: dict[str, torch.Tensor], model: dict[str, Any], rows: list[Epoch]) -> None:
    """Write the three files of a member; the folder appears once all are whole."""
    from safetensors.torch import save

    with fresh_folder(out) as folder:
        # Not save_file, which makes a file that only its owner may read.
        (folder / "weights.safetensors").write_bytes(save(weights))
        write_json(folder / "model.json", model)
        write_text(folder / "history.csv", as_csv(rows))


# ---- the machine ----------------------------------------------------------------------------------------------------


def resolve_devices(hardware: HardwareConfig, batch: BatchConfig) -> tuple[str, int]:
    """Return the accelerator and the number of processes on each node.

    ``auto`` takes one process on a CPU, and as many GPUs as divide the batch.

    Raises
    ------
    UserError
        The machine has no such accelerator, or fewer devices.
    """
    found = {"gpu": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    accelerator: str = hardware.accelerator
    if accelerator == "auto":
        accelerator = next((kind for kind, count in found.items() if count), "cpu")
    if accelerator == "cpu":
        return "cpu", hardware.devices if isinstance(hardware.devices, int) else 1
    available = found[accelerator]
    if not available:
        raise UserError(
            f"params.yaml: hardware.accelerator: found {accelerator}, but this machine has none; allowed: auto | cpu"
        )
    if isinstance(hardware.devices, int):
        if hardware.devices > available:
            raise UserError(
                f"params.yaml: hardware.devices: found {hardware.devices}, but this machine has {available}; "
                f"allowed: auto, or at most {available}"
            )
        return accelerator, hardware.devices
    return accelerator, devices_that_divide(
        available, size=batch.size, microbatch=batch.microbatch, num_nodes=hardware.num_nodes
    )


def check_precision(precision: str, accelerator: str) -> None:
    """Refuse a precision that this machine computes a hundred times slower than float32.

    Raises
    ------
    UserError
        16-bit floats on a CPU, or bfloat16 on a CPU without instructions for it.
    """
    if accelerator != "cpu" or precision == "32-true":
        return
    if precision == "16-mixed":
        raise UserError("params.yaml: trainer.precision: found 16-mixed on a CPU; allowed: 32-true, or a GPU")
    if not cpu_has_bfloat16():
        raise UserError(
            "params.yaml: trainer.precision: found bf16-mixed on a CPU without bfloat16 instructions, where it is about "
            "100 times slower than 32-true; allowed: 32-true"
        )


def cpu_has_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, or Arm's BF16)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if any(capabilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16")):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def set_threads(threads: int | str, processes: int) -> int:
    """Set and return the number of CPU threads; ``auto`` shares the cores that this process may use."""
    if isinstance(threads, str):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // processes)
    torch.set_num_threads(threads)
    return threads


def strategy_for(world_size: int) -> Any:
    """Return Lightning's strategy; BatchNorm's buffers are ours to bring together, once an optimizer step."""
    if world_size == 1:
        return "auto"
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's banners and the warnings that our own choices cause from the terminal."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in QUIET:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def global_settings() -> Iterator[None]:
    """Put torch's process-wide switches back as they were."""
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Deterministic mode would overwrite all new memory with NaN first; nothing here reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM come out as KeyboardInterrupt: Lightning would turn the first into a SystemExit."""

    def stop(signum: int, frame: Any) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    if in_main:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
