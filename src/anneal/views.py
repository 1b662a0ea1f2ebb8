"""Test-time augmentation: the views of an image whose predictions are averaged, and prediction under them.

A view is a function from the height and width of the images, and keyword arguments, to the images that it stands for: each
a `Warp`, which says where every pixel comes from, or a `Draw` of an augmentation policy.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from anneal.augment import COLOUR_ONLY, COMPOSITIONS, PRESETS, apply_policy, check_policy, compile_policy, seed_policy
from anneal.ensemble import Floats, log_softmax, logit_mean, probability_mean
from anneal.params import ParamsError, UserError, allowed, nearest

if TYPE_CHECKING:
    import torch

    from anneal.transforms import A

Images = npt.NDArray[np.uint8]
Entry = str | dict[str, Any]
Grid = Sequence[Entry | list[Entry]]
View = tuple[str, dict[str, Any]]
"""A parsed view: its name and all its arguments."""

IDENTITY: View = ("identity", {})


SEEDED = Lock()
"""Held from the seeding of a policy to its use: a served predictor may be asked by several threads."""


class Warp(NamedTuple):
    """Where the pixels of a view come from, in pixels of the stored image: the centre of its first pixel is (0, 0).

    ``rows`` and ``columns`` are float64 and broadcast to the view's (height, width). Between pixels the value is bilinear,
    rounded to whole numbers; beyond the edge, the edge's pixels repeat.
    """

    rows: Floats
    columns: Floats


class Draw(NamedTuple):
    """The draw ``number`` of an augmentation policy (JSON text) for an image, of the randomness of ``seed``."""

    policy: str
    seed: int
    number: int


def identity(height: int, width: int) -> list[Warp]:
    """Return the image as it is."""
    return [_grid(np.arange(height), np.arange(width))]


def hflip(height: int, width: int) -> list[Warp]:
    """Return the image mirrored left to right."""
    return [_grid(np.arange(height), np.arange(width)[::-1])]


def vflip(height: int, width: int) -> list[Warp]:
    """Return the image mirrored top to bottom."""
    return [_grid(np.arange(height)[::-1], np.arange(width))]


def shifts(
    height: int,
    width: int,
    *,
    pixels: Annotated[int, Field(ge=1, le=64)] = 1,
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None,
) -> list[Warp]:
    """Return the image moved up, down, left and right, by ``pixels``, or by ``fraction`` of the side, at least one pixel."""
    down, right = (pixels if fraction is None else max(1, round(fraction * side)) for side in (height, width))
    if down >= height or right >= width:
        found = f"pixels: found {pixels}" if fraction is None else f"fraction: found {fraction}"
        raise UserError(f"shifts.{found}, allowed: less than {min(height, width)} pixels, the side of the image")
    rows, columns = np.arange(height), np.arange(width)
    moved = [_grid(rows + by, columns) for by in (down, -down)]
    return moved + [_grid(rows, columns + by) for by in (right, -right)]


def five_crop(
    height: int, width: int, *, fraction: Annotated[float, Field(gt=0, lt=1)] = 0.875, resize: bool = True
) -> list[Warp]:
    """Return the four corners and the centre, each ``fraction`` of the height and width.

    Enlarged to the full size; without ``resize`` they stay as small as they are, which fully convolutional networks take.
    """
    if not resize:
        h, w = (max(1, round(fraction * side)) for side in (height, width))
        down, right = height - h, width - w
        corners = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
        return [_grid(top + np.arange(h), left + np.arange(w)) for top, left in corners]
    free = 1 - fraction
    places = [(0.0, 0.0), (0.0, free), (free, 0.0), (free, free), (free / 2, free / 2)]
    return [
        _grid(_window(height, top * height, fraction), _window(width, left * width, fraction)) for top, left in places
    ]


def ten_crop(
    height: int, width: int, *, fraction: Annotated[float, Field(gt=0, lt=1)] = 0.875, resize: bool = True
) -> list[Warp]:
    """Return the images of `five_crop`, then each of them mirrored left to right."""
    crops = five_crop(height, width, fraction=fraction, resize=resize)
    return crops + [Warp(rows, columns[:, ::-1]) for rows, columns in crops]


def scales(
    height: int,
    width: int,
    *,
    factors: Annotated[list[Annotated[float, Field(ge=0.5, le=2)]], Field(min_length=1)] = [0.9, 1.1],  # noqa: B006
) -> list[Warp]:
    """Return the image zoomed by each factor about its centre, then cropped, or padded with the edge's pixels."""

    def zoomed(side: int, factor: float) -> Floats:
        return _window(side, side * (1 - 1 / factor) / 2, 1 / factor)

    return [_grid(zoomed(height, factor), zoomed(width, factor)) for factor in factors]


def rotations(
    height: int,
    width: int,
    *,
    degrees: Annotated[list[Annotated[float, Field(ge=-180, le=180)]], Field(min_length=1)] = [-10.0, 10.0],  # noqa: B006
) -> list[Warp]:
    """Return the image turned about its centre by each angle, counter-clockwise, its corners cut off."""
    down, right = (np.arange(side) - (side - 1) / 2 for side in (height, width))
    made = []
    for angle in np.deg2rad(degrees):
        sine, cosine = np.sin(angle), np.cos(angle)
        rows = (height - 1) / 2 + sine * right[None, :] + cosine * down[:, None]
        made.append(Warp(rows, (width - 1) / 2 + cosine * right[None, :] - sine * down[:, None]))
    return made


def dense(
    height: int,
    width: int,
    *,
    factors: Annotated[list[Annotated[float, Field(gt=1, le=4)]], Field(min_length=1)] = [1.25],  # noqa: B006
) -> list[Warp]:
    """Return the whole image enlarged by each factor, for fully convolutional networks, which average over its places."""

    def enlarged(side: int, factor: float) -> Floats:
        larger = round(side * factor)
        return (np.arange(larger) + 0.5) * side / larger - 0.5

    return [_grid(enlarged(height, factor), enlarged(width, factor)) for factor in factors]


def augment(
    height: int,  # noqa: ARG001
    width: int,  # noqa: ARG001
    *,
    policy: Annotated[
        str | list[str | dict[str, dict[str, Any] | None]],
        Field(json_schema_extra={"allowed": f"{' | '.join(PRESETS)} | a list of transforms"}),
    ] = "light",
    n: Annotated[int, Field(ge=1, le=256)] = 4,
    seed: Annotated[int, Field(ge=0)] | None = None,
) -> list[Draw]:
    """Return ``n`` draws of an augmentation policy, as ``augment.policy`` has it.

    Draws belong to the seed and to the image's own pixels, never to its place in a batch or file. Without a ``seed``,
    ``evaluate`` writes that of the recipe into the exported predictor.
    """
    return [Draw(json.dumps(policy), seed or 0, number) for number in range(n)]


VIEWS: dict[str, Callable[..., Sequence[Warp | Draw]]] = {
    "identity": identity,
    "hflip": hflip,
    "vflip": vflip,
    "shifts": shifts,
    "five_crop": five_crop,
    "ten_crop": ten_crop,
    "scales": scales,
    "rotations": rotations,
    "dense": dense,
    "augment": augment,
}
"""``evaluate.tta.views``."""

AVERAGE: dict[str, Callable[[Floats], Floats]] = {
    "probability": probability_mean,
    "logit": logit_mean,
    "log_probability": logit_mean,
}
"""``evaluate.tta.average``. The last two are one: logits differ from log-probabilities by a constant an image, which the
softmax takes out again, so the softmax of the mean logits is the normalised geometric mean of the probabilities."""

ZOOMS = ({"Affine"}, {"ShiftScaleRotate"}, {"RandomScale"}, {"RandomResizedCrop"}, {"RandomSizedCrop"})
CROPS = ({"RandomCropFromBorders"}, {"CropAndPad"}, {"BBoxSafeRandomCrop"}, {"AtLeastOneBBoxRandomCrop"})
MIRRORS = (
    {"HorizontalFlip"},
    {"D4"},
    {"SquareSymmetry"},
    {"Transpose", "RandomRotate90"},
    {"VerticalFlip", "RandomRotate90"},
)

COVERED_BY: dict[str, Sequence[set[str]]] = {
    "hflip": MIRRORS,
    "vflip": (
        {"VerticalFlip"},
        {"D4"},
        {"SquareSymmetry"},
        {"Transpose", "RandomRotate90"},
        {"HorizontalFlip", "RandomRotate90"},
    ),
    "shifts": ({"RandomPadCrop"}, {"RandomCrop"}, *ZOOMS, *CROPS),
    "five_crop": (*ZOOMS, *CROPS),
    "ten_crop": tuple(zoom | mirror for mirror in MIRRORS for zoom in (*ZOOMS, *CROPS)),
    "scales": (*ZOOMS, *CROPS),
    "rotations": ({"Rotate"}, {"SafeRotate"}, {"Affine"}, {"ShiftScaleRotate"}),
    "dense": (*ZOOMS, *CROPS),
}
"""View to the sets of training transforms, in albumentations' names, each of which teaches the network such a view."""


# ---- from params.yaml -------------------------------------------------------------------------------------------------


def parse_views(entries: Sequence[Entry], key: str = "evaluate.tta.views") -> list[View]:
    """Return the views of params.yaml as (name, arguments), defaults filled in.

    Parameters
    ----------
    entries
        Each ``"name"`` or ``{"name": {argument: value}}``.
    key
        Where they stand, for messages.

    Raises
    ------
    UserError
        An unknown view or argument, a value out of range, or the same view twice.
    """
    parsed: list[View] = []
    for index, entry in enumerate(entries):
        view = _parsed(entry, f"{key}[{index}]")
        if view in parsed:
            raise UserError(f"{key}[{index}]: found {view[0]} twice with the same arguments, allowed: once")
        parsed.append(view)
    return parsed


def _parsed(entry: Entry, where: str) -> View:
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
    arguments = {**_defaults(name), **_checked(name, given, f"{where}.{name}")}
    if arguments.get("fraction") is not None and "pixels" in arguments:
        if "pixels" in given:
            raise UserError(f"{where}.{name}: found pixels and fraction, allowed: one of them")
        del arguments["pixels"]
    return name, {key: value for key, value in arguments.items() if value is not None}


def parse_sets(entries: Grid, key: str = "evaluate.grid") -> list[list[View]]:
    """Return sets of views, each to be averaged: a single view stands for itself and the identity, a list as it is.

    Parameters
    ----------
    entries
        Each a view as for `parse_views`, or a list of views.
    key
        Where they stand, for messages.

    Raises
    ------
    UserError
        As `parse_views`; an empty list, the same set twice, or the identity alone.

    Examples
    --------
    >>> parse_sets(["hflip", ["hflip"]])
    [[('identity', {}), ('hflip', {})], [('hflip', {})]]
    """
    sets: list[list[View]] = []
    for index, entry in enumerate(entries):
        where = f"{key}[{index}]"
        found = parse_views(entry, where) if isinstance(entry, list) else with_identity([_parsed(entry, where)])
        if not found or found == [IDENTITY]:
            raise UserError(f"{where}: found {entry!r}, allowed: a view beside the identity, or a list of views")
        if found in sets:
            raise UserError(f"{where}: found {set_label(found)} twice, allowed: once")
        sets.append(found)
    return sets


def set_label(views: Iterable[View]) -> str:
    """Return views that are averaged on one line.

    >>> set_label([IDENTITY, ("shifts", {"pixels": 2})])
    'identity + shifts pixels=2'
    """
    return " + ".join(label_of(view) for view in views)


def union(sets: Iterable[Iterable[View]]) -> list[View]:
    """Return all views of some sets once each, in order."""
    found: list[View] = []
    for views in sets:
        found += [view for view in views if view not in found]
    return found


def entries_of(views: Iterable[View]) -> list[Entry]:
    """Return parsed views as they stand in params.yaml, with all their arguments."""
    return [{name: arguments} if arguments else name for name, arguments in views]


def with_identity(views: Sequence[View]) -> list[View]:
    """Return the views with the identity before them where it is not among them."""
    return list(views) if IDENTITY in views else [IDENTITY, *views]


def label_of(view: View) -> str:
    """Return a parsed view on one line, with the arguments that are not its defaults, and without the seed of draws.

    >>> label_of(("shifts", {"pixels": 2})), label_of(("identity", {}))
    ('shifts pixels=2', 'identity')
    """
    name, arguments = view
    defaults = _defaults(name)
    own = [f" {key}={_compact(value)}" for key, value in arguments.items() if value != defaults[key] and key != "seed"]
    return name + "".join(own)


def told_apart(labels: Iterable[str]) -> list[str]:
    """Return labels with a number behind each that stood before: policies that differ in an argument or seed have one label.

    >>> told_apart(["hflip", "augment", "augment"])
    ['hflip', 'augment', 'augment (2)']
    """
    found: list[str] = []
    stood: Counter[str] = Counter()
    for label in labels:
        stood[label] += 1
        found.append(label if stood[label] == 1 else f"{label} ({stood[label]})")
    return found


def resolve(views: Iterable[View], *, channels: int, seed: int, key: str = "evaluate.tta.views") -> list[View]:
    """Return parsed views with nothing left open: a policy's preset as its list of transforms, and its seed.

    Parameters
    ----------
    views
        Parsed views.
    channels
        Of the images; 1 channel is grey, on which a preset leaves its transforms of colour out.
    seed
        For the policies that name none.
    key
        Where they stand, for messages.

    Raises
    ------
    UserError
        Two of them are now the same.
    """
    resolved: list[View] = []
    for name, arguments in views:
        if name == "augment":
            policy = arguments["policy"]
            if isinstance(policy, str):
                policy = [entry for entry in PRESETS[policy] if channels > 1 or not COLOUR_ONLY & entry.keys()]
            arguments = {**arguments, "policy": policy, "seed": arguments.get("seed", seed)}
        if (name, arguments) in resolved:
            raise UserError(f"{key}: found {name} twice with the same policy and seed, allowed: once")
        resolved.append((name, arguments))
    return resolved


def uncovered(views: Iterable[View], augmentations: Mapping[str, Sequence[str]]) -> list[str]:
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
    choices_of: dict[str, Sequence[set[str]]] = {}
    for name, arguments in views:
        own = {"policy": arguments["policy"]} if name == "augment" else {}
        choices = ({*_names(own["policy"])},) if own else COVERED_BY.get(name, ())
        choices_of.setdefault(label_of((name, own)) if own else name, choices)
    for label, choices in choices_of.items():
        missing = [member for member, names in augmentations.items() if not any(s <= set(names) for s in choices)]
        if choices and missing:
            who = "no member" if len(missing) == len(augmentations) else f"not every member (not {', '.join(missing)})"
            warnings.append(
                f"evaluate.tta.views: {label}: {who} was trained with an augmentation that covers it; "
                f"drop the view, or train with {' or '.join(' + '.join(sorted(s)) for s in choices[:3])}"
            )
    return warnings


def conflicts(entries: Sequence[Entry], *, model: str, normalize: str, size: int, grid: Grid = ()) -> list[str]:
    """Return what is wrong with views for a member's network and the images, as params.yaml alone can tell.

    Parameters
    ----------
    entries, grid
        ``evaluate.tta.views`` and ``evaluate.grid``.
    model, normalize, size
        ``model.name``, ``preprocess.normalize`` and ``preprocess.size``.

    Examples
    --------
    >>> conflicts([{"dense": {"factors": [1.5]}}], model="convnet", normalize="scale", size=8)
    []
    """
    reasons = {"model.name: found mlp, which has a weight for each pixel": model == "mlp"}
    kinds = ("center_image", "standardize_pixel", "pca", "zca")
    reasons[f"preprocess.normalize: found {normalize}, which has statistics for each pixel"] = normalize in kinds
    faults: dict[str, None] = {}
    listed, compared = parse_views(entries), union(parse_sets(grid))
    for key, view in [
        *(("evaluate.tta.views", view) for view in listed),
        *(("evaluate.grid", view) for view in compared if view not in listed),
    ]:
        try:
            sizes = {_size(item, size, size) for item in VIEWS[view[0]](size, size, **view[1])}
        except UserError as error:
            faults[f"{key}: {error}"] = None
            continue
        if sizes - {(size, size)}:
            cannot = f"allowed with {key} {label_of(view)}: a fully convolutional network"
            faults.update({f"{reason}, {cannot}": None for reason, holds in reasons.items() if holds})
    return list(faults)


def check_sizes(
    views: Iterable[View],
    members: Mapping[str, torch.nn.Module],
    shape: tuple[int, int, int],
    key: str = "evaluate.tta.views",
) -> None:
    """Refuse views that the images' geometry or a member does not allow, before anything is predicted.

    Views of another size than the stored images need fully convolutional networks, whose last step before the head is
    a mean or maximum over all places.

    Parameters
    ----------
    views
        Parsed views.
    members
        Name to classifier, in evaluation mode.
    shape
        (H, W, C) of the stored images.
    key
        Where the views stand in params.yaml, for messages.

    Raises
    ------
    UserError
        The view, the member, and the reason.
    """
    import torch

    height, width, channels = shape

    def logits(classifier: torch.nn.Module, h: int, w: int) -> torch.Tensor:
        device = next(classifier.parameters()).device
        with torch.inference_mode():
            return _forward(classifier, torch.zeros(1, h, w, channels, dtype=torch.uint8, device=device))

    for view in views:
        try:
            if view[0] == "augment":
                _policy(json.dumps(view[1]["policy"]), shape)
            sizes = {_size(item, height, width) for item in VIEWS[view[0]](height, width, **view[1])}
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        for h, w in sorted(sizes - {(height, width)}):
            for member, classifier in members.items():
                try:
                    found, expected = logits(classifier, h, w).shape, logits(classifier, height, width).shape
                    if found != expected:
                        raise ValueError(f"it makes {tuple(found)} of it, not {tuple(expected)}")
                except Exception as error:  # whatever a network raises on a size that it was not made for
                    raise UserError(
                        f"{key}: {label_of(view)}: member {member} cannot take images of {h} x {w}, "
                        f"only of {height} x {width} ({' '.join(str(error).split())[:200]}); allowed: fully "
                        "convolutional networks whose normalisation has statistics a channel"
                    ) from None


# ---- images and predictions ---------------------------------------------------------------------------------------------


def num_images(views: Iterable[View], height: int, width: int) -> list[int]:
    """Return how many images each view stands for, which is its weight in the average."""
    return [len(VIEWS[name](height, width, **arguments)) for name, arguments in views]


def passes(views: Iterable[View], height: int, width: int) -> list[float]:
    """Return the cost of each view in forward passes of a stored image, a larger or smaller image by its number of pixels."""
    sizes = [[_size(item, height, width) for item in VIEWS[name](height, width, **args)] for name, args in views]
    return [round(sum(h * w for h, w in of_view) / (height * width), 6) for of_view in sizes]


def make_views(images: torch.Tensor, views: Iterable[View]) -> list[tuple[str, list[torch.Tensor]]]:
    """Return all views of the images, uint8 (N, H, W, C), in order: name, and the images that the view stands for.

    Each is uint8 (N, h, w, C) on the same device, and depends on the image alone, not on its batch.
    """
    height, width = images.shape[1:3]
    return [(name, [_made(images, item) for item in VIEWS[name](height, width, **args)]) for name, args in views]


def predict_images(classifiers: Sequence[torch.nn.Module], images: Images, views: Sequence[View]) -> list[Floats]:
    """Predict one batch with every classifier under every view, nothing averaged.

    Parameters
    ----------
    classifiers
        M networks in evaluation mode on one device, uint8 NHWC to logits.
    images
        uint8 (N, H, W, C).
    views
        Parsed views.

    Returns
    -------
    list of ndarray
        For each view its log-probabilities, float64 (M, V, N, K), V the number of images that it stands for.
    """
    import torch

    batch = torch.from_numpy(np.require(images, requirements=["C", "W"])).to(next(classifiers[0].parameters()).device)
    height, width = images.shape[1:3]
    found = []
    # TF32 would make a GPU's figures differ from a CPU's in the third digit.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for name, arguments in views:
            by_image = []
            for item in VIEWS[name](height, width, **arguments):
                made = _made(batch, item)
                by_image.append(np.stack([_log_probabilities(classifier, made) for classifier in classifiers]))
            found.append(np.stack(by_image, axis=1))
    return found


def predict_views(
    classifiers: Sequence[torch.nn.Module], images: Images, views: Sequence[View], average: str
) -> Floats:
    """Predict one batch with every classifier under every view, each view's images averaged.

    Parameters
    ----------
    classifiers, images, views
        As for `predict_images`.
    average
        A key of `AVERAGE`.

    Returns
    -------
    ndarray
        Log-probabilities, float64 (M, E, N, K), E the number of views.
    """
    return average_images(predict_images(classifiers, images, views), average)


def average_images(by_image: Sequence[Floats], average: str) -> Floats:
    """Return what `predict_images` gave with each view's images averaged: float64 (M, E, N, K)."""
    return np.stack([np.stack([AVERAGE[average](member) for member in view]) for view in by_image], axis=1)


def average_views(by_view: Floats, weights: Sequence[int], average: str) -> Floats:
    """Return the mean over views, each counted as often as the number of images that it stands for.

    Parameters
    ----------
    by_view
        Log-probabilities, float64 (E, N, K).
    weights
        E numbers, of `num_images`.
    average
        A key of `AVERAGE`.

    Returns
    -------
    ndarray
        Log-probabilities, float64 (N, K).

    Examples
    --------
    >>> halves, sure = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    >>> np.exp(average_views(np.stack([halves, sure]), [1, 3], "probability")).round(6)
    array([[0.8, 0.2]])
    """
    if len(set(weights)) == 1:
        return AVERAGE[average](by_view)
    shares = np.array(weights, np.float64)[:, None, None] / sum(weights)
    if average == "probability":
        return log_softmax(np.logaddexp.reduce(by_view + np.log(shares), axis=0))
    return log_softmax((by_view * shares).sum(axis=0))


def predict(classifiers: Sequence[torch.nn.Module], images: Images, views: Sequence[View], average: str) -> Floats:
    """Predict one batch with every classifier, averaged over the views.

    Parameters
    ----------
    classifiers, images, views
        As for `predict_images`.
    average
        A key of `AVERAGE`.

    Returns
    -------
    ndarray
        Log-probabilities, float64 (M, N, K).
    """
    weights = num_images(views, *images.shape[1:3])
    by_view = predict_views(classifiers, images, views, average)
    return np.stack([average_views(member, weights, average) for member in by_view])


def batch_size(height: int, width: int, channels: int) -> int:
    """Return how many images one forward pass of evaluation sees, so that memory stays within bounds."""
    return max(1, min(256, 2**22 // (height * width * channels)))


def _log_probabilities(classifier: torch.nn.Module, images: torch.Tensor) -> Floats:
    step = batch_size(*images.shape[1:])
    logits = [_forward(classifier, part).float().cpu().numpy() for part in images.split(step)]
    return log_softmax(np.concatenate(logits))


def _forward(classifier: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the logits of images, whatever their size; at another than its own, statistics a channel carry over."""
    from anneal.models.normalization import CHANNEL, Normalization

    layer = getattr(classifier, "normalization", None)
    if not isinstance(layer, Normalization) or images.shape[1:3] == (layer.height, layer.width):
        return classifier(images)
    if layer.kind not in (*CHANNEL, "scale", "none"):
        raise ValueError(f"preprocess.normalize {layer.kind} has statistics for each pixel")
    height, width, channels = images.shape[1:]
    other = Normalization(layer.kind, None, height, width, channels).to(images.device)
    for ours, theirs in ((other.scale, layer.scale), (other.shift, layer.shift)):
        if ours is not None and theirs is not None:
            ours.copy_(theirs[:channels].repeat(width))
    logits: torch.Tensor = classifier.network(other(images))  # type: ignore[operator]
    return logits


def _made(images: torch.Tensor, item: Warp | Draw) -> torch.Tensor:
    return _drawn(images, item) if isinstance(item, Draw) else _warped(images, item)


def _warped(images: torch.Tensor, warp: Warp) -> torch.Tensor:
    """Return images, uint8 (N, H, W, C), bilinearly sampled at the places of a warp.

    By indices and single operations on elements, none of which depends on what else is in the batch, or on the device.
    """
    import torch

    count, height, width, channels = images.shape
    (top, bottom, down), (left, right, across) = _between(warp.rows, height), _between(warp.columns, width)
    rows, columns = np.broadcast(warp.rows, warp.columns).shape

    def places(row: npt.NDArray[np.int64], column: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy((row * width + column).ravel()).to(images.device)

    def lerp(low: torch.Tensor, high: torch.Tensor, fractions: npt.NDArray[np.float32]) -> torch.Tensor:
        weights = torch.from_numpy(np.broadcast_to(fractions, (rows, columns)).reshape(-1, 1).copy())
        # In three operations, each rounded as IEEE 754 says: a fused one is not, and not the same for all elements.
        return high.sub_(low).mul_(weights.to(images.device)).add_(low)

    if not down.any() and not across.any():
        moved = images.reshape(count, height * width, channels).index_select(1, places(top, left))
        return moved.reshape(count, rows, columns, channels)
    # A line a pixel, so that a place is a run of memory.
    pixels = images.permute(1, 2, 0, 3).reshape(height * width, count * channels).float()

    def at(row: npt.NDArray[np.int64], column: npt.NDArray[np.int64]) -> torch.Tensor:
        return pixels.index_select(0, places(row, column))

    values = lerp(at(top, left), at(bottom, left), down)
    if across.any():
        values = lerp(values, lerp(at(top, right), at(bottom, right), down), across)
    whole = values.round_().to(torch.uint8)
    return whole.reshape(rows, columns, count, channels).permute(2, 0, 1, 3).contiguous()


def _between(
    positions: Floats, side: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the pixels on both sides of positions, within the image, and the fraction of the way from one to the other."""
    # Rounded, so that a quarter turn falls on pixels and not 1e-16 beside them.
    inside = np.clip(np.round(positions, 9), 0, side - 1)
    before = np.floor(inside).astype(np.int64)
    return before, np.minimum(before + 1, side - 1), (inside - before).astype(np.float32)


def _drawn(images: torch.Tensor, draw: Draw) -> torch.Tensor:
    import torch

    pixels = images.cpu().numpy()
    compose = _policy(draw.policy, pixels.shape[1:])
    made = np.empty_like(pixels)
    for index, image in enumerate(pixels):
        digest = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
        with SEEDED:
            seed_policy(compose, draw.seed, "tta", digest, draw.number)
            made[index] = apply_policy(compose, image[None])[0]
    return torch.from_numpy(made).to(images.device)


@lru_cache(maxsize=32)
def _policy(policy: str, shape: tuple[int, int, int]) -> A.Compose:
    height, width, channels = shape
    try:
        return compile_policy(json.loads(policy), height=height, width=width, channels=channels)
    except ParamsError as error:
        raise UserError(_as_view(error.faults[0], "augment")) from None


def _as_view(fault: str, where: str) -> str:
    return f"{where}.{fault.removeprefix('augment.')}"


def _size(item: Warp | Draw, height: int, width: int) -> tuple[int, ...]:
    return np.broadcast(*item).shape if isinstance(item, Warp) else (height, width)


def _grid(rows: npt.NDArray[Any], columns: npt.NDArray[Any]) -> Warp:
    return Warp(rows.astype(np.float64)[:, None], columns.astype(np.float64)[None, :])


def _window(side: int, start: float, scale: float) -> Floats:
    """Return the places that stretch the window from ``start``, ``scale`` x the side, to the full side."""
    return start + (np.arange(side, dtype=np.float64) + 0.5) * scale - 0.5


def _names(policy: str | Sequence[Any]) -> list[str]:
    """Return the names of all transforms of a policy, those inside compositions included, sorted."""
    found: set[str] = set()
    for entry in PRESETS[policy] if isinstance(policy, str) else policy:
        name, arguments = (entry, None) if isinstance(entry, str) else next(iter(entry.items()))
        found.update(_names((arguments or {}).get("transforms", [])) if name in COMPOSITIONS else [name])
    return sorted(found)


def _compact(value: Any) -> str:
    if isinstance(value, list) and value and not all(isinstance(item, int | float) for item in value):
        return "+".join(_names(value))  # a policy
    return str(value).replace(" ", "")


def _defaults(name: str) -> dict[str, Any]:
    parameters = list(inspect.signature(VIEWS[name]).parameters.values())[2:]  # behind height and width
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
        if key == "policy":
            try:
                check_policy(value)
            except ParamsError as error:
                raise UserError(_as_view(error.faults[0], where)) from None
    return dict(given)


def _range(adapter: TypeAdapter[Any]) -> str:
    schema = adapter.json_schema()
    items = f" of {allowed(schema['items'], schema)}" if "items" in schema else ""
    return allowed(schema, schema) + items
