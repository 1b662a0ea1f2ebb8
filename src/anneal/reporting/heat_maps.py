"""Heat maps: a table of numbers as coloured cells, a panel beside those of `anneal.reporting.lines`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HeatMap:
    """A table of numbers, each a coloured cell with the number in it.

    Parameters
    ----------
    values
        A row a label of ``rows``, a number a label of ``columns``; NaN leaves a cell empty.
    rows, columns
        Labels, from the top and from the left.
    title, x_label, y_label
        Its words.
    low, high
        Ends of the scale of colours; what lies beyond has the colour of the end.
    marked
        Cells whose number is bold, in the shape of ``values``; by default none.
    """

    values: Sequence[Sequence[float]]
    rows: Sequence[str]
    columns: Sequence[str]
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    low: float = 0.0
    high: float = 1.0
    marked: Sequence[Sequence[bool]] | None = None


def draw_heat_map(axes: Any, panel: HeatMap) -> None:
    """Draw a heat map into axes of matplotlib."""
    axes.imshow(panel.values, cmap="cividis", vmin=panel.low, vmax=panel.high, aspect="auto")
    middle = (panel.low + panel.high) / 2
    for i, row in enumerate(panel.values):
        for j, value in enumerate(row):
            if math.isnan(value):
                continue
            bold = panel.marked is not None and panel.marked[i][j]
            axes.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if value > middle else "white",
                fontweight="bold" if bold else "normal",
            )
    axes.set_xticks(range(len(panel.columns)), panel.columns)
    axes.set_yticks(range(len(panel.rows)), panel.rows)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label, title=panel.title)
