"""docs/params.md: what would be generated, complete, and with words and sources that belong to a key."""

from __future__ import annotations

import re
from pathlib import Path

from anneal import params, reference
from anneal.recipe import json_schema

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")
VALUES = params.read_yaml(ROOT / "params.yaml")
ROWS = {row.key: row for row in reference.keys(TEXT, VALUES, json_schema())}
TECHNIQUES = (
    "optimizer.",
    "schedule.",
    "init.",
    "model.norm.",
    "loss.",
    "regularization.",
    "averaging.",
    "augment.",
    "preprocess.normalize",
    *(f"model.{name}" for name, value in VALUES["model"].items() if isinstance(value, dict)),
)
"""Starts of the keys that stand for a method of somebody's."""


def test_the_page_is_what_would_be_generated() -> None:
    written = (ROOT / "docs" / "params.md").read_text(encoding="utf-8")
    assert written == reference.page(ROOT), "run `make schema`, or `python -m anneal.reference`"


def test_every_key_of_params_has_a_row_with_its_value() -> None:
    for key, value in params.flatten({name: part for name, part in VALUES.items() if isinstance(part, dict)}).items():
        starts = [key.rsplit(".", n)[0] for n in range(key.count("."))]
        row = next((ROWS[start] for start in starts if start in ROWS and ROWS[start].kind != "block"), None)
        assert row is not None, key
        if row.key == key:
            assert row.default == reference.shown(value)
        else:
            assert "mapping" in row.kind, f"{key} has no row of its own"
    for row in ROWS.values():
        assert row.kind.startswith("block") or row.default, row.key


def test_every_key_is_described() -> None:
    hint = "a comment in params.yaml, or a line of WORDS in anneal/reference.py"
    for key, row in ROWS.items():
        assert len(row.description) > 4, f"{key}: {hint}"
        choices = {word.strip("`,") for word in row.allowed.split()}
        left = set(re.findall(r"[\w-]+", row.description)) - choices - {"a", "number", "of", "null"}
        assert left, f"{key}: {row.description!r} says what is allowed and no more: {hint}"


def test_every_technique_has_a_source() -> None:
    techniques = [row for key, row in ROWS.items() if key.startswith(TECHNIQUES) and row.kind != "block"]
    assert len(techniques) > 150
    for row in techniques:
        assert row.source, f"{row.key}: a line of SOURCES in anneal/reference.py"
        assert row.source == reference.BLOCKS or "](https://" in row.source, row.key


def test_no_words_sources_or_pages_of_keys_that_are_gone() -> None:
    keys = [*ROWS, *VALUES]
    assert not [word for word in reference.WORDS if not any(f".{key}".endswith(f".{word}") for key in keys)]
    assert not [source for source in reference.SOURCES if source not in ROWS]
    assert all("." in source for source in reference.SOURCES), "a section is too wide to have one source"
    assert set(reference.PAGES) == set(VALUES)
    for pages in reference.PAGES.values():
        for page in pages:
            assert (ROOT / "docs" / f"{page}.md").is_file(), page


def test_a_source_is_that_of_the_nearest_key() -> None:
    assert reference.source("model.norm.batch.ghost") != reference.source("model.norm.batch.eps")
    assert reference.source("optimizer.SGD.no_such_key") == reference.source("optimizer.SGD")
    assert reference.source("optimizer") == reference.source("hardware.devices") == ""


def test_every_line_of_a_table_has_six_cells() -> None:
    lines = [line for line in reference.page(ROOT).splitlines() if line.startswith("|")]
    assert len(lines) == len(ROWS) + 2 * len(VALUES)
    for line in lines:
        assert len(re.split(r"(?<!\\)\|", line)) == 8, line


def test_what_a_key_left_out_stands_for() -> None:
    assert ROWS["optimizer.Adam.eps"].default == "left out: 1.0e-8"
    assert ROWS["optimizer.Yogi"].default == "left out: null"
    assert ROWS["trainer.early_stopping"].kind == "block or null" and ROWS["trainer.early_stopping"].default == "null"
    assert ROWS["trainer.early_stopping.patience"].default == "left out"
