"""What a search has found: its trials in order, its tables and figure, the recipe of the best, MLflow's runs."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anneal import tracking
from anneal.params import UserError
from anneal.reporting.lines import Line, Panel, draw_panels
from anneal.search.config import SearchConfig
from anneal.search.space import Key, in_words, replaced
from anneal.store import write_text
from anneal.studies.outputs import table

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

STUDIES = Path("studies/search")
RECIPES = Path("recipes")

MARK = "# Found by anneal search"
"""How the first line of a recipe begins that a search wrote."""

MOST_ROWS = 10
"""Trials in the table on the terminal."""

MOST_SLICES = 8
"""Keys in the figure."""

ENOUGH = 10
"""Trials that have run to their end, from which on the importance of keys is worth a look."""


# ---- values ---------------------------------------------------------------------------------------------------------


def value_of(figures: Mapping[str, float], metric: str, export: str) -> float:
    """Return what an epoch is compared by: the metric of the weights that ``averaging.export`` would take there.

    >>> value_of({"val/loss": 0.4, "val_average/loss": 0.3}, "val/loss", "best")
    0.3
    """
    raw, average = figures[metric], figures.get(metric.replace("val/", "val_average/"))
    if average is None or export == "raw":
        return raw
    if export == "average":
        return average
    return min(raw, average) if metric.endswith("loss") else max(raw, average)


def figure(row: Mapping[str, float], metric: str, *, averaged: bool) -> float:
    """Return the metric of an epoch, of its newest or of its averaged weights."""
    return float(row[metric.replace("val/", "val_average/") if averaged else metric])


def is_complete(trial: FrozenTrial) -> bool:
    """Say whether a trial ran to its end."""
    return trial.state.name == "COMPLETE"


def value(trial: FrozenTrial) -> float:
    """Return the value of a trial that ran to its end."""
    assert trial.values is not None
    return float(trial.values[0])


def ranked(trials: Sequence[FrozenTrial], metric: str) -> list[FrozenTrial]:
    """Return the trials that ran to their end, the best first; among equals the other figure decides, then the earlier one."""
    sign = 1 if metric.endswith("loss") else -1

    def rank(trial: FrozenTrial) -> tuple[float, float, int]:
        return sign * value(trial), -sign * float(trial.user_attrs.get("other", 0.0)), trial.number

    return sorted(filter(is_complete, trials), key=rank)


def best(trials: Sequence[FrozenTrial], metric: str) -> FrozenTrial | None:
    """Return the best trial that ran to its end, None where there is none."""
    return next(iter(ranked(trials, metric)), None)


# ---- words ----------------------------------------------------------------------------------------------------------


def outcome(trial: FrozenTrial, metric: str) -> str:
    """Return how a trial ended: ``val/accuracy 0.9722``, ``pruned after epoch 3``, ``failed: ...``."""
    reason = " ".join(str(trial.user_attrs.get("reason", "")).split())
    if is_complete(trial):
        return f"{metric} {value(trial):.4f}"
    if trial.state.name == "PRUNED":
        return f"pruned {reason}" if reason.startswith("after") else f"pruned: {reason[:120]}"
    return f"failed: {reason[:200]}" if trial.state.is_finished() else "running"


def settings(trial: FrozenTrial) -> str:
    """Return the values of a trial: ``optimizer.SGD.lr 0.05, ...``."""
    return ", ".join(f"{name} {shown(part)}" for name, part in trial.user_attrs.get("chosen", {}).items())


def shown(part: Any) -> str:
    """Return a value for a table."""
    return f"{part:.4g}" if isinstance(part, float) else part if isinstance(part, str) else json.dumps(part)


def in_lines(config: SearchConfig, keys: Sequence[Key], study: Study, trials: Sequence[FrozenTrial]) -> list[str]:
    """Return how many trials there are of each kind, the table of the best, and the importance of the keys."""
    from anneal.search.trials import importances

    states = [trial.state.name for trial in trials]
    words = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
    counts = ", ".join(f"{states.count(name)} {word}" for name, word in words.items() if name in states)
    lines = [f"search {config.study}: {len(trials)} trials{f' ({counts})' if counts else ''}"]
    order = ranked(trials, config.metric)
    if not order:
        return [*lines, "no trial has run to its end"]
    other = "val/accuracy" if config.metric == "val/loss" else "val/loss"
    names = [key.name for key in keys]
    head = ["trial", config.metric, other, "best epoch", *short_names(names)]
    rows = [
        [
            str(trial.number),
            f"{value(trial):.4f}",
            f"{trial.user_attrs['other']:.4f}",
            str(trial.user_attrs["best_epoch"]),
        ]
        + [shown(trial.user_attrs["chosen"][name]) if name in trial.user_attrs["chosen"] else "" for name in names]
        for trial in order[:MOST_ROWS]
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines += [
        "",
        *("  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [head, *rows]),
    ]
    if len(order) > MOST_ROWS:
        lines.append(f"  and {len(order) - MOST_ROWS} more")
    if len(order) >= ENOUGH and (found := importances(study)):
        lines += ["", "importance (share of the variance among the better trials, PED-ANOVA):"]
        lines += [f"  {share:5.1%}  {name}" for name, share in found.items()]
    return lines


def short_names(names: Sequence[str]) -> list[str]:
    """Return the ends of dotted keys that tell them apart.

    >>> short_names(["optimizer.name", "optimizer.SGD.lr", "optimizer.Adam.lr", "trainer.epochs"])
    ['optimizer.name', 'SGD.lr', 'Adam.lr', 'epochs']
    """
    ends = [name.split(".")[-1] for name in names]
    pairs = [".".join(name.split(".")[-2:]) for name in names]
    return [
        end if end != "name" and ends.count(end) == 1 else pair if pairs.count(pair) == 1 else name
        for name, end, pair in zip(names, ends, pairs, strict=True)
    ]


def description(config: SearchConfig, keys: Sequence[Key], lines: Sequence[str]) -> str:
    """Return the text of the search's run in Markdown."""
    head = f"`anneal search --study {config.study}`: {config.sampler}, pruning {config.pruner}, validation split alone"
    return "\n".join([head, "", *(f"- `{in_words(key)}`" for key in keys), "", "```", *lines, "```"])


# ---- files ----------------------------------------------------------------------------------------------------------


def write(
    config: SearchConfig,
    keys: Sequence[Key],
    base: Mapping[str, Any],
    study: Study,
    trials: Sequence[FrozenTrial],
    recipe: Path,
) -> list[str]:
    """Write ``studies/search/<study>/`` and the recipe of the best trial, and return what was found, in lines."""
    from anneal.search.trials import importances

    folder = STUDIES / config.study
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name,
            config.metric: value(trial) if is_complete(trial) else "",
            "best_epoch": trial.user_attrs.get("best_epoch", ""),
            "epochs": len(trial.user_attrs.get("epochs", [])),
            **{key.name: cell(trial.user_attrs.get("chosen", {}).get(key.name)) for key in keys},
            "reason": trial.user_attrs.get("reason", ""),
        }
        for trial in trials
    ]
    write_text(folder / "trials.csv", table(rows))
    curves = [{"trial": trial.number, **epoch} for trial in trials for epoch in trial.user_attrs.get("epochs", [])]
    write_text(folder / "curves.csv", table(curves))
    found = importances(study) if sum(map(is_complete, trials)) >= ENOUGH else {}
    panels = figure_panels(config, keys, trials, found)
    draw_panels(
        panels, folder / "figure.png", f"search {config.study}: {Path(base['data']['path']).name}, validation split"
    )
    lines = in_lines(config, keys, study, trials)
    winner = best(trials, config.metric)
    if winner is not None:
        write_text(recipe, recipe_text(config, base, winner, len(trials)))
        lines += [
            "",
            f"the best, trial {winner.number}, is written as {recipe}; to use it: anneal recipe {recipe.stem}",
            f"its {config.metric} is the best of {len(trials)} looks at one validation split, so it flatters: "
            f"`anneal seeds` says what it is worth, and test is for the recipe that you keep",
        ]
    return [
        *lines,
        f"see {folder}/figure.png, {folder}/trials.csv and MLflow's run `search {config.study}`; docs/search.md",
    ]


def cell(part: Any) -> Any:
    """Return a value as a cell of a CSV table."""
    return "" if part is None else part if isinstance(part, str | int | float) else json.dumps(part)


def recipe_path(study: str, *, force: bool) -> Path:
    """Return where the recipe of a study goes.

    Raises
    ------
    UserError
        A recipe that no search of this name wrote is there, and ``force`` is not given.
    """
    path = RECIPES / f"{study}.yaml"
    if path.exists() and not force and not path.read_text(encoding="utf-8").startswith(f"{MARK} {study}:"):
        raise UserError(
            f"{path}: found a recipe that is not of this search, allowed: another name (--study NAME), or --force, "
            f"which overwrites it in the end"
        )
    return path


def recipe_text(config: SearchConfig, base: Mapping[str, Any], trial: FrozenTrial, count: int) -> str:
    """Return the recipe of a trial: the keys that were searched, for params.yaml."""
    from ruamel.yaml import YAML

    other = "val/accuracy" if config.metric == "val/loss" else "val/loss"
    data = Path(base["data"]["path"]).name
    text = io.StringIO()
    YAML().dump(replaced({}, trial.user_attrs["chosen"]), text)
    return (
        f"{MARK} {config.study}: the best of {count} trials on {data}, {config.metric} {value(trial):.4f}, "
        f"{other} {trial.user_attrs['other']:.4f} (trial {trial.number})\n{text.getvalue()}"
    )


# ---- the figure -----------------------------------------------------------------------------------------------------


def figure_panels(
    config: SearchConfig, keys: Sequence[Key], trials: Sequence[FrozenTrial], importance: Mapping[str, float]
) -> list[Panel]:
    """Return the history of a search, the importance of its keys, and the value of each trial over each key."""
    panels = [history_panel(config, trials)]
    if importance:
        names = list(importance)[:MOST_SLICES]
        shares = [importance[name] for name in names]
        panels.append(
            Panel(
                [Line("", shares, list(range(len(names))), style=".")],
                "importance of keys (PED-ANOVA)",
                "share",
                y_names=names,
            )
        )
    order = sorted(keys, key=lambda key: -importance.get(key.name, 0.0))
    return panels + [slice_panel(config, key, trials) for key in order[:MOST_SLICES]]


def last_value(trial: FrozenTrial) -> float | None:
    """Return the value of a trial, of one that was pruned its last."""
    return float(trial.values[0]) if trial.values else None


def history_panel(config: SearchConfig, trials: Sequence[FrozenTrial]) -> Panel:
    """Return the value of each trial by its number, and the best so far."""
    lower = config.metric.endswith("loss")
    so_far: list[float] = []
    numbers: list[int] = []
    for trial in trials:
        if is_complete(trial):
            so_far.append((min if lower else max)([value(trial), *so_far[-1:]]))
            numbers.append(trial.number)
    best_line = Line("best so far", numbers, so_far, colour=0)
    return Panel([best_line, *by_state(trials, lambda trial: trial.number)], "trials", "trial", config.metric)


def by_state(trials: Sequence[FrozenTrial], place: Any) -> list[Line]:
    """Return the values of trials over a place each, those that ran to their end and those that were pruned apart."""
    lines = []
    for label, name, colour in (("complete", "COMPLETE", 4), ("pruned, its last", "PRUNED", 6)):
        points = [(place(t), last_value(t)) for t in trials if t.state.name == name and place(t) is not None]
        known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        if known:
            lines.append(Line(label, [x for x, _ in known], [y for _, y in known], style=".", colour=colour))
    return lines


def slice_panel(config: SearchConfig, key: Key, trials: Sequence[FrozenTrial]) -> Panel:
    """Return the value of each trial over one key; choices stand below each other."""

    def of(trial: FrozenTrial) -> Any:
        return trial.user_attrs.get("chosen", {}).get(key.name)

    if key.kind != "choice":
        return Panel(by_state(trials, of), key.name, key.name.split(".")[-1], config.metric, log_x=key.log)

    def row(trial: FrozenTrial) -> int | None:
        return key.choices.index(json.dumps(of(trial))) if key.name in trial.user_attrs.get("chosen", {}) else None

    lines = [Line(line.label, line.y, line.x, style=".", colour=line.colour) for line in by_state(trials, row)]
    return Panel(lines, key.name, config.metric, y_names=[text.strip('"')[:30] for text in key.choices])


# ---- MLflow ---------------------------------------------------------------------------------------------------------


def track(run: tracking.Run, config: SearchConfig, base: Mapping[str, Any], trial: FrozenTrial) -> None:
    """Log a trial that has ended below the search's run, once however often."""
    known = trial.user_attrs
    state = {"COMPLETE": "COMPLETE", "PRUNED": "PRUNED"}.get(trial.state.name, "FAILED")
    tags = {"state": state, "trial": str(trial.number), **({"reason": known["reason"]} if "reason" in known else {})}
    series: list[dict[str, Any]] = [
        {"step": epoch["epoch"], "values": {k: v for k, v in epoch.items() if k not in ("epoch", "step")}}
        for epoch in known.get("epochs", [])
    ]
    if is_complete(trial):
        series.append({"step": known["best_epoch"], "values": {f"best/{config.metric}": value(trial)}})
    run.child(
        f"trial {trial.number}",
        key=f"trial-{trial.number}",
        params={"seed": base["seed"], **known.get("chosen", {})},
        tags=tags,
        series=series,
        began=known.get("began", 0),
        ended=known.get("ended", known.get("began", 0)),
        status="FAILED" if state == "FAILED" else "FINISHED",
    )
