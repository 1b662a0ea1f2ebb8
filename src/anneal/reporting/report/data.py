"""The data card, and what augmentation makes of it."""

from __future__ import annotations

from typing import Any

from anneal.reporting.report.blocks import Block, Fold, Items, Picture, Section, Table, Text
from anneal.reporting.report.inputs import Inputs
from anneal.reporting.report.words import counted, short

SPLITS = ("train", "val", "test")

PREPROCESSING = {
    "images.png": "The first image of each of the first classes: above as stored, below as the network sees it.",
    "histograms.png": "Distribution of the values of training images, before and after normalisation, a line a channel.",
    "spectrum.png": "Eigenvalues of the covariance of the training images, and the share of variance of the first k.",
}


def data(inputs: Inputs) -> Section:
    """Return what the data set is: counts, what was left out, duplicates, and how it was preprocessed."""
    found = inputs.data
    splits = [name for name in SPLITS if name in found]
    counts = ", ".join(f"{found[name]:,} {name}" for name in splits)
    kind = "grey" if found["channels"] == 1 else "colour"
    blocks: list[Block] = [
        Text(
            f"{counts} images of {counted(found['num_classes'], 'class', 'classes')}, "
            f"{found['height']}x{found['width']} {kind}, from {inputs.recipe['data']['path']}."
        ),
        Table(["", ""], [[name, value] for name, value in _facts(inputs)], text=(0, 1)),
    ]
    rows = [[item["name"], *(item.get(split, 0) for split in splits)] for item in found["classes"]]
    blocks.append(Fold("Images of each class", [Table(["class", *splits], rows)]))
    blocks += _left_out(found)
    pictures = [
        Picture(inputs.pictures[f"preprocessing/{name}"], words, caption=words, wide=True)
        for name, words in PREPROCESSING.items()
        if f"preprocessing/{name}" in inputs.pictures
    ]
    if pictures:
        blocks.append(Fold("Before and after normalisation", pictures))
    return Section("data", "Data", blocks)


def _facts(inputs: Inputs) -> list[tuple[str, str]]:
    found = inputs.data
    facts: list[tuple[str, str]] = []
    if size := found.get("original_size"):
        widths = _span(size["min_width"], size["max_width"])
        heights = _span(size["min_height"], size["max_height"])
        facts.append(("original size", f"width {widths}, height {heights} pixels"))
    counts = [row["train"] for row in found["classes"] if row.get("train")]
    if counts:
        ratio = max(counts) / min(counts)
        facts.append(
            ("largest class over smallest", f"{ratio:.1f} ({max(counts):,} to {min(counts):,} training images)")
        )
    facts.append(("files rejected", f"{found['num_rejected']:,}"))
    facts.append(("duplicates removed", f"{found['num_duplicates_removed']:,} (same pixels in two splits)"))
    if within := found.get("num_duplicates_within"):
        facts.append(("duplicates kept", ", ".join(f"{within[name]:,} in {name}" for name in SPLITS if name in within)))
    if "num_conflicting" in found:
        facts.append(("same pixels, other label", counted(found["num_conflicting"], "image")))
    if found.get("num_left_out_by_limit"):
        facts.append(("left out by data.limit", counted(found["num_left_out_by_limit"], "training image")))
    near = inputs.records.get("near_duplicates")
    if near:
        each = [f"{of['with_duplicate_in_train']:,} of {name}" for name, of in near["splits"].items()]
        facts.append(("near duplicates in train", ", ".join(each)))
    errors = inputs.records.get("label_errors")
    if errors and errors["splits"]:
        each = [f"{of['suspected']:,} of {name}" for name, of in errors["splits"].items()]
        facts.append(("labels suspected", ", ".join(each)))
    if statistics := found.get("statistics"):
        values = [
            f"{name} {', '.join(short(value) for value in statistics[name])}"
            for name in ("mean", "std")
            if name in statistics
        ]
        facts.append(("normalisation", f"{statistics['normalize']}; {'; '.join(values)} (of x in 0..1)"))
    return facts


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _left_out(found: Any) -> list[Block]:
    """Return what was rejected, removed and contradicts itself, each behind a line."""
    blocks: list[Block] = []
    if rejected := found.get("rejected"):
        entries = [f"{item['source']}: {item['reason']}" for item in rejected]
        blocks.append(Fold(_listed("Rejected files", len(entries), found["num_rejected"]), [Items(entries)]))
    if duplicates := found.get("duplicates"):
        rows = [[item["removed"], item["from"], item["kept"], item["in"]] for item in duplicates]
        table = Table(["removed", "from", "same as", "in"], rows, text=(0, 1, 2, 3))
        blocks.append(Fold(_listed("Duplicates removed", len(rows), found["num_duplicates_removed"]), [table]))
    if groups := found.get("conflicting"):
        entries = [", ".join(f"{item['source']} ({item['label']})" for item in group) for group in groups]
        blocks.append(Fold(f"Same pixels under several labels: {counted(len(entries), 'group')}", [Items(entries)]))
    return blocks


def _listed(title: str, shown: int, total: int) -> str:
    return f"{title}: {total:,}" + (f", the first {shown:,}" if shown < total else "")


def augmentation(inputs: Inputs) -> Section | None:
    """Return the preview of the policy."""
    png = inputs.pictures.get("augmentation/overview.png")
    if png is None:
        return None
    policy = inputs.recipe["augment"]["policy"]
    named = f"policy {policy}" if isinstance(policy, str) else f"{counted(len(policy), 'transform')} of its own"
    share = inputs.recipe["augment"].get("copies", {}).get("balance")
    text = f"What training sees, by {named}" + (", with copies that balance the classes." if share else ".")
    words = "A row for each class: an original image, then augmented versions of it."
    return Section("augmentation", "Augmentation", [Text(text), Picture(png, words, words, pixels=True, wide=True)])
