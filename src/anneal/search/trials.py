"""The trials of a study in its storage: who takes which up, what they report, how they end. The only module with optuna."""

from __future__ import annotations

import json
import platform
import re
import shutil
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
from filelock import FileLock, Timeout
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages._rdb.models import NOT_FOUND_MSG
from optuna.trial import FrozenTrial, TrialState

from anneal import seeding
from anneal.params import UserError, nearest
from anneal.search.space import Key, suggest
from anneal.tracking import redact, repository

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

T = TypeVar("T")

SQLITE_PATIENCE = 120.0
"""Seconds that a process waits for others that write to the same file."""

PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0)
"""Seconds between attempts to reach a storage that has been reached before."""

RUNNING = (TrialState.RUNNING,)

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


# ---- storage --------------------------------------------------------------------------------------------------------


class Connection(sqlite3.Connection):
    """Of several processes to one file: readers do not wait for a writer, nor a writer for the disk at each call."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        with suppress(sqlite3.OperationalError):  # another process is just doing it, or the file system cannot
            self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


def address(uri: str) -> str:
    """Return the address of a storage, a relative sqlite path made absolute from the repository."""
    match = re.fullmatch(r"sqlite:///(?!/)([^?]+)(\?.*)?", uri)
    return f"sqlite:///{repository() / match[1]}{match[2] or ''}" if match else uri


def open_storage(uri: str) -> optuna.storages.BaseStorage:
    """Return the storage at an address.

    Raises
    ------
    UserError
        It is none of a database, cannot be reached, or its driver is not installed.
    """
    where = address(uri)
    options: dict[str, Any] = {"pool_pre_ping": True}
    file = re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", where)
    if where.startswith("sqlite"):
        if file is None or file[1].endswith(":memory:"):
            raise UserError(
                f"search.storage: found {redact(uri)}, allowed: sqlite:///FILE, or the address of a database server"
            )
        options = {"connect_args": {"timeout": SQLITE_PATIENCE, "factory": Connection}}
    for last in (False, True):
        try:
            if file is not None:
                Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
            return optuna.storages.get_storage(optuna.storages.RDBStorage(where, engine_kwargs=options))
        except Exception as error:  # whatever a driver raises; two that make the tables at once trip over each other
            if last:
                raise UserError(f"search.storage: cannot open {redact(where)}: {_line(error)}{_hint(error)}") from None
            time.sleep(1.0)
    raise AssertionError


def _hint(error: BaseException) -> str:
    if not isinstance(error, ImportError):
        return ""
    return "; install the driver, such as psycopg2-binary for postgresql:// or PyMySQL for mysql+pymysql://"


def _line(error: BaseException) -> str:
    return redact(" ".join(f"{type(error).__name__}: {error}".split()))[:300]


def patiently(call: Callable[[], T], pauses: Sequence[float] = PAUSES) -> T:
    """Return what a call of the storage returns, made again where it cannot be reached for a while.

    Raises
    ------
    UserError
        It was out of reach for too long, or the study is no longer there.
    """
    for pause in (*pauses, None):
        try:
            return call()
        except optuna.exceptions.StorageInternalError as error:
            if pause is None:
                raise UserError(
                    f"search.storage: out of reach: {_line(error)}; `anneal search` goes on once it is back"
                ) from None
            time.sleep(pause)
        except KeyError as error:
            if error.args != (NOT_FOUND_MSG,):
                raise
            raise UserError("search.storage: the study is gone: another process deleted it, with --fresh") from None
    raise AssertionError


# ---- sampling and pruning -------------------------------------------------------------------------------------------


class Numbered(BaseSampler):
    """Samples each trial with a generator of its own, keyed by seed and number, so that it does not matter who asks when.

    Parameters
    ----------
    name
        ``TPE`` or ``random``.
    seed
        Of params.yaml.
    """

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed

    def _for(self, trial: FrozenTrial) -> BaseSampler:
        seed = seeding.seed_for(self.seed, "search", trial.number) % 2**32
        return RandomSampler(seed=seed) if self.name == "random" else TPESampler(seed=seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:  # noqa: ARG002
        """Make the sampler of a trial."""
        self._current = (trial.number, self._for(trial))

    def of(self, trial: FrozenTrial) -> BaseSampler:
        """Return the sampler of a trial."""
        if self._current[0] != trial.number:
            self._current = (trial.number, self._for(trial))
        return self._current[1]

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See `optuna.samplers.BaseSampler`."""
        return self.of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See `optuna.samplers.BaseSampler`."""
        return self.of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See `optuna.samplers.BaseSampler`."""
        return self.of(trial).sample_independent(study, trial, param_name, param_distribution)


def pruner(name: str, epochs: int) -> optuna.pruners.BasePruner:
    """Return a pruner for trials of at most so many epochs; steps are epochs that have ended, from 1."""
    if name == "median":
        # A tenth of the run is left alone: warm-up, and noise of the first epochs.
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=max(1, epochs // 10))
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3)
    return optuna.pruners.NopPruner()


# ---- a study --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A trial that this process runs; its lock ends with the process, whatever ends that.

    Parameters
    ----------
    trial
        Of Optuna.
    chosen
        Its values by dotted key.
    folder
        Its own.
    resumed
        Whether a process began it that is gone.
    lock
        Held.
    """

    trial: optuna.Trial
    chosen: Mapping[str, Any]
    folder: Path
    resumed: bool
    lock: FileLock = field(repr=False)

    @property
    def number(self) -> int:
        """Number of the trial within the study, from 0."""
        return int(self.trial.number)


class Trials:
    """A study as one process on one machine sees it.

    Parameters
    ----------
    study
        Of Optuna.
    folder
        Of the study on this machine.
    keys, values
        See `space.suggest`.
    total
        Trials of the study, over all processes and machines.
    """

    def __init__(
        self, study: optuna.Study, folder: Path, keys: Sequence[Key], values: Mapping[str, Any], total: int
    ) -> None:
        self.study, self.folder, self.keys, self.values, self.total = study, folder, keys, values, total
        self.owner = owner()

    # ---- taking up ----

    def claim(self) -> Claim | None:
        """Take up a trial that a process which is gone left on this machine, or begin a new one; None where there are enough."""
        with self.alone():
            return patiently(self._claim)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let one process of this machine at a time look for a trial."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "study.lock"):
            yield

    def _claim(self) -> Claim | None:
        trials = self.study.get_trials(deepcopy=False)
        for left in trials:
            if left.state == TrialState.RUNNING and left.user_attrs.get("owner") == self.owner:
                lock = self._lock(left.number)
                if lock is None:
                    continue
                trial = optuna.Trial(self.study, left._trial_id)
                if not self.frozen(trial).state.is_finished():  # nor has it ended since it was looked up
                    return self._begin(trial, lock, resumed=True)
                lock.release()
        if len(counted(trials)) >= self.total:
            return None
        # As a queued trial it carries its owner from its first moment on: a kill in between leaves none without one.
        if not any(trial.state == TrialState.WAITING for trial in trials):
            self.study.enqueue_trial({}, user_attrs={"owner": self.owner})
        trial = self.study.ask()
        lock = self._lock(trial.number)
        assert lock is not None, trial.number
        trial.set_user_attr("owner", self.owner)
        before = [other for other in counted(self.study.get_trials(deepcopy=False)) if other.number < trial.number]
        if len(before) >= self.total:  # another machine was quicker
            trial.set_user_attr("surplus", True)
            self.study.tell(trial, state=TrialState.FAIL)
            lock.release()
            return None
        return self._begin(trial, lock, resumed=False)

    def _begin(self, trial: optuna.Trial, lock: FileLock, *, resumed: bool) -> Claim:
        chosen = suggest(self.keys, trial, self.values)
        if "began" not in trial.user_attrs:
            trial.set_user_attr("began", time.time_ns() // 1_000_000)
        return Claim(trial, chosen, self.folder / f"trial-{trial.number:04}", resumed, lock)

    def _lock(self, number: int) -> FileLock | None:
        path = self.folder / "locks" / f"{number:04}.lock"
        path.parent.mkdir(exist_ok=True)
        lock = FileLock(path, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    # ---- reporting ----

    def report(self, claim: Claim, epoch: int, value: float) -> bool:
        """Record the value of an epoch, and return whether the trial is to end there.

        An epoch that a resumed trial comes through once more is recorded once, and decided as it was before.
        """
        return patiently(lambda: self._report(claim.trial, epoch, value))

    def _report(self, trial: optuna.Trial, epoch: int, value: float) -> bool:
        known = self.frozen(trial)
        if known.intermediate_values.get(epoch) != value:
            trial.storage.set_trial_intermediate_value(known._trial_id, epoch, value)
        if (pruned_at := known.user_attrs.get("pruned_at")) is not None:
            return bool(epoch >= pruned_at)
        if any(step > epoch for step in known.intermediate_values):
            return False
        # Not trial.should_prune, which sees only what trial.report has told it in this process.
        if not self.study.pruner.prune(self.study, self.frozen(trial)):
            return False
        trial.set_user_attr("pruned_at", epoch)
        return True

    def frozen(self, trial: optuna.Trial) -> FrozenTrial:
        """Return a trial as it stands in the storage."""
        return patiently(lambda: trial.storage.get_trial(trial._trial_id))

    # ---- ending ----

    def end(
        self, claim: Claim, state: str, *, value: float | None = None, facts: Mapping[str, Any] | None = None
    ) -> FrozenTrial:
        """End a trial as ``complete`` with a value, ``pruned`` or ``failed``; remove its folder, keep ``facts`` with it."""

        def tell() -> FrozenTrial:
            for name, fact in {**(facts or {}), "ended": time.time_ns() // 1_000_000}.items():
                claim.trial.set_user_attr(name, fact)
            states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
            return self.study.tell(claim.trial, value, state=states[state], skip_if_finished=True)

        found = patiently(tell)
        shutil.rmtree(claim.folder / "state", ignore_errors=True)
        shutil.rmtree(claim.folder / "member", ignore_errors=True)
        if state != "failed":
            shutil.rmtree(claim.folder, ignore_errors=True)
        claim.lock.release()
        return found

    # ---- looking ----

    def all(self) -> list[FrozenTrial]:
        """Return the trials that count, by number."""
        return counted(patiently(lambda: self.study.get_trials(deepcopy=False)))


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that have begun, without those that were one too many."""
    return [t for t in trials if t.state != TrialState.WAITING and not t.user_attrs.get("surplus")]


def owner() -> str:
    """Return what the trials of this working tree on this machine are known by."""
    return f"{platform.node()}:{repository()}"


def open_study(
    storage: optuna.storages.BaseStorage,
    name: str,
    *,
    folder: Path,
    metric: str,
    sampler: str,
    pruning: str,
    epochs: int,
    seed: int,
    asked: Mapping[str, Any],
) -> optuna.Study:
    """Return a study, made where there is none.

    Parameters
    ----------
    storage
        Of `open_storage`.
    name
        Of the study.
    folder
        Of the study on this machine.
    metric, sampler, pruning
        Of section ``search``.
    epochs
        Most that a trial has.
    seed
        Of params.yaml.
    asked
        Everything that its trials share, by name, plain values.

    Raises
    ------
    UserError
        The study began with something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = {key: json.dumps(value, sort_keys=True) for key, value in asked.items()}
    with FileLock(folder / "study.lock"):
        study = patiently(
            lambda: optuna.create_study(
                study_name=name,
                storage=storage,
                direction="minimize" if metric.endswith("loss") else "maximize",
                sampler=Numbered(sampler, seed),
                pruner=pruner(pruning, epochs),
                load_if_exists=True,
            )
        )
        before = patiently(lambda: study.user_attrs).get("asked")
        if before is None:
            patiently(lambda: study.set_user_attr("id", f"{time.time_ns():x}"))
            patiently(lambda: study.set_user_attr("asked", text))
            return study
    changed = sorted(key for key in {*before, *text} if before.get(key) != text.get(key))
    if changed:
        key = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"search {name}: {key}: found {_short(text.get(key))}, but the study began with {_short(before.get(key))}{more}; "
            f"allowed: what it began with, another study (--study NAME), or --fresh, which forgets its trials"
        )
    return study


def _short(text: str | None) -> str:
    text = "none" if text is None else text
    return text if len(text) <= 60 else text[:57] + "..."


def load_study(storage: optuna.storages.BaseStorage, name: str) -> optuna.Study:
    """Return a study that is there.

    Raises
    ------
    UserError
        It is not.
    """
    names = patiently(lambda: optuna.get_all_study_names(storage))
    if name not in names:
        there = f"there are {', '.join(names)}{nearest(name, names)}" if names else "there is none yet"
        raise UserError(f"search.study: no study {name!r} in search.storage; {there}")
    return optuna.load_study(study_name=name, storage=storage)


def forget(storage: optuna.storages.BaseStorage, name: str, folder: Path) -> None:
    """Delete a study and what this machine has of it.

    Raises
    ------
    UserError
        A process of this machine runs one of its trials.
    """
    for path in sorted(folder.glob("locks/*.lock")):
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            raise UserError(f"--fresh: another process runs trial {int(path.stem)} of {name}; stop it first") from None
    if name in patiently(lambda: optuna.get_all_study_names(storage)):
        patiently(lambda: optuna.delete_study(study_name=name, storage=storage))
    shutil.rmtree(folder, ignore_errors=True)


def importances(study: optuna.Study) -> dict[str, float]:
    """Return how much each key matters to the value, shares of 1 by PED-ANOVA, largest first; empty where it cannot say."""
    try:
        found = optuna.importance.get_param_importances(study)
    except (RuntimeError, ValueError):
        return {}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
