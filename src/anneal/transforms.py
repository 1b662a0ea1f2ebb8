"""Our own albumentations transforms: the ones every recipe uses, an order of magnitude faster than the library's.

The only module that imports albumentations, so that it is always imported the same way: without its update check, which
would ask the network, without its OpenCV threads, which fight with the loader's processes, and without its
``albumentations.pytorch``, which would import torch (two of three seconds) for a class that nobody here uses.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field


@contextmanager
def without_torch() -> Iterator[None]:
    """Make ``import albumentations.pytorch`` fail inside the block, which albumentations takes as "torch is not installed"."""
    name = "albumentations.pytorch"
    loaded = name in sys.modules
    if not loaded:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not loaded:
            del sys.modules[name]


os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
with without_torch():
    import albumentations as A
    from albumentations.core.serialization import serialize_enum

__all__ = ["A", "Cutout", "RandomPadCrop", "serialize_enum", "without_torch"]

cv2.setNumThreads(0)

Image = npt.NDArray[np.uint8]
Byte = Annotated[int, Field(ge=0, le=255)]
Fraction = Annotated[float, Field(gt=0, le=1)]

BORDERS = {"constant": cv2.BORDER_CONSTANT, "edge": cv2.BORDER_REPLICATE, "reflect": cv2.BORDER_REFLECT_101}


def _pixels(fraction: float, side: int) -> int:
    return max(1, round(fraction * side))


class BatchTransform(A.ImageOnlyTransform):
    """A transform that also takes a whole batch, each image by draws of its own, at a fraction of the cost of calls."""

    def apply_batch(self, images: Image) -> Image:
        """Transform uint8 (N, H, W, C) into a new array of the same shape, each image with probability ``p``."""
        raise NotImplementedError

    def _chosen(self, n: int) -> Iterator[int]:
        """Yield the indices of the images to transform, each with probability ``p``."""
        return (
            iter(range(n)) if self.p >= 1 else iter(np.flatnonzero(self.random_generator.random(n) < self.p).tolist())
        )


class RandomPadCrop(BatchTransform):
    """Pad every side, then crop back to the size at a random place: a shift by whole pixels in each direction.

    Parameters
    ----------
    padding
        Fraction of the side, in (0, 1], at least one pixel: 0.125 is the usual 4 pixels at 32. The shift is uniform over
        ``-padding .. padding``.
    border
        What comes in at the edge: ``constant`` (`fill`), ``edge`` (the last pixel) or ``reflect`` (mirrored).
    fill
        0..255, for ``constant``.
    p
        Probability.

    Notes
    -----
    Lee et al. 2015, "Deeply-supervised nets"; He et al. 2016, "Deep residual learning for image recognition".
    """

    class InitSchema(A.BasicTransform.InitSchema):
        """What the arguments may be."""

        padding: Fraction
        border: Literal["constant", "edge", "reflect"]
        fill: Byte

    def __init__(self, padding: float = 0.125, border: str = "constant", fill: int = 0, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.padding, self.border, self.fill = padding, border, fill

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Draw the shift in pixels, for an image of height and width ``params["shape"]``."""
        height, width = params["shape"][:2]
        draw, vertical, horizontal = self.py_random.random, _pixels(self.padding, height), _pixels(self.padding, width)
        down = int(draw() * (2 * vertical + 1)) - vertical
        return {"down": down, "right": int(draw() * (2 * horizontal + 1)) - horizontal}

    def apply(self, img: Image, down: int, right: int, **params: Any) -> Image:  # noqa: ARG002
        """Return the image shifted down and to the right."""
        height, width = img.shape[:2]
        top, left = max(down, 0), max(right, 0)
        bottom, behind = top - down, left - right
        mode, value = BORDERS[self.border], (self.fill,) * 4
        padded: Any = cv2.copyMakeBorder(img, top, bottom, left, behind, mode, value=value)
        return np.reshape(padded[bottom : bottom + height, behind : behind + width], img.shape)

    def apply_batch(self, images: Image) -> Image:
        """Shift each image by a draw of its own."""
        n, height, width = images.shape[:3]
        vertical, horizontal = _pixels(self.padding, height), _pixels(self.padding, width)
        tops = self.random_generator.integers(0, 2 * vertical + 1, n).tolist()
        lefts = self.random_generator.integers(0, 2 * horizontal + 1, n).tolist()
        sides = ((0, 0), (vertical, vertical), (horizontal, horizontal), (0, 0))
        if self.border == "constant":
            padded = np.pad(images, sides, constant_values=self.fill)
        else:
            padded = np.pad(images, sides, mode="edge" if self.border == "edge" else "reflect")
        out = np.empty_like(images) if self.p >= 1 else images.copy()
        for i in self._chosen(n):
            top, left = tops[i], lefts[i]
            out[i] = padded[i, top : top + height, left : left + width]
        return out


class Cutout(BatchTransform):
    """Blank out one square; its centre is anywhere in the image, so that the square may stick out at the edge.

    Parameters
    ----------
    size
        Side of the square as a fraction of the shorter side, in (0, 1]: the paper has 0.5 for CIFAR-10, 0.25 for CIFAR-100.
    fill
        0..255; 127, mid-grey, is near the mean of most data.
    p
        Probability.

    Notes
    -----
    DeVries & Taylor 2017, "Improved regularization of convolutional neural networks with cutout".
    """

    class InitSchema(A.BasicTransform.InitSchema):
        """What the arguments may be."""

        size: Fraction
        fill: Byte

    def __init__(self, size: float = 0.25, fill: int = 127, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.size, self.fill = size, fill

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Draw the centre of the square in pixels."""
        height, width = params["shape"][:2]
        return {"row": int(self.py_random.random() * height), "column": int(self.py_random.random() * width)}

    def apply(self, img: Image, row: int, column: int, **params: Any) -> Image:  # noqa: ARG002
        """Return a copy of the image with the square around (row, column) filled."""
        side = _pixels(self.size, min(img.shape[:2]))
        top, left = row - side // 2, column - side // 2
        img = img.copy()
        img[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = self.fill
        return img

    def apply_batch(self, images: Image) -> Image:
        """Blank out a square of each image by a draw of its own."""
        n, height, width = images.shape[:3]
        side = _pixels(self.size, min(height, width))
        tops = (self.random_generator.integers(0, height, n) - side // 2).tolist()
        lefts = (self.random_generator.integers(0, width, n) - side // 2).tolist()
        out = images.copy()
        for i in self._chosen(n):
            top, left = tops[i], lefts[i]
            out[i, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = self.fill
        return out
