"""Every member, view and split into figures: what is predicted is combined, calibrated and compared, and written."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from anneal import breakdown, calibration, export, metrics, tta, views
from anneal.baselines import baselines
from anneal.candidates import as_candidate, beside
from anneal.cost import prediction_cost
from anneal.ensemble import COMBINE, Floats, probability_mean
from anneal.figures import absent, headline, split_figures, tracked
from anneal.params import Strict, UserError
from anneal.predicting import Predictions, best_device, load_members, predict_split
from anneal.reporting import evaluation as pictures
from anneal.robustness import RobustnessConfig
from anneal.store import Store, fresh_folder, write_json, write_text

if TYPE_CHECKING:
    import torch

__all__ = [
    "EvaluateConfig",
    "Evaluation",
    "Predictions",
    "TTAConfig",
    "baselines",
    "best_device",
    "evaluate",
    "headline",
    "load_members",
    "predict_split",
    "split_figures",
    "tracked",
    "write_predictions",
    "write_reports",
]

View = str | dict[str, Any]


class TTAConfig(Strict):
    """``evaluate.tta``: the views of an image whose predictions are averaged."""

    views: Annotated[list[View], Field(min_length=1)]
    average: Literal["probability", "logit", "log_probability"]
    select: Literal["none", "greedy"] = "none"

    @field_validator("views")
    @classmethod
    def _known(cls, value: list[View]) -> list[View]:
        return _parsed(views.parse_views, value, "evaluate.tta.views")


class EvaluateConfig(Strict):
    """Section ``evaluate``."""

    splits: Annotated[list[Literal["train", "val", "test"]], Field(min_length=1)]
    tta: TTAConfig
    calibration: Literal["none", "temperature", "vector"]
    grid: list[View | list[View]]
    soups: list[Literal["uniform", "greedy"]]
    bootstrap: Annotated[int, Field(ge=100)]
    mistakes: Annotated[int, Field(ge=0, le=100)]
    label_errors: Annotated[int, Field(ge=0)]
    near_duplicates: bool
    robustness: RobustnessConfig | None

    @field_validator("grid")
    @classmethod
    def _known(cls, value: list[View | list[View]]) -> list[View | list[View]]:
        return _parsed(views.parse_sets, value, "evaluate.grid")

    @field_validator("splits", "soups")
    @classmethod
    def _once_each(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError(f": found {', '.join(value)}, allowed: each once")
        return value


def _parsed(parse: Callable[[Any], object], value: Any, key: str) -> Any:
    """Return the value of a key if it can be parsed; else raise what pydantic puts the key before."""
    try:
        parse(value)
    except UserError as error:
        raise ValueError(str(error).removeprefix(key)) from None
    return value


@dataclass(frozen=True)
class Evaluation:
    """All that `evaluate` found, and `write_reports` writes.

    Parameters
    ----------
    classes
        K names.
    predictor
        What reports/evaluation/predictor.json says: members, combine, weights where it has some, views, average,
        temperature, calibration.
    predictions
        Split to what the members say, in the order of ``evaluate.splits``.
    exported, uncalibrated
        Split to the exported predictor's probabilities, float64 (N, K), and to those before calibration.
    figures
        What reports/metrics.json says.
    tta
        What reports/evaluation/tta.csv says, see `anneal.tta.table`.
    tables
        Name of a file in reports/evaluation/, without ``.csv``, to its rows; see `anneal.breakdown`.
    soups
        What reports/evaluation/soups.json says.
    baselines
        What reports/evaluation/baselines.json says, see `anneal.baselines.baselines`.
    cost
        What reports/evaluation/cost.json says, see `anneal.cost.prediction_cost`.
    warnings
        One line each.
    """

    classes: list[str]
    predictor: dict[str, Any]
    predictions: dict[str, Predictions]
    exported: dict[str, Floats]
    uncalibrated: dict[str, Floats]
    figures: dict[str, Any]
    tta: list[dict[str, Any]]
    tables: dict[str, list[dict[str, Any]]]
    soups: dict[str, Any]
    baselines: dict[str, Any]
    cost: dict[str, Any]
    warnings: list[str]


def evaluate(
    store: Store,
    members: Mapping[str, Path],
    *,
    splits: Sequence[str],
    tta_views: Sequence[View],
    average: str,
    combine: str,
    calibrate: str,
    num_resamples: int,
    seed: int,
    device: str = "cpu",
    select: str = "none",
    grid: Sequence[View | list[View]] = (),
    soups: Sequence[str] = (),
) -> Evaluation:
    """Predict each split with every member under every view, once, and turn it into figures.

    What is fitted is fitted on ``val`` whatever ``splits`` says; ``test`` is read only where ``splits`` has it.

    Parameters
    ----------
    store
        The processed data.
    members
        Name to the folder of model.json and weights.safetensors.
    splits
        Of ``train``, ``val``, ``test``: the splits that get figures.
    tta_views, average
        As in ``evaluate.tta``.
    combine
        A key of `anneal.ensemble.COMBINE` or `anneal.ensemble.FITTED`.
    calibrate
        A key of `anneal.calibration.KINDS`.
    num_resamples, seed
        Of the bootstrap behind each interval.
    device
        In torch's words; on a GPU the last digits differ.
    select
        ``none``: all views are averaged; ``greedy``: the identity and those that help on ``val``.
    grid
        Further sets of views, of `anneal.views.parse_sets`, which get rows of the grid and change nothing else.
    soups
        See `anneal.candidates.soups`; they change nothing else either.

    Raises
    ------
    UserError
        A member is missing or was trained on other data, a split is empty, a member predicts NaN, or a view is none for
        these images or members.
    """
    names = list(members)
    drawn: dict[str, int] = {"num_resamples": num_resamples, "seed": seed}
    classifiers, models = load_members(store, members, device)
    listed, further = _views(store, dict(zip(names, classifiers, strict=True)), tta_views, grid, seed)
    shown = views.with_identity(listed)
    every = views.union([shown, *further.values()])

    fits = export.needs_val(combine=combine, calibrate=calibrate, select=select) or "greedy" in soups
    everything = {
        name: predict_split(classifiers, store.split(name), every, average, names)
        for name in dict.fromkeys(["val", *splits] if fits else splits)
    }
    chosen = export.choose(
        everything["val"] if fits else None,
        listed,
        average=average,
        combine=combine,
        calibrate=calibrate,
        select=select,
    )
    everything = {
        name: replace(found, averaged=found.over(chosen.views, average)) for name, found in everything.items()
    }
    predictions = {name: everything[name] for name in splits}
    uncalibrated = {name: chosen.uncalibrated(found) for name, found in predictions.items()}
    final = {name: calibration.apply(p, chosen.calibration) for name, p in uncalibrated.items()}
    exported = {name: np.exp(p) for name, p in final.items()}

    sets = further if chosen.views == [views.IDENTITY] else {breakdown.EXPORTED: chosen.views, **further}
    others, said = beside(
        soups,
        members,
        models,
        store,
        splits=splits,
        val=everything.get("val"),
        sets=sets,
        average=average,
        device=device,
    )
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, found in predictions.items():
        of_split = breakdown.split_tables(
            name,
            found.labels,
            [as_candidate("single", names, found, sets), *others[name]],
            combine=combine,
            shares=chosen.weights,
            weigh=lambda indices: export.weigh(everything.get("val"), combine, indices),
            averaged=found.averaged,
            uncalibrated=uncalibrated[name],
            exported=final[name] if chosen.is_calibrated else None,
            classes=store.info.classes,
            **drawn,
        )
        for file, rows in of_split.items():
            tables.setdefault(file, []).extend(rows)
    described = chosen.described(names)
    passes = views.passes(chosen.views, store.info.height, store.info.width)
    return Evaluation(
        classes=store.info.classes,
        predictor=described,
        predictions=predictions,
        exported=exported,
        uncalibrated={name: np.exp(p) for name, p in uncalibrated.items()},
        figures={
            name: split_figures(names, found, combine=combine, shares=chosen.weights, exported=exported[name], **drawn)
            for name, found in predictions.items()
        },
        tta=_tta_rows(everything, chosen, shown, splits, **drawn),
        tables=tables,
        soups=said,
        baselines=baselines(store, {name: found.labels for name, found in predictions.items()}, exported, **drawn),
        cost=prediction_cost(models, described["members"], views=len(chosen.views), passes=sum(passes)),
        warnings=_warnings(chosen.views, models, predictions, store.info.classes),
    )


def _views(
    store: Store,
    networks: Mapping[str, torch.nn.Module],
    tta_views: Sequence[View],
    grid: Sequence[View | list[View]],
    seed: int,
) -> tuple[list[views.View], dict[str, list[views.View]]]:
    """Return the views of ``evaluate.tta``, and the sets of ``evaluate.grid`` by their labels, once all networks take them."""
    info = store.info
    listed = views.resolve(views.parse_views(tta_views), channels=info.channels, seed=seed)
    compared = [
        views.resolve(each, channels=info.channels, seed=seed, key="evaluate.grid") for each in views.parse_sets(grid)
    ]
    shape = (info.height, info.width, info.channels)
    views.check_sizes(listed, networks, shape)
    views.check_sizes([view for view in views.union(compared) if view not in listed], networks, shape, "evaluate.grid")
    labels = views.told_apart([views.set_label(each) for each in compared])
    return listed, dict(zip(labels, compared, strict=True))


def _tta_rows(
    everything: Mapping[str, Predictions],
    chosen: export.Export,
    shown: Sequence[views.View],
    splits: Sequence[str],
    *,
    num_resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Return the table of the views of ``evaluate.tta`` and the identity, which are the first that were predicted."""
    size = next(iter(everything.values())).size
    return tta.table(
        views.told_apart([views.label_of(view) for view in shown]),
        {name: found.by_view[:, : len(shown)] for name, found in everything.items()},
        {name: found.labels for name, found in everything.items()},
        chosen=[shown.index(view) for view in chosen.views],
        splits=splits,
        calibrate=chosen.is_calibrated,
        **export.tta_arguments(shown, size, chosen.average, COMBINE.get(chosen.combine, probability_mean)),
        num_resamples=num_resamples,
        seed=seed,
    )


def _warnings(
    exported_views: Sequence[views.View],
    models: Mapping[str, Mapping[str, Any]],
    predictions: Mapping[str, Predictions],
    classes: Sequence[str],
) -> list[str]:
    """Return what a reader of the figures should know, and say it on the terminal."""
    warnings = views.uncovered(exported_views, {name: list(model["augmentation"]) for name, model in models.items()})
    for name, found in predictions.items():
        if without := absent(found.labels, classes):
            warnings.append(f"{name}: has no image of {', '.join(without)}; macro averages leave such a class out")
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    return warnings


# ---- files ------------------------------------------------------------------------------------------------------------


def write_reports(found: Evaluation, reports: Path = Path("reports")) -> None:
    """Write metrics.json, predictions.parquet and evaluation/ below ``reports``; the pictures show the last split."""
    last = list(found.predictions)[-1]
    labels = found.predictions[last].labels
    exported = found.exported[last]
    with fresh_folder(reports / "evaluation") as folder:
        write_json(folder / "predictor.json", found.predictor)
        write_json(folder / "baselines.json", found.baselines)
        write_json(folder / "cost.json", found.cost)
        write_json(folder / "warnings.json", found.warnings)
        write_json(folder / "soups.json", found.soups)
        write_json(folder / "comparisons.json", found.tables["comparisons"])
        for name, entries in found.tables.items():
            header = breakdown.COMPARISON_KEYS if name == "comparisons" else list(entries[0])
            write_text(folder / f"{name}.csv", csv_text(header, [list(entry.values()) for entry in entries]))
        write_text(folder / "tta.csv", csv_text(list(found.tta[0]), [list(row.values()) for row in found.tta]))
        pairs = zip(labels, metrics.predicted(exported), strict=True)
        rows = [(found.classes[actual], found.classes[predicted]) for actual, predicted in pairs]
        write_text(folder / "confusion.csv", csv_text(["actual", "predicted"], rows))
        pictures.confusion_figure(
            metrics.confusion(exported, labels),
            found.classes,
            folder / "confusion.png",
            f"{last}: {len(labels)} images",
        )
        table = metrics.reliability(exported, labels)
        write_text(folder / "reliability.csv", csv_text(list(table[0]), [list(row.values()) for row in table]))
        tables = {"before calibration": metrics.reliability(found.uncalibrated[last], labels), "exported": table}
        if found.predictor["calibration"]["kind"] == "none":
            del tables["before calibration"]
        pictures.reliability_figure(tables, folder / "reliability.png", f"{last}: reliability")
    write_predictions(found, reports / "predictions.parquet")
    write_json(reports / "metrics.json", found.figures)


def write_predictions(found: Evaluation, path: Path) -> None:
    """Write a row an image: split, source, label, predicted, and the exported predictor's ``prob_<class>``, float64."""
    import pyarrow as pa
    import pyarrow.parquet

    classes = np.array(found.classes, dtype=object)
    columns: dict[str, Any] = {
        "split": [name for name, of in found.predictions.items() for _ in of.sources],
        "source": [source for of in found.predictions.values() for source in of.sources],
        "label": np.concatenate([classes[of.labels] for of in found.predictions.values()]),
        "predicted": np.concatenate([classes[metrics.predicted(p)] for p in found.exported.values()]),
    }
    probabilities = np.concatenate(list(found.exported.values()))
    columns |= {f"prob_{name}": probabilities[:, index] for index, name in enumerate(found.classes)}
    temporary = path.with_name(path.name + ".tmp")
    try:
        pyarrow.parquet.write_table(pa.table(columns), temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def csv_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as CSV with a header line, lines ending in a newline alone."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()
