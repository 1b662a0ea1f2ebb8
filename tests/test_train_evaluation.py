"""A fixed sample of training images, as stored, evaluated beside validation: the sample, the figures, what is left alone."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anneal.models.build import load_classifier
from anneal.store import open_store
from anneal.training import train_evaluation
from anneal.training.train_evaluation import TrainEvaluation, images_to_evaluate, measured_on, stratified_sample
from tests.test_training import FILES, sections, train, write_inputs

HARD = {
    "regularization": {"dropout": 0.5, "label_smoothing": 0.2, "mixup": {"alpha": 0.4}, "input_noise": 0.5},
    "batch": {"size": 32, "microbatch": 16, "noise_microbatches": 0},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    policy = [{"HorizontalFlip": {"p": 0.5}}, {"Cutout": {"size": 0.5}}]
    return write_inputs(tmp_path_factory.mktemp("inputs"), num_train=90, num_val=40, policy=policy)


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A run that is evaluated on its training images, what was logged, and the same run without."""
    folder, logged = tmp_path_factory.mktemp("run"), []
    result = train(inputs, folder / "on", log=lambda metrics, step: logged.append(metrics), **HARD)
    train(inputs, folder / "off", **HARD | {"trainer": {"evaluate_train": 0}})
    return folder, result, logged


def history(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "history.csv").read_text().splitlines()))


# ---- the sample -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 40, 100, 333, 500])
def test_each_class_has_its_share(size: int) -> None:
    labels = np.random.default_rng(1).choice(4, 500, p=[0.6, 0.25, 0.1, 0.05])
    index = stratified_sample(labels, size, seed=0)
    assert len(index) == len(set(index.tolist())) == size
    assert (np.diff(index) > 0).all()
    shares = np.bincount(labels) * size / 500
    assert np.abs(np.bincount(labels[index], minlength=4) - shares).max() <= 1


def test_the_draw_belongs_to_the_seed_and_is_fair_within_a_class() -> None:
    labels = np.repeat([0, 1], [300, 100])
    times = np.zeros(400)
    for seed in range(400):
        times[stratified_sample(labels, 40, seed)] += 1
    # Each image is drawn in a tenth of the seeds: 40 of 400, give or take a binomial error of 6.
    assert 36 < times[:300].mean() < 44 and 36 < times[300:].mean() < 44
    assert times.min() > 40 - 5 * 6 and times.max() < 40 + 5 * 6
    assert np.array_equal(stratified_sample(labels, 40, 3), stratified_sample(labels, 40, 3))
    assert set(stratified_sample(labels, 20, 3)) < set(stratified_sample(labels, 40, 3))


def test_classes_without_images_are_no_error() -> None:
    labels = np.array([2, 2, 0, 2, 5])
    assert stratified_sample(labels, 5, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_no_more_images_than_either_split_has() -> None:
    assert images_to_evaluate(50, num_train=90, num_val=40) == 40
    assert images_to_evaluate(50, num_train=30, num_val=40) == 30
    assert images_to_evaluate(10, num_train=90, num_val=40) == 10
    assert images_to_evaluate(0, num_train=90, num_val=40) == 0


# ---- the figures ----------------------------------------------------------------------------------------------------


def test_they_are_those_of_the_exported_weights_on_stored_images(inputs, run) -> None:
    """An independent computation: the best epoch's weights from disk, on the images as the store has them."""
    folder, result, _ = run
    classifier, model = load_classifier(folder / "on")
    split = open_store(inputs[0]).split("train")
    index = stratified_sample(np.asarray(split.labels), 40, seed=0)
    with torch.no_grad():
        logits = classifier(torch.from_numpy(split.take(index)))
    labels = torch.from_numpy(split.labels[index])
    row = result.rows[model["best_epoch"] - 1]
    assert row.train_eval_loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert row.train_eval_accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert row.train_eval_loss != pytest.approx(row.train_loss, rel=0.01)


def test_they_reach_the_history_and_the_log(run) -> None:
    folder, _, logged = run
    epochs = [metrics for metrics in logged if "epoch" in metrics]
    for row, metrics in zip(history(folder / "on"), epochs, strict=True):
        for column, name in (("train_eval_loss", "train_eval/loss"), ("train_eval_accuracy", "train_eval/accuracy")):
            assert float(row[column]) == metrics[name]
    assert all(row["train_eval_loss"] == "" for row in history(folder / "off"))


def test_nothing_else_changes(run) -> None:
    folder, *_ = run
    for name in FILES:
        if name != "history.csv":
            assert (folder / "on" / name).read_bytes() == (folder / "off" / name).read_bytes()
    for on, off in zip(history(folder / "on"), history(folder / "off"), strict=True):
        assert {key: value for key, value in on.items() if not key.startswith("train_eval")} == {
            key: value for key, value in off.items() if not key.startswith("train_eval")
        }


def test_processes_that_share_the_images_find_the_same_to_the_bit(inputs, run, monkeypatch) -> None:
    """tests/test_devices.py compares the whole history of one and of two real processes."""
    monkeypatch.setattr(train_evaluation, "BATCH", 7)
    callback = TrainEvaluation(open_store(inputs[0]).split("train"), size=40, seed=0)
    assert [len(batch) for batch in callback.batches] == [7] * 5 + [5]
    classifier, _ = load_classifier(run[0] / "on")
    zero = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        whole = callback.sums(classifier, zero)
        for world_size in (2, 4, 8):
            shares = [callback.sums(classifier, zero, rank, world_size) for rank in range(world_size)]
            assert torch.equal(torch.stack(shares).sum(0), whole)


# ---- in words -------------------------------------------------------------------------------------------------------


def in_words(transforms=(), images=0, **changes) -> list[str]:
    given = sections(**changes)
    return measured_on(
        transforms=transforms,
        model=given["model"],
        regularization=given["regularization"],
        loss=given["loss"],
        sampling=given["batch"].sampling,
        images=images,
    ).split(" | ")


def test_training_figures_say_what_they_are_measured_on(run) -> None:
    assert in_words(regularization={"label_smoothing": 0.0}) == [
        "train/*: as stored, weights still changing",
        "val/*: as stored, plain cross entropy, weights at the epoch's end",
    ]
    train_words, train_eval, val = run[1].measured_on.split(" | ")
    assert train_words == (
        "train/*: augmented (Cutout, HorizontalFlip), mixed (mixup), label smoothing 0.2, dropout 0.5, input noise 0.5, "
        "weights still changing"
    )
    assert train_eval == "train_eval/*: 40 training images as stored, plain cross entropy, weights at the epoch's end"
    assert val.startswith("val/*: as stored")


def test_what_is_off_is_not_named() -> None:
    mixing = {"mixup": {"alpha": 0.4, "probability": 0.0}, "cutmix": {"alpha": 1.0}, "label_smoothing": 0.0}
    words = in_words(regularization=mixing, batch={"sampling": "balanced"}, loss={"name": "focal"})
    assert words[0] == "train/*: as stored, mixed (cutmix), focal, balanced classes, weights still changing"
    wide = {"model": {"name": "wide_resnet", "wide_resnet": {"block_dropout": 0.3}}}
    assert "block dropout 0.3" in in_words(**wide)[0]
