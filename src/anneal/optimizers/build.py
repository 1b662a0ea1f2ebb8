"""From names and plain values to an optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from anneal.optimizers.config import EXTRA
from anneal.optimizers.groups import parameter_groups, weight_layers
from anneal.optimizers.lbfgs import LBFGS
from anneal.optimizers.muon import MuonWithAdamW
from anneal.optimizers.sam import SAM
from anneal.params import UserError, nearest

IMPLEMENTATION = ("params", "foreach", "fused", "capturable", "differentiable", "maximize", "kwargs")
"""Arguments that say how or of what, and not by which law: not the user's."""

CLASSES = {"LAMB": "Lamb"}
"""Names that pytorch_optimizer spells another way."""


def class_of(name: str) -> type[torch.optim.Optimizer]:
    """Return the class of torch.optim, or of pytorch_optimizer for the names of `EXTRA`.

    Raises
    ------
    UserError
        There is no such optimizer, or pytorch_optimizer is not installed.
    """
    if name in EXTRA:
        try:
            import pytorch_optimizer
        except ImportError:
            raise UserError(
                f"optimizer.name: found {name}, which is in pytorch_optimizer, an optional extra that is not installed; "
                f"run pip install 'anneal[optimizers]', or make setup, or choose a class of torch.optim"
            ) from None
        cls: type[torch.optim.Optimizer] = getattr(pytorch_optimizer, CLASSES.get(name, name))
        return cls
    names = dense_optimizers()
    if name not in names:
        allowed = "a class of torch.optim that takes dense parameters, or one of pytorch_optimizer"
        raise UserError(f"optimizer.name: found {name}, allowed: {allowed}{nearest(name, [*names, *EXTRA])}")
    return names[name]


def dense_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Return all classes of torch.optim that take dense parameters, by name."""
    base = torch.optim.Optimizer
    found = {name: cls for name, cls in vars(torch.optim).items() if inspect.isclass(cls) and issubclass(cls, base)}
    return {name: cls for name, cls in found.items() if name not in ("Optimizer", "SparseAdam")}


def law(cls: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """Return the arguments of an optimizer that make its law, with their defaults."""
    known = inspect.signature(cls).parameters
    return {name: parameter.default for name, parameter in known.items() if name not in IMPLEMENTATION}


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Check a block of arguments against the signature of its class, and its values by building it.

    Parameters
    ----------
    name
        ``optimizer.name``.
    arguments
        The block of that name, plain values; ``lr`` may be ``auto``.

    Raises
    ------
    UserError
        There is no such optimizer, or its library is not installed; it has no such argument, or refuses a value.
    """
    cls = class_of(name)
    blocks = [(f"optimizer.{name}", cls, arguments)]
    if name == "Muon":
        rest = arguments.get("rest")
        if not isinstance(rest, Mapping):
            raise UserError("optimizer.Muon.rest: missing, allowed: the arguments of AdamW for all but hidden weights")
        blocks = [
            ("optimizer.Muon", cls, {key: value for key, value in arguments.items() if key != "rest"}),
            ("optimizer.Muon.rest", torch.optim.AdamW, rest),
        ]
    for key, block_class, block in blocks:
        known = law(block_class)
        for argument in block:
            if argument not in known:
                raise UserError(f"{key}.{argument}: unknown argument{nearest(argument, known)}")
        values = _values(block)
        if values.get("lr") == "auto":
            values["lr"] = 1.0
        build: Callable[..., Any] = block_class
        # pytorch_optimizer has exceptions of its own, with no base in common.
        try:
            build([nn.Parameter(torch.ones(2, 2))], **values)
        except Exception as error:
            reason = " ".join(str(error).split())
            for argument in [name for name in values if name != "lr"]:
                try:
                    build([nn.Parameter(torch.ones(2, 2))], **{k: v for k, v in values.items() if k != argument})
                except Exception:
                    continue
                default = known[argument]
                raise UserError(
                    f"{key}.{argument}: found {block[argument]}, the default is {default}; {reason}"
                ) from None
            raise UserError(f"{key}: {reason}") from None


def _values(arguments: Mapping[str, Any]) -> dict[str, Any]:
    # Lists are what YAML and JSON have; torch wants tuples.
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def build_optimizer(
    network: nn.Module,
    name: str,
    arguments: Mapping[str, Any],
    decay_exempt: Collection[str] = ("bias", "norm", "scale"),
    lr_factors: Mapping[str, float] | None = None,
    sam: Mapping[str, Any] | None = None,
    staged: bool = False,
) -> torch.optim.Optimizer:
    """Build an optimizer over `parameter_groups`, in torch's fastest implementation of its law on the network's device.

    Parameters
    ----------
    network
        On the device where it will be trained.
    name
        A class of ``torch.optim`` that takes dense parameters, or a name of `EXTRA`. Muon is `MuonWithAdamW`: hidden
        weights, those of all layers but the first and the last, and AdamW for the rest.
    arguments
        Its arguments by the library's names, as plain values; ``weight_decay`` is that of the decayed parameters.
    decay_exempt
        As for `parameter_groups`.
    lr_factors
        ``first``, ``head`` and ``layer_decay`` of `rate_factors`; None is 1 for each.
    sam
        ``rho`` and ``adaptive`` of `SAM`; None or a rho of 0 is off.
    staged
        Some parameters get their first gradient later than others.

    Raises
    ------
    UserError
        There is no such optimizer, or it has no such argument; LBFGS with factors or SAM, Muon without hidden weights.
    """
    check_arguments(name, arguments)
    factors = dict(lr_factors or {})
    rho = (sam or {}).get("rho", 0.0)
    if name == "LBFGS":
        if rho or any(factor != 1 for factor in factors.values()):
            raise UserError("optimizer.name: found LBFGS, which goes neither with sam nor with lr_factors")
        return LBFGS([p for p in network.parameters() if p.requires_grad], **_values(arguments))
    optimizer: torch.optim.Optimizer
    if name == "Muon":
        optimizer = _muon(network, arguments, decay_exempt, factors)
    else:
        optimizer = _over_groups(network, class_of(name), arguments, decay_exempt, factors, staged=staged)
    return SAM(optimizer, **sam) if sam is not None and rho else optimizer


def _over_groups(
    network: nn.Module,
    cls: type[torch.optim.Optimizer],
    arguments: Mapping[str, Any],
    decay_exempt: Collection[str],
    factors: Mapping[str, float],
    only: Collection[nn.Parameter] | None = None,
    *,
    staged: bool = False,
) -> torch.optim.Optimizer:
    values = {**law(cls), **_values(arguments)}
    groups = parameter_groups(
        network,
        lr=values["lr"],
        weight_decay=values.get("weight_decay"),
        decay_exempt=decay_exempt,
        only=only,
        **factors,
    )
    build: Callable[..., torch.optim.Optimizer] = cls
    # torch's fused SGD makes the momentum of all parameters of a group at once, or of none.
    fastest = {} if staged and cls is torch.optim.SGD else _implementation(network, cls, values)
    optimizer = build(groups, **_values(arguments), **fastest)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # Else 16-bit training would leave unscaling to the fused step, and clipping would see scaled gradients.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _implementation(network: nn.Module, cls: type[torch.optim.Optimizer], values: Mapping[str, Any]) -> dict[str, bool]:
    """Return which of torch's implementations of one law to take: ``fused``, ``foreach`` or, if empty, torch's choice.

    bench/optimizers.py has the ratios. Fused is one pass over memory: on a CPU 1.2 to 2.2 times as fast as one operation
    after another for Adagrad, Adam, AdamW and SGD with momentum (without momentum that is a single operation, and fused is
    four times slower), on CUDA one launch for all parameters. Else torch takes foreach on CUDA, as one wants, and plain
    loops on a CPU, where foreach is worth it for RAdam (1.4 to 1.7) and slower for ASGD (0.7).
    """
    devices = {p.device.type for p in network.parameters()}
    if "fused" in inspect.signature(cls).parameters and devices in ({"cpu"}, {"cuda"}):
        return {"fused": True} if values.get("momentum") != 0 or devices == {"cuda"} else {}
    return {"foreach": True} if cls is torch.optim.RAdam and devices == {"cpu"} else {}


def _muon(
    network: nn.Module, arguments: Mapping[str, Any], decay_exempt: Collection[str], factors: Mapping[str, float]
) -> MuonWithAdamW:
    values = {**law(torch.optim.Muon), **_values(arguments)}
    rest_arguments = values.pop("rest")
    hidden = [weight for weight in weight_layers(network)[1:-1] if weight.requires_grad]
    if not hidden:
        raise UserError(
            "optimizer.name: found Muon, which is for the weights between the first layer and the head, and this network "
            "has none, allowed: AdamW, or a deeper network"
        )
    groups = parameter_groups(
        network, lr=values["lr"], weight_decay=values["weight_decay"], decay_exempt=(), only=hidden, **factors
    )
    taken = {id(weight) for weight in hidden}
    others = [p for p in network.parameters() if id(p) not in taken]
    rest = _over_groups(network, torch.optim.AdamW, rest_arguments, decay_exempt, factors, others)
    assert isinstance(rest, torch.optim.AdamW)
    return MuonWithAdamW(groups, rest, **values)
