"""What is to be trained: variants of a recipe over seeds, what of it is there already, and how long the rest takes."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from anneal import params, tracking
from anneal.params import UserError
from anneal.tracking.names import at

FOLDER = Path(".anneal/experiments")
"""Checkouts of experiments that run, and below ``results`` what those that ended gave."""

RESULTS = FOLDER / "results"

CODE = ("preprocess", "augment", "train", "evaluate")
"""Stages that an experiment runs."""

CHEAP: dict[str, Any] = {
    "splits": ["val"],
    "grid": [],
    "soups": [],
    "bootstrap": 100,
    "mistakes": 0,
    "label_errors": 0,
    "near_duplicates": False,
    "robustness": None,
}
"""Of section ``evaluate`` in an experiment: no test data, and nothing that its figures do not need."""

OVERHEAD = 20.0
"""Seconds that an experiment takes beside its trainings: a checkout, DVC, evaluation."""


@dataclass(frozen=True)
class Experiment:
    """A variant with some of its seeds.

    Parameters
    ----------
    name
        Of the DVC experiment: the variant and a hash of all that has a part in its result.
    variant
        Label of the variant.
    values
        Whole params.
    keys
        Member to the key of its training, by which its result is kept.
    cached
        Members whose training DVC's cache holds.
    members
        Those that are trained, where they are others than those of ``keys``.
    """

    name: str
    variant: str
    values: Mapping[str, Any]
    keys: Mapping[str, str]
    cached: frozenset[str] = frozenset()
    members: tuple[str, ...] = ()

    @property
    def trainings(self) -> int:
        """How many networks are to be trained."""
        return len(self.members or self.keys) - len(self.cached)


@dataclass(frozen=True)
class Plan:
    """Variants over seeds.

    Parameters
    ----------
    keys
        Variant to member to the key of its result.
    seeds
        Member to its seed.
    todo
        Experiments without results.
    """

    keys: Mapping[str, Mapping[str, str]]
    seeds: Mapping[str, int]
    todo: Sequence[Experiment]

    @property
    def trainings(self) -> int:
        """How many networks are to be trained."""
        return sum(experiment.trainings for experiment in self.todo)

    def seconds(self, training: float, jobs: int) -> float:
        """Return about how long it takes, for so many seconds a training and so many experiments at once."""
        each = [training * one.trainings + OVERHEAD for one in self.todo]
        return max([sum(each) / max(1, min(jobs, len(each))), *each]) if each else 0.0


def make_plan(
    variants: Mapping[str, Mapping[str, Any]],
    members: Mapping[str, Mapping[str, Any] | None],
    *,
    kept: Mapping[str, Any] | None = None,
    jobs: int = 1,
) -> Plan:
    """Return what is there and what is to be done.

    Parameters
    ----------
    variants
        Label to whole params, whose members are left out of account.
    members
        Name to overrides: the seeds, the same for every variant.
    kept
        The params in the workspace, for their own seeds.
    jobs
        Experiments at once: with fewer variants, the seeds of each are shared out over several experiments.

    Raises
    ------
    UserError
        No commit, no dvc.lock, data that a checkout would not have.
    """
    seed = (kept or next(iter(variants.values())))["seed"]
    root = Path.cwd()
    check_repository(next(iter(variants.values())))
    inputs = Inputs(root)
    cache = RunCache(cache_folder(root), inputs)
    keys: dict[str, dict[str, str]] = {}
    todo: list[Experiment] = []
    # By all members, so that those that have ended do not regroup the others, which may be half trained.
    parts = shares(list(members), max(1, jobs // len(variants)))
    for label, whole in variants.items():
        keys[label] = {name: training_key(with_members(whole, members), name, inputs) for name in members}
        for part in parts:
            of = {name: key for name in part if not has_result(key := keys[label][name])}
            if not of:
                continue
            values = with_members(whole, {name: members[name] for name in of})
            held = frozenset(name for name in of if cache.holds(values, name))
            todo.append(Experiment(experiment_name(label, of), label, values, of, held))
    return Plan(keys, {name: (over or {}).get("seed", seed) for name, over in members.items()}, todo)


def shares(names: Sequence[str], count: int) -> list[list[str]]:
    """Return names in at most so many parts of about one size, none of them empty.

    >>> shares(["a", "b", "c"], 2), shares(["a"], 4), shares([], 2)
    ([['a', 'c'], ['b']], [['a']], [])
    """
    return [list(names[i::count]) for i in range(min(count, len(names)))]


# ---- recipes and seeds ----------------------------------------------------------------------------------------------


def recipe_and_seeds(
    values: Mapping[str, Any], count: int, member: str | None = None
) -> tuple[dict[str, Any], dict[str, Mapping[str, Any] | None]]:
    """Return the one recipe that is varied, and so many members that differ by their seed alone.

    The members of ``ensemble.members`` come first, under their names, so that what is trained of them is in DVC's cache.

    Parameters
    ----------
    values
        params.yaml.
    count
        Number of seeds.
    member
        The member whose overrides belong to the recipe, where members differ by more than their seed.

    Raises
    ------
    UserError
        A count below 1, no such member, members of different recipes.
    """
    if count < 1:
        raise UserError(f"seeds: found {count}, allowed: a whole number >= 1")
    given: Mapping[str, Mapping[str, Any] | None] = values["ensemble"]["members"]
    base = dict(values)
    if member is not None:
        params.member(values, member)  # says which there are
        base = params.merge(values, {key: value for key, value in (given[member] or {}).items() if key != "seed"})
        given = {member: {"seed": (given[member] or {}).get("seed", values["seed"])}}
    for name, overrides in given.items():
        if further := [key for key in overrides or {} if key != "seed"]:
            raise UserError(
                f"ensemble.members.{name}: changes {', '.join(further)} beside the seed, so that there is no one recipe "
                f"to vary, allowed: --member {name}, for the recipe of that member"
            )
    chosen: dict[str, Mapping[str, Any] | None] = {}
    seeds: set[int] = set()
    for name, overrides in given.items():
        seed = (overrides or {}).get("seed", values["seed"])
        if seed not in seeds and len(chosen) < count:
            chosen[name] = overrides
            seeds.add(seed)
    for seed in itertools.count():
        if len(chosen) == count:
            break
        if seed not in seeds and (name := f"s{seed}") not in given:
            chosen[name] = {"seed": seed}
            seeds.add(seed)
    return base, chosen


def with_members(values: Mapping[str, Any], members: Mapping[str, Any]) -> dict[str, Any]:
    """Return a variant's params with these members, for figures on ``val`` alone and nothing that these do not need."""
    evaluate = {key: CHEAP.get(key, value) for key, value in values["evaluate"].items()}
    evaluate["tta"] = {**evaluate["tta"], **({"select": "none"} if "select" in evaluate["tta"] else {})}
    ensemble = {**values["ensemble"], "members": dict(members), "combine": "probability_mean"}
    return {**values, "evaluate": evaluate, "ensemble": ensemble, "registry": {**values["registry"], "name": None}}


# ---- names and keys -------------------------------------------------------------------------------------------------


def training_key(values: Mapping[str, Any], name: str, inputs: Inputs) -> str:
    """Return 16 hexadecimal digits over all that has a part in the predictions of a member on ``val``."""
    sections, tta = decisive(values)
    seed = (values["ensemble"]["members"][name] or {}).get("seed", values["seed"])
    return hexadecimal([sections, seed, tta, inputs.digest(values)])[:16]


def decisive(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all params but the seed that have a part in a member's predictions on ``val``: whole sections, and TTA."""
    apart = (*params.UNTRACKED, "registry", "ensemble", "evaluate")
    return {key: value for key, value in values.items() if key not in apart}, with_members(values, {})["evaluate"][
        "tta"
    ]


def hexadecimal(made_of: Any) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def experiment_name(label: str, keys: Mapping[str, str]) -> str:
    """Return a name that git takes for a reference: the label, and a hash of the members' names and keys.

    >>> experiment_name("weight decay", {"a": "01"})
    'weight-decay-d4d13547'
    """
    words = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-").lower() or "variant"
    return f"{words[:60]}-{hexadecimal(dict(keys))[:8]}"


def result_files(key: str) -> tuple[Path, Path]:
    """Return where a result is kept: its arrays, and what else is known of it, which is written last."""
    return RESULTS / f"{key}.npz", RESULTS / f"{key}.json"


def has_result(key: str) -> bool:
    """Say whether a training has ended and its predictions are kept."""
    return all(path.exists() for path in result_files(key))


# ---- what the pipeline reads ----------------------------------------------------------------------------------------


class Inputs:
    """Hashes of the code and the data that the stages of an experiment read, as dvc.lock would have them.

    Parameters
    ----------
    root
        The repository.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hashes: dict[str, str] = {}

    @cached_property
    def stages(self) -> dict[str, dict[str, Any]]:
        """dvc.yaml's block of each stage."""
        found = params.read_yaml(self.root / "dvc.yaml")["stages"]
        return {name: found[name].get("do", found[name]) for name in CODE}

    @cached_property
    def outs(self) -> set[str]:
        """What stages write."""
        return {out for block in self.stages.values() for key in ("outs", "metrics") for out in block.get(key, [])}

    def hash_of(self, path: str) -> str:
        """Return the md5 of a file or a folder; of one that DVC tracks, what its .dvc file says."""
        if path not in self.hashes:
            tracked = self.root / f"{path}.dvc"
            known = params.read_yaml(tracked).get("outs", [{}])[0].get("md5") if tracked.is_file() else None
            self.hashes[path] = known or tracking.dvc_hash(self.root / path, self.root) or ""
        return self.hashes[path]

    def deps(self, stage: str, values: Mapping[str, Any], member: str = "") -> dict[str, str | None]:
        """Return a stage's deps, each with its hash, or None where another stage writes it."""
        found: dict[str, str | None] = {}
        for dep in self.stages[stage].get("deps", []):
            path = filled(dep, values, member)
            written = path in self.outs or path in ("models", "data/processed", "data/augmented")
            found[path] = None if written else self.hash_of(path)
        return found

    def digest(self, values: Mapping[str, Any]) -> str:
        """Return a hash over all code and data that an experiment reads."""
        return hexadecimal({path: md5 for stage in CODE for path, md5 in self.deps(stage, values).items() if md5})


def filled(text: str, values: Mapping[str, Any], member: str = "") -> str:
    """Return a text of dvc.yaml with ``${key}`` replaced by the member and ``${section.key}`` by its value.

    >>> filled("${data.path} ${key}", {"data": {"path": "x.zip"}}, "a")
    'x.zip a'
    """
    return re.sub(
        r"\$\{([\w.]+)\}", lambda m: member if m[1] == "key" else str(at(values, *m[1].split("."))), str(text)
    )


class RunCache:
    """DVC's run cache, read to tell which trainings it holds; DVC itself decides, when it runs.

    Parameters
    ----------
    folder
        DVC's cache.
    inputs
        Hashes of what stages read.
    """

    def __init__(self, folder: Path, inputs: Inputs) -> None:
        self.folder, self.inputs = folder, inputs
        self.parsed: dict[Path, dict[str, Any]] = {}

    @cached_property
    def by_command(self) -> dict[str, list[Path]]:
        """Entries by their command, which is their first line, the newest first."""
        found: dict[str, list[tuple[float, Path]]] = {}
        for path in (self.folder / "runs").glob("*/*/*"):
            with suppress(OSError), path.open(encoding="utf-8") as file:
                command = file.readline().removeprefix("cmd: ").strip()
                found.setdefault(command, []).append((path.stat().st_mtime, path))
        return {command: [path for _, path in sorted(entries, reverse=True)] for command, entries in found.items()}

    def holds(self, values: Mapping[str, Any], member: str) -> bool:
        """Say whether a member's training, and the data that it trains on, are there."""
        outs: dict[str, str] = {}
        for stage, name in (("preprocess", ""), ("augment", ""), ("train", member)):
            found = self.outs(stage, values, name, outs)
            if found is None:
                return False
            outs |= found
        return True

    def outs(
        self, stage: str, values: Mapping[str, Any], member: str, made: Mapping[str, str]
    ) -> dict[str, str] | None:
        """Return the hashes of what a stage wrote from these params and deps; None where it never ran on them."""
        block = self.inputs.stages[stage]
        wanted = {filled(name, values, member): None for name in block.get("params", [])}
        read = {name: at(values, *name.split(".")) for name in wanted}
        deps = {
            path: made.get(path) if md5 is None else md5
            for path, md5 in self.inputs.deps(stage, values, member).items()
        }
        for path in self.by_command.get(filled(block["cmd"], values, member), []):
            entry = self.entry(path)
            if entry.get("params", {}).get("params.yaml") == read and hashes(entry, "deps") == deps:
                outs = hashes(entry, "outs")
                if all(self.object(md5) for md5 in outs.values()):
                    return outs
        return None

    def entry(self, path: Path) -> dict[str, Any]:
        """Return what an entry says; nothing where it cannot be read."""
        if path not in self.parsed:
            try:
                self.parsed[path] = params.read_yaml(path)
            except UserError:
                self.parsed[path] = {}
        return self.parsed[path]

    def object(self, md5: str) -> bool:
        """Say whether the cache holds these bytes."""
        return (self.folder / "files/md5" / md5[:2] / md5[2:]).exists()


def hashes(entry: Mapping[str, Any], key: str) -> dict[str, str]:
    """Return path to md5 of an entry of dvc.lock or of the run cache."""
    return {item["path"]: item.get("md5", "") for item in entry.get(key, [])}


def cache_folder(root: Path) -> Path:
    """Return DVC's cache, wherever DVC's configuration puts it, the user's and the system's too."""
    from dvc.config import Config, ConfigError

    try:
        place = Config(str(root / ".dvc"))["cache"].get("dir", "cache")
    except ConfigError as error:
        raise UserError(f"dvc: {params.one_line(str(error))}") from None
    return (root / ".dvc" / place).resolve()


# ---- refusals -------------------------------------------------------------------------------------------------------


def check_repository(values: Mapping[str, Any]) -> None:
    """Refuse a repository whose checkout would not run.

    Raises
    ------
    UserError
        No commit; no dvc.lock; a file of the pipeline that git does not track, or data or weights to start from that
        neither git nor DVC tracks.
    """
    head = git("rev-parse", "--verify", "--quiet", "HEAD", check=False)
    if head.returncode:
        raise UserError("git: this repository has no commit yet, which experiments start from; git add -A, git commit")
    if not Path("dvc.lock").exists():
        raise UserError("dvc.lock: no such file; train the recipe itself first: make repro, or dvc repro")
    for key, path in named_paths(values).items():
        _check_tracked(key, path)
    untracked = git("ls-files", "--others", "--exclude-standard", "--", "src", "stages", "dvc.yaml", "params.yaml")
    if untracked.stdout:
        first = untracked.stdout.splitlines()[0]
        raise UserError(f"{first}: not tracked by git, so that an experiment cannot see it; run: git add {first}")


def named_paths(values: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files and folders that params name relative to the repository, by their key."""
    named = {"data.path": values["data"]["path"], "model.start_from.path": values["model"]["start_from"]["path"]}
    return {key: Path(path) for key, path in named.items() if path is not None and not Path(path).is_absolute()}


def _check_tracked(key: str, path: Path) -> None:
    if not (Path.cwd() / path).resolve().is_relative_to(Path.cwd().resolve()):
        raise UserError(
            f"{key}: found {path}, which a checkout of this repository would look for elsewhere, "
            f"allowed: an absolute path, or a path inside it (dvc add, dvc import-url)"
        )
    if in_dvc(path):
        return
    if not git("ls-files", "--", str(path)).stdout:
        raise UserError(
            f"{key}: found {path}, which neither git nor DVC tracks, so that an experiment cannot see it; "
            f"run: dvc add {path}"
        )
    for name in filter(None, git("ls-files", "-z", "--others", "--", str(path)).stdout.split("\0")):
        if Path(name).name != ".gitignore" and not in_dvc(Path(name)):
            raise UserError(
                f"{key}: found {path}, of which git does not track {name}, so that an experiment cannot see it; "
                f"run: git add -f {name}, or give all of {path} to DVC"
            )


def in_dvc(path: Path) -> bool:
    """Say whether a path of the repository, or a folder above it, has a .dvc file."""
    return any(Path(f"{each}.dvc").exists() for each in (path, *path.parents) if each != Path())


def git(*arguments: str, folder: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run git.

    Raises
    ------
    UserError
        git is not there, or fails.
    """
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise UserError("git: no such program; experiments are kept in git") from None
    if check and done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"git {arguments[0]}: {reason[-1] if reason else f'exit code {done.returncode}'}")
    return done
