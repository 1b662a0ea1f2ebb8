"""Near copies of training images in the splits that give figures: such a leak makes those figures too good.

An image's fingerprint holds the low frequencies of its grey version, freed of brightness and contrast; the distance of two
images is 0 for the same picture and 1 for unrelated ones. Some data have near neighbours by nature (digits, trousers), so an image
counts as a copy only where its nearest training image stands out: much nearer than those that come next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from anneal.progress import progress
from anneal.store import Images, Split

if TYPE_CHECKING:
    import torch

Vectors = npt.NDArray[np.float32]

SIDE = 16
"""Largest side in pixels of the grey version behind a fingerprint."""

FREQUENCIES = 10
"""Most frequencies of a fingerprint along a side, and one fewer than its pixels: JPEG files keep these best."""

LEAST_CONTRAST = 4.0
"""Standard deviation in grey levels below which an image is flat, and like any other flat one: such images are left out."""

MOST_DISTANCE = 0.15
"""Largest distance of a copy."""

MOST_RATIO = 0.35
"""Largest distance of a copy, as a fraction of the natural distance, that of the training images that come next."""

NEIGHBOURS = 6
"""The training image whose distance is the natural one: the sixth nearest."""

LEAK = 0.005
"""Share of a split's images above which near copies count as a leak, three at least: every set has a few look-alikes."""

BLOCK = 2**24
"""Largest number of distances held at once."""


@dataclass(frozen=True)
class Copies:
    """Images of one split that have a near copy in train, the nearest first.

    Parameters
    ----------
    num_images
        N, of the split.
    indices, train_indices
        int64 (n,): which images, and which training image is nearest to each.
    distances
        float64 (n,): 0 the same picture, 1 unrelated.
    """

    num_images: int
    indices: npt.NDArray[np.int64]
    train_indices: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float64]

    @property
    def leak(self) -> bool:
        """Whether there are too many to be look-alikes by nature."""
        return len(self.indices) > max(2, LEAK * self.num_images)


def find_copies(train: Split, split: Split) -> Copies:
    """Find the images of a split that are near copies of training images, in time N x N_train and bounded memory.

    Parameters
    ----------
    train, split
        Both of the same store.
    """
    size = max(1, 2**26 // int(np.prod(split.shards[0].shape[1:])))
    queries = np.concatenate([fingerprints(images) for images, _ in split.batches(size)])
    blocks = (fingerprints(images) for images, _ in train.batches(min(size, 2**14)))
    name = f"near copies of {split.path.name} in train"
    indices, distances = nearest(queries, progress(blocks, len(train), name=name))
    found = np.flatnonzero(stand_out(distances))
    found = found[np.argsort(distances[found, 0], kind="stable")]
    return Copies(len(split), found, indices[found, 0], distances[found, 0])


def fingerprints(images: Images) -> Vectors:
    """Return images as unit vectors: the low frequencies of their grey version, zeros for flat images.

    These are the coefficients of a discrete cosine transform that a perceptual hash (pHash) has the signs of; without the
    rounding to bits, near copies are told from images that are alike by nature.

    Parameters
    ----------
    images
        uint8 (N, H, W, C).

    Returns
    -------
    ndarray
        float32 (N, D), D at most 54.

    Examples
    --------
    >>> stripes = np.tile(np.array([0, 200], np.uint8), (1, 4, 2))[..., None]
    >>> both = fingerprints(np.concatenate([stripes, stripes // 2 + 20]))
    >>> round(float(both[0] @ both[1]), 4)
    1.0
    """
    from scipy.fft import dctn

    weights = np.array([0.299, 0.587, 0.114] if images.shape[-1] == 3 else [1.0], np.float32)
    small = averaged_down(images) @ weights
    rows, columns = small.shape[1:]
    frequencies = np.add.outer(np.arange(rows), np.arange(columns))
    # The first one is the brightness.
    kept = (frequencies > 0) & (frequencies < min(FREQUENCIES, max(rows, columns) - 1))
    vectors = dctn(small, axes=(1, 2), norm="ortho")[:, kept]
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    contrasts = small.std(axis=(1, 2))[:, None]
    return np.where(contrasts >= LEAST_CONTRAST, vectors / np.maximum(norms, 1e-6), 0).astype(np.float32)


def averaged_down(images: Images) -> Vectors:
    """Return images averaged down to at most `SIDE` pixels a side, float32 (N, h, w, C)."""
    channels = images.astype(np.float32).transpose(0, 3, 1, 2)
    small = _shrink(images.shape[1]) @ channels @ _shrink(images.shape[2]).T
    return np.ascontiguousarray(small.transpose(0, 2, 3, 1))


def _shrink(length: int) -> Vectors:
    """Return the matrix that averages ``length`` pixels down to at most `SIDE`, float32 (n, length)."""
    count = min(SIDE, length)
    edges = np.arange(count + 1) * length / count
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(overlap, 0, None) * count / length).astype(np.float32)


def nearest(
    queries: Vectors, base: Iterable[Vectors], count: int = NEIGHBOURS
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the nearest vectors of ``base``: indices, int64 (N, k), and distances, float64 (N, k), the nearest first.

    Parameters
    ----------
    queries
        Unit vectors, float32 (N, D).
    base
        Blocks of unit vectors, float32 (n, D).
    count
        How many; k is fewer where ``base`` has fewer.
    """
    import torch

    wanted = torch.from_numpy(queries)
    likeness = torch.empty((len(queries), 0))
    indices = torch.empty((len(queries), 0), dtype=torch.int64)
    start = 0
    for block in base:
        values, places = _best(wanted, torch.from_numpy(block), count)
        likeness = torch.cat([likeness, values], dim=1)
        indices = torch.cat([indices, places + start], dim=1)
        order = torch.sort(likeness, dim=1, descending=True, stable=True).indices[:, :count]
        likeness, indices = likeness.gather(1, order), indices.gather(1, order)
        start += len(block)
    # In steps of a millionth: the last bits of a product depend on the machine.
    return indices.numpy(), np.sqrt(np.round(np.clip(1 - likeness.double().numpy(), 0, 2), 6))


def _best(queries: torch.Tensor, base: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    step = max(1, BLOCK // len(base))
    parts = [(rows @ base.T).topk(min(count, len(base)), dim=1) for rows in queries.split(step)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def stand_out(distances: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return of each row of sorted distances to training images whether the first is that of a copy.

    It is where it is at most `MOST_DISTANCE`, and at most `MOST_RATIO` of the natural distance, that of the row's last. The
    first test alone takes neighbours by nature for copies where images are alike, the second alone an image that has a rare
    neighbour. A row's last is itself a copy's where training has several: it counts as at least half the median of all.

    Parameters
    ----------
    distances
        float64 (N, k), each row rising.

    Examples
    --------
    >>> stand_out(np.array([[0.05, 0.4, 0.5], [0.12, 0.25, 0.3]]))
    array([ True, False])
    """
    first, last = distances[:, 0], distances[:, -1]
    if distances.shape[1] == 1:
        return first <= MOST_DISTANCE
    return (first <= MOST_DISTANCE) & (first <= MOST_RATIO * np.maximum(last, np.median(last) / 2))


def verdict(found: Mapping[str, Copies]) -> str:
    """Return one sentence over all splits.

    Examples
    --------
    >>> none, some = np.empty(0, np.int64), np.arange(12)
    >>> verdict({"val": Copies(180, none, none, none * 1.0), "test": Copies(360, some, some, some * 0.001)})
    '12 of 360 test images (3.3 %) have a near copy in train: test figures are too good'
    >>> verdict({"test": Copies(10000, some, some, some * 0.001)})
    '12 of 10,000 test images (0.12 %) have a near copy in train: too few to matter'
    >>> verdict({"test": Copies(360, none, none, none * 1.0)})
    'no near copies of training images in test'
    """
    leaking = {name: of for name, of in found.items() if of.leak}
    shown = leaking or {name: of for name, of in found.items() if len(of.indices)}
    if not shown:
        return f"no near copies of training images in {' and '.join(found)}"
    parts = []
    for name, of in shown.items():
        count, share = len(of.indices), 100 * len(of.indices) / of.num_images
        have = "has" if count == 1 else "have"
        digits = 1 if leaking else 2
        parts.append(f"{count} of {of.num_images:,} {name} images ({share:.{digits}f} %) {have} a near copy in train")
    end = f"{' and '.join(leaking)} figures are too good" if leaking else "too few to matter"
    return f"{', '.join(parts)}: {end}"


def shares(found: Mapping[str, Copies]) -> dict[str, Any]:
    """Return what near_duplicates.json says of the splits."""
    return {
        name: {
            "images": of.num_images,
            "with_duplicate_in_train": len(of.indices),
            "share": len(of.indices) / of.num_images,
            "leak": of.leak,
        }
        for name, of in found.items()
    }
