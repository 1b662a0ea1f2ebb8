"""Figures and names as the page says them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

PREDICTORS = {
    "single": "one network (mean of the members)",
    "tta": "one network with views (mean of the members)",
    "ensemble": "ensemble",
    "uncalibrated": "exported predictor, before calibration",
    "ensemble_tta": "exported predictor",
    "probability_mean": "plain mean of the probabilities",
    "ema": "EMA of the weights",
    "swa": "SWA weights",
    "polyak": "mean of the weights (Polyak)",
    "soup_uniform": "uniform soup",
    "soup_greedy": "greedy soup",
}
"""Names of predictors in files to words."""

SPACE = "\u00a0"
"""At which no line is broken."""


def predictor(name: str) -> str:
    """Return a predictor's name in words.

    >>> predictor("members/a"), predictor("ensemble")
    ('member a', 'ensemble')
    """
    return f"member {name.removeprefix('members/')}" if name.startswith("members/") else PREDICTORS.get(name, name)


def percent(value: float | None, digits: int = 2) -> str:
    r"""Return a fraction in percent; empty for None.

    >>> percent(0.98765), percent(None)
    ('98.77\xa0%', '')
    """
    return "" if value is None else f"{100 * value:.{digits}f}{SPACE}%"


def figure(value: float | None, digits: int = 4) -> str:
    """Return a figure with so many decimals; empty for None and for what is no number."""
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def short(value: float) -> str:
    """Return a number with four significant digits.

    >>> short(0.000123456), short(1234567), short(-2.0)
    ('0.0001235', '1,234,567', '−2')
    """
    text = f"{value:,.0f}" if abs(value) >= 1000 and math.isfinite(value) else f"{value:.4g}"
    return text.replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign.

    >>> signed(1.5), signed(-0.25), signed(-0.001)
    ('+1.50', '−0.25', '0.00')
    """
    text = f"{value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", "−")


def interval(ends: Any, digits: int = 2) -> str:
    r"""Return both ends of an interval of fractions in percent; empty for None.

    >>> interval([0.88, 0.925])
    '88.00 to 92.50\xa0%'
    """
    return "" if ends is None else f"{100 * ends[0]:.{digits}f} to {100 * ends[1]:.{digits}f}{SPACE}%"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun.

    >>> counted(1, "image"), counted(2000, "class", "classes")
    ('1 image', '2,000 classes')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def gain(value: float, low: float, high: float, *, reach: float, verdict: str) -> Markup:
    """Return a difference of accuracies with its 95 % interval, in points and as a bar around zero, and its verdict.

    Parameters
    ----------
    value, low, high
        The difference and the ends of its interval, fractions of 1.
    reach
        Difference at the ends of the scale, one for all rows of a table; what lies beyond is drawn there.
    verdict
        ``better``, ``worse``, or ``no difference shown``.
    """

    def place(of: float) -> str:
        return f"{60 + 56 * max(-1.0, min(1.0, of / max(reach, 1e-12))):.1f}"

    bar = Markup(
        '<svg class="interval" viewBox="0 0 120 12" aria-hidden="true"><line x1="60" y1="0" x2="60" y2="12" class="zero"/>'
        '<line x1="{}" y1="6" x2="{}" y2="6" class="range"/><circle cx="{}" cy="6" r="3.5"/></svg>'
    ).format(place(low), place(high), place(value))
    return Markup('<strong>{}</strong> points<br><small class="ends">{} to {}</small>{}{}').format(
        signed(100 * value), signed(100 * low), signed(100 * high), bar, badge(verdict)
    )


def scale_of(ends: Sequence[float]) -> float:
    """Return the `gain.reach` of differences whose intervals have these ends: the largest, but 5 times the median at most.

    So that one disaster does not flatten all others.

    >>> scale_of([-0.01, 0.02, 0.01, -0.9]), scale_of([])
    (0.075, 1.0)
    """
    sizes = [abs(end) for end in ends]
    return min(max(sizes), 5 * statistics.median(sizes) or max(sizes)) if sizes else 1.0


def badge(verdict: str) -> Markup:
    """Return a comparison's verdict: better, worse, or no difference shown."""
    kind = {"better": "good", "worse": "bad"}.get(verdict, "none")
    return Markup('<span class="badge {}">{}</span>').format(kind, verdict)


def chance(p: float) -> str:
    """Return a p value.

    >>> chance(0.0312), chance(1e-9)
    ('0.031', '< 0.0001')
    """
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def evidence(found: Mapping[str, float | None]) -> str:
    """Return a finding's figures.

    >>> evidence({"gap": 0.25, "last_val_loss": None, "epochs": 30.0})
    'gap 0.25, epochs 30'
    """
    return ", ".join(f"{key.replace('_', ' ')} {short(value)}" for key, value in found.items() if value is not None)
