"""Learning curves, as a table and as a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from anneal.reporting.style import plain_style

QUANTITIES = (
    "train_loss",
    "train_eval_loss",
    "val_loss",
    "train_accuracy",
    "train_eval_accuracy",
    "val_accuracy",
    "lr",
    "grad_norm",
)
"""Always columns, empty where nothing was measured."""

AVERAGED = ("val_average_loss", "val_average_accuracy")
"""Those of averaged weights, which not every epoch has, nor every member."""

STYLES: dict[str, tuple[Any, str]] = {
    "train": ("--", "train ({})"),
    "train_eval": (":", "train (as stored)"),
    "val": ("-", "val"),
    "val_average": ("-.", "val (averaged weights)"),
}
"""Curve to its line style and its words in the legend."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
"""Okabe & Ito's palette, which colour-blind readers can tell apart; the yellow, faint on white, is left out."""

Histories = Mapping[str, Mapping[str, list[float]]]
"""Member to the columns of its history.csv."""

Mark = tuple[str, str, int, int]
"""Member, finding, and the first and last epoch that show it."""


def mean_curves(histories: Histories) -> dict[str, list[float]]:
    """Return each quantity's mean over the members that still train and have it, a value an epoch; NaN where none has.

    Those of `AVERAGED` are there only where a member has one.

    >>> history = {"epoch": [1, 2], **{quantity: [1.0, 3.0] for quantity in QUANTITIES}}
    >>> mean_curves({"a": history})["val_loss"]
    [1.0, 3.0]
    """
    epochs = range(max(len(history["epoch"]) for history in histories.values()))
    averaged = [q for q in AVERAGED if any(_has(history, q, i) for history in histories.values() for i in epochs)]
    means: dict[str, list[float]] = {}
    for quantity in (*QUANTITIES, *averaged):
        known = [[h[quantity][i] for h in histories.values() if _has(h, quantity, i)] for i in epochs]
        means[quantity] = [fmean(values) if values else math.nan for values in known]
    return means


def _has(history: Mapping[str, list[float]], quantity: str, i: int) -> bool:
    return quantity in history and i < len(history[quantity]) and not math.isnan(history[quantity][i])


def curves_csv(histories: Histories) -> str:
    """Return one table: ``epoch``, a column for each quantity, and one for each member and quantity (``a_val_loss``).

    A quantity's own column is the mean over the members that still train; a member's is empty once it stopped. Those of
    averaged weights are there where a member has them.
    """
    means = mean_curves(histories)
    names = [(member, quantity) for member in histories for quantity in means]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["epoch", *means, *(f"{member}_{quantity}" for member, quantity in names)])
    for i in range(len(means[QUANTITIES[0]])):
        writer.writerow(
            [
                i + 1,
                *("" if math.isnan(mean[i]) else repr(mean[i]) for mean in means.values()),
                *(
                    repr(histories[member][quantity][i]) if _has(histories[member], quantity, i) else ""
                    for member, quantity in names
                ),
            ]
        )
    return buffer.getvalue()


def draw_curves(
    histories: Histories,
    path: Path,
    *,
    measured_on: Mapping[str, str] | None = None,
    marks: Sequence[Mark] = (),
) -> None:
    """Draw loss and accuracy over epochs, a colour for each member and a style for each of `STYLES`; PNG to ``path``.

    Below them each finding has a row, with a bar for each member over the epochs that show it.

    The same histories give the same bytes.

    Parameters
    ----------
    histories
        Member to the columns of its history.csv; curves that it lacks are left out.
    path
        PNG to write.
    measured_on
        Member to what its training figures are measured on, such as ``augmented, mixed``, for the legend.
    marks
        Findings, in the order of their rows.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    words = {(measured_on or {}).get(member, "") for member in histories}
    trained_on = words.pop() if len(words) == 1 else ""
    with plain_style():
        findings = list(dict.fromkeys(finding for _, finding, _, _ in marks))
        heights = [4.0, 0.3 + 0.22 * len(findings)] if findings else [4.0]
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        drawn: set[str] = set()
        grid = figure.subplots(len(heights), 2, squeeze=False, sharex="col", height_ratios=heights)
        places = grid[0]
        for axes, quantity in zip(places, ("loss", "accuracy"), strict=True):
            for i, history in enumerate(histories.values()):
                for name, (style, _) in STYLES.items():
                    curve = np.array(history.get(f"{name}_{quantity}", math.nan), dtype=np.float64)
                    if np.isnan(curve).all():
                        continue
                    drawn.add(name)
                    colour = COLOURS[i % len(COLOURS)]
                    axes.plot(history["epoch"], curve, color=colour, linestyle=style, linewidth=1.6, marker=".")
            axes.set(title=quantity)
            axes.tick_params(labelbottom=True)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        for axes in grid[-1]:
            axes.set_xlabel("epoch")
        for axes in grid[1:].flat:
            _draw_marks(axes, marks, findings, list(histories))
        members = [Line2D([], [], color=colour, label=name) for colour, name in zip(COLOURS, histories, strict=False)]
        if len(members) == len(histories):
            places[0].legend(handles=members, fontsize=8)
        curves = [
            Line2D([], [], color="0.3", linestyle=style, label=label.format(trained_on or "as trained on"))
            for name, (style, label) in STYLES.items()
            if name in drawn
        ]
        places[1].legend(handles=curves, fontsize=8)
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _draw_marks(axes: Any, marks: Sequence[Mark], findings: Sequence[str], members: Sequence[str]) -> None:
    """Draw a row a finding, with a bar a member from its first to its last epoch."""
    height = 0.8 / len(members)
    for member, finding, first, last in marks:
        i = members.index(member)
        top = findings.index(finding) - 0.4 + (i + 0.5) * height
        # Half an epoch on either side, so that a single epoch has a bar too.
        axes.barh(top, last - first + 1, left=first - 0.5, height=0.8 * height, color=COLOURS[i % len(COLOURS)])
    axes.set_yticks(range(len(findings)), [finding.replace("_", " ") for finding in findings], fontsize=8)
    axes.set_ylim(len(findings) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
