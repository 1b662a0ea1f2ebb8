"""Networks, splits and views into log-probabilities, nothing combined yet."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anneal import tta, views
from anneal.ensemble import Floats
from anneal.params import UserError
from anneal.store import Labels, Split, Store
from anneal.views import View

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Predictions:
    """What the members say about one split.

    Parameters
    ----------
    labels
        int64 (N,).
    sources
        N names of files.
    size
        Height and width of the images.
    views, average
        The E views that were predicted, parsed, and how the images that each stands for were averaged.
    plain, averaged
        Log-probabilities, float64 (M, N, K): of the images as they are, and averaged over the exported predictor's views;
        until these are chosen the same as ``plain``.
    by_view
        Log-probabilities, float64 (M, E, N, K), of each view.
    otherwise
        The same with the images of a view averaged in the other of the two ways, by ``probability`` or by ``logit``.
    """

    labels: Labels
    sources: list[str]
    size: tuple[int, int]
    views: list[View]
    average: str
    plain: Floats
    averaged: Floats
    by_view: Floats
    otherwise: Floats

    def over(self, chosen: Sequence[View], average: str) -> Floats:
        """Return the mean over some of the views in a way of `anneal.views.AVERAGE`: log-probabilities, float64 (M, N, K)."""
        same_way = (average == "probability") == (self.average == "probability")
        weights = views.num_images(self.views, *self.size)
        indices = [self.views.index(view) for view in chosen]
        return tta.averaged(self.by_view if same_way else self.otherwise, weights, average, indices)


def load_members(
    store: Store, members: Mapping[str, Path], device: str
) -> tuple[list[torch.nn.Module], dict[str, dict[str, Any]]]:
    """Load classifiers, and by member what model.json says.

    Raises
    ------
    UserError
        A member is missing, or its classes or image size are not those of the store.
    """
    from anneal.models.build import load_classifier

    classifiers: list[torch.nn.Module] = []
    models = {}
    geometry = {name: getattr(store.info, name) for name in ("height", "width", "channels")}
    for name, folder in members.items():
        classifier, model = load_classifier(folder, folded=True)
        of_model = {key: model["normalization"][key] for key in geometry}
        if model["classes"] != store.info.classes or of_model != geometry:
            raise UserError(
                f"{folder}: was trained on other data than {store.path}; run `dvc repro train@{name}` first"
            )
        classifiers.append(classifier.to(device))
        models[name] = model
    return classifiers, models


def best_device(accelerator: str) -> str:
    """Return the device in torch's words for ``hardware.accelerator``: one GPU where it asks for one and there is one."""
    import torch

    if accelerator in ("auto", "gpu") and torch.cuda.is_available():
        return "cuda"
    return "mps" if accelerator in ("auto", "mps") and torch.backends.mps.is_available() else "cpu"


def predict_split(
    classifiers: Sequence[torch.nn.Module],
    split: Split,
    parsed_views: Sequence[View],
    average: str,
    members: Sequence[str],
) -> Predictions:
    """Predict one split in batches of a fixed size, so that a rerun gives the same bytes; the identity is among the views.

    Raises
    ------
    UserError
        The split is empty, or a member predicts what is not finite.
    """
    from tqdm import tqdm

    name, total = split.path.name, len(split)
    if not total:
        raise UserError(f"evaluate.splits: {name} holds no image, allowed: splits with images; see reports/data.json")
    height, width, channels = split.shards[0].shape[1:]
    weights = views.num_images(parsed_views, height, width)
    other = "logit" if average == "probability" else "probability"
    by_view: dict[str, list[Floats]] = {average: []} if max(weights) == 1 else {average: [], other: []}
    done, spoke = 0, time.monotonic()
    interactive = sys.stderr.isatty()
    with tqdm(total=total, desc=f"predict {name}", unit="image", disable=not interactive, leave=False) as bar:
        for images, _ in split.batches(views.batch_size(height, width, channels)):
            batch = views.predict_images(classifiers, images, parsed_views)
            for way, parts in by_view.items():
                parts.append(np.stack([np.stack([views.AVERAGE[way](m) for m in view]) for view in batch], axis=1))
            bar.update(len(images))
            done += len(images)
            if not interactive and (done == total or time.monotonic() - spoke > 5):
                print(f"predict {name}: {done} of {total} images, {len(members)} members", file=sys.stderr)
                spoke = time.monotonic()
    values = np.concatenate(by_view[average], axis=2)
    for member, of_member in zip(members, values, strict=True):
        if not np.isfinite(of_member).all():
            raise UserError(f"models/{member}: predicts NaN or infinity: its training diverged; lower optimizer.*.lr")
    plain = values[:, parsed_views.index(views.IDENTITY)]
    return Predictions(
        labels=split.labels,
        sources=[sample.source for sample in split.samples()],
        size=(height, width),
        views=list(parsed_views),
        average=average,
        plain=plain,
        averaged=plain,
        by_view=values,
        otherwise=np.concatenate(by_view[other], axis=2) if other in by_view else values,
    )
