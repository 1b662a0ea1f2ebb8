"""One recipe on one and on two real processes (gloo): the same steps, rates, microbatches and weights."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anneal.batching import epoch_order
from tests.pipeline.conftest import make_clone, make_small
from tests.test_batching import GROWING, LAST_WINDOWS, LOSSES, SIZES, STEPS, by_hand, relative_difference
from tests.test_nan import GATED, brighten
from tests.test_training import largest_difference, train, write_inputs

ROOT = Path(__file__).resolve().parents[1]
BATCH = {"batch": {"size": 64, "microbatch": 16}}
# Batch normalisation, and all that is drawn by microbatch. SiLU is smooth: where a ReLU's input is 0 but for rounding,
# the gradient jumps, and the order of a sum shows in the fourth digit.
DRAWING = {
    "model": {"activation": "SiLU"},
    "regularization": {"dropout": 0.2, "mixup": {"alpha": 0.4}, "label_smoothing": 0.1},
    "schedule": {"name": "cosine", "warmup": {"length": 0.2}},
}
RECALIBRATED = {"model": DRAWING["model"] | {"norm": {"batch": {"recalibrate": {"when": "always", "images": 50}}}}}
# And all that acts on the loss, the gradient or the weights of a step.
BALANCED = {
    "batch": GROWING["batch"] | {"sampling": "balanced"},
    "loss": {"name": "focal"},
    "regularization": DRAWING["regularization"]
    | {"l2": 1e-3, "max_norm": 1.0, "gradient_noise": {"std": 0.01, "decay": 0.55}, "gradient_clip_adaptive": 0.05},
}
AVERAGED = {"averaging": {"name": "ema", "ema": {"decay": 0.8}}, "trainer": {"restore_best": False}}
# Windows of two microbatches at most: sums of two terms, which are the same whoever adds them up.
PAIRS = {"batch": {"size": 32, "microbatch": 16}}
SKIPPING = {
    "model": GATED,
    "regularization": {"label_smoothing": 0.1},
    "trainer": AVERAGED["trainer"] | {"on_nan": "skip"},
}
TO_THE_BIT = {
    "drawing pairs": (40, DRAWING | BALANCED | AVERAGED | {"batch": PAIRS["batch"] | {"sampling": "balanced"}}),
    "drawing pairs AdamW": (25, DRAWING | AVERAGED | PAIRS | {"optimizer": {"name": "AdamW"}}),
    "drawing skipping": ("white", AVERAGED | SKIPPING | PAIRS),
}
CASES = {
    **{f"{loss} {rest}": (rest, options | BATCH) for loss, options in LOSSES.items() for rest in LAST_WINDOWS},
    "grown": (40, LOSSES["penalised"] | GROWING),
    "drawing 40": (40, DRAWING | BATCH),
    "drawing 6": (6, DRAWING | BATCH | AVERAGED),
    "drawing grown": (40, DRAWING | GROWING | BALANCED),
    "drawing recalibrated": (6, DRAWING | BATCH | RECALIBRATED),
    **TO_THE_BIT,
}
PADDED = {"drawing pairs AdamW": 0}
"""Microbatches that only keep a process in step; two where nothing is said."""
# Of a last window two processes normalise 12 and 13 samples together, or 13 and none.
SYNCED = {"synced 25": 25, "synced 13": 13}
# The last case, after which the processes are of no further use.
STOPPED = {"drawing stopped": ("white", SKIPPING | PAIRS | {"trainer": {"on_nan": "stop"}})}
SCRIPT = """
import json, os, sys
from pathlib import Path
import pytorch_lightning as pl
from safetensors.torch import save_file
from anneal.params import UserError
from tests.test_training import train

class Seen(pl.Callback):
    def __init__(self, out):
        self.out, self.batches = out, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        sums = batch.images.flatten(1).to(int).sum(1).tolist()
        self.batches.append([batch.epoch, batch.microbatch, batch_idx, sums])

    def on_train_end(self, trainer, pl_module):
        name = f"{self.out}-{trainer.global_rank}"
        state = {key: value.contiguous() for key, value in pl_module.classifier.state_dict().items()}
        save_file(state, name + ".safetensors")
        Path(name + ".json").write_text(json.dumps(self.batches))

inputs, cases, out, devices = json.loads(sys.argv[1])
for name, (rest, options) in cases.items():
    path = Path(out, name)
    options["trainer"] = {"epochs": 2, **options.get("trainer", {}), "threads": 1, "deterministic": True}
    try:
        train([Path(p) for p in inputs[rest]], path, callbacks=(Seen(path),), hardware={"devices": devices}, **options)
    except UserError as error:
        Path(f"{path}-{os.environ.get('LOCAL_RANK', '0')}.txt").write_text(str(error))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    flip = [{"HorizontalFlip": {"p": 0.5}}]
    stores = {}
    for rest, num_train in {**LAST_WINDOWS, 25: 89, "white": 104}.items():
        for name, policy in ((f"{rest}", "none"), (f"{rest} flipped", flip)):
            (root / name).mkdir()
            stores[name] = write_inputs(root / name, num_train=num_train, policy=policy)
    # In the second microbatch of the second step: of two processes the second one's.
    brighten(stores["white flipped"][0], "train", epoch_order(104, 0, 0)[32 + 20])
    for name, rest in SYNCED.items():
        (root / name).mkdir()
        stores[name] = write_inputs(root / name, num_train=64 + rest)
    return stores


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Every case on one process and on two, which stay together from case to case."""
    root = tmp_path_factory.mktemp("runs")
    (root / "script.py").write_text(SCRIPT)
    cases = {
        name: (f"{rest} flipped" if name.startswith("drawing") else f"{rest}", options)
        for name, (rest, options) in CASES.items()
    }
    stopped = {name: (f"{rest} flipped", options) for name, (rest, options) in STOPPED.items()}
    paths = {name: [str(path) for path in pair] for name, pair in inputs.items()}
    train(inputs["40"], root / "start", model={"activation": "SiLU"}, trainer={"epochs": 1})
    digest = hashlib.sha256((root / "start" / "weights.safetensors").read_bytes()).hexdigest()
    start = {"path": str(root / "start"), "sha256": digest, "freeze": "1 steps", "unfreeze": "gradually"}
    waking = DRAWING["model"] | {"start_from": start}
    cases["waking"] = ("40 flipped", DRAWING | BALANCED | BATCH | {"model": waking})
    for devices in (1, 2):
        out = root / str(devices)
        out.mkdir()
        # One process needs microbatches as large as what two normalise together.
        batch = {"size": 64, "microbatch": 32 // devices}
        norm = {"activation": "SiLU", "norm": {"batch": {"sync": devices == 2}}}
        here = cases | {name: (name, {"model": norm, "batch": batch}) for name in SYNCED} | stopped
        argument = json.dumps([paths, here, str(out), devices])
        command = [sys.executable, str(root / "script.py"), argument]
        done = subprocess.run(
            command,
            cwd=root,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])},
            timeout=300,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    return root


def state(runs, devices, name, rank=0):
    return load_file(runs / str(devices) / f"{name}-{rank}.safetensors")


def history(runs, devices, name):
    return list(csv.DictReader((runs / str(devices) / name / "history.csv").read_text().splitlines()))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("drawing")])
def test_two_processes_step_as_one_big_batch(inputs, runs, name):
    rest, options = CASES[name]
    sizes = SIZES if name == "grown" else [64, 64]
    expected = by_hand(inputs[str(rest)], sizes, **options)
    assert relative_difference(state(runs, 2, name), expected) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_steps_rates_and_sizes_are_exactly_the_same(runs, name):
    one, two = history(runs, 1, name), history(runs, 2, name)
    for column in ("epoch", "step", "lr", "batch_size"):
        assert [row[column] for row in one] == [row[column] for row in two]
    if "growth" in CASES[name][1]["batch"]:
        assert [int(row["step"]) for row in two] == STEPS
        assert [int(row["batch_size"]) for row in two] == SIZES
    for a, b in zip(one, two, strict=True):
        measured = {key: float(value) for key, value in a.items() if value}
        assert measured == pytest.approx({key: float(value) for key, value in b.items() if value}, rel=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_weights_and_running_statistics_are_the_same(runs, name):
    one, two = state(runs, 1, name), state(runs, 2, name)
    agree(name, one, two)
    assert all(torch.equal(a, b) for a, b in zip(two.values(), state(runs, 2, name, rank=1).values(), strict=True))
    if name.startswith("drawing"):
        counts = [value.item() for key, value in two.items() if key.endswith("num_batches_tracked")]
        made = int(history(runs, 2, name)[-1]["step"]) - (2 if name == "drawing skipping" else 0)
        assert counts and set(counts) == {made}


@pytest.mark.parametrize("name", ["drawing 6", *TO_THE_BIT])
def test_averages_and_their_figures_are_the_same(runs, name):
    """Each process averages by itself; the last epoch's, with the statistics that are recalibrated for it."""
    one, two = (load_file(runs / f"{n}" / name / "averages" / "ema.safetensors") for n in (1, 2))
    agree(name, one, two)
    assert largest_difference(two, state(runs, 2, name)) > 1e-4
    for column in ("val_average_loss", "val_average_accuracy"):
        assert [float(row[column]) for row in history(runs, 2, name)] == pytest.approx(
            [float(row[column]) for row in history(runs, 1, name)], rel=1e-5
        )


def agree(name, one, two):
    """To the bit, batch normalisation's statistics too, where sums have two terms; else to rounding."""
    if name in TO_THE_BIT:
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    else:
        assert largest_difference(one, two) < 2e-6


def test_processes_stop_together_and_say_the_same(runs):
    """Though only the second one has seen what is not finite."""
    (name,) = STOPPED
    messages = [(runs / f"{n}" / f"{name}-{rank}.txt").read_text() for n, rank in ((1, 0), (2, 0), (2, 1))]
    assert len(set(messages)) == 1
    assert "the loss is nan (not finite first: the output of layer module.0.1) in epoch 1, step 2, at" in messages[0]
    assert not any((runs / f"{n}" / name).exists() for n in (1, 2))


@pytest.mark.parametrize("name", SYNCED)
def test_synchronised_statistics_are_those_of_one_big_microbatch(runs, name):
    """Weights, hence forward passes and gradients, and running statistics over accumulation and unequal microbatches."""
    one, two = state(runs, 1, name), state(runs, 2, name)
    assert int(history(runs, 2, name)[-1]["step"]) == 4
    assert largest_difference(one, two) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(two.values(), state(runs, 2, name, rank=1).values(), strict=True))


def test_frozen_layers_stay_to_the_bit_on_every_process(runs):
    """The head alone in the first step, then a layer more each step: as many learn in the end on one process and on two."""
    start = load_file(runs / "start" / "weights.safetensors")
    one, two, other = state(runs, 1, "waking"), state(runs, 2, "waking"), state(runs, 2, "waking", rank=1)
    assert largest_difference(one, two) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(two.values(), other.values(), strict=True))
    moved = [{name for name in start if not torch.equal(start[name], run[name])} for run in (one, two)]
    assert moved[0] == moved[1]
    still = set(start) - moved[1]
    assert "network.stem.conv.weight" in still and "network.stem.norm.running_mean" in still
    assert "network.stages.1.0.conv2.weight" in moved[1]


@pytest.mark.parametrize("name", CASES)
def test_microbatches_are_the_same(runs, name):
    """Each microbatch with its images, augmented, whichever process computes it; what fills a round up is not one."""
    one = json.loads((runs / "1" / f"{name}-0.json").read_text())
    ranks = [json.loads((runs / "2" / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    expected = {(epoch, microbatch): sums for epoch, microbatch, _, sums in one}
    found = {(epoch, microbatch): sums for rank in ranks for epoch, microbatch, _, sums in rank}
    assert {key: found[key] for key in expected} == expected
    padding = [key for key in found if key not in expected]
    assert all(key in {tuple(row[:2]) for row in ranks[1]} for key in padding)
    if "grown" not in name:
        assert len(padding) == PADDED.get(name, 2)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    clone = make_small(make_clone(tmp_path_factory.mktemp("devices")))
    clone.set(batch__size=32, batch__microbatch=8, trainer__threads=1, model__activation="SiLU")
    for stage in ("preprocess", "augment"):
        clone.run("python", "-m", f"stages.{stage}")
    return clone


@pytest.mark.long
def test_one_params_file_gives_one_curve_on_any_number_of_devices(clone):
    runs = {}
    for devices in (1, 2):
        clone.set(hardware__devices=devices)
        clone.run("python", "-m", "stages.train", "a")
        folder = clone.path / "models" / "a"
        rows = list(csv.DictReader((folder / "history.csv").read_text().splitlines()))
        runs[devices] = rows, load_file(folder / "weights.safetensors")
    (one, a), (two, b) = runs[1], runs[2]
    assert [(row["step"], row["lr"]) for row in one] == [(row["step"], row["lr"]) for row in two]
    assert len({row["lr"] for row in one}) == 2
    assert 0 < largest_difference(a, b) < 1e-5
