"""The headline, and what to look at first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from anneal.reporting.report.blocks import Block, Fold, Items, Section, Table, Text
from anneal.reporting.report.inputs import Inputs
from anneal.reporting.report.words import PREDICTORS, counted, evidence, figure, gain, interval, percent, predictor

FIGURES = {
    "accuracy": "accuracy",
    "macro_accuracy": "macro accuracy",
    "macro_f1": "macro F1",
    "top5": "top 5",
    "nll": "NLL",
    "brier": "Brier",
    "ece": "ECE",
}

SHARES = ("accuracy", "macro_accuracy", "top5")
"""Those of them that are shares of images."""

FINDINGS = {
    "noisy_validation": "validation split too small",
    "validation_easier": "validation easier than training: a leak, or an easier split",
    "label_noise": "label noise suspected",
    "dead_layers": "dead layers",
}
"""Names of findings to words, where theirs do not say enough."""

GRAVE = ("diverging", "dead_layers", "exploding_layers", "validation_easier", "label_noise", "noisy_validation")
"""Findings that cast doubt on all figures below; they come first."""

WIDE = 0.02
"""Half the width of an interval of the accuracy, from which on the split is called small."""


def headline(inputs: Inputs) -> Section:
    """Return the exported predictor's accuracy, beside what a constant and a linear classifier reach."""
    split = inputs.split
    if split is None:
        return Section("result", "Result", [Text("No split was evaluated.")])
    found = inputs.metrics[split]["ensemble_tta"]
    blocks: list[Block] = [
        Text(
            Markup("<strong>{}</strong> {} accuracy <small>95 % interval {}</small>").format(
                percent(found["accuracy"]), split, interval(found["accuracy_ci"])
            ),
            "headline",
        )
    ]
    rows = [["this predictor", _accuracy(found), ""]]
    baselines = inputs.records.get("baselines", {})
    for name, words in (("linear", "linear classifier on pixels"), ("majority_class", "always the largest class")):
        if split in baselines.get(name, {}):
            rows.append([words, _accuracy(baselines[name][split]), ""])
    if against := over_linear(inputs, split):
        value, low, high = (against[f"accuracy_{end}"] for end in ("difference", "low", "high"))
        reach = max(abs(low), abs(high))
        rows[1][2] = gain(value, low, high, reach=reach, verdict=against["accuracy_verdict"])
    blocks.append(Table(["", f"{split} accuracy, 95 % interval", "this predictor gains"], rows, text=(0, 1, 2)))
    for name in [split, *(name for name in inputs.metrics if name != split)]:
        blocks.append(Fold(f"All figures on {name}", [_figures(inputs.metrics[name])]))
    return Section("result", "Result", blocks)


def _accuracy(found: Mapping[str, Any]) -> Markup:
    return Markup('{}<br><small class="ends">{}</small>').format(
        percent(found["accuracy"]), interval(found.get("accuracy_ci"))
    )


def over_linear(inputs: Inputs, split: str | None) -> Mapping[str, Any] | None:
    """Return the comparison of the exported predictor with the linear baseline; None where there is none."""
    gains = inputs.records.get("baselines", {}).get("linear", {}).get("gain", {})
    found: Mapping[str, Any] | None = gains.get(split)
    return found


def _figures(found: Mapping[str, Any]) -> Table:
    named = [(words, found[key]) for key, words in PREDICTORS.items() if key in found]
    named += [(predictor(f"members/{name}"), found["members"][name]) for name in sorted(found["members"])]
    rows = []
    for name, of in named:
        cells = [percent(of.get(key)) if key in SHARES else figure(of.get(key)) for key in FIGURES]
        rows.append([name, cells[0], interval(of.get("accuracy_ci")), *cells[1:]])
    return Table(["predictor", "accuracy", "95 % interval", *list(FIGURES.values())[1:]], rows)


def look_first(inputs: Inputs) -> Section:
    """Return what a reader should know before believing the figures, the gravest first."""
    entries = [*_leaks(inputs), *_grave(inputs), *_labels(inputs), *_against_linear(inputs), *_small_split(inputs)]
    entries += [*_other_findings(inputs), *_data(inputs), *_warnings(inputs)]
    blocks: list[Block] = [Items(entries, numbered=True)] if entries else [Text("Nothing stands out.", "verdict")]
    if checked := _in_order(inputs):
        blocks.append(Text(f"Checked without finding: {'; '.join(checked)}.", "note"))
    return Section("first", "What to look at first", blocks)


def _entry(title: str, text: str, link: str, words: str) -> Markup:
    return Markup('<strong>{}</strong>: {} <a href="#{}">{}</a>').format(title, text, link, words)


def _leaking(found: Mapping[str, Any]) -> bool:
    return any(split["leak"] for split in found["splits"].values())


def _noisy(found: Mapping[str, Any]) -> bool:
    return bool(found["shown"])


def _in_order(inputs: Inputs) -> list[str]:
    """Return what was checked without finding anything."""
    checked = []
    if not any(member["findings"] for member in inputs.diagnosis["members"].values()):
        checked.append("no finding in the learning curves")
    for name, bad in (("near_duplicates", _leaking), ("label_errors", _noisy)):
        found = inputs.records.get(name)
        if found and found["splits"] and not bad(found):
            checked.append(found["verdict"])
    return checked


def _leaks(inputs: Inputs) -> list[Markup]:
    found = inputs.records.get("near_duplicates")
    if not found or not _leaking(found):
        return []
    return [_entry("leak", found["verdict"], "near-duplicates", "the pairs")]


def _labels(inputs: Inputs) -> list[Markup]:
    found = inputs.records.get("label_errors")
    if not found or not _noisy(found):
        return []
    return [_entry("label noise", found["verdict"], "label-errors", "the images")]


def _against_linear(inputs: Inputs) -> list[Markup]:
    found = over_linear(inputs, inputs.split)
    if not found or found["accuracy_verdict"] == "better":
        return []
    shown = "shown to be worse" if found["accuracy_verdict"] == "worse" else "no difference shown"
    text = (
        f"on {inputs.split} the network has {percent(found['accuracy_b'])}, "
        f"a linear classifier on pixels {percent(found['accuracy_a'])}: {shown}."
    )
    return [_entry("not shown to be better than a linear classifier", text, "result", "the figures")]


def _small_split(inputs: Inputs) -> list[Markup]:
    split = inputs.split
    if split is None:
        return []
    low, high = inputs.metrics[split]["ensemble_tta"]["accuracy_ci"]
    if (high - low) / 2 < WIDE:
        return []
    images = inputs.data.get(split)
    size = f"its {counted(images, 'image')} leave" if images else "its images leave"
    text = f"{size} the accuracy open from {interval([low, high])}; smaller differences cannot be seen on it."
    return [_entry(f"{split} split small", text, "result", "the figures")]


def _by_name(inputs: Inputs) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return findings by name, then by member, in the order in which rules and members come."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for member in sorted(inputs.diagnosis["members"]):
        for finding in inputs.diagnosis["members"][member]["findings"]:
            found.setdefault(finding["name"], {})[member] = finding
    return found


def finding_words(name: str) -> str:
    """Return a finding's name in words.

    >>> finding_words("slow_start"), finding_words("noisy_validation")
    ('slow start', 'validation split too small')
    """
    return FINDINGS.get(name, name.replace("_", " "))


def _findings(inputs: Inputs, names: list[str]) -> list[Markup]:
    entries = []
    found = _by_name(inputs)
    for name in names:
        of = found[name]
        first = next(iter(of.values()))
        whole = len(of) == len(inputs.diagnosis["members"])
        who = "every member" if whole and len(of) > 1 else f"member{'s' * (len(of) > 1)} {', '.join(of)}"
        shown = f"{who}, {first['confidence']} confidence; {evidence(first['evidence'])}."
        advice = Markup("; ").join(Markup("<code>{}</code>: {}").format(c["key"], c["try"]) for c in first["change"])
        text = Markup("{} Try {}.").format(shown, advice) if advice else Markup("{}").format(shown)
        entries.append(_entry(finding_words(name), text, "training", "the curves"))
    return entries


def _grave(inputs: Inputs) -> list[Markup]:
    return _findings(inputs, [name for name in GRAVE if name in _by_name(inputs)])


def _other_findings(inputs: Inputs) -> list[Markup]:
    return _findings(inputs, [name for name in _by_name(inputs) if name not in GRAVE])


def _data(inputs: Inputs) -> list[Markup]:
    entries = []
    if number := inputs.data.get("num_conflicting"):
        text = f"{counted(number, 'image')} with the same pixels as another one have another label."
        entries.append(_entry("contradicting labels", text, "data", "the data"))
    if number := inputs.data.get("num_rejected"):
        text = f"{counted(number, 'file')} could not be used."
        entries.append(_entry("rejected files", text, "data", "the data"))
    return entries


def _warnings(inputs: Inputs) -> list[Markup]:
    return [Markup("<strong>warning</strong>: {}").format(text) for text in inputs.records.get("warnings", [])]
