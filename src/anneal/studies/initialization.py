"""Study of the first weights: `init`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anneal.reporting.heat_maps import HeatMap
from anneal.reporting.lines import Panel
from anneal.studies.base import dense
from anneal.studies.study import (
    Point,
    Results,
    Study,
    accuracy_map,
    by_seed,
    differs,
    grouped,
    learned,
    mean_of,
    over_steps,
    stated,
    where,
)

SCHEMES = ("zeros", "constant", "normal", "uniform", "xavier_normal", "kaiming_normal", "orthogonal", "lsuv")
ACTIVATIONS = ("ReLU", "Tanh")

DEPTHS = (2, 6, 12, 20)
"""Hidden layers."""

WIDTH = 64

SHOWN = 6
"""Depth whose curves are drawn."""

IN_PART = 0.9
"""A network learned in part where its training loss is at most this share of a guess's, but not at most half of it."""

COLOURED = 7
"""Lines that the palette tells apart; those beyond them are dashed."""


def init_grid(recipe: Mapping[str, Any], _num_train: int) -> list[Point]:
    """Return each scheme at each depth and activation, dense layers without normalisation."""
    points = []
    for activation in ACTIVATIONS:
        for scheme in SCHEMES:
            for depth in DEPTHS:
                overrides = dense(recipe, [WIDTH] * depth)
                overrides["model"] |= {"activation": activation, "norm": {"name": "none"}}
                overrides["init"] = overrides.get("init", {}) | {"name": scheme}
                at = {"activation": activation, "scheme": scheme, "depth": depth}
                points.append(Point(f"{activation} {scheme} {depth} layers", overrides, at))
    return points


def how_far(group: Results) -> str:
    """Say in a word how far the runs of a point came, by their number: ``learned``, ``in part`` or ``not at all``.

    Learned is a training loss of at most half a guess's, in part one of at most nine tenths of it, in the last epoch.
    """
    counts = {"learned": sum(map(learned, group)), "in part": sum(learned(r, IN_PART) for r in group)}
    counts["in part"] -= counts["learned"]
    counts["not at all"] = len(group) - sum(counts.values())
    return ", ".join(f"{word} {count} of {len(group)}" for word, count in counts.items() if count)


def draw_init(results: Results) -> list[Panel | HeatMap]:
    """Draw for each activation what was learned, by scheme and depth, and the training curves at one depth."""
    ceiling = 1.5 * math.log(results[0].num_classes)
    groups = grouped(results, "activation")
    maps: list[Panel | HeatMap] = [
        accuracy_map(
            group, "scheme", "depth", f"{activation}: training accuracy", "hidden layers; bold: every run learned"
        )
        for activation, group in groups.items()
    ]
    curves = [
        over_steps(some, scheme, style="-" if i < COLOURED else "--", ceiling=ceiling)
        for i, (scheme, some) in enumerate(grouped(where(groups["ReLU"], depth=SHOWN), "scheme").items())
    ]
    return [*maps, Panel(curves, f"ReLU, {SHOWN} hidden layers: training loss", "optimizer steps", "loss", log_y=True)]


def conclude_init(results: Results) -> list[str]:
    """Say which networks learned, the deepest of each scheme, and at each depth which scheme ended lower."""
    guess = math.log(results[0].num_classes)
    lines = [
        f"learned: training loss of the last epoch at most {0.5 * guess:.2f}, half a guess's; in part: at most "
        f"{IN_PART * guess:.2f}; not at all: above it"
    ]
    for activation, group in grouped(results, "activation").items():
        for scheme, some in grouped(group, "scheme").items():
            depths = grouped(some, "depth")
            every = [depth for depth, runs in depths.items() if all(map(learned, runs))]
            lines.append(
                f"{activation}, {scheme}: "
                + (
                    f"learned in every run with up to {max(every)} layers"
                    if every
                    else "learned in every run at no depth"
                )
                + "; "
                + "; ".join(
                    f"{depth} layers: {how_far(runs)}, training loss {stated([r.final('train/loss') for r in runs])}"
                    for depth, runs in depths.items()
                )
            )
        for depth, some in grouped(group, "depth").items():
            schemes = {name: runs for name, runs in grouped(some, "scheme").items() if any(map(learned, runs))}
            order = sorted(schemes, key=lambda name: mean_of(schemes[name], "train/loss"))
            for name in order[1:]:
                text = differs(by_seed(schemes[name], "train/loss"), by_seed(schemes[order[0]], "train/loss"))
                lines.append(f"{activation}, {depth} layers: training loss, {name} against {order[0]}: {text}")
    return lines


INIT = Study(
    "init",
    "Which networks learn at all, by their first weights and their depth?",
    init_grid,
    draw_init,
    conclude_init,
    base={
        "model": {"name": "mlp"},
        "trainer": {"epochs": 6},
        # A deep network without normalisation wants a lower rate than a shallow one.
        "optimizer": {"SGD": {"lr": 0.01}},
        "init": {
            "constant": {"value": 0.01},
            "normal": {"std": 0.01},
            "uniform": {"limit": 0.05},
            "xavier_normal": {"gain": 1.0},
            "orthogonal": {"gain": "auto"},
            "lsuv": {"tolerance": 0.01, "max_iterations": 10},
        },
    },
)
