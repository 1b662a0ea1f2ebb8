"""Training runs that are killed, stopped or disturbed go on, and end as if nothing had happened.

`make chaos` does the same at many more moments, on more recipes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.attack import RESUMING, Kill, attack, checkpoints, copy, differences, tracked
from tests.chaos.campaigns import EVERYTHING, SMALL
from tests.pipeline.conftest import Clone, make_clone

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills and looks at processes by /proc")

SHORT: dict[str, Any] = {"trainer__epochs": 5, "ensemble__members": {"a": {"seed": 3}}}
ENDLESS: dict[str, Any] = {**SHORT, "trainer__epochs": 5000, "schedule__name": "plateau"}
STATE = ".anneal/train/a"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """Everything but training has run."""
    clone = make_clone(tmp_path_factory.mktemp("base"))
    clone.set(**SMALL)
    clone.repro("augment")
    return clone


def test_killed_runs_end_like_an_undisturbed_one(base: Clone, tmp_path: Path) -> None:
    kills = [
        Kill("checkpoint half written", 3, "trainer"),
        Kill("mid-batch", 9, "all"),
    ]
    undisturbed = {"hardware__num_workers": 0, "hardware__checkpoint_every": "1 h"}
    reference = copy(base, tmp_path / "reference", {**EVERYTHING, **SHORT, **undisturbed})
    reference.repro("train@a")
    killed = copy(base, tmp_path / "killed", {**EVERYTHING, **SHORT, "hardware__num_workers": 2})
    outcome = attack(killed, kills, tmp_path / "log", "train@a")
    assert outcome.faults == []
    assert outcome.kills == kills
    assert differences(killed, reference) == []
    assert killed.run("dvc", "status", "train@a").stdout.strip() == "Data and pipelines are up to date."


def start(clone: Clone, log: Path) -> subprocess.Popen[bytes]:
    """Start the trainer as the leader of a process group, as a terminal would."""
    foreign = ("MLFLOW_", "DVC_", "OMP_")
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "stages.train", "a"],
            cwd=clone.path,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={key: value for key, value in os.environ.items() if not key.startswith(foreign)},
        )


def wait_for(condition: Any, process: subprocess.Popen[bytes], log: Path, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)


def stop(process: subprocess.Popen[bytes], signum: int, log: Path) -> str:
    """Send a signal as a terminal or a scheduler does, see that the process ends as one expects, return what it said."""
    os.killpg(process.pid, signum)
    assert process.wait(timeout=60) == 128 + signum, (
        log.read_text()
    )  # ten seconds on a machine that has nothing else to do
    text = log.read_text()
    assert "Traceback" not in text
    assert "stopped" in text
    return text


@dataclass
class Interrupted:
    """A run that Ctrl-C has ended."""

    clone: Clone
    said: str
    second: subprocess.CompletedProcess[str]
    """A trainer of the same member that was started beside it."""

    def copy(self, folder: Path) -> Clone:
        shutil.copytree(self.clone.path, folder / "anneal", symlinks=True)
        return Clone(folder / "anneal")


@pytest.fixture(scope="module")
def interrupted(base: Clone, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    folder = tmp_path_factory.mktemp("interrupted")
    clone = copy(base, folder, {**EVERYTHING, **ENDLESS})
    log = folder / "log"
    process = start(clone, log)
    try:
        wait_for(lambda: checkpoints(clone).get("a", 0) > 5, process, log)
        process.send_signal(signal.SIGSTOP)  # it need not work to hold its lock
        second = clone.run("python", "-m", "stages.train", "a", check=False)
        process.send_signal(signal.SIGCONT)
        said = stop(process, signal.SIGINT, log)
    finally:
        process.kill()
    return Interrupted(clone, said, second)


def names(clone: Clone) -> list[str]:
    return sorted(path.name for path in (clone.path / STATE).glob("checkpoint-*"))


def test_ctrl_c_leaves_a_checkpoint_and_a_killed_run(interrupted: Interrupted) -> None:
    assert "resuming" not in interrupted.said
    assert [run.status for run in tracked(interrupted.clone)["train@a"]] == ["KILLED"]
    assert checkpoints(interrupted.clone)["a"] > 5
    assert all(name.endswith(".ckpt") for name in names(interrupted.clone))
    assert not list((interrupted.clone.path / "models").glob("a*"))


def test_a_second_trainer_is_refused(interrupted: Interrupted) -> None:
    second = interrupted.second
    assert second.returncode == 1, second.stdout + second.stderr
    (error,) = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert "another process" in error
    assert "Traceback" not in second.stderr


def test_the_state_is_ignored_by_git_and_dvc(interrupted: Interrupted) -> None:
    clone = interrupted.clone
    assert names(clone)
    assert ".anneal" not in clone.run("git", "status", "--porcelain", "--untracked-files=all").stdout
    assert clone.run("dvc", "check-ignore", ".anneal").stdout.strip() == ".anneal"
    assert ".anneal" not in clone.run("dvc", "status").stdout


@pytest.mark.long
def test_a_stopped_run_goes_on_as_the_same_run(interrupted: Interrupted, tmp_path: Path) -> None:
    """From the checkpoint before the newest, which is cut short."""
    clone, log = interrupted.copy(tmp_path), tmp_path / "log"
    before = checkpoints(clone)["a"]
    newest = clone.path / STATE / names(clone)[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    newest.with_name("checkpoint-9999999999.tmp").write_bytes(b"PK")  # of a trainer that was killed while it wrote
    process = start(clone, log)
    try:
        wait_for(lambda: "resuming" in log.read_text(), process, log)
        wait_for(lambda: checkpoints(clone).get("a", 0) > before + 8, process, log)
        said = stop(process, signal.SIGTERM, log)
    finally:
        process.kill()
    ((_, step),) = RESUMING.findall(said)
    assert 0 < int(step) < before
    assert newest.name in said
    (run,) = tracked(clone)["train@a"]
    assert run.status == "KILLED"
    assert max(Counter(point[:2] for point in run.points).values()) == 1
    steps = [step for key, step, _ in run.points if key == "val/loss"]
    assert steps == sorted(steps)
    assert len(steps) >= 2


@pytest.mark.long
def test_a_changed_recipe_starts_anew_and_leaves_nothing(interrupted: Interrupted, tmp_path: Path) -> None:
    clone = interrupted.copy(tmp_path)
    clone.set(trainer__epochs=2)
    done = clone.run("python", "-m", "stages.train", "a")
    assert "params changed since" in done.stderr
    assert "starting anew" in done.stderr
    assert "resuming" not in done.stderr
    assert len((clone.path / "models/a/history.csv").read_text().splitlines()) == 3
    assert not (clone.path / STATE).exists()
    statuses = sorted(run.status for run in tracked(clone)["train@a"])
    assert statuses == ["FINISHED", "KILLED"]


@pytest.mark.long
def test_ctrl_c_at_the_start(base: Clone, tmp_path: Path) -> None:
    clone, log = copy(base, tmp_path, {**EVERYTHING, **ENDLESS}), tmp_path / "log"
    process = start(clone, log)
    try:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_for(lambda: "libtorch" in maps.read_text(), process, log)
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(timeout=60)
    finally:
        process.kill()
    text = log.read_text()
    assert code in (130, -signal.SIGINT, 1), text
    assert "Traceback" not in text
    assert "stopped" in text
