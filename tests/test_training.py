import copy
import csv
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from anneal import params
from anneal.augment import compile_policy, policy_to_json
from anneal.batching import epoch_order
from anneal.conflicts import check_recipe
from anneal.models.build import build_classifier, load_classifier
from anneal.models.initialization import initialize
from anneal.params import ParamsError, UserError
from anneal.preprocess import PreprocessConfig
from anneal.schedules import ScheduleConfig, factor, factor_arguments, momentum_at
from anneal.store import Sample, SplitWriter, finish, open_store
from anneal.training.best import rank
from anneal.training.data import MicrobatchDataset, training_set, workers_that_pay
from anneal.training.fit import fit
from anneal.training.machine import check_precision, cpu_has_bfloat16, quiet, resolve_devices
from anneal.training.module import WindowNorms
from anneal.training.progress import Progress
from anneal.training.schedule import ScheduleCurve
from anneal.training.sections import SECTIONS
from anneal.training.setup import balanced_weights, set_up

SIDE, CLASSES = 6, ["a", "b", "c"]
NO_NORM = {"model": {"name": "convnet", "norm": {"name": "none"}, "convnet": {"widths": [8], "depth": 1}}}
FILES = ("weights.safetensors", "model.json", "history.csv", "steps.csv", "layers.csv", "initial.csv")


def images_of(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, brighter in the third of the image that is the label's."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, len(CLASSES), number)
    images = draw.integers(0, 160, (number, SIDE, SIDE, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 2] += 60
    return images, labels


def write_split(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    writer = SplitWriter(folder, *images.shape[1:])
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        writer.add(image, Sample(str(i), "0" * 64, int(label), SIDE, SIDE))
    writer.close()


def write_inputs(root: Path, num_train: int = 150, num_val: int = 40, policy: object = "none") -> tuple[Path, Path]:
    store, augmented = root / "processed", root / "augmented"
    train = images_of(num_train, 0)
    write_split(store / "train", *train)
    write_split(store / "val", *images_of(num_val, 1))
    x = train[0] / 255
    statistics = {"mean": x.mean((0, 1, 2)), "std": x.std((0, 1, 2))}
    finish(
        store,
        classes=CLASSES,
        shape=(SIDE, SIDE, 1),
        counts={"train": num_train, "val": num_val},
        normalize="standardize",
        statistics=statistics,
        fit="crop",
        interpolation="bilinear",
    )
    augmented.mkdir()
    compose = compile_policy(policy, height=SIDE, width=SIDE, channels=1)
    (augmented / "policy.json").write_text(policy_to_json(compose))
    return store, augmented


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    policy = [{"HorizontalFlip": {"p": 0.5}}, {"RandomBrightnessContrast": {"p": 0.5}}]
    return write_inputs(tmp_path_factory.mktemp("flipped"), policy=policy)


SHIPPED = params.read_yaml(Path(__file__).parents[1] / "params.yaml")


def sections(**overrides: object) -> dict:
    small = {
        "model": {"name": "resnet", "resnet": {"widths": [8, 8], "depths": [1, 1]}},
        "schedule": {"warmup": {"length": 0.1}},
        "batch": {"size": 64, "microbatch": 64},
        "trainer": {"epochs": 2, "threads": 1},
        "hardware": {"accelerator": "cpu", "devices": 1, "num_workers": 0},
    }
    return params.parse(params.merge(params.merge(SHIPPED, small), overrides), SECTIONS)


def train(inputs, out: Path, *, seed: int = 0, log=None, callbacks=(), **overrides):
    return fit(
        name="a",
        store=inputs[0],
        augmented=inputs[1],
        out=out,
        seed=seed,
        log=log,
        callbacks=callbacks,
        **sections(**overrides),
    )


def contents(folder: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return {name: (folder / name).read_bytes() for name in FILES}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_classifier(folder)[0].state_dict()


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


# ---- outs -----------------------------------------------------------------------------------------------------------


def test_outs_and_log(inputs, tmp_path):
    logged = []
    result = train(inputs, tmp_path / "a", log=lambda metrics, step: logged.append((metrics, step)))
    classifier, model = load_classifier(tmp_path / "a")
    assert model["classes"] == CLASSES
    assert model["preprocessing"] == {"size": SIDE, "fit": "crop", "interpolation": "bilinear"}
    assert model["normalization"] == {"kind": "standardize", "height": SIDE, "width": SIDE, "channels": 1}
    assert model["num_parameters"] == sum(p.numel() for p in classifier.parameters()) == result.num_parameters
    assert model["augmentation"] == []
    rows = list(csv.DictReader((tmp_path / "a" / "history.csv").read_text().splitlines()))
    assert list(rows[0]) == [
        "epoch",
        "step",
        "lr",
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
        "grad_norm",
        "batch_size",
        "update_ratio",
        "update_cosine",
        "rate_low",
        "rate_median",
        "rate_high",
        "noise_scale",
        "train_eval_loss",
        "train_eval_accuracy",
        "val_average_loss",
        "val_average_accuracy",
        "norm_gap",
        "norm_small_scales",
    ]
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6")]
    epochs = [(metrics, step) for metrics, step in logged if "epoch" in metrics]
    assert [step for _, step in epochs] == [3, 6]
    for row, (metrics, _) in zip(rows, epochs, strict=True):
        named = {name.replace("/", "_"): value for name, value in metrics.items()}
        assert {name: float(row[name]) for name in row if name != "step" and row[name]} == {
            name: value for name, value in named.items() if name in row
        }
        layers = {row["layer"] for row in csv.DictReader((tmp_path / "a" / "layers.csv").read_text().splitlines())}
        assert {name.removeprefix("update_ratio/") for name in metrics if name.startswith("update_ratio/")} == layers
    best = max(result.rows, key=lambda row: (row.val_accuracy, -row.val_loss, -row.epoch))
    assert model["best_epoch"] == result.best_epoch == best.epoch


def test_exported_weights_are_those_of_the_best_epoch(inputs, tmp_path):
    # A rate that grows without bound spoils the later epochs, so that the best is not the last.
    result = train(
        inputs,
        tmp_path / "a",
        trainer={"epochs": 6},
        optimizer={"SGD": {"lr": 3.0, "momentum": 0.0, "nesterov": False}},
        schedule={"name": "constant", "warmup": {"length": 0.9, "start": 0.001}},
    )
    classifier, model = load_classifier(tmp_path / "a")
    split = open_store(inputs[0]).split("val")
    with torch.no_grad():
        logits = classifier(torch.from_numpy(split.take(range(len(split)))))
    row = result.rows[model["best_epoch"] - 1]
    assert float((logits.argmax(1).numpy() == split.labels).mean()) == row.val_accuracy
    assert F.cross_entropy(logits, torch.from_numpy(split.labels)).item() == pytest.approx(row.val_loss, rel=1e-5)
    assert rank({"val/accuracy": row.val_accuracy, "val/loss": row.val_loss}) == max(
        rank({"val/accuracy": r.val_accuracy, "val/loss": r.val_loss}) for r in result.rows
    )


def test_it_learns(inputs, tmp_path):
    result = train(inputs, tmp_path / "a", trainer={"epochs": 12}, batch={"size": 32, "microbatch": 32})
    assert max(row.val_accuracy for row in result.rows) > 0.9
    assert result.rows[-1].train_loss < result.rows[0].train_loss


def test_reruns_give_the_same_bytes_whatever_the_workers(flipped, tmp_path):
    regularization = {
        "dropout": 0.2,
        "stochastic_depth": 0.2,
        "mixup": {"alpha": 0.4},
        "cutmix": {"alpha": 1.0},
        "gradient_clip": 1.0,
        "l1": 1e-5,
    }
    options = {"regularization": regularization, "batch": {"size": 32, "microbatch": 16}}
    train(flipped, tmp_path / "a", **options)
    torch.rand(7)
    np.random.rand(3)  # noqa: NPY002
    train(flipped, tmp_path / "b", **options)
    train(flipped, tmp_path / "c", hardware={"num_workers": 2}, **options)
    train(flipped, tmp_path / "d", seed=1, **options)
    first = contents(tmp_path / "a")
    assert contents(tmp_path / "b") == first
    assert contents(tmp_path / "c") == first
    other = contents(tmp_path / "d")
    assert other["weights.safetensors"] != first["weights.safetensors"]
    assert json.loads(first["model.json"])["augmentation"] == ["HorizontalFlip", "RandomBrightnessContrast"]


# ---- the gradient of a window ---------------------------------------------------------------------------------------


def reference_run(inputs, epochs: int, size: int, lr: float) -> dict[str, torch.Tensor]:
    """Train by hand: one big batch a step, the last one shorter, plain SGD on the mean loss."""
    chosen = sections(**NO_NORM)
    store = open_store(inputs[0])
    split, info = store.split("train"), store.info
    architecture = {
        "name": "convnet",
        "arguments": chosen["model"].convnet.model_dump(),
        "num_classes": 3,
        "in_channels": 1,
        "height": SIDE,
        "width": SIDE,
        "norm": "none",
    }
    geometry = {"kind": info.normalize, "height": SIDE, "width": SIDE, "channels": 1}
    classifier = build_classifier(architecture, geometry, store.statistics())
    initialize(classifier.network, "kaiming_normal", {"mode": "fan_out"}, zero_last=True, activation="ReLU", seed=0)
    images, labels = torch.from_numpy(split.take(range(len(split)))), torch.from_numpy(split.labels)
    for epoch in range(epochs):
        order = epoch_order(len(split), 0, epoch)
        for start in range(0, len(order), size):
            index = order[start : start + size]
            loss = F.cross_entropy(classifier(images[index]), labels[index])
            classifier.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in classifier.parameters():
                    parameter -= lr * parameter.grad
    return classifier.state_dict()


PLAIN = {
    **NO_NORM,
    "optimizer": {"SGD": {"lr": 0.05, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}},
    "schedule": {"name": "constant", "warmup": {"length": 0.0}},
    "regularization": {"label_smoothing": 0.0},
}


class LastWeights(pl.Callback):
    """The weights at the end of training, not of the best epoch."""

    def on_train_end(self, trainer, pl_module):
        self.state = copy.deepcopy(pl_module.classifier.state_dict())


@pytest.mark.parametrize("microbatch", [64, 16, 32])
def test_steps_are_those_of_one_big_batch(inputs, tmp_path, microbatch):
    # 150 = 64 + 64 + 22: in microbatches of 16 the last window is 11 + 11.
    last = LastWeights()
    train(inputs, tmp_path / "a", callbacks=(last,), **PLAIN, batch={"size": 64, "microbatch": microbatch})
    assert largest_difference(last.state, reference_run(inputs, 2, 64, 0.05)) < 1e-6


def test_l1_and_weights_keep_their_share_under_accumulation(inputs, tmp_path):
    options = PLAIN | {"regularization": {"label_smoothing": 0.1, "l1": 1e-2}, "loss": {"class_weights": "balanced"}}
    states = []
    for microbatch in (64, 16):
        last = LastWeights()
        out = tmp_path / str(microbatch)
        train(inputs, out, callbacks=(last,), **options, batch={"size": 64, "microbatch": microbatch})
        states.append(last.state)
    assert largest_difference(*states) < 1e-6
    last = LastWeights()
    train(inputs, tmp_path / "none", callbacks=(last,), **PLAIN, batch={"size": 64, "microbatch": 64})
    assert largest_difference(last.state, states[0]) > 1e-4


def test_gradient_norm_and_clipping(inputs, tmp_path):
    free = train(inputs, tmp_path / "a", **PLAIN, trainer={"epochs": 1})
    first = LastWeights()
    options = PLAIN | {"regularization": {"label_smoothing": 0.0, "gradient_clip": 1e-6}}
    clipped = train(inputs, tmp_path / "b", callbacks=(first,), **options, trainer={"epochs": 1})
    assert free.rows[0].grad_norm > 0.1
    # The norm is that before clipping; with steps this small the weights stay where they began.
    assert clipped.rows[0].grad_norm > 0.1
    begun = reference_run(inputs, 0, 64, 0.05)
    assert 0 < largest_difference(first.state, begun) < 3 * 0.05 * 1e-6 + 1e-8


def test_window_norms_update_once_from_the_mean():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3, momentum=0.1)
    norm.running_mean.uniform_()
    norm.running_var.uniform_()
    old_mean, old_var = norm.running_mean.clone(), norm.running_var.clone()
    parts = [torch.randn(n, 3, 4, 4) * 2 + 1 for n in (8, 8, 5)]
    window = WindowNorms(norm)
    for i, part in enumerate(parts):
        window.before(len(part), first=i == 0)
        norm(part)
    window.close()
    share = torch.tensor([8.0, 8.0, 5.0]) / 21
    mean = sum(s * p.mean((0, 2, 3)) for s, p in zip(share, parts, strict=True))
    var = sum(s * p.var((0, 2, 3)) for s, p in zip(share, parts, strict=True))
    torch.testing.assert_close(norm.running_mean, 0.9 * old_mean + 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 * old_var + 0.1 * var)
    assert norm.momentum == 0.1 and norm.num_batches_tracked == 1


PROCESSES = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_training import train
inputs = Path({store!r}), Path({augmented!r})
options = dict(batch=dict(size=64, microbatch=16), trainer=dict(epochs=2, threads=1, deterministic=True))
train(inputs, Path(sys.argv[1]), regularization=dict(dropout=0.2, mixup=dict(alpha=0.4)),
      averaging=dict(name="ema", export="average"), hardware=dict(devices=int(sys.argv[2])), **options)
"""


@pytest.mark.long
def test_two_processes_train_the_same_network(flipped, tmp_path):
    script = tmp_path / "script.py"
    tests = str(Path(__file__).parent)
    script.write_text(PROCESSES.format(tests=tests, store=str(flipped[0]), augmented=str(flipped[1])))
    for devices in (1, 2):
        command = [sys.executable, str(script), str(tmp_path / str(devices)), str(devices)]
        subprocess.run(command, check=True, timeout=300, cwd=tmp_path, stderr=subprocess.DEVNULL)
    assert largest_difference(weights(tmp_path / "1"), weights(tmp_path / "2")) < 1e-5
    one, two = (list(csv.DictReader((tmp_path / n / "history.csv").read_text().splitlines())) for n in ("1", "2"))
    for a, b in zip(one, two, strict=True):
        measured = [name for name in a if a[name] or b[name]]
        assert [float(a[name]) for name in measured] == pytest.approx([float(b[name]) for name in measured], rel=1e-4)


# ---- data -----------------------------------------------------------------------------------------------------------


def test_extra_samples_stand_behind_the_real_ones(tmp_path):
    store, augmented = write_inputs(tmp_path, num_train=40)
    images, labels = images_of(7, 5)
    write_split(augmented / "extra", images, labels)
    _, data, _ = training_set(store, augmented, 0)
    assert len(data) == 47
    index = np.array([46, 3, 40, 0])
    expected = np.concatenate([open_store(store).split("train").take(range(40)), images])[index]
    batch = data.__getitems__([(0, 0), *index.tolist()])
    assert (batch.images.numpy() == expected).all()
    assert batch.labels[0] == labels[6] and batch.labels[2] == labels[0]
    assert train((store, augmented), tmp_path / "a", batch={"size": 47, "microbatch": 47}).rows[0].step == 1


def test_augmentation_is_drawn_by_microbatch(flipped):
    _, data, _ = training_set(*flipped, seed=0)
    keyed = [(1, 2), *range(32)]
    first = data.__getitems__(keyed).images
    data.__getitems__([(0, 0), 5, 6])
    assert torch.equal(data.__getitems__(keyed).images, first)
    assert not torch.equal(data.__getitems__([(2, 2), *range(32)]).images, first)
    assert not torch.equal(data.__getitems__([(1, 3), *range(32)]).images, first)


def test_workers_only_where_loading_is_dear(inputs):
    _, data, _ = training_set(*inputs, seed=0)
    assert isinstance(data, MicrobatchDataset)
    cores = len(os.sched_getaffinity(0))
    assert workers_that_pay(data, 64, 1, clock=iter([0.0, 32 * 10e-6]).__next__) == 0
    assert workers_that_pay(data, 64, 1, clock=iter([0.0, 32 * 900e-6]).__next__) == cores


def test_balanced_weights_have_mean_one_over_the_samples():
    labels = np.array([0] * 7 + [1] * 2 + [3])
    found = balanced_weights(labels, 4)
    assert found[2] == 0
    assert found[labels].mean().item() == pytest.approx(1)
    assert (found[0] * 7).item() == pytest.approx((found[3] * 1).item())


# ---- stopping -------------------------------------------------------------------------------------------------------


def test_early_stopping(inputs, tmp_path):
    stop = {"epochs": 9, "early_stopping": {"patience": 2, "min_delta": 100.0}}
    result = train(inputs, tmp_path / "a", trainer=stop)
    assert len(result.rows) == 3


def test_a_diverging_run_stops_at_once_with_advice(inputs, tmp_path):
    optimizer = {"SGD": {"lr": 1e30, "momentum": 0.0, "nesterov": False}}
    schedule = {"name": "constant", "warmup": {"length": 0.0}}
    with pytest.raises(
        UserError, match=r"diverged.* epoch 1, step \d, at learning rate 1e\+30; lower optimizer\.SGD\.lr"
    ):
        train(inputs, tmp_path / "a", optimizer=optimizer, schedule=schedule, trainer={"epochs": 5}, **NO_NORM)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_comes_out_as_keyboard_interrupt(inputs, tmp_path, number):
    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(inputs, tmp_path / "a", callbacks=(Kill(),))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert list(tmp_path.iterdir()) == []


def test_a_batch_larger_than_the_training_split_is_refused(inputs, tmp_path):
    with pytest.raises(ParamsError, match=r"batch\.size: found 256, but the training split has 150 images"):
        train(inputs, tmp_path / "a", batch={"size": 256, "microbatch": 128})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model": {"name": "convnet"}, "regularization": {"stochastic_depth": 0.1}},
            "regularization.stochastic_depth",
        ),
        ({"model": {"name": "mlp"}, "batch": {"size": 64, "microbatch": 1}}, "microbatch"),
        ({"model": {"convnet": {"widths": [4] * 6, "depth": 1}, "name": "convnet"}}, "model.convnet.widths"),
    ],
)
def test_conflicts_stop_before_any_work(inputs, tmp_path, overrides, message):
    with pytest.raises(ParamsError, match=message):
        train(inputs, tmp_path / "a", **overrides)
    assert list(tmp_path.iterdir()) == []


# ---- the terminal ---------------------------------------------------------------------------------------------------


def test_plain_lines_and_no_other_noise(inputs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(inputs, tmp_path / "a")
    out, err = capfd.readouterr()
    assert out == "" and [str(w.message) for w in caught] == []
    lines = err.splitlines()
    assert len(lines) == 2
    pattern = (
        r"a: epoch 1/2  train loss \d+\.\d{3} accuracy \d\.\d{3}  val loss \d+\.\d{3} accuracy \d\.\d{3}  "
        r"[\d,]+ images/s  \d+:\d\d left"
    )
    assert re.fullmatch(pattern, lines[0]), lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


class Terminal:
    def __init__(self, is_terminal):
        self.text, self.is_terminal = "", is_terminal

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_within_an_epoch(inputs, tmp_path, is_terminal):
    from anneal.batching import plan_run

    seconds = iter(range(0, 10000, 10))
    stream = Terminal(is_terminal)
    batches = plan_run(size=64, microbatch=64, devices=1, num_nodes=1, num_samples=150, epochs=2)
    shown = Progress("m", batches, stream, clock=lambda: float(next(seconds)))
    train(inputs, tmp_path / "a", callbacks=(shown,))
    wanted = r"m: epoch 2/2.*step 1/3  loss \d\.\d{3}  accuracy \d\.\d{3}  \d+ images/s  \d:\d\d left"
    assert re.search(wanted, stream.text), stream.text
    assert "val loss" in stream.text


# ---- the machine and conflicts --------------------------------------------------------------------------------------


def test_precision_that_a_cpu_lacks_is_refused():
    with pytest.raises(UserError, match=r"trainer\.precision: found 16-mixed on a CPU; allowed: 32-true"):
        check_precision("16-mixed", "cpu")
    if cpu_has_bfloat16():
        check_precision("bf16-mixed", "cpu")
    else:
        with pytest.raises(UserError, match="bf16-mixed on a CPU without bfloat16"):
            check_precision("bf16-mixed", "cpu")


def test_a_missing_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    chosen = sections(hardware={"accelerator": "gpu"})
    with pytest.raises(UserError, match=r"hardware\.accelerator: found gpu, but this machine has none"):
        resolve_devices(chosen["hardware"], chosen["batch"])
    chosen = sections(hardware={"accelerator": "auto", "devices": "auto"})
    assert resolve_devices(chosen["hardware"], chosen["batch"])[1] == 1


def test_conflicts_are_all_reported_without_torch():
    chosen = sections(
        model={"name": "convnet"},
        regularization={"stochastic_depth": 0.1},
        schedule={"warmup": {"length": "900 epochs"}},
    )
    hardware = chosen.pop("hardware")
    names = params.MEMBER_SECTIONS[1:]
    chosen = {name: chosen[name] for name in names}
    values = params.merge(
        params.read_yaml(Path(__file__).parents[1] / "params.yaml"), {"preprocess": {"normalize": "pca"}}
    )
    preprocess = params.parse(values, {"preprocess": PreprocessConfig})["preprocess"]
    with pytest.raises(ParamsError) as caught:
        check_recipe(**chosen, preprocess=preprocess, num_train=40, hardware=hardware)
    text = str(caught.value)
    for part in ("stochastic_depth", "zca", "found 64, but the training split has 40 images"):
        assert part in text
    with pytest.raises(ParamsError, match="900 epochs"):
        check_recipe(**chosen, preprocess=preprocess, num_train=4000)
    code = "import anneal.conflicts, sys; print([m for m in ('torch', 'cv2', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- schedules ------------------------------------------------------------------------------------------------------

SHORT = {
    # Lengths for runs of 6 to 12 steps; the plateau falls whenever it may.
    "warmup": {"length": "1 step", "start": 0.1},
    "step": {"every": "2 steps"},
    "multistep": {"milestones": [0.4, 0.8]},
    "cosine_restarts": {"cycle": "4 steps"},
    "cyclic": {"cycle": "4 steps"},
    "trapezoid": {"decay": 0.5},
    "plateau": {"patience": 1, "cooldown": 0, "gamma": 0.5, "min_delta": 100.0},
}
SCHEDULES = get_args(ScheduleConfig.model_fields["name"].annotation)


def set_up_run(inputs, **overrides):
    chosen = sections(**overrides)
    return set_up(store=inputs[0], augmented=inputs[1], seed=0, **chosen)


class Rates(pl.Callback):
    """The rate and momentum of every optimizer step; and a checkpoint after the second epoch."""

    def __init__(self, checkpoint: Path | None = None):
        self.rates, self.groups, self.checkpoint = [], [], checkpoint

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rates.append(pl_module.rate)
        self.groups.append([(group["lr"], group.get("momentum")) for group in trainer.optimizers[0].param_groups])

    def on_validation_end(self, trainer, pl_module):
        if self.checkpoint is not None and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.checkpoint)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_resumed_curve_is_the_uninterrupted_one(inputs, tmp_path, name):
    options = {**NO_NORM, "schedule": {**SHORT, "name": name}, "trainer": {"epochs": 4}}
    whole, rest = Rates(tmp_path / "half.ckpt"), Rates()
    with quiet():
        setup = set_up_run(inputs, **options)
        setup.trainer([whole]).fit(setup.module, datamodule=setup.data_module())
        again = set_up_run(inputs, **options)
        again.trainer([rest]).fit(
            again.module, datamodule=again.data_module(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )
    assert len(whole.rates) == 12 and len(rest.rates) == 6
    assert rest.rates == whole.rates[6:]
    assert rest.groups == whole.groups[6:]
    assert again.module.val_losses == setup.module.val_losses
    losses = setup.module.val_losses
    arguments = setup.module.schedule_arguments
    peak = setup.module.peak_rate
    assert whole.rates == [peak * factor(step, losses[: step // 3], **arguments) for step in range(12)]
    if name == "plateau":
        assert whole.rates[-1] == 0.5 * peak  # without the losses of the first half it would not have fallen
    if name != "constant":
        assert len(set(whole.rates[1:])) > 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_trains(inputs, tmp_path, name):
    schedule = {**SHORT, "name": name}
    logged = []
    result = train(
        inputs,
        tmp_path / "a",
        log=lambda metrics, step: logged.append((step, metrics)),
        schedule=schedule,
        batch={"noise_microbatches": 0},
        **NO_NORM,
    )
    arguments = factor_arguments(sections(schedule=schedule)["schedule"].model_dump(), total_steps=6, steps_per_epoch=3)
    losses = [row.val_loss for row in result.rows]
    expected = [0.05 * factor(step, losses[: step // 3], **arguments) for step in (2, 5)]
    assert [row.lr for row in result.rows] == pytest.approx(expected, rel=1e-12)
    momenta = [metrics["momentum"] for _, metrics in logged if "momentum" in metrics]
    cycle = [momentum_at(step, **arguments) for step in (2, 5)]
    assert momenta == ([] if cycle[0] is None else pytest.approx(cycle))


@pytest.mark.parametrize(
    ("optimizer", "key"),
    [
        ({"name": "SGD"}, "momentum"),
        ({"name": "AdamW"}, "betas"),
        ({"name": "RMSprop", "RMSprop": {"momentum": 0.5}}, "momentum"),
        ({"name": "RMSprop"}, None),
        ({"name": "Adagrad"}, None),
    ],
)
def test_momentum_runs_against_the_rate_where_there_is_one(inputs, optimizer, key):
    setup = set_up_run(inputs, schedule={**SHORT, "name": "one_cycle"}, optimizer=optimizer, **NO_NORM)

    class Groups(pl.Callback):
        seen = []

        def on_train_batch_end(self, trainer, *_):
            self.seen.append([dict(group) for group in trainer.optimizers[0].param_groups])

    before = [dict(g) for g in setup.module.configure_optimizers().param_groups]
    watch = Groups()
    watch.seen = []
    with quiet():
        setup.trainer([watch]).fit(setup.module, datamodule=setup.data_module())
    expected = [momentum_at(step, **setup.module.schedule_arguments) for step in range(6)]
    assert expected[0] == 0.95 and min(expected) < 0.88
    for step, groups in enumerate(watch.seen):
        for group, first in zip(groups, before, strict=True):
            if key == "momentum":
                assert group["momentum"] == expected[step]
            elif key == "betas":
                assert group["betas"] == (expected[step], first["betas"][1])
            else:
                assert group.get("momentum") == first.get("momentum") and group.get("betas") == first.get("betas")
            assert group.get("nesterov") == first.get("nesterov")
    assert ("momentum" in setup.module.figures) == (key is not None)


def test_the_schedule_is_drawn_before_training(inputs, tmp_path):
    events = []

    class First(pl.Callback):
        def on_train_batch_start(self, *_):
            events.append("step")

    train(
        inputs,
        tmp_path / "a",
        callbacks=(ScheduleCurve(lambda name, panels: events.append((name, panels))), First()),
        schedule={**SHORT, "name": "one_cycle"},
        **NO_NORM,
    )
    name, panels = events[0]
    assert name == "schedule.png" and events[1:] == ["step"] * 6
    rate, momentum = json.loads(json.dumps(panels))
    assert rate["lines"][0]["x"] == momentum["lines"][0]["x"] == list(range(6))
    assert max(rate["lines"][0]["y"]) > 0.04 and momentum["lines"][0]["y"][0] == 0.95
    events.clear()
    draw = ScheduleCurve(lambda name, panels: events.append(len(panels)))
    options = {"schedule": {**SHORT, "name": "one_cycle"}, "optimizer": {"name": "Adagrad"}}
    train(inputs, tmp_path / "b", callbacks=(draw,), **options, **NO_NORM)
    assert events == [1]  # no momentum, none drawn


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"batch": {"lr_scaling": "linear", "reference_size": 32}, "schedule": {"warmup": {"length": 0.0}}},
            r"batch\.lr_scaling: found linear.*batch.size 64 2 times.*allowed: with schedule\.warmup\.length 0\.05",
        ),
        (
            {"trainer": {"early_stopping": {"patience": 2, "min_delta": 0.0}}, "schedule": {"name": "plateau"}},
            r"trainer\.early_stopping\.patience: found 2",
        ),
        ({"schedule": {"name": "trapezoid", "trapezoid": {"decay": 0.01}}}, r"schedule\.trapezoid\.decay: found 0\.01"),
    ],
)
def test_schedules_that_cannot_work_stop_before_any_work(inputs, tmp_path, overrides, message):
    with pytest.raises(ParamsError, match=message):
        train(inputs, tmp_path / "a", **overrides)
    assert list(tmp_path.iterdir()) == []
    chosen = sections(**overrides)
    chosen = {name: chosen[name] for name in inspect.signature(check_recipe).parameters if name in chosen}
    preprocess = params.parse(
        params.read_yaml(Path(__file__).parents[1] / "params.yaml"), {"preprocess": PreprocessConfig}
    )
    with pytest.raises(ParamsError, match=message):
        check_recipe(**chosen, **preprocess, num_train=150)
