"""What a predictor has to beat: the classes' shares, whatever the image, and a linear classifier on pixels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anneal import metrics
from anneal.ensemble import Floats
from anneal.seeding import generator
from anneal.significance import compare
from anneal.store import Images, Labels, Split, Store

SIDE = 16
"""Largest side in pixels of what the linear classifier sees: finer ones make it slower and hardly better."""

MOST_IMAGES = 10_000
"""Training images that it is fitted on, at most."""

MOST_WORK = 200_000_000
"""Largest product of images, features and classes; of many classes fewer images are taken, but `LEAST_IMAGES` of each."""

LEAST_IMAGES = 5

MOST_ITERATIONS = 200

STRENGTH = 0.1
"""``C`` of scikit-learn: the inverse of the L2 penalty, on pixels with a standard deviation of 1."""


def baselines(
    store: Store, labels: Mapping[str, Labels], exported: Mapping[str, Floats], *, num_resamples: int, seed: int
) -> dict[str, Any]:
    """Return what baselines.json says: the figures of both baselines on each split, with intervals.

    ``majority_class``: the training split's class shares as a constant prediction. Its accuracy is that of always saying the
    largest class; a classifier that does not beat it has learnt nothing. ``linear``: multinomial logistic regression on
    pixels; a network that is not shown to beat it is not worth its cost. ``linear.gain`` compares the exported predictor, b,
    with it, a.

    Parameters
    ----------
    store
        The processed data; both are fitted on ``train``.
    labels, exported
        Split to its labels, int64 (N,), and to the exported predictor's probabilities, float64 (N, K).
    num_resamples, seed
        Of the bootstrap; the seed also draws the images that the linear classifier is fitted on.
    """
    drawn: dict[str, int] = {"num_resamples": num_resamples, "seed": seed}
    counts = np.bincount(store.split("train").labels, minlength=len(store.info.classes))
    shares = counts / counts.sum()
    constant = {name: np.tile(shares, (len(of), 1)) for name, of in labels.items()}
    found: dict[str, Any] = {
        "majority_class": {
            "class": store.info.classes[int(counts.argmax())],
            **{name: _figures(constant[name], of, **drawn) for name, of in labels.items()},
        }
    }
    fitted = fit_linear(store, seed=seed)
    if fitted is not None:
        predict, num_images, num_features = fitted
        linear = {name: predict(store.split(name)) for name in labels}
        found["linear"] = {
            "images": num_images,
            "features": num_features,
            **{name: _figures(linear[name], of, **drawn) for name, of in labels.items()},
            "gain": {name: compare(linear[name], exported[name], of, **drawn).as_dict() for name, of in labels.items()},
        }
    return found


def _figures(probabilities: Floats, labels: Labels, *, num_resamples: int, seed: int) -> dict[str, Any]:
    resampled = metrics.bootstrap([probabilities], labels, num_resamples=num_resamples, seed=seed)[0]
    return metrics.with_intervals(metrics.figures(probabilities, labels), resampled, len(labels))


def fit_linear(store: Store, *, seed: int) -> tuple[Callable[[Split], Floats], int, int] | None:
    """Fit multinomial logistic regression on pixels of training images, by L-BFGS in a bounded number of iterations.

    On one thread: how sums are split among several would move its last bits.

    Parameters
    ----------
    store
        The processed data.
    seed
        Of the draw of images, where there are more than it takes.

    Returns
    -------
    tuple or None
        What predicts a split, float64 (N, K), and the numbers of images and features behind it. None where the images that
        were drawn have one class.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    info, train = store.info, store.split("train")
    classes = len(info.classes)
    features = min(info.height, SIDE) * min(info.width, SIDE) * info.channels
    most = min(MOST_IMAGES, max(MOST_WORK // (features * classes), LEAST_IMAGES * classes))
    chosen = np.sort(generator(seed, "linear baseline").permutation(len(train))[:most])
    labels = train.labels[chosen]
    if len(np.unique(labels)) < 2:
        return None
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the bound on its cost is what stops it
        inputs = pixels(train.take(chosen))
        centre, spread = inputs.mean(axis=0), float(inputs.std()) or 1.0
        model = LogisticRegression(C=STRENGTH, max_iter=MOST_ITERATIONS).fit((inputs - centre) / spread, labels)

    def predict(split: Split) -> Floats:
        probabilities = np.zeros((len(split), classes))
        start = 0
        with threadpool_limits(limits=1):
            for images, _ in split.batches(1024):
                rows = slice(start, start + len(images))
                probabilities[rows, model.classes_] = model.predict_proba((pixels(images) - centre) / spread)
                start += len(images)
        return probabilities

    return predict, len(chosen), features


def pixels(images: Images, side: int = SIDE) -> Floats:
    """Return images as rows of pixels in 0..1, averaged down to ``side``.

    Parameters
    ----------
    images
        uint8 (N, H, W, C).
    side
        Largest height and width.

    Returns
    -------
    ndarray
        float64 (N, min(H, side) * min(W, side) * C).

    Examples
    --------
    >>> pixels(np.array([[0, 255], [255, 255]], np.uint8)[None, :, :, None], side=1)
    array([[0.75]])
    """
    import torch

    height, width = images.shape[1:3]
    planes = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).double() / 255
    small = torch.nn.functional.adaptive_avg_pool2d(planes, (min(height, side), min(width, side)))
    flat: Floats = small.flatten(1).numpy()
    return flat
