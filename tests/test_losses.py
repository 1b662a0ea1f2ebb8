"""The losses against their formulas in numpy, their gradients against differences, and what they train."""

import inspect
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anneal.models.build import load_classifier
from anneal.store import open_store
from anneal.training.config import LossConfig
from anneal.training.losses import LOSSES, binary_cross_entropy, cross_entropy, focal
from tests.test_training import sections, set_up_run, train, write_inputs

N, K = 7, 4
ARGUMENTS = {"cross_entropy": {}, "focal": {"gamma": 1.7}, "binary_cross_entropy": {}}
WEIGHTS = np.array([0.5, 1.0, 2.5, 0.0])


def batch(kind, scale=2.0):
    draw = np.random.default_rng(3)
    logits = draw.normal(size=(N, K)) * scale
    labels = draw.integers(0, K, N)
    return logits, labels if kind == "hard" else draw.dirichlet(np.ones(K), N)


def by_formula(name, logits, targets, weights, smoothing, gamma=0.0):
    t = np.eye(K)[targets] if targets.ndim == 1 else targets
    w = np.ones(K) if weights is None else weights
    of_sample = t @ w
    t = (1 - smoothing) * t + smoothing / K
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    s = 1 / (1 + np.exp(-logits))
    if name == "binary_cross_entropy":
        return (of_sample[:, None] * -(t * np.log(s) + (1 - t) * np.log(1 - s))).sum()
    return -(w * t * (1 - p) ** gamma * np.log(p)).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_formula_and_its_gradient(name, kind, weights, smoothing):
    logits, targets = batch(kind)
    x = torch.tensor(logits, requires_grad=True)
    w = None if weights is None else torch.tensor(weights)

    def loss(x):
        return LOSSES[name](x, torch.tensor(targets), w, label_smoothing=smoothing, **ARGUMENTS[name])

    expected = by_formula(name, logits, targets, weights, smoothing, **ARGUMENTS[name])
    assert loss(x).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(loss, x)


@pytest.mark.parametrize("name", LOSSES)
def test_hard_labels_are_one_hot_targets_and_a_sum_is_over_samples(name):
    logits, labels = (torch.tensor(a) for a in batch("hard"))
    loss, w = LOSSES[name], torch.tensor(WEIGHTS)
    soft = F.one_hot(labels, K).double()
    torch.testing.assert_close(
        loss(logits, labels, w, label_smoothing=0.1), loss(logits, soft, w, label_smoothing=0.1), rtol=1e-12, atol=0
    )
    single = sum(loss(logits[i : i + 1], labels[i : i + 1], w, label_smoothing=0.1) for i in range(N))
    torch.testing.assert_close(single, loss(logits, labels, w, label_smoothing=0.1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_focal_without_focus_is_cross_entropy_to_the_bit_and_the_limit_too(kind):
    logits, targets = (torch.tensor(a) for a in batch(kind))
    logits = logits.float().requires_grad_()
    targets = targets.float() if kind == "soft" else targets
    options = {"class_weights": torch.tensor(WEIGHTS).float(), "label_smoothing": 0.1}
    values = [loss(logits, targets, **options) for loss in (cross_entropy, lambda *a, **k: focal(*a, **k, gamma=0.0))]
    gradients = [torch.autograd.grad(value, logits)[0] for value in values]
    assert torch.equal(*values) and torch.equal(*gradients)
    torch.testing.assert_close(focal(logits, targets, **options, gamma=1e-6), values[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_stays_finite_where_a_probability_is_one_or_none(gamma):
    logits = torch.tensor([[200.0, 0, 0], [-200.0, 0, 0], [17.0, 0, 0], [0.0, 0, 0]], requires_grad=True)
    labels = torch.tensor([0, 0, 0, 0])
    for targets in (labels, F.one_hot(labels, 3) * 0.9 + 0.1 / 3):
        (gradient,) = torch.autograd.grad(focal(logits, targets, gamma=gamma), logits)
        assert gradient.isfinite().all()
    assert focal(logits[:1], labels[:1], gamma=gamma).item() == 0
    assert focal(logits[1:2], labels[1:2], gamma=gamma).item() == pytest.approx(200, rel=0.01)


def test_focal_turns_down_what_is_already_right():
    logits, labels = torch.tensor([[4.0, 0, 0], [0.0, 4, 0]]), torch.tensor([0, 0])
    right, wrong = (focal(logits[i : i + 1], labels[:1]) / cross_entropy(logits[i : i + 1], labels[:1]) for i in (0, 1))
    assert right < 0.01 and wrong > 0.9


def test_gradients_of_binary_cross_entropy_are_as_large_as_those_of_cross_entropy():
    logits, labels = (torch.tensor(a) for a in batch("hard"))
    logits.requires_grad_()
    (found,) = torch.autograd.grad(binary_cross_entropy(logits, labels), logits)
    torch.testing.assert_close(found, torch.sigmoid(logits) - F.one_hot(labels, K))


def test_a_softmax_of_two_consistent_sigmoids_is_right_at_temperature_two():
    """Why logits that were trained by sigmoids want calibration: their softmax compares odds."""
    p = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    logits = torch.stack([p.logit(), (1 - p).logit()], 1)
    torch.testing.assert_close(torch.softmax(logits / 2, 1)[:, 0], p)
    assert (torch.softmax(logits, 1).amax(1) >= torch.maximum(p, 1 - p)).all()


@pytest.mark.parametrize("name", LOSSES)
def test_sixteen_bit_logits_are_widened(name):
    logits, labels = (torch.tensor(a) for a in batch("hard"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = LOSSES[name](logits.bfloat16(), labels, label_smoothing=0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, LOSSES[name](logits.bfloat16().float(), labels, label_smoothing=0.1))


# ---- in training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), num_train=96)


def test_every_name_of_the_recipe_is_a_loss_with_the_arguments_of_its_block():
    assert set(get_args(LossConfig.model_fields["name"].annotation)) == set(LOSSES)
    for name, loss in LOSSES.items():
        arguments = sections(loss={"name": name})["loss"].arguments
        own = set(inspect.signature(loss).parameters) - set(inspect.signature(cross_entropy).parameters)
        assert set(arguments) == own


@pytest.mark.parametrize("name", LOSSES)
def test_it_trains_mixed_and_weighted_and_validates_by_plain_cross_entropy(inputs, tmp_path, name):
    options = {
        "loss": {"name": name, "class_weights": "balanced"},
        "regularization": {"mixup": {"alpha": 0.4, "probability": 0.5}},
        "batch": {"size": 32, "microbatch": 16, "noise_microbatches": 8},
    }
    rows = train(inputs, tmp_path / "a", **options).rows
    assert rows[-1].train_loss < rows[0].train_loss
    classifier, model = load_classifier(tmp_path / "a")
    split = open_store(inputs[0]).split("val")
    with torch.no_grad():
        logits = classifier(torch.from_numpy(split.take(range(len(split)))))
    expected = F.cross_entropy(logits, torch.from_numpy(split.labels)).item()
    assert rows[model["best_epoch"] - 1].val_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_module_takes_the_loss_of_the_recipe(inputs, name):
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 1])
    options = {"loss": {"name": name, "class_weights": "balanced", "focal": {"gamma": 3.0}}}
    module = set_up_run(inputs, **options, regularization={"label_smoothing": 0.3}).module
    more = {"gamma": 3.0} if name == "focal" else {}
    assert torch.equal(
        module.summed_loss(logits, labels),
        LOSSES[name](logits, labels, module.class_weights, label_smoothing=0.3, **more),
    )
    assert module.class_weights is not None and len(set(module.class_weights.tolist())) > 1
