"""Which parameters an optimizer treats alike: by weight decay, and by the place of their layer in the network."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def parameter_groups(
    network: nn.Module,
    *,
    lr: float,
    weight_decay: float | None = None,
    decay_exempt: Collection[str] = ("bias", "norm", "scale"),
    first: float = 1.0,
    head: float = 1.0,
    layer_decay: float = 1.0,
    only: Collection[nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    """Split a network's parameters by weight decay and by factor of the rate.

    Parameters
    ----------
    network
        Frozen parameters are left out.
    lr
        Rate at factor 1.
    weight_decay
        Decay of all parameters but the exempt ones, which have 0; None where the optimizer has no such argument.
    decay_exempt
        ``bias``: every parameter named bias; ``norm``: every parameter of a normalisation layer (its scale and its
        bias); ``scale``: every other vector or scalar, such as the scale of a layer.
    first, head, layer_decay
        As for `rate_factors`.
    only
        Take these parameters alone; None takes all.

    Returns
    -------
    list of dict
        torch parameter groups, each with ``params`` in the network's own order, ``weight_decay`` unless that is None, and
        ``lr`` where its factor is not 1. Factors come in the order in which the network has them, the decayed group of a
        factor before the exempt one; an empty group is left out.
    """
    factors = rate_factors(network, first=first, head=head, layer_decay=layer_decay)
    chosen = None if only is None else {id(parameter) for parameter in only}
    groups: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or (chosen is not None and id(parameter) not in chosen):
                continue
            exempt = weight_decay is not None and not _kinds(module, name, parameter).isdisjoint(decay_exempt)
            groups.setdefault(factors[parameter], ([], []))[exempt].append(parameter)
    found: list[dict[str, Any]] = []
    for factor, parts in groups.items():
        for params, decay in zip(parts, (weight_decay, 0.0), strict=True):
            if params:
                group: dict[str, Any] = {"params": params}
                if decay is not None and weight_decay is not None:
                    group["weight_decay"] = decay
                if factor != 1:
                    group["lr"] = lr * factor
                found.append(group)
    return found


def _kinds(module: nn.Module, name: str, parameter: nn.Parameter) -> set[str]:
    """Return what a parameter is in the words of ``decay_exempt``; a norm layer's bias is two things."""
    kinds = {kind for kind, applies in (("bias", name == "bias"), ("norm", isinstance(module, NORMS))) if applies}
    return kinds or ({"scale"} if parameter.ndim < 2 else set())


def module_layers(network: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Yield each module with the number of its weight layer, in module order from 0: of its own weight or the one before."""
    layer = -1
    for module in network.modules():
        layer += _own_weight(module) is not None
        yield max(layer, 0), module


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, nn.Parameter) and weight.ndim >= 2 else None


def _layers(network: nn.Module) -> Iterator[tuple[int, bool, nn.Parameter]]:
    """Yield each parameter with the number of its weight layer, and whether it is that layer's weight."""
    for layer, module in module_layers(network):
        weight = _own_weight(module)
        for parameter in module.parameters(recurse=False):
            yield layer, parameter is weight, parameter


def parameter_layers(network: nn.Module) -> dict[nn.Parameter, int]:
    """Return the number of the weight layer of each parameter, from 0 for the first to the head's."""
    return {parameter: layer for layer, _, parameter in _layers(network)}


def weight_layers(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all layers that have a matrix or a filter bank, in module order: the first to the head."""
    return [parameter for _, is_weight, parameter in _layers(network) if is_weight]


def rate_factors(
    network: nn.Module, *, first: float = 1.0, head: float = 1.0, layer_decay: float = 1.0
) -> dict[nn.Parameter, float]:
    """Return the factor of the rate of each parameter, by the place of its layer.

    Layers are those with a weight of two or more dimensions, in module order; biases and norm layers belong to the one
    before them. Layer i of n has ``layer_decay ** (n - 1 - i)`` (Clark et al. 2020; Bao et al. 2022), times ``first`` for
    layer 0 and times ``head`` for layer n - 1.

    Parameters
    ----------
    network
        All its parameters are given a factor.
    first, head
        Of the first layer and of the classifier, > 0.
    layer_decay
        In (0, 1]; 1 is off.
    """
    last = max(0, len(weight_layers(network)) - 1)
    return {
        parameter: layer_decay ** (last - layer) * (first if layer == 0 else 1.0) * (head if layer == last else 1.0)
        for layer, _, parameter in _layers(network)
    }
