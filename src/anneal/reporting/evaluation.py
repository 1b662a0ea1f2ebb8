"""Pictures of an evaluation: confusion matrix and reliability diagram."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from anneal.reporting.style import plain_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERS = 20
"""Up to so many classes the confusion matrix carries numbers."""

NAMES = 60
"""Up to so many classes its axes carry the classes' names."""


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def confusion_figure(matrix: npt.NDArray[np.int64], classes: Sequence[str], path: Path, title: str) -> None:
    """Draw a confusion matrix, coloured by the share of each actual class, and save it as PNG.

    Parameters
    ----------
    matrix
        int64 (K, K), a row an actual class, a column a predicted one.
    classes
        K names.
    path
        Where to.
    title
        Above the matrix.
    """
    from matplotlib.figure import Figure

    num_classes = len(classes)
    with plain_style():
        side = min(14.0, 3.0 + 0.42 * num_classes)
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        picture = axes.imshow(share, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        figure.colorbar(picture, ax=axes, label="share of the actual class", shrink=0.8)
        if num_classes <= NUMBERS:
            for actual, predicted in zip(*np.nonzero(matrix), strict=True):
                color = "white" if share[actual, predicted] > 0.5 else "black"
                text = str(matrix[actual, predicted])
                axes.text(predicted, actual, text, ha="center", va="center", color=color, fontsize=8)
        if num_classes <= NAMES:
            # A dollar sign in a class's name is no formula.
            names = [name.replace("$", r"\$") for name in classes]
            size = 9 if num_classes <= NUMBERS else 6
            axes.set_xticks(range(num_classes), names, rotation=90, fontsize=size)
            axes.set_yticks(range(num_classes), names, fontsize=size)
        axes.set(xlabel="predicted", ylabel="actual", title=title)
        _save(figure, path)


def reliability_figure(tables: Mapping[str, Sequence[Mapping[str, float]]], path: Path, title: str) -> None:
    """Draw reliability diagrams over the diagonal of perfect calibration, and save them as PNG.

    Parameters
    ----------
    tables
        Name of a line to rows as `anneal.metrics.reliability` returns them.
    path
        Where to.
    title
        Above the diagram.
    """
    from matplotlib.figure import Figure

    with plain_style():
        figure = Figure(figsize=(5.5, 5), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="perfect")
        for name, rows in tables.items():
            axes.plot(
                [r["confidence"] for r in rows], [r["accuracy"] for r in rows], marker="o", markersize=4, label=name
            )
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy", title=title)
        axes.legend(loc="lower right")
        _save(figure, path)
