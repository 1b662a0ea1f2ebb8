"""What a run left behind, as tables; and the figures that rules read from them."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anneal.params import UserError

History = dict[str, list[float]]
"""Columns of history.csv, one value an epoch."""

Row = dict[str, Any]
"""A row of layers.csv or initial.csv; None for an empty cell."""

Curve = npt.NDArray[np.float64]

SECTIONS = ("model", "augment", "optimizer", "batch", "loss", "regularization")
"""Of params.yaml, that the stage reads."""

FLOOR = 0.05
"""Added to a loss that others are divided by: a relative change of a loss near 0 says nothing."""


@dataclass(frozen=True)
class Run:
    """One member's curves and the recipe facts that say how to read them.

    Parameters
    ----------
    history
        Columns of history.csv; empty where the run broke off in its first epoch.
    num_val, num_classes
        Size of the validation split, and number of classes.
    class_counts
        Training images of each class.
    steps
        Columns of steps.csv.
    layers, initial
        Rows of layers.csv and initial.csv.
    optimizer, model
        Names in the recipe, for the keys in the advice.
    loss
        ``loss.name``: what training losses are; all others are plain cross entropy.
    microbatch
        Samples of a forward pass, over which batch norm has its statistics.
    distorted
        Training accuracy is measured on augmented images or under dropout, hence lower than on clean ones.
    mixed
        Mixup or CutMix is on: that training accuracy says nothing.
    one_rate
        All layers learn at the same rate.
    recipe
        Sections of params.yaml, as far as they are known, which advice is given for.

    Where the history has the accuracy on training images as they are stored, that is read instead, and the last two play no
    part.
    """

    history: History
    num_val: int
    num_classes: int
    class_counts: Sequence[int] = ()
    steps: History = field(default_factory=dict)
    layers: Sequence[Row] = ()
    initial: Sequence[Row] = ()
    optimizer: str = "SGD"
    model: str = "resnet"
    loss: str = "cross_entropy"
    microbatch: int | None = None
    distorted: bool = True
    mixed: bool = False
    one_rate: bool = True
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def curve(self, name: str) -> Curve:
        """Return a column as float64, one value an epoch; all NaN where the history has none of that name."""
        return np.asarray(self.history.get(name, [math.nan] * self.epochs), dtype=np.float64)

    @property
    def epochs(self) -> int:
        """Number of epochs."""
        return len(self.history.get("val_loss", []))

    @property
    def chance(self) -> float:
        """Cross entropy of a network that knows nothing: ``ln(classes)``."""
        return math.log(self.num_classes)

    @property
    def first_loss(self) -> float:
        """Loss of the first step, as it was trained on; that of the first epoch where steps are not known."""
        losses = self.steps.get("loss") or self.history.get("train_loss") or [math.nan]
        return float(losses[0])

    @property
    def train_chance(self) -> float:
        """Training loss of a network that knows nothing: `chance` for cross entropy, else the first step's."""
        return self.chance if self.loss == "cross_entropy" else self.first_loss

    @property
    def train_left(self) -> float:
        """Loss on training images over that of chance at the end: of images as stored, else as they were trained on."""
        if self.as_stored:
            return float(end(self.curve("train_eval_loss")).mean()) / self.chance
        return float(end(self.curve("train_loss")).mean()) / self.train_chance

    @property
    def annealed(self) -> bool:
        """Whether the learning rate came down below a tenth of its peak."""
        rate = self.curve("lr")
        return bool(rate[-1] < 0.1 * rate.max())

    @property
    def as_stored(self) -> bool:
        """Whether the accuracy on training images as they are stored is known."""
        return bool(self.epochs and np.isfinite(self.curve("train_eval_accuracy")[-1]))

    @property
    def train_accuracy(self) -> float | None:
        """The last training accuracy that says how well the network fits; None where none does."""
        if self.as_stored:
            return float(self.history["train_eval_accuracy"][-1])
        return None if self.mixed else float(self.history["train_accuracy"][-1])

    @property
    def gap(self) -> float | None:
        """That accuracy less the last validation accuracy."""
        train = self.train_accuracy
        return None if train is None else train - float(self.history["val_accuracy"][-1])

    @property
    def handicap(self) -> float:
        """Share of what was learnt of training images as stored that is lost as trained on, in the second half of the run.

        NaN where it is not known.
        """
        stored, trained = (float(late(self.curve(name)).mean()) for name in ("train_eval_accuracy", "train_accuracy"))
        return 1 - self.learnt(trained) / max(self.learnt(stored), 1e-12)

    def learnt(self, accuracy: float) -> float:
        """Return an accuracy counted from chance: 0.5 is nothing with two classes, and much with a hundred."""
        return (accuracy - 1 / self.num_classes) / (1 - 1 / self.num_classes)

    def standard_error(self, accuracy: float) -> float:
        """Return the standard error of a validation accuracy: ``sqrt(p (1 - p) / n)``, p drawn to a half by two images.

        Without these (Agresti & Coull 1998) an accuracy of 1 on ten images would have no error.
        """
        n = self.num_val + 4
        p = (accuracy * self.num_val + 2) / n
        return math.sqrt(p * (1 - p) / n)

    @property
    def standard_error_of_gap(self) -> float:
        """Standard error of the gap; of training accuracy only where it is that of a sample, which is as large as ``num_val``.

        Or smaller, where there are thousands and the error is far below any threshold.
        """
        train = self.standard_error(self.history["train_eval_accuracy"][-1]) if self.as_stored else 0.0
        return math.hypot(self.standard_error(self.history["val_accuracy"][-1]), train)


# ---- figures --------------------------------------------------------------------------------------------------------


def late(curve: Curve) -> Curve:
    """Return the second half of a curve, at least its last value."""
    return curve[len(curve) // 2 :]


def end(curve: Curve) -> Curve:
    """Return the last fifth of a curve, at least its last value."""
    return curve[-max(1, len(curve) // 5) :]


def fall(curve: Curve) -> float:
    """Return by which share the mean of the last fifth is below that of the fifth before; NaN for less than two epochs.

    >>> fall(np.array([4.0, 3.0, 2.0, 1.0, 0.5]))
    0.5
    """
    fifth = max(1, len(curve) // 5)
    if len(curve) < 2 * fifth:
        return math.nan
    return float(1 - curve[-fifth:].mean() / max(curve[-2 * fifth : -fifth].mean(), 1e-12))


def bounce(curve: Curve) -> float:
    """Return how far a loss rises from one epoch to the next in the second half of a run, over its mean there.

    Mean of the rises, an epoch that falls counting as 0: of a loss that only falls it is 0.

    >>> round(bounce(np.array([2.0, 1.5, 0.95, 1.15, 0.95, 1.15])), 3)
    0.088
    """
    half = late(curve)
    if len(half) < 2:
        return 0.0
    return float(np.maximum(np.diff(half), 0).mean() / (half.mean() + FLOOR))


def noise(curve: Curve) -> float:
    """Return the standard deviation of a curve from epoch to epoch in the second half of a run, less its trend; NaN if unknown.

    That of the differences over the root of 2, as of independent deviations from a line.

    >>> noise(np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])), round(noise(np.array([0.0, 0.0, 0.1, -0.1, 0.1, -0.1])), 2)
    (0.0, 0.14)
    """
    half = late(curve)
    return float(np.std(np.diff(half)) / math.sqrt(2)) if len(half) > 2 else math.nan


def rise(curve: Curve) -> float:
    """Return how far the lowest of the last fifth of a loss is above its lowest, over the latter.

    The lowest, as a rate that is too high makes some epochs high.

    >>> round(rise(np.array([2.0, 1.0, 1.0, 1.1, 1.2])), 3)
    0.19
    """
    return float((end(curve).min() - curve.min()) / (curve.min() + FLOOR))


def spread_entropy(accuracy: float, num_classes: int) -> float:
    """Return the cross entropy of a calibrated network whose errors are spread evenly over all other classes.

    ``-a ln(a) - (1 - a) ln((1 - a) / (K - 1))``, the most that an accuracy of ``a`` allows a calibrated network.

    >>> round(spread_entropy(0.1, 10), 3), round(spread_entropy(0.7, 10), 3)
    (2.303, 1.27)
    """
    a = min(max(accuracy, 1e-6), 1 - 1e-6)
    return -a * math.log(a) - (1 - a) * math.log((1 - a) / (num_classes - 1))


# ---- reading --------------------------------------------------------------------------------------------------------


def read_history(path: Path) -> History:
    """Read history.csv; an empty cell, of what was not measured in that epoch, is NaN.

    Raises
    ------
    UserError
        There is none, or it holds no epoch.
    """
    try:
        columns = read_columns(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run `dvc repro` to train this member first") from None
    if not columns:
        raise UserError(f"{path}: holds no epoch; run `dvc repro --force train@{path.parent.name}`")
    return columns


def read_columns(path: Path) -> History:
    """Read a table of numbers such as steps.csv, by column; an empty cell is NaN. No row: an empty dict."""
    return columns_of(read_rows(path))


def columns_of(rows: Sequence[Row]) -> History:
    """Return a table by column; None becomes NaN. No row: an empty dict.

    >>> columns_of([{"epoch": 1.0, "noise_scale": None}])
    {'epoch': [1.0], 'noise_scale': [nan]}
    """
    return {name: [math.nan if row[name] is None else row[name] for row in rows] for name in rows[0]} if rows else {}


def read_rows(path: Path) -> list[Row]:
    """Read a table such as layers.csv or initial.csv, by row: numbers, truth values, text, and None for an empty cell."""
    with open(path, encoding="utf-8", newline="") as file:
        return [{name: value_of(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def value_of(cell: str) -> Any:
    """Return the number, truth value or text that a cell stands for; None for an empty one."""
    if cell in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[cell]
    try:
        return float(cell)
    except ValueError:
        return cell


def training_words(policy: Any, regularization: Mapping[str, Any]) -> list[str]:
    """Say in which ways training figures are measured on other things than validation's, in words for a legend.

    Parameters
    ----------
    policy, regularization
        ``augment.policy`` and section ``regularization``, as params.yaml has them.

    Examples
    --------
    >>> off = {"alpha": 0.0, "probability": 1.0}
    >>> training_words("light", {"mixup": off, "cutmix": off, "dropout": 0.2, "label_smoothing": 0.1})
    ['augmented', 'smoothed', 'dropout']
    """
    mixes = [regularization[name] for name in ("mixup", "cutmix")]
    words = {
        "augmented": policy not in ("none", []),
        "mixed": any(mix["alpha"] > 0 and mix.get("probability", 1) > 0 for mix in mixes),
        "smoothed": regularization["label_smoothing"] > 0,
        "dropout": any(regularization.get(f"{key}dropout", 0) > 0 for key in ("", "spatial_")),
        "stochastic depth": regularization.get("stochastic_depth", 0) > 0,
        "noise": regularization.get("input_noise", 0) > 0,
    }
    return [word for word, holds in words.items() if holds]


def read_run(folder: Path, *, recipe: Mapping[str, Any], data: Mapping[str, Any]) -> Run:
    """Return what a member left in its folder, with what its recipe and the data say about reading it.

    Parameters
    ----------
    folder
        ``models/<member>``: history.csv, and of steps.csv, layers.csv and initial.csv those that are there.
    recipe
        The member's params: sections ``model``, ``augment``, ``optimizer``, ``batch``, ``loss`` and ``regularization``.
    data
        reports/data.json.

    Raises
    ------
    UserError
        There is no history.csv, or it holds no epoch.
    """
    tables = {name: folder / f"{name}.csv" for name in ("steps", "layers", "initial")}
    return as_run(
        read_history(folder / "history.csv"),
        steps=read_columns(tables["steps"]) if tables["steps"].exists() else {},
        layers=read_rows(tables["layers"]) if tables["layers"].exists() else [],
        initial=read_rows(tables["initial"]) if tables["initial"].exists() else [],
        recipe=recipe,
        data=data,
    )


def as_run(
    history: History,
    *,
    steps: History,
    layers: Sequence[Row],
    initial: Sequence[Row],
    recipe: Mapping[str, Any],
    data: Mapping[str, Any],
) -> Run:
    """Return tables with what the recipe and the data say about reading them; see `read_run`."""
    words = training_words(recipe["augment"]["policy"], recipe["regularization"])
    microbatch = recipe["batch"]["microbatch"]
    return Run(
        history,
        num_val=data["val"],
        num_classes=data["num_classes"],
        class_counts=[row["train"] for row in data["classes"]],
        steps=steps,
        layers=layers,
        initial=initial,
        optimizer=recipe["optimizer"]["name"],
        model=recipe["model"]["name"],
        loss=recipe["loss"]["name"],
        microbatch=min(microbatch, recipe["model"]["norm"]["batch"]["ghost"] or microbatch),
        distorted=set(words) - {"smoothed"} != set(),
        mixed="mixed" in words,
        one_rate=all(factor == 1 for factor in recipe["optimizer"].get("lr_factors", {}).values()),
        recipe={name: recipe[name] for name in SECTIONS if name in recipe},
    )
