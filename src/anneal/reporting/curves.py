"""Learning curves, as a table and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import numpy as np

QUANTITIES = ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr", "grad_norm")

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
"""Okabe & Ito's palette, which colour-blind readers can tell apart; the yellow, faint on white, is left out."""


def mean_curves(histories: Mapping[str, Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Return each quantity's mean over the members that still train, a value an epoch.

    >>> history = {"epoch": [1, 2], **{quantity: [1.0, 3.0] for quantity in QUANTITIES}}
    >>> mean_curves({"a": history})["val_loss"]
    [1.0, 3.0]
    """
    means: dict[str, list[float]] = {quantity: [] for quantity in QUANTITIES}
    for i in range(max(len(history["epoch"]) for history in histories.values())):
        training = [history for history in histories.values() if i < len(history["epoch"])]
        for quantity in QUANTITIES:
            means[quantity].append(fmean(history[quantity][i] for history in training))
    return means


def curves_csv(histories: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Return one table: ``epoch``, a column for each quantity, and one for each member and quantity (``a_val_loss``).

    A quantity's own column is the mean over the members that still train; a member's is empty once it stopped.

    Parameters
    ----------
    histories
        Member to the columns of its history.csv.
    """
    names = [(member, quantity) for member in histories for quantity in QUANTITIES]
    means = mean_curves(histories)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["epoch", *QUANTITIES, *(f"{member}_{quantity}" for member, quantity in names)])
    for i in range(len(means[QUANTITIES[0]])):
        columns = [histories[member][quantity] for member, quantity in names]
        writer.writerow(
            [
                i + 1,
                *(repr(mean[i]) for mean in means.values()),
                *(repr(column[i]) if i < len(column) else "" for column in columns),
            ]
        )
    return buffer.getvalue()


def draw_curves(histories: Mapping[str, Mapping[str, list[float]]], path: Path) -> None:
    """Draw loss and accuracy over epochs, a colour for each member, validation solid and training dashed; PNG to ``path``.

    The same histories give the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for i, (member, history) in enumerate(histories.items()):
                colour = COLOURS[i % len(COLOURS)]
                for split, style in (("train", "--"), ("val", "-")):
                    curve = np.array(history[f"{split}_{quantity}"], dtype=np.float64)
                    label = f"{member} {split}"
                    axes.plot(history["epoch"], curve, style, color=colour, linewidth=1.6, label=label, marker=".")
            axes.set(xlabel="epoch", title=quantity)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        if len(histories) <= 8:
            axes.legend(fontsize=8)
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
