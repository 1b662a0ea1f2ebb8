"""Initial weights: their laws, their keys, what is fitted to images, and branches that start at zero."""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ks_2samp
from torch import nn

from anneal import params
from anneal.conflicts import check_recipe
from anneal.models.build import build_network, load_classifier
from anneal.models.config import InitConfig
from anneal.models.initialization import DATA_LAWS, GAINS, LAWS, Weight, initialize, whitening_filters
from anneal.models.layers import ACTIVATIONS, Custom
from anneal.models.resnet import BLOCKS
from anneal.params import ParamsError, UserError
from anneal.preprocess import PreprocessConfig
from anneal.training.setup import first_batch, set_up
from tests.test_training import sections, train, write_inputs

RESNET = {"widths": [32, 64], "depths": [2, 1], "stem": "small"}
NETWORKS = {"resnet": RESNET, "convnet": {"widths": [32, 64], "depth": 2}, "mlp": {"hidden": [64, 32]}}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "zeros": {},
    "constant": {"value": 0.3},
    "normal": {"std": 0.02},
    "truncated_normal": {"std": 0.02},
    "uniform": {"limit": 0.1},
    "xavier_normal": {"gain": 1.3},
    "xavier_uniform": {"gain": 1.3},
    "kaiming_normal": {"mode": "fan_out"},
    "kaiming_uniform": {"mode": "fan_out"},
    "orthogonal": {"gain": 1.3},
    "lsuv": {"tolerance": 0.01, "max_iterations": 10},
}
RANDOM = [name for name in LAWS if name not in ("zeros", "constant")]


def build(name: str = "resnet", arguments: dict[str, Any] | None = None, **keywords: Any) -> nn.Module:
    arguments = NETWORKS[name] if arguments is None else arguments
    geometry = {"num_classes": 10, "in_channels": 3, "height": 16, "width": 16}
    return build_network(name, arguments=arguments, **geometry, **keywords)


def fill(network: nn.Module, seed: int = 0, *, law: str = "kaiming_normal", **keywords: Any) -> nn.Module:
    own = {key: keywords.pop(key) for key in list(keywords) if key in ARGUMENTS[law]}
    keywords = {"zero_last": False, "activation": "ReLU", **keywords}
    initialize(network, law, {**ARGUMENTS[law], **own}, seed=seed, **keywords)
    return network


def weights(network: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def natural(number: int = 16, channels: int = 3, side: int = 16) -> torch.Tensor:
    """Images whose neighbouring pixels and channels are alike, not centred."""
    noise = torch.randn(number, channels, side + 4, side + 4, generator=torch.Generator().manual_seed(3))
    smooth = F.avg_pool2d(noise, 5, 1) * 5 + 0.1 * noise[:, :, 2:-2, 2:-2]
    mixed = torch.einsum("nchw,dc->ndhw", smooth, torch.eye(channels) + 0.5)
    return mixed + 0.7


# ---- gains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gain_keeps_the_power_of_a_signal(activation: str) -> None:
    z = np.linspace(-12, 12, 400_001)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    outputs = ACTIVATIONS[activation]().double()(torch.from_numpy(z)).detach().numpy()
    assert GAINS[activation] == pytest.approx(1 / math.sqrt(np.trapezoid(outputs**2 * density, z)), rel=1e-5)


def test_gain_of_relu_is_he() -> None:
    assert GAINS["ReLU"] == pytest.approx(math.sqrt(2))
    assert GAINS["LeakyReLU"] == pytest.approx(nn.init.calculate_gain("leaky_relu", 0.01))


# ---- laws -----------------------------------------------------------------------------------------------------------


REFERENCES: dict[str, Callable[[torch.Tensor, bool], Any]] = {
    "zeros": lambda w, head: nn.init.zeros_(w),
    "constant": lambda w, head: nn.init.constant_(w, 0.3),
    "normal": lambda w, head: nn.init.normal_(w, 0.0, 0.02),
    "truncated_normal": lambda w, head: nn.init.trunc_normal_(w, 0.0, 0.02, -0.04, 0.04),
    "uniform": lambda w, head: nn.init.uniform_(w, -0.1, 0.1),
    "xavier_normal": lambda w, head: nn.init.xavier_normal_(w, 1.0 if head else 1.3),
    "xavier_uniform": lambda w, head: nn.init.xavier_uniform_(w, 1.0 if head else 1.3),
    "kaiming_normal": lambda w, head: nn.init.kaiming_normal_(
        w, mode="fan_in" if head else "fan_out", nonlinearity="linear" if head else "relu"
    ),
    "kaiming_uniform": lambda w, head: nn.init.kaiming_uniform_(
        w, mode="fan_in" if head else "fan_out", nonlinearity="linear" if head else "relu"
    ),
    "orthogonal": lambda w, head: nn.init.orthogonal_(w, 1.0 if head else 1.3),
}
"""torch's own draw of the same law, which knows nothing of ours."""


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("law", LAWS)
def test_each_layer_is_drawn_as_torch_draws_it(law: str, name: str) -> None:
    network = fill(build(name), law=law)
    checked = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for prefix, layer in weights(network).items():
            weight = layer.weight.detach()
            draws = torch.stack([REFERENCES[law](torch.empty(weight.shape), prefix == "head") for _ in range(4)])
            checked += 1
            if law in ("zeros", "constant"):
                assert torch.equal(weight.contiguous(), draws[0])
                continue
            assert ks_2samp(weight.flatten().numpy(), draws.flatten().numpy()).pvalue > 1e-3, prefix
            std, n = float(draws.std()), weight.numel()
            # Five standard errors of a normal sample's mean and standard deviation; others' are smaller.
            assert abs(float(weight.mean())) < 5 * std / math.sqrt(n), prefix
            assert abs(float(weight.std()) / std - 1) < 5 / math.sqrt(2 * n), prefix
    assert checked == {"resnet": 9, "convnet": 5, "mlp": 3}[name]


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("activation", ["ReLU", "Tanh", "GELU"])
@pytest.mark.parametrize("law", ["kaiming_normal", "kaiming_uniform"])
def test_fan_and_gain_of_each_layer(law: str, mode: str, activation: str) -> None:
    network = fill(build(activation=activation), law=law, mode=mode, activation=activation)
    for prefix, layer in weights(network).items():
        weight = layer.weight.detach()
        fan = weight.shape[1 if mode == "fan_in" or prefix == "head" else 0] * weight[0, 0].numel()
        expected = (1.0 if prefix == "head" else GAINS[activation]) / math.sqrt(fan)
        assert float(weight.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * weight.numel())), prefix
        if law == "kaiming_uniform":
            assert 0.9 * expected * math.sqrt(3) < float(weight.abs().max()) <= expected * math.sqrt(3) * 1.000001


@pytest.mark.parametrize("law", ["xavier_normal", "xavier_uniform", "orthogonal"])
def test_gain_by_the_activation(law: str) -> None:
    # A factor of float32 weights rounds.
    auto = weights(fill(build(), law=law, gain="auto", activation="GELU"))
    one = weights(fill(build(), law=law, gain=1.0))
    for name, layer in auto.items():
        factor = 1.0 if name == "head" else GAINS["GELU"]
        torch.testing.assert_close(layer.weight, one[name].weight * factor, rtol=1e-5, atol=1e-7)


def test_ranges() -> None:
    for layer in weights(fill(build(), law="truncated_normal")).values():
        assert float(layer.weight.detach().abs().max()) <= 0.04
        assert float(layer.weight.detach().std()) == pytest.approx(
            0.02 * 0.8796, rel=5 / math.sqrt(2 * layer.weight.numel())
        )
    assert (
        max(
            float(layer.weight.detach().abs().max())
            for layer in weights(fill(build(), law="truncated_normal")).values()
        )
        > 0.039
    )
    for layer in weights(fill(build(), law="uniform")).values():
        assert 0.09 < float(layer.weight.detach().abs().max()) <= 0.1


@pytest.mark.parametrize("gain", [1.0, 1.7])
@pytest.mark.parametrize(
    ("out", "inside", "kernel", "groups"), [(64, 4, 3, 1), (16, 32, 3, 1), (32, 32, 3, 4), (24, 24, 5, 24)]
)
def test_orthogonal_is(out: int, inside: int, kernel: int, groups: int, gain: float) -> None:
    conv = nn.Conv2d(inside, out, kernel, groups=groups)
    fill(nn.Sequential(conv), law="orthogonal", gain=gain)
    for block in conv.weight.detach().double().flatten(1).chunk(groups):
        square = block @ block.T if block.shape[0] <= block.shape[1] else block.T @ block
        torch.testing.assert_close(square, gain**2 * torch.eye(len(square), dtype=torch.float64), rtol=0, atol=2e-6)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_fans_count_inputs_and_outputs(groups: int) -> None:
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=groups, bias=False)
    nn.init.ones_(conv.weight)
    x = torch.zeros(1, 8, 9, 9, requires_grad=True)
    conv(x)[0, 0, 4, 4].backward()
    x_one = torch.zeros(1, 8, 9, 9)
    x_one[0, 0, 4, 4] = 1
    weight = Weight(tuple(conv.weight.shape), groups, 1.0, torch.Generator())
    assert weight.fan_in == int((x.grad != 0).sum()) == 8 // groups * 9
    assert weight.fan_out == int((conv(x_one) != 0).sum()) == 16 // groups * 9
    assert Weight((5, 3), 1, 1.0, torch.Generator()).fan("fan_out") == 5


@pytest.mark.parametrize("groups", [4, 256])
@pytest.mark.parametrize("law", ["kaiming_normal", "kaiming_uniform", "orthogonal"])
def test_grouped_convolutions_keep_the_power_both_ways(law: str, groups: int) -> None:
    conv = nn.Conv2d(256, 256, 3, padding=1, padding_mode="circular", groups=groups, bias=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 256, 12, 12, generator=generator, requires_grad=True)
    modes = ["fan_in", "fan_out"] if law != "orthogonal" else ["fan_in"]
    for mode in modes:
        chosen = {"mode": mode} if law != "orthogonal" else {"gain": 1.0}
        fill(nn.Sequential(OrderedDict(conv=conv)), law=law, activation="linear", **chosen)
        y = conv(x)
        back = torch.autograd.grad(y, x, torch.randn(y.shape, generator=generator))[0]
        assert float(y.detach().square().mean()) == pytest.approx(1.0, rel=0.15)
        assert float(back.square().mean()) == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize("activation", ["ReLU", "GELU", "Tanh"])
def test_power_neither_dies_nor_explodes_over_twenty_layers(activation: str) -> None:
    network = build("mlp", {"hidden": [256] * 20}, activation=activation, norm="none")
    fill(network, mode="fan_in", activation=activation)
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    power = network.get_submodule("hidden")(x.flatten(1)).square().mean().item()
    # A gain of 1 would leave GELU's at 1e-7.
    assert 0.03 < power < 30.0


def test_biases_norms_and_slopes() -> None:
    for module in fill(build(norm_position="after", activation="PReLU"), activation="PReLU").modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            assert (module.bias == 0).all()
        elif isinstance(module, nn.PReLU):
            assert (module.weight == 0.25).all()


def test_a_network_from_elsewhere_keeps_its_own_draw_unless_it_is_fitted_to_images() -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return Custom(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)))

    own, images = made().state_dict(), natural()
    drawn = fill(made(), law="zeros").state_dict()
    assert all(torch.equal(own[key], drawn[key]) for key in own)
    fitted = fill(made(), law="lsuv", images=images)
    assert float(fitted(images).var().detach()) == pytest.approx(1.0, abs=0.012)
    white = fill(made(), images=images, whiten_eps=1e-3).state_dict()
    assert [key for key in own if not torch.equal(own[key], white[key])] == ["module.0.weight", "module.0.bias"]


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [*LAWS, *DATA_LAWS])
def test_same_bits_for_a_seed_whatever_was_there_before(law: str) -> None:
    images = natural()
    torch.manual_seed(1)
    a = fill(build(), 5, law=law, images=images).state_dict()
    torch.manual_seed(2)
    b, c = fill(build(), 5, law=law, images=images), fill(build(), 6, law=law, images=images).state_dict()
    assert all(torch.equal(a[key], value) for key, value in b.state_dict().items())
    different = [key for key in a if not torch.equal(a[key], c[key])]
    assert sorted(different) == ([] if law in ("zeros", "constant") else sorted(key for key in a if a[key].ndim > 1))
    assert all(torch.isfinite(a[key]).all() for key in a)


@pytest.mark.parametrize("law", ["kaiming_normal", "orthogonal", "truncated_normal", "lsuv"])
def test_neither_memory_format_nor_threads_change_the_draw(law: str) -> None:
    images = natural()
    plain = build().to(memory_format=torch.contiguous_format)
    first = fill(plain, law=law, images=images, whiten_eps=1e-3).state_dict()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        second = fill(build(), law=law, images=images, whiten_eps=1e-3).state_dict()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_adding_a_block_leaves_the_draws_of_the_others() -> None:
    small = fill(build()).state_dict()
    large = fill(build(arguments={**RESNET, "depths": [3, 1]})).state_dict()
    assert len(large) > len(small)
    assert all(torch.equal(small[key], large[key]) for key in small)


@pytest.mark.parametrize("law", RANDOM)
def test_two_layers_of_one_shape_draw_apart(law: str) -> None:
    state = fill(build(), law=law).state_dict()
    assert not torch.equal(state["stages.0.0.conv1.weight"], state["stages.0.1.conv1.weight"])


# ---- LSUV -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("activation", ["ReLU", "Tanh"])
def test_lsuv_gives_each_layer_unit_variance(name: str, norm: str, activation: str) -> None:
    images = natural() * 20
    network = build(name, norm=norm, activation=activation, dropout=0.5)
    for buffer in network.buffers():
        buffer.fill_(3)
    state = torch.get_rng_state()
    fill(network.eval(), law="lsuv", images=images, activation=activation)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module.training for module in network.modules())
    assert all((buffer == 3).all() for buffer in network.buffers())
    variances = {}
    for prefix, layer in weights(network).items():
        # Measured by torch.var in float32, dropout off, batch statistics on.
        layer.register_forward_hook(lambda m, x, y, prefix=prefix: variances.update({prefix: float(y.detach().var())}))
    network.train().get_submodule("dropout").eval()
    network(images)
    assert len(variances) == len(weights(network))
    assert all(value == pytest.approx(1.0, abs=0.012) for value in variances.values()), variances


def test_lsuv_scales_an_orthogonal_draw() -> None:
    images = natural()
    network, start = fill(build(), law="lsuv", images=images), fill(build(), law="orthogonal", gain=1.0)
    for name, layer in weights(network).items():
        ratio = layer.weight / weights(start)[name].weight
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)


def test_lsuv_stops_at_the_tolerance_and_after_max_iterations() -> None:
    images = natural()
    start = fill(build("mlp"), law="orthogonal", gain=1.0).state_dict()
    loose = fill(build("mlp"), law="lsuv", images=images / images.std(), tolerance=0.999).state_dict()
    assert torch.equal(start["head.weight"], loose["head.weight"])


def test_lsuv_leaves_layers_alone_that_start_at_zero() -> None:
    network = build(arguments={**RESNET, "block": "preactivation"})
    fill(network, law="lsuv", images=natural(), zero_last=True)
    lasts = [m.last for m in network.modules() if isinstance(m, tuple(BLOCKS.values()))]
    assert len(lasts) == 3 and all((last.weight == 0).all() for last in lasts)
    assert all(torch.isfinite(p).all() for p in network.parameters())


# ---- whitening ------------------------------------------------------------------------------------------------------


def test_whitened_responses_are_uncorrelated() -> None:
    images, eps = natural(), 1e-3
    filters, mean = whitening_filters(images, (3, 3), eps=eps)
    assert filters.shape == (27, 3, 3, 3) and mean.shape == (3, 3, 3)
    # numpy's own covariance of patches cut by hand.
    patches = np.lib.stride_tricks.sliding_window_view(images.double().numpy(), (3, 3), (2, 3))
    patches = patches.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    covariance = np.cov(patches, rowvar=False, bias=True)
    values = np.linalg.eigvalsh(covariance)[::-1]
    flat = filters.flatten(1).numpy()
    expected = np.diag(values / (values + eps * values.mean()))
    np.testing.assert_allclose(flat @ covariance @ flat.T, expected, atol=1e-9)
    np.testing.assert_allclose(mean.flatten().numpy(), patches.mean(0), atol=1e-12)
    assert (np.diff(values) < 0).all()


@pytest.mark.parametrize(("width", "signed"), [(16, 0), (32, 5), (54, 27), (64, 27)])
def test_whitening_fills_the_first_convolution(width: int, signed: int) -> None:
    images = natural()
    network = build("convnet", {"widths": [width, 8], "depth": 1}, norm="none")
    fill(network, images=images, whiten_eps=1e-3)
    first = network.get_submodule("stages.0.conv0")
    filters, _ = whitening_filters(images, (3, 3), eps=1e-3)
    count = min(width, 27)
    torch.testing.assert_close(first.weight[:count], filters[:count].float())
    torch.testing.assert_close(first.weight[27 : 27 + signed], -filters[:signed].float())
    plain = fill(build("convnet", {"widths": [width, 8], "depth": 1}, norm="none"))
    assert torch.equal(first.weight[54:], plain.get_submodule("stages.0.conv0").weight[54:])
    # With its bias the responses to whole patches have mean 0.
    inside = first(images)[:, : count + signed, 1:-1, 1:-1]
    assert float(inside.detach().mean((0, 2, 3)).abs().max()) < 1e-4
    assert all(torch.equal(network.state_dict()[k], v) for k, v in plain.state_dict().items() if "stages.0" not in k)


def test_signs_and_order_do_not_depend_on_the_order_of_images() -> None:
    images = natural()
    a, _ = whitening_filters(images, (3, 3), eps=1e-3)
    b, _ = whitening_filters(images.flip(0), (3, 3), eps=1e-3)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_components_that_are_not_there_are_left_out() -> None:
    # Grey images in three channels, each standardised by its own statistics as float32 rounds them.
    grey = natural(channels=1).expand(-1, 3, -1, -1)
    scaled = (grey - torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1)) / torch.tensor([0.9, 1.1, 1.3]).view(-1, 1, 1)
    filters, _ = whitening_filters(scaled, (3, 3), eps=1e-3)
    assert len(filters) == 9
    network = fill(build("convnet"), images=scaled, whiten_eps=1e-3)
    plain = fill(build("convnet"))
    a, b = (n.get_submodule("stages.0.conv0").weight for n in (network, plain))
    assert torch.equal(a[18:], b[18:]) and not torch.equal(a[:18], b[:18])


def test_kernel_larger_than_the_image() -> None:
    network = build_network(
        "resnet",
        arguments={"widths": [16], "depths": [1], "stem": "large"},
        num_classes=3,
        in_channels=3,
        height=6,
        width=6,
    )
    fill(network, images=natural(side=6), whiten_eps=1e-2)
    assert torch.isfinite(network.get_submodule("stem.conv").weight).all()


def test_whitening_joins_lsuv() -> None:
    images = natural()
    network = fill(build("convnet"), law="lsuv", images=images, whiten_eps=1e-3)
    first = network.get_submodule("stages.0.conv0")
    assert float(first(images).detach().var()) == pytest.approx(1.0, abs=0.02)
    filters, _ = whitening_filters(images, (3, 3), eps=1e-3)
    ratio = first.weight[:27] / filters.float()
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)


def test_nothing_to_whiten_is_said() -> None:
    with pytest.raises(UserError, match=r"init.whiten_first: found true for a network without a first convolution"):
        fill(build("mlp"), images=natural(), whiten_eps=1e-3)
    for value in (0.0, 0.3, 255.0):
        with pytest.raises(UserError, match=r"init.whiten_first: found true for training images of a single colour"):
            fill(build(), images=torch.full((8, 3, 16, 16), value), whiten_eps=1e-3)


# ---- branches that start at zero ------------------------------------------------------------------------------------


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


# ---- params ---------------------------------------------------------------------------------------------------------


@cache
def section() -> dict[str, Any]:
    return params.read_yaml(Path(__file__).parents[1] / "params.yaml")["init"]


def test_every_law_is_in_params_and_its_name_alone_works() -> None:
    names = get_args(InitConfig.model_fields["name"].annotation)
    assert sorted(names) == sorted([*LAWS, *DATA_LAWS]) == sorted(ARGUMENTS)
    for name in names:
        init = InitConfig.model_validate({**section(), "name": name})
        assert init.arguments == section().get(name, {})
        network = build("convnet", {"widths": [8], "depth": 1})
        initialize(network, name, init.arguments, zero_last=False, activation="ReLU", seed=0, images=natural(4))


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("normal", {"std": 0.0}, "a number > 0"),
        ("orthogonal", {"gain": "relu"}, r"a number > 0 \| auto \(by the activation\)"),
        ("kaiming_uniform", {"mode": "fan"}, r"fan_in \| fan_out"),
        ("lsuv", {"tolerance": 1.0, "max_iterations": 3}, "a number > 0 and < 1"),
        ("whitening", {"eps": 0.0}, "a number > 0"),
        ("name", "kaiming_norml", "did you mean 'kaiming_normal'"),
    ],
)
def test_faults_are_said(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ParamsError, match=rf"init.{key}.*{allowed}"):
        params.parse({"init": {**section(), key: value}}, {"init": InitConfig})


def test_unknown_law() -> None:
    with pytest.raises(UserError, match=r"init.name: found kaiming_norml, .*did you mean 'kaiming_normal'"):
        initialize(build(), "kaiming_norml", {}, zero_last=False, activation="ReLU", seed=0)


# ---- in the pipeline ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"), policy="standard")


def prepared(inputs: tuple[Path, Path], seed: int = 0, **overrides: Any) -> Any:
    chosen = sections(**overrides)
    return set_up(store=inputs[0], augmented=inputs[1], seed=seed, **chosen)


def test_set_up_fits_the_weights_to_training_images(inputs: tuple[Path, Path]) -> None:
    setups = [prepared(inputs, init={"name": "lsuv", "whiten_first": True}) for _ in range(2)]
    a, b = (setup.module.classifier.state_dict() for setup in setups)
    assert all(torch.equal(a[key], b[key]) for key in a)
    classifier = setups[0].module.classifier
    images, labels = first_batch(setups[0].store, 0)
    assert images.dtype == torch.uint8 and images.shape == (150, 6, 6, 1) and labels.shape == (150,)
    outputs = classifier.network.get_submodule("stem.conv")(classifier.normalization(images))
    assert float(outputs.detach().var()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("law", [*LAWS, *DATA_LAWS])
def test_every_law_trains_and_is_exported(inputs: tuple[Path, Path], tmp_path: Path, law: str) -> None:
    model = {"name": "convnet", "convnet": {"widths": [8], "depth": 1}}
    batch = {"size": 75, "microbatch": 75, "noise_microbatches": 0}
    chosen = {"model": model, "init": {"name": law}, "batch": batch, "trainer": {"epochs": 1}}
    result = train(inputs, tmp_path / "a", **chosen)
    assert result.rows[-1].step == 2 and math.isfinite(result.rows[-1].val_loss)
    trained = load_classifier(tmp_path / "a")[0].state_dict()
    assert all(torch.isfinite(value).all() for value in trained.values())


def test_first_batch_is_drawn_by_seed_and_a_smaller_one_is_its_start(inputs: tuple[Path, Path]) -> None:
    store = prepared(inputs).store
    images, labels = first_batch(store, 3)
    fewer, _ = first_batch(store, 3, most=20)
    assert torch.equal(images[:20], fewer)
    assert not torch.equal(images, first_batch(store, 4)[0])
    assert sorted(labels.tolist()) == sorted(store.split("train").labels.tolist())


def test_whitening_an_mlp_is_refused(inputs: tuple[Path, Path]) -> None:
    overrides = {"model": {"name": "mlp"}, "init": {"whiten_first": True}}
    reason = "init.whiten_first: found true with model.name mlp, which has no convolution"
    with pytest.raises(ParamsError, match=reason):
        prepared(inputs, **overrides)
    values = params.read_yaml(Path(__file__).parents[1] / "params.yaml")
    preprocess = PreprocessConfig.model_validate({**values["preprocess"], "size": 8})
    chosen = sections(**overrides)
    keys = params.MEMBER_SECTIONS[1:]
    with pytest.raises(ParamsError, match=reason):
        check_recipe(**{key: chosen[key] for key in keys}, preprocess=preprocess, num_train=1000)
