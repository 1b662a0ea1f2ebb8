"""Batch normalisation: over devices, frozen, recalibrated, folded, measured. The layers themselves: test_models.py."""

import copy
import csv
import hashlib
import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from anneal.evaluation import load_members
from anneal.models.build import build_network, load_classifier
from anneal.models.config import conflicts
from anneal.models.folding import fold, foldable
from anneal.models.layers import Dropout
from anneal.models.norms import NORMS, FrozenBatchNorm, SyncedBatchNorm
from anneal.models.recalibration import recalibrate
from anneal.optimizers.build import build_optimizer
from anneal.params import ParamsError
from anneal.store import open_store
from anneal.training.dynamics import Layer
from anneal.training.module import WindowNorms, frozen_statistics
from anneal.training.norm_health import MeasureNorms, NormHealth, figures, norm_health
from anneal.training.recalibrate import recalibration_batches
from tests.test_training import SIDE, largest_difference, sections, train, write_inputs

ARCHITECTURES = {
    "resnet": {"widths": [8, 16], "depths": [1, 1], "stem": "small", "block": "basic"},
    "bottleneck": {"widths": [8, 16], "depths": [1, 1], "stem": "large", "block": "bottleneck"},
    "preact_resnet": {"widths": [8, 16], "depths": [1, 1], "stem": "small"},
    "wide_resnet": {"depth": 10, "width": 1, "block_dropout": 0.1},
    "convnext": {"widths": [8, 16], "depths": [1, 1], "stem": 2, "kernel": 3, "layer_scale": 1.0},
    "airbench": {"widths": [8, 16], "scale": 0.111},
    "convnet": {"widths": [8, 16], "depth": 2},
    "mlp": {"hidden": [16, 8]},
}
# Norms that follow a weight layer at once, and all norms.
FOLDED = {
    ("resnet", "before"): (6, 6),
    ("resnet", "after"): (1, 6),
    ("bottleneck", "before"): (9, 9),
    ("bottleneck", "after"): (2, 9),
    ("preact_resnet", "before"): (2, 5),
    ("preact_resnet", "after"): (0, 5),
    ("wide_resnet", "before"): (3, 7),
    ("wide_resnet", "after"): (0, 7),
    ("convnext", "before"): (3, 5),
    ("airbench", "before"): (2, 4),
    ("airbench", "after"): (0, 4),
    ("convnet", "before"): (4, 4),
    ("convnet", "after"): (0, 4),
    ("mlp", "before"): (2, 2),
    ("mlp", "after"): (0, 2),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def network_of(name="resnet", position="before", side=12, **norm):
    kind = "resnet" if name == "bottleneck" else name
    network = build_network(
        kind,
        arguments=ARCHITECTURES[name],
        num_classes=3,
        in_channels=1,
        height=side,
        width=side,
        norm_position=position,
        norm_arguments=norm,
    )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in norms_of(network):
            layer.running_mean.normal_(0, 0.5, generator=draw)
            layer.running_var.uniform_(0.5, 2, generator=draw)
            if layer.affine:
                layer.weight.normal_(1, 0.5, generator=draw)
                layer.bias.normal_(0, 0.5, generator=draw)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.normal_(0, layer.weight[0].numel() ** -0.5, generator=draw)
    return network


def norms_of(network):
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def images(number, side=12, seed=0):
    return torch.randn(number, 1, side, side, generator=torch.Generator().manual_seed(seed))


def copied(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# ---- over devices: see test_devices.py ------------------------------------------------------------------------------


class Final(pl.Callback):
    """Keep the weights of the last step, of each process."""

    def __init__(self, out):
        self.out = out

    def on_train_end(self, trainer, pl_module):
        state = {key: value.contiguous() for key, value in pl_module.classifier.state_dict().items()}
        save_file(state, f"{self.out}-{trainer.global_rank}.safetensors")


@pytest.mark.parametrize("vector", [False, True])
def test_sync_without_other_processes_is_plain(vector):
    plain, synced = NORMS["batch"][vector](4), NORMS["batch"][vector](4, sync=True)
    assert isinstance(synced, SyncedBatchNorm) and type(plain) in (nn.BatchNorm1d, nn.BatchNorm2d)
    x = torch.randn(6, 4, *([] if vector else [3, 3]))
    for train_mode in (True, False):
        assert torch.equal(plain.train(train_mode)(x), synced.train(train_mode)(x))
    assert same(plain.state_dict(), synced.state_dict())


# ---- frozen ---------------------------------------------------------------------------------------------------------


def test_frozen_normalises_by_its_statistics_and_trains_nothing_of_itself():
    frozen, plain = network_of(frozen=True), network_of()
    assert all(isinstance(layer, FrozenBatchNorm) for layer in norms_of(frozen))
    assert frozen.state_dict().keys() == plain.state_dict().keys()
    frozen.load_state_dict(plain.state_dict())
    x, before = images(8), copied(frozen)
    assert torch.equal(frozen.train()(x), plain.eval()(x))
    with frozen_statistics(frozen):
        assert torch.equal(frozen(x), plain(x))
    optimizer = build_optimizer(
        frozen,
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": False, "weight_decay": 0.1},
        decay_exempt=[],
        lr_factors={"first": 1.0, "head": 1.0, "layer_decay": 1.0},
        sam={"rho": 0.0, "adaptive": False},
    )
    window = WindowNorms(frozen)
    frozen.requires_grad_(True)  # as unfreezing does
    for number in (8, 4):
        window.before(number, first=number == 8)
        frozen(images(number)).square().sum().backward()
    window.close()
    optimizer.step()
    recalibrate(frozen, [images(8)])
    after = frozen.state_dict()
    of_norms = {
        f"{name}.{key}" for name, m in frozen.named_modules() if isinstance(m, _BatchNorm) for key in m.state_dict()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert of_norms and changed == before.keys() - of_norms


def test_frozen_norms_of_a_trained_member_stay_as_they_were(inputs, tmp_path):
    train(inputs, tmp_path / "a")
    pinned = hashlib.sha256((tmp_path / "a" / "weights.safetensors").read_bytes()).hexdigest()
    model = {"norm": {"batch": {"frozen": True}}, "start_from": {"path": str(tmp_path / "a"), "sha256": pinned}}
    train(inputs, tmp_path / "b", seed=1, model=model, init={"zero_last": True})
    before, after = (load_file(tmp_path / name / "weights.safetensors") for name in "ab")
    kept = {name for name in before if torch.equal(before[name], after[name])}
    norms = {
        name for name, module in load_classifier(tmp_path / "b")[0].named_modules() if isinstance(module, _BatchNorm)
    }
    assert {name.rpartition(".")[0] for name in kept if not name.startswith("normalization")} == norms
    assert {name for name in before if name.rpartition(".")[0] in norms} <= kept and len(norms) == 6
    layers = list(csv.DictReader((tmp_path / "b" / "layers.csv").read_text().splitlines()))
    assert not any(row["norm_gap"] or f"network.{row['layer']}" in norms for row in layers)


def test_frozen_without_scale():
    layer = NORMS["batch"][False](3, frozen=True, affine=False)
    assert torch.allclose(layer(torch.ones(2, 3, 1, 1)), torch.ones(2, 3, 1, 1), atol=1e-4) and layer.weight is None


# ---- what does not go together --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        ({"frozen": True, "sync": True}, "model.norm.batch.sync: found true with model.norm.batch.frozen"),
        ({"frozen": True, "ghost": 8}, "model.norm.batch.ghost: found 8 with model.norm.batch.frozen"),
        ({"sync": True, "ghost": 8}, "model.norm.batch.ghost: found 8 with model.norm.batch.sync"),
    ],
)
def test_kinds_of_batch_norm_exclude_each_other(norm, message):
    faults = conflicts(
        "resnet", arguments=ARCHITECTURES["resnet"], height=12, width=12, norm_arguments=norm, microbatch=16
    )
    assert len(faults) == 1 and faults[0].startswith(message) and "allowed: " in faults[0]
    assert not conflicts(
        "resnet",
        arguments=ARCHITECTURES["resnet"],
        height=12,
        width=12,
        norm="group",
        norm_arguments=norm | {"groups": 8},
    )


def test_frozen_needs_statistics_to_keep(inputs, tmp_path):
    batch = {"frozen": True, "recalibrate": {"when": "always"}}
    with pytest.raises(ParamsError) as error:
        train(inputs, tmp_path / "a", model={"norm": {"batch": batch}})
    found = str(error.value)
    assert "model.norm.batch.frozen: found true with model.start_from.path null" in found
    assert "model.norm.batch.recalibrate.when: found always" in found
    assert not (tmp_path / "a").exists()
    assert sections(model={"norm": {"name": "group", "batch": batch}})


# ---- recalibration --------------------------------------------------------------------------------------------------


def test_statistics_are_plain_means_over_batches_of_what_training_sees():
    torch.manual_seed(0)
    first, second = nn.Linear(5, 4), nn.Linear(4, 3)
    network = nn.Sequential(first, nn.BatchNorm1d(4), nn.ReLU(), Dropout(0.5), second, nn.BatchNorm1d(3, momentum=None))
    batches = [torch.randn(n, 5) * n for n in (4, 4, 7)]
    network.train()
    network(batches[0])
    network[0].eval()
    before = copied(network)
    recalibrate(network, iter(batches))

    def affine(x, layer):
        return x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()

    hidden = [affine(batch.double().numpy(), first) for batch in batches]
    normalized = [(h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) for h in hidden]
    deep = [affine(np.maximum(h, 0), second) for h in normalized]
    for layer, values in ((network[1], hidden), (network[5], deep)):
        np.testing.assert_allclose(layer.running_mean, np.mean([v.mean(0) for v in values], 0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer.running_var, np.mean([v.var(0, ddof=1) for v in values], 0), rtol=1e-5)
    after = network.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"{i}.running_{what}" for i in (1, 5) for what in ("mean", "var")
    }
    assert [module.training for module in network] == [False, True, True, True, True, True]
    assert network[1].momentum == 0.1 and network[5].momentum is None
    recalibrate(network, [])
    assert same(after, network.state_dict())


@pytest.mark.parametrize("norm", [{}, {"ghost": 4}, {"sync": True}])
def test_recalibration_agrees_with_torch_and_repeats_to_the_bit(norm):
    network, batches = network_of(**norm), [images(8, seed=i) for i in range(3)]
    other = copy.deepcopy(network).train()
    update_bn(batches, other)
    recalibrate(network, batches)
    once = {name: value for name, value in copied(network).items() if "tracked" not in name}
    theirs = {name: value for name, value in other.state_dict().items() if "tracked" not in name}
    assert largest_difference(once, theirs) < 1e-6
    recalibrate(network, batches)
    assert same(once, {name: value for name, value in network.state_dict().items() if "tracked" not in name})


def test_recalibration_draws_whole_batches_by_key(inputs):
    store = open_store(inputs[0])

    def drawn(images, microbatch, seed=0):
        return list(recalibration_batches(store, seed, images, microbatch))

    batches = drawn(100, 16)
    assert [batch.shape for batch in batches] == [(16, SIDE, SIDE, 1)] * 6 and batches[0].dtype == torch.uint8
    assert all(torch.equal(a, b) for a, b in zip(batches, drawn(100, 16), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(batches, drawn(40, 16), strict=False))
    assert not torch.equal(batches[0], drawn(100, 16, seed=1)[0])
    assert len({batch.numpy().tobytes() for batch in batches}) == 6
    assert [len(batch) for batch in drawn(10_000, 16)] == [16] * 9
    assert [len(batch) for batch in drawn(10_000, 500)] == [150]
    assert [len(batch) for batch in drawn(2, 16)] == [16]


def test_always_exports_what_was_validated_and_trains_the_same(inputs, tmp_path):
    runs = {}
    for when in ("never", "always"):
        out = tmp_path / when
        train(
            inputs,
            out,
            model={"norm": {"batch": {"recalibrate": {"when": when, "images": 128}}}},
            callbacks=(Final(out),),
        )
        runs[when] = (
            list(csv.DictReader((out / "history.csv").read_text().splitlines())),
            load_file(f"{out}-0.safetensors"),
        )
    (plain, a), (recalibrated, b) = runs.values()
    of_training = [column for column in plain[0] if not column.startswith(("val", "train_eval", "norm_gap"))]
    assert [[row[c] for c in of_training] for row in plain] == [[row[c] for c in of_training] for row in recalibrated]
    assert [row["val_loss"] for row in plain] != [row["val_loss"] for row in recalibrated]
    assert {name for name in a if not torch.equal(a[name], b[name])} == {n for n in a if "running" in n}

    classifier, _ = load_classifier(tmp_path / "always")
    exported = copied(classifier)
    store = open_store(inputs[0])
    recalibrate(classifier, recalibration_batches(store, 0, 128, 64))
    assert same(exported, classifier.state_dict())
    split = store.split("val")
    with torch.no_grad():
        logits = classifier(torch.from_numpy(split.take(np.arange(len(split)))))
    losses = [float(row["val_loss"]) for row in recalibrated]
    loss = float(nn.functional.cross_entropy(logits, torch.from_numpy(split.labels.copy())))
    assert min(abs(loss - value) for value in losses) < 1e-6


# ---- folding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "position"), FOLDED)
def test_folded_networks_compute_the_same(name, position):
    network, x = network_of(name, position).eval(), images(8)
    before = copied(network)
    folded = fold(network, x[:2])
    with torch.no_grad():
        expected, found = network(x), folded(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5) and expected.abs().max() > 0.02
    remaining, total = len(norms_of(folded)), len(norms_of(network))
    assert (total - remaining, total) == FOLDED[name, position]
    assert same(before, network.state_dict()) and type(folded) is type(network)
    # A norm is left only where it does not follow a weight layer, which the forward pass itself says.
    convolutions = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)


@pytest.mark.parametrize("norm", [{"sync": True}, {"frozen": True}, {"ghost": 4}, {"affine": False}, {"eps": 0.1}])
def test_every_kind_of_batch_norm_folds(norm):
    network, x = network_of(**norm).eval(), images(8)
    folded = fold(network, x)
    assert not norms_of(folded) and torch.allclose(folded(x), network(x), rtol=0, atol=1e-5)


class Branches(nn.Module):
    """What cannot be traced."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return self.layers(x) if x.sum() > 0 else x


class Twice(nn.Module):
    """One layer before two norms, and its output used beside the norm."""

    def __init__(self, beside):
        super().__init__()
        self.beside = beside
        self.layer, self.a, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        if self.beside:
            y = self.layer(x)
            return y + self.a(y)
        return self.b(self.layer(self.a(self.layer(x))))


class Clamped(nn.BatchNorm1d):
    """A norm that is more than a scale and a shift."""

    def forward(self, x):
        return super().forward(x).clamp(-3, 3)


def hooked():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    network[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return network


def normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4))


def untracked():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))


LEFT = {
    "branches": Branches,
    "twice": lambda: Twice(False),
    "beside": lambda: Twice(True),
    "hooked": hooked,
    "parametrized": normed,
    "another norm": lambda: nn.Sequential(nn.Linear(4, 4), Clamped(4)),
    "untracked": untracked,
    "training": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_folded_is_left_as_it_is(name):
    network = LEFT[name]()
    network.train(name == "training")
    x = torch.ones(3, 4)
    assert foldable(network) == [] and fold(network, x) is network


def test_a_norm_over_another_axis_than_the_layers_units_is_left():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    network[1].running_mean.copy_(torch.arange(4.0))
    assert fold(network, torch.ones(3, 4)) is not network
    assert fold(network, torch.ones(3, 4, 4)) is network


def test_evaluation_and_serving_fold_and_training_files_do_not(inputs, tmp_path):
    train(inputs, tmp_path / "a")
    plain, _ = load_classifier(tmp_path / "a")
    assert same(plain.state_dict(), load_file(tmp_path / "a" / "weights.safetensors"))
    (folded,), _ = load_members(open_store(inputs[0]), {"a": tmp_path / "a"}, "cpu")
    assert len(norms_of(plain)) == 6 and not norms_of(folded) and type(folded) is type(plain)
    batch = torch.from_numpy(open_store(inputs[0]).split("val").take(np.arange(40)))
    with torch.inference_mode():
        assert torch.allclose(folded(batch), plain(batch), rtol=0, atol=1e-5)


# ---- health ---------------------------------------------------------------------------------------------------------


def test_gaps_and_small_scales_are_those_of_the_formula():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)
    )
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([2.0, -0.02, 0.021, 0.0]))
        network[1].running_mean.copy_(torch.arange(4.0))
        network[1].running_var.copy_(torch.arange(1.0, 5.0))
    x = torch.randn(20, 5)
    before, modes = copied(network), [m.training for m in network.modules()]
    first, last = norm_health(network, x)
    assert same(before, network.state_dict()) and modes == [m.training for m in network.modules()]

    values = network[0](x).detach().double().numpy()
    mean, var = np.arange(4.0), np.arange(1.0, 5.0) + 1e-5
    gap = np.sqrt(np.mean((mean - values.mean(0)) ** 2 / var))
    variance_gap = np.sqrt(np.mean(np.log((values.var(0, ddof=1) + 1e-5) / var) ** 2))
    assert (first.layer, first.channels, first.small_scales) == ("1", 4, 0.5)
    assert first.gap == pytest.approx(gap, rel=1e-5) and first.variance_gap == pytest.approx(variance_gap, rel=1e-5)
    assert last.small_scales is None
    assert figures([first, last]) == {
        "norm/gap": pytest.approx((first.gap + last.gap) / 2),
        "norm/variance_gap": pytest.approx((first.variance_gap + last.variance_gap) / 2),
        "norm/small_scales": 0.5,
        "norm_gap/1": first.gap,
        "norm_gap/4": last.gap,
    }
    recalibrate(network, [x])
    assert all(h.gap < 1e-6 and h.variance_gap < 1e-5 for h in norm_health(network, x))
    nn.init.zeros_(network[1].weight)
    assert norm_health(network, x)[0].small_scales == 1.0
    assert norm_health(nn.Sequential(nn.Linear(5, 4), nn.GroupNorm(1, 4)), x) == [] and figures([]) == {}


def test_health_is_logged_each_epoch(inputs, tmp_path):
    seen = []
    train(inputs, tmp_path / "a", log=lambda metrics, step: seen.append(metrics))
    history = list(csv.DictReader((tmp_path / "a" / "history.csv").read_text().splitlines()))
    logged = [metrics for metrics in seen if "norm/gap" in metrics]
    assert [float(row["norm_gap"]) for row in history] == [metrics["norm/gap"] for metrics in logged]
    assert [float(row["norm_small_scales"]) for row in history] == [0.0, 0.0]
    layers = list(csv.DictReader((tmp_path / "a" / "layers.csv").read_text().splitlines()))
    measured = [row for row in layers if row["norm_gap"]]
    assert len(measured) == 12 and all("norm" in r["layer"] or "shortcut.1" in r["layer"] for r in measured)
    for row in measured:
        assert logged[int(row["epoch"]) - 1][f"norm_gap/{row['layer']}"] == float(row["norm_gap"])


def test_a_resumed_run_keeps_its_rows():
    measure = MeasureNorms(torch.zeros(1))
    measure.rows = [(1, NormHealth("network.a", 0.5, 0.25, None, 4))]
    resumed = MeasureNorms(torch.zeros(1))
    resumed.load_state_dict(json.loads(json.dumps(measure.state_dict())))
    rows = [Layer(epoch, name, 8, 1.0, 1.0, None) for epoch in (1, 2) for name in ("a", "b")]
    assert [(row.norm_gap, row.norm_variance_gap, row.small_scales) for row in resumed.into(rows)] == [
        (0.5, 0.25, None),
        *[(None, None, None)] * 3,
    ]
