"""Every member, view and split into figures."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from anneal import calibration, metrics, views
from anneal.ensemble import COMBINE, Floats
from anneal.params import Strict, UserError
from anneal.reporting import evaluation as pictures
from anneal.store import Labels, Split, Store, fresh_folder, write_json, write_text

if TYPE_CHECKING:
    import torch

View = str | dict[str, Any]


class TTAConfig(Strict):
    """``evaluate.tta``: the views of an image whose predictions are averaged."""

    views: Annotated[list[View], Field(min_length=1)]
    average: Literal["probability", "logit"]

    @field_validator("views")
    @classmethod
    def _known(cls, value: list[View]) -> list[View]:
        try:
            views.parse_views(value)
        except UserError as error:
            raise ValueError(str(error).removeprefix("evaluate.tta.views")) from None
        return value


class EvaluateConfig(Strict):
    """Section ``evaluate``."""

    splits: Annotated[list[Literal["train", "val", "test"]], Field(min_length=1)]
    tta: TTAConfig
    calibration: Literal["none", "temperature"]
    bootstrap: Annotated[int, Field(ge=100)]

    @field_validator("splits")
    @classmethod
    def _once_each(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError(f": found {', '.join(value)}, allowed: each split once")
        return value


@dataclass(frozen=True)
class Predictions:
    """What the members say about one split.

    Parameters
    ----------
    labels
        int64 (N,).
    sources
        N names of files.
    plain, averaged
        Log-probabilities, float64 (M, N, K): of the images as they are, and averaged over the views.
    """

    labels: Labels
    sources: list[str]
    plain: Floats
    averaged: Floats


@dataclass(frozen=True)
class Evaluation:
    """All that `evaluate` found, and `write_reports` writes.

    Parameters
    ----------
    classes
        K names.
    predictor
        What reports/evaluation/predictor.json says: members, combine, views, average, temperature.
    predictions
        Split to what the members say, in the order of ``evaluate.splits``.
    exported, uncalibrated
        Split to the exported predictor's probabilities, float64 (N, K), and to those before the temperature.
    figures
        What reports/metrics.json says.
    baselines
        Figures of the classes' shares in the training split as a constant prediction, by split.
    warnings
        One line each.
    """

    classes: list[str]
    predictor: dict[str, Any]
    predictions: dict[str, Predictions]
    exported: dict[str, Floats]
    uncalibrated: dict[str, Floats]
    figures: dict[str, Any]
    baselines: dict[str, Any]
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
) -> Evaluation:
    """Predict each split with every member under every view, once, and turn it into figures.

    The temperature is fitted on ``val`` whatever ``splits`` says; ``test`` is read only where ``splits`` has it.

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
        A key of `anneal.ensemble.COMBINE`.
    calibrate
        ``none`` or ``temperature``.
    num_resamples, seed
        Of the bootstrap behind each interval.
    device
        In torch's words; on a GPU the last digits differ.

    Raises
    ------
    UserError
        A member is missing or was trained on other data, a split is empty, a member predicts NaN.
    """
    parsed = views.parse_views(tta_views)
    classifiers, augmentations = load_members(store, members, device)
    warnings = views.uncovered(parsed, augmentations)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)

    everything = {
        name: predict_split(classifiers, store.split(name), parsed, average, list(members))
        for name in dict.fromkeys(["val", *splits] if calibrate == "temperature" else splits)
    }
    uncalibrated = {name: COMBINE[combine](found.averaged) for name, found in everything.items()}
    temperature = 1.0
    if calibrate == "temperature":
        temperature = calibration.fit_temperature(uncalibrated["val"], everything["val"].labels)
    exported = {name: np.exp(calibration.apply_temperature(p, temperature)) for name, p in uncalibrated.items()}

    predictions = {name: everything[name] for name in splits}
    for name, found in predictions.items():
        absent = [
            c
            for c, n in zip(
                store.info.classes, np.bincount(found.labels, minlength=len(store.info.classes)), strict=True
            )
            if not n
        ]
        if absent:
            warnings.append(f"{name}: has no image of {', '.join(absent)}; macro averages leave such a class out")
            print(f"warning: {warnings[-1]}", file=sys.stderr)
    return Evaluation(
        classes=store.info.classes,
        predictor={
            "members": list(members),
            "combine": combine,
            "views": views.entries_of(parsed),
            "average": average,
            "temperature": temperature,
        },
        predictions=predictions,
        exported={name: exported[name] for name in splits},
        uncalibrated={name: np.exp(uncalibrated[name]) for name in splits},
        figures={
            name: split_figures(
                list(members), found, combine=combine, exported=exported[name], num_resamples=num_resamples, seed=seed
            )
            for name, found in predictions.items()
        },
        baselines=baselines(store, {name: found.labels for name, found in predictions.items()}),
        warnings=warnings,
    )


def load_members(
    store: Store, members: Mapping[str, Path], device: str
) -> tuple[list[torch.nn.Module], dict[str, list[str]]]:
    """Load classifiers, and by member the names of the transforms that it was trained with.

    Raises
    ------
    UserError
        A member is missing, or its classes or image size are not those of the store.
    """
    from anneal.models.build import load_classifier

    classifiers: list[torch.nn.Module] = []
    augmentations = {}
    geometry = {name: getattr(store.info, name) for name in ("height", "width", "channels")}
    for name, folder in members.items():
        classifier, model = load_classifier(folder, folded=True)
        of_model = {key: model["normalization"][key] for key in geometry}
        if model["classes"] != store.info.classes or of_model != geometry:
            raise UserError(
                f"{folder}: was trained on other data than {store.path}; run `dvc repro train@{name}` first"
            )
        classifiers.append(classifier.to(device))
        augmentations[name] = list(model["augmentation"])
    return classifiers, augmentations


def best_device(accelerator: str) -> str:
    """Return the device in torch's words for ``hardware.accelerator``: one GPU where it asks for one and there is one."""
    import torch

    if accelerator in ("auto", "gpu") and torch.cuda.is_available():
        return "cuda"
    return "mps" if accelerator in ("auto", "mps") and torch.backends.mps.is_available() else "cpu"


def predict_split(
    classifiers: Sequence[torch.nn.Module],
    split: Split,
    parsed_views: Sequence[tuple[str, dict[str, Any]]],
    average: str,
    members: Sequence[str],
) -> Predictions:
    """Predict one split in batches of a fixed size, so that a rerun gives the same bytes.

    Raises
    ------
    UserError
        The split is empty, or a member predicts what is not finite.
    """
    from tqdm import tqdm

    name, total = split.path.name, len(split)
    if not total:
        raise UserError(f"evaluate.splits: {name} holds no image, allowed: splits with images; see reports/data.json")
    size = views.batch_size(*split.shards[0].shape[1:])
    plain, averaged = [], []
    done, spoke = 0, time.monotonic()
    interactive = sys.stderr.isatty()
    with tqdm(total=total, desc=f"predict {name}", unit="image", disable=not interactive, leave=False) as bar:
        for images, _ in split.batches(size):
            batch_plain, batch_averaged = views.predict(classifiers, images, parsed_views, average)
            plain.append(batch_plain)
            averaged.append(batch_averaged)
            bar.update(len(images))
            done += len(images)
            if not interactive and (done == total or time.monotonic() - spoke > 5):
                print(f"predict {name}: {done} of {total} images, {len(members)} members", file=sys.stderr)
                spoke = time.monotonic()
    found = Predictions(
        labels=split.labels,
        sources=[sample.source for sample in split.samples()],
        plain=np.concatenate(plain, axis=1),
        averaged=np.concatenate(averaged, axis=1),
    )
    for member, values, over_views in zip(members, found.plain, found.averaged, strict=True):
        if not (np.isfinite(values).all() and np.isfinite(over_views).all()):
            raise UserError(f"models/{member}: predicts NaN or infinity: its training diverged; lower optimizer.*.lr")
    return found


def split_figures(
    members: Sequence[str], found: Predictions, *, combine: str, exported: Floats, num_resamples: int, seed: int
) -> dict[str, Any]:
    """Return one split's entry of metrics.json.

    ``members``: each alone; ``single`` and ``tta``: the members' mean, without and with views; ``ensemble`` and
    ``ensemble_tta``: the members combined, without and with views, the latter with the temperature, which makes it the
    exported predictor; ``uncalibrated``: that without the temperature.

    Parameters
    ----------
    members
        M names.
    found
        Their predictions.
    combine
        A key of `anneal.ensemble.COMBINE`.
    exported
        Probabilities of the exported predictor, float64 (N, K).
    num_resamples, seed
        Of the bootstrap.
    """
    count = len(members)
    predictors = [
        *np.exp(found.plain),
        *np.exp(found.averaged),
        np.exp(COMBINE[combine](found.plain)),
        exported,
        np.exp(COMBINE[combine](found.averaged)),
    ]
    values = [metrics.figures(p, found.labels) for p in predictors]
    resampled = metrics.bootstrap(predictors, found.labels, num_resamples=num_resamples, seed=seed)
    each = [metrics.with_intervals(v, r) for v, r in zip(values, resampled, strict=True)]
    single, tta = (
        metrics.with_intervals(metrics.mean(values[chosen]), metrics.mean(resampled[chosen]))
        for chosen in (slice(0, count), slice(count, 2 * count))
    )
    ensemble, ensemble_tta, uncalibrated = each[2 * count :]
    return {
        "members": dict(zip(members, each[:count], strict=True)),
        "single": single,
        "tta": tta,
        "ensemble": ensemble,
        "ensemble_tta": ensemble_tta,
        "uncalibrated": uncalibrated,
    }


def baselines(store: Store, labels: Mapping[str, Labels]) -> dict[str, Any]:
    """Return the figures of the training split's class shares as a constant prediction, for each split's labels.

    Its accuracy is that of always saying the largest class; a classifier that does not beat it has learnt nothing.
    """
    counts = np.bincount(store.split("train").labels, minlength=len(store.info.classes))
    shares = counts / counts.sum()
    return {
        "majority_class": {
            "class": store.info.classes[int(counts.argmax())],
            **{name: metrics.figures(np.tile(shares, (len(of), 1)), of) for name, of in labels.items()},
        }
    }


def tracked(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics.json as MLflow's metrics: ``test/accuracy`` is the exported predictor's, others ``test/ensemble/accuracy``.

    The ends of the exported predictor's intervals are ``test/accuracy_ci_low`` and ``test/accuracy_ci_high``.
    """
    flat: dict[str, float] = {}
    for split, of_split in figures.items():
        groups = {f"members/{name}/": values for name, values in of_split["members"].items()}
        groups |= {f"{name}/": of_split[name] for name in ("single", "tta", "ensemble", "uncalibrated")}
        groups[""] = of_split["ensemble_tta"]
        for prefix, values in groups.items():
            for name, value in values.items():
                if not isinstance(value, list):
                    flat[f"{split}/{prefix}{name}"] = value
                elif not prefix:
                    flat[f"{split}/{name}_low"], flat[f"{split}/{name}_high"] = value
    return flat


def headline(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the few metrics by which runs are compared, a row of the runs table each."""
    names = (
        "accuracy",
        "macro_accuracy",
        "macro_f1",
        "nll",
        "ece",
        "single/accuracy",
        "tta/accuracy",
        "ensemble/accuracy",
    )
    return {name: value for name, value in tracked(figures).items() if name.split("/", 1)[1] in names}


# ---- files ------------------------------------------------------------------------------------------------------------


def write_reports(found: Evaluation, reports: Path = Path("reports")) -> None:
    """Write metrics.json, predictions.parquet and evaluation/ below ``reports``; the pictures show the last split."""
    last = list(found.predictions)[-1]
    labels = found.predictions[last].labels
    exported = found.exported[last]
    with fresh_folder(reports / "evaluation") as folder:
        write_json(folder / "predictor.json", found.predictor)
        write_json(folder / "baselines.json", found.baselines)
        write_json(folder / "warnings.json", found.warnings)
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
        if found.predictor["temperature"] == 1.0:
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
