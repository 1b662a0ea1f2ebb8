"""Learning curves made to show one thing each, and what the rules find in them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from anneal.diagnosis import RULES, Run, diagnose, read_history, summarize, training_words
from anneal.params import UserError
from anneal.reporting.curves import COLOURS, curves_csv, draw_curves


def make_run(*, epochs: int = 20, num_val: int = 1000, lr_end: float = 0.0, **options) -> Run:
    """Curves of a run without fault, its columns replaced by ``options`` that name one."""
    t = np.linspace(0, 1, epochs)
    columns = {
        "train_loss": 0.2 + 1.8 * np.exp(-8 * t),
        "val_loss": 0.25 + 1.8 * np.exp(-10 * t),
        "train_accuracy": 0.97 - 0.8 * np.exp(-8 * t),
        "val_accuracy": 0.95 - 0.8 * np.exp(-10 * t),
        "lr": np.linspace(0.1, lr_end, epochs),
        "grad_norm": np.ones(epochs),
        "epoch": np.arange(1, epochs + 1),
        "step": 10 * np.arange(1, epochs + 1),
    }
    optional = ("train_eval_loss", "train_eval_accuracy", "val_average_loss", "val_average_accuracy")
    columns.update({name: options.pop(name) for name in list(options) if name in columns or name in optional})
    history = {name: [float(v) for v in column] for name, column in columns.items()}
    return Run(history, num_val=num_val, num_classes=10, **options)


T = np.linspace(0, 1, 20)
JUMPS = 0.9 + 0.06 * np.array([-1, 1] * 10)

FAULTY = {
    "diverging": {"train_loss": [1.0] * 19 + [5.0]},
    "underfitting": {"train_accuracy": 0.5 - 0.3 * np.exp(-8 * T), "val_accuracy": 0.49 - 0.3 * np.exp(-10 * T)},
    "overfitting": {"val_loss": 0.5 + 2 * (T - 0.3) ** 2, "train_accuracy": np.ones(20), "val_accuracy": 0.8 + 0 * T},
    "stopped_too_early": {"val_loss": 2 - T, "lr_end": 0.1},
    "noisy_validation": {"val_accuracy": JUMPS},
}


def test_a_healthy_run_has_no_findings() -> None:
    assert diagnose(make_run()) == []


@pytest.mark.parametrize("name", RULES)
def test_each_rule_finds_its_fault_and_no_other_does(name: str) -> None:
    findings = diagnose(make_run(**FAULTY[name]))
    assert [finding.name for finding in findings] == [name]
    assert findings[0].evidence and findings[0].change


def test_a_loss_that_is_no_number_is_diverging_for_certain() -> None:
    run = make_run(train_loss=[1.0] * 5 + [float("nan")] * 15, val_loss=[float("inf")] * 20)
    (finding,) = diagnose(run)
    assert (finding.name, finding.confidence) == ("diverging", "high")
    assert finding.evidence["first_broken_epoch"] == 1
    json.dumps(summarize({"a": run}), allow_nan=False)


def test_advice_names_the_keys_of_the_recipe() -> None:
    run = make_run(**FAULTY["underfitting"], optimizer="AdamW", model="convnet")
    assert {"optimizer.AdamW.lr", "model.convnet"} <= diagnose(run)[0].change.keys()


def test_training_accuracy_is_not_trusted_where_it_is_distorted() -> None:
    assert diagnose(make_run(**FAULTY["underfitting"], distorted=False))[0].confidence == "medium"
    assert diagnose(make_run(**FAULTY["underfitting"], distorted=True))[0].confidence == "low"
    assert diagnose(make_run(**FAULTY["underfitting"], mixed=True)) == []
    chance = make_run(train_accuracy=[0.1] * 20, val_accuracy=[0.11] * 20, mixed=True)
    assert [(f.name, f.confidence) for f in diagnose(chance)] == [("underfitting", "high")]


def test_images_as_stored_are_read_where_they_were_measured() -> None:
    """Augmented training looks like underfitting, or hides a gap; what the images say as they are stored counts."""
    augmented = {"train_accuracy": [0.6] * 20, "val_accuracy": [0.93] * 20}
    assert [f.name for f in diagnose(make_run(**augmented))] == ["underfitting"]
    assert diagnose(make_run(**augmented, train_eval_accuracy=[0.96] * 20)) == []
    hidden = augmented | {"val_accuracy": [0.8] * 20, "train_eval_accuracy": [0.5] * 19 + [1.0]}
    (finding,) = diagnose(make_run(**hidden))
    assert finding.name == "overfitting" and finding.evidence["gap"] == pytest.approx(0.2)
    low = {"train_eval_accuracy": [0.5] * 20, "val_accuracy": [0.49] * 20}
    assert [(f.name, f.confidence) for f in diagnose(make_run(**low, mixed=True))] == [("underfitting", "medium")]
    run = make_run(**augmented, train_eval_accuracy=[0.96] * 20, mixed=True)
    assert summarize({"a": run})["members"]["a"]["last_gap"] == pytest.approx(0.03)


def test_images_as_stored_that_were_not_measured_change_nothing() -> None:
    for name, faulty in FAULTY.items():
        without = make_run(**faulty, train_eval_accuracy=[float("nan")] * 20)
        assert diagnose(without) == diagnose(make_run(**faulty)), name
    mixed = make_run(mixed=True, train_eval_accuracy=[float("nan")] * 20)
    assert summarize({"a": mixed})["members"]["a"]["last_gap"] is None


def test_a_sample_of_training_images_has_an_error_too() -> None:
    """As large as the validation split: sqrt(0.9 0.1 / n + 0.75 0.25 / n)."""
    sample = {"train_eval_accuracy": [0.9] * 20, "val_accuracy": [0.75] * 20}
    assert make_run(**sample, num_val=100).standard_error_of_gap == pytest.approx(0.0527, abs=1e-4)
    assert "overfitting" in [f.name for f in diagnose(make_run(**sample, num_val=55))]
    assert "overfitting" not in [f.name for f in diagnose(make_run(**sample, num_val=45))]


def test_what_training_figures_are_measured_on() -> None:
    off = {"alpha": 0.0, "probability": 1.0}
    plain = {"mixup": off, "cutmix": off, "label_smoothing": 0.0, "dropout": 0.0}
    assert training_words("none", plain) == training_words([], plain) == []
    assert training_words(["Rotate"], plain | {"cutmix": {"alpha": 1.0}}) == ["augmented", "mixed"]
    assert training_words("none", plain | {"mixup": {"alpha": 1.0, "probability": 0.0}}) == []
    everything = {"label_smoothing": 0.1, "spatial_dropout": 0.1, "stochastic_depth": 0.1, "input_noise": 0.1}
    assert training_words("none", plain | everything) == ["smoothed", "dropout", "stochastic depth", "noise"]


def test_a_gap_within_the_sampling_error_is_no_finding() -> None:
    gap = {"train_accuracy": [0.95] * 20, "val_accuracy": [0.83] * 20}
    assert [f.name for f in diagnose(make_run(**gap, num_val=1000))] == ["overfitting"]
    assert diagnose(make_run(**gap, num_val=30)) == []


def test_both_faults_are_named_where_both_are_there() -> None:
    run = make_run(train_accuracy=[0.5] * 20, val_accuracy=[0.3] * 20)
    assert [finding.name for finding in diagnose(run)] == ["underfitting", "overfitting"]


def test_overconfidence_alone_is_low_confidence_overfitting() -> None:
    rising = {"val_loss": 0.5 + 0.4 * (T - 0.3) ** 2, "val_accuracy": 0.93 + 0.01 * T}
    (finding,) = diagnose(make_run(**rising))
    assert (finding.name, finding.confidence) == ("overfitting", "low")


def test_the_fall_that_annealing_brings_is_expected() -> None:
    falling = {"val_loss": 1.0 - 0.3 * T}
    assert [f.name for f in diagnose(make_run(**falling, lr_end=0.1))] == ["stopped_too_early"]
    assert diagnose(make_run(**falling, lr_end=0.0)) == []


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_short_runs_are_no_error(epochs: int) -> None:
    summary = summarize({"a": make_run(epochs=epochs)})
    assert summary["members"]["a"]["epochs"] == epochs


def test_summary_counts_findings_at_the_top() -> None:
    runs = {"a": make_run(), "b": make_run(**FAULTY["overfitting"]), "c": make_run(**FAULTY["overfitting"])}
    summary = summarize(runs)
    assert (summary["healthy"], summary["overfitting"], summary["diverging"]) == (1, 2, 0)
    assert list(summary["members"]) == ["a", "b", "c"]
    assert summary["members"]["b"]["lowest_val_loss_epoch"] == 7
    assert summary["members"]["b"]["findings"][0]["change"][0]["key"] == "augment.policy"


def test_history_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a" / "history.csv"
    with pytest.raises(UserError, match="missing"):
        read_history(path)
    path.parent.mkdir()
    path.write_text("epoch,val_loss\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds no epoch; run `dvc repro --force train@a`"):
        read_history(path)
    path.write_text("epoch,val_loss\n1,0.5\n2,nan\n", encoding="utf-8")
    assert read_history(path)["epoch"] == [1.0, 2.0]


def test_empty_cells_of_a_history_are_not_numbers(tmp_path: Path) -> None:
    run = make_run(epochs=2)
    columns = [*run.history, "update_cosine", "noise_scale"]
    rows = [[repr(run.history[name][i]) for name in run.history] + [cosine, ""] for i, cosine in enumerate(("", "0.5"))]
    path = tmp_path / "history.csv"
    path.write_text("\n".join(",".join(row) for row in [columns, *rows]) + "\n", encoding="utf-8")
    found = read_history(path)
    assert np.isnan(found["update_cosine"][0]) and found["update_cosine"][1] == 0.5
    assert np.isnan(found["noise_scale"]).all()
    whole = Run(found, num_val=1000, num_classes=10)
    assert diagnose(whole) == diagnose(run)
    assert curves_csv({"a": found}) == curves_csv({"a": run.history})


def test_curves_have_a_column_for_each_member(tmp_path: Path) -> None:
    histories = {"a": make_run(epochs=3).history, "b": make_run(epochs=5).history}
    rows = list(csv.DictReader(curves_csv(histories).splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [row["a_val_loss"] != "" for row in rows] == [True, True, True, False, False]
    assert float(rows[4]["b_val_loss"]) == histories["b"]["val_loss"][4] == float(rows[4]["val_loss"])
    both = histories["a"]["lr"][1] + histories["b"]["lr"][1]
    assert float(rows[1]["lr"]) == pytest.approx(both / 2)
    for name in ("one.png", "two.png"):
        draw_curves(histories, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_curves_hold_what_some_members_measured() -> None:
    """An empty cell where nothing was measured; the mean is over the members that have it."""
    nan = float("nan")
    histories = {
        "a": make_run(epochs=3, train_eval_loss=[3.0, 2.0, 1.0]).history,
        "b": make_run(epochs=3, train_eval_loss=[5.0, 4.0, 3.0], val_average_loss=[nan, 0.5, 0.25]).history,
        "c": make_run(epochs=3).history,
    }
    rows = list(csv.DictReader(curves_csv(histories).splitlines()))
    assert [row["train_eval_loss"] for row in rows] == ["4.0", "3.0", "2.0"]
    assert [row["val_average_loss"] for row in rows] == ["", "0.5", "0.25"]
    assert [row["c_train_eval_loss"] for row in rows] == [row["train_eval_accuracy"] for row in rows] == [""] * 3
    assert "val_average_accuracy" not in rows[0]
    plain = next(csv.DictReader(curves_csv({"c": histories["c"]}).splitlines()))
    assert plain["train_eval_loss"] == "" and "val_average_loss" not in plain


def test_the_legend_says_what_training_is_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    seen: list[str] = []
    legend = Axes.legend
    monkeypatch.setattr(
        Axes,
        "legend",
        lambda axes, *, handles, **options: (
            seen.extend(handle.get_label() for handle in handles),
            legend(axes, handles=handles, **options),
        ),
    )
    histories = {
        "a": make_run(epochs=3, train_eval_loss=[3.0, 2.0, 1.0]).history,
        "b": make_run(epochs=3, val_average_accuracy=[0.1, 0.2, 0.3]).history,
    }
    words = {"a": "augmented, mixed", "b": "augmented, mixed"}
    draw_curves(histories, tmp_path / "same.png", measured_on=words)
    assert seen == ["a", "b", "train (augmented, mixed)", "train (as stored)", "val", "val (averaged weights)"]
    seen.clear()
    draw_curves(
        {"a": make_run(epochs=3).history, "b": histories["a"]}, tmp_path / "other.png", measured_on={"a": "mixed"}
    )
    assert seen == ["a", "b", "train (as trained on)", "train (as stored)", "val"]
    assert (tmp_path / "same.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_pictures_take_many_members(tmp_path: Path) -> None:
    draw_curves({f"m{i}": make_run(epochs=2).history for i in range(len(COLOURS) + 3)}, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 1000
