"""Calibration: temperature and vector scaling, fitted on validation, that make confidences match accuracies.

Each is kept only where cross-validation on the validation split says that it helps: on few images one more parameter can
make the likelihood of new images worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from anneal.ensemble import Floats, log_softmax
from anneal.seeding import generator

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


def apply_vector(log_probabilities: Floats, scale: npt.ArrayLike, bias: npt.ArrayLike) -> Floats:
    """Return log-probabilities of ``softmax(scale * log_probabilities + bias)``, a scale and a bias a class (K,)."""
    return log_softmax(log_probabilities * np.asarray(scale, np.float64) + np.asarray(bias, np.float64))


def fit_vector(log_probabilities: Floats, labels: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return the scale and the bias of each class, each float64 (K,), of the least negative log-likelihood (Guo et al. 2017).

    Targets are smoothed as in `fit_temperature`, and the fit starts there; L-BFGS. Biases sum to 0, since only their
    differences count. Unlike a temperature it can change which class is predicted.

    Parameters
    ----------
    log_probabilities, labels
        As in `fit_temperature`.
    """
    from scipy.optimize import minimize

    num_images, num_classes = log_probabilities.shape
    targets = np.full((num_images, num_classes), 1 / (num_images + 1) / num_classes)
    targets[np.arange(num_images), labels] += 1 - 1 / (num_images + 1)

    def loss(values: Floats) -> tuple[float, Floats]:
        predicted = apply_vector(log_probabilities, values[:num_classes], values[num_classes:])
        error = (np.exp(predicted) - targets) / num_images
        gradient = np.concatenate([(error * log_probabilities).sum(axis=0), error.sum(axis=0)])
        return float(-(targets * predicted).sum() / num_images), gradient

    start = np.concatenate(
        [np.full(num_classes, 1 / fit_temperature(log_probabilities, labels)), np.zeros(num_classes)]
    )
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-8}).x
    scale, bias = found[:num_classes], found[num_classes:]
    return scale, bias - bias.mean()


# ---- which of them ------------------------------------------------------------------------------------------------------

Fitted = dict[str, Any]
"""``{"kind": "none"}``, ``{"kind": "temperature", "temperature": t}`` or ``{"kind": "vector", "scale": [...], "bias": [...]}``."""


def _none(log_probabilities: Floats, labels: npt.NDArray[np.int64]) -> Fitted:  # noqa: ARG001
    return {"kind": "none"}


def _temperature(log_probabilities: Floats, labels: npt.NDArray[np.int64]) -> Fitted:
    return {"kind": "temperature", "temperature": fit_temperature(log_probabilities, labels)}


def _vector(log_probabilities: Floats, labels: npt.NDArray[np.int64]) -> Fitted:
    scale, bias = fit_vector(log_probabilities, labels)
    return {"kind": "vector", "scale": scale.tolist(), "bias": bias.tolist()}


KINDS: dict[str, Callable[[Floats, npt.NDArray[np.int64]], Fitted]] = {
    "none": _none,
    "temperature": _temperature,
    "vector": _vector,
}
"""``evaluate.calibration``, each freer than the one before."""

FOLDS = 5
"""Parts of the validation split, each predicted by what was fitted on the others."""


def apply(log_probabilities: Floats, fitted: Mapping[str, Any]) -> Floats:
    """Return calibrated log-probabilities, float64 (N, K); ``fitted`` as `choose` returns it."""
    if fitted["kind"] == "temperature":
        return apply_temperature(log_probabilities, fitted["temperature"])
    if fitted["kind"] == "vector":
        return apply_vector(log_probabilities, fitted["scale"], fitted["bias"])
    return log_probabilities


def choose(log_probabilities: Floats, labels: npt.NDArray[np.int64], most: str) -> tuple[Fitted, dict[str, Any]]:
    """Fit the calibration that cross-validation favours, none or one of `KINDS` up to ``most``.

    Vector scaling is left out where a class has no image here. From none on, the next is taken if it lowers the cross-validated negative log-likelihood by more than one standard error of
    that difference over the images (the rule of Breiman et al. 1984): what a few images ask for by chance is not followed.

    Parameters
    ----------
    log_probabilities
        float64 (N, K), of the predictor that is to be calibrated, on the validation split.
    labels
        int64 (N,).
    most
        A key of `KINDS`.

    Returns
    -------
    tuple
        What was fitted on all images; and why: ``asked``, ``kind``, ``num_images`` and, by kind, ``cross_validated_nll`` and
        ``standard_error`` of its difference to the one kept before it.
    """
    # A class without an image costs nothing to rule out, in each fold: cross-validation cannot see what that does elsewhere.
    absent = log_probabilities.shape[1] - len(np.unique(labels))
    allowed = "temperature" if most == "vector" and absent else most
    names = list(KINDS)[: list(KINDS).index(allowed) + 1]
    losses = {name: _cross_validated(log_probabilities, labels, KINDS[name]) for name in names}
    kept, errors = "none", {}
    for name in names[1:]:
        gain = losses[kept] - losses[name]
        errors[name] = float(gain.std(ddof=1) / np.sqrt(len(gain))) if len(gain) > 1 else 0.0
        if len(labels) > 1 and gain.mean() > errors[name]:
            kept = name
    why = {
        "asked": most,
        "kind": kept,
        "num_images": len(labels),
        "cross_validated_nll": {name: float(loss.mean()) for name, loss in losses.items()},
        "standard_error": errors,
    }
    if allowed != most:
        why["left_out"] = f"{most}: {absent} of {log_probabilities.shape[1]} classes have no image in val"
    return KINDS[kept](log_probabilities, labels), why


def _cross_validated(log_probabilities: Floats, labels: npt.NDArray[np.int64], fit: Callable[..., Fitted]) -> Floats:
    """Return the negative log-likelihood of each image, float64 (N,), by what was fitted without its fold."""
    fold = _folds(labels)
    losses = np.empty(len(labels))
    for number in np.unique(fold):
        out = fold == number
        fitted = fit(log_probabilities[~out], labels[~out]) if not out.all() else {"kind": "none"}
        predicted = apply(log_probabilities[out], fitted)
        losses[out] = -predicted[np.arange(out.sum()), labels[out]]
    return losses


def _folds(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the fold of each image, classes spread evenly: shuffled, always in the same way, sorted by class, dealt out in turn."""
    order = generator(0, "calibration").permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % FOLDS
    return fold
