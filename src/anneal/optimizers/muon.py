"""Muon for hidden weights and AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def as_matrix(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a weight (out, ...) as a matrix (out, columns), its columns in the order in which ``like`` has them in memory.

    A view of ``like`` itself, in channels_last memory too; the order of columns does not matter to what is orthogonal.

    >>> weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    >>> matrix = as_matrix(weight, weight)
    >>> matrix.shape, matrix.data_ptr() == weight.data_ptr()
    (torch.Size([8, 36]), True)
    """
    if not like.is_contiguous():
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(len(tensor), -1)


def orthogonalize(
    matrix: torch.Tensor, *, coefficients: Sequence[float], steps: int, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return nearly ``U V^T`` for a matrix ``U S V^T``, by a Newton-Schulz iteration of fifth order (Jordan et al. 2024).

    Parameters
    ----------
    matrix
        Floating point (rows, columns).
    coefficients
        (a, b, c) of ``x <- a x + b x³ + c x⁵`` on the singular values; torch's bring any of them to 0.7..1.2 in 5 steps.
    steps
        Of the iteration.
    eps
        Smallest norm to divide by.
    dtype
        To compute in.

    Returns
    -------
    torch.Tensor
        ``dtype`` (rows, columns).
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = (matrix.T if tall else matrix).to(dtype, copy=True)
    x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


SCALES = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
"""``adjust_lr_fn`` to the factor of the rate for a matrix (Jordan et al. 2024; Liu et al. 2025)."""


class MuonWithAdamW(torch.optim.Optimizer):
    """The law of torch.optim.Muon on filter banks and matrices, torch.optim.AdamW on all else.

    torch's Muon takes matrices alone; here a filter bank (out, in, height, width) is one of ``in x height x width``
    columns. The iteration runs in bfloat16 on a GPU, as torch's does, and in float32 on a CPU, most of which have no
    arithmetic for bfloat16. ``param_groups`` are those of both, each with its own rate; their rates and state are saved
    and loaded as one.

    Parameters
    ----------
    hidden
        Parameter groups of weights with two or more dimensions.
    rest
        Has the groups and rates of all other parameters.
    lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn
        As for torch.optim.Muon.
    """

    def __init__(
        self,
        hidden: list[dict[str, Any]],
        rest: torch.optim.AdamW,
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__([{**defaults, **group} for group in hidden] + rest.param_groups, {})
        self.num_hidden = len(hidden)
        self.rest = rest
        self._share()

    def _share(self) -> None:
        self.rest.param_groups = self.param_groups[self.num_hidden :]
        self.rest.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step; return the closure's loss where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups[: self.num_hidden]:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        self.rest.step()
        return loss

    def _step(self, parameter: torch.nn.Parameter, group: Mapping[str, Any]) -> None:
        assert parameter.grad is not None
        weight = as_matrix(parameter, parameter)
        gradient = as_matrix(parameter.grad, parameter)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = as_matrix(state["momentum_buffer"], parameter)
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = orthogonalize(
            gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer,
            coefficients=group["ns_coefficients"],
            steps=group["ns_steps"],
            eps=group["eps"],
            dtype=torch.bfloat16
            if parameter.device.type == "cuda"
            else torch.promote_types(parameter.dtype, torch.float32),
        )
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * SCALES[group["adjust_lr_fn"] or "original"](*weight.shape))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()
