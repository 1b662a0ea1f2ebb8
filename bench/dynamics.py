"""What the telemetry of a run costs: the time of the calls that it adds, as a share of an epoch.

Trains the network of recipes/fashion-mnist-fast.yaml on noise, with metrics to a real MLflow store, and takes the time that
the callbacks behind steps.csv and layers.csv need (all their hooks, logging included), against the time of the same epochs.

    python bench/dynamics.py [--epochs 8] [--steps 40] [--optimizer SGD]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from step import ROOT, TRAINING, write_inputs

from anneal import params, tracking
from anneal.recipe import Recipe
from anneal.training.dynamics import Dynamics
from anneal.training.fit import fit
from anneal.training.history import Steps

HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_validation_end")


class Clock(pl.Callback):
    """Seconds of each epoch, and within it those of the timed hooks."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.epochs: list[tuple[float, dict[str, float]]] = []

    def timed(self, kind: type[pl.Callback]) -> None:
        """Take the time of all hooks of a callback from now on."""
        for name in HOOKS:
            if name in vars(kind):
                setattr(kind, name, self._timed(getattr(kind, name), f"{kind.__name__}.{name}"))

    def _timed(self, hook: Callable[..., None], label: str) -> Callable[..., None]:
        def called(*arguments: Any) -> None:
            start = time.perf_counter()
            hook(*arguments)
            self.spent[label] += time.perf_counter() - start

        return called

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start an epoch."""
        self.spent.clear()
        self.start = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        """End it."""
        self.epochs.append((time.perf_counter() - self.start, dict(self.spent)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8, help="epochs, the first of which is left out (default 8)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of an epoch (default 40)")
    parser.add_argument("--optimizer", default="SGD", help="optimizer.name (default SGD)")
    options = parser.parse_args()

    recipe = params.read_yaml(ROOT / "recipes" / "fashion-mnist-fast.yaml")
    values = params.merge(params.read_yaml(ROOT / "params.yaml"), recipe)
    values["optimizer"]["name"] = options.optimizer
    values["trainer"] |= {"epochs": options.epochs, "early_stopping": None}
    values["hardware"] |= {"accelerator": "cpu", "devices": 1, "num_workers": 0}
    classes = {name: field.annotation for name, field in Recipe.model_fields.items() if name in TRAINING}
    sections = params.parse(values, classes)  # type: ignore[arg-type]
    clock = Clock()
    clock.timed(Dynamics)
    clock.timed(Steps)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        values["tracking"]["uri"] = f"sqlite:///{folder}/mlflow.db"
        write_inputs(Path(folder), values["augment"]["policy"], options.steps * sections["batch"].size, 640)
        out = Path("models/a")
        with tracking.stage_run(values, "train", member="a", outs=[out]) as run:
            result = fit(
                name="a",
                store=Path("data/processed"),
                augmented=Path("data/augmented"),
                out=out,
                seed=0,
                log=run.metrics,
                callbacks=(clock,),
                **sections,
            )
        os.chdir(ROOT)
    epochs = clock.epochs[1:]
    print(
        f"{len(epochs)} epochs of {options.steps} steps, {options.optimizer}, {result.num_parameters:,} parameters, "
        f"{torch.get_num_threads()} threads; medians"
    )
    for label in epochs[0][1]:
        print(f"{1000 * np.median([spent[label] for _, spent in epochs]):8.2f} ms  {label}")
    added = [sum(spent.values()) for _, spent in epochs]
    shares = [part / whole for (whole, _), part in zip(epochs, added, strict=True)]
    print(
        f"{1000 * np.median(added):8.2f} ms of {np.median([whole for whole, _ in epochs]):.2f} s an epoch: "
        f"{np.median(shares):.2%}; goal under 1 %"
    )


if __name__ == "__main__":
    main()
