"""Initial weights: their law, their keys, and branches that start at zero."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from anneal.models.build import build_network
from anneal.models.initialization import GAINS, LAWS, initialize
from anneal.models.layers import ACTIVATIONS
from anneal.models.resnet import BLOCKS
from anneal.params import UserError

RESNET = {"widths": [32, 64], "depths": [2, 1], "stem": "small"}


def build(name: str = "resnet", arguments: dict[str, Any] = RESNET, **keywords: Any) -> nn.Module:
    return build_network(name, arguments=arguments, num_classes=10, in_channels=3, height=16, width=16, **keywords)


def fill(
    network: nn.Module, seed: int = 0, *, zero_last: bool = False, mode: str = "fan_out", activation: str = "ReLU"
):
    initialize(network, "kaiming_normal", {"mode": mode}, zero_last=zero_last, activation=activation, seed=seed)
    return network


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gain_keeps_the_power_of_a_signal(activation: str) -> None:
    z = np.linspace(-12, 12, 400_001)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    power = np.trapezoid(ACTIVATIONS[activation]()(torch.from_numpy(z)).numpy() ** 2 * density, z)
    assert GAINS[activation] == pytest.approx(1 / math.sqrt(power), rel=1e-6)


def test_gain_of_relu_is_he() -> None:
    assert GAINS["ReLU"] == pytest.approx(math.sqrt(2))
    assert GAINS["LeakyReLU"] == pytest.approx(nn.init.calculate_gain("leaky_relu", 0.01))


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("activation", ["ReLU", "Tanh"])
@pytest.mark.parametrize("name", ["resnet", "convnet", "mlp"])
def test_std_of_each_layer(name: str, mode: str, activation: str) -> None:
    blocks = {"resnet": RESNET, "convnet": {"widths": [32, 64], "depth": 2}, "mlp": {"hidden": [64, 32]}}
    network = fill(build(name, blocks[name], activation=activation), mode=mode, activation=activation)
    checked = 0
    for prefix, module in network.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weight = module.weight.detach()
        area = weight[0, 0].numel()
        fan = weight.shape[1 if mode == "fan_in" or prefix == "head" else 0] * area
        expected = (1.0 if prefix == "head" else GAINS[activation]) / math.sqrt(fan)
        n = weight.numel()
        # Five standard errors of a normal sample's mean and standard deviation.
        assert abs(float(weight.mean())) < 5 * expected / math.sqrt(n), prefix
        assert abs(float(weight.std()) / expected - 1) < 5 / math.sqrt(2 * n), prefix
        checked += 1
    assert checked == {"resnet": 9, "convnet": 5, "mlp": 3}[name]


@pytest.mark.parametrize("activation", ["ReLU", "GELU", "Tanh"])
def test_power_neither_dies_nor_explodes_over_twenty_layers(activation: str) -> None:
    network = build("mlp", {"hidden": [256] * 20}, activation=activation, norm="none")
    fill(network, mode="fan_in", activation=activation)
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    power = network.get_submodule("hidden")(x.flatten(1)).square().mean().item()
    # A gain of 1 would leave GELU's at 1e-7.
    assert 0.03 < power < 30.0


def test_biases_and_norms() -> None:
    network = fill(build(norm_position="after"))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            assert (module.bias == 0).all()


@pytest.mark.parametrize("name", LAWS)
def test_same_bits_for_a_seed_whatever_was_there_before(name: str) -> None:
    assert name == "kaiming_normal"
    torch.manual_seed(1)
    a = fill(build(), 5).state_dict()
    torch.manual_seed(2)
    b, c = fill(build(), 5).state_dict(), fill(build(), 6).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    different = [key for key in a if not torch.equal(a[key], c[key])]
    assert sorted(different) == sorted(key for key in a if a[key].ndim > 1)


def test_memory_format_does_not_change_the_draw() -> None:
    plain = fill(build().to(memory_format=torch.contiguous_format)).state_dict()
    last = fill(build()).state_dict()
    assert all(torch.equal(plain[key], last[key]) for key in plain)


def test_adding_a_block_leaves_the_draws_of_the_others() -> None:
    small = fill(build()).state_dict()
    large = fill(build(arguments={**RESNET, "depths": [3, 1]})).state_dict()
    assert len(large) > len(small)
    assert all(torch.equal(small[key], large[key]) for key in small)


def test_two_layers_of_one_shape_draw_apart() -> None:
    state = fill(build()).state_dict()
    assert not torch.equal(state["stages.0.0.conv1.weight"], state["stages.0.1.conv1.weight"])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("position", ["before", "after"])
def test_zero_last_makes_each_branch_vanish_and_still_learn(block: str, norm: str, position: str) -> None:
    arguments = {**RESNET, "block": block}
    network = fill(build(arguments=arguments, norm=norm, norm_position=position), zero_last=True)
    blocks = [module for module in network.modules() if isinstance(module, tuple(BLOCKS.values()))]
    assert len(blocks) == 3
    branches: list[torch.Tensor] = []
    for module in blocks:
        module.drop.register_forward_hook(lambda _, inputs, output: branches.append(output))
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network(x).square().sum().backward()
    assert len(branches) == 3 and all((branch == 0).all() for branch in branches)
    for module in blocks:
        assert module.last.get_parameter("weight").grad.abs().max() > 0


def test_without_zero_last_no_branch_vanishes() -> None:
    for module in fill(build()).modules():
        if isinstance(module, tuple(BLOCKS.values())):
            assert (module.last.get_parameter("weight") != 0).any()


def test_unknown_law() -> None:
    with pytest.raises(UserError, match=r"init.name: found kaiming_norml, .*did you mean 'kaiming_normal'"):
        initialize(build(), "kaiming_norml", {}, zero_last=False, activation="ReLU", seed=0)
