"""What tracking costs: the time of the calls that it adds to training, as a share of an epoch.

Trains the network of recipes/fashion-mnist-fast.yaml, once with a real MLflow store (sqlite) and once with a server that is
down, and takes the time that the calls of `tracking.Run` need which the training makes (the metrics of an epoch, the rows of
its steps), against the time of the same epochs. What the process that sends them uses of the CPU is printed beside it.

    python bench/tracking.py [--data FOLDER] [--epochs 12] [--steps 40]
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytorch_lightning as pl
import torch
from step import ROOT, TRAINING, interval, write_inputs

from anneal import params, tracking
from anneal.recipe import Recipe
from anneal.training.fit import fit
from anneal.training.logger import Write


class Clock(pl.Callback):
    """Seconds from the start of each epoch to that of the next, those of the timed calls in it, and their number."""

    def __init__(self) -> None:
        self.spent, self.calls, self.start = 0.0, 0, 0.0
        self.epochs: list[tuple[float, float, int]] = []

    def timed(self, write: Write) -> Write:
        """Return a function that takes the time of another's calls."""

        def called(values: dict[str, float], step: int) -> None:
            start = time.perf_counter()
            write(values, step)
            self.spent += time.perf_counter() - start
            self.calls += 1

        return called

    def on_train_epoch_start(self, *_: Any) -> None:
        """End an epoch, and start the next; Lightning logs after the hooks of an epoch's end."""
        now = time.perf_counter()
        if self.start:
            self.epochs.append((now - self.start, self.spent, self.calls))
        self.spent, self.calls, self.start = 0.0, 0, now


def measure(values: dict[str, Any], sections: dict[str, Any], uri: str, label: str) -> None:
    """Train once, and print what the calls took."""
    values["tracking"]["uri"] = uri
    clock, out = Clock(), Path("models/a")
    start = time.perf_counter()
    with tracking.stage_run(values, "train", member="a", outs=[out]) as run:
        opened = time.perf_counter()
        fit(
            name="a",
            store=Path("data/processed"),
            augmented=Path("data/augmented"),
            out=out,
            seed=0,
            log=clock.timed(run.metrics),
            callbacks=(clock,),
            **sections,
        )
        fitted = time.perf_counter()
        sender = [process.cpu_times() for process in psutil.Process().children()]
    ended = time.perf_counter()
    seconds, spent, calls = (np.array(column) for column in zip(*clock.epochs[1:], strict=True))
    share, low, high = (100 * figure for figure in interval(spent / seconds))
    busy = sum(times.user + times.system for times in sender)
    print(
        f"{label}: {len(seconds)} epochs of {np.median(seconds):.2f} s, {np.median(calls):.0f} calls in each; medians"
    )
    print(f"  {1e6 * np.median(spent / calls):.0f} us a call, {1e3 * np.median(spent):.2f} ms an epoch")
    print(f"  {share:.3f} % of its time, 95 % interval {low:.3f} to {high:.3f}; goal under 2 %")
    print(f"  the stage waited {1e3 * (opened - start):.0f} ms at its start and {ended - fitted:.1f} s at its end;")
    print(f"  the sending process used {busy:.1f} s of CPU in {fitted - opened:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a processed data set of 28x28 grey images (default: noise)")
    parser.add_argument(
        "--epochs", type=int, default=12, help="epochs; the first and the last are left out (default 12)"
    )
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of an epoch of noise (default 40)")
    options = parser.parse_args()

    recipe = params.read_yaml(ROOT / "recipes" / "fashion-mnist-fast.yaml")
    values = params.merge(params.read_yaml(ROOT / "params.yaml"), recipe)
    values["trainer"] |= {"epochs": options.epochs, "early_stopping": None}
    values["hardware"] |= {"accelerator": "cpu", "devices": 1, "num_workers": 0}
    classes = {name: field.annotation for name, field in Recipe.model_fields.items() if name in TRAINING}
    sections = params.parse(values, classes)  # type: ignore[arg-type]
    data = options.data.resolve() if options.data else None
    with tempfile.TemporaryDirectory() as folder, socket.socket() as nobody:
        os.chdir(folder)
        write_inputs(Path(folder), values["augment"]["policy"], options.steps * sections["batch"].size, 640)
        if data:
            shutil.rmtree("data/processed")
            Path("data/processed").symlink_to(data)
        nobody.bind(("127.0.0.1", 0))  # a port that is taken, and on which nobody listens
        print(f"{torch.get_num_threads()} threads")
        measure(values, sections, f"sqlite:///{folder}/mlflow.db", "sqlite")
        shutil.rmtree("models")
        measure(values, sections, f"http://127.0.0.1:{nobody.getsockname()[1]}", "server down")
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
