"""From names and plain values to an optimizer, and which parameters it treats alike."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from anneal.params import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn


def parameter_groups(
    network: nn.Module, weight_decay: float, decay_exempt: Collection[str] = ("bias", "norm")
) -> list[dict[str, Any]]:
    """Split a network's parameters into those that weight decay acts on and those that it leaves alone.

    Parameters
    ----------
    network
        Frozen parameters are left out.
    weight_decay
        Decay of the first group; the second has 0.
    decay_exempt
        ``bias``: every parameter named bias; ``norm``: every parameter of a normalisation layer (its scale and its bias).

    Returns
    -------
    list of dict
        torch parameter groups, each with ``params`` and ``weight_decay`` and in the network's own order; an empty group
        is left out.
    """
    from torch import nn

    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            left_alone = ("bias" in decay_exempt and name == "bias") or (
                "norm" in decay_exempt and isinstance(module, norms)
            )
            (exempt if left_alone else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    network: nn.Module, name: str, arguments: Mapping[str, Any], decay_exempt: Collection[str] = ("bias", "norm")
) -> torch.optim.Optimizer:
    """Build an optimizer of ``torch.optim`` over `parameter_groups`.

    On a CPU the fused implementation is taken where torch has one: the same law in one pass over memory.

    Parameters
    ----------
    network
        On the device where it will be trained.
    name
        A class of ``torch.optim``.
    arguments
        Its arguments by torch's names, as plain values; ``weight_decay`` is that of the decayed group.
    decay_exempt
        As for `parameter_groups`.

    Raises
    ------
    UserError
        There is no such optimizer, or it has no such argument.
    """
    import torch

    names = [n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)]
    if name not in names or name == "Optimizer":
        raise UserError(f"optimizer.name: found {name}, allowed: a class of torch.optim{nearest(name, names)}")
    cls = getattr(torch.optim, name)
    known = inspect.signature(cls).parameters
    for argument in arguments:
        if argument not in known:
            raise UserError(f"optimizer.{name}.{argument}: unknown argument{nearest(argument, known)}")
    # Lists are what YAML and JSON have; torch wants a pair.
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    groups = parameter_groups(network, arguments.get("weight_decay", 0.0), decay_exempt)
    if "fused" in known and "fused" not in values and all(p.device.type == "cpu" for p in network.parameters()):
        values["fused"] = True
    return cls(groups, **values)
