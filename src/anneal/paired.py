"""Run against run: the exported predictors of two runs, compared on the images that both predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from anneal.metrics import Floats, Integers
from anneal.params import UserError
from anneal.significance import Comparison, compare, wording


@dataclass(frozen=True)
class Predicted:
    """One split of a predictions.parquet, sorted by source.

    Parameters
    ----------
    classes
        K names.
    sources
        N names of files.
    labels
        int64 (N,).
    probabilities
        float64 (N, K).
    """

    classes: list[str]
    sources: list[str]
    labels: Integers
    probabilities: Floats


def read_predictions(data: bytes, name: str) -> dict[str, Predicted]:
    """Return the splits of a predictions.parquet.

    Parameters
    ----------
    data
        The file's content.
    name
        What messages call it.

    Raises
    ------
    UserError
        It is damaged, or another kind of file.
    """
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pa.BufferReader(data)).sort_by("source")
        columns = [column for column in table.column_names if column.startswith("prob_")]
        classes = [column.removeprefix("prob_") for column in columns]
        probabilities = np.stack([table[column].to_numpy() for column in columns], axis=1).astype(np.float64)
        if not np.isfinite(probabilities).all() or any(
            table[column].null_count for column in ("label", "split", "source")
        ):
            raise ValueError("a cell without a value")
        number = {name: index for index, name in enumerate(classes)}
        labels = np.array([number[label] for label in table["label"].to_pylist()], np.int64)
        splits = np.array(table["split"].to_pylist())
        sources = np.array(table["source"].to_pylist(), object)
    except (pa.ArrowException, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: found no predictions of evaluate ({reason}), allowed: a predictions.parquet"
        ) from None
    return {
        str(split): Predicted(
            classes, list(sources[splits == split]), labels[splits == split], probabilities[splits == split]
        )
        for split in dict.fromkeys(splits)
    }


def compare_runs(
    a: Mapping[str, Predicted], b: Mapping[str, Predicted], *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Comparison]:
    """Compare two runs on each split that both predicted, image by image; see `anneal.significance.compare`.

    Raises
    ------
    UserError
        They have no split in common, or one with other classes, images or labels, where nothing can be said.
    """
    shared = [split for split in a if split in b]
    if not shared:
        raise UserError(
            f"evaluate.splits: found {', '.join(a)} and {', '.join(b)}, allowed: runs with a split in common"
        )
    found = {}
    for split in shared:
        one, two = a[split], b[split]
        if one.classes != two.classes:
            raise UserError(f"{split}: the runs have other classes, so that their predictions cannot be compared")
        if one.sources != two.sources or (one.labels != two.labels).any():
            only = len({*one.sources} ^ {*two.sources})
            what = f"{only} images are in one of the runs alone" if only else "images have other labels in the two runs"
            raise UserError(f"{split}: {what}; allowed: runs on the same split of the same data")
        found[split] = compare(one.probabilities, two.probabilities, one.labels, num_resamples=num_resamples, seed=seed)
    return found


def as_lines(found: Mapping[str, Comparison]) -> list[str]:
    """Return comparisons in words, three lines a split; what is better or worse is b."""
    lines = []
    for split, of in found.items():
        low, high = of.nll_low, of.nll_high
        lines += [
            f"{split}: {wording(of)}",
            f"  accuracy {of.accuracy_a:.4f} and {of.accuracy_b:.4f} on {of.num_images} images; {of.only_a} that a alone "
            f"gets right, {of.only_b} that b alone does",
            f"  likelihood: {of.nll_verdict}; nll {of.nll_a:.4f} and {of.nll_b:.4f} (95 % interval of the difference "
            f"{low:+.4f} to {high:+.4f})",
        ]
    return lines
