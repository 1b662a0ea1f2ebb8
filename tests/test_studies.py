"""Studies: every grid is valid and independent of params.yaml, and a tiny one runs end to end, is resumed, repeats."""

from __future__ import annotations

import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from anneal import cli, params
from anneal.conflicts import check_recipe
from anneal.params import ParamsError, UserError
from anneal.preprocess import Normalize, build_store
from anneal.recipe import validate
from anneal.reporting.heat_maps import HeatMap
from anneal.reporting.lines import Line, draw_panels
from anneal.sources import open_source
from anneal.store import open_store
from anneal.studies import catalog
from anneal.studies.augmentation import AUGMENTATION, HARM, NONE, TRANSFORMS, own_transforms, policy_of, verdict
from anneal.studies.base import base_recipe
from anneal.studies.batchnorm import best_of, beyond, decades, mean_decades, most_decades
from anneal.studies.catalog import DIGITS_TRAIN, STUDIES
from anneal.studies.data import normalized
from anneal.studies.initialization import how_far
from anneal.studies.label_change import Change, Reading, answers, as_readings, changes, reading
from anneal.studies.preprocessing import SCHEMES, steps_to_learn
from anneal.studies.rates import exponents
from anneal.studies.regularization import gap
from anneal.studies.run import one_run, policy_for, possible, run_study, store_for
from anneal.studies.study import Job, Point, Result, Study, accuracy_map, against, best_rate, differs, edge

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = (*params.MEMBER_SECTIONS[1:], "preprocess", "hardware")

every_study = pytest.mark.parametrize("study", STUDIES.values(), ids=list(STUDIES))


def values() -> dict[str, Any]:
    return params.read_yaml(ROOT / "params.yaml")


def points_of(study: Study, recipe: Mapping[str, Any], num_train: int = DIGITS_TRAIN) -> list[Point]:
    return study.grid(recipe, num_train)


# ---- every study, without training ----------------------------------------------------------------------------------


@every_study
@pytest.mark.parametrize("current", [False, True])
def test_every_point_is_a_valid_recipe(study: Study, current: bool) -> None:
    base = base_recipe(values(), study.base, current=current)
    points = points_of(study, base)
    assert len({point.label for point in points}) == len(points) > 3
    for point in points:
        checked = validate(params.merge(base, point.overrides))
        check_recipe(num_train=DIGITS_TRAIN, **{name: getattr(checked, name) for name in TOGETHER})
        assert checked.evaluate.splits == ["val"]
        assert checked.hardware.devices == 1


def changed_leaves(value: Any) -> Any:
    """Change every leaf, to something that no longer validates."""
    if isinstance(value, Mapping) and value:
        return {key: changed_leaves(item) for key, item in value.items()}
    return ["changed", value]


@every_study
def test_a_study_on_digits_does_not_depend_on_the_recipe(study: Study) -> None:
    """Whatever params.yaml says: what may differ are blocks that no point chooses, and what has no part in a run."""
    base = base_recipe(values(), study.base, current=False)
    other = base_recipe(changed_leaves(values()), study.base, current=False)
    points = points_of(study, base)
    assert points == points_of(study, other)
    apart = ("evaluate.", "registry.", "tracking.", "search.", "ensemble.combine")
    theirs = params.flatten(other)
    for point in points:
        recipe = params.merge(base, point.overrides)
        chosen = {
            name: recipe[name]["name"] for name in ("model", "init", "optimizer", "schedule", "loss", "averaging")
        }
        chosen["model.norm"] = recipe["model"]["norm"]["name"]
        given = params.flatten(point.overrides)
        mine = params.flatten(recipe)
        for key in sorted(mine.keys() | theirs.keys()):
            if key in given or mine.get(key) == theirs.get(key) or key.startswith(apart):
                continue
            *parents, block = key.split(".")[: 3 if key.startswith("model.norm.") else 2]
            section = ".".join(parents)
            assert section in chosen and block not in (chosen[section], "name"), (
                f"{key} has a part in study {study.name}, and is params.yaml's: give it in src/anneal/studies/base.py"
            )


def made_up(study: Study, seeds: int) -> list[Result]:
    """Results as a study's functions get them: one point diverged at once, one later, all others learned."""
    base = base_recipe(values(), study.base, current=False)
    results = []
    for i, point in enumerate(points_of(study, base)):
        for seed in range(seeds):
            end = 0.1 + 0.01 * ((7 * i + seed) % 5)
            epochs = [
                {
                    "epoch": n,
                    "step": 10 * n,
                    "train/loss": end + 1 / n,
                    "val/loss": end + 1.1 / n,
                    "train/accuracy": 0.95,
                    "val/accuracy": 0.9,
                    "noise_scale": 5.0 + n,
                    "noise_scale/trace": 6.0,
                    "noise_scale/gradient_sq": 1.0 - (n % 2),
                }
                for n in (1, 2)
            ]
            steps = [(n, 0.1, 2.3 - 0.1 * n - 0.001 * i) for n in range(1, 20)]
            if i == 1:
                results.append(Result(point, seed, [], [], 10, "training diverged: the loss is nan"))
            elif i == 2:
                results.append(Result(point, seed, epochs[:1], steps, 10, "training diverged: the loss is inf"))
            else:
                results.append(Result(point, seed, epochs, steps, 10, "", 1000.0 + i))
    return results


@every_study
def test_every_study_draws_and_concludes_whatever_diverged(study: Study, tmp_path: Path) -> None:
    results = made_up(study, 2)
    panels = study.draw(results)
    draw_panels(panels, tmp_path / "figure.png", study.question)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert any(isinstance(panel, HeatMap) or any(line.label for line in panel.lines) for panel in panels)
    assert len(study.conclude(results)) > 3
    alone = made_up(study, 1)
    assert study.draw(alone)
    for line in study.conclude(alone):
        assert "higher by" not in line and "lower by" not in line, "one run shows no difference"


def test_digits_train_is_what_the_split_leaves() -> None:
    from anneal.preprocess import planned_classes
    from anneal.sources import open_source

    base = base_recipe(values(), {}, current=False)
    source = open_source(str(ROOT / base["data"]["path"]), "auto")
    planned = planned_classes(source, val=base["split"]["val"], test=base["split"]["test"], limit=None)
    assert sum(planned["train"].values()) == DIGITS_TRAIN


def test_every_study_is_estimated_well_below_five_minutes() -> None:
    for study in STUDIES.values():
        runs, seconds = catalog.estimate(study, values(), seeds=3)
        assert runs >= 12
        assert seconds <= 150, study.name


def test_points_that_come_to_the_same_recipe_share_a_run() -> None:
    base = base_recipe(values(), STUDIES["momentum"].base, current=False)
    points = points_of(STUDIES["momentum"], base)
    assert len(points) == 10
    assert len(catalog.distinct(base, points)) == 8  # momentum 0.9, with Nesterov and without, at both kinds of rate


# ---- what is said of results ----------------------------------------------------------------------------------------


def result(lr: float, seed: int, losses: list[float], stopped: str = "", peak: float = 0.0) -> Result:
    epochs = [{"epoch": i + 1, "step": i + 1, "train/loss": x, "val/loss": x} for i, x in enumerate(losses)]
    steps = [(1, lr, 2.3), (2, lr, peak), *((i + 3, lr, x) for i, x in enumerate(losses))]
    return Result(Point(str(lr), {}, {"lr": lr}), seed, epochs, steps, 10, stopped)


def test_diverged() -> None:
    assert result(1, 0, [], "training diverged: the loss is nan").diverged
    assert result(1, 0, [2.4, 2.4], peak=3.5).diverged
    assert not result(1, 0, [2.29, 2.29], peak=2.31).diverged, "a rate that is too low"
    assert not result(1, 0, [1.0, 0.5], peak=3.5).diverged, "it came back"
    assert result(1, 0, [0.5], "training diverged").final("val/loss") == math.inf


def test_a_line_over_rates_stands_still_where_runs_diverged() -> None:
    results = [result(0.1, seed, [0.2 + 0.1 * seed]) for seed in range(3)]
    results += [result(10.0, seed, [], "training diverged") for seed in range(3)]
    line = against(results, "lr", lambda r: r.final("val/loss"), ceiling=3.0)
    assert line == Line("", [0.1, 10.0], [pytest.approx(0.3), 3.0], [0.2, 3.0], [0.4, 3.0], style=".-")


def test_differs_needs_two_pairs_that_ended() -> None:
    assert "no difference shown" in differs({0: 1.0}, {0: 0.1})
    assert "no difference shown" in differs({0: math.inf, 1: 1.0}, {0: 0.1, 1: 0.1})
    assert differs({0: 0.1, 1: 0.1}, {0: 1.0, 1: 1.0}) == "lower by 0.900 (95 % interval 0.900 to 0.900)"


def test_the_best_rates_follow_a_power_of_the_batch() -> None:
    best = {(size, 0): 0.01 * size**0.5 for size in (8, 32, 128)}
    assert exponents(best) == {0: pytest.approx(0.5)}


def made(seed: int, loss: float, accuracy: float = 0.5, stopped: str = "", **at: Any) -> Result:
    epoch = {"epoch": 1, "step": 9, "train/loss": loss, "val/loss": loss, "train/accuracy": accuracy}
    return Result(Point(str(at), {}, at), seed, [epoch], [], 10, stopped)


def test_the_best_rate_and_whether_it_is_at_the_edge() -> None:
    results = [made(seed, loss, lr=lr) for seed in range(2) for lr, loss in ((0.1, 0.5), (1.0, 0.2), (10.0, 0.7))]
    assert best_rate(results) == 1.0
    assert edge(results) == ""
    assert edge(results[1:3]) == " (the lowest tried)"
    assert edge(results[:2]) == " (the highest tried)"


def test_how_far_a_network_learned() -> None:
    """At most 1.15, half of log 10, is learned, at most 2.07 in part."""
    runs = [made(0, 1.15), made(1, 1.16), made(2, 2.07), made(3, 2.08), made(4, 0.1, stopped="training diverged")]
    assert how_far(runs) == "learned 1 of 5, in part 2 of 5, not at all 2 of 5"


def test_a_map_of_accuracies_marks_what_every_run_learned() -> None:
    results = [made(seed, 0.1, 0.9, depth=2, scheme="a") for seed in range(2)]
    results += [made(0, 0.1, 0.8, depth=6, scheme="a"), made(1, 2.3, 0.2, depth=6, scheme="a")]
    results += [made(seed, 0.1, 0.9, "training diverged", depth=2, scheme="b") for seed in range(2)]
    found = accuracy_map(results, "scheme", "depth", "")
    assert (found.rows, found.columns) == (["a", "b"], ["2", "6"])
    assert found.values[0] == pytest.approx([0.9, 0.5])
    assert found.values[1][0] == 0.0 and math.isnan(found.values[1][1])
    assert found.marked is not None and found.marked[0] == [True, False] and not found.marked[1][0]


def test_decades_of_rates_that_learn() -> None:
    """Of three rates half a decade apart std 0.1 learns at two in seed 0, and at one in seed 1; std 1 at none."""
    losses = {(0.1, 0): (0.1, 0.2, 2.3), (0.1, 1): (2.3, 0.2, 2.3), (1.0, 0): (2.3,) * 3, (1.0, 1): (2.3,) * 3}
    results = [
        made(seed, loss, std=std, lr=lr)
        for (std, seed), row in losses.items()
        for lr, loss in zip((0.1, 0.3, 1.0), row, strict=True)
    ]
    assert decades(results[:6]) == {0: 1.0, 1: 0.5}
    assert beyond(results[:6]) == ", or more (learned at the lowest tried)"
    assert beyond(results[3:]) == ""
    assert mean_decades(results, "std") == {0: 0.5, 1: 0.25}
    assert most_decades(results, "std") == {0: 1.0, 1: 0.5}
    assert most_decades(results, "lr") == {0: 0.5, 1: 0.5}
    assert [run.at["lr"] for run in best_of(results[:6])] == [0.3, 0.3]


def test_steps_to_learn() -> None:
    steps = [(1, 0.1, 2.3), (4, 0.1, 1.1), (7, 0.1, 1.4)]
    assert steps_to_learn(Result(Point("", {}), 0, [], steps, 10)) == 4
    assert math.isnan(steps_to_learn(Result(Point("", {}), 0, [], steps[:1], 10)))


def test_preprocessing_is_judged_where_it_can_be() -> None:
    """Components are no images, and whitening has a limit."""
    base = base_recipe(values(), STUDIES["preprocessing"].base, current=False)
    points = points_of(STUDIES["preprocessing"], base)
    schemes = {(point.at["network"], point.at["scheme"]) for point in points}
    assert ("mlp", "pca") in schemes and ("convnet", "zca") in schemes and ("convnet", "pca") not in schemes
    large = params.merge(base, {"preprocess": {"size": 64}, "model": {"name": "mlp"}, "init": {"zero_last": True}})
    points = points_of(STUDIES["preprocessing"], large)
    assert {point.at["scheme"] for point in points}.isdisjoint({"pca", "zca"})
    assert {point.at["network"] for point in points} == {"mlp"}
    assert all(point.overrides["init"] == {"zero_last": False} for point in points)


# ---- transforms that change the label -------------------------------------------------------------------------------


def seen(shares: Mapping[tuple[int, int], float], num_classes: int = 5, number: int = 50) -> Reading:
    return Reading(0.5, [0.5] * num_classes, [number] * num_classes, {k: number * v for k, v in shares.items()})


def test_a_change_of_the_label_is_told_from_difficulty() -> None:
    """Of 50 images 0.33 is the least share whose 95 % interval lies above 0.2."""
    swap = seen({(0, 1): 0.9, (1, 0): 0.5, (2, 3): 0.3})
    found = changes([swap, swap, swap])
    assert [(change.a, change.b) for change in found] == [(0, 1), (1, 0)]
    assert found[0].shares == pytest.approx([0.9] * 3)
    assert changes([swap]) == [], "one network says nothing of the next"
    assert changes([]) == []
    assert changes([swap, swap, seen({(0, 1): 0.3})]) == [], "an accident of two networks"
    few = seen({(0, 1): 0.5}, number=4)
    assert changes([few, few]) == []
    sink = seen({(a, 4): 0.9 for a in range(4)})
    assert changes([sink, sink]) == [], "what is like nothing seen before lands in one class"
    assert [(c.a, c.b) for c in changes([seen({(0, 1): 0.9}, 2)] * 2)] == [(0, 1)], "two classes have no others"


def test_what_a_reading_counts() -> None:
    """Only images that are read rightly as they are, as a mean over draws."""
    labels, before = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 1])
    found = reading(before, np.array([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]), labels, 3)
    assert found.right == [2, 2, 0]
    assert found.read == {(0, 1): 1.5, (1, 0): 0.5}
    assert (found.share(0, 1), found.share(1, 0), found.share(2, 0)) == (0.75, 0.25, 0.0)
    assert found.accuracy == pytest.approx(0.4)
    assert found.by_class[:2] == pytest.approx([1 / 6, 0.75]) and math.isnan(found.by_class[2])


def test_what_is_said_of_a_change() -> None:
    one, back = Change(6, 9, [0.9]), Change(9, 6, [0.5])
    assert verdict([one, back], harmed=False).startswith("CHANGES THE LABEL")
    assert verdict([one], harmed=True).startswith("CHANGES THE LABEL")
    assert verdict([one, Change(9, 5, [0.5])], harmed=False).startswith("not shown to change the label")


@pytest.mark.parametrize(
    ("transform", "changed"),
    [("VerticalFlip", {(0, 1), (1, 0)}), ("HorizontalFlip", set()), ("Cutout", set())],
)
def test_a_hand_made_network_tells_which_flip_changes_the_label(transform: str, changed: set[tuple[int, int]]) -> None:
    """Classes: the upper half bright, the lower half, the middle columns, a dark frame around a bright square."""
    import torch

    from anneal.augment import apply_policy, compile_policy, seed_policy
    from anneal.studies.augmentation import always

    shapes = np.zeros((4, 8, 8))
    shapes[0, :4], shapes[1, 4:], shapes[2, :, 3:5], shapes[3, 2:6, 2:6] = 1, 1, 1, 1
    labels = np.repeat(np.arange(4), 40)
    noise = np.random.default_rng(0).integers(0, 40, (len(labels), 8, 8, 1))
    images = (200 * shapes[labels][..., None] + noise).astype(np.uint8)
    templates = torch.from_numpy((shapes - shapes.mean((1, 2), keepdims=True)).reshape(4, -1)).float()

    def network(batch: torch.Tensor) -> torch.Tensor:
        return batch.float().flatten(1) @ (templates / templates.norm(dim=1, keepdim=True)).T

    compose = compile_policy([always(TRANSFORMS[transform])], height=8, width=8, channels=1)
    seed_policy(compose, 0, "test")
    before, after = answers(network, images), answers(network, apply_policy(compose, images))  # type: ignore[arg-type]
    assert (before == labels).all()
    found = changes([reading(before, after[None], labels, 4)] * 2)
    assert {(change.a, change.b) for change in found} == changed


def under(seed: int, transform: str, loss: float, **answers: Any) -> Result:
    epoch = {"epoch": 1, "step": 9, "train/loss": loss, "val/loss": loss, "val/accuracy": 1 - loss}
    return Result(Point(transform, {}, {"transform": transform}), seed, [epoch], [], 3, answers=answers)


def test_conclusions_name_what_changes_the_label() -> None:
    """A flip is read as another class by all networks; whether training under it is dear decides."""
    counts = {"accuracy": 0.5, "by_class": [0.5, 0.5, None], "right": [50, 50, 0], "read": [[0, 1, 45.0]]}
    asked = {"classes": ["six", "nine", "none"], "under": {"flip": counts, "shift": counts | {"read": []}}}
    assert as_readings(asked)["flip"].share(0, 1) == 0.9

    def lines(loss: float) -> list[str]:
        results = [under(seed, NONE, 0.1 + 0.001 * seed, **asked) for seed in range(3)]
        results += [under(seed, name, loss + 0.002 * seed) for name in ("flip", "shift") for seed in range(3)]
        return AUGMENTATION.conclude(results)

    dear = lines(0.1 * HARM + 0.05)
    assert dear[-1].startswith("flip: CHANGES THE LABEL") and dear[-1].endswith(
        "read six as nine in 0.90 (0.90 to 0.90, n = 3)"
    )
    assert sum("LABEL" in line for line in dear) == 1, "a shift that hurts is no change of the label"
    assert lines(0.1 * HARM - 0.02)[-1].startswith("flip: not shown to change the label")
    assert "networks that never saw it read 0.500" in dear[1]


def test_a_policy_of_ones_own_is_judged_transform_by_transform() -> None:
    assert list(own_transforms("strong")) == [
        f"your {name}"
        for name in ("HorizontalFlip", "RandomPadCrop", "RandomBrightnessContrast", "HueSaturationValue", "Cutout")
    ]
    policy = ["HorizontalFlip", {"RandomPadCrop": {"padding": 0.125}}]
    base = base_recipe(params.merge(values(), {"augment": {"policy": policy}}), AUGMENTATION.base, current=True)
    points = points_of(AUGMENTATION, base)
    assert [point.label for point in points][:4] == ["none", "your policy", "your HorizontalFlip", "your RandomPadCrop"]
    assert points[1].overrides == policy_of(policy)
    assert "RandomPadCrop" not in {point.label for point in points}, "the same transform twice"
    assert points[0].overrides["augment"]["policy"] == "none"
    assert points[0].asks["your HorizontalFlip"] == [{"HorizontalFlip": {"p": 1.0}}]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of 60 noisy grey images of 4 x 4 in two classes, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 128, (60, 4, 4), np.uint8)):
        pixels[:, 2 * (i % 2) : 2 * (i % 2) + 2] += 100
        (tmp_path / f"raw/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"raw/{i % 2}/{i}.png")
    Path("store").mkdir()
    arguments: dict[str, Any] = {"seed": 0, "size": 4, "fit": "stretch", "interpolation": "area", "epsilon": 1e-3}
    build_store(
        open_source("raw", "auto"), Path("store"), normalize="none", val=0.5, test=0.2, num_workers=0, **arguments
    )
    return Path("store")


def test_an_optional_point_that_the_data_refuses_is_left_out(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_recipe(values(), {"batch": {"size": 8, "microbatch": 8}}, current=False)
    hue = policy_of([{"HueSaturationValue": {"p": 1.0}}])
    points = [Point("hue", hue, optional=True), Point("flip", policy_of(["HorizontalFlip"]), optional=True)]
    points += [Point("huge", {"batch": {"size": 4096, "microbatch": 4096}}, optional=True), Point("plain", {})]
    assert [point.label for point in possible(base, points, small, 18)] == ["flip", "plain"]
    told = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in told] == ["hue: left out", "huge: left out"]


def test_a_run_trains_under_its_points_policy_and_answers_afterwards(small: Path, tmp_path: Path) -> None:
    base = base_recipe(values(), {"batch": {"size": 8, "microbatch": 8}, "trainer": {"epochs": 2}}, current=False)
    asks = {"flip": [{"HorizontalFlip": {"p": 1.0}}], "hue": [{"HueSaturationValue": {"p": 1.0}}]}
    point = Point("flip", policy_of([{"HorizontalFlip": {"p": 1.0}}]), asks=asks)
    job = Job(point, params.merge(base, point.overrides), "")
    own = policy_for(job, small, tmp_path)
    assert '"HorizontalFlip"' in (own / "policy.json").read_text(encoding="utf-8")
    assert policy_for(job, small, tmp_path) == own != tmp_path
    assert policy_for(Job(Point("as it is", {}), base, ""), small, tmp_path) == tmp_path
    kept = one_run(job, small, own, AUGMENTATION.ask)
    assert list(kept["answers"]["under"]) == ["flip"], "hue cannot work on grey images"
    assert kept["answers"]["classes"] == ["0", "1"]
    assert 0 <= as_readings(kept["answers"])["flip"].accuracy <= 1
    assert one_run(job, small, own)["answers"] == {}


def test_the_gap_compares_like_with_like_where_it_can() -> None:
    epoch = {"epoch": 1, "step": 1, "train/loss": 0.9, "val/loss": 0.5, "train/accuracy": 0.6, "val/accuracy": 0.8}
    stored = epoch | {"train_eval/loss": 0.1, "train_eval/accuracy": 1.0}
    both = [Result(Point("", {}), 0, [one], [], 10) for one in (epoch, stored)]
    assert [gap(result) for result in both] == pytest.approx([-0.4, 0.4])
    assert [gap(result, "accuracy") for result in both] == pytest.approx([-0.2, 0.2])


def test_each_technique_is_alone() -> None:
    """Whatever the recipe has on: all off, then one."""
    found = params.merge(
        values(), {"regularization": {"label_smoothing": 0.3, "mixup": {"alpha": 1.0}, "dropout": 0.2}}
    )
    study = STUDIES["regularization"]
    base = base_recipe(found, study.base, current=True)
    recipes = {point.label: params.merge(base, point.overrides) for point in points_of(study, base)}
    assert recipes["your recipe"]["regularization"] == found["regularization"]
    assert recipes["none"]["augment"]["policy"] == "none"
    assert recipes["none"]["optimizer"]["SGD"]["weight_decay"] == 0.0
    plain = params.flatten(recipes["none"])
    for label, recipe in recipes.items():
        if label in ("none", "your recipe"):
            continue
        sections = {key.split(".")[0] for key, value in params.flatten(recipe).items() if value != plain.get(key)}
        assert len(sections) == 1, label


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the shipped digits, as the working directory."""
    for name in ("params.yaml", "params.schema.json", "recipes", "data/digits.zip"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def anneal(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "anneal.cli", *arguments],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_speed(path: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows(path)]


def test_list(project: Path) -> None:
    out = anneal(project, "study").stdout
    for name, study in STUDIES.items():
        assert f"  {name} " in out
        assert study.question in out
    assert out.count("runs, about") == len(STUDIES)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["lr-by-optimiser"], "did you mean 'lr-by-optimizer'?"),
        (["lr", "--seeds", "0"], "--seeds: found 0, allowed: a whole number >= 1"),
        (["lr", "--current"], "run `dvc repro augment` first"),
    ],
)
def test_refused_in_one_line(project: Path, arguments: list[str], fault: str) -> None:
    done = anneal(project, "study", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert fault in done.stderr
    assert not (project / "studies").exists()


def test_a_store_under_another_normalisation_is_what_preprocess_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments: dict[str, Any] = {"seed": 0, "size": 4, "fit": "stretch", "interpolation": "area", "epsilon": 1e-3}
    arguments |= {"val": 0.2, "test": 0.2, "num_workers": 0}
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (30, 4, 4), np.uint8)):
        (tmp_path / f"raw/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"raw/{i % 2}/{i}.png")
    kinds = get_args(Normalize)
    assert kinds == SCHEMES
    for kind in kinds:
        Path(kind).mkdir()
        build_store(open_source("raw", "auto"), Path(kind), normalize=kind, **arguments)
    store = Path("standardize")
    made_of = {kind: normalized(store, normalize=kind, epsilon=1e-3) for kind in kinds}
    for kind, folder in made_of.items():
        assert contents(folder) == contents(Path(kind)), kind
        assert normalized(store, normalize=kind, epsilon=1e-3) == folder
    recipe = {"preprocess": {"normalize": "zca", "epsilon": 1e-3}}
    assert store_for(Job(Point("x", {"preprocess": {"normalize": "zca"}}), recipe, ""), store) == made_of["zca"]
    assert store_for(Job(Point("y", {}), recipe, ""), store) == store
    assert normalized(store, normalize="zca", epsilon=1e-2) != made_of["zca"]
    before = open_store(made_of["zca"]).split("train").take([0, 1])
    shutil.rmtree(store)
    assert np.array_equal(open_store(made_of["zca"]).split("train").take([0, 1]), before)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_digits(project: Path) -> None:
    (project / "data/digits.zip").unlink()
    with pytest.raises(UserError, match=r"git checkout data/digits\.zip"):
        run_study(STUDIES["lr"], values())


def test_current_needs_a_number_as_rate() -> None:
    found = params.merge(values(), {"optimizer": {"SGD": {"lr": "auto"}}})
    with pytest.raises(UserError, match=r"optimizer\.SGD\.lr: found auto, allowed for a study: a number"):
        base_recipe(found, {}, current=True)


def test_current_keeps_the_recipe_but_for_its_length() -> None:
    found = params.merge(values(), {"regularization": {"label_smoothing": 0.3}, "hardware": {"devices": 4}})
    base = base_recipe(found, STUDIES["lr"].base, current=True)
    assert base["regularization"]["label_smoothing"] == 0.3
    assert base["model"] == found["model"]
    assert base["trainer"]["epochs"] < found["trainer"]["epochs"]
    assert base["hardware"]["devices"] == 1


def test_a_bad_grid_is_refused_before_anything_runs(project: Path) -> None:
    broken = Study("broken", "?", lambda *_: [Point("x", {"batch": {"size": 4096, "microbatch": 4096}})], list, list)  # type: ignore[arg-type, list-item]
    with pytest.raises(ParamsError, match=r"batch.size: found 4096"):
        run_study(broken, values())
    assert not (project / "studies/broken").exists()


def mlflow_runs(project: Path) -> tuple[list[Any], list[Any]]:
    """Return the studies' runs and the runs below them."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = list(client.search_runs(experiments, order_by=["attributes.start_time ASC"]))
    return (
        [run for run in found if "study.key" in run.data.tags],
        [run for run in found if "mlflow.parentRunId" in run.data.tags],
    )


@pytest.mark.long
def test_killed_resumed_repeated_and_untracked(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project / "studies/lr"
    command = [sys.executable, "-m", "anneal.cli", "study", "lr", "--seeds", "1"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not list(folder.glob("runs/*.json")) and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = {path.name: path.read_bytes() for path in folder.glob("runs/*.json")}
    assert 1 <= len(kept) < 6
    assert not (folder / "results.csv").exists()

    cli.main(["study", "lr", "--seeds", "1"])
    out, err = capsys.readouterr()
    assert f"lr: {len(kept)} runs are there from before" in err
    assert f"lr: {6 - len(kept)} runs, about" in err
    assert "epoch" not in err, "what a run says of itself"
    assert all((folder / "runs" / name).read_bytes() == content for name, content in kept.items())
    assert "- rate 0.03: training loss 0." in out
    assert "1 of 1 diverged" in out
    table = without_speed(folder / "results.csv")
    assert [row["point"] for row in table] == [f"lr {lr}" for lr in ("0.0003", "0.003", "0.03", "0.15", "0.3", "3")]
    assert [row["diverged"] for row in table][:4] == ["false"] * 4
    assert table[-1]["diverged"] == "true"
    assert float(table[2]["val_loss"]) < 0.5 < float(table[0]["val_loss"])
    curves = rows(folder / "curves.csv")
    assert {row["epoch"] for row in curves} == {str(epoch) for epoch in range(1, 9)}
    figure = (folder / "figure.png").read_bytes()
    assert figure[:4] == b"\x89PNG"
    assert "lowest mean validation loss at rate 0." in (folder / "conclusions.txt").read_text(encoding="utf-8")
    for name in ("data/processed", "data/augmented", "models", "reports"):
        assert not (project / name).exists()

    (parent,), children = mlflow_runs(project)
    assert parent.info.run_name == "study lr"
    assert parent.info.status == "FINISHED"
    assert {"stage": "study", "study": "lr"}.items() <= parent.data.tags.items()
    assert "lowest mean validation loss" in parent.data.tags["mlflow.note.content"]
    assert parent.data.params["model.name"] == "convnet"
    assert parent.data.metrics["study/runs"] == 6
    names = {path.name for path in (project / "mlruns").rglob("*") if path.is_file()}
    assert {"figure.png", "results.csv", "curves.csv", "conclusions.txt"} <= names
    assert sorted(run.info.run_name for run in children) == sorted(f"{row['point']} · seed 0" for row in table)
    for run in children:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert set(run.data.params) == {"seed", "optimizer.SGD.lr"}
        row = next(row for row in table if row["point"] == run.data.tags["point"])
        assert run.data.metrics["val/loss"] == float(row["val_loss"])
        assert "step/loss" in run.data.metrics

    cli.main(["study", "lr", "--seeds", "1"])
    assert "6 runs are there from before" in capsys.readouterr().err
    assert [len(runs) for runs in mlflow_runs(project)] == [1, 6], "the same study is one run, however often"
    assert (folder / "figure.png").read_bytes() == figure

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    cli.main(["study", "lr", "--seeds", "1", "--fresh"])
    assert "from before" not in capsys.readouterr().err
    assert without_speed(folder / "results.csv") == table
    assert rows(folder / "curves.csv") == curves
    assert (folder / "figure.png").read_bytes() == figure
