"""Experiments side by side: started, watched, collected; what ends is kept, what fails is named, the rest goes on later."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from anneal import params
from anneal.experiments.checkout import READY, claim, fetch, prepare, remove
from anneal.experiments.plan import FOLDER, OVERHEAD, RESULTS, Experiment, Plan, has_result
from anneal.params import UserError
from anneal.store import write_json

STAGE = re.compile(r"Running stage '([\w@-]+)'|Stage '([\w@-]+)' (?:is cached|didn't change)|^Predicting:")
"""What DVC says of a stage that it runs, or does not."""

PATIENCE = 30.0
"""Seconds that interrupted experiments have to end."""

PATIENCE_LAST = 10.0
"""Seconds that trainings have after those that started them, to save a checkpoint."""


def default_jobs(values: Mapping[str, Any]) -> int:
    """Return how many experiments run at once: one a GPU machine, else as many as the cores hold trainings.

    A training takes ``trainer.threads`` cores; where that is ``auto``, one of up to four cores, or four of more.
    """
    if values["hardware"]["accelerator"] in ("gpu", "mps") or Path("/dev/nvidia0").exists():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = values["trainer"]["threads"]
    return max(1, cores // (threads if isinstance(threads, int) else 1 if cores <= 4 else 4))


def check_jobs(jobs: int | None, values: Mapping[str, Any]) -> int:
    """Return ``jobs``, or the default.

    Raises
    ------
    UserError
        A number below 1.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs: found {jobs}, allowed: a whole number >= 1")
    return jobs or default_jobs(values)


# ---- time -----------------------------------------------------------------------------------------------------------


def training_seconds(values: Mapping[str, Any]) -> float | None:
    """Return what a training takes: as earlier experiments took, else as MLflow has the last one; None where neither has one."""
    with suppress(OSError, ValueError, KeyError):
        known = json.loads((RESULTS / "times.json").read_text(encoding="utf-8"))
        if known["recipe"] == recipe_of(values):
            return float(known["seconds"])
    return last_training(values)


def recipe_of(values: Mapping[str, Any]) -> list[Any]:
    """Return what decides how long a training takes."""
    return [values["data"], values["preprocess"], values["model"], values["batch"], values["trainer"]]


def last_training(values: Mapping[str, Any]) -> float | None:
    """Return the seconds of the newest training in MLflow, None where there is none or MLflow is out of reach."""
    from anneal.tracking.durations import last_seconds

    given = values["tracking"]
    for member in values["ensemble"]["members"]:
        if found := last_seconds(given["uri"], given["experiment"], "train", member):
            seconds, epochs = found
            return seconds * values["trainer"]["epochs"] / (epochs or values["trainer"]["epochs"])
    return None


def in_words(seconds: float) -> str:
    """Return a duration in words.

    >>> in_words(48), in_words(180), in_words(9000)
    ('50 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def counted(number: int, word: str) -> str:
    """Return a number with its word.

    >>> counted(1, "seed"), counted(2, "seed")
    ('1 seed', '2 seeds')
    """
    return f"{number} {word}{'s' * (number != 1)}"


def estimate(plan: Plan, jobs: int, training: float | None) -> str:
    """Say what is to be done and how long it takes."""
    count = sum(len(keys) for keys in plan.keys.values())
    missing = sum(len(one.keys) for one in plan.todo)
    text = f"{counted(len(plan.keys), 'variant')} x {counted(len(plan.seeds), 'seed')} = {counted(count, 'training')}"
    if count > missing:
        text += f", {count - missing} of them with results from before"
    if missing > plan.trainings:
        text += f", {missing - plan.trainings} in DVC's cache"
    if not plan.todo:
        return f"{text}: nothing to train"
    text += (
        f"; {plan.trainings} to train in {counted(len(plan.todo), 'experiment')}, {min(jobs, len(plan.todo))} at once"
    )
    if training is None and plan.trainings:
        return f"{text}; how long that takes shows once the first training has ended"
    return f"{text}: about {in_words(plan.seconds(training or 0.0, jobs))}"


# ---- running --------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """An experiment that runs."""

    experiment: Experiment
    folder: Path
    slot: int
    process: subprocess.Popen[bytes]
    log: IO[str]
    stage: str = ""
    since: float = field(default_factory=time.monotonic)
    trained: int = 0
    rest: str = ""


def run_plan(plan: Plan, values: Mapping[str, Any], *, jobs: int, title: str) -> dict[str, str]:
    """Run what a plan lacks, and return the reason of each experiment that failed, by its variant.

    What has ended is kept at once, so that a later call goes on from there. Ctrl-C, or SIGTERM, stops the trainings at a
    checkpoint, from which the next call goes on too.

    Parameters
    ----------
    plan
        See `anneal.experiments.plan.make_plan`.
    values
        The recipe, for the time that a training takes.
    jobs
        Experiments at once.
    title
        First word of each line of progress.

    Raises
    ------
    UserError
        Another call runs experiments of this repository.
    """
    if not plan.todo:
        return {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    claimed = claim(FOLDER)
    if claimed is None:
        raise UserError(
            f"{title}: another `anneal ablate` or `anneal seeds` runs in this repository, allowed: one at a time; wait for "
            f"it, or stop it"
        )
    collect_ended()
    status = Status(title, plan, training_seconds(values), jobs, recipe_of(values))
    waiting, running = list(plan.todo), list[Job]()
    failed: dict[str, str] = {}
    slots = list(range(jobs))
    before = signal.getsignal(signal.SIGTERM)
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            while waiting and slots:
                experiment, slot = waiting.pop(0), slots.pop(0)
                try:
                    running.append(start(experiment, slot, jobs))
                except UserError as error:
                    failed[experiment.variant] = str(error)
                    slots.append(slot)
            time.sleep(0.2)
            for job in list(running):
                status.read(job)
                if job.process.poll() is None:
                    continue
                status.read(job)
                running.remove(job)
                slots.append(job.slot)
                if reason := finish(job):
                    failed[job.experiment.variant] = reason
                status.ended(job, reason)
            status.show(running)
    except KeyboardInterrupt:
        status.say("stopping; the same command goes on from here")
        stop(running)
        raise
    finally:
        stop(running)
        os.close(claimed)
        status.close()
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, before)
    return failed


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def start(experiment: Experiment, slot: int, jobs: int) -> Job:
    """Make an experiment's checkout and start its process."""
    root, folder = Path.cwd(), (FOLDER / experiment.name).absolute()
    prepare(experiment, folder, root)
    path = folder / "log.txt"
    source = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    with path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "anneal.experiments.job", str(folder), str(slot), str(jobs)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which stops the others in order
            env={**os.environ, "PYTHONPATH": search, "PYTHONUNBUFFERED": "1"},
        )
    return Job(experiment, folder, slot, process, path.open(encoding="utf-8", errors="replace"))


def collect_ended() -> None:
    """Collect experiments that ended after the call that started them was killed."""
    for ready in sorted(FOLDER.glob(f"*/{READY}")):
        ended = json.loads(ready.read_text(encoding="utf-8"))
        if ended["keys"] and all(map(has_result, ended["keys"].values())):
            with suppress(UserError):
                fetch(ended["name"], ready.parent / "checkout", Path.cwd())
            remove(ready.parent)


def finish(job: Job) -> str:
    """Collect an experiment that ended; return why it failed, nothing where it did not."""
    job.log.close()
    text = (job.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    if job.process.returncode or not all(map(has_result, job.experiment.keys.values())):
        kept = FOLDER / "logs" / f"{job.experiment.name}.txt"
        kept.parent.mkdir(parents=True, exist_ok=True)
        (job.folder / "log.txt").replace(kept)
        remove(job.folder)
        code = job.process.returncode
        return f"{f'ended by signal {-code}' if code < 0 else reason_in(text)} (see {kept})"
    try:
        fetch(job.experiment.name, job.folder / "checkout", Path.cwd())
    except UserError as error:
        print(f"warning: {job.experiment.name}: its DVC experiment is not in this repository: {error}", file=sys.stderr)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (job.folder / "metrics.json").replace(RESULTS / f"{job.experiment.name}.metrics.json")
    remove(job.folder)
    return ""


def reason_in(log: str) -> str:
    r"""Return the line of a log that says why a stage failed: its first error in our words, else its last line.

    >>> reason_in("Running stage 'train@a':\nerror: training diverged\nERROR: failed to reproduce")
    'training diverged'
    """
    lines = [params.one_line(line.strip()) for line in log.splitlines() if line.strip()]
    ours = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return ours[0] if ours else lines[-1] if lines else "it ended without a word"


def stop(running: Sequence[Job]) -> None:
    """Stop experiments in order: their trainings leave a checkpoint, their checkouts stay for the next call."""
    for job in running:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(job.process.pid, signal.SIGTERM)
    end = time.monotonic() + PATIENCE
    for job in running:
        try:
            job.process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(job.process.pid, signal.SIGKILL)
        job.log.close()
    end = min(end, time.monotonic() + PATIENCE_LAST)
    while time.monotonic() < end and any(alive(job.process.pid) for job in running):
        time.sleep(0.1)


def alive(group: int) -> bool:
    """Say whether a process of this group is left: a trainer saves its checkpoint while what started it has gone."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


class Status:
    """How far the experiments are: a line that is written over on a terminal, elsewhere a line where something ends.

    Parameters
    ----------
    title
        First word of each line.
    plan
        What is run.
    training
        Seconds of a training, where they are known.
    jobs
        Experiments at once.
    recipe
        What these seconds are of, to be kept with them.
    """

    def __init__(self, title: str, plan: Plan, training: float | None, jobs: int, recipe: Sequence[Any]) -> None:
        self.title, self.plan, self.jobs, self.recipe = title, plan, jobs, recipe
        self.guess, self.seconds = training, list[float]()
        self.done = 0
        self.left = {one.name: one.trainings for one in plan.todo}
        self.terminal = sys.stderr.isatty()
        self.shown = ""
        self.next = 0.0
        self.report: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)

    def read(self, job: Job) -> None:
        """Read what an experiment's log says of its stages since the last time."""
        if job.log.closed:
            return
        *lines, job.rest = (job.rest + job.log.read()).split("\n")
        for line in lines:
            if "resuming train@" in line:
                self.say(f"{job.experiment.variant}: {params.one_line(line)}")
            if match := STAGE.search(line):
                now = time.monotonic()
                if job.stage.startswith("train@"):
                    self.seconds.append(now - job.since)
                    job.trained += 1
                    self.left[job.experiment.name] = max(0, self.left[job.experiment.name] - 1)
                job.stage, job.since = match[1] or "", now

    def training(self) -> float | None:
        """Return the seconds of a training: the mean of those that ended, else what was known before."""
        return sum(self.seconds) / len(self.seconds) if self.seconds else self.guess

    def ended(self, job: Job, reason: str) -> None:
        """Say that an experiment ended."""
        self.done += 1
        self.left.pop(job.experiment.name, None)
        if self.seconds:
            write_json(RESULTS / "times.json", {"recipe": self.recipe, "seconds": round(self.training() or 0, 1)})
        self.say(
            f"{self.done} of {len(self.plan.todo)}: {job.experiment.variant} "
            + (f"failed: {reason}" if reason else "done")
            + self.time_left()
        )

    def time_left(self) -> str:
        """Return the time left in words, nothing while it is not known."""
        training = self.training()
        if not self.left or (training is None and any(self.left.values())):
            return ""
        seconds = sum((training or 0.0) * count + OVERHEAD for count in self.left.values())
        return f", about {in_words(seconds / max(1, min(self.jobs, len(self.left))))} left"

    def show(self, running: Sequence[Job]) -> None:
        """Show what runs, on a terminal at once, elsewhere every minute."""
        parts = [f"{job.experiment.variant} {job.stage or '...'}" for job in running]
        line = f"{self.title}: {self.done} of {len(self.plan.todo)} done; {', '.join(parts)}{self.time_left()}"
        if self.terminal:
            if line != self.shown:
                width = max(20, _columns() - 1)
                print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)
                self.shown = line
        elif running and time.monotonic() >= self.next:
            if self.next:
                self.report(line)
            self.next = time.monotonic() + 60

    def say(self, text: str) -> None:
        """Say a line that stays."""
        self.report(("\r\x1b[K" if self.terminal else "") + f"{self.title}: {text}")
        self.shown = ""

    def close(self) -> None:
        """Remove the line that is written over."""
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size().columns
