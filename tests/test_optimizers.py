"""Optimizers: each law derived again in numpy, and which parameters decay."""

import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from anneal.models.build import build_network
from anneal.optimizers.build import build_optimizer, parameter_groups
from anneal.params import UserError

Array = np.ndarray
STEPS = 10


def gradient(weight: Array) -> Array:
    """Of a badly conditioned bowl with a ripple: neither constant nor linear in the weights."""
    return np.linspace(0.1, 3.0, weight.size) * weight + 0.3 * np.sin(5.0 * weight)


def sgd(weight: Array, *, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Array:
    velocity = np.zeros_like(weight)
    for _ in range(STEPS):
        g = gradient(weight) + weight_decay * weight
        velocity = momentum * velocity + g
        weight = weight - lr * (g + momentum * velocity if nesterov else velocity)
    return weight


def adam(
    weight: Array,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> Array:
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, STEPS + 1):
        g = gradient(weight)
        if decoupled:
            weight = weight - lr * weight_decay * weight
        else:
            g = g + weight_decay * weight
        mean = betas[0] * mean + (1 - betas[0]) * g
        square = betas[1] * square + (1 - betas[1]) * g * g
        unbiased = np.sqrt(square / (1 - betas[1] ** step))
        weight = weight - lr * (mean / (1 - betas[0] ** step)) / (unbiased + eps)
    return weight


def adamw(weight: Array, **arguments: float) -> Array:
    return adam(weight, decoupled=True, **arguments)


class Bowl(nn.Module):
    def __init__(self, weight: Array) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(weight.copy()))


CASES: list[tuple[str, dict, Callable[..., Array]]] = [
    ("SGD", {"lr": 0.1}, sgd),
    ("SGD", {"lr": 0.1, "weight_decay": 0.05}, sgd),
    ("SGD", {"lr": 0.1, "momentum": 0.9}, sgd),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}, sgd),
    ("Adam", {"lr": 0.03}, adam),
    ("Adam", {"lr": 0.03, "betas": [0.8, 0.95], "eps": 1e-3, "weight_decay": 0.1}, adam),
    ("AdamW", {"lr": 0.03, "betas": [0.9, 0.999], "weight_decay": 0.1}, adamw),
]


@pytest.mark.parametrize(("name", "arguments", "law"), CASES)
def test_ten_steps_follow_the_law(name: str, arguments: dict, law: Callable[..., Array]) -> None:
    start = np.random.default_rng(0).normal(size=17)
    bowl = Bowl(start)
    optimizer = build_optimizer(bowl, name, arguments)
    for _ in range(STEPS):
        bowl.weight.grad = torch.from_numpy(gradient(bowl.weight.detach().numpy()))
        optimizer.step()
    expected = law(start, **arguments)
    assert np.abs(expected - start).max() > 0.1
    np.testing.assert_allclose(bowl.weight.detach().numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_fused_steps_repeat_to_the_bit(name: str) -> None:
    def weights() -> torch.Tensor:
        torch.manual_seed(0)
        layer = nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(layer, name, {"lr": 0.01, "weight_decay": 0.01})
        assert optimizer.defaults["fused"]
        for _ in range(STEPS):
            optimizer.zero_grad()
            layer(torch.ones(2, 16, 8, 8)).square().mean().backward()
            optimizer.step()
        return layer.weight.detach()

    assert torch.equal(weights(), weights())


@pytest.fixture
def network() -> nn.Module:
    arguments = {"widths": [4, 8], "depths": [1, 1], "stem": "small"}
    return build_network("resnet", arguments=arguments, num_classes=3, in_channels=1, height=8, width=8)


@pytest.mark.parametrize(
    ("exempt", "kinds"),
    [
        ([], {"weight": True, "bias": True, "norm.weight": True, "norm.bias": True}),
        (["bias"], {"weight": True, "bias": False, "norm.weight": True, "norm.bias": False}),
        (["norm"], {"weight": True, "bias": True, "norm.weight": False, "norm.bias": False}),
        (["bias", "norm"], {"weight": True, "bias": False, "norm.weight": False, "norm.bias": False}),
    ],
)
def test_what_decays(network: nn.Module, exempt: list[str], kinds: dict[str, bool]) -> None:
    groups = parameter_groups(network, 0.1, exempt)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(list(network.parameters()))
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert len(norms) == 6
    for name, parameter in network.named_parameters():
        layer, kind = name.rsplit(".", 1)
        decays = kinds[f"norm.{kind}" if layer in norms else kind]
        assert decay[id(parameter)] == (0.1 if decays else 0.0), name


def test_frozen_parameters_are_left_out(network: nn.Module) -> None:
    network.get_submodule("stem").requires_grad_(False)
    groups = parameter_groups(network, 0.1)
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


def test_any_class_of_torch_optim_by_its_name(network: nn.Module) -> None:
    optimizer = build_optimizer(network, "NAdam", {"lr": 0.01, "betas": [0.9, 0.99]})
    assert isinstance(optimizer, torch.optim.NAdam)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    assert "fused" not in inspect.signature(torch.optim.NAdam).parameters


def test_mistakes_are_named(network: nn.Module) -> None:
    with pytest.raises(UserError, match=r"optimizer.name: found AdamX, .*did you mean 'Adam'"):
        build_optimizer(network, "AdamX", {"lr": 0.1})
    with pytest.raises(UserError, match=r"optimizer.SGD.momentun: unknown argument; did you mean 'momentum'"):
        build_optimizer(network, "SGD", {"lr": 0.1, "momentun": 0.9})
