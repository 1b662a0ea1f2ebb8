"""What an epoch's last steps did to the weights: updates by layer, their direction, and the rates behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

if TYPE_CHECKING:
    from anneal.training.data import Batch
    from anneal.training.module import TrainingModule

SAMPLE = 2**17
"""Most parameters behind the quantiles of the effective rate."""

QUANTILES = {"rate/low": 0.05, "rate/median": 0.5, "rate/high": 0.95}


@dataclass(frozen=True)
class Layer:
    """A row of layers.csv: one layer at the last optimizer step of an epoch.

    Parameters
    ----------
    epoch
        From 1; 0 stands for the first step of the run, hence for the initial weights.
    layer
        Path of the module in the network.
    num_parameters
        Trainable values of its own, those of its submodules left out.
    weight_norm
        Of these values, all in one vector, before the step.
    grad_norm
        Of the gradient behind the step, before clipping; None where it was not finite, and of a frozen layer.
    update_ratio
        Norm of the update over `weight_norm`; None in epoch 0, where all weights were 0, and of a frozen layer.
    norm_gap, norm_variance_gap, small_scales
        Of a batch norm layer at the end of the epoch; see `anneal.training.norm_health.NormHealth`.
    """

    epoch: int
    layer: str
    num_parameters: int
    weight_norm: float
    grad_norm: float | None
    update_ratio: float | None
    norm_gap: float | None = None
    norm_variance_gap: float | None = None
    small_scales: float | None = None


# ---- the effective rate ---------------------------------------------------------------------------------------------

Values = Mapping[str, Any]


def _over(lr: float, root: torch.Tensor, eps: float) -> torch.Tensor:
    # A parameter that has never had a gradient has no rate; lr / eps would be the largest of all.
    return torch.where(root > 0, lr / (root + eps), torch.nan)


def _sgd(group: Values, state: Values, update: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return torch.full_like(update, group["lr"])


def _adagrad(group: Values, state: Values, update: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    lr = group["lr"] / (1 + (float(state["step"]) - 1) * group["lr_decay"])
    return _over(lr, state["sum"].sqrt(), group["eps"])


def _rmsprop(group: Values, state: Values, update: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    square = state["square_avg"]
    if group["centered"]:
        square = (square - state["grad_avg"] ** 2).clamp(min=0)
    return _over(group["lr"], square.sqrt(), group["eps"])


def _adadelta(group: Values, state: Values, update: torch.Tensor) -> torch.Tensor:
    # The state already holds the update of this step; the rate is made of what it held before.
    old = state["acc_delta"] - (1 - group["rho"]) * (update / group["lr"]) ** 2
    old = old.clamp(min=0) / group["rho"] if group["rho"] else torch.zeros_like(old)
    root = (state["square_avg"] + group["eps"]).sqrt()
    return torch.where(state["square_avg"] > 0, group["lr"] * (old + group["eps"]).sqrt() / root, torch.nan)


def _adam(group: Values, state: Values, update: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    square = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    correction = 1 - group["betas"][1] ** float(state["step"])
    return _over(group["lr"], (square / correction).sqrt(), group["eps"])


def _radam(group: Values, state: Values, update: torch.Tensor) -> torch.Tensor:
    step, beta = float(state["step"]), group["betas"][1]
    correction = 1 - beta**step
    limit = 2 / (1 - beta) - 1
    length = limit - 2 * step * beta**step / correction
    if length <= 5:
        return torch.full_like(update, group["lr"])
    rectified = ((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)) ** 0.5
    return _over(group["lr"] * rectified * correction**0.5, state["exp_avg_sq"].sqrt(), group["eps"])


def _adamax(group: Values, state: Values, update: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    # torch adds eps to each gradient, so that it is the least that the largest gradient can be.
    largest = state["exp_inf"]
    return torch.where(largest > group["eps"], group["lr"] / largest, torch.nan)


def _rprop(group: Values, state: Values, update: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return state["step_size"].clone()


RATES: dict[str, Callable[[Values, Values, torch.Tensor], torch.Tensor]] = {
    "SGD": _sgd,
    "Adagrad": _adagrad,
    "RMSprop": _rmsprop,
    "Adadelta": _adadelta,
    "Adam": _adam,
    "AdamW": _adam,
    "NAdam": _adam,
    "RAdam": _radam,
    "Adamax": _adamax,
    "Rprop": _rprop,
}
"""Class of optimizer to its rates, from a parameter group, the state after the step and the update; shapes are equal."""


class Places:
    """A fixed sample over the values of several tensors, taken as one vector: every so many.

    Parameters
    ----------
    tensors
        Whose sizes count.
    largest
        Most values of the sample.

    Examples
    --------
    >>> places = Places([torch.zeros(2, 3), torch.zeros(5)], largest=100)
    >>> places.take(1, torch.arange(5))
    tensor([0, 1, 2, 3, 4])
    """

    def __init__(self, tensors: Sequence[torch.Tensor], largest: int = SAMPLE) -> None:
        sizes = [tensor.numel() for tensor in tensors]
        self.stride = max(1, -(-sum(sizes) // largest))
        # A stride that shares a factor with the shapes would meet the same place of every 3x3 kernel again and again.
        while math.gcd(self.stride, 2 * 3 * 5 * 7) > 1:
            self.stride += 1
        starts = np.cumsum([0, *sizes])[:-1]
        self.first = [int(-start % self.stride) for start in starts]

    def take(self, i: int, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sample's values of the ``i``-th tensor, (number,)."""
        return tensor.reshape(-1)[self.first[i] :: self.stride]


def effective_rates(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    updates: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    places: Places,
) -> torch.Tensor:
    """Return what the newest step multiplied the gradient of each sampled parameter by.

    Optimizers of `RATES` are read from their state; where an optimizer has momentum it is the factor of the momentum,
    unbiased where the optimizer makes it so. For any other it is ``abs(update) / abs(gradient)``, with all that the
    optimizer does beside (momentum, weight decay).

    Parameters
    ----------
    optimizer
        After its step.
    parameters
        In any order.
    updates
        New less old value of each.
    gradients
        What the step was made from, of each the sample's values alone (number,); None where there was none.
    places
        The sample over ``parameters``.

    Returns
    -------
    torch.Tensor
        (number,), without those that have had no gradient yet, or had none in a step that is not in `RATES`.
    """
    rules = {
        id(p): (rule, group) for rule in rules_of(optimizer) for group in rule.param_groups for p in group["params"]
    }
    found = []
    for i, (parameter, update, gradient) in enumerate(zip(parameters, updates, gradients, strict=True)):
        if id(parameter) not in rules or gradient is None:
            continue
        rule, group = rules[id(parameter)]
        state, moved = rule.state.get(parameter, {}), places.take(i, update)
        rate = RATES.get(type(rule).__name__)
        if rate is None or (not state and rate is not _sgd):
            found.append(moved.abs() / gradient.abs())
            continue
        sampled = {
            # A count of steps has no dimensions, and neither may the parameter.
            key: places.take(i, value)
            if torch.is_tensor(value) and value.shape == parameter.shape and key != "step"
            else value
            for key, value in state.items()
        }
        found.append(rate(group, sampled, moved))
    rates = torch.cat(found) if found else torch.zeros(0)
    return rates[rates.isfinite()]


def rules_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """Yield an optimizer, and behind it those inside it that make the updates of some or all of its parameters."""
    yield optimizer
    for name in ("base", "rest"):  # of SAM and of MuonWithAdamW
        inner = getattr(optimizer, name, None)
        if isinstance(inner, torch.optim.Optimizer):
            yield from rules_of(inner)


# ---- the callback ---------------------------------------------------------------------------------------------------


def layers_of(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trainable parameters of each module that has some of its own, by its path in the network.

    >>> list(layers_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
    ['0', '2']
    """
    found = {}
    for name, module in network.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        if own:
            found[name or "network"] = own
    return found


class Dynamics(pl.Callback):
    """Measure the last two optimizer steps of each epoch; changes nothing, and processes measure without a word.

    An update is the difference of the weights before and after a whole step, however often the optimizer evaluates its
    batch. Into the module's `extras` go

    - ``update_ratio/<layer>``: norm of the last update over the norm of the weights before it, and their median over
      layers as ``update/ratio``;
    - ``update/cosine`` between the last two updates. An epoch of a single step compares it with the last of the epoch
      before;
    - ``rate/low``, ``rate/median``, ``rate/high``: quantiles 5, 50 and 95 % of `effective_rates` over at most `SAMPLE`
      parameters.

    What does not exist (a ratio to weights of norm 0, the cosine of a first update, all of a step that was skipped) is
    left out. Holds two copies of the
    weights between steps, three for a moment.
    """

    def __init__(self) -> None:
        self.rows: list[Layer] = []
        self.before: list[torch.Tensor] = []
        self.update: list[torch.Tensor] = []
        self.is_last = False
        self.step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]  # noqa: ARG002
        """Find the layers."""
        self.layers = layers_of(pl_module.classifier.network)
        self.weights = [parameter for own in self.layers.values() for parameter in own]
        self.places = Places(self.weights)
        self.update = [part.to(pl_module.device) for part in self.update]

    def on_train_batch_start(  # type: ignore[override]
        self,
        trainer: pl.Trainer,
        pl_module: TrainingModule,
        batch: Batch,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Keep the weights where one of the epoch's last two windows begins."""
        plan = pl_module.plan[trainer.current_epoch]
        window, in_window = divmod(batch_idx, plan.accumulation)
        if in_window == 0 and window >= plan.steps_per_epoch - 2:
            self.before = [weight.detach().clone() for weight in self.weights]
            self.is_last = window == plan.steps_per_epoch - 1
            self.step = trainer.global_step

    def on_before_optimizer_step(  # type: ignore[override]
        self,
        trainer: pl.Trainer,
        pl_module: TrainingModule,
        optimizer: torch.optim.Optimizer,  # noqa: ARG002
    ) -> None:
        """Measure the gradient, which is not clipped yet."""
        is_first = trainer.global_step == 0
        if pl_module.again or not (is_first or (self.before and self.is_last)):
            return
        gradients = [weight.grad for weight in self.weights]
        self.gradient_norms = norms(
            [w.new_zeros(()) if g is None else g for w, g in zip(self.weights, gradients, strict=True)]
        )
        self.gradients = [None if g is None else self.places.take(i, g).clone() for i, g in enumerate(gradients)]
        if is_first:
            self.add_rows(0, *torch.stack([norms(self.weights), self.gradient_norms]).tolist())

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: pl.Trainer,
        pl_module: TrainingModule,
        outputs: Any,  # noqa: ARG002
        batch: Batch,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Measure the update where the window's step is made."""
        if not self.before or trainer.global_step == self.step:
            return
        before, self.before = self.before, []
        if pl_module.skipped:
            return
        previous, self.update = self.update, [w.detach() - b for w, b in zip(self.weights, before, strict=True)]
        if not self.is_last:
            return
        dots = [(a * b).sum() for a, b in zip(self.update, previous, strict=True)] if previous else []
        values = torch.stack([norms(before), self.gradient_norms, norms(self.update), norms(previous or before)])
        weight_norms, gradient_norms, update_norms, previous_norms = values.tolist()
        figures = self.add_rows(trainer.current_epoch + 1, weight_norms, gradient_norms, update_norms)
        length = math.hypot(*update_norms) * math.hypot(*previous_norms)
        if dots and length > 0:
            figures["update/cosine"] = float(torch.stack(dots).sum()) / length
        clipping = 1.0
        if pl_module.gradient_clip is not None:
            clipping = min(1.0, pl_module.gradient_clip / (float(pl_module.norm) + 1e-6))
        gradients = [None if g is None else g * clipping for g in self.gradients]
        rates = effective_rates(trainer.optimizers[0], self.weights, self.update, gradients, self.places).cpu().numpy()
        if len(rates):
            figures |= zip(QUANTILES, np.quantile(rates, list(QUANTILES.values())).tolist(), strict=True)
        pl_module.extras.update(figures)
        if pl_module.plan[trainer.current_epoch + 1].steps_per_epoch > 1:
            self.update = []  # the next epoch's last but one takes its place

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the rows so far, and an update that the next one is compared with."""
        return {"rows": [asdict(row) for row in self.rows], "update": [part.cpu() for part in self.update]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.rows = [Layer(**row) for row in state_dict["rows"]]
        self.update = list(state_dict["update"])

    def add_rows(
        self,
        epoch: int,
        weight_norms: Sequence[float],
        gradient_norms: Sequence[float],
        update_norms: Sequence[float] | None = None,
    ) -> dict[str, float]:
        """Append a row a layer from the norms of each parameter, and return the layers' ratios and their median."""
        start, figures = 0, {}
        for name, own in self.layers.items():
            mine = slice(start, start + len(own))
            start = mine.stop
            weight_norm, ratio = math.hypot(*weight_norms[mine]), None
            # A frozen layer has no gradient, and no update to speak of: one of 0 would be a layer that has died.
            frozen = all(gradient is None for gradient in self.gradients[mine])
            if update_norms is not None and weight_norm > 0 and not frozen:
                ratio = figures[f"update_ratio/{name}"] = math.hypot(*update_norms[mine]) / weight_norm
            size, length = sum(parameter.numel() for parameter in own), math.hypot(*gradient_norms[mine])
            known = math.isfinite(length) and not frozen
            self.rows.append(Layer(epoch, name, size, weight_norm, length if known else None, ratio))
        return {"update/ratio": median(figures.values()), **figures} if figures else {}


def norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the Euclidean norm of each tensor, (number,)."""
    return torch.stack([torch.linalg.vector_norm(tensor.detach()) for tensor in tensors])
