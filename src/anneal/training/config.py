"""The sections of params.yaml that training alone reads; imports no torch, so that checking params is quick."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from anneal.diagnosis.live import LiveName
from anneal.optimizers.config import NO_RATE, OWN_STEPS
from anneal.params import Strict

Probability = Annotated[float, Field(ge=0, lt=1)]


Share = Annotated[float, Field(ge=0, le=1)]
AtLeastZero = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class FocalConfig(Strict):
    """``loss.focal``: Lin et al. 2017."""

    gamma: AtLeastZero


class LossConfig(Strict):
    """Section ``loss``: what is minimised, and one block of arguments for each choice that takes any."""

    name: Literal["cross_entropy", "focal", "binary_cross_entropy"]
    class_weights: Literal["none", "balanced"]
    focal: FocalConfig

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the loss, plain values."""
        block = getattr(self, self.name, None)
        return {} if block is None else block.model_dump()


class MixConfig(Strict):
    """``regularization.mixup`` and ``cutmix``: ``alpha`` of the Beta distribution, 0 for off; chance of a microbatch."""

    alpha: AtLeastZero
    probability: Share


class GradientNoiseConfig(Strict):
    """``regularization.gradient_noise``: Neelakantan et al. 2015."""

    std: AtLeastZero
    decay: AtLeastZero


class RegularizationConfig(Strict):
    """Section ``regularization``."""

    label_smoothing: Probability
    dropout: Probability
    spatial_dropout: Probability
    stochastic_depth: Probability
    l1: AtLeastZero
    l2: AtLeastZero
    max_norm: Positive | None
    mixup: MixConfig
    cutmix: MixConfig
    cutmix_share: Share
    input_noise: AtLeastZero
    gradient_noise: GradientNoiseConfig
    gradient_clip: Positive | None
    gradient_clip_value: Positive | None
    gradient_clip_adaptive: Positive | None


Start = Annotated[
    float, Field(ge=0, lt=1, json_schema_extra={"allowed": "a fraction of the run, 0 or more and below 1"})
]


class EMAConfig(Strict):
    """``averaging.ema``: exponential moving average over optimizer steps."""

    decay: Annotated[float, Field(gt=0, lt=1)]
    warmup: bool


class SWAConfig(Strict):
    """``averaging.swa``: Izmailov et al. 2018; ``lr`` and ``low`` as factors of the peak rate."""

    start: Start
    lr: Positive | None
    cycle: Annotated[int, Field(ge=1)]
    low: Annotated[float, Field(gt=0, le=1)]


class PolyakConfig(Strict):
    """``averaging.polyak``: plain mean over optimizer steps (Polyak & Juditsky 1992)."""

    start: Start


class AveragingConfig(Strict):
    """Section ``averaging``: mean of the weights along the run, and one block of arguments for each choice."""

    name: Literal["none", "ema", "swa", "polyak"]
    export: Literal["best", "raw", "average"]
    ema: EMAConfig
    swa: SWAConfig
    polyak: PolyakConfig

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the average, plain values."""
        block = getattr(self, self.name, None)
        return {} if block is None else block.model_dump()

    @property
    def swa_rate(self) -> dict[str, Any] | None:
        """Block ``swa``, plain values, where it is on and sets the rate from its start on."""
        return self.swa.model_dump() if self.name == "swa" and self.swa.lr is not None else None


class EarlyStoppingConfig(Strict):
    """``trainer.early_stopping``: stop when the validation loss has not fallen by ``min_delta`` for ``patience`` epochs."""

    patience: Annotated[int, Field(ge=1)]
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class TrainerConfig(Strict):
    """Section ``trainer``: length, precision and determinism of the run."""

    epochs: Annotated[int, Field(ge=1)]
    early_stopping: EarlyStoppingConfig | None
    restore_best: bool
    evaluate_train: Annotated[int, Field(ge=0)]
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    threads: Annotated[int, Field(ge=1)] | Literal["auto"]
    deterministic: bool | Literal["warn"]
    on_nan: Literal["stop", "skip"]
    stop_on: list[LiveName]
    snapshots: list[Annotated[int, Field(ge=1)]]

    @model_validator(mode="after")
    def _within_the_run(self) -> TrainerConfig:
        late = [epoch for epoch in self.snapshots if epoch > self.epochs]
        if late or len(set(self.snapshots)) < len(self.snapshots):
            found = ", ".join(map(str, self.snapshots))
            raise ValueError(f"snapshots: found {found}, allowed: epochs of the run, 1 to {self.epochs}, each once")
        return self


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


CHECKPOINT_EVERY = r"^[1-9][0-9]*( ?(s|min|h)| steps?)$"


class HardwareConfig(Strict):
    """Section ``hardware``: what the machine has; never changes a result, tracked by no stage."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"]
    devices: Annotated[int, Field(ge=1)] | Literal["auto"]
    num_nodes: Annotated[int, Field(ge=1)]
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"]
    checkpoint_every: Annotated[
        str,
        Field(
            pattern=CHECKPOINT_EVERY, json_schema_extra={"allowed": "60s | 5 min | 1 h | 200 steps, any whole number"}
        ),
    ]
