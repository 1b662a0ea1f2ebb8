"""What a prediction costs, the recipe, how to have the same again; and, in MLflow's copy alone, this execution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anneal.reporting.report.blocks import Block, Code, Fold, Section, Table, Text
from anneal.reporting.report.inputs import Inputs
from anneal.reporting.report.words import counted, short


def cost(inputs: Inputs) -> Section | None:
    """Return parameters, multiplications and forward passes of a prediction."""
    found = inputs.records.get("cost")
    if not found:
        return None
    rows = [
        [
            name,
            of["architecture"],
            _count(of["parameters"]),
            _macs(of["macs"]),
            "" if of["lr"] is None else short(of["lr"]),
        ]
        for name, of in sorted(found["members"].items())
    ]
    exported = found["predictor"]
    text = (
        f"A prediction runs {counted(exported['networks'], 'network')} over {counted(exported['views'], 'view')} of an image: "
        f"{short(exported['forward_passes'])} forward passes"
    )
    if exported["macs"] is not None and exported["parameters"] is not None:
        text += f", {_macs(exported['macs'])} multiply-adds; {exported['parameters']:,} parameters in all"
    text += "."
    header = ["member", "model", "parameters", "multiply-adds, one pass", "peak learning rate"]
    return Section("cost", "Cost", [Text(text), Table(header, rows, text=(0, 1))])


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _macs(value: float | None) -> str:
    """Return a number of multiply-adds with its unit; empty for None.

    >>> _macs(2116224), _macs(900)
    ('2.1 M', '900')
    """
    if value is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value >= 10 * size else f"{value / size:.1f} {unit}"
    return f"{value:.0f}"


def recipe(inputs: Inputs) -> Section:
    """Return params.yaml as it was."""
    values = inputs.recipe
    words = [
        f"{values['model']['name']} trained by {values['optimizer']['name']} for {values['trainer']['epochs']} epochs",
        f"{values['schedule']['name']} schedule",
        f"batch {values['batch']['size']}",
        f"augmentation {values['augment']['policy'] if isinstance(values['augment']['policy'], str) else 'of its own'}",
        f"{counted(len(inputs.members), 'member')} ({', '.join(inputs.members)})",
    ]
    return Section("recipe", "Recipe", [Text(f"{'; '.join(words)}."), Fold("params.yaml", [Code(inputs.recipe_text)])])


def reproduce(inputs: Inputs) -> Section:  # noqa: ARG001
    """Return the commands that make all of it again."""
    blocks: list[Block] = [
        Text("On the commit that holds this page's dvc.lock:"),
        Code("make repro          # or: dvc repro\ndvc metrics show\ndvc params diff\ndvc plots diff"),
        Text("The same data, params and code give the same bytes on the same machine; this page is one of them."),
    ]
    return Section("reproduce", "Reproduce", blocks)


def this_execution(inputs: Inputs, execution: Mapping[str, Any]) -> Section:
    """Return when and where the stages ran, which MLflow knows.

    Parameters
    ----------
    inputs
        Of the page.
    execution
        What `anneal.tracking.Run.execution` gives: ``stages`` (a list of ``stage``, ``member``, ``seconds``, ``attempt``,
        ``earlier``), ``environment`` (name to text), ``commit``, ``test_uses``; each may be missing or None.
    """
    rows = []
    for stage in execution.get("stages") or []:
        label = " ".join(filter(None, [stage["stage"], stage.get("member")]))
        seconds = stage.get("seconds")
        images = _images(inputs, stage)
        speed = f"{images / seconds:,.0f}" if images and seconds else ""
        note = "taken from DVC's cache: an earlier run's" if stage.get("earlier") else ""
        if (stage.get("attempt") or 1) > 1:
            note = "; ".join(filter(None, [note, f"attempt {stage['attempt']}"]))
        rows.append([label, "" if seconds is None else _clock(seconds), speed, note])
    blocks: list[Block] = []
    if rows:
        blocks.append(Table(["stage", "time", "images/s", ""], rows, text=(0, 3)))
        blocks.append(
            Text(
                "images/s: training images x epochs, or images x members, over all the time of the stage's run.",
                "note",
            )
        )
    if uses := execution.get("test_uses"):
        blocks.append(
            Text(
                f"test set used by {counted(uses, 'recipe')}. Each look at it makes the best figure of all a little too good.",
                "verdict",
            )
        )
    facts = [[name, text] for name, text in (execution.get("environment") or {}).items()]
    if commit := execution.get("commit"):
        facts.insert(0, ["git commit", commit])
    if facts:
        blocks.append(Table(["", ""], facts, text=(0, 1)))
    return Section("execution", "This execution", blocks)


def _images(inputs: Inputs, stage: Mapping[str, Any]) -> int | None:
    """Return how many images a stage went through; None where that says nothing."""
    data, members = inputs.data, inputs.diagnosis["members"]
    if stage["stage"] == "train" and stage.get("member") in members:
        return int(data.get("train", 0) * members[stage["member"]]["epochs"])
    if stage["stage"] == "evaluate":
        return sum(data.get(split, 0) for split in inputs.metrics) * len(members)
    return int(data.get("images", 0)) if stage["stage"] == "preprocess" else None


def _clock(seconds: float) -> str:
    """Return a duration.

    >>> _clock(7.25), _clock(125), _clock(7300)
    ('7.2 s', '2 min 5 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60)} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
