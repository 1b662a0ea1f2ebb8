"""Before the first step, and what the curves show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from anneal.reporting.report.blocks import Block, Chart, Fold, Items, Key, Section, Side, Table, Text
from anneal.reporting.report.charts import COLOURS, Axis, Line, Mark, draw_lines
from anneal.reporting.report.inputs import Inputs, Row
from anneal.reporting.report.result import finding_words
from anneal.reporting.report.words import evidence, figure, short

CURVES = {
    "train": ("as trained on", "5 4"),
    "train_eval": ("train, images as stored", "1 4"),
    "val": ("validation", ""),
    "val_average": ("validation, averaged weights", "9 3 2 3"),
}
"""Curve of curves.csv to its words and dashes."""

STEEP = 50.0
"""Largest loss over the smallest, from which on its axis is logarithmic."""

MOST_POINTS = 400
"""Points of a line that are drawn."""


def column(rows: Sequence[Row], name: str) -> list[float]:
    """Return a column, NaN for an empty cell and where there is none of that name."""
    return [math.nan if row.get(name) is None else float(row[name]) for row in rows]


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def initialization(inputs: Inputs) -> Section | None:
    """Return what signals and gradients are in each layer before the first step."""
    if not inputs.initial:
        return None
    members = list(dict.fromkeys(str(row["member"]) for row in inputs.initial))
    blocks: list[Block] = [
        Text(
            "One batch through the untrained network. Healthy initial weights keep the standard deviation of the outputs and "
            "the norm of the gradient within a few powers of ten from the first layer to the last."
        )
    ]
    quantities = [
        ("std", "standard deviation of the outputs", True),
        ("grad_norm", "norm of a sample's gradient", True),
        ("dead", "share of units that are zero on every image", False),
    ]
    charts = []
    for name, words, log in quantities:
        lines = []
        for i, member in enumerate(members):
            rows = [row for row in inputs.initial if row["member"] == member and row.get(name) is not None]
            # The input has no gradient and is no layer of its own, but its deviation is what others are held against.
            every = [row for row in inputs.initial if row["member"] == member]
            points = [(every.index(row), float(row[name])) for row in rows if float(row[name]) > 0 or not log]
            if points:
                x, y = zip(*points, strict=True)
                lines.append(Line(member, x, y, colour=i, dots=len(every) <= 60))
        if lines:
            vertical = Axis(log=True) if log else Axis(low=0.0, high=1.0)
            svg = draw_lines(lines, Axis("layer, from input to output", whole=True), vertical, alt=f"{words}, by layer")
            charts.append(Chart(svg, caption=words.capitalize()))
    blocks += [Side(charts), Chart(Markup(""), _legend(members))]
    header = ["layer", "kind", "std of outputs", "gradient norm", "zero units"]
    for member in members:
        layers = [
            [
                row["layer"],
                row["kind"],
                _number(row.get("std")),
                _number(row.get("grad_norm")),
                _number(row.get("dead")),
            ]
            for row in inputs.initial
            if row["member"] == member
        ]
        blocks.append(Fold(f"Layers of member {member}", [Table(header, layers, text=(0, 1))]))
    return Section("initialization", "Before the first step", blocks)


def _number(value: Any) -> str:
    return "" if value is None else short(float(value))


def _legend(members: Sequence[str]) -> list[Key]:
    """Return a legend of members; none of many, whose colours repeat."""
    return [Key(f"member {name}", i) for i, name in enumerate(members)] if len(members) <= COLOURS else []


def training(inputs: Inputs) -> Section | None:
    """Return the learning curves with the findings on them, and the learning rate."""
    if not inputs.curves:
        return None
    members = inputs.members
    epochs = column(inputs.curves, "epoch")
    marks = [
        Mark(
            finding_words(finding["name"]), finding["epochs"][0] - 0.5, finding["epochs"][1] + 0.5, members.index(name)
        )
        for name in members
        for finding in inputs.diagnosis["members"].get(name, {"findings": []})["findings"]
        if finding.get("epochs")
    ]
    charts = []
    drawn: dict[str, None] = {}
    for quantity in ("loss", "accuracy"):
        lines = []
        for i, member in enumerate(members):
            for curve, (words, dash) in CURVES.items():
                values = column(inputs.curves, f"{member}_{curve}_{quantity}")
                if _known(values):
                    drawn[curve] = None
                    lines.append(
                        Line(f"{member}, {words}", epochs, values, i, dash, dots=len(epochs) <= 40 and not dash)
                    )
        if not lines:
            continue
        values = [value for line in lines for value in _known(line.y) if value > 0]
        steep = quantity == "loss" and bool(values) and max(values) > STEEP * min(values)
        vertical = Axis(log=steep) if quantity == "loss" else Axis(high=1.0)
        alt = f"{quantity} over epochs of {len(members)} members"
        svg = draw_lines(lines, Axis("epoch", whole=True), vertical, alt=alt, marks=marks)
        charts.append(Chart(svg, caption=quantity.capitalize()))
    keys = [Key(CURVES[curve][0], 6, CURVES[curve][1]) for curve in CURVES if curve in drawn]
    blocks: list[Block] = [*_said(inputs), Side(charts)]
    if charts:
        blocks.append(Chart(Markup(""), [*_legend(members), *keys]))
    blocks.append(_summary(inputs))
    rates = _rates(inputs, members)
    norms = _norms(inputs, members, epochs)
    blocks.append(Side([chart for chart in (rates, norms) if chart is not None]))
    return Section("training", "Learning curves", blocks)


def _said(inputs: Inputs) -> list[Block]:
    """Return the findings of each member, in words."""
    entries = []
    for name in sorted(inputs.diagnosis["members"]):
        for finding in inputs.diagnosis["members"][name]["findings"]:
            advice = Markup("; ").join(
                Markup("<code>{}</code>: {}").format(item["key"], item["try"]) for item in finding["change"]
            )
            said = Markup("<strong>{}: {}</strong> ({} confidence). Seen: {}.").format(
                name, finding_words(finding["name"]), finding["confidence"], evidence(finding["evidence"])
            )
            entries.append(said + (Markup(" Try {}.").format(advice) if advice else Markup("")))
    if not entries:
        return [Text("No rule found fault with a learning curve.", "verdict")]
    if len(entries) <= 4:
        return [Items(entries)]
    return [Items(entries[:3]), Fold(f"All {len(entries)} findings", [Items(entries)])]


def _summary(inputs: Inputs) -> Block:
    rows = []
    for name in inputs.members:
        member = inputs.diagnosis["members"].get(name)
        if member:
            best = member.get("lowest_val_loss_epoch")
            lowest, last = member.get("lowest_val_loss"), member.get("last_val_accuracy")
            rows.append([name, member["epochs"], best, figure(lowest), figure(last), figure(member.get("last_gap"))])
    header = ["member", "epochs", "best epoch", "its val loss", "last val accuracy", "gap to train"]
    return Fold("Members in figures", [Table(header, rows)])


def _rates(inputs: Inputs, members: Sequence[str]) -> Chart | None:
    """Return the learning rate by step, or by epoch where steps are not known."""
    by_step = bool(inputs.rates)
    rows = inputs.rates or inputs.curves
    every = max(1, -(-len(rows) // MOST_POINTS))
    rows = [row for i, row in enumerate(rows) if i % every == 0 or i == len(rows) - 1]
    x = column(rows, "step" if by_step else "epoch")
    lines = []
    for i, member in enumerate(members):
        y = column(rows, member if by_step else f"{member}_lr")
        if _known(y):
            lines.append(Line(member, x, y, colour=i))
    if not lines:
        return None
    unit = "step" if by_step else "epoch"
    axis = Axis(f"optimizer {unit}" if by_step else unit, whole=True)
    svg = draw_lines(lines, axis, Axis(low=0.0), alt=f"learning rate by {unit}")
    return Chart(svg, caption="Learning rate")


def _norms(inputs: Inputs, members: Sequence[str], epochs: list[float]) -> Chart | None:
    """Return the norm of the gradient by epoch."""
    lines = [
        Line(member, epochs, column(inputs.curves, f"{member}_grad_norm"), colour=i) for i, member in enumerate(members)
    ]
    lines = [line for line in lines if _known(line.y)]
    if not lines:
        return None
    svg = draw_lines(lines, Axis("epoch", whole=True), Axis(log=True), alt="norm of the gradient by epoch")
    return Chart(svg, caption="Norm of the gradient")
