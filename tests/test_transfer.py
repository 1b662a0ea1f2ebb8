"""Starting from a trained member: its weights, which layers learn when, and what is refused."""

import hashlib
import json
import shutil
import zipfile
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import nn

from anneal import params
from anneal.augment import compile_policy, policy_to_json
from anneal.cli import main as anneal
from anneal.conflicts import check_recipe
from anneal.diagnosis.curves import read_columns, read_rows, read_run
from anneal.diagnosis.rules import diagnose
from anneal.models.transfer import load_start
from anneal.optimizers.build import build_optimizer, dense_optimizers
from anneal.optimizers.config import EXTRA
from anneal.optimizers.groups import module_layers, parameter_layers
from anneal.params import ParamsError, UserError
from anneal.preprocess import PreprocessConfig
from anneal.store import finish
from anneal.training.conflicts import WAKING
from anneal.training.lr_range import lr_range
from anneal.training.machine import quiet
from anneal.training.transfer import Freezing, head_names, num_learning
from tests.test_training import (
    CLASSES,
    FILES,
    SIDE,
    contents,
    images_of,
    sections,
    set_up_run,
    train,
    weights,
    write_inputs,
    write_split,
)

ROOT = Path(__file__).parents[1]
# 3 steps an epoch; a window is 2 forward passes, whose running statistics are updated once.
BATCH = {"size": 32, "microbatch": 16, "noise_microbatches": 0}


def write_data(
    root: Path, images: np.ndarray, labels: np.ndarray, num_val: int, classes: list[str]
) -> tuple[Path, Path]:
    """A processed data set of which the first ``num_val`` images are for validation."""
    store, augmented = root / "processed", root / "augmented"
    write_split(store / "train", images[num_val:], labels[num_val:])
    write_split(store / "val", images[:num_val], labels[:num_val])
    x = images[num_val:] / 255
    finish(
        store,
        classes=classes,
        shape=images.shape[1:],
        counts={"train": len(images) - num_val, "val": num_val},
        normalize="standardize",
        statistics={"mean": x.mean((0, 1, 2)), "std": x.std((0, 1, 2))},
        fit="crop",
        interpolation="bilinear",
    )
    augmented.mkdir()
    policy = compile_policy("none", height=images.shape[1], width=images.shape[2], channels=1)
    (augmented / "policy.json").write_text(policy_to_json(policy))
    return store, augmented


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), num_train=96)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The same images, darker, and with other names for the classes."""
    images, labels = images_of(120, 2)
    return write_data(tmp_path_factory.mktemp("others"), images // 2, labels, 24, ["x", "y", "z"])


@pytest.fixture(scope="module")
def source(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained") / "a"
    train(inputs, out, trainer={"epochs": 1}, batch=BATCH)
    return out


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


def starting(source: Path, freeze: object = 0.0, unfreeze: str = "together", **rest: object) -> dict:
    return {
        "start_from": {"path": str(source), "sha256": digest(source), "freeze": freeze, "unfreeze": unfreeze},
        **rest,
    }


# ---- loading --------------------------------------------------------------------------------------------------------


def test_weights_come_along_and_the_normalisation_does_not(inputs, others, source):
    with quiet():
        same = set_up_run(inputs, model=starting(source)).module.classifier.state_dict()
        other = set_up_run(others, model=starting(source)).module.classifier.state_dict()
        new = set_up_run(others).module.classifier.state_dict()
    before = load_file(source / "weights.safetensors")
    head = {"network.head.weight", "network.head.bias"}
    assert before["network.head.bias"].any()
    statistics = {"normalization.scale", "normalization.shift"}
    assert {name for name in before if not torch.equal(before[name], same[name])} == set()
    assert {name for name in before if not torch.equal(before[name], other[name])} == head | statistics
    # Other classes have the head that the run without a start would have.
    assert all(torch.equal(new[name], other[name]) for name in head | statistics)


def test_another_number_of_classes_and_another_size(source, tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (30, 9, 9, 1), dtype=np.uint8)
    data = write_data(tmp_path, images, np.arange(30) % 5, 10, [*"pqrst"])
    with quiet():
        setup = set_up_run(data, model=starting(source), batch={"size": 4, "microbatch": 4})
    found, before = setup.module.classifier.state_dict(), load_file(source / "weights.safetensors")
    assert found["network.head.weight"].shape == (5, 8)
    assert torch.equal(found["network.stages.0.0.conv1.weight"], before["network.stages.0.0.conv1.weight"])


def test_a_network_by_import_path(inputs, others, tmp_path):
    custom = {"name": "tests.custom_models.networks:Small", "custom": {"width": 4}}
    train(inputs, tmp_path / "a", model=custom, batch=BATCH, trainer={"epochs": 1})
    with quiet():
        module = set_up_run(others, model=starting(tmp_path / "a", freeze=1.0, **custom)).module
    before, now = weights(tmp_path / "a"), module.classifier.state_dict()
    changed = {name for name in before if not torch.equal(before[name], now[name])}
    assert changed - {"normalization.scale", "normalization.shift"} == {
        "network.module.fc.weight",
        "network.module.fc.bias",
    }
    assert head_names(module.classifier.network) == {"module.fc.weight", "module.fc.bias"}
    with pytest.raises(ParamsError, match=r"model\.custom\.width: found 5, allowed: 4, as the network of"):
        set_up_run(others, model=starting(tmp_path / "a", **custom | {"custom": {"width": 5}}))


def test_frozen_layers_have_no_gradient_rather_than_one_of_zero(inputs, source, tmp_path):
    """A gradient of 0 is that of a layer that has died."""
    model = starting(source, freeze=1.0)
    train(inputs, tmp_path / "a", model=model, batch=BATCH, trainer={"epochs": 3})
    rows = read_rows(tmp_path / "a" / "layers.csv")
    head = [row for row in rows if row["layer"] == "head"]
    assert len(head) == 4 and all(row["grad_norm"] > 0 for row in head)
    assert all(row["grad_norm"] is None and row["update_ratio"] is None for row in rows if row["layer"] != "head")
    # The median is that of the layers that learn.
    history = read_columns(tmp_path / "a" / "history.csv")
    assert history["update_ratio"] == pytest.approx([row["update_ratio"] for row in head[1:]], rel=1e-4)
    values = params.merge(params.read_yaml(ROOT / "params.yaml"), {"model": model})
    counts = [{"name": name, "train": 10, "val": 10} for name in "abc"]
    run = read_run(tmp_path / "a", recipe=values, data={"train": 30, "val": 30, "num_classes": 3, "classes": counts})
    assert not {"dead_layers", "learning_rate_too_low"} & {finding.name for finding in diagnose(run)}


# ---- which layers learn ---------------------------------------------------------------------------------------------


def test_a_folder_that_a_script_wrote(inputs, tmp_path, monkeypatch):
    """The script of docs/transfer-learning.md, with a network of ours in the place of timm's."""
    page = (ROOT / "docs" / "transfer-learning.md").read_text()
    script = page.split("```python\n")[1].split("```")[0]
    call = '{"name": "tests.custom_models.networks:Small", "arguments": {"num_classes": 7, "in_chans": 1}}'
    given = '{"name": "timm:create_model", "arguments": {"model_name": "resnet18", "in_chans": 3}}'
    for old, new in {
        "import timm": "from tests.custom_models.networks import Small",
        "timm.create_model": "Small",
        ", pretrained=True": "",
        '"in_channels": 3': '"in_channels": 1',
        given.replace("timm.create_model", "Small"): call,
    }.items():
        assert old in script, old
        script = script.replace(old, new)
    monkeypatch.chdir(tmp_path)
    values: dict = {}
    exec(script, values)
    custom = {"name": "tests.custom_models.networks:Small", "custom": {"in_chans": 1}}
    with quiet():
        network = set_up_run(inputs, model=starting(Path("pretrained/resnet18"), **custom)).module.classifier.network
    theirs = values["network"].state_dict()
    for name, tensor in network.module.state_dict().items():
        assert torch.equal(tensor, theirs[name]) if not name.startswith("fc.") else len(tensor) == 3


def test_the_schedule_of_layers():
    gradual = [num_learning(step, 4, freeze_steps=3, gradually=True) for step in range(14)]
    assert gradual == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4]
    assert [num_learning(step, 4, freeze_steps=3, gradually=False) for step in range(5)] == [1, 1, 1, 4, 4]
    assert {num_learning(step, 4, freeze_steps=None, gradually=True) for step in range(9)} == {1}

    network = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 3, 1),
        nn.BatchNorm2d(3, affine=False),
        nn.Flatten(),
        nn.Linear(3, 2),
    )
    freezing = Freezing(network, freeze_steps=2, gradually=True)
    names = {parameter: name for name, parameter in network.named_parameters()}
    seen = []
    for step in range(5):
        freezing.set(step, skip_gradients=True)
        awake = [names[parameter] for parameter in freezing.awake()]
        assert awake == [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        seen.append((awake, [network[i].training for i in (1, 3)], round(freezing.share(), 4)))
    head, middle = ["5.weight", "5.bias"], ["2.weight", "2.bias"]
    all_of_them = ["0.weight", "0.bias", "1.weight", "1.bias", *middle, *head]
    assert seen == [
        (head, [False, False], round(8 / 41, 4)),
        (head, [False, False], round(8 / 41, 4)),
        (middle + head, [False, True], round(17 / 41, 4)),
        (middle + head, [False, True], round(17 / 41, 4)),
        (all_of_them, [True, True], 1.0),
    ]
    # A function of the step: going back is as good as coming there first.
    freezing.set(0, skip_gradients=True)
    assert [names[parameter] for parameter in freezing.awake()] == head
    freezing.end()
    assert all(parameter.requires_grad for parameter in network.parameters())


class States(pl.Callback):
    """The network after each optimizer step, and a checkpoint after the first epoch."""

    def __init__(self, checkpoint: Path | None = None):
        self.states, self.shares, self.checkpoint = [], [], checkpoint

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > len(self.states):
            self.states.append({k: v.clone() for k, v in pl_module.classifier.state_dict().items()})

    def on_validation_end(self, trainer, pl_module):
        self.shares.append(pl_module.figures["trainable_share"])
        if self.checkpoint is not None and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.checkpoint)


# Everything that moves weights beside the gradient: decay, momentum, penalties, projection, noise.
MOVING = {
    "optimizer": {"SGD": {"weight_decay": 0.01}},
    "regularization": {"max_norm": 0.1, "l2": 0.01, "gradient_noise": {"std": 0.1}, "gradient_clip": 1.0},
    "batch": BATCH,
}


def moved(a: dict, b: dict) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("unfreeze", ["together", "gradually"])
def test_frozen_layers_stay_to_the_bit_and_then_learn(others, source, tmp_path, unfreeze):
    states = States()
    model = starting(source, freeze="2 steps", unfreeze=unfreeze)
    result = train(others, tmp_path / "b", model=model, callbacks=(states,), trainer={"epochs": 2}, **MOVING)
    network = weights(source)
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in network if name.startswith("network.")))
    with quiet():
        classifier = set_up_run(others, model=starting(source)).module.classifier
    start = classifier.state_dict()
    layer_of = {
        name: layer
        for layer, module in module_layers(classifier)
        for name, m in classifier.named_modules()
        if m is module
    }
    last = max(layer_of.values())
    assert len(states.states) == 6 and last == 6
    for step, (before, after) in enumerate(zip([start, *states.states], states.states, strict=False)):
        learns = num_learning(step, last + 1, freeze_steps=2, gradually=unfreeze == "gradually")
        expected = {name for name in names if layer_of[name] > last - learns}
        # Weights and running statistics alike: a module whose layer is asleep keeps all of its bytes.
        assert {name.rpartition(".")[0] for name in moved(before, after)} == expected
    assert result.rows[-1].train_loss < result.rows[0].train_loss
    sizes = {p: p.numel() for p in classifier.parameters()}
    layers = parameter_layers(classifier)
    # After 3 and 6 steps of 3 an epoch, the share is that of the epoch's last step.
    for epoch, step in enumerate((2, 5)):
        learns = num_learning(step, last + 1, freeze_steps=2, gradually=unfreeze == "gradually")
        share = sum(size for p, size in sizes.items() if layers[p] > last - learns) / sum(sizes.values())
        assert states.shares[epoch] == pytest.approx(share)
    assert result.num_parameters == sum(sizes.values())
    assert json.loads((tmp_path / "b" / "model.json").read_text())["num_parameters"] == result.num_parameters


def test_a_linear_probe(others, source, tmp_path):
    # Averaging makes running statistics anew, but not those of frozen layers. LBFGS is at its best here.
    optimizer = {"name": "LBFGS", "LBFGS": {"max_iter": 2}}
    for name, options in {
        "polyak": {"averaging": {"name": "polyak", "export": "average", "polyak": {"start": 0.3}}, **MOVING},
        "lbfgs": {"optimizer": optimizer, "batch": {**BATCH, "size": 16}},
    }.items():
        options = {"regularization": {"label_smoothing": 0.0}, **options}
        train(others, tmp_path / name, model=starting(source, freeze=1.0), trainer={"epochs": 2}, **options)
        changed = moved(weights(source), weights(tmp_path / name))
        assert changed - {"normalization.scale", "normalization.shift"} == {"network.head.weight", "network.head.bias"}


def test_the_same_bytes_whether_or_not_gradients_are_skipped(others, source, tmp_path, monkeypatch):
    options = {"model": starting(source, freeze=0.34, unfreeze="gradually"), **MOVING}
    train(others, tmp_path / "a", **options)
    train(others, tmp_path / "b", **options)
    plain = Freezing.set
    # What runs on several devices, on one: all gradients are computed, and those of frozen layers taken away.
    monkeypatch.setattr(Freezing, "set", lambda self, step, *, skip_gradients: plain(self, step, skip_gradients=False))
    train(others, tmp_path / "c", **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_a_resumed_run_is_the_uninterrupted_one(others, source, tmp_path):
    options = {
        "model": starting(source, freeze="2 steps", unfreeze="gradually"),
        "optimizer": {"name": "AdamW"},
        "batch": BATCH,
    }
    whole, rest = States(tmp_path / "half.ckpt"), States()
    rest.states = [{}] * 3
    with quiet():
        for states, checkpoint in ((whole, None), (rest, tmp_path / "half.ckpt")):
            setup = set_up_run(others, **options)
            setup.trainer([states]).fit(
                setup.module,
                datamodule=setup.data_module(),
                ckpt_path=checkpoint,
                weights_only=bool(checkpoint) or None,
            )
    assert len(whole.states) == len(rest.states) == 6
    for a, b in zip(whole.states[3:], rest.states[3:], strict=True):
        assert moved(a, b) == set()
    assert rest.shares == whole.shares[1:]


def test_a_range_test_is_of_the_layers_that_learn_in_the_end(others, source):
    losses = []
    for freeze in (0.0, 0.5, 1.0):
        batch = {"size": 16, "microbatch": 16}
        chosen = sections(model=starting(source, freeze=freeze), batch=batch, trainer={"epochs": 1})
        losses.append(lr_range(name="a", store=others[0], augmented=others[1], seed=0, num_steps=40, **chosen).losses)
    assert losses[0] == losses[1] != losses[2]


# ---- optimizers -----------------------------------------------------------------------------------------------------


def small_network() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, generator=generator)
    return network


def step(network: nn.Module, optimizer: torch.optim.Optimizer, number: int, those: list[int]) -> None:
    generator = torch.Generator().manual_seed(number)
    for i, parameter in enumerate(network.parameters()):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient if i in those else None
    optimizer.step()


@pytest.mark.parametrize("name", [name for name in [*dense_optimizers(), *EXTRA] if name != "LBFGS"])
def test_a_parameter_that_wakes_is_one_of_a_new_run(name):
    recipe = params.read_yaml(ROOT / "params.yaml")["optimizer"]
    arguments = recipe.get(name) or {"lr": EXTRA[name]}
    late, fresh = small_network(), small_network()
    optimizer = build_optimizer(late, name, arguments, staged=True)
    asleep, head = [0, 1, 2, 3], [4, 5]
    for number in range(4):
        step(late, optimizer, number, head)
    pairs = list(zip(late.parameters(), fresh.parameters(), strict=True))[:4]
    assert all(torch.equal(a, b) for a, b in pairs)
    other = build_optimizer(fresh, name, arguments)
    for number in range(4, 7):
        step(late, optimizer, number, asleep + head)
        step(fresh, other, number, asleep)
    equal = all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in pairs)
    assert not any(torch.equal(a, b) for a, b in zip(late.parameters(), small_network().parameters(), strict=True))
    # Those that fail here, and no others, are refused.
    assert equal == (name not in EXTRA or name in WAKING or name == "Prodigy")


# ---- what is refused ------------------------------------------------------------------------------------------------


def faults(**overrides: object) -> str:
    recipe = params.read_yaml(ROOT / "params.yaml")
    preprocess = params.parse(recipe, {"preprocess": PreprocessConfig})
    try:
        check_recipe(**sections(**overrides), **preprocess, num_train=96)
    except ParamsError as error:
        return "\n".join(error.faults)
    return ""


REFUSED = {
    "freeze alone": (
        {"start_from": {"freeze": 0.5}},
        {},
        "start_from.freeze: found 0.5 with model.start_from.path null",
    ),
    "gradually at once": (
        {"unfreeze": "gradually"},
        {},
        "start_from.unfreeze: found gradually with model.start_from.freeze 0.0",
    ),
    "no step": ({"freeze": 0.01}, {}, "start_from.freeze: found 0.01, 0 of the run's 4 steps"),
    "no hash": ({"sha256": None}, {}, "start_from.sha256: found null, allowed: the hash of {path}/weights.safetensors"),
    "other hash": (
        {"sha256": "0" * 64},
        {},
        "start_from.sha256: found 000000000000..., but {path}/weights.safetensors has",
    ),
    "no folder": ({"path": "{path}x"}, {}, "start_from.path: found {path}x, no such folder, allowed"),
    "whitening": ({}, {"init": {"whiten_first": True}}, "init.whiten_first: found true with model.start_from.path"),
    "lsuv": ({}, {"init": {"name": "lsuv"}}, "init.name: found lsuv with model.start_from.path"),
    "another network": (
        {},
        {"model": {"name": "convnet"}},
        "model.name: found convnet, allowed: resnet, as the network of",
    ),
    "widths": (
        {},
        {"model": {"resnet": {"widths": [8, 16]}}},
        "model.resnet.widths: found [8, 16], allowed: [8, 8], as the network of model.start_from.path {path} has",
    ),
    "activation": ({}, {"model": {"activation": "SiLU"}}, "model.activation: found SiLU, allowed: ReLU"),
    "norm": ({}, {"model": {"norm": {"name": "group"}}}, "model.norm.name: found group, allowed: batch"),
    "eps": ({}, {"model": {"norm": {"batch": {"eps": 1e-3}}}}, "model.norm.batch.eps: found 0.001, allowed: 1e-05"),
    "LBFGS": (
        {"freeze": 0.5},
        {"optimizer": {"name": "LBFGS"}},
        "start_from.freeze: found 0.5 with LBFGS",
    ),
    "group's steps": (
        {"freeze": 0.5},
        {"optimizer": {"name": "LAMB"}},
        "start_from.freeze: found 0.5 with LAMB, which counts the steps of all parameters as one",
    ),
}


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(ParamsError, match=r"model\.start_from\.path: found \"\", allowed: "):
        sections(model={"start_from": {"path": ""}})


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(source, name):
    start, overrides, message = REFUSED[name]
    if name == "freeze alone":
        model = start
    else:
        model = starting(source)
        model["start_from"] |= {k: v.format(path=source) if isinstance(v, str) else v for k, v in start.items()}
    found = faults(**params.merge({"model": model}, overrides))
    assert message.format(path=source) in found
    assert len(found.splitlines()) == 1
    if name == "no hash":
        assert found.endswith(f"write sha256: {digest(source)}")


def test_what_is_free(source):
    assert faults(model=starting(source, freeze=0.5), regularization={"dropout": 0.5, "stochastic_depth": 0.1}) == ""
    assert faults(model=starting(source, norm={"batch": {"momentum": 0.01, "ghost": 8}})) == ""
    assert faults(model=starting(source, freeze=1.0), optimizer={"name": "LAMB"}) == ""


def test_differences_that_only_the_data_shows(inputs, source, tmp_path):
    model = json.loads((source / "model.json").read_text())
    model["architecture"]["in_channels"], model["normalization"]["kind"] = 3, "zca"
    shutil.copytree(source, tmp_path / "a")
    (tmp_path / "a" / "model.json").write_text(json.dumps(model))
    with pytest.raises(ParamsError) as error:
        set_up_run(inputs, model=starting(tmp_path / "a"))
    assert "preprocess.normalize: found standardize, allowed: zca, which the network of" in error.value.faults[1]
    assert "channels of an image: found 1, allowed: 3, as the network of" in error.value.faults[0]


def test_an_mlp_needs_images_of_its_size(inputs, tmp_path):
    train(inputs, tmp_path / "a", model={"name": "mlp", "mlp": {"hidden": [4]}}, trainer={"epochs": 1})
    model = starting(tmp_path / "a", name="mlp", mlp={"hidden": [4]})
    assert f"preprocess.size: found 8, allowed: {SIDE}, as the network of" in faults(model=model)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.json", None, "holds no model.json"),
        ("weights.safetensors", None, "holds no weights.safetensors"),
        ("model.json", b"{", "model.json is damaged"),
        ("model.json", b"\xff", "cannot be read"),
        ("model.json", b"[]", "model.json is damaged"),
        ("model.json", b'{"architecture": {"name": 3}, "normalization": {"kind": ""}, "classes": []}', "is damaged"),
        ("weights.safetensors", b"", "weights.safetensors is damaged"),
        ("weights.safetensors", b"\x80\x04}", "weights.safetensors is damaged"),  # a pickle, which nothing opens
    ],
)
def test_damaged_members(source, tmp_path, file, content, message):
    shutil.copytree(source, tmp_path / "a")
    model = starting(tmp_path / "a")
    (tmp_path / "a" / file).unlink()
    if content is not None:
        (tmp_path / "a" / file).write_bytes(content)
    found = faults(model=model)
    assert found.startswith("model.start_from.path: ") and message in found and len(found.splitlines()) == 1


def test_a_cut_off_file_is_seen(source, tmp_path):
    shutil.copytree(source, tmp_path / "a")
    path = tmp_path / "a" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert "weights.safetensors is damaged (SafetensorError" in faults(model=starting(tmp_path / "a"))


def test_weights_that_do_not_fit_change_nothing(inputs, source, tmp_path):
    shutil.copytree(source, tmp_path / "a")
    tensors = load_file(source / "weights.safetensors")
    with quiet():
        network = set_up_run(inputs).module.classifier.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    name = "network.stages.0.0.conv2.weight"
    for changed, message in (
        (
            {**tensors, name: tensors[name][:4].contiguous()},
            r"stages\.0\.0\.conv2\.weight as \(4, 8, 3, 3\), allowed: \(8, 8",
        ),
        ({k: v for k, v in tensors.items() if k != name}, "has none for the weight stages.0.0.conv2.weight"),
        ({**tensors, "network.more": torch.zeros(1)}, "has one for the weight more and the one to be trained none"),
    ):
        (tmp_path / "a" / "weights.safetensors").write_bytes(save(changed))
        with pytest.raises(UserError, match=message):
            load_start(network, head_names(network), str(tmp_path / "a"), digest(tmp_path / "a"), CLASSES)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


# ---- what it is for -------------------------------------------------------------------------------------------------


def digits() -> tuple[np.ndarray, np.ndarray]:
    with zipfile.ZipFile(ROOT / "data" / "digits.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")]
        images = [np.asarray(Image.open(BytesIO(archive.read(name))).convert("L")) for name in names]
    order = np.random.default_rng(0).permutation(len(names))
    return np.stack(images)[order, ..., None], np.array([int(name[0]) for name in names])[order]


def test_ten_digits_help_to_tell_odd_from_even(tmp_path):
    images, labels = digits()
    for name in ("many", "few"):
        (tmp_path / name).mkdir()
    many = write_data(tmp_path / "many", images[:650], labels[:650], 50, [*"0123456789"])
    # Forty images to learn from.
    few = write_data(tmp_path / "few", images[650:1190], labels[650:1190] % 2, 500, ["even", "odd"])
    model = {"resnet": {"widths": [16, 32], "depths": [1, 1]}}
    options = {"trainer": {"evaluate_train": 0, "epochs": 5}, "optimizer": {"SGD": {"lr": 0.1}}}
    train(many, tmp_path / "a", model=model, batch={**BATCH, "microbatch": 32}, **options)
    options = {"batch": {**BATCH, "size": 20, "microbatch": 20}, "trainer": {"evaluate_train": 0, "epochs": 8}}
    accuracy = {
        name: train(few, tmp_path / name, model=chosen, **options).rows[-1].val_accuracy
        for name, chosen in {"fresh": model, "started": starting(tmp_path / "a", freeze=0.5, **model)}.items()
    }
    assert accuracy["started"] > accuracy["fresh"] + 0.05


# ---- the pipeline ---------------------------------------------------------------------------------------------------


class Run:
    """What the stage says of its run, in place of MLflow, which has tests of its own and takes seconds to begin."""

    def __init__(self):
        self.tags, self.logged = {}, {}

    def tag(self, name, value):
        self.tags[name] = value

    def metrics(self, values, step=0):
        self.logged.update(values)

    def picture(self, *_):
        pass

    def artifact(self, *_):
        pass

    def text(self, *_):
        pass


def test_the_stage_tags_its_run(inputs, source, tmp_path, monkeypatch):
    from stages import train as stage

    run = Run()
    monkeypatch.setattr(stage.tracking, "stage_run", lambda *_, **__: nullcontext(run))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for folder in inputs:
        shutil.copytree(folder, tmp_path / "data" / folder.name)
    shutil.copytree(source, tmp_path / "pretrained" / "a")
    for name in ("params.schema.json", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    values = params.merge(
        params.read_yaml(ROOT / "params.yaml"),
        {
            "model": {"resnet": {"widths": [8, 8], "depths": [1, 1]}},
            "trainer": {"epochs": 1},
            "hardware": {"accelerator": "cpu", "devices": 1},
        },
    )
    # Each member may start from another.
    start = {"path": "pretrained/a", "sha256": digest(source), "freeze": 1.0}
    values["ensemble"]["members"] = {"a": {"model": {"start_from": start}}, "b": {}}
    (tmp_path / "params.yaml").write_text(json.dumps(values))
    stage.main("a")
    assert sorted(path.name for path in (tmp_path / "models" / "a").iterdir()) == sorted(FILES)
    assert run.tags["start_from"] == f"pretrained/a {digest(source)[:12]}"
    assert 0 < run.logged["trainable_share"] < 0.05


def test_check_says_what_a_run_starts_from(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.schema.json", tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "digits.zip", tmp_path / "data")
    values = params.merge(
        params.read_yaml(ROOT / "params.yaml"),
        {
            "model": {
                "resnet": {"widths": [8, 8], "depths": [1, 1]},
                "start_from": {
                    "path": "pretrained/a",
                    "sha256": digest(source),
                    "freeze": 0.1,
                    "unfreeze": "gradually",
                },
            }
        },
    )
    for folder, good in (("pretrained", True), ("models", False)):
        shutil.copytree(source, tmp_path / folder / "a")
        values["model"]["start_from"]["path"] = f"{folder}/a"
        (tmp_path / "params.yaml").write_text(json.dumps(values))
        if good:
            assert anneal(["check"]) == 0
            out = capsys.readouterr().out
            assert f"starts from pretrained/a ({digest(source)[:12]}); the head learns alone for 120 steps" in out
        else:
            for known in (digest(source), None):  # it is of no use to look for the hash first
                values["model"]["start_from"]["sha256"] = known
                (tmp_path / "params.yaml").write_text(json.dumps(values))
                with pytest.raises(
                    UserError, match="found models/a, which training writes anew, allowed: a copy elsewhere"
                ):
                    anneal(["check"])
