"""What the first batch says of the initial weights."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anneal.models.build import Classifier, build_classifier
from anneal.models.initial_statistics import (
    SYMMETRIC,
    LayerStatistics,
    findings,
    initial_statistics,
    statistics_panels,
)
from anneal.models.initialization import initialize
from anneal.reporting.lines import draw_panels, from_values

SIDE = 8
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet", {"widths": [8, 16], "depths": [1, 1], "stem": "small"}),
    "preactivation": ("resnet", {"widths": [8, 16], "depths": [1, 1], "stem": "small", "block": "preactivation"}),
    "convnet": ("convnet", {"widths": [8, 16], "depth": 2}),
    "mlp": ("mlp", {"hidden": [32, 16]}),
    "deep": ("mlp", {"hidden": [64] * 12}),
}
SOUND: dict[str, dict[str, Any]] = {
    "xavier_normal": {"gain": "auto"},
    "kaiming_normal": {"mode": "fan_in"},
    "kaiming_uniform": {"mode": "fan_in"},
    "orthogonal": {"gain": "auto"},
    "lsuv": {"tolerance": 0.01, "max_iterations": 10},
}


def batch(number: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = F.avg_pool2d(torch.randn(number, 3, SIDE + 4, SIDE + 4, generator=generator), 5, 1)
    images = (noise * 250 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return images, torch.randint(0, 10, (number,), generator=generator)


def classifier(
    network: str = "mlp",
    law: str = "kaiming_normal",
    arguments: dict[str, Any] | None = None,
    *,
    norm: str = "none",
    activation: str = "ReLU",
    zero_last: bool = False,
    normalize: str = "standardize",
    dropout: float = 0.0,
) -> Classifier:
    name, block = NETWORKS[network]
    pixels = batch()[0].double().numpy() / 255
    architecture = {
        "name": name,
        "arguments": block,
        "num_classes": 10,
        "in_channels": 3,
        "height": SIDE,
        "width": SIDE,
        "activation": activation,
        "norm": norm,
        "dropout": dropout,
    }
    built = build_classifier(
        architecture,
        {"kind": normalize, "height": SIDE, "width": SIDE, "channels": 3},
        {"mean": pixels.mean((0, 1, 2)), "std": pixels.std((0, 1, 2))},
    )
    arguments = SOUND.get(law, {}) if arguments is None else arguments
    keywords = {"zero_last": zero_last, "activation": activation, "seed": 0}
    initialize(built.network, law, arguments, images=built.normalization(batch()[0]), **keywords)
    return built


def warnings_of(*choices: Any, **keywords: Any) -> list[str]:
    return findings(initial_statistics(classifier(*choices, **keywords), *batch()))


def kinds_of(*choices: Any, **keywords: Any) -> list[str]:
    return [warning.split(":")[0] for warning in warnings_of(*choices, **keywords)]


# ---- the figures ----------------------------------------------------------------------------------------------------


def test_rows_are_what_they_say() -> None:
    model = classifier("mlp")
    images, labels = batch()
    rows = {row.layer: row for row in initial_statistics(model, images, labels)}
    assert [row.kind for row in rows.values()] == ["input", "linear", "activation", "linear", "activation", "linear"]
    # The same by hand.
    x = model.normalization(images)
    layers = model.network.get_submodule("hidden")
    a = layers[0].linear(x.flatten(1))
    b = a.clamp(min=0)
    c = layers[1].linear(b)
    d = c.clamp(min=0)
    e = model.network.get_submodule("head")(d)
    loss = F.cross_entropy(e, labels, reduction="sum")
    outputs = {
        "hidden.0.linear": a,
        "hidden.0.activation": b,
        "hidden.1.linear": c,
        "hidden.1.activation": d,
        "head": e,
    }
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    for (name, output), gradient in zip(outputs.items(), gradients, strict=True):
        row = rows[name]
        assert row.mean == pytest.approx(float(output.detach().mean()), rel=1e-3, abs=1e-6)
        assert row.std == pytest.approx(float(output.detach().std(correction=0)), rel=1e-4)
        assert row.grad_mean == pytest.approx(float(gradient.mean()), rel=1e-3, abs=1e-6)
        assert row.grad_std == pytest.approx(float(gradient.std(correction=0)), rel=1e-4)
        assert row.grad_norm == pytest.approx(float(gradient.square().sum(1).mean().sqrt()), rel=1e-4)
        expected = None if name.endswith(("linear", "head")) else float((output == 0).all(0).float().mean())
        assert row.dead == expected
    assert rows["input"].std == pytest.approx(1.0, abs=0.01) and rows["input"].mean == pytest.approx(0.0, abs=0.01)


def test_rows_follow_the_forward_order_and_name_second_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)
            self.first = nn.Conv2d(3, 6, 3)
            self.activation = nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.activation(self.first(x)).mean((2, 3))
            return self.head(self.activation(x))

    model = Classifier(classifier("convnet").normalization, Twice())
    images, labels = batch()
    rows = initial_statistics(model, images, labels % 3)
    assert [row.layer for row in rows] == ["input", "first", "activation", "activation#2", "head"]
    # The convolution is measured before the activation overwrites it.
    assert rows[1].mean < rows[2].mean
    assert rows[1].grad_std is not None and rows[1].grad_std > 0


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_nothing_is_touched(norm: str) -> None:
    model = classifier("resnet", norm=norm, dropout=0.5).eval()
    images, labels = batch()
    model.train()
    F.cross_entropy(model(images), labels).backward()
    model.network.get_submodule("stem").eval()
    state = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    first = initial_statistics(model, images, labels)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if p.grad is not None)
    assert not any(module._forward_hooks for module in model.modules())
    assert first == initial_statistics(model, images, labels)


def test_dead_units_are_counted_by_channel() -> None:
    model = classifier("convnet")
    conv = model.network.get_submodule("stages.0.conv0")
    with torch.no_grad():
        conv.bias[:3] = -1e4
    rows = {row.layer: row for row in initial_statistics(model, *batch())}
    assert rows["stages.0.activation0"].dead == pytest.approx(3 / 8)


@pytest.mark.parametrize("law", ["zeros", "kaiming_normal"])
def test_panels_can_be_drawn(law: str, tmp_path: Path) -> None:
    rows = initial_statistics(classifier("convnet", law), *batch())
    panels = json.loads(json.dumps(statistics_panels(rows), allow_nan=False))
    draw_panels(from_values(panels), tmp_path / "initial.png")
    assert (tmp_path / "initial.png").stat().st_size > 5000
    lines = {line["label"]: line for line in panels[0]["lines"]}
    if law == "zeros":
        assert list(lines) == ["input"]
    else:
        assert lines["layers with weights"]["x"] == [n for n, row in enumerate(rows) if row.kind in ("conv", "linear")]
        assert lines["activations"]["y"] == [row.std for row in rows if row.kind == "activation"]
    assert panels[2]["lines"][0]["y"] == [row.dead for row in rows if row.dead is not None]


# ---- the findings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_last", [False, True])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("law", SOUND)
def test_a_sound_start_has_no_finding(law: str, network: str, norm: str, zero_last: bool) -> None:
    assert warnings_of(network, law, norm=norm, zero_last=zero_last) == []


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize(("law", "arguments"), [("zeros", {}), ("constant", {"value": 0.01})])
def test_zeros_and_constants_are_symmetric(law: str, arguments: dict[str, Any], network: str, norm: str) -> None:
    model = classifier(network, law, arguments, norm=norm)
    rows = initial_statistics(model, *batch())
    named = {row.layer for row in rows if row.spread is not None and row.spread <= SYMMETRIC}
    layers = {name for name, m in model.network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert named == layers - {"head"}
    warnings = findings(rows)
    assert warnings[0].startswith(f"symmetric: {next(row.layer for row in rows if row.spread is not None)}")
    assert not any(warning.startswith(("dead", "vanishing")) for warning in warnings)


def test_symmetric_layers_do_stay_symmetric() -> None:
    # What the warning says, shown: ten steps of SGD later the units are still copies of one another.
    model, (images, labels) = classifier("mlp", "constant", {"value": 0.05}), batch()
    for _ in range(10):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        for parameter in model.parameters():
            parameter.data -= 0.01 * parameter.grad
    hidden = model.network.get_submodule("hidden.1.linear").weight
    torch.testing.assert_close(hidden, hidden[:1].expand_as(hidden))


def test_one_layer_alone_is_symmetric() -> None:
    model = classifier("mlp")
    with torch.no_grad():
        model.network.get_submodule("hidden.1.linear").weight.fill_(0.1)
        head = model.network.get_submodule("head").weight
        head.copy_(head[:, :1].expand_as(head))
    warnings = findings(initial_statistics(model, *batch()))
    assert warnings[0].startswith("symmetric: hidden.1.linear (1 of 5 layers)")
    # Once the units' gradients differ they drift apart, so that the same weights alone are no fault.
    with torch.no_grad():
        head.normal_(generator=torch.Generator().manual_seed(0))
    assert findings(initial_statistics(model, *batch())) == []


@pytest.mark.parametrize("law", ["normal", "truncated_normal"])
def test_too_small_vanishes_and_too_large_explodes(law: str) -> None:
    small = warnings_of("deep", law, {"std": 0.01})
    assert [warning.split(":")[0] for warning in small] == ["vanishing activations", "vanishing gradients"]
    assert "hidden.11.activation" in small[0] and "hidden.0.linear" in small[1]
    large = kinds_of("deep", law, {"std": 1.0})
    assert large == ["exploding activations", "exploding gradients", "exploding logits"]
    assert kinds_of("deep", law, {"std": 4.0}, norm="batch") == ["exploding logits"]
    assert kinds_of("deep", law, {"std": 0.01}, norm="batch") == []


def test_what_is_no_number_is_exploding() -> None:
    warnings = warnings_of("deep", "normal", {"std": 1e5})
    assert warnings[0].startswith("exploding: ") and "beyond what a number can hold" in warnings[0]


def test_sigmoids_vanish_backward() -> None:
    assert kinds_of("deep", activation="Sigmoid") == ["vanishing gradients"]


def test_raw_pixels_explode_without_norm_layers() -> None:
    assert kinds_of("mlp", normalize="none") == ["exploding logits"]
    assert kinds_of("mlp", normalize="none", norm="batch") == []


@pytest.mark.parametrize(("activation", "expected"), [("ReLU", True), ("LeakyReLU", False), ("GELU", False)])
def test_a_large_negative_bias_kills_rectifiers(activation: str, expected: bool) -> None:
    model = classifier("mlp", activation=activation)
    with torch.no_grad():
        model.network.get_submodule("hidden.0.linear").bias.fill_(-20.0 if activation == "ReLU" else -5.0)
    warnings = findings(initial_statistics(model, *batch()))
    assert any(warning.startswith("dead: hidden.0.activation") for warning in warnings) is expected


def test_findings_of_nothing() -> None:
    assert findings([]) == [] == findings([LayerStatistics("input", "input", 0.0, 1.0)])
