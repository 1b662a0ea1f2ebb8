"""Batch norm layers at the end of each epoch: how far running statistics are from a batch's, how many scales are nearly 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import nn

from anneal.models.recalibration import recalibrate, tracking_norms
from anneal.training.dynamics import Layer
from anneal.training.noise_scale import kept_buffers

if TYPE_CHECKING:
    from anneal.training.module import TrainingModule

SMALL = 0.01
"""Of a layer's largest scale: the share at which another counts as small. Relative, since weight decay shrinks all of a
layer's scales alike and the next norm takes a common factor out again; of the largest and not the median, which is itself
nearly 0 where most channels are."""

SAMPLE, SHARE = 256, 16
"""Most images of the batch, and at most one in so many of the training split unless a microbatch is more."""


@dataclass(frozen=True)
class NormHealth:
    """One batch norm layer, over a batch.

    With m, v the running mean and variance of a channel and b, u the batch's:

    Parameters
    ----------
    layer
        Path of the module in the network.
    gap
        Root of the mean over channels of (m - b)^2 / (v + eps): how far means are off, in running standard deviations.
    variance_gap
        Root of the mean over channels of ln((u + eps) / (v + eps))^2: 0.1 is a variance some 10 % off, either way.
    small_scales
        Share of the scales that are at most `SMALL` of the layer's largest in size; None where it has no scales.
    channels
        Number of channels.
    """

    layer: str
    gap: float
    variance_gap: float
    small_scales: float | None
    channels: int


def sample_size(num_samples: int, microbatch: int) -> int:
    """Return how many images are measured on: one batch, small beside the epoch.

    >>> sample_size(54_000, 128), sample_size(1_280, 32)
    (256, 80)
    """
    return min(SAMPLE, max(microbatch, num_samples // SHARE), num_samples)


def norm_health(network: nn.Module, images: torch.Tensor) -> list[NormHealth]:
    """Measure every batch norm layer that keeps running statistics, and leave the network as it was.

    Parameters
    ----------
    network
        In any mode; each norm layer sees inputs that those before it normalised by the batch, as in training.
    images
        What the network takes.
    """
    layers = tracking_norms(network)
    running = [(m.running_mean.clone(), m.running_var.clone()) for m in layers.values()]  # type: ignore[union-attr]
    with kept_buffers(network):
        recalibrate(network, [images])
        batch = [(m.running_mean.clone(), m.running_var.clone()) for m in layers.values()]  # type: ignore[union-attr]
    found = []
    for (name, layer), (mean, var), (batch_mean, batch_var) in zip(layers.items(), running, batch, strict=True):
        distance = (mean - batch_mean).square() / (var + layer.eps)
        ratio = ((batch_var + layer.eps) / (var + layer.eps)).log()
        figures = [distance.mean().sqrt(), ratio.square().mean().sqrt()]
        if layer.affine:
            scales = layer.weight.detach().abs()
            figures.append((scales <= SMALL * scales.max()).float().mean())
        gap, variance_gap, *small = torch.stack(figures).tolist()
        found.append(NormHealth(name, gap, variance_gap, small[0] if small else None, len(mean)))
    return found


class MeasureNorms(pl.Callback):
    """Measure batch norm layers after each epoch's last microbatch, on the same images each time; changes nothing.

    Into the module's `extras` go ``norm/gap`` and ``norm/variance_gap``, medians over layers, ``norm_gap/<layer>`` of each, and
    ``norm/small_scales``, the share of all scales. Every process measures the same, without a word between them.

    Parameters
    ----------
    images
        uint8 (N, H, W, C).
    """

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.rows: list[tuple[int, NormHealth]] = []

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: pl.Trainer,
        pl_module: TrainingModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Measure after the epoch's last microbatch: what comes later is too late for the epoch's figures."""
        if not pl_module.plan[trainer.current_epoch].ends_epoch(batch_idx):
            return
        with trainer.precision_plugin.forward_context():
            self.images = self.images.to(pl_module.device)
            found = norm_health(pl_module.classifier, self.images)
        self.rows += [(trainer.current_epoch + 1, health) for health in found]
        pl_module.extras.update(figures(found))

    def into(self, rows: Sequence[Layer]) -> list[Layer]:
        """Return rows of layers.csv with the gaps and small scales of batch norm layers filled in."""
        measured = {(epoch, health.layer.removeprefix("network.")): health for epoch, health in self.rows}
        return [
            replace(row, norm_gap=h.gap, norm_variance_gap=h.variance_gap, small_scales=h.small_scales)
            if (h := measured.get((row.epoch, row.layer))) is not None
            else row
            for row in rows
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the rows so far."""
        return {"rows": [[epoch, asdict(health)] for epoch, health in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.rows = [(epoch, NormHealth(**values)) for epoch, values in state_dict["rows"]]


def figures(found: Sequence[NormHealth]) -> dict[str, float]:
    """Return the epoch's figures by their names in MLflow."""
    if not found:
        return {}
    by_name = {
        "norm/gap": median(health.gap for health in found),
        "norm/variance_gap": median(health.variance_gap for health in found),
        **{f"norm_gap/{health.layer.removeprefix('network.')}": health.gap for health in found},
    }
    small = [(health.small_scales, health.channels) for health in found if health.small_scales is not None]
    if small:
        by_name["norm/small_scales"] = sum(share * n for share, n in small) / sum(n for _, n in small)
    return by_name
