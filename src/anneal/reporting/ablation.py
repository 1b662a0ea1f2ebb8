"""An ablation's plot and page; the same values give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from anneal.reporting.curves import COLOURS
from anneal.reporting.report.blocks import Block, Code, Fold, Picture, Section, Table, Text
from anneal.reporting.report.page import POLICY, TEMPLATE
from anneal.reporting.style import plain_style

MARKERS = {"better": ("o", COLOURS[0]), "worse": ("s", COLOURS[4]), "no difference shown": ("D", "0.45")}
"""A verdict's marker and colour, which say the same."""

LABELS = {"better": "helps", "worse": "hurts", "no difference shown": "no difference shown"}


def plot(rows: Sequence[tuple[str, float, tuple[float, float] | None, str]], path: Path, title: str) -> None:
    """Draw contributions with their intervals, a line each, PNG to ``path``.

    Parameters
    ----------
    rows
        Name, contribution, interval and verdict of each technique; fractions of 1.
    path
        In a folder that exists.
    title
        Above it.
    """
    from matplotlib.figure import Figure

    with plain_style():
        figure = Figure(figsize=(7.2, 1.6 + 0.34 * max(1, len(rows))), layout="constrained")
        axes = figure.subplots()
        told: set[str] = set()
        for place, (_, value, interval, verdict) in enumerate(rows):
            marker, colour = MARKERS[verdict]
            if interval is not None:
                axes.plot([100 * x for x in interval], [place, place], color=colour, linewidth=2)
            label = LABELS[verdict] if verdict not in told else "_"
            axes.plot([100 * value], [place], marker, color=colour, markersize=6, label=label)
            told.add(verdict)
        axes.axvline(0, color="0.3", linewidth=1)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(max(1, len(rows)) - 0.4, -0.6)
        axes.set_xlabel("points of accuracy (per cent)")
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(title, fontsize=10)
        if told:
            axes.legend(fontsize=8, loc="best")
        unfinished = Path(f"{path}.tmp")
        figure.savefig(unfinished, format="png", dpi=120, metadata={"Software": None})
        unfinished.replace(path)


def page(
    *,
    name: str,
    title: str,
    intro: Sequence[str],
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    pairs: Sequence[Sequence[Any]],
    settings: Sequence[Sequence[str]],
    picture: bytes,
    alt: str,
    recipe: str,
    command: str,
) -> str:
    """Return an ablation's page: HTML in one file, all text escaped.

    Parameters
    ----------
    name, title, intro
        Words at its top.
    header, rows
        The table, whose first and last columns are text.
    pairs
        Interactions, a row a pair, in the columns of ``header`` without its second; may be empty.
    settings
        Technique, and what switches it off.
    picture, alt
        PNG, and its content in words.
    recipe, command
        What was varied, and how.
    """
    import jinja2

    last = len(header) - 1
    result: list[Block] = [
        *(Text(line) for line in intro),
        Picture(picture, f"{title}. {alt}.", wide=True),
        Table(list(header), [unbroken(row) for row in rows], text=(0, last)),
    ]
    sections = [Section("ablation", title, result)]
    if pairs:
        of_pairs = ["pair", "together beyond the sum (points)", *header[3:]]
        words = (
            "What two techniques earn together, less the sum of what each earns alone: below 0 where they do in part the "
            "same, above 0 where they need each other."
        )
        table = Table(of_pairs, [unbroken(row) for row in pairs], text=(0, len(of_pairs) - 1))
        sections.append(Section("pairs", "Interactions", [Text(words), table]))
    off = Table(["technique", "switched off by"], [unbroken(row) for row in settings], text=(0, 1))
    sections.append(Section("settings", "What was switched off", [off]))
    sections.append(
        Section("recipe", "The recipe", [Fold("params.yaml", [Code(recipe)]), Text("Once more:"), Code(command)])
    )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(sections=sections, policy=POLICY, name=name) + "\n"


def unbroken(row: Sequence[Any]) -> list[Any]:
    """Return a row whose first cell, a name, stays on one line."""
    return [Markup('<span style="white-space: nowrap">{}</span>').format(row[0]), *row[1:]]
