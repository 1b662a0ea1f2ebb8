"""Tables of the members' training, one for all of them: layers before the first step, and learning rates."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

INITIAL = ("layer", "kind", "std", "grad_norm", "dead")
"""Columns of the members' initial.csv that are kept."""


def initial_csv(members: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a row a layer and member: ``member`` and the columns of `INITIAL`; of no member the header alone.

    Parameters
    ----------
    members
        Member to the rows of its initial.csv.
    """
    rows = [[name, *(_cell(row[column]) for column in INITIAL)] for name, of in members.items() for row in of]
    return _text(["member", *INITIAL], rows)


def rates_csv(members: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return the learning rate by optimizer step: ``step``, and a column a member, empty where it has no such step.

    Parameters
    ----------
    members
        Member to the columns of its steps.csv, of which ``step`` and ``lr`` are read.

    Examples
    --------
    >>> print(rates_csv({"a": {"step": [1.0, 5.0], "lr": [0.1, 0.2]}, "b": {"step": [1.0], "lr": [0.1]}}), end="")
    step,a,b
    1,0.1,0.1
    5,0.2,
    """
    rates = {name: dict(zip(of.get("step", ()), of.get("lr", ()), strict=True)) for name, of in members.items()}
    steps = sorted({step for of in rates.values() for step in of})
    rows = [[int(step), *(_cell(of.get(step)) for of in rates.values())] for step in steps]
    return _text(["step", *members], rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else ""
    return "" if value is None else str(value)


def _text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()
