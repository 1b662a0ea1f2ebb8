"""Line plots as PNG: panels of labelled lines with bands and marked places; the same values give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anneal.reporting.curves import COLOURS
from anneal.reporting.heat_maps import HeatMap, draw_heat_map
from anneal.reporting.style import plain_style


@dataclass(frozen=True)
class Line:
    """A line.

    Parameters
    ----------
    label
        For the legend; an empty one stays out of it.
    x, y
        Points; one that is not finite breaks the line.
    low, high
        Band around it, where there is one.
    style
        ``-`` line, ``--`` dashed, ``.-`` with points, ``.`` points alone.
    colour
        Number of a colour of the palette; by default the place among the panel's lines.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: str = "-"
    colour: int | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Parameters
    ----------
    lines
        What it shows.
    title, x_label, y_label
        Its words.
    log_x, log_y
        Whether an axis is logarithmic.
    marks
        Label to an x at which a vertical line stands.
    y_limits
        Lowest and highest y shown; by default all.
    y_names
        What stands at y = 0, 1, ..., from the top down, instead of numbers.
    """

    lines: Sequence[Line]
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    marks: Mapping[str, float] = field(default_factory=dict)
    y_limits: tuple[float, float] | None = None
    y_names: Sequence[str] = ()


def as_values(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Return panels as plain values, for JSON."""
    return [asdict(panel) for panel in panels]


def from_values(values: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Return the panels that `as_values` was given."""
    return [Panel(**{**panel, "lines": [Line(**line) for line in panel["lines"]]}) for panel in values]


def draw_panels(
    panels: Sequence[Panel | HeatMap],
    path: Path | str,
    title: str = "",
    *,
    columns: int = 3,
    size: tuple[float, float] = (4.8, 3.8),
    dpi: int = 110,
) -> None:
    """Draw panels beside each other; PNG to ``path``, which appears once it is whole.

    Parameters
    ----------
    panels
        At least one.
    path
        In a folder that exists.
    title
        Above all panels.
    columns
        Most panels in a row.
    size, dpi
        Width and height of a panel in inches, and dots an inch.
    """
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with plain_style():
        width, height = size
        extent = (max(1.25 * width, width * columns), height * rows + 0.3 * bool(title))
        figure = Figure(figsize=extent, layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(places, panels, strict=False):
            if isinstance(panel, HeatMap):
                draw_heat_map(axes, panel)
            else:
                _draw(axes, panel)
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        if title:
            figure.suptitle(title)
        unfinished = Path(f"{path}.tmp")
        figure.savefig(unfinished, format="png", dpi=dpi, metadata={"Software": None})
        unfinished.replace(path)


def _draw(axes: Any, panel: Panel) -> None:
    for i, line in enumerate(panel.lines):
        colour = COLOURS[(i if line.colour is None else line.colour) % len(COLOURS)]
        style = {"color": colour, "linewidth": 1.6, "label": line.label or "_"}
        marker = {"marker": "."} if "." in line.style else {}
        axes.plot(line.x, line.y, linestyle=line.style.replace(".", "") or "none", **style, **marker)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    for i, (label, x) in enumerate(panel.marks.items()):
        axes.axvline(x, color="0.3", linestyle=("--", ":", "-.")[i % 3], linewidth=1.2, label=label)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label, title=panel.title)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    if panel.y_limits is not None:
        axes.set_ylim(*panel.y_limits)
    if panel.y_names:
        axes.set_yticks(range(len(panel.y_names)), panel.y_names, fontsize=7)
        axes.invert_yaxis()
    axes.grid(alpha=0.3)
    if panel.marks or any(line.label for line in panel.lines):
        axes.legend(fontsize=8)
