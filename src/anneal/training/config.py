"""The sections of params.yaml that training alone reads; imports no torch, so that checking params is quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from anneal.optimizers.config import NO_RATE, OWN_STEPS
from anneal.params import Strict

Probability = Annotated[float, Field(ge=0, lt=1)]


class LossConfig(Strict):
    """Section ``loss``."""

    name: Literal["cross_entropy"]
    class_weights: Literal["none", "balanced"]


class MixConfig(Strict):
    """``regularization.mixup`` and ``cutmix``: ``alpha`` of the Beta distribution, 0 for off."""

    alpha: Annotated[float, Field(ge=0)]


class RegularizationConfig(Strict):
    """Section ``regularization``."""

    label_smoothing: Probability
    dropout: Probability
    stochastic_depth: Probability
    l1: Annotated[float, Field(ge=0)]
    mixup: MixConfig
    cutmix: MixConfig
    gradient_clip: Annotated[float, Field(gt=0)] | None


class AveragingConfig(Strict):
    """Section ``averaging``: average of the weights over steps."""

    name: Literal["none"]


class EarlyStoppingConfig(Strict):
    """``trainer.early_stopping``: stop when the validation loss has not fallen by ``min_delta`` for ``patience`` epochs."""

    patience: Annotated[int, Field(ge=1)]
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class TrainerConfig(Strict):
    """Section ``trainer``: length, precision and determinism of the run."""

    epochs: Annotated[int, Field(ge=1)]
    early_stopping: EarlyStoppingConfig | None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    threads: Annotated[int, Field(ge=1)] | Literal["auto"]
    deterministic: bool | Literal["warn"]
    on_nan: Literal["stop"]


def rate_faults(optimizer: str, lr: float | str, lr_scaling: str) -> list[str]:
    """Say what does not go with a rate scaled by the batch; an empty list where all does.

    >>> len(rate_faults("SGD", "auto", "linear")), len(rate_faults("SGD", 0.1, "linear"))
    (1, 0)
    """
    if optimizer in OWN_STEPS and lr_scaling != "none":
        return [
            f"batch.lr_scaling: found {lr_scaling} with {optimizer}, {NO_RATE[optimizer]}, so that there is no rate to "
            f"scale, allowed: none"
        ]
    if lr != "auto" or lr_scaling == "none":
        return []
    return [
        f"optimizer.{optimizer}.lr: found auto with batch.lr_scaling {lr_scaling}, but the range test finds the rate at "
        f"batch.size itself, allowed: a number, or lr_scaling: none"
    ]


class HardwareConfig(Strict):
    """Section ``hardware``: what the machine has; never changes a result, tracked by no stage."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"]
    devices: Annotated[int, Field(ge=1)] | Literal["auto"]
    num_nodes: Annotated[int, Field(ge=1)]
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"]
