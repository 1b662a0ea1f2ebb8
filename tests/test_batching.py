import csv

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anneal.batching import (
    BatchConfig,
    MicrobatchSampler,
    balanced_order,
    devices_that_divide,
    epoch_order,
    most_repeats,
    plan,
    plan_run,
)
from anneal.cli import _batch_in_words
from anneal.params import ParamsError, parse
from anneal.store import open_store
from anneal.training.setup import set_up
from tests.test_training import PLAIN, images_of, largest_difference, sections, train, write_inputs, write_split


def run_plan(size, microbatch, world_size, num_samples):
    return plan_run(
        size=size, microbatch=microbatch, devices=world_size, num_nodes=1, num_samples=num_samples, epochs=1
    )


def section(**changes):
    values = {"size": 8, "microbatch": 8, "lr_scaling": "none", "reference_size": 8, "noise_microbatches": 0}
    return values | {"sampling": "shuffle", "growth": {"at": [], "factor": 2}} | changes


def test_plan_counts():
    p = plan(size=64, microbatch=16, devices=2, num_nodes=2, num_samples=64 * 3 + 20)
    assert (p.accumulation, p.steps_per_epoch, p.microbatches_per_epoch, p.rounds_per_epoch) == (1, 4, 14, 4)
    assert p.samples_per_epoch == 212
    assert [p.window_samples(i) for i in range(4)] == [64, 64, 64, 20]
    assert p.bounds(3) == [(192, 202), (202, 212)]
    assert [p.window_of(i) for i in (0, 3, 4, 11, 12, 13)] == [0, 0, 1, 2, 3, 3]


def test_batch_larger_than_the_training_split_names_both():
    with pytest.raises(ParamsError, match=r"batch\.size: found 128, but the training split has 100 images"):
        plan(size=128, microbatch=128, devices=1, num_nodes=1, num_samples=100)


def test_indivisible_accumulation_names_the_nearest_valid_values():
    text = r"found 96, .* 32 x 2 devices x 1 nodes = 64 .* batch\.size 64 or 128; batch\.microbatch 24; hardware\.devices 3$"
    with pytest.raises(ParamsError, match=text):
        plan(size=96, microbatch=32, devices=2, num_nodes=1, num_samples=1000)
    # A batch that the training split could not fill is no help.
    with pytest.raises(ParamsError, match=r"nearest valid: batch\.microbatch 48; hardware\.devices 1$"):
        plan(size=96, microbatch=96, devices=2, num_nodes=1, num_samples=100)
    with pytest.raises(ParamsError, match=r"nearest valid: batch\.microbatch 1$"):
        plan(size=4, microbatch=4, devices=2, num_nodes=2, num_samples=4)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 60), microbatch=st.integers(1, 30), devices=st.integers(1, 4), nodes=st.integers(1, 2))
def test_the_values_proposed_are_valid(size, microbatch, devices, nodes):
    arguments = {"size": size, "microbatch": microbatch, "devices": devices, "num_nodes": nodes, "num_samples": 60}
    if size % (microbatch * devices * nodes) == 0:
        plan(**arguments)
        return
    with pytest.raises(ParamsError, match="nearest valid: ") as caught:
        plan(**arguments)
    for choice in caught.value.faults[0].split("nearest valid: ")[1].split("; "):
        key, *values = choice.replace(" or ", " ").split(" ")
        for value in values if key.startswith(("batch", "hardware.devices")) else ():
            plan(**arguments | {key.split(".")[1]: int(value)})


def test_microbatch_must_divide_size():
    values = {"batch": section(size=96, microbatch=36)}
    with pytest.raises(ParamsError, match=r"batch.*found 36.*divisor of size, nearest 32"):
        parse(values, {"batch": BatchConfig})


@pytest.mark.parametrize(
    ("available", "size", "microbatch", "expected"), [(8, 64, 16, 4), (3, 64, 16, 2), (1, 5, 5, 1)]
)
def test_devices_that_divide(available, size, microbatch, expected):
    assert devices_that_divide(available, size=size, microbatch=microbatch) == expected


@pytest.mark.parametrize(("size", "microbatch", "num_samples"), [(4, 2, 11), (16, 2, 21), (16, 8, 39), (64, 16, 131)])
def test_no_microbatch_is_too_small_for_batchnorm(size, microbatch, num_samples):
    p = plan(size=size, microbatch=microbatch, devices=1, num_nodes=1, num_samples=num_samples)
    bounds = [b for window in range(p.steps_per_epoch) for b in p.bounds(window)]
    assert len(bounds) == p.microbatches_per_epoch
    assert min(end - start for start, end in bounds) >= 2
    assert bounds[-1][1] == p.samples_per_epoch


def test_order_is_keyed_by_seed_and_epoch():
    assert (epoch_order(50, 0, 1) == epoch_order(50, 0, 1)).all()
    assert (epoch_order(50, 0, 1) != epoch_order(50, 0, 2)).any()
    assert (epoch_order(50, 0, 1) != epoch_order(50, 1, 1)).any()


@settings(max_examples=150, deadline=None)
@given(
    microbatch=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    world_size=st.integers(1, 4),
    windows=st.integers(1, 4),
    rest=st.integers(0, 200),
    epoch=st.integers(0, 3),
)
def test_every_sample_once_whatever_the_processes(microbatch, accumulation, world_size, windows, rest, epoch):
    size = microbatch * accumulation * world_size
    num_samples = size * windows + rest % size
    p = plan(size=size, microbatch=microbatch, devices=world_size, num_nodes=1, num_samples=num_samples)
    by_rank = []
    for rank in range(world_size):
        sampler = MicrobatchSampler(run_plan(size, microbatch, world_size, num_samples), 7, rank)
        sampler.set_epoch(epoch)
        by_rank.append(list(sampler))
        assert len(by_rank[-1]) == len(sampler) == p.rounds_per_epoch
    alone = MicrobatchSampler(run_plan(size, microbatch, 1, num_samples), 7)
    alone.set_epoch(epoch)
    expected = {key: indices for key, *indices in alone}
    rounds = [keyed for of_round in zip(*by_rank, strict=True) for keyed in of_round]
    real = {key: indices for key, *indices in rounds if key[1] < p.microbatches_per_epoch}
    assert real == expected
    assert list(real) == [(epoch, i) for i in range(p.microbatches_per_epoch)]
    seen = [i for indices in real.values() for i in indices]
    assert seen == epoch_order(num_samples, 7, epoch)[: p.samples_per_epoch].tolist()
    assert num_samples - len(seen) == (1 if num_samples % size == 1 else 0)
    # A part of three, where cutting it at two would leave one sample alone.
    assert all(len(indices) <= (3 if microbatch == 2 else microbatch) for indices in real.values())
    if microbatch >= 2:
        assert all(len(indices) >= 2 for indices in real.values())
    for i in range(p.microbatches_per_epoch):
        window = p.window_of(i)
        assert any(stop - start == len(real[(epoch, i)]) for start, stop in p.bounds(window))
        assert sum(len(real[(epoch, j)]) for j in range(p.microbatches_per_epoch) if p.window_of(j) == window) == (
            p.window_samples(window)
        )


def test_padding_keeps_processes_in_step_in_the_last_window():
    sampler = MicrobatchSampler(run_plan(64, 16, 4, 70), 0, rank=3)
    (epoch, microbatch), *indices = list(sampler)[-1]
    assert microbatch >= sampler.run[0].microbatches_per_epoch
    assert indices == np.array(epoch_order(70, 0, epoch)[64:]).tolist()


# ---- balanced sampling ----------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=60), seed=st.integers(0, 3))
def test_every_class_as_often_and_every_sample_of_a_class_too(labels, seed):
    labels = np.array(labels)
    seen = np.zeros(len(labels), int)
    for epoch in range(6):
        order = balanced_order(labels, seed, epoch)
        assert order.shape == labels.shape and order.dtype == np.int64
        now = np.bincount(order, minlength=len(labels))
        seen += now
        # In an epoch and over the run: classes within one of each other, and the samples of a class as well.
        for counts, slack in ((now, 2), (seen, 1)):
            of_class = [counts[labels == label] for label in np.unique(labels)]
            assert max(c.sum() for c in of_class) - min(c.sum() for c in of_class) <= 1
            assert all(c.max() - c.min() <= slack for c in of_class)


def test_balanced_orders_are_keyed_and_begin_anywhere():
    labels = np.array([0] * 40 + [1] * 7 + [4] * 3)
    assert (balanced_order(labels, 0, 5) == balanced_order(labels, 0, 5)).all()
    assert (balanced_order(labels, 0, 5) != balanced_order(labels, 0, 6)).any()
    assert (balanced_order(labels, 0, 5) != balanced_order(labels, 1, 5)).any()
    assert most_repeats(labels) == pytest.approx(50 / 3 / 3)
    # The large class goes on where the last epoch left it: 17 of its 40 samples an epoch, or 16.
    first = [i for epoch in range(2) for i in balanced_order(labels, 0, epoch) if i < 40]
    assert len(set(first)) == len(first) == 34
    # Classes are not bunched: in 50 shuffled places of a third each, neighbours agree about every third time.
    order = labels[balanced_order(labels, 0, 0)]
    assert 6 <= int((order[1:] == order[:-1]).sum()) <= 27


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_balanced_microbatches_do_not_depend_on_the_processes(world_size):
    labels = np.random.default_rng(0).choice(3, 70, p=[0.8, 0.15, 0.05])
    run = run_plan(16, 4, world_size, 70)
    found = {}
    for rank in range(world_size):
        sampler = MicrobatchSampler(run, 7, rank, labels)
        sampler.set_epoch(2)
        found |= {key: indices for key, *indices in sampler if key[1] < run[2].microbatches_per_epoch}
    order = [i for key in sorted(found) for i in found[key]]
    assert order == balanced_order(labels, 7, 2).tolist()


# ---- growth ---------------------------------------------------------------------------------------------------------


def grown(at, epochs=8, num_samples=100, **options):
    arguments = {"size": 8, "microbatch": 4, "devices": 1, "num_nodes": 1, "growth_factor": 2} | options
    return plan_run(epochs=epochs, num_samples=num_samples, growth_at=at, **arguments)


@pytest.mark.parametrize(
    ("at", "epochs", "sizes"),
    [
        ([], 3, [8, 8, 8]),
        ([0.5], 4, [8, 8, 16, 16]),
        ([0.5, 0.75], 8, [8, 8, 8, 8, 16, 16, 32, 32]),
        (["1 epoch", "3 epochs"], 4, [8, 16, 16, 32]),
        ([0.75, "2 epochs"], 4, [8, 8, 16, 32]),
        ([0.01], 3, [8, 16, 16]),  # never in the first epoch, which batch.size is for
        ([0.75], 2, [8, 16]),  # nor past the last
        ([0.5, 0.75], 1, [8]),  # a run cut short for a try
        (["5 epochs"], 1, [8]),
    ],
)
def test_the_batch_grows_between_epochs(at, epochs, sizes):
    run = grown(at, epochs)
    assert [run[epoch].size for epoch in range(epochs)] == sizes
    assert [run[epoch].accumulation for epoch in range(epochs)] == [size // 4 for size in sizes]
    assert run.total_steps == sum(-(-100 // size) for size in sizes)
    assert run.grows == (len(set(sizes)) > 1)


def test_check_says_what_the_batch_grows_to():
    assert _batch_in_words(grown([]), 1) == "batch 8 = 4 x 1 device x 2 accumulated; 13 steps an epoch"
    assert _batch_in_words(grown([0.5, 0.75], devices=2), 2) == (
        "batch 8 = 4 x 2 devices x 1 accumulated, 16 from epoch 5, 32 from epoch 7; 13, later 7, later 4 steps an epoch"
    )


def test_growth_that_cannot_be_names_the_key():
    with pytest.raises(
        ParamsError, match=r"batch\.growth\.at: .* batch\.size 8 into 128, .* 100 images; .* at most 3 points"
    ):
        grown([0.2, 0.4, 0.6, 0.8])
    with pytest.raises(
        ParamsError, match=r"batch\.growth\.at: found '9 epochs', but the run ends after 8 epochs; .* 7 ep"
    ):
        grown(["9 epochs"])
    with pytest.raises(ParamsError, match=r"batch\.size: found 8, which batch\.microbatch 4 x 4 devices"):
        grown([0.5], devices=4)
    for at in ([0], [0.0], [1.0], ["3 steps"], ["0 epochs"], ["1.5 epochs"]):
        with pytest.raises(ParamsError, match=r"batch\.growth\.at\[0\]: .* a fraction of the run between 0 and 1"):
            parse({"batch": section(growth={"at": at, "factor": 2})}, {"batch": BatchConfig})
    with pytest.raises(ParamsError, match=r"batch\.growth\.factor: found 1, allowed: a whole number >= 2"):
        parse({"batch": section(growth={"at": [0.5], "factor": 1})}, {"batch": BatchConfig})


# ---- through fit, against one big batch by hand ---------------------------------------------------------------------


class LastWeights(pl.Callback):
    """The weights at the end of training, not of the best epoch."""

    def on_train_end(self, trainer, pl_module):
        self.state = {name: value.clone() for name, value in pl_module.classifier.state_dict().items()}


def by_hand(inputs, sizes, lr=0.05, **overrides):
    """Train with one forward pass a step, ``sizes[epoch]`` samples, and a loss that is written out."""
    chosen = sections(**overrides)
    setup = set_up(store=inputs[0], augmented=inputs[1], seed=0, **chosen)
    classifier, weights = setup.module.classifier, setup.module.class_weights
    smoothing, l1 = chosen["regularization"].label_smoothing, chosen["regularization"].l1
    split = open_store(inputs[0]).split("train")
    images, labels = torch.from_numpy(split.take(range(len(split)))), torch.from_numpy(split.labels)
    if weights is None:
        weights = torch.ones(3)
    for epoch, size in enumerate(sizes):
        if chosen["batch"].sampling == "balanced":
            order = balanced_order(split.labels, 0, epoch)
        else:
            order = epoch_order(len(split), 0, epoch)
        for start in range(0, len(order), size):
            index = order[start : start + size]
            log_p = torch.log_softmax(classifier(images[index]), 1)
            y = labels[index]
            right = weights[y] * log_p[range(len(y)), y]
            loss = -((1 - smoothing) * right + smoothing / 3 * (weights * log_p).sum(1)).mean()
            loss = loss + l1 * sum(p.abs().sum() for p in classifier.parameters() if p.ndim > 1)
            for p, gradient in zip(
                classifier.parameters(), torch.autograd.grad(loss, list(classifier.parameters())), strict=True
            ):
                p.data -= lr * gradient
    return classifier.state_dict()


def relative_difference(a, b):
    return largest_difference(a, b) / max(float(value.abs().max()) for value in b.values())


PENALISED = PLAIN | {
    "regularization": {"label_smoothing": 0.1, "l1": 1e-2},
    "loss": {"class_weights": "balanced"},
}
LOSSES = {"plain": PLAIN, "penalised": PENALISED}
# 64 + 64 + 40: the last window is 13 + 13 + 14, so of two processes one has no sample in its last round;
# 64 + 64 + 6: one microbatch, and nothing at all for a second process.
LAST_WINDOWS = {40: 168, 6: 134}


@pytest.fixture(scope="module", params=LAST_WINDOWS.values(), ids=[f"rest{rest}" for rest in LAST_WINDOWS])
def short(request, tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("short"), num_train=request.param)


@pytest.mark.parametrize("microbatch", [64, 16])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_short_last_window_is_a_mean_over_its_own_samples(short, tmp_path, loss, microbatch):
    last = LastWeights()
    batch = {"size": 64, "microbatch": microbatch}
    train(short, tmp_path / "a", callbacks=(last,), **LOSSES[loss], batch=batch)
    assert relative_difference(last.state, by_hand(short, [64, 64], **LOSSES[loss], batch=batch)) < 1e-6


GROWING = {"batch": {"size": 32, "microbatch": 8, "growth": {"at": ["1 epoch", 0.5]}}, "trainer": {"epochs": 4}}
SIZES, STEPS = [32, 64, 128, 128], [6, 9, 11, 13]
"""Of 168 samples; steps so far at the end of each epoch."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), num_train=168)


def test_a_grown_batch_trains_as_by_hand(inputs, tmp_path):
    last = LastWeights()
    result = train(inputs, tmp_path / "a", callbacks=(last,), **PENALISED, **GROWING)
    assert [(row.batch_size, row.step) for row in result.rows] == list(zip(SIZES, STEPS, strict=True))
    assert relative_difference(last.state, by_hand(inputs, SIZES, **PENALISED, **GROWING)) < 1e-6
    assert relative_difference(last.state, by_hand(inputs, [32] * 4, **PENALISED, **GROWING)) > 1e-3
    rows = list(csv.DictReader((tmp_path / "a" / "history.csv").read_text().splitlines()))
    assert [int(row["batch_size"]) for row in rows] == SIZES


def test_schedule_lengths_in_epochs_follow_the_growth(inputs, tmp_path):
    schedule = {"name": "step", "step": {"every": "2 epochs", "gamma": 0.1}, "warmup": {"length": 0.0}}
    options = PLAIN | {"schedule": schedule}
    rows = train(inputs, tmp_path / "a", **options, **GROWING).rows
    assert [row.step for row in rows] == STEPS
    # Two epochs are 9 steps here, so the next drop would come at step 18, after the end.
    assert [row.lr for row in rows] == pytest.approx([0.05, 0.05, 0.005, 0.005])


def test_a_grown_run_has_the_same_bytes_whatever_the_workers(inputs, tmp_path):
    options = {"regularization": {"dropout": 0.2, "mixup": {"alpha": 0.4}}, **GROWING}
    for out, workers in (("a", 0), ("b", 2)):
        train(inputs, tmp_path / out, hardware={"num_workers": workers}, **options)
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("a", "b"))
    assert a == b


def test_the_rate_is_that_of_the_first_size(inputs, tmp_path):
    options = PLAIN | {"batch": GROWING["batch"] | {"lr_scaling": "linear", "reference_size": 16}}
    options["schedule"] = {"name": "constant", "warmup": {"length": "2 steps"}}
    rows = train(inputs, tmp_path / "a", **options, trainer={"epochs": 4}).rows
    assert [row.lr for row in rows] == pytest.approx([0.1] * 4)


def test_balanced_sampling_trains_as_by_hand_while_the_batch_grows(inputs, tmp_path):
    last, figures = LastWeights(), []
    options = {**PLAIN, **GROWING, "batch": GROWING["batch"] | {"sampling": "balanced", "noise_microbatches": 8}}
    result = train(
        inputs, tmp_path / "a", callbacks=(last,), log=lambda metrics, step: figures.append(metrics), **options
    )
    assert [(row.batch_size, row.step) for row in result.rows] == list(zip(SIZES, STEPS, strict=True))
    assert relative_difference(last.state, by_hand(inputs, SIZES, **options)) < 1e-6
    shuffled = options | {"batch": GROWING["batch"]}
    assert relative_difference(last.state, by_hand(inputs, SIZES, **shuffled)) > 1e-3
    labels = open_store(inputs[0]).split("train").labels
    assert {f["sampling/repeats"] for f in figures if "epoch" in f} == {most_repeats(labels)}
    assert all(row.noise_scale is None or row.noise_scale > 0 for row in result.rows)


def test_balanced_sampling_counts_augmented_copies_too(tmp_path):
    paths = write_inputs(tmp_path, num_train=40)
    images, labels = images_of(7, 5)
    write_split(paths[1] / "extra", images, labels)
    setup = set_up(
        store=paths[0],
        augmented=paths[1],
        seed=0,
        **sections(batch={"size": 47, "microbatch": 47, "sampling": "balanced"}),
    )
    assert setup.train.balanced and len(setup.train.labels) == 47
    order = balanced_order(setup.train.labels, 0, 0)
    assert order.max() >= 40
    counts = np.bincount(setup.train.labels[order])
    assert counts.max() - counts.min() <= 1
