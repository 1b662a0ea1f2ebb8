"""What experiments gave, read back: each variant's predictions over seeds, and the recipe's figures on test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anneal import params, tracking
from anneal.experiments.plan import (
    CODE,
    RESULTS,
    Experiment,
    Inputs,
    Plan,
    RunCache,
    cache_folder,
    experiment_name,
    hashes,
    hexadecimal,
    result_files,
)
from anneal.metrics import Floats, Integers
from anneal.params import UserError
from anneal.tracking.names import at


@dataclass(frozen=True)
class Predictions:
    """What a variant's networks say of ``val``.

    Parameters
    ----------
    plain, tta
        Log-probabilities, float32 (M, N, K), of M seeds: of the images alone, and over the recipe's views.
    labels
        int64 (N,).
    images
        A hash of the images' names, which say whether two variants can be compared image by image.
    runs
        By seed: name of the DVC experiment, began and ended in milliseconds since 1970.
    """

    plain: Floats
    tta: Floats
    labels: Integers
    images: str
    runs: Sequence[Mapping[str, Any]]

    def of(self, views: bool) -> Floats:
        """Return the predictions with or without views."""
        return self.tta if views else self.plain


def read(plan: Plan, variant: str) -> Predictions:
    """Read a variant's predictions, all seeds.

    Raises
    ------
    UserError
        One is missing or damaged.
    """
    arrays: list[dict[str, Any]] = []
    runs = []
    for key in plan.keys[variant].values():
        path, beside = result_files(key)
        try:
            with np.load(path, allow_pickle=False) as found:
                arrays.append({name: found[name] for name in ("plain", "tta", "labels", "images")})
            runs.append(json.loads(beside.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, EOFError):
            for damaged in (path, beside):
                damaged.unlink(missing_ok=True)
            raise UserError(f"{path}: damaged, and removed; run the same command again") from None
    return Predictions(
        np.stack([each["plain"] for each in arrays]),
        np.stack([each["tta"] for each in arrays]),
        arrays[0]["labels"],
        str(arrays[0]["images"]),
        runs,
    )


def read_all(plan: Plan, failed: Mapping[str, str]) -> dict[str, Predictions]:
    """Read every variant that did not fail.

    Raises
    ------
    UserError
        A result is damaged, or variants were judged on other images than the first.
    """
    found = {variant: read(plan, variant) for variant in plan.keys if variant not in failed}
    if len({each.images for each in found.values()}) > 1:
        raise UserError("val: its images differ between the variants, allowed: changes that leave the split as it is")
    return found


# ---- the recipe itself, on test -------------------------------------------------------------------------------------


def recorded(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return reports/metrics.json where dvc.lock says that it is of this recipe, code and data; else None."""
    inputs = Inputs(Path.cwd())
    made: dict[str, str | None] = {name: tracking.dvc_hash(name) for name in ("models", "reports/metrics.json")}
    try:
        lock = params.read_yaml("dvc.lock")["stages"]
        metrics = json.loads(Path("reports/metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError):
        return None
    for stage in CODE:
        for member in values["ensemble"]["members"] if stage == "train" else [""]:
            entry = lock.get(f"train@{member}" if member else stage, {})
            names = [name.replace("${key}", member) for name in inputs.stages[stage].get("params", [])]
            read_then = entry.get("params", {}).get("params.yaml", {})
            if read_then != {name: at(values, *name.split(".")) for name in names}:
                return None
            deps, outs = inputs.deps(stage, values, member), hashes(entry, "outs")
            if hashes(entry, "deps") != {path: md5 or made.get(path) for path, md5 in deps.items()}:
                return None
            if stage == "train":
                made[f"models/{member}"] = tracking.dvc_hash(f"models/{member}")
            if any(made.get(path, md5) != md5 for path, md5 in outs.items()):
                return None
            made |= outs
    return dict(metrics)


def whole_recipe(values: Mapping[str, Any]) -> Experiment:
    """Return the recipe as it is, as an experiment: for its figures on test, in a workspace that has none."""
    inputs = Inputs(Path.cwd())
    cache = RunCache(cache_folder(Path.cwd()), inputs)
    members = values["ensemble"]["members"]
    apart = {key: value for key, value in values.items() if key not in params.UNTRACKED}
    own = {"": hexadecimal([apart, inputs.digest(values)])}
    held = frozenset(name for name in members if cache.holds(values, name))
    return Experiment(experiment_name("recipe", own), "recipe", values, {}, held, tuple(members))


def kept_metrics(experiment: Experiment) -> dict[str, Any] | None:
    """Return the metrics.json of an experiment that has ended."""
    with suppress(OSError, ValueError):
        return dict(json.loads((RESULTS / f"{experiment.name}.metrics.json").read_text(encoding="utf-8")))
    return None
