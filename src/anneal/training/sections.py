"""The sections of params.yaml that a training run reads, each with its class."""

from __future__ import annotations

from anneal.batching import BatchConfig
from anneal.models.config import InitConfig, ModelConfig
from anneal.optimizers.config import OptimizerConfig
from anneal.params import Strict
from anneal.schedules import ScheduleConfig
from anneal.training.config import (
    AveragingConfig,
    HardwareConfig,
    LossConfig,
    RegularizationConfig,
    TrainerConfig,
)

SECTIONS: dict[str, type[Strict]] = {
    "model": ModelConfig,
    "init": InitConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "batch": BatchConfig,
    "loss": LossConfig,
    "regularization": RegularizationConfig,
    "averaging": AveragingConfig,
    "trainer": TrainerConfig,
    "hardware": HardwareConfig,
}
"""Name to class; what each names is an argument of `anneal.training.fit.fit`."""
