"""Raw data in: folder, zip/tar, IDX, CIFAR binary, CSV/Parquet table."""

from __future__ import annotations

import bz2
import copy
import csv
import gzip
import hashlib
import lzma
import math
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO, Literal, Self, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field

from anneal.params import Strict, UserError, nearest, one_line

Format = Literal["auto", "folder", "archive", "idx", "cifar", "table"]
Pixels = npt.NDArray[np.uint8]

SPLITS = ("train", "val", "test")
SPLIT_SYNONYMS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val or test",
    "test": "test",
    "testing": "test",
}
"""Lower-case names that data sets give the folders of their splits, to ours."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
NOT_DATA = ("Thumbs.db", "desktop.ini", "__MACOSX")
TABLES = ("labels.csv", "labels.parquet")
COLUMNS = ("path", "label", "split")
CHECKSUMS = "MD5SUMS"
MAX_FILE_BYTES = 512 * 2**20
MAX_EXPANDED_BYTES = 2**30
MAX_RATIO = 200
"""A compressed file may expand to `MAX_EXPANDED_BYTES` or to so many times its size, whatever is more."""

MAX_NAME_LENGTH = 4096
MAX_HEADER_BYTES = 32 * 2**10
"""Of one extended header in a tar; reading one takes memory with the square of its size."""

MAX_LONE_FOLDERS = 32
MAX_ROWS = 50_000_000
BLOCK_BYTES = 4 * 2**20

OUTS = tuple(map(Path, ("data/processed", "data/augmented", "models", "reports", "mlruns")))
"""Folders that the pipeline writes to."""


class DataConfig(Strict):
    """Section ``data``: where the images are and what is refused."""

    path: Annotated[str, Field(min_length=1)]
    format: Format
    limit: Annotated[int, Field(ge=1)] | None
    max_rejected: Annotated[float, Field(ge=0, le=1)]
    max_pixels: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class Item:
    """One labelled image of a source.

    Parameters
    ----------
    file
        Path inside the source, of the image or of the file that holds it.
    label
        Name of its class.
    split
        train, val or test where the source brings splits, otherwise None.
    content
        The image file's bytes; a picklable function that reads them; or the pixels, uint8 (H, W, C).
    index
        Position in a file that holds many images.
    """

    file: str
    label: str
    split: str | None
    content: bytes | Callable[[], bytes] | Pixels
    index: int | None = None

    @property
    def name(self) -> str:
        """The source of the image as reports show it, e.g. ``cat/1.png`` or ``train-images-idx3-ubyte.gz#123``."""
        return self.file if self.index is None else f"{self.file}#{self.index}"

    def load(self) -> bytes | Pixels:
        """Return the content; raise ValueError or OSError with the reason where it cannot be read."""
        return self.content() if callable(self.content) else self.content


@dataclass(frozen=True)
class Rejected:
    """A file that was left out, and why."""

    source: str
    reason: str


Place = tuple[str, str | None]
"""Class and split of an image; no split where the source brings none."""


@dataclass(frozen=True)
class Source:
    """Labelled images, read one after the other, in an order of the source's own.

    Parameters
    ----------
    format
        Which of the formats it is.
    classes
        Names of all classes, sorted, those without an image included.
    num_items
        Number of items.
    num_bytes
        Size of the encoded image files; 0 where the images are plain pixels.
    read
        Starts reading from the beginning.
    places
        Yields the class and the split of every item, in any order, without reading the images.
    rejected
        Files left out before any was decoded.
    """

    format: str
    classes: list[str]
    num_items: int
    num_bytes: int
    read: Callable[[], Iterator[Item]]
    places: Callable[[], Iterable[Place]]
    rejected: list[Rejected] = field(default_factory=list)

    def __len__(self) -> int:
        return self.num_items

    def __iter__(self) -> Iterator[Item]:
        return self.read()


@dataclass
class Files:
    """The files of a folder or an archive.

    Parameters
    ----------
    sizes
        Name with ``/`` between its parts, to size in bytes; sorted.
    folders
        Folders, empty ones included.
    stream
        Yields (name, content), where content is bytes or a picklable function that reads them.
    rejected
        What is no file, or leads out.
    """

    sizes: dict[str, int]
    folders: list[str]
    stream: Callable[[], Iterator[tuple[str, bytes | Callable[[], bytes]]]]
    rejected: list[Rejected]


def open_source(path: Path | str, format: str = "auto") -> Source:
    """Open raw data for reading.

    Raises
    ------
    UserError
        There is nothing at ``path``, or nothing that is understood, or a file is damaged or not the one expected.
    """
    _check_path(path)
    path = Path(path)
    if not os.path.exists(path):
        tracked = f"{path}.dvc"
        hint = f"; `dvc pull {tracked}` or `dvc update {tracked}` fetches it" if os.path.exists(tracked) else ""
        raise UserError(f"data.path: {path} does not exist{hint}")
    try:
        source = _open(path, format)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"data.path: {error.filename or path} cannot be read: {error.strerror}") from None
        raise _damaged(path, error) from None
    if not len(source) and not source.rejected:
        raise UserError(
            f"data.path: there are no images in {path}; expected <class>/<image> or <train|val|test>/<class>/<image>, "
            "an IDX or CIFAR binary folder, or a table with path and label"
        )
    return source


def _check_path(path: Path | str) -> None:
    if "\0" in os.fspath(path):
        raise UserError("data.path: found a null byte, allowed: the path of a file or folder")


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(f"data.path: {path} is damaged: {_reason(error)}")


def _reason(error: BaseException) -> str:
    return one_line(" ".join(str(error).split())[:200]) or type(error).__name__


def _open(path: Path, format: str) -> Source:
    if not path.is_dir() and not path.is_file():
        raise UserError(f"data.path: {path} is no data set: not a regular file")  # reading a pipe may take forever
    kind = detect(path) if format == "auto" else format
    if (kind in ("folder", "idx", "cifar")) != path.is_dir() and not (kind == "table" and path.is_dir()):
        found = "a folder" if path.is_dir() else "a file"
        raise UserError(f"data.format: {kind} does not fit {path}, which is {found}; auto finds out by itself")
    return READERS[kind](path)


def check_outs(path: Path | str, outs: Iterable[Path] = OUTS) -> None:
    """Check that raw data hold nothing that the pipeline writes, or each run would change its own input.

    Raises
    ------
    UserError
        ``path`` is or holds one of ``outs``, or lies in one.
    """
    _check_path(path)
    for out in outs:
        inner, outer = Path(os.path.realpath(out)), Path(os.path.realpath(path))
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise UserError(
                f"data.path: {path} overlaps {out}, which the pipeline writes; move the images to a folder of their own"
            )


def detect(path: Path) -> str:
    """Tell the format of existing raw data.

    Raises
    ------
    UserError
        A file of no known kind.
    """
    if path.is_dir():
        names = sorted(entry.name for entry in os.scandir(path))
        if any(IDX_IMAGES.fullmatch(name.removesuffix(".dvc")) for name in names):
            return "idx"
        if any(name in CIFAR for name in names):
            return "cifar"
        return "table" if any(name in names for name in TABLES) else "folder"
    if path.suffix.lower() in (".csv", ".parquet"):
        return "table"
    if path.is_file() and (zipfile.is_zipfile(path) or _is_tar(path)):
        return "archive"
    raise UserError(
        f"data.path: {path} is no data set; allowed: a folder, a zip or tar archive, an IDX or CIFAR binary folder, "
        "a CSV or Parquet table"
    )


# ---- folders and archives -------------------------------------------------------------------------------------------


def read_file(path: Path | str) -> bytes:
    """Read a regular file, never waiting for a pipe or a device.

    Raises
    ------
    ValueError
        It is no regular file, or too large to be an image.
    OSError
        It cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        _check_size(status.st_size)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise UserError(f"data.path: {path}: not a regular file")


def _read_text(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"data.path: {path}: not UTF-8 text") from None
    except ValueError as error:
        raise UserError(f"data.path: {path}: {error}") from None


def _check_expansion(path: Path, size: int) -> None:
    """Refuse a compressed file that expands to ``size`` bytes or more, where no images do."""
    limit = max(MAX_EXPANDED_BYTES, MAX_RATIO * path.stat().st_size)
    if size > limit:
        raise UserError(
            f"data.path: {path} expands to more than {limit:,} bytes; allowed: {MAX_EXPANDED_BYTES:,}, or "
            f"{MAX_RATIO} times the size of the file; unpack it and give the folder if that is right"
        )


def _check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        _refuse_size(size)


def _refuse_size(size: int) -> bytes:
    raise ValueError(f"{size:,} bytes, more than the {MAX_FILE_BYTES:,} of any image file")


def printable(name: str) -> str:
    r"""Return a file name as UTF-8 text, bytes that are none as ``\xNN``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part in NOT_DATA for part in name.split("/"))


def list_folder(root: Path) -> Files:
    """List a folder's files, hidden ones left out; links that lead out of it, or to a folder, are rejected."""
    paths: dict[str, str] = {}
    sizes: dict[str, int] = {}
    folders, rejected = [], []
    inside = os.path.realpath(root)
    pending = [("", os.fspath(root))]
    while pending:
        prefix, folder = pending.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            rejected.append(Rejected(prefix, error.strerror or str(error)))
            continue
        for entry in entries:
            name = prefix + printable(entry.name)
            if _hidden(name):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
                pending.append((name + "/", entry.path))
            elif entry.is_symlink() and not os.path.realpath(entry.path).startswith(inside + os.sep):
                rejected.append(Rejected(name, "a link out of the data folder"))
            elif not os.path.isfile(entry.path):  # entry.is_file() raises on a loop of links
                rejected.append(Rejected(name, "not a regular file"))
            else:
                paths[name], sizes[name] = entry.path, entry.stat().st_size
    names = sorted(paths)

    def stream() -> Iterator[tuple[str, Callable[[], bytes]]]:
        for name in names:
            yield name, partial(read_file, paths[name])

    return Files({name: sizes[name] for name in names}, folders, stream, rejected)


def list_archive(path: Path) -> Files:
    """List the members of a zip or tar archive (compressed or not), to be read without unpacking it to disk.

    Members that are no regular files, or whose names are absolute or hold ``..``, are rejected.

    Raises
    ------
    UserError
        It is damaged, or expands to more than any images would.
    """
    try:
        return _list_tar(path) if _is_tar(path) else _list_zip(path)
    except UserError:
        raise
    except Exception as error:  # zipfile and tarfile raise nearly anything on damaged files
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise  # the system's: the content is not at fault
        raise _damaged(path, error) from None


def _member_name(name: str) -> tuple[str, str]:
    """Return a member's name without ``./``, and why it is left out, if it is."""
    if name.startswith("/") or ".." in name.split("/") or re.match(r"[A-Za-z]:/", name):
        return printable(name), "leads out of the archive"
    if len(name) > MAX_NAME_LENGTH:
        return printable(name), f"a name of {len(name):,} characters, more than the {MAX_NAME_LENGTH:,} of any file"
    return "/".join(part for part in printable(name).split("/") if part not in ("", ".")), ""


def _list_zip(path: Path) -> Files:
    members: dict[str, str] = {}
    sizes: dict[str, int] = {}
    folders, rejected = [], []
    with zipfile.ZipFile(path) as archive:
        _check_expansion(path, sum(info.file_size for info in archive.infolist()))
        for info in archive.infolist():
            name, reason = _member_name(info.filename.replace("\\", "/"))
            kind = stat.S_IFMT(info.external_attr >> 16) if info.create_system == 3 else 0
            if reason:
                rejected.append(Rejected(printable(info.filename), reason))
            elif _hidden(name) or not name:
                continue
            elif info.is_dir():
                folders.append(name)
            elif kind not in (0, stat.S_IFREG):
                rejected.append(Rejected(name, "not a regular file"))
            elif info.flag_bits & 1:
                rejected.append(Rejected(name, "encrypted"))
            else:
                members[name], sizes[name] = info.filename, info.file_size
    names = sorted(members)

    def stream() -> Iterator[tuple[str, Callable[[], bytes]]]:
        for name in names:
            yield name, partial(_read_zip_member, os.fspath(path), members[name])

    return Files({name: sizes[name] for name in names}, folders, stream, rejected)


@lru_cache(maxsize=1)
def _zip(path: str, modified: int) -> zipfile.ZipFile:  # noqa: ARG001 - part of the key
    return zipfile.ZipFile(path)


def _read_zip_member(path: str, member: str) -> bytes:
    archive = _zip(path, os.stat(path).st_mtime_ns)  # each process keeps its own open: listing a large zip takes long
    info = archive.getinfo(member)
    _check_size(info.file_size)
    try:
        return _unzip(archive, info)
    except Exception as error:  # zipfile raises nearly anything on damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"cannot be read from the archive: {_reason(error)}") from None


def _unzip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Read a member in memory of the size that it states, plus some, whatever it expands to."""
    if info.compress_type == zipfile.ZIP_BZIP2:  # zipfile expands all that it has read: a few bytes may hold gigabytes
        stored = copy.copy(info)
        stored.compress_type, stored.file_size = zipfile.ZIP_STORED, info.compress_size
        stored.CRC = None  # type: ignore[assignment] # it is of the content
        with archive.open(stored) as file:
            data = bz2.BZ2Decompressor().decompress(file.read(), info.file_size)
        if len(data) < info.file_size or zlib.crc32(data) != info.CRC:
            raise zipfile.BadZipFile(f"Bad CRC-32 for file {info.filename!r}")
        return data
    parts = []
    step = 2**20 if info.compress_type == zipfile.ZIP_DEFLATED else 4096
    with archive.open(info) as file:
        while part := file.read(step):
            parts.append(part)
    return b"".join(parts)


class _TarInfo(tarfile.TarInfo):
    """A header that must be one: tarfile takes a missing or damaged one for the end, and the rest would be lost."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends too soon, without the end mark of a tar archive")
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not any(buf):
                raise  # the end mark
            raise tarfile.ReadError(f"a member's header: {error}") from None
        if member.size < 0:
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        if member.type in EXTENSIONS and member.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(
                f"an extended header of {member.size:,} bytes, more than the {MAX_HEADER_BYTES:,} that are read"
            )
        return member


EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
"""Members of a tar that describe the next, which tarfile reads whole into memory."""


def _list_tar(path: Path) -> Files:
    places: dict[str, tuple[int, int]] = {}
    folders, rejected = [], []
    with tarfile.open(path, tarinfo=_TarInfo) as archive:
        compressed = not _is_plain_tar(path)
        end = 0
        for member in archive:
            if member.size < 0 or member.offset_data < end:  # an extended header may give a size too
                raise tarfile.ReadError(f"a member of {member.size} bytes at {member.offset_data}")
            end = member.offset_data
            if compressed:
                _check_expansion(path, end + member.size)
            name, reason = _member_name(member.name)
            if reason:
                rejected.append(Rejected(printable(member.name), reason))
            elif _hidden(name) or not name:
                continue
            elif member.isdir():
                folders.append(name)
            elif not member.isreg() or member.issparse():
                rejected.append(Rejected(name, "not a regular file"))
            else:
                places[name] = (member.offset_data, member.size)
        if compressed:
            assert archive.fileobj is not None
            while archive.fileobj.read(BLOCK_BYTES):  # a checksum of the whole stands at its end
                _check_expansion(path, archive.fileobj.tell())
    names = sorted(places)

    def by_offset() -> Iterator[tuple[str, Callable[[], bytes]]]:
        for name in names:
            yield name, partial(_read_range, os.fspath(path), *places[name])

    def in_sequence() -> Iterator[tuple[str, bytes | Callable[[], bytes]]]:
        # Not "r|*", which reads the first stream of several alone, and expands all that it has read at once.
        with (
            tarfile.open(path, tarinfo=_TarInfo) as whole,
            tarfile.open(fileobj=_rewound(whole), mode="r|", tarinfo=_TarInfo) as archive,
        ):
            for member in archive:
                name, _ = _member_name(member.name)
                if places.get(name) != (member.offset_data, member.size):
                    continue
                if member.size > MAX_FILE_BYTES:
                    yield name, partial(_refuse_size, member.size)
                    continue
                file = archive.extractfile(member)
                assert file is not None
                yield name, file.read()

    sizes = {name: places[name][1] for name in names}
    return Files(sizes, folders, in_sequence if compressed else by_offset, rejected)


def _rewound(archive: tarfile.TarFile) -> BinaryIO:
    assert archive.fileobj is not None
    archive.fileobj.seek(0)
    return cast(BinaryIO, archive.fileobj)


def _is_tar(path: Path) -> bool:
    return _opens(path, "r:*")


def _is_plain_tar(path: Path) -> bool:
    return _opens(path, "r:")


def _opens(path: Path, mode: Literal["r:", "r:*"]) -> bool:
    """Tell whether a tar opens; not by `tarfile.is_tarfile`, whose headers may take any memory."""
    try:
        with tarfile.open(path, mode, tarinfo=_TarInfo):
            return True
    except tarfile.TarError:
        return False


def _read_range(path: str, offset: int, size: int) -> bytes:
    _check_size(size)
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise ValueError("the archive ends inside this file")
    return data


def _read_folder(path: Path) -> Source:
    return _by_class_folder("folder", list_folder(path), path)


def _read_archive(path: Path) -> Source:
    return _by_class_folder("archive", list_archive(path), path)


def _by_class_folder(format: str, files: Files, path: Path) -> Source:
    """Label files by their folder: ``<class>/*`` or ``<train|val|test>/<class>/*``, below at most a lone top folder."""
    prefix, brings_splits = _layout(files, path)
    depth = len(prefix) + brings_splits
    places: dict[str, tuple[str | None, str]] = {}
    rejected = list(files.rejected)
    classes = {
        parts[depth] for parts in map(_parts, files.folders) if len(parts) > depth and parts[: len(prefix)] == prefix
    }
    for name in files.sizes:
        parts = _parts(name)
        if parts[: len(prefix)] == prefix and len(parts) > depth + 1:
            places[name] = (parts[depth - 1] if brings_splits else None, parts[depth])
        elif name.lower().endswith(SUFFIXES):
            rejected.append(Rejected(name, "in no class folder"))
    classes |= {label for _, label in places.values()}

    def read() -> Iterator[Item]:
        for name, content in files.stream():
            if name in places:
                split, label = places[name]
                yield Item(name, label, split, content)

    def labels() -> Iterator[Place]:
        return ((label, split) for split, label in places.values())

    num_bytes = sum(files.sizes[name] for name in places)
    return Source(format, sorted(classes), len(places), num_bytes, read, labels, rejected)


def _parts(name: str) -> tuple[str, ...]:
    return tuple(name.split("/"))


def _layout(files: Files, path: Path) -> tuple[tuple[str, ...], bool]:
    """Return the lone top folders to look below, and whether the folders there are splits."""
    paths = [_parts(name) for name in files.sizes]
    prefix: tuple[str, ...] = ()
    while True:
        depth = len(prefix)
        below = [parts[depth:] for parts in paths if parts[:depth] == prefix and len(parts) > depth + 1]
        tops = {parts[0] for parts in below} | {
            parts[depth] for parts in map(_parts, files.folders) if len(parts) > depth and parts[:depth] == prefix
        }
        if len(tops) != 1 or tops & set(SPLITS) or any(len(parts) < 3 for parts in below) or not below:
            break
        if depth == MAX_LONE_FOLDERS:
            break
        prefix += tuple(tops)
    splits = {parts[0] for parts in below if parts[0] in SPLITS and len(parts) > 2}
    if not splits:
        if tops and tops <= set(SPLITS):
            raise UserError(
                f"data.path: {path}: {', '.join(sorted(tops))} holds no class folders, expected <class>/<image>"
            )
        _check_synonyms(path, tops, below)
        return prefix, False
    strangers = sorted(tops - set(SPLITS))
    if strangers:
        raise UserError(
            f"data.path: {path}: folder {strangers[0]!r} stands beside {', '.join(sorted(splits))}, "
            f"allowed: train, val, test{nearest(strangers[0], SPLITS)}"
        )
    return prefix, True


def _check_synonyms(path: Path, tops: set[str], below: list[tuple[str, ...]]) -> None:
    """Refuse splits under other names, which would become classes."""
    ours = {top: SPLIT_SYNONYMS.get(top.lower()) for top in sorted(tops)}
    if None not in ours.values() and "train" in ours.values() and any(len(parts) > 2 for parts in below):
        renamed = ", ".join(f"{top} to {name}" for top, name in ours.items() if top != name)
        raise UserError(f"data.path: {path}: {', '.join(ours)} hold class folders, like splits; rename {renamed}")


# ---- tables ---------------------------------------------------------------------------------------------------------


def _read_table(path: Path) -> Source:
    """Read a table of path, label and perhaps split; paths are relative to the table's folder and may not leave it."""
    if path.is_dir():
        found = [path / name for name in TABLES if (path / name).exists()]
        if len(found) != 1:
            raise UserError(f"data.path: {path}: expected one table, {' or '.join(TABLES)}")
        path = found[0]
        _check_regular(path)
    rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _csv_rows(path)
    if not rows:
        raise UserError(f"data.path: {path} has no rows; expected one an image below the line of column names")
    root = os.path.realpath(path.parent)
    real_folder = lru_cache(maxsize=10_000)(os.path.realpath)  # each row's own would take minutes for a million
    items, rejected, unsplit, num_bytes = [], [], 0, 0
    for line, (file, label, split) in enumerate(rows, start=2):
        where = f"data.path: {path}, row {line}"
        if split and split not in SPLITS:
            raise UserError(f"{where}: split is {split[:60]!r}, allowed: train, val, test{nearest(split, SPLITS)}")
        unsplit += not split
        if "\0" in file:
            rejected.append(Rejected(file.replace("\0", r"\0"), "a null byte in the path"))
            continue
        target, size = _target(root, file, real_folder)
        if not file or not label:
            rejected.append(Rejected(file or f"{path.name}, row {line}", "no label" if file else "no path"))
        elif not target.startswith(root + os.sep):
            rejected.append(Rejected(file, "outside the table's folder"))
        else:
            items.append(Item(str(PurePosixPath(file)), label, split or None, partial(read_file, target)))
            num_bytes += size
    if unsplit not in (0, len(items) + len(rejected)):
        raise UserError(f"data.path: {path}: {unsplit} rows have no split, others do; fill all or leave the column out")
    items.sort(key=lambda item: (item.file, item.label))
    classes = sorted({item.label for item in items})

    def labels() -> Iterator[Place]:
        return ((item.label, item.split) for item in items)

    return Source("table", classes, len(items), num_bytes, lambda: iter(items), labels, rejected)


def _target(root: str, file: str, real_folder: Callable[[str], str]) -> tuple[str, int]:
    """Return where a table's path leads, links followed, and the size of what is there, 0 for nothing."""
    path = os.path.join(root, file)
    folder, name = os.path.split(path)
    if name not in ("", ".", ".."):
        path = os.path.join(real_folder(folder), name)
        try:
            status = os.lstat(path)
        except OSError:
            return path, 0
        if not stat.S_ISLNK(status.st_mode):
            return path, status.st_size
    path = os.path.realpath(path)
    return path, os.path.getsize(path) if os.path.exists(path) else 0


Row = tuple[str, str, str]


def _csv_rows(path: Path) -> list[Row]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            names = next(reader, [])
            _check_columns(path, names)
            places = [len(names) - 1 - names[::-1].index(key) if key in names else None for key in COLUMNS]
            return [_csv_row(row, places) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.path: {path} is no CSV table in UTF-8: {error}") from None


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            _check_columns(path, columns)
            if file.metadata.num_rows > MAX_ROWS:
                raise UserError(f"data.path: {path} has {file.metadata.num_rows:,} rows, allowed: {MAX_ROWS:,}")
            table = file.read([column for column in COLUMNS if column in columns])
        return [_row(row) for row in table.to_pylist()]
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"data.path: {path} is no Parquet table: {_reason(error)}") from None


def _check_columns(path: Path, columns: Iterable[str]) -> None:
    columns = list(columns)
    shown = one_line(", ".join(map(str, columns))[:300])
    for column in ("path", "label"):
        if column not in columns:
            raise UserError(
                f"data.path: {path} has no column {column!r}, its columns are {shown or 'none'}; "
                "expected: path, label and, where it brings splits, split"
            )


def _row(row: dict[str, object]) -> Row:
    file, label, split = ("" if row.get(key) is None else str(row[key]).strip() for key in COLUMNS)
    return file, label, split


def _csv_row(row: list[str], places: Sequence[int | None]) -> Row:
    file, label, split = (row[i].strip() if i is not None and i < len(row) else "" for i in places)
    return file, label, split


# ---- IDX (MNIST family) ---------------------------------------------------------------------------------------------

IDX_IMAGES = re.compile(r"(?P<prefix>.*?)[-._]?images[-._]idx(?P<rank>[34])[-._]ubyte(\.gz)?")
IDX_SPLITS = {"train": "train", "t10k": "test", "test": "test", "val": "val"}


def _read_idx(path: Path) -> Source:
    """Read pairs of ``<split>-images-idx3-ubyte[.gz]`` and ``<split>-labels-idx1-ubyte[.gz]``.

    Class names are the labels' numbers, or the lines of classes.txt where the folder has one. Files that the folder's
    MD5SUMS lists are checked against it.
    """
    parts: dict[str, tuple[Path, Pixels, tuple[int, ...]]] = {}
    checksums = _checksums(path)
    for images in sorted(path.iterdir()):
        match = IDX_IMAGES.fullmatch(images.name)
        if not match:
            continue
        split = next((split for word, split in IDX_SPLITS.items() if word in match["prefix"]), None)
        if split is None or split in parts:
            raise UserError(f"data.path: {images}: expected one images file each for train and t10k or test")
        other = re.sub(r"images([-._])idx[34]", r"labels\1idx1", images.name)
        stem = other.removesuffix(".gz")
        labels = next((path / name for name in (other, stem, f"{stem}.gz") if (path / name).exists()), None)
        if labels is None:
            raise UserError(f"data.path: {path / other}: no such file beside {images.name}")
        for file in (images, labels):
            _check_regular(file)
            _verify(file, checksums)
        shape = _idx_shape(images, ranks=(3, 4))
        (count,) = _idx_shape(labels, ranks=(1,))
        if count != shape[0]:
            raise UserError(f"data.path: {images.name} holds {shape[0]} images, {labels.name} {count} labels")
        _check_idx_size(labels, (count,))
        _check_idx_size(images, shape)
        parts[split] = (images, _idx_values(labels, count), shape)
    if "train" not in parts:
        hint = "; `dvc update` with the folder's .dvc files fetches them" if list(path.glob("*.dvc")) else ""
        raise UserError(f"data.path: {path} holds no train-images-idx3-ubyte file{hint}")
    largest = max((int(labels.max(initial=0)) for _, labels, _ in parts.values()), default=0)
    names = _class_names(path, ("classes.txt",), largest + 1)
    present = sorted({names[label] for _, labels, _ in parts.values() for label in np.unique(labels)})

    def read() -> Iterator[Item]:
        for split, (images, labels, shape) in parts.items():
            size = max(1, min(1024, BLOCK_BYTES // max(1, math.prod(shape[1:]))))
            index = 0
            for block in _idx_blocks(images, shape, size):
                for image in block.reshape(len(block), shape[1], shape[2], -1):
                    yield Item(images.name, names[labels[index]], split, image, index)
                    index += 1

    def places() -> Iterator[Place]:
        return ((names[label], split) for split, (_, labels, _) in parts.items() for label in labels)

    return Source("idx", present, sum(shape[0] for _, _, shape in parts.values()), 0, read, places)


def _idx_open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")


def _idx_shape(path: Path, ranks: tuple[int, ...]) -> tuple[int, ...]:
    try:
        with _idx_open(path) as file:
            magic = file.read(4)
            rank = magic[3] if len(magic) == 4 else 0
            if magic[:3] != b"\0\0\x08" or rank not in ranks:
                raise UserError(
                    f"data.path: {path} is no IDX file of bytes with {' or '.join(map(str, ranks))} dimensions"
                )
            header = file.read(4 * rank)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"data.path: {path} is damaged: {error}") from None
    shape = tuple(int(n) for n in np.frombuffer(header[: len(header) // 4 * 4], ">u4"))
    if len(shape) < rank or any(n == 0 for n in shape[1:]) or (rank == 4 and shape[3] not in (1, 3)):
        raise UserError(f"data.path: {path} says its shape is {' x '.join(map(str, shape))}")
    if math.prod(shape[1:]) > MAX_FILE_BYTES:
        raise UserError(f"data.path: {path} says that its images are {' x '.join(map(str, shape[1:]))}")
    return shape


def _check_idx_size(path: Path, shape: tuple[int, ...]) -> None:
    """Refuse a header that promises what the file cannot hold, before memory is taken for it."""
    size = 4 + 4 * len(shape) + math.prod(shape)
    if path.suffix == ".gz":
        _check_expansion(path, size)
    elif (there := path.stat().st_size) < size:
        rows = max(0, there - 4 - 4 * len(shape)) // math.prod(shape[1:])
        raise UserError(f"data.path: {path} is truncated: {shape[0]} rows promised, {rows} there")


def _idx_blocks(path: Path, shape: tuple[int, ...], size: int) -> Iterator[Pixels]:
    """Yield blocks of at most ``size`` rows, and check that the file ends where its header says."""
    try:
        with _idx_open(path) as file:
            file.read(4 + 4 * len(shape))
            row = math.prod(shape[1:])
            for start in range(0, shape[0], size):
                rows = min(size, shape[0] - start)
                data = file.read(rows * row)
                if len(data) < rows * row:
                    raise UserError(
                        f"data.path: {path} is truncated: {shape[0]} rows promised, {start + len(data) // row} there"
                    )
                yield np.frombuffer(data, np.uint8).reshape(rows, *shape[1:])
            if file.read(1):
                raise UserError(f"data.path: {path} goes on after the {shape[0]} rows of its header")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"data.path: {path} is damaged: {error}") from None


def _idx_values(path: Path, count: int) -> Pixels:
    return np.concatenate([np.empty(0, np.uint8), *_idx_blocks(path, (count,), BLOCK_BYTES)])


def _checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    lines = [line.split(maxsplit=1) for line in _read_text(path).splitlines() if line.strip()]
    return {line[1].lstrip("*"): line[0].lower() for line in lines if len(line) == 2}


def _verify(path: Path, checksums: dict[str, str]) -> None:
    if path.name not in checksums:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != checksums[path.name]:
        raise UserError(
            f"data.path: {path} is not the file that {path.parent / CHECKSUMS} lists: its MD5 is {found}, "
            f"expected {checksums[path.name]}; fetch it again, or delete its line to use another file"
        )


def _class_names(folder: Path, files: Iterable[str], count: int) -> list[str]:
    for name in files:
        if (folder / name).exists():
            names = [line.strip() for line in _read_text(folder / name).splitlines() if line.strip()]
            if len(names) < count or len(set(names)) < len(names):
                raise UserError(
                    f"data.path: {folder / name}: expected {count} different names, found {len(set(names))}"
                )
            return names
    return [str(label).zfill(len(str(count - 1))) for label in range(count)]


# ---- CIFAR-10 and CIFAR-100, binary version -------------------------------------------------------------------------

CIFAR = {f"data_batch_{i}.bin": ("train", 1) for i in range(1, 6)} | {
    "test_batch.bin": ("test", 1),
    "train.bin": ("train", 2),
    "test.bin": ("test", 2),
}
"""File name to its split and its number of label bytes a record, the last of which is the (fine) label."""


def _read_cifar(path: Path) -> Source:
    """Read records of label bytes and 3072 bytes of pixels, channel after channel, 32 x 32."""
    files = [name for name in sorted(CIFAR) if (path / name).exists()]
    if len({CIFAR[name][1] for name in files}) > 1:
        raise UserError(f"data.path: {path} holds files of CIFAR-10 and of CIFAR-100")
    if not any(CIFAR[name][0] == "train" for name in files):
        raise UserError(f"data.path: {path} holds no training file; expected one of {', '.join(CIFAR)}")
    records: dict[str, Pixels] = {}
    for name in files:
        length = CIFAR[name][1] + 3072
        _check_regular(path / name)
        size = (path / name).stat().st_size
        if size % length or not size:
            raise UserError(f"data.path: {path / name}: {size} bytes are no whole number of {length}-byte records")
        records[name] = np.memmap(path / name, np.uint8, "r", shape=(size // length, length))
    labels = {name: np.array(array[:, CIFAR[name][1] - 1]) for name, array in records.items()}
    largest = max(int(values.max()) for values in labels.values())
    names = _class_names(path, ("batches.meta.txt", "fine_label_names.txt"), largest + 1)

    def read() -> Iterator[Item]:
        for name, array in records.items():
            for index, label in enumerate(labels[name]):
                pixels = np.array(array[index, -3072:]).reshape(3, 32, 32).transpose(1, 2, 0)
                yield Item(name, names[label], CIFAR[name][0], np.ascontiguousarray(pixels), index)

    def places() -> Iterator[Place]:
        return ((names[label], CIFAR[name][0]) for name, values in labels.items() for label in values)

    present = sorted({names[label] for values in labels.values() for label in np.unique(values)})
    return Source("cifar", present, sum(map(len, records.values())), 0, read, places)


READERS: dict[str, Callable[[Path], Source]] = {
    "folder": _read_folder,
    "archive": _read_archive,
    "idx": _read_idx,
    "cifar": _read_cifar,
    "table": _read_table,
}
"""``data.format`` to its reader."""
