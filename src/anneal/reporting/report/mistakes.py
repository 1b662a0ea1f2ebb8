"""Single images: what is wrong and why, which labels are doubtful, what is in two splits; and other conditions."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from anneal.reporting.report.blocks import Block, Card, Chart, Fold, Gallery, Key, Picture, Section, Table, Text
from anneal.reporting.report.charts import COLOURS, Axis, Line, draw_lines
from anneal.reporting.report.inputs import Inputs, Row
from anneal.reporting.report.words import counted, gain, interval, percent, scale_of, short

SHOWN = 12
"""Cards that are open at first; more are behind a line."""


def _picture(inputs: Inputs, path: str | None, alt: str) -> list[Picture]:
    """Return a picture of evaluate, none where there is no such file."""
    png = inputs.pictures.get(f"evaluation/{path}") if path else None
    return [] if png is None else [Picture(png, alt, pixels=True)]


def _cards(cards: Sequence[Card]) -> list[Block]:
    blocks: list[Block] = [Gallery(cards[:SHOWN])] if cards else []
    if len(cards) > SHOWN:
        blocks.append(Fold(f"{len(cards) - SHOWN:,} more", [Gallery(cards[SHOWN:])]))
    return blocks


def mistakes(inputs: Inputs) -> Section | None:
    """Return the errors of which the predictor is surest, with saliency, and the pairs that it confuses."""
    found = inputs.records.get("mistakes")
    if not found:
        return None
    if not found["count"]:
        return Section(
            "mistakes", "Mistakes", [Text(f"None of {counted(found['images'], found['split'] + ' image')} is wrong.")]
        )
    blocks: list[Block] = [
        Text(
            f"{found['count']:,} of {found['images']:,} {found['split']} images are wrong; here those of which the predictor is "
            "surest. Each is shown twice: as it is, and with what spoke for the predicted class in orange, for its label in blue."
        )
    ]
    cards = []
    for item in found["errors"]:
        alt = f"{item['label']}, predicted {item['predicted']}"
        pictures = _picture(inputs, item["picture"], alt)
        pictures += _picture(inputs, item.get("saliency"), f"saliency of {alt}")
        own = item.get("probability_of_label")
        said = Markup("<strong>{}</strong>, predicted <strong>{}</strong> at {}{}<br><small>{}</small>").format(
            item["label"],
            item["predicted"],
            percent(item["probability"], 1),
            "" if own is None else f" (own class {percent(own, 1)})",
            item["source"],
        )
        cards.append(Card(pictures, said))
    blocks += _cards(cards)
    pairs = []
    for item in found.get("confused", []):
        alt = f"{item['actual']}, predicted {item['predicted']}"
        pictures = [picture for path in item.get("pictures", []) for picture in _picture(inputs, path, alt)]
        share = percent(item["share_of_actual"], 1)
        said = Markup("<strong>{}</strong> taken for <strong>{}</strong>: {}, {} of the class").format(
            item["actual"], item["predicted"], counted(item["count"], "image"), share
        )
        pairs.append(Card(pictures, said))
    if pairs:
        blocks.append(Fold("Most confused pairs, in pictures", [Gallery(pairs)]))
    return Section("mistakes", "Mistakes", blocks)


def label_errors(inputs: Inputs) -> Section | None:
    """Return labels that are likely wrong."""
    found = inputs.records.get("label_errors")
    if not found:
        return None
    rows = [
        [
            name,
            f"{of['images']:,}",
            of["suspected"],
            percent(of.get("estimated_share"), 1),
            interval(of.get("share_ci"), 1),
            of.get("method", ""),
        ]
        for name, of in found["splits"].items()
    ]
    header = ["split", "images", "suspected", "estimated share", "95 % interval", "method"]
    cards = []
    for item in found["items"]:
        alt = f"labelled {item['label']}, looks like {item['suggested']}"
        said = Markup(
            "labelled <strong>{}</strong>, rather <strong>{}</strong><br><small>{}, {}; own label {}</small>"
        ).format(item["label"], item["suggested"], item["split"], item["source"], percent(item["self_confidence"], 1))
        cards.append(Card(_picture(inputs, item.get("picture"), alt), said))
    blocks: list[Block] = [
        Text(found["verdict"], "verdict"),
        *([Table(header, rows, text=(0, 4, 5))] if rows else []),
        *_cards(cards),
    ]
    return Section("label-errors", "Labels that may be wrong", blocks)


def near_duplicates(inputs: Inputs) -> Section | None:
    """Return images of val and test that training has seen in another file."""
    found = inputs.records.get("near_duplicates")
    if not found:
        return None
    rows = [
        [name, f"{of['images']:,}", of["with_duplicate_in_train"], percent(of["share"], 1)]
        for name, of in found["splits"].items()
    ]
    cards = []
    for item in found["pairs"]:
        pictures = _picture(inputs, item.get("picture"), f"{item['split']}: {item['label']}")
        pictures += _picture(inputs, item.get("train_picture"), f"train: {item['train_label']}")
        said = Markup(
            "{} <strong>{}</strong>, train <strong>{}</strong><br><small>{} and {}, distance {}</small>"
        ).format(
            item["split"],
            item["label"],
            item["train_label"],
            item["source"],
            item["train_source"],
            short(item["distance"]),
        )
        cards.append(Card(pictures, said))
    blocks: list[Block] = [
        Text(found["verdict"], "verdict"),
        Table(["split", "images", "with a near duplicate in train", "share"], rows),
        *_cards(cards),
    ]
    return Section("near-duplicates", "Near duplicates", blocks)


def robustness(inputs: Inputs) -> Section | None:
    """Return the accuracy under corruptions of the images."""
    rows = inputs.rows("robustness")
    if not rows:
        return None
    split = inputs.split if any(row["split"] == inputs.split for row in rows) else rows[-1]["split"]
    rows = [row for row in rows if row["split"] == split]
    kinds = list(dict.fromkeys(row["corruption"] for row in rows))
    lines = []
    for i, kind in enumerate(kinds):
        of = sorted((row for row in rows if row["corruption"] == kind), key=lambda row: row["severity"])
        x, y = [row["severity"] for row in of], [row["accuracy"] for row in of]
        lines.append(Line(kind, x, y, i, _DASHES[i // COLOURS % len(_DASHES)], dots=True))
    alt = f"accuracy on {split} by severity of {len(kinds)} corruptions"
    svg = draw_lines(lines, Axis("severity", whole=True), Axis(high=1.0), alt=alt)
    legend = [Key(line.label, line.colour, line.dash, dots=True) for line in lines]
    worst = max(row["severity"] for row in rows)
    changed = [row for row in rows if row["severity"] > 0]
    clean = next((row for row in rows if row["severity"] == 0), None)
    images = counted(round(rows[0]["images"]), f"{split} image")
    as_they_are = f"As they are: {percent(clean['accuracy'])}. " if clean else ""
    blocks: list[Block] = [
        Text(
            f"Accuracy on {images} that were made worse, by severity (0: as they are). Nothing was trained for it, unless "
            "augmentation did."
        ),
        Chart(svg, legend),
        Text(f"{as_they_are}At severity {short(worst)}:"),
        _changes([row for row in changed if row["severity"] == worst]),
        Fold("Every severity", [_changes(changed)]),
    ]
    return Section("robustness", "Robustness", blocks)


_DASHES = ("", "5 4", "1 4")


def _changes(rows: Sequence[Row]) -> Table:
    reach = scale_of([row[key] for row in rows for key in ("change_low", "change_high")])
    cells = [
        [
            row["corruption"],
            gain(row["change"], row["change_low"], row["change_high"], reach=reach, verdict=row["verdict"]),
            percent(row["accuracy"]),
            short(row["severity"]),
        ]
        for row in rows
    ]
    return Table(["corruption", "change, 95 % interval", "accuracy", "severity"], cells, text=(0, 1))
