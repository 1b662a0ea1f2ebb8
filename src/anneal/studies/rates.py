"""Studies of the learning rate: `lr`, `lr-by-optimizer`, `batch-by-lr`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from anneal.reporting.lines import Line, Panel
from anneal.studies.base import batch_sizes, rate_of, sized
from anneal.studies.study import (
    Point,
    Result,
    Results,
    Study,
    against,
    by_seed,
    compared,
    differs,
    grouped,
    mean_of,
    over_epochs,
    over_steps,
    rate_text,
    stated,
    where,
)

RATES = (0.01, 0.1, 1.0, 5.0, 10.0, 100.0)
"""Multiples of the recipe's rate in the study `lr`."""

DECADES = tuple(10 ** (i / 2) for i in range(-4, 5))
"""Multiples of each optimizer's own rate in `lr-by-optimizer`: two decades down and up, by half decades."""

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"momentum": 0.0, "nesterov": False}),
    "SGD, momentum 0.9": ("SGD", {"momentum": 0.9, "nesterov": False}),
    "Adagrad": ("Adagrad", {}),
    "RMSprop": ("RMSprop", {}),
    "Adam": ("Adam", {}),
}
"""Name in the figure to the class and its arguments beside the rate."""

DOUBLINGS = tuple(2.0**i for i in range(-3, 5))
"""Multiples of the recipe's rate in `batch-by-lr`."""

GOOD = 2.0
"""A rate is good where the validation loss is at most so many times the lowest of the study."""


# ---- lr -------------------------------------------------------------------------------------------------------------


def lr_grid(recipe: Mapping[str, Any], _num_train: int) -> list[Point]:
    """Return the recipe's rate and multiples of it."""
    name, rate = recipe["optimizer"]["name"], rate_of(recipe)
    return [
        Point(f"lr {rate_text(rate * m)}", {"optimizer": {name: {"lr": rate * m}}}, {"lr": rate * m}) for m in RATES
    ]


def draw_lr(results: Results) -> list[Panel]:
    """Draw training and validation curves, and the last losses against the rate."""
    ceiling = 1.5 * math.log(results[0].num_classes)
    groups = grouped(results, "lr")
    names = {lr: f"{rate_text(lr)}{' diverged' if most_diverged(group) else ''}" for lr, group in groups.items()}
    return [
        Panel(
            [over_steps(group, names[lr], ceiling=ceiling) for lr, group in groups.items()],
            "training loss (cut off at the top)",
            "optimizer steps",
            "loss",
        ),
        Panel(
            [over_epochs(group, "val/loss", names[lr], ceiling=ceiling) for lr, group in groups.items()],
            "validation loss (cut off at the top)",
            "epoch",
            "loss",
        ),
        Panel(
            [
                against(results, "lr", lambda r: r.final("train/loss"), "training", ceiling=ceiling),
                against(results, "lr", lambda r: r.final("val/loss"), "validation", ceiling=ceiling),
            ],
            "loss of the last epoch",
            "learning rate",
            "loss",
            log_x=True,
            log_y=True,
        ),
    ]


def most_diverged(results: Results) -> bool:
    """Say whether more than half of the runs diverged."""
    return sum(result.diverged for result in results) * 2 > len(results)


def conclude_lr(results: Results) -> list[str]:
    """Say what each rate reached, and whether the best is better than those beside it."""
    groups = grouped(results, "lr")
    lines = [f"rate {rate_text(lr)}: {outcome(group)}" for lr, group in groups.items()]
    rates = list(groups)
    best = min(rates, key=lambda lr: mean_of(groups[lr]))
    lines.append(f"lowest mean validation loss at rate {rate_text(best)}")
    for other in rates:
        if abs(rates.index(other) - rates.index(best)) == 1:
            lines.append(f"rate {rate_text(other)} against {rate_text(best)}: {compared(groups[other], groups[best])}")
    return lines


def outcome(group: Results) -> str:
    """Return the last losses and accuracy of a point in words."""
    lost = sum(result.diverged for result in group)
    return (
        f"training loss {stated([r.final('train/loss') for r in group])}, "
        f"validation loss {stated([r.final('val/loss') for r in group])}, "
        f"accuracy {stated([r.final('val/accuracy') for r in group])}"
        + (f"; {lost} of {len(group)} diverged" if lost else "")
    )


LR = Study(
    "lr",
    "What do a learning rate that is too low, good, too high and far too high look like?",
    lr_grid,
    draw_lr,
    conclude_lr,
)


# ---- lr-by-optimizer ------------------------------------------------------------------------------------------------


def optimizer_grid(recipe: Mapping[str, Any], _num_train: int) -> list[Point]:
    """Return each optimizer at its own rate and multiples of it."""
    return [
        Point(
            f"{label} lr {rate_text(rate_of(recipe, name) * m)}",
            {"optimizer": {"name": name, name: {"lr": rate_of(recipe, name) * m, **arguments}}},
            {"optimizer": label, "lr": rate_of(recipe, name) * m},
        )
        for label, (name, arguments) in OPTIMIZERS.items()
        for m in DECADES
    ]


def draw_optimizers(results: Results) -> list[Panel]:
    """Draw the last losses of each optimizer against the rate."""
    ceiling = 1.5 * math.log(results[0].num_classes)
    lines = {
        name: [
            against(group, "lr", lambda r, n=name: r.final(n), label, ceiling=ceiling)  # type: ignore[misc]
            for label, group in grouped(results, "optimizer").items()
        ]
        for name in ("train/loss", "val/loss")
    }
    words: dict[str, Any] = {"x_label": "learning rate", "y_label": "loss", "log_x": True, "log_y": True}
    return [
        Panel(lines["train/loss"], "training loss of the last epoch", **words),
        Panel(lines["val/loss"], "validation loss of the last epoch", **words),
    ]


def good_decades(results: Results, limit: float) -> dict[int, float]:
    """Return by seed over how many decades of rate the last validation loss is at most ``limit``."""
    return {
        seed: sum(r.final("val/loss") <= limit for r in results if r.seed == seed) / 2
        for seed in dict.fromkeys(r.seed for r in results)
    }


def conclude_optimizers(results: Results) -> list[str]:
    """Say what each optimizer reached, and over how many decades of rate it was good."""
    groups = grouped(results, "optimizer")
    points = {label: grouped(group, "lr") for label, group in groups.items()}
    best = {label: min(rates, key=lambda lr: mean_of(rates[lr])) for label, rates in points.items()}
    lowest = min(mean_of(points[label][lr]) for label, lr in best.items())
    limit = GOOD * lowest
    half = 0.5 * math.log(results[0].num_classes)
    lines, widths = [], {label: good_decades(group, limit) for label, group in groups.items()}
    learned = {label: good_decades(group, half) for label, group in groups.items()}
    for label in groups:
        reached = points[label][best[label]]
        lines.append(
            f"{label}: best rate {rate_text(best[label])}, validation loss "
            f"{stated([r.final('val/loss') for r in reached])}; at most {limit:.3f} over "
            f"{stated(list(widths[label].values()), 1)} decades of rate, at most {half:.2f} (half a guess's) over "
            f"{stated(list(learned[label].values()), 1)}"
        )
    for words, found in (("of good rates", widths), (f"of rates that reach {half:.2f}", learned)):
        order = sorted(groups, key=lambda label: -fmean(found[label].values()))
        for label in order[1:]:
            text = differs(found[order[0]], found[label], 2)
            lines.append(f"decades {words}, {order[0]} against {label}: {text}")
    leader = min(best, key=lambda label: mean_of(points[label][best[label]]))
    for label in groups:
        if label != leader:
            text = differs(by_seed(points[label][best[label]]), by_seed(points[leader][best[leader]]))
            lines.append(f"validation loss at the best rate, {label} against {leader}: {text}")
    return lines


LR_BY_OPTIMIZER = Study(
    "lr-by-optimizer",
    "Which optimizer forgives a wrong learning rate?",
    optimizer_grid,
    draw_optimizers,
    conclude_optimizers,
)


# ---- batch-by-lr ----------------------------------------------------------------------------------------------------


def batch_by_lr_grid(recipe: Mapping[str, Any], num_train: int) -> list[Point]:
    """Return each batch size at the recipe's rate and multiples of it."""
    name, rate = recipe["optimizer"]["name"], rate_of(recipe)
    return [
        Point(
            f"batch {size} lr {rate_text(rate * m)}",
            {"optimizer": {name: {"lr": rate * m}}, **sized(size)},
            {"batch": size, "lr": rate * m},
        )
        for size in batch_sizes(recipe, num_train)
        for m in DOUBLINGS
    ]


def draw_batch_by_lr(results: Results) -> list[Panel]:
    """Draw the last loss of each batch size against the rate, and the best rate against the batch size."""
    ceiling = 1.5 * math.log(results[0].num_classes)
    words: dict[str, Any] = {"x_label": "learning rate", "y_label": "loss", "log_x": True, "log_y": True}
    best = best_rates(results)
    rows = [
        Result(Point(str(size), {}, {"batch": size}), seed, [{"epoch": 1, "rate": rate}], [], 0)
        for (size, seed), rate in best.items()
    ]
    return [
        Panel(
            [
                against(group, "lr", lambda r: r.final("train/loss"), f"batch {size}", ceiling=ceiling)
                for size, group in grouped(results, "batch").items()
            ],
            "training loss of the last epoch",
            **words,
        ),
        Panel(
            [
                against(group, "lr", lambda r: r.final("val/loss"), f"batch {size}", ceiling=ceiling)
                for size, group in grouped(results, "batch").items()
            ],
            "validation loss of the last epoch",
            **words,
        ),
        Panel(
            [against(rows, "batch", lambda r: r.final("rate"), "best rate by seed"), *laws(rows)],
            "best rate (training loss)",
            "batch size",
            "learning rate",
            log_x=True,
            log_y=True,
        ),
    ]


def best_rates(results: Results, name: str = "train/loss") -> dict[tuple[int, int], float]:
    """Return by batch size and seed the rate with the lowest loss."""
    best: dict[tuple[int, int], Result] = {}
    for result in results:
        key = (int(result.at["batch"]), result.seed)
        if key not in best or result.final(name) < best[key].final(name):
            best[key] = result
    return {key: float(result.at["lr"]) for key, result in best.items()}


def laws(rows: Results) -> list[Line]:
    """Return the linear and the square-root law through the mean best rate of the smallest batch."""
    sizes = sorted({int(r.at["batch"]) for r in rows})
    first = fmean(r.final("rate") for r in rows if r.at["batch"] == sizes[0])
    return [
        Line(label, sizes, [first * (size / sizes[0]) ** power for size in sizes], style="--", colour=colour)
        for label, power, colour in (("linear law", 1.0, 4), ("square-root law", 0.5, 2))
    ]


def exponents(best: Mapping[tuple[int, int], float]) -> dict[int, float]:
    """Return by seed the slope of log rate over log batch size, by least squares.

    >>> exponents({(8, 0): 0.1, (32, 0): 0.4, (8, 1): 0.1, (32, 1): 0.2})
    {0: 1.0, 1: 0.5}
    """
    slopes = {}
    for seed in dict.fromkeys(seed for _, seed in best):
        x = [math.log2(size) for size, s in best if s == seed]
        y = [math.log2(rate) for (_, s), rate in best.items() if s == seed]
        middle, height = fmean(x), fmean(y)
        spread = sum((a - middle) ** 2 for a in x)
        if spread:
            slopes[seed] = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / spread
    return {seed: round(slope, 9) for seed, slope in slopes.items()}


def conclude_batch_by_lr(results: Results) -> list[str]:
    """Say the best rate of each batch size, and by what power of the batch size it grows."""
    lines = []
    for name, word in (("train/loss", "training"), ("val/loss", "validation")):
        best = best_rates(results, name)
        for size, group in grouped(results, "batch").items():
            rates = [rate for (s, _), rate in best.items() if s == size]
            at_best = [
                r.final(name)
                for seed in dict.fromkeys(r.seed for r in group)
                for r in where(group, lr=best[size, seed])
                if r.seed == seed
            ]
            lines.append(
                f"batch {size}: lowest {word} loss {stated(at_best)} at rate {', '.join(map(rate_text, rates))} (by seed)"
            )
        slopes = list(exponents(best).values())
        lines.append(
            f"the best rate by {word} loss grows as batch size to the power of {stated(slopes, 2)}; "
            f"linear scaling says 1, square-root scaling 0.5"
        )
    return lines


BATCH_BY_LR = Study(
    "batch-by-lr",
    "Which learning rate is the best for each batch size, at equal epochs?",
    batch_by_lr_grid,
    draw_batch_by_lr,
    conclude_batch_by_lr,
)
