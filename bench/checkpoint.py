"""What resumable training costs: the checkpoint's calls themselves, over the time of the steps between them; prints shares.

Trains the network of recipes/fashion-mnist-fast.yaml on grey 28x28 noise for a few short epochs, with a checkpoint every
few steps, and times each call of the checkpoint callback. At the default settings a checkpoint is written each
`hardware.checkpoint_every` and at each epoch's end; the shares are of these, with the recipe's 54,000 images an epoch.

    python bench/checkpoint.py [--epochs 4] [--steps 60]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from step import ROOT, TRAINING, interval, write_inputs

from anneal import params
from anneal.recipe import Recipe
from anneal.training.checkpoint import Checkpoints
from anneal.training.checkpoint import interval as seconds_of
from anneal.training.fit import fit
from anneal.training.state import RunState

IMAGES = 54_000
"""Of an epoch of the recipe."""


class Steps(pl.Callback):
    """The time from the start of a forward pass to the end of its optimizer step, validation and checkpoints left out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it; checkpoints come after all other callbacks."""
        self.times.append(time.perf_counter() - self.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4, help="short epochs (default 4)")
    parser.add_argument("--steps", type=int, default=60, help="steps of one (default 60)")
    options = parser.parse_args()

    recipe = params.read_yaml(ROOT / "recipes" / "fashion-mnist-fast.yaml")
    values = params.merge(params.read_yaml(ROOT / "params.yaml"), recipe)
    every, _ = seconds_of(values["hardware"]["checkpoint_every"])
    values["trainer"] |= {"epochs": options.epochs, "early_stopping": None}
    values["hardware"] |= {"accelerator": "cpu", "devices": 1, "num_workers": 0, "checkpoint_every": "10 steps"}
    classes = {name: field.annotation for name, field in Recipe.model_fields.items() if name in TRAINING}
    sections = params.parse(values, classes)  # type: ignore[arg-type]
    size = sections["batch"].size
    hooks: list[float] = []
    saves: list[float] = []
    Checkpoints.on_train_batch_end = timed_method(Checkpoints.on_train_batch_end, hooks)  # type: ignore[method-assign]
    Checkpoints.save = timed_method(Checkpoints.save, saves)  # type: ignore[method-assign]
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_inputs(root, values["augment"]["policy"], options.steps * size, 1000)
        fit(
            name="a",
            store=root / "data" / "processed",
            augmented=root / "data" / "augmented",
            out=root / "a",
            seed=0,
            state=RunState(root / "state", {}),
            callbacks=(steps,),
            **sections,
        )
        megabytes = max(path.stat().st_size for path in (root / "state").glob("*.ckpt")) / 1e6
    step = float(np.median(steps.times))
    saved = set(saves)
    idle = np.array([hook for hook in hooks if hook < min(saved)])
    epoch = IMAGES / size * step
    shares = idle.mean() / step + np.array(saves) * (1 / every + 1 / epoch)
    middle, low, high = interval(shares)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, steps of {size}, {step * 1e3:.1f} ms each")
    print(f"a checkpoint: {megabytes:.1f} MB, median {np.median(saves) * 1e3:.1f} ms of {len(saves)}")
    print(f"asking whether one is due: {idle.mean() * 1e6:.1f} us a step, {100 * idle.mean() / step:.3f} %")
    print(
        f"all at the defaults: {100 * middle:.2f} % of a step's time (95 % interval {100 * low:.2f} to {100 * high:.2f})"
    )


def timed_method(method: Any, times: list[float]) -> Any:
    """Return a function for a class that keeps the time of each call of its method."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(self, *arguments, **options)
        finally:
            times.append(time.perf_counter() - start)

    return call


if __name__ == "__main__":
    main()
