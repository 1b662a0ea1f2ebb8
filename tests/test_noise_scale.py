import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from anneal.training.module import frozen_statistics
from anneal.training.noise_scale import NoiseScale, estimate, gradient_squares, noise_scale, sample_sizes
from anneal.training.setup import set_up
from tests.test_training import NO_NORM, sections, train, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("flipped"), policy=[{"HorizontalFlip": {"p": 0.5}}])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def setup_of(inputs, **overrides):
    chosen = sections(**overrides)
    return set_up(store=inputs[0], augmented=inputs[1], seed=0, **chosen)


def callback_for(setup, num_microbatches=8, microbatch=64):
    return NoiseScale(setup.train, num_microbatches=num_microbatches, microbatch=microbatch, seed=0)


# ---- the estimators -------------------------------------------------------------------------------------------------


def exact(gradients: np.ndarray) -> tuple[float, float]:
    """Squared norm of the mean, and trace of the covariance, of per-sample gradients (N, P)."""
    return float((gradients.mean(0) ** 2).sum()), float(gradients.var(0, ddof=1).sum())


def estimated(gradients: np.ndarray, parts: np.ndarray) -> tuple[float, float]:
    """The estimators on microbatches given as indices (n, b)."""
    means = gradients[parts].mean(1)
    number, size = parts.shape
    return estimate(
        float((means**2).sum(1).mean()),
        float((means.mean(0) ** 2).sum()),
        num_microbatches=number,
        size=size,
        num_samples=len(gradients),
    )


@pytest.mark.parametrize(("number", "size"), [(2, 1), (2, 2), (3, 2), (2, 3)])
def test_estimators_are_unbiased_over_every_possible_draw(number, size):
    gradients = np.random.default_rng(0).normal(0.3, 1.0, (6, 4))
    draws = [estimated(gradients, np.reshape(p[: number * size], (number, size))) for p in permutations(6)]
    assert np.mean(draws, 0) == pytest.approx(exact(gradients), rel=1e-12)


def permutations(number):
    return [np.array(p) for p in itertools.permutations(range(number))]


def test_without_end_of_samples_the_estimators_are_those_of_the_paper():
    # McCandlish et al. 2018, appendix A.1, equations A.2 and A.3.
    small, big, square_small, square_big = 4, 32, 3.0, 1.25
    gradient_sq = (big * square_big - small * square_small) / (big - small)
    trace = (square_small - square_big) / (1 / small - 1 / big)
    found = estimate(square_small, square_big, num_microbatches=8, size=4, num_samples=10**18)
    assert found == pytest.approx((gradient_sq, trace), rel=1e-12)


def test_the_whole_split_gives_its_own_gradient():
    gradients = np.random.default_rng(1).normal(0.0, 1.0, (24, 3))
    found = estimated(gradients, np.arange(24).reshape(8, 3))
    # However little is left of the gradient, it cannot come out below 0 here.
    assert found[0] == pytest.approx(exact(gradients)[0], rel=1e-12)


def test_softmax_regression_agrees_with_its_per_sample_gradients():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=draw, dtype=torch.float64)
    y = torch.randint(0, 3, (400,), generator=draw)
    weight = torch.randn(3, 5, generator=draw, dtype=torch.float64).requires_grad_()
    p = torch.softmax(x @ weight.detach().T, 1)
    # d cross entropy / d logits = p - onehot, so a sample's gradient is (p - onehot) x^T.
    gradients = torch.einsum("nk,nd->nkd", p - F.one_hot(y, 3), x).flatten(1).numpy()
    order = np.random.default_rng(0)
    found = []
    for _ in range(400):
        parts = order.permutation(400)[:80].reshape(8, 10)
        losses = (F.cross_entropy(x[part] @ weight.T, y[part]) for part in parts)
        mean_of_squares, square_of_mean, number = gradient_squares(losses, [weight])
        this = estimate(mean_of_squares, square_of_mean, num_microbatches=number, size=10, num_samples=400)
        assert this == pytest.approx(estimated(gradients, parts), rel=1e-9)
        found.append(this)
    error = np.std(found, 0) / np.sqrt(len(found))
    assert (np.abs(np.mean(found, 0) - exact(gradients)) < 4 * error).all()
    assert weight.grad is None


def test_scale_of_a_loss_cancels():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    plain = gradient_squares(((weight * c).sum() for c in (1.0, 3.0)), [weight])
    scaled = gradient_squares(((weight * c).sum() * 1024 for c in (1.0, 3.0)), [weight], 1024)
    assert plain == pytest.approx((10.0, 8.0, 2))
    assert scaled == pytest.approx((10.0, 8.0, 2))


def test_noise_scale_is_a_ratio_of_means_or_nothing():
    assert noise_scale([(2.0, 10.0)]) == 5.0
    assert noise_scale([(2.0, 10.0), (-1.0, 6.0)]) == 16.0
    assert noise_scale([(1.0, 10.0), (-1.0, 6.0)]) is None
    assert noise_scale([]) is None


@pytest.mark.parametrize(
    ("num_samples", "number", "microbatch", "expected"),
    [
        (54_000, 8, 128, (8, 128)),
        (54_000, 32, 128, (32, 128)),
        (1_280, 8, 32, (8, 20)),
        (100, 8, 32, (8, 2)),
        (10, 8, 32, (5, 2)),
        (3, 8, 32, (0, 0)),
        (54_000, 8, 1, (8, 2)),
    ],
)
def test_sample_sizes(num_samples, number, microbatch, expected):
    assert sample_sizes(num_samples, num_microbatches=number, microbatch=microbatch) == expected


# ---- in training ----------------------------------------------------------------------------------------------------

BUSY = {
    "model": {"name": "resnet", "resnet": {"widths": [8, 8], "depths": [1, 1]}},
    "regularization": {"dropout": 0.3, "stochastic_depth": 0.2, "mixup": {"alpha": 0.4}},
    "trainer": {"epochs": 3},
}


@pytest.mark.parametrize("microbatch", [64, 16])
def test_training_is_the_same_to_the_byte_with_and_without(flipped, tmp_path, microbatch):
    batch = {"size": 64, "microbatch": microbatch}
    with_it = train(flipped, tmp_path / "a", **BUSY, batch=batch | {"noise_microbatches": 8})
    without = train(flipped, tmp_path / "b", **BUSY, batch=batch | {"noise_microbatches": 0})
    train(flipped, tmp_path / "c", **BUSY, batch=batch | {"noise_microbatches": 8})
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a["weights.safetensors"] == b["weights.safetensors"]
    assert all(row.noise_scale is None for row in without.rows)
    assert any(row.noise_scale is not None for row in with_it.rows)
    assert a["history.csv"] != b["history.csv"]
    assert contents(tmp_path / "c") == a


def state_of(module):
    """All that a measurement could disturb."""
    layers = list(module.classifier.modules())
    return {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],  # noqa: NPY002
        "training": [layer.training for layer in layers],
        "keys": [getattr(layer, "key", None) for layer in layers],
        "tracking": [getattr(layer, "track_running_stats", None) for layer in layers],
        "momentum": [getattr(layer, "momentum", None) for layer in layers],
        "gradients": [p.grad for p in module.parameters()],
        **{f"state {name}": value.clone() for name, value in module.state_dict().items()},
    }


def test_nothing_is_touched(inputs):
    setup = setup_of(inputs, **BUSY)
    module = setup.module.train()
    loss, _, _ = module.microbatch_loss(setup.train.__getitems__([(0, 0), *range(16)]))
    loss.backward()
    before = state_of(module)
    gradients = [g.clone() for g in before["gradients"]]
    callback = callback_for(setup)
    found = callback.measure(module)
    after = state_of(module)
    for name, value in before.items():
        if name == "gradients":
            assert all(a is b and torch.equal(a, c) for a, b, c in zip(after[name], value, gradients, strict=True))
        else:
            same = (after[name] == value).all() if hasattr(value, "all") else after[name] == value
            assert same, name
    assert any(key is not None for key in before["keys"])
    # The same samples and the same draws of dropout, whatever came before.
    torch.rand(5)
    assert callback.measure(module) == found == callback_for(setup).measure(module)


def test_running_statistics_of_any_layer_are_left_alone(inputs):
    setup = setup_of(inputs, model={"name": "tests.custom_models.networks:normed"})
    module = setup.module.train()
    before = {name: value.clone() for name, value in module.classifier.named_buffers()}
    assert any("running_mean" in name for name in before)
    callback_for(setup).measure(module)
    assert all(torch.equal(value, before[name]) for name, value in module.classifier.named_buffers())
    images = setup.train.__getitems__([(0, 0), *range(16)]).images
    with frozen_statistics(module.classifier):
        module.classifier(images)
    assert all(torch.equal(value, before[name]) for name, value in module.classifier.named_buffers())
    module.classifier(images)
    assert not all(torch.equal(value, before[name]) for name, value in module.classifier.named_buffers())


def test_measures_what_is_trained_on(inputs):
    """Smoothed and weighted by class, against the same loss written out and differentiated sample by sample."""
    options = NO_NORM | {"regularization": {"label_smoothing": 0.2, "l1": 0.1}, "loss": {"class_weights": "balanced"}}
    setup = setup_of(inputs, **options)
    module, train_set = setup.module.train(), setup.train
    callback = callback_for(setup)
    assert callback.index.shape == (8, 2) and len(set(callback.index.ravel())) == 16
    counts = np.bincount(train_set.labels)
    rows = []
    for i in range(len(train_set)):
        label = train_set.labels[i]
        log_p = F.log_softmax(module.classifier(torch.from_numpy(train_set.take(np.array([i])))), 1)[0]
        weight = torch.tensor(len(train_set) / (3 * counts), dtype=torch.float32)
        loss = -0.8 * weight[label] * log_p[label] - 0.2 / 3 * (weight * log_p).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, module.weights)]).double().numpy())
    found = callback.measure(module)
    assert found == pytest.approx(estimated(np.array(rows), callback.index), rel=1e-4)


class Extras(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append(dict(pl_module.figures))


NAMES = [f"noise_scale{part}" for part in ("", "/gradient_sq", "/trace", "/critical_batch")]


def test_figures_of_each_epoch(inputs, tmp_path):
    extras, logged = Extras(), []
    result = train(
        inputs,
        tmp_path / "a",
        callbacks=(extras,),
        log=lambda values, step: logged.append(values) if "val/loss" in values else None,
        **NO_NORM,
        trainer={"epochs": 7},
    )
    pairs = []
    for row, figures, metrics in zip(result.rows, extras.seen, logged, strict=True):
        pairs.append((figures["noise_scale/gradient_sq"], figures["noise_scale/trace"]))
        for name, expected in ((NAMES[0], noise_scale(pairs[-1:])), (NAMES[3], noise_scale(pairs[-5:]))):
            assert figures.get(name) == metrics.get(name) == expected
        assert row.noise_scale == figures.get("noise_scale")
    assert all(trace > 0 for _, trace in pairs)


def test_a_gradient_drowned_in_noise_leaves_the_metric_out(inputs):
    setup = setup_of(inputs, **NO_NORM)
    callback = callback_for(setup)
    module = setup.module
    module.extras = {}
    plan = module.plan[0]

    class Trainer:
        current_epoch = 0
        precision_plugin = type("Plugin", (), {"forward_context": staticmethod(nullcontext)})

    def end(batch_idx, found):
        module.extras = {}
        callback.measure = lambda *_, **__: found
        callback.on_train_batch_end(Trainer, module, None, None, batch_idx)
        return sorted(module.extras)

    last = plan.rounds_per_epoch - 1
    assert end(0, (1.0, 2.0)) == []
    assert end(last, (-1.0, 2.0)) == [NAMES[1], NAMES[2]]
    assert end(last, (3.0, 2.0)) == sorted(NAMES)
    assert module.extras[NAMES[3]] == 2.0
    assert end(last, (float("nan"), 2.0)) == []
    other = callback_for(setup)
    other.load_state_dict(callback.state_dict())
    assert other.estimates == callback.estimates == [(-1.0, 2.0), (3.0, 2.0)]


def test_a_split_too_small_to_measure_trains_all_the_same(tmp_path):
    inputs = write_inputs(tmp_path, num_train=3, num_val=4)
    result = train(inputs, tmp_path / "a", batch={"size": 3, "microbatch": 3})
    assert [row.noise_scale for row in result.rows] == [None, None]
