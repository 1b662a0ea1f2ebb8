"""Test-time augmentation: the views of an image whose predictions are averaged, and prediction under them.

A view is a function from images, uint8 (N, H, W, C), and keyword arguments to a list of views of the same shape.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from anneal.ensemble import COMBINE, Floats, log_softmax
from anneal.params import UserError, allowed, nearest

if TYPE_CHECKING:
    import torch

Images = npt.NDArray[np.uint8]
Entry = str | dict[str, Any]


def identity(images: Images) -> list[Images]:
    """Return the images as they are."""
    return [images]


def hflip(images: Images) -> list[Images]:
    """Return the images mirrored left to right."""
    return [images[:, :, ::-1]]


def vflip(images: Images) -> list[Images]:
    """Return the images mirrored top to bottom."""
    return [images[:, ::-1]]


def shifts(images: Images, *, pixels: Annotated[int, Field(ge=1, le=64)] = 1) -> list[Images]:
    """Return the images moved by ``pixels`` up, down, left and right, the edge's pixels repeated where they come in."""
    height, width = images.shape[1:3]
    if pixels >= min(height, width):
        raise UserError(
            f"evaluate.tta.views: shifts.pixels: found {pixels}, allowed: less than {min(height, width)}, "
            "the side of the image"
        )
    rows, columns = np.arange(height), np.arange(width)
    moved = [images[:, np.clip(rows + by, 0, height - 1)] for by in (pixels, -pixels)]
    return moved + [images[:, :, np.clip(columns + by, 0, width - 1)] for by in (pixels, -pixels)]


def five_crop(images: Images, *, fraction: Annotated[float, Field(gt=0, lt=1)] = 0.875) -> list[Images]:
    """Return the four corners and the centre, each ``fraction`` of the height and width, enlarged to the full size."""
    free = 1 - fraction
    corners = [(0.0, 0.0), (0.0, free), (free, 0.0), (free, free), (free / 2, free / 2)]
    return [_resample(images, top=top, left=left, scale=fraction) for top, left in corners]


def scales(
    images: Images,
    *,
    factors: Annotated[list[Annotated[float, Field(ge=0.5, le=2)]], Field(min_length=1)] = [0.9, 1.1],  # noqa: B006
) -> list[Images]:
    """Return the images zoomed by each factor about their centre, then cropped, or padded with the edge's pixels."""
    return [_resample(images, top=(1 - 1 / f) / 2, left=(1 - 1 / f) / 2, scale=1 / f) for f in factors]


VIEWS: dict[str, Callable[..., list[Images]]] = {
    "identity": identity,
    "hflip": hflip,
    "vflip": vflip,
    "shifts": shifts,
    "five_crop": five_crop,
    "scales": scales,
}
"""``evaluate.tta.views``."""

ZOOMS = ({"Affine"}, {"ShiftScaleRotate"}, {"RandomScale"}, {"RandomResizedCrop"}, {"RandomSizedCrop"})
CROPS = ({"RandomCropFromBorders"}, {"CropAndPad"}, {"BBoxSafeRandomCrop"}, {"AtLeastOneBBoxRandomCrop"})

COVERED_BY: dict[str, Sequence[set[str]]] = {
    "hflip": (
        {"HorizontalFlip"},
        {"D4"},
        {"SquareSymmetry"},
        {"Transpose", "RandomRotate90"},
        {"VerticalFlip", "RandomRotate90"},
    ),
    "vflip": (
        {"VerticalFlip"},
        {"D4"},
        {"SquareSymmetry"},
        {"Transpose", "RandomRotate90"},
        {"HorizontalFlip", "RandomRotate90"},
    ),
    "shifts": ({"RandomPadCrop"}, {"RandomCrop"}, *ZOOMS, *CROPS),
    "five_crop": (*ZOOMS, *CROPS),
    "scales": (*ZOOMS, *CROPS),
}
"""View to the sets of training transforms, in albumentations' names, each of which teaches the network such a view."""


def parse_views(entries: Sequence[Entry]) -> list[tuple[str, dict[str, Any]]]:
    """Return the views of params.yaml as (name, arguments), defaults filled in.

    Parameters
    ----------
    entries
        Each ``"name"`` or ``{"name": {argument: value}}``.

    Raises
    ------
    UserError
        An unknown view or argument, a value out of range, or the same view twice.
    """
    parsed: list[tuple[str, dict[str, Any]]] = []
    for index, entry in enumerate(entries):
        where = f"evaluate.tta.views[{index}]"
        if isinstance(entry, str):
            entry = {entry: None}
        if len(entry) != 1:
            raise UserError(f"{where}: found {entry!r}, allowed: a view's name, or one name with its arguments")
        name, given = next(iter(entry.items()))
        if name not in VIEWS:
            raise UserError(f"{where}: found {name!r}, allowed: {', '.join(VIEWS)}{nearest(name, VIEWS)}")
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise UserError(f"{where}.{name}: found {given!r}, allowed: a mapping of arguments")
        view = (name, {**_defaults(name), **_checked(name, given, f"{where}.{name}")})
        if view in parsed:
            raise UserError(f"{where}: found {name} twice with the same arguments, allowed: once")
        parsed.append(view)
    return parsed


def entries_of(views: Iterable[tuple[str, dict[str, Any]]]) -> list[Entry]:
    """Return parsed views as they stand in params.yaml, with all their arguments."""
    return [{name: arguments} if arguments else name for name, arguments in views]


def make_views(images: Images, views: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[str, Images]]:
    """Return all views of the images, in order: name and uint8 (N, H, W, C); some names give several."""
    return [(name, made) for name, arguments in views for made in VIEWS[name](images, **arguments)]


def uncovered(views: Iterable[tuple[str, dict[str, Any]]], augmentations: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a warning for each view that the training augmentation of some member does not cover.

    A network predicts badly on what it never saw: averaging such a view in costs accuracy.

    Parameters
    ----------
    views
        Parsed views.
    augmentations
        Member to the names of the transforms it was trained with.
    """
    warnings = []
    for name in dict.fromkeys(name for name, _ in views):
        choices = COVERED_BY.get(name, ())
        missing = [member for member, names in augmentations.items() if not any(s <= set(names) for s in choices)]
        if choices and missing:
            who = "no member" if len(missing) == len(augmentations) else f"not every member (not {', '.join(missing)})"
            warnings.append(
                f"evaluate.tta.views: {name}: {who} was trained with an augmentation that covers it; "
                f"drop the view, or train with {' or '.join(' + '.join(sorted(s)) for s in choices[:3])}"
            )
    return warnings


def predict(
    classifiers: Sequence[torch.nn.Module], images: Images, views: Sequence[tuple[str, dict[str, Any]]], average: str
) -> tuple[Floats, Floats]:
    """Predict one batch with every classifier, plain and averaged over the views; each view is predicted once.

    Parameters
    ----------
    classifiers
        M networks in evaluation mode, uint8 NHWC to logits.
    images
        uint8 (N, H, W, C).
    views
        Parsed views.
    average
        ``probability`` or ``logit``.

    Returns
    -------
    plain, averaged
        Log-probabilities, each float64 (M, N, K); ``plain`` is that of the images as they are.
    """
    import torch

    made = make_views(images, views)
    plain, averaged = [], []
    # TF32 would make a GPU's figures differ from a CPU's in the third digit.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for classifier in classifiers:
            own = _log_probabilities(classifier, images)
            by_view = [own if name == "identity" else _log_probabilities(classifier, view) for name, view in made]
            plain.append(own)
            averaged.append(COMBINE[f"{average}_mean"](np.stack(by_view)))
    return np.stack(plain), np.stack(averaged)


def _log_probabilities(classifier: torch.nn.Module, images: Images) -> Floats:
    import torch

    batch = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    device = next(classifier.parameters()).device
    return log_softmax(classifier(batch.to(device)).float().cpu().numpy())


def batch_size(height: int, width: int, channels: int) -> int:
    """Return how many images one forward pass of evaluation sees, so that memory stays within bounds."""
    return max(1, min(256, 2**22 // (height * width * channels)))


def _resample(images: Images, *, top: float, left: float, scale: float) -> Images:
    """Return the window at (top, left), ``scale`` x the size, all in fractions of the side, stretched to the full size.

    Bilinear; beyond the edge, the edge's pixels repeat.
    """
    values = _interpolated(images.astype(np.float32), axis=1, start=top, scale=scale)
    return np.rint(_interpolated(values, axis=2, start=left, scale=scale)).astype(np.uint8)


def _interpolated(values: npt.NDArray[np.float32], *, axis: int, start: float, scale: float) -> npt.NDArray[np.float32]:
    side = values.shape[axis]
    position = np.clip(start * side + (np.arange(side) + 0.5) * scale - 0.5, 0, side - 1)
    before = np.floor(position).astype(np.int64)
    shape = [1] * values.ndim
    shape[axis] = side
    weight = (position - before).astype(np.float32).reshape(shape)
    low, high = values.take(before, axis), values.take(np.minimum(before + 1, side - 1), axis)
    return low + (high - low) * weight


def _defaults(name: str) -> dict[str, Any]:
    parameters = list(inspect.signature(VIEWS[name]).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def _checked(name: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(VIEWS[name], include_extras=True)
    known = list(_defaults(name))
    for key, value in given.items():
        if key not in known:
            there_are = f"allowed: {', '.join(known)}" if known else "it takes none"
            raise UserError(f"{where}.{key}: unknown argument, {there_are}{nearest(key, known)}")
        adapter: TypeAdapter[Any] = TypeAdapter(hints[key], config=ConfigDict(strict=True, allow_inf_nan=False))
        try:
            adapter.validate_python(value)
        except ValidationError:
            raise UserError(f"{where}.{key}: found {value!r}, allowed: {_range(adapter)}") from None
    return dict(given)


def _range(adapter: TypeAdapter[Any]) -> str:
    schema = adapter.json_schema()
    items = f" of {allowed(schema['items'], schema)}" if "items" in schema else ""
    return allowed(schema, schema) + items
