"""Initial weights: one draw a parameter, keyed by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from anneal.models.resnet import BasicBlock, PreactivationBlock
from anneal.params import UserError, nearest
from anneal.seeding import seed_for

GAINS: dict[str, float] = {
    "linear": 1.0,
    "ReLU": 1.4142135624,
    "LeakyReLU": 1.4141428570,
    "ELU": 1.2451983007,
    "GELU": 1.5335304412,
    "SiLU": 1.6765324703,
    "Mish": 1.4868475813,
    "Tanh": 1.5925374197,
    "Sigmoid": 1.8462285453,
}
"""``1 / sqrt(E f(z)^2)`` for z ~ N(0, 1): what keeps the signal's power through an activation f, sqrt(2) for ReLU."""


def kaiming_normal(weight: torch.Tensor, gain: float, generator: torch.Generator, *, mode: str) -> torch.Tensor:
    """Draw N(0, std^2) with ``std = gain / sqrt(fan)`` (He et al. 2015).

    Parameters
    ----------
    weight
        (out, in[, kernel height, kernel width]); only its shape is read.
    gain
        See `GAINS`.
    generator
        Source of the draw.
    mode
        ``fan_in`` (inputs x kernel area) keeps the power of the signal going forward, ``fan_out`` (outputs x kernel
        area) that of the gradient going back.

    Returns
    -------
    torch.Tensor
        float32, contiguous, of the shape of ``weight``.
    """
    fan = weight[0].numel() if mode == "fan_in" else weight.shape[0] * weight[0, 0].numel()
    return torch.empty(weight.shape).normal_(0.0, gain / math.sqrt(fan), generator=generator)


LAWS: dict[str, Callable[..., torch.Tensor]] = {"kaiming_normal": kaiming_normal}
"""``init.name`` to ``law(weight, gain, generator, **arguments)``."""


@torch.no_grad()
def initialize(
    network: nn.Module, name: str, arguments: Mapping[str, Any], *, zero_last: bool, activation: str, seed: int
) -> None:
    """Set every parameter of a network in place.

    Weights of convolutions and linear layers follow the law; that of the head, which no activation follows, has gain 1
    and fan_in, so that the first logits are of order 1. Biases are 0, scales of norm layers 1. Each weight is drawn from
    a generator of its own, keyed by (seed, its name): adding a layer leaves the draws of the others as they were.

    Parameters
    ----------
    network
        As `anneal.models.build.build_network` returns it, on the CPU.
    name, arguments
        A key of `LAWS`, and the law's arguments.
    zero_last
        Start each residual branch at zero, by the last layer in it: its norm's scale, or its convolution's weight where
        the branch ends in a convolution (Goyal et al. 2017; Zhang et al. 2019).
    activation
        A key of `GAINS`.
    seed
        Of the recipe or the member.

    Raises
    ------
    UserError
        No such law.
    """
    if name not in LAWS:
        raise UserError(f"init.name: found {name}, allowed: {' | '.join(LAWS)}{nearest(name, LAWS)}")
    for prefix, module in network.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if kind == "bias":
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                assert isinstance(module, nn.Conv2d | nn.Linear), f"no initial value for {prefix}.{kind}"
                generator = torch.Generator().manual_seed(seed_for(seed, "init", f"{prefix}.{kind}"))
                is_head = prefix == "head"
                settings = {**arguments, "mode": "fan_in"} if is_head and "mode" in arguments else arguments
                gain = GAINS["linear" if is_head else activation]
                # Drawn apart and copied: filling in place would depend on the parameter's memory format.
                parameter.copy_(LAWS[name](parameter, gain, generator, **settings))
    if zero_last:
        for module in network.modules():
            if isinstance(module, BasicBlock | PreactivationBlock):
                module.last.get_parameter("weight").zero_()
