"""Our training step under Lightning, everything on, against a hand-written PyTorch loop; prints the ratio of their times.

Both train the network of recipes/fashion-mnist-fast.yaml on the same 28x28 grey images with the same augmentation, in one
process and in turns: a block of either is one short epoch (40 steps of 128 and a validation). Ours has the progress
lines, gradient norms, metrics to a real MLflow store, best weights and NaN checks on; the loop has none of them.

    python bench/step.py [--blocks 24] [--steps 40]
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from anneal import params, tracking
from anneal.augment import compile_policy, policy_to_json
from anneal.batching import MicrobatchSampler
from anneal.optimizers.build import build_optimizer
from anneal.recipe import Recipe
from anneal.store import Sample, SplitWriter, finish
from anneal.training.fit import fit

ROOT = Path(__file__).parents[1]
SIDE, CLASSES = 28, 10
TRAINING = (*params.MEMBER_SECTIONS[1:], "hardware")


def write_inputs(root: Path, policy: Any, num_train: int, num_val: int) -> None:
    """Write a store of noise: the time of a step does not depend on what the images show."""
    draw = np.random.default_rng(0)
    store = root / "data" / "processed"
    for name, number in (("train", num_train), ("val", num_val)):
        writer = SplitWriter(store / name, SIDE, SIDE, 1)
        for i in range(number):
            image = draw.integers(0, 256, (SIDE, SIDE, 1), dtype=np.uint8)
            writer.add(image, Sample(str(i), "0" * 64, i % CLASSES, SIDE, SIDE))
        writer.close()
    finish(
        store,
        classes=[str(i) for i in range(CLASSES)],
        shape=(SIDE, SIDE, 1),
        counts={"train": num_train, "val": num_val},
        normalize="standardize",
        statistics={"mean": np.array([0.5]), "std": np.array([0.29])},
    )
    augmented = root / "data" / "augmented"
    augmented.mkdir()
    compose = compile_policy(policy, height=SIDE, width=SIDE, channels=1)
    (augmented / "policy.json").write_text(policy_to_json(compose))


class HandWritten:
    """What one would write without a framework; trains a copy of the network on the same data set."""

    def __init__(self, module: Any, data_module: Any, label_smoothing: float) -> None:
        self.classifier = copy.deepcopy(module.classifier)
        self.optimizer = build_optimizer(self.classifier, **module.optimizer_arguments)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: module.factor_at(step, ()))
        sampler = MicrobatchSampler(module.plan, seed=1)
        self.train = torch.utils.data.DataLoader(
            data_module.train, batch_sampler=sampler, collate_fn=lambda batch: batch, num_workers=0
        )
        self.val = data_module.val_dataloader()
        self.label_smoothing = label_smoothing

    def epoch(self) -> tuple[float, float]:
        """Train and validate for one epoch; return training and validation loss."""
        self.classifier.train()
        total, correct, seen = torch.zeros(()), torch.zeros((), dtype=torch.int64), 0
        for batch in self.train:
            logits = self.classifier(batch.images)
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            total += loss.detach() * len(batch.labels)
            correct += (logits.detach().argmax(1) == batch.labels).sum()
            seen += len(batch.labels)
        self.classifier.eval()
        val = torch.zeros(())
        with torch.inference_mode():
            for batch in self.val:
                val += F.cross_entropy(self.classifier(batch.images), batch.labels, reduction="sum")
        return float(total) / seen, float(val)


class Turns(pl.Callback):
    """Run a block of the hand-written loop after each epoch of ours, and keep both times."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing
        self.times: list[tuple[float, float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Build the loop, and warm it up."""
        self.loop = HandWritten(pl_module, trainer.datamodule, self.label_smoothing)
        self.loop.epoch()
        self.start = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        """Take the time of our block, then run and time the loop's."""
        middle = time.perf_counter()
        self.loop.epoch()
        end = time.perf_counter()
        self.times.append((middle - self.start, end - middle))
        self.start = time.perf_counter()


def interval(ratios: np.ndarray, resamples: int = 10_000) -> tuple[float, float, float]:
    """Return the median ratio and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(ratios, (resamples, len(ratios)))
    low, high = np.quantile(np.median(draws, 1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=24, help="blocks of each (default 24)")
    parser.add_argument("--steps", type=int, default=40, help="steps of a block (default 40)")
    options = parser.parse_args()

    recipe = params.read_yaml(ROOT / "recipes" / "fashion-mnist-fast.yaml")
    values = params.merge(params.read_yaml(ROOT / "params.yaml"), recipe)
    values["trainer"] |= {"epochs": options.blocks + 1, "early_stopping": None}
    values["hardware"] |= {"accelerator": "cpu", "devices": 1, "num_workers": 0}
    classes = {name: field.annotation for name, field in Recipe.model_fields.items() if name in TRAINING}
    sections = params.parse(values, classes)  # type: ignore[arg-type]
    turns = Turns(sections["regularization"].label_smoothing)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        values["tracking"]["uri"] = f"sqlite:///{folder}/mlflow.db"
        write_inputs(Path(folder), values["augment"]["policy"], options.steps * sections["batch"].size, 640)
        out = Path("models/a")
        with tracking.stage_run(values, "train", member="a", outs=[out]) as run:
            fit(
                name="a",
                store=Path("data/processed"),
                augmented=Path("data/augmented"),
                out=out,
                seed=0,
                log=run.metrics,
                callbacks=(turns,),
                **sections,
            )
        os.chdir(ROOT)
    times = np.array(turns.times[1:])
    middle, low, high = interval(times[:, 0] / times[:, 1])
    ours, theirs = np.median(times, 0) / options.steps * 1000
    print(f"{len(times)} blocks of {options.steps} steps each, {torch.get_num_threads()} threads")
    print(f"ours {ours:.2f} ms a step, hand-written {theirs:.2f} ms a step (validation and epoch ends included)")
    print(f"ratio {middle:.3f}, 95 % interval {low:.3f} to {high:.3f}; goal at most 1.10")


if __name__ == "__main__":
    main()
