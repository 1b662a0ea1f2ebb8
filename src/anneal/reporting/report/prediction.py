"""What views, members and calibration earned; how far the probabilities can be trusted; which classes are confused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from anneal.reporting.report.blocks import Block, Chart, Fold, Key, Section, Side, Table, Text
from anneal.reporting.report.charts import Axis, Line, draw_lines, draw_matrix
from anneal.reporting.report.inputs import Inputs, Row
from anneal.reporting.report.words import (
    badge,
    chance,
    counted,
    figure,
    gain,
    percent,
    predictor,
    scale_of,
    short,
    signed,
)

MOST_PAIRS = 20
"""Confused pairs of classes that are listed."""


def _gains(rows: Sequence[Row], prefix: str = "", kind: str = "gain") -> list[Markup]:
    """Return a cell a row with its gain in accuracy, all on one scale; empty where the row has none.

    Parameters
    ----------
    rows
        With columns ``<prefix>accuracy_...``.
    prefix
        Such as ``test_``.
    kind
        ``gain``: columns ``accuracy_gain``, ``_gain_low``, ``_gain_high``; ``difference``: ``accuracy_difference``,
        ``accuracy_low``, ``accuracy_high``.
    """
    names = [f"{prefix}accuracy_{name}" for name in _ENDS[kind]]
    known = [row for row in rows if row.get(names[0]) is not None]
    reach = scale_of([row[name] for row in known for name in names[1:]])
    return [
        gain(*(row[name] for name in names), reach=reach, verdict=row[f"{prefix}accuracy_verdict"])
        if row.get(names[0]) is not None
        else Markup("")
        for row in rows
    ]


_ENDS = {"gain": ("gain", "gain_low", "gain_high"), "difference": ("difference", "low", "high")}


def _nll(rows: Sequence[Row], prefix: str = "", kind: str = "gain") -> list[Markup]:
    """Return a cell a row with its gain in likelihood (nats, positive is better); see `_gains`."""
    cells = []
    for row in rows:
        value, low, high = (row.get(f"{prefix}nll_{name}") for name in _ENDS[kind])
        if value is None or low is None or high is None:
            cells.append(Markup(""))
            continue
        if kind == "difference":
            value, low, high = -value, -high, -low
        cells.append(
            Markup('{}<br><small class="ends">{} to {}</small><br>{}').format(
                signed(value, 4), signed(low, 4), signed(high, 4), badge(row[f"{prefix}nll_verdict"])
            )
        )
    return cells


def gains(inputs: Inputs) -> Section | None:
    """Return what each step of the prediction gained over the one before, with intervals."""
    split = inputs.split
    rows = inputs.rows("comparisons", split)
    if not rows:
        return None
    blocks: list[Block] = [
        Text(
            f"Each row compares two predictors on the same {split} images. A difference counts as shown where its "
            "paired 95 % interval leaves 0 out and a test says p < 0.05: McNemar's of accuracy, a paired t test of NLL. Of twenty comparisons without any "
            "difference one is expected to show one."
        ),
        _comparisons(rows),
    ]
    for other in dict.fromkeys(row["split"] for row in inputs.rows("comparisons")):
        if other != split:
            blocks.append(Fold(f"The same on {other}", [_comparisons(inputs.rows("comparisons", other))]))
    return Section("gains", "What each step earned", blocks)


def _comparisons(rows: Sequence[Row]) -> Table:
    accuracies, losses = _gains(rows, kind="difference"), _nll(rows, kind="difference")
    return Table(
        ["predictor", "gain in accuracy, 95 % interval", "gain in NLL, 95 % interval", "McNemar p"],
        [
            [
                Markup("{}<br><small>against {}</small>").format(predictor(row["b"]), predictor(row["a"])),
                accuracy,
                loss,
                chance(row["mcnemar_p"]),
            ]
            for row, accuracy, loss in zip(rows, accuracies, losses, strict=True)
        ],
        text=(0, 1, 2),
    )


def views(inputs: Inputs) -> Section | None:
    """Return what each view of an image costs and earns."""
    rows = inputs.tables.get("tta", ())
    splits = [name for name in inputs.metrics if rows and f"{name}_accuracy" in rows[0]]
    split = inputs.split
    if not rows or split not in splits:
        return None
    chosen = inputs.records.get("predictor", {}).get("views", [])
    named = ", ".join(view if isinstance(view, str) else next(iter(view)) for view in chosen)
    blocks: list[Block] = [Text(f"The exported predictor averages: {named}." if named else "")]
    if len(rows) == 1:
        blocks.append(Text("No other view was asked for (evaluate.tta.views).", "note"))
    blocks.append(_views(rows, split))
    blocks += [Fold(f"The same on {name}", [_views(rows, name)]) for name in splits if name != split]
    return Section("views", "Test-time views", blocks)


def _views(rows: Sequence[Row], split: str) -> Table:
    accuracies, losses = _gains(rows, f"{split}_"), _nll(rows, f"{split}_")
    return Table(
        ["view", "gain beside identity, 95 % interval", "passes", f"{split} accuracy, alone", "gain in NLL"],
        [
            [
                "the chosen views together" if row["view"] == "chosen" else row["view"],
                accuracy,
                short(row["passes"]),
                percent(row[f"{split}_accuracy"]),
                loss,
            ]
            for row, accuracy, loss in zip(rows, accuracies, losses, strict=True)
        ],
        text=(0, 1, 4),
    )


def ensemble(inputs: Inputs) -> Section | None:
    """Return how the ensemble grows, what each member adds, how alike they are, and every other way to predict."""
    split = inputs.split
    sizes = inputs.rows("ensemble", split)
    blocks: list[Block] = []
    if sizes:
        combine = inputs.records.get("predictor", {}).get("combine", "")
        # Fitted weights belong to all members: fewer of them are drawn as their mean.
        fitted = combine in ("weighted", "greedy")
        rest = " The curve is that of their plain means." if fitted else ""
        blocks.append(Text(f"{counted(len(sizes), 'member')}, combined by {combine}.{rest}" if combine else ""))
        line = Line(
            "mean",
            [row["members"] for row in sizes],
            [row["accuracy"] for row in sizes],
            dots=True,
            low=[row["accuracy_low"] for row in sizes],
            high=[row["accuracy_high"] for row in sizes],
        )
        alt = f"accuracy on {split} of ensembles of 1 to {len(sizes)} members"
        svg = draw_lines([line], Axis("members", whole=True), Axis(), alt=alt)
        caption = f"Accuracy on {split} by size: mean, lowest and highest over the subsets of that size"
        grown = Table(
            ["members", "gain over one fewer, 95 % interval", f"{split} accuracy"],
            [
                [short(row["members"]), cell, percent(row["accuracy"])]
                for row, cell in zip(sizes, _gains(sizes), strict=True)
            ],
            text=(0, 1),
        )
        members = inputs.rows("ensemble_members", split)
        added = Table(
            ["member", "what it adds, 95 % interval", "weight"],
            [
                [row["member"], cell, f"{row['weight']:.2f}"]
                for row, cell in zip(members, _gains(members, kind="difference"), strict=True)
            ],
            text=(0, 1),
        )
        blocks += [Chart(svg, caption=caption), Side([grown, added])]
        pairs = inputs.rows("ensemble_diversity", split)
        rows = [
            [
                f"{row['a']}, {row['b']}",
                percent(row["disagreement"]),
                percent(row["double_fault"]),
                figure(row["q_statistic"], 3),
            ]
            for row in pairs
        ]
        header = ["pair", "disagree on", "both wrong on", "Q statistic"]
        blocks.append(Fold("How alike the members are", [Table(header, rows)]))
    grid = inputs.rows("grid", split)
    if grid:
        rows = [
            [
                predictor(row["predictor"]),
                row["views"],
                row["averaging"],
                percent(row["accuracy"]),
                cell,
                figure(row["nll"]),
                figure(row["ece"]),
                short(row["forward_passes"]),
            ]
            for row, cell in zip(grid, _gains(grid), strict=True)
        ]
        header = ["networks", "views", "averaged by", f"{split} accuracy", "gain by the views, 95 % interval"]
        header += ["NLL", "ECE", "forward passes"]
        note = Text("All before calibration. The best of many rows is best partly by chance: choose on val.", "note")
        every = Table(header, rows, text=(0, 1, 2, 4))
        blocks.append(Fold(f"Every way to predict with what was trained, on {split}", [note, every]))
    blocks += _soups(inputs.records.get("soups") or {})
    return Section("ensemble", "Ensemble" if sizes else "Other ways to predict", blocks) if blocks else None


def _soups(soups: Mapping[str, Any]) -> list[Block]:
    entries = []
    for kind, found in sorted(soups.items()):
        if isinstance(found, Mapping) and found.get("members"):
            entries.append(f"{kind} soup of {', '.join(found['members'])}")
        elif isinstance(found, Mapping) and found.get("omitted"):
            entries.append(f"no {kind} soup: {found['omitted']}")
    return [Text("; ".join(entries) + ".", "note")] if entries else []


def calibration(inputs: Inputs) -> Section | None:
    """Return how far the probabilities can be trusted: reliability, calibration errors, risk by coverage."""
    bins = inputs.tables.get("reliability", ())
    split, last = inputs.split, inputs.last_split
    risk = inputs.rows("risk_coverage", split)
    if not bins and not risk:
        return None
    blocks: list[Block] = []
    if split is not None:
        found = inputs.metrics[split]
        fitted = inputs.records.get("predictor", {}).get("calibration", {})
        rows = [
            [
                words,
                figure(found[key].get("ece")),
                figure(found[key].get("ece_classwise")),
                figure(found[key].get("nll")),
            ]
            for key, words in (("uncalibrated", "before calibration"), ("ensemble_tta", "exported predictor"))
            if key in found
        ]
        header = [f"on {split}", "ECE", "ECE classwise", "NLL"]
        blocks.append(Text(_fitted(fitted, inputs.records.get("predictor", {}))))
        blocks.append(Table(header, rows))
    charts = []
    if bins:
        x, y = [row["confidence"] for row in bins], [row["accuracy"] for row in bins]
        line = Line("exported predictor", x, y, dots=True)
        axis = Axis("confidence", low=min([0.0 if min(x) < 0.5 else 0.5, *x]), high=1.0)
        svg = draw_lines([line], axis, Axis(low=0.0, high=1.0), alt=f"accuracy by confidence on {last}", diagonal=True)
        charts.append(
            Chart(
                svg,
                caption=f"Reliability on {last}: accuracy by confidence, in bins of equally many images; dashed: calibrated",
            )
        )
    if risk:
        line = Line("risk", [row["coverage"] for row in risk], [row["risk"] for row in risk])
        axis = Axis("share of images kept, most confident first", 0.0, 1.0)
        svg = draw_lines([line], axis, Axis(low=0.0), alt=f"share of mistakes by coverage on {split}")
        charts.append(
            Chart(svg, caption=f"Risk by coverage on {split}: share of mistakes among the images that are kept")
        )
    blocks.append(Side(charts))
    if risk and split is not None:
        of = inputs.metrics[split]["ensemble_tta"]
        parts = [
            f"{percent(of[key])} on the most confident {key[-2:]} %" for key in _COVERED if of.get(key) is not None
        ]
        if parts:
            blocks.append(Text(f"Accuracy: {', '.join(parts)} of the images."))
    if classes := inputs.rows("classwise", split):
        by_class = [
            [
                row["class"],
                f"{row['images']:,.0f}",
                percent(row["share"]),
                percent(row["mean_probability"]),
                figure(row["ece"]),
            ]
            for row in classes
        ]
        header = ["class", "images", "share", "mean probability", "ECE"]
        blocks.append(Fold(f"By class, on {split}", [Table(header, by_class)]))
    return Section("calibration", "Calibration", blocks)


_COVERED = ("accuracy_at_80", "accuracy_at_90", "accuracy_at_95")


def _fitted(fitted: Mapping[str, Any], exported: Mapping[str, Any]) -> str:
    kind = fitted.get("kind", "none")
    if kind == "temperature":
        return f"Calibrated on val by a temperature of {short(exported['temperature'])}: above 1 softens, below 1 sharpens."
    if kind == "vector":
        return "Calibrated on val by vector scaling: a factor and a shift for each class."
    if fitted.get("asked", "none") != "none":
        return f"Not calibrated: {fitted['asked']} scaling did not help on val by more than a standard error."
    return "Not calibrated (evaluate.calibration is none)."


def confusion(inputs: Inputs) -> Section | None:
    """Return which classes are taken for which."""
    pairs = inputs.tables.get("confusion", ())
    if not pairs:
        return None
    names = [item["name"] for item in inputs.data["classes"]]
    place = {name: index for index, name in enumerate(names)}
    counts = [[0] * len(names) for _ in names]
    for row in pairs:
        counts[place[row["actual"]]][place[row["predicted"]]] += 1
    split = inputs.last_split
    wrong = Counter(
        {(i, j): counts[i][j] for i in range(len(names)) for j in range(len(names)) if i != j and counts[i][j]}
    )
    total = len(pairs)
    missed = sum(wrong.values())
    worst = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:MOST_PAIRS]
    rows = [
        [f"{names[i]}, taken for {names[j]}", count, f"{count / max(sum(counts[i]), 1):.1%}"] for (i, j), count in worst
    ]
    alt = f"confusion matrix on {split}: {total - missed} of {total} right" + (
        f"; most often {rows[0][0]}" if rows else ""
    )
    blocks: list[Block] = [
        Text(f"{missed:,} of {total:,} {split} images are wrong. Actual classes down, predicted classes across."),
        Chart(draw_matrix(counts, names, alt=alt), [Key("right", 7), Key("wrong", 8)], wide=len(names) > 12),
    ]
    by_class = [
        [
            name,
            sum(counts[i]),
            percent(counts[i][i] / sum(counts[i])) if sum(counts[i]) else "",
            percent(counts[i][i] / predicted) if (predicted := sum(row[i] for row in counts)) else "",
        ]
        for i, name in enumerate(names)
    ]
    if rows:
        blocks.append(Fold("Most confused pairs", [Table(["", "images", "share of the class"], rows)]))
    header = ["class", "images", "recognised", "right where predicted"]
    blocks.append(Fold("By class", [Table(header, by_class)]))
    return Section("confusion", "Confusion", blocks)
