"""The augmentation preview: what the policy makes of a few real images, drawn before anything is trained on them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anneal.augment import apply_policy, seed_policy
from anneal.store import Images, Split

if TYPE_CHECKING:
    from anneal.transforms import A

MOST_CLASSES = 20
VERSIONS = 7
TILE = 64
GAP = 4


def draw_preview(compose: A.Compose, split: Split, classes: Sequence[str], folder: Path, *, seed: int) -> list[Path]:
    """Draw a row for each class, the first image of the class and `VERSIONS` augmented versions of it.

    Parameters
    ----------
    compose
        The policy.
    split
        Training split.
    classes
        Names by label; the first `MOST_CLASSES` that have images are drawn.
    folder
        Gets ``overview.png`` (all rows, each with its name) and ``<label>-<name>.png`` (one row).

    Returns
    -------
    list of Path
        What was written, the overview first. The same policy, images and seed give the same bytes.
    """
    present = [label for label in range(len(classes)) if (split.labels == label).any()][:MOST_CLASSES]
    rows = {label: _row(compose, split, label, seed) for label in present}
    height, width = next(iter(rows.values())).shape[:2]
    font = ImageFont.load_default(14)
    names = {label: _short(classes[label]) for label in present}
    left = 3 * GAP + round(max(font.getlength(name) for name in names.values()))
    overview = Image.new("RGB", (left + width, len(rows) * (height + GAP) + GAP), "white")
    draw = ImageDraw.Draw(overview)
    paths = [folder / "overview.png"]
    for i, (label, row) in enumerate(rows.items()):
        top = GAP + i * (height + GAP)
        overview.paste(Image.fromarray(row), (left, top))
        draw.text((GAP, top + height // 2), names[label], fill="black", font=font, anchor="lm")
        paths.append(folder / f"{label:03d}-{re.sub(r'[^A-Za-z0-9_-]+', '-', classes[label])[:60]}.png")
        Image.fromarray(row).save(paths[-1])
    overview.save(paths[0])
    return paths


def _row(compose: A.Compose, split: Split, label: int, seed: int) -> Images:
    """Return the original and its augmented versions side by side, uint8 RGB."""
    original = split.take(np.flatnonzero(split.labels == label)[:1])
    seed_policy(compose, seed, "preview", label)
    images = [original[0], *apply_policy(compose, np.repeat(original, VERSIONS, axis=0))]
    tiles = [_tile(image) for image in images]
    gap = np.full((tiles[0].shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([tiles[0], gap, gap, gap, *(part for tile in tiles[1:] for part in (tile, gap))], axis=1)


def _tile(image: Images) -> Images:
    """Scale an image to `TILE` pixels or somewhat more: by a whole factor where it is small, so that its pixels show."""
    pixels = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    side = max(pixels.size)
    if side < TILE:
        factor = -(-TILE // side)
        return np.asarray(pixels.resize((pixels.width * factor, pixels.height * factor), Image.Resampling.NEAREST))
    if side <= 2 * TILE:
        return np.asarray(pixels)
    size = (max(1, 2 * TILE * pixels.width // side), max(1, 2 * TILE * pixels.height // side))
    return np.asarray(pixels.resize(size, Image.Resampling.BOX))


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
