"""The model's first layer: uint8 images in, normalised floating point out, statistics as buffers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from anneal.params import UserError

CHANNEL = ("center", "standardize")
PIXEL = ("center_image", "standardize_pixel")
WHITENING = ("pca", "zca")
KINDS = ("none", "scale", *CHANNEL, *PIXEL, *WHITENING)


class Normalization(nn.Module):
    """Apply the statistics of the training split to a batch of images.

    With ``x`` the pixels divided by 255: ``none`` gives the pixels themselves, 0 to 255; ``scale`` gives ``x``; ``center``
    and ``center_image`` give ``x - mean``; ``standardize`` and ``standardize_pixel`` give ``(x - mean) / std``; ``pca``
    and ``zca`` give ``matrix @ (x - mean)`` over the flattened image in height, width, channel order.

    A batch is computed as rows of one image line each, so that the statistics stay in the processor's first cache: the
    same figures as the broadcast form over (N, C, H, W), several times sooner.

    Parameters
    ----------
    kind
        One of `KINDS`.
    statistics
        Arrays of statistics.npz: ``mean`` and ``std`` of shape (C,) or (H, W, C), ``matrix`` (D, D) with D = H*W*C. None
        leaves room for them, to be filled from a state dict.
    height, width, channels
        Geometry of the images.

    Raises
    ------
    UserError
        ``kind`` is unknown, or a statistic is missing or of another shape.
    """

    def __init__(
        self,
        kind: str,
        statistics: Mapping[str, npt.NDArray[np.floating]] | None,
        height: int,
        width: int,
        channels: int,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"preprocess.normalize: found {kind}, allowed: {' | '.join(KINDS)}")
        self.kind = kind
        self.height, self.width, self.channels = height, width, channels
        # Statistics of a channel repeat along a line of pixels; those of a pixel need the whole image as one row.
        self.row = height * width * channels if kind in PIXEL + WHITENING else width * channels
        self.matrix: torch.Tensor | None
        self.scale: torch.Tensor | None
        self.shift: torch.Tensor | None
        if kind == "none":
            scale, shift, matrix = None, None, None
        elif statistics is None:
            scale, shift = torch.zeros(self.row), torch.zeros(self.row)
            matrix = torch.zeros(self.row, self.row) if kind in WHITENING else None
        else:
            scale, shift, matrix = self._fold(statistics)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.register_buffer("matrix", matrix)

    def _fold(
        self, statistics: Mapping[str, npt.NDArray[np.floating]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return scale and shift of a row, and the whitening matrix transposed, folded in float64."""
        shape = (self.channels,) if self.kind in CHANNEL else (self.height, self.width, self.channels)
        mean = _statistic(statistics, "mean", shape) if self.kind != "scale" else np.zeros(self.channels)
        std = _statistic(statistics, "std", shape) if self.kind.startswith("standardize") else np.ones_like(mean)
        # A pixel or channel that never varies is centred only: there is no scale to give it.
        std = np.where(std > 0, std, 1.0)
        repeats = self.row // mean.size
        scale = np.tile((1.0 / (255.0 * std)).ravel(), repeats)
        shift = np.tile((-mean / std).ravel(), repeats)
        matrix = _statistic(statistics, "matrix", (self.row, self.row)) if self.kind in WHITENING else None
        return (
            torch.from_numpy(scale).float(),
            torch.from_numpy(shift).float(),
            None if matrix is None else torch.from_numpy(np.ascontiguousarray(matrix.T)).float(),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images.

        Parameters
        ----------
        images
            (N, H, W, C), uint8, or floating point in 0..255 (mixed or averaged images).

        Returns
        -------
        torch.Tensor
            float32 (N, C, H, W) in channels_last memory; for ``pca`` (N, D, 1, 1).
        """
        assert images.shape[1:] == (self.height, self.width, self.channels), tuple(images.shape)
        pixels = images.float()
        if self.scale is not None and self.shift is not None:
            rows = torch.addcmul(self.shift, pixels.reshape(-1, self.row), self.scale)
            if self.matrix is not None:
                rows = rows @ self.matrix
            if self.kind == "pca":
                return rows.view(len(images), self.row, 1, 1)
            pixels = rows.view(images.shape)
        return pixels.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """Name the kind and the geometry in the module's print-out."""
        return f"{self.kind}, height={self.height}, width={self.width}, channels={self.channels}"


def _statistic(
    statistics: Mapping[str, npt.NDArray[np.floating]], name: str, shape: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    if name not in statistics:
        raise UserError(f"statistics.npz: no array {name!r}; run `dvc repro preprocess` again")
    array = np.asarray(statistics[name], dtype=np.float64)
    if array.shape != shape:
        raise UserError(
            f"statistics.npz: {name!r} has shape {array.shape}, not {shape}; run `dvc repro preprocess` again"
        )
    return array
