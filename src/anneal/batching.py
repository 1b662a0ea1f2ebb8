"""Effective batch, microbatches and accumulation; which randomness belongs to which microbatch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from anneal.params import Strict


class BatchConfig(Strict):
    """Section ``batch``: samples an optimizer step (``size``) and a forward pass (``microbatch``)."""

    size: Annotated[int, Field(ge=1)]
    microbatch: Annotated[int, Field(ge=1)]
    lr_scaling: Literal["none", "linear", "sqrt"]
    reference_size: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _whole_accumulation(self) -> BatchConfig:
        if self.size % self.microbatch:
            divisors = [d for d in range(1, self.size + 1) if self.size % d == 0]
            best = min(divisors, key=lambda d: abs(d - self.microbatch))
            raise ValueError(
                f"microbatch: found {self.microbatch}, which does not divide size {self.size}, "
                f"allowed: a divisor of size, nearest {best}"
            )
        return self
