"""What the page is made from: the files below reports/ that the other stages wrote."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anneal.params import UserError

Row = Mapping[str, Any]
"""A row of a table: text, numbers, and None for empty cells."""

RECORDS = (
    *("predictor", "baselines", "warnings", "soups", "cost"),
    *("mistakes", "label_errors", "near_duplicates"),
)
"""JSON files of evaluate; each may be absent."""

TABLES = (
    *("tta", "comparisons", "grid", "ensemble", "ensemble_members", "ensemble_diversity"),
    *("reliability", "risk_coverage", "classwise", "confusion", "robustness"),
)
"""CSV files of evaluate; each may be absent."""

TEXT = {
    *("split", "view", "predictor", "views", "averaging", "a", "b", "member", "class", "actual", "predicted"),
    *("corruption", "layer", "kind"),
}
"""Columns whose cells are names, even where one looks like a number; so are verdicts."""

PICTURES = ("augmentation/overview.png", "preprocessing/*.png", "evaluation/**/*.png")


@dataclass(frozen=True)
class Inputs:
    """All that a page says.

    Parameters
    ----------
    metrics, data, diagnosis
        Contents of metrics.json, data.json and diagnosis.json.
    recipe
        The sections of params.yaml, and the same as YAML text.
    records, tables
        Name to content of the files of evaluate that there are: `RECORDS` and `TABLES`.
    curves, rates, initial
        Rows of curves.csv, learning_rate.csv and initial.csv.
    pictures
        Path below reports/ to PNG bytes.
    """

    metrics: Mapping[str, Any]
    data: Mapping[str, Any]
    diagnosis: Mapping[str, Any]
    recipe: Mapping[str, Any]
    recipe_text: str
    records: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    curves: Sequence[Row] = ()
    rates: Sequence[Row] = ()
    initial: Sequence[Row] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def split(self) -> str | None:
        """The split of the headline: test where it was evaluated, else the last of ``evaluate.splits``."""
        last = [name for name in self.recipe["evaluate"]["splits"] if name in self.metrics]
        return "test" if "test" in self.metrics else last[-1] if last else None

    @property
    def last_split(self) -> str:
        """The split of the confusion matrix and the reliability diagram: the last of ``evaluate.splits``."""
        return str(self.recipe["evaluate"]["splits"][-1])

    @property
    def members(self) -> list[str]:
        """Names of the members, in the order of the recipe."""
        return list(self.recipe["ensemble"]["members"])

    def rows(self, table: str, split: str | None = None) -> list[Row]:
        """Return the rows of a table of evaluate, of one split where it is named; none where the table is absent."""
        return [row for row in self.tables.get(table, ()) if split is None or row["split"] == split]


def read_inputs(reports: Path, recipe: Mapping[str, Any], recipe_text: str) -> Inputs:
    """Read what the other stages wrote.

    Parameters
    ----------
    reports
        Folder of metrics.json and the others.
    recipe, recipe_text
        The sections of params.yaml that the page prints, and their YAML.

    Raises
    ------
    UserError
        metrics.json, data.json or diagnosis.json is missing, or a file is damaged.
    """
    evaluation = reports / "evaluation"
    records = {name: evaluation / f"{name}.json" for name in RECORDS}
    tables = {name: evaluation / f"{name}.csv" for name in TABLES}
    curves, rates, initial = (
        read_table(reports / f"{name}.csv") if (reports / f"{name}.csv").exists() else []
        for name in ("curves", "learning_rate", "initial")
    )
    pictures = sorted(path for pattern in PICTURES for path in reports.glob(pattern))
    return Inputs(
        metrics=read_record(reports / "metrics.json"),
        data=read_record(reports / "data.json"),
        diagnosis=read_record(reports / "diagnosis.json"),
        recipe=recipe,
        recipe_text=recipe_text,
        records={name: read_record(path) for name, path in records.items() if path.exists()},
        tables={name: read_table(path) for name, path in tables.items() if path.exists()},
        curves=curves,
        rates=rates,
        initial=initial,
        pictures={path.relative_to(reports).as_posix(): path.read_bytes() for path in pictures},
    )


def read_record(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises
    ------
    UserError
        It is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro report`") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run `dvc checkout`") from None


def read_table(path: Path) -> list[Row]:
    """Return the rows of a CSV file: names as text, all else as numbers, None for an empty cell.

    Raises
    ------
    UserError
        A cell that should hold a number does not.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [{key: _value(key, cell) for key, cell in row.items()} for row in csv.DictReader(file)]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); run `dvc checkout`") from None


def _value(column: str, cell: str) -> Any:
    if column in TEXT or column.endswith("verdict"):
        return cell
    return float(cell) if cell else None
