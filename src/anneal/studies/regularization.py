"""Study of what narrows the gap between training and validation: `regularization`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anneal import params
from anneal.models.config import RESIDUAL
from anneal.reporting.lines import Panel
from anneal.studies.study import Point, Result, Results, Study, by_seed, differs, grouped, spread_panel, stated

NONE, OWN = "none", "your recipe"

OFF: dict[str, Any] = {
    "augment": {"policy": "none", "copies": {"balance": False}},
    "regularization": {
        "label_smoothing": 0.0,
        "dropout": 0.0,
        "spatial_dropout": 0.0,
        "stochastic_depth": 0.0,
        "l1": 0.0,
        "l2": 0.0,
        "max_norm": None,
        "mixup": {"alpha": 0.0},
        "cutmix": {"alpha": 0.0},
        "input_noise": 0.0,
        "gradient_noise": {"std": 0.0},
    },
    "trainer": {"early_stopping": None},
}
"""No technique at all, but for the optimizer's weight decay."""

TECHNIQUES: dict[str, dict[str, Any]] = {
    "l2 0.005": {"regularization": {"l2": 0.005}},
    "l1 0.0005": {"regularization": {"l1": 0.0005}},
    "max-norm 1": {"regularization": {"max_norm": 1.0}},
    "dropout 0.5": {"regularization": {"dropout": 0.5}},
    "spatial dropout 0.2": {"regularization": {"spatial_dropout": 0.2}},
    "label smoothing 0.1": {"regularization": {"label_smoothing": 0.1}},
    "mixup 0.4": {"regularization": {"mixup": {"alpha": 0.4, "probability": 1.0}}},
    "cutmix 1": {"regularization": {"cutmix": {"alpha": 1.0, "probability": 1.0}}},
    "cutout 0.25": {"augment": {"policy": [{"Cutout": {"size": 0.25}}]}},
    "input noise 0.3": {"regularization": {"input_noise": 0.3}},
    "gradient noise 0.1": {"regularization": {"gradient_noise": {"std": 0.1, "decay": 0.55}}},
    "early stopping 3": {"trainer": {"early_stopping": {"patience": 3, "min_delta": 0.0}}},
}
"""Name in the figure to what it changes of `OFF`."""

DECAY = 0.005
"""Of the optimizer's own weight decay."""

RESNET: dict[str, Any] = {
    "name": "resnet",
    "norm": {"name": "batch"},
    "resnet": {"widths": [16, 32], "depths": [2, 2], "stem": "small", "block": "basic"},
}
"""For stochastic depth, where the recipe's network has no residual branches."""


def regularization_grid(recipe: Mapping[str, Any], _num_train: int) -> list[Point]:
    """Return no technique, each alone, and the recipe as it is where that is something else."""
    name = recipe["optimizer"]["name"]
    decays = "weight_decay" in recipe["optimizer"][name]
    off = params.merge(OFF, {"optimizer": {name: {"weight_decay": 0.0}}} if decays else {})
    own_decay = {f"weight decay {DECAY}": {"optimizer": {name: {"weight_decay": DECAY}}}} if decays else {}
    alone = {label: (overrides, NONE) for label, overrides in {**own_decay, **TECHNIQUES}.items()}
    depth: dict[str, Any] = {"regularization": {"stochastic_depth": 0.2}}
    if recipe["model"]["name"] in RESIDUAL:
        alone["stochastic depth 0.2"] = (depth, NONE)
    else:
        alone["none, resnet"] = ({"model": RESNET}, "none, resnet")
        alone["stochastic depth 0.2, resnet"] = (params.merge({"model": RESNET}, depth), "none, resnet")
    points = [Point(NONE, off, {"technique": NONE, "against": NONE})]
    if params.merge(recipe, off) != recipe:
        points.append(Point(OWN, {}, {"technique": OWN, "against": NONE}))
    for label, (overrides, against) in alone.items():
        at = {"technique": label, "against": against}
        points.append(Point(label, params.merge(off, overrides), at, optional=label not in (NONE, "none, resnet")))
    return points


def gap(result: Result, word: str = "loss") -> float:
    """Return how much better the network is on training images than on validation images, both as they are stored.

    Where no training images were evaluated as they are, the figure of training itself stands for them, which a technique
    that changes images or labels makes worse.
    """
    train = result.final(f"train_eval/{word}")
    if math.isnan(train):
        train = result.final(f"train/{word}")
    val = result.final(f"val/{word}")
    return val - train if word == "loss" else train - val


def gaps(results: Results, word: str = "loss") -> dict[int, float]:
    """Return the gap by seed."""
    return {result.seed: gap(result, word) for result in results}


def draw_regularization(results: Results) -> list[Panel]:
    """Draw the gap in loss and in accuracy, and the validation accuracy, of each technique."""
    groups = grouped(results, "technique")
    return [
        spread_panel(
            {name: list(gaps(group).values()) for name, group in groups.items()},
            "validation loss minus training loss",
            "gap in loss",
        ),
        spread_panel(
            {name: list(gaps(group, "accuracy").values()) for name, group in groups.items()},
            "training accuracy minus validation accuracy",
            "gap in accuracy",
        ),
        spread_panel(
            {name: list(by_seed(group, "val/accuracy").values()) for name, group in groups.items()},
            "validation accuracy",
            "accuracy of the last epoch",
        ),
    ]


def conclude_regularization(results: Results) -> list[str]:
    """Say of each technique how wide the gap is, and what it changed in it and on the validation split."""
    groups = grouped(results, "technique")
    lines = []
    if not any("train_eval/loss" in epoch for result in results for epoch in result.epochs):
        lines.append("training figures are those of training itself, since no training images were evaluated as stored")
    verdicts: dict[str, list[str]] = {}
    for name, group in groups.items():
        accuracy = [r.final("val/accuracy") for r in group]
        text = (
            f"{name}: gap in loss {stated(list(gaps(group).values()))}, validation loss "
            f"{stated([r.final('val/loss') for r in group])}, accuracy {stated(accuracy)}"
        )
        against = group[0].at["against"]
        if name != against:
            base = groups[against]
            narrowed = differs(gaps(group), gaps(base))
            loss, better = (differs(by_seed(group, key), by_seed(base, key)) for key in ("val/loss", "val/accuracy"))
            text += f"; against {against}: gap {narrowed}, validation loss {loss}, accuracy {better}"
            verdicts.setdefault(verdict(narrowed, loss, better), []).append(name)
        lines.append(text)
    return lines + [f"{words}: {'; '.join(names)}" for words, names in sorted(verdicts.items())]


def verdict(narrowed: str, loss: str, accuracy: str) -> str:
    """Put into words what three comparisons of `differs` say of a technique.

    >>> verdict("lower by 0.1 (...)", "lower by 0.1 (...)", "no difference shown (...)")
    'narrower gap, lower validation loss'
    >>> verdict(*["no difference shown (...)"] * 3)
    'no change shown'
    """
    words = [
        {"lower": "narrower gap", "higher": "wider gap"}.get(narrowed.split()[0]),
        {"lower": "lower validation loss", "higher": "higher validation loss"}.get(loss.split()[0]),
        {"lower": "lower accuracy", "higher": "higher accuracy"}.get(accuracy.split()[0]),
    ]
    return ", ".join(word for word in words if word) or "no change shown"


REGULARIZATION = Study(
    "regularization",
    "What does each regularisation technique do to the gap between training and validation?",
    regularization_grid,
    draw_regularization,
    conclude_regularization,
    base={
        # Few images and a larger network, so that there is something to regularise.
        "data": {"limit": 100},
        "model": {"convnet": {"widths": [32, 64], "depth": 1}},
        "trainer": {"epochs": 50, "evaluate_train": 2000},
        "batch": {"size": 16, "microbatch": 16, "reference_size": 16},
        "schedule": {"name": "linear"},
    },
)
