"""Studies of the batch: `batch`, `accumulation`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anneal.params import UserError
from anneal.reporting.lines import Panel
from anneal.studies.base import batch_sizes, sized
from anneal.studies.study import (
    Point,
    Result,
    Results,
    Study,
    against,
    compared,
    differs,
    grouped,
    over_epochs,
    over_steps,
    stated,
    where,
)

# ---- batch ----------------------------------------------------------------------------------------------------------

LENGTHS = ("equal epochs", "equal steps")
SCALINGS = {"none": "rate fixed", "linear": "rate scaled"}


def batch_grid(recipe: Mapping[str, Any], num_train: int) -> list[Point]:
    """Return each batch size at equal epochs and at equal steps, with the rate fixed and in proportion to the size."""
    epochs = recipe["trainer"]["epochs"]
    steps = epochs * -(-num_train // recipe["batch"]["size"])
    points = []
    for size in batch_sizes(recipe, num_train):
        for length in LENGTHS:
            equal_steps = max(1, round(steps / -(-num_train // size)))
            for scaling, words in SCALINGS.items():
                overrides = sized(size)
                same = size == recipe["batch"]["size"]  # which scaling leaves alone: one run for both
                overrides["batch"] |= {"lr_scaling": "none" if same else scaling, "noise_microbatches": 8}
                overrides["batch"] |= {"reference_size": recipe["batch"]["size"]}
                overrides["trainer"] = {"epochs": epochs if length == LENGTHS[0] else equal_steps}
                points.append(
                    Point(
                        f"batch {size} {length} {words}",
                        overrides,
                        {"batch": size, "length": length, "rate": words},
                    )
                )
    return points


def step_noise(result: Result) -> float | None:
    """Return the noise of a step's gradient over its norm in the second half of the run: sqrt(tr(Sigma) / batch) / |G|.

    Squares are means over that half's epochs; None where noise drowned the gradient.
    """
    late = [epoch for epoch in result.epochs if 2 * epoch["step"] > result.epochs[-1]["step"]]
    trace = sum(epoch.get("noise_scale/trace", 0.0) for epoch in late)
    square = sum(epoch.get("noise_scale/gradient_sq", 0.0) for epoch in late)
    return math.sqrt(trace / (square * result.at["batch"])) if square > 0 and trace >= 0 else None


def gap(result: Result) -> float:
    """Return validation loss minus training loss of the last epoch."""
    return math.nan if result.stopped else result.final("val/loss") - result.final("train/loss")


def draw_batch(results: Results) -> list[Panel]:
    """Draw noise and speed against the batch size, then losses and their gap in the four ways of comparing."""
    ceiling = 1.5 * math.log(results[0].num_classes)
    fixed, alike = (where(results, length=length, rate="rate fixed") for length in LENGTHS)
    ways = grouped(results, "length", "rate")
    styles = {way: {"style": ".-" if way[0] == LENGTHS[0] else ".--"} for way in ways}
    colours = {way: i % 2 for i, way in enumerate(ways)}
    words: dict[str, Any] = {"x_label": "batch size", "log_x": True}

    def lines(value: Any, top: float = math.inf) -> list[Any]:
        return [
            against(group, "batch", value, ", ".join(way), colour=colours[way], ceiling=top, **styles[way])
            for way, group in ways.items()
        ]

    return [
        Panel(
            [against(alike, "batch", step_noise)],
            "noise of a step's gradient over its norm",
            y_label="ratio",
            log_y=True,
            **words,
        ),
        Panel(
            [
                over_epochs(group, "noise_scale", f"batch {size}", x="step")
                for size, group in grouped(alike, "batch").items()
            ],
            "gradient noise scale (equal steps, rate fixed)",
            "optimizer steps",
            "samples",
            log_y=True,
        ),
        Panel(
            [against(fixed, "batch", lambda r: r.images_per_second)],
            "speed of training",
            y_label="images/s",
            log_y=True,
            **words,
        ),
        Panel(lines(lambda r: r.final("train/loss"), ceiling), "training loss", y_label="loss", log_y=True, **words),
        Panel(lines(lambda r: r.final("val/loss"), ceiling), "validation loss", y_label="loss", log_y=True, **words),
        Panel(lines(gap), "validation loss - training loss", y_label="loss", **words),
    ]


def conclude_batch(results: Results) -> list[str]:
    """Say noise and speed by batch size, and in each way of comparing what the extremes reached."""
    lines = []
    fixed, alike = (where(results, length=length, rate="rate fixed") for length in LENGTHS)
    sizes = list(grouped(fixed, "batch"))
    for size in sizes:
        noise = [value for value in map(step_noise, where(alike, batch=size)) if value is not None]
        speed = [r.images_per_second for r in where(fixed, batch=size) if r.images_per_second is not None]
        lines.append(f"batch {size}: gradient noise over norm {stated(noise, 2)}, images/s {stated(speed, 0)}")
    for (length, rate), group in grouped(results, "length", "rate").items():
        for size in sizes:
            here = where(group, batch=size)
            lost = sum(result.diverged for result in here)
            lines.append(
                f"{length}, {rate}, batch {size}: training loss {stated([r.final('train/loss') for r in here])}, "
                f"validation loss {stated([r.final('val/loss') for r in here])}, gap {stated([gap(r) for r in here])}"
                + (f"; {lost} of {len(here)} diverged" if lost else "")
            )
        small, large = where(group, batch=sizes[0]), where(group, batch=sizes[-1])
        lines.append(f"{length}, {rate}: batch {sizes[-1]} against batch {sizes[0]}: {compared(large, small)}")
        text = differs({r.seed: gap(r) for r in large}, {r.seed: gap(r) for r in small})
        lines.append(f"{length}, {rate}: gap of batch {sizes[-1]} against batch {sizes[0]}: {text}")
    return lines


BATCH = Study(
    "batch",
    "What does a larger batch change: gradient noise, speed, and the gap between training and validation?",
    batch_grid,
    draw_batch,
    conclude_batch,
    # A rate that is scaled up needs a warm-up (Goyal et al. 2017); all get it, so that it makes no difference.
    base={"schedule": {"warmup": {"length": 0.1, "start": 0.01, "shape": "linear"}}},
)


# ---- accumulation ---------------------------------------------------------------------------------------------------

NORMS = {"none": "no normalisation", "batch": "BatchNorm"}
WAYS = ((1, 1), (4, 1), (1, 4))
"""Microbatches a step, and parts of the recipe's batch that a step sees; the first is the batch in one piece."""


def accumulation_grid(recipe: Mapping[str, Any], _num_train: int) -> list[Point]:
    """Return the batch in one piece, in four, and a quarter of it, without normalisation and with BatchNorm."""
    size = recipe["batch"]["size"]
    if size % 4 or size < 8:
        raise UserError(f"params.yaml: batch.size: found {size}, allowed for this study: a multiple of 4, at least 8")
    points = []
    for norm, words in NORMS.items():
        for pieces, parts in WAYS:
            step = size // parts
            batch = {"size": step, "microbatch": step // pieces}
            way = f"{pieces} x {step // pieces}"
            overrides = {"model": {"norm": {"name": norm}}, "batch": batch}
            points.append(Point(f"{way} {words}", overrides, {"norm": words, "way": way}))
    return points


def step_differences(first: Result, second: Result) -> list[tuple[int, float, float]]:
    """Return step, rate and the absolute difference in training loss of two runs, at least 1e-9 for a logarithm's sake."""
    known = {step: loss for step, _, loss in second.steps}
    return [(step, rate, max(abs(loss - known[step]), 1e-9)) for step, rate, loss in first.steps if step in known]


def pairs(group: Results) -> list[Result]:
    """Return a result a seed whose steps are the differences between the batch in one piece and in four."""
    whole, split, *_ = grouped(group, "way").values()
    return [
        Result(a.point, a.seed, a.epochs, step_differences(a, b), a.num_classes)
        for a in whole
        for b in split
        if a.seed == b.seed and not a.stopped and not b.stopped
    ]


def draw_accumulation(results: Results) -> list[Panel]:
    """Draw the training curves without and with BatchNorm, and how far one piece and four are apart."""
    groups = grouped(results, "norm")
    curves = [
        Panel(
            [
                over_steps(runs, way, style="-" if i != 1 else "--")
                for i, (way, runs) in enumerate(grouped(group, "way").items())
            ],
            f"training loss, {norm}",
            "optimizer steps",
            "loss",
            log_y=True,
        )
        for norm, group in groups.items()
    ]
    apart = Panel(
        [over_steps(pairs(group), norm) for norm, group in groups.items()],
        "training loss, one piece against four: apart by",
        "optimizer steps",
        "difference",
        log_y=True,
    )
    return [*curves, apart]


def conclude_accumulation(results: Results) -> list[str]:
    """Say how far the batch in four pieces is from that in one, beside a quarter of the batch."""
    lines = []
    for norm, group in grouped(results, "norm").items():
        ways = grouped(group, "way")
        (one, whole), (four, split), (small, quarter) = ways.items()
        largest = [max(loss for _, _, loss in pair.steps) for pair in pairs(group)]
        last = [pair.steps[-1][2] for pair in pairs(group)]
        if largest:
            lines.append(
                f"{norm}: training loss of {four} and {one} at most {max(largest):.2g} apart on the way, "
                f"{max(last):.2g} at the end (n = {len(last)})"
            )
        for name, runs in ways.items():
            lines.append(
                f"{norm}, {name}: training loss {stated([r.final('train/loss') for r in runs])}, "
                f"validation loss {stated([r.final('val/loss') for r in runs])}"
            )
        lines.append(f"{norm}: {four} against {one}: {compared(split, whole)}")
        lines.append(f"{norm}: {small} against {one}: {compared(quarter, whole)}")
    return lines


ACCUMULATION = Study(
    "accumulation",
    "Is a batch that is accumulated from four microbatches the same as the batch in one piece?",
    accumulation_grid,
    draw_accumulation,
    conclude_accumulation,
    base={"batch": {"size": 64, "microbatch": 64, "reference_size": 64}},
)
