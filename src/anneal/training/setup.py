"""Everything that stands before the first optimizer step: data, plan of the run, network and LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from anneal.batching import BatchConfig, RunPlan, most_repeats, plan_run
from anneal.models.build import Classifier, build_classifier
from anneal.models.config import InitConfig, ModelConfig
from anneal.models.initialization import DATA_LAWS, initialize
from anneal.models.transfer import load_start
from anneal.optimizers.build import check_arguments
from anneal.optimizers.config import OptimizerConfig, schedule_for
from anneal.params import ParamsError
from anneal.schedules import ScheduleConfig, factor_arguments, scaled_rate
from anneal.seeding import generator
from anneal.store import DatasetInfo, Store
from anneal.training.config import AveragingConfig, HardwareConfig, LossConfig, RegularizationConfig, TrainerConfig
from anneal.training.conflicts import member_conflicts
from anneal.training.data import MicrobatchDataset, StoreDataModule, training_set
from anneal.training.machine import check_precision, resolve_devices, set_threads, strategy_for
from anneal.training.module import TrainingModule
from anneal.training.transfer import Freezing, freezing, head_names

FIRST_PIXELS = 2**19
"""Most pixels of the images that initial weights are fitted to, unless 16 images have more."""


@dataclass(frozen=True)
class Setup:
    """A run that has not begun.

    Parameters
    ----------
    store, train
        The processed data set, and its training samples with their augmentation.
    transforms
        Names of the policy's transforms.
    plan
        How each epoch falls into steps and microbatches.
    module
        Network, loss, optimizer and schedule.
    architecture, normalization
        Arguments of `anneal.models.build.build_classifier`, plain values as model.json holds them.
    accelerator, devices, num_nodes, num_workers
        Of the machine; the first two resolved.
    threads
        CPU threads of each process.
    precision, deterministic, seed
        Of the recipe.
    """

    store: Store
    train: MicrobatchDataset
    transforms: list[str]
    plan: RunPlan
    module: TrainingModule
    architecture: dict[str, Any]
    normalization: dict[str, Any]
    accelerator: str
    devices: int
    num_nodes: int
    num_workers: int | str
    threads: int
    precision: str
    deterministic: bool | str
    seed: int

    def data_module(self) -> StoreDataModule:
        """Return the loaders of this run."""
        return StoreDataModule(self.store, self.train, self.plan, self.seed, self.num_workers)

    def trainer(self, callbacks: Sequence[pl.Callback], **options: Any) -> pl.Trainer:
        """Return a Trainer for this run with Lightning's own logging, checkpoints and bars off.

        Parameters
        ----------
        callbacks
            In the order in which they are called.
        options
            Further arguments of pl.Trainer; they win.
        """
        return pl.Trainer(
            **{
                "accelerator": self.accelerator,
                "devices": self.devices,
                "num_nodes": self.num_nodes,
                "strategy": strategy_for(self.plan.world_size),
                "precision": self.precision,
                "max_epochs": len(self.plan),
                "accumulate_grad_batches": self.plan[0].accumulation,
                # A loader knows its length once; where the batch grows, epochs differ in theirs.
                "reload_dataloaders_every_n_epochs": int(self.plan.grows),
                "deterministic": self.deterministic,
                "benchmark": False,
                "logger": False,
                "callbacks": list(callbacks),
                "log_every_n_steps": self.plan[0].rounds_per_epoch,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                **options,
            }
        )


def set_up(
    *,
    store: Path,
    augmented: Path,
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
) -> Setup:
    """Prepare a run: open the data, plan the epochs, build and initialise the network.

    Parameters
    ----------
    store
        Folder of the processed data set.
    augmented
        Folder of policy.json and, optionally, ``extra/``.
    seed
        Of everything random.
    model, init, optimizer, schedule, batch, loss, regularization, averaging, trainer
        Sections of the member.
    hardware
        What the machine has.

    Raises
    ------
    UserError
        The settings do not fit the data or the machine.
    """
    accelerator, devices = resolve_devices(hardware, batch)
    check_precision(trainer.precision, accelerator)
    data_set, train, transforms = training_set(store, augmented, seed, batch.sampling)
    plan = plan_run(
        size=batch.size,
        microbatch=batch.microbatch,
        devices=devices,
        num_nodes=hardware.num_nodes,
        num_samples=len(train),
        epochs=trainer.epochs,
        growth_at=batch.growth.at,
        growth_factor=batch.growth.factor,
    )
    threads = set_threads(trainer.threads, devices if accelerator == "cpu" else 1)
    info = data_set.info
    faults = member_conflicts(
        model=model,
        init=init,
        optimizer=optimizer,
        schedule=schedule,
        batch=batch,
        loss=loss,
        regularization=regularization,
        averaging=averaging,
        trainer=trainer,
        height=info.height,
        width=info.width,
        normalize=info.normalize,
        plan=plan,
        channels=info.channels,
    )
    if faults:
        raise ParamsError(faults)
    check_arguments(optimizer.name, optimizer.arguments)
    architecture = architecture_of(model, info, regularization)
    normalization = {
        "kind": info.normalize,
        "height": info.height,
        "width": info.width,
        "channels": info.channels,
    }
    classifier = build_classifier(
        architecture, normalization, data_set.statistics(), input_noise=regularization.input_noise, seed=seed
    )
    fitted = init.whiten_first or init.name in DATA_LAWS
    initialize(
        classifier.network,
        init.name,
        init.arguments,
        zero_last=init.zero_last,
        activation=model.activation,
        seed=seed,
        whiten_eps=init.whitening.eps if init.whiten_first else None,
        images=classifier.normalization(first_batch(data_set, seed)[0]) if fitted else None,
    )
    network, start = classifier.network, model.start_from
    if start.path is not None:
        load_start(network, head_names(network), start.path, start.sha256, info.classes)
    module = training_module(
        classifier,
        plan,
        info,
        train,
        seed=seed,
        optimizer=optimizer,
        schedule=schedule,
        batch=batch,
        loss=loss,
        regularization=regularization,
        averaging=averaging,
        frozen=freezing(start, plan, network),
        on_nan=trainer.on_nan,
    )
    return Setup(
        store=data_set,
        train=train,
        transforms=transforms,
        plan=plan,
        module=module,
        architecture=architecture,
        normalization=normalization,
        accelerator=accelerator,
        devices=devices,
        num_nodes=hardware.num_nodes,
        num_workers=hardware.num_workers,
        threads=threads,
        precision=trainer.precision,
        deterministic=trainer.deterministic,
        seed=seed,
    )


def first_batch(store: Store, seed: int, most: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Return training images that are drawn for the initial weights: as they are stored, without augmentation.

    Fewer where they are large, for memory; a smaller ``most`` gives the first of the same images.

    Parameters
    ----------
    store
        The processed data set.
    seed
        Of the recipe or the member.
    most
        Number of images, where the split has as many.

    Returns
    -------
    tuple
        Images, uint8 (N, H, W, C), and labels, int64 (N,).
    """
    split = store.split("train")
    count = min(most, max(FIRST_PIXELS // (store.info.height * store.info.width), 16))
    index = generator(seed, "init", "batch").permutation(len(split))[:count]
    return torch.from_numpy(split.take(index)), torch.from_numpy(split.labels[index])


def architecture_of(model: ModelConfig, info: DatasetInfo, regularization: RegularizationConfig) -> dict[str, Any]:
    """Return the arguments of `anneal.models.build.build_network`, plain values as model.json holds them."""
    norm = model.norm
    return {
        "name": model.name,
        "arguments": model.arguments,
        "num_classes": len(info.classes),
        "in_channels": info.channels,
        "height": info.height,
        "width": info.width,
        "activation": model.activation,
        "norm": norm.name,
        "norm_position": norm.position,
        "norm_arguments": norm.arguments,
        "dropout": regularization.dropout,
        "stochastic_depth": regularization.stochastic_depth,
        "spatial_dropout": regularization.spatial_dropout,
    }


def training_module(
    classifier: Classifier,
    plan: RunPlan,
    info: DatasetInfo,
    train: MicrobatchDataset,
    *,
    seed: int,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    batch: BatchConfig,
    loss: LossConfig,
    regularization: RegularizationConfig,
    averaging: AveragingConfig,
    frozen: Freezing | None = None,
    on_nan: str = "stop",
) -> TrainingModule:
    """Return the LightningModule that the sections describe; ``frozen`` says which layers learn at each step."""
    arguments = optimizer.arguments
    scaling: dict[str, Any] = {"scaling": batch.lr_scaling, "size": batch.size, "reference_size": batch.reference_size}
    if arguments["lr"] != "auto":
        arguments["lr"] = scaled_rate(arguments["lr"], **scaling)
    if "rest" in arguments:
        arguments["rest"] = arguments["rest"] | {"lr": scaled_rate(arguments["rest"]["lr"], **scaling)}
    return TrainingModule(
        classifier,
        plan,
        seed=seed,
        num_classes=len(info.classes),
        optimizer={
            "name": optimizer.name,
            "arguments": arguments,
            "decay_exempt": optimizer.decay_exempt,
            "lr_factors": optimizer.lr_factors.model_dump(),
            "sam": optimizer.sam.model_dump(),
        },
        # Literal totals: to read Lightning's estimate in configure_optimizers costs the loader's state on a resume.
        schedule=factor_arguments(
            schedule_for(optimizer.name, schedule.model_dump()),
            total_steps=plan.total_steps,
            steps_per_epoch=plan.epoch_steps,
            swa=averaging.swa_rate,
        ),
        loss=loss.name,
        loss_arguments=loss.arguments,
        label_smoothing=regularization.label_smoothing,
        class_weights=CLASS_WEIGHTS[loss.class_weights](train.labels, len(info.classes)),
        l1=regularization.l1,
        l2=regularization.l2,
        mixing={
            "mixup_alpha": regularization.mixup.alpha,
            "cutmix_alpha": regularization.cutmix.alpha,
            "mixup_probability": regularization.mixup.probability,
            "cutmix_probability": regularization.cutmix.probability,
            "cutmix_share": regularization.cutmix_share,
        },
        max_norm=regularization.max_norm,
        gradient_clip=regularization.gradient_clip,
        gradient_clip_value=regularization.gradient_clip_value,
        gradient_clip_adaptive=regularization.gradient_clip_adaptive,
        gradient_noise=regularization.gradient_noise.model_dump(),
        constants={"sampling/repeats": most_repeats(train.labels)} if batch.sampling == "balanced" else None,
        freezing=frozen,
        on_nan=on_nan,
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
