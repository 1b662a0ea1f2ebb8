"""What a study is: a grid of recipes, the results of its runs, and how to compare them. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from anneal import params
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
    """

    label: str
    overrides: Mapping[str, Any]
    at: Mapping[str, Any] = field(default_factory=dict)


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
    """

    point: Point
    seed: int
    epochs: Sequence[Mapping[str, float]]
    steps: Sequence[tuple[int, float, float]]
    num_classes: int
    stopped: str = ""
    images_per_second: float | None = None

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
    """

    name: str
    question: str
    grid: Callable[[Mapping[str, Any], int], list[Point]]
    draw: Callable[[Results], list[Panel]]
    conclude: Callable[[Results], list[str]]
    base: Mapping[str, Any] = field(default_factory=dict)


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


def by_seed(results: Results, name: str = "val/loss") -> dict[int, float]:
    """Return a figure of the last epoch by seed."""
    return {result.seed: result.final(name) for result in results}


# ---- lines ----------------------------------------------------------------------------------------------------------


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


def rate_text(rate: float) -> str:
    """Return a rate in two digits.

    >>> rate_text(0.0158), rate_text(3.0)
    ('0.016', '3')
    """
    return f"{rate:.2g}"
