"""Raw data to a store: decode and resize once, split, leave duplicates out, fit the statistics of the training split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from anneal import splitting, statistics
from anneal.decoding import as_channels, decode, resize
from anneal.params import Strict, UserError, one_line
from anneal.sources import Rejected, Source
from anneal.spooling import Record, Work, fill
from anneal.store import Sample, SplitWriter, finish, open_split

__all__ = [
    "PreprocessConfig",
    "SplitConfig",
    "as_channels",
    "build_store",
    "decode",
    "planned_classes",
    "resize",
]

Fit = Literal["crop", "pad", "stretch"]
Interpolation = Literal["nearest", "area", "bilinear", "bicubic", "lanczos"]
Normalize = Literal["none", "scale", "center", "center_image", "standardize", "standardize_pixel", "pca", "zca"]

BLOCK_BYTES = 8 * 2**20
"""Of images that the statistics take at once."""

MAX_LISTED = 1000
"""Entries of a list in the report; the counts beside it cover all."""


class SplitConfig(Strict):
    """Section ``split``: fractions held out, per class, where the source brings no split of its own."""

    val: Annotated[float, Field(gt=0, lt=1)]
    test: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _leaves_training_data(self) -> SplitConfig:
        if self.val + self.test >= 1:
            raise ValueError(
                f"val: found val + test = {self.val + self.test:g}, allowed: a sum < 1, or nothing is left to train on"
            )
        return self


class PreprocessConfig(Strict):
    """Section ``preprocess``: the geometry of the stored images and the statistics that the model's first layer applies."""

    size: Annotated[int, Field(ge=1, le=4096)]
    fit: Fit
    interpolation: Interpolation
    normalize: Normalize
    epsilon: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _can_be_whitened(self) -> PreprocessConfig:
        try:
            statistics.check_dimensions(self.normalize, self.size, self.size, 1)
        except UserError as error:
            raise ValueError(str(error).removeprefix("preprocess.")) from None
        return self


def build_store(
    source: Source,
    folder: Path,
    *,
    seed: int,
    size: int,
    fit: str,
    interpolation: str,
    normalize: str,
    epsilon: float,
    val: float,
    test: float,
    limit: int | None = None,
    max_rejected: float = 0.01,
    max_pixels: int = 50_000_000,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Turn raw images into a store, whose bytes depend neither on the order of the disk nor on the number of processes.

    Every image is decoded and resized once, into a spool file beside the store; when all are known they are split,
    duplicates are left out, and shards and statistics are written from the spool. Memory holds one shard and a record
    an image.

    Parameters
    ----------
    source
        Labelled images (see `anneal.sources.open_source`).
    folder
        Existing folder, empty.
    seed
        Seeds the split and the limit.
    size, fit, interpolation
        See `anneal.decoding.resize`.
    normalize, epsilon
        See `anneal.statistics.fit_statistics`.
    val, test
        Fractions of each class, for the splits that the source does not bring.
    limit
        Largest number of training images, each class in proportion; None for all.
    max_rejected
        Largest fraction of files that may be left out.
    max_pixels
        Largest width x height of a file's image.
    num_workers
        Processes that decode; None for as many as pay.

    Returns
    -------
    dict
        The report: counts, rejected files, duplicates, statistics; plain values for JSON.

    Raises
    ------
    UserError
        Nothing to train on, one class, a class too small, too much rejected, whitening of too many dimensions.
    """
    planned_classes(source, val=val, test=test, limit=limit)  # what is certain to fail, fails before any decoding
    work = Work(size, fit, interpolation, max_pixels)
    _check_whitening(source, work, normalize)
    spool = folder / "spool"
    records, rejected = fill(spool, source, work, num_workers)
    _check_rejected(rejected, len(records), max_rejected)
    plan = make_plan(records, source.classes, seed=seed, val=val, test=test, limit=limit)
    channels = max(record.channels for record in records)
    statistics.check_dimensions(normalize, size, size, channels)
    for split, rows in plan.members.items():
        _write_split(folder / split, rows, spool, (size, size, channels), source.classes)
    spool.unlink()
    train = open_split(folder / "train")
    blocks = (images for images, _ in train.batches(max(1, min(1024, BLOCK_BYTES // (size * size * channels)))))
    sums = statistics.add_up(blocks, products=normalize in statistics.WHITENING)
    fitted = statistics.statistics_from(normalize, sums, epsilon=epsilon)
    info = finish(
        folder,
        classes=source.classes,
        shape=(size, size, channels),
        counts={split: len(rows) for split, rows in plan.members.items()},
        normalize=normalize,
        statistics=fitted,
        fit=fit,
        interpolation=interpolation,
    )
    return {
        "images": sum(info.counts.values()),
        **info.counts,
        "num_classes": len(info.classes),
        "height": size,
        "width": size,
        "channels": channels,
        **_describe(plan, source.classes),
        "num_rejected": len(rejected),
        "rejected": [{"source": r.source, "reason": r.reason} for r in rejected[:MAX_LISTED]],
        "statistics": {"normalize": normalize, **_summary(sums, fitted)},
    }


def _check_source(source: Source) -> None:
    if len(source.classes) < 2:
        found = f"one class, {source.classes[0]!r}" if source.classes else "no class"
        first = f"; {_described(source.rejected[0])}" if source.rejected else ""
        raise UserError(f"data.path: found {found}, allowed: at least two{first}")


def _check_whitening(source: Source, work: Work, normalize: str) -> None:
    """Refuse what is too large for whitening by the first image already: decoding the rest may take long."""
    if normalize in statistics.WHITENING:
        first = [result for item in islice(source, 1) for result in work([item])]
        channels = max((result[0].channels for result in first if not isinstance(result, Rejected)), default=1)
        statistics.check_dimensions(normalize, work.size, work.size, channels)


def _described(rejected: Rejected) -> str:
    name = rejected.source if len(rejected.source) <= 200 else rejected.source[:197] + "..."
    return one_line(f"{name}: {rejected.reason}")


def _check_rejected(rejected: Sequence[Rejected], num_good: int, max_rejected: float) -> None:
    total = len(rejected) + num_good
    if not num_good or len(rejected) > max_rejected * total:
        first = "; ".join(map(_described, rejected[:3]))
        raise UserError(
            f"data.max_rejected: {len(rejected)} of {total} files ({len(rejected) / max(total, 1):.1%}) cannot be used, "
            f"allowed: {max_rejected:.1%}; {first}" + ("; ..." if len(rejected) > 3 else "")
        )


# ---- who goes where -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Who goes where.

    Parameters
    ----------
    members
        Split name to its images, sorted by source name.
    duplicates
        (left out, its split, the image that stays, its split).
    conflicts
        Groups of one image under several labels, all left out.
    over_limit
        Number of training images left out by the limit.
    """

    members: dict[str, list[Record]]
    duplicates: list[tuple[Record, str, Record, str]]
    conflicts: list[list[Record]]
    over_limit: int


def make_plan(
    records: Sequence[Record], classes: Sequence[str], *, seed: int, val: float, test: float, limit: int | None
) -> Plan:
    """Split images, leaving out those under two labels, copies across splits, and what is above the limit.

    Raises
    ------
    UserError
        A class is too small to be split, or nothing of it is left.
    """
    groups = splitting.find_conflicts([r.pixels for r in records], [r.item.label for r in records])
    conflicting = {index for group in groups for index in group}
    kept = [record for index, record in enumerate(records) if index not in conflicting]
    labels = [record.item.label for record in kept]
    given = [record.item.split for record in kept]
    splits = splitting.assign(labels, given, names=classes, seed=seed, val=val, test=test)
    duplicates = splitting.find_duplicates([record.pixels for record in kept], splits)
    removed = {duplicate.removed for duplicate in duplicates}
    members: dict[str, list[Record]] = {split: [] for split in splitting.SPLITS}
    for index, record in enumerate(kept):
        if index not in removed:
            members[splits[index]].append(record)
    ours = [split for split in ("val", "test") if split not in given]
    for split in ("train", *ours):
        splitting.check_classes(split, [record.item.label for record in members[split]], classes)
    train = members["train"]
    if limit is not None:
        members["train"] = [train[i] for i in splitting.choose([r.item.label for r in train], limit, seed=seed)]
    return Plan(
        members,
        [(kept[d.removed], d.split, kept[d.kept], d.kept_split) for d in duplicates],
        [[records[index] for index in group] for group in groups],
        len(train) - len(members["train"]),
    )


def planned_classes(source: Source, *, val: float, test: float, limit: int | None = None) -> dict[str, dict[str, int]]:
    """Return how many images of each class each split would get if every file were usable and none a duplicate.

    Decodes nothing, and reads no image.

    Returns
    -------
    dict
        Split name, to class name (all of them, sorted), to number of images.

    Raises
    ------
    UserError
        Nothing to train on, one class, a class too small, a limit below the number of classes.
    """
    _check_source(source)
    places = list(source.places())
    labels, given = [label for label, _ in places], [split for _, split in places]
    splits = splitting.assign(labels, given, names=source.classes, seed=0, val=val, test=test)
    found = Counter(zip(splits, labels, strict=True))
    planned = {split: {name: found[split, name] for name in source.classes} for split in splitting.SPLITS}
    if limit is not None:
        planned["train"] = splitting.limited(planned["train"], limit)
    return planned


# ---- writing --------------------------------------------------------------------------------------------------------


def _write_split(
    folder: Path, rows: Sequence[Record], spool: Path, shape: tuple[int, int, int], classes: Sequence[str]
) -> None:
    label_of = {name: index for index, name in enumerate(classes)}
    writer = SplitWriter(folder, *shape)
    with open(spool, "rb") as file:
        for row in rows:
            file.seek(row.offset)
            data = file.read(shape[0] * shape[1] * row.channels)
            image = np.frombuffer(data, np.uint8).reshape(shape[0], shape[1], row.channels)
            sample = Sample(row.item.name, row.sha256, label_of[row.item.label], row.width, row.height)
            writer.add(as_channels(image, shape[2]), sample)
    writer.close()


# ---- report ---------------------------------------------------------------------------------------------------------


def _describe(plan: Plan, classes: Sequence[str]) -> dict[str, Any]:
    """Return the plan as plain values: counts, duplicates, conflicts, original sizes."""
    counts = {split: Counter(row.item.label for row in rows) for split, rows in plan.members.items()}
    everyone = [record for rows in plan.members.values() for record in rows]
    widths, heights = [record.width for record in everyone], [record.height for record in everyone]
    return {
        "classes": [{"name": name, **{split: counts[split][name] for split in counts}} for name in classes],
        "original_size": {
            "min_width": min(widths),
            "max_width": max(widths),
            "min_height": min(heights),
            "max_height": max(heights),
        },
        "num_left_out_by_limit": plan.over_limit,
        "num_duplicates_removed": len(plan.duplicates),
        "num_duplicates_within": {
            split: len(rows) - len({row.pixels for row in rows}) for split, rows in plan.members.items()
        },
        "duplicates": [
            {"removed": removed.item.name, "from": split, "kept": kept.item.name, "in": kept_split}
            for removed, split, kept, kept_split in plan.duplicates[:MAX_LISTED]
        ],
        "num_conflicting": sum(map(len, plan.conflicts)),
        "conflicting": [
            [{"source": record.item.name, "label": record.item.label} for record in group]
            for group in plan.conflicts[:MAX_LISTED]
        ],
    }


def _summary(sums: statistics.Sums, fitted: dict[str, npt.NDArray[np.float64]]) -> dict[str, Any]:
    """Return mean and standard deviation of each channel, and for whitening the largest and smallest eigenvalue."""
    by_channel = statistics.statistics_from("standardize", sums, epsilon=1)
    summary: dict[str, Any] = {name: [float(v) for v in by_channel[name]] for name in ("mean", "std")}
    if "eigenvalues" in fitted:
        eigenvalues = fitted["eigenvalues"]
        summary |= {"dimensions": len(eigenvalues)}
        summary |= {"largest_eigenvalue": float(eigenvalues[0]), "smallest_eigenvalue": float(eigenvalues[-1])}
    return summary
