"""A learning-rate range test on the disk and in words."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anneal.reporting.lines import draw_panels, from_values
from anneal.store import write_text

if TYPE_CHECKING:
    from anneal.training.lr_curve import LRRange


def write(result: LRRange, folder: Path, member: str) -> list[Path]:
    """Write ``<member>.csv`` (columns step, lr, loss, smoothed) and ``<member>.png``, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / f"{member}.csv", folder / f"{member}.png"
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["step", "lr", "loss", "smoothed"])
    curve = zip(result.rates, result.losses, result.smoothed, strict=True)
    rows.writerows([step, *map(repr, point)] for step, point in enumerate(curve, 1))
    write_text(table, text.getvalue())
    draw_panels(from_values(result.panels()), picture, title=f"learning-rate range test of {member}")
    return [picture, table]


def in_words(result: LRRange, *, optimizer: str, lr: float | str, size: int, scaling: str) -> str:
    """Say what a range test found and how to set it.

    Parameters
    ----------
    result
        Of the test.
    optimizer, lr
        Name of the optimizer, and its rate in params.yaml.
    size, scaling
        ``batch.size`` at which the rate was found, and ``batch.lr_scaling``.
    """
    lines: list[tuple[str, str]] = []
    if result.descent is not None:
        low, high = result.descent
        lines.append(("the loss descends", f"from {low:.2g} to {high:.2g}, where it is lowest"))
        lines.append(("steepest", f"at {result.steepest:.2g}"))
    lines.append(("steps", f"{len(result.rates)} of {result.num_steps}"))
    if result.suggestion is None:
        lines.append(("no suggestion", result.reason))
        return _aligned(lines)
    lines.append(("suggestion", f"{result.suggestion:g}, by the valley rule; params.yaml has {lr}"))
    setting = f"optimizer.{optimizer}.lr: {result.suggestion:g}"
    if scaling != "none":
        setting += f", with batch.reference_size: {size}"
    lines.append(("to take it", f"{setting}  (found at batch.size {size})"))
    return _aligned(lines)


def _aligned(lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"  {label:<{width}}  {text}" for label, text in lines)
