"""What happens to gradients between the backward pass and the optimizer's step, and to weights right after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from anneal.optimizers.groups import weight_layers
from anneal.seeding import seed_for

UNITS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight holds one unit's incoming weights in each slice of its first dimension."""

SMALLEST_NORM = 1e-3
"""Of a unit's weights in `clip_adaptive`, so that units that start at zero can leave it; the paper's."""

AT_THE_BOUND = 0.999
"""Share of ``max_norm`` from which on a unit counts as held by it."""


def clip_value_(gradients: Sequence[torch.Tensor], most: float) -> torch.Tensor:
    """Cut every entry of the gradients to [-most, most], in place; return whether any was outside, a scalar of 0 or 1.

    >>> gradients = [torch.tensor([0.5, -3.0]), torch.tensor([2.0])]
    >>> clip_value_(gradients, 1.0).item(), gradients
    (1.0, [tensor([ 0.5000, -1.0000]), tensor([1.])])
    """
    largest = nn.utils.get_total_norm(gradients, norm_type=torch.inf)
    torch._foreach_clamp_min_(list(gradients), -most)
    torch._foreach_clamp_max_(list(gradients), most)
    return (largest > most).to(torch.float32)


def clip_adaptive_(
    weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], most: float, smallest: float = SMALLEST_NORM
) -> torch.Tensor:
    """Scale the gradient of each unit, in place, to at most ``most`` times the norm of its weights (Brock et al. 2021).

    A unit is a slice of the first dimension, a row of a matrix or a filter; a vector or scalar is one unit as a whole::

        g_i <- g_i min(1, most max(norm(w_i), smallest) / norm(g_i))

    Parameters
    ----------
    weights, gradients
        In pairs of the same shape.
    most
        Largest ratio, > 0; the paper's is 0.01 to 0.08.
    smallest
        What a norm of weights counts at least as.

    Returns
    -------
    torch.Tensor
        Share of the units that were scaled, a scalar; 0 where there are none.

    Examples
    --------
    >>> gradient = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
    >>> clip_adaptive_([torch.tensor([[0.0, 2.0], [2.0, 0.0]])], [gradient], 0.5).item(), gradient
    (0.5, tensor([[0.6000, 0.8000],
            [0.0000, 0.5000]]))
    """
    found = []
    for weight, gradient in zip(weights, gradients, strict=True):
        norm, bound = _unit_norms(gradient), _unit_norms(weight.detach()).clamp_min(smallest) * most
        # No step where the gradient vanishes, and none that divides by zero.
        gradient.mul_((bound / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0))
        found.append((norm > bound).flatten())
    return torch.cat(found).to(torch.float32).mean() if found else torch.zeros(())


def _unit_norms(tensor: torch.Tensor) -> torch.Tensor:
    dims = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=dims is not None)


def head_parameters(network: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of the last layer that has a weight of two or more dimensions: the classifier's."""
    weights = weight_layers(network)[-1:]
    for module in network.modules():
        own = set(module.parameters(recurse=False))
        if own.issuperset(weights) and weights:
            return own
    return set()


def noise_std(step: int, *, std: float, decay: float) -> float:
    """Return ``std / (1 + step)^(decay / 2)``, so that the variance falls by the power ``decay`` (Neelakantan et al. 2015).

    >>> noise_std(0, std=0.1, decay=0.55), round(noise_std(3, std=0.1, decay=1.0), 12)
    (0.1, 0.05)
    """
    return float(std / (1 + step) ** (decay / 2))


def add_noise_(named: Iterable[tuple[str, nn.Parameter]], *, seed: int, step: int, std: float, decay: float) -> None:
    """Add Gaussian noise to the gradients, in place, drawn from (seed, "gradient_noise", step, name of the parameter).

    So every process adds the same, and one that resumes draws what it would have drawn.

    Parameters
    ----------
    named
        Parameters with their names; those without a gradient are left alone.
    seed
        Of the recipe or the member.
    step
        Optimizer steps made so far.
    std, decay
        As for `noise_std`.
    """
    size = noise_std(step, std=std, decay=decay)
    for name, parameter in named:
        gradient = parameter.grad
        if gradient is not None:
            key = seed_for(seed, "gradient_noise", step, name)
            # Contiguous whatever the gradient's memory format: the n-th draw is the n-th entry's.
            noise = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
            noise.normal_(generator=torch.Generator(gradient.device).manual_seed(key))
            gradient.add_(noise, alpha=size)


def unit_weights(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all linear and convolutional layers, the classifier's among them, in module order."""
    units = [module for module in network.modules() if isinstance(module, UNITS)]
    return [weight for unit in units for name, weight in unit.named_parameters(recurse=False) if name == "weight"]


@torch.no_grad()
def limit_norms_(weights: Iterable[nn.Parameter], most: float) -> None:
    """Project each unit's incoming weights to a norm of at most ``most``, in place (Srivastava et al. 2014).

    Weights that are frozen stay as they are.

    >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    >>> limit_norms_([weight], 2.5), weight.detach()
    (None, tensor([[1.5000, 2.0000],
            [0.0000, 1.0000]]))
    """
    for weight in weights:
        if weight.requires_grad:
            weight.renorm_(2, 0, most)


@torch.no_grad()
def share_at_bound(weights: Sequence[nn.Parameter], most: float) -> float:
    """Return the share of all units whose norm is at `limit_norms_`'s bound; 0 where there are no units.

    >>> share_at_bound([nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))], 5.0)
    0.5
    """
    norms = [_unit_norms(weight).flatten() for weight in weights]
    return float((torch.cat(norms) >= AT_THE_BOUND * most).to(torch.float32).mean()) if norms else 0.0
