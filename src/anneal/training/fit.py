"""Train one member of the ensemble, from the processed data set to its files."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping

from anneal.batching import BatchConfig, RunPlan
from anneal.models.build import count_macs, count_parameters
from anneal.models.config import InitConfig, ModelConfig
from anneal.models.initial_statistics import LayerStatistics, findings, initial_statistics
from anneal.models.recalibration import recalibration_batches
from anneal.optimizers.config import OptimizerConfig
from anneal.processes import is_first_process
from anneal.schedules import ScheduleConfig
from anneal.store import fresh_folder, write_json, write_text
from anneal.training.averaging import Averaging
from anneal.training.best import BestWeights, exported
from anneal.training.checkpoint import Checkpoints, Found, WholeFiles, newest
from anneal.training.config import (
    AveragingConfig,
    HardwareConfig,
    LossConfig,
    RegularizationConfig,
    TrainerConfig,
)
from anneal.training.dynamics import Dynamics
from anneal.training.history import Epoch, History, Steps, as_csv
from anneal.training.interruption import interruptible
from anneal.training.live import LiveFindings, Tell
from anneal.training.logger import FunctionLogger, Write
from anneal.training.lr_curve import LRRange
from anneal.training.lr_range import found_rate, lr_range
from anneal.training.machine import global_settings, quiet
from anneal.training.noise_scale import NoiseScale
from anneal.training.norm_health import MeasureNorms, sample_size
from anneal.training.progress import Progress
from anneal.training.recalibrate import Recalibration
from anneal.training.setup import first_batch, set_up
from anneal.training.snapshots import Snapshots
from anneal.training.state import RunState
from anneal.training.train_evaluation import TrainEvaluation, images_to_evaluate, measured_on


@dataclass(frozen=True)
class FitResult:
    """How a run went.

    Parameters
    ----------
    rows
        history.csv.
    best_epoch
        Whose weights were exported, from 1.
    weights
        Which were: ``raw``, or the name of their average.
    peak_rate
        Learning rate at factor 1 of the schedule.
    range_test
        What found it; None where params.yaml gave a number, and in all processes but the first.
    initial, initial_findings
        Activations and gradients of each layer on one batch before the first step, and what is wrong with them.
    measured_on
        What its training and validation figures are measured on, in words.
    threads
        CPU threads of each process, which decide the last bits of a result.
    devices
        Processes on each node.
    accelerator
        ``cpu``, ``gpu`` or ``mps``.
    num_parameters
        Trainable values of the network.
    macs
        Multiplications of weights behind one image's forward pass.
    is_main
        Whether this process wrote the files; of several only the first does.
    """

    rows: list[Epoch]
    best_epoch: int
    weights: str
    peak_rate: float
    range_test: LRRange | None
    initial: list[LayerStatistics]
    initial_findings: list[str]
    measured_on: str
    threads: int
    devices: int
    accelerator: str
    num_parameters: int
    macs: int
    is_main: bool

    @property
    def facts(self) -> dict[str, float]:
        """Single figures of the run, by their names in MLflow."""
        return {
            "best_epoch": self.best_epoch,
            "num_parameters": self.num_parameters,
            "macs": self.macs,
            "peak_lr": self.peak_rate,
        }

    @property
    def tags(self) -> dict[str, str]:
        """Facts of the run that are no figures, by their names in MLflow."""
        return {
            "initial.findings": " | ".join(self.initial_findings) or "none",
            "train.measured_on": self.measured_on,
            "weights": self.weights,
            "threads": str(self.threads),
            "devices": f"{self.devices} {self.accelerator}",
        }


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
    averaging: AveragingConfig,
    trainer: TrainerConfig,
    hardware: HardwareConfig,
    state: RunState | None = None,
    log: Write | None = None,
    tell: Tell | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
) -> FitResult:
    """Train a member and write ``weights.safetensors``, ``model.json``, ``history.csv``, ``steps.csv``, ``layers.csv``.

    The weights are those of the epoch with the highest validation accuracy; among equals the lower validation loss wins,
    then the earlier epoch; where ``trainer.restore_best`` is false they are those of the last. An average of the weights is
    written to ``averages/<name>.safetensors`` by the same rule, and ``averaging.export`` says which of the two is exported.
    All files are a function of the data, the sections and the seed (and in the last bits
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
    state
        Where the run keeps checkpoints, and goes on from one; its folder stays until `RunState.forget`. None keeps none.
    log
        Called with metrics and the number of optimizer steps behind them: at each epoch's end with its figures, and with
        those of single steps (``step/...``).
    tell
        Called with ``live.finding`` and words when something is certain while the run goes on.
    callbacks
        Further Lightning callbacks.

    Raises
    ------
    UserError
        The settings do not fit the data or the machine, training diverged, or ``trainer.stop_on`` stopped it.
    Interrupted
        Stopped by Ctrl-C, SIGTERM or SIGUSR1; ``out`` was not written, but a checkpoint was.
    """
    rate_key = f"optimizer.{optimizer.name}.lr of member {name}"
    inputs: dict[str, Any] = {
        "store": store,
        "augmented": augmented,
        "seed": seed,
        "model": model,
        "init": init,
        "optimizer": optimizer,
        "schedule": schedule,
        "batch": batch,
        "loss": loss,
        "regularization": regularization,
        "averaging": averaging,
        "trainer": trainer,
        "hardware": hardware,
    }
    setup = set_up(**inputs)
    module, network = setup.module, setup.module.classifier.network
    checkpoint = _resume(name, state, setup.plan) if state is not None else None
    range_test: LRRange | None = None
    if checkpoint is not None:
        module.peak_rate, range_test = checkpoint.peak_rate, checkpoint.range_test
    elif module.auto_rate and (setup.plan.world_size == 1 or is_first_process()):
        range_test = lr_range(name=name, **inputs)
        module.peak_rate = found_rate(range_test, rate_key)
        print(
            f"{name}: learning rate {module.peak_rate:g} from a range test over {len(range_test.rates)} steps",
            file=sys.stderr,
            flush=True,
        )
    info = setup.store.info
    macs = count_macs(network, (info.channels, info.height, info.width))
    # As many images as a forward pass takes, for memory's sake.
    images, labels = first_batch(setup.store, seed, most=min(max(batch.microbatch, 32), 256))
    initial = initial_statistics(module.classifier, images, labels)
    initial_findings = findings(initial)
    if is_first_process():
        for finding in initial_findings:
            print(f"{name}: warning: {finding}", file=sys.stderr, flush=True)
    history, best = History(), BestWeights(restore_best=trainer.restore_best)
    steps, dynamics = Steps(setup.plan.total_steps), Dynamics()
    measured = first_batch(setup.store, seed, most=sample_size(len(setup.train), batch.microbatch))[0]
    norms = MeasureNorms(measured)
    live = LiveFindings(
        name,
        stop_on=trainer.stop_on,
        initial=initial,
        steps=steps,
        optimizer=optimizer.name,
        chance=math.log(len(info.classes)) if loss.name == "cross_entropy" else math.inf,
        tell=tell,
    )
    own: list[pl.Callback] = [norms, history, best, steps, dynamics, Progress(name, setup.plan), live, *callbacks]
    statistics = model.norm.batch.recalibrate
    if statistics.when == "always":
        # Once norms are measured, and before anything is evaluated.
        own.insert(1, Recalibration(setup.store, seed=seed, images=statistics.images, microbatch=batch.microbatch))
    average: Averaging | None = None
    if averaging.name != "none":
        average = Averaging(
            averaging.name,
            averaging.arguments,
            epoch_steps=setup.plan.epoch_steps,
            restore_best=trainer.restore_best,
            calibration=None
            if statistics.when == "never"
            else partial(recalibration_batches, setup.store, seed, statistics.images, batch.microbatch),
        )
        own.append(average)
    snapshots = Snapshots(trainer.snapshots)
    if trainer.snapshots:
        own.append(snapshots)
    if batch.noise_microbatches:
        own.append(
            NoiseScale(setup.train, num_microbatches=batch.noise_microbatches, microbatch=batch.microbatch, seed=seed)
        )
    train_split = setup.store.split("train")
    evaluated = images_to_evaluate(
        trainer.evaluate_train, num_train=len(train_split), num_val=len(setup.store.split("val"))
    )
    if evaluated:
        own.append(TrainEvaluation(train_split, size=evaluated, seed=seed))
    if trainer.early_stopping is not None:
        stopping = trainer.early_stopping
        own.append(
            EarlyStopping("val/loss", patience=stopping.patience, min_delta=stopping.min_delta, check_finite=False)
        )
    with quiet(), interruptible() as interruptions, global_settings():
        if state is not None:
            own.append(
                Checkpoints(
                    state,
                    hardware.checkpoint_every,
                    interruptions=interruptions,
                    range_test=range_test,
                )
            )
        runner = setup.trainer(
            own,
            logger=FunctionLogger(log) if log is not None else False,
            **({"enable_checkpointing": True, "plugins": [WholeFiles()]} if state is not None else {}),
        )
        if checkpoint is None:
            runner.fit(module, datamodule=setup.data_module())
        else:
            runner.fit(module, datamodule=setup.data_module(), ckpt_path=checkpoint.path, weights_only=True)
    averaged = average.kept if average is not None else None
    chosen = exported(best.kept, averaged, averaging.export)
    kept = averaged if averaged is not None and chosen == "average" else best.kept
    weights = averaging.name if kept is averaged else "raw"
    if runner.is_global_zero:
        values = {
            "architecture": setup.architecture,
            "normalization": setup.normalization,
            "classes": info.classes,
            "preprocessing": {"size": info.height, "fit": info.fit, "interpolation": info.interpolation},
            "num_parameters": count_parameters(network),
            "macs": macs,
            "weights": weights,
            "best_epoch": kept.epoch,
            "lr": module.peak_rate,
            "augmentation": setup.transforms,
        }
        tables: dict[str, Sequence[Any]] = {
            "history.csv": history.rows,
            "steps.csv": steps.rows,
            "layers.csv": norms.into(dynamics.rows),
            "initial.csv": initial,
        }
        beside = {f"snapshots/{epoch}": of_epoch for epoch, of_epoch in sorted(snapshots.weights.items())}
        if averaged is not None and averaged.epoch:
            beside[f"averages/{averaging.name}"] = averaged.weights
        write_member(out, kept.weights, values, tables, beside)
    return FitResult(
        rows=history.rows,
        best_epoch=kept.epoch,
        weights=weights,
        peak_rate=module.peak_rate,
        range_test=range_test,
        initial=initial,
        initial_findings=initial_findings,
        measured_on=measured_on(
            transforms=setup.transforms,
            model=model,
            regularization=regularization,
            loss=loss,
            sampling=batch.sampling,
            images=evaluated,
        ),
        threads=setup.threads,
        devices=setup.devices,
        accelerator=setup.accelerator,
        num_parameters=count_parameters(network),
        macs=macs,
        is_main=runner.is_global_zero,
    )


def _resume(name: str, state: RunState, plan: RunPlan) -> Found | None:
    """Say what the run goes on from, and return it; a folder of another recipe is emptied."""

    def say(line: str) -> None:
        if is_first_process():
            print(f"{name}: {line}", file=sys.stderr, flush=True)

    state.begin()
    found = newest(state, plan.world_size, say)
    if found is not None and found.position.epoch < len(plan):
        say(f"resuming train@{name} at epoch {found.position.epoch + 1}, step {found.position.step}")
    elif found is not None:
        say(f"resuming train@{name} after the last step, {found.position.step}")
    return found


def write_member(
    out: Path,
    weights: dict[str, torch.Tensor],
    model: dict[str, Any],
    tables: Mapping[str, Sequence[Any]],
    beside: Mapping[str, dict[str, torch.Tensor]],
) -> None:
    """Write the files of a member, ``tables`` and other weights by file name; the folder appears once all are whole."""
    from safetensors.torch import save

    with fresh_folder(out) as folder:
        # Not save_file, which makes a file that only its owner may read.
        (folder / "weights.safetensors").write_bytes(save(weights))
        for name, other in beside.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / f"{name}.safetensors").write_bytes(save(other))
        write_json(folder / "model.json", model)
        for name, rows in tables.items():
            write_text(folder / name, as_csv(rows))
