"""Members, views and splits into figures and files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from pydantic import ValidationError

from anneal import metrics, params
from anneal.ensemble import COMBINE, log_softmax
from anneal.evaluation import EvaluateConfig, Evaluation, evaluate, headline, tracked, write_reports
from anneal.models.build import load_classifier
from anneal.params import UserError
from anneal.serving import load_predictor
from anneal.store import Store, open_store
from anneal.tracking.split_uses import METRIC, recipes_on_test
from tests.tiny_project import CLASSES, COUNTS, write_member, write_store

ROOT = Path(__file__).resolve().parents[1]
M_KEYS = {"accuracy", "accuracy_ci", "macro_accuracy", "macro_f1", "top5", "nll", "brier", "ece"}
VIEWS: list[Any] = ["identity", "hflip", {"shifts": {"pixels": 1}}]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    store = write_store(root)
    for seed, name in enumerate("abc"):
        write_member(root, store, name, seed, ["HorizontalFlip", "RandomPadCrop"])
    return root


def run(root: Path, members: str = "abc", **changes: Any) -> Evaluation:
    arguments: dict[str, Any] = {
        "splits": ["val", "test"],
        "tta_views": VIEWS,
        "average": "probability",
        "combine": "probability_mean",
        "calibrate": "temperature",
        "num_resamples": 100,
        "seed": 0,
    }
    store = open_store(root / "data/processed")
    return evaluate(store, {name: root / "models" / name for name in members}, **{**arguments, **changes})


@pytest.fixture(scope="module")
def found(project: Path) -> Evaluation:
    return run(project)


def test_metrics_have_the_names_that_others_script_against(found: Evaluation) -> None:
    assert list(found.figures) == ["val", "test"]
    for figures in found.figures.values():
        assert set(figures) >= {"members", "single", "tta", "ensemble", "ensemble_tta"}
        assert set(figures["members"]) == {"a", "b", "c"}
        groups = [*figures["members"].values(), *(v for k, v in figures.items() if k != "members")]
        for values in groups:
            assert set(values) >= M_KEYS
            for name in metrics.RESAMPLED:
                low, high = values[f"{name}_ci"]
                assert low <= values[name] <= high


def test_figures_are_those_of_the_members_by_hand(project: Path, found: Evaluation) -> None:
    split = open_store(project / "data/processed").split("test")
    images = split.take(np.arange(len(split)))
    plain = []
    with torch.inference_mode():
        for name in "abc":
            classifier, _ = load_classifier(project / "models" / name)
            plain.append(log_softmax(classifier(torch.from_numpy(images)).numpy()))
    figures = found.figures["test"]
    by_hand = [metrics.figures(np.exp(p), split.labels) for p in plain]
    for member, values in zip("abc", by_hand, strict=True):
        for key, value in values.items():
            assert figures["members"][member][key] == pytest.approx(value, abs=1e-5), key
    for key in by_hand[0]:
        assert figures["single"][key] == pytest.approx(np.mean([values[key] for values in by_hand]), abs=1e-5)
    ensemble = metrics.figures(np.exp(COMBINE["probability_mean"](np.stack(plain))), split.labels)
    assert figures["ensemble"]["nll"] == pytest.approx(ensemble["nll"], abs=1e-5)
    # Jensen: the likelihood of the mean prediction is at least the mean likelihood.
    assert figures["ensemble"]["nll"] < figures["single"]["nll"]
    assert figures["tta"]["nll"] != figures["single"]["nll"]


def test_the_temperature_is_fitted_on_val_alone_and_kept_by_the_export(project: Path) -> None:
    found = run(project, "bc")
    temperature = found.predictor["temperature"]
    assert temperature == found.predictor["calibration"]["temperature"] != 1.0
    val = found.figures["val"]
    assert val["ensemble_tta"]["nll"] < val["uncalibrated"]["nll"]
    assert val["ensemble_tta"]["accuracy"] == val["uncalibrated"]["accuracy"]
    only_test = run(project, "bc", splits=["test"])
    assert only_test.predictor == found.predictor
    assert list(only_test.figures) == ["test"] and only_test.figures["test"] == found.figures["test"]
    none = run(project, "bc", calibrate="none")
    assert none.predictor["temperature"] == 1.0 and none.predictor["calibration"]["kind"] == "none"
    assert none.figures["test"]["ensemble_tta"] == none.figures["test"]["uncalibrated"]


def test_a_calibration_that_does_not_help_is_left_out_and_said(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(project, "a", tta_views=["identity"])
    why = found.predictor["calibration"]
    assert (why["asked"], why["kind"], found.predictor["temperature"]) == ("temperature", "none", 1.0)
    losses = why["cross_validated_nll"]
    assert losses["none"] - losses["temperature"] <= why["standard_error"]["temperature"]
    assert found.figures["test"]["ensemble_tta"] == found.figures["test"]["uncalibrated"]
    assert "temperature does not help on val" in capsys.readouterr().err
    vector = run(project, "a", tta_views=["identity"], calibrate="vector")
    assert vector.predictor["calibration"]["kind"] == "vector" and vector.predictor["temperature"] == 1.0
    assert len(vector.predictor["calibration"]["scale"]) == len(vector.predictor["calibration"]["bias"]) == 3
    assert vector.figures["val"]["ensemble_tta"]["nll"] < vector.figures["val"]["uncalibrated"]["nll"]


def test_weights_of_members_are_fitted_on_val_alone_and_members_without_are_not_exported(project: Path) -> None:
    found = run(project, combine="weighted", calibrate="none")
    predictor = found.predictor
    assert predictor["members"] == ["a", "b"] and len(predictor["weights"]) == 2
    assert sum(predictor["weights"]) == pytest.approx(1)
    only_test = run(project, combine="weighted", calibrate="none", splits=["test"])
    assert only_test.predictor == predictor
    np.testing.assert_array_equal(only_test.exported["test"], found.exported["test"])
    p = np.exp(found.predictions["test"].averaged)
    expected = predictor["weights"][0] * p[0] + predictor["weights"][1] * p[1]
    np.testing.assert_allclose(found.exported["test"], expected, atol=1e-12)
    rows = {(row["split"], row["member"]): row for row in found.tables["ensemble_members"]}
    assert rows["test", "a"]["weight"] == predictor["weights"][0] and rows["test", "c"]["weight"] == 0
    assert rows["test", "c"]["nll_difference"] == pytest.approx(0, abs=1e-3)
    assert (
        found.figures["val"]["uncalibrated"]["nll"] <= run(project, calibrate="none").figures["val"]["ensemble"]["nll"]
    )
    pairs = {(row["split"], row["a"], row["b"]) for row in found.tables["comparisons"]}
    assert ("test", "probability_mean", "uncalibrated") in pairs


# ---- tables -----------------------------------------------------------------------------------------------------------


def rows_of(found: Evaluation, table: str, **chosen: Any) -> list[dict[str, Any]]:
    return [row for row in found.tables[table] if all(row[key] == value for key, value in chosen.items())]


def test_the_grid_has_every_way_to_predict(project: Path, found: Evaluation) -> None:
    assert len(rows_of(found, "grid")) == 2 * (1 + 3 + 3 + 3)
    for split in ("val", "test"):
        own = found.predictions[split]
        (single,) = rows_of(found, "grid", split=split, predictor="single", views="none")
        for key in ("accuracy", "nll", "ece"):
            assert single[key] == found.figures[split]["single"][key]
        assert (single["averaging"], single["forward_passes"]) == (None, 1)
        (tta,) = rows_of(found, "grid", split=split, predictor="single", views="tta", averaging="probability")
        assert (tta["nll"], tta["forward_passes"]) == (pytest.approx(found.figures[split]["tta"]["nll"]), 6)
        (mean,) = rows_of(found, "grid", split=split, predictor="ensemble", views="none", averaging="probability")
        assert (mean["accuracy"], mean["nll"]) == tuple(
            found.figures[split]["ensemble"][key] for key in ("accuracy", "nll")
        )
        ways = rows_of(found, "grid", split=split, predictor="ensemble", views="tta")
        assert [row["averaging"] for row in ways] == ["probability", "logit", "log_probability"]
        assert ways[0]["nll"] == pytest.approx(found.figures[split]["uncalibrated"]["nll"])
        assert ways[1]["nll"] == ways[2]["nll"] != ways[0]["nll"] and ways[0]["forward_passes"] == 18
        # Averaged by logits throughout, also the four shifts that are one view.
        logits = run(project, average="logit", combine="logit_mean", calibrate="none", splits=[split])
        assert ways[1]["nll"] == pytest.approx(logits.figures[split]["ensemble_tta"]["nll"], abs=1e-12)
        assert own.otherwise.shape == own.by_view.shape


def test_further_views_are_rows_with_what_they_gain_and_change_nothing_else(project: Path, found: Evaluation) -> None:
    grid: list[Any] = ["hflip", ["five_crop", "hflip"], {"shifts": {"pixels": 1}}, ["ten_crop"]]
    more = run(project, grid=grid)
    assert more.figures == found.figures and more.predictor == found.predictor and more.tta == found.tta
    assert {**more.tables, "grid": []} == {**found.tables, "grid": []}
    before = [row for row in more.tables["grid"] if row["views"] in ("none", "tta")]
    assert before == found.tables["grid"]
    costs = {"none": 1, "tta": 6, "identity + hflip": 2, "five_crop + hflip": 6, "identity + shifts": 5, "ten_crop": 10}
    rows = rows_of(more, "grid", split="test", predictor="single")
    assert {row["views"]: row["forward_passes"] for row in rows} == costs and len(rows) == 1 + 3 * 5

    # Each row is a run of its own: its figures, and what it gains over the one without views.
    for average, combine in (("probability", "probability_mean"), ("logit", "logit_mean")):
        own = run(project, tta_views=["five_crop", "hflip"], average=average, combine=combine, calibrate="none")
        pairs = {(row["a"], row["b"]): row for row in rows_of(own, "comparisons", split="test")}
        for predictor, (a, b) in {"single": ("single", "tta"), "ensemble": ("ensemble", "uncalibrated")}.items():
            key = {"split": "test", "predictor": predictor, "views": "five_crop + hflip", "averaging": average}
            (row,) = rows_of(more, "grid", **key)
            expected = pairs[a, b]
            assert row["accuracy"] == pytest.approx(own.figures["test"][b]["accuracy"])
            assert row["nll"] == pytest.approx(own.figures["test"][b]["nll"])
            assert row["ece"] == pytest.approx(own.figures["test"][b]["ece"])
            assert row["accuracy_gain"] == pytest.approx(expected["accuracy_difference"])
            ends = [row["nll_gain_low"], row["nll_gain"], row["nll_gain_high"]]
            assert ends == pytest.approx([-expected[f"nll_{end}"] for end in ("high", "difference", "low")])
            assert row["mcnemar_p"] == pytest.approx(expected["mcnemar_p"])
            assert (row["accuracy_verdict"], row["nll_verdict"]) == (
                expected["accuracy_verdict"],
                expected["nll_verdict"],
            )


def test_policies_that_differ_in_their_seed_are_rows_of_their_own(project: Path) -> None:
    draws: list[Any] = [{"augment": {"n": 2, "seed": seed}} for seed in (1, 2)]
    found = run(project, "a", splits=["val"], grid=draws, tta_views=["identity", *draws])
    rows = rows_of(found, "grid", averaging="probability")
    label = "identity + augment policy=RandomPadCrop n=2"
    assert [row["views"] for row in rows] == ["tta", label, f"{label} (2)"]
    assert rows[1]["nll"] != rows[2]["nll"]
    assert [row["view"] for row in found.tta][2] == "augment policy=RandomPadCrop n=2 (2)"
    # The second is the first once the seed of the recipe is filled in: serving would refuse such a predictor.
    with pytest.raises(UserError, match=r"evaluate\.tta\.views: found augment twice with the same policy and seed"):
        run(project, "a", tta_views=["identity", {"augment": {"n": 2}}, {"augment": {"n": 2, "seed": 0}}])


def test_views_of_the_grid_that_a_member_cannot_take_are_refused(project: Path) -> None:
    with pytest.raises(UserError, match=r"^evaluate.grid: shifts.pixels: found 8, allowed: less than 8"):
        run(project, grid=[{"shifts": {"pixels": 8}}])


def test_snapshots_of_a_run_are_an_ensemble_of_it(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "data", tmp_path / "data")
    shutil.copytree(project / "models", tmp_path / "models")
    for epoch, weights in ((2, "a"), (10, "b")):
        for name in "ac" if epoch == 2 else "a":
            (tmp_path / f"models/{name}/snapshots").mkdir(exist_ok=True)
            shutil.copy(
                project / f"models/{weights}/weights.safetensors",
                tmp_path / f"models/{name}/snapshots/{epoch}.safetensors",
            )
    found = run(tmp_path, grid=["five_crop"])
    pair = run(project, "ab", grid=["five_crop"])
    rows = rows_of(found, "grid", predictor="snapshots")  # of a alone: c has one, which is no ensemble
    assert [row["views"] for row in rows[:6]] == ["none"] * 3 + ["tta"] * 3
    expected = rows_of(pair, "grid", predictor="ensemble")
    for row, other in zip(rows, expected, strict=True):
        assert row == {**other, "predictor": "snapshots"}
    assert [row["forward_passes"] for row in rows[:6]] == [2, 2, 2, 12, 12, 12]
    (compared,) = rows_of(found, "comparisons", split="test", b="snapshots")
    assert compared["a"] == "single"
    assert compared["nll_a"] == pytest.approx(found.figures["test"]["members"]["a"]["nll"])
    assert compared["nll_b"] == pytest.approx(pair.figures["test"]["ensemble"]["nll"])


def test_comparisons_stand_beside_the_figures_that_they_are_of(found: Evaluation) -> None:
    for row in found.tables["comparisons"]:
        figures = found.figures[row["split"]]
        for side in ("a", "b"):
            name = row[side]
            of = figures["members"][name.split("/")[1]] if name.startswith("members/") else figures[name]
            assert row[f"accuracy_{side}"] == pytest.approx(of["accuracy"])
            assert row[f"nll_{side}"] == pytest.approx(of["nll"])
        assert row["accuracy_low"] <= row["accuracy_difference"] <= row["accuracy_high"]
        assert 0 < row["mcnemar_p"] <= 1
    of_test = [(row["a"], row["b"]) for row in rows_of(found, "comparisons", split="test")]
    assert of_test == [
        ("single", "tta"),
        ("single", "ensemble"),
        ("tta", "uncalibrated"),
        ("ensemble", "uncalibrated"),
        ("single", "ensemble_tta"),
        ("members/a", "ensemble_tta"),
        ("members/b", "ensemble_tta"),
        ("members/c", "ensemble_tta"),
    ]


def test_tables_of_the_ensemble(found: Evaluation) -> None:
    sizes = rows_of(found, "ensemble", split="test")
    assert [(row["members"], row["subsets"]) for row in sizes] == [(1, 3), (2, 3), (3, 1)]
    assert sizes[0]["nll"] == pytest.approx(found.figures["test"]["tta"]["nll"])
    assert sizes[2]["nll"] == pytest.approx(found.figures["test"]["uncalibrated"]["nll"])
    assert sizes[0]["nll_gain"] is None
    assert sizes[2]["nll_gain"] == pytest.approx(sizes[1]["nll"] - sizes[2]["nll"])
    assert sizes[2]["nll_gain_low"] < sizes[2]["nll_gain"] < sizes[2]["nll_gain_high"]
    assert sizes[2]["accuracy_gain"] == pytest.approx(sizes[2]["accuracy"] - sizes[1]["accuracy"])
    # What the mean over subsets of two lacks to the whole is what the members add, on average.
    gains = [-row["nll_difference"] for row in rows_of(found, "ensemble_members", split="test")]
    assert np.mean(gains) == pytest.approx(sizes[2]["nll_gain"])
    pairs = rows_of(found, "ensemble_diversity", split="test")
    assert [(row["a"], row["b"]) for row in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    classes = found.predictions["test"].averaged.argmax(axis=2)
    assert pairs[1]["disagreement"] == (classes[0] != classes[2]).mean()


def test_tables_of_the_calibration(found: Evaluation) -> None:
    p, labels = found.exported["test"], found.predictions["test"].labels
    curve = rows_of(found, "risk_coverage", split="test")
    assert len(curve) == COUNTS["test"] and curve[-1]["coverage"] == 1
    assert curve[-1]["accuracy"] == pytest.approx(metrics.accuracy(p, labels))
    assert np.mean([row["risk"] for row in curve]) == pytest.approx(found.figures["test"]["ensemble_tta"]["aurc"])
    classes = rows_of(found, "classwise", split="test")
    assert [row["class"] for row in classes] == CLASSES and sum(row["images"] for row in classes) == COUNTS["test"]
    error = np.mean([row["ece"] for row in classes])
    assert error == pytest.approx(found.figures["test"]["ensemble_tta"]["ece_classwise"])


def test_averages_of_the_weights_are_compared_with_the_same_members(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "models", tmp_path / "models")
    shutil.copytree(project / "data", tmp_path / "data")
    for name in "ab":
        (tmp_path / "models" / name / "averages").mkdir()
        shutil.copy(project / "models/c/weights.safetensors", tmp_path / "models" / name / "averages/ema.safetensors")
    found = run(tmp_path, tta_views=["identity"], grid=["hflip", ["five_crop"]], soups=["uniform"])
    (row,) = rows_of(found, "grid", split="test", predictor="ema", views="none")
    assert row["nll"] == pytest.approx(found.figures["test"]["members"]["c"]["nll"])
    for predictor, networks in (("single", 1), ("ema", 1), ("soup_uniform", 1), ("ensemble", 3)):
        rows = rows_of(found, "grid", split="test", predictor=predictor)
        costs = {(row["views"], row["averaging"]): row["forward_passes"] for row in rows}
        ways = ["probability", "logit", "log_probability"]
        expected = {("none", way): networks for way in ([None] if networks == 1 else ways)}
        expected |= {("identity + hflip", way): 2 * networks for way in ways}
        expected |= {("five_crop", way): 5 * networks for way in ways}
        assert costs == expected
        assert all((row["mcnemar_p"] is None) == (row["views"] == "none") for row in rows)
    (compared,) = rows_of(found, "comparisons", split="test", b="ema")
    both = np.mean([found.figures["test"]["members"][name]["nll"] for name in "ab"])
    assert compared["a"] == "single" and compared["nll_a"] == pytest.approx(both)
    for name in "ab":  # what is exported is the average already: nothing to add
        model = json.loads((tmp_path / "models" / name / "model.json").read_text())
        (tmp_path / "models" / name / "model.json").write_text(json.dumps({**model, "weights": "ema"}))
    assert not rows_of(run(tmp_path, tta_views=["identity"]), "grid", predictor="ema")


def test_soups_are_rows_of_the_tables_and_change_nothing_else(project: Path, found: Evaluation) -> None:
    mixed = run(project, soups=["uniform", "greedy"])
    assert mixed.figures == found.figures and mixed.predictor == found.predictor and found.soups == {}
    assert mixed.soups["uniform"] == {"members": ["a", "b", "c"]}
    assert len(rows_of(mixed, "grid", predictor="soup_uniform")) == 2 * 4
    assert [row["a"] for row in rows_of(mixed, "comparisons", split="val", b="soup_uniform")] == ["single", "ensemble"]
    chosen = mixed.soups["greedy"]["members"]
    assert bool(rows_of(mixed, "grid", predictor="soup_greedy")) == (len(chosen) == 2)


def test_grids_on_val_never_open_test(project: Path, tmp_path: Path, found: Evaluation) -> None:
    shutil.copytree(project / "data/processed", tmp_path / "data/processed")
    shutil.rmtree(tmp_path / "data/processed/test")
    shutil.copytree(project / "models", tmp_path / "models")
    assert run(tmp_path, splits=["val"]).figures["val"] == found.figures["val"]


def test_one_member_alone(project: Path) -> None:
    for combine in COMBINE:
        alone = run(project, "a", combine=combine, tta_views=["identity"], calibrate="none")
        values = alone.figures["test"]
        assert (
            values["single"] == values["ensemble"] == values["tta"] == values["ensemble_tta"] == values["members"]["a"]
        )


def test_the_exported_predictor_gives_the_probabilities_of_the_figures(project: Path, found: Evaluation) -> None:
    write_reports(found, project / "reports")
    table = pyarrow.parquet.read_table(project / "reports/predictions.parquet").to_pydict()
    assert list(table) == ["split", "source", "label", "predicted", *(f"prob_{name}" for name in CLASSES)]
    assert table["split"] == ["val"] * COUNTS["val"] + ["test"] * COUNTS["test"]
    probabilities = np.stack([table[f"prob_{name}"] for name in CLASSES], axis=1)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-12)
    labels = np.array([CLASSES.index(name) for name in table["label"]])
    of_test = np.array(table["split"]) == "test"
    recomputed = metrics.figures(probabilities[of_test], labels[of_test])
    for key, value in recomputed.items():
        assert found.figures["test"]["ensemble_tta"][key] == pytest.approx(value, abs=1e-12)

    split = open_store(project / "data/processed").split("test")
    served = load_predictor(project).predict(split.take(np.arange(len(split))))
    np.testing.assert_allclose(served, probabilities[of_test], atol=1e-6)


def test_files(project: Path, found: Evaluation) -> None:
    reports = project / "reports"
    write_reports(found, reports)
    names = ["baselines.json", "classwise.csv", "comparisons.csv", "comparisons.json", "confusion.csv", "confusion.png"]
    names += [
        "cost.json",
        "ensemble.csv",
        "ensemble_diversity.csv",
        "ensemble_members.csv",
        "grid.csv",
        "predictor.json",
    ]
    names += ["reliability.csv", "reliability.png", "risk_coverage.csv", "soups.json", "tta.csv", "warnings.json"]
    assert sorted(path.name for path in (reports / "evaluation").iterdir()) == names
    assert not list(reports.rglob("*.tmp"))
    assert json.loads((reports / "metrics.json").read_text())["test"]["single"] == found.figures["test"]["single"]
    assert json.loads((reports / "evaluation/predictor.json").read_text()) == found.predictor
    assert found.predictor["views"] == ["identity", "hflip", {"shifts": {"pixels": 1}}]

    with open(reports / "evaluation/confusion.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == COUNTS["test"]
    agree = np.mean([row["actual"] == row["predicted"] for row in rows])
    assert agree == pytest.approx(found.figures["test"]["ensemble_tta"]["accuracy"])
    with open(reports / "evaluation/reliability.csv", newline="", encoding="utf-8") as file:
        bins = list(csv.DictReader(file))
    assert sum(int(row["count"]) for row in bins) == COUNTS["test"]

    majority = json.loads((reports / "evaluation/baselines.json").read_text())["majority_class"]
    assert majority["class"] == "cat"
    assert majority["test"]["accuracy"] == pytest.approx(14 / 41)
    assert majority["val"]["nll"] == pytest.approx(np.log(3))


def test_a_second_run_writes_the_same_bytes(project: Path, found: Evaluation, tmp_path: Path) -> None:
    write_reports(found, tmp_path / "one")
    write_reports(run(project), tmp_path / "two")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 2 + 18
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_the_seed_moves_intervals_and_nothing_else(project: Path, found: Evaluation) -> None:
    other = run(project, seed=1).figures["test"]["ensemble_tta"]
    same = found.figures["test"]["ensemble_tta"]
    assert {k: v for k, v in other.items() if not k.endswith("_ci")} == {
        k: v for k, v in same.items() if not k.endswith("_ci")
    }
    assert other["nll_ci"] != same["nll_ci"]


def test_uncovered_views_and_absent_classes_are_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path, [*CLASSES, "zebra"])
    write_member(tmp_path, store, "a", 0, ["RandomPadCrop"])
    labels = np.load(tmp_path / "data/processed/test/labels.npy")
    np.save(tmp_path / "data/processed/test/labels.npy", np.where(labels == 3, 0, labels))
    warnings = run(tmp_path, "a").warnings
    assert len(warnings) == 2
    assert "hflip: no member was trained with" in warnings[0]
    assert "test: has no image of zebra" in warnings[1]
    printed = capsys.readouterr().err
    assert all(f"warning: {line}" in printed for line in warnings)


def test_faults_are_named(project: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="models/z: no trained member"):
        run(project, "az")
    store = write_store(tmp_path, ["x", "y"])
    write_member(tmp_path, store, "a", 0)
    with pytest.raises(UserError, match="was trained on other data"):
        evaluate_with(open_store(project / "data/processed"), tmp_path / "models/a")
    classifier, _ = load_classifier(tmp_path / "models/a")
    from safetensors.torch import save_file

    weights = {key: value.contiguous() for key, value in classifier.state_dict().items()}
    weights = {key: value * float("nan") if value.is_floating_point() else value for key, value in weights.items()}
    save_file(weights, tmp_path / "models/a/weights.safetensors")
    with pytest.raises(UserError, match="models/a: predicts NaN"):
        evaluate_with(store, tmp_path / "models/a")


def evaluate_with(store: Store, folder: Path) -> Evaluation:
    return evaluate(
        store,
        {"a": folder},
        splits=["test"],
        tta_views=["identity"],
        average="logit",
        combine="vote",
        calibrate="none",
        num_resamples=100,
        seed=0,
    )


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    write_member(tmp_path, store, "a", 0)
    folder = tmp_path / "data/processed/val"
    np.save(folder / "labels.npy", np.empty(0, np.int64))
    np.save(folder / "images-00000.npy", np.empty((0, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="val holds no image"):
        run(tmp_path, "a")


def test_names_for_mlflow(found: Evaluation) -> None:
    flat = tracked(found.figures)
    values = found.figures["test"]
    assert flat["test/accuracy"] == values["ensemble_tta"]["accuracy"]
    for name in ("single", "tta", "ensemble"):
        assert flat[f"test/{name}/accuracy"] == values[name]["accuracy"]
    assert flat["test/members/b/nll"] == values["members"]["b"]["nll"]
    assert [flat["test/accuracy_ci_low"], flat["test/accuracy_ci_high"]] == values["ensemble_tta"]["accuracy_ci"]
    assert all(isinstance(value, float) for value in flat.values())
    assert set(headline(found.figures)) < set(flat)
    assert headline(found.figures)["val/accuracy"] == flat["val/accuracy"]


GOOD = {
    **params.read_yaml(ROOT / "params.yaml")["evaluate"],
    "grid": ["hflip", ["five_crop", "ten_crop"]],
    "soups": ["uniform"],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": ["val", "val"]}, "each once"),
        ({"tta": {"views": ["hflop"], "average": "logit"}}, "did you mean 'hflip'"),
        ({"tta": {"views": [{"shifts": {"pixels": 0}}], "average": "logit"}}, "a whole number >= 1"),
        ({"tta": {"views": [], "average": "logit"}}, "at least 1"),
        ({"bootstrap": 10}, "100"),
        ({"soups": ["greedy", "greedy"]}, "each once"),
        ({"grid": ["hflop"]}, r"^(?s:.)*\[0\]: found 'hflop', allowed: .*did you mean 'hflip'"),
        ({"grid": ["hflip", ["hflip", {"scales": {"factors": []}}]]}, r"\[1\]\[1\].scales.factors: found \[\]"),
        ({"grid": ["hflip", ["identity", "hflip"]]}, r"\[1\]: found identity \+ hflip twice"),
        ({"grid": ["identity"]}, r"\[0\]: found 'identity', allowed: a view beside the identity"),
        ({"grid": [[]]}, r"\[0\]: found \[\], allowed: a view beside the identity"),
    ],
)
def test_the_section_is_checked(change: dict[str, Any], message: str) -> None:
    EvaluateConfig.model_validate(GOOD)
    with pytest.raises(ValidationError, match=message):
        EvaluateConfig.model_validate({**GOOD, **change})


def test_checking_params_imports_nothing_heavy() -> None:
    code = "import sys, anneal.evaluation, anneal.ensemble; print([m for m in {0} if m in sys.modules])"
    heavy = ["torch", "albumentations", "mlflow", "sklearn", "matplotlib", "scipy"]
    found = subprocess.run([sys.executable, "-c", code.format(heavy)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def stage(root: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"}
    command = [sys.executable, "-m", "stages.evaluate"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def write_params(root: Path, **changes: Any) -> None:
    from ruamel.yaml import YAML

    from anneal.recipe import schema_text

    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["ensemble"] |= {"members": {"a": None, "b": {}, "z": {}}, "combine": "weighted"}
    values["evaluate"] |= {"tta": {"views": VIEWS, "average": "logit"}, "bootstrap": 100, **changes}
    with open(root / "params.yaml", "w", encoding="utf-8") as file:
        YAML(typ="safe").dump(values, file)
    (root / "params.schema.json").write_text(schema_text(), encoding="utf-8")


def test_the_stage_writes_its_outs_and_logs_the_predictor(tmp_path: Path) -> None:
    import mlflow

    store = write_store(tmp_path)
    for seed, name in enumerate("abz"):
        write_member(tmp_path, store, name, seed)
    shutil.copytree(tmp_path / "models/a", tmp_path / "models/removed")
    (tmp_path / "models/removed/model.json").write_text("not a member of params.yaml")
    write_params(tmp_path, calibration="vector", grid=["five_crop"])
    done = stage(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "hflip: no member" in done.stderr
    figures = json.loads((tmp_path / "reports/metrics.json").read_text())
    assert f"test: accuracy {figures['test']['ensemble_tta']['accuracy']:.4f}" in done.stdout
    predictor = load_predictor(tmp_path)
    assert (predictor.combine, predictor.average, len(predictor.classifiers)) == ("weighted", "logit", 2)
    assert "five_crop" in (tmp_path / "reports/evaluation/grid.csv").read_text()

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    (own,) = [run for run in runs if run.data.tags.get("stage") == "evaluate"]
    (parent,) = [run for run in runs if run.info.run_id == own.data.tags["mlflow.parentRunId"]]
    for run in (own, parent):
        assert run.data.metrics["test/accuracy"] == figures["test"]["ensemble_tta"]["accuracy"]
        assert run.data.metrics["test/single/accuracy"] == figures["test"]["single"]["accuracy"]
    assert own.data.metrics.keys() >= {"test/corrupted_accuracy", "test/near_duplicates"}
    client, experiments = mlflow.MlflowClient(), [own.info.experiment_id]
    assert recipes_on_test(client, experiments, store.info.digest) == [parent.data.tags["fingerprint"]]
    assert recipes_on_test(client, experiments, "0" * 32) == []
    assert parent.data.metrics[METRIC] == 1 and "test set used by 1 recipe\n" in done.stdout
    logged = mlflow.pyfunc.load_model(own.data.tags["predictor.uri"])
    images = store.split("test").take(np.arange(COUNTS["test"]))
    np.testing.assert_allclose(logged.predict(images), predictor.predict(images), atol=1e-12)
    table = pyarrow.parquet.read_table(tmp_path / "reports/predictions.parquet").to_pylist()
    written = [[row[f"prob_{name}"] for name in CLASSES] for row in table if row["split"] == "test"]
    np.testing.assert_allclose(logged.predict(images), written, atol=1e-6)


def test_the_stage_stops_before_any_work_on_a_fault(tmp_path: Path) -> None:
    write_params(tmp_path, tta={"views": ["hflop"], "average": "logit"})
    done = stage(tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert "evaluate.tta.views[0]: found 'hflop'" in done.stderr and "did you mean 'hflip'" in done.stderr
    write_params(tmp_path)
    done = stage(tmp_path)
    assert done.returncode == 1 and "no processed data here" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "reports").exists()
