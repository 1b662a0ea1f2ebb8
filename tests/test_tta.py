"""Which views help, and what they cost."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from anneal import calibration, metrics, significance, tta, views
from anneal.ensemble import log_softmax, logit_mean, probability_mean
from anneal.evaluation import Evaluation, TTAConfig, evaluate, write_reports
from anneal.models.build import load_classifier
from anneal.params import UserError
from anneal.serving import load_predictor
from anneal.store import open_store
from tests.tiny_project import COUNTS, write_member, write_store

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 3, 400)
TRUTH = 2.0 * (LABELS[:, None] == np.arange(3))


def noisy(scale: float, seed: int) -> np.ndarray:
    """Return log-probabilities of two members, (2, N, 3), the more wrong the larger the scale."""
    return log_softmax(TRUTH + np.random.default_rng(seed).normal(0, scale, (2, 400, 3)))


def select(by_view: list[np.ndarray], **changes: Any) -> list[int]:
    count = len(by_view)
    arguments: dict[str, Any] = {
        "weights": [1] * count,
        "costs": [1.0] * count,
        "average": "probability",
        "combine": probability_mean,
        "calibrate": False,
    }
    return tta.select_greedy(np.stack(by_view, axis=1), LABELS, **{**arguments, **changes})


def test_the_best_view_joins_first_and_bad_ones_never() -> None:
    identity, good, fair, bad = noisy(1.0, 0), noisy(1.0, 1), noisy(2.0, 2), log_softmax(-5 * noisy(0.1, 3))
    assert select([identity, bad, fair, good])[:2] == [0, 3]
    assert 1 not in select([identity, bad, fair, good])
    assert select([bad, identity, good], start=1) == [1, 2]
    assert select([good, bad]) == [0]


@pytest.mark.parametrize("average", views.AVERAGE)
def test_each_step_is_the_best_of_all_that_could_be_taken(average: str) -> None:
    by_view = np.stack([noisy(2.5 + 0.2 * index, index) for index in range(5)], axis=1)
    weights = [1, 2, 1, 3, 1]
    chosen = select(list(by_view.swapaxes(0, 1)), weights=weights, average=average)

    def loss(indices: list[int]) -> float:
        of_members = []
        for member in by_view:
            repeated = np.concatenate([member[[i]].repeat(weights[i], axis=0) for i in indices])
            mean = (
                np.log(np.exp(repeated).mean(axis=0))
                if average == "probability"
                else log_softmax(repeated.mean(axis=0))
            )
            of_members.append(np.exp(mean))
        return metrics.nll(np.mean(of_members, axis=0), LABELS)

    assert chosen[0] == 0 and len(chosen) > 1
    for count in range(1, len(chosen) + 1):
        left = [index for index in range(5) if index not in chosen[:count]]
        losses = {index: loss([*chosen[:count], index]) for index in left}
        if count < len(chosen):
            assert chosen[count] == min(losses, key=losses.__getitem__)
            assert losses[chosen[count]] < loss(chosen[:count])
        else:
            assert all(value >= loss(chosen) for value in losses.values())


def test_a_view_that_changes_nothing_is_not_paid_for_and_ties_go_to_the_cheaper() -> None:
    identity, good = noisy(1.0, 0), noisy(1.0, 1)
    assert select([identity, identity + 1e-12]) == [0]
    assert select([identity, good, good], costs=[1.0, 5.0, 2.0])[:2] == [0, 2]
    assert select([identity, good, good], costs=[1.0, 2.0, 5.0])[:2] == [0, 1]


def test_softening_alone_is_no_reason_where_a_temperature_does_it() -> None:
    sure = log_softmax(6 * noisy(1.5, 0))
    flat = np.full_like(sure, -np.log(3))
    for calibrate, chosen in ((False, [0, 1]), (True, [0])):
        assert select([sure, flat], average="logit", combine=logit_mean, calibrate=calibrate) == chosen


def test_the_table_is_what_each_view_costs_and_earns() -> None:
    parsed = views.parse_views(["identity", "hflip", "five_crop"])
    by_view = {
        name: np.stack([noisy(1 + i, 10 * s + i) for i in range(3)], axis=1) for s, name in enumerate(("val", "test"))
    }
    rows = tta.table(
        [views.label_of(view) for view in parsed],
        by_view,
        {"val": LABELS, "test": LABELS},
        weights=views.num_images(parsed, 8, 8),
        costs=views.passes(parsed, 8, 8),
        chosen=[0, 1],
        average="probability",
        combine=probability_mean,
        calibrate=True,
        splits=["val", "test"],
        num_resamples=200,
        seed=0,
    )
    assert [row["view"] for row in rows] == ["identity", "hflip", "five_crop", "chosen"]
    assert [row["images"] for row in rows] == [1, 1, 5, 2] and [row["passes"] for row in rows] == [1, 1, 5, 2]
    assert [row["chosen"] for row in rows] == [1, 2, None, None]

    def probabilities(split: str, indices: list[int], weights: list[int]) -> np.ndarray:
        """Return what the members say together, at the temperature of val."""
        values = {
            name: np.log(np.average(np.exp(by_view[name][:, indices]), axis=1, weights=weights).mean(axis=0))
            for name in ("val", split)
        }
        temperature = calibration.fit_temperature(values["val"], LABELS)
        return np.exp(log_softmax(values[split] / temperature))

    for split in ("val", "test"):
        plain = probabilities(split, [0], [1])
        assert rows[0][f"{split}_nll"] == pytest.approx(metrics.nll(plain, LABELS))
        assert rows[0][f"{split}_nll_gain"] is None and rows[0][f"{split}_accuracy_verdict"] is None
        alone, added = probabilities(split, [2], [1]), probabilities(split, [0, 2], [1, 5])
        crops = rows[2]
        assert crops[f"{split}_accuracy"] == metrics.accuracy(alone, LABELS)
        assert crops[f"{split}_ece"] == pytest.approx(metrics.ece(alone, LABELS))
        expected = significance.compare(plain, added, LABELS, num_resamples=200, seed=0)
        assert crops[f"{split}_accuracy_gain"] == pytest.approx(expected.accuracy_difference)
        assert crops[f"{split}_nll_gain"] == pytest.approx(expected.nll_a - expected.nll_b)
        low, high = crops[f"{split}_nll_gain_low"], crops[f"{split}_nll_gain_high"]
        assert (low, high) == (pytest.approx(-expected.nll_high), pytest.approx(-expected.nll_low)) and low < high
        assert rows[3][f"{split}_nll"] == pytest.approx(metrics.nll(probabilities(split, [0, 1], [1, 1]), LABELS))
        assert rows[3][f"{split}_nll_gain"] == rows[1][f"{split}_nll_gain"]


# ---- in evaluate ------------------------------------------------------------------------------------------------------

CANDIDATES: list[Any] = [
    "hflip",
    {"dense": {"factors": [1.5]}},
    {"ten_crop": {"fraction": 0.75, "resize": False}},
    "rotations",
    {"augment": {"policy": ["HorizontalFlip", "RandomPadCrop"], "n": 2}},
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    store = write_store(root)
    for seed, name in enumerate("ab"):
        write_member(root, store, name, seed, ["HorizontalFlip", "RandomPadCrop"])
    return root


def run(root: Path, **changes: Any) -> Evaluation:
    arguments: dict[str, Any] = {
        "splits": ["val", "test"],
        "tta_views": CANDIDATES,
        "average": "log_probability",
        "combine": "probability_mean",
        "calibrate": "temperature",
        "num_resamples": 100,
        "seed": 3,
    }
    members = {name: root / "models" / name for name in "ab"}
    return evaluate(open_store(root / "data/processed"), members, **{**arguments, **changes})


@pytest.mark.parametrize("selection", ["none", "greedy"])
def test_the_exported_predictor_serves_the_chosen_views(project: Path, selection: str) -> None:
    found = run(project, select=selection)
    write_reports(found, project / "reports")
    with open(project / "reports/evaluation/tta.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = ["identity", *(views.label_of(view) for view in views.parse_views(CANDIDATES))]
    assert labels[-2:] == ["rotations", "augment policy=HorizontalFlip+RandomPadCrop n=2"]
    assert [row["view"] for row in rows if row["view"] != "chosen"] == labels
    assert float(rows[3]["passes"]) == 10 * 0.75**2
    exported = json.loads((project / "reports/evaluation/predictor.json").read_text())
    chosen = [row["view"] for row in sorted(rows, key=lambda row: int(row["chosen"] or 99)) if row["chosen"]]
    names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in exported["views"]]
    assert names == [label.split()[0] for label in chosen]
    if selection == "greedy":
        assert names[0] == "identity" and len(names) < 6
    else:
        assert names == ["hflip", "dense", "ten_crop", "rotations", "augment"]
        assert exported["views"][-1]["augment"]["seed"] == 3
    if rows[-1]["view"] == "chosen":
        assert float(rows[-1]["test_accuracy"]) == found.figures["test"]["ensemble_tta"]["accuracy"]
        assert float(rows[-1]["test_nll"]) == pytest.approx(found.figures["test"]["ensemble_tta"]["nll"])

    table = pyarrow.parquet.read_table(project / "reports/predictions.parquet").to_pydict()
    probabilities = np.stack([table[key] for key in table if key.startswith("prob_")], axis=1)
    split = open_store(project / "data/processed").split("test")
    order = np.random.default_rng(1).permutation(len(split))
    served = load_predictor(project).predict(split.take(order))
    np.testing.assert_allclose(served, probabilities[COUNTS["val"] :][order], atol=1e-6)


def test_the_choice_looks_at_val_alone(project: Path) -> None:
    chosen = run(project, select="greedy")
    on_val = run(project, select="greedy", splits=["val"])
    assert chosen.predictor == on_val.predictor
    assert not [key for row in on_val.tta for key in row if key.startswith("test")]
    again = run(project, select="greedy", splits=["test"])
    assert again.predictor == chosen.predictor and again.exported["test"].tobytes() == chosen.exported["test"].tobytes()


def test_each_gain_is_that_of_a_run_with_this_view(project: Path) -> None:
    rows = {row["view"]: row for row in run(project).tta}
    plain = run(project, tta_views=["identity"])
    assert [row["view"] for row in plain.tta] == ["identity"]
    alone = run(project, tta_views=["identity", "hflip"])
    figures = [found.figures["test"]["ensemble_tta"] for found in (plain, alone)]
    assert rows["hflip"]["test_nll_gain"] == pytest.approx(figures[0]["nll"] - figures[1]["nll"])
    assert rows["hflip"]["test_accuracy_gain"] == pytest.approx(figures[1]["accuracy"] - figures[0]["accuracy"])
    assert rows["identity"]["test_accuracy"] == figures[0]["accuracy"]


def test_views_that_a_member_cannot_take_are_refused_before_any_prediction(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path)
    folder = write_member(tmp_path, store, "a", 0)
    model = json.loads((folder / "model.json").read_text())
    model["normalization"]["kind"] = "standardize_pixel"
    (folder / "model.json").write_text(json.dumps(model))
    classifier, _ = load_classifier(project / "models/a")
    from safetensors.torch import save_file

    weights = {key: value.contiguous() for key, value in classifier.state_dict().items()}
    weights |= {
        f"normalization.{key}": value.repeat(8)
        for key, value in (("scale", weights["normalization.scale"]), ("shift", weights["normalization.shift"]))
    }
    save_file(weights, folder / "weights.safetensors")
    with pytest.raises(UserError, match=r"dense factors=\[1.5\]: member a cannot take images of 12 x 12"):
        evaluate(
            store,
            {"a": folder},
            splits=["val"],
            tta_views=CANDIDATES,
            average="logit",
            combine="vote",
            calibrate="none",
            num_resamples=100,
            seed=0,
        )
    assert "predict" not in capsys.readouterr().err


def test_the_section() -> None:
    values = {"views": CANDIDATES, "average": "log_probability"}
    assert TTAConfig.model_validate(values).select == "none"
    assert TTAConfig.model_validate({**values, "select": "greedy"}).select == "greedy"
