"""Run against run, from the predictions that each wrote."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from anneal import cli
from anneal.paired import as_lines, compare_runs, read_predictions
from anneal.params import UserError
from anneal.significance import compare


def table(p: np.ndarray, order: list[int], **changes: Any) -> bytes:
    """Return a predictions.parquet of two classes whose labels are 0, 1, 0, 1, ..."""
    labels = np.arange(len(p)) % 2
    columns = {
        "split": ["test"] * len(p),
        "source": [f"{i:03d}.png" for i in order],
        "label": [("cat", "dog")[labels[i]] for i in order],
        "prob_cat": p[order, 0],
        "prob_dog": p[order, 1],
    }
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns | changes), buffer)
    return buffer.getvalue()


def predictions(share: float, seed: int) -> np.ndarray:
    labels = np.arange(80) % 2
    right = np.where(np.random.default_rng(seed).random(80) < share, 0.9, 0.2)
    return np.stack([np.where(labels == 0, right, 1 - right), np.where(labels == 0, 1 - right, right)], axis=1)


def test_images_are_matched_by_their_source() -> None:
    a, b = predictions(0.5, 0), predictions(0.95, 1)
    shuffled = [int(i) for i in np.random.default_rng(2).permutation(80)]
    one, two = read_predictions(table(a, list(range(80))), "one"), read_predictions(table(b, shuffled), "two")
    found = compare_runs(one, two, num_resamples=200)
    assert found == {"test": compare(a, b, np.arange(80) % 2, num_resamples=200)}
    assert found["test"].accuracy_verdict == "better"
    lines = as_lines(found)
    assert lines[0].startswith("test: better by ") and "McNemar p" in lines[0] and "95 % interval" in lines[0]
    assert f"{found['test'].only_b} that b alone does" in lines[1] and "likelihood: better" in lines[2]
    assert as_lines(compare_runs(one, one))[0].startswith("test: no difference shown: +0.00 points (95 % interval")


def test_what_cannot_be_compared_is_refused() -> None:
    p, order = predictions(0.9, 0), list(range(80))
    one = read_predictions(table(p, order), "one")
    for changes, reason in (
        ({"source": [f"x{i:03d}.png" for i in order]}, "test: 160 images are in one of the runs alone"),
        ({"label": ["cat"] * 80}, "test: images have other labels"),
        ({"split": ["val"] * 80}, "found test and val, allowed: runs with a split in common"),
        ({"prob_fox": [0.0] * 80}, "test: the runs have other classes"),
    ):
        with pytest.raises(UserError, match=reason):
            compare_runs(one, read_predictions(table(p, order, **changes), "two"))
    for changes in (
        {"prob_cat": [float("nan"), *p[1:, 0]]},
        {"prob_cat": [None, *p[1:, 0]]},
        {"split": [None] + ["test"] * 79},
    ):
        with pytest.raises(UserError, match=r"found no predictions of evaluate \(a cell without a value\)"):
            read_predictions(table(p, order, **changes), "x.parquet")
    with pytest.raises(UserError, match=r"^x.parquet: found no predictions of evaluate"):
        read_predictions(b"PAR1 no", "x.parquet")
    with pytest.raises(UserError, match=r"^x.parquet: found no predictions of evaluate \('fox'\)"):
        read_predictions(table(p, order, label=["fox"] * 80), "x.parquet")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    (tmp_path / "a.parquet").write_bytes(table(predictions(0.9, 0), list(range(80))))
    with pytest.raises(UserError, match=r"reports/predictions.parquet: no such file"):
        cli.main(["compare", "a.parquet"])
    (tmp_path / "reports/predictions.parquet").write_bytes(table(predictions(0.5, 1), list(range(80))))
    cli.main(["compare", "a.parquet"])
    printed = capsys.readouterr().out
    assert printed.startswith("a: a.parquet\nb: this workspace\ntest: worse by ")
    with pytest.raises(UserError, match=r"^nowhere: neither a file nor"):
        cli.main(["compare", "nowhere"])
