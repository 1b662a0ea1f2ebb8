"""Removing one technique leaves the draws of all others as they were, which is what makes ablations sharp."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from anneal import params
from anneal.ablation.techniques import techniques_on
from anneal.models.layers import KeyedRandom
from anneal.training.machine import quiet
from tests.test_training import SHIPPED, set_up_run, write_inputs

POLICY = [{"HorizontalFlip": {"p": 0.5}}, {"RandomBrightnessContrast": {"p": 0.5}}]
RECIPE: dict[str, Any] = {
    "model": {"name": "resnet", "resnet": {"widths": [8], "depths": [2]}},
    "batch": {"size": 32, "microbatch": 16, "noise_microbatches": 0},
    "regularization": {
        "label_smoothing": 0.1,
        "dropout": 0.3,
        "stochastic_depth": 0.3,
        "mixup": {"alpha": 0.4, "probability": 0.5},
        "input_noise": 0.1,
        "gradient_noise": {"std": 0.01},
        "gradient_clip": 1.0,
        "l2": 1e-4,
    },
    "averaging": {"name": "ema"},
    "trainer": {"epochs": 2, "threads": 1, "evaluate_train": 0},
}


class Drawn(pl.Callback):
    """What a run drew: the first weights, every microbatch as it comes, and what mixing and dropout make of the first."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"images": [], "labels": []}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = pl_module.classifier.state_dict()
        self.found["weights"] = {name: value.numpy().tobytes() for name, value in state.items()}
        self.handles = [pl_module.classifier.register_forward_pre_hook(self.mixed)]
        for name, module in pl_module.classifier.named_modules():
            if isinstance(module, KeyedRandom):
                self.handles.append(module.register_forward_hook(self.dropped(f"{module.technique} {name}")))

    def mixed(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if module.training:
            self.found.setdefault("mixed", inputs[0].numpy().tobytes())

    def dropped(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            if module.training and f"dropped {name}" not in self.found:
                dead = inputs[0] == 0  # of these one cannot tell
                self.found[f"dropped {name}"] = ((output == 0) & ~dead).numpy(), dead.numpy()

        return hook

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        self.found["images"].append(batch.images.numpy().tobytes())
        self.found["labels"].append(batch.labels.tolist())

    def on_train_end(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def draws(inputs: Any, recipe: dict[str, Any]) -> dict[str, Any]:
    """Train, and return what was drawn."""
    from anneal.training.sections import SECTIONS

    drawn = Drawn()
    changes = {name: recipe[name] for name in SECTIONS}
    with quiet():
        setup = set_up_run(inputs, **changes)
        setup.trainer([drawn]).fit(setup.module, datamodule=setup.data_module())
    return drawn.found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_inputs(tmp_path_factory.mktemp("augmented"), num_train=70, num_val=20, policy=POLICY)


def recipe() -> dict[str, Any]:
    small = params.merge(SHIPPED, {"hardware": {"accelerator": "cpu", "devices": 1, "num_workers": 0}})
    return params.merge(small, {**RECIPE, "augment": {"policy": POLICY}})


@pytest.fixture(scope="module")
def full(inputs: Any) -> dict[str, Any]:
    return draws(inputs, recipe())


ON = techniques_on(recipe())
OF_DATA = {"augmentation", "input_normalization"}
"""Techniques of stages before training."""

OTHER_NETWORK = {"init", "norm", "dropout", "stochastic_depth"}
"""Without these there are other weights, or other layers."""


def test_the_recipe_has_much_on() -> None:
    assert {"momentum", "schedule", "warmup", "weight_decay", "label_smoothing", "mixup", "averaging"} < set(ON)
    assert set(ON) > OTHER_NETWORK | OF_DATA


@pytest.mark.parametrize("name", [name for name, one in ON.items() if one.trains and name not in OF_DATA])
def test_without_a_technique_all_other_draws_are_the_same(name: str, inputs: Any, full: dict[str, Any]) -> None:
    found = draws(inputs, params.merge(recipe(), ON[name].off))
    assert len(full["images"]) == 10  # 5 microbatches in each of two epochs
    assert found["labels"] == full["labels"], "the order"
    assert found["images"] == full["images"], "the augmentation"
    assert (found["mixed"] == full["mixed"]) == (name != "mixup"), "the mixing"
    if name not in OTHER_NETWORK:
        assert found["weights"] == full["weights"], "the first weights"
    elif name != "init":
        shared = set(found["weights"]) & set(full["weights"])
        assert shared and all(found["weights"][key] == full["weights"][key] for key in shared if key.endswith("weight"))
    masks = [key for key in full if key.startswith("dropped")]
    assert masks
    for key in [key for key in masks if key in found and key.split()[1] != name]:
        (a, dead_a), (b, dead_b) = found[key], full[key]
        alive = ~(dead_a | dead_b)
        assert np.array_equal(a[alive], b[alive]), "what is dropped"


def test_without_augmentation_the_order_and_the_first_weights_are_the_same(
    full: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    plain = write_inputs(tmp_path_factory.mktemp("plain"), num_train=70, num_val=20)
    found = draws(plain, params.merge(recipe(), ON["augmentation"].off))
    assert found["labels"] == full["labels"] and found["weights"] == full["weights"]
    assert found["images"] != full["images"]
