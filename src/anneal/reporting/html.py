"""report.html: one self-contained page of what was trained, on what, and how well it does."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; height: auto; background: white; padding: .25rem; box-sizing: border-box; }
img.pixels { image-rendering: pixelated; }
.headline { font-size: 1.4rem; }
pre { padding: .75rem; overflow-x: auto; border: 1px solid var(--line); border-radius: .25rem; font-size: .85rem; }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for the page: no script runs, and nothing is fetched, whatever a class is named."""

FIGURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "top5": "top 5",
    "nll": "NLL",
    "brier": "Brier",
    "ece": "ECE",
}

PREDICTORS = {
    "single": "one member (mean)",
    "tta": "one member with TTA (mean)",
    "ensemble": "ensemble",
    "ensemble_tta": "ensemble with TTA",
}


def render(
    *,
    metrics: Mapping[str, Any],
    data: Mapping[str, Any],
    diagnosis: Mapping[str, Any],
    warnings: Sequence[str],
    recipe: str,
    pictures: Mapping[str, bytes],
) -> str:
    """Return the page as HTML, a pure function of its arguments.

    Parameters
    ----------
    metrics, data, diagnosis
        Contents of metrics.json, data.json and diagnosis.json.
    warnings
        Of the evaluation, shown above its figures.
    recipe
        The params, as YAML text.
    pictures
        ``augmentation``, ``curves`` and ``confusion`` to PNG bytes; one that is missing is left out.
    """
    sections = {
        "Results": _headline(metrics) + _items(warnings) + "".join(_figures(name, metrics[name]) for name in metrics),
        "Mistakes": _picture(pictures, "confusion", "Confusion matrix: actual classes down, predicted classes across."),
        "Training": _findings(diagnosis) + _picture(pictures, "curves", _curves_in_words(diagnosis)),
        "Data": _data(data),
        "Augmentation": _picture(
            pictures,
            "augmentation",
            "A row for each class: an original image, then augmented versions of it.",
            "pixels",
        ),
        "Recipe": f"<pre>{escape(recipe)}</pre>",
        "Reproduce": "<p>On the commit that holds this report's <code>dvc.lock</code>:</p>"
        "<pre>make repro        # or: dvc repro\ndvc metrics show\ndvc params diff</pre>",
    }
    body = "".join(f"<section><h2>{name}</h2>\n{content}</section>\n" for name, content in sections.items() if content)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>anneal report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>anneal report</h1>\n{body}</body>\n</html>\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table; its first column is text, the others are numbers."""
    head = "".join(f"<th{'' if i == 0 else CLASS}>{escape(str(name))}</th>" for i, name in enumerate(header))
    lines = [
        "<tr>" + "".join(f"<td{'' if i == 0 else CLASS}>{escape(str(v))}</td>" for i, v in enumerate(row)) + "</tr>"
        for row in rows
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>\n'


CLASS = ' class="number"'


def _headline(metrics: Mapping[str, Any]) -> str:
    split = "test" if "test" in metrics else next(iter(metrics), None)
    if split is None:
        return "<p>No split was evaluated.</p>"
    figures = metrics[split]["ensemble_tta"]
    low, high = figures["accuracy_ci"]
    return (
        f'<p class="headline"><strong>{figures["accuracy"]:.2%}</strong> {escape(split)} accuracy '
        f"(95 % interval {low:.2%} to {high:.2%})</p>\n"
    )


def _figures(split: str, found: Mapping[str, Any]) -> str:
    named = [(text, found[key]) for key, text in PREDICTORS.items() if key in found]
    named += [(f"member {name}", found["members"][name]) for name in sorted(found["members"])]
    rows = []
    for name, figures in named:
        interval = figures.get("accuracy_ci")
        shown = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        cells = [f"{figures[key]:.4f}" if figures.get(key) is not None else "" for key in FIGURES]
        rows.append([name, cells[0], shown, *cells[1:]])
    header = ["predictor", "accuracy", "95 % interval", *list(FIGURES.values())[1:]]
    return f"<h3>{escape(split)}</h3>\n" + _table(header, rows)


def _findings(diagnosis: Mapping[str, Any]) -> str:
    rows = []
    for name, member in sorted(diagnosis["members"].items()):
        for finding in member["findings"]:
            evidence = ", ".join(f"{k} {v:.4g}" for k, v in sorted(finding["evidence"].items()) if v is not None)
            change = "; ".join(f"{item['key']}: {item['try']}" for item in finding["change"])
            found = finding["name"].replace("_", " ")
            rows.append(f"{name}: {found} ({finding['confidence']} confidence). Seen: {evidence}. Try {change}.")
    return _items(rows) or "<p>No rule found fault with a learning curve.</p>\n"


def _curves_in_words(diagnosis: Mapping[str, Any]) -> str:
    words = [
        f"member {name}, {member['epochs']} epochs, lowest validation loss in epoch {member['lowest_val_loss_epoch']}"
        for name, member in sorted(diagnosis["members"].items())
    ]
    return f"Loss and accuracy over epochs: {'; '.join(words)}."


def _data(data: Mapping[str, Any]) -> str:
    splits = [name for name in ("train", "val", "test") if name in data]
    counts = ", ".join(f"{data[name]:,} {name}" for name in splits)
    kind = "grey" if data["channels"] == 1 else "colour"
    rows = [[item["name"], *(item.get(split, 0) for split in splits)] for item in data["classes"]]
    text = (
        f"{counts} images of {data['num_classes']} classes, {data['height']}x{data['width']} {kind}; "
        f"{data['num_rejected']} files rejected, {data['num_duplicates_removed']} duplicates removed."
    )
    return (
        f"<p>{escape(text)}</p>\n"
        f"<details><summary>Images of each class</summary>{_table(['class', *splits], rows)}</details>\n"
    )


def _items(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>\n" if texts else ""


def _picture(pictures: Mapping[str, bytes], name: str, alt: str, kind: str = "") -> str:
    if name not in pictures:
        return ""
    source = base64.b64encode(pictures[name]).decode()
    return f'<img class="{kind}" alt="{escape(alt)}" src="data:image/png;base64,{source}">\n'
