"""Settings of different sections that cannot work together; imports no torch, so that checking params is quick."""

from __future__ import annotations

from anneal.batching import BatchConfig, plan_run
from anneal.models.config import ModelConfig, conflicts
from anneal.params import ParamsError
from anneal.preprocess import PreprocessConfig
from anneal.schedules import ScheduleConfig, factor_arguments
from anneal.training.config import HardwareConfig, RegularizationConfig, TrainerConfig


def check_recipe(
    *,
    model: ModelConfig,
    schedule: ScheduleConfig,
    batch: BatchConfig,
    regularization: RegularizationConfig,
    trainer: TrainerConfig,
    preprocess: PreprocessConfig,
    num_train: int,
    hardware: HardwareConfig | None = None,
) -> None:
    """Check the sections that a member trains with against each other and against the size of the training split.

    Parameters
    ----------
    model, schedule, batch, regularization, trainer
        Sections of the member.
    preprocess
        Of the recipe: size of the images and normalisation.
    num_train
        Images of the training split.
    hardware
        Adds the check that the batch divides over the devices; ``auto`` always does.

    Raises
    ------
    ParamsError
        All faults found, one line each.
    """
    faults = conflicts(
        model.name,
        arguments=getattr(model, model.name).model_dump(),
        height=preprocess.size,
        width=preprocess.size,
        normalize=preprocess.normalize,
        norm=model.norm.name,
        stochastic_depth=regularization.stochastic_depth,
        microbatch=batch.microbatch,
    )
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
        try:
            factor_arguments(schedule.model_dump(), total_steps=run.total_steps, steps_per_epoch=run.epoch_steps)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ParamsError(faults)
