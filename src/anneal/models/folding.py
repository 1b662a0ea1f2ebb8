"""Batch normalisation folded into the weights before it: fewer passes over memory when evaluating, the same logits."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anneal.models.norms import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    SyncedBatchNorm1d,
    SyncedBatchNorm2d,
)

FOLDING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers that take a scale and a shift in; subclasses may compute anything, and do not."""

FOLDED = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    SyncedBatchNorm1d,
    SyncedBatchNorm2d,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
)
"""Norms that are a scale and a shift when evaluating; subclasses may compute anything, and are left."""

TOLERANCE = 1e-4
"""Largest difference of the outputs, over their largest value, with which a folded network passes for the same."""


def fold(network: nn.Module, example: torch.Tensor) -> nn.Module:
    """Return a copy of a network with batch norm layers folded into the convolution or linear layer before them.

    With the layer's weight W and bias b, and the norm's scale g, shift h and running statistics m and v::

        g (W x + b - m) / sqrt(v + eps) + h = s W x + s (b - m) + h,   s = g / sqrt(v + eps)

    (Jacob et al. 2018, section 3.2). s is computed in float64. A norm is folded where all that goes into it, and nothing
    else, comes from one such layer; every other stays, and so does the rest of the network: its class, the names of its
    modules, memory formats. An identity stands where a folded norm was.

    Parameters
    ----------
    network
        In evaluation mode. One that torch.fx cannot trace, or whose outputs would change, is returned as it is.
    example
        What the network takes, any number of samples, to see that outputs stay.

    Examples
    --------
    >>> network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.ReLU()).eval()
    >>> fold(network, torch.zeros(1, 2))
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True)
      (1): Identity()
      (2): ReLU()
    )
    """
    pairs = foldable(network)
    if not pairs:
        return network
    folded = copy.deepcopy(network)
    for layer, norm in pairs:
        folded.set_submodule(layer, folded_layer(folded.get_submodule(layer), folded.get_submodule(norm)))
        folded.set_submodule(norm, nn.Identity())
    with torch.no_grad():
        before, after = network(example), folded(example)
    # A linear layer's output may have more dimensions than two, and its norm then other channels.
    same = before.shape == after.shape and bool((before - after).abs().max() <= TOLERANCE * before.abs().max())
    return folded if same else network


def foldable(network: nn.Module) -> list[tuple[str, str]]:
    """Return the paths of each layer and of the norm that can be folded into it; nothing where tracing fails.

    >>> foldable(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2)).eval())
    [('0', '1')]
    """
    batch_norms = {name: m for name, m in network.named_modules() if isinstance(m, _BatchNorm)}
    norms = {name for name, m in batch_norms.items() if type(m) in FOLDED and m.running_mean is not None}
    if not norms or any(module.training for module in network.modules()):
        return []
    try:
        nodes = list(_Tracer().trace(network).nodes)
    except Exception:  # whatever another's forward pass raises when it is given no numbers
        return []
    modules = dict(network.named_modules())
    aliases = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
    calls = Counter(str(node.target) for node in nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}

    def is_plain(name: str) -> bool:
        module = modules[name]
        hooks = module._forward_hooks or module._forward_pre_hooks
        return calls[name] == 1 and aliases[id(module)] == 1 and name not in read and not hooks

    found = []
    for node in nodes:
        if node.op != "call_module" or node.target not in norms or len(node.args) != 1 or node.kwargs:
            continue
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        layer, norm = str(before.target), str(node.target)
        if type(modules[layer]) in FOLDING and is_plain(layer) and is_plain(norm):
            found.append((layer, norm))
    return found


def folded_layer(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Return a copy of a convolution or linear layer that does the work of the batch norm layer after it too."""
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, torch.Tensor) and not layer.training
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -scale * norm.running_mean.double()
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    if isinstance(bias, torch.Tensor):
        shift = shift + scale * bias.detach().double()
    merged = copy.deepcopy(layer)
    by_unit = scale.view(-1, *[1] * (weight.ndim - 1))
    # Elementwise, which keeps the memory format.
    merged.weight = nn.Parameter((weight.detach().double() * by_unit).to(weight.dtype), requires_grad=False)
    merged.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
    return merged


class _Tracer(fx.Tracer):
    """Follows a network down to torch's layers and every batch norm layer."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)
