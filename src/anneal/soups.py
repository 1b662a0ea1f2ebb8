"""Weight soups: one network whose weights are the mean of several members' (Wortsman et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from anneal.models.build import Classifier, build_classifier, fold_norms
from anneal.models.recalibration import recalibrate, recalibration_batches
from anneal.store import Store

Weights = dict[str, torch.Tensor]

IMAGES = 2048
"""Training images on which a soup's batch norm statistics are estimated."""

MICROBATCH = 128
"""Images of a batch there."""


def mixed(states: Sequence[Weights]) -> Weights:
    """Return the mean of state dicts with the same keys and shapes, in float64; what is no floating point is the first's.

    >>> mixed([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 2.0])}])
    {'w': tensor([2., 2.])}
    """
    return {
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(first.dtype)
        if first.is_floating_point()
        else first
        for name, first in states[0].items()
    }


def apart(models: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return why the weights of members cannot be averaged, or None where they can.

    Parameters
    ----------
    models
        Name to what model.json says, two or more of them.

    Examples
    --------
    >>> model = {"architecture": {"name": "mlp"}, "normalization": {"kind": "none"}}
    >>> apart({"a": model, "b": model})
    >>> apart({"a": model, "b": {**model, "architecture": {"name": "resnet"}}})
    'member b has another architecture than a'
    """
    if len(models) < 2:
        return "there is one member"
    first = next(iter(models))
    for key in ("architecture", "normalization"):
        others = [name for name, model in models.items() if model[key] != models[first][key]]
        if others:
            number = f"member {others[0]} has" if len(others) == 1 else f"members {', '.join(others)} have"
            return f"{number} another {key} than {first}"
    return None


def soup(states: Sequence[Weights], model: Mapping[str, Any], store: Store, device: str = "cpu") -> Classifier:
    """Return the network of the mean weights, in evaluation mode, batch norm folded in.

    Its batch normalisation is recalibrated on training images without augmentation, the same for every soup: the running
    statistics of the members belong to other weights, and their mean to none.

    Parameters
    ----------
    states
        State dicts of classifiers of one architecture.
    model
        What model.json says of one of them.
    store
        The processed data.
    device
        In torch's words.
    """
    classifier = build_classifier(model["architecture"], model["normalization"], None)
    classifier.load_state_dict(mixed(states))
    classifier.to(device).eval()
    batches = recalibration_batches(store, 0, IMAGES, MICROBATCH)
    recalibrate(classifier, (images.to(device) for images in batches))
    return fold_norms(classifier.cpu()).to(device)


def greedy(
    names: Sequence[str],
    accuracy: Mapping[str, float],
    taste: Callable[[Sequence[str]], float],
) -> list[str]:
    """Return the members of the greedy soup: from the best on, each that does not lower the validation accuracy.

    Parameters
    ----------
    names
        Of the members; the earlier one comes first where two are as good.
    accuracy
        Of each alone on the validation split.
    taste
        Returns that of the soup of some.

    Examples
    --------
    >>> greedy("abc", {"a": 0.7, "b": 0.9, "c": 0.8}, lambda some: 0.95 if "a" not in some else 0.5)
    ['b', 'c']
    """
    best, *others = sorted(names, key=lambda name: -accuracy[name])
    chosen, reached = [best], accuracy[best]
    for name in others:
        found = taste([*chosen, name])
        if found >= reached:
            chosen, reached = [*chosen, name], found
    return chosen


def load_weights(path: Path) -> Weights:
    """Return the tensors of a .safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)
