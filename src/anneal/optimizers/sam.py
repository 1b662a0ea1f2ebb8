"""Sharpness-aware minimisation around any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class SAM(torch.optim.Optimizer):
    """Step with the gradient at the point nearby where the loss is highest (Foret et al. 2021).

    ``e = rho g / |g|``, then ``base`` steps from ``w`` with the gradient at ``w + e``. With ``adaptive`` the neighbourhood
    scales with each weight (Kwon et al. 2021): ``e = rho w² g / | |w| g |``, all elementwise. Norms are over all parameters.

    Parameters
    ----------
    base
        Does the step. Its parameter groups and state are this optimizer's: rates set here act there.
    rho
        Radius of the neighbourhood, > 0; 0.05 is usual, with ``adaptive`` 0.5 to 2.
    adaptive
        See above.
    """

    def __init__(self, base: torch.optim.Optimizer, rho: float, adaptive: bool = False) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self.rho = rho
        self.adaptive = adaptive
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call ``closure`` twice, at the weights and at the point nearby, and step; return the first loss.

        Parameters
        ----------
        closure
            Clears the gradients, computes the loss and the gradients, and returns the loss, as for LBFGS.
        """
        assert closure is not None, "SAM evaluates the loss itself"
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # The weights come back from a copy: w + e - e is not w in floating point.
        copies = [p.clone() for p in parameters]
        try:
            self._climb(parameters)
            evaluate()
        finally:
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)
        self.base.step()
        return loss

    def _climb(self, parameters: list[torch.nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.adaptive:
            scales = [p.abs() for p in parameters]
            gradients = [g * scale for g, scale in zip(gradients, scales, strict=True)]
        length = self.rho / (torch.nn.utils.get_total_norm(gradients) + 1e-12)
        for i, parameter in enumerate(parameters):
            step = gradients[i] * length
            parameter.add_(step * scales[i] if self.adaptive else step)

    def state_dict(self) -> dict[str, Any]:
        """Return that of the base; SAM itself has no state."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the base."""
        self.base.load_state_dict(state_dict)
        self._share()
