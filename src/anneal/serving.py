"""The exported predictor: load it, predict arrays, files, folders and archives; used by the pyfunc model and the CLI."""

from __future__ import annotations

import io
import json
import lzma
import os
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from csv import writer
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anneal import calibration, views
from anneal.decoding import as_channels, decode, resize
from anneal.ensemble import COMBINE, FITTED, Floats, combined
from anneal.params import UserError, one_line
from anneal.sources import list_archive, list_folder, printable, read_file
from anneal.store import Images

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 50_000_000
"""Largest image that is decoded, as ``data.max_pixels`` ships; a larger one is more likely a bomb than a photograph."""

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

DAMAGED = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class Prediction:
    """One file's prediction: ``probabilities``, float64 (K,), or the ``error`` for which there are none."""

    source: str
    probabilities: Floats | None
    error: str | None = None


@dataclass(frozen=True)
class Predictor:
    """The exported predictor: members, their weights, views and calibration as evaluate wrote them.

    Parameters
    ----------
    classes
        K names, in the order of the probabilities.
    height, width, channels
        Geometry of the images that `predict` takes.
    preprocessing
        ``size``, ``fit`` and ``interpolation`` of `anneal.decoding.resize`, which files go through first.
    classifiers
        M networks, uint8 NHWC to logits.
    parsed_views, average, combine, weights, calibration
        What becomes of their predictions; see `anneal.ensemble.combined` and `anneal.calibration.apply`.
    """

    classes: list[str]
    height: int
    width: int
    channels: int
    preprocessing: dict[str, Any]
    classifiers: Sequence[torch.nn.Module]
    parsed_views: list[tuple[str, dict[str, Any]]]
    average: str
    combine: str
    weights: list[float] | None
    calibration: dict[str, Any]

    def predict(self, images: Images) -> Floats:
        """Return probabilities, float64 (N, K), of images, uint8 (N, H, W, C).

        Raises
        ------
        UserError
            The images have another type or shape.
        """
        expected = (self.height, self.width, self.channels)
        if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.uint8:
            raise UserError(
                f"images: found {images.dtype} {images.shape}, allowed: uint8 (N, {', '.join(map(str, expected))})"
            )
        size = views.batch_size(*expected)
        parts = [self._predict_batch(images[start : start + size]) for start in range(0, len(images), size)]
        return np.concatenate([np.empty((0, len(self.classes))), *parts])

    def _predict_batch(self, images: Images) -> Floats:
        averaged = views.predict(self.classifiers, images, self.parsed_views, self.average)
        together = combined(averaged, self.combine, self.weights)
        return np.exp(calibration.apply(together, self.calibration))

    def prepare(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> Images:
        """Return an image file's content as `predict` takes it, uint8 (H, W, C), by the same steps as preprocess.

        Raises
        ------
        ValueError
            It cannot be decoded; the reason.
        """
        return as_channels(resize(decode(data, max_pixels=max_pixels), **self.preprocessing), self.channels)

    def predict_files(self, paths: Iterable[Path | str], *, max_pixels: int = MAX_PIXELS) -> Iterator[Prediction]:
        """Predict files, all files below folders, and all files in archives (zip, tar), in sorted order of each.

        Memory is bounded by one batch. A file that cannot be read or decoded yields its error and does not stop the rest.
        """
        size = views.batch_size(self.height, self.width, self.channels)
        waiting: list[Prediction | tuple[str, Images]] = []
        for source, content in _contents(paths):
            if isinstance(content, str):
                waiting.append(Prediction(source, None, content))
            else:
                try:
                    data = content() if callable(content) else content
                    waiting.append((source, self.prepare(data, max_pixels=max_pixels)))
                except OSError as error:
                    waiting.append(Prediction(source, None, error.strerror or str(error)))
                except ValueError as error:
                    waiting.append(Prediction(source, None, str(error)))
            if len(waiting) == size:
                yield from self._flush(waiting)
                waiting = []
        yield from self._flush(waiting)

    def _flush(self, waiting: Sequence[Prediction | tuple[str, Images]]) -> Iterator[Prediction]:
        images = [item[1] for item in waiting if isinstance(item, tuple)]
        rows = iter(self.predict(np.stack(images)) if images else ())
        for item in waiting:
            yield item if isinstance(item, Prediction) else Prediction(item[0], next(rows))


def load_predictor(root: Path | str = Path("."), device: str = "cpu") -> Predictor:
    """Load the predictor that evaluate exported.

    Parameters
    ----------
    root
        Holds reports/evaluation/predictor.json and models/<member>/.
    device
        In torch's words.

    Raises
    ------
    UserError
        Nothing was exported yet, a file is missing or damaged, or members differ in classes or geometry.
    """
    from anneal.models.build import load_classifier

    root = Path(root)
    path = root / "reports" / "evaluation" / "predictor.json"
    try:
        exported = json.loads(path.read_text(encoding="utf-8"))
        members, parsed_views = list(exported["members"]), views.parse_views(exported["views"])
        average, combine, weights = exported["average"], exported["combine"], exported.get("weights")
        # Predictors of earlier versions have a temperature alone.
        fitted = dict(exported.get("calibration") or {"kind": "temperature", "temperature": exported["temperature"]})
        if not members:
            raise ValueError("it names no member")
        if (
            average not in views.AVERAGE
            or combine not in {*COMBINE, *FITTED}
            or fitted["kind"] not in calibration.KINDS
        ):
            raise ValueError(
                f"it names no way to average, combine or calibrate: {average}, {combine}, {fitted['kind']}"
            )
        if combine in FITTED and len(weights) != len(members):
            raise ValueError(f"it has {len(weights)} weights for {len(members)} members")
    except FileNotFoundError:
        raise UserError(f"{path}: no exported predictor; run `dvc repro` first") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from None
    loaded = {name: load_classifier(root / "models" / name, folded=True) for name in members}
    models = [model for _, model in loaded.values()]
    for name, model in zip(loaded, models, strict=True):
        if lacking := [key for key in ("classes", "preprocessing") if key not in model]:
            raise UserError(f"models/{name}: model.json has no {lacking[0]}; run `dvc checkout` or train again")
    first = models[0]
    geometry = {key: first["normalization"][key] for key in ("height", "width", "channels")}
    for name, (_, model) in loaded.items():
        same = all(model[key] == first[key] for key in ("classes", "preprocessing"))
        if not same or any(model["normalization"][key] != value for key, value in geometry.items()):
            raise UserError(f"models/{name}: was trained on other data than the other members; run `dvc repro` first")
    try:
        with np.errstate(all="ignore"):
            tried = combined(np.zeros((len(members), 1, len(first["classes"]))), combine, weights)
            if not np.isfinite(calibration.apply(tried, fitted)).all():
                raise ValueError("weights or calibration give no numbers")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    return Predictor(
        classes=first["classes"],
        **geometry,
        preprocessing=first["preprocessing"],
        classifiers=[classifier.to(device) for classifier, _ in loaded.values()],
        parsed_views=parsed_views,
        average=average,
        combine=combine,
        weights=weights,
        calibration=fitted,
    )


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return UserError(f"{path}: damaged ({reason}); run `dvc checkout` or `dvc repro evaluate`")


# ---- files, folders, archives ----------------------------------------------------------------------------------------


def _contents(paths: Iterable[Path | str]) -> Iterator[tuple[str, bytes | Callable[[], bytes] | str]]:
    """Yield (source, content) of every file, or (source, reason) where there is none."""
    for given in paths:
        shown = printable(str(given))
        try:
            if os.path.isdir(given):
                files = list_folder(Path(given))
            elif _is_archive(given):
                files = list_archive(Path(given))
            else:
                yield shown, partial(read_file, given)
                continue
            for rejected in files.rejected:
                yield f"{shown}/{rejected.source}".rstrip("/"), rejected.reason
            for name, content in files.stream():
                yield f"{shown.rstrip('/')}/{name}", content
        except UserError as error:
            yield shown, str(error).removeprefix(f"data.path: {given} ")
        except DAMAGED as error:
            yield shown, f"is damaged ({' '.join(str(error).split())[:200] or type(error).__name__})"


def _is_archive(path: Path | str) -> bool:
    # By name alone: a picture that carries an archive behind its pixels stays a picture.
    return str(path).lower().endswith(ARCHIVES) and os.path.isfile(path)


# ---- printing --------------------------------------------------------------------------------------------------------


def predictions_table(
    predictions: Iterable[Prediction], classes: Sequence[str], *, csv: bool = False, top: int = 1
) -> Iterator[str]:
    """Yield the lines of a table: label and probability of the ``top`` most probable classes, and the file.

    Parameters
    ----------
    predictions
        As `Predictor.predict_files` yields them; one without probabilities gives no line.
    classes
        K names.
    csv
        Give CSV instead: ``source,predicted,prob_<class>,...``, probabilities in full, as in predictions.parquet.
    top
        How many classes a line of the table shows, at most K.
    """
    if csv:
        yield _csv_line(["source", "predicted", *(f"prob_{name}" for name in classes)])
    shown = [one_line(name) for name in classes]  # a name could otherwise command the terminal
    width = max(map(len, shown))
    for prediction in predictions:
        if prediction.probabilities is None:
            continue
        best = np.argsort(-prediction.probabilities, kind="stable")[: min(top, len(classes))]
        if csv:
            yield _csv_line([prediction.source, classes[best[0]], *map(float, prediction.probabilities)])
        else:
            labels = [f"{shown[index]:<{width}}  {prediction.probabilities[index]:.4f}" for index in best]
            yield "  ".join([*labels, one_line(prediction.source)])


def print_predictions(
    predictor: Predictor,
    paths: Iterable[Path | str],
    *,
    csv: bool = False,
    top: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Predict files and print each as soon as its batch is done; what cannot be used goes to stderr, with the reason.

    Raises
    ------
    UserError
        At the end, where some file could not be used, or there was none.
    """
    count = failed = 0

    def reported() -> Iterator[Prediction]:
        nonlocal count, failed
        for prediction in predictor.predict_files(paths, max_pixels=max_pixels):
            count += 1
            if prediction.error is not None:
                failed += 1
                print(one_line(f"{prediction.source}: {prediction.error}"), file=sys.stderr)
            yield prediction

    for line in predictions_table(reported(), predictor.classes, csv=csv, top=top):
        print(line)
    if not count:
        raise UserError(f"{', '.join(printable(str(path)) for path in paths)}: no files found")
    if failed:
        raise UserError(f"{failed} of {count} files could not be used")


def _csv_line(values: Sequence[Any]) -> str:
    buffer = io.StringIO()
    writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue()
