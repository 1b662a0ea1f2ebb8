"""What becomes of a run whose loss or gradient is no longer finite: the message, and steps that are skipped to the bit."""

import csv
import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from anneal.batching import epoch_order
from anneal.params import ParamsError
from anneal.training.averaging import Averaging
from anneal.training.machine import global_settings, quiet
from anneal.training.module import Diverged
from anneal.training.setup import set_up
from tests.test_training import NO_NORM, contents, sections, train, write_inputs

NUM_TRAIN, SIZE = 104, 32
STEPS = 4
"""Of an epoch: 32 + 32 + 32 + 8."""

GATED = {"name": "tests.custom_models.networks:gated"}
SMALL = {"batch": {"size": SIZE, "microbatch": 16}}
SKIP = {"on_nan": "skip"}


def brighten(store, split, index):
    """Make an image white, brighter than `Gate` takes."""
    images = np.lib.format.open_memmap(store / split / "images-00000.npy", "r+")
    images[index] = 255
    images.flush()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("clean"), num_train=NUM_TRAIN)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """One training image is white: in the first of two microbatches of the first epoch's second step."""
    store, augmented = write_inputs(tmp_path_factory.mktemp("spoiled"), num_train=NUM_TRAIN)
    brighten(store, "train", epoch_order(NUM_TRAIN, 0, 0)[SIZE + 3])
    return store, augmented


def skipped_steps(epochs):
    """Steps of the run, from 1, that have the white image in them."""
    white = epoch_order(NUM_TRAIN, 0, 0)[SIZE + 3]
    return [epoch * STEPS + list(epoch_order(NUM_TRAIN, 0, epoch)).index(white) // SIZE + 1 for epoch in range(epochs)]


def everything(trainer, module):
    """All that a step changes, as bytes: weights, statistics, the optimizer's state, averages."""
    optimizer = trainer.optimizers[0].state_dict()["state"]
    averages = [callback for callback in trainer.callbacks if isinstance(callback, Averaging)]
    tensors = {
        **module.classifier.state_dict(),
        **{f"state {i} {key}": value for i, state in optimizer.items() for key, value in state.items()},
        **{f"average {i}": value for average in averages for i, value in enumerate(average.mean)},
    }
    return {name: torch.as_tensor(value).numpy().tobytes() for name, value in tensors.items()} | {
        "taken": [average.number for average in averages]
    }


class Witness(pl.Callback):
    """The state before each step, the rate of each, and the state a run stopped in."""

    def __init__(self):
        self.before, self.rates, self.left = {}, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % pl_module.plan[0].accumulation == 0:
            self.before[trainer.global_step + 1] = everything(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rates[trainer.global_step] = pl_module.rate

    def on_exception(self, trainer, pl_module, exception):
        self.left = everything(trainer, pl_module)


def diverges(inputs, tmp_path, **options):
    """Train, and return the message and what was seen; nothing may have been written."""
    witness = Witness()
    with pytest.raises(Diverged) as caught:
        train(inputs, tmp_path / "a", callbacks=(witness,), **options)
    assert not (tmp_path / "a").exists() and list(tmp_path.iterdir()) == []
    return str(caught.value), witness


# ---- stop -----------------------------------------------------------------------------------------------------------


def test_the_run_stops_within_the_step_and_names_the_layer(spoiled, tmp_path):
    """Though the microbatch that spoiled it was not the last one."""
    message, witness = diverges(spoiled, tmp_path, model=GATED, **SMALL)
    assert skipped_steps(1) == [2]
    rate = f"{witness.rates[1]:.3g}"  # of a constant warm-up
    assert re.fullmatch(
        r"training diverged: the loss is nan \(not finite first: the output of layer module\.0\.1\) in epoch 1, step 2, "
        r"at learning rate 0\.05; lower optimizer\.SGD\.lr, lengthen schedule\.warmup\.length, or set "
        r"regularization\.gradient_clip: 1\.0",
        message,
    ), (message, rate)
    weights = [name for name in witness.left if not name.split(".")[-1].startswith(("running", "num_batches"))]
    assert max(witness.before) == 2
    assert all(witness.left[name] == witness.before[2][name] for name in weights)
    assert witness.before[2] != witness.before[1]


def test_a_huge_rate_is_named_with_the_layer_it_overflows_in(inputs, tmp_path):
    optimizer = {"SGD": {"lr": 1e30, "momentum": 0.0, "nesterov": False}}
    schedule = {"name": "constant", "warmup": {"length": 0.0}}
    message, _ = diverges(inputs, tmp_path, optimizer=optimizer, schedule=schedule, **NO_NORM, **SMALL)
    assert re.search(
        r"is (nan|inf) \(not finite first: the output of layer \S+\) in epoch 1, step \d, at learn", message
    )


def test_a_gradient_that_is_not_finite_is_named(inputs, tmp_path):
    cusp = {"name": "tests.custom_models.networks:Cusp"}
    message, witness = diverges(inputs, tmp_path, model=cusp, **SMALL)
    assert (
        "the norm of the gradient is nan (not finite first: the gradient of module.conv.bias) in epoch 1, step 1"
        in (message.replace("module.conv.weight", "module.conv.bias"))
    )
    assert witness.left == witness.before[1]


def test_a_validation_loss_that_is_not_finite_stops_whatever_the_setting(tmp_path, tmp_path_factory):
    inputs = write_inputs(tmp_path_factory.mktemp("spoiled"), num_train=NUM_TRAIN)
    brighten(inputs[0], "val", 3)
    message, _ = diverges(inputs, tmp_path, model=GATED | {"custom": {"always": True}}, trainer=SKIP, **SMALL)
    assert f"diverged: the validation loss is nan in epoch 1, step {STEPS}, at" in message


# ---- skip -----------------------------------------------------------------------------------------------------------

AVERAGED = {"averaging": {"name": "ema", "ema": {"decay": 0.8}}}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "sam"])
def test_a_skipped_step_leaves_everything_as_it_was(spoiled, inputs, tmp_path, capfd, optimizer):
    logged, witness, expected = [], Witness(), Witness()
    options = {
        "model": GATED,
        "optimizer": {"sam": {"rho": 0.05}} if optimizer == "sam" else {"name": optimizer},
        "batch": {"size": SIZE, "microbatch": SIZE if optimizer == "sam" else 16},
        **AVERAGED,
    }
    result = train(
        spoiled,
        tmp_path / "a",
        callbacks=(witness,),
        log=lambda metrics, step: logged.append((metrics, step)),
        trainer={"epochs": 3} | SKIP,
        **options,
    )
    skipped = skipped_steps(3)
    assert [step for step in witness.before if step + 1 in witness.before] == list(range(1, 3 * STEPS))
    for step in range(1, 3 * STEPS):
        unchanged = witness.before[step] == witness.before[step + 1]
        assert unchanged == (step in skipped), step
    # One line, and the layer in it.
    lines = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == 1
    assert lines[0].startswith("a: warning: epoch 1, step 2 is skipped at learning rate ")
    assert "the loss is nan (not finite first: the output of layer module.0.1); nan/skipped counts" in lines[0]
    epochs = [metrics for metrics, _ in logged if "epoch" in metrics]
    assert [metrics["nan/skipped"] for metrics in epochs] == [1, 1, 1]
    for table in ("history.csv", "steps.csv", "layers.csv"):
        text = (tmp_path / "a" / table).read_text()
        assert "nan" not in text and "inf" not in text
    steps = list(csv.DictReader((tmp_path / "a" / "steps.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in steps] == [s for s in range(1, 3 * STEPS + 1) if s not in skipped]
    for epoch, row in enumerate(result.rows):
        mine = [s for s in steps if epoch * STEPS < int(s["step"]) <= (epoch + 1) * STEPS]
        sizes = [8 if int(s["step"]) % STEPS == 0 else SIZE for s in mine]
        assert row.train_loss == pytest.approx(np.average([float(s["loss"]) for s in mine], weights=sizes), rel=1e-5)
        assert row.grad_norm == pytest.approx(np.mean([float(s["grad_norm"]) for s in mine]), rel=1e-5)
    # The step counts: rates and epochs are those of a run that skips none.
    train(inputs, tmp_path / "b", callbacks=(expected,), trainer={"epochs": 3}, **options)
    assert witness.rates == expected.rates


def mixed(inputs, on_nan, init_scale):
    """Train with float16 and a loss scaler, which the recipe allows on GPUs alone; return what was seen and the plugin."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    witness, plugin = Witness(), MixedPrecision("16-mixed", "cpu", scaler)
    recipe = sections(model=GATED, trainer={"epochs": 3, "on_nan": on_nan}, **SMALL)
    setup = set_up(store=inputs[0], augmented=inputs[1], seed=0, **recipe)
    with quiet(), global_settings():
        setup.trainer([witness], precision=None, plugins=[plugin]).fit(setup.module, datamodule=setup.data_module())
    unchanged = [step for step in range(1, 3 * STEPS) if witness.before[step] == witness.before[step + 1]]
    return setup.module, unchanged, scaler.get_scale()


def test_a_skipped_step_goes_with_a_loss_scaler(spoiled):
    module, unchanged, _ = mixed(spoiled, "skip", 1024.0)
    assert unchanged == skipped_steps(3)
    assert module.figures["nan/skipped"] == 1


def test_an_infinite_gradient_is_the_scalers_business(inputs):
    """It skips the first steps by itself until its scale is low enough; running statistics go on, as usual."""
    module, _, scale = mixed(inputs, "stop", 2.0**30)
    assert module.skipped_in_a_row == 0
    assert scale < 2.0**30
    assert module.figures["train/loss"] < 2


def test_the_setting_alone_changes_nothing(inputs, tmp_path):
    logged = []
    train(inputs, tmp_path / "a", **SMALL)
    train(inputs, tmp_path / "b", trainer=SKIP, log=lambda metrics, _: logged.append(metrics), **SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert [metrics["nan/skipped"] for metrics in logged if "epoch" in metrics] == [0, 0]


@pytest.mark.parametrize("cause", ["every image", "the second gradient of SAM"])
def test_ten_skipped_steps_in_a_row_end_the_run(inputs, tmp_path, cause):
    """By SAM's second gradient, whose weights are far off, nothing must have changed either."""
    options = {"model": GATED | {"custom": {"most": -100.0}}} if cause == "every image" else {}
    if not options:
        options = {"optimizer": {"sam": {"rho": 1e30}}}
    message, witness = diverges(inputs, tmp_path, trainer=SKIP, batch={"size": 8, "microbatch": 8}, **options)
    assert "diverged: 10 steps in a row were skipped, of the last the loss is nan (not finite first: the out" in message
    assert "in epoch 1, step 10, at learning rate" in message
    assert witness.left == witness.before[1]


def test_an_epoch_without_a_step_ends_the_run(inputs, tmp_path):
    message, _ = diverges(inputs, tmp_path, trainer=SKIP, model=GATED | {"custom": {"most": -100.0}}, **SMALL)
    assert f"diverged: all steps of the epoch were skipped in epoch 1, step {STEPS}, at" in message


def test_lbfgs_is_refused(inputs, tmp_path):
    with pytest.raises(ParamsError, match=r"trainer\.on_nan: found skip with LBFGS, whose line search"):
        train(inputs, tmp_path / "a", optimizer={"name": "LBFGS"}, batch={"size": 64, "microbatch": 64}, trainer=SKIP)
