"""Run a search: a process that trains, trial after trial, until the study has as many as it is to have."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anneal import params, tracking
from anneal.conflicts import check_recipe
from anneal.params import ParamsError, UserError, flatten
from anneal.recipe import Recipe, json_schema, validate
from anneal.search import results
from anneal.search.config import SearchConfig
from anneal.search.space import Key, in_words, longest, never_applies, replaced, search_space
from anneal.store import open_store
from anneal.studies.run import TRAINING, clock

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from anneal.search.trials import Claim, Trials

DATA = Path("data/processed")
AUGMENTED = Path("data/augmented")
STATE = Path(".anneal/search")
"""What is needed to go on with a search, a folder a study."""

MADE_BY = {"preprocess": DATA, "augment": AUGMENTED}
"""Stage to the folder that trials read."""

ALIKE = {"failed": 3, "refused": 10}
"""Trials in a row that end a search where they failed with the same words, numbers apart: what is at fault is then none of
their values. Values that cannot work together are refused, which a part of all trials may be."""

MOST_EPOCHS = 200
"""Most epochs whose figures are kept with a trial in the storage."""

PATIENCE = 12.0
"""Seconds that a training has to write its checkpoint and leave."""

BY_SIGNAL = {code for number in (signal.SIGINT, signal.SIGTERM) for code in (-number, 128 + number)}
"""Exit codes of a training that somebody stopped; it is no failure of its trial."""


class Stopped(Exception):
    """The training of a trial was stopped; the trial can be gone on with."""


def command(options: argparse.Namespace) -> int:
    """Run `anneal search` and return its exit code."""
    values = params.load()
    if options.show:
        print("\n".join(show(values, study=options.study)))
        return 0
    try:
        lines = run_search(
            values,
            study=options.study,
            trials=options.trials,
            jobs=options.jobs,
            fresh=options.fresh,
            force=options.force,
        )
    except KeyboardInterrupt:
        print(
            "stopped; `anneal search` goes on where it was, `anneal search --show` says what it has found",
            file=sys.stderr,
        )
        return 130
    print("\n".join(lines))
    return 0


def run_search(
    values: Mapping[str, Any],
    *,
    study: str | None = None,
    trials: int | None = None,
    jobs: int = 1,
    fresh: bool = False,
    force: bool = False,
) -> list[str]:
    """Run what is missing of a search, write its folder, its recipe and its MLflow runs, and return what it found, in lines.

    Parameters
    ----------
    values
        params.yaml.
    study, trials
        In place of those of section ``search``.
    jobs
        Trials at a time.
    fresh
        Forget the trials of an earlier call.
    force
        Overwrite a recipe of the study's name that no search wrote.

    Raises
    ------
    UserError
        Something of section ``search`` or of the data is not as it must be; three failures in a row were alike.
    """
    config, keys, base = plan(values, study=study, trials=trials)
    if jobs < 1:
        raise UserError(f"--jobs: found {jobs}, allowed: a whole number >= 1")
    check_data(values, base, keys)
    recipe = results.recipe_path(config.study, force=force)

    from anneal.search.trials import Trials, forget, open_storage, open_study

    folder = STATE / config.study
    storage = open_storage(config.storage)
    if fresh:
        forget(storage, config.study, folder)
    found = open_study(
        storage,
        config.study,
        folder=folder,
        metric=config.metric,
        sampler=config.sampler,
        pruning=config.pruner,
        epochs=longest(keys, base),
        seed=values["seed"],
        asked=shared(config, keys, base),
    )
    searched = Trials(found, folder, keys, base, config.trials)
    with tracking.study_run(base, config.study, key=f"search-{found.user_attrs['id']}", kind="search") as run:
        search = Search(config, keys, base, searched, run)
        search.begin()
        with terminated():
            search.work(jobs)
        lines = results.write(config, keys, base, found, searched.all(), recipe)
        for file in ("figure.png", "trials.csv", "curves.csv"):
            run.artifact(results.STUDIES / config.study / file)
        run.describe(results.description(config, keys, lines))
    return lines


def show(values: Mapping[str, Any], *, study: str | None = None) -> list[str]:
    """Return what a search has found so far, in lines.

    Raises
    ------
    UserError
        There is no such study.
    """
    config, keys, _ = plan(values, study=study)
    from anneal.search.trials import counted, load_study, open_storage, patiently

    found = load_study(open_storage(config.storage), config.study)
    return results.in_lines(config, keys, found, counted(patiently(lambda: found.get_trials(deepcopy=False))))


# ---- what is searched -----------------------------------------------------------------------------------------------


def plan(
    values: Mapping[str, Any], *, study: str | None = None, trials: int | None = None
) -> tuple[SearchConfig, list[Key], dict[str, Any]]:
    """Return the section, the keys that apply, and the whole params that all trials share: those of the first member.

    Raises
    ------
    UserError
        A range is not valid, the member overrides a key, or no key applies.
    """
    given = {"study": study, "trials": trials}
    chosen = {name: value for name, value in given.items() if value is not None}
    config: SearchConfig = params.parse({"search": {**values["search"], **chosen}}, {"search": SearchConfig})["search"]
    name = next(iter(values["ensemble"]["members"]))
    base = params.member(values, name)
    keys = search_space(config, base, json_schema())
    own = flatten(values["ensemble"]["members"][name] or {})
    for key in keys:
        if any(f"{other}.".startswith(f"{key.name}.") for other in own):
            raise UserError(
                f"search.ranges.{key.name}: ensemble.members.{name} overrides it, so that no recipe could; "
                f"allowed: one of the two"
            )
    idle = [key for key in keys if never_applies(key, keys, base)]
    for key in idle:
        chooser, block = key.when[-1]
        print(f"search.ranges.{key.name}: left out, as {chooser} is never {block}", file=sys.stderr)
    keys = [key for key in keys if key not in idle]
    if not keys:
        raise UserError("search.ranges: found no key that applies, allowed: at least one; docs/search.md has examples")
    # One process a trial: its stdin and stdout are the search's, and several trials at a time use more devices.
    base = params.merge(base, {"hardware": {"devices": 1, "num_nodes": 1}, "evaluate": {"splits": ["val"]}})
    base["ensemble"] = {**base["ensemble"], "members": {"search": {}}}
    return config, keys, base


def check_data(values: Mapping[str, Any], base: Mapping[str, Any], keys: list[Key]) -> None:
    """Check that the data are there and were made with these params.

    Raises
    ------
    UserError
        They are not.
    """
    for file in (DATA / "dataset.json", AUGMENTED / "policy.json"):
        if not file.exists():
            raise UserError(f"{file}: no such file; run `dvc repro augment` first")
    lock = Path("dvc.lock")
    stages = params.read_yaml(lock).get("stages", {}) if lock.exists() else {}
    for stage, folder in MADE_BY.items():
        made = stages.get(stage, {}).get("params", {}).get("params.yaml", {})
        for name, before in made.items():
            if name in values and values[name] != before:
                raise UserError(
                    f"{folder}: made with another {name} than params.yaml has; run `dvc repro augment` first"
                )
    if any(key.name.startswith("augment.") for key in keys) and base["augment"]["copies"]["balance"]:
        raise UserError(
            "search.ranges.augment.policy: found with augment.copies.balance: true, whose copies are made by one policy; "
            "allowed: balance: false"
        )


def shared(config: SearchConfig, keys: list[Key], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return by name what all trials of a study share, so that one is not gone on with under other settings."""
    searched = {key.name for key in keys}
    sections = ("seed", *(name for name in TRAINING if name != "hardware"))
    recipe = {
        key: value
        for key, value in flatten({name: base[name] for name in sections}).items()
        if not any(f"{key}.".startswith(f"{name}.") for name in searched)
    }
    policy = {} if "augment.policy" in searched else {"augment.policy": (AUGMENTED / "policy.json").read_text("utf-8")}
    ranges = {f"search.ranges.{key.name}": in_words(key) for key in keys}
    return {**recipe, **policy, **ranges, "search.metric": config.metric, "data": open_store(DATA).info.digest}


# ---- the search -----------------------------------------------------------------------------------------------------


class Search:
    """Trials, one after the other or a few at a time, each told as it ends.

    Parameters
    ----------
    config, keys, base
        Of `plan`.
    trials
        Of the study.
    run
        MLflow's.
    """

    def __init__(
        self, config: SearchConfig, keys: list[Key], base: Mapping[str, Any], trials: Trials, run: tracking.Run
    ) -> None:
        self.config, self.keys, self.base, self.trials, self.run = config, keys, base, trials, run
        self.workers: list[Worker] = []
        self.seconds: list[float] = []
        self.failures: list[tuple[str, str]] = []
        self.over = False
        self.lock = threading.Lock()
        self.jobs = 1
        self.terminal = sys.stderr.isatty()
        self.next_line = time.monotonic() + 10

    def begin(self) -> None:
        """Say what is to be done, and give MLflow what an earlier call could not."""
        config, found = self.config, self.trials.all()
        ended = [trial for trial in found if trial.state.is_finished()]
        for trial in ended:
            if trial.user_attrs.get("owner") == self.trials.owner:
                results.track(self.run, config, self.base, trial)
        there = f", {len(ended)} of them there from before (--fresh would forget them)" if ended else ""
        self.say(
            f"search {config.study}: {config.trials} trials{there}; {config.sampler}, pruning: {config.pruner}, "
            f"by {config.metric}; {tracking.redact(config.storage)}"
        )
        for key in self.keys:
            self.say(f"  {in_words(key)}")

    def work(self, jobs: int) -> None:
        """Run trials until there are enough."""
        cores = cores_of(jobs)
        self.jobs = jobs
        self.workers = [Worker(cores[i]) for i in range(jobs)]
        try:
            if jobs == 1:
                self.one_after_the_other(self.workers[0])
                return
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    for future in as_completed([pool.submit(self.one_after_the_other, w) for w in self.workers]):
                        future.result()
                finally:  # before the pool waits for its threads
                    self.over = True
                    for worker in self.workers:
                        worker.close()
        except Stopped as stop:
            raise UserError(
                f"search {self.config.study}: {stop}; `anneal search` goes on from its checkpoint"
            ) from None
        finally:
            for worker in self.workers:
                worker.stop()
            self.clear()

    def one_after_the_other(self, worker: Worker) -> None:
        """Run trials on one worker until there are enough."""
        while not self.over and (claim := self.trials.claim()) is not None:
            try:
                self.one(claim, worker)
            finally:
                claim.lock.release()

    def one(self, claim: Claim, worker: Worker) -> None:
        """Run a trial."""
        if claim.resumed:
            self.say(f"trial {claim.number}: taken up again where it was stopped")
        recipe, began = replaced(self.base, claim.chosen), time.monotonic()
        refusal = refused(recipe)
        if refusal:
            answer: dict[str, Any] = {"end": "refused", "reason": refusal, "epochs": []}
        else:
            claim.folder.mkdir(parents=True, exist_ok=True)
            job = {
                "number": claim.number,
                "folder": str(claim.folder),
                "log": str(claim.folder / "log.txt"),
                "recipe": recipe,
                "store": str(DATA),
                "augmented": str(AUGMENTED),
                "policy": "augment.policy" in claim.chosen,
            }
            self.status(f"trial {claim.number}: begins")
            answer = worker.train(job, lambda epoch, figures: self.reported(claim, recipe, epoch, figures))
        self.ended(claim, answer, answer.get("seconds", time.monotonic() - began))

    def reported(self, claim: Claim, recipe: Mapping[str, Any], epoch: int, figures: Mapping[str, float]) -> bool:
        """Take an epoch down and decide whether the trial goes on."""
        value = results.value_of(figures, self.config.metric, recipe["averaging"]["export"])
        self.status(
            f"trial {claim.number}: epoch {epoch} of {recipe['trainer']['epochs']}, {self.config.metric} {value:.4f}"
        )
        with self.lock:
            return self.trials.report(claim, epoch, value)

    def ended(self, claim: Claim, answer: Mapping[str, Any], seconds: float) -> None:
        """Take down how a trial ended, and say so."""
        config, epochs, reason = self.config, answer["epochs"], answer.get("reason", "")
        every = -(-len(epochs) // MOST_EPOCHS) or 1
        state, value, facts = answer["end"], None, {"epochs": epochs[every - 1 :: every]}
        pruned_at = self.trials.frozen(claim.trial).user_attrs.get("pruned_at")
        if state == "complete" and pruned_at is not None:
            state, reason = "pruned", f"after epoch {pruned_at}"
        elif state == "complete":
            row = epochs[answer["best_epoch"] - 1]
            facts |= {"best_epoch": answer["best_epoch"], "weights": answer["weights"]}
            value = results.figure(row, config.metric, averaged=answer["weights"] != "raw")
            other = "val/accuracy" if config.metric == "val/loss" else "val/loss"
            facts["other"] = results.figure(row, other, averaged=answer["weights"] != "raw")
            if not math.isfinite(value):
                state, value, reason = "failed", None, f"{config.metric} is {value} in epoch {answer['best_epoch']}"
        elif state == "diverged":  # a result: the sampler is to keep away from there
            state = "pruned"
        failure = (state, re.sub(r"\d+", "N", reason))
        state = "failed" if state == "refused" else state
        facts |= {"chosen": dict(claim.chosen), **({"reason": reason} if reason else {})}
        trial = self.trials.end(claim, state, value=value, facts=facts)
        with self.lock:
            self.seconds.append(seconds)
            results.track(self.run, config, self.base, trial)
            found = self.trials.all()
            best = results.best(found, config.metric)
            if best is not None:
                self.run.metrics({f"best/{config.metric}": results.value(best)}, trial.number)
            self.say(self.line(trial, best, found))
            self.failures = [*self.failures, failure] if state == "failed" else []
            count = ALIKE.get(failure[0], 0)
            if self.failures[-count:] == [failure] * count and state == "failed":
                log = claim.folder / "log.txt"
                more = f"; what it said is in {log}" if log.exists() else ""
                raise UserError(f"search {config.study}: {count} trials in a row failed alike: {reason}{more}")

    # ---- words ------------------------------------------------------------------------------------------------------

    def line(self, trial: FrozenTrial, best: FrozenTrial | None, found: list[FrozenTrial]) -> str:
        """Return what a trial came to, the best so far, and the time left."""
        left = max(0, self.config.trials - sum(other.state.is_finished() for other in found))
        mean = sum(self.seconds) / len(self.seconds)
        best_text = "none" if best is None else f"{results.value(best):.4f} (trial {best.number})"
        about = f", {clock(mean * left / self.jobs)} left" if left else ""
        return (
            f"trial {trial.number}: {results.outcome(trial, self.config.metric)}; best {best_text}{about}; "
            f"{results.settings(trial)}"
        )

    def say(self, text: str) -> None:
        """Write a line that stays."""
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def status(self, text: str) -> None:
        """Write a line that is written over; where there is no terminal, one now and then."""
        if self.terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() >= self.next_line:
            print(text, file=sys.stderr, flush=True)
            self.next_line = time.monotonic() + 10

    def clear(self) -> None:
        """Remove the line that is written over."""
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def refused(recipe: Mapping[str, Any]) -> str:
    """Say what of a trial's values cannot work together, an empty string where they can."""
    try:
        checked: Recipe = validate(recipe)
        sections = {name: getattr(checked, name) for name in (*TRAINING, "preprocess")}
        check_recipe(num_train=open_store(DATA).info.counts["train"], **sections)
    except ParamsError as error:
        return error.faults[0]
    return ""


@contextmanager
def terminated() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that trainings get to write their checkpoints."""

    def leave(signum: int, frame: Any) -> None:  # noqa: ARG001
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- the process that trains ----------------------------------------------------------------------------------------


def cores_of(jobs: int) -> list[set[int] | None]:
    """Return the cores of each of several trainings, shared out: torch's threads only lose by meeting on a core."""
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::jobs]) if len(cores) >= jobs else None for i in range(jobs)]


class Worker:
    """A process of `anneal.search.worker`, started for the first trial, and again where one brought it down.

    Parameters
    ----------
    cores
        That it may use; None for all.
    """

    def __init__(self, cores: set[int] | None = None) -> None:
        self.cores = cores
        self.process: subprocess.Popen[str] | None = None
        self.closed = False

    def train(self, job: Mapping[str, Any], report: Any) -> dict[str, Any]:
        """Train a trial and return how it ended.

        Raises
        ------
        Stopped
            Somebody stopped the process.
        """
        began = time.monotonic()
        if self.process is None:
            self._start(job["log"])
        process = self.process
        assert process is not None and process.stdout is not None
        self._send(job)
        for line in process.stdout:
            answer: dict[str, Any] = json.loads(line)
            if "ready" in answer:
                began = time.monotonic()
                continue
            if "end" in answer:
                return {**answer, "seconds": time.monotonic() - began}
            self._send({"stop": report(answer["epoch"], answer["values"])})
        code = process.wait()
        self.process = None
        if self.closed or code in BY_SIGNAL:
            raise Stopped(f"the training of trial {job['number']} was stopped")
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        out_of_memory = ", as when the memory is used up" if code in (-9, 137) else ""
        return {"end": "failed", "reason": f"the training process ended with {how}{out_of_memory}", "epochs": []}

    def _start(self, log: str) -> None:
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "anneal.search.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                bufsize=1,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C in the terminal is for the search, which then lets go of it
            )
        if self.cores is not None:
            with suppress(OSError):
                os.sched_setaffinity(self.process.pid, self.cores)

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self.process is not None and self.process.stdin is not None
        with suppress(OSError, ValueError):  # a process that is gone is seen by what it no longer says
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """Close the pipe: a training that is under way writes its checkpoint and ends."""
        self.closed = True
        if self.process is not None and self.process.stdin is not None:
            with suppress(OSError, ValueError):
                self.process.stdin.close()

    def stop(self) -> None:
        """End the process, by force where it takes too long."""
        self.close()
        if self.process is None:
            return
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
