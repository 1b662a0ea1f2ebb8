"""The command line: what it prints, and how it says no."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anneal import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("params.yaml", "params.schema.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anneal.cli", *arguments]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


def edit(project: Path, old: str, new: str) -> None:
    file = project / "params.yaml"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_check_resolves_every_member(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(project, "    c: {seed: 2}", "    c: {seed: 2, batch: {size: 64}, optimizer: {name: AdamW}}")
    assert cli.main(["check"]) == 0
    out = capsys.readouterr().out
    assert "data/digits.zip (archive): 1,259 train, 179 val, 359 test; 10 classes" in out
    assert "seed 1; resnet; batch 32 = 32 x 1 device x 1 accumulated; 40 steps an epoch, 1,200 steps in all" in out
    assert "seed 2; resnet; batch 64 = 32 x 1 device x 2 accumulated; 20 steps an epoch, 600 steps in all; AdamW" in out
    assert "warm-up 60 steps, then cosine" in out


def test_scaled_peak_rate(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(project, "lr_scaling: none", "lr_scaling: linear")
    edit(project, "  size: 32  ", "  size: 64  ")
    cli.main(["check"])
    assert "peak rate 0.1," in capsys.readouterr().out


def test_balancing_copies_count_as_training_images(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(project, "balance: false", "balance: true")
    cli.main(["check"])
    assert "40 steps an epoch" in capsys.readouterr().out  # 10 classes x 128 = 1,280 images


def test_a_fault_of_a_member_names_it(project: Path) -> None:
    edit(project, "    b: {seed: 1}", "    b: {seed: 1, batch: {size: 4096}}")
    assert "params.yaml: ensemble.members.b.batch.size: found 4096" in run(project, "check").stderr
    edit(project, "    b: {seed: 1, batch: {size: 4096}}", "    b: {optimizer: {name: AdamX}}")
    fault = 'params.yaml: ensemble.members.b.optimizer.name: found "AdamX", allowed: SGD | Adagrad | '
    assert fault in run(project, "check").stderr
    edit(project, "    b: {optimizer", "    1: {optimizer")
    assert "ensemble.members.1: found a name that is no text" in run(project, "check").stderr


def test_brief_is_one_line(project: Path) -> None:
    assert run(project, "check", "--brief").stdout == "params.yaml is valid\n"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("  name: resnet ", "  name: resnt ", "did you mean 'resnet'?"),
        ("views: [identity]", "views: [hflop]", "did you mean 'hflip'?"),
        ("policy: light", "policy: [{HorizontalFlip: {q: 1}}]", "augment.policy[0].HorizontalFlip"),
        ("devices: auto", "devices: 3", "batch"),
        ("  path: data/digits.zip", "  path: data/digit.zip", "data.path: data/digit.zip does not exist"),
    ],
)
def test_check_refuses(project: Path, old: str, new: str, fault: str) -> None:
    edit(project, old, new)
    done = run(project, "check")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert fault in done.stderr


def test_recipe_lists_and_writes(project: Path) -> None:
    out = run(project, "recipe").stdout
    for name in ("digits", "fashion-mnist-fast", "photos"):
        assert f"  {name}" in out
    done = run(project, "recipe", "photos")
    assert "+  path: data/photos" in done.stdout
    assert "put your images at data/photos" in done.stdout
    assert run(project, "recipe", "photo").stderr.endswith("did you mean 'photos'?\n")
    assert "already says" in run(project, "recipe", "photos").stdout


def test_no_command_is_help(project: Path) -> None:
    done = run(project)
    assert done.returncode == 2
    for command in ("check", "recipe", "summary", "predict", "ui"):
        assert command in done.stdout


def test_outside_a_project(tmp_path: Path) -> None:
    done = run(tmp_path, "check")
    assert done.returncode == 1
    assert done.stderr == "error: params.yaml: no such file; run from the folder that holds dvc.yaml\n"


def test_predict_needs_a_positive_top(project: Path) -> None:
    assert "--top: found 0" in run(project, "predict", "--top", "0", "x.png").stderr


# ---- the schedule ---------------------------------------------------------------------------------------------------


def test_check_says_the_schedule_in_words(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(project, "    a: {seed: 0}", "    a: {schedule: {name: one_cycle, one_cycle: {end: 0.1}}}")
    edit(project, "    b: {seed: 1}", "    b: {schedule: {name: plateau, warmup: {length: 0}}}")
    edit(project, "    c: {seed: 2}", "    c: {schedule: {name: step, floor: 0.2, warmup: {length: 10 steps}}}")
    cli.main(["check"])
    a, b, c = capsys.readouterr().out.splitlines()[-3:]
    assert a.endswith("peak rate 0.05, warm-up 60 steps, then one_cycle to 0.005, momentum 0.95 to 0.85 and back")
    assert b.endswith("warm-up 0 steps, then plateau: x 0.2 after 4 epochs without a lower validation loss")
    assert c.endswith("warm-up 10 steps, then step to 0.01")


def test_check_claims_no_momentum_where_there_is_none(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(project, "    a: {seed: 0}", "    a: {optimizer: {name: Adagrad}, schedule: {name: one_cycle}}")
    edit(project, "    b: {seed: 1}", "    b: {optimizer: {name: Rprop}}")
    cli.main(["check"])
    a, b, _ = capsys.readouterr().out.splitlines()[-3:]
    assert "one_cycle" in a and "momentum" not in a
    assert b.endswith("Rprop, peak rate 0.001, warm-up 0 steps, then constant to 0.001")


def test_check_draws_the_schedule(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", "--brief", "--plot"])
    assert capsys.readouterr().out == "params.yaml is valid\ndrew studies/schedule.png\n"
    cli.main(["check", "--plot", "there/here.png"])
    pictures = [project / "studies/schedule.png", project / "there/here.png"]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    edit(project, "    b: {seed: 1}", "    b: {schedule: {name: linear}}")
    cli.main(["check", "--plot"])
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    assert [path.name for path in pictures[0].parent.iterdir()] == ["schedule.png"]


def test_a_picture_that_cannot_be_written(project: Path) -> None:
    assert (
        run(project, "check", "--plot", "a.pdf").stderr
        == "error: --plot: found a.pdf, allowed: a file that ends in .png\n"
    )
    (project / "file").write_text("")
    assert run(project, "check", "--plot", "file/a.png").stderr.startswith("error: --plot: file/a.png: ")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"lr_scaling: none": "lr_scaling: linear", "  size: 32  ": "  size: 64  ", "length: 0.05": "length: 0.0"},
            "batch.lr_scaling: found linear, which makes the rate of batch.size 64 2 times that of reference_size 32",
        ),
        ({"  name: cosine  ": "  name: step  ", "every: 0.3": "every: 0.0"}, "schedule.step.every: found 0.0, 0 of"),
        ({"  name: cosine  ": "  name: cosin  "}, "did you mean 'cosine'?"),
    ],
)
def test_check_refuses_a_schedule(project: Path, changes: dict[str, str], fault: str) -> None:
    for old, new in changes.items():
        edit(project, old, new)
    done = run(project, "check")
    assert done.returncode == 1 and done.stdout == ""
    assert all(fault in line for line in done.stderr.splitlines()) and done.stderr.startswith("error: ")
