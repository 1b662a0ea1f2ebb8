"""Networks: normalisation, shapes, residual blocks, random layers, conflicts, and the way to disk and back."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from anneal import params
from anneal.conflicts import check_recipe
from anneal.models.build import (
    NETWORKS,
    Classifier,
    build_classifier,
    build_network,
    count_macs,
    count_parameters,
    key_randomness,
    load_classifier,
)
from anneal.models.config import (
    ARCHITECTURES,
    RESIDUAL,
    Activation,
    ModelConfig,
    NormConfig,
    conflicts,
    halvings,
    smallest_image,
)
from anneal.models.convnext import ConvNeXtBlock
from anneal.models.custom import import_callable
from anneal.models.initial_statistics import initial_statistics
from anneal.models.initialization import initialize, rehearsal_of
from anneal.models.layers import ACTIVATIONS, Dropout, LayerScale, ResidualBlock, StochasticDepth
from anneal.models.normalization import KINDS, Normalization
from anneal.models.norms import NORMS, GhostBatchNorm1d, GhostBatchNorm2d, LayerNorm2d
from anneal.models.resnet import BLOCKS
from anneal.optimizers.groups import parameter_groups
from anneal.params import ParamsError, UserError
from anneal.preprocess import PreprocessConfig
from anneal.training.module import WindowNorms, frozen_statistics
from tests.test_training import sections, train, write_inputs

BLOCK: dict[str, dict[str, Any]] = {
    "resnet": {"widths": [8, 16], "depths": [1, 2], "stem": "small", "block": "basic"},
    "preact_resnet": {"widths": [8, 16], "depths": [1, 1], "stem": "small"},
    "wide_resnet": {"depth": 10, "width": 1, "block_dropout": 0.0},
    "convnext": {"widths": [8, 16], "depths": [1, 1], "stem": 2, "kernel": 3, "layer_scale": 0.1},
    "airbench": {"widths": [8, 16], "scale": 0.5},
    "convnet": {"widths": [8, 16], "depth": 2},
    "mlp": {"hidden": [32, 16]},
}
NORM: dict[str, dict[str, Any]] = {
    "batch": {"momentum": 0.2, "eps": 1e-4},
    "group": {"groups": 4, "eps": 1e-4},
    "layer": {"eps": 1e-4},
    "instance": {"eps": 1e-4},
    "none": {},
}
CONVOLUTIONAL = [name for name in NETWORKS if name != "mlp"]
SMALL = "tests.custom_models.networks:Small"
H, W = 12, 10


def positions(name: str, norm: str = "batch") -> list[str]:
    zero = norm == "instance" and name in RESIDUAL
    return ["before"] if name == "convnext" or zero else ["before", "after"]


def settings_that_go_together() -> Iterator[tuple[str, str, str]]:
    """Every network with every norm in every place."""
    for name in NETWORKS:
        for norm in NORMS:
            if norm != "instance" or name not in ("mlp", "convnext"):
                yield from ((name, norm, position) for position in positions(name, norm))


def statistics(kind: str, channels: int, height: int = H, width: int = W) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shape = (height, width, channels)
    pixel, d = kind in ("center_image", "standardize_pixel", "pca", "zca"), height * width * channels
    if kind in ("none", "scale"):
        return {}
    arrays = {"mean": rng.uniform(0.2, 0.8, shape if pixel else (channels,))}
    if kind.startswith("standardize"):
        arrays["std"] = rng.uniform(0.1, 0.4, arrays["mean"].shape)
    if kind in ("pca", "zca"):
        arrays["matrix"] = rng.normal(0, 1 / np.sqrt(d), (d, d))
        arrays["eigenvalues"] = np.ones(d)
    return arrays


def naive(kind: str, arrays: dict[str, np.ndarray], images: torch.Tensor) -> torch.Tensor:
    """The broadcast form, as one would write it."""
    x = images.numpy().astype(np.float64)
    if kind == "none":
        y = x
    else:
        y = x / 255 - arrays.get("mean", 0.0)
        y = y / arrays.get("std", 1.0)
        if "matrix" in arrays:
            y = np.stack([arrays["matrix"] @ image.ravel() for image in y])
            y = y[:, None, None, :] if kind == "pca" else y.reshape(x.shape)
    return torch.from_numpy(y).permute(0, 3, 1, 2)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (5, H, W, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_normalization_equals_the_broadcast_form(kind: str, channels: int, images: torch.Tensor) -> None:
    images = images[..., :channels].contiguous()
    arrays = statistics(kind, channels)
    output = Normalization(kind, arrays, H, W, channels)(images)
    expected = naive(kind, arrays, images)
    assert output.dtype == torch.float32 and output.shape == expected.shape
    # Relative to the values' size, which is about 1 but for none, where it is 255.
    assert float((output - expected).abs().max()) <= 1e-6 * max(1.0, float(expected.abs().max()))
    if kind != "pca":
        assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_normalization_takes_mixed_and_strided_images(kind: str, images: torch.Tensor) -> None:
    layer = Normalization(kind, statistics(kind, 3), H, W, 3)
    assert torch.equal(layer(images.float()), layer(images))
    flipped = images.flip(2)
    assert torch.equal(layer(flipped), layer(flipped.contiguous()))
    transposed = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(layer(transposed), layer(images))


def test_a_pixel_that_never_varies_is_only_centred() -> None:
    arrays = {"mean": np.full((2, 2, 1), 0.5), "std": np.array([0.0, 0.5, 0.5, 0.5]).reshape(2, 2, 1)}
    output = Normalization("standardize_pixel", arrays, 2, 2, 1)(torch.full((1, 2, 2, 1), 255, dtype=torch.uint8))
    torch.testing.assert_close(output.flatten(), torch.tensor([0.5, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_travel_in_the_state_dict(kind: str, images: torch.Tensor) -> None:
    full, empty = Normalization(kind, statistics(kind, 3), H, W, 3), Normalization(kind, None, H, W, 3)
    empty.load_state_dict(full.state_dict())
    assert torch.equal(empty(images), full(images))


def test_normalization_names_what_is_wrong() -> None:
    with pytest.raises(UserError, match=r"preprocess.normalize: found zac"):
        Normalization("zac", {}, H, W, 3)
    with pytest.raises(UserError, match="no array 'std'"):
        Normalization("standardize", {"mean": np.zeros(3)}, H, W, 3)
    with pytest.raises(UserError, match=r"'mean' has shape \(1,\), not \(3,\)"):
        Normalization("center", {"mean": np.zeros(1)}, H, W, 3)


def build(name: str = "resnet", **keywords: Any) -> nn.Module:
    settings: dict[str, Any] = {"num_classes": 7, "in_channels": 3, "height": H, "width": W, **keywords}
    return build_network(name, arguments=settings.pop("arguments", BLOCK.get(name)), **settings)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_learns_a_batch(name: str) -> None:
    for position in positions(name):
        network = build(name, norm_position=position)
        initialize(network, "kaiming_normal", {"mode": "fan_in"}, zero_last=True, activation="ReLU", seed=0)
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(14, 3, H, W, generator=generator), torch.arange(14) % 7
        optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
        losses = []
        for _ in range(30):
            loss = nn.functional.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] < 5.0 and losses[-1] < 0.5


@pytest.mark.parametrize(("name", "norm", "position"), settings_that_go_together())
def test_every_network_with_every_norm(name: str, norm: str, position: str) -> None:
    network = build(name, norm=norm, norm_position=position, norm_arguments=NORM[norm])
    initialize(network, "kaiming_normal", {"mode": "fan_in"}, zero_last=False, activation="ReLU", seed=0)
    x = torch.randn(6, 3, H, W, generator=torch.Generator().manual_seed(0))
    logits = network(x)
    assert logits.shape == (6, 7) and 1e-3 < float(logits.detach().std()) < 20.0
    logits.square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert network.eval()(x[:1]).shape == (1, 7)
    # Scales and biases of every kind of norm are exempt from weight decay.
    groups = parameter_groups(network, lr=0.1, weight_decay=0.5, decay_exempt=["norm", "bias", "scale"])
    assert {parameter.ndim > 1 for parameter in groups[0]["params"]} == {True}
    assert {parameter.ndim > 1 for parameter in groups[1]["params"]} == {False}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_has_a_gradient(name: str, activation: str) -> None:
    network = build(name, activation=activation, norm_arguments=NORM["batch"])
    initialize(network, "kaiming_normal", {"mode": "fan_out"}, zero_last=False, activation=activation, seed=0)
    logits = network(torch.randn(6, 3, H, W))
    assert logits.shape == (6, 7)
    (logits * torch.randn_like(logits)).sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_whole_network_runs_in_channels_last(name: str, channels: int, norm: str) -> None:
    classifier = build_classifier(
        {
            "name": name,
            "arguments": BLOCK[name],
            "num_classes": 7,
            "in_channels": channels,
            "height": H,
            "width": W,
            "norm": norm,
            "norm_arguments": NORM[norm],
        },
        {"kind": "standardize", "height": H, "width": W, "channels": channels},
        statistics("standardize", channels),
    )
    wrong = []

    def check(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.ndim == 4 and not output.is_contiguous(memory_format=torch.channels_last):
            wrong.append(module)

    for module in classifier.modules():
        module.register_forward_hook(check)
    classifier(torch.zeros(4, H, W, channels, dtype=torch.uint8))
    assert wrong == []


@pytest.mark.parametrize(
    ("norm", "position", "biased"), [("batch", "before", False), ("batch", "after", True), ("none", "before", True)]
)
@pytest.mark.parametrize("name", ["resnet", "convnet"])
def test_convolutions_have_a_bias_only_where_no_norm_follows(name: str, norm: str, position: str, biased: bool) -> None:
    convolutions = [m for m in build(name, norm=norm, norm_position=position).modules() if isinstance(m, nn.Conv2d)]
    assert {(m.bias is not None) for m in convolutions if m.kernel_size == (3, 3)} == {biased}


def test_norm_position() -> None:
    def order(position: str) -> list[str]:
        return [type(m).__name__ for m in build("convnet", norm_position=position).get_submodule("stages.0")][:3]

    assert order("before") == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert order("after") == ["Conv2d", "ReLU", "BatchNorm2d"]


def test_norm_arguments_reach_the_layers() -> None:
    norms = [m for m in build(norm_arguments={"momentum": 0.3, "eps": 1e-3}).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.momentum, m.eps) for m in norms} == {(0.3, 1e-3)}
    assert not [m for m in build(norm="none").modules() if isinstance(m, nn.BatchNorm2d)]


def manual_block(block: nn.Module, x: torch.Tensor, kind: str, position: str) -> torch.Tensor:
    """The formula of a block, written out."""
    act, b = torch.relu, dict(block.named_children())
    if kind == "bottleneck" and position == "before":
        h = act(b["norm2"](b["conv2"](act(b["norm1"](b["conv1"](x))))))
        return act(b["shortcut"](x) + b["norm3"](b["conv3"](h)))
    if kind == "bottleneck":
        h = b["norm2"](act(b["conv2"](b["norm1"](act(b["conv1"](x))))))
        return b["shortcut"](x) + b["norm3"](act(b["conv3"](h)))
    if kind == "basic" and position == "before":
        return act(b["shortcut"](x) + b["norm2"](b["conv2"](act(b["norm1"](b["conv1"](x))))))
    if kind == "basic":
        return b["shortcut"](x) + b["norm2"](act(b["conv2"](b["norm1"](act(b["conv1"](x))))))
    if position == "before":
        h = act(b["norm1"](x))
        branch = b["conv2"](act(b["norm2"](b["conv1"](h))))
    else:
        h = b["norm1"](act(x))
        branch = b["conv2"](b["norm2"](act(b["conv1"](h))))
    return branch + (b["shortcut"](h) if "shortcut" in b and b["shortcut"] is not None else x)


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_their_formulas(kind: str, position: str) -> None:
    network = build(arguments={**BLOCK["resnet"], "block": kind}, norm_position=position).eval()
    stages = network.get_submodule("stages")
    torch.manual_seed(0)
    x = torch.randn(2, 8, H, W)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
    for stage in stages:
        for block in stage:
            expected = manual_block(block, x, kind, position)
            torch.testing.assert_close(block(x), expected)
            x = expected
    assert x.shape == (2, 64 if kind == "bottleneck" else 16, H // 2, W // 2)


def test_the_stride_of_a_bottleneck_is_its_3x3() -> None:
    block = build(arguments={**BLOCK["resnet"], "block": "bottleneck"}).get_submodule("stages.1.0")
    strides = {name: m.stride[0] for name, m in block.named_modules() if isinstance(m, nn.Conv2d)}
    assert strides == {"conv1": 1, "conv2": 2, "conv3": 1, "shortcut.0": 2}


def test_convnext_block_is_its_formula() -> None:
    network = build("convnext", norm="layer", activation="GELU").eval()
    block = network.get_submodule("stages.0.0")
    assert isinstance(block, ConvNeXtBlock)
    nn.init.normal_(block.scale.get_parameter("weight"))
    x = torch.randn(2, 8, 6, 5)
    h = block.depthwise(x).permute(0, 2, 3, 1)
    h = nn.functional.layer_norm(h, (8,), block.norm.weight, block.norm.bias, block.norm.eps)
    # As the paper's own code has it: linear layers over the channels.
    h = nn.functional.linear(h, block.expand.weight.flatten(1), block.expand.bias)
    h = nn.functional.linear(nn.functional.gelu(h), block.project.weight.flatten(1), block.project.bias)
    torch.testing.assert_close(block(x), x + (h * block.scale.weight).permute(0, 3, 1, 2))


def test_airbench_is_its_formula() -> None:
    network = build("airbench", arguments={"widths": [8, 16], "scale": 0.5}, activation="GELU").eval()
    net, act = dict(network.named_modules()), nn.functional.gelu
    x = h = torch.randn(2, 3, H, W)
    assert net["stem.conv"].weight.shape == (2 * 3 * 2 * 2, 3, 2, 2)
    h = act(net["stem.conv"](h))
    assert h.shape[2:] == (H - 1, W - 1)
    for i in range(2):
        stage = {name: net[f"stages.{i}.{name}"] for name in ("conv1", "norm1", "conv2", "norm2")}
        h = act(stage["norm1"](nn.functional.max_pool2d(stage["conv1"](h), 2)))
        h = act(stage["norm2"](stage["conv2"](h)))
    logits = nn.functional.adaptive_max_pool2d(h, 1).flatten(1) @ net["head"].weight.T * 0.5
    torch.testing.assert_close(network(x), logits)


def test_wide_resnet_drops_within_its_blocks() -> None:
    network = build("wide_resnet", arguments={"depth": 16, "width": 2, "block_dropout": 0.3})
    widths = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert widths == [16] + [32] * 4 + [64] * 4 + [128] * 4
    rates = {name: m.rate for name, m in network.named_modules() if isinstance(m, Dropout) and m.rate}
    assert list(rates) == [f"stages.{i}.{j}.dropout" for i in range(3) for j in range(2)]
    assert set(rates.values()) == {0.3}


@pytest.mark.parametrize("name", RESIDUAL)
@pytest.mark.parametrize(
    "norm", [{"norm": "batch"}, {"norm": "batch", "norm_arguments": {"affine": False}}, {"norm": "none"}]
)
def test_a_branch_ends_at_last(name: str, norm: dict[str, Any]) -> None:
    network = build(name, **norm)
    initialize(network, "kaiming_normal", {"mode": "fan_in"}, zero_last=True, activation="ReLU", seed=0)
    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    branches: list[torch.Tensor] = []
    for block in blocks:
        block.get_submodule("drop").register_forward_hook(lambda _, __, output: branches.append(output))
    network(torch.randn(4, 3, H, W)).square().sum().backward()
    assert len(branches) == len(blocks) > 1 and all((branch == 0).all() for branch in branches)
    assert all(block.last.get_parameter("weight").grad.abs().max() > 0 for block in blocks)


def test_layer_scale_and_prelu_keep_their_first_value() -> None:
    network = build("convnext", activation="PReLU", arguments={**BLOCK["convnext"], "layer_scale": 0.03})
    initialize(network, "kaiming_normal", {"mode": "fan_in"}, zero_last=False, activation="PReLU", seed=0)
    scales = [m.weight.detach() for m in network.modules() if isinstance(m, LayerScale)]
    assert len(scales) == 2 and all(scale.unique().item() == pytest.approx(0.03) for scale in scales)
    slopes = [m.weight.item() for m in network.modules() if isinstance(m, nn.PReLU)]
    assert slopes == [0.25, 0.25]
    plain = build("convnext", arguments={**BLOCK["convnext"], "layer_scale": 0.0})
    assert not [m for m in plain.modules() if isinstance(m, LayerScale)]


# Parameters from the papers' tables: He et al. 2016a (by torchvision's count), Zagoruyko & Komodakis 2016 (36.5 M),
# Liu et al. 2022 (28.6 M), Jordan 2024 (1.97 M and the norms' scales, which are frozen there). Then multiplications at
# that size: torchvision's 1.81 G and 4.09 G, 5.2 G, 4.5 G of the papers.
RESNET = {"widths": [64, 128, 256, 512], "stem": "large"}
PUBLISHED = [
    ("resnet", {**RESNET, "depths": [2, 2, 2, 2], "block": "basic"}, 224, 1000, 11_689_512, 1.814e9),
    ("resnet", {**RESNET, "depths": [3, 4, 6, 3], "block": "bottleneck"}, 224, 1000, 25_557_032, 4.089e9),
    ("preact_resnet", {**RESNET, "depths": [2, 2, 2, 2]}, 224, 1000, 11_687_720, 1.814e9),
    ("wide_resnet", {"depth": 28, "width": 10, "block_dropout": 0.3}, 32, 10, 36_479_194, 5.24e9),
    (
        "convnext",
        {"widths": [96, 192, 384, 768], "depths": [3, 3, 9, 3], "stem": 4, "kernel": 7, "layer_scale": 1e-6},
        *(224, 1000, 28_589_128, 4.456e9),
    ),
    ("airbench", {"widths": [64, 256, 256], "scale": 1 / 9}, 32, 10, 1_970_488 + 2 * 1152, 0.1181e9),
]


@pytest.mark.parametrize(("name", "arguments", "size", "classes", "parameters", "macs"), PUBLISHED)
def test_published_sizes(
    name: str, arguments: dict[str, Any], size: int, classes: int, parameters: int, macs: float
) -> None:
    with torch.device("meta"):
        norm = {"norm": "layer"} if name == "convnext" else {}
        geometry = {"num_classes": classes, "in_channels": 3, "height": size, "width": size}
        network = build_network(name, arguments=arguments, **geometry, **norm)
        assert count_parameters(network) == parameters
        assert count_macs(network, (3, size, size)) == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_are_half_of_torchs_flops(name: str) -> None:
    network = build(name)
    network.get_submodule("head").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(2, 3, H, W))
    modes, before = [m.training for m in network.modules()], {k: v.clone() for k, v in network.state_dict().items()}
    assert count_macs(network, (3, H, W)) == counter.get_total_flops() / 2 / 2
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(m._forward_hooks for m in network.modules())


def test_macs_of_other_convolutions() -> None:
    layers = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose1d(6, 8, 2, stride=2, groups=2))
    # 6 positions x 6 outputs x 2 inputs x 3 taps; then 6 positions x 6 inputs x 4 outputs x 2 taps.
    assert count_macs(layers, (4, 8)) == 6 * 6 * 2 * 3 + 6 * 6 * 4 * 2


def test_resnet_shapes_and_size() -> None:
    arguments = {"widths": [64, 128, 256, 512], "depths": [1, 1, 1, 1], "stem": "large"}
    network = build_network(
        "resnet", arguments=arguments, num_classes=1000, in_channels=3, height=64, width=64, dropout=0.1
    )
    sizes = []
    for stage in network.get_submodule("stages"):
        stage.register_forward_hook(lambda _, __, output: sizes.append(tuple(output.shape[1:])))
    network(torch.zeros(2, 3, 64, 64))
    assert sizes == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]


def test_mlp_works_on_components(images: torch.Tensor) -> None:
    d = H * W * 3
    for geometry in ((3, H, W), (d, 1, 1)):
        architecture = dict(zip(("in_channels", "height", "width"), geometry, strict=True))
        classifier = build_classifier(
            {"name": "mlp", "arguments": {"hidden": [16]}, "num_classes": 4, **architecture},
            {"kind": "pca", "height": H, "width": W, "channels": 3},
            statistics("pca", 3),
        )
        assert classifier(images).shape == (5, 4)


def test_linear_classifier() -> None:
    assert count_parameters(build("mlp", arguments={"hidden": []})) == 7 * (H * W * 3 + 1)


# ---- norm layers ------------------------------------------------------------------------------------------------------

TORCH: dict[str, Any] = {
    "batch": (nn.BatchNorm2d, nn.BatchNorm1d, lambda c: {}),
    "group": (nn.GroupNorm, nn.GroupNorm, lambda c: {"num_groups": 4, "num_channels": c}),
    "instance": (nn.InstanceNorm2d, nn.InstanceNorm2d, lambda c: {}),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", [name for name in NORMS if name != "none"])
def test_norms_are_their_formulas(norm: str, affine: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for vector in (False, True):
        if vector and norm == "instance":
            continue
        x = 3.0 + 2.0 * torch.randn(6, 8, *(() if vector else (5, 4)), generator=generator)
        layer = NORMS[norm][vector](8, **NORM[norm], affine=affine)
        over = {
            "batch": (0,) if vector else (0, 2, 3),
            "layer": (1,),
            "instance": (2, 3),
            "group": (2,) if vector else (2, 3, 4),
        }[norm]
        z = x.unflatten(1, (4, 2)) if norm == "group" else x
        expected = (z - z.mean(over, keepdim=True)) / (z.var(over, correction=0, keepdim=True) + 1e-4).sqrt()
        expected = expected.reshape(x.shape)
        assert len(list(layer.parameters())) == 2 * affine
        if affine:
            nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
            shape = (8,) if vector else (8, 1, 1)
            expected = expected * layer.weight.view(shape) + layer.bias.view(shape)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", TORCH)
def test_norms_are_torchs(norm: str) -> None:
    x = torch.randn(6, 8, 5, 4, generator=torch.Generator().manual_seed(0))
    cls, _, arguments = TORCH[norm]
    theirs = cls(**{"num_features": 8, **arguments(8)} if norm != "group" else arguments(8), eps=1e-4)
    torch.testing.assert_close(NORMS[norm][0](8, **NORM[norm])(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [12, 11, 7, 5])
@pytest.mark.parametrize("vector", [False, True])
def test_ghost_batches_are_batches_of_their_own(vector: bool, samples: int) -> None:
    x = torch.randn(samples, 8, *(() if vector else (3, 2)), generator=torch.Generator().manual_seed(0))
    x = x if vector else x.contiguous(memory_format=torch.channels_last)
    ghost = NORMS["batch"][vector](8, **NORM["batch"], ghost=4)
    assert isinstance(ghost, GhostBatchNorm1d if vector else GhostBatchNorm2d) and isinstance(ghost, _BatchNorm)
    plain = [NORMS["batch"][vector](8, momentum=1.0, eps=1e-4) for _ in range(3)]
    # A group is of four samples, and the last one takes in what is left over.
    parts = {12: [4, 4, 4], 11: [4, 7], 7: [7], 5: [5]}[samples]
    expected = torch.cat([norm(part) for norm, part in zip(plain, x.split(parts), strict=False)])
    y = ghost(x)
    torch.testing.assert_close(y, expected)
    assert vector or y.is_contiguous(memory_format=torch.channels_last)
    for name, before in (("running_mean", 0.0), ("running_var", 1.0)):
        mean = sum(n * norm.get_buffer(name) for n, norm in zip(parts, plain, strict=False)) / samples
        torch.testing.assert_close(ghost.get_buffer(name), 0.8 * before + 0.2 * mean)
    assert int(ghost.num_batches_tracked) == 1
    ordinary = NORMS["batch"][vector](8, **NORM["batch"])
    ordinary.load_state_dict(ghost.state_dict())
    assert torch.equal(ghost.eval()(x), ordinary.eval()(x))


def test_ghost_batches_in_a_window_of_microbatches() -> None:
    """The running statistics take in the mean over all groups of all microbatches, once a step."""
    x = torch.randn(16, 8, 3, 2, generator=torch.Generator().manual_seed(0))
    norm = GhostBatchNorm2d(8, ghost=2, momentum=0.3)
    window = WindowNorms(norm)
    for part, first in zip(x.split(8), (True, False), strict=True):
        window.before(8, first=first)
        norm(part)
    window.close()
    groups = torch.stack([part.var((0, 2, 3)) for part in x.split(2)])
    torch.testing.assert_close(norm.running_var, 0.7 + 0.3 * groups.mean(0))
    assert norm.momentum == 0.3 and int(norm.num_batches_tracked) == 1
    before = norm.running_var.clone()
    with frozen_statistics(norm):
        norm(x)
    assert torch.equal(norm.running_var, before) and int(norm.num_batches_tracked) == 1


def test_ghost_batches_without_a_momentum_average_all_passes() -> None:
    x = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    norm = GhostBatchNorm1d(5, ghost=2, momentum=None)
    for part in x:
        norm(part)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 1)))


def test_layer_norm_keeps_channels_last() -> None:
    x = torch.randn(2, 8, 4, 3).contiguous(memory_format=torch.channels_last)
    assert LayerNorm2d(8)(x).is_contiguous(memory_format=torch.channels_last)


def test_groups_must_divide_the_channels() -> None:
    message = r"^model.norm.group.groups: found 5, allowed: a number that divides .* \(8, 16\); nearest 4$"
    with pytest.raises(UserError, match=message):
        build(norm="group", norm_arguments={"groups": 5})
    with pytest.raises(UserError, match=r"found 5 for a layer of 12 channels.*nearest 4$"):
        NORMS["group"][0](12, groups=5)


@pytest.mark.parametrize(
    ("name", "norm", "given", "found"),
    [
        ("mlp", "instance", {}, "model.norm.name: found instance"),
        ("convnext", "instance", {}, "model.norm.name: found instance"),
        ("mlp", "group", {"groups": 16}, "model.norm.group.groups: found 16"),
    ],
)
def test_a_norm_of_one_value_is_refused(name: str, norm: str, given: Mapping[str, Any], found: str) -> None:
    with pytest.raises(UserError, match=f"^{found}, which normalises each of"):
        build(name, norm=norm, norm_arguments=given)


def test_a_norm_over_a_last_map_of_one_pixel() -> None:
    deep = {"widths": [8] * 4, "depths": [1] * 4, "stem": "small"}
    for norm, given, fault in (("instance", {}, True), ("group", {"groups": 8}, True), ("group", {"groups": 4}, False)):
        settings = {"norm": norm, "norm_arguments": given}
        assert bool(conflicts("resnet", arguments=deep, height=8, width=8, **settings)) == fault
        assert conflicts("resnet", arguments=deep, height=9, width=8, **settings) == []


@pytest.mark.parametrize("name", ["resnet", "preact_resnet", "wide_resnet"])
def test_a_mean_over_what_has_no_mean_is_refused(name: str) -> None:
    for norm, given in (("instance", {}), ("group", {"groups": 64 if name == "wide_resnet" else 16})):
        arguments = {**BLOCK[name], **({} if name == "wide_resnet" else {"widths": [16, 16]})}
        with pytest.raises(UserError, match=r"^model.norm.(position: found after|group.groups)"):
            build(name, arguments=arguments, norm=norm, norm_arguments=given, norm_position="after")


def test_ghost_batches_divide_the_microbatch() -> None:
    def faults(ghost: int, microbatch: int) -> list[str]:
        given = {"norm_arguments": {"ghost": ghost}, "microbatch": microbatch}
        return conflicts("resnet", arguments=BLOCK["resnet"], height=H, width=W, **given)

    assert faults(16, 32) == faults(32, 32) == []
    for ghost, microbatch, near in ((24, 32, 16), (64, 32, 32), (2, 7, 7)):
        assert faults(ghost, microbatch) == [
            f"model.norm.batch.ghost: found {ghost}, allowed: a number that divides batch.microbatch {microbatch}; nearest {near}"
        ]


def test_norms_of_convnext_have_no_activation_to_follow() -> None:
    with pytest.raises(UserError, match=r"^model.norm.position: found after with model.name convnext"):
        build("convnext", norm_position="after")


def test_zero_last_needs_a_scale() -> None:
    settings = {"height": H, "width": W, "zero_last": True, "norm_arguments": {"affine": False}}
    assert "init.zero_last: found true" in conflicts("resnet", arguments=BLOCK["resnet"], **settings)[0]
    assert conflicts("resnet", arguments={**BLOCK["resnet"], "block": "preactivation"}, **settings) == []


# ---- random layers --------------------------------------------------------------------------------------------------


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    layer, x = Dropout(0.3), torch.ones(200, 500)
    layer.key = 1
    y = layer(x)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert abs(float((y == 0).float().mean()) - 0.3) < 0.01
    assert layer.eval()(x) is x


def test_stochastic_depth_drops_whole_samples() -> None:
    layer, x = StochasticDepth(0.4), torch.ones(4000, 3, 2, 2)
    layer.key = 1
    y = layer(x)
    kept = y.flatten(1)
    assert ((kept == 0).all(1) | (kept - 1 / 0.6).abs().lt(1e-6).all(1)).all()
    assert abs(float((kept[:, 0] == 0).float().mean()) - 0.4) < 0.04
    assert layer.eval()(x) is x


@pytest.mark.parametrize("name", ["resnet", "preact_resnet", "convnext"])
def test_stochastic_depth_grows_linearly_with_depth(name: str) -> None:
    network = build(name, arguments={**BLOCK[name], "depths": [2, 3]}, stochastic_depth=0.5)
    rates = [m.rate for m in network.modules() if isinstance(m, StochasticDepth)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def random_network() -> nn.Module:
    network = build(dropout=0.5, stochastic_depth=0.5)
    initialize(network, "kaiming_normal", {"mode": "fan_out"}, zero_last=False, activation="ReLU", seed=0)
    return network.train()


def test_keys_decide_the_draws() -> None:
    network, x = random_network(), torch.randn(8, 3, H, W, generator=torch.Generator().manual_seed(0))

    def logits(*key: int) -> torch.Tensor:
        key_randomness(network, *key)
        return network(x)

    first = logits(0, 1, 2)
    torch.rand(100)
    assert torch.equal(logits(0, 1, 2), first)
    assert torch.equal(network(x), first)
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(logits(*other), first)


def test_keys_belong_to_the_layer_and_its_technique() -> None:
    network = random_network()
    key_randomness(network, 0, 0, 0)
    keys = {name: m.key for name, m in network.named_modules() if isinstance(m, Dropout | StochasticDepth)}
    assert len(keys) == len(set(keys.values())) == 4
    deeper = build(arguments={**BLOCK["resnet"], "depths": [2, 2]}, dropout=0.0, stochastic_depth=0.2)
    key_randomness(deeper, 0, 0, 0)
    assert {name: m.key for name, m in deeper.named_modules() if name in keys} == keys


def test_draws_leave_the_global_generator_alone() -> None:
    network, x = random_network(), torch.randn(8, 3, H, W)
    key_randomness(network, 0, 0, 0)
    before = torch.get_rng_state()
    network(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_key_draws_differ() -> None:
    network, x = random_network(), torch.randn(8, 3, H, W)
    assert not torch.equal(network(x), network(x))


# ---- conflicts ------------------------------------------------------------------------------------------------------


def test_no_conflict_in_what_works() -> None:
    for name, arguments in BLOCK.items():
        assert conflicts(name, arguments=arguments, height=H, width=W, normalize="zca", microbatch=2) == []
    for name in RESIDUAL:
        assert conflicts(name, arguments=BLOCK[name], height=H, width=W, stochastic_depth=0.1) == []
    assert conflicts("mlp", arguments={"hidden": [8]}, height=H, width=W, normalize="pca") == []


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in RESIDUAL])
def test_stochastic_depth_needs_branches(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"^regularization.stochastic_depth: found 0.2 with model.name {name}, allowed: 0"
    ):
        build(name, stochastic_depth=0.2)


def test_too_many_stages_for_the_image() -> None:
    arguments = {"widths": [8] * 6, "depths": [1] * 6, "stem": "small"}
    with pytest.raises(
        UserError, match=r"^model.resnet.widths: found 6 stages.* 5 times.*8x8.*at most 4 stages.*>= 32$"
    ):
        build(arguments=arguments, height=8, width=8)
    assert build(arguments=arguments, height=32, width=32)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(UserError, match=r"^model.convnet.widths: found 4 stages.*at most 3 stages.*>= 16$"):
        build("convnet", arguments={"widths": [8] * 4, "depth": 1}, height=8, width=9)
    assert build("convnet", arguments={"widths": [8] * 3, "depth": 1}, height=8, width=9)(
        torch.zeros(2, 3, 8, 9)
    ).shape == (2, 7)


def test_the_most_stages_named_are_allowed() -> None:
    for size in range(4, 40):
        most = size.bit_length()
        good = {"widths": [8] * most, "depths": [1] * most, "stem": "small"}
        bad = {"widths": [8] * (most + 1), "depths": [1] * (most + 1), "stem": "small"}
        assert conflicts("resnet", arguments=good, height=size, width=size) == []
        assert f"at most {most} stages" in conflicts("resnet", arguments=bad, height=size, width=size)[0]
        assert halvings("resnet", good) == most - 1


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_the_smallest_image(name: str) -> None:
    """One pixel less is refused, and what is not refused runs."""
    arguments = BLOCK[name]
    side = smallest_image(name, arguments)
    assert side == {"convnext": 4, "airbench": 5, "wide_resnet": 4, "convnet": 4}.get(name, 2)
    assert build(name, height=side, width=side + 3).train()(torch.randn(4, 3, side, side + 3)).shape == (4, 7)
    with pytest.raises(UserError) as caught:
        build(name, height=side + 3, width=side - 1)
    assert re.fullmatch(
        rf"model\.\S+: found .*pixels, allowed: (at most 1 stages, or )?preprocess\.size >= {side}", str(caught.value)
    )


def test_patches_larger_than_the_image() -> None:
    with pytest.raises(UserError, match=r"^model.convnext.stem: found patches of 16 pixels.* 12x10 .*at most 10$"):
        build("convnext", arguments={**BLOCK["convnext"], "stem": 16})


def test_large_stem_on_a_tiny_image() -> None:
    with pytest.raises(UserError, match=r"^model.resnet.stem: found large"):
        build(arguments={"widths": [8], "depths": [1], "stem": "large"}, height=3, width=3)


def test_pca_needs_a_fully_connected_network() -> None:
    with pytest.raises(UserError, match=r"^preprocess.normalize: found pca with model.name resnet.*zca.*mlp$"):
        build_classifier(
            {
                "name": "resnet",
                "arguments": BLOCK["resnet"],
                "num_classes": 7,
                "in_channels": 3,
                "height": H,
                "width": W,
            },
            {"kind": "pca", "height": H, "width": W, "channels": 3},
            statistics("pca", 3),
        )


def test_batch_norm_cannot_see_one_image() -> None:
    deep = {"widths": [8] * 4, "depths": [1] * 4, "stem": "small"}
    assert (
        "batch.microbatch: found 1" in conflicts("mlp", arguments={"hidden": [8]}, height=8, width=8, microbatch=1)[0]
    )
    assert "batch.microbatch: found 1" in conflicts("resnet", arguments=deep, height=8, width=8, microbatch=1)[0]
    assert "batch.microbatch: found 1" in conflicts("resnet", arguments=deep, height=16, width=16, microbatch=1)[0]
    assert conflicts("resnet", arguments=deep, height=16, width=16, norm="group", microbatch=1) == []
    assert conflicts("mlp", arguments={"hidden": [8]}, height=8, width=8, norm="none", microbatch=1) == []
    with pytest.raises(ValueError, match="more than 1 value"):
        build(arguments=deep, height=8, width=8).train()(torch.zeros(1, 3, 8, 8))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"^model.name: found resnt, .*did you mean 'resnet'"):
        build_network("resnt", arguments={}, num_classes=2, in_channels=1, height=8, width=8)
    with pytest.raises(UserError, match=r"^model.activation: found ReLu, .*did you mean 'ReLU'"):
        build(activation="ReLu")


# ---- to disk and back -----------------------------------------------------------------------------------------------


def save(folder: Path, kind: str = "zca") -> tuple[nn.Module, dict[str, Any]]:
    model = {
        "architecture": {
            "name": "resnet",
            "arguments": BLOCK["resnet"],
            "num_classes": 7,
            "in_channels": 3,
            "height": H,
            "width": W,
            "activation": "GELU",
            "norm": "batch",
            "norm_position": "before",
            "norm_arguments": {"momentum": 0.2, "eps": 1e-4},
            "dropout": 0.1,
            "stochastic_depth": 0.1,
        },
        "normalization": {"kind": kind, "height": H, "width": W, "channels": 3},
        "classes": list("abcdefg"),
    }
    classifier = build_classifier(model["architecture"], model["normalization"], statistics(kind, 3))
    initialize(classifier.network, "kaiming_normal", {"mode": "fan_in"}, zero_last=False, activation="GELU", seed=1)
    classifier(torch.randint(0, 256, (8, H, W, 3), dtype=torch.uint8))
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(model))
    save_file(
        {key: value.contiguous() for key, value in classifier.state_dict().items()}, folder / "weights.safetensors"
    )
    return classifier.eval(), model


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [*NETWORKS, SMALL])
def test_every_network_comes_back(tmp_path: Path, images: torch.Tensor, name: str, norm: str) -> None:
    custom = name == SMALL
    if (norm == "instance" and name in ("mlp", "convnext")) or (custom and norm != "batch"):
        return
    architecture = {
        "name": name,
        "arguments": {"width": 4} if custom else BLOCK[name],
        **{"num_classes": 7, "in_channels": 3, "height": H, "width": W},
        **{"norm": norm, "norm_arguments": NORM[norm]},
    }
    normalization = {"kind": "scale", "height": H, "width": W, "channels": 3}
    classifier = build_classifier(architecture, normalization, {}, seed=3)
    initialize(classifier.network, "kaiming_normal", {"mode": "fan_in"}, zero_last=False, activation="ReLU", seed=1)
    classifier(images)
    (tmp_path / "model.json").write_text(json.dumps({"architecture": architecture, "normalization": normalization}))
    state = {key: value.contiguous() for key, value in classifier.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    loaded, _ = load_classifier(tmp_path)
    assert torch.equal(loaded(images), classifier.eval()(images))


@pytest.mark.parametrize("kind", [*KINDS[:-2], "zca"])
def test_a_saved_member_comes_back(tmp_path: Path, images: torch.Tensor, kind: str) -> None:
    classifier, model = save(tmp_path / "a", kind)
    loaded, values = load_classifier(tmp_path / "a")
    assert values == model
    assert not loaded.training
    assert torch.equal(loaded(images), classifier(images))
    weight = loaded.network.get_parameter("stages.0.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_folder_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a: no trained member here; run `dvc repro train@a`"):
        load_classifier(tmp_path / "a")
    _, model = save(tmp_path / "a")
    model["architecture"]["num_classes"] = 3
    (tmp_path / "a" / "model.json").write_text(json.dumps(model))
    with pytest.raises(UserError, match=r"does not fit model\.json"):
        load_classifier(tmp_path / "a")
    for damaged in ({}, [], {**model, "architecture": {**model["architecture"], "foo": 1}}):
        (tmp_path / "a" / "model.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"a: model\.json is damaged, or of another version"):
            load_classifier(tmp_path / "a")
    (tmp_path / "a" / "weights.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="damaged"):
        load_classifier(tmp_path / "a")


# ---- networks by import path ----------------------------------------------------------------------------------------


def custom(name: str, arguments: Mapping[str, Any], **keywords: Any) -> nn.Module:
    return build(f"tests.custom_models.networks:{name}", arguments=arguments, **keywords)


def test_a_custom_network_is_called_with_what_its_signature_takes() -> None:
    assert custom("Small", {}).get_submodule("module.fc").out_features == 7
    assert custom("Small", {"width": 3}, in_channels=1).get_submodule("module.conv").weight.shape == (3, 1, 3, 3)
    assert custom("small_or_large", {"large": True}).get_submodule("module.conv").out_channels == 16
    # What params.yaml says wins; a signature of **settings says nothing.
    assert custom("anything", {"classes": 7, "channels": 3}).get_submodule("module.fc").out_features == 7


def test_a_custom_network_draws_its_own_weights() -> None:
    before = torch.get_rng_state()
    a, b, c = (custom("Small", {}, seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(not torch.equal(a[key], c[key]) for key in a)
    network = custom("Small", {}, seed=5)
    initialize(network, "zeros", {}, zero_last=True, activation="ReLU", seed=0)
    assert all(torch.equal(a[key], value) for key, value in network.state_dict().items())


def test_lazy_layers_draw_under_the_seed_too() -> None:
    weights = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        weights.append(custom("lazy", {}, seed=5).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("name", ["normed", "Frozen", "lazy", "Small"])
def test_common_habits_of_custom_networks(name: str) -> None:
    classifier = Classifier(Normalization("scale", None, H, W, 3), custom(name, {}))
    assert count_macs(classifier.network, (3, H, W)) > 0
    images, labels = torch.randint(0, 256, (16, H, W, 3), dtype=torch.uint8), torch.arange(16) % 7
    assert len(initial_statistics(classifier, images, labels)) > 1
    inputs = classifier.normalization(images)
    initialize(
        classifier.network,
        "lsuv",
        {"tolerance": 0.1, "max_iterations": 1},
        zero_last=False,
        activation="ReLU",
        seed=0,
        images=inputs,
    )


def test_a_rehearsal_keeps_the_norms_of_a_custom_network_on_batch_statistics() -> None:
    rehearsal = rehearsal_of(custom("normed", {}))
    assert all(module.training for module in rehearsal.modules() if isinstance(module, nn.BatchNorm2d))


def test_a_custom_network_draws_by_its_key_alone() -> None:
    network, x = custom("Small", {"dropout": 0.5}), torch.randn(8, 3, H, W)

    def logits(*key: int) -> torch.Tensor:
        key_randomness(network, *key)
        return network(x)

    before = torch.get_rng_state()
    first = logits(0, 1, 2)
    assert torch.equal(logits(0, 1, 2), first) and not torch.equal(logits(0, 1, 3), first)
    assert torch.equal(torch.get_rng_state(), before)
    network.eval()
    assert torch.equal(logits(0, 1, 2), logits(0, 1, 3))


def test_a_custom_network_learns_from_channels_last_images() -> None:
    network = custom("Small", {})
    x = torch.randn(4, 3, H, W).contiguous(memory_format=torch.channels_last)
    network(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    assert count_macs(network, (3, H, W)) == H * W * 3 * 8 * 9 + 32 * 7


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "Smal",
            {},
            "model.name: found tests.custom_models.networks:Smal, but .* no callable Smal; did you mean 'Small'?",
        ),
        ("WIDTH", {}, "model.name: found tests.custom_models.networks:WIDTH, but .* no callable WIDTH"),
        ("Small", {"widht": 3}, "model.custom.widht: unknown argument; did you mean 'width'?"),
        ("small_or_large", {}, "model.custom.large: missing; tests.custom_models.networks:small_or_large needs it"),
        ("no_module", {}, "model.name: .* returned int, allowed: a torch.nn.Module"),
        ("features", {}, "model.name: .* makes (2, 5) of 2 images, allowed: (2, 7)"),
        ("untrainable", {}, "model.name: .* has no trainable parameters"),
        ("broken", {}, "model.name: .* failed: RuntimeError: out of ideas (networks.py, line "),
        ("Small", {"width": "4"}, "model.name: .* failed: TypeError: "),
    ],
)
def test_faults_of_custom_networks(name: str, arguments: Mapping[str, Any], message: str) -> None:
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(UserError, match=rf"^{pattern}"):
        custom(name, arguments)


def test_a_custom_network_that_cannot_take_the_images() -> None:
    with pytest.raises(
        UserError, match=r"^model.name: torch.nn:Bilinear cannot take images of \(N, 3, 12, 10\): TypeError"
    ):
        build("torch.nn:Bilinear", arguments={"in1_features": 1, "in2_features": 1, "out_features": 1})


def test_import_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("os.system", "os:", ":f", "a b:c", "a:b.c", "a:b\n", "../a:b", "a:b()"):
        with pytest.raises(UserError, match=r"^model.name: found "):
            import_callable(path)
    with pytest.raises(
        UserError, match=r"but there is no module tests\.nothing; it must be installed, or lie in the folder"
    ):
        import_callable("tests.nothing:f")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    (tmp_path / "own_network_of_mine.py").write_text("from torch.nn import Linear as Mine\n")
    (tmp_path / "needs_another.py").write_text("import no_such_package_here\n")
    (tmp_path / "cut_short.py").write_text("def f(:\n")
    assert import_callable("own_network_of_mine:Mine") is nn.Linear
    with pytest.raises(UserError, match="needs_another imports no_such_package_here, which is not installed"):
        import_callable("needs_another:f")
    with pytest.raises(UserError, match="importing cut_short failed: SyntaxError"):
        import_callable("cut_short:f")


def test_what_a_custom_network_cannot_follow() -> None:
    faults = conflicts(
        SMALL,
        arguments={},
        height=2,
        width=2,
        normalize="pca",
        dropout=0.1,
        stochastic_depth=0.2,
        whiten_first=True,
        zero_last=True,
    )
    keys = [fault.split(":")[0] for fault in faults]
    expected = ["regularization.dropout", "regularization.stochastic_depth", "init.whiten_first", "init.zero_last"]
    assert keys == [*expected, "preprocess.normalize"]
    assert conflicts(SMALL, arguments={}, height=2, width=2) == []


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"), num_train=40, num_val=12)


@pytest.mark.parametrize("name", [*NETWORKS, SMALL])
def test_two_steps_of_training(inputs: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    """Through the real pipeline code, at what params.yaml ships but for narrower networks, to disk and back."""
    narrow = {
        "widths": [8, 16],
        "wide_resnet": {"width": 1, "block_dropout": 0.2},
        "mlp": {"hidden": [16]},
        SMALL: {"dropout": 0.5},
    }
    block = "custom" if name == SMALL else name
    changes = {
        "model": {"name": name, block: narrow.get(name, {"widths": narrow["widths"]})},
        "regularization": {
            "stochastic_depth": 0.2 if name in RESIDUAL else 0.0,
            "dropout": 0.0 if name == SMALL else 0.2,
        },
        "batch": {"size": 20, "microbatch": 10, "noise_microbatches": 0},
        "trainer": {"epochs": 1},
    }
    result = train(inputs, tmp_path / "a", **changes)
    assert np.isfinite(result.rows[-1].train_loss) and result.rows[-1].step == 2
    classifier, model = load_classifier(tmp_path / "a")
    assert model["architecture"]["name"] == name
    images = torch.zeros(3, 6, 6, 1, dtype=torch.uint8)
    assert classifier(images).shape == (3, 3)
    if name in ("wide_resnet", SMALL):
        train(inputs, tmp_path / "b", **changes)
        weights = [(tmp_path / member / "weights.safetensors").read_bytes() for member in "ab"]
        assert weights[0] == weights[1]
        train(inputs, tmp_path / "c", seed=1, **changes)
        assert (tmp_path / "c" / "weights.safetensors").read_bytes() != weights[0]


def test_a_custom_network_is_checked_before_it_is_trained(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    given = sections(model={"name": SMALL, "custom": {"widht": 4}})
    chosen = {key: given[key] for key in params.MEMBER_SECTIONS[1:]}
    values = params.read_yaml(Path(__file__).parents[1] / "params.yaml")
    preprocess = params.parse(values, {"preprocess": PreprocessConfig})["preprocess"]
    with pytest.raises(ParamsError, match=r"^params.yaml: model.custom.widht: unknown argument; did you mean 'width'"):
        check_recipe(**chosen, preprocess=preprocess, num_train=400)
    small = {"batch": {"size": 20, "microbatch": 20}}
    with pytest.raises(UserError, match=r"model.custom.widht: unknown argument; did you mean 'width'"):
        train(inputs, tmp_path / "a", model={"name": SMALL, "custom": {"widht": 4}}, **small)
    assert not (tmp_path / "a").exists()


# ---- the section of params.yaml -------------------------------------------------------------------------------------


def section(**changes: Any) -> ModelConfig:
    values = params.read_yaml(Path(__file__).parents[1] / "params.yaml")
    return params.parse(params.merge(values, {"model": changes}), {"model": ModelConfig})["model"]


def test_the_section_and_the_tables_name_the_same() -> None:
    assert tuple(NETWORKS) == ARCHITECTURES
    fields = set(ModelConfig.model_fields) - {"name", "activation", "norm", "custom", "start_from"}
    assert fields == set(NETWORKS) == set(BLOCK)
    assert list(Activation.__args__) == ["auto", *ACTIVATIONS]
    assert set(NormConfig.model_fields) - {"name", "position"} == set(NORMS) - {"none"}


def test_activations_are_torchs_and_elementwise() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    for name, cls in ACTIVATIONS.items():
        layer = cls().double()
        assert type(layer) is getattr(nn, name)
        assert torch.equal(layer(x)[1, 2], layer(x[1:2, 2:3])[0, 0])
        assert sum(p.numel() for p in layer.parameters()) == (name == "PReLU")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("norm", ["auto", *NORMS])
def test_the_name_alone_gives_a_network(name: str, norm: str) -> None:
    """As params.yaml ships, for its digits and for Fashion-MNIST's size."""
    chosen = section(name=name, norm={"name": norm})
    for size in (8, 28):
        settings = {"height": size, "width": size, "norm": chosen.norm.name, "norm_arguments": chosen.norm.arguments}
        faults = conflicts(name, arguments=chosen.arguments, microbatch=32, **settings)
        one_value = name in ("mlp", "convnext") or (name == "airbench" and size == 8)
        assert bool(faults) == (norm == "instance" and one_value)
        if not faults:
            with torch.device("meta"):
                network = build_network(name, arguments=chosen.arguments, num_classes=10, in_channels=1, **settings)
                assert network(torch.zeros(2, 1, size, size)).shape == (2, 10)


def test_auto_is_what_the_paper_has() -> None:
    def resolved(name: str, **changes: Any) -> tuple[str, str]:
        chosen = section(name=name, **changes)
        return chosen.activation, chosen.norm.name

    assert resolved("convnext") == ("GELU", "layer")
    assert resolved("airbench") == ("GELU", "batch")
    assert resolved("resnet") == resolved(SMALL) == ("ReLU", "batch")
    assert resolved("convnext", activation="SiLU", norm={"name": "batch"}) == ("SiLU", "batch")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"name": "resnt"},
            "model.name: found \"resnt\", allowed: resnet | .* | package.module:callable; did you mean 'resnet'?",
        ),
        ({"name": "timm.create_model"}, 'model.name: found "timm.create_model", allowed: resnet | '),
        ({"wide_resnet": {"depth": 20}}, "model.wide_resnet.depth: found 20, allowed: 6 n + 4 .*; nearest 22"),
        ({"convnext": {"kernel": 4}}, "model.convnext.kernel: found 4, allowed: an odd number; nearest 3"),
        ({"convnext": {"depths": [1]}}, "model.convnext.depths: found 1 stages, allowed: 2"),
        ({"norm": {"batch": {"ghost": 1}}}, "model.norm.batch.ghost: found 1, allowed: "),
        ({"norm": {"name": "bach"}}, "model.norm.name: found \"bach\", .*did you mean 'batch'"),
        ({"activation": "RReLU"}, 'model.activation: found "RReLU", allowed: .*'),
    ],
)
def test_faults_of_the_section(changes: dict[str, Any], fault: str) -> None:
    pattern = ".*".join(re.escape(part) for part in fault.split(".*"))
    with pytest.raises(ParamsError, match=rf"^params.yaml: {pattern}"):
        section(**changes)


def test_arguments_of_a_custom_network() -> None:
    chosen = section(name=SMALL, custom={"width": 4, "more": [1, {"a": None}]})
    assert chosen.arguments == {"width": 4, "more": [1, {"a": None}]}
