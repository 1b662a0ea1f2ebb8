"""Train one member of the ensemble, from the processed data set to its three files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping

from anneal.batching import BatchConfig
from anneal.models.build import count_parameters
from anneal.models.config import InitConfig, ModelConfig
from anneal.optimizers.config import OptimizerConfig
from anneal.schedules import ScheduleConfig
from anneal.store import fresh_folder, write_json, write_text
from anneal.training.best import BestWeights
from anneal.training.config import AveragingConfig, HardwareConfig, LossConfig, RegularizationConfig, TrainerConfig
from anneal.training.history import Epoch, History, as_csv
from anneal.training.logger import FunctionLogger, Write
from anneal.training.machine import global_settings, interruptible, quiet
from anneal.training.progress import Progress
from anneal.training.setup import set_up


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
    setup = set_up(
        store=store,
        augmented=augmented,
        seed=seed,
        model=model,
        init=init,
        optimizer=optimizer,
        schedule=schedule,
        batch=batch,
        loss=loss,
        regularization=regularization,
        trainer=trainer,
        hardware=hardware,
    )
    module, network = setup.module, setup.module.classifier.network
    history, best = History(), BestWeights()
    own: list[pl.Callback] = [history, best, Progress(name, setup.plan), *callbacks]
    if trainer.early_stopping is not None:
        stopping = trainer.early_stopping
        own.append(
            EarlyStopping("val/loss", patience=stopping.patience, min_delta=stopping.min_delta, check_finite=False)
        )
    with quiet(), interruptible(), global_settings():
        runner = setup.trainer(own, logger=FunctionLogger(log) if log is not None else False)
        runner.fit(module, datamodule=setup.data_module())
    if runner.is_global_zero:
        info = setup.store.info
        values = {
            "architecture": setup.architecture,
            "normalization": setup.normalization,
            "classes": info.classes,
            "preprocessing": {"size": info.height, "fit": info.fit, "interpolation": info.interpolation},
            "num_parameters": count_parameters(network),
            "best_epoch": best.epoch,
            "augmentation": setup.transforms,
        }
        write_member(out, best.weights, values, history.rows)
    return FitResult(
        rows=history.rows,
        best_epoch=best.epoch,
        threads=setup.threads,
        devices=setup.devices,
        accelerator=setup.accelerator,
        num_parameters=count_parameters(network),
        is_main=runner.is_global_zero,
    )


def write_member(out: Path, weights: dict[str, torch.Tensor], model: dict[str, Any], rows: list[Epoch]) -> None:
    """Write the three files of a member; the folder appears once all are whole."""
    from safetensors.torch import save

    with fresh_folder(out) as folder:
        # Not save_file, which makes a file that only its owner may read.
        (folder / "weights.safetensors").write_bytes(save(weights))
        write_json(folder / "model.json", model)
        write_text(folder / "history.csv", as_csv(rows))
