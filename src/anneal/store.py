"""The processed data set on disk: written once, memory-mapped, read by every later stage.

Layout of a store::

    dataset.json               classes (sorted), geometry, counts, normalisation, digest of everything below
    statistics.npz             arrays of the normalisation (see anneal.preprocess)
    <split>/images-00000.npy   uint8, (N, H, W, C), C order; shards of at most `SHARD_BYTES`
    <split>/labels.npy         int64, (N,)
    <split>/samples.parquet    source, sha256, label, width, height of each sample, in the same order
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from anneal.params import UserError

SHARD_BYTES = 64 * 2**20
"""Largest shard in bytes; a constant of the format, for the bytes of a store must not depend on the machine."""

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DatasetInfo:
    """What dataset.json says.

    Parameters
    ----------
    classes
        Names in sorted order; a label is an index into them.
    height, width, channels
        Geometry of every image; ``channels`` is 1 (grey) or 3 (RGB).
    counts
        Split name to number of images.
    normalize
        Name of the normalisation whose arrays statistics.npz holds.
    digest
        32 hexadecimal digits over all the above and the content of the store.
    fit, interpolation
        How images were resized (see `anneal.decoding.resize`), for new images to be treated alike.
    """

    classes: list[str]
    height: int
    width: int
    channels: int
    counts: dict[str, int]
    normalize: str
    digest: str = ""
    fit: str = "stretch"
    interpolation: str = "area"


@dataclass(frozen=True)
class Sample:
    """One row of samples.parquet: where an image came from (``sha256`` of its file's content, original size in pixels)."""

    source: str
    sha256: str
    label: int
    width: int
    height: int


@dataclass
class Split:
    """One split of a store, its images memory-mapped.

    Parameters
    ----------
    path
        Folder of the split.
    shards
        Memory-mapped arrays, uint8 (N, H, W, C).
    labels
        int64 (N,).
    """

    path: Path
    shards: list[Images]
    labels: Labels
    _starts: npt.NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: npt.ArrayLike) -> Images:
        """Return copies of the images at ``indices``: uint8 (n, H, W, C), in that order."""
        index = np.asarray(indices, dtype=np.int64)
        if len(self.shards) == 1:
            return self.shards[0][index]
        shape = self.shards[0].shape[1:]
        images = np.empty((len(index), *shape), np.uint8)
        which = np.searchsorted(self._starts, index, side="right") - 1
        for shard in np.unique(which):
            rows = which == shard
            images[rows] = self.shards[shard][index[rows] - self._starts[shard]]
        return images

    def batches(self, size: int) -> Iterator[tuple[Images, Labels]]:
        """Yield the split in order: images uint8 (n, H, W, C) and labels int64 (n,), ``n <= size``."""
        for start in range(0, len(self), size):
            rows = np.arange(start, min(start + size, len(self)))
            yield self.take(rows), self.labels[rows]

    def samples(self) -> list[Sample]:
        """Return samples.parquet as a list, in the order of the images."""
        import pyarrow.parquet

        path = self.path / "samples.parquet"
        with _readable(path):
            return [Sample(**row) for row in pyarrow.parquet.read_table(path).to_pylist()]


@dataclass(frozen=True)
class Store:
    """A processed data set, opened for reading."""

    path: Path
    info: DatasetInfo

    @property
    def splits(self) -> list[str]:
        """Names of the splits that hold images."""
        return [name for name, count in self.info.counts.items() if count]

    def split(self, name: str) -> Split:
        """Memory-map one split.

        Raises
        ------
        UserError
            The store has no such split.
        """
        if not (self.path / name / "labels.npy").exists():
            raise UserError(f"{self.path}: there is no split {name!r}; there are {', '.join(self.splits)}")
        return open_split(self.path / name)

    def statistics(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of statistics.npz, an empty dict where the store has none."""
        path = self.path / "statistics.npz"
        if not path.exists():
            return {}
        with _readable(path), np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


def open_split(folder: Path) -> Split:
    """Memory-map the split that a `SplitWriter` wrote to ``folder``."""
    labels: Labels = _load(folder / "labels.npy")
    return Split(folder, [_load(path, mmap_mode="r") for path in sorted(folder.glob("images-*.npy"))], labels)


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> npt.NDArray[Any]:
    """Return the numbers of a .npy file.

    Raises
    ------
    UserError
        It holds none, or is damaged.
    """
    with _readable(path):
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of arrays, not one array")
        return array


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say of a file that numpy cannot read that it is damaged."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy raises nearly anything on what is no file of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged: {reason}; run `dvc checkout`, or delete it and run `dvc repro`") from None


def open_store(path: Path | str) -> Store:
    """Open a store for reading.

    Raises
    ------
    UserError
        There is no store at ``path``, or its description is damaged.
    """
    path = Path(path)
    try:
        return Store(path, DatasetInfo(**json.loads((path / "dataset.json").read_text(encoding="utf-8"))))
    except FileNotFoundError:
        raise UserError(f"{path}: no processed data here; run `dvc repro preprocess` first") from None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path / 'dataset.json'} is damaged: {error}; delete {path} and run `dvc repro preprocess`"
        ) from None


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write the bytes of `numpy.save`, whose own writing of a full disk raises an OSError without a number."""
    array = np.ascontiguousarray(array)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


class SplitWriter:
    """Writes one split shard by shard; memory is bounded by one shard."""

    def __init__(self, folder: Path, height: int, width: int, channels: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.shape = (height, width, channels)
        self.shard_size = max(1, SHARD_BYTES // (height * width * channels))
        self.buffer: Images = np.empty((self.shard_size, *self.shape), np.uint8)
        self.filled = 0
        self.num_shards = 0
        self.samples: list[Sample] = []

    def add(self, image: Images, sample: Sample) -> None:
        """Append one image, uint8 (H, W, C)."""
        assert image.shape == self.shape and image.dtype == np.uint8, (image.shape, image.dtype)
        self.buffer[self.filled] = image
        self.samples.append(sample)
        self.filled += 1
        if self.filled == self.shard_size:
            self._flush()

    def _flush(self) -> None:
        save_array(self.folder / f"images-{self.num_shards:05d}.npy", self.buffer[: self.filled])
        self.num_shards += 1
        self.filled = 0

    def close(self) -> None:
        """Write what is left: the last shard, labels.npy and samples.parquet."""
        import pyarrow as pa
        import pyarrow.parquet

        if self.filled or not self.num_shards:
            self._flush()
        save_array(self.folder / "labels.npy", np.array([s.label for s in self.samples], np.int64))
        schema = pa.schema(
            {
                "source": pa.string(),
                "sha256": pa.string(),
                "label": pa.int64(),
                "width": pa.int64(),
                "height": pa.int64(),
            }
        )
        table = pa.Table.from_pylist([asdict(s) for s in self.samples], schema=schema)
        pyarrow.parquet.write_table(table, self.folder / "samples.parquet")


def finish(
    folder: Path,
    *,
    classes: Sequence[str],
    shape: tuple[int, int, int],
    counts: Mapping[str, int],
    normalize: str,
    statistics: Mapping[str, npt.NDArray[Any]],
    fit: str = "stretch",
    interpolation: str = "area",
) -> DatasetInfo:
    """Write statistics.npz and dataset.json, the last files of a store; ``shape`` is (H, W, C)."""
    if statistics:
        np.savez(folder / "statistics.npz", **{name: statistics[name] for name in sorted(statistics)})  # type: ignore[arg-type]
    info = DatasetInfo(list(classes), *shape, dict(counts), normalize, fit=fit, interpolation=interpolation)
    info = replace(info, digest=_digest(folder, asdict(info)))
    write_json(folder / "dataset.json", asdict(info))
    return info


def _digest(folder: Path, values: Mapping[str, Any]) -> str:
    """Return 32 hexadecimal digits over ``values`` and the names and contents of all files below ``folder``."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:32]


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON with sorted keys to a temporary name, then rename."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path | str, text: str) -> None:
    """Write text to a temporary name, then rename, so that nobody ever reads half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def fresh_folder(path: Path | str) -> Iterator[Path]:
    """Give an empty temporary folder that takes the place of ``path`` when the block ends well, and goes when it does not."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)
