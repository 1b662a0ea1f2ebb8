"""What the telemetry of a run says, against the optimizers themselves and against weights kept by hand."""

from __future__ import annotations

import csv
import itertools
import math
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from anneal.optimizers.muon import MuonWithAdamW
from anneal.optimizers.sam import SAM
from anneal.training import history
from anneal.training.dynamics import RATES, Dynamics, Places, effective_rates, layers_of
from anneal.training.history import Steps, step_interval
from anneal.training.setup import set_up
from tests.test_training import NO_NORM, LastWeights, sections, train, write_inputs

CONSTANT = {"schedule": {"name": "constant", "warmup": {"length": 0.0}}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


# ---- effective rates ------------------------------------------------------------------------------------------------


def unbiased(group, state, gradient):
    return state["exp_avg"] / (1 - group["betas"][0] ** float(state["step"]))


def nesterov(group, state, gradient):
    beta, decay, step = group["betas"][0], group["momentum_decay"], float(state["step"])
    now, then = (beta * (1 - 0.5 * 0.96 ** (t * decay)) for t in (step, step + 1))
    product = float(state["mu_product"])
    return (1 - now) / (1 - product) * gradient + then / (1 - product * then) * state["exp_avg"]


def plain(group, state, gradient):
    return gradient


CASES = {
    "SGD": [({"lr": 0.1}, plain), ({"lr": 0.1, "momentum": 0.9}, lambda g, s, _: s["momentum_buffer"])],
    "Adagrad": [({"lr": 0.1}, plain), ({"lr": 0.1, "lr_decay": 0.5, "eps": 0.1}, plain)],
    "RMSprop": [({"lr": 0.1, "alpha": 0.9}, plain), ({"lr": 0.1, "alpha": 0.9, "centered": True}, plain)],
    "Adadelta": [({"lr": 1.0}, plain), ({"lr": 0.5, "rho": 0.5}, plain)],
    "Adam": [
        ({"lr": 0.1, "betas": (0.0, 0.9)}, plain),
        ({"lr": 0.1, "eps": 0.1}, unbiased),
        ({"lr": 0.1, "betas": (0.9, 0.5), "amsgrad": True}, unbiased),
    ],
    "AdamW": [({"lr": 0.1, "weight_decay": 0.0}, unbiased)],
    "NAdam": [({"lr": 0.1}, nesterov)],
    # The variance is rectified from about the sixth step on.
    "RAdam": [({"lr": 0.1, "betas": (0.9, 0.9)}, unbiased), ({"lr": 0.1, "eps": 0.1}, unbiased)],
    "Adamax": [({"lr": 0.1, "betas": (0.9, 0.9)}, unbiased)],
    "Rprop": [({"lr": 0.1, "step_sizes": (1e-6, 1.0)}, lambda g, s, gradient: gradient.sign())],
}
"""Optimizer to arguments and to what its rate multiplies."""


def steps_of(optimizer, parameters, gradients):
    """Make a step with each row of gradients; give the rates and updates of each."""
    places = Places(parameters)
    for row in gradients:
        before = [p.detach().clone() for p in parameters]
        for parameter, gradient in zip(parameters, row, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        updates = [p.detach() - old for p, old in zip(parameters, before, strict=True)]
        sampled = [places.take(i, gradient) for i, gradient in enumerate(row)]
        yield effective_rates(optimizer, parameters, updates, sampled, places), updates


def test_every_formula_has_a_case():
    assert CASES.keys() == RATES.keys()


@pytest.mark.parametrize(("name", "case"), [(name, i) for name in CASES for i in range(len(CASES[name]))])
def test_the_rate_is_what_the_optimizer_multiplies_by(name, case):
    arguments, direction = CASES[name][case]
    draw = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size, generator=draw, dtype=torch.float64)) for size in ((3, 4), (5,))]
    # Two groups at two rates; Rprop makes no step where a gradient has changed its sign.
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.3 * arguments["lr"]}]
    optimizer = getattr(torch.optim, name)(groups, **arguments)
    rows = [[torch.rand(p.shape, generator=draw, dtype=torch.float64) + 0.1 for p in parameters] for _ in range(12)]
    if name != "Rprop":
        rows = [[g - 0.5 for g in row] for row in rows]
    for row, (rates, updates) in zip(rows, steps_of(optimizer, parameters, rows), strict=True):
        directions = [
            direction(group, optimizer.state[p], g)
            for group, p, g in zip(optimizer.param_groups, parameters, row, strict=True)
        ]
        moved = torch.cat([u.flatten() for u in updates])
        torch.testing.assert_close(rates * torch.cat([d.flatten() for d in directions]), -moved, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["Adagrad", "Adam", "RAdam", "NAdam", "RMSprop"])
def test_a_scalar_between_large_weights_is_no_count_of_steps(name):
    parameters = [nn.Parameter(torch.ones(size)) for size in ((4, 5), (), (3,))]
    optimizer = getattr(torch.optim, name)(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    places = Places(parameters, largest=3)
    assert places.stride > 1 and len(places.take(1, parameters[1].detach())) == 0
    rates = effective_rates(optimizer, parameters, parameters, [torch.ones(())] * 3, places)
    assert len(rates) == sum(len(places.take(i, p.detach())) for i, p in enumerate(parameters)) > 0


@pytest.mark.parametrize("name", ["ASGD", "Adafactor"])
def test_other_optimizers_are_measured(name):
    assert name not in RATES
    parameter = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0]]))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1)
    ((rates, (update,)),) = steps_of(optimizer, [parameter], [[torch.tensor([[0.5, 0.0, -2.0]])]])
    wanted = update.abs() / torch.tensor([[0.5, 1.0, 2.0]])
    torch.testing.assert_close(rates, wanted[0, [0, 2]])


def test_the_rates_of_a_wrapper_are_those_of_the_optimizers_inside():
    draw = torch.Generator().manual_seed(0)
    kernel, bias = (nn.Parameter(torch.randn(size, generator=draw)) for size in ((3, 4), (5,)))
    rest = torch.optim.AdamW([bias], lr=0.1, weight_decay=0.0)
    optimizer = MuonWithAdamW([{"params": [kernel]}], rest, lr=0.1)
    rows = [[torch.randn(p.shape, generator=draw) for p in (kernel, bias)] for _ in range(3)]
    for row, (rates, (moved, shifted)) in zip(rows, steps_of(optimizer, [kernel, bias], rows), strict=True):
        torch.testing.assert_close(rates[:12], (moved / row[0]).abs().flatten())
        direction = unbiased(rest.param_groups[0], rest.state[bias], None)
        torch.testing.assert_close(rates[12:] * direction, -shifted, rtol=1e-4, atol=1e-6)
    base = torch.optim.Adagrad([bias], lr=0.1)
    optimizer = SAM(base, rho=0.05)
    optimizer.step(lambda: (bias.grad.copy_(torch.arange(5.0)), torch.zeros(()))[1])
    rates = effective_rates(optimizer, [bias], [torch.ones(5)], [torch.ones(5)], Places([bias]))
    torch.testing.assert_close(rates, 0.1 / torch.arange(1, 5.0))


@pytest.mark.parametrize("name", ["Adagrad", "RMSprop", "Adadelta", "Adam", "Adamax"])
def test_what_never_had_a_gradient_has_no_rate(name):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = getattr(torch.optim, name)(parameters, lr=0.1)
    ((rates, _),) = steps_of(optimizer, parameters, [[torch.tensor([1.0, 0.0, 1.0]), torch.zeros(2)]])
    assert len(rates) == 2 and float(rates.max()) < 1.0
    idle = nn.Parameter(torch.ones(4))
    assert len(effective_rates(optimizer, [idle], [torch.zeros(4)], [None], Places([idle]))) == 0


def test_adagrads_rates_only_shrink_and_rmsprops_recover():
    # Gradients of 1 for 20 steps, then of 0.01: RMSProp forgets the large ones within some 1 / (1 - alpha) steps.
    curves = {}
    for name, arguments in (("Adagrad", {"lr": 0.1}), ("RMSprop", {"lr": 0.1, "alpha": 0.9})):
        parameter = nn.Parameter(torch.zeros(10))
        optimizer = getattr(torch.optim, name)([parameter], **arguments)
        rows = [[torch.full((10,), size)] for size in [1.0] * 20 + [0.01] * 100]
        curves[name] = [float(rates.median()) for rates, _ in steps_of(optimizer, [parameter], rows)]
    assert all(b < a for a, b in zip(curves["Adagrad"], curves["Adagrad"][1:], strict=False))
    assert curves["Adagrad"][-1] == pytest.approx(0.1 / math.sqrt(20.01), rel=1e-3)
    assert curves["RMSprop"][19] < 0.12
    assert curves["RMSprop"][-1] == pytest.approx(0.1 / 0.01, rel=0.2)


def test_places_are_spread_over_all_tensors():
    tensors = [torch.zeros(4, 3, 3, 3), torch.zeros(7), torch.zeros(11, 5)]
    total = sum(t.numel() for t in tensors)
    numbered = torch.arange(total).split([t.numel() for t in tensors])
    for largest in (1, 3, 10, 40, 1000):
        places = Places(tensors, largest)
        taken = torch.cat(
            [places.take(i, n.view(t.shape)) for i, (n, t) in enumerate(zip(numbered, tensors, strict=True))]
        )
        assert taken.tolist() == list(range(0, total, places.stride)) and len(taken) <= largest
        assert math.gcd(places.stride, 210) == 1
    assert Places(tensors, 1000).stride == 1
    # The order is that of the values, whatever the memory.
    kernel = torch.randn(4, 3, 3, 3)
    assert torch.equal(
        Places([kernel], 20).take(0, kernel.to(memory_format=torch.channels_last)), kernel.flatten()[::11]
    )


# ---- against weights kept by hand -----------------------------------------------------------------------------------


class Witness(pl.Callback):
    """Keep the weights before the first and after each optimizer step, and the gradients before clipping."""

    def on_train_start(self, trainer, pl_module):
        self.layers = layers_of(pl_module.classifier.network)
        self.kept, self.gradients, self.ends = [self.copy()], {}, []

    def copy(self):
        return {name: torch.cat([p.detach().double().flatten() for p in own]) for name, own in self.layers.items()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {name: math.hypot(*(float(p.grad.norm()) for p in own)) for name, own in self.layers.items()}
        self.gradients.setdefault(trainer.global_step, gradients)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == len(self.kept):
            self.kept.append(self.copy())

    def on_validation_end(self, trainer, pl_module):
        self.ends.append(trainer.global_step)


RUNS = {
    "whole windows": {"batch": {"size": 32, "microbatch": 32}},
    "accumulation": {"batch": {"size": 64, "microbatch": 16}, "regularization": {"gradient_clip": 0.1}},
    "growth": {"batch": {"size": 32, "microbatch": 16, "growth": {"at": [0.34, 0.67]}}},
    "one step an epoch": {"batch": {"size": 150, "microbatch": 50}},
    "several evaluations a step": {
        "optimizer": {"name": "LBFGS", "LBFGS": {"lr": 0.5, "max_iter": 3}},
        "batch": {"size": 64, "microbatch": 64},
        **NO_NORM,
    },
    "sharpness-aware": {"optimizer": {"sam": {"rho": 0.05}}, "batch": {"size": 64, "microbatch": 64}},
    "two optimizers in one": {"optimizer": {"name": "Muon"}},
}


@pytest.mark.parametrize("name", RUNS)
def test_ratios_and_cosines_are_those_of_the_weights(inputs, tmp_path, name):
    witness = Witness()
    result = train(inputs, tmp_path / "a", callbacks=(witness,), trainer={"epochs": 3}, **CONSTANT, **RUNS[name])
    kept, ends = witness.kept, witness.ends
    rows = {(int(row["epoch"]), row["layer"]): row for row in table(tmp_path / "a", "layers.csv")}
    assert list(rows) == [(epoch, layer) for epoch in range(4) for layer in witness.layers]
    for layer, weights in kept[0].items():
        row = rows[0, layer]
        assert int(row["num_parameters"]) == len(weights)
        assert float(row["weight_norm"]) == pytest.approx(float(weights.norm()), rel=1e-5)
        assert float(row["grad_norm"]) == pytest.approx(witness.gradients[0][layer], rel=1e-4)
        assert row["update_ratio"] == ""
    assert len(ends) == 3 and len(kept) == ends[-1] + 1
    for epoch, (row, end) in enumerate(zip(result.rows, ends, strict=True), start=1):
        before, after = kept[end - 1], kept[end]
        update = {layer: after[layer] - before[layer] for layer in before}
        ratios = []
        for layer in before:
            found = rows[epoch, layer]
            ratios.append(float(update[layer].norm() / before[layer].norm()))
            assert float(found["weight_norm"]) == pytest.approx(float(before[layer].norm()), rel=1e-5)
            assert float(found["grad_norm"]) == pytest.approx(witness.gradients[end - 1][layer], rel=1e-4)
            assert float(found["update_ratio"]) == pytest.approx(ratios[-1], rel=1e-3)
        assert row.update_ratio == pytest.approx(median(ratios), rel=1e-3)
        if end == 1:
            assert row.update_cosine is None
            continue
        a = torch.cat([update[layer] for layer in before])
        b = torch.cat([before[layer] - kept[end - 2][layer] for layer in before])
        assert row.update_cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-4)
    assert all(row.rate_low <= row.rate_median <= row.rate_high for row in result.rows)


def test_the_last_gradient_is_that_of_steps_csv(inputs, tmp_path):
    options = {"batch": {"size": 64, "microbatch": 16}, "regularization": {"gradient_clip": 0.1, "l1": 1e-3}}
    train(inputs, tmp_path / "a", **options)
    norms = {row["step"]: float(row["grad_norm"]) for row in table(tmp_path / "a", "steps.csv")}
    rows = table(tmp_path / "a", "layers.csv")
    for epoch, step in (("0", "1"), ("1", "3"), ("2", "6")):
        layers = [float(row["grad_norm"]) for row in rows if row["epoch"] == epoch]
        assert math.hypot(*layers) == pytest.approx(norms[step], rel=1e-5)


def test_a_measured_rate_is_that_of_the_clipped_gradient(inputs, tmp_path):
    # ASGD without decay is SGD; its rate is measured.
    optimizer = {"name": "ASGD", "ASGD": {"lr": 0.05, "lambd": 0.0, "weight_decay": 0.0}}
    options = {"optimizer": optimizer, "regularization": {"gradient_clip": 0.05}, **CONSTANT, **NO_NORM}
    for row in train(inputs, tmp_path / "a", **options).rows:
        assert row.grad_norm > 0.1
        assert row.rate_median == pytest.approx(0.05, rel=1e-2)


def test_adagrads_rates_fall_epoch_by_epoch(inputs, tmp_path):
    rows = train(inputs, tmp_path / "a", optimizer={"name": "Adagrad"}, trainer={"epochs": 5}, **CONSTANT).rows
    assert {row.lr for row in rows} == {rows[0].lr}
    for figure in ("rate_low", "rate_median", "rate_high"):
        values = [getattr(row, figure) for row in rows]
        assert all(b < a for a, b in itertools.pairwise(values)), figure


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_measuring_leaves_the_weights_alone(inputs, tmp_path, optimizer):
    measured, unmeasured = LastWeights(), LastWeights()
    options = {"optimizer": {"name": optimizer}, "batch": {"size": 32, "microbatch": 16}}
    train(inputs, tmp_path / "a", callbacks=(measured,), **options)
    chosen = sections(**options)
    setup = set_up(store=inputs[0], augmented=inputs[1], seed=0, **chosen)
    runner = setup.trainer([unmeasured])
    assert not any(isinstance(callback, Dynamics | Steps) for callback in runner.callbacks)
    runner.fit(setup.module, datamodule=setup.data_module())
    assert measured.state.keys() == unmeasured.state.keys()
    for name, tensor in measured.state.items():
        assert torch.equal(tensor, unmeasured.state[name]), name


# ---- steps.csv ------------------------------------------------------------------------------------------------------


def test_steps_make_up_the_epochs(inputs, tmp_path):
    logged = []
    options = {
        "batch": {"size": 32, "microbatch": 16, "growth": {"at": [0.5]}},
        "regularization": {"l1": 1e-2, "dropout": 0.2},
    }
    result = train(inputs, tmp_path / "a", log=lambda metrics, step: logged.append((metrics, step)), **options)
    rows = [{name: float(value) for name, value in row.items()} for row in table(tmp_path / "a", "steps.csv")]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    for epoch, first, samples in ((0, 0, [32, 32, 32, 32, 22]), (1, 5, [64, 64, 22])):
        mine, row = rows[first : first + len(samples)], result.rows[epoch]
        losses = [step["loss"] for step in mine]
        assert np.average(losses, weights=samples) == pytest.approx(row.train_loss, rel=1e-9)
        assert np.mean([step["grad_norm"] for step in mine]) == pytest.approx(row.grad_norm, rel=1e-5)
        assert mine[-1]["lr"] == row.lr
    steps = [({name.removeprefix("step/"): v for name, v in m.items()}, s) for m, s in logged if "step/loss" in m]
    assert steps == [({name: row[name] for name in ("loss", "lr", "grad_norm")}, row["step"]) for row in rows]


@pytest.mark.parametrize(("most", "steps"), [(12, range(1, 13)), (11, range(1, 13, 2)), (5, range(1, 13, 3)), (1, [1])])
def test_a_long_run_keeps_every_kth_step(inputs, tmp_path, monkeypatch, most, steps):
    options = {"batch": {"size": 64, "microbatch": 16}, "trainer": {"epochs": 4}}
    train(inputs, tmp_path / "all", **options)
    monkeypatch.setattr(history, "MOST_STEPS", most)
    assert len(range(0, 12, step_interval(12))) <= most
    train(inputs, tmp_path / "a", **options)
    whole = table(tmp_path / "all", "steps.csv")
    assert table(tmp_path / "a", "steps.csv") == [whole[step - 1] for step in steps]


# ---- several processes ----------------------------------------------------------------------------------------------

PROCESSES = """
import sys, traceback
import torch.distributed as dist
from pathlib import Path

def silent(function):
    def guarded(*arguments, **options):
        stack = [frame.filename for frame in traceback.extract_stack()]
        assert not any(name.endswith("dynamics.py") for name in stack), "the telemetry communicates"
        return function(*arguments, **options)
    return guarded

for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "reduce", "barrier"):
    setattr(dist, name, silent(getattr(dist, name)))

sys.path.insert(0, {root!r})
from tests.test_training import train

inputs = Path({store!r}), Path({augmented!r})
train(inputs, Path(sys.argv[1]), batch=dict(size=64, microbatch=16), optimizer=dict(name="AdamW"),
      hardware=dict(devices=int(sys.argv[2])))
"""


@pytest.mark.long
def test_two_processes_measure_the_same(inputs, tmp_path):
    script = tmp_path / "script.py"
    root = str(Path(__file__).parents[1])
    script.write_text(PROCESSES.format(root=root, store=str(inputs[0]), augmented=str(inputs[1])))
    for devices in ("1", "2"):
        command = [sys.executable, str(script), str(tmp_path / devices), devices]
        done = subprocess.run(command, timeout=300, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name in ("history.csv", "steps.csv", "layers.csv"):
        one, two = (table(tmp_path / devices, name) for devices in ("1", "2"))
        assert len(one) == len(two) > 1
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            for column in a.keys() - {"layer", "noise_scale"}:
                if a[column] or b[column]:
                    assert float(a[column]) == pytest.approx(float(b[column]), rel=2e-3, abs=1e-4), (name, column)
