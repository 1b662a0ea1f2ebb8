"""Where a number that is not finite comes from: the first layer of a network that makes one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn


class Skipped(Exception):
    """An optimizer step that is not made, and why; never leaves the module that raises it."""


def first_bad(rows: Sequence[Sequence[float]]) -> tuple[int, int] | None:
    """Return row and column of the number that is not finite, the first column's first; None where all are.

    >>> first_bad([[1.0, 2.0, math.inf], [1.0, math.nan, math.inf]]), first_bad([[0.0]])
    ((1, 1), None)
    """
    for column, values in enumerate(zip(*rows, strict=True)):
        for row, value in enumerate(values):
            if not math.isfinite(value):
                return row, column
    return None


def culprit(network: nn.Module, forward: Callable[[], torch.Tensor]) -> str:
    """Say what is not finite first: a weight, what a layer makes of finite inputs, the loss, or a gradient.

    Reads every weight, and each layer's inputs and outputs, so it is for a run that has gone wrong.

    Parameters
    ----------
    network
        With the gradients of its last backward pass.
    forward
        Returns the loss of the network; called once, unless a weight is at fault.

    Examples
    --------
    >>> network = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU(), nn.Linear(1, 1)))
    >>> culprit(network, lambda: network(torch.ones(2, 1)).sum() / 0)
    'the loss'
    >>> _ = nn.init.constant_(network[0].weight, 3e38)
    >>> culprit(network, lambda: network(torch.tensor([[10.0]])).sum())
    'the output of layer 0'
    >>> _ = nn.init.constant_(network[1][1].bias, math.nan)
    >>> culprit(network, lambda: network(torch.tensor([[1.0]])).sum())
    'the weight 1.1.bias'
    """
    for name, parameter in network.named_parameters():
        if not finite(parameter):
            return f"the weight {_short(name)}"
    watch = _Watch(network)
    try:
        with torch.no_grad():
            loss = forward()
    finally:
        watch.remove()
    if watch.found is not None:
        return f"the output of {watch.found}"
    if not finite(loss):
        return "the loss"
    # The backward pass meets the layers the other way round.
    ran = [*reversed(watch.ran), *(name for name, _ in network.named_modules() if name not in watch.ran)]
    layers = dict(network.named_modules())
    gradients = [
        (f"{layer}.{name}" if layer else name, parameter.grad)
        for layer in dict.fromkeys(ran)
        for name, parameter in layers[layer].named_parameters(recurse=False)
        if parameter.grad is not None
    ]
    for name, gradient in gradients:
        if not finite(gradient):
            return f"the gradient of {_short(name)}"
    if not gradients:
        return "no layer"
    largest = max(gradients, key=lambda pair: float(pair[1].abs().max()))
    return f"no entry; the largest are in the gradient of {_short(largest[0])}"


class _Watch:
    """Hooks on every module, which note the order they ran in and the first that made what is not finite."""

    def __init__(self, network: nn.Module) -> None:
        self.found: str | None = None
        self.ran: list[str] = []
        self.inputs: list[bool] = []
        self.hooks: list[Any] = []
        for name, module in network.named_modules():
            self.hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(self._leaver(name)))

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        # Asked before the layer runs, which may work in place.
        self.inputs.append(all(finite(value) for value in tensors_in((args, kwargs))))

    def _leaver(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            good = self.inputs.pop()
            self.ran.append(name)
            if self.found is None and good and not all(finite(value) for value in tensors_in(output)):
                short = _short(name)
                self.found = f"layer {short}" if short else "the network"

        return leave

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def finite(tensor: torch.Tensor) -> bool:
    """Say whether all elements are finite."""
    return bool(torch.isfinite(tensor).all())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists, tuples and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _short(name: str) -> str:
    """Return a path as layers.csv has it: within the network, behind the first layer that normalises the images.

    >>> _short("network.stem.conv"), _short("network"), _short("normalization")
    ('stem.conv', '', 'normalization')
    """
    return "" if name == "network" else name.removeprefix("network.")
