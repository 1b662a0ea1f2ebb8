"""The page: whole, escaped, self-contained."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from anneal.reporting.html import render

PIXEL = b"\x89PNG not really"
M = {"accuracy": 0.9, "accuracy_ci": [0.88, 0.92], "macro_f1": 0.89, "top5": 1.0, "nll": 0.3, "brier": 0.1, "ece": 0.02}
FIGURES = {"members": {"a": M, "b": M}, "single": M, "tta": M, "ensemble": M, "ensemble_tta": {**M, "accuracy": 0.987}}
FINDING = {
    "name": "overfitting",
    "confidence": "medium",
    "evidence": {"gap": 0.2, "rise": None},
    "change": [{"key": "augment.policy", "try": "a stronger one"}],
}


def page(**changes: Any) -> str:
    member = {"epochs": 3, "lowest_val_loss_epoch": 2, "findings": []}
    arguments: dict[str, Any] = {
        "metrics": {"val": FIGURES, "test": FIGURES},
        "data": {
            **{"train": 100, "val": 10, "test": 20, "num_classes": 1, "height": 8, "width": 8, "channels": 1},
            **{"num_rejected": 0, "num_duplicates_removed": 2},
            "classes": [{"name": "<b>&cat", "train": 100, "val": 10, "test": 20}],
        },
        "diagnosis": {"members": {"a": {**member, "findings": [FINDING]}, "b": member}},
        "warnings": [],
        "recipe": "seed: 0\n",
        "pictures": {"augmentation": PIXEL, "curves": PIXEL, "confusion": PIXEL},
    }
    return render(**{**arguments, **changes})


class Checker(HTMLParser):
    """Collects tags, and fails on one that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_and_self_contained() -> None:
    checker = Checker()
    checker.feed(page())
    assert checker.open == []
    images = [attributes for tag, attributes in checker.tags if tag == "img"]
    assert len(images) == 3
    assert all(str(image["alt"]) and str(image["src"]).startswith("data:image/png;base64,") for image in images)
    assert not any(tag in ("script", "link", "iframe") for tag, _ in checker.tags)
    assert not re.search(r"https?://", page())
    assert 'name="viewport"' in page() and "color-scheme: light dark" in page()


def test_figures_and_findings_are_on_the_page() -> None:
    text = page()
    assert "<strong>98.70%</strong> test accuracy (95 % interval 88.00% to 92.00%)" in text
    assert "member b" in text
    assert "a: overfitting (medium confidence). Seen: gap 0.2. Try augment.policy: a stronger one." in text
    assert "100 train, 10 val, 20 test images of 1 classes, 8x8 grey" in text
    assert page() == text


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "x: <script>alert(1)</script>"},
        {"warnings": ["<script>alert(1)</script>"]},
        {"metrics": {"<script>alert(1)</script>": FIGURES}},
        {"metrics": {"val": {**FIGURES, "members": {"<script>alert(1)</script>": M}}}},
        {
            "diagnosis": {
                "members": {'"<script>alert(1)</script>': {"epochs": 1, "lowest_val_loss_epoch": 1, "findings": []}}
            }
        },
    ],
)
def test_names_are_escaped(changes: dict[str, Any]) -> None:
    assert "<script>" not in page(**changes)
    assert "<b>&cat" not in page(**changes) and "&lt;b&gt;&amp;cat" in page(**changes)


def test_missing_parts_are_left_out() -> None:
    text = page(pictures={}, metrics={"val": {"members": {}, "ensemble_tta": M}})
    assert "<h2>Mistakes" not in text and "<img" not in text
    assert "val accuracy" in text
    assert "No split was evaluated" in page(metrics={})
