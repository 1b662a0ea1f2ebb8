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

from anneal import metrics
from anneal.ensemble import COMBINE, log_softmax
from anneal.evaluation import EvaluateConfig, Evaluation, evaluate, headline, tracked, write_reports
from anneal.models.build import load_classifier
from anneal.params import UserError
from anneal.serving import load_predictor
from anneal.store import Store, open_store
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


def test_the_temperature_is_fitted_on_val_alone_and_kept_by_the_export(project: Path, found: Evaluation) -> None:
    temperature = found.predictor["temperature"]
    assert temperature != 1.0
    val = found.figures["val"]
    assert val["ensemble_tta"]["nll"] < val["uncalibrated"]["nll"]
    assert val["ensemble_tta"]["accuracy"] == val["uncalibrated"]["accuracy"]
    only_test = run(project, splits=["test"])
    assert only_test.predictor == found.predictor
    assert list(only_test.figures) == ["test"] and only_test.figures["test"] == found.figures["test"]
    none = run(project, calibrate="none")
    assert none.predictor["temperature"] == 1.0
    assert none.figures["test"]["ensemble_tta"] == none.figures["test"]["uncalibrated"]


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
    names = ["baselines.json", "confusion.csv", "confusion.png", "predictor.json"]
    names += ["reliability.csv", "reliability.png", "warnings.json"]
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
    assert len(files) == 9
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
    "splits": ["val"],
    "tta": {"views": ["identity"], "average": "logit"},
    "calibration": "none",
    "bootstrap": 100,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": ["val", "val"]}, "each split once"),
        ({"tta": {"views": ["hflop"], "average": "logit"}}, "did you mean 'hflip'"),
        ({"tta": {"views": [{"shifts": {"pixels": 0}}], "average": "logit"}}, "a whole number >= 1"),
        ({"tta": {"views": [], "average": "logit"}}, "at least 1"),
        ({"bootstrap": 10}, "100"),
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
    values["ensemble"] |= {"members": {"a": None, "b": {}}, "combine": "logit_mean"}
    values["evaluate"] |= {"tta": {"views": VIEWS, "average": "logit"}, "bootstrap": 100, **changes}
    with open(root / "params.yaml", "w", encoding="utf-8") as file:
        YAML(typ="safe").dump(values, file)
    (root / "params.schema.json").write_text(schema_text(), encoding="utf-8")


def test_the_stage_writes_its_outs_and_logs_the_predictor(tmp_path: Path) -> None:
    import mlflow

    store = write_store(tmp_path)
    for seed, name in enumerate("ab"):
        write_member(tmp_path, store, name, seed)
    shutil.copytree(tmp_path / "models/a", tmp_path / "models/removed")
    (tmp_path / "models/removed/model.json").write_text("not a member of params.yaml")
    write_params(tmp_path)
    done = stage(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "hflip: no member" in done.stderr
    figures = json.loads((tmp_path / "reports/metrics.json").read_text())
    assert f"test: accuracy {figures['test']['ensemble_tta']['accuracy']:.4f}" in done.stdout
    predictor = load_predictor(tmp_path)
    assert (predictor.combine, predictor.average) == ("logit_mean", "logit")

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    (own,) = [run for run in runs if run.data.tags.get("stage") == "evaluate"]
    (parent,) = [run for run in runs if run.info.run_id == own.data.tags["mlflow.parentRunId"]]
    for run in (own, parent):
        assert run.data.metrics["test/accuracy"] == figures["test"]["ensemble_tta"]["accuracy"]
        assert run.data.metrics["test/single/accuracy"] == figures["test"]["single"]["accuracy"]
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
