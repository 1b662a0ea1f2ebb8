"""What a signal and its gradient look like in each layer before the first step, and what that says of the initial weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from anneal.models.build import Classifier
from anneal.models.initialization import rehearsal_of
from anneal.models.layers import ACTIVATIONS, ResidualBlock

VANISHING = 1e-3
"""Standard deviation of a layer's outputs over that of the input, or norm of its gradient over that of the logits', below
which it vanishes: one learning rate serves all layers, and what suits one leaves another a thousand times fainter alone."""

EXPLODING = 1e3
"""The same upward."""

LOGITS = 10.0
"""Standard deviation of the logits above which they explode: the softmax is sure of one class, mostly the wrong one, and
the first loss several times ``ln(classes)``."""

DEAD = 0.8
"""Fraction of a layer's units that are zero on the whole batch, from which on it is dead. Not a half: in a deep network of
rectifiers without norm layers all samples come to look alike, and a sound unit is then on or off for all of them."""

SYMMETRIC = 1e-6
"""Difference between a layer's units below which they are the same: some roundings of float32."""

CLOSED = 1e-2
"""Scale at the end of a residual branch below which the branch is meant to start closed (layer scale)."""


@dataclass(frozen=True)
class LayerStatistics:
    """One layer before the first step, over a batch.

    Parameters
    ----------
    layer
        Path of the module in the network; with ``#2`` where it is called a second time. ``input``: what the network sees.
    kind
        ``input``, ``conv``, ``linear`` or ``activation``.
    mean, std
        Of its outputs.
    dead
        Fraction of units (channels, features) that are zero on the whole batch; of activations alone.
    grad_mean, grad_std
        Of the gradient of a sample's cross entropy with respect to the layer's outputs.
    grad_norm
        Of a sample's gradient: root of the mean over samples of the squared norm.
    spread
        Largest difference between units, of their weights and outputs over the largest of these in the layer, and of
        their gradients over the largest of the logits': 0 where all units are the same. Of layers with weights and at
        least two units.
    closed
        Whether it lies in a residual branch that is meant to start at zero.
    """

    layer: str
    kind: str
    mean: float
    std: float
    dead: float | None = None
    grad_mean: float | None = None
    grad_std: float | None = None
    grad_norm: float | None = None
    spread: float | None = None
    closed: bool = False


def initial_statistics(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor) -> list[LayerStatistics]:
    """Measure activations and gradients of every convolution, linear layer and activation on one batch.

    As at the first step of training, on batch statistics, but without dropout and stochastic depth. Measured on a copy: the
    classifier keeps its weights, gradients, running statistics and mode, and random generators their state.

    Parameters
    ----------
    classifier
        With its initial weights.
    images
        uint8 (N, H, W, C), N at least 2.
    labels
        int64 (N,).

    Returns
    -------
    list of LayerStatistics
        ``input``, then a row for each call of a layer, in forward order. Functions that are no modules have none.
    """
    rehearsal = rehearsal_of(classifier)
    assert isinstance(rehearsal, Classifier)
    rehearsal.requires_grad_(True)
    kinds: list[tuple[str, tuple[type[nn.Module], ...]]] = [
        ("conv", (nn.Conv2d,)),
        ("linear", (nn.Linear,)),
        ("activation", tuple({type(make()) for make in ACTIVATIONS.values()})),
    ]
    modules = dict(rehearsal.network.named_modules())
    found = {
        module: (name, kind) for name, module in modules.items() for kind, types in kinds if isinstance(module, types)
    }
    closed = tuple(
        f"{name}." for name, module in modules.items() if isinstance(module, ResidualBlock) and _closed(module)
    )
    calls: list[_Call] = []

    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:  # noqa: ARG001
        name, kind = found[module]
        if kind == "activation" and calls and calls[-1].ndim == output.ndim:
            axis = calls[-1].axis  # some blocks have channels last
        else:
            axis = -1 if kind == "linear" else 1
        call = _Call(name, kind, axis, output.ndim)
        call.see(output.detach(), module)
        if output.requires_grad:  # not behind a network that computes its features without a gradient
            output.register_hook(call.see_gradient)
        calls.append(call)

    for module in found:
        module.register_forward_hook(record)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        inputs = rehearsal.normalization(images)
        # A sum: its gradient is that of each sample, whatever the size of the batch.
        F.cross_entropy(rehearsal.network(inputs), labels, reduction="sum").backward()
    error = calls[-1].grad_largest if calls else 0.0
    rows = [LayerStatistics("input", "input", *_moments(inputs))]
    times: dict[str, int] = {}
    for call in calls:
        times[call.layer] = times.get(call.layer, 0) + 1
        label = call.layer if times[call.layer] == 1 else f"{call.layer}#{times[call.layer]}"
        rows.append(call.row(label, error, call.layer.startswith(closed)))
    return rows


@dataclass
class _Call:
    """One call of a layer, measured as it happens: nothing large is kept, and what works in place may."""

    layer: str
    kind: str
    axis: int
    ndim: int
    mean: float = 0.0
    std: float = 0.0
    dead: float | None = None
    spread: float | None = None
    grad_mean: float = 0.0
    grad_std: float = 0.0
    grad_norm: float = 0.0
    grad_largest: float = 0.0
    grad_spread: float = 0.0

    def see(self, output: torch.Tensor, module: nn.Module) -> None:
        units = output.transpose(0, self.axis).flatten(1)
        self.mean, self.std = _moments(units)
        if self.kind == "activation":
            self.dead = float((units == 0).all(1).float().mean())
        elif len(units) > 1:
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            weight = weight.detach().flatten(1)
            self.spread = max(_spread(values) / (_largest(values) or 1.0) for values in (weight, units))

    def see_gradient(self, gradient: torch.Tensor) -> None:
        units = gradient.detach().transpose(0, self.axis).flatten(1)
        self.grad_mean, self.grad_std = _moments(units)
        self.grad_norm = float(units.double().square().sum() / len(gradient)) ** 0.5
        self.grad_largest, self.grad_spread = _largest(units), _spread(units)

    def row(self, layer: str, error: float, closed: bool) -> LayerStatistics:
        spread = None if self.spread is None else max(self.spread, self.grad_spread / (error or 1.0))
        return LayerStatistics(
            layer=layer,
            kind=self.kind,
            mean=self.mean,
            std=self.std,
            dead=self.dead,
            grad_mean=self.grad_mean,
            grad_std=self.grad_std,
            grad_norm=self.grad_norm,
            spread=spread,
            closed=closed,
        )


def _moments(values: torch.Tensor) -> tuple[float, float]:
    values = values.detach().double()
    return float(values.mean()), float(values.std(correction=0))


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


def _spread(units: torch.Tensor) -> float:
    """Return the largest difference of a row from the first."""
    return float((units - units[0]).abs().max())


def _closed(block: ResidualBlock) -> bool:
    weight = block.last.state_dict()["weight"]  # a buffer where it is frozen
    return float(weight.detach().abs().max()) <= (CLOSED if weight.ndim == 1 else 0.0)


def statistics_panels(rows: Sequence[LayerStatistics]) -> list[dict[str, Any]]:
    """Return outputs, gradients and dead units by layer as plain values for `anneal.reporting.lines.from_values`.

    What is 0 has no place on a logarithmic axis, and no point.

    Parameters
    ----------
    rows
        What `initial_statistics` returned.
    """
    figures: list[tuple[str, str, bool]] = [
        ("std", "standard deviation of the outputs", True),
        ("grad_norm", "norm of a sample's gradient", True),
        ("dead", "fraction of dead units", False),
    ]
    kinds = {"input": ("input",), "layers with weights": ("conv", "linear"), "activations": ("activation",)}
    panels = []
    for figure, words, logarithmic in figures:
        lines = []
        for colour, (label, own) in enumerate(kinds.items()):
            values = [(number, getattr(row, figure)) for number, row in enumerate(rows) if row.kind in own]
            points = [(x, y) for x, y in values if y is not None and math.isfinite(y) and (y > 0 or not logarithmic)]
            if points:
                x, y = zip(*points, strict=True)
                lines.append({"label": label, "x": list(x), "y": list(y), "style": ".-", "colour": colour})
        panel = {"title": words, "x_label": "layer, in forward order", "log_y": logarithmic, "lines": lines}
        panels.append(panel if logarithmic else {**panel, "y_limits": [-0.02, 1.02]})
    return panels


# ---- what it says ---------------------------------------------------------------------------------------------------


def findings(rows: Sequence[LayerStatistics]) -> list[str]:
    """Return a warning for each thing that is wrong with the initial weights, naming the layers; none where all is well.

    Parameters
    ----------
    rows
        What `initial_statistics` returned.

    Examples
    --------
    >>> rows = [
    ...     LayerStatistics("input", "input", 0.0, 1.0),
    ...     LayerStatistics("hidden.0.linear", "linear", 0.0, 2e-5, None, 0.0, 0.1, 0.5, 1.5),
    ...     LayerStatistics("head", "linear", 0.0, 1e-5, None, 0.0, 0.1, 0.9, 1.5),
    ... ]
    >>> for warning in findings(rows):
    ...     print(warning)
    vanishing activations: hidden.0.linear (1 of 2 layers), down to 2e-05 of the input's standard deviation; try init.name: kaiming_normal or lsuv, model.norm.name: batch, or model.activation: ReLU
    """
    layers = [row for row in rows if row.kind != "input"]
    if not layers:
        return []
    head, hidden = layers[-1], layers[:-1]
    reference = next((row.std for row in rows if row.kind == "input"), 0.0) or 1.0
    error = head.grad_norm or 1.0
    found = []

    def warn(what: str, named: Sequence[LayerStatistics], measured: str) -> None:
        if named:
            found.append(f"{what}: {_listed(named)} ({len(named)} of {len(layers)} layers){measured}")

    def outputs(row: LayerStatistics) -> float:
        return row.std / reference

    def gradient(row: LayerStatistics) -> float:
        return (row.grad_norm or 0.0) / error

    def between(low: float, high: float, figure: Callable[[LayerStatistics], float]) -> list[LayerStatistics]:
        return [row for row in hidden if low < figure(row) < high]

    symmetric = [row for row in hidden if row.spread is not None and row.spread <= SYMMETRIC]
    warn(
        "symmetric", symmetric, ": all units of a layer are the same and learn the same; try init.name: kaiming_normal"
    )

    broken = [row for row in layers if not math.isfinite(row.std) or not math.isfinite(row.grad_norm or 0.0)]
    warn("exploding", broken, f", beyond what a number can hold; {_SMALLER}")

    # What is exactly 0 is a dead layer, named as such; what lies in a closed branch is meant to be small; and units that
    # are the same make gradients vanish and rectifiers die in their wake.
    faint = [row for row in between(0.0, VANISHING, outputs) if not row.closed]
    if faint and not symmetric:
        warn("vanishing activations", faint, f", down to {min(map(outputs, faint)):.1g} of {_INPUT}; {_LARGER}")
    faint = [row for row in between(0.0, VANISHING, gradient) if not row.closed]
    if faint and not symmetric:
        warn("vanishing gradients", faint, f", down to {min(map(gradient, faint)):.1g} of {_LOGITS}; {_LARGER}")
    loud = between(EXPLODING, math.inf, outputs)
    if loud:
        warn("exploding activations", loud, f", up to {max(map(outputs, loud)):.1g} times {_INPUT}; {_SMALLER}")
    loud = between(EXPLODING, math.inf, gradient)
    if loud:
        warn("exploding gradients", loud, f", up to {max(map(gradient, loud)):.1g} times {_LOGITS}; {_SMALLER}")
    if LOGITS < head.std < math.inf:
        warn(
            "exploding logits",
            [head],
            f", with a standard deviation of {head.std:.2g}, which should be near 1; {_SMALLER}",
        )

    dead = [row for row in layers if row.dead is not None and row.dead >= DEAD]
    if dead and not symmetric:
        most = max(row.dead or 0.0 for row in dead)
        advice = "try model.activation: LeakyReLU, or model.norm.name: batch"
        warn("dead", dead, f", up to {most:.0%} of a layer's units zero on every image; {advice}")
    return found


_INPUT = "the input's standard deviation"
_LOGITS = "the norm of the logits' gradient"
_LARGER = "try init.name: kaiming_normal or lsuv, model.norm.name: batch, or model.activation: ReLU"
_SMALLER = "try init.name: kaiming_normal or lsuv, model.norm.name: batch, or preprocess.normalize: standardize"


def _listed(rows: Sequence[LayerStatistics], most: int = 3) -> str:
    names = [row.layer for row in rows]
    return ", ".join(names) if len(names) <= most + 1 else f"{', '.join(names[:most])} ... {names[-1]}"
