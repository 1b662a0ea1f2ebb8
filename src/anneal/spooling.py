"""Every image of a source decoded, hashed and resized once, over processes, into one file on disk."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from anneal.decoding import check_pixels, decode, resize
from anneal.progress import progress
from anneal.sources import Item, Rejected, Source

CHUNK_BYTES = 8 * 2**20
"""Of encoded or of stored images that travel to or from a process at once."""

CHUNK_ITEMS = 64

MIN_BYTES_FOR_PROCESSES = 16 * 2**20
"""Less is decoded before a second process has started."""


@dataclass(frozen=True)
class Record:
    """An image that was decoded and waits in the spool file.

    Parameters
    ----------
    item
        Where it came from, without its content.
    sha256
        Of the file's content, or of the pixels where the source has no image files.
    pixels
        Hash of the decoded pixels at full size.
    width, height
        Original size in pixels, upright.
    channels
        1 or 3, as decoded.
    offset
        Of its resized pixels in the spool file, in bytes.
    """

    item: Item
    sha256: str
    pixels: bytes
    width: int
    height: int
    channels: int
    offset: int


Result = tuple[Record, npt.NDArray[np.uint8]] | Rejected
"""A decoded image and its resized pixels, uint8 (size, size, C), or why it was left out."""


@dataclass(frozen=True)
class Work:
    """What is done to every image; travels to the processes."""

    size: int
    fit: str
    interpolation: str
    max_pixels: int

    def __call__(self, items: Sequence[Item]) -> list[Result]:
        """Decode, hash and resize a chunk of items, in their order."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on files that decode all the same
            return [self._one(item) for item in items]

    def _one(self, item: Item) -> Result:
        try:
            content = item.load()
            if isinstance(content, np.ndarray):
                image = content
                check_pixels(image.shape[1], image.shape[0], self.max_pixels)
            else:
                image = decode(content, max_pixels=self.max_pixels)
        except OSError as error:
            return Rejected(item.name, f"cannot be read: {error.strerror or error}")
        except ValueError as error:
            return Rejected(item.name, str(error))
        height, width, channels = image.shape
        pixels = _hash_pixels(image)
        data = image.tobytes() if isinstance(content, np.ndarray) else content
        record = Record(
            item=replace(item, content=b""),
            sha256=hashlib.sha256(data).hexdigest(),
            pixels=pixels,
            width=width,
            height=height,
            channels=channels,
            offset=0,
        )
        return record, np.ascontiguousarray(resize(image, self.size, self.fit, self.interpolation))


def _hash_pixels(image: npt.NDArray[np.uint8]) -> bytes:
    """Hash an image's size and pixels; a grey picture saved as RGB gets the hash of the grey one."""
    if image.shape[2] == 3 and (image[::8, ::8] == image[::8, ::8, :1]).all() and (image == image[:, :, :1]).all():
        image = image[:, :, :1]
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).data).digest()[:16]


def fill(
    spool: Path, source: Source, work: Work, num_workers: int | None = None
) -> tuple[list[Record], list[Rejected]]:
    """Decode a whole source into the file ``spool``.

    Parameters
    ----------
    spool
        File to write: the resized pixels of one image after the other.
    source, work
        What to decode, and how.
    num_workers
        Processes; None for as many as pay.

    Returns
    -------
    records, rejected
        Sorted by source name; both the same whatever the number of processes.
    """
    records: list[Record] = []
    rejected = list(source.rejected)
    offset = 0
    with open(spool, "wb") as file:
        results = _results(source, work, _num_processes(source, num_workers))
        for result in chain.from_iterable(progress(results, len(source), name="preprocess")):
            if isinstance(result, Rejected):
                rejected.append(result)
                continue
            record, pixels = result
            records.append(replace(record, offset=offset))
            file.write(pixels.data)
            offset += pixels.nbytes
    records.sort(key=lambda record: (record.item.file, record.item.index or 0, record.item.label))
    return records, sorted(rejected, key=lambda r: (r.source, r.reason))


def _num_processes(source: Source, num_workers: int | None) -> int:
    if num_workers is not None:
        return max(1, num_workers)
    if source.num_bytes < MIN_BYTES_FOR_PROCESSES:
        return 1
    import joblib

    return int(joblib.cpu_count())


def _results(source: Source, work: Work, num_processes: int) -> Iterator[list[Result]]:
    """Yield the results of each chunk in the source's order, whatever the number of processes."""
    chunks = _chunks(source, work.size)
    if num_processes == 1:
        yield from map(work, chunks)
        return
    from joblib import Parallel, delayed

    parallel = Parallel(n_jobs=num_processes, return_as="generator", pre_dispatch="2*n_jobs", batch_size=1)
    yield from parallel(delayed(work)(chunk) for chunk in chunks)


def _chunks(source: Source, size: int) -> Iterator[list[Item]]:
    """Cut a source into chunks of bounded size: of what goes to a process and of what comes back."""
    most = max(1, min(CHUNK_ITEMS, CHUNK_BYTES // (size * size * 3)))
    items = iter(source)
    while chunk := list(islice(items, 1)):
        num_bytes = _weight(chunk[0])
        while len(chunk) < most and num_bytes < CHUNK_BYTES and (more := list(islice(items, 1))):
            chunk += more
            num_bytes += _weight(more[0])
        yield chunk


def _weight(item: Item) -> int:
    if callable(item.content):
        return 0
    return item.content.nbytes if isinstance(item.content, np.ndarray) else len(item.content)
