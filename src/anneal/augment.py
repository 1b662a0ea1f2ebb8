"""The albumentations policy: presets, checking, compiling, seeding, applying, and extra copies of small classes."""

from __future__ import annotations

import inspect
import json
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from anneal import seeding
from anneal.params import ParamsError, Strict, UserError, nearest
from anneal.store import Images, Sample, Split, SplitWriter

if TYPE_CHECKING:
    from anneal.transforms import A

Preset = Literal["none", "light", "standard", "strong"]
Policy = str | Sequence[str | Mapping[str, Mapping[str, Any] | None]]

PRESETS: dict[str, list[dict[str, dict[str, Any]]]] = {
    "none": [],
    "light": [{"RandomPadCrop": {"padding": 0.125}}],
    "standard": [{"HorizontalFlip": {"p": 0.5}}, {"RandomPadCrop": {"padding": 0.125}}],
    "strong": [
        {"HorizontalFlip": {"p": 0.5}},
        {"RandomPadCrop": {"padding": 0.125}},
        {"RandomBrightnessContrast": {"brightness_limit": 0.2, "contrast_limit": 0.2, "p": 0.5}},
        {"HueSaturationValue": {"hue_shift_limit": 10, "sat_shift_limit": 30, "val_shift_limit": 0, "p": 0.5}},
        {"Cutout": {"size": 0.25}},
    ],
}
"""What each preset is; fractions, so that it suits any image size."""

COLOUR_ONLY = {"HueSaturationValue"}
"""Transforms that a preset leaves out where images are grey."""

COMPOSITIONS = ("OneOf", "SomeOf", "RandomOrder", "Sequential")
"""Transforms that hold a list of ``transforms``."""

REFUSED = {
    "Normalize": "the model's first layer does this; choose it with preprocess.normalize",
    "ToFloat": "images stay uint8 until the model's first layer; leave it out",
    "FromFloat": "images stay uint8 until the model's first layer; leave it out",
    "ToTensorV2": "the loader makes tensors; leave it out",
    "Lambda": "a Python function cannot stand in params.yaml; allowed: any named transform",
    "TextImage": "it reads a font file that no stage could track; allowed: any other transform",
    "Compose": "the policy is one already; allowed: " + " | ".join(COMPOSITIONS),
    "OneOrOther": "allowed: OneOf with two transforms",
    "MixUp": "it mixes a batch; set regularization.mixup.alpha",
    "CutMix": "it mixes a batch; set regularization.cutmix.alpha",
}
"""Names that people try, and what to do instead."""

DRAWS = 16
"""How often a transform is tried on a sample image when a policy is compiled."""


class CopiesConfig(Strict):
    """``augment.copies``: extra augmented samples written to disk."""

    balance: bool


class AugmentConfig(Strict):
    """Section ``augment``: a preset's name, or a list of albumentations transforms, each ``{Name: {argument: value}}``."""

    policy: Preset | list[str | dict[str, dict[str, Any] | None]]
    copies: CopiesConfig


# ---- checking and compiling -----------------------------------------------------------------------------------------


def check_policy(policy: Policy) -> None:
    """Check names, arguments and values of a policy, without data.

    Raises
    ------
    ParamsError
        All faults, each naming the transform and the argument: an unknown name, an unknown or missing argument, a value
        that albumentations does not take.
    """
    _build_all(policy, channels=3)


def compile_policy(policy: Policy, *, height: int, width: int, channels: int) -> A.Compose:
    """Build a policy and try it on sample images of the data's geometry.

    Parameters
    ----------
    policy
        Name of a preset, or a list of transforms as ``augment.policy`` has it.
    height, width, channels
        Geometry of the images; 1 channel is grey, on which a preset leaves its `COLOUR_ONLY` transforms out.

    Returns
    -------
    albumentations.Compose
        As `policy_from_json` loads it: what was tried is what trains.

    Raises
    ------
    ParamsError
        What `check_policy` finds; or the policy cannot work on such images: a transform fails (a crop larger than the
        image, hue on grey), does nothing, or images come out of the policy with another size or type.
    """
    from anneal.transforms import A

    compose = policy_from_json(policy_to_json(A.Compose(_build_all(policy, channels))))
    _try(compose, (height, width, channels))
    return compose


def _build_all(policy: Policy, channels: int) -> list[Any]:
    """Return the transforms of a policy, all faults reported at once."""
    if isinstance(policy, str):
        if policy not in PRESETS:
            raise ParamsError([f"augment.policy: found {policy!r}, allowed: {' | '.join(PRESETS)} or a list"])
        policy = [entry for entry in PRESETS[policy] if channels > 1 or not COLOUR_ONLY & entry.keys()]
    faults: list[str] = []
    transforms = _build_list(policy, "augment.policy", faults)
    if faults:
        raise ParamsError(faults)
    return transforms


def _build_list(entries: Sequence[Any], path: str, faults: list[str]) -> list[Any]:
    return [_build(entry, f"{path}[{i}]", faults) for i, entry in enumerate(entries)]


def _build(entry: Any, path: str, faults: list[str]) -> Any:
    """Return the transform that one entry of a policy describes; put what is wrong with it in ``faults``."""
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, Mapping) or len(entry) != 1 or not isinstance(next(iter(entry.values())) or {}, Mapping):
        faults.append(
            f"{path}: found {json.dumps(entry, default=str)[:60]}, allowed: Name or {{Name: {{argument: value}}}}"
        )
        return None
    name, arguments = next((str(name), dict(values or {})) for name, values in entry.items())
    known = _transforms()
    if name not in known:
        reason = REFUSED.get(name) or f"no such transform{nearest(name, known) or '; see docs/augmentation.md'}"
        faults.append(f"{path}.{name}: {reason}")
        return None
    cls, path, before = known[name], f"{path}.{name}", len(faults)
    names = [key for key in inspect.signature(cls.__init__).parameters if key not in ("self", "strict")]
    for key in arguments:
        if key not in names:
            faults.append(f"{path}.{key}: unknown argument{nearest(key, names) or '; allowed: ' + ', '.join(names)}")
    p = arguments.get("p", 1)
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        faults.append(f"{path}.p: found {json.dumps(p, default=str)}, allowed: a number >= 0 and <= 1")
    if name in COMPOSITIONS:
        if not isinstance(arguments.get("transforms"), list) or not arguments["transforms"]:
            faults.append(f"{path}.transforms: missing or empty; allowed: a list of transforms")
        else:
            arguments["transforms"] = _build_list(arguments["transforms"], f"{path}.transforms", faults)
            _check_choice(arguments, path, faults)
    return _construct(cls, arguments, path, faults) if len(faults) == before else None


def _check_choice(arguments: Mapping[str, Any], path: str, faults: list[str]) -> None:
    """Check what albumentations would take from a composition and then change or trip over."""
    n, most = arguments.get("n", 1), len(arguments["transforms"])
    limit = f"a whole number >= 1{'' if arguments.get('replace') else f' and <= {most}, the number of transforms'}"
    if isinstance(n, bool) or not isinstance(n, int) or n < 1 or (n > most and not arguments.get("replace")):
        faults.append(f"{path}.n: found {json.dumps(n, default=str)}, allowed: {limit}")
    if not isinstance(arguments.get("replace", False), bool):
        faults.append(f"{path}.replace: found {json.dumps(arguments['replace'], default=str)}, allowed: true | false")


def _construct(cls: type[Any], arguments: dict[str, Any], path: str, faults: list[str]) -> Any:
    """Return ``cls(**arguments)``, its refusals as faults."""
    from pydantic import ValidationError

    # Without strict, a transform whose schema fails oddly falls back to all its defaults with no more than a warning.
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    strict = {"strict": True} if "InitSchema" in vars(owner) else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about aliases and speed
            transform = cls(**arguments, **strict)
            if not strict and hasattr(cls, "InitSchema"):  # an own __init__ below an inherited schema goes unchecked
                fields = cls.InitSchema.model_fields
                values = {key: value for key, value in transform.get_transform_init_args().items() if key in fields}
                cls.InitSchema.model_validate({**values, "p": transform.p, "strict": False})
    except Exception as error:
        cause = error if isinstance(error, ValidationError) else error.__cause__
        if isinstance(cause, ValidationError):
            faults.extend(_value_faults(cause, path))
        else:
            faults.append(f"{path}: {_line(error)}")
        return None
    needs = getattr(transform, "targets_as_params", None)
    if needs:
        faults.append(f"{path}: it needs {', '.join(needs)} beside the image, which labelled images do not have")
    return transform


def _value_faults(error: Any, path: str) -> list[str]:
    """Return a pydantic error of albumentations as one fault an argument."""
    found: dict[str, list[Any]] = {}
    for details in error.errors(include_url=False):
        found.setdefault(str(details["loc"][0]) if details["loc"] else "", []).append(details)
    faults = []
    for argument, several in found.items():
        where, first = f"{path}.{argument}" if argument else path, several[0]
        if first["type"] == "missing":
            faults.append(f"{where}: missing")
        elif first["type"] in ("value_error", "assertion_error"):
            faults.append(f"{where}: {' '.join(first['msg'].removeprefix('Value error, ').split())}")
        else:
            wanted = [item["msg"].removeprefix("Input should be ").split(", unable to")[0] for item in several]
            wanted = [f"a number {text}" if text.startswith(("less", "greater")) else text for text in wanted]
            value = json.dumps(first["input"], default=str)[:60]
            faults.append(f"{where}: found {value}, allowed: {' or '.join(dict.fromkeys(wanted))}")
    return faults


def _transforms() -> dict[str, type[Any]]:
    """Return every transform that a policy may name: albumentations' for single images, and ours."""
    from anneal import transforms
    from anneal.transforms import A

    bases = (A.BasicTransform, A.DualTransform, A.ImageOnlyTransform)
    found = {name: getattr(A, name) for name in dir(A) if name not in REFUSED}
    leaves = {
        name: cls
        for name, cls in found.items()
        if inspect.isclass(cls) and issubclass(cls, bases) and cls not in bases and not issubclass(cls, A.Transform3D)
    }
    return {
        **leaves,
        **{name: found[name] for name in COMPOSITIONS},
        "Cutout": transforms.Cutout,
        "RandomPadCrop": transforms.RandomPadCrop,
    }


def _line(error: BaseException) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:300]


# ---- trying a policy on sample images -------------------------------------------------------------------------------


def _try(compose: A.Compose, shape: tuple[int, int, int]) -> None:
    """Run every branch of a policy on sample images of ``shape`` (H, W, C).

    Raises
    ------
    ParamsError
        A transform fails or does nothing, or images come out otherwise than they went in.
    """
    noise = seeding.generator(0, "sample").integers(0, 256, shape, dtype=np.uint8)
    seed_policy(compose, 0, "sample")
    states = {_kind(noise): (noise, "")}
    for i, transform in enumerate(compose.transforms):
        states = _run(transform, states, f"augment.policy[{i}]")
    for (found, dtype), (_, path) in states.items():
        if found != shape or dtype != "uint8":
            raise ParamsError(
                [
                    f"{path}: images come out of the policy as {_shown(found)} {dtype}, "
                    f"allowed: {_shown(shape)} uint8, as they went in"
                ]
            )
    samples = np.stack([noise, np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)] * DRAWS)
    outputs = []
    for _ in range(2):
        seed_policy(compose, 0, "sample", "whole")
        try:
            outputs.append(apply_policy(compose, samples))
        except Exception as error:
            raise ParamsError([f"augment.policy: fails on images of {_shown(shape)}: {_line(error)}"]) from error
    if not np.array_equal(outputs[0], outputs[1]):
        raise ParamsError(["augment.policy: gives other images on the same seed, so no run could be repeated"])


States = dict[tuple[tuple[int, ...], str], tuple[Any, str]]
"""One sample image of each (shape, dtype) that can arrive at a place in a policy, and the path of what made it so."""


def _run(transform: Any, states: States, path: str) -> States:
    """Return what can come out of a transform, or of any branch of a composition, when ``states`` can go in."""
    name = type(transform).__name__
    path = f"{path}.{name}"
    if name not in COMPOSITIONS:
        out = _run_leaf(transform, states, path)
    elif name == "OneOf":
        out = {}
        for i, child in enumerate(transform.transforms):
            out |= _run(child, states, f"{path}.transforms[{i}]")
    else:
        out = states
        for i, child in enumerate(transform.transforms):
            after = _run(child, out, f"{path}.transforms[{i}]")
            out = after if name == "Sequential" else {**out, **after}
    return out if transform.p >= 1 else {**states, **out}


def _run_leaf(transform: Any, states: States, path: str) -> States:
    out: States = {}
    changed = False
    for image, before in states.values():
        for _ in range(DRAWS):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    warnings.simplefilter("error", UserWarning)  # "not applicable to grey", and then it does nothing
                    result = _with_channels(transform(force_apply=True, image=image.copy())["image"])
            except Exception as error:
                raise ParamsError([f"{path}: fails on images of {_shown(image.shape)}: {_line(error)}"]) from error
            changed = changed or result.shape != image.shape or not np.array_equal(result, image)
            out.setdefault(_kind(result), (result, before if _kind(result) == _kind(image) else path))
    shape = image.shape
    if not changed and type(transform).__name__ != "NoOp" and min(shape[:2]) > 1:
        raise ParamsError([f"{path}: changes nothing on images of {_shown(shape)}; leave it out or set its limits"])
    if shape[-1] == 1:
        idle = [key for key in ("hue", "saturation") if len(set(getattr(transform, key, ()))) > 1]
        if idle:
            raise ParamsError([f"{path}.{idle[0]}: grey images have none, allowed: 0"])
    return out


def _kind(image: Any) -> tuple[tuple[int, ...], str]:
    return image.shape, str(image.dtype)


def _with_channels(image: Any) -> Any:
    """Put back the channel axis that OpenCV drops from a grey image."""
    return image if image.ndim == 3 else image[..., None]


def _shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# ---- policy.json ----------------------------------------------------------------------------------------------------


def policy_to_json(compose: A.Compose) -> str:
    """Return a compiled policy as JSON text, in albumentations' own serialised form."""
    from anneal.transforms import A, serialize_enum

    return json.dumps(serialize_enum(A.to_dict(compose)), indent=2, sort_keys=True, allow_nan=False) + "\n"


def policy_from_json(text: str) -> A.Compose:
    """Load what `policy_to_json` wrote.

    Raises
    ------
    UserError
        The text is no policy, or names a transform that is not there.
    """
    from anneal.transforms import A, without_torch

    try:
        with warnings.catch_warnings(), without_torch():
            warnings.simplefilter("ignore")
            return A.from_dict(json.loads(text))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(
            f"policy.json: not a policy of this version ({_line(error)}); run the augment stage again"
        ) from error


def transform_names(compose: A.Compose) -> list[str]:
    """Return the names of all transforms in a policy, sorted, those inside compositions included."""

    def leaves(transforms: Sequence[Any]) -> Iterator[str]:
        for transform in transforms:
            if type(transform).__name__ in COMPOSITIONS:  # ColorJitter has "transforms" too, which are functions
                yield from leaves(transform.transforms)
            else:
                yield type(transform).__name__

    return sorted(set(leaves(compose.transforms)))


# ---- applying -------------------------------------------------------------------------------------------------------


def seed_policy(compose: A.Compose, seed: int, *key: int | str) -> None:
    """Give a policy the randomness that belongs to ``(seed, "augment", *key)``; ``key`` is (epoch, microbatch) in training.

    All its transforms draw from one shared pair of generators, so that their draws are independent of each other;
    albumentations' own seeding gives each transform a copy of the same stream.
    """
    compose.set_random_state(
        seeding.generator(seed, "augment", *key), random.Random(seeding.seed_for(seed, "augment", "python", *key))
    )


def apply_policy(compose: A.Compose, images: Images) -> Images:
    """Augment each image of a batch by draws of its own: uint8 (N, H, W, C) in, new uint8 (N, H, W, C) out."""
    from anneal.transforms import BatchTransform

    batch: Any = images
    for transform in compose.transforms:
        if isinstance(transform, BatchTransform) and len({image.shape for image in batch}) == 1:
            batch = transform.apply_batch(np.asarray(batch))
        else:
            batch = [_with_channels(transform(image=image)["image"]) for image in batch]
    return np.array(batch)


def write_copies(compose: A.Compose, split: Split, folder: Path, *, num_classes: int, seed: int) -> dict[int, int]:
    """Write augmented copies of the smaller classes as one split of a store, until each has as many images as the largest.

    A class's images are copied in turn, from a shuffled order, so that none is copied twice before all are once.

    Parameters
    ----------
    compose
        The policy, from `compile_policy`.
    split
        Training split.
    folder
        Where the copies go: images, labels and samples.parquet, whose sources are those of the originals with ``#1``,
        ``#2``... behind. Nothing is written where all classes are of one size.

    Returns
    -------
    dict
        Label to number of copies, of the classes that got some. A class with no image gets none.
    """
    counts = np.bincount(split.labels, minlength=num_classes)
    wanted = {label: int(counts.max() - count) for label, count in enumerate(counts) if 0 < count < counts.max()}
    if not wanted:
        return {}
    samples = split.samples()
    writer = SplitWriter(folder, *split.shards[0].shape[1:])
    for label, number in wanted.items():
        own = np.flatnonzero(split.labels == label)
        seeding.generator(seed, "augment", "copies", label).shuffle(own)
        for start in range(0, number, 256):
            turns = np.arange(start, min(start + 256, number))
            rows = own[turns % len(own)]
            seed_policy(compose, seed, "copies", label, start)
            for turn, row, image in zip(turns, rows, apply_policy(compose, split.take(rows)), strict=True):
                original = samples[row]
                source = f"{original.source}#{turn // len(own) + 1}"
                writer.add(image, Sample(source, original.sha256, label, original.width, original.height))
    writer.close()
    return wanted
