"""Learning curves in, findings out: a few rules of thumb, each with its evidence, its confidence and what to change."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from anneal.params import UserError

Confidence = Literal["low", "medium", "high"]
History = dict[str, list[float]]
"""Columns of history.csv, one value an epoch."""

DIVERGED = 2.0
"""Last training loss over the lowest, from which on a run has diverged."""
GENERALIZATION_LOSS = 0.05
"""Last validation loss over the lowest, less 1: Prechelt (1998), GL at alpha = 5."""
GAP = 0.1
"""Training accuracy less validation accuracy, from which on it is called overfitting."""
LEARNT = 0.9
"""Training accuracy below which there is something left to learn, where more is missing than the gap to validation."""
STILL_FALLING = 0.05
"""Relative fall of the validation loss between the last two fifths of a run."""
STILL_FALLING_ANNEALED = 0.15
"""The same where the learning rate has come down: annealing alone makes the loss fall at the end."""
NOISE = 0.02
"""Standard deviation of the validation accuracy from epoch to epoch in the second half of a run."""


@dataclass(frozen=True)
class Run:
    """One member's curves and the recipe facts that say how to read them.

    Parameters
    ----------
    history
        Columns of history.csv.
    num_val, num_classes
        Size of the validation split, and number of classes.
    optimizer, model
        Names in the recipe, for the keys in the advice.
    distorted
        Training accuracy is measured on augmented images or under dropout, hence lower than on clean ones.
    mixed
        Mixup or CutMix is on: that training accuracy says nothing.

    Where the history has the accuracy on training images as they are stored, that is read instead, and the last two play no
    part.
    """

    history: History
    num_val: int
    num_classes: int
    optimizer: str = "SGD"
    model: str = "resnet"
    distorted: bool = True
    mixed: bool = False

    def curve(self, name: str) -> npt.NDArray[np.float64]:
        """Return a column as float64, one value an epoch."""
        return np.asarray(self.history[name], dtype=np.float64)

    @property
    def as_stored(self) -> bool:
        """Whether the accuracy on training images as they are stored is known."""
        return "train_eval_accuracy" in self.history and bool(np.isfinite(self.history["train_eval_accuracy"][-1]))

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

    def standard_error(self, accuracy: float) -> float:
        """Return the standard error of a validation accuracy: ``sqrt(p (1 - p) / n)``."""
        return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / max(self.num_val, 1))

    @property
    def standard_error_of_gap(self) -> float:
        """Standard error of the gap; of training accuracy only where it is that of a sample, which is as large as ``num_val``.

        Or smaller, where there are thousands and the error is far below any threshold.
        """
        train = self.standard_error(self.history["train_eval_accuracy"][-1]) if self.as_stored else 0.0
        return math.hypot(self.standard_error(self.history["val_accuracy"][-1]), train)


@dataclass(frozen=True)
class Finding:
    """What the curves show.

    Parameters
    ----------
    name
        Key of `RULES`.
    confidence
        How far the rule can be trusted here.
    evidence
        The figures it rests on; epochs count from 1.
    change
        Key of params.yaml to what to try with it, the most promising first.
    """

    name: str
    confidence: Confidence
    evidence: dict[str, float | None]
    change: dict[str, str] = field(default_factory=dict)


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


def diagnose(run: Run) -> list[Finding]:
    """Return what the curves show, in the order of `RULES`; an empty list means healthy."""
    if not run.history["val_loss"]:
        return []
    diverging = _diverging(run)
    if diverging:  # nothing else can be read from curves that broke off
        return [diverging]
    return [finding for rule in RULES.values() if (finding := rule(run)) is not None]


def summarize(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Return reports/diagnosis.json: counts of findings at the top, for each member its figures and findings."""
    members: dict[str, Any] = {}
    for name, run in runs.items():
        loss, accuracy = run.curve("val_loss"), run.curve("val_accuracy")
        finite = np.where(np.isfinite(loss), loss, np.inf)
        members[name] = {
            "epochs": len(loss),
            "lowest_val_loss": _number(finite.min()),
            "lowest_val_loss_epoch": int(finite.argmin()) + 1,
            "last_val_loss": _number(loss[-1]),
            "last_val_accuracy": _number(accuracy[-1]),
            "last_gap": _number(run.gap),
            "findings": [
                {
                    "name": finding.name,
                    "confidence": finding.confidence,
                    "evidence": finding.evidence,
                    "change": [{"key": key, "try": advice} for key, advice in finding.change.items()],
                }
                for finding in diagnose(run)
            ],
        }
    found = [finding["name"] for member in members.values() for finding in member["findings"]]
    counts = {name: found.count(name) for name in RULES}
    return {**counts, "healthy": sum(not member["findings"] for member in members.values()), "members": members}


def read_history(path: Path) -> History:
    """Read history.csv; an empty cell, of what was not measured in that epoch, is NaN.

    Raises
    ------
    UserError
        There is none, or it holds no epoch.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run `dvc repro` to train this member first") from None
    if not rows:
        raise UserError(f"{path}: holds no epoch; run `dvc repro --force train@{path.parent.name}`")
    return {name: [float(row[name] or "nan") for row in rows] for name in rows[0]}


# ---- rules ----------------------------------------------------------------------------------------------------------


def _diverging(run: Run) -> Finding | None:
    """Find a loss that is no number, or a training loss that ends far above its lowest (Goodfellow et al. 2016, 8.2)."""
    train, val = run.curve("train_loss"), run.curve("val_loss")
    broken = ~(np.isfinite(train) & np.isfinite(val))
    if not broken.any() and train[-1] <= DIVERGED * train.min():
        return None
    evidence = {
        "first_broken_epoch": float(broken.argmax() + 1) if broken.any() else None,
        "lowest_train_loss": _number(np.min(train[np.isfinite(train)], initial=np.inf)),
        "last_train_loss": _number(train[-1]),
    }
    change = {
        f"optimizer.{run.optimizer}.lr": "a third of it",
        "schedule.warmup.length": "twice as long",
        "regularization.gradient_clip": "1.0",
    }
    return Finding("diverging", "high" if broken.any() else "medium", evidence, change)


def _underfitting(run: Run) -> Finding | None:
    """Find a low accuracy on the training data itself (Ng 2018, ch. 20-25: avoidable bias)."""
    val = float(run.curve("val_accuracy").max())
    train, gap = run.train_accuracy, run.gap
    at_chance = val < 1 / run.num_classes + 3 * run.standard_error(1 / run.num_classes)
    unlearnt = train is not None and gap is not None and train < LEARNT and 1 - train > gap
    if not at_chance and not unlearnt:
        return None
    evidence = {"last_train_accuracy": train, "best_val_accuracy": val, "chance": 1 / run.num_classes}
    change = {
        f"optimizer.{run.optimizer}.lr": "three times, and a third of it",
        "trainer.epochs": "twice as many",
        f"model.{run.model}": "a wider or deeper network",
        "augment.policy": "a lighter one",
    }
    confidence: Confidence = "high" if at_chance else "low" if run.distorted and not run.as_stored else "medium"
    return Finding("underfitting", confidence, {key: _number(value) for key, value in evidence.items()}, change)


def _overfitting(run: Run) -> Finding | None:
    """Find a validation loss that rises again (Prechelt 1998, GL), or a gap between the accuracies."""
    loss, accuracy = run.curve("val_loss"), run.curve("val_accuracy")
    best = int(loss.argmin())
    rise = float(loss[-1] / max(loss[best], 1e-12) - 1)
    gap = run.gap
    rises = rise > GENERALIZATION_LOSS
    # As trained on, augmentation and dropout make training harder, so that a gap in spite of them is the more telling.
    gaping = gap is not None and gap >= max(GAP, 2 * run.standard_error_of_gap)
    if not rises and not gaping:
        return None
    # A loss that rises while the accuracy does not fall is overconfidence first of all (Guo et al. 2017).
    overconfident = rises and not gaping and accuracy[-1] >= accuracy[best]
    confidence: Confidence = "high" if rises and gaping else "low" if overconfident else "medium"
    evidence = {
        "lowest_val_loss_epoch": best + 1,
        "lowest_val_loss": loss[best],
        "last_val_loss": loss[-1],
        "rise": rise,
        "val_accuracy_then": accuracy[best],
        "last_val_accuracy": accuracy[-1],
        "gap": gap,
    }
    change = {
        "augment.policy": "a stronger one",
        f"optimizer.{run.optimizer}.weight_decay": "three times",
        "regularization.dropout": "0.2",
        "trainer.early_stopping": "{patience: 5, min_delta: 0.0}",
    }
    return Finding("overfitting", confidence, {key: _number(value) for key, value in evidence.items()}, change)


def _stopped_too_early(run: Run) -> Finding | None:
    """Find a validation loss that still falls at the end."""
    loss, rate = run.curve("val_loss"), run.curve("lr")
    fifth = len(loss) // 5
    if not fifth:
        return None
    before, last = float(loss[-2 * fifth : -fifth].mean()), float(loss[-fifth:].mean())
    fall = 1 - last / max(before, 1e-12)
    annealed = bool(rate[-1] < 0.1 * rate.max())
    if int(loss.argmin()) < len(loss) - fifth or fall < (STILL_FALLING_ANNEALED if annealed else STILL_FALLING):
        return None
    evidence = {"val_loss_before": before, "val_loss_at_the_end": last, "fall": fall, "epochs": len(loss)}
    confidence: Confidence = "low" if annealed else "medium"
    change = {"trainer.epochs": "twice as many"}
    return Finding("stopped_too_early", confidence, {key: _number(value) for key, value in evidence.items()}, change)


def _noisy_validation(run: Run) -> Finding | None:
    """Find a validation accuracy that jumps from epoch to epoch, late in the run."""
    accuracy = run.curve("val_accuracy")
    late = accuracy[len(accuracy) // 2 :]
    if len(late) < 4:
        return None
    noise = float(np.std(np.diff(late)) / math.sqrt(2))  # of a level with independent noise on each epoch
    error = run.standard_error(float(late.mean()))
    if noise < NOISE:
        return None
    evidence = {"from_epoch": len(accuracy) // 2 + 1, "standard_deviation": noise, "standard_error": error}
    small = noise < 2 * error
    change = {"split.val": "more validation images"} if small else {}
    change |= {f"optimizer.{run.optimizer}.lr": "a third of it", "schedule.name": "cosine"}
    confidence: Confidence = "low" if small else "medium"
    return Finding("noisy_validation", confidence, {key: _number(value) for key, value in evidence.items()}, change)


RULES: dict[str, Callable[[Run], Finding | None]] = {
    "diverging": _diverging,
    "underfitting": _underfitting,
    "overfitting": _overfitting,
    "stopped_too_early": _stopped_too_early,
    "noisy_validation": _noisy_validation,
}


def _number(value: Any) -> float | None:
    """Return a float that JSON can hold, None for what it cannot."""
    return float(value) if value is not None and math.isfinite(value) else None
