"""How a network reads validation images under a transform that it never saw, and which classes then change places."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from anneal.params import ParamsError

if TYPE_CHECKING:
    from anneal.models.build import Classifier

Ints = npt.NDArray[np.int64]

DRAWS = 4
"""How often the images are transformed, each time by other draws."""

MOST_IMAGES = 5_000
"""Most validation images that are read under each transform."""

SHARE = 0.2
"""A class is taken for another where each network reads more than this share of it so, beyond the images' own chance."""

TIMES = 3.0
"""And where that is so many times what the other classes send there: a class that takes in all is no label change."""


@dataclass(frozen=True)
class Reading:
    """How one network reads validation images under one transform.

    Parameters
    ----------
    accuracy
        Under the transform, mean over draws, a fraction of 1.
    by_class
        The same for each class; NaN for one without images.
    right
        Images of each class that the network reads rightly as they are.
    read
        (class, other class) to how many of these it reads as the other under the transform, mean over draws.
    """

    accuracy: float
    by_class: Sequence[float]
    right: Sequence[int]
    read: Mapping[tuple[int, int], float]

    def share(self, a: int, b: int) -> float:
        """Return which share of the rightly read images of class ``a`` is read as ``b`` under the transform."""
        return self.read.get((a, b), 0.0) / self.right[a] if self.right[a] else 0.0


def reading(before: Ints, after: Ints, labels: Ints, num_classes: int) -> Reading:
    """Compare a network's answers for images as they are with those under a transform.

    Parameters
    ----------
    before
        Its classes for the images as they are, (N,).
    after
        Its classes under the transform, (draws, N).
    labels
        True classes, (N,).
    num_classes
        Of the data set.

    Examples
    --------
    >>> found = reading(np.array([0, 0, 1]), np.array([[1, 0, 1], [1, 1, 1]]), np.array([0, 0, 1]), 2)
    >>> found.accuracy, found.read, found.share(0, 1)
    (0.5, {(0, 1): 1.5}, 0.75)
    """
    correct = (after == labels).mean(0)
    by_class = [float(correct[labels == c].mean()) if (labels == c).any() else math.nan for c in range(num_classes)]
    right = before == labels
    pairs: dict[tuple[int, int], float] = {}
    for a in range(num_classes):
        answers = np.bincount(after[:, right & (labels == a)].ravel(), minlength=num_classes) / len(after)
        pairs |= {(a, int(b)): float(answers[b]) for b in np.flatnonzero(answers) if b != a}
    return Reading(float(correct.mean()), by_class, np.bincount(labels[right], minlength=num_classes).tolist(), pairs)


@dataclass(frozen=True)
class Change:
    """A class that networks take for another under a transform.

    Parameters
    ----------
    a, b
        The class, and the one that it is taken for.
    shares
        Of the images of ``a`` that a network reads rightly as they are, those that it reads as ``b``; one a network.
    """

    a: int
    b: int
    shares: Sequence[float]


def changes(readings: Sequence[Reading]) -> list[Change]:
    """Return the classes that are taken for one other under a transform, by networks that never saw it.

    Three things tell such a change from mere difficulty. It is large: the lower end of the 95 % interval of the share
    (Wilson) is above `SHARE`. It is no accident of one network: that holds for each of them. And it is a
    change between two classes: the other classes send on average at most 1 / `TIMES` of that share to the same one, while an
    image that is like nothing seen before lands in whatever class takes in all such images.

    Parameters
    ----------
    readings
        Of the same transform, one a network; of fewer than two nothing is said.

    Returns
    -------
    list of Change
        Those with the largest mean share first.
    """
    if len(readings) < 2:
        return []
    found = []
    classes = range(len(readings[0].right))
    for a, b in sorted(set.intersection(*(set(one.read) for one in readings))):
        shares = [one.share(a, b) for one in readings]
        certain = all(lower_bound(one.share(a, b), one.right[a]) > SHARE for one in readings)
        others = [one.share(c, b) for one in readings for c in classes if c not in (a, b)]
        if certain and (not others or float(np.mean(shares)) >= TIMES * float(np.mean(others))):
            found.append(Change(a, b, shares))
    return sorted(found, key=lambda change: -float(np.mean(change.shares)))


def lower_bound(share: float, number: int) -> float:
    """Return the lower end of the 95 % interval of a share of ``number`` images, by Wilson's formula.

    >>> round(lower_bound(0.5, 20), 3), lower_bound(0.0, 20), lower_bound(0.0, 0)
    (0.299, 0.0, 0.0)
    """
    if not number:
        return 0.0
    z = 1.96
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return max(0.0, (share + z * z / (2 * number) - half) / (1 + z * z / number))


def read_under(member: Path, store: Path, policies: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return how a trained member reads the validation split under each policy, as plain values for `as_readings`.

    Parameters
    ----------
    member
        Folder of the member.
    store
        Folder of the processed data set.
    policies
        Name to a policy as ``augment.policy`` has it; one that cannot work on such images is left out.
    seed
        Of the transforms' draws.
    """
    from anneal.augment import apply_policy, compile_policy, seed_policy
    from anneal.models.build import load_classifier
    from anneal.store import open_store

    classifier, _ = load_classifier(member)
    data = open_store(store)
    info, split = data.info, data.split("val")
    index = np.unique(np.linspace(0, len(split) - 1, min(len(split), MOST_IMAGES)).round().astype(np.int64))
    images, labels = split.take(index), np.asarray(split.labels)[index]
    before = answers(classifier, images)
    under = {}
    for name, policy in policies.items():
        try:
            compose = compile_policy(policy, height=info.height, width=info.width, channels=info.channels)
        except ParamsError:
            continue
        after = []
        for draw in range(DRAWS):
            seed_policy(compose, seed, "label", draw)
            after.append(answers(classifier, apply_policy(compose, images)))
        found = reading(before, np.stack(after), labels, len(info.classes))
        under[name] = {
            "accuracy": found.accuracy,
            "by_class": [None if math.isnan(value) else value for value in found.by_class],
            "right": list(found.right),
            "read": [[a, b, number] for (a, b), number in found.read.items()],
        }
    return {"classes": list(info.classes), "under": under}


def as_readings(values: Mapping[str, Any]) -> dict[str, Reading]:
    """Return by policy what `read_under` gave; empty where it gave nothing."""
    return {
        name: Reading(
            found["accuracy"],
            [math.nan if value is None else value for value in found["by_class"]],
            found["right"],
            {(a, b): number for a, b, number in found["read"]},
        )
        for name, found in values.get("under", {}).items()
    }


def answers(classifier: Classifier, images: npt.NDArray[np.uint8], size: int = 250) -> Ints:
    """Return the classes that a network reads in uint8 images (N, H, W, C), as (N,)."""
    import torch

    with torch.inference_mode():
        parts = [
            classifier(torch.from_numpy(np.ascontiguousarray(images[i : i + size]))).argmax(1)
            for i in range(0, len(images), size)
        ]
    return torch.cat(parts).numpy()
