"""Settings of a member's sections that cannot work together; imports no torch, so that checking params is quick."""

from __future__ import annotations

import itertools
import math

from anneal.batching import BatchConfig, RunPlan
from anneal.models.config import InitConfig, ModelConfig, conflicts, hidden_weights, is_custom
from anneal.models.transfer import freeze_steps, start_faults
from anneal.optimizers.config import EXTRA, NO_RATE, OptimizerConfig
from anneal.optimizers.config import conflicts as optimizer_conflicts
from anneal.schedules import ScheduleConfig, averaged_steps, schedule_faults
from anneal.training.config import (
    AveragingConfig,
    LossConfig,
    RegularizationConfig,
    TrainerConfig,
    rate_faults,
)


def member_conflicts(
    *,
    model: ModelConfig,
    init: InitConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    batch: BatchConfig,
    loss: LossConfig,
    regularization: RegularizationConfig,
    averaging: AveragingConfig,
    trainer: TrainerConfig,
    height: int,
    width: int,
    normalize: str,
    plan: RunPlan | None,
    channels: int | None = None,
) -> list[str]:
    """Say which settings cannot work together, one line each; an empty list where all do.

    Reads the folder of ``model.start_from``.

    Parameters
    ----------
    model, init, optimizer, schedule, batch, loss, regularization, averaging, trainer
        Sections of the member.
    height, width
        Pixels of the stored images.
    normalize
        ``preprocess.normalize``.
    plan
        How the epochs fall into steps; None, where there is no such plan, leaves the schedule unchecked.
    channels
        Of the stored images; None where they are not known yet.
    """
    faults = conflicts(
        model.name,
        arguments=model.arguments,
        height=height,
        width=width,
        normalize=normalize,
        norm=model.norm.name,
        norm_position=model.norm.position,
        norm_arguments=model.norm.arguments,
        dropout=regularization.dropout,
        stochastic_depth=regularization.stochastic_depth,
        spatial_dropout=regularization.spatial_dropout,
        microbatch=batch.microbatch,
        whiten_first=init.whiten_first,
        zero_last=init.zero_last,
    )
    faults += rate_faults(optimizer.name, optimizer.arguments["lr"], batch.lr_scaling)
    faults += optimizer_conflicts(
        optimizer.name,
        arguments=optimizer.arguments,
        lr_factors=optimizer.lr_factors.model_dump(),
        sam_rho=optimizer.sam.rho,
        size=batch.size,
        microbatch=batch.microbatch,
        grows=bool(batch.growth.at),
        precision=trainer.precision,
        gradient_clip=regularization.gradient_clip,
    )
    if optimizer.name == "Muon" and (hidden := hidden_weights(model.name, model.arguments)) is not None and hidden < 1:
        faults.append(
            f"optimizer.name: found Muon, which is for the weights between the first layer and the head, with a "
            f"model.{model.name} that has none, allowed: AdamW, or a deeper network"
        )
    if plan is not None:
        faults += schedule_faults(
            schedule.model_dump(),
            total_steps=plan.total_steps,
            steps_per_epoch=plan.epoch_steps,
            scaling=batch.lr_scaling,
            size=batch.size,
            reference_size=batch.reference_size,
            early_stopping=trainer.early_stopping.patience if trainer.early_stopping is not None else None,
        )
    faults += _norm_conflicts(model)
    faults += _start_conflicts(model, init, optimizer, plan)
    if model.start_from.path is not None:
        architecture = {
            "name": model.name,
            "arguments": model.arguments,
            "height": height,
            "activation": model.activation,
            "norm": model.norm.name,
            "norm_position": model.norm.position,
            "norm_arguments": model.norm.arguments,
            **({"in_channels": channels} if channels is not None else {}),
        }
        sha256 = model.start_from.sha256
        faults += start_faults(model.start_from.path, sha256, architecture=architecture, normalize=normalize)
    faults += _step_conflicts(optimizer, regularization)
    faults += _mixing_conflicts(batch, regularization)
    faults += _sampling_conflicts(batch, loss)
    faults += _nan_conflicts(trainer, optimizer)
    return faults + _averaging_conflicts(averaging, schedule, optimizer, trainer, plan)


def _norm_conflicts(model: ModelConfig) -> list[str]:
    batch = model.norm.batch
    if is_custom(model.name) or model.norm.name != "batch" or not batch.frozen:
        return []
    faults = []
    if model.start_from.path is None:
        faults.append(
            "model.norm.batch.frozen: found true with model.start_from.path null, where there are no statistics to keep: the "
            "first are mean 0 and variance 1 of nothing, allowed: false, or a trained member to start from"
        )
    if batch.recalibrate.when == "always":
        faults.append(
            "model.norm.batch.recalibrate.when: found always with model.norm.batch.frozen, whose statistics stay as they "
            "are, allowed: averaging | never, or model.norm.batch.frozen: false"
        )
    return faults


WAKING = ("LARS", "Lion", "NovoGrad", "QHAdam", "SGDW", "SignSGD", "Tiger")
"""Optimizers of pytorch_optimizer that treat a parameter whose first gradient comes late as one of a new run; torch's all do."""


def _start_conflicts(
    model: ModelConfig, init: InitConfig, optimizer: OptimizerConfig, plan: RunPlan | None
) -> list[str]:
    start = model.start_from
    key, found = "model.start_from.freeze", start.freeze
    is_off = float(found.split()[0]) == 0 if isinstance(found, str) else found == 0
    if start.path is None:
        if is_off:
            return []
        return [
            f"{key}: found {found} with model.start_from.path null, where it would freeze layers that have learned nothing, "
            f"allowed: 0, or a trained member to start from"
        ]
    faults = []
    if init.whiten_first:
        faults.append(
            "init.whiten_first: found true with model.start_from.path, which brings the weights of the first convolution, "
            "allowed: false"
        )
    if init.name == "lsuv":
        faults.append(
            "init.name: found lsuv with model.start_from.path, which replaces the layers that it would fit to each other, "
            "allowed: another law; it draws a new head alone"
        )
    if is_off:
        if start.unfreeze == "gradually":
            faults.append(
                f"model.start_from.unfreeze: found gradually with {key} {found}, the time from one layer to the next, "
                f"allowed: together, or a longer freeze"
            )
        return faults
    if plan is None:
        return faults
    steps = freeze_steps(found, total_steps=plan.total_steps, steps_per_epoch=plan.epoch_steps)
    if steps == 0:
        faults.append(f"{key}: found {found}, 0 of the run's {plan.total_steps} steps, allowed: 0, or at least 1 step")
    elif steps is not None and optimizer.name == "LBFGS":
        faults.append(
            f"{key}: found {found} with LBFGS, which learns the curvature from steps of all parameters, "
            f"allowed: 0 | 1.0 (the head alone), or another optimizer"
        )
    elif steps is not None and optimizer.name in EXTRA and optimizer.name not in WAKING:
        faults.append(
            f"{key}: found {found} with {optimizer.name}, which counts the steps of all parameters as one and would take "
            f"wrong first steps with those that wake later, allowed: 0 | 1.0 (the head alone), or an optimizer of torch.optim"
        )
    return faults


def _step_conflicts(optimizer: OptimizerConfig, regularization: RegularizationConfig) -> list[str]:
    clips = {
        "gradient_clip": regularization.gradient_clip,
        "gradient_clip_value": regularization.gradient_clip_value,
        "gradient_clip_adaptive": regularization.gradient_clip_adaptive,
    }
    chosen = [name for name, most in clips.items() if most is not None]
    faults = []
    if len(chosen) > 1:
        faults.append(
            f"regularization.{chosen[1]}: found {clips[chosen[1]]:g} with regularization.{chosen[0]} "
            f"{clips[chosen[0]]:g}, while the one would cut what the other has left, allowed: null for all but one of "
            f"{', '.join(clips)}"
        )
    if optimizer.name == "Rprop":
        faults += [
            f"regularization.{name}: found {clips[name]:g} with Rprop, which reads the gradient's signs alone, and those no "
            f"clip changes, allowed: null, or another optimizer"
            for name in chosen
        ]
    if optimizer.name != "LBFGS":
        return faults
    # gradient_clip itself is refused with the optimizer's own settings.
    changed = {name: (most, "null") for name, most in clips.items() if most is not None and name != "gradient_clip"}
    if regularization.gradient_noise.std:
        changed["gradient_noise.std"] = regularization.gradient_noise.std, "0"
    faults += [
        f"regularization.{name}: found {value:g} with LBFGS, which learns the curvature from differences of true gradients, "
        f"allowed: {off}, or another optimizer"
        for name, (value, off) in changed.items()
    ]
    if regularization.max_norm is not None:
        faults.append(
            f"regularization.max_norm: found {regularization.max_norm:g} with LBFGS, which learns the curvature from its own "
            f"steps and would not know of the projection, allowed: null, or another optimizer"
        )
    return faults


def _mixing_conflicts(batch: BatchConfig, regularization: RegularizationConfig) -> list[str]:
    mixes = {"mixup": regularization.mixup, "cutmix": regularization.cutmix}
    return [
        f"regularization.{name}.alpha: found {mix.alpha:g} with batch.microbatch 1, where an image has no partner to be mixed "
        f"with, allowed: 0, or batch.microbatch at least 2"
        for name, mix in mixes.items()
        if mix.alpha and mix.probability and batch.microbatch == 1
    ]


def _sampling_conflicts(batch: BatchConfig, loss: LossConfig) -> list[str]:
    if batch.sampling == "balanced" and loss.class_weights == "balanced":
        return [
            "batch.sampling: found balanced with loss.class_weights balanced, which would count the smaller classes twice "
            "over, allowed: one of the two, and shuffle or none for the other"
        ]
    return []


def _nan_conflicts(trainer: TrainerConfig, optimizer: OptimizerConfig) -> list[str]:
    if trainer.on_nan == "skip" and optimizer.name == "LBFGS":
        return [
            "trainer.on_nan: found skip with LBFGS, whose line search has moved the weights, and learned from them, before it "
            "meets a loss that is not finite, allowed: stop, or another optimizer"
        ]
    return []


def _averaging_conflicts(
    averaging: AveragingConfig,
    schedule: ScheduleConfig,
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    plan: RunPlan | None,
) -> list[str]:
    faults = []
    if averaging.swa_rate is not None:
        if schedule.name == "plateau":
            faults.append(
                "averaging.swa.lr: found a rate with schedule.name plateau, which sets its own by the validation loss, "
                "allowed: null, or another schedule"
            )
        if optimizer.name == "Rprop":
            faults.append(f"averaging.swa.lr: found a rate with Rprop, {NO_RATE['Rprop']}, allowed: null")
    elif averaging.name == "swa" and averaging.swa.low < 1:
        faults.append(
            f"averaging.swa.low: found {averaging.swa.low:g} with averaging.swa.lr null, where the rate is the schedule's, "
            f"allowed: 1.0, or a number for averaging.swa.lr"
        )
    if averaging.name not in ("swa", "polyak") or plan is None:
        return faults
    key, start = f"averaging.{averaging.name}.start", averaging.arguments["start"]
    steps = averaged_steps(averaging.name, averaging.arguments, plan.epoch_steps)
    if len(steps) < 2:
        cycle = averaging.swa.cycle
        latest = 1 - (2 * cycle / len(plan) if averaging.name == "swa" else 2 / plan.total_steps)
        few = f"a mean over {len(steps)} set{'s' * (len(steps) != 1)} of weights in a run of {len(plan)} epochs"
        if averaging.name == "swa":
            few += f" with swa.cycle {cycle}"
        longer = f"trainer.epochs at least {2 * cycle}" if averaging.name == "swa" else "a longer run"
        faults.append(
            f"{key}: found {start:g}, which leaves {few}, allowed: "
            + (f"at most {math.floor(latest * 100) / 100:g}" if latest >= 0 else longer)
        )
    elif trainer.early_stopping is not None:
        patience = trainer.early_stopping.patience
        ends = itertools.accumulate(plan.epoch_steps)
        first = next(epoch for epoch, end in enumerate(ends, 1) if end >= min(steps))
        if patience + 1 < first:
            faults.append(
                f"{key}: found {start:g}, an average that begins in epoch {first}, with trainer.early_stopping.patience "
                f"{patience}, which may end the run after epoch {patience + 1}, allowed: early_stopping null, patience "
                f"at least {first - 1}, or an earlier start"
            )
    return faults
