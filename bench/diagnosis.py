"""Recall and false alarms of the findings of `anneal.diagnosis`, on small networks with induced faults.

    python bench/diagnosis.py                     measure, on the curves in tests/fixtures/diagnosis
    python bench/diagnosis.py generate            train what is missing into studies/diagnosis; goes on where it was stopped
    python bench/diagnosis.py pack                write tests/fixtures/diagnosis from studies/diagnosis

Of each of `KINDS` and each data set ten seeds are trained; a seed draws the network, the optimizer and how severe the fault
is. Rules and thresholds were developed on all data sets but `MEASURES`, whose runs were first read when they stood. Who
changes a rule for what it says of that one needs another to measure it.
A run takes a few seconds on one core, all of them an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import hashlib
import io
import json
import math
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anneal import params
from anneal.diagnosis import live
from anneal.diagnosis.curves import Row, Run, as_run, columns_of, value_of
from anneal.diagnosis.rules import RULES, diagnose
from anneal.store import Sample, SplitWriter, finish, fresh_folder, open_store, write_json

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "studies" / "diagnosis"
FIXTURES = ROOT / "tests" / "fixtures" / "diagnosis"
SEEDS = {
    "digits": range(10),
    "fashion-mnist": range(10, 20),
    "patches": range(20, 30),
    "garments": range(30, 40),
    "letters": range(40, 50),
    "accessories": range(50, 60),
    "figures": range(60, 70),
}
"""Data set to the seeds of its runs."""
MEASURES = "figures"
"""The data set that no rule or threshold was developed on."""
TRAINING = (*params.MEMBER_SECTIONS[1:], "hardware")

Draw = np.random.Generator
Values = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A run to be: changes of the base recipe, and what is done to the data.

    Parameters
    ----------
    overrides
        Of params.yaml.
    num_train, num_val
        Images.
    enough
        Training images are `ENOUGH`, not `NUM_TRAIN`.
    label_noise
        Share of the labels, of training and validation alike, that are drawn anew from the other classes.
    imbalance
        Images of the largest class over those of the smallest; in between geometric.
    copies
        How often each validation image stands in the training split too.
    """

    overrides: Values = field(default_factory=dict)
    num_train: int = 0
    num_val: int = 300
    enough: bool = False
    label_noise: float = 0.0
    imbalance: float = 1.0
    copies: int = 0


BASE: Values = {
    "augment": {"policy": "none", "copies": {"balance": False}},
    "model": {
        "name": "mlp",
        "activation": "ReLU",
        "norm": {"name": "batch", "position": "before"},
        "mlp": {"hidden": [64, 32]},
        "convnet": {"widths": [16, 32], "depth": 1},
        "start_from": {"path": None},
    },
    "init": {"name": "kaiming_normal", "zero_last": False, "whiten_first": False},
    "optimizer": {
        "name": "SGD",
        "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5.0e-4},
        "AdamW": {"lr": 5.0e-3, "weight_decay": 0.05},
    },
    "schedule": {"name": "cosine", "warmup": {"length": 0.1, "start": 0.01, "shape": "linear"}, "floor": 0.0},
    "batch": {"size": 32, "microbatch": 32, "lr_scaling": "none", "growth": {"at": []}, "noise_microbatches": 0},
    "loss": {"name": "cross_entropy", "class_weights": "none"},
    "regularization": {"label_smoothing": 0.0, "dropout": 0.0, "gradient_clip": None},
    "averaging": {"name": "none"},
    "trainer": {"epochs": 14, "early_stopping": None, "evaluate_train": 2000, "threads": 1},
    "hardware": {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "num_workers": 0},
}

NUM_TRAIN = {
    "digits": 700,
    "fashion-mnist": 1500,
    "patches": 1000,
    "garments": 1500,
    "letters": 1500,
    "accessories": 1500,
    "figures": 1500,
}
"""Training images of a run."""
ENOUGH = {
    "digits": 1400,
    "fashion-mnist": 4000,
    "patches": 2500,
    "garments": 4000,
    "letters": 4000,
    "accessories": 4000,
    "figures": 4000,
}
"""Training images of a run whose fault, if it has one, is not that of few images."""


# ---- kinds ----------------------------------------------------------------------------------------------------------


def rates(factor: float) -> Values:
    """Return the base's learning rates, times a factor."""
    optimizers = BASE["optimizer"]
    return {"optimizer": {name: {"lr": optimizers[name]["lr"] * factor} for name in ("SGD", "AdamW")}}


def log_uniform(draw: Draw, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform."""
    return float(np.exp(draw.uniform(np.log(low), np.log(high))))


def merged(*parts: Values) -> Values:
    """Return all changes together, the later ones on top."""
    found: Values = {}
    for part in parts:
        found = params.merge(found, part)
    return found


CONSTANT: Values = {"schedule": {"name": "constant", "warmup": {"length": 0.0}}}
PLAIN: Values = {"model": {"norm": {"name": "none"}}}
DEEP: Values = {"model": {"name": "mlp", "norm": {"name": "none"}, "mlp": {"hidden": [32] * 5}}}
SMOOTH: Values = {"regularization": {"label_smoothing": 0.1, "dropout": 0.1}}
BIG: Values = {"model": {"mlp": {"hidden": [256, 128]}, "convnet": {"widths": [24, 48], "depth": 1}}}


def healthy(draw: Draw) -> Case:
    """Return the base recipe on enough images, at a rate within a factor of 1.5 of it, with a little dropout or more."""
    changes: Values = {"trainer": {"epochs": 8}, "regularization": {"dropout": 0.1}}
    return Case(
        merged(rates(log_uniform(draw, 0.67, 1.5)), SMOOTH if draw.random() < 0.5 else {}, changes), enough=True
    )


def healthy_augmented(draw: Draw) -> Case:
    """Return a sound recipe whose training figures are worse than they would be on images as stored."""
    regularization = {"label_smoothing": 0.1, "dropout": 0.1, "mixup": {"alpha": float(draw.choice([0.0, 0.2]))}}
    changes: Values = {"augment": {"policy": "light"}, "regularization": regularization, "trainer": {"epochs": 10}}
    return Case(changes, enough=True)


def diverging(draw: Draw) -> Case:
    """Return a rate far too high for a network without normalisation."""
    return Case(merged(PLAIN, CONSTANT, rates(log_uniform(draw, 10, 40)), {"optimizer": {"name": "SGD"}}))


def rate_too_high(draw: Draw) -> Case:
    """Return a rate that is far too high, but which normalisation or Adam keeps from diverging."""
    return Case(merged(CONSTANT, rates(log_uniform(draw, 10, 30))))


def rate_too_low(draw: Draw) -> Case:
    """Return a rate a hundredth of the base's, more or less."""
    return Case(merged(CONSTANT if draw.random() < 0.5 else {}, rates(log_uniform(draw, 0.004, 0.015))))


def slow_start(draw: Draw) -> Case:
    """Return weights so small that a network of five layers without normalisation is long in finding out of chance."""
    std = log_uniform(draw, 0.07, 0.09)
    start: Values = {
        "init": {"name": "normal", "normal": {"std": std}},
        "optimizer": {"name": "SGD", "SGD": {"lr": 0.05}},
    }
    return Case(merged(DEEP, {"trainer": {"epochs": 30}}, start), num_train=700)


def plateau(draw: Draw) -> Case:
    """Return a constant rate that is good at first and too high to settle: small batches, no decay.

    For SGD, the base's rate is that already, at a quarter of the base's batch.
    """
    changes: Values = {
        "augment": {"policy": "light"},
        "batch": {"size": 8, "microbatch": 8},
        "trainer": {"epochs": 30},
    }
    high = merged(rates(log_uniform(draw, 2, 4)), {"optimizer": {"SGD": {"lr": 0.1 * log_uniform(draw, 1, 2)}}})
    return Case(merged(CONSTANT, high, changes), num_train=400)


def stopped_too_early(draw: Draw) -> Case:
    """Return a rate of a third to two thirds of the base's, and a tenth of the base's steps."""
    changes: Values = {"trainer": {"epochs": int(draw.integers(4, 7))}}
    return Case(merged(CONSTANT, rates(log_uniform(draw, 0.3, 0.67)), changes), num_train=300)


def underfitting(draw: Draw) -> Case:
    """Return a network that is far too small."""
    small: Values = {"name": "mlp", "activation": "GELU", "mlp": {"hidden": [2]}}
    return Case(merged(rates(log_uniform(draw, 0.67, 1.5)), {"model": small, "trainer": {"epochs": 20}}))


def over_regularized(draw: Draw) -> Case:
    """Return a sound network under so much dropout and weight decay that it cannot fit."""
    decay = {"SGD": {"weight_decay": 0.01}, "AdamW": {"weight_decay": 1.0}}
    changes: Values = {"regularization": {"dropout": float(draw.uniform(0.8, 0.9))}, "optimizer": decay}
    return Case(merged({"model": {"mlp": {"hidden": [16]}, "convnet": {"widths": [8, 16]}}}, changes))


def overfitting(draw: Draw) -> Case:
    """Return a large network on few images, without regularisation."""
    decay: Values = {"optimizer": {"SGD": {"weight_decay": 0.0}, "AdamW": {"weight_decay": 0.0}}}
    changes: Values = {"batch": {"size": 16, "microbatch": 16}, "trainer": {"epochs": 30}}
    return Case(merged(BIG, rates(0.3), decay, changes), num_train=16 * int(draw.integers(2, 4)))


def overconfidence(draw: Draw) -> Case:
    """Return a network that has long learnt what it can, and goes on to be surer of it."""
    decay: Values = {"optimizer": {"name": "AdamW", "AdamW": {"weight_decay": 0.0}}}
    changes: Values = merged(
        decay, {"model": {"name": "mlp"}, "batch": {"size": 16, "microbatch": 16}, "trainer": {"epochs": 120}}
    )
    return Case(
        merged(BIG, PLAIN, CONSTANT, rates(log_uniform(draw, 0.3, 0.6)), changes),
        num_train=int(draw.integers(60, 120)),
    )


def leak(draw: Draw) -> Case:
    """Return a training split that has every validation image several times, and a network that can learn them by heart."""
    changes: Values = {"model": {"name": "mlp"}, "trainer": {"epochs": 12}, "regularization": {"dropout": 0.3}}
    return Case(merged(BIG, changes), num_train=2000, copies=int(draw.integers(3, 6)))


def small_validation(draw: Draw) -> Case:
    """Return a sound recipe on enough images, and a validation split of some twenty."""
    changes: Values = merged(SMOOTH, {"trainer": {"epochs": 8}})
    return Case(changes, num_val=int(draw.integers(15, 31)), enough=True)


def tiny_microbatch(draw: Draw) -> Case:
    """Return batch norm over microbatches of two or three images."""
    size = int(draw.choice([2, 2, 4]))
    return Case({"batch": {"size": 8 * size, "microbatch": size}, "trainer": {"epochs": 10}}, num_train=400)


def dead(draw: Draw) -> Case:
    """Return initial weights from which a network learns nothing: all units alike, or signals that have died out."""
    starts: list[Values] = [
        {"init": {"name": "zeros"}},
        {"init": {"name": "constant", "constant": {"value": -0.05}}},
        {"init": {"name": "normal", "normal": {"std": 1.0e-3}}},
    ]
    return Case(merged(DEEP, starts[int(draw.integers(3))]))


def exploding(draw: Draw) -> Case:
    """Return initial weights so large that the first outputs are many times what they should be."""
    return Case(merged(DEEP, {"init": {"name": "normal", "normal": {"std": log_uniform(draw, 0.6, 1.2)}}}))


def imbalance(draw: Draw) -> Case:
    """Return classes of which the largest has twenty times as many images as the smallest, or more."""
    return Case(SMOOTH, imbalance=float(draw.uniform(15, 40)))


def label_noise(draw: Draw) -> Case:
    """Return a third of all labels wrong, and a network that can learn them by heart."""
    changes: Values = {"model": {"name": "mlp"}, "trainer": {"epochs": 40}}
    return Case(merged(BIG, changes), label_noise=float(draw.uniform(0.25, 0.4)))


KINDS: dict[str, Callable[[Draw], Case]] = {
    "healthy": healthy,
    "healthy_augmented": healthy_augmented,
    "diverging": diverging,
    "rate_too_high": rate_too_high,
    "rate_too_low": rate_too_low,
    "slow_start": slow_start,
    "plateau": plateau,
    "stopped_too_early": stopped_too_early,
    "underfitting": underfitting,
    "over_regularized": over_regularized,
    "overfitting": overfitting,
    "overconfidence": overconfidence,
    "leak": leak,
    "small_validation": small_validation,
    "tiny_microbatch": tiny_microbatch,
    "dead": dead,
    "exploding": exploding,
    "imbalance": imbalance,
    "label_noise": label_noise,
}


FEW = {"overfitting", "overconfidence"}
"""What a few hundred images bring with them."""

TRUTH: dict[str, tuple[set[str], set[str]]] = {
    "healthy": (set(), set()),
    "healthy_augmented": (set(), set()),
    "diverging": ({"diverging"}, {"dead_layers"}),
    # Where a rate is so high that the network never comes back, that is divergence. On so few images, without regularisation, a
    # network that does come back may have a gap as well.
    "rate_too_high": ({"learning_rate_too_high", "diverging"}, {"dead_layers", "plateau", "underfitting", *FEW}),
    "rate_too_low": ({"learning_rate_too_low"}, {"stopped_too_early", "underfitting"}),
    "slow_start": ({"slow_start"}, {"stopped_too_early", "underfitting", *FEW}),
    # A rate too high to settle, under which the loss may still fall through its noise: plateau is the weaker word for it.
    "plateau": ({"plateau", "learning_rate_too_high"}, {"underfitting", *FEW}),
    "stopped_too_early": ({"stopped_too_early"}, {"underfitting", *FEW}),
    "underfitting": ({"underfitting"}, set()),
    "over_regularized": ({"over_regularized"}, {"underfitting"}),
    "overfitting": ({"overfitting"}, {"overconfidence"}),
    "overconfidence": ({"overconfidence"}, {"overfitting"}),
    # The loss of validation images falls for as long as their copies are learnt by heart.
    "leak": ({"validation_easier"}, {"stopped_too_early"}),
    "small_validation": ({"noisy_validation"}, set()),
    "tiny_microbatch": ({"batch_too_small_for_batch_norm"}, {"underfitting", *FEW}),
    "dead": ({"dead_layers"}, {"underfitting"}),
    "exploding": ({"exploding_layers"}, {"diverging", "dead_layers", "underfitting", "learning_rate_too_low", *FEW}),
    # Validation has the small classes too, which training has hardly seen.
    "imbalance": ({"class_imbalance"}, {"overfitting", "overconfidence"}),
    "label_noise": ({"label_noise"}, {"underfitting", *FEW}),
}
"""Kind, to the findings of which one is to be found, and to those that follow from it and are no false alarm beside it.

Of sound recipes none is: their images are so many that there is no gap to speak of (`ENOUGH`)."""


def network(draw: Draw) -> Values:
    """Draw a network and an optimizer."""
    return {
        "model": {"name": str(draw.choice(["mlp", "convnet"]))},
        "optimizer": {"name": str(draw.choice(["SGD", "AdamW"]))},
    }


def case_of(kind: str, seed: int, data: str) -> Case:
    """Return the run of a seed."""
    draw = np.random.default_rng([zlib.crc32(kind.encode()), seed, zlib.crc32(data.encode())])
    drawn = network(draw)
    case = KINDS[kind](draw)
    changes = {
        **asdict(case),
        "overrides": merged(drawn, case.overrides),
        "num_train": case.num_train or (ENOUGH if case.enough else NUM_TRAIN)[data],
    }
    return Case(**changes)


def digest(case: Case) -> str:
    """Return a name for what a run is made of, by which one of another recipe is told and trained again."""
    whole = {**asdict(case), "overrides": merged(BASE, case.overrides)}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]


# ---- data -----------------------------------------------------------------------------------------------------------


def write_store(
    folder: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], case: Case, seed: int
) -> dict[str, Any]:
    """Write the store of a run, and return what reports/data.json would say of it."""
    draw = np.random.default_rng([seed, 1])
    classes = int(labels.max()) + 1
    order = draw.permutation(len(labels))
    val, rest = order[: case.num_val], order[case.num_val :]
    share = case.imbalance ** -(draw.permutation(classes) / (classes - 1))
    # The largest class has as many as a balanced split would give it, or the images that there are.
    most = int(case.num_train / share.sum())
    train = np.concatenate(
        [rest[labels[rest] == label][: max(2, round(most * share[label]))] for label in range(classes)]
    )
    noisy = labels.copy()
    wrong = draw.random(len(labels)) < case.label_noise
    noisy[wrong] = (labels[wrong] + draw.integers(1, classes, wrong.sum())) % classes
    train = np.concatenate([train, *[val] * case.copies])
    for name, index in (("train", train), ("val", val)):
        writer = SplitWriter(folder / name, *images.shape[1:])
        for i in index:
            writer.add(images[i], Sample(str(i), "0" * 64, int(noisy[i]), images.shape[2], images.shape[1]))
        writer.close()
    pixels = images[train].astype(np.float64) / 255
    finish(
        folder,
        classes=[str(label) for label in range(classes)],
        shape=images.shape[1:],
        counts={"train": len(train), "val": len(val)},
        normalize="standardize",
        statistics={"mean": pixels.mean((0, 1, 2)), "std": pixels.std((0, 1, 2))},
    )
    counts = {name: np.bincount(noisy[index], minlength=classes) for name, index in (("train", train), ("val", val))}
    return {
        "train": len(train),
        "val": len(val),
        "num_classes": classes,
        "classes": [{"name": str(i), **{s: int(c[i]) for s, c in counts.items()}} for i in range(classes)],
    }


# ---- training -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep what a run says from the terminal."""
    with (
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def train(case: Case, seed: int, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], out: Path) -> None:
    """Train a run, and leave its tables, data.json and params.json in ``out``."""
    import pytorch_lightning as pl

    from anneal.augment import compile_policy, policy_to_json
    from anneal.models.initial_statistics import initial_statistics
    from anneal.recipe import Recipe
    from anneal.training.fit import fit
    from anneal.training.history import History, Step, Steps, as_csv
    from anneal.training.module import Diverged
    from anneal.training.setup import first_batch, set_up

    class Witness(pl.Callback):
        """Knows the run's own callbacks."""

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
            """Look them up."""
            self.history = next(each for each in trainer.callbacks if isinstance(each, History))  # type: ignore[attr-defined]
            self.steps = next(each for each in trainer.callbacks if isinstance(each, Steps))  # type: ignore[attr-defined]

    values = merged(params.read_yaml(ROOT / "params.yaml"), BASE, case.overrides)
    values["ensemble"]["members"] = {"a": {}}
    recipe = Recipe.model_validate(values)
    sections: dict[str, Any] = {name: getattr(recipe, name) for name in TRAINING}
    witness = Witness()
    with tempfile.TemporaryDirectory() as scratch, silent():
        store, augmented, member = (Path(scratch) / name for name in ("store", "augmented", "member"))
        data = write_store(store, images, labels, case, seed)
        info = open_store(store).info
        compose = compile_policy(recipe.augment.policy, height=info.height, width=info.width, channels=info.channels)
        augmented.mkdir()
        (augmented / "policy.json").write_text(policy_to_json(compose), encoding="utf-8")
        inputs = {"store": store, "augmented": augmented, "seed": seed, **sections}
        broke_off = False
        try:
            fit(name="a", out=member, callbacks=(witness,), **inputs)
        except Diverged:
            broke_off = True
        with fresh_folder(out) as folder:
            write_json(folder / "data.json", data)
            told = {key: values[key] for key in ("augment", "model", "optimizer", "batch", "loss", "regularization")}
            write_json(folder / "params.json", {**told, "broke_off": broke_off, "case": digest(case)})
            if not broke_off:
                for name in ("history.csv", "steps.csv", "layers.csv", "initial.csv"):
                    shutil.copy(member / name, folder / name)
                return
            # What there was until then; a run that broke off writes nothing itself.
            history, steps = witness.history, witness.steps
            known = zip(steps.known, steps.losses, steps.norms, strict=True)
            rows = steps.rows + [Step(step, float(loss), rate, float(norm)) for (step, rate), loss, norm in known]
            module = set_up(**inputs).module
            initial = initial_statistics(module.classifier, *first_batch(open_store(store), seed, most=32))
            for name, table in (("history.csv", history.rows), ("steps.csv", rows), ("initial.csv", initial)):
                if table:
                    (folder / name).write_text(as_csv(table), encoding="utf-8")


def generate(
    kinds: list[str], data_sets: list[str], fashion: Path | None, clothing: Path | None, pause_file: Path | None
) -> None:
    """Train every run that is missing or of another recipe, all kinds of a seed before the next."""
    from diagnosis_images import images_of

    pools = {data: images_of(data, fashion, clothing) for data in data_sets}
    jobs = [(seed, data, kind) for data in data_sets for seed in SEEDS[data] for kind in kinds]
    missing = [(seed, data, kind) for seed, data, kind in jobs if not is_there(data, kind, seed)]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are there", flush=True)
    for number, (seed, data, kind) in enumerate(missing):
        while pause_file is not None and pause_file.exists():
            time.sleep(2)
        began = time.process_time()
        train(case_of(kind, seed, data), seed, *pools[data], RUNS / data / f"{kind}-{seed}")
        print(f"{number + 1}/{len(missing)} {data} {kind} {seed}: {time.process_time() - began:.1f} s", flush=True)


def is_there(data: str, kind: str, seed: int) -> bool:
    """Say whether a run was trained, of today's recipe."""
    told = RUNS / data / f"{kind}-{seed}" / "params.json"
    if not told.exists():
        return False
    return json.loads(told.read_text(encoding="utf-8")).get("case") == digest(case_of(kind, seed, data))


# ---- fixtures -------------------------------------------------------------------------------------------------------

KEPT = {
    "history": None,
    "steps": ("step", "loss", "lr"),
    "layers": ("epoch", "layer", "weight_norm", "grad_norm", "update_ratio"),
    "initial": ("layer", "kind", "std", "dead", "grad_norm", "spread", "closed"),
}
"""Columns of each table that the fixtures hold; None: all that some run has a value in."""


def pack(data_sets: list[str]) -> None:
    """Write one table a data set and kind of file, all runs below each other, rounded to four digits."""
    missing = [
        f"{data}/{kind}-{seed}"
        for data in data_sets
        for kind in KINDS
        for seed in SEEDS[data]
        if not is_there(data, kind, seed)
    ]
    if missing:
        sys.exit(
            f"{len(missing)} runs are missing, {missing[0]} the first; train them: python bench/diagnosis.py generate"
        )
    for data in data_sets:
        folders = sorted(RUNS / data / f"{kind}-{seed}" for kind in KINDS for seed in SEEDS[data])
        facts = {}
        for folder in folders:
            told = {
                name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("params", "data")
            }
            facts[folder.name] = told
        write_gzip(FIXTURES / data / "runs.json.gz", json.dumps(facts, sort_keys=True))
        for table, columns in KEPT.items():
            rows = [row for folder in folders for row in packed_rows(folder, table)]
            names = columns or tuple(name for name in rows[0] if name != "run" and any(row[name] for row in rows))
            buffer = io.StringIO()
            writer = csv.DictWriter(buffer, ["run", *names], extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: rounded(cell) for name, cell in row.items()} for row in rows)
            write_gzip(FIXTURES / data / f"{table}.csv.gz", buffer.getvalue())
    size = sum(path.stat().st_size for path in FIXTURES.rglob("*.gz"))
    print(f"{FIXTURES.relative_to(ROOT)}: {size / 1e3:,.0f} kB")


def packed_rows(folder: Path, table: str) -> list[dict[str, str]]:
    """Return a run's rows of a table; of layers.csv weights and gradients before the first step and of the last epoch alone."""
    path = folder / f"{table}.csv"
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = [{"run": folder.name, **row} for row in csv.DictReader(file)]
    if table != "layers":
        return rows
    rest = {"weight_norm": "", "grad_norm": ""}
    return [row if row["epoch"] in ("0", rows[-1]["epoch"]) else row | rest for row in rows]


def rounded(cell: str) -> str:
    """Return a number with four digits, other text as it is."""
    try:
        return f"{float(cell):.4g}" if "." in cell or "e" in cell else cell
    except ValueError:
        return cell


def write_gzip(path: Path, text: str) -> None:
    """Write text compressed, the same bytes at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def load(data: str) -> dict[str, Run]:
    """Return the runs of a data set from the fixtures, by ``<kind>-<seed>``."""
    tables: dict[str, dict[str, list[Row]]] = {}
    for table in KEPT:
        text = gzip.decompress((FIXTURES / data / f"{table}.csv.gz").read_bytes()).decode()
        tables[table] = {}
        for row in csv.DictReader(io.StringIO(text)):
            tables[table].setdefault(row.pop("run"), []).append({name: value_of(cell) for name, cell in row.items()})
    facts = json.loads(gzip.decompress((FIXTURES / data / "runs.json.gz").read_bytes()))
    return {
        name: as_run(
            columns_of(tables["history"].get(name, [])),
            steps=columns_of(tables["steps"].get(name, [])),
            layers=tables["layers"].get(name, []),
            initial=tables["initial"].get(name, []),
            recipe=told["params"],
            data=told["data"],
        )
        for name, told in facts.items()
    }


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How the rules did on one data set.

    Parameters
    ----------
    confusion
        Kind, to finding or ``healthy``, to number of runs.
    recall
        Share of the faulty runs whose fault was found, by kind.
    false_alarms
        Share of the runs with a finding that is neither their fault nor a consequence of it, by kind.
    """

    confusion: dict[str, Counter[str]]
    recall: dict[str, float]
    false_alarms: dict[str, float]


def score(runs: Mapping[str, Run]) -> Score:
    """Diagnose runs, and compare with what was done to them."""
    confusion: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    hits: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    alarms: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for name, run in runs.items():
        kind = name.rsplit("-", 1)[0]
        found = {finding.name for finding in diagnose(run)}
        expected, also = TRUTH[kind]
        confusion[kind].update(found or {"healthy"})
        hits[kind].append(bool(found & expected))
        alarms[kind].append(bool(found - expected - also))
    mean = {kind: float(np.mean(values)) for kind, values in alarms.items() if values}
    return Score(confusion, {kind: float(np.mean(hits[kind])) for kind in mean if TRUTH[kind][0]}, mean)


def print_score(data: str, found: Score) -> None:
    """Print the confusion matrix and the two figures."""
    names = [*RULES, "healthy"]
    letters = {name: chr(ord("A") + i) for i, name in enumerate(names)}
    print(f"\n{data}: runs of each kind (rows) with each finding (columns)")
    print(f"{'':18}" + "".join(f"{letters[name]:>4}" for name in names) + "   recall  false alarms")
    for kind, counts in found.confusion.items():
        if kind in found.false_alarms:
            cells = "".join(f"{counts[name] or '.':>4}" for name in names)
            recall = f"{found.recall[kind]:.2f}" if kind in found.recall else ""
            print(f"{kind:18}{cells}   {recall:>6}  {found.false_alarms[kind]:12.2f}")
    print(", ".join(f"{letter} {name}" for name, letter in letters.items()))
    mean = {name: float(np.mean(list(getattr(found, name).values()))) for name in ("recall", "false_alarms")}
    print(f"{data}: recall {mean['recall']:.3f} (goal 0.95), false alarms {mean['false_alarms']:.3f} (goal 0.05)")


def live_findings(run: Run) -> tuple[str, float] | None:
    """Return the first finding while the run went on, and after which share of it."""
    if live.dead_at_start(run.initial) is not None:
        return "dead_at_start", 0.0
    last = run.steps.get("step", [0.0])[-1]
    for epoch in range(run.epochs):
        until = int(run.history["step"][epoch])
        losses = [loss for step, loss in zip(run.steps["step"], run.steps["loss"], strict=True) if step <= until]
        if live.diverged(losses, run.chance) is not None:
            return "diverging", until / last
    broke_off = run.steps and not math.isfinite(run.steps["loss"][-1])
    return ("diverging", 1.0) if broke_off or not run.epochs else None


def print_live(data: str, runs: Mapping[str, Run]) -> None:
    """Print what was certain before the end."""
    found: dict[tuple[str, str], list[float]] = {}
    for name, run in runs.items():
        if (seen := live_findings(run)) is not None:
            found.setdefault((name.rsplit("-", 1)[0], seen[0]), []).append(seen[1])
    for (kind, finding), shares in sorted(found.items()):
        print(f"{data}, live: {finding} in {len(shares)} runs of {kind}, after {np.median(shares):.0%} of the run")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", nargs="?", choices=["measure", "generate", "pack"], default="measure")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--data", nargs="+", choices=list(SEEDS), default=list(SEEDS), help="data sets (default: all)")
    parser.add_argument("--fashion-mnist", type=Path, help="generate: folder of its gzipped IDX files")
    parser.add_argument("--clothing", type=Path, help="generate: tar of photographs, a folder a class")
    parser.add_argument("--pause-file", type=Path, help="generate: wait between runs while this file exists")
    options = parser.parse_args()
    needed = {"fashion-mnist": ["fashion-mnist", "garments", "accessories"], "clothing": ["patches"]}
    for name, data_sets in needed.items():
        path = getattr(options, name.replace("-", "_"))
        wanted = [data for data in data_sets if data in options.data]
        if options.command == "generate" and wanted and (path is None or not path.exists()):
            parser.error(f"--{name}: found {path or 'nothing'}, which {', '.join(wanted)} need; see docs/diagnosis.md")
    if options.command == "generate":
        generate(options.kinds, options.data, options.fashion_mnist, options.clothing, options.pause_file)
    elif options.command == "pack":
        pack(options.data)
    else:
        for data in options.data:
            runs = load(data)
            print_score(data, score(runs))
            print_live(data, runs)
        print("\nrecall: share of the faulty runs whose fault was found")
        print("false alarm: a run with a finding that is neither its fault nor follows from it (TRUTH)")


if __name__ == "__main__":
    main()
