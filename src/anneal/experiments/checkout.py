"""A checkout of the repository for one experiment, with params of its own and the cache of all, and its way back."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anneal.experiments.plan import Experiment, cache_folder, git, named_paths
from anneal.store import write_json, write_text

READY = "job.json"
"""Written once a checkout is complete."""

EXPERIMENTS = "refs/exps"
"""Where DVC keeps experiments in git, below the commit that they start from."""


def prepare(experiment: Experiment, folder: Path, root: Path) -> Path:
    """Make the checkout of an experiment below ``folder``, or leave the one that an interrupted call has made.

    It shares git's objects and DVC's cache with the repository. It holds what git tracks, with the changes in the
    workspace; so nobody's workspace is touched, and training that was interrupted goes on from its checkpoint.

    Returns
    -------
    Path
        The checkout.

    Raises
    ------
    UserError
        git fails, or the disk is full.
    """
    checkout = folder / "checkout"
    if (folder / READY).exists():
        return checkout
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    git("clone", "--quiet", "--shared", "--no-checkout", str(root), str(checkout))
    for key, otherwise in (("user.name", "anneal"), ("user.email", "anneal@localhost")):
        known = git("config", key, folder=root, check=False).stdout.strip()
        git("config", key, known or otherwise, folder=checkout)
    for name in files(root, experiment.values):
        source, target = root / name, checkout / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    git("reset", "--quiet", folder=checkout)
    git("add", "--all", folder=checkout)  # files that are new too, for the experiment's commit
    write_params(checkout / "params.yaml", experiment.values)
    configure(checkout, root)
    write_json(
        folder / READY,
        {
            "name": experiment.name,
            "variant": experiment.variant,
            "keys": dict(experiment.keys),
            "values": dict(experiment.values),
            "root": str(root),
        },
    )
    return checkout


def files(root: Path, values: Mapping[str, Any]) -> list[str]:
    """Return what a checkout needs: the files that git tracks, dvc.lock, and the .dvc files of what params name."""
    tracked = git("ls-files", "-z", "--cached", folder=root).stdout.split("\0")
    beside = [
        f"{each}.dvc" for path in named_paths(values).values() for each in (path, *path.parents) if each != Path()
    ]
    return [*dict.fromkeys([*filter(None, tracked), "dvc.lock", *beside])]


def write_params(path: Path, values: Mapping[str, Any]) -> None:
    """Write values into a params.yaml, keeping its comments."""
    from ruamel.yaml import YAML

    round_trip = YAML()
    round_trip.preserve_quotes = True
    round_trip.width = 4096
    round_trip.representer.add_representer(
        type(None), lambda dump, _: dump.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    tree = round_trip.load(path.read_text(encoding="utf-8"))
    assign(tree, values)
    buffer = io.StringIO()
    round_trip.dump(tree, buffer)
    write_text(path, buffer.getvalue())


def assign(tree: Any, values: Mapping[str, Any]) -> None:
    """Make a tree equal to values, touching nothing that is equal already."""
    for key in [key for key in tree if key not in values]:
        del tree[key]
    for key, value in values.items():
        old = tree.get(key)
        if isinstance(value, Mapping) and value and isinstance(old, Mapping) and old:
            assign(old, value)
        elif key not in tree or old != value or kind(old) != kind(value):
            tree[key] = value


def kind(value: Any) -> tuple[bool, bool]:
    """Return what tells apart values that Python finds equal: 1, 1.0 and true."""
    return isinstance(value, bool), isinstance(value, float)


def configure(checkout: Path, root: Path) -> None:
    """Have the checkout's DVC use the repository's cache and whatever else it is configured to, for this machine."""
    import configparser

    config = configparser.ConfigParser(interpolation=None, strict=False)
    config.read(root / ".dvc/config.local", encoding="utf-8")
    if not config.has_section("cache"):
        config.add_section("cache")
    config.set("cache", "dir", str(cache_folder(root)))
    path = checkout / ".dvc/config.local"
    with path.open("w", encoding="utf-8") as file:
        path.chmod(0o600)  # it may hold secrets
        config.write(file)


def environment(name: str, root: Path, checkout: Path) -> dict[str, str]:
    """Return the variables of an experiment's processes: as DVC sets them, and with programs of this Python first."""
    import sys

    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "DVC_ROOT": str(root),  # so that all experiments log to the repository's MLflow store
        "DVC_EXP_NAME": name,
        "DVC_EXP_BASELINE_REV": git("rev-parse", "HEAD", folder=checkout).stdout.strip(),
        "DVC_SITE_CACHE_DIR": str(checkout / ".dvc/tmp/site"),
        "DVC_NO_ANALYTICS": "1",
    }


def save(name: str, checkout: Path) -> str:
    """Make the checkout's state a DVC experiment, a commit on top of the one that it started from; return its reference.

    Not by ``dvc exp save``, which also rewrites the .dvc files of data that is not there and commits a file of its own.
    """
    baseline = git("rev-parse", "HEAD", folder=checkout).stdout.strip()
    git("add", "--update", folder=checkout)
    git("add", "--force", "dvc.lock", "params.yaml", folder=checkout)
    message = ("--quiet", "--no-verify", "--no-gpg-sign", "--allow-empty", "-m", f"dvc: commit experiment {name}")
    git("-c", f"core.hooksPath={os.devnull}", "commit", *message, folder=checkout)
    reference = f"{EXPERIMENTS}/{baseline[:2]}/{baseline[2:]}/{name}"
    git("update-ref", reference, "HEAD", folder=checkout)
    return reference


def fetch(name: str, checkout: Path, root: Path) -> None:
    """Bring a saved experiment into the repository, where ``dvc exp show`` lists it."""
    listed = git("for-each-ref", "--format=%(refname)", EXPERIMENTS, folder=checkout).stdout.split()
    for reference in listed:
        if reference.rsplit("/", 1)[-1] == name:
            git("fetch", "--quiet", str(checkout), f"+{reference}:{reference}", folder=root)


def remove(folder: Path) -> None:
    """Remove an experiment's checkout, whose results are kept elsewhere."""
    (folder / READY).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def claim(folder: Path, patience: float = 0.0) -> int | None:
    """Take a folder for this process; a file descriptor, None where another has it and keeps it for so many seconds."""
    import time

    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    if os.name == "nt":
        return descriptor
    import fcntl

    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= end:
                os.close(descriptor)
                return None
            time.sleep(0.2)
