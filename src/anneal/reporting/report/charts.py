"""Charts as inline SVG: they follow the page's colours, light or dark, and its width. Pure functions of their arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from anneal.reporting.report.words import short

WIDTH, HEIGHT = 420, 250
"""Of a chart in its own units, near the width of a phone, where its text of 13 units is to be read."""

LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 42

BAND = 18
"""Height of a row of marks."""

COLOURS = 7
"""Colours of page.html: ``--c0`` and so on, Okabe & Ito's palette."""


@dataclass(frozen=True)
class Line:
    """A line.

    Parameters
    ----------
    label
        Its name in the legend.
    x, y
        Points; one that is not finite breaks the line.
    colour
        Number of a colour.
    dash
        Dashes as SVG has them; empty for a whole line.
    dots
        Whether its points are drawn.
    low, high
        Ends of the interval at each point, where there are intervals.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: str = ""
    dots: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Axis:
    """An axis: its label (of the x axis), its ends (by default those of the data), whether logarithmic or of whole numbers.

    A logarithmic one is linear all the same where the data span less than a power of ten.
    """

    label: str = ""
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Mark:
    """A stretch of the x axis with a name: rows of equal names are one, above the lines."""

    label: str
    first: float
    last: float
    colour: int = 0


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from ``low`` to ``high``.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step)))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, digits) + 0.0 for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten from ``low`` to ``high``, at most seven; between few of them 2 and 5 times these.

    >>> log_ticks(0.001, 1.0)
    [0.001, 0.01, 0.1, 1.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 100 else (1,)
    step = max(1, -(-len(powers) // 7))
    values = [float(f"{factor}e{power}") for power in powers[::step] for factor in factors]
    return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


@dataclass(frozen=True)
class _Scale:
    """Where a value lies between two places of the drawing."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    least: float
    most: float

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, self.low)), math.log(low), math.log(high)
        share = (value - low) / (high - low)
        # What lies far beyond would make numbers that no viewer can draw.
        return self.start + min(max(share, -0.5), 1.5) * (self.stop - self.start)


def _scale(axis: Axis, values: Sequence[float], start: float, stop: float) -> _Scale:
    known = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)] or [1.0]
    least = min(known) if axis.low is None else axis.low
    most = max(known) if axis.high is None else axis.high
    low, high = least, most
    if axis.log and most >= 10 * least:  # less of it would have one number or two
        low = low / 1.25 if axis.low is None else low
        high = max(high * 1.25 if axis.high is None else high, low * 1.1)
        return _Scale(low, high, start, stop, True, low, high)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-3):
        fixed = axis.low is not None and axis.high is not None
        low = low - 0.5 * (abs(low) or 1.0) if axis.low is None or fixed else low
        high = high + 0.5 * (abs(high) or 1.0) if axis.high is None or fixed else high
    room = 0.04 * (high - low)
    low = low - room if axis.low is None else low
    high = high + room if axis.high is None else high
    # Before the first epoch and behind the last there is nothing to number.
    ends = (least, most) if axis.whole else (low, high)
    return _Scale(low, high, start, stop, False, *ends)


def draw_lines(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    alt: str,
    marks: Sequence[Mark] = (),
    diagonal: bool = False,
    levels: Mapping[str, float] | None = None,
) -> Markup:
    """Draw lines over a grid.

    Parameters
    ----------
    lines
        What is drawn; a line without points is left out.
    x, y
        The axes.
    alt
        What the chart shows, for who does not see it.
    marks
        Named stretches of the x axis, a row a name above the grid.
    diagonal
        Whether y = x is drawn.
    levels
        Name to a y at which a horizontal line stands.

    Returns
    -------
    Markup
        An ``svg`` element; the same arguments give the same text.
    """
    levels = levels or {}
    rows = list(dict.fromkeys(mark.label for mark in marks))
    top = TOP + BAND * len(rows) + (6 if rows else 0)
    bottom, right = top + HEIGHT - BOTTOM, WIDTH - RIGHT
    across = _scale(x, [v for line in lines for v in line.x], LEFT, right)
    ends = [v for line in lines for part in (line.y, line.low or (), line.high or ()) for v in part]
    up = _scale(y, [*ends, *levels.values()], bottom, top)
    parts: list[Markup] = [*_grid(x, across, up, bottom, right)]
    for place, name in enumerate(rows):
        parts += _marked(name, [mark for mark in marks if mark.label == name], across, TOP + BAND * place, bottom)
    for name, level in levels.items():
        parts.append(
            Markup(
                '<line class="level" x1="{}" y1="{}" x2="{}" y2="{}"/><text x="{}" y="{}" class="small">{}</text>'
            ).format(LEFT, _n(up(level)), right, _n(up(level)), LEFT + 4, _n(up(level) - 4), name)
        )
    if diagonal:
        low, high = max(across.low, up.low), min(across.high, up.high)
        parts.append(
            Markup('<line class="level" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
                _n(across(low)), _n(up(low)), _n(across(high)), _n(up(high))
            )
        )
    for line in lines:
        parts += _drawn(line, across, up)
    return _svg(parts, WIDTH, bottom + BOTTOM, alt)


def _grid(x: Axis, across: _Scale, up: _Scale, bottom: float, right: float) -> list[Markup]:
    """Return the grid, the numbers at its edges and the name of the horizontal axis."""
    parts = []
    for value in log_ticks(up.low, up.high) if up.log else ticks(up.low, up.high):
        at = _n(up(value))
        parts.append(Markup('<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(LEFT, at, right, at))
        parts.append(
            Markup('<text x="{}" y="{}" class="end">{}</text>').format(LEFT - 6, _n(up(value) + 4), short(value))
        )
    places = log_ticks(across.low, across.high) if across.log else ticks(across.low, across.high)
    if x.whole:
        places = [place for place in places if place == round(place) and across.least <= place <= across.most]
    for value in places:
        at = _n(across(value))
        tick = Markup('<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/>')
        parts.append(tick.format(at, _n(bottom), at, _n(bottom + 4)))
        parts.append(Markup('<text x="{}" y="{}" class="middle">{}</text>').format(at, _n(bottom + 17), short(value)))
    below = Markup('<text x="{}" y="{}" class="middle">{}</text>')
    return [*parts, below.format(_n((LEFT + right) / 2), _n(bottom + 35), x.label)]


def _marked(name: str, marks: Sequence[Mark], across: _Scale, top: float, bottom: float) -> list[Markup]:
    """Return a row of marks with its name, and faint lines from their ends down through the grid."""
    parts = []
    height = (BAND - 4) / len(marks)
    for place, mark in enumerate(marks):
        left, right = (min(max(across(end), LEFT), WIDTH - RIGHT) for end in (mark.first, mark.last))
        right = max(right, left + 3)
        parts.append(
            Markup('<rect class="mark s{}" x="{}" y="{}" width="{}" height="{}"/>').format(
                mark.colour % COLOURS, _n(left), _n(top + place * height), _n(right - left), _n(height)
            )
        )
        for at in (left, right):
            edge = Markup('<line class="edge" x1="{}" y1="{}" x2="{}" y2="{}"/>')
            parts.append(edge.format(_n(at), _n(top + BAND - 4), _n(at), _n(bottom)))
    return [*parts, Markup('<text x="{}" y="{}" class="small">{}</text>').format(LEFT + 4, _n(top + 11), name)]


def _drawn(line: Line, across: _Scale, up: _Scale) -> list[Markup]:
    """Return a line with its points and intervals."""
    points = [
        (across(a), up(b)) if math.isfinite(a) and math.isfinite(b) and (b > 0 or not up.log) else None
        for a, b in zip(line.x, line.y, strict=True)
    ]
    path, pen_down = [], False
    for point in points:
        if point is not None:
            path.append(f"{'L' if pen_down else 'M'}{_n(point[0])} {_n(point[1])}")
        pen_down = point is not None
    if not path:
        return []
    colour = line.colour % COLOURS
    dashes = Markup(' stroke-dasharray="{}"').format(line.dash) if line.dash else Markup("")
    parts = [Markup('<path class="line s{}" d="{}"{}/>').format(colour, "".join(path), dashes)]
    if line.low is not None and line.high is not None:
        for point, low, high in zip(points, line.low, line.high, strict=True):
            if point is not None:
                bar = Markup('<line class="bar s{}" x1="{}" y1="{}" x2="{}" y2="{}"/>')
                parts.append(bar.format(colour, _n(point[0]), _n(up(low)), _n(point[0]), _n(up(high))))
    if line.dots or len([point for point in points if point]) == 1:
        dot = Markup('<circle class="s{}" cx="{}" cy="{}" r="3"/>')
        parts += [dot.format(colour, _n(point[0]), _n(point[1])) for point in points if point]
    return parts


def draw_matrix(counts: Sequence[Sequence[int]], names: Sequence[str], *, alt: str) -> Markup:
    """Draw a confusion matrix: a row an actual class, a column a predicted one.

    What is right is blue, what is wrong is vermilion, the stronger the larger its share of the actual class (by its root, so
    that rare mistakes show). Up to 20 classes cells carry their number, up to 60 rows and columns their class; a pointer
    on a cell says all of it.

    Parameters
    ----------
    counts
        K rows of K numbers of images.
    names
        K classes.
    alt
        What the chart shows.
    """
    number = len(names)
    cell = 30 if number <= 12 else 24 if number <= 20 else 14 if number <= 60 else max(3, 700 // number)
    size = 13 if number <= 20 else 11
    shown = [_cut(name) if number <= 60 else "" for name in names]
    room = 30 + round(0.62 * size * max(map(len, shown), default=0))
    side = room + cell * number
    parts = [
        Markup('<rect class="frame" x="{}" y="{}" width="{}" height="{}"/>').format(
            room, room, side - room, side - room
        )
    ]
    for i, row in enumerate(counts):
        total = max(sum(row), 1)
        for j, count in enumerate(row):
            if not count:
                continue
            strength = count / total if i == j else math.sqrt(count / total)
            words = f"{names[i]}, predicted {names[j]}: {count} ({count / total:.1%})"
            left, top = room + j * cell, room + i * cell
            parts.append(
                Markup(
                    '<rect class="{}" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}"><title>{}</title></rect>'
                ).format("right" if i == j else "wrong", left, top, cell, cell, f"{0.1 + 0.9 * strength:.2f}", words)
            )
            if number <= 20:
                parts.append(
                    Markup('<text x="{}" y="{}" class="middle{}">{}</text>').format(
                        _n(left + cell / 2), _n(top + cell / 2 + 4), " strong" if strength > 0.5 else "", count
                    )
                )
    for index, name in enumerate(shown):
        at = room + (index + 0.5) * cell
        side_text = Markup('<text x="{}" y="{}" class="end" font-size="{}">{}</text>')
        parts.append(side_text.format(room - 5, _n(at + 4), size, name))
        above = Markup('<text transform="translate({} {}) rotate(-90)" font-size="{}">{}</text>')
        parts.append(above.format(_n(at + 4), room - 5, size, name))
    middle = room + cell * number / 2
    parts.append(Markup('<text x="{}" y="14" class="middle">predicted</text>').format(_n(middle)))
    parts.append(
        Markup('<text class="middle" transform="translate(14 {}) rotate(-90)">actual</text>').format(_n(middle))
    )
    return _svg(parts, side + 4, side + 4, alt, fixed=True)


def _cut(name: str, most: int = 12) -> str:
    """Return a name without its middle where it is long: classes often differ at the end."""
    return name if len(name) <= most else f"{name[: most - 5]}…{name[-4:]}"


def _n(value: float) -> str:
    """Return a coordinate, one decimal."""
    text = f"{value:.1f}"
    return text.removesuffix(".0")


def _svg(parts: Sequence[Markup], width: float, height: float, alt: str, *, fixed: bool = False) -> Markup:
    # Of `fixed` drawings the text stays near its size, whatever the width of the page.
    style = f' style="min-width:{round(0.8 * width)}px;max-width:{round(1.2 * width)}px"' if fixed else ""
    head = f'<svg class="chart" viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-label="{escape(alt)}"{style}>'
    return Markup(head) + Markup("").join(parts) + Markup("</svg>")
