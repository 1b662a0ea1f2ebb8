"""The recipes that are killed, with everything switched on, and the moments at which each is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.attack import EVERY

SMALL: dict[str, Any] = {
    "data__limit": 300,
    "augment__policy": "standard",
    "augment__copies__balance": True,
    "evaluate__bootstrap": 100,
    "ensemble__members": {"a": {"seed": 3}},
    "hardware__checkpoint_every": f"{EVERY} steps",
    "hardware__num_workers": 0,
    "trainer__threads": 1,
}
"""What preprocess and augment read is the same in all campaigns, which so share what these write."""

EVERYTHING: dict[str, Any] = {
    **SMALL,
    "model__name": "resnet",
    "model__resnet__widths": [8, 8],
    "model__resnet__depths": [1, 1],
    "model__norm__name": "batch",
    "batch__size": 64,
    "batch__microbatch": 16,
    "batch__noise_microbatches": 8,
    "regularization__label_smoothing": 0.1,
    "regularization__dropout": 0.1,
    "regularization__spatial_dropout": 0.05,
    "regularization__stochastic_depth": 0.2,
    "regularization__l1": 1.0e-5,
    "regularization__l2": 1.0e-5,
    "regularization__max_norm": 3.0,
    "regularization__mixup": {"alpha": 0.2, "probability": 0.8},
    "regularization__cutmix": {"alpha": 1.0, "probability": 0.8},
    "regularization__input_noise": 0.05,
    "regularization__gradient_noise": {"std": 0.01, "decay": 0.55},
    "regularization__gradient_clip": 1.0,
    "averaging__name": "ema",
    "averaging__ema": {"decay": 0.9, "warmup": True},
    "optimizer__name": "SGD",
    "schedule__name": "cosine",
    "loss__class_weights": "balanced",
    "trainer__epochs": 10,
    "trainer__evaluate_train": 100,
    "trainer__restore_best": True,
}
"""Five optimizer steps an epoch, the last of them of three microbatches instead of four."""

WORKERS = {"hardware__num_workers": 2}


@dataclass(frozen=True)
class Campaign:
    """A recipe and how it is killed.

    Parameters
    ----------
    kills
        Moments of `tests.chaos.moments.MOMENTS`, and whom they kill.
    changes
        Of `EVERYTHING`.
    stops_early
        Whether early stopping must end the run before its last epoch.
    """

    kills: tuple[tuple[str, str], ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    stops_early: bool = False


CAMPAIGNS = {
    "EMA, cosine": Campaign(
        (
            ("mid-batch", "trainer"),
            ("inside a window", "trainer"),
            ("checkpoint half written", "trainer"),
            ("weights being written", "trainer"),
        ),
    ),
    "SWA, 2 workers": Campaign(
        (
            ("inside a window", "all"),
            ("validation", "trainer"),
            ("checkpoint renamed", "all"),
            ("epoch's end", "trainer"),
            ("run finished", "trainer"),
        ),
        {**WORKERS, "averaging__name": "swa", "averaging__swa__start": 0.3, "averaging__swa__low": 0.5},
    ),
    "plateau, AdamW": Campaign(
        (
            ("before the step", "trainer"),
            ("checkpoint not renamed", "all"),
            ("validation", "all"),
            ("after the last step", "trainer"),
        ),
        {
            "optimizer__name": "AdamW",
            "schedule__name": "plateau",
            "schedule__plateau": {"patience": 1, "cooldown": 0, "gamma": 0.5, "min_delta": 0.3},
            "trainer__restore_best": False,
        },
    ),
    "restarts, Polyak mean, 2 workers": Campaign(
        (
            ("mid-batch", "dvc"),
            ("old checkpoint goes", "trainer"),
            ("epoch's very end", "all"),
            ("outs not renamed", "trainer"),
        ),
        {
            **WORKERS,
            "optimizer__name": "AdamW",
            "schedule__name": "cosine_restarts",
            "averaging__name": "polyak",
            "averaging__polyak__start": 0.3,
        },
    ),
    "one cycle, found rate": Campaign(
        (
            ("mid-batch", "trainer"),  # of the range test
            ("start", "trainer"),
            ("checkpoint half written", "all"),
            ("after the step", "trainer"),
            ("validation's end", "trainer"),
            ("after the last step", "all"),
        ),
        {"schedule__name": "one_cycle", "optimizer__SGD__lr": "auto"},
    ),
    "growing batch, Muon, 2 workers": Campaign(
        (
            ("inside a window", "trainer"),
            ("inside a window", "dvc"),
            ("checkpoint renamed", "trainer"),
            ("outs renamed", "trainer"),
        ),
        {
            **WORKERS,
            "optimizer__name": "Muon",
            "schedule__name": "trapezoid",
            "batch__growth": {"at": [0.4], "factor": 2},
        },
    ),
    "early stopping": Campaign(
        (
            ("validation", "trainer"),
            ("mid-batch", "all"),
            ("epoch's end", "trainer"),
            ("after the last step", "trainer"),
        ),
        {
            "trainer__epochs": 30,
            "trainer__early_stopping": {"patience": 3, "min_delta": 0.03},
            "optimizer__SGD__lr": 0.3,
            "schedule__name": "exponential",
            "schedule__exponential": {"every": "2 epochs", "gamma": 0.3},
            "regularization__gradient_clip": None,
            "regularization__gradient_clip_adaptive": 0.05,
            "regularization__gradient_noise": {"std": 0.001, "decay": 0.55},
        },
        stops_early=True,
    ),
    "two members": Campaign(
        (
            ("before the step", "all"),
            ("checkpoint half written", "trainer"),
            ("weights being written", "all"),
            ("mid-batch", "trainer"),  # of the other member
            ("after the last step", "dvc"),
        ),
        {
            "ensemble__members": {
                "a": {"seed": 3},
                "b": {"seed": 4, "optimizer": {"name": "Muon"}, "averaging": {"name": "none"}},
            },
            "batch__sampling": "balanced",
            "loss__class_weights": "none",
            "schedule__name": "cyclic",
            "model__norm__batch__recalibrate": {"when": "always", "images": 64},
        },
    ),
}
