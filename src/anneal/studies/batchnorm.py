"""Study of normalisation between the layers: `batchnorm`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from anneal.reporting.heat_maps import HeatMap
from anneal.reporting.lines import Panel
from anneal.studies.base import rate_of
from anneal.studies.study import (
    Point,
    Result,
    Results,
    Study,
    accuracy_map,
    against,
    by_seed,
    differs,
    grouped,
    learned,
    mean_of,
    rate_text,
    stated,
)

NORMS = {"none": "no normalisation", "batch": "BatchNorm", "group": "GroupNorm"}

MULTIPLES = tuple(10 ** (i / 2) for i in range(-3, 4))
"""Of the recipe's rate: a decade and a half down and up, by half decades."""

STDS = tuple(10 ** (i / 2) for i in range(0, -5, -1))
"""Standard deviations of the first weights, half decades apart."""

STD = "std of the first weights"

DECADES = 0.5
"""Between two rates, and between two standard deviations."""


def batchnorm_grid(recipe: Mapping[str, Any], _num_train: int) -> list[Point]:
    """Return each norm at each rate and each standard deviation of the first weights."""
    optimizer, rate = recipe["optimizer"]["name"], rate_of(recipe)
    points = []
    for norm, words in NORMS.items():
        for std in (float(f"{std:.3g}") for std in STDS):
            for lr in (float(f"{rate * multiple:.3g}") for multiple in MULTIPLES):
                overrides = {
                    "model": {"norm": {"name": norm}},
                    "init": {"name": "normal", "normal": {"std": std}},
                    "optimizer": {optimizer: {"lr": lr}},
                }
                at = {"norm": words, "std": std, "lr": lr}
                label = f"{words} std {rate_text(std)} lr {rate_text(lr)}"
                # Groups may not divide the channels of another network.
                points.append(Point(label, overrides, at, optional=norm == "group"))
    return points


def decades(results: Results) -> dict[int, float]:
    """Return by seed over how many decades the runs learned: half a decade for each, of rate or of first weights."""
    return {seed: DECADES * sum(map(learned, runs)) for seed, runs in seeds_of(results).items()}


def seeds_of(results: Results) -> dict[int, list[Result]]:
    """Return results by seed."""
    groups: dict[int, list[Result]] = {}
    for result in results:
        groups.setdefault(result.seed, []).append(result)
    return groups


def mean_decades(results: Results, over: str) -> dict[int, float]:
    """Return by seed the mean of `decades` over the values of a coordinate."""
    widths = [decades(group) for group in grouped(results, over).values()]
    return {seed: fmean(width[seed] for width in widths) for seed in seeds_of(results)}


def beyond(results: Results) -> str:
    """Say where a run learned at the lowest or the highest rate tried, so that the range may be wider than it was seen."""
    rates = [float(result.at["lr"]) for result in results if learned(result)]
    every = [float(result.at["lr"]) for result in results]
    ends = [word for word, end in (("lowest", min(every)), ("highest", max(every))) if end in rates]
    return f", or more (learned at the {' and the '.join(ends)} tried)" if ends else ""


def most_decades(results: Results, at: str) -> dict[int, float]:
    """Return by seed the `decades` at the value of a coordinate where their mean over seeds is the largest."""
    return max((decades(group) for group in grouped(results, at).values()), key=lambda width: fmean(width.values()))


def draw_batchnorm(results: Results) -> list[Panel | HeatMap]:
    """Draw what was learned by rate and first weights for each norm, the widths of both, and the lowest loss."""
    ceiling = 1.5 * math.log(results[0].num_classes)
    groups = grouped(results, "norm")
    maps: list[Panel | HeatMap] = [
        accuracy_map(group, "std", "lr", f"{norm}: training accuracy", "learning rate; bold: every run learned", STD)
        for norm, group in groups.items()
    ]
    words: dict[str, Any] = {"log_x": True}
    return [
        *maps,
        Panel(
            [
                against(width_rows(group, "std"), "at", lambda r: r.final("width"), norm)
                for norm, group in groups.items()
            ],
            "rates that learn",
            STD,
            "decades",
            **words,
        ),
        Panel(
            [
                against(width_rows(group, "lr"), "at", lambda r: r.final("width"), norm)
                for norm, group in groups.items()
            ],
            "first weights that learn",
            "learning rate",
            "decades",
            **words,
        ),
        Panel(
            [
                against(
                    [run for some in grouped(group, "std").values() for run in best_of(some)],
                    "std",
                    lambda r: r.final("val/loss"),
                    norm,
                    ceiling=ceiling,
                )
                for norm, group in groups.items()
            ],
            "validation loss at the best rate",
            STD,
            "loss",
            log_y=True,
            **words,
        ),
    ]


def width_rows(results: Results, key: str) -> list[Result]:
    """Return a row a value of a coordinate and seed, whose figure ``width`` is its `decades`."""
    return [
        Result(Point(str(value), {}, {"at": value}), seed, [{"epoch": 1, "width": width}], [], 0)
        for value, group in grouped(results, key).items()
        for seed, width in decades(group).items()
    ]


def best_of(results: Results, *keys: str) -> list[Result]:
    """Return the runs of the setting with the lowest mean validation loss; of a rate, unless other coordinates are given."""
    points = grouped(results, *(keys or ("lr",)))
    return list(points[min(points, key=lambda at: mean_of(points[at]))])


def conclude_batchnorm(results: Results) -> list[str]:
    """Say over which rates and first weights each norm learned, whether these ranges differ, and what it reached."""
    limit = 0.5 * math.log(results[0].num_classes)
    groups = grouped(results, "norm")
    plain = NORMS["none"]
    lines = [
        f"learned: training loss of the last epoch at most {limit:.2f}, half a guess's; a width counts {DECADES} decades a "
        f"setting, of {DECADES * len(MULTIPLES)} for rates and {DECADES * len(STDS)} for first weights"
    ]
    for norm, group in groups.items():
        lines.append(f"{norm}: learned in {sum(map(learned, group))} of {len(group)} runs")
        for std, some in grouped(group, "std").items():
            best = best_of(some)
            lines.append(
                f"{norm}, std {rate_text(std)}: learned over {stated(list(decades(some).values()), 1)} decades of rate"
                f"{beyond(some)}; best rate {rate_text(best[0].at['lr'])}, validation loss {stated([r.final('val/loss') for r in best])}, "
                f"accuracy {stated([r.final('val/accuracy') for r in best])}"
            )
    kinds = {
        "decades of rates that learn, mean over first weights": {
            norm: mean_decades(group, "std") for norm, group in groups.items()
        },
        "decades of rates that learn, at the first weights that allow most": {
            norm: most_decades(group, "std") for norm, group in groups.items()
        },
        "decades of first weights that learn, at the rate that allows most": {
            norm: most_decades(group, "lr") for norm, group in groups.items()
        },
    }
    for words, widths in kinds.items():
        for norm, width in widths.items():
            lines.append(f"{words}, {norm}: {stated(list(width.values()), 2)}")
        lines += [
            f"{words}, {norm} against {plain}: {differs(width, widths[plain], 2)}"
            for norm, width in widths.items()
            if norm != plain
        ]
    at_best = {norm: best_of(group, "std", "lr") for norm, group in groups.items()}
    for norm, runs in at_best.items():
        text = "" if norm == plain else f"; against {plain}: {differs(by_seed(runs), by_seed(at_best[plain]))}"
        lines.append(
            f"{norm} at its best (std {rate_text(runs[0].at['std'])}, rate {rate_text(runs[0].at['lr'])}): validation loss "
            f"{stated([r.final('val/loss') for r in runs])}{text}"
        )
    return lines


BATCHNORM = Study(
    "batchnorm",
    "Over which learning rates and first weights does a network train, with and without normalisation?",
    batchnorm_grid,
    draw_batchnorm,
    conclude_batchnorm,
    base={
        "trainer": {"epochs": 4},
        "model": {
            "name": "mlp",
            "mlp": {"hidden": [64] * 6},
            "norm": {"group": {"groups": 8, "eps": 1.0e-5, "affine": True}},
        },
    },
)
