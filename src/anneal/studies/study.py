"""What a study is: a grid of recipes, the results of its runs, and how to compare them. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from anneal import params
from anneal.reporting.heat_maps import HeatMap
from anneal.reporting.lines import Line, Panel

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom; beyond them 2.1 serves, which is a little wide."""


@dataclass(frozen=True)
class Point:
    """One setting of a study.

    Parameters
    ----------
    label
        Short and unique within the study.
    overrides
        What it changes of the study's recipe, as nested params.
    at
        Its coordinates, for drawing and for the table: name to number or text.
    optional
        Leave it out, and say so, where the recipe or the data refuses it; otherwise that ends the study.
    asks
        What `Study.ask` asks the trained network, plain values.
    """

    label: str
    overrides: Mapping[str, Any]
    at: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False
    asks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A run to be done.

    Parameters
    ----------
    point
        Its setting.
    recipe
        Whole params of the run, its seed among them.
    key
        Fingerprint of all that has a part in it; points that come to the same recipe share a run.
    """

    point: Point
    recipe: Mapping[str, Any]
    key: str


@dataclass(frozen=True)
class Result:
    """How one run of a point went.

    Parameters
    ----------
    point
        The setting.
    seed
        Of everything random; results of one seed began with the same weights and saw the same order.
    epochs
        One mapping an epoch: ``epoch``, ``step``, ``train/loss``, ``val/loss``, ``val/accuracy``, ``lr``, ...
    steps
        One triple each few optimizer steps: steps made, rate of the last, mean training loss over them.
    num_classes
        Of the data set.
    stopped
        Why the run ended early, empty where it did not.
    images_per_second
        Of training alone; None where too little was trained to say.
    answers
        Of the trained network to what the point asks; empty where that is nothing, or the run was stopped.
    """

    point: Point
    seed: int
    epochs: Sequence[Mapping[str, float]]
    steps: Sequence[tuple[int, float, float]]
    num_classes: int
    stopped: str = ""
    images_per_second: float | None = None
    answers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def at(self) -> Mapping[str, Any]:
        """Coordinates of the point."""
        return self.point.at

    @property
    def diverged(self) -> bool:
        """Whether the loss became infinite, or rose to well above where it began and ended no better than a guess."""
        if self.stopped:
            return True
        first, peak = self.steps[0][2], max(loss for _, _, loss in self.steps)
        return peak > 1.2 * first and self.final("train/loss") > 0.9 * math.log(self.num_classes)

    def final(self, name: str) -> float:
        """Return a figure of the last epoch; NaN where there is none, infinity for a loss of a run that was stopped."""
        if self.stopped:
            return math.inf if name.endswith("loss") else math.nan
        return float(self.epochs[-1].get(name, math.nan))

    def best(self, name: str) -> float:
        """Return the lowest loss or the highest accuracy of all epochs; infinity and NaN as for `final`."""
        values = [float(epoch[name]) for epoch in self.epochs if name in epoch]
        if not values:
            return math.inf if name.endswith("loss") else math.nan
        return min(values) if name.endswith("loss") else max(values)


Results = Sequence[Result]


def varied(jobs: Iterable[Job]) -> list[str]:
    """Return the dotted keys that any point of a study changes."""
    return sorted({key for job in jobs for key in params.flatten(job.point.overrides)})


@dataclass(frozen=True)
class Study:
    """A phenomenon and the grid that shows it.

    Parameters
    ----------
    name
        On the command line.
    question
        One sentence.
    grid
        Base params, and number of training images, to points.
    draw
        Results to the panels of one figure.
    conclude
        Results to lines that say what they show.
    base
        What it changes of the base recipe for all its points.
    ask
        Run of a point with `Point.asks`, folder of the trained member and of its data to plain values for `Result.answers`.
    """

    name: str
    question: str
    grid: Callable[[Mapping[str, Any], int], list[Point]]
    draw: Callable[[Results], Sequence[Panel | HeatMap]]
    conclude: Callable[[Results], list[str]]
    base: Mapping[str, Any] = field(default_factory=dict)
    ask: Callable[[Job, Path, Path], dict[str, Any]] | None = None


# ---- groups and means -----------------------------------------------------------------------------------------------


def grouped(results: Iterable[Result], *keys: str) -> dict[Any, list[Result]]:
    """Return results by the values of coordinates, in the order of the grid; a single key gives no tuple."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        values = tuple(result.at.get(key) for key in keys)
        groups.setdefault(values[0] if len(keys) == 1 else values, []).append(result)
    return groups


def where(results: Iterable[Result], **at: Any) -> list[Result]:
    """Return the results with these coordinates."""
    return [result for result in results if all(result.at.get(key) == value for key, value in at.items())]


def mean_of(results: Results, name: str = "val/loss") -> float:
    """Return the mean over seeds of a figure of the last epoch."""
    return fmean(result.final(name) for result in results) if results else math.nan


def half_width(values: Sequence[float]) -> float:
    """Return half the 95 % interval of a mean by Student's t; infinity for fewer than two values.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)
    2.484
    """
    if len(values) < 2:
        return math.inf
    quantile = STUDENT[len(values) - 2] if len(values) - 2 < len(STUDENT) else 2.1
    return quantile * stdev(values) / math.sqrt(len(values))


def stated(values: Sequence[float], digits: int = 3) -> str:
    """Return ``mean (lowest to highest, n = ...)``.

    >>> stated([0.1, 0.2, 0.3])
    '0.200 (0.100 to 0.300, n = 3)'
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return f"none (n = {len(values)})"
    lost = f", {len(values) - len(finite)} of {len(values)} without a figure" if len(finite) < len(values) else ""
    low, high = min(finite), max(finite)
    return f"{fmean(finite):.{digits}f} ({low:.{digits}f} to {high:.{digits}f}, n = {len(finite)}{lost})"


def differs(first: Mapping[int, float], second: Mapping[int, float], digits: int = 3) -> str:
    """Compare two settings seed by seed: the mean difference with its 95 % interval, or that none was shown.

    Runs of one seed began with the same weights and saw the same order, so what they share falls out of the difference.

    >>> differs({0: 1.0, 1: 1.2, 2: 1.1}, {0: 0.5, 1: 0.8, 2: 0.6})
    'higher by 0.467 (95 % interval 0.323 to 0.610)'
    >>> differs({0: 1.0, 1: 1.2}, {0: 1.1, 1: 1.1})
    'no difference shown (0.000, 95 % interval -1.271 to 1.271)'
    """
    changes = [first[seed] - second[seed] for seed in first if seed in second]
    changes = [change for change in changes if math.isfinite(change)]
    if len(changes) < 2:
        return "no difference shown (fewer than two pairs of runs to compare)"
    mean, half = fmean(changes), half_width(changes)
    shown = "higher by" if mean > half else "lower by" if mean < -half else "no difference shown"
    mean = -mean if mean < -half else mean
    low, middle, high = (f"{round(value, digits) + 0.0:.{digits}f}" for value in (mean - half, mean, mean + half))
    if shown == "no difference shown":
        return f"{shown} ({middle}, 95 % interval {low} to {high})"
    return f"{shown} {middle} (95 % interval {low} to {high})"


def compared(first: Results, second: Results) -> str:
    """Compare the last losses of two settings, as `differs` does."""
    return "; ".join(
        f"{word} loss {differs(by_seed(first, name), by_seed(second, name))}"
        for word, name in (("training", "train/loss"), ("validation", "val/loss"))
    )


def learned(result: Result, share: float = 0.5) -> bool:
    """Say whether the training loss of the last epoch is at most ``share`` of a guess's, the logarithm of the classes."""
    return result.final("train/loss") <= share * math.log(result.num_classes)


def by_seed(results: Results, name: str = "val/loss") -> dict[int, float]:
    """Return a figure of the last epoch by seed."""
    return {result.seed: result.final(name) for result in results}


def best_rate(results: Results) -> float:
    """Return the rate of the lowest mean validation loss."""
    rates = grouped(results, "lr")
    return float(min(rates, key=lambda lr: mean_of(rates[lr])))


def edge(results: Results) -> str:
    """Say where the best rate is the highest or the lowest that was tried, beyond which may lie a better one."""
    rates, best = [float(r.at["lr"]) for r in results], best_rate(results)
    return " (the highest tried)" if best == max(rates) else " (the lowest tried)" if best == min(rates) else ""


# ---- lines and maps -------------------------------------------------------------------------------------------------


def against(
    results: Results,
    key: str,
    value: Callable[[Result], float | None],
    label: str = "",
    *,
    style: str = ".-",
    colour: int | None = None,
    ceiling: float = math.inf,
) -> Line:
    """Return a line over a coordinate: the mean over seeds, the band from the lowest seed to the highest.

    A value above ``ceiling``, an infinite loss among them, is drawn at it; a missing one is left out.
    """
    points = []
    for x, group in sorted(grouped(results, key).items()):
        found = [value(result) for result in group]
        numbers = [min(number, ceiling) for number in found if number is not None and not math.isnan(number)]
        if numbers and all(map(math.isfinite, numbers)):
            points.append((x, fmean(numbers), min(numbers), max(numbers)))
    columns = list(zip(*points, strict=True)) or [(), (), (), ()]
    x, y, low, high = map(list, columns)
    return Line(label, x, y, low, high, style=style, colour=colour)


def over_epochs(
    results: Results,
    name: str,
    label: str,
    *,
    x: str = "epoch",
    style: str = "-",
    colour: int | None = None,
    ceiling: float = math.inf,
) -> Line:
    """Return the curve of a figure over epochs, or over ``step``: the mean over seeds that have it, with their band."""
    series = [{int(epoch[x]): float(epoch[name]) for epoch in result.epochs if name in epoch} for result in results]
    return _over(series, label, style, colour, ceiling)


def over_steps(
    results: Results,
    label: str,
    *,
    column: int = 2,
    style: str = "-",
    colour: int | None = None,
    ceiling: float = math.inf,
) -> Line:
    """Return the curve of the training loss (``column`` 2) or of the rate (1) over optimizer steps, as `over_epochs`."""
    series = [{int(row[0]): float(row[column]) for row in result.steps} for result in results]
    return _over(series, label, style, colour, ceiling)


def _over(series: Sequence[Mapping[int, float]], label: str, style: str, colour: int | None, ceiling: float) -> Line:
    x = sorted(set().union(*series)) if series else []
    values = [[min(one[i], ceiling) for one in series if i in one] for i in x]
    return Line(
        label,
        x,
        [fmean(v) for v in values],
        [min(v) for v in values],
        [max(v) for v in values],
        style=style,
        colour=colour,
    )


def without_band(line: Line) -> Line:
    """Return a line alone, where the bands of many would hide each other."""
    return Line(line.label, line.x, line.y, style=line.style, colour=line.colour)


def mean_accuracy(results: Results) -> float:
    """Return the mean training accuracy of the last epoch; a run that was stopped counts as 0, no run at all as NaN."""
    found = [result.final("train/accuracy") for result in results]
    return fmean(0.0 if math.isnan(accuracy) else accuracy for accuracy in found) if found else math.nan


def accuracy_map(
    results: Results, rows: str, columns: str, title: str, x_label: str = "", y_label: str = ""
) -> HeatMap:
    """Return the mean training accuracy of the last epoch over two coordinates; bold where every run learned."""
    down, across = list(grouped(results, rows)), list(grouped(results, columns))
    cells = [[where(results, **{rows: i, columns: j}) for j in across] for i in down]
    return HeatMap(
        [[mean_accuracy(cell) for cell in row] for row in cells],
        [rate_text(i) if isinstance(i, float) else str(i) for i in down],
        [rate_text(j) if isinstance(j, float) else str(j) for j in across],
        title,
        x_label,
        y_label,
        marked=[[all(map(learned, cell)) for cell in row] for row in cells],
    )


def rate_text(rate: float) -> str:
    """Return a rate in two digits.

    >>> rate_text(0.0158), rate_text(3.0)
    ('0.016', '3')
    """
    return f"{rate:.2g}"


def spread_panel(groups: Mapping[str, Sequence[float]], title: str, x_label: str) -> Panel:
    """Return a row a group: the mean over seeds as a point, a line from the lowest seed to the highest.

    The mean of the first group, which the others are measured by, is marked.
    """
    rows: dict[str, tuple[float, float, float] | None] = {}
    for name, values in groups.items():
        finite = [value for value in values if math.isfinite(value)]
        rows[name] = (fmean(finite), min(finite), max(finite)) if finite else None
    name, row = next(iter(rows.items()))
    marks = {name: row[0]} if row else {}
    return _rows(rows, title, x_label, "lowest to highest", marks)


def change_panel(
    groups: Mapping[str, tuple[Mapping[int, float], Mapping[int, float]]], title: str, x_label: str
) -> Panel:
    """Return a row a group: the mean difference of two settings by seed as a point, its 95 % interval as a line."""
    rows = {}
    for name, (first, second) in groups.items():
        values = [first[seed] - second[seed] for seed in first if seed in second]
        values = [value for value in values if math.isfinite(value)]
        half = half_width(values) if len(values) > 1 else 0.0
        rows[name] = (fmean(values), fmean(values) - half, fmean(values) + half) if values else None
    return _rows(rows, title, x_label, "95 % interval", {"no change": 0.0})


def _rows(
    rows: Mapping[str, tuple[float, float, float] | None],
    title: str,
    x_label: str,
    label: str,
    marks: Mapping[str, float],
) -> Panel:
    lines: list[Line] = []
    for i, row in enumerate(rows.values()):
        if row is not None:
            lines.append(Line("" if lines else label, [row[1], row[2]], [i, i], colour=0))
            lines.append(Line("", [row[0]], [i], style=".", colour=0))
    return Panel(lines, title, x_label, marks=marks, y_names=list(rows))
