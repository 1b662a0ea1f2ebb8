"""Means of members' weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from anneal.models.build import load_classifier
from anneal.models.recalibration import recalibrate, recalibration_batches, tracking_norms
from anneal.soups import IMAGES, MICROBATCH, apart, greedy, load_weights, mixed, soup
from anneal.store import Store
from tests.test_evaluation import run
from tests.tiny_project import write_member, write_store


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    root = tmp_path_factory.mktemp("soups")
    store = write_store(root)
    for seed, name in enumerate("ab"):
        write_member(root, store, name, seed)
    return root, store


def folder(project: tuple[Path, Store], name: str) -> Path:
    return project[0] / "models" / name


def test_the_weights_are_means_and_the_statistics_those_of_the_means(project: tuple[Path, Store]) -> None:
    a, b = (load_weights(folder(project, name) / "weights.safetensors") for name in "ab")
    mean = mixed([a, b])
    model = json.loads((folder(project, "a") / "model.json").read_text())
    found = soup([a, b], model, project[1])
    expected, _ = load_classifier(folder(project, "a"))
    expected.load_state_dict(mean)
    norms = tracking_norms(expected)
    assert norms
    before = {name: norm.running_mean.clone() for name, norm in norms.items()}
    recalibrate(expected, recalibration_batches(project[1], 0, IMAGES, MICROBATCH))
    assert all(not torch.equal(before[name], norm.running_mean) for name, norm in norms.items())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(parameter.detach(), (a[name] + b[name]) / 2)
    images = torch.from_numpy(project[1].split("val").take(np.arange(8)))
    with torch.inference_mode():
        torch.testing.assert_close(found(images), expected.eval()(images), atol=1e-4, rtol=1e-4)
    assert not found.training


def test_the_mean_of_one_and_of_equals_is_itself(project: tuple[Path, Store]) -> None:
    a = load_weights(folder(project, "a") / "weights.safetensors")
    for states in ([a], [a, a, a]):
        for name, tensor in mixed(states).items():
            assert torch.equal(tensor, a[name]) and tensor.dtype == a[name].dtype


def test_the_greedy_soup_keeps_what_does_not_lower_the_accuracy() -> None:
    asked = []

    def taste(names: list[str]) -> float:
        asked.append("".join(names))
        return {"bc": 0.9, "bca": 0.8, "bcd": 0.95}["".join(names)]

    assert greedy("abcd", {"a": 0.85, "b": 0.9, "c": 0.88, "d": 0.1}, taste) == ["b", "c", "d"]
    assert asked == ["bc", "bca", "bcd"]


def test_a_greedy_soup_predicts_with_the_members_that_it_kept(project: tuple[Path, Store]) -> None:
    from anneal import candidates

    root, store = project
    folders = {each: root / "models" / ("a" if each == "twin" else each) for each in ("a", "twin", "b")}
    models = {each: json.loads((path / "model.json").read_text()) for each, path in folders.items()}
    seen: dict[str, dict[str, torch.Tensor]] = {}
    twin = load_weights(folders["twin"] / "weights.safetensors")
    name = "network.head.weight"

    def predict(networks: list[torch.nn.Module], names: list[str]) -> str:
        seen[names[0]] = networks[0].state_dict()
        return names[0]

    said, found = candidates.soups(
        ["uniform", "greedy"],
        folders,
        models,
        store,
        accuracy={"a": 0.9, "twin": 0.9, "b": 0.1},
        # The soup of twins is the twin: b makes another.
        taste=lambda network: float(torch.equal(network.state_dict()[name], twin[name])),
        predict=predict,  # type: ignore[arg-type]
        device="cpu",
    )
    assert said["greedy"] == {"members": ["a", "twin"]} and found.keys() == {"uniform", "greedy"}
    assert torch.equal(seen["soup_greedy"][name], twin[name])
    assert not torch.equal(seen["soup_uniform"][name], twin[name])


def test_members_of_other_architectures_are_left_out_with_the_reason(
    project: tuple[Path, Store], tmp_path: Path
) -> None:
    assert apart({"a": {}}) == "there is one member"
    shutil.copytree(project[0] / "models", tmp_path / "models")
    shutil.copytree(project[0] / "data", tmp_path / "data")
    torch.manual_seed(0)
    write_member(tmp_path, project[1], "c", 2)
    path = tmp_path / "models/c/model.json"
    model = json.loads(path.read_text())
    model["architecture"]["activation"] = "SiLU"
    path.write_text(json.dumps(model))
    found = run(tmp_path, tta_views=["identity"], soups=["uniform", "greedy"])
    reason = {"omitted": "member c has another architecture than a"}
    assert found.soups == {"uniform": reason, "greedy": reason}
    assert not [row for row in found.tables["grid"] if row["predictor"].startswith("soup")]
    assert run(tmp_path, "a", tta_views=["identity"], soups=["greedy"]).soups == {
        "greedy": {"omitted": "there is one member"}
    }


def test_a_soup_of_near_twins_is_a_predictor_like_them(project: tuple[Path, Store], tmp_path: Path) -> None:
    """Members a small step apart, as fine-tuned from one start: the soup predicts what they do."""
    shutil.copytree(project[0] / "models/a", tmp_path / "models/a")
    shutil.copytree(project[0] / "data", tmp_path / "data")
    weights = load_file(tmp_path / "models/a/weights.safetensors")
    classifier, _ = load_classifier(tmp_path / "models/a")
    recalibrate(classifier, recalibration_batches(project[1], 0, IMAGES, MICROBATCH))
    weights = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(weights, tmp_path / "models/a/weights.safetensors")
    shutil.copytree(tmp_path / "models/a", tmp_path / "models/b")
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: tensor + 1e-4 * torch.randn(tensor.shape, generator=generator) if "weight" in name else tensor
        for name, tensor in weights.items()
    }
    save_file(moved, tmp_path / "models/b/weights.safetensors")
    found = run(tmp_path, "ab", tta_views=["identity"], soups=["uniform", "greedy"])
    rows = {row["predictor"]: row for row in found.tables["grid"] if row["split"] == "test"}
    assert rows["soup_uniform"]["nll"] == pytest.approx(rows["single"]["nll"], abs=1e-2)
    assert found.soups["greedy"]["members"] == ["a", "b"]  # the uniform soup again, and so without a row of its own
    assert "soup_greedy" not in rows
