"""What a page is made of: plain values, which page.html turns into HTML. All text in them is escaped there."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from markupsafe import Markup

Words = str | Markup
"""Text; as `Markup` it is HTML, and whatever was formatted into it is escaped already."""


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Parameters
    ----------
    words
        Its text.
    style
        A class of page.html: ``headline``, ``note`` or ``verdict``; empty for plain text.
    """

    kind: ClassVar[str] = "text"
    words: Words
    style: str = ""


@dataclass(frozen=True)
class Items:
    """A list; numbered where the order says something."""

    kind: ClassVar[str] = "items"
    entries: Sequence[Words]
    numbered: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Parameters
    ----------
    header
        Names of the columns.
    rows
        A cell a column; None is an empty one.
    text
        Columns that hold text, to the left; the others hold numbers, to the right.
    """

    kind: ClassVar[str] = "table"
    header: Sequence[Words]
    rows: Sequence[Sequence[Any]]
    text: Sequence[int] = (0,)


@dataclass(frozen=True)
class Picture:
    """A PNG that goes into the page.

    Parameters
    ----------
    png
        Its bytes.
    alt
        What it shows, for who does not see it.
    caption
        Below it.
    pixels
        Whether it is made of few pixels, which are to be seen.
    wide
        Whether a narrow screen scrolls it sideways, so that it stays readable.
    """

    kind: ClassVar[str] = "picture"
    png: bytes
    alt: str
    caption: Words = ""
    pixels: bool = False
    wide: bool = False

    @property
    def source(self) -> str:
        """The picture as an address that holds it."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Key:
    """An entry of a chart's legend: colour and dashes as in `anneal.reporting.report.charts.Line`."""

    label: str
    colour: int = 0
    dash: str = ""
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing of `anneal.reporting.report.charts`.

    Parameters
    ----------
    svg
        The drawing.
    legend
        Its lines.
    caption
        Above it.
    wide
        As in `Picture`.
    """

    kind: ClassVar[str] = "chart"
    svg: Markup
    legend: Sequence[Key] = ()
    caption: Words = ""
    wide: bool = False


@dataclass(frozen=True)
class Card:
    """Pictures that belong together, with words below."""

    pictures: Sequence[Picture]
    words: Words


@dataclass(frozen=True)
class Gallery:
    """Cards, as many in a row as there is room for."""

    kind: ClassVar[str] = "gallery"
    cards: Sequence[Card]


@dataclass(frozen=True)
class Code:
    """Text as it is, such as commands."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Side:
    """Blocks beside each other where there is room."""

    kind: ClassVar[str] = "side"
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Fold:
    """Blocks behind a line that opens them."""

    kind: ClassVar[str] = "fold"
    summary: Words
    blocks: Sequence[Any]


Block = Text | Items | Table | Picture | Chart | Gallery | Code | Side | Fold


@dataclass(frozen=True)
class Section:
    """A section of the page: ``id`` is what links to it name."""

    id: str
    title: str
    blocks: Sequence[Block] = field(default_factory=list)
