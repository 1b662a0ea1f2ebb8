"""Run a study: each of its runs with the real `fit`, kept as it ends, so that a study that was interrupted goes on."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anneal import params, tracking
from anneal.conflicts import check_recipe
from anneal.params import ParamsError, UserError
from anneal.recipe import Recipe, validate
from anneal.store import open_store, write_json
from anneal.studies.base import base_recipe
from anneal.studies.catalog import cost
from anneal.studies.data import DATA, STUDIES_FOLDER, current_data, digits_data, fingerprint, normalized, policy_folder
from anneal.studies.outputs import describe, summary, track, write_outputs
from anneal.studies.study import Job, Point, Result, Study, varied

if TYPE_CHECKING:
    from anneal.studies.recorder import Recorder

TRAINING = (
    "model",
    "init",
    "optimizer",
    "schedule",
    "batch",
    "loss",
    "regularization",
    "averaging",
    "trainer",
    "hardware",
)
"""Sections that `fit` takes."""

TRACKED = ("seed", "preprocess", "augment", *TRAINING[:-1])
"""Sections that decide what a run does."""

APART = ("studies", "search", "reporting", "tracking", "cli.py", "serving.py", "pyfunc.py", "recipe.py", "conflicts.py")
"""What of this package has no part in a run."""


PRIOR = 5.0
"""Seconds of runs that take as long as expected, which the time left starts from."""


def run_study(
    study: Study,
    values: Mapping[str, Any],
    *,
    seeds: int = 3,
    current: bool = False,
    fresh: bool = False,
) -> list[str]:
    """Run what is missing of a study, write its folder and its MLflow runs, and return its conclusions.

    ``studies/<name>/`` gets ``figure.png``, ``results.csv`` (a row a point and seed), ``curves.csv`` (a row a point, seed
    and epoch), ``conclusions.txt`` and ``runs/``, from which a study that was interrupted goes on.

    Parameters
    ----------
    study
        From `catalog.STUDIES`.
    values
        params.yaml.
    seeds
        Runs of each point.
    current
        Vary the recipe in params.yaml on data/processed, not the quick one on digits; the folder is then
        ``studies/<name>-current``.
    fresh
        Forget the runs of an earlier call.

    Raises
    ------
    UserError
        A number of seeds below 1; data that is missing; a recipe that does not validate.
    """
    if seeds < 1:
        raise UserError(f"--seeds: found {seeds}, allowed: a whole number >= 1")
    base = base_recipe(values, study.base, current=current)
    store, augmented = current_data() if current else digits_data(base)
    info = open_store(store).info
    points = possible(base, study.grid(base, info.counts["train"]), store, info.counts["train"])
    made_of = [info.digest, (augmented / "policy.json").read_text(encoding="utf-8"), code_digest()]
    jobs = plan_jobs(base, points, seeds, made_of, info.counts["train"])
    folder = STUDIES_FOLDER / (f"{study.name}-current" if current else study.name)
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    runs_key = fingerprint([study.name, sorted({job.key for job in jobs})])
    with tracking.study_run(base, study.name, key=runs_key) as tracked:
        results = run_jobs(study, jobs, folder / "runs", store, augmented, tracked)
        conclusions = study.conclude(results)
        write_outputs(study, folder, jobs, results, conclusions, base)
        for name in ("figure.png", "results.csv", "curves.csv", "conclusions.txt"):
            tracked.artifact(folder / name)
        tracked.metrics(summary(results))
        tracked.describe(describe(study, conclusions, current=current, seeds=seeds))
    return conclusions


def possible(base: Mapping[str, Any], points: Sequence[Point], store: Path, num_train: int) -> list[Point]:
    """Return the points without those optional ones that the recipe or the data refuses, which are named on the terminal."""
    found = []
    for point in points:
        try:
            if point.optional:
                recipe = checked_recipe(base, point, num_train)
                if "augment" in point.overrides:
                    policy_folder(recipe["augment"]["policy"], store)
            found.append(point)
        except ParamsError as error:
            print(
                f"{point.label}: left out; {str(error).splitlines()[0].removeprefix('params.yaml: ')}", file=sys.stderr
            )
    return found


def checked_recipe(base: Mapping[str, Any], point: Point, num_train: int) -> dict[str, Any]:
    """Return the whole params of a point.

    Raises
    ------
    ParamsError
        They do not validate.
    """
    recipe = params.merge(base, point.overrides)
    checked = validate(recipe)
    check_recipe(num_train=num_train, **{name: getattr(checked, name) for name in (*TRAINING, "preprocess")})
    return recipe


def plan_jobs(
    base: Mapping[str, Any], points: Sequence[Point], seeds: int, made_of: Sequence[str], num_train: int
) -> list[Job]:
    """Return a job a point and seed, after a check of every recipe.

    Raises
    ------
    ParamsError
        The recipe of a point does not validate.
    """
    jobs = []
    for point in points:
        recipe = checked_recipe(base, point, num_train)
        for seed in range(base["seed"], base["seed"] + seeds):
            seeded = {**recipe, "seed": seed}
            asked = [dict(point.asks)] if point.asks else []
            key = fingerprint([{name: seeded[name] for name in TRACKED}, *made_of, *asked])
            jobs.append(Job(point, seeded, key))
    return jobs


def run_jobs(
    study: Study, jobs: Sequence[Job], folder: Path, store: Path, augmented: Path, tracked: tracking.Run
) -> list[Result]:
    """Return a result a job, each from its file in ``folder``, or run now and written there."""
    info = open_store(store).info
    known = {job.key: kept for job in jobs if (kept := read_run(folder / f"{job.key}.json")) is not None}
    costs = {job.key: cost(job.recipe, info.counts["train"]) for job in jobs if job.key not in known}
    status = Status(study.name, costs, timed=store.parent == DATA)
    status.begin(len(known))
    if costs:
        import anneal.training.fit  # noqa: F401  # seconds that belong to no run
    keys, told = varied(jobs), set()
    results = []
    for job in jobs:
        if job.key not in known:
            with status.run(job):
                known[job.key] = one_run(job, store_for(job, store), policy_for(job, store, augmented), study.ask)
            write_json(folder / f"{job.key}.json", known[job.key])
        kept = known[job.key]
        result = as_result(job, kept, len(info.classes))
        results.append(result)
        if job.key not in told:
            track(tracked, job, result, keys=keys, began=kept["began"], ended=kept["ended"])
        told.add(job.key)
    status.close()
    return results


def policy_for(job: Job, store: Path, augmented: Path) -> Path:
    """Return the folder of a job's policy: the study's, or another where the point asks for one."""
    if "augment" not in job.point.overrides:
        return augmented
    return policy_folder(job.recipe["augment"]["policy"], store)


def store_for(job: Job, store: Path) -> Path:
    """Return the folder of a job's data: the study's, under another normalisation where the point asks for one.

    Raises
    ------
    UserError
        Whitening of too many dimensions.
    """
    if "preprocess" not in job.point.overrides:
        return store
    assert set(job.point.overrides["preprocess"]) <= {"normalize", "epsilon"}, "a study varies no stored image"
    section = job.recipe["preprocess"]
    return normalized(store, normalize=section["normalize"], epsilon=section["epsilon"])


class Status:
    """Where a study is: a line that is written over on a terminal, elsewhere a line of its own every ten seconds.

    Parameters
    ----------
    name
        Of the study.
    costs
        Run to about the seconds that it takes.
    timed
        Whether these are seconds here; otherwise they are a measure to share out what runs took so far.
    """

    def __init__(self, name: str, costs: Mapping[str, float], *, timed: bool) -> None:
        self.name, self.costs, self.timed = name, costs, timed
        self.number, self.done, self.spent = 0, 0.0, 0.0
        self.terminal = sys.stderr.isatty()
        self.next = 0.0

    def begin(self, num_known: int) -> None:
        """Say what is to be done."""
        if num_known:
            print(f"{self.name}: {num_known} runs are there from before; --fresh would run them again", file=sys.stderr)
        if self.costs:
            about = f", about {clock(sum(self.costs.values()))} on one core" if self.timed else ""
            print(f"{self.name}: {len(self.costs)} runs{about}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def run(self, job: Job) -> Iterator[None]:
        """Show a run before it begins, and time it."""
        self.number += 1
        self.show(
            f"{self.name}: run {self.number} of {len(self.costs)}, {job.point.label}, seed {job.recipe['seed']}"
            + self.left()
        )
        began = time.monotonic()
        yield
        self.spent += time.monotonic() - began
        self.done += self.costs[job.key]

    def left(self) -> str:
        """Return the time left, by what the runs so far took; before the first by what is known of digits."""
        left, before = sum(self.costs.values()) - self.done, PRIOR if self.timed else 0.0
        if not self.done + before:
            return ""
        return f", {clock(left * (self.spent + before) / (self.done + before))} left"

    def show(self, line: str) -> None:
        """Show a line."""
        if self.terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() >= self.next:
            print(line, file=sys.stderr, flush=True)
            self.next = time.monotonic() + 10

    def close(self) -> None:
        """Remove the line."""
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Return a duration as ``1:05``.

    >>> clock(64.6)
    '1:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


Ask = Callable[[Job, Path, Path], dict[str, Any]]


def one_run(job: Job, store: Path, augmented: Path, ask: Ask | None = None) -> dict[str, Any]:
    """Train once, into a folder that is then thrown away, and return what was seen and answered, as plain values.

    A run that diverged is a result, with what it did until then.
    """
    from anneal.studies.recorder import Recorder
    from anneal.training.fit import fit

    sections = Recipe.model_validate(job.recipe)
    recorder = Recorder()
    stopped, began = "", time.time_ns() // 1_000_000
    answers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, hidden():
        try:
            fit(
                name="study",
                store=store,
                augmented=augmented,
                out=Path(scratch) / "member",
                seed=job.recipe["seed"],
                callbacks=(recorder,),
                **{name: getattr(sections, name) for name in TRAINING},
            )
        except UserError as error:
            if not str(error).startswith("training diverged"):
                raise
            stopped = str(error)
        if ask is not None and job.point.asks and not stopped:
            answers = ask(job, Path(scratch) / "member", store)
    return {"answers": answers} | recorded(recorder, stopped, began)


def recorded(recorder: Recorder, stopped: str, began: int) -> dict[str, Any]:
    """Return what a recorder saw as plain values, without numbers that JSON cannot say."""
    return {
        "epochs": [{k: v for k, v in epoch.items() if math.isfinite(v)} for epoch in recorder.epochs],
        "steps": [list(row) for row in recorder.steps if math.isfinite(row[2])],
        "stopped": stopped,
        "images_per_second": recorder.images_per_second,
        "began": began,
        "ended": time.time_ns() // 1_000_000,
    }


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Keep what a run says about itself from the terminal."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_run(path: Path) -> dict[str, Any] | None:
    """Return a run of an earlier call, None where there is none that can be read."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) and "epochs" in kept else None


def as_result(job: Job, kept: Mapping[str, Any], num_classes: int) -> Result:
    """Return a run as the study sees it."""
    steps = [(int(step), float(rate), float(loss)) for step, rate, loss in kept["steps"]]
    speed = kept["images_per_second"]
    return Result(
        job.point,
        job.recipe["seed"],
        kept["epochs"],
        steps,
        num_classes,
        kept["stopped"],
        speed,
        kept.get("answers", {}),
    )


def code_digest() -> str:
    """Return a digest of the modules that have a part in a run."""
    root = Path(__file__).resolve().parents[1]
    paths = [path for path in sorted(root.rglob("*.py")) if path.relative_to(root).parts[0] not in APART]
    digest = hashlib.sha256()
    for path in [*paths, *(Path(__file__).with_name(name) for name in ("recorder.py", "label_change.py"))]:
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
