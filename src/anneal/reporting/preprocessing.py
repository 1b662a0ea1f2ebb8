"""Pictures of what the preprocessing did: images and histograms before and after normalisation, the whitening's spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from anneal.reporting.style import plain_style
from anneal.statistics import normalize
from anneal.store import Split

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_CLASSES = 10
NUM_SAMPLES = 1000
"""Images behind the histograms, evenly spaced over the training split."""

COLOURS = {1: ("#444444",), 3: ("#d62728", "#2ca02c", "#1f77b4")}


def draw_preprocessing(
    train: Split,
    classes: Sequence[str],
    kind: str,
    statistics: dict[str, npt.NDArray[np.float64]],
    folder: Path,
) -> list[Path]:
    """Draw ``images.png`` and ``histograms.png``, and ``spectrum.png`` for whitening; the same bytes on every run.

    Parameters
    ----------
    train
        The training split.
    classes
        Names of the classes.
    kind, statistics
        The normalisation, as `anneal.statistics.fit_statistics` takes and returns them.
    folder
        Existing folder to draw into.

    Returns
    -------
    list of Path
        The pictures.
    """
    with plain_style():
        pictures = {
            "images.png": _draw_images(train, classes, kind, statistics),
            "histograms.png": _draw_histograms(train, kind, statistics),
        }
        if "eigenvalues" in statistics:
            pictures["spectrum.png"] = _draw_spectrum(statistics["eigenvalues"])
        for name, figure in pictures.items():
            figure.savefig(folder / name, dpi=100, metadata={"Software": None})
    return [folder / name for name in pictures]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_images(
    train: Split, classes: Sequence[str], kind: str, statistics: dict[str, npt.NDArray[np.float64]]
) -> Figure:
    """Draw the first image of each of the first classes: as stored, and as the network sees it."""
    labels = [label for label in range(len(classes)) if (train.labels == label).any()][:NUM_CLASSES]
    images = train.take([int(np.argmax(train.labels == label)) for label in labels])
    after = normalize(images, kind, statistics).reshape(images.shape)
    low, high = float(after.min()), float(after.max())
    shown = (after - low) / max(high - low, 1e-12)
    figure = _figure(1.3 * len(labels) + 0.6, 3.4)
    # One strip a row: axes of their own for each image would take most of the stage's time.
    above, below = figure.subplots(2, 1)
    _strip(above, images / 255)
    _strip(below, shown)
    names = [classes[label][:16].replace("$", r"\$") for label in labels]
    above.set_xticks(_centres(images), names, fontsize=8)
    above.tick_params(top=False, labeltop=True, bottom=False, labelbottom=False)
    above.set_ylabel("stored, 0..255", fontsize=8)
    below.set_ylabel("components" if kind == "pca" else kind, fontsize=8)
    figure.supxlabel(f"below: {low:.2f} (black) to {high:.2f} (white)", fontsize=8)
    return figure


def _strip(axes: Axes, images: npt.NDArray[np.float64]) -> None:
    """Show images (N, H, W, C) in 0..1 side by side, a white gap before each but the first."""
    white = np.ones((*images.shape[1:2], _gap(images), images.shape[3]))
    strip = np.concatenate([part for image in images for part in (white, image)][1:], axis=1)
    axes.imshow(strip.squeeze(-1) if strip.shape[-1] == 1 else strip, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _gap(images: npt.NDArray[np.generic]) -> int:
    return max(1, images.shape[2] // 8)


def _centres(images: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Return where the middle of each image of a strip lies."""
    width = images.shape[2]
    return np.arange(len(images)) * (width + _gap(images)) + (width - 1) / 2


def _draw_histograms(train: Split, kind: str, statistics: dict[str, npt.NDArray[np.float64]]) -> Figure:
    """Draw the distribution of values before and after, a line a channel."""
    chosen = np.unique(np.linspace(0, len(train) - 1, min(len(train), NUM_SAMPLES)).astype(int))
    images = train.take(chosen)
    after = normalize(images, kind, statistics)
    figure = _figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    _histogram(left, images.astype(np.float64), np.linspace(0, 256, 65))
    left.set_xlabel("stored value, 0..255")
    left.set_ylabel("share of values")
    # The outermost thousandths would squeeze all else into one bar.
    low, high = np.quantile(after, [0.001, 0.999])
    _histogram(right, after, np.linspace(low, max(high, low + 1e-6), 65))
    right.set_xlabel(f"after {kind}: mean {after.mean():.3f}, standard deviation {after.std():.3f}")
    return figure


def _histogram(axes: Axes, values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]) -> None:
    channels = values.reshape(-1, values.shape[-1]).T if values.ndim == 4 else values.reshape(1, -1)
    for channel, colour in zip(channels, COLOURS[len(channels)], strict=True):
        counts, _ = np.histogram(channel, edges)
        axes.stairs(counts / len(channel), edges, color=colour)
    axes.set_yscale("log")


def _draw_spectrum(eigenvalues: npt.NDArray[np.float64]) -> Figure:
    """Draw the eigenvalues of the covariance, largest first, and the share of variance of the first k."""
    figure = _figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    component = np.arange(1, len(eigenvalues) + 1)
    left.plot(component, np.maximum(eigenvalues, 1e-12), color="#444444")
    left.set_yscale("log")
    left.set_xlabel("component")
    left.set_ylabel("eigenvalue (variance of x in 0..1)")
    share = np.cumsum(eigenvalues) / max(eigenvalues.sum(), 1e-300)
    right.plot(component, share, color="#444444")
    right.set_ylim(0, 1.02)
    right.set_xlabel(f"components ({int(np.searchsorted(share, 0.99)) + 1} hold 99 % of the variance)")
    right.set_ylabel("share of variance")
    return figure
