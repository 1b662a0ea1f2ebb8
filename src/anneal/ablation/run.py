"""`anneal ablate`: runs without each technique, or with each alone, and what they show."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from anneal import params, tracking
from anneal.ablation import results
from anneal.ablation.effects import accuracies
from anneal.ablation.outputs import write_outputs
from anneal.ablation.results import Predictions
from anneal.ablation.table import BARE, FULL, Ablation, interactions, label_of, lines, table
from anneal.ablation.techniques import Technique, chosen, possible, techniques_on, without
from anneal.experiments.plan import Experiment, Plan, make_plan, recipe_and_seeds
from anneal.experiments.run import check_jobs, counted, estimate, run_plan, training_seconds
from anneal.metrics import nll
from anneal.params import UserError
from anneal.store import open_store
from anneal.tracking.names import fingerprint

DATA = Path("data/processed")


def command(options: argparse.Namespace) -> None:
    """Run ``anneal ablate`` with the options of its command line, and print what was found."""
    found = run_ablation(
        params.load(),
        options.techniques,
        seeds=options.seeds,
        add=options.add,
        pairs=options.pairs,
        jobs=options.jobs,
        member=options.member,
        dry_run=options.dry_run,
    )
    if found is not None:
        print("\n".join(lines(found)))
        print(f"\nsee {found.folder}/ablation.html, and MLflow's run `study {found.folder.name}`; docs/ablation.md")


def run_ablation(
    values: Mapping[str, Any],
    names: Sequence[str] = (),
    *,
    seeds: int = 3,
    add: bool = False,
    pairs: bool = False,
    jobs: int | None = None,
    member: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Ablation | None:
    """Train what is missing, compare, and write ``studies/ablation/`` and MLflow's runs.

    Parameters
    ----------
    values
        params.yaml.
    names
        Techniques; all that are on where none is named.
    seeds
        Trainings of each variant, the same seeds in all.
    add
        Add each technique to a recipe without any, instead of removing it from the whole.
    pairs
        Train without each pair too.
    jobs
        Experiments at once.
    member
        See `anneal.experiments.plan.recipe_and_seeds`.
    dry_run
        Only say what would be done; None is returned.
    say
        Takes lines for the user.

    Raises
    ------
    UserError
        What `make_plan`, `recipe_and_seeds`, `chosen` and `results.read_all` refuse; the recipe itself cannot be trained.
    """
    recipe, members = recipe_and_seeds(values, seeds, member)
    on = techniques_on({**recipe, "ensemble": {**recipe["ensemble"], "members": members}})
    if "ensemble" in names and seeds == 1:
        raise UserError("ensemble: found with --seeds 1, allowed: 2 seeds or more, which are its members")
    techniques = chosen(on, names)
    if not techniques:
        raise UserError("ablate: no technique is on in this recipe, so that there is nothing to remove")
    if pairs and add:
        raise UserError("--pairs: found with --add, allowed: one of the two")
    at_once = check_jobs(jobs, values)
    wanted = variants(recipe, on, techniques, add=add, pairs=pairs)
    found, refused = possible(wanted, partial(check, num_train=num_train(recipe)))
    for label in (FULL, BARE) if add else (FULL,):
        if label in refused:
            raise UserError(f"ablate: the {label} cannot be trained: {refused[label]}")
    for label, reason in refused.items():
        say(f"left out: {label}: {reason}")
    plan = make_plan(found, members, kept=values, jobs=at_once)
    say(estimate(plan, at_once, training_seconds(values) if plan.trainings else 0.0))
    whole = missing_on_test(values)
    further = sorted(set(whole.members) - whole.cached - set(members)) if whole else []
    if further:
        said = counted(len(further), "member")
        say(f"and {said} of the recipe's own ensemble to train, {', '.join(further)}, for its figure on test")
    if dry_run:
        for experiment in plan.todo:
            say(f"  {experiment.variant}: {experiment.trainings} to train, seeds of {', '.join(experiment.keys)}")
        return None
    failed = run_plan(plan, values, jobs=at_once, title="ablate")
    if FULL in failed or (add and BARE in failed):
        raise UserError(f"ablate: {failed.get(FULL) or failed.get(BARE)}")
    predictions = results.read_all(plan, failed)
    rows = table(predictions, on, techniques, failed | refused, add=add)
    ablation = Ablation(
        recipe,
        plan.seeds,
        add,
        rows,
        interactions(predictions, techniques) if pairs else {},
        len(predictions[FULL].labels),
        None,
        typed(names, seeds=seeds, add=add, pairs=pairs, member=member),
    )
    ablation = replace(ablation, test=on_test(values, whole, at_once))
    write_outputs(ablation)
    track(ablation, plan, found, predictions)
    return ablation


def variants(
    recipe: Mapping[str, Any],
    on: Mapping[str, Technique],
    techniques: Mapping[str, Technique],
    *,
    add: bool,
    pairs: bool,
) -> dict[str, dict[str, Any]]:
    """Return label to whole params of all that is to be trained; see `label_of`."""
    found = {FULL: dict(recipe)}
    trained = [technique for technique in techniques.values() if technique.trains]
    if add:
        found[BARE] = without(recipe, on.values())
        for technique in trained:
            found[label_of(technique, add=True)] = without(
                recipe, [other for other in on.values() if other.name != technique.name]
            )
        return found
    for technique in trained:
        found[label_of(technique)] = without(recipe, [technique])
    if pairs:
        for pair in combinations(trained, 2):
            found[label_of(*pair)] = without(recipe, pair)
    return found


def check(values: Mapping[str, Any], *, num_train: int) -> None:
    """Check a variant as `anneal check` would.

    Raises
    ------
    ParamsError
        It cannot be trained.
    """
    from anneal.conflicts import check_recipe
    from anneal.recipe import validate
    from anneal.training.sections import SECTIONS

    checked = validate(values)
    check_recipe(num_train=num_train, **{name: getattr(checked, name) for name in (*SECTIONS, "preprocess")})


def num_train(values: Mapping[str, Any]) -> int:
    """Return the images of the training split, by data/processed, else by the data."""
    try:
        return open_store(DATA).info.counts["train"]
    except UserError:
        from anneal.preprocess import planned_classes
        from anneal.sources import open_source

        source = open_source(values["data"]["path"], values["data"]["format"])
        split = values["split"]
        planned = planned_classes(source, val=split["val"], test=split["test"], limit=values["data"]["limit"])
        return sum(planned["train"].values())


def missing_on_test(values: Mapping[str, Any]) -> Experiment | None:
    """Return what gives the recipe's figures on ``test``; None where they are there, or the recipe is not for test."""
    if "test" not in values["evaluate"]["splits"] or results.recorded(values) is not None:
        return None
    whole = results.whole_recipe(values)
    return whole if results.kept_metrics(whole) is None else None


def on_test(values: Mapping[str, Any], missing: Experiment | None, jobs: int) -> tuple[float, float, float] | None:
    """Return the recipe's accuracy on ``test`` with its interval: what there is of it, else evaluated once."""
    if "test" not in values["evaluate"]["splits"]:
        return None
    if missing is not None:
        run_plan(Plan({}, {}, [missing]), values, jobs=jobs, title="ablate, the recipe on test")
    metrics = results.recorded(values) or results.kept_metrics(results.whole_recipe(values))
    figures = (metrics or {}).get("test", {}).get("ensemble_tta")
    return (figures["accuracy"], *figures["accuracy_ci"]) if figures else None


# ---- words and MLflow -----------------------------------------------------------------------------------------------


def typed(names: Sequence[str], *, seeds: int, add: bool, pairs: bool, member: str | None) -> str:
    """Return what gives this ablation again.

    >>> typed(["momentum"], seeds=3, add=False, pairs=True, member=None)
    'anneal ablate momentum --seeds 3 --pairs'
    """
    words = ["anneal", "ablate", *names, "--seeds", str(seeds)]
    words += ["--add"] if add else []
    words += ["--pairs"] if pairs else []
    return shlex.join([*words, *(["--member", member] if member else [])])


def track(
    ablation: Ablation,
    plan: Plan,
    found: Mapping[str, Mapping[str, Any]],
    predictions: Mapping[str, Predictions],
) -> None:
    """Log a parent run with the table and the page, and a child run a variant and seed."""
    name = ablation.folder.name
    key = hashlib.sha256(json.dumps([name, plan.keys], sort_keys=True).encode()).hexdigest()[:32]
    with tracking.study_run(ablation.values, name, key=key) as run:
        track_children(run, plan, found, predictions, ablation.values)
        for file in sorted(ablation.folder.glob("ablation.*")):
            run.artifact(file)
        shown = [one for one in ablation.rows if one.effect and one.effect.verdict != "no difference shown"]
        run.metrics(
            {
                "ablation/techniques": float(sum(one.effect is not None for one in ablation.rows)),
                "ablation/differences_shown": float(len(shown)),
                "val/accuracy": fmean(ablation.rows[0].accuracies),
            }
        )
        said = "\n".join(f"- {line}" for line in lines(ablation))
        run.describe(f"**What each technique earns**\n\n`{ablation.command}`, validation split\n\n{said}")


def track_children(
    run: tracking.Run,
    plan: Plan,
    found: Mapping[str, Mapping[str, Any]],
    predictions: Mapping[str, Predictions],
    recipe: Mapping[str, Any],
) -> None:
    """Log a run a variant and seed, with the params that differ from the recipe's, and a tag that leads to the recipe's run."""
    import numpy as np

    flat = params.flatten(recipe)
    links = {}
    try:
        links = {"recipe.fingerprint": fingerprint(recipe, open_store(DATA).info.digest)}
    except UserError:  # the workspace has no data set now
        pass
    for variant, of in predictions.items():
        changed = {k: v for k, v in params.flatten(found[variant]).items() if flat.get(k) != v}
        for i, (member, seed) in enumerate(plan.seeds.items()):
            log_probabilities = of.tta[i]
            figures = {
                "val/accuracy": float(accuracies(of.tta[i : i + 1], of.labels)[0]),
                "val/single/accuracy": float(accuracies(of.plain[i : i + 1], of.labels)[0]),
                "val/nll": nll(np.exp(log_probabilities.astype(np.float64)), of.labels),
            }
            known = of.runs[i]
            run.child(
                f"{variant} · seed {seed}",
                key=plan.keys[variant][member],
                params={"seed": seed, **changed},
                tags={"variant": variant, "DVC_EXP_NAME": str(known.get("name", "")), **links},
                series=[{"step": 0, "values": figures}],
                began=int(known.get("began", 0)),
                ended=int(known.get("ended", 0)),
            )
