"""The journal of a stage: an append-only file of its calls, which is what they are sent from, and the folder around it.

`<repository>/.anneal/tracking/<time>-<process>-<stage>[-<member>]/` holds `journal.jsonl` (a line a call),
`context.json` (what is true only while the stage runs: commit, process), `sent.json` (how far it has been sent), `lock`
(held by who sends it) and `kept/` (files that calls name). The standard library is all that this module needs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

CHUNK = 1 << 22
"""Bytes that are read at a time."""

FOLDER = Path(".anneal/tracking")
"""Place of the journals, below the repository."""


class Line(NamedTuple):
    """One call: its name, its arguments, the offset behind it; without a name where the line is torn."""

    name: str
    arguments: dict[str, Any]
    end: int


class Journal:
    """The folder of one stage execution."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "journal.jsonl"

    @property
    def name(self) -> str:
        """The folder's name, which is the tag ``journal`` of its run."""
        return self.folder.name

    def read(self, offset: int = 0) -> list[Line]:
        """Return the whole lines behind ``offset``, some megabytes of them at most."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            data = file.read(CHUNK)
            while not data[: data.rfind(b"\n") + 1].strip() and (more := file.read(CHUNK)):  # not one whole line yet
                data += more
        lines = []
        for raw in data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]:
            offset += len(raw) + 1
            if not raw:
                continue
            try:
                name, arguments = json.loads(raw)
            except ValueError:  # the first part of a line that did not fit on the disk, and was written again
                name, arguments = "", {}
            lines.append(Line(name, arguments, offset))
        return lines

    def lines(self, offset: int = 0) -> Iterator[Line]:
        """Give all whole lines behind ``offset``, torn ones left out."""
        while found := self.read(offset):
            yield from (line for line in found if line.name)
            offset = found[-1].end

    def tail(self) -> list[Line]:
        """Return the last lines, a megabyte of them at most but for a longer one."""
        with open(self.path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 20)))
            start = file.tell() + len(file.readline()) if file.tell() else 0
        return list(self.lines(start)) or list(self.lines())

    def first(self) -> dict[str, Any]:
        """Return the arguments of the first call, which starts the run; empty where there is none yet."""
        with suppress(OSError):
            return next((line.arguments for line in self.lines()), {})
        return {}

    def abandoned(self) -> bool:
        """Say whether the stage is gone; who sends the journal may still be there."""
        try:
            with open(self.path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Lock the journal for the block; gives whether that worked."""
        with locked(self.folder / "lock") as mine:
            yield mine and self.path.exists()

    def load(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file of the folder, empty where there is none."""
        try:
            return dict(json.loads((self.folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def save(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file into the folder, whole or not at all."""
        new = self.folder / f"{name}.new"
        new.write_text(json.dumps(values), encoding="utf-8")
        os.replace(new, self.folder / name)

    def remove(self) -> None:
        """Remove the folder, in a way that a half removed one is no journal."""
        done = self.folder.with_name(f"{self.name}.done")
        os.replace(self.folder, done)
        shutil.rmtree(done, ignore_errors=True)

    def pack(self, offset: int, hash_of: Callable[[Path], str | None]) -> None:
        """Make what is behind ``offset`` independent of the working tree: copy the files that calls name, take hashes.

        What is before ``offset`` stays as it is, so that the offset holds.
        """
        start, new = self.first(), [self.path.read_bytes()[:offset]]
        for line in self.lines(offset):
            with suppress(OSError):  # a file that is gone or does not fit stays a name
                self._keep(line.arguments, line.name, start, hash_of)
            new.append(encode(line.name, line.arguments))
        packed = self.path.with_name("journal.new")
        packed.write_bytes(b"".join(new))
        os.replace(packed, self.path)

    def _keep(
        self, arguments: dict[str, Any], name: str, start: dict[str, Any], hash_of: Callable[[Path], str | None]
    ) -> None:
        here = Path(start.get("cwd", "."))
        if name == "artifact" and os.path.isabs(arguments["path"]):
            place = self._place()
            copy(Path(arguments["path"]), place / Path(arguments["path"]).name)
            arguments["path"] = (place / Path(arguments["path"]).name).relative_to(self.folder).as_posix()
        elif name == "predictor" and os.path.isabs(arguments["base"]):
            place = self._place()
            for file in arguments["files"]:
                copy(Path(arguments["base"]) / file, place / file)
            arguments["base"] = place.relative_to(self.folder).as_posix()
        elif name == "link" and "md5" not in arguments:
            arguments["md5"] = hash_of(here / arguments["path"])
        elif name == "finish" and arguments["status"] == "FINISHED" and "outs" not in arguments:
            arguments["outs"] = {out: hash_of(here / out) for out in start.get("outs", [])}

    def _place(self) -> Path:
        kept = self.folder / "kept"
        kept.mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(dir=kept, prefix=""))


class Writer:
    """Appends calls to a journal, a line in one write; safe under threads.

    Parameters
    ----------
    path
        Of the file.
    own
        Whether this is the stage, whose life a lock on the file stands for.
    """

    def __init__(self, path: Path, *, own: bool = False) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._waiting: list[bytes] = []
        self._mutex = threading.Lock()
        if own:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def waiting(self) -> int:
        """Number of lines that could not be written yet."""
        return len(self._waiting)

    def append(self, name: str, arguments: dict[str, Any], default: Callable[[Any], Any] | None = None) -> None:
        """Write a call, after those that could not be written before.

        Raises
        ------
        OSError
            It cannot be written now, and is kept in memory for the next call.
        TypeError, ValueError
            JSON has no form for an argument.
        """
        line = encode(name, arguments, default)
        with self._mutex:
            self._waiting.append(line)
            while self._waiting:
                # The file has two writers, and half a line of the other may stand at its end: begin a new one.
                line = b"\n" + self._waiting[0]
                if os.write(self._file, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._waiting.pop(0)

    def close(self) -> None:
        """Close the file, with it the stage's lock."""
        with suppress(OSError):
            os.close(self._file)


def encode(name: str, arguments: dict[str, Any], default: Callable[[Any], Any] | None = None) -> bytes:
    """Return a call as a line."""
    return json.dumps([name, arguments], default=default).encode() + b"\n"


def create(root: Path, stage: str, member: str | None) -> Journal:
    """Make the folder of a stage execution below ``root``, which nobody else on this machine may read."""
    base = root / FOLDER
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    ignore = base / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
    when = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    folder = base / "-".join(filter(None, [when, str(os.getpid()), stage, member]))
    folder.mkdir(mode=0o700)
    return Journal(folder)


def journals(root: Path) -> list[Journal]:
    """Return the journals below ``root``, oldest first; what a removal has left behind goes."""
    found = []
    for folder in sorted(path for path in (root / FOLDER).glob("*/") if path.is_dir()):
        if folder.suffix == ".done":
            shutil.rmtree(folder, ignore_errors=True)
        elif (folder / "journal.jsonl").exists():
            found.append(Journal(folder))
    return found


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Hold a lock file for the block, after waiting so many seconds for it; gives whether it is held.

    The lock goes with the process, however that ends.
    """
    end = time.monotonic() + patience
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield False
        return
    try:
        mine = False
        while not mine:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = True
            if not mine and time.monotonic() >= end:
                break
            if not mine:
                time.sleep(0.05)
        yield mine
    finally:
        os.close(file)


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)
