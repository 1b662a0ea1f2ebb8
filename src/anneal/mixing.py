"""Mixing of pairs of images within a microbatch: mixup and cutmix, with soft targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anneal.seeding import generator

if TYPE_CHECKING:
    import torch


def choose(
    mixup_alpha: float,
    cutmix_alpha: float,
    *,
    mixup_probability: float = 1.0,
    cutmix_probability: float = 1.0,
    cutmix_share: float = 0.5,
    seed: int,
    epoch: int,
    microbatch: int,
) -> str | None:
    """Return which technique a microbatch gets: ``"mixup"``, ``"cutmix"`` or None.

    With both on a first draw decides between them, and then a second whether the microbatch is mixed at all. Each draw has
    a key of its own, so it moves no other.

    Parameters
    ----------
    mixup_alpha, cutmix_alpha
        Parameter of Beta(alpha, alpha); 0 switches the technique off.
    mixup_probability, cutmix_probability
        Chance in [0, 1] that a microbatch which would get the technique really does.
    cutmix_share
        Chance in [0, 1] of cutmix where both are on; mixup has the rest.
    seed, epoch, microbatch
        Key of the draws; ``microbatch`` counts over all devices.

    Examples
    --------
    >>> choose(0.2, 0.0, seed=0, epoch=3, microbatch=7), choose(0.0, 0.0, seed=0, epoch=3, microbatch=7)
    ('mixup', None)
    """
    if mixup_alpha and cutmix_alpha:
        is_mixup = generator(seed, "mixing", epoch, microbatch).random() < 1.0 - cutmix_share
        technique = "mixup" if is_mixup else "cutmix"
    elif mixup_alpha or cutmix_alpha:
        technique = "mixup" if mixup_alpha else "cutmix"
    else:
        return None
    probability = mixup_probability if technique == "mixup" else cutmix_probability
    if probability < 1 and generator(seed, "mixing probability", epoch, microbatch).random() >= probability:
        return None
    return technique


def mixed_share(num_microbatches: int, *, seed: int, epoch: int, **arguments: float) -> float:
    """Return the share of an epoch's microbatches that are mixed; ``arguments`` are the others of `choose`.

    >>> mixed_share(100, seed=0, epoch=0, mixup_alpha=0.2, cutmix_alpha=0.0, mixup_probability=0.0)
    0.0
    """
    chosen = [choose(**arguments, seed=seed, epoch=epoch, microbatch=i) for i in range(num_microbatches)]
    return sum(technique is not None for technique in chosen) / num_microbatches


def mix(
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    mixup_probability: float = 1.0,
    cutmix_probability: float = 1.0,
    cutmix_share: float = 0.5,
    seed: int,
    epoch: int,
    microbatch: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the technique that `choose` names to one microbatch.

    Parameters
    ----------
    images
        (N, H, W, C), uint8 or floating point.
    targets
        Floating point (N, K): one-hot or smoothed class probabilities.
    mixup_alpha, cutmix_alpha, mixup_probability, cutmix_probability, cutmix_share, seed, epoch, microbatch
        As for `choose`.

    Returns
    -------
    tuple
        Mixed images (as `mixup` or `cutmix` return them) and targets (N, K); where none is chosen the inputs themselves.
    """
    technique = choose(
        mixup_alpha,
        cutmix_alpha,
        mixup_probability=mixup_probability,
        cutmix_probability=cutmix_probability,
        cutmix_share=cutmix_share,
        seed=seed,
        epoch=epoch,
        microbatch=microbatch,
    )
    if technique is None:
        return images, targets
    draw = generator(seed, technique, epoch, microbatch)
    if technique == "mixup":
        return mixup(images, targets, alpha=mixup_alpha, draw=draw)
    return cutmix(images, targets, alpha=cutmix_alpha, draw=draw)


def mixup(
    images: torch.Tensor, targets: torch.Tensor, *, alpha: float, draw: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend each image with a partner: ``w x_i + (1 - w) x_j``, and the targets with the same weight.

    One ``w ~ Beta(alpha, alpha)`` a microbatch, the partner by a random permutation of it (Zhang et al. 2018). Since the
    normalisation of this package is affine, blending before or after it is the same.

    Parameters
    ----------
    images
        (N, ...) of any layout, uint8 or floating point.
    targets
        Floating point (N, K).
    alpha
        Greater than 0; small values (0.1 to 0.4) blend little, 1 draws ``w`` uniformly.
    draw
        Source of the two draws: the weight first, then the permutation.

    Returns
    -------
    tuple
        Images of the same shape in floating point (float32 for uint8 input, same range) and targets (N, K).
    """
    weight = float(draw.beta(alpha, alpha))
    partner = _permutation(draw, images)
    images = images if images.is_floating_point() else images.float()
    return images.lerp(images[partner], 1.0 - weight), targets.lerp(targets[partner], 1.0 - weight)


def cutmix(
    images: torch.Tensor, targets: torch.Tensor, *, alpha: float, draw: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paste a rectangle of each image's partner into it, and mix the targets by the area that is really pasted.

    ``w ~ Beta(alpha, alpha)`` is kept: the rectangle has sides ``sqrt(1 - w)`` of the image's, its centre is uniform and
    it is cut at the border (Yun et al. 2019). One rectangle and one permutation a microbatch.

    Parameters
    ----------
    images
        (N, H, W, C), uint8 or floating point.
    targets
        Floating point (N, K).
    alpha
        Greater than 0; 1, the paper's, draws ``w`` uniformly.
    draw
        Source of the draws: the weight, the permutation, then the centre's row and column.

    Returns
    -------
    tuple
        Images of the same shape and dtype, newly allocated, and targets (N, K).
    """
    height, width = images.shape[1:3]
    weight = float(draw.beta(alpha, alpha))
    partner = _permutation(draw, images)
    top, bottom = _span(height, weight, draw)
    left, right = _span(width, weight, draw)
    mixed = images.clone()
    mixed[:, top:bottom, left:right] = images[partner, top:bottom, left:right]
    pasted = (bottom - top) * (right - left) / (height * width)
    return mixed, targets.lerp(targets[partner], pasted)


def _permutation(draw: np.random.Generator, images: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(draw.permutation(len(images))).to(images.device)


def _span(size: int, weight: float, draw: np.random.Generator) -> tuple[int, int]:
    """Return where one side of the rectangle starts and ends, in pixels."""
    length = int(size * np.sqrt(1.0 - weight))
    start = int(draw.integers(size)) - length // 2
    return max(0, start), min(size, start + length)
