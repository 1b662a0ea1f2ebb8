"""Section ``optimizer``: one typed block for each class of torch.optim; imports no torch, so that checking is quick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from anneal.params import Strict, nearest

Rate = (
    Annotated[float, Field(gt=0)]
    | Annotated[Literal["auto"], Field(json_schema_extra={"allowed": "auto (found by a range test before training)"})]
)
Fraction = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Betas = Annotated[list[Fraction], Field(min_length=2, max_length=2)]

EXTRA: dict[str, float] = {
    "LARS": 5.0,
    "LAMB": 5e-3,
    "Lion": 1e-3,
    "ADOPT": 2e-3,
    "AdaBelief": 2e-3,
    "AdaBound": 2e-3,
    "Adan": 5e-3,
    "AdEMAMix": 1e-3,
    "LaProp": 2e-3,
    "MADGRAD": 2e-3,
    "NovoGrad": 0.02,
    "Prodigy": 1.0,
    "QHAdam": 2e-3,
    "Ranger": 0.03,
    "SGDW": 0.5,
    "SignSGD": 1e-3,
    "StableAdamW": 2e-3,
    "Tiger": 1e-3,
    "Yogi": 5e-3,
}
"""Classes of pytorch_optimizer, an optional extra, and a rate to start from: first-order rules that one evaluation of the
gradient is enough for, without modes or hooks. Their blocks are checked against its signatures once one is chosen."""

Arguments = dict[str, Any]


class Block(Strict):
    """Arguments of one class of torch.optim by torch's names; one that is left out has torch's default."""

    lr: Rate

    def given(self) -> dict[str, Any]:
        """Return the arguments that params.yaml gives, plain values."""
        return self.model_dump(exclude_unset=True)


class SGDConfig(Block):
    """``optimizer.SGD``: arguments of torch.optim.SGD."""

    momentum: Fraction = 0.0
    dampening: Fraction = 0.0
    nesterov: bool = False
    weight_decay: Decay = 0.0

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: found true with momentum 0, allowed: momentum > 0, or nesterov: false")
        if self.nesterov and self.dampening:
            raise ValueError(
                f"nesterov: found true with dampening {self.dampening:g}, allowed: dampening 0, or nesterov: false"
            )
        return self


class AdagradConfig(Block):
    """``optimizer.Adagrad``: arguments of torch.optim.Adagrad."""

    lr_decay: Decay = 0.0
    weight_decay: Decay = 0.0
    initial_accumulator_value: Decay = 0.0
    eps: Positive = 1e-10


class RMSpropConfig(Block):
    """``optimizer.RMSprop``: arguments of torch.optim.RMSprop."""

    alpha: Fraction = 0.99
    eps: Positive = 1e-8
    weight_decay: Decay = 0.0
    momentum: Fraction = 0.0
    centered: bool = False


class AdadeltaConfig(Block):
    """``optimizer.Adadelta``: arguments of torch.optim.Adadelta."""

    rho: Fraction = 0.9
    eps: Positive = 1e-6
    weight_decay: Decay = 0.0


class AdamaxConfig(Block):
    """``optimizer.Adamax``: arguments of torch.optim.Adamax."""

    betas: Betas = [0.9, 0.999]
    eps: Positive = 1e-8
    weight_decay: Decay = 0.0


class AdamWConfig(AdamaxConfig):
    """``optimizer.AdamW``: arguments of torch.optim.AdamW."""

    weight_decay: Decay = 0.01
    amsgrad: bool = False


class AdamConfig(AdamaxConfig):
    """``optimizer.Adam``: arguments of torch.optim.Adam."""

    amsgrad: bool = False
    decoupled_weight_decay: bool = False


class NAdamConfig(AdamaxConfig):
    """``optimizer.NAdam``: arguments of torch.optim.NAdam."""

    momentum_decay: Decay = 0.004
    decoupled_weight_decay: bool = False


class RAdamConfig(AdamaxConfig):
    """``optimizer.RAdam``: arguments of torch.optim.RAdam."""

    decoupled_weight_decay: bool = False


class ASGDConfig(Block):
    """``optimizer.ASGD``: arguments of torch.optim.ASGD."""

    lambd: Decay = 1e-4
    alpha: Positive = 0.75
    t0: Decay = 1e6
    weight_decay: Decay = 0.0


class RpropConfig(Block):
    """``optimizer.Rprop``: arguments of torch.optim.Rprop."""

    etas: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [0.5, 1.2]
    step_sizes: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [1e-6, 50]

    @model_validator(mode="after")
    def _one_shrinks_and_one_grows(self) -> RpropConfig:
        if not self.etas[0] < 1 < self.etas[1]:
            raise ValueError(f"etas: found {self.etas}, allowed: a factor below 1 and one above 1, e.g. [0.5, 1.2]")
        if not self.step_sizes[0] < self.step_sizes[1]:
            raise ValueError(
                f"step_sizes: found {self.step_sizes}, allowed: the smallest, then the largest, e.g. [1.0e-6, 0.1]"
            )
        return self


class AdafactorConfig(Block):
    """``optimizer.Adafactor``: arguments of torch.optim.Adafactor."""

    beta2_decay: Annotated[float, Field(le=0)] = -0.8
    eps: Annotated[list[Positive | None], Field(min_length=2, max_length=2)] = [None, 1e-3]
    d: Annotated[float, Field(ge=1)] = 1.0
    weight_decay: Decay = 0.0

    @model_validator(mode="after")
    def _the_second_is_a_number(self) -> AdafactorConfig:
        if self.eps[1] is None:
            raise ValueError(
                f"eps: found {self.eps}, allowed: null or a number, then a number > 0, e.g. [null, 1.0e-3]"
            )
        return self


class LBFGSConfig(Block):
    """``optimizer.LBFGS``: arguments of torch.optim.LBFGS."""

    max_iter: Annotated[int, Field(ge=1)] = 20
    max_eval: Annotated[int, Field(ge=1)] | None = None
    tolerance_grad: Decay = 1e-7
    tolerance_change: Decay = 1e-9
    history_size: Annotated[int, Field(ge=1)] = 100
    line_search_fn: Literal["strong_wolfe"] | None = None


class RestConfig(AdamWConfig):
    """``optimizer.Muon.rest``: arguments of torch.optim.AdamW for all but hidden weights."""

    lr: Positive


class MuonConfig(Block):
    """``optimizer.Muon``: arguments of torch.optim.Muon for hidden weights, and of AdamW for all else (``rest``)."""

    weight_decay: Decay = 0.1
    momentum: Fraction = 0.95
    nesterov: bool = True
    ns_coefficients: Annotated[list[float], Field(min_length=3, max_length=3)] = [3.4445, -4.775, 2.0315]
    eps: Positive = 1e-7
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None
    rest: RestConfig


class SAMConfig(Strict):
    """``optimizer.sam``: sharpness-aware minimisation around the chosen rule; ``rho`` 0 for off."""

    rho: Annotated[float, Field(ge=0)]
    adaptive: bool


class LRFactorsConfig(Strict):
    """``optimizer.lr_factors``: factors of the rate by place in the network; 1 for none."""

    first: Positive
    head: Positive
    layer_decay: Annotated[float, Field(gt=0, le=1)]


class OptimizerConfig(Strict):
    """Section ``optimizer``: the rule, and one block of arguments for each choice."""

    name: Literal[
        "SGD",
        "Adagrad",
        "RMSprop",
        "Adadelta",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "ASGD",
        "Rprop",
        "Adafactor",
        "LBFGS",
        "Muon",
        "LARS",
        "LAMB",
        "Lion",
        "ADOPT",
        "AdaBelief",
        "AdaBound",
        "Adan",
        "AdEMAMix",
        "LaProp",
        "MADGRAD",
        "NovoGrad",
        "Prodigy",
        "QHAdam",
        "Ranger",
        "SGDW",
        "SignSGD",
        "StableAdamW",
        "Tiger",
        "Yogi",
    ]
    decay_exempt: list[Literal["bias", "norm", "scale"]]
    lr_factors: LRFactorsConfig
    sam: SAMConfig
    SGD: SGDConfig
    Adagrad: AdagradConfig
    RMSprop: RMSpropConfig
    Adadelta: AdadeltaConfig
    Adam: AdamConfig
    AdamW: AdamWConfig
    Adamax: AdamaxConfig
    NAdam: NAdamConfig
    RAdam: RAdamConfig
    ASGD: ASGDConfig
    Rprop: RpropConfig
    Adafactor: AdafactorConfig
    LBFGS: LBFGSConfig
    Muon: MuonConfig
    LARS: Arguments
    LAMB: Arguments
    Lion: Arguments
    ADOPT: Arguments | None = None
    AdaBelief: Arguments | None = None
    AdaBound: Arguments | None = None
    Adan: Arguments | None = None
    AdEMAMix: Arguments | None = None
    LaProp: Arguments | None = None
    MADGRAD: Arguments | None = None
    NovoGrad: Arguments | None = None
    Prodigy: Arguments | None = None
    QHAdam: Arguments | None = None
    Ranger: Arguments | None = None
    SGDW: Arguments | None = None
    SignSGD: Arguments | None = None
    StableAdamW: Arguments | None = None
    Tiger: Arguments | None = None
    Yogi: Arguments | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the chosen block as params.yaml gives them, plain values; ``lr`` is among them."""
        block = getattr(self, self.name)
        return block.given() if isinstance(block, Block) else dict(block)

    @property
    def has_momentum(self) -> bool:
        """Whether the chosen rule has a momentum that a schedule can cycle."""
        block = getattr(self, self.name)
        values = block.model_dump() if isinstance(block, Block) else dict(block)
        return bool(values.get("momentum") or (values.get("betas") or [0])[0])

    @model_validator(mode="after")
    def _a_rate_in_every_block(self) -> OptimizerConfig:
        for name, start in EXTRA.items():
            block = getattr(self, name)
            if block is None:
                if self.name == name:
                    raise ValueError(
                        f"{name}: missing, but optimizer.name is {name}, allowed: a block of its arguments with at least "
                        f"lr; write {name}: {{lr: {start:g}}}"
                    )
                continue
            rate = block.get("lr")
            if rate is None:
                raise ValueError(f"{name}.lr: missing{nearest('lr', block)}; write {name}: {{lr: {start:g}, ...}}")
            if rate != "auto" and (isinstance(rate, bool) or not isinstance(rate, int | float) or rate <= 0):
                raise ValueError(f"{name}.lr: found {rate}, allowed: a number > 0 | auto")
        return self


NO_RATE = {
    "LBFGS": "whose line search finds the length of every step",
    "Rprop": "which grows and shrinks each step by itself and reads lr once",
    "Prodigy": "which estimates its rate by itself and only multiplies it by lr",
    "AdaBound": "whose bound on the rate the test would move with it",
    "Muon": "which has a second rate, Muon.rest.lr, that one curve cannot tell from the first",
}
"""Optimizers whose ``lr`` a range test says nothing about, and why."""

OWN_STEPS = ("LBFGS", "Rprop", "Prodigy")
"""Of these, those whose ``lr`` is not the length of a step."""


def schedule_for(name: str, schedule: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section ``schedule`` as an optimizer follows it: Rprop, which reads its rate once, follows none.

    >>> schedule_for("Rprop", {"name": "cosine", "warmup": {"length": 0.1, "start": 0.01}})
    {'name': 'constant', 'warmup': {'length': 0.0, 'start': 0.01}}
    """
    if name != "Rprop":
        return dict(schedule)
    return {**schedule, "name": "constant", "warmup": {**schedule["warmup"], "length": 0.0}}


def conflicts(
    name: str,
    *,
    arguments: Mapping[str, Any],
    lr_factors: Mapping[str, float],
    sam_rho: float,
    size: int,
    microbatch: int,
    grows: bool,
    precision: str,
    gradient_clip: float | None,
) -> list[str]:
    """Say which settings an optimizer cannot work with, one line each; an empty list where all do.

    Parameters
    ----------
    name, arguments, lr_factors
        ``optimizer.name``, the block of that name, and ``optimizer.lr_factors``.
    sam_rho
        ``optimizer.sam.rho``; 0 is off.
    size, microbatch, grows
        Of the batch, and whether ``batch.growth`` enlarges it.
    precision
        ``trainer.precision``.
    gradient_clip
        ``regularization.gradient_clip``.

    Examples
    --------
    >>> for fault in conflicts("Rprop", arguments={"lr": "auto"}, lr_factors={"first": 1.0}, sam_rho=0.0, size=32,
    ...                        microbatch=32, grows=False, precision="32-true", gradient_clip=None):
    ...     print(fault)
    optimizer.Rprop.lr: found auto with Rprop, which grows and shrinks each step by itself and reads lr once, allowed: a number
    """
    faults: list[str] = []
    if name in NO_RATE and arguments.get("lr") == "auto":
        faults.append(f"optimizer.{name}.lr: found auto with {name}, {NO_RATE[name]}, allowed: a number")
    if name == "Prodigy" and any(factor != 1 for factor in lr_factors.values()):
        faults.append(
            "optimizer.lr_factors: found factors with Prodigy, which takes the first group's rate for all, "
            "allowed: 1 for each, or another optimizer"
        )
    if name == "LBFGS":
        if sam_rho:
            faults.append(
                f"optimizer.sam.rho: found {sam_rho:g} with LBFGS, whose line search needs the gradient where the weights "
                f"are and not where the loss is highest nearby, allowed: 0, or another optimizer"
            )
        if any(factor != 1 for factor in lr_factors.values()):
            faults.append(
                "optimizer.lr_factors: found factors with LBFGS, which takes all parameters as one vector, "
                "allowed: 1 for each, or another optimizer"
            )
        if gradient_clip is not None:
            faults.append(
                f"regularization.gradient_clip: found {gradient_clip:g} with LBFGS, which learns the curvature from "
                f"differences of true gradients, allowed: null, or another optimizer"
            )
    if name != "LBFGS" and not sam_rho:
        return faults
    who = "optimizer.name LBFGS" if name == "LBFGS" else f"optimizer.sam.rho {sam_rho:g}"
    why = f"with {who}, which evaluates a batch more than once before it steps"
    if microbatch != size:
        faults.append(
            f"batch.microbatch: found {microbatch} {why} and so needs it in one piece, allowed: batch.size ({size})"
        )
    if grows:
        faults.append(
            f"batch.growth.at: found a batch that grows beyond its microbatch {why} and so needs it in one piece, allowed: []"
        )
    if precision == "16-mixed":
        faults.append(
            f"trainer.precision: found 16-mixed {why}, while loss scaling allows one evaluation, "
            f"allowed: 32-true | bf16-mixed"
        )
    return faults
