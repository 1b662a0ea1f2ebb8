"""Run a pipeline that is killed again and again, and compare it with one that is not."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.moments import MOMENTS
from tests.pipeline.conftest import Clone

HOOK = Path(__file__).parent / "hook"

EVERY = 2
"""Optimizer steps from one checkpoint to the next."""

PATIENCE = 500.0
"""Seconds that one `dvc repro` may take, and within which a trainer whose dvc was killed must end."""

RESUMING = re.compile(r"^(?:train@)?(\w+): resuming .*?(\d+)$", re.MULTILINE)
"""What a trainer says when it goes on from a checkpoint: its member, and the optimizer steps made."""

VOLATILE = re.compile(r"process|journal|predictor\.uri|mlflow\..*|DVC_.*|git\..*|resumed.*|environment.*")
"""Tags of a run that say where and when it was made, or have a name that MLflow drew."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL of ``whom`` at the ``call``-th call that ``moment`` names."""

    moment: str
    call: int
    whom: str

    def __str__(self) -> str:
        return f"{self.moment} {self.call} of {self.whom}"


def draw(kills: Sequence[tuple[str, str]], seed: int) -> list[Kill]:
    """Choose the calls for moments and victims."""
    numbers = random.Random(seed)
    return [Kill(moment, numbers.randint(*MOMENTS[moment].calls), whom) for moment, whom in kills]


@dataclass
class Outcome:
    """What came of a campaign.

    Parameters
    ----------
    kills
        Those that have happened.
    faults
        In which the run differs from what is promised; none where all is well.
    repeated
        Optimizer steps that were made more than once.
    """

    kills: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    repeated: int = 0


def attack(clone: Clone, kills: Sequence[Kill], folder: Path, *targets: str) -> Outcome:
    """Run `dvc repro` as often as there are kills, and once more to the end.

    Parameters
    ----------
    clone
        Whose params have checkpoints every `EVERY` steps.
    kills
        In their order.
    folder
        For the plan and the logs, outside the clone.
    targets
        Of `dvc repro`.
    """
    outcome = Outcome()
    folder.mkdir(parents=True)
    plan = [{"moment": asdict(MOMENTS[kill.moment]), "call": kill.call, "whom": kill.whom} for kill in kills]
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (folder / "done").write_text("0", encoding="utf-8")
    (folder / "steps.log").touch()
    for number, kill in enumerate([*kills, None]):
        before = checkpoints(clone)
        log = folder / f"repro-{number}.log"
        code = repro(clone, folder, log, targets)
        happened = int((folder / "done").read_text(encoding="utf-8"))
        if kill is not None and happened != number + 1:
            outcome.faults.append(f"kill {number} ({kill}) never came, dvc ended with {code}; see {log}")
            return outcome
        if kill is None and code:
            outcome.faults.append(f"the last dvc repro ended with {code}; see {log}")
            return outcome
        if kill is not None:
            outcome.kills.append(kill)
        outcome.faults += goes_on(before, log, folder / "steps.log", number, kill)
        outcome.repeated = repeated(folder / "steps.log")
    return outcome


def repro(clone: Clone, folder: Path, log: Path, targets: Sequence[str]) -> int:
    """Run `dvc repro` under the hook, wait for its trainer's end too, and return the exit code."""
    (folder / "trainer").unlink(missing_ok=True)
    # Into a file: what outlives dvc would keep a pipe open.
    command = ("sh", "-c", 'log=$1; shift; exec "$@" >"$log" 2>&1', "sh", str(log), "dvc", "repro", *targets)
    done = clone.run(*command, check=False, timeout=PATIENCE, PYTHONPATH=str(HOOK), ANNEAL_CHAOS=str(folder))
    if (folder / "trainer").exists():
        pid = int((folder / "trainer").read_text(encoding="utf-8"))
        end = time.monotonic() + PATIENCE
        while is_alive(pid):
            assert time.monotonic() < end, f"the trainer {pid} lives on without its dvc"
            time.sleep(0.05)
    return done.returncode


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def checkpoints(clone: Clone) -> dict[str, int]:
    """Return the optimizer step of the newest checkpoint of each member that has one."""
    found: dict[str, int] = {}
    for path in (clone.path / ".anneal/train").glob("*/checkpoint-*.ckpt"):
        step = int(re.findall(r"\d+", path.name)[0])
        found[path.parent.name] = max(step, found.get(path.parent.name, 0))
    return found


def read_steps(log: Path) -> list[tuple[int, str, int]]:
    """Return (attempt, member, step) of every optimizer step made."""
    lines = [line.split() for line in log.read_text(encoding="utf-8").splitlines()]
    return [(int(attempt), member, int(step)) for attempt, member, step in lines]


def repeated(log: Path) -> int:
    """Return how many optimizer steps were made more than once."""
    return sum(count - 1 for count in Counter((member, step) for _, member, step in read_steps(log)).values())


def goes_on(before: Mapping[str, int], log: Path, steps_log: Path, number: int, kill: Kill | None) -> list[str]:
    """Return in what a run did not go on from the newest checkpoints.

    Parameters
    ----------
    before
        The newest checkpoints when it began.
    log
        What it printed.
    steps_log, number
        All steps so far, and the number of this attempt.
    kill
        What ended it.
    """
    faults: list[str] = []
    text = log.read_text(encoding="utf-8", errors="replace")
    steps = read_steps(steps_log)
    said = {member: int(step) for member, step in RESUMING.findall(text)}
    started = set(re.findall(r"stages\.train (\w+)$", text, re.MULTILINE))  # dvc takes members in any order
    for member, step in before.items():
        if member in started and (kill is None or kill.moment != "start") and said.get(member) != step:
            faults.append(
                f"attempt {number}: train@{member} resumed at {said.get(member)}, the checkpoint is of {step}"
            )
        earlier = max((s for attempt, name, s in steps if name == member and attempt < number), default=0)
        if earlier - step > EVERY:
            faults.append(f"attempt {number}: train@{member} lost {earlier - step} steps, from {step} to {earlier}")
    if kill is None and (idle := sorted(before.keys() - started)):
        faults.append(f"attempt {number}: train@{', train@'.join(idle)} did not go on")
    if extra := sorted(said.keys() - before.keys()):
        faults.append(f"attempt {number}: train@{', train@'.join(extra)} resumed without a checkpoint")
    for member in {name for attempt, name, _ in steps if attempt == number}:
        made = [s for attempt, name, s in steps if (attempt, name) == (number, member)]
        first = before.get(member, 0) + 1
        if made != list(range(first, first + len(made))):
            faults.append(f"attempt {number}: train@{member} made steps {made}, the first should be {first}")
    return faults


def differences(killed: Clone, reference: Clone) -> list[str]:
    """Return what differs between two clones of one recipe: dvc.lock, models, what was left behind, and MLflow."""
    faults: list[str] = []
    locked, expected = entries(killed.lock), entries(reference.lock)
    faults += [
        f"dvc.lock differs in {name}"
        for name in sorted(locked.keys() | expected.keys())
        if locked.get(name) != expected.get(name)
    ]
    ours, theirs = (files(clone.path / "models") for clone in (killed, reference))
    if odd := sorted(ours.keys() ^ theirs.keys()):
        faults.append(f"models: files in one alone: {odd}")
    faults += [f"models/{name} differs" for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name]]
    if not theirs:
        faults.append("models: nothing there")
    if left := sorted(str(path.relative_to(killed.path)) for path in (killed.path / ".anneal/train").glob("*/")):
        faults.append(f"state of training left behind: {left}")
    ours_in_git, theirs_in_git = (clone.run("git", "status", "--porcelain").stdout for clone in (killed, reference))
    if ours_in_git != theirs_in_git:
        faults.append(f"git status differs: {ours_in_git!r}, not {theirs_in_git!r}")
    return faults + tracked_differences(tracked(killed), tracked(reference))


def entries(lock: bytes) -> dict[str, str]:
    """Return the text of each stage in a dvc.lock: DVC runs members, and so lists them, in an order that it draws."""
    head, *parts = re.split(r"^  (?=\S)", lock.decode(), flags=re.MULTILINE)
    return {"": head, **{part.partition(":\n")[0]: part for part in parts}}


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files by their place; .gitignore is DVC's."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".gitignore")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@dataclass
class Tracked:
    """A run in MLflow: its status, tags, artifacts, and the points of all metrics in the order of the store."""

    status: str
    tags: dict[str, str]
    artifacts: list[str]
    points: list[tuple[str, int, str]]


def tracked(clone: Clone) -> dict[str, list[Tracked]]:
    """Return the runs of each stage (``train@a``), the system's own metrics left out."""
    for key, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    if any((clone.path / ".anneal/tracking").glob("*/")):  # the store was slower than a stage waits for it
        clone.run("anneal", "sync")
    client = MlflowClient(f"sqlite:///{clone.path}/mlflow.db")
    found: dict[str, list[Tracked]] = {}
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in client.search_runs(experiments, max_results=1000):
        tags = run.data.tags
        points = [
            (key, point.step, repr(point.value))
            for key in run.data.metrics
            if not key.startswith("system/")
            for point in client.get_metric_history(run.info.run_id, key)
        ]
        artifacts: list[str] = []
        folders: list[str | None] = [None]
        for folder in folders:
            for item in client.list_artifacts(run.info.run_id, folder):
                (folders if item.is_dir else artifacts).append(item.path)
        name = "@".join(filter(None, [tags.get("stage", "recipe"), tags.get("member")]))
        kept = {key: value for key, value in tags.items() if not VOLATILE.fullmatch(key)}
        found.setdefault(name, []).append(Tracked(run.info.status, kept, sorted(artifacts), points))
    return found


def tracked_differences(
    killed: Mapping[str, Sequence[Tracked]], reference: Mapping[str, Sequence[Tracked]]
) -> list[str]:
    """Return what differs between two stores; each has every stage once."""
    faults: list[str] = []
    for name in sorted(killed.keys() | reference.keys()):
        ours, theirs = killed.get(name, []), reference.get(name, [])
        if len(ours) != 1 or len(theirs) != 1:
            faults.append(f"MLflow: {len(ours)} runs of {name} ({[run.status for run in ours]}), not {len(theirs)}")
            continue
        (a,), (b,) = ours, theirs
        if a.status != "FINISHED":
            faults.append(f"MLflow: {name} is {a.status}")
        counts = Counter(point[:2] for point in a.points)
        twice = [point for point, number in counts.items() if number > 1 and name.startswith("train")]
        if twice:
            faults.append(f"MLflow: {len(twice)} points of {name} more than once, such as {twice[0]}")
        if missing := sorted((Counter(b.points) - Counter(a.points)).elements()):
            faults.append(f"MLflow: {len(missing)} points of {name} missing or different, such as {missing[0]}")
        if extra := sorted((Counter(a.points) - Counter(b.points)).elements()):
            faults.append(f"MLflow: {len(extra)} points of {name} that should not be, such as {extra[0]}")
        odd = {key: (a.tags.get(key), b.tags.get(key)) for key in a.tags.keys() | b.tags.keys()}
        odd = {key: pair for key, pair in odd.items() if pair[0] != pair[1]}
        if odd:
            faults.append(f"MLflow: tags of {name} differ: {odd}"[:300])
        if a.artifacts != b.artifacts:
            faults.append(f"MLflow: artifacts of {name} differ: {sorted(set(a.artifacts) ^ set(b.artifacts))}")
    return faults


def copy(base: Clone, folder: Path, changes: Mapping[str, Any]) -> Clone:
    """Copy a clone without its MLflow store, whose paths are absolute, commit changed params in it, and return it."""
    path = folder / "anneal"
    shutil.copytree(
        base.path, path, symlinks=True, ignore=shutil.ignore_patterns("mlflow.db*", "mlruns", "__pycache__", ".anneal")
    )
    clone = Clone(path)
    clone.set(**changes)
    subprocess.run(["git", "commit", "--allow-empty", "-qam", "recipe"], cwd=path, check=True, capture_output=True)
    return clone
