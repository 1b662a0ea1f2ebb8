"""Temperature scaling: one number, fitted on validation, that makes confidences match accuracies."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from anneal.ensemble import Floats, log_softmax

LIMITS = (0.05, 20.0)
"""Smallest and largest temperature that is fitted."""


def apply_temperature(log_probabilities: Floats, temperature: float) -> Floats:
    """Return log-probabilities of ``softmax(log_probabilities / temperature)``, float64 (N, K).

    A temperature above 1 softens, below 1 sharpens; the order of the classes stays. At 1 nothing changes.
    """
    return log_probabilities if temperature == 1.0 else log_softmax(log_probabilities / temperature)


def fit_temperature(log_probabilities: Floats, labels: npt.NDArray[np.int64]) -> float:
    """Return the temperature with the least negative log-likelihood (Guo et al. 2017).

    The targets are smoothed by one image in N + 1, as in Platt (1999): on a validation set without a mistake the plain
    likelihood has no optimum but a temperature of 0, yet N images do not show an error rate far below 1 / (N + 1).

    Parameters
    ----------
    log_probabilities
        float64 (N, K), of the predictor that is to be calibrated.
    labels
        int64 (N,), of the validation split.

    Returns
    -------
    float
        Within `LIMITS`.
    """
    num_images = len(labels)
    smoothing = 1 / (num_images + 1)
    own = np.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]
    target = (1 - smoothing) * own.mean() + smoothing * log_probabilities.mean()

    def slope(inverse: float) -> float:
        """Return the derivative of the loss in 1 / temperature, in which the loss is convex."""
        probabilities = np.exp(log_softmax(log_probabilities * inverse))
        return float((probabilities * log_probabilities).sum(axis=1).mean() - target)

    low, high = np.log(1 / LIMITS[1]), np.log(1 / LIMITS[0])
    for _ in range(60):  # bisection: 60 halvings leave 5e-18 of the range, and cannot miss
        middle = (low + high) / 2
        if slope(float(np.exp(middle))) > 0:
            high = middle
        else:
            low = middle
    return float(np.clip(np.exp(-(low + high) / 2), *LIMITS))
