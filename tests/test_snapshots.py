"""Snapshots of a run: what is kept, and what evaluate makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from anneal import params
from anneal.evaluation import evaluate
from anneal.store import open_store
from anneal.training.config import TrainerConfig
from anneal.training.fit import fit
from tests.test_every_choice import SMALL, Inputs, inputs  # noqa: F401
from tests.test_training import SECTIONS


def test_snapshots_are_the_weights_of_their_epochs_and_an_ensemble(inputs: Inputs, tmp_path: Path) -> None:  # noqa: F811
    for name, changes in (("a", {"snapshots": [1, 3], "epochs": 3}), ("b", {"epochs": 3}), ("c", {"epochs": 1})):
        sections = params.parse(
            params.merge(SMALL, {"trainer": {"restore_best": False, **changes}, "schedule": {"name": "constant"}}),
            SECTIONS,
        )
        fit(name=name, store=inputs[0], augmented=inputs[1], out=tmp_path / name, seed=0, **sections)
    written = {name: (tmp_path / f"{name}/weights.safetensors").read_bytes() for name in "abc"}
    assert written["a"] == written["b"], "what is kept changes nothing"
    assert sorted(path.name for path in (tmp_path / "a/snapshots").iterdir()) == ["1.safetensors", "3.safetensors"]
    assert (tmp_path / "a/snapshots/3.safetensors").read_bytes() == written["a"]
    assert (tmp_path / "a/snapshots/1.safetensors").read_bytes() == written["c"] and written["c"] != written["a"]
    assert set(load_file(tmp_path / "a/snapshots/1.safetensors")) == set(load_file(tmp_path / "a/weights.safetensors"))
    assert not (tmp_path / "b/snapshots").exists()
    found = evaluate(
        open_store(inputs[0]),
        {name: tmp_path / name for name in "ac"},
        splits=["val"],
        tta_views=["identity"],
        average="probability",
        combine="probability_mean",
        calibrate="none",
        num_resamples=100,
        seed=0,
    )
    figures = {row["predictor"]: row["nll"] for row in found.tables["grid"] if row["averaging"] == "probability"}
    # Of a the first epoch and the third: the weights of c and of a.
    assert figures["snapshots"] == pytest.approx(figures["ensemble"])


def test_epochs_are_those_of_the_run() -> None:
    good = params.read_yaml(Path(__file__).parents[1] / "params.yaml")["trainer"] | {"epochs": 4}
    for snapshots in ([5], [1, 1], [0]):
        with pytest.raises(ValueError, match=r"snapshots"):
            TrainerConfig.model_validate({**good, "snapshots": snapshots})
    assert TrainerConfig.model_validate({**good, "snapshots": [4, 2]}).snapshots == [4, 2]
