"""Labels that look wrong, by predictions for images whose labels the predictor has not seen.

How many labels are wrong cannot be told from how often a predictor errs: a hard image and a wrong label look alike. It can be
told among images that the predictor finds easy, where it hardly errs of itself: see `examine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from anneal.ensemble import Floats
from anneal.metrics import Integers, predicted
from anneal.near_duplicates import averaged_down
from anneal.seeding import generator
from anneal.store import Split, Store
from anneal.views import batch_size

if TYPE_CHECKING:
    import torch

EASY = 1 / 3
"""Share of the images, those with the most confident predictions, whose labels give the estimate."""

MOST_ERRORS = 0.4
"""Share of predictions other than the label, as a fraction of that of guessing, above which no third of the images is easy."""

MOST_PROBABLE = 0.2
"""Largest probability of a label that looks wrong."""

SHOWN = 0.01
"""Share of wrong labels that the lower end of the interval has to exceed to count as shown."""

LEAST_CONTRADICTED = 3
"""Easy images with another label than the prediction, from which on wrong labels count as shown: one or two are chance."""

NEIGHBOURS = {"features": 20, "pixels": 10}
"""Neighbours that judge the label of a training image."""

WIDER = 10
"""Times as many neighbours say which images are the easiest of those on which all `NEIGHBOURS` agree."""

AS_GOOD = 0.02
"""By how much neighbours by pixels may be less accurate on val than the members, and yet judge the labels of train."""

MOST_VAL = 2000
"""Images of val on which the two are compared, at most."""

EXPORTED = "exported predictor"
"""Method of a split that no member was trained on."""


@dataclass(frozen=True)
class LabelErrors:
    """What the predictions say about the labels of one split.

    Parameters
    ----------
    images
        How many were examined.
    share, low, high
        Estimated share of wrong labels, a fraction of 1, and its 95 % interval.
    contradicted
        Easy images whose label is not the prediction.
    suspects
        int64 (n,), indices of the images whose labels look wrong, the worst first.
    suggested
        int64 (n,), the labels that the predictor would give them.
    self_confidence
        float64 (n,), the probabilities of the labels that they have.
    method
        Where the probabilities came from.
    """

    images: int
    share: float
    low: float
    high: float
    contradicted: int
    suspects: Integers
    suggested: Integers
    self_confidence: Floats
    method: str

    @property
    def shown(self) -> bool:
        """Whether there are more wrong labels than chance and a few odd images explain."""
        return shown(self.low, self.contradicted)


def shown(low: float, contradicted: int) -> bool:
    """Return whether there are wrong labels: by the lower end of their share, and by how many images it rests on.

    >>> shown(0.04, 12), shown(0.2, 1)
    (True, False)
    """
    return low > SHOWN and contradicted >= LEAST_CONTRADICTED


def examine(
    probabilities: Floats,
    labels: Integers,
    method: str,
    *,
    ranking: Floats | None = None,
    ties: Floats | None = None,
) -> LabelErrors | None:
    """Estimate the share of wrong labels, and name the images whose labels look most wrong.

    The share is that of labels other than the prediction among the `EASY` share of images with the most confident
    predictions, with a 95 % interval (Wilson 1927), less the mistakes that these predictions expect of themselves, one minus
    their probability: they have to be calibrated, or mistakes that they are too sure of count as wrong labels. Which images are
    easy does not depend on their labels, so where errors strike at random the share among them is that of all; errors that
    annotators make on hard images alone are not counted.
    Suspects are images whose label is not the prediction (by cleanlab, Northcutt et al. 2021), those with the least probable
    labels: at most as many as that share of all, or where it counts as shown, as the upper end of its interval.

    Parameters
    ----------
    probabilities
        float64 (N, K), of predictors that did not see these labels.
    labels
        int64 (N,).
    method
        In words, for the report.
    ranking
        Probabilities by which suspects are named, where better ones are at hand that have seen the labels.
    ties
        Probabilities by which the easy ones are chosen among images whose ``probabilities`` are equally confident.

    Returns
    -------
    LabelErrors or None
        None where the predictor errs more than `MOST_ERRORS` times as often as guessing: a wrong label does not stand out then.
    """
    from scipy.stats import binomtest

    guesses = predicted(probabilities)
    if (guesses != labels).mean() > MOST_ERRORS * (1 - 1 / probabilities.shape[1]):
        return None
    finer = probabilities if ties is None else np.take_along_axis(ties, guesses[:, None], axis=1)
    order = np.lexsort((-finer.max(axis=1), -probabilities.max(axis=1)))
    easy = order[: max(1, round(EASY * len(labels)))]
    contradicted = int((guesses[easy] != labels[easy]).sum())
    interval = binomtest(contradicted, len(easy)).proportion_ci(method="wilson")
    ends = (contradicted / len(easy), interval.low, interval.high)
    expected = float((1 - probabilities[easy].max(axis=1)).mean())
    share, low, high = (max(0.0, float(value) - expected) for value in ends)
    judges = probabilities if ranking is None else ranking
    # Where there is something to find, better a few too many than too few.
    most = high if shown(low, contradicted) else share
    suspects = _other_than_predicted(judges, labels)[: int(np.ceil(most * len(labels)))]
    suspects = suspects[judges[suspects, labels[suspects]] <= MOST_PROBABLE]
    return LabelErrors(
        images=len(labels),
        share=share,
        low=low,
        high=high,
        contradicted=contradicted,
        suspects=suspects,
        suggested=predicted(judges)[suspects],
        self_confidence=judges[suspects, labels[suspects]],
        method=method,
    )


def _other_than_predicted(probabilities: Floats, labels: Integers) -> Integers:
    """Return the indices of images whose label is not the prediction, the least probable label first."""
    from cleanlab.filter import find_label_issues

    if len(np.unique(labels)) < 2:
        return np.empty(0, np.int64)
    found = find_label_issues(
        labels, probabilities, filter_by="predicted_neq_given", return_indices_ranked_by="self_confidence", n_jobs=1
    )
    return np.asarray(found, np.int64).reshape(-1)


# ---- the training split -------------------------------------------------------------------------------------------------


def examine_train(
    store: Store, classifiers: Sequence[torch.nn.Module], *, most: int, seed: int
) -> tuple[LabelErrors | None, Integers]:
    """Examine the labels of the training split, which the members were fitted to.

    Each image is judged by its nearest neighbours, itself left out: by those in the members' last features (Bahri et al.
    2020), which a member that has learnt a wrong label by heart moves towards that label; its prediction has a part in naming the suspects. Where neighbours by pixels are
    about as good on ``val``, as on images as simple as digits, they judge instead, since no label has a part in them, and
    both together name the suspects.

    Parameters
    ----------
    store
        The processed data.
    classifiers
        M networks, uint8 NHWC to logits.
    most
        Images that are examined, drawn where there are more.
    seed
        Of the draw.

    Returns
    -------
    tuple
        What `examine` returns, None for a single image too; and the indices in the training split of the images that were
        examined, int64 (n,).
    """
    train, num_classes = store.split("train"), len(store.info.classes)
    indices = drawn(len(train), most, seed)
    if len(indices) < 2:
        return None, indices
    labels = train.labels[indices]
    features, of_members = last_features(classifiers, train, indices, num_classes)
    by_features = neighbours_say(features, labels, num_classes, count=NEIGHBOURS["features"])
    if store.info.counts.get("val"):
        val = store.split("val")
        some = drawn(len(val), min(most, MOST_VAL), seed)
        _, on_val = last_features(classifiers, val, some, num_classes)
        pixels, of_val = principal_components(small_images(train, indices), small_images(val, some))
        count = NEIGHBOURS["pixels"]
        guesses = predicted(neighbours_say(pixels, labels, num_classes, count=count, queries=of_val))
        right = (guesses == val.labels[some]).mean()
        if right >= (predicted(on_val) == val.labels[some]).mean() - AS_GOOD:
            by_pixels = neighbours_say(pixels, labels, num_classes, count=count)
            wider = neighbours_say(pixels, labels, num_classes, count=WIDER * count)
            both = (by_pixels + by_features) / 2
            return examine(by_pixels, labels, "neighbours by pixels", ranking=both, ties=wider), indices
    wider = neighbours_say(features, labels, num_classes, count=WIDER * NEIGHBOURS["features"])
    both = (by_features + of_members) / 2
    return examine(by_features, labels, "neighbours by the members' features", ranking=both, ties=wider), indices


def drawn(total: int, count: int, seed: int) -> Integers:
    """Return the indices of at most ``count`` of ``total`` images, drawn without replacement, in order: int64 (n,)."""
    if total <= count:
        return np.arange(total)
    return np.sort(generator(seed, "label_errors").choice(total, count, replace=False))


def neighbours_say(
    features: npt.NDArray[np.floating],
    labels: Integers,
    num_classes: int,
    *,
    count: int,
    queries: npt.NDArray[np.floating] | None = None,
) -> Floats:
    """Return the shares of the classes among the nearest neighbours, the nearer the more: float64 (n, K).

    Parameters
    ----------
    features
        (N, D), of the images that have the labels.
    labels
        int64 (N,).
    num_classes
        K.
    count
        Neighbours that are asked, fewer where there are fewer images; each counts by the inverse of its distance.
    queries
        (n, D): who asks. None: each of the N images, itself left out.

    Examples
    --------
    >>> places = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    >>> neighbours_say(places, np.array([0, 1, 0, 1, 1, 1]), 2, count=2).argmax(axis=1)
    array([1, 0, 1, 1, 1, 1])
    """
    from sklearn.neighbors import NearestNeighbors

    count = min(count, len(labels) - (queries is None))
    found = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(features)
    distances, indices = found.kneighbors(queries)
    weights = 1 / np.maximum(distances, 1e-6)
    said = np.zeros((len(distances), num_classes))
    for rank in range(count):
        np.add.at(said, (np.arange(len(said)), labels[indices[:, rank]]), weights[:, rank])
    return said / said.sum(axis=1, keepdims=True)


def last_features(
    classifiers: Sequence[torch.nn.Module], split: Split, indices: Integers, num_classes: int
) -> tuple[npt.NDArray[np.float32], Floats]:
    """Return what the last layer of each network takes, and the mean of their probabilities.

    Parameters
    ----------
    classifiers
        M networks, uint8 NHWC to logits (n, K).
    split, indices
        Which images.
    num_classes
        K.

    Returns
    -------
    tuple
        float32 (n, D), the features of all networks beside each other, each scaled to mean length 1; and float64 (n, K). A
        network whose last layer with weights is not the one that makes its logits gives the logits as features.
    """
    import torch

    features, probabilities = [], np.zeros((len(indices), num_classes))
    size = batch_size(*split.shards[0].shape[1:])
    for classifier in classifiers:
        taken: list[torch.Tensor] = []
        device = next((parameter.device for parameter in classifier.parameters()), torch.device("cpu"))
        weights = [(module, getattr(module, "weight", None)) for module in classifier.modules()]
        layers = [(module, weight) for module, weight in weights if isinstance(weight, torch.Tensor)]
        last = layers[-1][0] if layers and len(layers[-1][1]) == num_classes else None

        def keep(module: torch.nn.Module, inputs: Any, output: Any, taken: list[torch.Tensor] = taken) -> None:  # noqa: ARG001
            taken.append(inputs[0])

        hook = last.register_forward_hook(keep) if last is not None else None
        parts = []
        try:
            with torch.inference_mode():
                for start in range(0, len(indices), size):
                    images = torch.from_numpy(split.take(indices[start : start + size])).to(device)
                    logits = classifier(images).float()
                    probabilities[start : start + size] += logits.softmax(dim=1).double().cpu().numpy() / len(
                        classifiers
                    )
                    found = taken.pop() if taken else logits
                    # Of a convolution at the end, the mean over the image.
                    flat = found.float().flatten(2).mean(dim=2) if found.ndim > 2 else found.float()
                    parts.append(flat.cpu().numpy() if len(flat) == len(logits) else logits.cpu().numpy())
        finally:
            if hook is not None:
                hook.remove()
        of_member = np.concatenate(parts)
        features.append(of_member / max(float(np.linalg.norm(of_member, axis=1).mean()), 1e-12))
    return np.concatenate(features, axis=1).astype(np.float32), probabilities


def small_images(split: Split, indices: Integers) -> npt.NDArray[np.float32]:
    """Return images averaged down to at most 16 pixels a side, flat: float32 (n, D)."""
    size = max(1, 2**24 // int(np.prod(split.shards[0].shape[1:])))
    parts = [averaged_down(split.take(indices[start : start + size])) for start in range(0, len(indices), size)]
    return np.concatenate([part.reshape(len(part), -1) for part in parts])


def principal_components(
    features: npt.NDArray[np.float32], others: npt.NDArray[np.float32], count: int = 50
) -> tuple[Floats, Floats]:
    """Return both in at most ``count`` principal components of the first: float64 (N, D) and (n, D)."""
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    kept = vectors[:, ::-1][:, :count]
    return centred @ kept, (others - mean) @ kept


# ---- words --------------------------------------------------------------------------------------------------------------


def verdict(found: Mapping[str, LabelErrors | None]) -> str:
    """Return one sentence over all splits; those that could not be judged are named.

    Examples
    --------
    >>> none, no_floats = np.empty(0, np.int64), np.empty(0)
    >>> clean = LabelErrors(180, 0.0, 0.0, 0.04, 0, none, none, no_floats, EXPORTED)
    >>> noisy = LabelErrors(1258, 0.051, 0.04, 0.063, 21, none, none, no_floats, "neighbours by pixels")
    >>> verdict({"train": noisy, "val": clean})
    'about 5.1 % (4.0 to 6.3 %) of the train labels look wrong; see label_errors.csv'
    >>> verdict({"val": clean, "test": None})
    'no label errors shown (too many mistakes to judge the labels of test)'
    """
    parts = [
        f"{100 * of.share:.1f} % ({100 * of.low:.1f} to {100 * of.high:.1f} %) of the {name} labels"
        for name, of in found.items()
        if of and of.shown
    ]
    if parts:
        return f"about {' and '.join(parts)} look wrong; see label_errors.csv"
    without = [name for name, of in found.items() if of is None]
    return "no label errors shown" + (
        f" (too many mistakes to judge the labels of {' and '.join(without)})" if without else ""
    )
