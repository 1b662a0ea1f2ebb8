"""Networks: normalisation, shapes, residual blocks, random layers, conflicts, and the way to disk and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from anneal.models.build import (
    NETWORKS,
    build_classifier,
    build_network,
    count_parameters,
    key_randomness,
    load_classifier,
)
from anneal.models.config import conflicts, halvings
from anneal.models.initialization import initialize
from anneal.models.layers import ACTIVATIONS, NORMS, Dropout, StochasticDepth
from anneal.models.normalization import KINDS, Normalization
from anneal.models.resnet import BLOCKS
from anneal.params import UserError

BLOCK: dict[str, dict[str, Any]] = {
    "resnet": {"widths": [8, 16], "depths": [1, 2], "stem": "small", "block": "basic"},
    "convnet": {"widths": [8, 16], "depth": 2},
    "mlp": {"hidden": [32, 16]},
}
H, W = 12, 10


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
    return build_network(name, arguments=settings.pop("arguments", BLOCK[name]), **settings)


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_learns_a_batch(name: str, norm: str, position: str) -> None:
    network = build(name, norm=norm, norm_position=position)
    initialize(network, "kaiming_normal", {"mode": "fan_in"}, zero_last=True, activation="ReLU", seed=0)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(14, 3, H, W, generator=generator), torch.arange(14) % 7
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(80):
        loss = nn.functional.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 5.0 and losses[-1] < 0.3


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_has_a_gradient(name: str, activation: str) -> None:
    network = build(name, activation=activation, norm_arguments={"momentum": 0.2, "eps": 1e-4})
    initialize(network, "kaiming_normal", {"mode": "fan_out"}, zero_last=False, activation=activation, seed=0)
    logits = network(torch.randn(6, 3, H, W))
    assert logits.shape == (6, 7)
    (logits * torch.randn_like(logits)).sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", ["resnet", "convnet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_whole_network_runs_in_channels_last(name: str, channels: int) -> None:
    classifier = build_classifier(
        {
            "name": name,
            "arguments": BLOCK[name],
            "num_classes": 7,
            "in_channels": channels,
            "height": H,
            "width": W,
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
    assert x.shape == (2, 16, H // 2, W // 2)


def test_resnet_shapes_and_size() -> None:
    arguments = {"widths": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "stem": "large"}
    network = build_network(
        "resnet", arguments=arguments, num_classes=1000, in_channels=3, height=64, width=64, dropout=0.1
    )
    # ResNet-18 of He et al. 2016.
    assert count_parameters(network) == 11_689_512
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


def test_stochastic_depth_grows_linearly_with_depth() -> None:
    network = build(arguments={**BLOCK["resnet"], "depths": [2, 3]}, stochastic_depth=0.5)
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
    assert conflicts("mlp", arguments={"hidden": [8]}, height=H, width=W, normalize="pca") == []


@pytest.mark.parametrize("name", ["convnet", "mlp"])
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


def test_batch_norm_cannot_see_one_value() -> None:
    deep = {"widths": [8] * 4, "depths": [1] * 4, "stem": "small"}
    assert (
        "batch.microbatch: found 1" in conflicts("mlp", arguments={"hidden": [8]}, height=8, width=8, microbatch=1)[0]
    )
    assert "batch.microbatch: found 1" in conflicts("resnet", arguments=deep, height=8, width=8, microbatch=1)[0]
    assert conflicts("resnet", arguments=deep, height=16, width=16, microbatch=1) == []
    assert conflicts("mlp", arguments={"hidden": [8]}, height=8, width=8, norm="none", microbatch=1) == []
    with pytest.raises(ValueError, match="more than 1 value"):
        build(arguments=deep, height=8, width=8).train()(torch.zeros(1, 3, 8, 8))
    build(arguments=deep, height=16, width=16).train()(torch.zeros(1, 3, 16, 16))


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
    (tmp_path / "a" / "weights.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="damaged"):
        load_classifier(tmp_path / "a")
