"""What stands behind the figures: mistakes, labels that look wrong, near copies of training images, corruptions.

Written beside the tables of `anneal.evaluation`, in reports/evaluation/:

- ``mistakes.json``, ``label_errors.json`` and ``.csv``, ``near_duplicates.json`` and ``.csv``, ``robustness.csv`` and
  ``.png``; what is switched off has no file;
- a folder of pictures beside each JSON file, which names them relative to reports/evaluation/.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anneal import calibration, views
from anneal.ensemble import Floats, combined
from anneal.evaluation import Evaluation, csv_text
from anneal.label_errors import EXPORTED, LabelErrors, examine, examine_train
from anneal.label_errors import verdict as labels_verdict
from anneal.metrics import Integers, predicted
from anneal.mistakes import confident_errors, confused_pairs
from anneal.near_duplicates import MOST_DISTANCE, Copies, find_copies, shares
from anneal.near_duplicates import verdict as copies_verdict
from anneal.predicting import load_members
from anneal.reporting import mistakes as pictures
from anneal.robustness import drawn, robustness_table
from anneal.store import Images, Split, Store, fresh_folder, write_json, write_text

if TYPE_CHECKING:
    import torch

MOST_LISTED = 200
"""Entries of a JSON file, at most; the CSV file beside it has all."""

MEAN_OF = 1000
"""Training images behind the baseline of the saliency, evenly spaced."""


@dataclass
class Inspection:
    """What `inspect` found: by name of a file in reports/evaluation/, what it holds.

    Parameters
    ----------
    json, csv
        Values of a JSON file, rows of a CSV file (with its columns, for there may be none).
    images
        Path of a picture to an image, uint8 (H, W, C), or to an image and its attributions, float64 (H, W).
    verdicts
        Sentences for the terminal, those that ask for something to be done.
    """

    json: dict[str, Any] = field(default_factory=dict)
    csv: dict[str, tuple[list[str], list[dict[str, Any]]]] = field(default_factory=dict)
    images: dict[str, Images | tuple[Images, Floats]] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)


def inspect(
    found: Evaluation,
    store: Store,
    folders: Mapping[str, Path],
    *,
    mistakes: int,
    label_errors: int,
    near_duplicates: bool,
    robustness: Mapping[str, Any] | None,
    seed: int,
    device: str = "cpu",
) -> Inspection:
    """Look at what an evaluation found, image by image.

    ``test`` is read only where it was evaluated. Where ``val`` alone was, as in grids and searches,
    corruptions and the labels of ``train`` are left out, which take longest.

    Parameters
    ----------
    found
        The evaluation.
    store, folders, device
        What it was made of; see `anneal.evaluation.evaluate`.
    mistakes
        Pictures of mistakes, of suspect labels and of near copies, each; 0: none, and no mistakes.json.
    label_errors
        Training images whose labels are examined, drawn where there are more; 0: no labels at all.
    near_duplicates
        Whether to look for near copies.
    robustness
        ``corruptions`` and ``images`` of `anneal.robustness`, the images those of the last split; None: off.
    seed
        Of what is drawn.
    """
    result = Inspection()
    in_full = list(found.exported) != ["val"]
    last = list(found.exported)[-1]
    classifiers: list[torch.nn.Module] = []
    if mistakes or in_full:
        classifiers, _ = load_members(store, {name: folders[name] for name in found.predictor["members"]}, device)
    if mistakes:
        _add_mistakes(result, found, store, classifiers, last, mistakes)
    if label_errors:
        examined = classifiers if in_full else []
        _add_label_errors(result, found, store, examined, most=label_errors, num_pictures=mistakes, seed=seed)
    if near_duplicates:
        _add_near_duplicates(result, found, store, mistakes)
    if robustness and robustness["corruptions"] and in_full:
        split = store.split(last)
        indices = drawn(len(split), robustness["images"], seed)
        rows = robustness_table(
            last,
            lambda images: exported_probabilities(classifiers, images, found.predictor),
            split.take(indices),
            split.labels[indices],
            corruptions=robustness["corruptions"],
            seed=seed,
            indices=indices,
        )
        result.csv["robustness"] = (list(rows[0]), rows)
    return result


def exported_probabilities(
    classifiers: Sequence[torch.nn.Module], images: Images, predictor: Mapping[str, Any]
) -> Floats:
    """Return the exported predictor's probabilities, float64 (N, K), of images as they are, without its views.

    Parameters
    ----------
    classifiers
        Its members.
    images
        uint8 (N, H, W, C).
    predictor
        What predictor.json says.
    """
    size = views.batch_size(*images.shape[1:])
    parts = []
    for start in range(0, len(images), size):
        each = views.predict(classifiers, images[start : start + size], [views.IDENTITY], predictor["average"])
        together = combined(each, predictor["combine"], predictor.get("weights"))
        parts.append(np.exp(calibration.apply(together, predictor["calibration"])))
    return np.concatenate(parts)


# ---- mistakes -----------------------------------------------------------------------------------------------------------


def _add_mistakes(
    result: Inspection,
    found: Evaluation,
    store: Store,
    classifiers: Sequence[torch.nn.Module],
    name: str,
    num_pictures: int,
) -> None:
    from anneal.saliency import attributions

    probabilities, of, split = found.exported[name], found.predictions[name], store.split(name)
    guesses = predicted(probabilities)
    errors = confident_errors(probabilities, of.labels)
    shown = errors[:num_pictures]
    images = split.take(shown)
    print(f"saliency of {len(shown)} mistakes", file=sys.stderr)
    maps = attributions(
        classifiers,
        images,
        predicted=guesses[shown],
        labels=of.labels[shown],
        baseline=mean_image(store.split("train")),
        weights=found.predictor.get("weights"),
    )
    entries = []
    for number, (index, image, attribution) in enumerate(zip(shown, images, maps, strict=True)):
        picture, saliency = f"mistakes/error-{number:02d}.png", f"mistakes/saliency-{number:02d}.png"
        result.images |= {picture: image, saliency: (image, attribution)}
        entries.append(
            {
                "source": of.sources[index],
                "label": found.classes[of.labels[index]],
                "predicted": found.classes[guesses[index]],
                "probability": float(probabilities[index, guesses[index]]),
                "probability_of_label": float(probabilities[index, of.labels[index]]),
                "picture": picture,
                "saliency": saliency,
            }
        )
    confused = []
    for number, pair in enumerate(confused_pairs(probabilities, of.labels)):
        paths = [f"mistakes/confused-{number:02d}-{i}.png" for i in range(len(pair.examples))]
        result.images |= dict(zip(paths, split.take(pair.examples), strict=True))
        confused.append(
            {
                "actual": found.classes[pair.actual],
                "predicted": found.classes[pair.predicted],
                "count": pair.count,
                "share_of_actual": pair.share,
                "pictures": paths,
            }
        )
    result.json["mistakes"] = {
        "split": name,
        "count": len(errors),
        "images": len(of.labels),
        "errors": entries,
        "confused": confused,
    }


def mean_image(split: Split) -> Floats:
    """Return the mean of at most `MEAN_OF` images, evenly spaced: float64 (H, W, C), in 0..255."""
    chosen = np.unique(np.linspace(0, len(split) - 1, min(len(split), MEAN_OF)).astype(np.int64))
    return np.asarray(split.take(chosen).mean(axis=0, dtype=np.float64))


# ---- labels -------------------------------------------------------------------------------------------------------------


def _add_label_errors(
    result: Inspection,
    found: Evaluation,
    store: Store,
    classifiers: Sequence[torch.nn.Module],
    *,
    most: int,
    num_pictures: int,
    seed: int,
) -> None:
    examined: dict[str, LabelErrors | None] = {}
    places: dict[str, Integers] = {}
    if classifiers:
        print("labels of training images, by their neighbours", file=sys.stderr)
        examined["train"], places["train"] = examine_train(store, classifiers, most=most, seed=seed)
    for name, probabilities in calibrated(found).items():
        if name != "train":
            labels = found.predictions[name].labels
            examined[name], places[name] = examine(probabilities, labels, EXPORTED), np.arange(len(labels))
    if not examined:
        return
    judged = {name: errors for name, errors in examined.items() if errors is not None}
    rows = []
    for name, errors in judged.items():
        split = store.split(name)
        sources = [sample.source for sample in split.samples()]
        for rank, (index, suggested, confidence) in enumerate(
            zip(places[name][errors.suspects], errors.suggested, errors.self_confidence, strict=True)
        ):
            picture = f"label_errors/{name}-{rank:02d}.png" if rank < num_pictures else None
            if picture:
                result.images[picture] = split.take([index])[0]
            rows.append(
                {
                    "split": name,
                    "source": sources[index],
                    "label": found.classes[split.labels[index]],
                    "suggested": found.classes[suggested],
                    "self_confidence": float(confidence),
                    "picture": picture,
                }
            )
    columns = ["split", "source", "label", "suggested", "self_confidence"]
    result.csv["label_errors"] = (columns, rows)
    verdict = labels_verdict(examined)
    result.json["label_errors"] = {
        "splits": {
            name: {
                "images": errors.images,
                "suspected": len(errors.suspects),
                "estimated_share": errors.share,
                "share_ci": [errors.low, errors.high],
                "method": errors.method,
            }
            for name, errors in judged.items()
        },
        "items": _listed(rows),
        "verdict": verdict,
        "shown": any(errors.shown for errors in judged.values()),
    }
    if any(errors.shown for errors in judged.values()):
        result.verdicts.append(verdict)


def calibrated(found: Evaluation) -> dict[str, Floats]:
    """Return the exported predictor's probabilities by split; where the recipe asks for no calibration, by a temperature.

    That is fitted on ``val`` and used for nothing else: a predictor that is too sure of itself takes its own mistakes for wrong
    labels. Without ``val`` among the splits there is none to judge by.
    """
    if found.predictor["calibration"]["asked"] != "none":
        return found.exported
    if "val" not in found.exported:
        return {}
    logarithms = {name: np.log(np.maximum(p, np.finfo(np.float64).tiny)) for name, p in found.exported.items()}
    temperature = calibration.fit_temperature(logarithms["val"], found.predictions["val"].labels)
    return {name: np.exp(calibration.apply_temperature(p, temperature)) for name, p in logarithms.items()}


def _listed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most `MOST_LISTED` rows of each split."""
    splits = dict.fromkeys(row["split"] for row in rows)
    return [row for split in splits for row in [row for row in rows if row["split"] == split][:MOST_LISTED]]


# ---- near copies --------------------------------------------------------------------------------------------------------


def _add_near_duplicates(result: Inspection, found: Evaluation, store: Store, num_pictures: int) -> None:
    train = store.split("train")
    splits = {name: store.split(name) for name in found.predictions if name != "train"}
    copies: dict[str, Copies] = {name: find_copies(train, split) for name, split in splits.items()}
    if not copies:
        return
    train_sources = [sample.source for sample in train.samples()]
    rows = []
    for name, of in copies.items():
        split, sources = splits[name], found.predictions[name].sources
        for rank, (index, original, distance) in enumerate(
            zip(of.indices, of.train_indices, of.distances, strict=True)
        ):
            paths: list[str | None] = [None, None]
            if rank < num_pictures:
                paths = [f"near_duplicates/{name}-{rank:02d}{which}.png" for which in ("", "-train")]
                result.images |= {
                    str(paths[0]): split.take([index])[0],
                    str(paths[1]): train.take([original])[0],
                }
            rows.append(
                {
                    "split": name,
                    "source": sources[index],
                    "label": found.classes[split.labels[index]],
                    "train_source": train_sources[original],
                    "train_label": found.classes[train.labels[original]],
                    "distance": float(distance),
                    "picture": paths[0],
                    "train_picture": paths[1],
                }
            )
    verdict = copies_verdict(copies)
    columns = ["split", "source", "label", "train_source", "train_label", "distance"]
    result.csv["near_duplicates"] = (columns, rows)
    result.json["near_duplicates"] = {
        "max_distance": MOST_DISTANCE,
        "splits": shares(copies),
        "pairs": _listed(rows),
        "verdict": verdict,
    }
    if any(of.leak for of in copies.values()):
        result.verdicts.append(verdict)


# ---- MLflow -------------------------------------------------------------------------------------------------------------


def inspection_metrics(found: Inspection) -> dict[str, float]:
    """Return what MLflow's table of runs can be sorted by, as ``<split>/<name>``.

    ``suspected_labels`` and ``near_duplicates``: shares of the split's images; ``corrupted_accuracy``: the mean over all
    corruptions and severities.
    """
    values: dict[str, float] = {}
    for name, of in found.json.get("label_errors", {"splits": {}})["splits"].items():
        values[f"{name}/suspected_labels"] = of["suspected"] / of["images"]
    for name, of in found.json.get("near_duplicates", {"splits": {}})["splits"].items():
        values[f"{name}/near_duplicates"] = of["share"]
    corrupted = [row for row in found.csv.get("robustness", ([], []))[1] if row["severity"]]
    if corrupted:
        values[f"{corrupted[0]['split']}/corrupted_accuracy"] = float(np.mean([row["accuracy"] for row in corrupted]))
    return values


# ---- files --------------------------------------------------------------------------------------------------------------


def write_inspection(found: Inspection, folder: Path) -> None:
    """Write the files into ``folder``, reports/evaluation/, and say on stderr what asks for something to be done."""
    for name, value in found.json.items():
        write_json(folder / f"{name}.json", value)
    for name, (columns, rows) in found.csv.items():
        write_text(folder / f"{name}.csv", csv_text(columns, [[row[key] for key in columns] for row in rows]))
    for kind in dict.fromkeys(Path(path).parent.name for path in found.images):
        with fresh_folder(folder / kind) as unfinished:
            for path, image in found.images.items():
                if Path(path).parent.name != kind:
                    continue
                target = unfinished / Path(path).name
                if isinstance(image, tuple):
                    pictures.save_saliency(*image, target)
                else:
                    pictures.save_image(image, target)
    if "robustness" in found.csv:
        pictures.robustness_figure(found.csv["robustness"][1], folder / "robustness.png")
    for line in found.verdicts:
        print(f"warning: {line}", file=sys.stderr)
