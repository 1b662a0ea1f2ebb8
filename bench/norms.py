"""What folding batch norm layers saves when evaluating, and what measuring them costs in training; prints ratios.

The network is that of params.yaml or of a recipe, on noise. Folded and unfolded take turns, a block
each on the same batch. The cost of a measurement (training/norm_health.py, once an epoch) is stated in training steps.

    python bench/norms.py [--recipe digits] [--name resnet] [--blocks 40] [--batch 256]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from step import ROOT, interval

from anneal import params
from anneal.models.build import build_network
from anneal.models.config import ModelConfig
from anneal.models.folding import fold
from anneal.models.recalibration import recalibrate
from anneal.training.norm_health import norm_health


def seconds(call: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="digits", help="a file of recipes/, or digits: params.yaml (default)")
    parser.add_argument("--blocks", type=int, default=40, help="blocks of each (default 40)")
    parser.add_argument("--batch", type=int, default=256, help="images of a batch (default 256)")
    parser.add_argument("--size", type=int, default=28, help="pixels of a side (default 28)")
    parser.add_argument("--name", help="model.name, instead of the recipe's")
    options = parser.parse_args()

    values = params.read_yaml(ROOT / "params.yaml")
    if options.recipe != "digits":
        values = params.merge(values, params.read_yaml(ROOT / "recipes" / f"{options.recipe}.yaml"))
    if options.name:
        values["model"]["name"] = options.name
    model: ModelConfig = params.parse({"model": values["model"]}, {"model": ModelConfig})["model"]
    network = build_network(
        model.name,
        arguments=model.arguments,
        num_classes=10,
        in_channels=1,
        height=options.size,
        width=options.size,
        activation=model.activation,
        norm=model.norm.name,
        norm_position=model.norm.position,
        norm_arguments=model.norm.arguments,
    ).eval()
    images = torch.randn(options.batch, 1, options.size, options.size).to(memory_format=torch.channels_last)
    recalibrate(network, [images])
    folded = fold(network, images[:2])
    times = []
    with torch.inference_mode():
        difference = float((folded(images) - network(images)).abs().max())
        for _ in range(options.blocks):
            times.append([seconds(lambda: net(images)) for net in (network, folded)])  # noqa: B023
    both = np.array(times)
    middle, low, high = interval(both[:, 0] / both[:, 1])
    print(f"{model.name}, {options.batch} images of {options.size} pixels, {torch.get_num_threads()} threads")
    print(f"logits differ by {difference:.1e}")
    print(f"folding: evaluation {middle:.3f} times as fast, 95 % interval {low:.3f} to {high:.3f}")

    trained = copy.deepcopy(network).train()
    labels = torch.zeros(options.batch, dtype=torch.int64)

    def step() -> None:
        F.cross_entropy(trained(images), labels).backward()

    step()
    norm_health(trained, images)
    pairs = np.array([[seconds(lambda: norm_health(trained, images)), seconds(step)] for _ in range(options.blocks)])
    middle, low, high = interval(pairs[:, 0] / pairs[:, 1])
    print(f"measuring norms: {middle:.2f} steps of as many images, 95 % interval {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
