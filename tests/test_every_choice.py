"""Every choice of params.yaml for which no other test loops trains two steps, is exported, loaded and evaluated.

Names come from the config classes, so that a new one is tested here as soon as it can be chosen. Optimizers have such a
loop in test_optimizers.py, schedules in test_training.py, laws of the initial weights in test_initialization.py, networks in
test_models.py, presets of the augmentation in test_augment.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest

from anneal import params
from anneal.batching import BatchConfig
from anneal.evaluation import evaluate
from anneal.models.config import NormConfig, RecalibrateConfig, StartFromConfig
from anneal.store import open_store
from anneal.training.config import AveragingConfig, LossConfig, RegularizationConfig
from anneal.training.fit import FitResult, fit
from tests.test_training import SECTIONS, write_inputs

Inputs = tuple[Path, Path]

SMALL = params.merge(
    params.read_yaml(Path(__file__).parents[1] / "params.yaml"),
    {
        "model": {"name": "resnet", "resnet": {"widths": [8, 16], "depths": [1, 1]}},
        "schedule": {"warmup": {"length": 0.0}},
        "batch": {"size": 20, "microbatch": 10, "noise_microbatches": 0},
        "trainer": {"epochs": 1, "threads": 1},
        "hardware": {"accelerator": "cpu", "devices": 1, "num_workers": 0},
    },
)
"""What params.yaml ships, on a small network and in two steps."""


def choices(config: Any, key: str) -> list[str]:
    """Values of a key whose type is a Literal."""
    return list(get_args(config.model_fields[key].annotation))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Two steps of 20 training images."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), num_train=40, num_val=12)


def two_steps(inputs: Inputs, out: Path, *, seed: int = 0, **changes: Any) -> tuple[FitResult, bytes]:
    """Train two optimizer steps, check that the member can be evaluated, and return its weights."""
    sections = params.parse(params.merge(SMALL, changes), SECTIONS)
    result = fit(name="a", store=inputs[0], augmented=inputs[1], out=out, seed=seed, **sections)
    assert result.rows[-1].step == 2
    assert all(math.isfinite(row.train_loss) and math.isfinite(row.val_loss) for row in result.rows)
    found = evaluate(
        open_store(inputs[0]),
        {"a": out},
        splits=["val"],
        tta_views=["identity"],
        average="probability",
        combine="probability_mean",
        calibrate="none",
        num_resamples=100,
        seed=0,
    )
    exported = result.rows[result.best_epoch - 1]
    accuracy = found.figures["val"]["single"]["accuracy"]
    averaged = exported.val_average_accuracy
    assert any(accuracy == pytest.approx(value) for value in (exported.val_accuracy, averaged) if value is not None)
    return result, (out / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """What the settings give that every test below changes: a trained member and its weights."""
    out = tmp_path_factory.mktemp("plain") / "a"
    return out, two_steps(inputs, out)[1]


# ---- normalisation --------------------------------------------------------------------------------------------------


def norms() -> Iterator[Any]:
    for name, position in product(choices(NormConfig, "name"), choices(NormConfig, "position")):
        if (name, position) != ("instance", "after"):  # refused in a residual network
            yield pytest.param({"name": name, "position": position, "group": {"groups": 4}}, id=f"{name}-{position}")
    for when in choices(RecalibrateConfig, "when"):
        yield pytest.param({"batch": {"recalibrate": {"when": when, "images": 20}}}, id=f"recalibrate-{when}")
    yield pytest.param({"batch": {"ghost": 5}}, id="ghost")
    yield pytest.param({"batch": {"sync": True}}, id="sync")
    yield pytest.param({"batch": {"affine": False}}, id="affine")


@pytest.mark.parametrize("norm", norms())
def test_every_norm(inputs: Inputs, tmp_path: Path, norm: dict[str, Any]) -> None:
    two_steps(inputs, tmp_path / "a", model={"norm": norm})


# ---- transfer learning ----------------------------------------------------------------------------------------------


def ways_to_start() -> Iterator[tuple[str, float, bool]]:
    for unfreeze, freeze, frozen_norms in product(choices(StartFromConfig, "unfreeze"), (0.0, 0.5, 1.0), (False, True)):
        if (unfreeze, freeze) != ("gradually", 0.0):  # refused: no time from one layer to the next
            yield unfreeze, freeze, frozen_norms


@pytest.mark.parametrize(("unfreeze", "freeze", "frozen_norms"), ways_to_start())
def test_every_way_to_start_from_a_member(
    inputs: Inputs, tmp_path: Path, plain: tuple[Path, bytes], unfreeze: str, freeze: float, frozen_norms: bool
) -> None:
    digest = hashlib.sha256(plain[1]).hexdigest()
    start = {"path": str(plain[0]), "sha256": digest, "freeze": freeze, "unfreeze": unfreeze}
    model = {"start_from": start, "norm": {"batch": {"frozen": frozen_norms}}}
    _, weights = two_steps(inputs, tmp_path / "a", model=model, seed=1)
    assert weights != plain[1]


# ---- loss and sampling ----------------------------------------------------------------------------------------------


def losses() -> Iterator[tuple[str, str, str]]:
    for chosen in product(
        choices(LossConfig, "name"), choices(LossConfig, "class_weights"), choices(BatchConfig, "sampling")
    ):
        if chosen[1:] != ("balanced", "balanced"):  # refused: the small classes would count twice
            yield chosen


@pytest.mark.parametrize(("name", "class_weights", "sampling"), losses())
def test_every_loss(
    inputs: Inputs, tmp_path: Path, plain: tuple[Path, bytes], name: str, class_weights: str, sampling: str
) -> None:
    loss = {"name": name, "class_weights": class_weights}
    _, weights = two_steps(inputs, tmp_path / "a", loss=loss, batch={"sampling": sampling})
    assert (weights == plain[1]) == ((name, class_weights, sampling) == ("cross_entropy", "none", "shuffle"))


# ---- regularisation -------------------------------------------------------------------------------------------------

REGULARIZERS: dict[str, dict[str, Any]] = {
    "label_smoothing": {"label_smoothing": 0.5},
    "dropout": {"dropout": 0.5},
    "spatial_dropout": {"spatial_dropout": 0.5},
    "stochastic_depth": {"stochastic_depth": 0.5},
    "l1": {"l1": 0.1},
    "l2": {"l2": 0.1},
    "max_norm": {"max_norm": 0.5},
    "mixup": {"mixup": {"alpha": 1.0}},
    "cutmix": {"cutmix": {"alpha": 1.0}},
    "cutmix_share": {"mixup": {"alpha": 1.0}, "cutmix": {"alpha": 1.0}, "cutmix_share": 0.5},
    "input_noise": {"input_noise": 0.5},
    "gradient_noise": {"gradient_noise": {"std": 0.1}},
    "gradient_clip": {"gradient_clip": 0.1},
    "gradient_clip_value": {"gradient_clip_value": 0.001},
    "gradient_clip_adaptive": {"gradient_clip_adaptive": 0.001},
}
"""Each key of ``regularization``, on."""


@pytest.mark.parametrize("key", RegularizationConfig.model_fields)
def test_every_regularizer_does_something(inputs: Inputs, tmp_path: Path, plain: tuple[Path, bytes], key: str) -> None:
    _, weights = two_steps(inputs, tmp_path / "a", regularization=REGULARIZERS[key])
    assert weights != plain[1], f"{key}: the same weights as without it"


# ---- averaging ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", choices(AveragingConfig, "name"))
def test_every_average_and_what_is_exported(inputs: Inputs, tmp_path: Path, name: str) -> None:
    found = {}
    averaging = {"name": name, "swa": {"start": 0.0}, "polyak": {"start": 0.0}}
    for export in choices(AveragingConfig, "export"):
        _, found[export] = two_steps(
            inputs,
            tmp_path / export,
            averaging={**averaging, "export": export},
            batch={"size": 40},
            trainer={"epochs": 2, "restore_best": False},
        )
    if name == "none":
        assert len(set(found.values())) == 1
    else:
        assert found["raw"] != found["average"]
        assert found["best"] in (found["raw"], found["average"])
