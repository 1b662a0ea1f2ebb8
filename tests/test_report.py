"""The page: whole, escaped, self-contained; each section from what the stages write, none where they wrote nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anneal import params
from anneal.diagnosis.summary import summarize
from anneal.evaluation import evaluate, write_reports
from anneal.inspection import inspect, write_inspection
from anneal.params import UserError
from anneal.reporting.curves import curves_csv
from anneal.reporting.report.charts import Axis, Line, Mark, draw_lines, draw_matrix, log_ticks, ticks
from anneal.reporting.report.closing import this_execution
from anneal.reporting.report.inputs import Inputs, read_inputs
from anneal.reporting.report.page import SECTIONS, render
from anneal.reporting.report.words import gain
from anneal.reporting.training import initial_csv, rates_csv
from anneal.store import Sample, SplitWriter, Store, finish, open_store, write_json, write_text
from stages.report import SECTIONS as PRINTED
from tests.test_browser import browser_page
from tests.test_diagnosis import AS_STORED, initial, make_run, steps_of
from tests.tiny_project import write_member

ROOT = Path(__file__).resolve().parents[1]
EVIL = "<script>alert(1)</script>"
CLASSES = ["cat", "dog & co", EVIL]
IDS = [
    *("result", "first", "data", "augmentation", "initialization", "training", "gains", "views", "ensemble"),
    *("calibration", "confusion", "mistakes", "label-errors", "near-duplicates", "robustness"),
    *("cost", "recipe", "reproduce"),
]
"""Sections of a whole page, in order."""


def write_leaking_store(root: Path) -> Store:
    """Write a store in which some images of test are copies of training images, a little darker."""
    random = np.random.default_rng(0)
    images: dict[str, np.ndarray] = {}
    for name, count in {"train": 60, "val": 30, "test": 45}.items():
        labels = np.arange(count) % len(CLASSES)
        images[name] = random.integers(0, 200, (count, 8, 8, 3)) // 2 + 40 * labels[:, None, None, None]
    images["test"][:6] = images["train"][:6] * 0.9
    folder = root / "data/processed"
    for name, of in images.items():
        writer = SplitWriter(folder / name, 8, 8, 3)
        for i, image in enumerate(of.astype(np.uint8)):
            writer.add(image, Sample(f"{name}/{EVIL}-{i}.png", "0" * 64, i % len(CLASSES), 8, 8))
        writer.close()
    finish(
        folder,
        classes=CLASSES,
        shape=(8, 8, 3),
        counts={name: len(of) for name, of in images.items()},
        normalize="standardize",
        statistics={"mean": np.full(3, 0.4), "std": np.full(3, 0.2)},
    )
    return open_store(folder)


def write_diagnosis(reports: Path) -> None:
    """Write what diagnose does: one member overfits on a small validation split, the other is sound."""
    overfits = {
        "val_loss": np.linspace(1.0, 2.0, 20),
        "val_accuracy": np.full(20, 0.7),
        "update_ratio": np.full(20, 2e-3),
    }
    steps = {**steps_of(np.linspace(2, 1, 30)), "lr": [0.1] * 30}
    runs = {
        "a": make_run(num_val=30, initial=initial(), steps=steps, **overfits),
        "b": make_run(num_val=30, initial=initial(), steps=steps, **AS_STORED),
    }
    write_json(reports / "diagnosis.json", summarize(runs))
    write_text(reports / "curves.csv", curves_csv({name: run.history for name, run in runs.items()}))
    write_text(reports / "initial.csv", initial_csv({name: run.initial for name, run in runs.items()}))
    write_text(reports / "learning_rate.csv", rates_csv({name: run.steps for name, run in runs.items()}))


def data_report(store: Store) -> dict[str, Any]:
    """What preprocess would say of the store."""
    counts = {name: np.bincount(store.split(name).labels, minlength=3).tolist() for name in store.info.counts}
    return {
        **store.info.counts,
        **{"images": 135, "num_classes": 3, "height": 8, "width": 8, "channels": 3},
        "classes": [{"name": name, **{s: counts[s][i] for s in counts}} for i, name in enumerate(CLASSES)],
        "original_size": {"min_width": 8, "max_width": 10, "min_height": 8, "max_height": 8},
        "num_left_out_by_limit": 0,
        "num_rejected": 1,
        "rejected": [{"source": f"{EVIL}.png", "reason": f"not an image: {EVIL}"}],
        "num_duplicates_removed": 1,
        "num_duplicates_within": {"train": 2, "val": 0, "test": 0},
        "duplicates": [{"removed": f"{EVIL}.png", "from": "train", "kept": "y.png", "in": "test"}],
        "num_conflicting": 2,
        "conflicting": [[{"source": EVIL, "label": "cat"}, {"source": "x.png", "label": EVIL}]],
        "statistics": {"normalize": "standardize", "mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]},
    }


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder reports/ as the stages leave it, of two networks with random weights."""
    from PIL import Image

    root = tmp_path_factory.mktemp("report")
    store = write_leaking_store(root)
    members = {name: write_member(root, store, name, seed) for seed, name in enumerate("ab")}
    folder = root / "reports"
    found = evaluate(
        store,
        members,
        splits=["val", "test"],
        tta_views=["identity", "hflip"],
        average="probability",
        combine="probability_mean",
        calibrate="temperature",
        num_resamples=100,
        seed=0,
    )
    write_reports(found, folder)
    looked = inspect(
        found,
        store,
        members,
        mistakes=4,
        label_errors=0,
        near_duplicates=True,
        robustness={"corruptions": ["noise", "contrast"], "images": 40},
        seed=0,
    )
    looked.json["label_errors"] = noisy_labels()
    write_inspection(looked, folder / "evaluation")
    write_diagnosis(folder)
    write_json(folder / "data.json", data_report(store))
    for name in ("augmentation/overview.png", "preprocessing/images.png"):
        (folder / name).parent.mkdir()
        Image.radial_gradient("L").resize((300, 80)).save(folder / name)
    return folder


def noisy_labels() -> dict[str, Any]:
    """What evaluate says where labels of train are wrong."""
    item = {"split": "train", "source": EVIL, "label": EVIL, "suggested": "cat", "self_confidence": 0.01}
    return {
        "shown": True,
        "splits": {
            "train": {
                "images": 60,
                "suspected": 5,
                "estimated_share": 0.08,
                "share_ci": [0.03, 0.15],
                "method": "folds",
            }
        },
        "items": [{**item, "picture": None}],
        "verdict": "about 8.0 % of the train labels look wrong (95 % interval 3.0 to 15.0 %)",
    }


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    values = params.read_yaml(ROOT / "params.yaml")
    values["ensemble"]["members"] = {"a": {"seed": 0}, "b": {"seed": 1}}
    return {name: values[name] for name in PRINTED}


@pytest.fixture(scope="module")
def inputs(reports: Path, recipe: dict[str, Any]) -> Inputs:
    return read_inputs(reports, recipe, f"seed: 0  # {EVIL}\n")


@pytest.fixture(scope="module")
def page(inputs: Inputs) -> str:
    return render(inputs)


def without(reports: Path, recipe: dict[str, Any], tmp_path: Path, *names: str) -> Inputs:
    """What the page is made from where files are missing."""
    folder = tmp_path / "reports"
    shutil.copytree(reports, folder)
    for name in names:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    return read_inputs(folder, recipe, "seed: 0\n")


class Checker(HTMLParser):
    """Collects tags and sections, and fails on a tag that is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def section(page: str, name: str) -> str:
    """Return a section's HTML."""
    return page.split(f'<section id="{name}">', 1)[1].split("</section>", 1)[0]


def text_of(html: str) -> str:
    """Return what a reader sees, blanks joined."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


# ---- the page -----------------------------------------------------------------------------------------------------------


def test_every_section_is_there_in_order(page: str) -> None:
    assert [attributes["id"] for attributes in Checker(page).of("section")] == IDS
    assert len(IDS) == len(SECTIONS)
    for name in IDS:
        assert f'<a href="#{name}">' in page


def test_page_is_well_formed_and_self_contained(page: str) -> None:
    found = Checker(page)
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in found.of("img"))
    assert len(found.of("img")) > 10
    assert not any(found.of(tag) for tag in ("script", "link", "iframe", "object", "form"))
    assert not re.search(r"https?://", page)
    assert "url(" not in page and "@import" not in page
    policy = next(m["content"] for m in found.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'") and "script" not in str(policy)


def test_every_picture_says_what_it_shows(page: str) -> None:
    found = Checker(page)
    assert all(image["alt"] for image in found.of("img"))
    for svg in found.of("svg"):
        assert svg.get("aria-label") or svg.get("aria-hidden") == "true"


def test_the_same_inputs_give_the_same_bytes(page: str, reports: Path, recipe: dict[str, Any]) -> None:
    assert render(read_inputs(reports, recipe, f"seed: 0  # {EVIL}\n")) == page


def test_names_are_escaped(page: str) -> None:
    assert EVIL not in page
    assert "&lt;script&gt;" in page and "dog &amp; co" in page


# ---- what it says -------------------------------------------------------------------------------------------------------


def test_the_headline_has_interval_and_baselines(page: str, inputs: Inputs) -> None:
    shown = text_of(section(page, "result"))
    figures = inputs.metrics["test"]["ensemble_tta"]
    low, high = figures["accuracy_ci"]
    assert (
        f"{100 * figures['accuracy']:.2f} % test accuracy 95 % interval {100 * low:.2f} to {100 * high:.2f} %" in shown
    )
    linear = inputs.records["baselines"]["linear"]["test"]
    assert f"linear classifier on pixels {100 * linear['accuracy']:.2f} %" in shown
    assert "always the largest class 33.33 %" in shown
    assert re.search(r"this predictor gains .* points [+−]?[0-9.]+ to", shown)


def test_what_to_look_at_first(page: str) -> None:
    shown = text_of(section(page, "first"))
    assert "leak : 6 of 45 test images (13.3 %) have a near copy in train: test figures are too good" in shown
    assert "label noise : about 8.0 % of the train labels look wrong" in shown
    assert re.search(
        r"validation split too small : every member, high confidence; images 30, .*standard error 0\.0", shown
    )
    assert "overfitting : member a" in shown and "Try augment.policy : a stronger one" in shown
    assert "not shown to be better than a linear classifier" in shown
    assert "test split small : its 45 images" in shown
    assert "contradicting labels : 2 images" in shown and "rejected files : 1 file" in shown
    # The figures cannot be believed before these are seen.
    assert shown.index("leak") < shown.index("validation split") < shown.index("overfitting")


def test_a_sound_run_says_what_was_checked(
    inputs: Inputs, reports: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    sound = {"suspected": 0, "estimated_share": 0.0, "share_ci": [0.0, 0.005], "images": 60}
    labels = {"shown": False, "splits": {"train": sound}, "items": [], "verdict": "no wrong labels shown in train"}
    pairs = {
        "splits": {"test": {"images": 45, "with_duplicate_in_train": 0, "share": 0.0, "leak": False}},
        "pairs": [],
        "verdict": "no copies",
    }
    figures = {"accuracy": 0.99, "accuracy_ci": [0.985, 0.995]}
    member = {"epochs": 20, "findings": []}
    found = Inputs(
        metrics={"test": {"members": {}, "ensemble_tta": figures}},
        data={**inputs.data, "num_rejected": 0, "num_conflicting": 0},
        diagnosis={"members": {"a": member, "b": member}},
        recipe=recipe,
        recipe_text="",
        records={"label_errors": labels, "near_duplicates": pairs},
    )
    shown = text_of(section(render(found), "first"))
    assert "Nothing stands out." in shown
    assert "no finding in the learning curves; no copies; no wrong labels shown in train." in shown


def test_nothing_wrong_and_nothing_judged_are_said_so(inputs: Inputs) -> None:
    none = {"split": "test", "images": 45, "count": 0, "errors": [], "confused": []}
    unjudged = {"shown": False, "splits": {}, "items": [], "verdict": "no label errors shown (too many mistakes)"}
    found = replace(inputs, records={**inputs.records, "mistakes": none, "label_errors": unjudged})
    page = render(found)
    assert text_of(section(page, "mistakes")) == "Mistakes None of 45 test images is wrong."
    assert "<table" not in section(page, "label-errors") and unjudged["verdict"] in section(page, "label-errors")
    assert str(unjudged["verdict"]) not in section(page, "first")


def test_findings_are_marked_on_the_curves(page: str) -> None:
    curves = section(page, "training")
    assert curves.count('class="mark ') >= 4  # on the loss and on the accuracy
    assert ">overfitting</text>" in curves and ">validation split too small</text>" in curves
    assert "Seen: gap" in text_of(curves)
    assert "optimizer step" in curves and "Norm of the gradient" in curves


def test_no_gain_stands_without_its_interval(page: str) -> None:
    shown = section(page, "gains")
    rows = re.findall(r"<tr><td>.*?</tr>", shown, re.S)
    assert len(rows) >= 5
    for row in rows:
        assert re.search(r'points<br><small class="ends">[+−]?[0-9.]+ to [+−]?[0-9.]+</small>', row), row
        assert re.search(r'class="badge (good|bad|none)">(better|worse|no difference shown)<', row), row
    assert "no difference shown" in shown


def test_a_gain_in_nll_is_a_fall_of_it(page: str, inputs: Inputs) -> None:
    """More is better in every column of gains."""
    row = next(row for row in inputs.rows("comparisons", inputs.split) if abs(row["nll_difference"]) > 1e-3)
    sign = "+" if row["nll_difference"] < 0 else "−"
    assert f"{sign}{abs(row['nll_difference']):.4f}" in section(page, "gains")


def test_a_soup_that_there_is_not_says_why() -> None:
    from anneal.reporting.report.prediction import _soups

    (block,) = _soups({"uniform": {"members": ["a", "b"]}, "greedy": {"omitted": "the members are of other shapes"}})
    assert "no greedy soup: the members are of other shapes; uniform soup of a, b." in str(block)


def test_the_other_sections_say_what_the_files_do(page: str, inputs: Inputs) -> None:
    assert "60 train, 30 val, 45 test images of 3 classes, 8x8 colour" in text_of(section(page, "data"))
    assert "hflip" in section(page, "views") and "passes" in section(page, "views")
    assert "member" in section(page, "ensemble") and "forward passes" in section(page, "ensemble")
    assert "temperature" in section(page, "calibration") and "Risk by coverage" in section(page, "calibration")
    wrong = inputs.records["mistakes"]["count"]
    assert f"{wrong} of 45 test images are wrong" in text_of(section(page, "confusion"))
    assert section(page, "mistakes").count("saliency of") == 4
    assert "rather" in section(page, "label-errors")
    assert section(page, "near-duplicates").count('class="card"') == 6
    assert "noise" in section(page, "robustness") and "severity" in section(page, "robustness")
    assert "2 networks over 2 views" in text_of(section(page, "cost"))
    assert "dvc plots diff" in section(page, "reproduce")


@pytest.mark.parametrize(
    ("names", "gone"),
    [
        (["evaluation/mistakes.json", "evaluation/robustness.csv"], ["mistakes", "robustness"]),
        (["evaluation/label_errors.json", "evaluation/near_duplicates.json"], ["label-errors", "near-duplicates"]),
        (["initial.csv", "curves.csv", "learning_rate.csv"], ["initialization", "training"]),
        (["augmentation/overview.png", "preprocessing"], ["augmentation"]),
        (
            ["evaluation"],
            [
                *("gains", "views", "ensemble", "calibration", "confusion", "mistakes", "label-errors"),
                *("near-duplicates", "robustness", "cost"),
            ],
        ),
    ],
)
def test_what_is_absent_is_left_out(
    names: list[str], gone: list[str], reports: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    found = Checker(render(without(reports, recipe, tmp_path, *names)))
    assert [attributes["id"] for attributes in found.of("section")] == [name for name in IDS if name not in gone]


def test_a_missing_or_damaged_file_is_one_line(reports: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.json: no such file; run `dvc repro report`"):
        without(reports, recipe, tmp_path, "metrics.json")
    (tmp_path / "reports/metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        read_inputs(tmp_path / "reports", recipe, "")
    (tmp_path / "reports/metrics.json").write_text("{}")
    (tmp_path / "reports/evaluation/tta.csv").write_text("view,passes\nidentity,many\n")
    with pytest.raises(UserError, match=r"tta\.csv is damaged"):
        read_inputs(tmp_path / "reports", recipe, "")


def test_without_a_split_or_a_baseline_it_still_renders(inputs: Inputs, recipe: dict[str, Any]) -> None:
    found = Inputs({}, inputs.data, inputs.diagnosis, recipe, "")
    assert "No split was evaluated" in render(found)


# ---- this execution -----------------------------------------------------------------------------------------------------

EXECUTION = {
    "stages": [
        {"stage": "train", "member": "a", "seconds": 12.0, "attempt": 2, "earlier": False},
        {"stage": "preprocess", "member": None, "seconds": 3.0, "attempt": 1, "earlier": True},
    ],
    "environment": {"processor": f"X 9000 {EVIL}"},
    "commit": "0123abc",
    "test_uses": 7,
}


def test_the_copy_of_mlflow_says_when_and_where(page: str, inputs: Inputs) -> None:
    copy = render(inputs, EXECUTION)
    assert [attributes["id"] for attributes in Checker(copy).of("section")] == [*IDS, "execution"]
    shown = text_of(section(copy, "execution"))
    assert "train a 12.0 s 100 attempt 2" in shown  # 60 images x 20 epochs in 12 s
    assert "preprocess 3.0 s 45 taken from DVC" in shown
    assert "test set used by 7 recipes" in shown
    assert EVIL not in copy and "X 9000" in shown and "0123abc" in shown
    assert 'id="execution"' not in page


def test_what_nobody_knows_is_left_out(inputs: Inputs) -> None:
    shown = this_execution(inputs, {"stages": [], "environment": {}, "commit": None, "test_uses": None})
    assert not shown.blocks


@pytest.mark.long
def test_without_mlflow_the_page_is_the_same_and_soon_there(reports: Path, tmp_path: Path) -> None:
    for name in ("params.yaml", "params.schema.json"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(reports, tmp_path / "reports")
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "stages.report"],
        cwd=tmp_path,
        env={**os.environ, **away},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "are kept" in done.stderr
    assert 'id="execution"' not in (tmp_path / "reports/report.html").read_text(encoding="utf-8")


# ---- charts -------------------------------------------------------------------------------------------------------------


def test_a_line_breaks_where_nothing_was_measured_and_stays_in_the_picture() -> None:
    values = [1.0, float("nan"), 3.0, 1e30, float("inf"), 2.0]
    svg = draw_lines([Line("a", list(range(6)), values)], Axis("x"), Axis("y", high=4.0), alt="a chart")
    path = re.search(r'class="line s0" d="([^"]*)"', svg)
    assert path is not None and path[1].count("M") == 3 and path[1].count("L") == 1
    assert all(abs(float(number)) < 1000 for number in re.findall(r"-?[0-9.]+", path[1]))
    assert "nan" not in svg and "inf" not in svg


def test_logarithmic_axes_leave_out_what_is_not_positive() -> None:
    svg = draw_lines([Line("a", [1, 2, 3], [0.0, 0.01, 10.0])], Axis("x"), Axis("y", log=True), alt="a chart")
    path = re.search(r'd="([^"]*)"', svg)
    assert path is not None and path[1].count("M") + path[1].count("L") == 2
    assert log_ticks(1e-12, 1e12)[0] == 1e-12 and len(log_ticks(1e-12, 1e12)) <= 7


@pytest.mark.parametrize("values", [[0.5], [2.0, 2.0], [0.0, 0.0], [-3.0, 1e-9]])
def test_flat_and_single_values_have_a_scale(values: list[float]) -> None:
    svg = draw_lines([Line("a", list(range(len(values))), values)], Axis("x", whole=True), Axis("y"), alt="a chart")
    assert "nan" not in svg and '<path class="line' in svg
    assert ticks(-1.0, 1.0) == [-1.0, -0.5, 0.0, 0.5, 1.0]


@pytest.mark.parametrize(("value", "axis"), [(1.0, Axis(high=1.0)), (0.0, Axis(low=0.0)), (0.0, Axis(high=1.0))])
def test_a_flat_line_at_the_end_of_its_axis_does_not_lengthen_it(value: float, axis: Axis) -> None:
    svg = draw_lines([Line("a", [1, 2], [value, value])], Axis("x"), axis, alt="a chart")
    numbers = [float(text.replace("−", "-")) for text in re.findall(r'class="end">([^<]*)<', svg)]
    assert len(numbers) >= 3
    assert axis.high is None or max(numbers) <= axis.high
    assert axis.low is None or min(numbers) >= axis.low


def test_marks_of_one_name_share_a_row() -> None:
    marks = [Mark("overfitting", 3, 5, 0), Mark("overfitting", 4, 5, 1), Mark("slow start", 1, 2, 0)]
    svg = draw_lines([Line("a", [1, 5], [0, 1])], Axis("x"), Axis("y"), alt="a chart", marks=marks)
    assert svg.count('class="mark ') == 3 and svg.count(">overfitting<") == 1 and svg.count(">slow start<") == 1


def test_the_confusion_matrix_of_many_classes_stays_small() -> None:
    counts = np.zeros((100, 100), int)
    counts[np.arange(100), np.arange(100)] = 20
    counts[3, 7] = 5
    few = draw_matrix(counts[:10, :10].tolist(), [f"class {i}" for i in range(10)], alt="ten")
    many = draw_matrix(counts.tolist(), [EVIL] * 100, alt="a hundred")
    assert few.count("<rect") == 1 + 11 and ">20</text>" in few and ">class 3</text>" in few
    assert many.count("<rect") == 1 + 101 and EVIL not in many and len(many) < 50_000


def test_a_gain_is_drawn_around_zero() -> None:
    cell = gain(0.01, -0.02, 0.04, reach=0.04, verdict="no difference shown")
    assert '<strong>+1.00</strong> points<br><small class="ends">−2.00 to +4.00</small>' in cell
    assert 'x1="32.0"' in cell and 'x2="116.0"' in cell and 'cx="74.0"' in cell
    assert 'class="badge none">no difference shown' in cell
    beyond = gain(-0.9, -0.95, -0.8, reach=0.1, verdict="worse")
    assert beyond.count('"4.0"') == 3


def test_inputs_are_plain_values(inputs: Inputs) -> None:
    json.dumps([inputs.metrics, inputs.records, inputs.tables, inputs.curves, inputs.rates, inputs.initial])
    assert {row["actual"] for row in inputs.tables["confusion"]} <= set(CLASSES)


# ---- in a browser -------------------------------------------------------------------------------------------------------

SIDEWAYS = """() => [...document.querySelectorAll("body *")]
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".wide, pre"))
    .map((e) => e.tagName + "." + e.getAttribute("class") + " " + (e.textContent || "").slice(0, 40))"""
UNLOADED = "() => [...document.images].filter((i) => !(i.complete && i.naturalWidth && i.alt)).map((i) => i.outerHTML.slice(0, 200))"
FAINT = """() => {
    const light = (c) => {
        const [r, g, b] = c.match(/[0-9.]+/g).map((v) => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const ground = light(getComputedStyle(document.body).backgroundColor);
    const texts = [...document.querySelectorAll("p, td, th, li, a, summary, figcaption, small, .badge, pre, svg.chart text:not(.strong)")];
    return [...new Set(texts.map((e) => {
        const style = getComputedStyle(e), ink = light(e.closest("svg.chart") ? style.fill : style.color);
        const ratio = (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05);
        return ratio < 4.5 ? `${e.tagName}.${e.getAttribute("class")} ${ratio.toFixed(2)}` : null;
    }).filter(Boolean))];
}"""
"""Texts whose contrast is below WCAG's 4.5 to 1."""


def test_a_phone_and_a_wide_screen_show_it_in_light_and_in_dark(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(render(inputs, EXECUTION), encoding="utf-8")
    kept = os.environ.get("ANNEAL_SCREENSHOTS")  # a screenshot of the whole page takes a second
    out = Path(kept or tmp_path) / "report"
    out.mkdir(parents=True, exist_ok=True)
    with browser_page() as page:
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        page.goto((tmp_path / "report.html").as_uri())
        for width in (1280, 360):
            page.set_viewport_size({"width": width, "height": 900})
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                for is_open in ("false", "true"):
                    page.evaluate(f"() => document.querySelectorAll('details').forEach((d) => d.open = {is_open})")
                    size = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
                    assert size[0] <= size[1], page.evaluate(SIDEWAYS)
                assert page.evaluate(UNLOADED) == []
                assert page.evaluate(FAINT) == []
                if kept:
                    page.screenshot(path=out / f"{width}-{scheme}.png", full_page=True)
        page.locator("nav a[href='#confusion']").click()
        assert page.locator("#confusion h2").is_visible()
        page.emulate_media(media="print", color_scheme="light")
        assert len(page.pdf(path=out / "print.pdf", format="A4")) > 10_000
        assert said == []
