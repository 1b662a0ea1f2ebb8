"""Accuracy under corruptions of the images that nobody trained for: noise, blur, brightness, contrast, JPEG.

Kinds and severities are those of ImageNet-C and CIFAR-10-C (Hendrycks & Dietterich 2019), made by albumentations.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from anneal import seeding
from anneal.ensemble import Floats
from anneal.metrics import Integers, predicted
from anneal.params import Strict
from anneal.progress import progress
from anneal.significance import compare
from anneal.store import Images

if TYPE_CHECKING:
    from anneal.transforms import A

SEVERITIES = (1, 2, 3, 4, 5)

LARGE = 112
"""Side in pixels from which images have ImageNet-C's severities; smaller ones have CIFAR-10-C's."""

SIDES = {True: 224, False: 32}
"""Side of the images that the severities were made for, large and small; a blur scales with the side, from 32 px on."""


class Corruption(NamedTuple):
    """One kind: the transform of a strength and a side in pixels, and the strengths for small and for large images."""

    transform: Callable[[float, int], A.ImageOnlyTransform]
    small: tuple[float, float, float, float, float]
    large: tuple[float, float, float, float, float]


def noise(strength: float, side: int) -> A.ImageOnlyTransform:  # noqa: ARG001
    """Return Gaussian noise, its standard deviation ``strength`` x 255, each pixel and channel for itself."""
    from anneal.transforms import A

    return A.GaussNoise(std_range=(strength, strength), mean_range=(0.0, 0.0), p=1.0)


def blur(strength: float, side: int) -> A.ImageOnlyTransform:
    """Return a Gaussian blur, its standard deviation ``strength`` pixels at the side that the severities were made for."""
    from anneal.transforms import A

    sigma = strength * max(side, 32) / SIDES[side >= LARGE]
    return A.GaussianBlur(sigma_limit=(sigma, sigma), blur_limit=0, p=1.0)


def brightness(strength: float, side: int) -> A.ImageOnlyTransform:  # noqa: ARG001
    """Return the image brighter by ``strength`` x 255."""
    from anneal.transforms import A

    return A.RandomBrightnessContrast(
        brightness_limit=(strength, strength), contrast_limit=(0.0, 0.0), brightness_by_max=True, p=1.0
    )


def contrast(strength: float, side: int) -> A.ImageOnlyTransform:  # noqa: ARG001
    """Return the image with ``strength`` x its contrast, around its mean."""
    from anneal.transforms import A

    return A.ColorJitter(
        brightness=(1.0, 1.0), contrast=(strength, strength), saturation=(1.0, 1.0), hue=(0.0, 0.0), p=1.0
    )


def jpeg(strength: float, side: int) -> A.ImageOnlyTransform:  # noqa: ARG001
    """Return the image as a JPEG file of quality ``strength`` has it."""
    from anneal.transforms import A

    return A.ImageCompression(quality_range=(int(strength), int(strength)), p=1.0)


CORRUPTIONS: dict[str, Corruption] = {
    "noise": Corruption(noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "blur": Corruption(blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "brightness": Corruption(brightness, (0.05, 0.10, 0.15, 0.20, 0.30), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(contrast, (0.75, 0.50, 0.40, 0.30, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "jpeg": Corruption(jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
"""``evaluate.robustness.corruptions`` to what it does."""


class RobustnessConfig(Strict):
    """``evaluate.robustness``: accuracy under corruptions of the images, at five severities each."""

    corruptions: list[Literal["noise", "blur", "brightness", "contrast", "jpeg"]]
    images: Annotated[int, Field(ge=10)]

    @field_validator("corruptions")
    @classmethod
    def _once_each(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError(f": found {', '.join(value)}, allowed: each once")
        return value


def drawn(total: int, count: int, seed: int) -> Integers:
    """Return the indices of at most ``count`` of ``total`` images, drawn without replacement, in order: int64 (n,)."""
    if total <= count:
        return np.arange(total)
    return np.sort(seeding.generator(seed, "robustness").choice(total, count, replace=False))


def corrupt(images: Images, name: str, severity: int, *, seed: int, indices: Sequence[int] | Integers) -> Images:
    """Return corrupted images, uint8 (N, H, W, C).

    The draws of an image belong to (seed, corruption, index): they are the same at every severity, and whatever other
    images there are.

    Parameters
    ----------
    images
        uint8 (N, H, W, C).
    name
        A key of `CORRUPTIONS`.
    severity
        1 to 5.
    seed
        Of the randomness.
    indices
        N numbers, of the images in their split.
    """
    kind = CORRUPTIONS[name]
    side = min(images.shape[1:3])
    strength = (kind.large if side >= LARGE else kind.small)[severity - 1]
    transform = kind.transform(strength, side)
    out = np.empty_like(images)
    for position, (image, index) in enumerate(zip(images, indices, strict=True)):
        number = seeding.seed_for(seed, f"corruption {name}", int(index))
        transform.set_random_state(np.random.Generator(np.random.PCG64(number)), random.Random(number))
        out[position] = transform(image=image)["image"].reshape(image.shape)
    return out


def robustness_table(
    split: str,
    predict: Callable[[Images], Floats],
    images: Images,
    labels: Integers,
    *,
    corruptions: Sequence[str],
    seed: int,
    indices: Sequence[int] | Integers,
    num_resamples: int = 1000,
) -> list[dict[str, Any]]:
    """Return the accuracy on clean images and under each corruption at each severity.

    Parameters
    ----------
    split
        Its name.
    predict
        Images to probabilities, float64 (N, K).
    images, labels
        uint8 (N, H, W, C) and int64 (N,).
    corruptions
        Keys of `CORRUPTIONS`.
    seed, indices
        See `corrupt`.
    num_resamples
        Of the bootstrap behind the intervals of the change, which are paired: the same images in both.

    Returns
    -------
    list of dict
        Rows of ``split``, ``corruption``, ``severity`` (0: clean), ``images``, ``accuracy`` with its 95 % interval
        ``accuracy_low`` and ``accuracy_high`` (Wilson 1927), and ``change`` against clean with ``change_low``, ``change_high``, ``mcnemar_p`` and ``verdict``, as
        `anneal.significance.compare` has them.
    """
    from scipy.stats import binomtest

    clean = predict(images)
    rows = []
    for (name,) in progress([(name,) for name in corruptions], len(corruptions), name="robustness", unit="corruptions"):
        for severity in (0, *SEVERITIES):
            if severity:
                changed = predict(corrupt(images, name, severity, seed=seed, indices=indices))
                found = compare(clean, changed, labels, num_resamples=num_resamples, seed=seed)
            else:
                changed, found = clean, compare(clean, clean, labels, num_resamples=1, seed=seed)
            hits = int((predicted(changed) == labels).sum())
            interval = binomtest(hits, len(labels)).proportion_ci(method="wilson")
            rows.append(
                {
                    "split": split,
                    "corruption": name,
                    "severity": severity,
                    "images": len(labels),
                    "accuracy": hits / len(labels),
                    "accuracy_low": float(interval.low),
                    "accuracy_high": float(interval.high),
                    "change": found.accuracy_difference,
                    "change_low": found.accuracy_low,
                    "change_high": found.accuracy_high,
                    "mcnemar_p": found.mcnemar_p,
                    "verdict": found.accuracy_verdict,
                }
            )
    return rows
