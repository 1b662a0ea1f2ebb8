"""Changes on the command line, and what seeds say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anneal import params, seeds
from anneal.ablation.effects import Effect
from anneal.params import UserError
from anneal.seeds import Seeds, conclusion, images_needed, lines, parse_change, with_changes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """params.yaml as shipped."""
    return params.load(ROOT / "params.yaml", ROOT / "params.schema.json")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("trainer.epochs=20", "trainer.epochs", 20),
        ("optimizer.SGD.lr=5e-2", "optimizer.SGD.lr", 0.05),
        ("optimizer.name = AdamW", "optimizer.name", "AdamW"),
        ("evaluate.tta.views=[identity, hflip]", "evaluate.tta.views", ["identity", "hflip"]),
        ("regularization.gradient_clip=null", "regularization.gradient_clip", None),
        ("schedule.warmup.length=5 epochs", "schedule.warmup.length", "5 epochs"),
        ("augment.policy=[{HorizontalFlip: {p: 0.5}}]", "augment.policy", [{"HorizontalFlip": {"p": 0.5}}]),
        ("data.limit=100", "data.limit", 100),
    ],
)
def test_a_change_is_read_as_params_yaml_would_have_it(text: str, key: str, value: Any, values: dict[str, Any]) -> None:
    assert parse_change(text, values) == (key, value)
    assert parse_change(text, values)[1].__class__ is value.__class__


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer.epoch=20", "trainer.epoch: params.yaml has no such key; did you mean 'trainer.epochs'"),
        ("trainer.epochs", "found no KEY=VALUE"),
        ("=3", "found no KEY=VALUE"),
        ("seed=3", "seed: may not be changed here: the seeds are what this command varies"),
        ("split.val=0.2", "split.val: may not be changed here: the two would be judged on other images"),
        ("ensemble.members={}", "ensemble.members: may not be changed here"),
        ("evaluate.splits=[test]", "evaluate.splits: may not be changed here"),
        ("hardware.devices=2", "hardware.devices: may not be changed here: it changes no result"),
        ("trainer.epochs=[1", "trainer.epochs: found '[1'"),
    ],
)
def test_what_is_no_change_is_refused(text: str, words: str, values: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        parse_change(text, values)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_changes_merge(values: dict[str, Any]) -> None:
    found = with_changes(values, {"optimizer.name": "AdamW", "optimizer.AdamW.lr": 0.001})
    assert found["optimizer"]["AdamW"] == {**values["optimizer"]["AdamW"], "lr": 0.001}
    assert found["optimizer"]["SGD"] == values["optimizer"]["SGD"]


def test_what_the_recipe_says_already_is_no_change(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="this is what the recipe says already"):
        seeds.run_seeds(values, 2, [f"trainer.epochs={values['trainer']['epochs']}"])


def found(difference: float, spread: float, half_images: float, verdict: str, count: int = 5) -> Effect:
    half = 2.776 * spread / count**0.5
    ends = (difference - half, difference + half, 1000, difference - half_images, difference + half_images)
    return Effect(difference, count, spread, *ends, 0.01, verdict)


def test_a_real_change() -> None:
    text = conclusion(found(0.006, 0.001, 0.004, "better"))
    assert text.startswith(
        "the change is real, and better: +0.60 points (+0.48 to +0.72 over seeds, +0.20 to +1.00 over"
    )


def test_a_difference_that_more_seeds_would_show() -> None:
    text = conclusion(found(0.006, 0.01, 0.004, "no difference shown"))
    assert text.startswith("no difference shown with 5 seeds: +0.60 points")
    assert text.endswith("about 24 seeds would be needed to see a difference of this size")


def test_seeds_that_agree_by_chance_need_more_of_them() -> None:
    """With a spread of 0 between two seeds the interval is that of a spread of one image."""
    from anneal.ablation.effects import effect

    labels = np.zeros(400, np.int64)

    def right(hits: int) -> np.ndarray:
        return np.log(np.where(np.arange(400)[:, None] < hits, [0.9, 0.1], [0.2, 0.8]))

    of = effect(np.stack([right(300)] * 2), np.stack([right(308)] * 2), labels)
    assert of.spread == 0 and of.verdict == "no difference shown"
    assert "seeds would be needed" in conclusion(of)


def test_a_difference_that_more_images_would_show() -> None:
    shown = found(0.004, 0.001, 0.008, "no difference shown")
    needed = images_needed(shown)
    assert needed == pytest.approx(1000 * 4 * (2.8 / 1.96) ** 2, abs=1)
    assert conclusion(shown).endswith(f"too small: about {needed:,} images would be needed")
    assert images_needed(found(0.004, 0.001, 0.001, "better")) is None


def test_a_difference_that_is_lost_in_the_spread() -> None:
    text = conclusion(found(0.0001, 0.02, 0.008, "no difference shown"))
    assert text.endswith("more than 1,000 seeds would be needed to see a difference of this size")


def test_no_difference_at_all() -> None:
    assert conclusion(found(0.0, 0.0, 0.0, "no difference shown")).endswith("there is none to see")


def test_one_seed() -> None:
    one = Effect(0.02, 1, None, None, None, 500, 0.01, 0.03, 0.001, "better")
    assert conclusion(one).startswith("of these two networks the changed one is better: +2.00 points")
    assert conclusion(one).endswith("one seed says nothing of other trainings")
    unseen = Effect(0.001, 1, None, None, None, 500, -0.01, 0.01, 0.9, "no difference shown")
    assert "no difference shown with 1 seed:" in conclusion(unseen)


def test_a_change_that_nothing_depends_on_is_refused(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for change in ("evaluate.calibration=none", "evaluate.tta.select=greedy"):
        with pytest.raises(UserError, match=f"{change}: accuracy on val does not depend on it"):
            seeds.run_seeds(values, 1, [change], dry_run=True)


def test_the_recipe_alone() -> None:
    (line,) = lines(Seeds([0, 1, 2], [0.90, 0.91, 0.92], [], {}, None))
    assert (
        line
        == "recipe: accuracy 0.9100, standard deviation 0.0100 over 3 seeds (95 % interval of the mean 0.8852 to 0.9348)"
    )
    assert lines(Seeds([0], [0.9], [], {}, None)) == ["recipe: accuracy 0.9000 (one seed: its spread is not known)"]
