"""Images for bench/diagnosis.py: seven small data sets, of which two are drawn here."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

ROOT = Path(__file__).parents[1]

Images = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
"""Images, uint8 (N, H, W, C), and their labels, int64 (N,)."""


def images_of(data: str, fashion: Path | None, clothing: Path | None) -> Images:
    """Return a data set of bench/diagnosis.py; ``fashion`` is the folder of Fashion-MNIST's files, ``clothing`` an archive.

    Those that need neither do with None.
    """
    if data == "digits":
        return digits()
    if data == "patches":
        assert clothing is not None
        return patches(clothing)
    if data == "letters":
        return letters()
    if data == "figures":
        return figures()
    assert fashion is not None
    images, labels = fashion_mnist(fashion)
    if data == "fashion-mnist":
        return images[:12_000], labels[:12_000]
    classes = {"garments": [0, 2, 3, 4, 6], "accessories": [1, 5, 7, 8, 9]}[data]
    chosen = np.flatnonzero(np.isin(labels, classes))
    chosen = chosen[chosen >= 12_000][:12_000]
    return images[chosen], np.searchsorted(classes, labels[chosen]).astype(np.int64)


def digits() -> Images:
    """Return the digits of data/digits.zip: 8 x 8, grey, 10 classes."""
    from anneal.decoding import decode
    from anneal.sources import open_source

    source = open_source(ROOT / "data" / "digits.zip", "auto")
    names = list(source.classes)
    items = [(decode(bytes(item.load()), max_pixels=10**6), names.index(item.label)) for item in source]
    images = np.stack([image for image, _ in items])
    return images[..., :1], np.array([label for _, label in items], np.int64)


def fashion_mnist(folder: Path) -> Images:
    """Return the training images of Fashion-MNIST at half their size: 14 x 14, grey, 10 classes."""
    raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    images = np.frombuffer(raw, np.uint8).reshape(-1, 14, 2, 14, 2)
    halved = images.astype(np.float32).mean((2, 4)).round().astype(np.uint8)
    return halved[..., None], np.frombuffer(labels, np.uint8).astype(np.int64)


PATCH, SHRINK = 8, 2
"""Pixels a side of a patch, and of the photograph to one of its pixels."""


def patches(archive: Path) -> Images:
    """Return patches of ten photographs, of each class the largest; a patch's label is the photograph that it is from.

    Patches do not overlap. The photographs themselves are too few, two hundred a class, for any recipe to be sound.
    """
    largest: dict[str, tuple[int, str, npt.NDArray[np.uint8]]] = {}
    with tarfile.open(archive) as tar:
        for member in sorted((each for each in tar if each.isfile()), key=lambda each: each.name):
            name = Path(member.name).parent.name
            file = tar.extractfile(member)
            if file is None or Path(member.name).suffix != ".jpg":
                continue
            with Image.open(file) as image:
                area = image.width * image.height
                if name not in largest or area > largest[name][0]:
                    largest[name] = area, member.name, np.asarray(image.convert("RGB"))
    images, labels = [], []
    for label, name in enumerate(sorted(largest)):
        photograph = largest[name][2].astype(np.float32)
        rows, columns = (side // (PATCH * SHRINK) for side in photograph.shape[:2])
        cut = photograph[: rows * PATCH * SHRINK, : columns * PATCH * SHRINK]
        small = cut.reshape(rows, PATCH, SHRINK, columns, PATCH, SHRINK, 3).mean((2, 5))
        found = small.transpose(0, 2, 1, 3, 4).reshape(-1, PATCH, PATCH, 3).round().astype(np.uint8)
        images.append(found)
        labels += [label] * len(found)
    return np.concatenate(images), np.array(labels, np.int64)


LETTERS = "ABCDEFGHIJKL"
SIDE, LARGER = 12, 4
"""Pixels a side of a letter or a figure, and how much larger it is drawn."""


def letters(count: int = 6000) -> Images:
    """Return letters in the text fonts that come with matplotlib, turned, sheared, blurred and noisy: 12 x 12, grey, 12 classes."""
    draw = np.random.default_rng(0)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    kinds = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*", "cmr10*", "cmss10*", "cmtt10*", "cmb10*")
    found = sorted(path for kind in kinds for path in folder.glob(f"{kind}.ttf"))
    fonts = [path for path in found if "Display" not in path.name]  # those have no plain letters
    images = np.empty((count, SIDE, SIDE, 1), np.uint8)
    labels = draw.integers(len(LETTERS), size=count)
    large = SIDE * LARGER
    for i, label in enumerate(labels):
        font = ImageFont.truetype(fonts[draw.integers(len(fonts))], int(draw.uniform(0.65, 1.0) * large))
        page = Image.new("L", (large, large), 0)
        middle = large / 2 + draw.uniform(-0.08, 0.08, 2) * large
        ImageDraw.Draw(page).text((middle[0], middle[1]), LETTERS[label], fill=255, font=font, anchor="mm")
        angle, shear = np.radians(draw.uniform(-15, 15)), draw.uniform(-0.25, 0.25)
        matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, shear], [0, 1]]
        offset = large / 2 - matrix @ [large / 2, large / 2]
        placed = (*matrix[0], offset[0], *matrix[1], offset[1])
        page = page.transform((large, large), Image.Transform.AFFINE, placed, Image.Resampling.BILINEAR)
        page = page.filter(ImageFilter.GaussianBlur(draw.uniform(0, 0.6) * LARGER))
        small = np.asarray(page, np.float32).reshape(SIDE, LARGER, SIDE, LARGER).mean((1, 3))
        ink, paper = draw.uniform(0.5, 1.0), draw.uniform(0, 60)
        noisy = small * ink + paper + draw.normal(0, draw.uniform(5, 20), small.shape)
        images[i, ..., 0] = noisy.clip(0, 255).round()
    return images, labels.astype(np.int64)


CORNERS = {"triangle": 3, "square": 4, "hexagon": 6}
FIGURES = ("disc", "ring", "half", "star", "cross", "bars", *CORNERS)


def figures(count: int = 6000) -> Images:
    """Return figures of any colour on any other, turned a little, off the middle and noisy: 12 x 12, RGB, 9 classes."""
    draw = np.random.default_rng(0)
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    labels = draw.integers(len(FIGURES), size=count)
    large = SIDE * LARGER
    for i, label in enumerate(labels):
        mask = Image.new("L", (large, large), 0)
        radius = draw.uniform(0.28, 0.45) * large
        middle = large / 2 + draw.uniform(-0.06, 0.06, 2) * large
        draw_figure(ImageDraw.Draw(mask), FIGURES[label], middle, radius, draw.uniform(-0.35, 0.35))
        mask = mask.filter(ImageFilter.GaussianBlur(draw.uniform(0, 0.5) * LARGER))
        small = np.asarray(mask, np.float32).reshape(SIDE, LARGER, SIDE, LARGER).mean((1, 3))[..., None] / 255
        # The figure is always the lighter: a network that is not told so would need many more images.
        ground, ink = draw.uniform(0, 90, 3), draw.uniform(120, 255, 3)
        noisy = ground + (ink - ground) * small + draw.normal(0, draw.uniform(5, 20), (SIDE, SIDE, 3))
        images[i] = noisy.clip(0, 255).round()
    return images, labels.astype(np.int64)


def draw_figure(
    pen: ImageDraw.ImageDraw, name: str, middle: npt.NDArray[np.float64], radius: float, angle: float
) -> None:
    """Draw a figure of `FIGURES` in white; ``angle`` is in radians."""

    def around(angles: npt.NDArray[np.float64], radii: npt.NDArray[np.float64]) -> list[tuple[float, float]]:
        turned = angles + angle - np.pi / 2
        return [
            (float(middle[0] + r * np.cos(a)), float(middle[1] + r * np.sin(a)))
            for a, r in zip(turned, radii, strict=True)
        ]

    def bar(along: float, width: float, offset: float = 0.0) -> None:
        corners = np.array(
            [[-1.0, offset - width], [1.0, offset - width], [1.0, offset + width], [-1.0, offset + width]]
        )
        angles = np.arctan2(corners[:, 1], corners[:, 0]) + along
        pen.polygon(around(angles, radius * np.hypot(*corners.T)), fill=255)

    box = (*(middle - radius), *(middle + radius))
    degrees = float(np.degrees(angle))
    if name == "disc":
        pen.ellipse(box, fill=255)
    elif name == "ring":
        pen.ellipse(box, outline=255, width=max(1, round(radius * 0.35)))
    elif name == "half":
        pen.pieslice(box, degrees, degrees + 180, fill=255)
    elif name == "star":
        pen.polygon(around(np.arange(10) * np.pi / 5, radius * np.where(np.arange(10) % 2, 0.4, 1.1)), fill=255)
    elif name == "cross":
        bar(0.0, 0.25)
        bar(np.pi / 2, 0.25)
    elif name == "bars":
        bar(0.0, 0.2, -0.6)
        bar(0.0, 0.2, 0.6)
    else:
        corners = CORNERS[name]
        pen.polygon(around(np.arange(corners) * 2 * np.pi / corners, np.full(corners, radius)), fill=255)
