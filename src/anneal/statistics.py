"""Statistics of the training split in one streaming pass in float64: centre, standardise, PCA and ZCA whitening."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anneal.params import UserError

Floats = npt.NDArray[np.float64]

MAX_DIMENSIONS = 4096
"""Whitening needs the covariance of all pairs of values of an image: 128 MiB at this limit, growing with the square."""

BY_CHANNEL = ("center", "standardize")
BY_PIXEL = ("center_image", "standardize_pixel")
WHITENING = ("pca", "zca")

SMALLEST_STD = 1 / 255
"""One grey level: a pixel that (nearly) never changes must not have its noise blown up, nor divide by zero."""


@dataclass(frozen=True)
class Sums:
    """Exact integer sums over a split, which no block size and no number of threads can change.

    Parameters
    ----------
    count
        Number of images.
    first, second
        int64 (H, W, C): sums of values 0..255 and of their squares.
    products
        float64 (D, D), D = H*W*C: sums of products of all pairs of values, whole numbers; None where not asked for.
    """

    count: int
    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    products: Floats | None


def check_dimensions(kind: str, height: int, width: int, channels: int) -> None:
    """Refuse whitening of large images.

    Raises
    ------
    UserError
        ``kind`` is ``pca`` or ``zca``, and H*W*C is above `MAX_DIMENSIONS`.
    """
    dimensions = height * width * channels
    if kind in WHITENING and dimensions > MAX_DIMENSIONS:
        raise UserError(
            f"preprocess.normalize: {kind} of {height} x {width} x {channels} images whitens {dimensions:,} dimensions, "
            f"allowed: at most {MAX_DIMENSIONS:,}; take a smaller preprocess.size or standardize"
        )


def add_up(batches: Iterable[npt.NDArray[np.uint8]], *, products: bool = False) -> Sums:
    """Stream over batches of images, uint8 (n, H, W, C), at least one of them not empty."""
    count = 0
    first: npt.NDArray[np.int64] = np.zeros(1, np.int64)
    second = first
    pairs: Floats | None = None
    for batch in batches:
        if not len(batch):
            continue
        if not count:
            first, second = (np.zeros(batch.shape[1:], np.int64) for _ in range(2))
        count += len(batch)
        first += batch.sum(axis=0, dtype=np.int64)
        second += np.square(batch, dtype=np.uint32).sum(axis=0, dtype=np.int64)
        if products:
            # Sums of products of bytes are whole numbers below 2**53, so this float64 product is exact in any order.
            flat = batch.reshape(len(batch), -1).astype(np.float64)
            pairs = flat.T @ flat if pairs is None else pairs + flat.T @ flat
    assert count, "no images to take statistics of"
    return Sums(count, first, second, pairs)


def fit_statistics(
    kind: str, batches: Iterable[npt.NDArray[np.uint8]], *, epsilon: float = 1e-5
) -> dict[str, npt.NDArray[np.float64]]:
    """Fit a normalisation on the training split, x = uint8 / 255.

    ============================ ======================================================================
    none, scale                  nothing to fit
    center, center_image         ``mean`` (C,) or (H, W, C)
    standardize                  ``mean``, ``std`` (C,)
    standardize_pixel            ``mean``, ``std`` (H, W, C)
    pca                          y = diag(1 / sqrt(l + epsilon)) U^T (x - mean), a flat vector
    zca                          y = U diag(1 / sqrt(l + epsilon)) U^T (x - mean), an image again
    ============================ ======================================================================

    l and U are the eigenvalues and eigenvectors of the covariance. Whitening gives ``mean`` (H, W, C), ``matrix``
    (D, D) with D = H*W*C in HWC order, and ``eigenvalues`` (D,), largest first. Variances divide by the number of
    values; a standard deviation below one grey level (1/255) counts as one.

    Parameters
    ----------
    kind
        Name of the normalisation.
    batches
        The training split, uint8 (n, H, W, C) each.
    epsilon
        Added to each eigenvalue, in units of x squared: larger values leave weak components weak.

    Raises
    ------
    UserError
        Whitening above `MAX_DIMENSIONS`.

    References
    ----------
    Bell & Sejnowski 1997, "The 'independent components' of natural scenes are edge filters" (ZCA).
    """
    if kind in ("none", "scale"):
        return {}
    return statistics_from(kind, add_up(batches, products=kind in WHITENING), epsilon=epsilon)


def statistics_from(kind: str, sums: Sums, *, epsilon: float) -> dict[str, npt.NDArray[np.float64]]:
    """Return the arrays of `fit_statistics` from the sums of a split."""
    first, second, count = sums.first.astype(np.float64), sums.second.astype(np.float64), sums.count
    if kind in ("none", "scale"):
        return {}
    if kind in BY_CHANNEL:
        count *= first.shape[0] * first.shape[1]
        first, second = first.sum(axis=(0, 1)), second.sum(axis=(0, 1))
    mean = first / count
    std = np.maximum(np.sqrt(np.maximum(second / count - mean**2, 0)) / 255, SMALLEST_STD)
    if kind in WHITENING:
        assert sums.products is not None
        check_dimensions(kind, *sums.first.shape)
        flat = mean.ravel()
        covariance = (sums.products / count - np.outer(flat, flat)) / 255**2
        matrix, eigenvalues = _whitening(kind, covariance, epsilon)
        return {"mean": mean / 255, "matrix": matrix, "eigenvalues": eigenvalues}
    return {"mean": mean / 255} | ({"std": std} if kind.startswith("standardize") else {})


def _whitening(kind: str, covariance: Floats, epsilon: float) -> tuple[Floats, Floats]:
    with _one_thread():
        eigenvalues, vectors = np.linalg.eigh(covariance)
    eigenvalues = np.maximum(eigenvalues[::-1], 0)
    vectors = vectors[:, ::-1]
    # An eigenvector's sign is arbitrary: its largest entry is made positive, or LAPACK would decide.
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(len(vectors))])
    vectors = vectors * np.where(signs == 0, 1, signs)
    matrix = (vectors / np.sqrt(eigenvalues + epsilon)).T
    if kind == "zca":
        with _one_thread():
            matrix = vectors @ matrix
    return np.ascontiguousarray(matrix), np.ascontiguousarray(eigenvalues)


def _one_thread() -> AbstractContextManager[object]:
    """Keep BLAS and LAPACK to one thread: how they share out a sum decides its last bits."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def normalize(images: npt.NDArray[np.uint8], kind: str, statistics: dict[str, npt.NDArray[np.float64]]) -> Floats:
    """Apply a normalisation in float64: the reference for the model's first layer, and what the pictures show.

    Parameters
    ----------
    images
        uint8 (n, H, W, C).
    kind, statistics
        As `fit_statistics` takes and returns them.

    Returns
    -------
    ndarray
        float64 (n, H, W, C); (n, D) for ``pca``.
    """
    values = images.astype(np.float64)
    if kind == "none":
        return values
    values /= 255
    if kind == "scale":
        return values
    values -= statistics["mean"]
    if kind in WHITENING:
        with _one_thread():
            flat = values.reshape(len(values), -1) @ statistics["matrix"].T
        return flat if kind == "pca" else flat.reshape(values.shape)
    return values / statistics["std"] if "std" in statistics else values
