"""Settings of different sections that cannot work together; imports no torch, so that checking params is quick."""

from __future__ import annotations

from anneal.batching import BatchConfig, RunPlan, plan_run
from anneal.models.config import InitConfig, ModelConfig, is_custom
from anneal.models.custom import call_arguments
from anneal.optimizers.config import EXTRA, OptimizerConfig
from anneal.params import ParamsError, UserError
from anneal.preprocess import PreprocessConfig
from anneal.schedules import ScheduleConfig
from anneal.training.config import AveragingConfig, HardwareConfig, LossConfig, RegularizationConfig, TrainerConfig
from anneal.training.conflicts import member_conflicts


def check_recipe(
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
    preprocess: PreprocessConfig,
    num_train: int,
    hardware: HardwareConfig | None = None,
) -> RunPlan:
    """Check the sections that a member trains with against each other and against the size of the training split.

    Parameters
    ----------
    model, init, optimizer, schedule, batch, loss, regularization, averaging, trainer
        Sections of the member.
    preprocess
        Of the recipe: size of the images and normalisation.
    num_train
        Images of the training split.
    hardware
        Adds the check that the batch divides over the devices; ``auto`` always does.

    Returns
    -------
    RunPlan
        How the epochs fall into steps.

    Raises
    ------
    ParamsError
        All faults found, one line each.
    """
    faults: list[str] = []
    devices = hardware.devices if hardware is not None and isinstance(hardware.devices, int) else 1
    num_nodes = hardware.num_nodes if hardware is not None else 1
    try:
        plan = plan_run(
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
        plan = None
        faults.extend(error.faults)
    faults += member_conflicts(
        model=model,
        init=init,
        optimizer=optimizer,
        schedule=schedule,
        batch=batch,
        loss=loss,
        regularization=regularization,
        averaging=averaging,
        trainer=trainer,
        height=preprocess.size,
        width=preprocess.size,
        normalize=preprocess.normalize,
        plan=plan,
    )
    try:
        if is_custom(model.name):
            call_arguments(model.name, model.custom)
    except UserError as error:
        faults.append(str(error))
    if optimizer.name in EXTRA:
        # Only these need the library: the blocks of torch's own are typed.
        from anneal.optimizers.build import check_arguments

        try:
            check_arguments(optimizer.name, optimizer.arguments)
        except UserError as error:
            faults.append(str(error))
    if faults or plan is None:
        raise ParamsError(faults)
    return plan
