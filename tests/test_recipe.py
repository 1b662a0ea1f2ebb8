"""Ready-made recipes: written into params.yaml with its comments kept, and every one of them valid."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from anneal import params, recipe
from anneal.params import ParamsError, UserError

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(recipe.shipped(ROOT / "recipes"))


def ours() -> set[str]:
    """Names of the recipes that this project ships: not those that a user, or a search, has put beside them."""
    command = ["git", "-C", str(ROOT), "ls-files", "recipes"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    tracked = {Path(name).stem for name in listed} or set(NAMES)
    return {
        name
        for name, text in recipe.shipped(ROOT / "recipes").items()
        if name in tracked and not text.startswith("Found by")
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Path(shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml"))


def test_shipped_recipes_have_a_description() -> None:
    found = recipe.shipped(ROOT / "recipes")
    assert {"digits", "fashion-mnist-fast", "fashion-mnist-best", "photos"} <= set(found)
    assert all(len(found[name]) > 20 for name in ours())


def test_digits_is_the_default(file: Path) -> None:
    before = file.read_text(encoding="utf-8")
    assert recipe.apply("digits", file, ROOT / "recipes") == ""
    assert file.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("name", NAMES)
def test_apply_is_valid_keeps_comments_and_shows_the_difference(file: Path, name: str) -> None:
    before = file.read_text(encoding="utf-8")
    diff = recipe.apply(name, file, ROOT / "recipes")
    after = file.read_text(encoding="utf-8")
    recipe.validate(params.load(file, ROOT / "params.schema.json"))
    assert after.count("#") == before.count("#")
    for key, value in params.flatten(params.read_yaml(ROOT / "recipes" / f"{name}.yaml")).items():
        assert params.flatten(params.read_yaml(file))[key] == value
    assert recipe.apply(name, file, ROOT / "recipes") == "", "a second time changes nothing"
    assert (after != before) == bool(diff)
    # Back again: what one recipe sets, the default resets.
    recipe.apply("digits", file, ROOT / "recipes")
    assert file.read_text(encoding="utf-8") == before or name not in ours()


def test_views_that_a_network_cannot_take_are_faults_before_anything_runs(file: Path) -> None:
    with pytest.raises(ParamsError) as caught:
        recipe.set_value("evaluate.grid", ["dense", {"shifts": {"pixels": 8}}], file)  # of 8 x 8 pixels
    assert caught.value.faults == [
        "evaluate.grid: shifts.pixels: found 8, allowed: less than 8 pixels, the side of the image"
    ]
    recipe.set_value("evaluate.tta.views", ["identity", "dense"], file)
    with pytest.raises(ParamsError) as caught:
        recipe.set_value("ensemble.members.b", {"model": {"name": "mlp"}}, file)
    (fault,) = caught.value.faults
    assert fault.startswith("ensemble.members.b.model.name: found mlp, which has a weight for each pixel, allowed with")
    with pytest.raises(ParamsError) as caught:
        recipe.set_value("model.name", "mlp", file)
    assert len(caught.value.faults) == 1 and caught.value.faults[0].startswith("model.name: found mlp")


def test_only_members_are_replaced_as_a_whole(file: Path, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("# one\nensemble: {members: {z: {seed: 9}}}\noptimizer: {SGD: {lr: 0.3}}\n")
    diff = recipe.apply("one", file, tmp_path)
    values = params.read_yaml(file)
    assert values["ensemble"]["members"] == {"z": {"seed": 9}}
    assert values["optimizer"]["SGD"] == {
        "lr": 0.3,
        "momentum": 0.9,
        "dampening": 0.0,
        "nesterov": True,
        "weight_decay": 5.0e-4,
    }
    assert "-    a: {seed: 0}" in diff


def test_damaged_params_are_said_in_one_line(file: Path) -> None:
    file.write_text("a: [1\n", encoding="utf-8")
    with pytest.raises(UserError, match="expected ',' or"):
        recipe.apply("photos", file, ROOT / "recipes")


def test_unknown_name_and_faulty_recipe_leave_params_alone(file: Path, tmp_path: Path) -> None:
    before = file.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="did you mean 'digits'"):
        recipe.apply("digit", file, ROOT / "recipes")
    (tmp_path / "bad.yaml").write_text("# bad\noptimizer: {nam: SGD}\n")
    with pytest.raises(ParamsError, match=r"optimizer\.nam: unknown key"):
        recipe.apply("bad", file, tmp_path)
    assert file.read_text(encoding="utf-8") == before
