"""Pictures of single images, of what spoke for a prediction, and of accuracy under corruptions; the same bytes every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from anneal.reporting.lines import Line, Panel, draw_panels
from anneal.store import Images

TILE = 128
"""Side of a picture in pixels: small images are enlarged to it or a little beyond, large ones reduced to at most twice it."""

FOR, AGAINST = (230, 159, 0), (0, 114, 178)
"""Orange and blue of Okabe & Ito 2008, told apart by colour-blind readers too: for the predicted class, for the label."""

STRONG = 0.99
"""Quantile of an image's attributions, without their sign, that has full colour."""


def save_image(image: Images, path: Path) -> None:
    """Save an image, uint8 (H, W, C), as PNG; a small one by a whole factor larger, so that its pixels show."""
    _enlarged(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)).save(path)


def save_saliency(image: Images, attribution: npt.NDArray[np.float64], path: Path) -> None:
    """Save an image in grey under a map of what spoke for the predicted class (orange) and for the label (blue).

    Parameters
    ----------
    image
        uint8 (H, W, C).
    attribution
        float64 (H, W), above 0 for the predicted class.
    path
        Where to, as PNG.
    """
    _enlarged(Image.fromarray(overlay(image, attribution))).save(path)


def overlay(image: Images, attribution: npt.NDArray[np.float64]) -> Images:
    """Return the picture of `save_saliency` at the image's own size, uint8 (H, W, 3).

    A pixel is the more coloured the larger its attribution; those at the `STRONG` quantile and beyond hide the image.
    """
    strength = np.abs(attribution)
    scale = max(float(np.quantile(strength, STRONG)), 1e-12)
    alpha = np.clip(strength / scale, 0, 1)[..., None] * 0.9
    colour = np.where(attribution[..., None] > 0, np.array(FOR), np.array(AGAINST))
    grey = np.asarray(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("L"), np.float64)
    # Paler, so that both colours stand out on black and on white.
    paper = 64 + grey[..., None] * 0.62
    return np.round(paper * (1 - alpha) + colour * alpha).astype(np.uint8)


def _enlarged(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    if side < TILE:
        factor = -(-TILE // side)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if side <= 2 * TILE:
        return picture
    size = (max(1, 2 * TILE * picture.width // side), max(1, 2 * TILE * picture.height // side))
    return picture.resize(size, Image.Resampling.BOX)


def robustness_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy over the severity of each corruption, with 95 % intervals, a panel a split.

    Parameters
    ----------
    rows
        As `anneal.robustness.robustness_table` returns them, of one split or several.
    path
        Where to, as PNG.
    """
    panels = []
    for split in dict.fromkeys(row["split"] for row in rows):
        lines = []
        for name in dict.fromkeys(row["corruption"] for row in rows):
            of = [row for row in rows if row["split"] == split and row["corruption"] == name]
            columns = {
                key: [float(row[key]) for row in of]
                for key in ("severity", "accuracy", "accuracy_low", "accuracy_high")
            }
            lines.append(
                Line(
                    name,
                    columns["severity"],
                    columns["accuracy"],
                    columns["accuracy_low"],
                    columns["accuracy_high"],
                    style=".-",
                )
            )
        images = next(row["images"] for row in rows if row["split"] == split)
        panels.append(
            Panel(lines, f"{split}: {images} images", "severity (0: as stored)", "accuracy", y_limits=(0.0, 1.02))
        )
    draw_panels(panels, path, size=(5.5, 4.2))
