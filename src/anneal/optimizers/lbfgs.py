"""torch.optim.LBFGS for networks in channels_last memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class LBFGS(torch.optim.LBFGS):
    """The same, but for gradients in any memory format: torch's takes contiguous ones alone."""

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Step along a line search; ``closure`` clears and computes the gradients, and returns the loss."""

        def contiguous() -> Any:
            loss = closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad = parameter.grad.contiguous()
            return loss

        return super().step(contiguous)
