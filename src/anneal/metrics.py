"""Predictions to figures: accuracy, macro averages, likelihood, calibration, and their bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from anneal.seeding import generator

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

TOP = 5
"""``top5`` counts a hit among the best five classes; with five classes or fewer it is 1."""

BINS = 15
"""Bins of the calibration errors, as many as Guo et al. 2017 use; of equal mass after Nguyen & O'Connor 2015."""

COVERAGES = (0.80, 0.90, 0.95)
"""Shares of the images, the most confident ones, whose accuracy stands in the figures."""

RESAMPLED = ("accuracy", "macro_accuracy", "macro_f1", "top5", "nll", "brier")
"""Figures with an interval; calibration errors have none, since each resample's noise adds to them."""

NORMAL_95 = 1.96
"""Standard deviations to either side of the mean that hold 95 % of a normal distribution."""

CHUNK = 2**24
"""Largest number of drawn images held at once while resampling; a constant, for the draws' order depends on it."""


def predicted(probabilities: Floats) -> Integers:
    """Return the most probable class of each row, the first where several are: int64 (N,)."""
    return probabilities.argmax(axis=1)


def accuracy(probabilities: Floats, labels: Integers) -> float:
    """Return the fraction of images whose most probable class is their label.

    Parameters
    ----------
    probabilities
        float64 (N, K), rows sum to 1; so in every function here.
    labels
        int64 (N,), 0 to K - 1.

    >>> accuracy(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]))
    0.5
    """
    return float((predicted(probabilities) == labels).mean())


def macro_accuracy(probabilities: Floats, labels: Integers) -> float:
    """Return the mean over classes of the fraction recognised; a class without an image in ``labels`` does not count."""
    return float(_macro(*_class_counts(probabilities, labels))[0])


def macro_f1(probabilities: Floats, labels: Integers) -> float:
    """Return the mean over classes of F1 = 2 TP / (2 TP + FP + FN); a class neither present nor predicted does not count."""
    return float(_macro(*_class_counts(probabilities, labels))[1])


def top_k(probabilities: Floats, labels: Integers, k: int = TOP) -> float:
    """Return the fraction of images whose label is among the ``min(k, K)`` most probable classes, ties by class order."""
    return float(_hits_in_top(probabilities, labels, k).mean())


def nll(probabilities: Floats, labels: Integers) -> float:
    """Return the mean negative log-likelihood in nats, probabilities clipped at 2.2e-16 (so at most 36 an image)."""
    return float(nll_by_image(probabilities, labels).mean())


def brier(probabilities: Floats, labels: Integers) -> float:
    """Return the Brier score: the squared error summed over classes, averaged over images, 0 to 2 (Brier 1950).

    >>> brier(np.array([[0.5, 0.5]]), np.array([0]))
    0.5
    """
    return float(_brier_by_image(probabilities, labels).mean())


def ece(probabilities: Floats, labels: Integers, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean over bins of |accuracy - confidence|, weighted by images.

    Confidence is the largest probability. Bins have equal mass (quantiles of the confidence), since most
    predictions of a good classifier would share one bin of equal width; equal confidences share a bin.
    """
    table = reliability(probabilities, labels, bins)
    return float(sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in table) / len(labels))


def reliability(probabilities: Floats, labels: Integers, bins: int = BINS) -> list[dict[str, float]]:
    """Return the reliability diagram as rows ``low, high, confidence, accuracy, count``, by rising confidence.

    ``low`` and ``high`` are the extreme confidences in the bin, ``confidence`` and ``accuracy`` its means; empty bins
    are left out.
    """
    confidence = probabilities.max(axis=1)
    hit = predicted(probabilities) == labels
    edges = np.quantile(confidence, np.linspace(0, 1, min(bins, len(labels)) + 1)[1:-1])
    which = np.searchsorted(edges, confidence, side="right")
    rows = []
    for index in np.unique(which):
        chosen = which == index
        rows.append(
            {
                "low": float(confidence[chosen].min()),
                "high": float(confidence[chosen].max()),
                "confidence": float(confidence[chosen].mean()),
                "accuracy": float(hit[chosen].mean()),
                "count": int(chosen.sum()),
            }
        )
    return rows


def ece_equal_width(probabilities: Floats, labels: Integers, bins: int = BINS) -> float:
    """Return the expected calibration error over bins of equal width, as most papers have it (Guo et al. 2017).

    >>> ece_equal_width(np.array([[0.8, 0.2]] * 4), np.array([0, 0, 1, 1])).__round__(6)
    0.3
    """
    hit = predicted(probabilities) == labels
    return float(_error_by_column(probabilities.max(axis=1)[:, None], hit[:, None], bins)[0])


def classwise_ece(probabilities: Floats, labels: Integers, bins: int = BINS) -> Floats:
    """Return each class's calibration error: the mean over bins of |share of the class - its mean probability|.

    All K probabilities of an image count, not the largest alone, each in the bins of its class, which have equal width;
    bins are weighted by images. A class without an image counts too: its probability should be 0 (Kull et al. 2019).

    Returns
    -------
    ndarray
        float64 (K,); ``ece_classwise`` of `figures` is their mean.

    Examples
    --------
    >>> classwise_ece(np.array([[0.8, 0.2]] * 4), np.array([0, 0, 1, 1])).round(6)
    array([0.3, 0.3])
    """
    return _error_by_column(probabilities, labels[:, None] == np.arange(probabilities.shape[1]), bins)


def _error_by_column(probabilities: Floats, happened: npt.NDArray[np.bool_], bins: int) -> Floats:
    """Return the calibration error of each column of (N, C): what was said, and whether it happened. Bins are [low, high)."""
    num_images, columns = probabilities.shape
    edges = np.linspace(0, 1, bins + 1)
    which = np.searchsorted(edges, probabilities, side="right") - 1  # a bin of its own for 1.0, as in torchmetrics
    which += (bins + 1) * np.arange(columns)
    size = (bins + 1) * columns
    gaps = np.bincount(which.ravel(), (happened - probabilities).ravel(), size)
    return np.abs(gaps).reshape(columns, bins + 1).sum(axis=1) / num_images


def risk_coverage(probabilities: Floats, labels: Integers) -> Floats:
    """Return the share of mistakes among the n most confident images, for n from 1 to N: float64 (N,).

    Confidence is the largest probability. Where several images share one, their mistakes are spread evenly over them, so
    that the order of the images does not matter. The last value is 1 - accuracy (El-Yaniv & Wiener 2010).

    >>> risk_coverage(np.array([[0.6, 0.4], [0.9, 0.1]]), np.array([1, 0]))
    array([0. , 0.5])
    """
    wrong = (predicted(probabilities) != labels).astype(np.float64)
    _, group, counts = np.unique(-probabilities.max(axis=1), return_inverse=True, return_counts=True)
    shared = np.repeat(np.bincount(group, wrong) / counts, counts)
    return np.cumsum(shared) / np.arange(1, len(labels) + 1)


def aurc(probabilities: Floats, labels: Integers) -> float:
    """Return the area under the risk-coverage curve, the mean of `risk_coverage`; low is good (Geifman et al. 2019)."""
    return float(risk_coverage(probabilities, labels).mean())


def selective_accuracy(probabilities: Floats, labels: Integers, coverage: float) -> float:
    """Return the accuracy on the share ``coverage`` of the images, rounded up, that are predicted most confidently."""
    return float(1 - _at_coverage(risk_coverage(probabilities, labels), coverage))


def _at_coverage(risks: Floats, coverage: float) -> float:
    return float(risks[max(1, int(np.ceil(round(coverage * len(risks), 9)))) - 1])


def confusion(probabilities: Floats, labels: Integers) -> Integers:
    """Return the confusion matrix: int64 (K, K), a row an actual class, a column a predicted one."""
    classes = probabilities.shape[1]
    return np.bincount(labels * classes + predicted(probabilities), minlength=classes**2).reshape(classes, classes)


def figures(probabilities: Floats, labels: Integers) -> dict[str, float]:
    """Return all figures by name; see docs/evaluation.md."""
    risks = risk_coverage(probabilities, labels)
    return {
        "accuracy": accuracy(probabilities, labels),
        "macro_accuracy": macro_accuracy(probabilities, labels),
        "macro_f1": macro_f1(probabilities, labels),
        "top5": top_k(probabilities, labels),
        "nll": nll(probabilities, labels),
        "brier": brier(probabilities, labels),
        "ece": ece(probabilities, labels),
        "ece_equal_width": ece_equal_width(probabilities, labels),
        "ece_classwise": float(classwise_ece(probabilities, labels).mean()),
        "aurc": float(risks.mean()),
        **{f"accuracy_at_{round(100 * share)}": 1 - _at_coverage(risks, share) for share in COVERAGES},
    }


# ---- the bootstrap ----------------------------------------------------------------------------------------------------


def bootstrap(
    predictions: Sequence[Floats], labels: Integers, *, num_resamples: int, seed: int
) -> list[dict[str, Floats]]:
    """Return each figure of `RESAMPLED` on resamples of the images, drawn with replacement (Efron 1979).

    All predictions see the same resamples, so that their differences can be compared as well.

    Parameters
    ----------
    predictions
        Probabilities of several predictors on the same images, each float64 (N, K).
    labels
        int64 (N,).
    num_resamples
        B, the number of resamples of N images.
    seed
        Of the draws.

    Returns
    -------
    list of dict
        For each predictor, name of a figure to its values, float64 (B,).
    """
    num_images = len(labels)
    num_classes = predictions[0].shape[1]
    by_image = [
        np.stack(
            [
                predicted(p) == labels,
                _hits_in_top(p, labels, TOP),
                nll_by_image(p, labels),
                _brier_by_image(p, labels),
            ],
            axis=1,
        ).astype(np.float64)
        for p in predictions
    ]
    values: list[dict[str, list[Floats]]] = [{name: [] for name in RESAMPLED} for _ in predictions]
    for counts in resamples(num_images, num_resamples, seed):
        weights = counts.astype(np.float64)
        actual = _sums_by_group(counts, labels, num_classes)
        for index, p in enumerate(predictions):
            guess = predicted(p)
            hits = _sums_by_group(counts[:, guess == labels], labels[guess == labels], num_classes)
            macro = _macro(hits, actual, _sums_by_group(counts, guess, num_classes))
            # One product a predictor: in a wider one, the last bits would depend on who else is in it.
            columns = (weights @ by_image[index]).T / num_images
            for name, column in zip(
                RESAMPLED, (columns[0], macro[0], macro[1], columns[1], columns[2], columns[3]), strict=True
            ):
                values[index][name].append(column)
    return [{name: np.concatenate(chunks) for name, chunks in by_name.items()} for by_name in values]


def mean(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of each entry over items with the same keys: of figures, or of their resampled values."""
    return {name: np.mean([item[name] for item in items], axis=0) for name in items[0]}


def wilson(share: float, num_images: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of images (Wilson 1927).

    >>> low, high = wilson(0.9, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    """
    extra = NORMAL_95**2 / num_images
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(share * (1 - share) * extra + extra**2 / 4) / (1 + extra)
    return max(0.0, middle - half), min(1.0, middle + half)


def with_intervals(
    values: Mapping[str, float], resampled: Mapping[str, Floats], num_images: int, *, is_mean: bool = False
) -> dict[str, Any]:
    """Return figures, each followed by its 95 % interval ``<name>_ci: [low, high]`` where it was resampled.

    It is the bootstrap's percentile interval, but of one predictor's accuracy Wilson's: near 1, resamples of few mistakes are
    too certain, and those of none agree. Of a mean over predictors (``is_mean``), of exactly 1 or 0 it is Wilson's too.
    """
    result: dict[str, Any] = {}
    for name, value in values.items():
        result[name] = float(value)
        if name in resampled:
            low, high = np.quantile(resampled[name], [0.025, 0.975])
            if name == "accuracy" and (not is_mean or value in (0.0, 1.0)):
                low, high = wilson(float(value), num_images)
            result[f"{name}_ci"] = [float(low), float(high)]
    return result


def resamples(num_images: int, num_resamples: int, seed: int) -> Iterator[Integers]:
    """Yield how often each image was drawn, int64 (b, N) with rows that sum to N, ``num_resamples`` rows in all."""
    random = generator(seed, "bootstrap", num_images)
    rows = max(1, min(num_resamples, CHUNK // num_images))
    for start in range(0, num_resamples, rows):
        size = min(rows, num_resamples - start)
        drawn = random.integers(0, num_images, (size, num_images)) + num_images * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * num_images).reshape(size, num_images)


def _sums_by_group(counts: Integers, groups: Integers, num_groups: int) -> Integers:
    """Return the sums of ``counts`` (B, N) over the columns of each group: int64 (B, num_groups)."""
    sums = np.zeros((len(counts), num_groups), np.int64)
    if groups.size:
        order = np.argsort(groups, kind="stable")
        present, starts = np.unique(groups[order], return_index=True)
        sums[:, present] = np.add.reduceat(counts[:, order], starts, axis=1)
    return sums


def _class_counts(probabilities: Floats, labels: Integers) -> tuple[Integers, Integers, Integers]:
    matrix = confusion(probabilities, labels)
    return np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)


def _macro(hits: Integers, actual: Integers, guessed: Integers) -> tuple[Floats, Floats]:
    """Return macro accuracy and macro F1 from counts a class (..., K), classes in the last axis."""
    recall = hits / np.maximum(actual, 1)
    f1 = 2 * hits / np.maximum(actual + guessed, 1)
    return (
        recall.sum(axis=-1) / (actual > 0).sum(axis=-1),
        f1.sum(axis=-1) / (actual + guessed > 0).sum(axis=-1),
    )


def _hits_in_top(probabilities: Floats, labels: Integers, k: int) -> npt.NDArray[np.bool_]:
    own = np.take_along_axis(probabilities, labels[:, None], axis=1)
    before = np.arange(probabilities.shape[1]) < labels[:, None]
    rank = ((probabilities > own) | ((probabilities == own) & before)).sum(axis=1)
    return rank < k


def nll_by_image(probabilities: Floats, labels: Integers) -> Floats:
    """Return the negative log-likelihood of each image, float64 (N,), whose mean is `nll`."""
    own = probabilities[np.arange(len(labels)), labels]
    return -np.log(np.clip(own, np.finfo(np.float64).eps, 1.0))


def _brier_by_image(probabilities: Floats, labels: Integers) -> Floats:
    own = probabilities[np.arange(len(labels)), labels]
    return (probabilities**2).sum(axis=1) - 2 * own + 1
