import csv
import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from anneal.models.build import load_classifier
from anneal.models.recalibration import recalibrate, tracking_norms
from anneal.params import ParamsError
from anneal.reporting.curves import curves_csv, draw_curves, mean_curves
from anneal.schedules import averaged_steps, course_panels, factor, factor_arguments, swa_epochs
from anneal.store import open_store
from anneal.training.averaging import AVERAGES, Averaging, ema_decay
from anneal.training.best import BestWeights, Kept
from anneal.training.machine import quiet
from anneal.training.recalibrate import recalibration_batches
from tests.test_training import largest_difference, sections, set_up_run, train, weights, write_inputs

# 150 images: 3 steps an epoch.
KINDS = {
    "ema": {"name": "ema", "ema": {"decay": 0.6, "warmup": True}},
    "swa": {"name": "swa", "swa": {"start": 0.5}},
    "polyak": {"name": "polyak", "polyak": {"start": 0.45}},
}
EPOCHS = 4
QUICK = {"batch": {"size": 64, "microbatch": 64, "noise_microbatches": 0}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


class Weights(pl.Callback):
    """The parameters after every optimizer step, as float64 arrays; and a checkpoint after the second epoch."""

    def __init__(self, checkpoint: Path | None = None):
        self.steps, self.checkpoint = [], checkpoint

    def keeping(self, trainer):
        return [(own.kept.epoch, own.kept.rank) for own in trainer.callbacks if hasattr(own, "kept")]

    def on_train_start(self, trainer, pl_module):
        self.begun_with, self.last = self.keeping(trainer), trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step != self.last:
            self.last = trainer.global_step
            self.steps.append([p.detach().double().numpy().copy() for p in pl_module.classifier.parameters()])

    def on_validation_end(self, trainer, pl_module):
        self.val = pl_module.figures
        if self.checkpoint is not None and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.checkpoint)
            self.saved = self.keeping(trainer)


def reference(name: str, steps: list) -> list[np.ndarray]:
    """The average by its definition, in float64."""
    if name == "polyak":
        taken = steps[5:]  # 0.45 x 12 = 5.4 steps
    elif name == "swa":
        taken = [steps[8], steps[11]]
    else:
        mean = steps[0]
        for number, newest in enumerate(steps[1:], 2):
            decay = min(0.6, (1 + number) / (10 + number))
            mean = [decay * a + (1 - decay) * b for a, b in zip(mean, newest, strict=True)]
        return mean
    return [np.mean(tensors, 0) for tensors in zip(*taken, strict=True)]


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Each kind trained once, exporting the last average; the folder, the result, all weights and what was logged."""
    found = {}
    for name, averaging in KINDS.items():
        out, seen, logged = tmp_path_factory.mktemp("runs") / name, Weights(), []
        result = train(
            inputs,
            out,
            callbacks=(seen,),
            log=lambda metrics, step, logged=logged: logged.append(metrics),
            averaging={**averaging, "export": "average"},
            trainer={"epochs": EPOCHS, "restore_best": False},
            **QUICK,
        )
        found[name] = out, result, seen, logged
    return found


@pytest.mark.parametrize("name", AVERAGES)
def test_the_average_is_that_of_the_definition(inputs, runs, name):
    folder, result, seen, _ = runs[name]
    assert len(seen.steps) == 3 * EPOCHS
    average = load_file(folder / "averages" / f"{name}.safetensors")
    parameters = [key for key, _ in load_classifier(folder)[0].named_parameters()]
    for key, expected in zip(parameters, reference(name, seen.steps), strict=True):
        np.testing.assert_allclose(average[key].double().numpy(), expected, rtol=0, atol=1e-6)
    # It is what is exported, and the newest weights are others.
    model = json.loads((folder / "model.json").read_text())
    assert (model["weights"], model["best_epoch"]) == (name, EPOCHS) == (result.weights, result.best_epoch)
    assert largest_difference(weights(folder), average) == 0
    newest = {key: torch.from_numpy(value) for key, value in zip(parameters, seen.steps[-1], strict=True)}
    assert largest_difference({key: average[key] for key in parameters}, newest) > 1e-4


@pytest.mark.parametrize("name", AVERAGES)
def test_statistics_belong_to_the_average_and_figures_to_what_is_written(inputs, runs, name):
    folder, result, _, logged = runs[name]
    classifier, _ = load_classifier(folder)
    before = {key: layer.running_var.clone() for key, layer in tracking_norms(classifier).items()}
    store = open_store(inputs[0])
    recalibrate(classifier, recalibration_batches(store, 0, 8192, 64))
    for key, layer in tracking_norms(classifier).items():
        torch.testing.assert_close(layer.running_var, before[key], rtol=1e-5, atol=1e-7)
    split = store.split("val")
    with torch.no_grad():
        logits = classifier(torch.from_numpy(split.take(range(len(split)))))
    row = result.rows[-1]
    assert float((logits.argmax(1).numpy() == split.labels).mean()) == row.val_average_accuracy
    loss = F.cross_entropy(logits, torch.from_numpy(split.labels)).item()
    assert loss == pytest.approx(row.val_average_loss, rel=1e-5)
    # The epochs before it began have none.
    first = {"ema": 1, "polyak": 2, "swa": 3}[name]
    begun = [row.val_average_loss is not None for row in result.rows]
    assert begun == [epoch >= first for epoch in range(1, EPOCHS + 1)]
    epochs = [metrics for metrics in logged if "epoch" in metrics]
    assert [metrics.get("val_average/loss") for metrics in epochs] == [row.val_average_loss for row in result.rows]
    table = list(csv.DictReader((folder / "history.csv").read_text().splitlines()))
    assert [bool(row["val_average_accuracy"]) for row in table] == begun


def test_averaging_leaves_training_as_it_was(inputs, runs, tmp_path):
    plain = train(inputs, tmp_path / "a", trainer={"epochs": EPOCHS, "restore_best": False}, **QUICK)
    without = weights(tmp_path / "a")
    assert plain.weights == "raw" and not (tmp_path / "a" / "averages").exists()
    for name in ("ema", "polyak"):
        averaged = [(row.train_loss, row.val_loss, row.grad_norm) for row in runs[name][1].rows]
        assert averaged == [(row.train_loss, row.val_loss, row.grad_norm) for row in plain.rows]
    train(
        inputs,
        tmp_path / "b",
        averaging={**KINDS["ema"], "export": "raw"},
        trainer={"epochs": EPOCHS, "restore_best": False},
        **QUICK,
    )
    assert largest_difference(weights(tmp_path / "b"), without) == 0
    assert (tmp_path / "b" / "averages" / "ema.safetensors").exists()


def test_reruns_give_the_same_bytes(inputs, runs, tmp_path):
    averaging = {**KINDS["swa"], "export": "average"}
    trainer = {"epochs": EPOCHS, "restore_best": False}
    train(inputs, tmp_path / "a", averaging=averaging, trainer=trainer, **QUICK)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert Path("averages/swa.safetensors") in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (runs["swa"][0] / file).read_bytes(), file


@pytest.mark.parametrize("recalibrated", [True, False])
@pytest.mark.parametrize("name", AVERAGES)
def test_a_resumed_run_goes_on_exactly(inputs, tmp_path, name, recalibrated):
    """From a checkpoint at the end of epoch 2 of 4: in the middle of Polyak's and the EMA's mean, before SWA's second."""
    averaging = KINDS[name] | {"swa": {"start": 0.25}}
    options = {
        "averaging": averaging,
        "trainer": {"epochs": EPOCHS},
        "optimizer": {"SGD": {"lr": 0.3}},
        "batch": {"size": 64, "microbatch": 32},
    }

    def run(checkpoint=None, resumed=None):
        setup = set_up_run(inputs, **options)
        arguments = sections(**options)["averaging"].arguments
        average = Averaging(
            name,
            arguments,
            epoch_steps=setup.plan.epoch_steps,
            calibration=(lambda: recalibration_batches(setup.store, 0, 64, 64)) if recalibrated else None,
        )
        best, seen = BestWeights(), Weights(checkpoint)
        trainer = setup.trainer([average, best, seen])
        trainer.fit(setup.module, datamodule=setup.data_module(), ckpt_path=resumed, weights_only=bool(resumed) or None)
        return average, best, seen

    with quiet():
        whole = run(checkpoint=tmp_path / "half.ckpt")
        rest = run(resumed=tmp_path / "half.ckpt")
    assert len(rest[2].steps) == 6 and rest[2].val == whole[2].val
    assert rest[2].begun_with == whole[2].saved and all(epoch for epoch, _ in whole[2].saved)
    assert rest[0].number == whole[0].number == len(averaged_steps(name, whole[0].arguments, [3] * EPOCHS))
    assert largest_difference(rest[0].average.state_dict(), whole[0].average.state_dict()) == 0
    for kept, expected in ((rest[0].kept, whole[0].kept), (rest[1].kept, whole[1].kept)):
        assert (kept.epoch, kept.rank) == (expected.epoch, expected.rank)
        assert largest_difference(kept.weights, expected.weights) == 0


def test_without_recalibration_the_newest_statistics_are_taken(inputs, tmp_path):
    never = {"model": {"norm": {"batch": {"recalibrate": {"when": "never"}}}}}
    options = {"trainer": {"epochs": 1, "restore_best": False}, **QUICK, **never}
    train(inputs, tmp_path / "a", averaging={**KINDS["ema"], "export": "raw"}, **options)
    average, raw = load_file(tmp_path / "a" / "averages" / "ema.safetensors"), weights(tmp_path / "a")
    statistics = [key for key in raw if "running" in key]
    assert statistics and all(torch.equal(raw[key], average[key]) for key in statistics)
    assert largest_difference(raw, average) > 0


def test_what_was_kept_is_kept_in_a_resumed_run():
    class Trainer:  # stands for Lightning's: two plain facts
        current_epoch, is_global_zero = 4, True

    network, before = torch.nn.Linear(2, 1), Kept(True)
    before.offer((0.5, -1.0), Trainer, network)
    after = Kept(True)
    after.load_state_dict(before.state_dict())
    expected = network.weight.clone()
    torch.nn.init.zeros_(network.weight)
    Trainer.current_epoch = 5
    for worse in ((0.5, -1.0), (0.5, -1.5), (0.4, -0.1)):
        after.offer(worse, Trainer, network)
    assert after.epoch == 5 and torch.equal(after.weights["weight"], expected)
    after.offer((0.5, -0.9), Trainer, network)
    assert after.epoch == 6 and not after.weights["weight"].any()
    last = Kept(False)
    for rank in ((0.5, -1.0), (0.1, -2.0)):
        Trainer.current_epoch += 1
        last.offer(rank, Trainer, network)
    assert (last.epoch, last.rank) == (8, (0.1, -2.0))


# ---- which is exported ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "expected"), [(2.0, "ema"), (0.02, "raw")])
def test_the_better_on_validation_is_exported_at_its_best_epoch(inputs, tmp_path, lr, expected):
    """A rate that is too high rattles the newest weights, and their mean is better; a small one leaves the mean behind."""
    result = train(
        inputs,
        tmp_path / "a",
        averaging={"name": "ema", "ema": {"decay": 0.9, "warmup": lr > 1}},
        optimizer={"SGD": {"lr": lr}},
        schedule={"name": "constant"},
        trainer={"epochs": 5},
        **QUICK,
    )
    raw = max((row.val_accuracy, -row.val_loss, -row.epoch) for row in result.rows)
    average = max((row.val_average_accuracy, -row.val_average_loss, -row.epoch) for row in result.rows)
    assert result.weights == ("ema" if average[:2] > raw[:2] else "raw") == expected
    assert result.best_epoch == -max(raw, average, key=lambda rank: rank[:2])[2]
    exported, written = weights(tmp_path / "a"), load_file(tmp_path / "a" / "averages" / "ema.safetensors")
    assert (largest_difference(exported, written) == 0) == (expected == "ema")


def test_without_restore_best_the_last_epoch_is_exported(inputs, tmp_path):
    options = {"trainer": {"epochs": 3, "restore_best": False}, "schedule": {"name": "constant"}, **QUICK}
    seen = Weights()
    result = train(inputs, tmp_path / "a", callbacks=(seen,), optimizer={"SGD": {"lr": 2.0}}, **options)
    assert result.best_epoch == json.loads((tmp_path / "a" / "model.json").read_text())["best_epoch"] == 3
    classifier = load_classifier(tmp_path / "a")[0]
    for tensor, expected in zip(classifier.parameters(), seen.steps[-1], strict=True):
        assert np.array_equal(tensor.detach().double().numpy(), expected)


# ---- what is taken in, and the rate ---------------------------------------------------------------------------------


def test_ema_decay_and_steps():
    assert [ema_decay(t, decay=0.999, warmup=False) for t in (1, 5)] == [0.999, 0.999]
    assert [ema_decay(t, decay=0.999, warmup=True) for t in (2, 90)] == [0.25, 0.91]
    assert averaged_steps("ema", {}, [3, 2]) == range(1, 6)
    assert averaged_steps("polyak", {"start": 0.0}, [3, 2]) == range(1, 6)
    assert averaged_steps("swa", {"start": 0.5, "cycle": 1}, [4, 4, 2, 2]) == {10, 12}
    assert swa_epochs(30, start=0.75, cycle=1) == [24, 25, 26, 27, 28, 29, 30]
    assert swa_epochs(30, start=0.75, cycle=2) == [26, 28, 30]


LINEAR = {"name": "linear", "warmup": {"length": 0.0, "start": 0.0, "shape": "linear"}, "floor": 0.0}


@pytest.mark.parametrize(
    ("swa", "expected"),
    [
        # From epoch 3 of 4 on a constant rate.
        ({"cycle": 1, "low": 1.0}, [1, 7 / 8, 6 / 8, 5 / 8, 0.4, 0.4, 0.4, 0.4]),
        # A cycle of two epochs: alpha(i) = (1 - t) 0.4 + t 0.1 at t = 1/4, 2/4, 3/4, 1.
        ({"cycle": 2, "low": 0.25}, [1, 7 / 8, 6 / 8, 5 / 8, 0.325, 0.25, 0.175, 0.1]),
        ({"cycle": 1, "low": 0.5}, [1, 7 / 8, 6 / 8, 5 / 8, 0.3, 0.2, 0.3, 0.2]),
    ],
)
def test_the_rate_of_swa_at_every_step(swa, expected):
    arguments = factor_arguments(LINEAR, total_steps=8, steps_per_epoch=2, swa={"start": 0.5, "lr": 0.4, **swa})
    assert [factor(step, **arguments) for step in range(8)] == pytest.approx(expected)
    assert factor(99, **arguments) == pytest.approx(expected[-1])
    assert (
        factor_arguments(LINEAR, total_steps=8, steps_per_epoch=[2] * 4, swa={"start": 0.5, "lr": 0.4, **swa})
        == arguments
    )


def test_a_warm_up_rises_to_the_rate_of_swa_and_the_floor_holds():
    schedule = LINEAR | {"warmup": {"length": "2 steps", "start": 0.5, "shape": "linear"}, "floor": 0.2}
    swa = {"start": 0.0, "lr": 0.4, "cycle": 2, "low": 0.1}
    arguments = factor_arguments(schedule, total_steps=8, steps_per_epoch=2, swa=swa)
    expected = [0.31 * 0.5, 0.22 * 0.75, 0.2, 0.2, 0.31, 0.22, 0.2, 0.2]
    assert [factor(step, **arguments) for step in range(8)] == pytest.approx(expected)


def test_history_and_the_drawn_schedule_show_the_rate_of_swa(runs):
    rows = runs["swa"][1].rows
    assert [row.lr for row in rows[2:]] == pytest.approx([0.2 * 0.05] * 2)
    chosen = sections(averaging=KINDS["swa"])
    arguments = factor_arguments(
        chosen["schedule"].model_dump(), total_steps=12, steps_per_epoch=3, swa=chosen["averaging"].swa_rate
    )
    assert [row.lr for row in rows] == pytest.approx([0.05 * factor(step, **arguments) for step in (2, 5, 8, 11)])
    from anneal.schedules import Course

    (panel,) = course_panels({"a": Course(arguments, 0.05, [3] * 4)})
    assert panel["title"] == "cosine, then swa"
    assert panel["lines"][0]["y"][6:] == pytest.approx([0.01] * 6)
    # A rate of null leaves the schedule.
    assert sections(averaging={"name": "swa", "swa": {"lr": None}})["averaging"].swa_rate is None
    assert sections(averaging={"name": "ema"})["averaging"].swa_rate is None


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"averaging": {"name": "swa"}},
            r"averaging\.swa\.start: found 0\.75, which leaves a mean over 0 sets.*at most 0$",
        ),
        (
            {"averaging": {"name": "swa", "swa": {"cycle": 2}}},
            r"averaging\.swa\.start: found 0\.75.*allowed: trainer\.epochs at least 4",
        ),
        (
            {"averaging": {"name": "swa"}, "trainer": {"epochs": 6}},
            r"which leaves a mean over 1 set of weights in a run of 6 epochs.*allowed: at most 0\.66",
        ),
        (
            {"averaging": {"name": "polyak", "polyak": {"start": 0.9}}},
            r"averaging\.polyak\.start: found 0\.9, which leaves",
        ),
        (
            {
                "averaging": {"name": "swa", "swa": {"start": 0.5}},
                "schedule": {"name": "plateau"},
                "trainer": {"epochs": 4},
            },
            r"averaging\.swa\.lr: found a rate with schedule\.name plateau",
        ),
        (
            {"averaging": {"name": "swa", "swa": {"start": 0.0}}, "optimizer": {"name": "Rprop"}},
            r"averaging\.swa\.lr: found a rate with Rprop",
        ),
        (
            {"averaging": {"name": "swa", "swa": {"start": 0.0, "lr": None, "low": 0.5}}},
            r"averaging\.swa\.low: found 0\.5 with averaging\.swa\.lr null",
        ),
        (
            {
                "averaging": {"name": "polyak"},
                "trainer": {"epochs": 8, "early_stopping": {"patience": 2, "min_delta": 0.0}},
            },
            r"averaging\.polyak\.start: found 0\.5, an average that begins in epoch 5.*early_stopping\.patience 2.*at least 4",
        ),
    ],
)
def test_conflicts_stop_before_any_work(inputs, tmp_path, overrides, message):
    with pytest.raises(ParamsError, match=message):
        train(inputs, tmp_path / "a", **overrides)
    assert list(tmp_path.iterdir()) == []


# ---- where it is seen -----------------------------------------------------------------------------------------------


def test_curves_show_the_average_where_there_is_one(tmp_path):
    nan = float("nan")
    base = {
        q: [1.0, 3.0] for q in ("epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr", "grad_norm")
    }
    without = {**base, "val_average_loss": [nan, nan], "val_average_accuracy": [nan, nan]}
    averaged = {**base, "val_average_loss": [nan, 0.5], "val_average_accuracy": [nan, 0.75]}
    assert "val_average_loss" not in mean_curves({"a": without, "b": base})
    means = mean_curves({"a": without, "b": averaged})
    assert means["val_average_accuracy"][1] == 0.75 and np.isnan(means["val_average_accuracy"][0])
    rows = list(csv.DictReader(curves_csv({"a": without, "b": averaged}).splitlines()))
    assert [row["val_average_loss"] for row in rows] == ["", "0.5"] == [row["b_val_average_loss"] for row in rows]
    assert [row["a_val_average_loss"] for row in rows] == ["", ""] and rows[0]["a_val_loss"] == "1.0"
    draw_curves({"a": without}, tmp_path / "a.png")
    draw_curves({"a": averaged}, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
