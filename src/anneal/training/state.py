"""What a run that has not ended leaves for the next one to go on from: one folder a member, one trainer at a time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anneal.params import UserError
from anneal.processes import is_first_process
from anneal.store import write_json

PACKAGES = ("torch", "pytorch-lightning", "numpy", "albumentations", "opencv-python-headless", "pytorch_optimizer")
"""Distributions whose version a resumed run must share: they make the numbers, and read the checkpoint."""

PATIENCE = 15.0
"""Seconds that a run waits for one before it to end: a trainer whose ``dvc`` was killed still finishes its step."""

Fingerprint = dict[str, str]
"""``params``, ``data``, ``code`` and ``packages`` to a hash each."""


@dataclass(frozen=True)
class RunState:
    """Where the checkpoints of a run are, and what they must agree with.

    Parameters
    ----------
    folder
        Of this member alone.
    fingerprint
        See `fingerprint`.
    """

    folder: Path
    fingerprint: Fingerprint

    def begun(self) -> list[str] | None:
        """Return which parts of the fingerprint have changed since a run in this folder began; None where none did."""
        try:
            before = json.loads((self.folder / "fingerprint.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(before, dict):
            return None
        return changed(before, self.fingerprint)

    def begin(self) -> bool:
        """Take the folder for this fingerprint, and return whether a run of it began here before.

        What a run of another one left there is deleted; a line on stderr names what has changed. To be called before there
        is a run in MLflow, so that one which is killed before its first step goes on as the same run, too. Of several
        processes the first does all this.
        """
        if not is_first_process():
            return False
        changes = self.begun()
        if changes:
            what = " and ".join(changes)
            line = f"{self.folder.name}: {what} changed since the run that was interrupted here: starting anew"
            print(line, file=sys.stderr, flush=True)
        if changes != []:
            self.forget()
            write_json(self.folder / "fingerprint.json", self.fingerprint)
        for half in self.folder.glob("*.tmp"):  # of a checkpoint that was being written when the run was killed
            half.unlink(missing_ok=True)
        return changes == []

    def forget(self) -> None:
        """Delete the folder: the outs exist."""
        shutil.rmtree(self.folder, ignore_errors=True)


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in which parts two fingerprints differ.

    >>> changed({"params": "a", "data": "b"}, {"params": "a", "data": "c"})
    ['data']
    """
    return [part for part in now if before.get(part) != now[part]]


def fingerprint(params: Mapping[str, Any], data: Sequence[Path], code: Sequence[Path]) -> Fingerprint:
    """Return hashes over everything that a run's result is a function of.

    Parameters
    ----------
    params
        What the run reads of params.yaml, plain values.
    data, code
        Files, and folders of which all files count.

    Returns
    -------
    dict
        ``params``, ``data``, ``code`` and ``packages`` (`PACKAGES`) to 32 hexadecimal digits.
    """
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "params": _hash(json.dumps(params, sort_keys=True, default=str).encode()),
        "data": _hash_of_files(data),
        "code": _hash_of_files(code),
        "packages": _hash(json.dumps(versions, sort_keys=True).encode()),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # not all of them are needed
        return "none"


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _hash_of_files(paths: Sequence[Path]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for path in sorted(paths):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                with open(file, "rb") as content:
                    digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
                total.update(f"{file.as_posix()}\0{digest}\0".encode())
    return total.hexdigest()


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[None]:
    """Keep the folder of a member for this process: by a file lock, which ends with the process whatever ends it.

    Of the processes of one run only the first claims it.

    Raises
    ------
    UserError
        Another process trains this member, and goes on doing so.
    """
    if not is_first_process():
        yield
        return
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{name}: another process still trains this member; waiting for it to end", file=sys.stderr, flush=True)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            owner = _owner(path)
            raise UserError(
                f"train@{name}: another process{owner} trains this member in this folder (it holds {path}); wait for "
                f"it, or stop it, and run again"
            ) from None
    try:
        path.with_suffix(".pid").write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def _owner(path: Path) -> str:
    try:
        return f" ({path.with_suffix('.pid').read_text(encoding='utf-8').strip()})"
    except OSError:
        return ""
