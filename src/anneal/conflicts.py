"""Settings of different sections that cannot work together; imports no torch, so that checking params is quick."""

from __future__ import annotations

from anneal.batching import BatchConfig, plan_run
from anneal.models.config import InitConfig, ModelConfig, conflicts, hidden_weights, is_custom
from anneal.models.custom import call_arguments
from anneal.optimizers.config import EXTRA, OptimizerConfig
from anneal.optimizers.config import conflicts as optimizer_conflicts
from anneal.params import ParamsError, UserError
from anneal.preprocess import PreprocessConfig
from anneal.schedules import ScheduleConfig, schedule_faults
from anneal.training.config import HardwareConfig, RegularizationConfig, TrainerConfig, rate_faults


def check_recipe(
    *,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    batch: BatchConfig,
    regularization: RegularizationConfig,
    trainer: TrainerConfig,
    preprocess: PreprocessConfig,
    num_train: int,
    hardware: HardwareConfig | None = None,
    init: InitConfig | None = None,
) -> None:
    """Check the sections that a member trains with against each other and against the size of the training split.

    Parameters
    ----------
    model, optimizer, schedule, batch, regularization, trainer
        Sections of the member.
    preprocess
        Of the recipe: size of the images and normalisation.
    num_train
        Images of the training split.
    hardware
        Adds the check that the batch divides over the devices; ``auto`` always does.
    init
        Section of the member; adds the check that its way to whiten fits the model.

    Raises
    ------
    ParamsError
        All faults found, one line each.
    """
    faults = conflicts(
        model.name,
        arguments=model.arguments,
        height=preprocess.size,
        width=preprocess.size,
        normalize=preprocess.normalize,
        norm=model.norm.name,
        norm_position=model.norm.position,
        norm_arguments=model.norm.arguments,
        dropout=regularization.dropout,
        stochastic_depth=regularization.stochastic_depth,
        microbatch=batch.microbatch,
        whiten_first=init is not None and init.whiten_first,
        zero_last=init is not None and init.zero_last,
    )
    if is_custom(model.name):
        try:
            call_arguments(model.name, model.custom)
        except UserError as error:
            faults.append(str(error))
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
    if optimizer.name in EXTRA:
        # Only these need the library: the blocks of torch's own are typed.
        from anneal.optimizers.build import check_arguments

        try:
            check_arguments(optimizer.name, optimizer.arguments)
        except UserError as error:
            faults.append(str(error))
    devices = hardware.devices if hardware is not None and isinstance(hardware.devices, int) else 1
    num_nodes = hardware.num_nodes if hardware is not None else 1
    try:
        run = plan_run(
            size=batch.size,
            microbatch=batch.microbatch,
            devices=devices,
            num_nodes=num_nodes,
            num_samples=num_train,
            epochs=trainer.epochs,
            growth_at=batch.growth.at,
            growth_factor=batch.growth.factor,
        )
    except ParamsError as error:
        faults.extend(error.faults)
    else:
        faults.extend(
            schedule_faults(
                schedule.model_dump(),
                total_steps=run.total_steps,
                steps_per_epoch=run.epoch_steps,
                scaling=batch.lr_scaling,
                size=batch.size,
                reference_size=batch.reference_size,
                early_stopping=trainer.early_stopping.patience if trainer.early_stopping is not None else None,
            )
        )
    if faults:
        raise ParamsError(faults)
