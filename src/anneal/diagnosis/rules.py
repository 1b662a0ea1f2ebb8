"""Curves in, findings out: a rule for each fault, with its evidence, its confidence and what to change.

Thresholds were set by bench/diagnosis.py on runs with induced faults; docs/diagnosis.md has the figures and the sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from anneal.diagnosis import live
from anneal.diagnosis.curves import Run, bounce, end, fall, late, noise, rise, spread_entropy

Confidence = Literal["low", "medium", "high"]

DIVERGED = 2.0
"""Last training loss over the lowest, from which on a run has diverged."""
SPIKED = 1.5
"""Highest loss of a step over that of the first, or of chance if that is more, from which on a run that ends at chance has
diverged."""
VANISHING, EXPLODING, LOGITS, DEAD = 1e-3, 1e3, 10.0, 0.8
"""Of initial weights, as `anneal.models.initial_statistics` has them: outputs or gradients of a layer over those of the input
or the logits; standard deviation of the logits; share of an activation's units that are zero on a whole batch."""
LEARNT_NOTHING = 0.95
"""Training loss over that of chance, from which on nothing was learnt."""
STARTED = 0.9
"""Training loss over that of chance, below which a run is under way."""
SLOW_START = 0.1
"""Share of a run before it is under way, from which on it started slowly."""
SLOW_STEPS = 30
"""Optimizer steps before it is under way, from which on it started slowly: a few any run needs."""
FASTER = 3.5
"""Speed at which the training loss falls on to `HALF`, over that before: a run that is slow throughout has no slow start."""
HALF = 0.5
"""Training loss over that of chance, up to which the speed after the start is taken."""
FADING = 0.012
"""Initial outputs or gradients of a layer over those of the input or the logits, below which they explain a slow start."""
STILL_UPDATE = 7e-4
"""Update over weights, as the geometric mean of the median and the least over layers, below which weights hardly move (Karpathy,
CS231n)."""
TOO_LOW = 0.2
"""Training loss over that of chance, above which there was something left to learn."""
BOUNCE = 0.03
"""Mean rise of a loss from one epoch to the next, over its level, as the geometric mean of both losses, from which on the rate is
too high."""
PLATEAU_BOUNCE = 0.008
"""The same, from which on a rate that stays high keeps the loss up."""
LEARNT_ALL = 0.01
"""Training loss over that of chance, below which nothing is left to learn."""
FLAT = 0.15
"""Relative fall of the loss between the last two fifths of a run, below which it is flat."""
STILL_FALLING = 0.015
"""Relative fall of the validation loss between the last two fifths of a run."""
BEYOND_NOISE = 5.0
"""The same, over the mean rise from epoch to epoch."""
STILL_FALLING_ANNEALED = 0.15
"""That fall where the learning rate has come down: annealing alone makes the loss fall at the end."""
TRAIN_FALLING = 0.035
"""The same of the training loss under a constant rate, where the validation loss has not risen."""
NOT_RISEN = 0.03
"""Last validation loss over the lowest less 1, up to which it has not."""
LEARNT = 0.65
"""Accuracy on training images, from chance at 0 to 1, below which there is something left to learn, where more is missing than
the gap."""
HANDICAP = 0.4
"""Accuracy on training images as stored less that as trained on, over the former, both counted from chance, from which on
regularisation is heavy."""
FEW_IMAGES = 20
"""Training images a class, below which errors say nothing of labels."""
LITTLE = 0.15
"""Accuracy, from chance at 0 to 1, below which errors say nothing of labels."""
GAP = 0.1
"""Training accuracy less validation accuracy, from which on it is called overfitting."""
VARIANCE = 0.5
"""The same over the training error, from which on it is: where more is missing on training images, that comes first."""
BY_HEART = 0.05
"""Training error, up to which a network with that gap knows the training images by heart: how their loss moves says nothing."""
GENERALIZATION_LOSS = 0.05
"""Rise of the validation loss over its lowest: Prechelt (1998), GL at alpha = 5."""
RISEN = 0.01
"""The same over the loss of chance: a twentieth of a loss that is nearly 0 is nothing."""
HOLDS = 2.0
"""Standard errors by which an accuracy may fall and still hold."""
EASIER = 0.15
"""Logarithm of training over validation loss, both of images as stored, from which on validation is the easier."""
VALIDATION_ERROR = 0.03
"""Standard error of a validation accuracy, from which on the split is too small."""
SMALL_MICROBATCH = 4
"""Samples of a forward pass, up to which batch norm's statistics are too noisy."""
IMBALANCE = 10.0
"""Training images of the largest class over those of the smallest."""
SPREAD_ERRORS = 0.92
"""Lowest validation loss over that of errors spread evenly over all classes, from which on labels may be wrong."""
ALIKE = 0.5
"""Training error over validation error where validation loss was lowest, from which on what is wrong is wrong in both."""
MEMORIZED = 0.1
"""Training accuracy at the end less that on validation or training images where validation loss was lowest, whichever is less, from
which on labels are learnt by heart."""


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
    epochs
        First and last epoch that show it, for plots; None where it is not in the curves.
    """

    name: str
    confidence: Confidence
    evidence: dict[str, float | None]
    change: dict[str, str] = field(default_factory=dict)
    epochs: tuple[int, int] | None = None


def diagnose(run: Run) -> list[Finding]:
    """Return what a run shows, in the order of `RULES`; an empty list means healthy.

    Of a run that has diverged only what does not rest on the curves is read beside. A finding that another explains
    (`EXPLAINED`) is left out.
    """
    diverging = _diverging(run)
    named = RULES if not diverging and run.epochs else {name: RULES[name] for name in WITHOUT_CURVES}
    found = [diverging] if diverging else []
    found += [finding for name, rule in named.items() if name != "diverging" and (finding := rule(run)) is not None]
    names = {finding.name for finding in found}
    kept = [finding for finding in found if not names & EXPLAINED.get(finding.name, set())]
    return [replace(finding, change=applicable(finding.change, run.recipe)) for finding in kept]


def applicable(change: Mapping[str, str], recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return the advice that a recipe leaves room for: no key that it lacks, no share of 0, nothing that is so already.

    Parameters
    ----------
    change
        Key of params.yaml to what to try with it.
    recipe
        Sections of params.yaml; keys of others are taken as they are.

    Examples
    --------
    >>> change = {"regularization.dropout": "half of it", "batch.sampling": "balanced", "optimizer.SGD.lr": "a third of it"}
    >>> recipe = {"regularization": {"dropout": 0.0}, "batch": {"sampling": "shuffle"}, "optimizer": {"LBFGS": {"lr": 1.0}}}
    >>> applicable(change, recipe)
    {'batch.sampling': 'balanced'}
    """
    kept = {}
    for key, what in change.items():
        path = key.split(".")
        value = _setting(recipe, path)
        if path[0] not in recipe:
            kept[key] = what
        elif value == 0 and what == "three times":
            kept[key] = "more than 0"
        elif value is not LACKING:
            extreme = (value, what) in [("strong", "a stronger one"), ("none", "a lighter one")]
            if not extreme and str(value) != what and not (value == 0 and what.endswith("of it")):
                kept[key] = what
    return kept


LACKING = object()
"""What params.yaml has not."""


def _setting(recipe: Mapping[str, Any], path: Sequence[str]) -> Any:
    """Return a value of params.yaml, or `LACKING`."""
    value: Any = recipe
    for name in path:
        value = value.get(name, LACKING) if isinstance(value, Mapping) else LACKING
    return value


# ---- training went wrong --------------------------------------------------------------------------------------------


def _diverging(run: Run) -> Finding | None:
    """Find a loss that is no number, or blew up and stayed at chance, or ends far above its lowest (Goodfellow 2016, 8.2)."""
    train = run.curve("train_loss")
    newest = float(train[-1]) if run.epochs else math.nan
    steps = run.steps.get("loss", [])
    blown_up = live.diverged(steps, run.chance if run.loss == "cross_entropy" else math.inf)
    spike = max(steps, default=0.0) / max(run.first_loss, run.train_chance, 1e-12)
    ends_at_chance = spike > SPIKED and bool(run.epochs) and run.train_left >= LEARNT_NOTHING
    died = bool(run.epochs) and run.train_left >= LEARNT_NOTHING and _burst(run)
    broken = ~(np.isfinite(train) & np.isfinite(run.curve("val_loss")))
    if (
        blown_up is None
        and not ends_at_chance
        and not died
        and not broken.any()
        and (not run.epochs or end(train).mean() <= max(DIVERGED * train.min(), 0.5 * run.train_chance))
    ):
        return None
    lowest = float(np.min(train[np.isfinite(train)], initial=np.inf))
    evidence = {
        **(blown_up or {"highest_loss": max(steps, default=None)}),
        "first_broken_epoch": float(broken.argmax() + 1) if broken.any() else None,
        "lowest_train_loss": lowest,
        "last_train_loss": newest,
    }
    change = {
        f"optimizer.{run.optimizer}.lr": "a third of it",
        "schedule.warmup.length": "longer, as 0.1",
        "regularization.gradient_clip": "1.0",
    }
    since = int(broken.argmax() if broken.any() else np.argmin(train)) + 1 if run.epochs else 1
    evidence["layers_without_gradient"] = float(_silent_layers(run)) if run.epochs else None
    certain = blown_up is not None or broken.any()
    return _finding("diverging", "high" if certain else "medium", evidence, change, (since, run.epochs))


def _dead_layers(run: Run) -> Finding | None:
    """Find layers that no gradient reaches, in a run that learnt nothing, or where one stays without to the end."""
    silent = _silent_layers(run)
    figures = _initial_figures(run)
    learnt_nothing = run.train_left >= LEARNT_NOTHING
    if not silent and not (learnt_nothing and _born_dead(run)):
        return None
    evidence = {**(figures or {}), "layers_without_gradient": float(silent), **_ended(run)}
    change = {
        "init.name": "kaiming_normal, or lsuv",
        "model.norm.name": "batch",
        "model.activation": "LeakyReLU",
        f"optimizer.{run.optimizer}.lr": "a third of it, where layers died while training",
    }
    confidence: Confidence = "high" if learnt_nothing else "medium"
    return _finding("dead_layers", confidence, evidence, change, (1, run.epochs))


def _exploding_layers(run: Run) -> Finding | None:
    """Find initial weights that make outputs or gradients grow from layer to layer (Glorot & Bengio 2010; He et al. 2015)."""
    figures = _initial_figures(run)
    if figures is None:
        return None
    broken = any(not math.isfinite(row["std"]) or not math.isfinite(row["grad_norm"] or 0.0) for row in run.initial)
    largest = max(figures["largest_output"], figures["largest_gradient"])
    if not broken and largest <= EXPLODING and figures["logits"] <= LOGITS:
        return None
    evidence = {**figures, "first_loss": run.first_loss, "chance": run.chance}
    change = {"init.name": "kaiming_normal, or lsuv", "model.norm.name": "batch", "preprocess.normalize": "standardize"}
    return _finding("exploding_layers", "high", evidence, change, (1, 1) if run.epochs else None)


def _too_high(run: Run) -> Finding | None:
    """Find losses that rise as often as they fall, on training and validation images alike (Smith 2018, 3).

    Or a step whose loss was far above that of the start, in a run that came back from it.
    """
    train = bounce(run.curve("train_eval_loss" if run.as_stored else "train_loss"))
    val = bounce(run.curve("val_loss"))
    swings = (
        run.epochs >= 6 and math.sqrt(train * val) >= BOUNCE and run.train_left >= LEARNT_ALL and not _by_heart(run)
    )
    steps = run.steps.get("loss", [])
    spike = max(steps, default=0.0)
    if not swings and spike <= live.BLOWN_UP * max(run.first_loss, run.train_chance):
        return None
    evidence = {
        "highest_loss_of_a_step": spike if steps else None,
        "first_loss": run.first_loss,
        "rise_of_val_loss": val,
        "rise_of_train_loss": train,
        "update_ratio": _hot_update(run),
        "lr": float(run.curve("lr").max()),
    }
    change = {
        f"optimizer.{run.optimizer}.lr": "a third of it",
        "schedule.warmup.length": "0.1",
        "batch.size": "twice as large",
    }
    if not swings:
        change["regularization.gradient_clip"] = "1.0"
        return _finding("learning_rate_too_high", "medium", evidence, change, (1, run.epochs))
    return _finding("learning_rate_too_high", "medium", evidence, change, (run.epochs // 2 + 1, run.epochs))


def _too_low(run: Run) -> Finding | None:
    """Find weights that hardly move while there is much left to learn (CS231n; Smith 2018, 3)."""
    median, left = _hot_update(run), run.train_left
    # At rates of their own some layers move less by design.
    least = _least_update(run) if run.one_rate else math.nan
    ratio = median if math.isnan(least) else math.sqrt(median * least)
    falls = float(np.mean(np.diff(run.curve("train_loss")) < 0)) if run.epochs > 1 else 0.0
    if not ratio < STILL_UPDATE or left < TOO_LOW or falls < 0.5:
        return None
    evidence = {
        "update_ratio": median,
        "of_the_stillest_layer": least,
        "train_loss_over_chance": left,
        "last_train_loss": float(run.curve("train_loss")[-1]),
    }
    evidence |= {"share_of_epochs_that_fall": falls, "lr": float(run.curve("lr").max())}
    change = {f"optimizer.{run.optimizer}.lr": "ten times; or auto", "trainer.epochs": "more"}
    return _finding("learning_rate_too_low", "medium", evidence, change, (1, run.epochs))


def _slow_start(run: Run) -> Finding | None:
    """Find a loss that stays at that of chance for a while, and then falls (Glorot & Bengio 2010; Goyal et al. 2017)."""
    share, step, faster = _start(run)
    reached = run.train_left
    figures = _initial_figures(run)
    weakest = min(figures["least_output"], figures["least_gradient"]) if figures else math.nan
    if share < SLOW_START or (step or 0.0) < SLOW_STEPS or reached > STARTED:
        return None
    if faster < FASTER and not weakest < FADING:
        return None
    evidence = {
        "share_of_run": share,
        "step": step,
        "chance": run.train_chance,
        "train_loss_over_chance": reached,
        "faster": faster,
        "weakest_initial_signal": weakest,
    }
    change = {
        "init.name": "kaiming_normal, or lsuv",
        "schedule.warmup.length": "shorter, where there is one",
        "model.norm.name": "batch",
    }
    until = max(1, math.ceil(share * run.epochs))
    return _finding("slow_start", "medium", evidence, change, (1, until))


def _plateau(run: Run) -> Finding | None:
    """Find a loss that no longer falls under a rate that stays high: noise that a decay would take out (Smith 2018, 3)."""
    rate = run.curve("lr")
    if run.epochs < 6 or rate[-1] < 0.5 * rate.max():
        return None
    # The mean over an epoch's steps is the steadier curve, those at epochs' ends show what a step may change.
    loss = run.curve("train_loss")
    rises, falls, level = bounce(run.curve("train_eval_loss") if run.as_stored else loss), fall(loss), run.train_left
    if rises < PLATEAU_BOUNCE or falls > FLAT or level < LEARNT_ALL or _by_heart(run):
        return None
    evidence = {"fall": falls, "rise_from_epoch_to_epoch": rises, "train_loss_over_chance": level}
    evidence |= {"update_ratio": _hot_update(run)}
    change = {"schedule.name": "cosine", f"optimizer.{run.optimizer}.lr": "a third of it", "averaging.name": "ema"}
    return _finding("plateau", "medium", evidence, change, (run.epochs // 2 + 1, run.epochs))


def _stopped_too_early(run: Run) -> Finding | None:
    """Find a validation loss that still falls at the end (Prechelt 1998, training progress).

    Or that does not rise yet under a constant rate, where the training loss still falls: in a few epochs, one loss on some hundred
    images is mostly noise.
    """
    loss, train = run.curve("val_loss"), run.curve("train_loss")
    fifth = max(1, len(loss) // 5)
    falls, rises, annealed = fall(loss), bounce(loss), run.annealed
    newest = int(loss.argmin()) >= len(loss) - fifth
    val_falls = newest and falls >= max(STILL_FALLING_ANNEALED if annealed else STILL_FALLING, BEYOND_NOISE * rises)
    train_falls = (
        not annealed
        and fall(train) >= TRAIN_FALLING
        and run.train_left >= TOO_LOW
        and float(loss[-1]) <= (1 + NOT_RISEN) * float(loss.min())
        and bounce(run.curve("train_eval_loss") if run.as_stored else train) < PLATEAU_BOUNCE
    )
    if not val_falls and not train_falls:
        return None
    evidence = {
        "fall": falls,
        "rise_from_epoch_to_epoch": rises,
        "last_val_loss": float(loss[-1]),
        "fall_of_train_loss": fall(train),
        "epochs": float(len(loss)),
    }
    change = {"trainer.epochs": "twice as many"}
    since = max(1, run.epochs - 2 * fifth + 1)
    confidence: Confidence = "medium" if val_falls and not annealed else "low"
    return _finding("stopped_too_early", confidence, evidence, change, (since, run.epochs))


# ---- fit ------------------------------------------------------------------------------------------------------------


def _underfitting(run: Run) -> Finding | None:
    """Find a low accuracy on the training data itself (Ng 2018, ch. 20-25: avoidable bias)."""
    val = float(run.curve("val_accuracy").max())
    train, gap = run.train_accuracy, run.gap
    at_chance = val < _above_chance(run)
    unlearnt = train is not None and gap is not None and run.learnt(train) < LEARNT and 1 - train > gap
    if not at_chance and not unlearnt:
        return None
    evidence = {"last_train_accuracy": train, "best_val_accuracy": val, "chance": 1 / run.num_classes, "gap": gap}
    change = {
        f"model.{'custom' if ':' in run.model else run.model}": "a wider or deeper network",
        "trainer.epochs": "twice as many",
        f"optimizer.{run.optimizer}.lr": "three times, and a third of it",
        "augment.policy": "a lighter one",
    }
    confidence: Confidence = "high" if at_chance else "low" if run.distorted and not run.as_stored else "medium"
    return _finding("underfitting", confidence, evidence, change, (1, run.epochs))


def _over_regularized(run: Run) -> Finding | None:
    """Find training that is much harder than the task, and images that are not learnt as they are (Smith 2018, 4)."""
    left = run.train_left
    if not (run.as_stored and run.handicap >= HANDICAP and left >= TOO_LOW) or _small_statistics(run):
        return None
    if late(run.curve("train_eval_accuracy")).mean() < _above_chance(run):
        return None
    evidence = {
        "train_accuracy": float(run.curve("train_accuracy")[-1]),
        "train_accuracy_as_stored": run.train_accuracy,
        "train_loss_as_stored": left * run.chance,
        "val_accuracy": float(run.curve("val_accuracy")[-1]),
    }
    change = {
        "regularization.dropout": "half of it",
        "augment.policy": "a lighter one",
        f"optimizer.{run.optimizer}.weight_decay": "a third of it",
        "trainer.epochs": "twice as many",
    }
    return _finding("over_regularized", "medium", evidence, change, (run.epochs // 2 + 1, run.epochs))


def _overfitting(run: Run) -> Finding | None:
    """Find a gap between the accuracies on training and validation images (Ng 2018: variance; Prechelt 1998)."""
    gap = run.gap
    # As trained on, augmentation and dropout make training harder, so that a gap in spite of them is the more telling.
    if gap is None or gap < max(GAP, 2 * run.standard_error_of_gap, VARIANCE * (1 - (run.train_accuracy or 0.0))):
        return None
    loss, accuracy = run.curve("val_loss"), run.curve("val_accuracy")
    best = int(loss.argmin())
    rises = rise(loss)
    evidence = {
        "gap": gap,
        "standard_error": run.standard_error_of_gap,
        "lowest_val_loss_epoch": float(best + 1),
        "lowest_val_loss": float(loss[best]),
        "last_val_loss": float(loss[-1]),
        "rise": rises,
        "last_val_accuracy": float(accuracy[-1]),
    }
    change = {
        "augment.policy": "a stronger one",
        f"optimizer.{run.optimizer}.weight_decay": "three times",
        "regularization.dropout": "0.2",
        "trainer.early_stopping": "{patience: 5, min_delta: 0.0}",
    }
    confidence: Confidence = "high" if rises > GENERALIZATION_LOSS else "medium"
    return _finding("overfitting", confidence, evidence, change, (best + 1, run.epochs))


def _overconfidence(run: Run) -> Finding | None:
    """Find a validation loss that rises while the accuracy holds: surer, not worse (Guo et al. 2017)."""
    loss, accuracy = run.curve("val_loss"), run.curve("val_accuracy")
    best, rises = int(loss.argmin()), rise(loss)
    risen = float(end(loss).min() - loss.min()) / run.chance
    change_of_accuracy = float(end(accuracy).mean() - accuracy[best])
    still_falling = best >= run.epochs - max(1, run.epochs // 5)
    if (
        still_falling
        or rises <= GENERALIZATION_LOSS
        or risen < RISEN
        or change_of_accuracy < -HOLDS * run.standard_error(float(accuracy[best]))
    ):
        return None
    evidence = {
        "rise": rises,
        "lowest_val_loss_epoch": float(best + 1),
        "lowest_val_loss": float(loss[best]),
        "last_val_loss": float(loss[-1]),
        "change_of_accuracy": change_of_accuracy,
        "standard_error": run.standard_error(float(accuracy[best])),
    }
    change = {
        "regularization.label_smoothing": "0.1",
        "evaluate.calibration": "temperature",
        "trainer.early_stopping": "{patience: 5, min_delta: 0.0}",
    }
    return _finding("overconfidence", "medium", evidence, change, (best + 1, run.epochs))


# ---- data -----------------------------------------------------------------------------------------------------------


def _validation_easier(run: Run) -> Finding | None:
    """Find validation images that are fitted better than training images as they are stored: a leak, or an easier split."""
    if not run.as_stored or run.epochs < 2:
        return None
    train, val = late(run.curve("train_eval_loss")), late(run.curve("val_loss"))
    easier = float(np.log(max(float(train.mean()), 1e-12) / max(float(val.mean()), 1e-12)))
    gap = run.gap or 0.0
    if easier < EASIER or gap > 0 or run.standard_error(0.9) >= VALIDATION_ERROR:
        return None
    evidence = {
        "train_loss_as_stored": float(train.mean()),
        "val_loss": float(val.mean()),
        "train_accuracy_as_stored": run.train_accuracy,
        "val_accuracy": float(run.curve("val_accuracy")[-1]),
        "standard_error": run.standard_error_of_gap,
    }
    change = {
        "data.path": "look for copies of validation images in the training split",
        "split.val": "another split, by group",
    }
    return _finding("validation_easier", "medium", evidence, change, (run.epochs // 2 + 1, run.epochs))


def _noisy_validation(run: Run) -> Finding | None:
    """Find a validation split too small to tell recipes apart."""
    accuracy = late(run.curve("val_accuracy"))
    error = run.standard_error(float(accuracy.mean()))
    if error < VALIDATION_ERROR:
        return None
    evidence = {
        "images": float(run.num_val),
        "standard_error": error,
        "standard_deviation_over_epochs": noise(run.curve("val_accuracy")),
    }
    change = {"split.val": "more validation images"}
    return _finding("noisy_validation", "high", evidence, change, (1, run.epochs))


def _small_batch_norm(run: Run) -> Finding | None:
    """Find batch norm over so few images that its statistics are noise (Wu & He 2018)."""
    if not _small_statistics(run):
        return None
    gaps = run.curve("norm_gap")
    evidence = {
        "microbatch": float(run.microbatch or 0),
        "norm_gap": float(np.nanmedian(gaps)),
        "train_loss": float(late(run.curve("train_loss")).mean()),
        "train_loss_as_stored": float(late(run.curve("train_eval_loss")).mean()),
    }
    change = {"batch.microbatch": "16 or more", "model.norm.name": "group"}
    return _finding("batch_too_small_for_batch_norm", "high", evidence, change)


def _class_imbalance(run: Run) -> Finding | None:
    """Find classes of very different sizes (Buda et al. 2018)."""
    counts = [count for count in run.class_counts if count]
    if not counts or max(counts) < IMBALANCE * min(counts) or _evened(run):
        return None
    evidence = {
        "largest_class": float(max(counts)),
        "smallest_class": float(min(counts)),
        "ratio": max(counts) / min(counts),
    }
    change = {"batch.sampling": "balanced", "loss.class_weights": "balanced", "augment.copies.balance": "true"}
    return _finding("class_imbalance", "high", evidence, change)


def _evened(run: Run) -> bool:
    """Say whether the recipe makes up for classes of different sizes."""
    chosen = {
        ("batch", "sampling"): "balanced",
        ("loss", "class_weights"): "balanced",
        ("augment", "copies", "balance"): True,
    }
    return any(_setting(run.recipe, path) == value for path, value in chosen.items())


def _label_noise(run: Run) -> Finding | None:
    """Find errors that are spread over all classes as wrong labels are, in a run that did learn (Arpit et al. 2017)."""
    loss, accuracy = run.curve("val_loss"), run.curve("val_accuracy")
    best = int(loss.argmin())
    a = float(accuracy[best])
    ratio = float(loss[best]) / spread_entropy(a, run.num_classes)
    # Right labels are learnt first, and wrong ones by heart.
    train = run.curve("train_eval_accuracy" if run.as_stored else "train_accuracy")
    by_heart = float(train[-1]) - min(float(train[best]), a) if run.as_stored or not run.mixed else 0.0
    # In training images as many labels are wrong as in validation; of few images the right ones are learnt by heart as well.
    alike = float(1 - train[best]) / max(1 - a, 1e-12)
    # With two classes any error is spread over all others.
    if run.num_classes < 3 or (run.class_counts and sum(run.class_counts) < FEW_IMAGES * run.num_classes):
        return None
    if ratio < SPREAD_ERRORS or run.learnt(a) < LITTLE or by_heart < MEMORIZED or alike < ALIKE:
        return None
    evidence = {
        "lowest_val_loss": float(loss[best]),
        "val_accuracy_then": a,
        "loss_of_errors_spread_evenly": spread_entropy(a, run.num_classes),
        "ratio": ratio,
        "train_error_over_val_error_then": alike,
        "learnt_by_heart": by_heart,
        "last_val_loss": float(loss[-1]),
    }
    change = {
        "data.path": "look at the mistakes that the network is surest of",
        "regularization.label_smoothing": "0.1",
    }
    return _finding("label_noise", "low", evidence, change, (best + 1, run.epochs))


RULES: dict[str, Callable[[Run], Finding | None]] = {
    "diverging": _diverging,
    "dead_layers": _dead_layers,
    "exploding_layers": _exploding_layers,
    "learning_rate_too_high": _too_high,
    "learning_rate_too_low": _too_low,
    "slow_start": _slow_start,
    "plateau": _plateau,
    "stopped_too_early": _stopped_too_early,
    "underfitting": _underfitting,
    "over_regularized": _over_regularized,
    "overfitting": _overfitting,
    "overconfidence": _overconfidence,
    "validation_easier": _validation_easier,
    "noisy_validation": _noisy_validation,
    "batch_too_small_for_batch_norm": _small_batch_norm,
    "class_imbalance": _class_imbalance,
    "label_noise": _label_noise,
}

WITHOUT_CURVES = ("exploding_layers", "class_imbalance")
"""Rules that read no curve, and so hold for a run that has diverged too."""

EXPLAINED: dict[str, set[str]] = {
    "underfitting": {
        "dead_layers",
        "learning_rate_too_high",
        "learning_rate_too_low",
        "plateau",
        "stopped_too_early",
        "over_regularized",
        "label_noise",
    },
    "learning_rate_too_low": {"dead_layers", "exploding_layers"},
    "over_regularized": {"dead_layers", "learning_rate_too_low", "learning_rate_too_high", "plateau"},
    "slow_start": {"learning_rate_too_low", "over_regularized", "batch_too_small_for_batch_norm"},
    "stopped_too_early": {"learning_rate_too_low", "plateau"},
    "plateau": {"dead_layers"},
    # On few images a rise is chance.
    "learning_rate_too_high": {"noisy_validation", "exploding_layers"},
    "overconfidence": {"noisy_validation"},
    "label_noise": {
        "exploding_layers",
        "learning_rate_too_low",
        "over_regularized",
        "stopped_too_early",
        "batch_too_small_for_batch_norm",
    },
}
"""Finding to those that it is a mere consequence of."""


# ---- figures --------------------------------------------------------------------------------------------------------


def _initial_figures(run: Run) -> dict[str, float] | None:
    """Return what the initial weights do to signals and gradients; None where it is not known."""
    rows = [row for row in run.initial if row["kind"] != "input"]
    if len(rows) < 2:
        return None
    reference = next((row["std"] for row in run.initial if row["kind"] == "input"), None) or 1.0
    hidden = [row for row in rows[:-1] if not row["closed"]]
    outputs = [row["std"] / reference for row in hidden if row["std"]]
    head = rows[-1]["grad_norm"] or 1.0
    gradients = [row["grad_norm"] / head for row in hidden if row["grad_norm"] is not None]
    return {
        "least_output": min(outputs, default=1.0),
        "largest_output": max(outputs, default=1.0),
        "logits": rows[-1]["std"],
        "least_gradient": min(gradients, default=1.0),
        "largest_gradient": max(gradients, default=1.0),
        "most_dead_units": max((row["dead"] for row in rows if row["dead"] is not None), default=0.0),
    }


def _silent_layers(run: Run) -> int:
    """Return in how many layers but the last the gradient is exactly 0 at the end, where the last has one."""
    newest = [row for row in run.layers if row["epoch"] == run.epochs]
    if not newest or not newest[-1]["grad_norm"]:
        return 0
    return sum(row["grad_norm"] == 0 for row in newest[:-1])


def _burst(run: Run) -> bool:
    """Say whether hidden layers that were sound at first have lost their gradient, of which some have grown: by large steps."""
    if not _silent_layers(run) or _born_dead(run):
        return False
    norms = {
        epoch: {row["layer"]: row["weight_norm"] for row in run.layers if row["epoch"] == epoch}
        for epoch in (0, run.epochs)
    }
    silent = [row["layer"] for row in run.layers if row["epoch"] == run.epochs and row["grad_norm"] == 0]
    return any((norms[run.epochs][layer] or 0.0) > (norms[0].get(layer) or math.inf) for layer in silent)


def _born_dead(run: Run) -> bool:
    """Say whether the initial weights let hardly any signal or gradient through."""
    figures = _initial_figures(run)
    return figures is not None and (
        live.dead_at_start(run.initial) is not None
        or min(figures["least_output"], figures["least_gradient"]) < VANISHING
        or figures["most_dead_units"] >= DEAD
    )


def _hot_update(run: Run) -> float:
    """Return the median update ratio over the epochs whose rate is at least half the highest; NaN where it is not known."""
    rate, ratio = run.curve("lr"), run.curve("update_ratio")
    hot = ratio[(rate >= 0.5 * rate.max()) & np.isfinite(ratio)]
    return float(np.median(hot)) if len(hot) else math.nan


def _least_update(run: Run) -> float:
    """Return the update ratio of the layer that moves least over those epochs; NaN where none is known.

    A layer that does not move at all is frozen, or dead, which is another finding.
    """
    rate = run.curve("lr")
    hot = {float(epoch) for epoch in np.flatnonzero(rate >= 0.5 * rate.max()) + 1}
    ratios: dict[str, list[float]] = {}
    for row in run.layers:
        if row["epoch"] in hot and (ratio := row.get("update_ratio")):
            ratios.setdefault(row["layer"], []).append(ratio)
    return min((float(np.median(each)) for each in ratios.values()), default=math.nan)


def _start(run: Run) -> tuple[float, float | None, float]:
    """Return when the training loss falls below `STARTED` times chance's, and how much faster it falls from there to `HALF`.

    When is a share of the run, and a step; None where it never does.
    """
    losses = np.asarray(run.steps.get("loss", []), dtype=np.float64) / run.train_chance
    if len(losses) < 10:
        return 0.0, None, 0.0
    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    if not (smooth < STARTED).any():
        return 1.0, None, 0.0
    first = int((smooth < STARTED).argmax())
    half = int((smooth < HALF).argmax()) if (smooth < HALF).any() else int(smooth.argmin())
    before, after = (1 - STARTED) / (first + 1), (STARTED - float(smooth[half])) / max(1, half - first)
    step = first + window - 1
    return step / len(losses), float(run.steps["step"][step]), after / before


def _by_heart(run: Run) -> bool:
    """Say whether all training images are known, and many others are not."""
    return run.gap is not None and run.gap >= GAP and 1 - (run.train_accuracy or 0.0) <= BY_HEART


def _above_chance(run: Run) -> float:
    """Return the accuracy that is three standard errors above that of guessing."""
    return 1 / run.num_classes + 3 * run.standard_error(1 / run.num_classes)


def _small_statistics(run: Run) -> bool:
    has_batch_norm = bool(np.isfinite(run.curve("norm_gap")).any())
    return has_batch_norm and run.microbatch is not None and run.microbatch <= SMALL_MICROBATCH


def _ended(run: Run) -> dict[str, float]:
    return {"train_loss_over_chance": run.train_left, "last_train_loss": float(run.curve("train_loss")[-1])}


def _finding(
    name: str,
    confidence: Confidence,
    evidence: Mapping[str, Any],
    change: dict[str, str],
    epochs: tuple[int, int] | None = None,
) -> Finding:
    return Finding(name, confidence, {key: _number(value) for key, value in evidence.items()}, change, epochs)


def _number(value: Any) -> float | None:
    """Return a float that JSON can hold, None for what it cannot."""
    return float(value) if value is not None and math.isfinite(value) else None
