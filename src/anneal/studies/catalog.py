"""The studies by name, and what is known of them without running one. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anneal import params
from anneal.params import UserError, nearest
from anneal.studies.augmentation import AUGMENTATION
from anneal.studies.base import base_recipe
from anneal.studies.batches import ACCUMULATION, BATCH
from anneal.studies.batchnorm import BATCHNORM
from anneal.studies.initialization import INIT
from anneal.studies.preprocessing import PREPROCESSING
from anneal.studies.rates import BATCH_BY_LR, LR, LR_BY_OPTIMIZER
from anneal.studies.regularization import REGULARIZATION
from anneal.studies.rules import MOMENTUM, SCHEDULE
from anneal.studies.study import Point, Study

STUDIES: dict[str, Study] = {
    "lr": LR,
    "lr-by-optimizer": LR_BY_OPTIMIZER,
    "batch": BATCH,
    "batch-by-lr": BATCH_BY_LR,
    "accumulation": ACCUMULATION,
    "schedule": SCHEDULE,
    "momentum": MOMENTUM,
    "preprocessing": PREPROCESSING,
    "init": INIT,
    "batchnorm": BATCHNORM,
    "augmentation": AUGMENTATION,
    "regularization": REGULARIZATION,
}
"""``anneal study NAME``."""

DIGITS_TRAIN = 899
"""Training images of the digits under the studies' own split; a test holds it to the data."""

SECONDS_START = 10.0
"""What imports and MLflow cost, once."""

SECONDS_RUN, SECONDS_EPOCH, SECONDS_PASS = 0.15, 0.025, 0.0021
"""What a run, an epoch and a forward and backward pass of the quick recipe cost on one core."""

SECONDS_DENSE, SECONDS_LAYER = 0.0004, 0.00014
"""What such a pass costs in a network of dense layers, and what each hidden layer adds to it."""


def find(name: str) -> Study:
    """Return a study by name.

    Raises
    ------
    UserError
        There is none of that name.
    """
    if name not in STUDIES:
        raise UserError(f"study {name!r}: no such study; there are {', '.join(STUDIES)}{nearest(name, STUDIES)}")
    return STUDIES[name]


def passes(recipe: Mapping[str, Any], num_train: int) -> tuple[int, int]:
    """Return the epochs of a run, and its forward passes."""
    epochs = recipe["trainer"]["epochs"]
    return epochs, epochs * -(-num_train // recipe["batch"]["microbatch"])


def cost(recipe: Mapping[str, Any], num_train: int) -> float:
    """Return about how many seconds a run of the quick recipe takes; for others a measure to share time out by."""
    epochs, rounds = passes(recipe, num_train)
    seconds = SECONDS_PASS
    if recipe["model"]["name"] == "mlp":
        seconds = SECONDS_DENSE + SECONDS_LAYER * len(recipe["model"]["mlp"]["hidden"])
    return SECONDS_RUN + SECONDS_EPOCH * epochs + seconds * rounds


def distinct(base: Mapping[str, Any], points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the recipes of the points, those that several share once."""
    recipes: list[dict[str, Any]] = []
    for point in points:
        recipe = params.merge(base, point.overrides)
        if recipe not in recipes:
            recipes.append(recipe)
    return recipes


def estimate(study: Study, values: Mapping[str, Any], seeds: int) -> tuple[int, float]:
    """Return the number of runs of a study on digits, and about how many seconds they take on one core."""
    base = base_recipe(values, study.base, current=False)
    num_train = min(base["data"]["limit"] or DIGITS_TRAIN, DIGITS_TRAIN)
    recipes = distinct(base, study.grid(base, num_train))
    return len(recipes) * seeds, SECONDS_START + seeds * sum(cost(recipe, num_train) for recipe in recipes)
