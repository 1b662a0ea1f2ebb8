"""Who goes where: the seeded stratified split, duplicates across splits, one image under two labels, the limit."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from anneal import seeding
from anneal.params import UserError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Duplicate:
    """A sample left out of ``split`` for its image stands in ``kept_split``; both are indices of samples."""

    removed: int
    split: str
    kept: int
    kept_split: str


def _by(keys: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    return groups


def find_conflicts(images: Sequence[Hashable], labels: Sequence[str]) -> list[list[int]]:
    """Return the groups of indices that show one image under more than one label, in order of the first.

    >>> find_conflicts(["p", "q", "p"], ["cat", "cat", "dog"])
    [[0, 2]]
    """
    return [group for group in _by(images).values() if len({labels[i] for i in group}) > 1]


def find_duplicates(images: Sequence[Hashable], splits: Sequence[str]) -> list[Duplicate]:
    """Return what must go for no image to stand in two splits: test wins over val, val over train.

    >>> find_duplicates(["p", "p", "p"], ["train", "val", "train"])
    [Duplicate(removed=0, split='train', kept=1, kept_split='val'), Duplicate(removed=2, split='train', kept=1, kept_split='val')]
    """
    removed = []
    for group in _by(images).values():
        kept = max(group, key=lambda i: (SPLITS.index(splits[i]), -i))
        removed += [Duplicate(i, splits[i], kept, splits[kept]) for i in group if splits[i] != splits[kept]]
    return sorted(removed, key=lambda duplicate: duplicate.removed)


def assign(
    labels: Sequence[str], given: Sequence[str | None], *, names: Sequence[str], seed: int, val: float, test: float
) -> list[str]:
    """Give every sample a split: the source's own, and what it lacks taken from its training images.

    Each class is permuted by its own generator, so that a class more or less leaves the others where they were.

    Parameters
    ----------
    labels
        Class of each sample, in an order that does not depend on the disk.
    given
        The source's split of each sample; all None where it has none.
    names
        All classes, for those without a single sample to be named.
    seed
        Seeds the split.
    val, test
        Fractions of each class, rounded, at least one sample.

    Raises
    ------
    UserError
        A class is too small to give each split a sample, or has no training image.
    """
    have = {split for split in given if split is not None}
    splits = [split or "train" for split in given]
    wanted = {name: share for name, share in (("test", test), ("val", val)) if name not in have}
    classes = _by(labels[i] if splits[i] == "train" else None for i in range(len(labels)))
    needed = 1 + len(wanted)
    small = {name: len(classes.get(name, [])) for name in names if len(classes.get(name, [])) < needed}
    if small:
        shown = ", ".join(f"{name!r} has {count}" for name, count in list(small.items())[:5])
        parts = " and ".join(["one to train on", *(f"one for {name}" for name in wanted)])
        raise UserError(
            f"data.path: a class needs {needed} usable training images at least ({parts}): {shown}"
            + (f", and {len(small) - 5} more" if len(small) > 5 else "")
        )
    for name in names:
        members = classes[name]
        order = seeding.generator(seed, "split", name).permutation(len(members))
        start = 0
        for split, count in _shares(len(members), wanted).items():
            for position in order[start : start + count]:
                splits[members[position]] = split
            start += count
    return splits


def _shares(size: int, wanted: dict[str, float]) -> dict[str, int]:
    """Round each fraction of ``size`` to at least one, leaving at least one over.

    >>> _shares(10, {"test": 0.2, "val": 0.1}), _shares(3, {"test": 0.49, "val": 0.5})
    ({'test': 2, 'val': 1}, {'test': 1, 'val': 1})
    """
    counts = {name: max(1, round(size * share)) for name, share in wanted.items()}
    while counts and sum(counts.values()) >= size:
        largest = max(counts, key=lambda name: counts[name])
        counts[largest] -= 1
    return counts


def check_classes(split: str, labels: Sequence[str], names: Sequence[str]) -> None:
    """Check that once duplicates are removed a split still has an image of every class.

    Raises
    ------
    UserError
        Names the classes that have none.
    """
    present = set(labels)
    missing = [name for name in names if name not in present]
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(
            f"data.path: no {split} image of class {shown} is left once copies of other splits' images are removed"
        )


def choose(labels: Sequence[str], limit: int, *, seed: int) -> list[int]:
    """Choose ``limit`` of the samples, each class in proportion (largest remainders) and at least once.

    Returns
    -------
    list of int
        Indices in ascending order.

    Raises
    ------
    UserError
        The limit is below the number of classes.
    """
    classes = _by(labels)
    counts = limited({str(name): len(members) for name, members in classes.items()}, limit)
    chosen = []
    for name, members in classes.items():
        order = seeding.generator(seed, "limit", str(name)).permutation(len(members))
        chosen += [members[position] for position in order[: counts[str(name)]]]
    return sorted(chosen)


def limited(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """Return how many images of each class `choose` takes, from how many there are.

    Raises
    ------
    UserError
        The limit is below the number of classes.

    >>> limited({"cat": 6, "dog": 3}, 4)
    {'cat': 3, 'dog': 1}
    """
    total = sum(sizes.values())
    if limit >= total:
        return dict(sizes)
    if limit < len(sizes):
        raise UserError(f"data.limit: found {limit}, allowed: at least one image for each of the {len(sizes)} classes")
    exact = {name: limit * size / total for name, size in sizes.items()}
    counts = {name: max(1, int(share)) for name, share in exact.items()}
    largest = [(-count, place, name) for place, (name, count) in enumerate(counts.items())]
    heapq.heapify(largest)
    for _ in range(sum(counts.values()) - limit):
        count, place, name = largest[0]
        counts[name] -= 1
        heapq.heapreplace(largest, (count + 1, place, name))
    by_remainder = sorted(counts, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: limit - sum(counts.values())]:
        counts[name] += 1
    return counts
