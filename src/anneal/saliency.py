"""What in an image spoke for the predicted class, and what for its label: integrated gradients (captum)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from anneal.ensemble import Floats
from anneal.store import Images

if TYPE_CHECKING:
    import torch

STEPS = 32
"""Points on the way from the baseline to the image."""


def attributions(
    classifiers: Sequence[torch.nn.Module],
    images: Images,
    *,
    predicted: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    baseline: npt.NDArray[np.floating],
    weights: Sequence[float] | None = None,
    steps: int = STEPS,
) -> Floats:
    """Return by how much each pixel moved the decision from the label to the predicted class.

    Integrated gradients (Sundararajan et al. 2017) of log p(predicted) - log p(label), p the members' mean probability,
    along the straight line from ``baseline`` to the image. Over all pixels of an image they sum up to that difference at the
    image less the difference at the baseline. Works on every network that has gradients, at every size of image.

    Parameters
    ----------
    classifiers
        M networks in evaluation mode, images (N, H, W, C) in 0..255 to logits.
    images
        uint8 (N, H, W, C).
    predicted, labels
        int64 (N,).
    baseline
        (H, W, C), in 0..255: an image that speaks for no class, such as the mean of the training images.
    weights
        Of the classifiers; None: all alike.
    steps
        Points on the line.

    Returns
    -------
    ndarray
        float64 (N, H, W), summed over channels: above 0 speaks for the predicted class, below 0 for the label.
    """
    import torch
    from captum.attr import IntegratedGradients

    device = next((p.device for classifier in classifiers for p in classifier.parameters()), torch.device("cpu"))
    shares = torch.tensor([1.0] * len(classifiers) if weights is None else list(weights), device=device)
    start = torch.from_numpy(np.ascontiguousarray(baseline, dtype=np.float32))[None].to(device)
    maps = np.empty(images.shape[:3])
    for index, image in enumerate(images):
        wanted, other = int(predicted[index]), int(labels[index])

        def difference(pixels: torch.Tensor, wanted: int = wanted, other: int = other) -> torch.Tensor:
            each = torch.stack([classifier(pixels).float().log_softmax(dim=1) for classifier in classifiers])
            mean = torch.logsumexp(each + shares.log()[:, None, None], dim=0)
            return mean[:, wanted] - mean[:, other]

        pixels = torch.from_numpy(np.ascontiguousarray(image))[None].to(device).float()
        found = IntegratedGradients(difference).attribute(pixels, baselines=start, n_steps=steps)
        maps[index] = found[0].sum(dim=-1).double().cpu().numpy()
    return maps
