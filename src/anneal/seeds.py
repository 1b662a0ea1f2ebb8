"""`anneal seeds`: a recipe over n seeds, and whether a change of it is real."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from anneal import params, tracking
from anneal.ablation import results
from anneal.ablation.effects import MOST_SEEDS, Effect, accuracies, effect, points, seeds_needed, t_interval
from anneal.ablation.run import check, num_train, track_children
from anneal.ablation.techniques import possible
from anneal.experiments.plan import decisive, make_plan, recipe_and_seeds
from anneal.experiments.run import check_jobs, estimate, run_plan, training_seconds
from anneal.params import UserError, nearest
from anneal.significance import p_value
from anneal.store import write_json

RECIPE, CHANGED = "recipe", "changed"
"""Labels of the two variants."""

APART = {
    "seed": "the seeds are what this command varies",
    "data.path": "the two would be judged on other images",
    "split": "the two would be judged on other images",
    "ensemble": "each seed is a network of its own",
    "evaluate.splits": "the two are judged on val",
    "registry": "it changes no result",
    "hardware": "it changes no result",
    "tracking": "it changes no result",
    "search": "it changes no result",
}
"""Keys that may not be changed, and why."""


@dataclass(frozen=True)
class Seeds:
    """What n seeds showed.

    Parameters
    ----------
    seeds
        In order.
    recipe, changed
        Accuracy on ``val`` by seed; ``changed`` is empty where nothing was changed.
    change
        Dotted key to its new value.
    effect
        What the change brings.
    """

    seeds: Sequence[int]
    recipe: Sequence[float]
    changed: Sequence[float]
    change: Mapping[str, Any]
    effect: Effect | None


def command(options: argparse.Namespace) -> None:
    """Run ``anneal seeds`` with the options of its command line, and print what was found."""
    found = run_seeds(
        params.load(),
        options.number,
        options.changes,
        jobs=options.jobs,
        member=options.member,
        dry_run=options.dry_run,
    )
    if found is not None:
        print("\n".join(lines(found)))
        print("\nsee studies/seeds/seeds.json, and MLflow's run `study seeds`; docs/seeds.md")


def run_seeds(
    values: Mapping[str, Any],
    count: int,
    changes: Sequence[str] = (),
    *,
    jobs: int | None = None,
    member: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Seeds | None:
    """Train n seeds of the recipe, and of a changed one, as far as they are missing; compare, and log to MLflow.

    Parameters
    ----------
    values
        params.yaml.
    count
        Number of seeds.
    changes
        ``KEY=VALUE``, the value as params.yaml would have it.
    jobs, member, dry_run, say
        As for `anneal.ablation.run.run_ablation`.

    Raises
    ------
    UserError
        A change of no key, or of one in `APART`; what `make_plan` and `recipe_and_seeds` refuse; a recipe that cannot be
        trained, or whose training failed.
    """
    recipe, members = recipe_and_seeds(values, count, member)
    change = dict(parse_change(text, recipe) for text in changes)
    wanted = {RECIPE: recipe, **({CHANGED: with_changes(recipe, change)} if change else {})}
    if change and wanted[CHANGED] == recipe:
        raise UserError(f"{changes[0]}: this is what the recipe says already, allowed: another value")
    if change and decisive(wanted[CHANGED]) == decisive(recipe):
        raise UserError(
            f"{changes[0]}: accuracy on val does not depend on it, allowed: what changes a training, or evaluate.tta.views"
        )
    found, refused = possible(wanted, partial(check, num_train=num_train(recipe)))
    for label, reason in refused.items():
        raise UserError(reason if label == RECIPE else f"with {' '.join(changes)}: {reason}")
    at_once = check_jobs(jobs, values)
    plan = make_plan(found, members, kept=values, jobs=at_once)
    say(estimate(plan, at_once, training_seconds(values) if plan.trainings else 0.0))
    if dry_run:
        return None
    failed = run_plan(plan, values, jobs=at_once, title="seeds")
    for label, reason in failed.items():
        raise UserError(f"the {label} {'recipe ' if label == CHANGED else ''}could not be trained: {reason}")
    predictions = results.read_all(plan, failed)
    labels = predictions[RECIPE].labels
    shown = effect(predictions[RECIPE].tta, predictions[CHANGED].tta, labels) if change else None
    of = {label: [float(x) for x in accuracies(each.tta, labels)] for label, each in predictions.items()}
    result = Seeds(list(plan.seeds.values()), of[RECIPE], of.get(CHANGED, []), change, shown)
    key = hashlib.sha256(json.dumps(["seeds", plan.keys], sort_keys=True).encode()).hexdigest()[:32]
    folder = Path("studies/seeds")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "seeds.json", as_json(result))
    with tracking.study_run(recipe, "seeds", key=key) as run:
        track_children(run, plan, found, predictions, recipe)
        run.artifact(folder / "seeds.json")
        run.metrics({f"val/accuracy/{label}": fmean(each) for label, each in of.items()})
        run.describe(
            "\n".join(["**Is the change real?**" if change else "**The spread over seeds**", "", *lines(result)])
        )
    return result


# ---- changes --------------------------------------------------------------------------------------------------------


def parse_change(text: str, recipe: Mapping[str, Any]) -> tuple[str, Any]:
    """Return key and value of ``KEY=VALUE``.

    >>> parse_change("a.b=[1, x]", {"a": {"b": None}})
    ('a.b', [1, 'x'])

    Raises
    ------
    UserError
        No ``=``, a value that is no YAML, a key that the recipe does not have or that may not be changed.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(
            f"{text!r}: found no KEY=VALUE, allowed: a key of params.yaml and its value, as in trainer.epochs=20"
        )
    for name, reason in APART.items():
        if key == name or key.startswith(f"{name}."):
            raise UserError(f"{key}: may not be changed here: {reason}")
    missing = object()
    node: Any = recipe
    for part in key.split("."):
        node = node.get(part, missing) if isinstance(node, Mapping) else missing
    if node is missing:
        known = [name for name in every_key(recipe) if name.split(".")[0] not in APART]
        raise UserError(f"{key}: params.yaml has no such key{nearest(key, known)}")
    try:
        return key, YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        raise UserError(f"{key}: found {value!r}, allowed: a value as params.yaml would have it") from None


def every_key(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return all dotted keys, those of mappings too.

    >>> every_key({"a": {"b": 1}})
    ['a', 'a.b']
    """
    found = []
    for key, value in values.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            found += every_key(value, f"{prefix}{key}.")
    return found


def with_changes(recipe: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with values changed; a mapping merges key by key.

    >>> with_changes({"a": {"b": 1, "c": 2}}, {"a.b": 3})
    {'a': {'b': 3, 'c': 2}}
    """
    found = dict(recipe)
    for key, value in change.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        found = params.merge(found, nested)
    return found


# ---- words ----------------------------------------------------------------------------------------------------------


def lines(found: Seeds) -> list[str]:
    """Return what the seeds showed: a line a recipe, then whether the change is real."""
    said = [_spread("recipe", found.recipe)]
    if found.effect is None:
        return said
    changed = ", ".join(f"{key}={_text(value)}" for key, value in found.change.items())
    said.append(_spread(changed, found.changed))
    return [*said, conclusion(found.effect)]


def _spread(label: str, values: Sequence[float]) -> str:
    text = f"{label}: accuracy {fmean(values):.4f}"
    interval = t_interval(values)
    if interval is None:
        return f"{text} (one seed: its spread is not known)"
    return (
        f"{text}, standard deviation {stdev(values):.4f} over {len(values)} seeds "
        f"(95 % interval of the mean {interval[0]:.4f} to {interval[1]:.4f})"
    )


def conclusion(found: Effect) -> str:
    """Say whether a change is real, with its intervals, and where it is not shown, how many seeds would show it.

    >>> same = Effect(0.001, 3, 0.002, -0.004, 0.006, 500, -0.003, 0.005, 0.5, "no difference shown")
    >>> conclusion(same)  # doctest: +ELLIPSIS
    'no difference shown with 3 seeds: +0.10 points (-0.40 to +0.60 over seeds, -0.30 to +0.50 over 500 images, ...
    """
    evidence = []
    if found.seeds_low is not None and found.seeds_high is not None:
        evidence.append(f"{points(found.seeds_low)} to {points(found.seeds_high)} over seeds")
    if found.images_low is not None and found.images_high is not None:
        evidence.append(f"{points(found.images_low)} to {points(found.images_high)} over {found.images:,} images")
    if found.p is not None:
        evidence.append(f"McNemar {p_value(found.p)}")
    figures = f"{points(found.difference)} points ({', '.join(evidence)})"
    count = f"{found.seeds} seed{'s' * (found.seeds > 1)}"
    if found.verdict != "no difference shown":
        if found.seeds == 1:
            return (
                f"of these two networks the changed one is {found.verdict}: {figures}; one seed says nothing of other "
                f"trainings"
            )
        return f"the change is real, and {found.verdict}: {figures}"
    said = f"no difference shown with {count}: {figures}"
    if found.spread is None:
        return f"{said}; more seeds would tell, and how many shows from 2 on"
    if not found.difference:
        return f"{said}; there is none to see"
    needed = seeds_needed(found.difference, max(found.spread, 1 / found.images))
    if needed is None or needed > found.seeds:
        many = f"more than {MOST_SEEDS:,}" if needed is None else f"about {needed}"
        return f"{said}; {many} seeds would be needed to see a difference of this size"
    if images := images_needed(found):
        return f"{said}; it is the validation split that is too small: about {images:,} images would be needed"
    return said


def images_needed(found: Effect) -> int | None:
    """Return about how many validation images would show a difference of this size; the interval shrinks with their root.

    None where those at hand do, or there is no difference.
    """
    if not found.difference or found.images_low is None or found.images_high is None:
        return None
    half = (found.images_high - found.images_low) / 2
    if half < abs(found.difference):
        return None
    return math.ceil(found.images * (half / abs(found.difference)) ** 2 * ((1.96 + 0.84) / 1.96) ** 2)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def as_json(found: Seeds) -> dict[str, Any]:
    """Return all figures as plain values."""
    return {
        "split": "val",
        "seeds": list(found.seeds),
        "change": dict(found.change),
        "recipe": list(found.recipe),
        "changed": list(found.changed),
        "effect": None if found.effect is None else found.effect.as_dict(),
        "lines": lines(found),
    }
