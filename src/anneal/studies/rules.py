"""Studies of the rule of a step: `schedule`, `momentum`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anneal.reporting.lines import Panel
from anneal.studies.base import rate_of
from anneal.studies.rates import outcome
from anneal.studies.study import (
    Point,
    Results,
    Study,
    against,
    best_rate,
    by_seed,
    compared,
    differs,
    edge,
    grouped,
    over_epochs,
    over_steps,
    rate_text,
    stated,
    where,
    without_band,
)

# ---- schedule -------------------------------------------------------------------------------------------------------

SCHEDULES = (
    "constant",
    "step",
    "exponential",
    "inverse_sqrt",
    "linear",
    "cosine",
    "cosine_restarts",
    "one_cycle",
    "trapezoid",
    "plateau",
)
PEAKS = (1.0, 3.0, 6.0)
"""Multiples of the recipe's rate: a schedule that decays may want a higher peak than one that does not."""

COLOURED = 7
"""Lines that the palette tells apart; those beyond them are dashed."""


def schedule_grid(recipe: Mapping[str, Any], _num_train: int) -> list[Point]:
    """Return each schedule at each peak rate."""
    name, rate = recipe["optimizer"]["name"], rate_of(recipe)
    return [
        Point(
            f"{schedule} peak {rate_text(rate * m)}",
            {"schedule": {"name": schedule}, "optimizer": {name: {"lr": rate * m}}},
            {"schedule": schedule, "lr": rate * m},
        )
        for schedule in SCHEDULES
        for m in PEAKS
    ]


def draw_schedule(results: Results) -> list[Panel]:
    """Draw the rates, the validation curves at each schedule's best peak, and the last loss against the peak."""
    ceiling = 1.5 * math.log(results[0].num_classes)
    groups = grouped(results, "schedule")
    middle = sorted({r.at["lr"] for r in results})[len(PEAKS) // 2]
    styles = ["-" if i < COLOURED else "--" for i in range(len(groups))]
    shown = list(zip(groups.items(), styles, strict=True))
    return [
        Panel(
            [over_steps(where(group, lr=middle)[:1], name, column=1, style=style) for (name, group), style in shown],
            f"learning rate, peak {rate_text(middle)}",
            "optimizer steps",
            "rate",
        ),
        Panel(
            [
                without_band(
                    over_epochs(where(group, lr=best_rate(group)), "val/loss", name, style=style, ceiling=ceiling)
                )
                for (name, group), style in shown
            ],
            "validation loss at its best peak, mean",
            "epoch",
            "loss",
            log_y=True,
        ),
        Panel(
            [
                without_band(
                    against(group, "lr", lambda r: r.final("val/loss"), name, style="." + style, ceiling=ceiling)
                )
                for (name, group), style in shown
            ],
            "validation loss of the last epoch, mean",
            "peak learning rate",
            "loss",
            log_x=True,
            log_y=True,
        ),
    ]


def conclude_schedule(results: Results) -> list[str]:
    """Say what each schedule reached at its best peak, and against a constant rate."""
    groups = grouped(results, "schedule")
    best = {name: where(group, lr=best_rate(group)) for name, group in groups.items()}
    lines = [
        f"{name}: best peak {rate_text(best_rate(groups[name]))}{edge(groups[name])}, validation loss "
        f"{stated([r.final('val/loss') for r in runs])}, accuracy {stated([r.final('val/accuracy') for r in runs])}"
        for name, runs in best.items()
    ]
    for name, runs in best.items():
        if name != "constant":
            text = differs(by_seed(runs), by_seed(best["constant"]))
            lines.append(f"validation loss, {name} against constant, each at its best peak: {text}")
    highest = max(r.at["lr"] for r in results)
    steady = where(groups["constant"], lr=highest)
    lines.append(f"constant at peak {rate_text(highest)}: validation loss {stated([*by_seed(steady).values()])}")
    for name, group in groups.items():
        if name != "constant":
            runs = where(group, lr=highest)
            text = differs(by_seed(runs), by_seed(steady))
            figures = stated([*by_seed(runs).values()])
            lines.append(f"{name} at peak {rate_text(highest)}: validation loss {figures}, against constant: {text}")
    return lines


SCHEDULE = Study(
    "schedule",
    "What does a schedule gain at equal epochs, and which one?",
    schedule_grid,
    draw_schedule,
    conclude_schedule,
    base={
        "trainer": {"epochs": 12},
        "schedule": {
            "warmup": {"length": 0.05, "start": 0.01, "shape": "linear"},
            "step": {"every": 0.3, "gamma": 0.1},
            "exponential": {"every": 0.2, "gamma": 0.316},
            "inverse_sqrt": {"timescale": 0.02},
            "cosine_restarts": {"cycle": 0.143, "multiplier": 2.0, "decay": 1.0},
            "one_cycle": {"rise": 0.3, "start": 0.04, "end": 0.0, "shape": "cosine", "momentum": [0.95, 0.85]},
            "trapezoid": {"decay": 0.2, "shape": "linear"},
            "plateau": {"patience": 2, "cooldown": 1, "gamma": 0.2, "min_delta": 0.001},
        },
    },
)


# ---- momentum -------------------------------------------------------------------------------------------------------

MOMENTA: dict[str, tuple[float, bool]] = {
    "0": (0.0, False),
    "0.5": (0.5, False),
    "0.9": (0.9, False),
    "0.9 Nesterov": (0.9, True),
    "0.99": (0.99, False),
}
FIXED, MATCHED = "rate fixed", "rate matched"


def momentum_grid(recipe: Mapping[str, Any], _num_train: int) -> list[Point]:
    """Return each momentum at the recipe's rate, and at the rate that keeps lr / (1 - momentum) as the recipe has it."""
    rate = rate_of(recipe, "SGD")
    reach = rate / (1 - recipe["optimizer"]["SGD"].get("momentum", 0.0))
    points = []
    for words in (FIXED, MATCHED):
        for label, (momentum, nesterov) in MOMENTA.items():
            lr = rate if words == FIXED else float(f"{reach * (1 - momentum):.6g}")
            block = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "dampening": 0.0}
            points.append(
                Point(
                    f"momentum {label} {words}",
                    {"optimizer": {"name": "SGD", "SGD": block}},
                    {"momentum": label, "rate": words, "lr": lr},
                )
            )
    return points


def draw_momentum(results: Results) -> list[Panel]:
    """Draw the training curves with the rate fixed and matched, and with it matched the validation curves."""
    ceiling = 1.5 * math.log(results[0].num_classes)
    groups = {rate: grouped(group, "momentum") for rate, group in grouped(results, "rate").items()}
    panels = [
        Panel(
            [
                over_steps(
                    some,
                    f"{m}, rate {rate_text(some[0].at['lr'])}",
                    style="--" if "Nesterov" in m else "-",
                    ceiling=ceiling,
                )
                for m, some in runs.items()
            ],
            f"training loss, {rate}",
            "optimizer steps",
            "loss",
            log_y=True,
        )
        for rate, runs in groups.items()
    ]
    lines = [
        over_epochs(some, "val/loss", m, style="--" if "Nesterov" in m else "-", ceiling=ceiling)
        for m, some in groups[MATCHED].items()
    ]
    return [*panels, Panel(lines, f"validation loss, {MATCHED}", "epoch", "loss", log_y=True)]


def conclude_momentum(results: Results) -> list[str]:
    """Say what each momentum reached, and against none."""
    lines = []
    for rate, group in grouped(results, "rate").items():
        runs = grouped(group, "momentum")
        for label, some in runs.items():
            lines.append(f"{rate}, momentum {label}, rate {rate_text(some[0].at['lr'])}: {outcome(some)}")
        for label in list(runs)[1:]:
            lines.append(f"{rate}: momentum {label} against 0: {compared(runs[label], runs['0'])}")
        lines.append(f"{rate}: 0.9 with Nesterov against without: {compared(runs['0.9 Nesterov'], runs['0.9'])}")
    return lines


MOMENTUM = Study(
    "momentum",
    "What does momentum do beyond making the step longer?",
    momentum_grid,
    draw_momentum,
    conclude_momentum,
)
