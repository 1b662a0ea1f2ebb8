"""The recipe that studies vary: a small quick one on digits, or what params.yaml says. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anneal import params

QUICK: dict[str, Any] = {
    "data": {
        "path": "data/digits.zip",
        "format": "auto",
        "limit": None,
        "max_rejected": 0.01,
        "max_pixels": 50_000_000,
    },
    # A larger validation split than the recipe's: a study compares settings by it.
    "split": {"val": 0.3, "test": 0.2},
    "preprocess": {
        "size": 8,
        "fit": "stretch",
        "interpolation": "area",
        "normalize": "standardize",
        "epsilon": 1.0e-5,
    },
    "augment": {"policy": "none", "copies": {"balance": False}},
    # Without normalisation, which takes the sting out of a wrong rate and makes a small batch another network.
    "model": {
        "name": "convnet",
        "activation": "ReLU",
        "norm": {
            "name": "none",
            "position": "before",
            "batch": {
                "momentum": 0.1,
                "eps": 1.0e-5,
                "affine": True,
                "ghost": None,
                "sync": False,
                "frozen": False,
                "recalibrate": {"when": "averaging", "images": 8192},
            },
        },
        "convnet": {"widths": [16, 32], "depth": 1},
        "start_from": {"path": None, "sha256": None, "freeze": 0.0, "unfreeze": "together"},
    },
    "init": {
        "name": "kaiming_normal",
        "zero_last": False,
        "whiten_first": False,
        "kaiming_normal": {"mode": "fan_out"},
    },
    "optimizer": {
        "name": "SGD",
        "decay_exempt": ["bias", "norm", "scale"],
        "lr_factors": {"first": 1.0, "head": 1.0, "layer_decay": 1.0},
        "sam": {"rho": 0.0, "adaptive": False},
        "SGD": {"lr": 0.03, "momentum": 0.9, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
        "Adagrad": {"lr": 0.03, "lr_decay": 0.0, "weight_decay": 0.0},
        "RMSprop": {"lr": 0.003, "alpha": 0.99, "momentum": 0.0, "centered": False, "weight_decay": 0.0},
        "Adam": {"lr": 0.003, "betas": [0.9, 0.999], "amsgrad": False, "weight_decay": 0.0},
    },
    "schedule": {"name": "constant", "warmup": {"length": 0.0, "start": 0.01, "shape": "linear"}, "floor": 0.0},
    "batch": {
        "size": 32,
        "microbatch": 32,
        "lr_scaling": "none",
        "reference_size": 32,
        "sampling": "shuffle",
        "growth": {"at": [], "factor": 2},
        "noise_microbatches": 0,
    },
    "loss": {"name": "cross_entropy", "class_weights": "none"},
    "regularization": {
        "label_smoothing": 0.0,
        "dropout": 0.0,
        "stochastic_depth": 0.0,
        "l1": 0.0,
        "mixup": {"alpha": 0.0, "probability": 1.0},
        "cutmix": {"alpha": 0.0, "probability": 1.0},
        "cutmix_share": 0.5,
        "spatial_dropout": 0.0,
        "l2": 0.0,
        "max_norm": None,
        "input_noise": 0.0,
        "gradient_noise": {"std": 0.0, "decay": 0.55},
        "gradient_clip": None,
        "gradient_clip_value": None,
        "gradient_clip_adaptive": None,
    },
    "averaging": {"name": "none", "export": "best"},
    # One thread: networks of this size are no faster on more, and the last bits depend on their number.
    "trainer": {
        "epochs": 8,
        "early_stopping": None,
        "restore_best": True,
        "evaluate_train": 0,
        "precision": "32-true",
        "threads": 1,
        "deterministic": True,
        "on_nan": "stop",
        "stop_on": [],
        "snapshots": [],
    },
    "ensemble": {"members": {"study": {}}},
    "evaluate": {"splits": ["val"]},
    "hardware": {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "num_workers": 0, "checkpoint_every": "60s"},
}
"""Everything that has a part in a run on digits, so that nothing in params.yaml has one but blocks that are not chosen."""

CURRENT: dict[str, Any] = {
    "trainer": {"epochs": 8, "early_stopping": None},
    "batch": {"noise_microbatches": 0, "growth": {"at": []}},
    "ensemble": {"members": {"study": {}}},
    "evaluate": {"splits": ["val"]},
    "hardware": {"devices": 1, "num_nodes": 1},
}
"""What a study changes of the recipe in params.yaml where it runs on that: its length, and what would blur its grid."""


def base_recipe(values: Mapping[str, Any], study: Mapping[str, Any], *, current: bool) -> dict[str, Any]:
    """Return the whole params that the points of a study change.

    Parameters
    ----------
    values
        params.yaml.
    study
        The study's own changes.
    current
        Vary the recipe in params.yaml rather than the quick one on digits.

    Raises
    ------
    UserError
        The rate in params.yaml is ``auto``.
    """
    if not current:
        quick = params.merge({**values, "seed": 0}, QUICK)
        quick["ensemble"] = {**quick["ensemble"], "members": {"study": {}}}
        return params.merge(quick, study)
    # Of a small data set's sizes nothing; of its length no more than the recipe's own.
    kept = {"trainer": dict(study.get("trainer", {}))}
    if "epochs" in kept["trainer"]:
        kept["trainer"]["epochs"] = min(kept["trainer"]["epochs"], values["trainer"]["epochs"])
    if warmup := study.get("schedule", {}).get("warmup"):
        kept["schedule"] = {"warmup": warmup}
    recipe = params.merge(params.merge(values, CURRENT), kept)
    recipe["ensemble"] = {**recipe["ensemble"], "members": {"study": {}}}
    rate_of(recipe)
    return recipe


def rate_of(recipe: Mapping[str, Any], optimizer: str | None = None) -> float:
    """Return the peak rate in the block of an optimizer, of the chosen one by default.

    Raises
    ------
    UserError
        The rate is ``auto``, so that there is no number to multiply.
    """
    name = optimizer or recipe["optimizer"]["name"]
    rate = recipe["optimizer"][name]["lr"]
    if rate == "auto":
        raise params.UserError(
            f"params.yaml: optimizer.{name}.lr: found auto, allowed for a study: a number, whose multiples are tried"
        )
    return float(rate)


SIZES = (0.25, 1, 4, 16)
"""Multiples of the recipe's batch in the studies of the batch."""


def batch_sizes(recipe: Mapping[str, Any], num_train: int) -> list[int]:
    """Return the sizes that the studies of the batch compare, those that a training split of ``num_train`` allows.

    >>> batch_sizes({"batch": {"size": 32}}, 400)
    [8, 32, 128]
    """
    return [size for size in (int(recipe["batch"]["size"] * m) for m in SIZES) if 2 <= size <= num_train]


def sized(size: int) -> dict[str, Any]:
    """Return the overrides for a batch of ``size`` in one forward pass."""
    return {"batch": {"size": size, "microbatch": size}}


IMAGES_ONLY: dict[str, Any] = {
    "model.start_from.path": None,
    "model.start_from.sha256": None,
    "init.whiten_first": False,
    "init.zero_last": False,
    "regularization.spatial_dropout": 0.0,
    "regularization.stochastic_depth": 0.0,
}
"""What no network of dense layers takes, and without it."""


def dense(recipe: Mapping[str, Any], hidden: Sequence[int]) -> dict[str, Any]:
    """Return the overrides for a network of dense layers, and without what the recipe has that none of them takes.

    >>> dense({"init": {"whiten_first": True}}, [64, 64])
    {'model': {'name': 'mlp', 'mlp': {'hidden': [64, 64]}}, 'init': {'whiten_first': False}}
    """
    overrides: dict[str, Any] = {"model": {"name": "mlp", "mlp": {"hidden": list(hidden)}}}
    flat = params.flatten(recipe)
    for key, without in IMAGES_ONLY.items():
        if flat.get(key, without) != without:
            *parents, name = key.split(".")
            change: dict[str, Any] = {name: without}
            for parent in reversed(parents):
                change = {parent: change}
            overrides = params.merge(overrides, change)
    return overrides
