"""One image file to one uint8 array: strict decoding, resizing, grey and colour; the same for training and serving."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""What is decoded; Pillow's other readers (PostScript, icons, ...) never see a file."""

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "area": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what turns the picture upright."""

ORIENTATION_TAG = 0x0112
TILE_TAGS = (322, 323)

MAX_SCANS = 100
"""Of a JPEG; each passes over the whole picture, so that a few kilobytes could take hours. Encoders write about 10."""

JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""What is no compressed data: a stuffed zero, a restart and a fill byte are."""


def decode(data: bytes, *, max_pixels: int) -> Pixels:
    """Decode an image file strictly: upright, on white where transparent, 8 bits a channel, first frame.

    Parameters
    ----------
    data
        Content of the file, in one of `FORMATS`.
    max_pixels
        Largest width x height.

    Returns
    -------
    ndarray
        uint8 (H, W, 1) for grey files, (H, W, 3) RGB for all others.

    Raises
    ------
    ValueError
        The reason, fit to be shown: unknown format, damaged or truncated, too large, no defined 8-bit range.
    """
    Image.MAX_IMAGE_PIXELS = None  # max_pixels is the limit; Pillow's own would only warn, or refuse what is allowed
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            check_pixels(width, height, max_pixels)
            check_pixels(*_tile(image), max_pixels)
            if image.format in ("JPEG", "MPO") and _num_scans(data) > MAX_SCANS:
                raise _Refusal(f"a JPEG of more than {MAX_SCANS} scans")
            image.load()
            return _to_array(_turn_upright(image))
    except _Refusal:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"no image in a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise ValueError(f"does not decode: {' '.join(str(error).split())[:200] or type(error).__name__}") from None


class _Refusal(ValueError):
    """A refusal of ours, passed on as it is."""


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Check the size of a picture before memory is taken for it.

    Raises
    ------
    ValueError
        It has more than ``max_pixels``.
    """
    if width * height > max_pixels:
        raise _Refusal(f"{width} x {height} pixels, more than data.max_pixels ({max_pixels})")


def _tile(image: Image.Image) -> tuple[int, int]:
    """Return the size of a TIFF's tiles, which may be larger than the picture; otherwise the picture's."""
    tags = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag) for tag in TILE_TAGS)
    return (width, height) if isinstance(width, int) and isinstance(height, int) else image.size


def _num_scans(data: bytes) -> int:
    """Count the scans of a JPEG's main picture, those of a thumbnail or of what follows it not included."""
    if data.count(b"\xff\xda") <= MAX_SCANS:
        return 0
    scans, place = 0, 2
    while match := JPEG_MARKER.search(data, place):
        place = match.end()
        marker = match[0][1]
        if marker == 0xD9:
            break
        scans += marker == 0xDA
        if marker != 0x01:
            place += int.from_bytes(data[place : place + 2], "big")
    return scans


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # damaged EXIF beside sound pixels
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _to_array(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise _Refusal("floating-point pixels have no defined range")
    mode = "L" if _is_grey(image) else "RGB"
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas.convert("RGB")
    array = np.array(image.convert(mode))
    return array[:, :, None] if mode == "L" else array


def _is_grey(image: Image.Image) -> bool:
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La")


def _from_16_bits(image: Image.Image) -> Pixels:
    values = np.array(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise _Refusal("32-bit pixels have no defined range")
    transparent: Any = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = 65535
    return ((values * 255 + 32767) // 65535).astype(np.uint8)[:, :, None]


def resize(image: Pixels, size: int, fit: str, interpolation: str) -> Pixels:
    """Resize an image to a square; every interpolation but ``nearest`` is antialiased when shrinking.

    Parameters
    ----------
    image
        uint8 (H, W, C), C 1 or 3.
    size
        Height and width of the result in pixels.
    fit
        ``crop``: the largest centred square, all else is cut off; ``pad``: the whole image, centred on black;
        ``stretch``: the whole image, its aspect ratio lost.
    interpolation
        A key of `RESAMPLING`.

    Returns
    -------
    ndarray
        uint8 (size, size, C); ``image`` itself where it has that size.

    >>> resize(np.full((4, 8, 1), 255, np.uint8), 4, "pad", "area")[:, 0, 0]
    array([  0, 255, 255,   0], dtype=uint8)
    """
    height, width, channels = image.shape
    if (height, width) == (size, size):
        return image
    box: tuple[float, float, float, float] = (0, 0, width, height)
    target = (size, size)
    if fit == "crop":
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    elif fit == "pad":
        side = max(height, width)
        target = (max(1, round(width * size / side)), max(1, round(height * size / side)))
    picture = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    resized = np.array(picture.resize(target, RESAMPLING[interpolation], box=box)).reshape(
        target[1], target[0], channels
    )
    if target == (size, size):
        return resized
    canvas = np.zeros((size, size, channels), np.uint8)
    top, left = (size - target[1]) // 2, (size - target[0]) // 2
    canvas[top : top + target[1], left : left + target[0]] = resized
    return canvas


def as_channels(image: Pixels, channels: int) -> Pixels:
    """Return uint8 (..., C) with 1 or 3 channels: grey is repeated, colour becomes ITU-R 601 luma.

    >>> as_channels(np.array([[[255, 0, 0]]], np.uint8), 1)
    array([[[76]]], dtype=uint8)
    """
    if image.shape[-1] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=-1)
    # Pillow's integers, so that a grey picture saved as RGB keeps its values.
    red, green, blue = np.moveaxis(image.astype(np.uint32), -1, 0)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)[..., None]
