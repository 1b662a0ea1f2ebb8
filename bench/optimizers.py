"""Fused, foreach and plain implementations of each optimizer, in turns in one process; prints the ratios of their times.

Each steps over the parameters of recipes/fashion-mnist-fast.yaml's network, with the arguments of params.yaml's block and
gradients that stay as they are. A ratio is the plain implementation's time over the other's, the median over rounds: above
1 the other is faster. Behind it stands the largest difference of the weights after ten steps from the plain ones. The last
line is Muon's: filter banks orthogonalised in float32, as here on a CPU, against bfloat16, as in torch.optim.Muon.

    python bench/optimizers.py [--device cpu] [--rounds 30] [--steps 10]
"""

from __future__ import annotations

import argparse
import copy
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from anneal import params
from anneal.models.build import build_network
from anneal.models.config import ModelConfig
from anneal.optimizers.build import dense_optimizers
from anneal.optimizers.groups import weight_layers
from anneal.optimizers.muon import as_matrix, orthogonalize

ROOT = Path(__file__).parents[1]
QUINTIC = (3.4445, -4.775, 2.0315)


def network_of_recipe(device: str) -> nn.Module:
    recipe = params.read_yaml(ROOT / "recipes" / "fashion-mnist-fast.yaml")
    values = params.merge(params.read_yaml(ROOT / "params.yaml"), recipe)
    model = params.parse(values, {"model": ModelConfig})["model"]
    arguments = getattr(model, model.name).model_dump()
    torch.manual_seed(0)
    network = build_network(model.name, arguments=arguments, num_classes=10, in_channels=1, height=28, width=28)
    network.to(device)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-2
    return network


def copy_of(network: nn.Module) -> nn.Module:
    twin = copy.deepcopy(network)
    for parameter, original in zip(twin.parameters(), network.parameters(), strict=True):
        parameter.grad = None if original.grad is None else original.grad.clone()
    return twin


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int, steps: int, device: str) -> dict[str, list[float]]:
    """Return the times of each call, ``steps`` of it at a time, in rounds that take them in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 2):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                call()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_number >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    return float(np.median(np.array(times[slow]) / np.array(times[fast])))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=30, help="default 30")
    parser.add_argument("--steps", type=int, default=10, help="steps of a round (default 10)")
    options = parser.parse_args()
    network = network_of_recipe(options.device)
    blocks = params.read_yaml(ROOT / "params.yaml")["optimizer"]
    number = sum(p.numel() for p in network.parameters())
    print(f"{number:,} parameters in {len(list(network.parameters()))} tensors, {options.device}, ", end="")
    print(f"{torch.get_num_threads()} threads; plain time over the other's, largest difference after ten steps")
    for name, cls in sorted(dense_optimizers().items()):
        known = inspect.signature(cls).parameters
        ways = {"plain": {"foreach": False}, "foreach": {"foreach": True}}
        if "fused" in known:
            ways["fused"] = {"fused": True}
        if "foreach" not in known:
            continue
        twins = {way: copy_of(network) for way in ways}
        build: Callable[..., torch.optim.Optimizer] = cls
        block = {key: tuple(value) if isinstance(value, list) else value for key, value in blocks[name].items()}
        optimizers = {way: build(twins[way].parameters(), **block, **ways[way]) for way in ways}
        for optimizer in optimizers.values():
            for _ in range(10):
                optimizer.step()
        plain = list(twins["plain"].parameters())
        off = {
            way: max(
                float((p.detach() - q.detach()).abs().max()) for p, q in zip(twin.parameters(), plain, strict=True)
            )
            for way, twin in twins.items()
        }
        times = in_turns({way: o.step for way, o in optimizers.items()}, options.rounds, options.steps, options.device)
        found = [f"{way} {ratio(times, 'plain', way):.2f} ({off[way]:.0e})" for way in ways if way != "plain"]
        print(f"  {name:<10} plain {np.median(times['plain']) / options.steps * 1000:6.2f} ms; {', '.join(found)}")

    banks = [as_matrix(p.detach(), p) for p in weight_layers(network)[1:-1]]
    settings: dict[str, Any] = {"coefficients": QUINTIC, "steps": 5, "eps": 1e-7}
    calls = {
        str(dtype): lambda dtype=dtype: [orthogonalize(bank, dtype=dtype, **settings) for bank in banks]
        for dtype in (torch.float32, torch.bfloat16)
    }
    times = in_turns(calls, max(3, options.rounds // 10), 1, options.device)
    print(f"  Muon       float32 {np.median(times['torch.float32']) * 1000:.1f} ms; bfloat16 takes ", end="")
    print(f"{ratio(times, 'torch.bfloat16', 'torch.float32'):.1f} times as long")


if __name__ == "__main__":
    main()
