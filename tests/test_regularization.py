"""Penalties, projections, clips and noise: each step by its formula, by hand and through a real run."""

import copy
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

from anneal.batching import epoch_order
from anneal.mixing import choose
from anneal.models.build import Classifier
from anneal.optimizers.sam import SAM
from anneal.params import ParamsError
from anneal.seeding import seed_for
from anneal.store import open_store
from anneal.training.gradients import (
    UNITS,
    add_noise_,
    clip_adaptive_,
    clip_value_,
    head_parameters,
    limit_norms_,
    noise_std,
    unit_weights,
)
from anneal.training.machine import quiet
from tests.test_training import NO_NORM, PLAIN, contents, largest_difference, sections, set_up_run, train, write_inputs

SIZE, NUM = 32, 96


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), num_train=NUM)


class LastWeights(pl.Callback):
    """The weights at the end of training, not of the best epoch, and what each epoch measured."""

    def __init__(self):
        self.figures = []

    def on_validation_end(self, trainer, pl_module):
        self.figures.append(dict(pl_module.figures))

    def on_train_end(self, trainer, pl_module):
        self.state = copy.deepcopy(pl_module.classifier.state_dict())


def trained(inputs, regularization, **overrides):
    """Train for two epochs of three steps without a norm layer; the network as it began, its last state and figures."""
    last = LastWeights()
    options = {**PLAIN, "batch": {"size": SIZE, "microbatch": SIZE, "noise_microbatches": 0}, **overrides}
    options["regularization"] = {"label_smoothing": 0.0, **regularization}
    with quiet():
        setup = set_up_run(inputs, **options)
        begun = copy.deepcopy(setup.module.classifier)
        setup.trainer([last]).fit(setup.module, datamodule=setup.data_module())
    return begun, last.state, last.figures


def by_hand(inputs, classifier, change=None, after=None, lr=0.05):
    """The same steps of plain SGD; ``change`` acts on named parameters at each step, ``after`` on the network."""
    split = open_store(inputs[0]).split("train")
    images, labels = torch.from_numpy(split.take(range(len(split)))), torch.from_numpy(split.labels)
    step = 0
    for epoch in range(2):
        order = epoch_order(len(split), 0, epoch)
        for start in range(0, len(order), SIZE):
            index = order[start : start + SIZE]
            classifier.zero_grad()
            F.cross_entropy(classifier(images[index]), labels[index]).backward()
            with torch.no_grad():
                if change is not None:
                    change(classifier, step)
                for parameter in classifier.parameters():
                    parameter -= lr * parameter.grad
                if after is not None:
                    after(classifier)
            step += 1
    return classifier.state_dict()


# ---- penalties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch", [32, 8])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_l2_is_the_weight_decay_of_sgd(inputs, momentum, microbatch):
    def run(l2, decay):
        sgd = {"lr": 0.05, "momentum": momentum, "nesterov": momentum > 0, "weight_decay": decay}
        batch = {"size": SIZE, "microbatch": microbatch}
        return trained(inputs, {"l2": l2}, optimizer={"SGD": sgd}, batch=batch)

    (_, plain, _), (_, decayed, _), (_, penalised, figures) = run(0.0, 0.0), run(0.0, 0.1), run(0.1, 0.0)
    assert largest_difference(penalised, decayed) < 1e-6
    assert largest_difference(penalised, plain) > 1e-3
    size = sum(float(value.double().square().sum()) for value in penalised.values() if value.ndim > 1)
    assert figures[-1]["penalty/l2"] == pytest.approx(0.1 * 0.5 * size, rel=1e-5)
    # The loss that is shown is the one without.
    assert figures[-1]["train/loss"] < 2 and "penalty/l1" not in figures[-1]


def test_decoupled_decay_is_another_thing_for_adam(inputs):
    """AdamW shrinks every weight alike; L2 in the gradient is divided by its size, as Adam's own decay is."""
    adam = {"lr": 1e-3, "betas": [0.9, 0.999], "amsgrad": False}
    batch = {"size": SIZE, "microbatch": SIZE}
    runs = {
        "l2": ({"l2": 0.1}, {"name": "Adam", "Adam": {**adam, "weight_decay": 0.0}}),
        "coupled": ({}, {"name": "Adam", "Adam": {**adam, "weight_decay": 0.1}}),
        "decoupled": ({}, {"name": "AdamW", "AdamW": {**adam, "weight_decay": 0.1}}),
    }
    last = {name: trained(inputs, r, optimizer=o, batch=batch)[1] for name, (r, o) in runs.items()}
    assert largest_difference(last["l2"], last["coupled"]) < 1e-5
    assert largest_difference(last["l2"], last["decoupled"]) > 1e-4


def test_l1_is_measured(inputs):
    _, state, figures = trained(inputs, {"l1": 1e-2})
    size = sum(float(value.double().abs().sum()) for value in state.values() if value.ndim > 1)
    assert figures[-1]["penalty/l1"] == pytest.approx(1e-2 * size, rel=1e-5)


# ---- max-norm -------------------------------------------------------------------------------------------------------


def norms_of_units(classifier):
    found = [m.weight for m in classifier.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return torch.cat([weight.detach().flatten(1).norm(dim=1) for weight in found])


def test_a_projection_is_the_nearest_point_of_the_ball():
    draw = np.random.default_rng(0)
    for shape in ((5, 7), (4, 3, 3, 3)):
        values = draw.normal(size=shape)
        weight = nn.Parameter(
            torch.tensor(values).to(memory_format=torch.channels_last) if len(shape) == 4 else torch.tensor(values)
        )
        most = float(np.median(np.linalg.norm(values.reshape(shape[0], -1), axis=1)))
        limit_norms_([weight], most)
        rows = values.reshape(shape[0], -1)
        expected = rows * np.minimum(1, most / np.linalg.norm(rows, axis=1))[:, None]
        np.testing.assert_allclose(weight.detach().numpy().reshape(shape[0], -1), expected, rtol=1e-6)
        small = np.linalg.norm(rows, axis=1) <= most
        assert (weight.detach().numpy().reshape(shape[0], -1)[small] == rows[small]).all()
    frozen = nn.Parameter(torch.full((2, 2), 9.0), requires_grad=False)
    limit_norms_([frozen], 1.0)
    assert (frozen == 9).all()


def test_max_norm_projects_after_each_step(inputs):
    def project(classifier):
        for module in classifier.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                rows = module.weight.flatten(1)
                module.weight.copy_((rows * (0.8 / rows.norm(dim=1, keepdim=True)).clamp_max(1)).view_as(module.weight))

    begun, state, figures = trained(inputs, {"max_norm": 0.8})
    assert norms_of_units(begun).max() > 1
    assert largest_difference(state, by_hand(inputs, copy.deepcopy(begun), after=project)) < 1e-6
    begun.load_state_dict(state)
    norms = norms_of_units(begun)
    assert norms.max() <= 0.8 * (1 + 1e-6)
    assert figures[-1]["max_norm/share"] == pytest.approx(float((norms >= 0.8 * 0.999).float().mean()))
    assert 0 < figures[-1]["max_norm/share"] <= 1


def test_max_norm_leaves_norm_layers_and_biases_alone(inputs):
    options = {"model": {"name": "resnet", "resnet": {"widths": [8, 8], "depths": [1, 1]}}}
    begun, state, _ = trained(inputs, {"max_norm": 0.05}, **options)
    names = {name for name, p in begun.named_parameters() if any(p is w for w in unit_weights(begun))}
    assert names == {n for n, m in ((f"{n}.weight", m) for n, m in begun.named_modules()) if isinstance(m, UNITS)}
    for name, value in state.items():
        if name in names:
            assert value.flatten(1).norm(dim=1).max() <= 0.05 * (1 + 1e-6)
        elif name.endswith("weight"):
            assert value.norm() > 1  # the scales of norm layers, which began at 1


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_noise_is_drawn_by_step_and_name_and_has_its_law():
    def noise(name="a", step=0, seed=0, std=0.3, size=(200, 300)):
        parameter = nn.Parameter(torch.zeros(size))
        parameter.grad = torch.zeros(size)
        add_noise_(
            [(name, parameter), ("frozen", nn.Parameter(torch.zeros(2)))], seed=seed, step=step, std=std, decay=0.55
        )
        return parameter.grad

    first = noise()
    assert torch.equal(noise(), first)
    for other in (noise(name="b"), noise(step=1), noise(seed=1)):
        assert abs(float((first * other).mean())) < 0.002
    assert abs(float(first.mean())) < 0.005
    for step in (0, 9):
        assert float(noise(step=step).var()) == pytest.approx(0.3**2 / (1 + step) ** 0.55, rel=0.02)
    fourth = float((first / 0.3).pow(4).mean())
    assert fourth == pytest.approx(3, rel=0.03)  # as of a Gaussian
    # Entry by entry whatever the memory format.
    image = nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    image.grad = torch.zeros_like(image)
    add_noise_([("a", image)], seed=0, step=0, std=0.3, decay=0.55)
    assert torch.equal(image.grad.contiguous(), noise(size=(2, 3, 4, 5)))


def noisy(std, decay):
    def change(classifier, step):
        for name, parameter in classifier.named_parameters():
            draws = torch.Generator().manual_seed(seed_for(0, "gradient_noise", step, name))
            size = std / (1 + step) ** (decay / 2)
            parameter.grad += size * torch.randn(parameter.shape, generator=draws)

    return change


def test_noise_comes_after_the_clip(inputs):
    noise = {"std": 0.1, "decay": 0.55}

    def change(classifier, step):
        nn.utils.clip_grad_norm_(classifier.parameters(), 0.1)
        noisy(**noise)(classifier, step)

    begun, state, figures = trained(inputs, {"gradient_noise": noise, "gradient_clip": 0.1})
    assert largest_difference(state, by_hand(inputs, copy.deepcopy(begun), change)) < 1e-6
    total = sum(p.numel() for p in begun.parameters())
    assert figures[-1]["gradient_noise/norm"] == pytest.approx(noise_std(5, **noise) * math.sqrt(total))
    assert figures[-1]["clip/share"] == 1


def test_noise_is_the_same_under_accumulation(inputs):
    noise = {"gradient_noise": {"std": 0.1, "decay": 0.55}}
    begun, state, _ = trained(inputs, noise, batch={"size": SIZE, "microbatch": 8})
    assert largest_difference(state, by_hand(inputs, begun, noisy(0.1, 0.55))) < 1e-6


def test_sam_looks_without_noise_and_steps_with_it(inputs):
    """Of the two gradients only that which the step is made from is clipped by value and disturbed."""
    options = {"optimizer": {"sam": {"rho": 0.1}}, "batch": {"size": NUM, "microbatch": NUM}, "trainer": {"epochs": 1}}
    options["optimizer"]["SGD"] = PLAIN["optimizer"]["SGD"]
    regularization = {"gradient_noise": {"std": 0.05, "decay": 0.0}, "gradient_clip_value": 0.02}
    begun, state, figures = trained(inputs, regularization, **options)
    split = open_store(inputs[0]).split("train")
    images, labels = torch.from_numpy(split.take(range(NUM))), torch.from_numpy(split.labels)
    optimizer = SAM(torch.optim.SGD(begun.parameters(), lr=0.05), rho=0.1)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(begun(images), labels)
        loss.backward()
        if calls:
            nn.utils.clip_grad_value_(begun.parameters(), 0.02)
            noisy(0.05, 0.0)(begun, 0)
        calls.append(loss)
        return loss

    optimizer.step(closure)
    assert len(calls) == 2 and figures[0]["clip/share"] == 1
    assert largest_difference(state, begun.state_dict()) < 1e-6


# ---- clips ----------------------------------------------------------------------------------------------------------


def by_unit(weight, gradient, most):
    """The paper's rule, entry by entry of the first dimension."""
    weight, gradient = weight.detach().numpy().astype(float), gradient.numpy().astype(float)
    units = [(weight, gradient)] if weight.ndim < 2 else list(zip(weight, gradient, strict=True))
    found = []
    for w, g in units:
        size, bound = np.sqrt((g**2).sum()), most * max(np.sqrt((w**2).sum()), 1e-3)
        found.append(g * bound / size if size > bound else g)
    return np.stack(found) if weight.ndim > 1 else found[0]


def test_adaptive_clipping_is_the_papers_rule():
    draw = torch.Generator().manual_seed(0)
    shapes = [(6, 5), (4, 3, 3, 3), (7,), ()]
    weights = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    with torch.no_grad():
        weights[0][2] = 0.0  # a unit that starts at zero may still move
    gradients = [torch.randn(shape, generator=draw) * 0.3 for shape in shapes]
    gradients[0][1] = 0.0
    expected = [by_unit(w, g, 0.2) for w, g in zip(weights, gradients, strict=True)]
    changed = [~np.isclose(e, g.numpy()) for e, g in zip(expected, gradients, strict=True)]
    units = np.concatenate([c.reshape(len(c), -1).any(1) if c.ndim > 1 else [c.any()] for c in changed])
    share = clip_adaptive_(weights, gradients, 0.2)
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-9)
    assert 0 < units.mean() < 1 and share.item() == pytest.approx(units.mean())
    assert clip_adaptive_([], [], 0.2).item() == 0  # where all but the head is frozen


def test_the_head_is_its_weight_and_its_bias(inputs):
    classifier = set_up_run(inputs).module.classifier
    assert isinstance(classifier, Classifier)
    named = {id(p): name for name, p in classifier.named_parameters()}
    assert {named[id(p)].split(".")[-1] for p in head_parameters(classifier)} == {"weight", "bias"}
    assert all(p.shape[0] == 3 for p in head_parameters(classifier))
    assert head_parameters(nn.Sequential(nn.ReLU())) == set()


def clip_by(kind, most):
    def change(classifier, step):
        if kind == "gradient_clip_value":
            nn.utils.clip_grad_value_(classifier.parameters(), most)
        elif kind == "gradient_clip":
            nn.utils.clip_grad_norm_(classifier.parameters(), most)
        else:
            head = head_parameters(classifier)
            for p in classifier.parameters():
                if p not in head:
                    p.grad.copy_(torch.from_numpy(by_unit(p, p.grad, most)))

    return change


@pytest.mark.parametrize("kind", ["gradient_clip", "gradient_clip_value", "gradient_clip_adaptive"])
def test_a_clip_acts_on_the_gradient_of_the_whole_step(inputs, kind):
    begun, state, figures = trained(inputs, {kind: 0.01}, batch={"size": SIZE, "microbatch": 8})
    expected = by_hand(inputs, copy.deepcopy(begun), clip_by(kind, 0.01))
    assert largest_difference(state, expected) < 1e-6
    assert largest_difference(state, by_hand(inputs, copy.deepcopy(begun))) > 1e-3
    assert figures[0]["clip/share"] == 1
    assert ("clip/units" in figures[0]) == (kind == "gradient_clip_adaptive")
    assert 0 < figures[0].get("clip/units", 1) <= 1
    # A bound that nothing reaches changes nothing.
    begun, state, figures = trained(inputs, {kind: 1e6})
    assert figures[0]["clip/share"] == 0 and figures[0].get("clip/units", 0) == 0
    assert largest_difference(state, trained(inputs, {})[1]) == 0


def test_a_value_on_the_bound_is_not_clipped():
    gradients = [torch.tensor([1.0, -1.0]), torch.tensor([0.5])]
    assert clip_value_(gradients, 1.0).item() == 0 and clip_value_(gradients, 0.75).item() == 1
    assert gradients[0].tolist() == [0.75, -0.75]


# ---- mixed precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "regularization",
    [
        {"gradient_clip": 0.05},
        {"gradient_clip_value": 0.01},
        {"gradient_clip_adaptive": 0.02},
        {"gradient_noise": {"std": 0.05, "decay": 0.55}, "l2": 0.1, "max_norm": 0.7},
    ],
    ids=lambda chosen: next(iter(chosen)),
)
@pytest.mark.parametrize("scale", [2.0**10, 2.0**40], ids=["", "overflowing"])
def test_sixteen_bit_gradients_are_clipped_and_disturbed_unscaled(inputs, regularization, scale):
    """Lightning's 16-mixed, on a CPU for the test's sake; where the scale overflows, the first steps are skipped."""
    states = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=scale)):
        last = LastWeights()
        batch = {"size": SIZE, "microbatch": 16, "noise_microbatches": 0}
        mixed = {"precision": None, "plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]} if scaler else {}
        with quiet():
            setup = set_up_run(inputs, **{**PLAIN, "regularization": regularization, "batch": batch})
            setup.trainer([last], **mixed).fit(setup.module, datamodule=setup.data_module())
        states.append(last.state)
        assert math.isfinite(last.figures[-1].get("clip/share", 0.0))
    difference = largest_difference(*states)
    assert math.isfinite(difference)
    assert scale > 2.0**20 or difference < 1e-3


# ---- together -------------------------------------------------------------------------------------------------------

ALL = {
    "l1": 1e-4,
    "l2": 1e-3,
    "max_norm": 1.0,
    "gradient_noise": {"std": 0.01, "decay": 0.55},
    "gradient_clip_adaptive": 0.02,
    "mixup": {"alpha": 0.4, "probability": 0.5},
    "cutmix": {"alpha": 1.0, "probability": 0.9},
    "cutmix_share": 0.3,
}
OFF = ("penalty/", "clip/", "gradient_noise/", "max_norm/", "mixed/", "sampling/")


def test_all_at_once_repeats_to_the_byte_and_what_is_off_is_not_measured(inputs, tmp_path):
    options = {
        "regularization": ALL,
        "loss": {"name": "focal"},
        "batch": {"size": 32, "microbatch": 16, "sampling": "balanced"},
    }
    logged = []
    train(inputs, tmp_path / "a", log=lambda metrics, step: logged.append(metrics), **options)
    train(inputs, tmp_path / "b", **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    epochs = [metrics for metrics in logged if "epoch" in metrics]
    names = {name for name in epochs[0] if name.startswith(OFF)}
    assert names == {
        "penalty/l1",
        "penalty/l2",
        "clip/share",
        "clip/units",
        "gradient_noise/norm",
        "max_norm/share",
        "mixed/share",
        "sampling/repeats",
    }
    mixing = {"mixup_probability": 0.5, "cutmix_probability": 0.9, "cutmix_share": 0.3}
    for epoch, metrics in enumerate(epochs):
        chosen = [choose(0.4, 1.0, **mixing, seed=0, epoch=epoch, microbatch=i) for i in range(6)]
        assert metrics["mixed/share"] == pytest.approx(sum(c is not None for c in chosen) / 6)
    train(inputs, tmp_path / "c", log=lambda metrics, step: logged.append(metrics))
    assert not any(name.startswith(OFF) for name in logged[-1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"regularization": {"gradient_clip": 1.0, "gradient_clip_adaptive": 0.01}},
            r"regularization\.gradient_clip_adaptive: found 0\.01 with regularization\.gradient_clip 1,.*null for all but",
        ),
        (
            {"regularization": {"gradient_clip_value": 1.0, "gradient_clip_adaptive": 0.01}},
            r"gradient_clip_adaptive: found 0\.01 with regularization\.gradient_clip_value 1,",
        ),
        *(
            (
                {"optimizer": {"name": "LBFGS"}, "regularization": {name: value}},
                rf"regularization\.{name}.*: found 0\.1 with LBFGS",
            )
            for name, value in {
                "gradient_clip_value": 0.1,
                "gradient_clip_adaptive": 0.1,
                "gradient_noise": {"std": 0.1},
                "max_norm": 0.1,
            }.items()
        ),
        *(
            (
                {"optimizer": {"name": "Rprop"}, "regularization": {name: 0.1}},
                rf"regularization\.{name}: found 0\.1 with Rprop",
            )
            for name in ("gradient_clip", "gradient_clip_value", "gradient_clip_adaptive")
        ),
        *(
            (
                {**NO_NORM, "regularization": {name: {"alpha": 0.4}}, "batch": {"size": 32, "microbatch": 1}},
                rf"regularization\.{name}\.alpha: found 0\.4 with batch\.microbatch 1,",
            )
            for name in ("mixup", "cutmix")
        ),
    ],
)
def test_what_does_not_go_together_is_refused(inputs, tmp_path, overrides, message):
    with pytest.raises(ParamsError, match=message):
        train(inputs, tmp_path / "a", **overrides)
    assert list(tmp_path.iterdir()) == []


def test_noise_of_a_resumed_run_is_that_of_the_whole(inputs, tmp_path):
    """The step is the key, and nothing of it is state."""

    class Save(LastWeights):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    options = {**NO_NORM, "regularization": ALL, "batch": {"size": 32, "microbatch": 32, "sampling": "balanced"}}
    whole, rest = Save(), LastWeights()
    with quiet():
        setup = set_up_run(inputs, **options)
        setup.trainer([whole]).fit(setup.module, datamodule=setup.data_module())
        again = set_up_run(inputs, **options)
        path = tmp_path / "half.ckpt"
        again.trainer([rest]).fit(again.module, datamodule=again.data_module(), ckpt_path=path, weights_only=True)
    assert largest_difference(whole.state, rest.state) == 0
    assert whole.figures[1:] == rest.figures


def test_the_chosen_sections_say_so(inputs):
    module = set_up_run(inputs, regularization=ALL).module
    chosen = sections(regularization=ALL)["regularization"]
    assert (module.l1, module.l2, module.max_norm) == (chosen.l1, chosen.l2, chosen.max_norm)
    assert module.mixing == {
        "mixup_alpha": 0.4,
        "cutmix_alpha": 1.0,
        "mixup_probability": 0.5,
        "cutmix_probability": 0.9,
        "cutmix_share": 0.3,
    }
