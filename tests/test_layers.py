"""Layers that draw at random in training: spatial dropout behind each stage, noise on the network's input."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from anneal.models.build import NETWORKS, Classifier, build_network, key_randomness, load_classifier
from anneal.models.config import conflicts
from anneal.models.initialization import initialize
from anneal.models.layers import Dropout, GaussianNoise, SpatialDropout
from anneal.models.normalization import Normalization
from anneal.params import ParamsError, UserError
from tests.test_training import train, write_inputs

BLOCK: dict[str, dict[str, Any]] = {
    "resnet": {"widths": [8, 16], "depths": [1, 1]},
    "preact_resnet": {"widths": [8, 16], "depths": [1, 1]},
    "wide_resnet": {"depth": 10, "width": 1},
    "convnext": {"widths": [8, 16], "depths": [1, 1], "stem": 2, "kernel": 3, "layer_scale": 0.1},
    "airbench": {"widths": [8, 16]},
    "convnet": {"widths": [8, 16], "depth": 1},
}
GEOMETRY: dict[str, Any] = {"num_classes": 5, "in_channels": 3, "height": 12, "width": 12}


def test_every_architecture_is_here() -> None:
    assert {*BLOCK, "mlp"} == set(NETWORKS)


def weights_of(name: str, **rates: float) -> tuple[nn.Module, OrderedDict[str, torch.Tensor]]:
    network = build_network(name, arguments=BLOCK[name], **GEOMETRY, **rates)
    initialize(network, "kaiming_normal", {"mode": "fan_out"}, zero_last=False, activation="ReLU", seed=0)
    return network, OrderedDict(network.state_dict())


# ---- spatial dropout ------------------------------------------------------------------------------------------------


def test_whole_channels_are_dropped_and_the_mean_stays() -> None:
    layer, x = SpatialDropout(0.3), torch.ones(200, 50, 3, 2)
    layer.key = 1
    y = layer(x)
    channels = y.flatten(2)
    assert (channels == channels[..., :1]).all()
    assert channels.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    dropped = (channels[..., 0] == 0).float()
    # Binomial: 10,000 channels drop 3,000, and each sample some of its own.
    assert abs(float(dropped.mean()) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 10_000)
    assert float(dropped.sum(1).var()) == pytest.approx(50 * 0.3 * 0.7, rel=0.3)
    assert torch.equal(layer(x), y)
    assert layer.eval()(x) is x
    assert SpatialDropout(0.0)(x) is x


def test_it_is_torch_s_dropout_by_channel() -> None:
    """The same law as nn.Dropout2d, which draws from the global generator: mean and variance of each element."""
    torch.manual_seed(0)
    x = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(4000, 2, 2, 2)
    ours, theirs = (layer(x) for layer in (SpatialDropout(0.4), nn.Dropout2d(0.4)))
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.15, rtol=0)
    torch.testing.assert_close(ours.var(0), theirs.var(0), atol=0.0, rtol=0.1)
    assert torch.equal((ours == 0).flatten(2).all(2), (ours == 0).flatten(2).any(2))


def test_the_gradient_passes_where_the_channel_did() -> None:
    layer, x = SpatialDropout(0.5), torch.randn(4, 6, 2, 2, requires_grad=True)
    layer.key = 3
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(y == 0, 0.0, 2.0))


@pytest.mark.parametrize("name", BLOCK)
def test_it_stands_behind_each_stage_and_changes_no_name_and_no_weight(name: str) -> None:
    plain, weights = weights_of(name)
    dropping, same = weights_of(name, spatial_dropout=0.5)
    assert not any(isinstance(module, SpatialDropout) for module in plain.modules())
    stages = dropping.get_submodule("stages")
    assert isinstance(stages, nn.Sequential)
    assert [isinstance(stage[-1], SpatialDropout) for stage in stages] == [True] * len(stages)
    assert list(weights) == list(same)
    assert all(torch.equal(weights[key], same[key]) for key in weights)
    x = torch.randn(4, 3, 12, 12)
    plain.load_state_dict(same)
    assert torch.equal(dropping.eval()(x), plain.eval()(x))
    dropping.train()
    key_randomness(dropping, 0, 1, 2)
    first = dropping(x)
    assert not torch.equal(first, plain.train()(x))
    key_randomness(dropping, 0, 1, 3)
    assert not torch.equal(dropping(x), first)


def test_behind_the_last_stage_it_is_dropout_of_the_head_s_features() -> None:
    """The mean over a dropped channel is 0, and over a kept one as much larger."""
    x, spatial, plain = torch.randn(8, 16, 3, 3), SpatialDropout(0.4), Dropout(0.4)
    spatial.key = plain.key = 5
    torch.testing.assert_close(spatial(x).mean((2, 3)), plain(x.mean((2, 3))))


def test_what_has_no_channels_refuses_it() -> None:
    (fault,) = conflicts("mlp", arguments={"hidden": [8]}, height=8, width=8, spatial_dropout=0.2)
    assert fault.startswith("regularization.spatial_dropout: found 0.2 with model.name mlp, which has no channels")
    (fault,) = conflicts("package.module:callable", arguments={}, height=8, width=8, spatial_dropout=0.2)
    assert fault.startswith("regularization.spatial_dropout: found 0.2 with model.name package.module:callable")
    with pytest.raises(UserError, match=r"^regularization\.spatial_dropout: found 0.2"):
        build_network("mlp", arguments={"hidden": [8]}, **GEOMETRY, spatial_dropout=0.2)


# ---- input noise ----------------------------------------------------------------------------------------------------


def test_noise_has_the_standard_deviation_asked_for_and_is_off_in_evaluation() -> None:
    layer, x = GaussianNoise(1.5), torch.full((100, 3, 20, 20), 2.0)
    layer.key = 1
    noise = layer(x) - x
    assert float(noise.mean()) == pytest.approx(0.0, abs=4 * 1.5 / np.sqrt(noise.numel()))
    assert float(noise.std()) == pytest.approx(1.5, rel=0.02)
    assert float(noise.pow(4).mean()) == pytest.approx(3 * 1.5**4, rel=0.05)
    assert torch.equal(layer(x) - x, noise)
    assert layer.eval()(x) is x
    assert GaussianNoise(0.0)(x) is x


def test_noise_on_a_linear_model_is_ridge_regression() -> None:
    """Bishop 1995, exact for a linear model: half the squared error rises by half the noise's variance times |w|^2."""
    generator = torch.Generator().manual_seed(0)
    x, t, w = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 8), (5,), (8,)))
    w.requires_grad_()
    layer, std = GaussianNoise(0.5), 0.5
    layer.key = 7
    noisy = layer(x.expand(100_000, 5, 8)) @ w
    (0.5 * (noisy - t).square()).mean().backward()
    found, w.grad = w.grad, None
    (0.5 * (x @ w - t).square().mean() + 0.5 * std**2 * w.square().sum()).backward()
    torch.testing.assert_close(found, w.grad, atol=0.02, rtol=0)
    plain = (x @ w - t) @ x / 5
    assert float((found - plain).detach().norm()) > 0.1


def test_noise_stands_on_the_normalised_input() -> None:
    class Seen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    statistics = {"mean": np.array([0.25]), "std": np.array([0.1])}
    normalization = Normalization("standardize", statistics=statistics, height=4, width=4, channels=1)
    images = torch.randint(0, 256, (500, 4, 4, 1), dtype=torch.uint8)
    classifier = Classifier(normalization, Seen(), input_noise=0.3)
    key_randomness(classifier, 0, 1, 2)
    expected = normalization(images)
    difference = classifier(images) - expected
    assert float(difference.std()) == pytest.approx(0.3, rel=0.05)
    assert torch.equal(classifier(images) - expected, difference)
    key_randomness(classifier, 0, 1, 3)
    assert not torch.equal(classifier(images) - expected, difference)
    assert torch.equal(classifier.eval()(images), expected)
    assert classifier.state_dict().keys() == Classifier(normalization, Seen()).state_dict().keys()


# ---- through the pipeline -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"), num_train=40, num_val=12)


@pytest.mark.parametrize("rates", [{"spatial_dropout": 0.3}, {"input_noise": 1.5}], ids=str)
def test_training_repeats_to_the_byte(inputs: tuple[Path, Path], tmp_path: Path, rates: dict[str, float]) -> None:
    changes = {
        "regularization": rates,
        "batch": {"size": 20, "microbatch": 10, "noise_microbatches": 0},
        "trainer": {"epochs": 1, "evaluate_train": 0},
    }
    for member in "ab":
        train(inputs, tmp_path / member, **changes)
    train(inputs, tmp_path / "off", **changes | {"regularization": {}})
    weights = [(tmp_path / member / "weights.safetensors").read_bytes() for member in ("a", "b", "off")]
    assert weights[0] == weights[1] != weights[2]
    # Serving knows nothing of the noise; of spatial dropout it knows and does nothing.
    model = json.loads((tmp_path / "a" / "model.json").read_text())
    assert model["architecture"]["spatial_dropout"] == rates.get("spatial_dropout", 0.0)
    assert "input_noise" not in json.dumps(model)
    classifier, _ = load_classifier(tmp_path / "a")
    images = torch.randint(0, 256, (3, 6, 6, 1), dtype=torch.uint8)
    assert torch.equal(classifier(images), classifier(images))


def test_a_model_from_before_spatial_dropout_loads(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    train(inputs, tmp_path / "a", batch={"size": 20, "microbatch": 20}, trainer={"epochs": 1, "evaluate_train": 0})
    path = tmp_path / "a" / "model.json"
    model = json.loads(path.read_text())
    del model["architecture"]["spatial_dropout"]
    path.write_text(json.dumps(model))
    load_classifier(tmp_path / "a")


def test_a_recipe_that_cannot_follow_is_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    changes = {"model": {"name": "mlp"}, "regularization": {"spatial_dropout": 0.1}}
    with pytest.raises(ParamsError, match=r"regularization\.spatial_dropout: found 0.1 with model.name mlp"):
        train(inputs, tmp_path / "a", **changes, batch={"size": 20, "microbatch": 20})
    assert not (tmp_path / "a").exists()
