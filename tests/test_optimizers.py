"""Optimizers: each law derived again in numpy, which parameters are treated alike, and every one through a real run."""

import math
import subprocess
import sys
import typing
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from anneal import params
from anneal.conflicts import check_recipe
from anneal.models.build import build_network
from anneal.models.initialization import initialize
from anneal.optimizers.build import (
    IMPLEMENTATION,
    build_optimizer,
    check_arguments,
    class_of,
    dense_optimizers,
    law,
)
from anneal.optimizers.config import EXTRA, OptimizerConfig, conflicts
from anneal.optimizers.groups import parameter_groups, rate_factors, weight_layers
from anneal.optimizers.muon import MuonWithAdamW, as_matrix, orthogonalize
from anneal.optimizers.sam import SAM
from anneal.params import ParamsError, UserError
from anneal.preprocess import PreprocessConfig
from anneal.training.config import rate_faults
from tests.test_training import PLAIN, LastWeights, reference_run, sections, train, write_inputs

Array = np.ndarray
STEPS = 10
NAMES = typing.get_args(OptimizerConfig.model_fields["name"].annotation)
PARAMS = params.read_yaml(Path(__file__).parents[1] / "params.yaml")
SMALL = {"batch": {"size": 16, "microbatch": 16, "noise_microbatches": 0}}


def block_of(name: str) -> dict:
    """The block that params.yaml has, or the shortest that it may have."""
    return PARAMS["optimizer"].get(name) or {"lr": EXTRA[name]}


# ---- the laws -------------------------------------------------------------------------------------------------------


def gradient(weight: Array) -> Array:
    """Of a badly conditioned bowl with a ripple: neither constant nor linear in the weights."""
    return np.linspace(0.1, 3.0, weight.size).reshape(weight.shape) * weight + 0.3 * np.sin(5.0 * weight)


def sgd(w: Array, *, lr: float, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0) -> Array:
    velocity = np.zeros_like(w)
    for step in range(STEPS):
        g = gradient(w) + weight_decay * w
        velocity = momentum * velocity + (g if step == 0 else (1 - dampening) * g)
        w = w - lr * (g + momentum * velocity if nesterov else velocity)
    return w


def adagrad(w: Array, *, lr: float, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10) -> Array:
    square = np.full_like(w, initial_accumulator_value)
    for step in range(STEPS):
        g = gradient(w) + weight_decay * w
        square = square + g * g
        w = w - lr / (1 + step * lr_decay) * g / (np.sqrt(square) + eps)
    return w


def rmsprop(w: Array, *, lr: float, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False) -> Array:
    mean, square, velocity = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for _ in range(STEPS):
        g = gradient(w) + weight_decay * w
        mean = alpha * mean + (1 - alpha) * g
        square = alpha * square + (1 - alpha) * g * g
        root = np.sqrt(square - mean * mean if centered else square) + eps
        velocity = momentum * velocity + g / root
        w = w - lr * velocity
    return w


def adadelta(w: Array, *, lr: float, rho=0.9, eps=1e-6, weight_decay=0.0) -> Array:
    square, steps = np.zeros_like(w), np.zeros_like(w)
    for _ in range(STEPS):
        g = gradient(w) + weight_decay * w
        square = rho * square + (1 - rho) * g * g
        step = np.sqrt(steps + eps) / np.sqrt(square + eps) * g
        steps = rho * steps + (1 - rho) * step * step
        w = w - lr * step
    return w


def adam(w: Array, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, decoupled=False) -> Array:
    mean, square, largest = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for t in range(1, STEPS + 1):
        g = gradient(w) + (0 if decoupled else weight_decay * w)
        w = w * (1 - lr * weight_decay) if decoupled else w
        mean = betas[0] * mean + (1 - betas[0]) * g
        square = betas[1] * square + (1 - betas[1]) * g * g
        largest = np.maximum(largest, square) if amsgrad else square
        root = np.sqrt(largest / (1 - betas[1] ** t)) + eps
        w = w - lr * mean / (1 - betas[0] ** t) / root
    return w


def adamw(w: Array, **arguments) -> Array:
    return adam(w, decoupled=True, **arguments)


def adamax(w: Array, *, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0) -> Array:
    mean, largest = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, STEPS + 1):
        g = gradient(w) + weight_decay * w
        mean = betas[0] * mean + (1 - betas[0]) * g
        largest = np.maximum(betas[1] * largest, np.abs(g) + eps)
        w = w - lr / (1 - betas[0] ** t) * mean / largest
    return w


def nadam(w: Array, *, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, momentum_decay=0.004) -> Array:
    mean, square, product = np.zeros_like(w), np.zeros_like(w), 1.0
    for t in range(1, STEPS + 1):
        g = gradient(w) + weight_decay * w
        now, then = (betas[0] * (1 - 0.5 * 0.96 ** (s * momentum_decay)) for s in (t, t + 1))
        product *= now
        mean = betas[0] * mean + (1 - betas[0]) * g
        square = betas[1] * square + (1 - betas[1]) * g * g
        ahead = then * mean / (1 - product * then) + (1 - now) * g / (1 - product)
        w = w - lr * ahead / (np.sqrt(square / (1 - betas[1] ** t)) + eps)
    return w


def radam(w: Array, *, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0) -> Array:
    mean, square, limit = np.zeros_like(w), np.zeros_like(w), 2 / (1 - betas[1]) - 1
    for t in range(1, STEPS + 1):
        g = gradient(w) + weight_decay * w
        mean = betas[0] * mean + (1 - betas[0]) * g
        square = betas[1] * square + (1 - betas[1]) * g * g
        length = limit - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
        unbiased = mean / (1 - betas[0] ** t)
        if length > 5:
            tamed = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
            unbiased = unbiased * math.sqrt(tamed * (1 - betas[1] ** t)) / (np.sqrt(square) + eps)
        w = w - lr * unbiased
    return w


def asgd(w: Array, *, lr: float, lambd=1e-4, alpha=0.75, weight_decay=0.0) -> Array:
    rate = lr
    for t in range(1, STEPS + 1):
        g = gradient(w) + weight_decay * w
        w = w * (1 - lambd * rate) - rate * g
        rate = lr / (1 + lambd * lr * t) ** alpha
    return w


def rprop(w: Array, *, lr: float, etas=(0.5, 1.2), step_sizes=(1e-6, 50)) -> Array:
    before, size = np.zeros_like(w), np.full_like(w, lr)
    for _ in range(STEPS):
        g = gradient(w)
        agrees = np.sign(g * before)
        size = np.clip(size * np.choose(agrees.astype(int) + 1, [etas[0], 1.0, etas[1]]), *step_sizes)
        before = np.where(agrees < 0, 0.0, g)
        w = w - size * np.sign(before)
    return w


def adafactor(w: Array, *, lr: float, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0) -> Array:
    rows, columns = np.zeros((len(w), 1)), np.zeros((1, w.shape[1]))
    tiny = eps[0] or np.finfo(w.dtype).eps
    for t in range(1, STEPS + 1):
        g, keep = gradient(w), 1 - t**beta2_decay
        rate = max(eps[1], np.sqrt((w * w).mean())) * min(lr, 1 / math.sqrt(t))
        w = w * (1 - lr * weight_decay)
        rows = keep * rows + (1 - keep) * (g * g).mean(1, keepdims=True)
        columns = keep * columns + (1 - keep) * (g * g).mean(0, keepdims=True)
        step = g / np.sqrt(np.maximum(rows * columns / max(rows.mean(), tiny), tiny**2))
        w = w - rate * step / max(1.0, np.sqrt((step * step).mean()) / d)
    return w


def lion(w: Array, *, lr: float, betas=(0.9, 0.99), weight_decay=0.0) -> Array:
    mean = np.zeros_like(w)
    for _ in range(STEPS):
        g = gradient(w)
        w = w * (1 - lr * weight_decay)
        w = w - lr * np.sign(betas[0] * mean + (1 - betas[0]) * g)
        mean = betas[1] * mean + (1 - betas[1]) * g
    return w


def lars(w: Array, *, lr: float, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3) -> Array:
    velocity = np.zeros_like(w)
    for _ in range(STEPS):
        g = gradient(w)
        size = np.linalg.norm(w)
        trust = trust_coefficient * size / (np.linalg.norm(g) + weight_decay * size)
        velocity = momentum * velocity + trust * (g + weight_decay * w)
        w = w - lr * velocity
    return w


def lamb(w: Array, *, lr: float, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-6) -> Array:
    mean, square = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, STEPS + 1):
        g = gradient(w)
        mean = betas[0] * mean + (1 - betas[0]) * g
        square = betas[1] * square + (1 - betas[1]) * g * g
        w = w * (1 - lr * weight_decay)
        step = mean / (np.sqrt(square) + eps)
        trust = min(np.linalg.norm(w), 10.0) / (np.linalg.norm(step) + eps)
        # The library's own: the ratio has no need of the correction, which makes the first steps longer.
        w = w - lr * trust * step / (1 - betas[0] ** t)
    return w


class Bowl(nn.Module):
    def __init__(self, weight: Array) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(weight.copy()))


CASES: list[tuple[str, dict, Callable[..., Array]]] = [
    ("SGD", {"lr": 0.1}, sgd),
    ("SGD", {"lr": 0.1, "weight_decay": 0.05}, sgd),
    ("SGD", {"lr": 0.1, "momentum": 0.9}, sgd),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, sgd),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}, sgd),
    ("Adagrad", {"lr": 0.1}, adagrad),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1}, adagrad),
    ("RMSprop", {"lr": 0.02}, rmsprop),
    ("RMSprop", {"lr": 0.02, "alpha": 0.9, "centered": True}, rmsprop),
    ("RMSprop", {"lr": 0.02, "alpha": 0.9, "momentum": 0.9, "weight_decay": 0.1}, rmsprop),
    ("RMSprop", {"lr": 0.01, "alpha": 0.8, "momentum": 0.5, "centered": True}, rmsprop),
    ("Adadelta", {"lr": 10.0, "weight_decay": 0.1}, adadelta),
    ("Adam", {"lr": 0.03}, adam),
    ("Adam", {"lr": 0.03, "betas": [0.8, 0.95], "eps": 1e-3, "weight_decay": 0.1}, adam),
    ("Adam", {"lr": 0.1, "betas": [0.5, 0.6], "amsgrad": True}, adam),
    ("AdamW", {"lr": 0.03, "betas": [0.9, 0.999], "weight_decay": 0.1}, adamw),
    ("Adamax", {"lr": 0.03, "weight_decay": 0.1}, adamax),
    ("NAdam", {"lr": 0.03, "weight_decay": 0.1}, nadam),
    ("RAdam", {"lr": 0.05, "weight_decay": 0.1}, radam),
    ("RAdam", {"lr": 0.05, "betas": [0.9, 0.5]}, radam),
    ("ASGD", {"lr": 0.1, "lambd": 0.1, "weight_decay": 0.05}, asgd),
    ("Rprop", {"lr": 0.1, "step_sizes": [1e-6, 0.2]}, rprop),
    ("Adafactor", {"lr": 0.3, "weight_decay": 0.1}, adafactor),
    ("Lion", {"lr": 0.03, "weight_decay": 0.1}, lion),
    ("LARS", {"lr": 100.0, "weight_decay": 0.1}, lars),
    ("LAMB", {"lr": 0.03, "weight_decay": 0.1}, lamb),
]


@pytest.mark.parametrize(("name", "arguments", "rule"), CASES)
def test_ten_steps_follow_the_law(name: str, arguments: dict, rule: Callable[..., Array]) -> None:
    start = np.random.default_rng(0).normal(size=(5, 4))
    bowl = Bowl(start)
    optimizer = build_optimizer(bowl, name, arguments)
    for _ in range(STEPS):
        bowl.weight.grad = torch.from_numpy(gradient(bowl.weight.detach().numpy()))
        optimizer.step()
    expected = rule(start, **arguments)
    assert np.abs(expected - start).max() > 0.1
    np.testing.assert_allclose(bowl.weight.detach().numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_fused_steps_repeat_to_the_bit(name: str) -> None:
    def weights() -> torch.Tensor:
        torch.manual_seed(0)
        layer = nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)
        momentum = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = build_optimizer(layer, name, {"lr": 0.01, "weight_decay": 0.01, **momentum})
        assert optimizer.defaults["fused"]
        # Else 16-bit training on a GPU would clip gradients that are still scaled.
        assert not optimizer._step_supports_amp_scaling
        for _ in range(STEPS):
            optimizer.zero_grad()
            layer(torch.ones(2, 16, 8, 8)).square().mean().backward()
            optimizer.step()
        return layer.weight.detach()

    assert torch.equal(weights(), weights())


def test_what_is_slower_is_not_chosen() -> None:
    assert build_optimizer(nn.Linear(2, 2), "SGD", {"lr": 0.1}).defaults["fused"] is None
    assert build_optimizer(nn.Linear(2, 2), "RAdam", {"lr": 0.1}).defaults["foreach"]
    assert build_optimizer(nn.Linear(2, 2), "ASGD", {"lr": 0.1}).defaults["foreach"] is None


# ---- names and signatures -------------------------------------------------------------------------------------------


def test_every_dense_class_of_torch_has_its_block() -> None:
    ours = set(NAMES) - set(EXTRA)
    theirs = set(dense_optimizers())
    hint = "torch.optim has changed: give each class a block in optimizers/config.py and in params.yaml, a row in docs/"
    assert ours == theirs, f"{hint}; only in torch {sorted(theirs - ours)}, only here {sorted(ours - theirs)}"
    assert set(NAMES) <= set(OptimizerConfig.model_fields)
    dense = nn.Parameter(torch.ones(2))
    dense.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="does not support dense"):
        torch.optim.SparseAdam([dense]).step()


@pytest.mark.parametrize("name", sorted(dense_optimizers()))
def test_blocks_are_the_signatures(name: str) -> None:
    blocks = [(OptimizerConfig.model_fields[name].annotation, dense_optimizers()[name])]
    if name == "Muon":
        blocks.append((blocks[0][0].model_fields["rest"].annotation, torch.optim.AdamW))
    for block, cls in blocks:
        known = law(cls)
        fields = {key: field.get_default() for key, field in block.model_fields.items() if key not in ("lr", "rest")}
        hint = f"torch.optim.{cls.__name__} has changed: bring {block.__name__} in optimizers/config.py up to date"
        assert fields.keys() == known.keys() - {"lr"}, hint
        for key, default in fields.items():
            assert (tuple(default) if isinstance(default, list) else default) == known[key], f"{hint}: {key}"
    assert {"foreach", "fused"} <= set(IMPLEMENTATION)


def test_names_of_the_extra_are_its_classes_and_none_of_torch() -> None:
    assert not set(EXTRA) & set(dense_optimizers())
    for name in EXTRA:
        assert class_of(name).__module__.startswith("pytorch_optimizer.")
        assert "lr" in law(class_of(name))


def test_each_has_a_row_in_the_docs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "optimizers.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"\n| `{name}` | " not in page] == []


def test_mistakes_are_named() -> None:
    network = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"optimizer.name: found AdamX, .*did you mean 'Adam'"):
        build_optimizer(network, "AdamX", {"lr": 0.1})
    with pytest.raises(UserError, match=r"optimizer.SGD.momentun: unknown argument; did you mean 'momentum'"):
        build_optimizer(network, "SGD", {"lr": 0.1, "momentun": 0.9})
    with pytest.raises(UserError, match=r"optimizer.SGD.foreach: unknown argument"):
        build_optimizer(network, "SGD", {"lr": 0.1, "foreach": True})
    # pytorch_optimizer itself swallows what it does not know.
    with pytest.raises(UserError, match=r"optimizer.LAMB.weight_dekay: unknown argument; did you mean 'weight_decay'"):
        check_arguments("LAMB", {"lr": "auto", "weight_dekay": 0.1})
    with pytest.raises(UserError, match=r"optimizer.Lion.betas: .*beta"):
        check_arguments("Lion", {"lr": 0.1, "betas": [0.9, 2.0]})
    with pytest.raises(UserError, match=r"optimizer.Muon.rest.beta: unknown argument; did you mean 'betas'"):
        check_arguments("Muon", {"lr": 0.1, "rest": {"lr": 0.1, "beta": [0.9, 0.9]}})
    with pytest.raises(UserError, match=r"found Muon, .* this network has none, allowed: AdamW, or a deeper network"):
        build_optimizer(network, "Muon", {"lr": 0.1, "rest": {"lr": 0.1}})


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match=r"found Lion, .* not installed; run pip install 'anneal\[optimizers\]'"):
        check_arguments("Lion", {"lr": 1e-4})


def test_the_library_is_imported_only_where_it_is_chosen_and_is_quiet() -> None:
    code = """
        import sys
        from anneal.optimizers.build import check_arguments
        check_arguments("SGD", {"lr": 0.1})
        assert "pytorch_optimizer" not in sys.modules
        check_arguments("Lion", {"lr": 0.1})
        assert "pytorch_optimizer" in sys.modules and "torchvision" not in sys.modules
        import anneal.optimizers.config
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def parse(**overrides) -> OptimizerConfig:
    values = params.merge(PARAMS, {"optimizer": overrides})
    return params.parse(values, {"optimizer": OptimizerConfig})["optimizer"]


def test_blocks_of_the_extra() -> None:
    with pytest.raises(ParamsError, match=r"optimizer\.Adan: missing, but .* write Adan: \{lr: 0\.005\}"):
        parse(name="Adan")
    with pytest.raises(ParamsError, match=r"optimizer\.Adan\.lr: missing; write Adan: \{lr: 0\.005, \.\.\.\}"):
        parse(Adan={"weight_decay": 0.1})
    with pytest.raises(ParamsError, match=r"optimizer\.LAMB\.lr: found -1, allowed: a number > 0 \| auto"):
        parse(LAMB={"lr": -1})
    chosen = parse(name="Adan", Adan={"lr": 0.01, "betas": [0.9, 0.9, 0.9]})
    assert chosen.arguments == {"lr": 0.01, "betas": [0.9, 0.9, 0.9]}
    with pytest.raises(ParamsError, match=r"optimizer\.Muon\.rest\.lr: found \"auto\", allowed: .*number"):
        parse(Muon={"rest": {"lr": "auto"}})


# ---- parameter groups -----------------------------------------------------------------------------------------------


@pytest.fixture
def network() -> nn.Module:
    arguments = {"widths": [4, 8], "depths": [1, 1], "stem": "small"}
    return build_network("resnet", arguments=arguments, num_classes=3, in_channels=1, height=8, width=8)


@pytest.mark.parametrize(
    ("exempt", "kinds"),
    [
        ([], {"weight": True, "bias": True, "norm.weight": True, "norm.bias": True, "scale": True}),
        (["bias"], {"weight": True, "bias": False, "norm.weight": True, "norm.bias": False, "scale": True}),
        (["norm"], {"weight": True, "bias": True, "norm.weight": False, "norm.bias": False, "scale": True}),
        (["scale"], {"weight": True, "bias": True, "norm.weight": True, "norm.bias": True, "scale": False}),
        (
            ["bias", "norm", "scale"],
            {"weight": True, "bias": False, "norm.weight": False, "norm.bias": False, "scale": False},
        ),
    ],
)
def test_what_decays(network: nn.Module, exempt: list[str], kinds: dict[str, bool]) -> None:
    network.end.register_parameter("scale", nn.Parameter(torch.ones(())))
    network.head.register_parameter("gamma", nn.Parameter(torch.ones(3)))
    groups = parameter_groups(network, lr=1.0, weight_decay=0.1, decay_exempt=exempt)
    assert len(groups) == (1 if all(kinds.values()) else 2)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(list(network.parameters()))
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert len(norms) == 6
    for name, parameter in network.named_parameters():
        layer, kind = name.rsplit(".", 1)
        kind = "scale" if kind == "gamma" else kind
        decays = kinds[f"norm.{kind}" if layer in norms else kind]
        assert decay[id(parameter)] == (0.1 if decays else 0.0), name


def test_frozen_parameters_are_left_out(network: nn.Module) -> None:
    network.get_submodule("stem").requires_grad_(False)
    groups = parameter_groups(network, lr=1.0, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters())) - 3
    for name in ("LBFGS", "Muon"):
        groups = build_optimizer(network, name, block_of(name)).param_groups
        assert sum(len(group["params"]) for group in groups) == len(list(network.parameters())) - 3


def test_decay_moves_only_what_it_should(network: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = build_optimizer(network, "SGD", {"lr": 0.1, "weight_decay": 0.5})
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        factor = 0.95 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_a_decay_that_is_left_out_is_torchs(network: nn.Module) -> None:
    groups = build_optimizer(network, "AdamW", {"lr": 0.1}).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]


def test_rules_without_decay_have_one_group(network: nn.Module) -> None:
    for name in ("Rprop", "LBFGS"):
        (group,) = build_optimizer(network, name, block_of(name)).param_groups
        assert group["params"] == list(network.parameters()) and "weight_decay" not in group


def test_rates_by_layer(network: nn.Module) -> None:
    # Weight layers: the stem, then two convolutions a block and the second block's shortcut, then the head.
    layers = weight_layers(network)
    assert [tuple(weight.shape)[:2] for weight in layers] == [(4, 1), (4, 4), (4, 4), (8, 4), (8, 8), (8, 4), (3, 8)]
    factors = rate_factors(network, first=3.0, head=10.0, layer_decay=0.5)
    expected = [3 * 0.5**6, 0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5, 10.0]
    assert [factors[weight] for weight in layers] == expected
    block = network.stages[1][0]
    assert factors[network.head.bias] == 10.0
    assert factors[network.stem.norm.weight] == expected[0]
    assert factors[block.norm2.bias] == expected[4]
    assert set(factors.values()) == set(expected) and len(factors) == len(list(network.parameters()))


def test_groups_merge_and_keep_their_order(network: nn.Module) -> None:
    plain = build_optimizer(network, "SGD", {"lr": 0.2, "weight_decay": 0.1})
    assert [(g["lr"], g["weight_decay"]) for g in plain.param_groups] == [(0.2, 0.1), (0.2, 0.0)]
    assert "lr" not in parameter_groups(network, lr=0.2, weight_decay=0.1)[0]
    factors = {"first": 0.5, "head": 2.0, "layer_decay": 1.0}
    placed = build_optimizer(network, "SGD", {"lr": 0.2, "weight_decay": 0.1}, lr_factors=factors)
    found = [(g["lr"], g["weight_decay"]) for g in placed.param_groups]
    assert found == [(0.1, 0.1), (0.1, 0.0), (0.2, 0.1), (0.2, 0.0), (0.4, 0.1), (0.4, 0.0)]
    moved = parameter_groups(network, lr=1.0, layer_decay=0.5)
    assert [group.get("lr", 1.0) for group in moved] == [0.5**k for k in range(6, -1, -1)]
    assert all("weight_decay" not in group for group in moved)


def test_a_network_of_one_layer_and_one_of_none() -> None:
    linear = nn.Linear(2, 2)
    assert set(rate_factors(linear, first=3.0, head=5.0, layer_decay=0.5).values()) == {15.0}
    assert set(rate_factors(Bowl(np.ones(3))).values()) == {1.0}


class Rates(pl.Callback):
    """The rates of all groups at their peak, and the schedule's factors of the newest step."""

    def on_train_batch_end(self, trainer, *_):
        groups = trainer.optimizers[0].param_groups
        self.seen = {round(group["lr"] / group["initial_lr"], 12) for group in groups}
        self.peaks = sorted({group["initial_lr"] for group in groups})


def test_factors_act_in_a_run(inputs, tmp_path) -> None:
    rates = Rates()
    factors = {"first": 0.1, "head": 2.0, "layer_decay": 1.0}
    train(inputs, tmp_path / "a", optimizer={"lr_factors": factors}, callbacks=(rates,), **SMALL)
    assert len(rates.seen) == 1 and max(rates.seen) < 1
    assert rates.peaks == pytest.approx([0.005, 0.05, 0.1])


def test_both_rates_of_muon_follow_schedule_and_batch(inputs, tmp_path) -> None:
    rates, (lr, rest) = Rates(), (block_of("Muon")["lr"], block_of("Muon")["rest"]["lr"])
    batch = {**SMALL["batch"], "lr_scaling": "linear", "reference_size": 8}
    train(inputs, tmp_path / "a", optimizer={"name": "Muon"}, callbacks=(rates,), batch=batch)
    assert len(rates.seen) == 1 and max(rates.seen) < 1
    assert rates.peaks == pytest.approx([2 * rest, 2 * lr])


# ---- Muon -----------------------------------------------------------------------------------------------------------


def newton_schulz(matrix: Array, coefficients: tuple[float, ...], steps: int) -> Array:
    x = matrix / np.linalg.norm(matrix)
    for _ in range(steps):
        a = x @ x.T
        x = coefficients[0] * x + (coefficients[1] * a + coefficients[2] * a @ a) @ x
    return x


QUINTIC = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("shape", [(6, 15), (15, 6)])
def test_orthogonalisation(shape) -> None:
    matrix = np.random.default_rng(0).normal(size=shape)
    for coefficients, steps, dtype, tolerance in [
        (QUINTIC, 5, torch.float64, 1e-10),
        (QUINTIC, 5, torch.float32, 1e-4),
        ((15 / 8, -10 / 8, 3 / 8), 30, torch.float64, 1e-10),
    ]:
        arguments = {"coefficients": coefficients, "steps": steps, "eps": 1e-7, "dtype": dtype}
        found = orthogonalize(torch.from_numpy(matrix), **arguments).double().numpy()
        np.testing.assert_allclose(found, newton_schulz(matrix, coefficients, steps), atol=tolerance)
        values = np.linalg.svd(found)[1]
        assert values.min() > 0.6 and values.max() < 1.25
    # With coefficients that converge it is the orthogonal factor of the polar decomposition.
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(found, u @ v, atol=1e-9)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_muon_steps_follow_the_law(nesterov: bool, adjust: str | None) -> None:
    start = np.random.default_rng(0).normal(size=(7, 4))
    bowl = Bowl(start)
    rest = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.1)
    arguments = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust}
    optimizer = MuonWithAdamW([{"params": [bowl.weight]}], rest, **arguments)
    w, mean = start, np.zeros_like(start)
    for _ in range(STEPS):
        bowl.weight.grad = torch.from_numpy(gradient(bowl.weight.detach().numpy()))
        optimizer.step()
        g = gradient(w)
        mean = 0.8 * mean + 0.2 * g
        update = newton_schulz(0.2 * g + 0.8 * mean if nesterov else mean, QUINTIC, 5)
        scale = 0.2 * math.sqrt(7) if adjust == "match_rms_adamw" else math.sqrt(7 / 4)
        w = w * (1 - 0.05 * 0.1) - 0.05 * scale * update
    assert np.abs(w - start).max() > 0.1
    np.testing.assert_allclose(bowl.weight.detach().numpy(), w, rtol=0, atol=1e-6)


def test_muon_is_torchs_but_for_bfloat16() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(8, 20)) for _ in range(2))
    arguments = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    pair = [
        MuonWithAdamW([{"params": [ours]}], torch.optim.AdamW([nn.Parameter(torch.ones(1))]), **arguments),
        torch.optim.Muon([theirs], **arguments),
    ]
    for _ in range(3):
        ours.grad = torch.randn(8, 20)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    assert (ours - 1).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_filter_banks_are_matrices_without_a_copy() -> None:
    torch.manual_seed(0)
    bank = torch.randn(6, 4, 3, 3)
    channels_last = bank.to(memory_format=torch.channels_last)
    for weight in (bank, channels_last, torch.randn(6, 4, 1, 1), torch.randn(6, 4)):
        matrix = as_matrix(weight, weight)
        assert matrix.shape == (6, weight.numel() // 6) and matrix.data_ptr() == weight.data_ptr()
        assert matrix._is_view() or matrix is weight
    # A gradient in another memory format gets the columns of its weight.
    assert torch.equal(as_matrix(bank, channels_last), as_matrix(channels_last, channels_last))
    moved = []
    for weight in (bank, channels_last):
        parameter = nn.Parameter(weight.clone())
        optimizer = MuonWithAdamW([{"params": [parameter]}], torch.optim.AdamW([nn.Parameter(torch.ones(1))]), lr=0.1)
        parameter.grad = bank.cos()
        optimizer.step()
        moved.append(parameter.detach())
    assert moved[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-5)


def backward(network: nn.Module, seed: int) -> float:
    draw = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(8, 1, 8, 8, generator=draw), torch.randint(0, 3, (8,), generator=draw)
    network.zero_grad()
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    return loss.item()


def test_muon_takes_hidden_weights_alone(network: nn.Module) -> None:
    factors = {"first": 1.0, "head": 2.0, "layer_decay": 1.0}
    optimizer = build_optimizer(network, "Muon", block_of("Muon"), lr_factors=factors)
    hidden = [p for group in optimizer.param_groups if "ns_steps" in group for p in group["params"]]
    assert [id(p) for p in hidden] == [id(p) for p in weight_layers(network)[1:-1]]
    rest = [p for group in optimizer.param_groups if "betas" in group for p in group["params"]]
    assert len(hidden) + len(rest) == len(list(network.parameters()))
    found = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    block = block_of("Muon")
    lr, decay = block["rest"]["lr"], block["rest"]["weight_decay"]
    assert found == [
        (block["lr"], block["weight_decay"]),
        (lr, decay),
        (lr, 0.0),
        (2 * lr, decay),
        (2 * lr, 0.0),
    ]


@pytest.mark.parametrize(
    ("name", "rho"), [*((name, 0.0) for name in NAMES), *((name, 0.05) for name in ("Muon", "SGD", "AdamW"))]
)
def test_a_run_goes_on_from_saved_state_to_the_bit(network: nn.Module, tmp_path, name: str, rho: float) -> None:
    def new() -> torch.optim.Optimizer:
        optimizer = build_optimizer(network, name, block_of(name), sam={"rho": rho, "adaptive": True})
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def steps(optimizer: torch.optim.Optimizer, seeds: range) -> dict[str, torch.Tensor]:
        for seed in seeds:
            for group in optimizer.param_groups:
                # The very first rate of a warm-up may be 0.
                group["lr"] = group["initial_lr"] * (seed > 0) / (1 + seed)

            def closure(seed=seed) -> float:
                return backward(network, seed)

            optimizer.step(closure)
        return {key: value.clone() for key, value in network.state_dict().items()}

    optimizer = new()
    half = steps(optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    whole = steps(optimizer, range(3, 6))
    network.load_state_dict(half)
    resumed = new()
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    again = steps(resumed, range(3, 6))
    assert all(value.isfinite().all() for value in whole.values())
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert not torch.equal(half["head.weight"], whole["head.weight"])


def test_muon_skips_what_has_no_gradient(network: nn.Module) -> None:
    optimizer = build_optimizer(network, "Muon", block_of("Muon"))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    backward(network, 0)
    still = {"stem.conv.weight", "stages.0.0.conv1.weight", "head.bias"}
    for name in still:
        network.get_parameter(name).grad = None
    optimizer.step()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter.detach(), before[name]) == (name in still), name
    optimizer.zero_grad()
    assert all(p.grad is None for p in network.parameters())


# ---- SAM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_step_is_that_of_the_paper(adaptive: bool) -> None:
    starts = [np.random.default_rng(i).normal(size=(2, 3)) for i in range(2)]
    bowls = nn.ModuleList(Bowl(start) for start in starts)
    optimizer = build_optimizer(bowls, "SGD", {"lr": 0.1, "momentum": 0.9}, sam={"rho": 0.3, "adaptive": adaptive})
    seen = []

    def closure() -> float:
        seen.append([bowl.weight.detach().numpy().copy() for bowl in bowls])
        for bowl in bowls:
            bowl.weight.grad = torch.from_numpy(gradient(bowl.weight.detach().numpy()))
        return float(len(seen))

    weights, velocity = starts, [np.zeros((2, 3))] * 2
    for step in range(1, 4):
        assert optimizer.step(closure) == 2 * step - 1
        assert len(seen) == 2 * step
        g = [gradient(w) for w in weights]
        size = [np.abs(w) if adaptive else np.ones_like(w) for w in weights]
        norm = math.sqrt(sum(((s * d) ** 2).sum() for s, d in zip(size, g, strict=True)))
        near = [w + 0.3 * s * s * d / norm for w, s, d in zip(weights, size, g, strict=True)]
        for found, w in zip(seen[-2], weights, strict=True):
            np.testing.assert_allclose(found, w, atol=1e-12)
        for found, e in zip(seen[-1], near, strict=True):
            np.testing.assert_allclose(found, e, atol=1e-10)
        velocity = [0.9 * v + gradient(e) for v, e in zip(velocity, near, strict=True)]
        weights = [w - 0.1 * v for w, v in zip(weights, velocity, strict=True)]
        for bowl, w in zip(bowls, weights, strict=True):
            np.testing.assert_allclose(bowl.weight.detach().numpy(), w, atol=1e-10)


def test_sam_puts_the_weights_back_to_the_bit() -> None:
    weight = nn.Parameter(torch.rand(1000) * 1e3)
    before = weight.detach().clone()
    optimizer = SAM(torch.optim.SGD([weight], lr=0.0), rho=0.7)

    def closure() -> float:
        weight.grad = torch.rand(1000)
        return 0.0

    optimizer.step(closure)
    assert torch.equal(weight.detach(), before)

    def fails() -> float:
        weight.grad = torch.rand(1000)
        if not torch.equal(weight.detach(), before):
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    assert torch.equal(weight.detach(), before)


def test_sam_shares_groups_and_state_with_its_base(network: nn.Module) -> None:
    optimizer = build_optimizer(network, "AdamW", {"lr": 0.1}, sam={"rho": 0.05, "adaptive": False})
    assert isinstance(optimizer, SAM) and isinstance(optimizer.base, torch.optim.AdamW)
    assert optimizer.param_groups is optimizer.base.param_groups
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.base.param_groups and optimizer.state is optimizer.base.state
    off = build_optimizer(network, "AdamW", {"lr": 0.1}, sam={"rho": 0.0, "adaptive": False})
    assert isinstance(off, torch.optim.AdamW)


class Passes(pl.Callback):
    """What the forward passes of a run saw and left behind."""

    def __init__(self) -> None:
        self.passes = self.steps = 0
        self.updates = []

    def on_train_start(self, trainer, pl_module):
        network = pl_module.classifier.network
        self.norm = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
        network.register_forward_hook(self.count)

    def count(self, module, *_):
        if module.training:
            self.passes += 1
            self.updates.append(int(self.norm.num_batches_tracked))

    def on_train_batch_end(self, *_):
        self.steps += 1


def test_sam_in_a_run_counts_each_sample_once(inputs, tmp_path) -> None:
    plain, sharp = Passes(), Passes()
    arguments = {"SGD": {"lr": 1e-9, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}}
    a = train(inputs, tmp_path / "a", optimizer=arguments, callbacks=(plain,), **SMALL)
    b = train(inputs, tmp_path / "b", optimizer=arguments | {"sam": {"rho": 0.5}}, callbacks=(sharp,), **SMALL)
    assert plain.steps == sharp.steps == plain.passes == 6
    assert sharp.passes == 12
    # Running statistics move at the first pass of each step alone.
    assert sharp.updates == [1 + i // 2 for i in range(12)]
    # With steps this small both stay where they began: losses, norms and statistics are those of the first passes.
    for one, other in zip(a.rows, b.rows, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-5)
        assert other.train_accuracy == one.train_accuracy
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
        assert other.val_loss == pytest.approx(one.val_loss, rel=1e-5)


def test_sam_in_a_run_is_sam_by_hand(inputs, tmp_path, monkeypatch) -> None:
    last = LastWeights()
    options = PLAIN | {"optimizer": PLAIN["optimizer"] | {"sam": {"rho": 0.1}}, "trainer": {"epochs": 1}}
    train(inputs, tmp_path / "a", callbacks=(last,), batch={"size": 48, "microbatch": 48}, **options)
    begun, moved = reference_run(inputs, 0, 48, 0.05), reference_run(inputs, 1, 48, 0.05)
    names = [name for name in begun if name.startswith("network.")]
    gradients = {name: (begun[name] - moved[name]) / 0.05 for name in names}
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))

    # The gradient nearby, by the same hand: plain SGD from there.
    def nearby(network, *arguments, **keywords):
        initialize(network, *arguments, **keywords)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter += 0.1 * gradients[f"network.{name}"] / norm

    monkeypatch.setattr("tests.test_training.initialize", nearby)
    at, after = reference_run(inputs, 0, 48, 0.05), reference_run(inputs, 1, 48, 0.05)
    for name in names:
        expected = begun[name] - (at[name] - after[name])
        assert (last.state[name] - expected).abs().max() < 1e-6
        assert (last.state[name] - moved[name]).abs().max() > 1e-6


# ---- what does not go together --------------------------------------------------------------------------------------

FINE = {
    "arguments": {"lr": 0.1},
    "lr_factors": {"first": 1.0, "head": 1.0, "layer_decay": 1.0},
    "sam_rho": 0.0,
    "size": 64,
    "microbatch": 64,
    "grows": False,
    "precision": "32-true",
    "gradient_clip": None,
}


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        (
            "LBFGS",
            {"microbatch": 32},
            r"batch\.microbatch: found 32 with optimizer\.name LBFGS, .* allowed: batch.size",
        ),
        ("SGD", {"sam_rho": 0.05, "microbatch": 32}, r"batch\.microbatch: found 32 with optimizer\.sam\.rho 0\.05, "),
        ("LBFGS", {"grows": True}, r"batch\.growth\.at: "),
        ("SGD", {"sam_rho": 0.05, "grows": True}, r"batch\.growth\.at: "),
        ("LBFGS", {"precision": "16-mixed"}, r"trainer\.precision: found 16-mixed .* allowed: 32-true"),
        ("SGD", {"sam_rho": 0.05, "precision": "16-mixed"}, r"trainer\.precision: found 16-mixed"),
        ("LBFGS", {"sam_rho": 0.05}, r"optimizer\.sam\.rho: found 0\.05 with LBFGS"),
        ("LBFGS", {"lr_factors": {"first": 1.0, "head": 2.0, "layer_decay": 1.0}}, r"optimizer\.lr_factors: "),
        ("Prodigy", {"lr_factors": {"first": 1.0, "head": 2.0, "layer_decay": 1.0}}, r"optimizer\.lr_factors: "),
        ("LBFGS", {"gradient_clip": 1.0}, r"regularization\.gradient_clip: found 1 with LBFGS"),
        *[
            (
                name,
                {"arguments": {"lr": "auto"}},
                rf"optimizer\.{name}\.lr: found auto with {name}, .* allowed: a number",
            )
            for name in ("LBFGS", "Rprop", "Prodigy", "Muon", "AdaBound")
        ],
    ],
)
def test_conflicts(name: str, change: dict, fault: str) -> None:
    assert conflicts(name, **FINE) == []
    (found,) = conflicts(name, **FINE | change)
    with pytest.raises(UserError, match=fault):
        raise UserError(found)
    assert conflicts("SGD", **FINE | {"microbatch": 8, "grows": True, "precision": "16-mixed"}) == []


def test_conflicts_are_refused_before_any_work(inputs, tmp_path) -> None:
    optimizer = {"name": "LBFGS", "LBFGS": {"lr": "auto"}}
    values = {"optimizer": optimizer, "batch": {"size": 32, "microbatch": 16}}
    with pytest.raises(ParamsError) as caught:
        train(inputs, tmp_path / "a", **values)
    assert len(caught.value.faults) == 2
    chosen = sections(**values)
    chosen = {key: chosen[key] for key in params.MEMBER_SECTIONS[1:]}
    preprocess = params.parse(PARAMS, {"preprocess": PreprocessConfig})["preprocess"]
    with pytest.raises(ParamsError) as again:
        check_recipe(**chosen, preprocess=preprocess, num_train=150)
    assert again.value.faults == caught.value.faults
    chosen = {**chosen, **sections(optimizer={"name": "Adan", "Adan": {"lr": 0.1, "beta": [0.9, 0.9]}})}
    chosen = {key: chosen[key] for key in params.MEMBER_SECTIONS[1:]}
    with pytest.raises(ParamsError, match=r"optimizer\.Adan\.beta: unknown argument; did you mean 'betas'"):
        check_recipe(**chosen, preprocess=preprocess, num_train=150)
    with pytest.raises(UserError, match=r"optimizer\.Adan\.beta: unknown argument"):
        train(inputs, tmp_path / "a", optimizer={"name": "Adan", "Adan": {"lr": 0.1, "beta": [0.9, 0.9]}}, **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["LBFGS", "Rprop", "Prodigy"])
def test_what_has_no_rate_is_not_scaled(name: str) -> None:
    (fault,) = rate_faults(name, 0.1, "linear")
    assert fault.startswith(f"batch.lr_scaling: found linear with {name}, ")
    assert rate_faults(name, 0.1, "none") == []


def test_rprop_reads_its_rate_once_and_follows_no_schedule(inputs, tmp_path) -> None:
    optimizer = {"name": "Rprop", "Rprop": {"lr": 0.002}}
    schedule = {"name": "cosine", "warmup": {"length": 0.5, "start": 0.01}}
    result = train(inputs, tmp_path / "a", optimizer=optimizer, schedule=schedule, **SMALL)
    assert {row.lr for row in result.rows} == {0.002}
    plain = {"name": "constant", "warmup": {"length": 0.0}}
    train(inputs, tmp_path / "b", optimizer=optimizer, schedule=plain, **SMALL)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("model", "fits"), [({"hidden": [8]}, False), ({"hidden": [8, 8]}, True)])
def test_muon_needs_hidden_weights(model: dict, fits: bool) -> None:
    chosen = sections(optimizer={"name": "Muon"}, model={"name": "mlp", "mlp": model})
    chosen = {key: chosen[key] for key in params.MEMBER_SECTIONS[1:]}
    preprocess = params.parse(PARAMS, {"preprocess": PreprocessConfig})["preprocess"]
    with nullcontext() if fits else pytest.raises(ParamsError, match=r"optimizer\.name: found Muon, .*model\.mlp"):
        check_recipe(**chosen, preprocess=preprocess, num_train=150)


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("LARS", {"lr": 0.1, "momentum": "abc"}, r"optimizer\.LARS\.momentum: found abc, the default is 0\.9"),
        ("Lion", {"lr": 0.1, "betas": 0.9}, r"optimizer\.Lion\.betas: found 0\.9, the default is"),
    ],
)
def test_a_wrong_value_of_the_extra_names_its_argument(name: str, arguments: dict, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        check_arguments(name, arguments)


def test_ranges_that_torch_finds_out_too_late() -> None:
    with pytest.raises(ParamsError, match=r"optimizer\.Adafactor\.eps: found \[None, None\]"):
        parse(Adafactor={"lr": 0.1, "eps": [None, None]})
    with pytest.raises(ParamsError, match=r"optimizer\.Rprop\.step_sizes: found \[1.0, 0.1\]"):
        parse(Rprop={"lr": 0.1, "step_sizes": [1.0, 0.1]})


# ---- every one of them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXTRA)
def test_twenty_steps_of_the_extra_lower_the_loss(network: nn.Module, name: str) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 3
    optimizer = build_optimizer(network, name, block_of(name))
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), num_train=48, num_val=16)


RUNS: dict[str, dict] = {
    name: {"name": name} | ({} if name in PARAMS["optimizer"] else {name: block_of(name)}) for name in NAMES
}
RUNS["SGD with SAM"] = {"name": "SGD", "sam": {"rho": 0.05}}
RUNS["Muon with SAM"] = {"name": "Muon", "sam": {"rho": 0.5, "adaptive": True}}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_through_the_pipelines_code(inputs, tmp_path, run: str) -> None:
    begun = {}

    class Begin(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            begun.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

        def on_train_end(self, trainer, pl_module):
            begun.update({name: begun[name] - p.detach() for name, p in pl_module.named_parameters()})

    options = {"optimizer": RUNS[run]} | SMALL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train(inputs, tmp_path / "a", callbacks=(Begin(),), **options)
    for row in result.rows:
        assert math.isfinite(row.train_loss) and math.isfinite(row.val_loss)
        assert row.train_loss < 3
    assert [row.step for row in result.rows] == [3, 6]
    assert all((difference != 0).any() for difference in begun.values())
    train(inputs, tmp_path / "b", **options)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in "ab")
    assert first == second
