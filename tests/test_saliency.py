"""The map shows where a model looks, on every architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from anneal.models.build import NETWORKS, build_classifier
from anneal.params import read_yaml
from anneal.saliency import attributions

BLOCKS = read_yaml(Path(__file__).resolve().parents[1] / "params.yaml")["model"]
SHAPE = (8, 8, 3)


class Corner(nn.Module):
    """Says class 1 where the top left 2x2 pixels are bright, class 0 where they are dark."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images[:, :2, :2].float().mean(dim=(1, 2, 3)) / 25.5 - 5
        return torch.stack([-bright, bright, torch.zeros_like(bright)], dim=1)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *SHAPE), np.uint8)


@pytest.mark.parametrize("members", [1, 2])
def test_a_model_that_looks_at_one_corner_is_caught(members: int) -> None:
    bright, dark = np.full((2, *SHAPE), 128, np.uint8)
    bright[:2, :2], dark[:2, :2] = 250, 5
    maps = attributions(
        [Corner()] * members,
        np.stack([bright, dark, dark]),
        predicted=np.array([1, 0, 1]),
        labels=np.array([0, 1, 0]),
        baseline=np.full(SHAPE, 128.0),
    )
    assert maps.shape == (3, 8, 8) and maps.dtype == np.float64
    outside = maps.copy()
    outside[:, :2, :2] = 0
    assert not outside.any()
    assert (maps[:2, :2, :2] > 0).all() and (maps[2, :2, :2] < 0).all()


def classifier(name: str, normalize: str = "standardize", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    height, width, channels = SHAPE
    size = height * width * channels
    statistics = {"mean": np.full(3, 0.4), "std": np.full(3, 0.2)}
    if normalize == "pca":
        statistics = {"mean": np.full(SHAPE, 0.4), "matrix": np.random.default_rng(0).normal(size=(size, size)) / 4}
    geometry = {"height": height, "width": width, "channels": channels}
    architecture = {"name": name, "arguments": BLOCKS[name], "num_classes": 3, "in_channels": 3}
    architecture |= {"height": height, "width": width}
    return build_classifier(architecture, {"kind": normalize, **geometry}, statistics).eval()


@pytest.mark.parametrize(("name", "normalize"), [*((name, "standardize") for name in NETWORKS), ("mlp", "pca")])
def test_attributions_sum_up_to_the_difference_on_every_architecture(name: str, normalize: str) -> None:
    members = [classifier(name, normalize, seed) for seed in (0, 1)]
    inputs, baseline = images(2), np.full(SHAPE, 100.0)
    predicted, labels, weights = np.array([0, 2]), np.array([1, 0]), [0.75, 0.25]
    maps = attributions(
        members, inputs, predicted=predicted, labels=labels, baseline=baseline, weights=weights, steps=200
    )
    with torch.no_grad():
        pixels = torch.from_numpy(np.concatenate([inputs, baseline[None]]).astype(np.float32))
        p = sum(w * member(pixels).softmax(dim=1) for w, member in zip(weights, members, strict=True))
    scores = p.log().numpy()
    for i in range(2):
        difference = scores[i, predicted[i]] - scores[i, labels[i]] - scores[2, predicted[i]] + scores[2, labels[i]]
        assert maps[i].sum() == pytest.approx(difference, abs=0.03 * np.abs(maps[i]).sum() + 1e-4)


def test_the_same_bytes_twice_and_each_image_by_itself() -> None:
    member, inputs = classifier("resnet"), images(3)
    keywords = {"baseline": np.zeros(SHAPE)}
    predicted, labels = np.array([0, 1, 2]), np.array([1, 2, 0])
    once, again = (attributions([member], inputs, predicted=predicted, labels=labels, **keywords) for _ in range(2))
    assert once.tobytes() == again.tobytes()
    alone = attributions([member], inputs[1:2], predicted=predicted[1:2], labels=labels[1:2], **keywords)
    assert alone[0].tobytes() == once[1].tobytes()


def test_no_image_gives_no_map() -> None:
    none = np.empty(0, np.int64)
    maps = attributions([classifier("mlp")], images(0), predicted=none, labels=none, baseline=np.zeros(SHAPE))
    assert maps.shape == (0, 8, 8)
