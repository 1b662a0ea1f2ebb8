"""Mutated files through the real readers: a data set or one line, never a traceback, a hang or memory without bound.

Tests call `taste` with mutations that hypothesis draws, and `tests.zoo.search` with those that atheris finds.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from anneal.params import UserError
from anneal.sources import Rejected, open_source
from anneal.spooling import Work
from tests.raw_data import write_idx, write_tar, write_zip

MOST_ITEMS = 40
MOST_PIXELS = 10**6
WORK = Work(4, "crop", "bilinear", MOST_PIXELS)


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Parameters
    ----------
    file
        Its path below the data folder.
    path
        ``data.path`` below that folder.
    format
        ``data.format``.
    seeds
        Sound contents to start from.
    around
        Writes the files that belong to it.
    """

    file: str
    path: str
    format: str
    seeds: Callable[[Path], list[bytes]]
    around: Callable[[Path], None] = lambda folder: None


def picture(format: str, mode: str = "RGB", **options: object) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(data, format, **options)
    return data.getvalue()


def pictures(folder: Path) -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        picture("PNG", exif=exif),
        picture("PNG", "P", transparency=3),
        picture("PNG", "1"),
        picture("JPEG", exif=exif),
        picture("JPEG", "CMYK", progressive=True),
        picture("GIF", "P"),
        picture("BMP"),
        picture("BMP", "P"),
        picture("TIFF", compression="tiff_lzw"),
        picture("TIFF", "L", compression="tiff_adobe_deflate"),
        picture("TIFF", "1", compression="group4"),
        picture("TIFF", compression="jpeg"),
        picture("WEBP", lossless=True, exif=exif.tobytes()),
        picture("WEBP", save_all=True, append_images=[Image.new("RGB", (7, 6))]),
        picture("PPM"),
        b"P3 2 1 255\n1 2 3 # a remark\n4 5 6\n",
        b"P5 2 1 65535\n\0\1\0\2",
        b"P4 2 1\n\x80",
    ]


def members() -> dict[str, bytes]:
    return {f"{label}/{i}.png": picture("PNG", "L") for label in ("cat", "dog") for i in range(2)} | {"cat/é.png": b"x"}


def tars(folder: Path) -> list[bytes]:
    long = write_tar(folder / "seed.tar", members() | {"cat/" + "long/" * 60 + "1.png": b"x"}).read_bytes()
    return [long, write_tar(folder / "seed.tar", members()).read_bytes()[:-8192]]


def zips(folder: Path) -> list[bytes]:
    seeds = [write_zip(folder / "seed.zip", members()).read_bytes()]
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", method) as archive:
            for name, content in members().items():
                archive.writestr(name, content)
        seeds.append(data.getvalue())
    return seeds


def images_file(folder: Path) -> list[bytes]:
    seeds = []
    for shape in ((6, 3, 2), (6, 3, 2, 3)):
        write_idx(folder / "seed", np.arange(np.prod(shape), dtype=np.uint8).reshape(shape))
        seeds.append((folder / "seed").read_bytes())
    return seeds


def labels_file(folder: Path) -> list[bytes]:
    write_idx(folder / "seed", np.array([0, 1, 2, 0, 1, 2], np.uint8))
    return [(folder / "seed").read_bytes()]


def idx_labels(folder: Path) -> None:
    write_idx(folder / "train-labels-idx1-ubyte", np.array([0, 1, 2, 0, 1, 2], np.uint8))


def idx_images(folder: Path) -> None:
    write_idx(folder / "train-images-idx3-ubyte", np.zeros((6, 3, 2), np.uint8))


def idx_both(folder: Path) -> None:
    idx_images(folder)
    idx_labels(folder)


def parquets(folder: Path) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet

    seeds = []
    for compression in ("snappy", "none"):
        table = pa.table({"path": ["a.png", "b.png", None], "label": ["cat", "dog", "cat"], "split": ["train"] * 3})
        pyarrow.parquet.write_table(table, folder / "seed", compression=compression)
        seeds.append((folder / "seed").read_bytes())
    return seeds


def csvs(folder: Path) -> list[bytes]:
    return [
        b'path,label,split\na.png,cat,train\nb.png,dog,val\n"c, d.png",cat,train\n',
        b'\xef\xbb\xbfpath,label\r\n"a\r\n.png",cat\r\n,\r\n',
        b"data_batch_1.bin\nlabel,path\ncat,a.png\n",
    ]


def cifar_names(folder: Path) -> None:
    (folder / "data_batch_1.bin").write_bytes(bytes(3073 * 2))


TARGETS = {
    "image": Target("raw/cat/a.png", "raw", "folder", pictures),
    "tar": Target("raw.tar", "raw.tar", "archive", tars),
    "tar.gz": Target("raw.tar", "raw.tar", "auto", lambda folder: [gzip.compress(tar, 1) for tar in tars(folder)]),
    "tar.bz2": Target("raw.tar", "raw.tar", "auto", lambda folder: [bz2.compress(tar) for tar in tars(folder)]),
    "tar.xz": Target("raw.tar", "raw.tar", "auto", lambda folder: [lzma.compress(tar) for tar in tars(folder)]),
    "zip": Target("raw.zip", "raw.zip", "archive", zips),
    "idx images": Target("raw/train-images-idx3-ubyte", "raw", "idx", images_file, idx_labels),
    "idx labels": Target("raw/train-labels-idx1-ubyte", "raw", "auto", labels_file, idx_images),
    "idx gzip": Target(
        "raw/train-images-idx3-ubyte.gz",
        "raw",
        "auto",
        lambda folder: [gzip.compress(data) for data in images_file(folder)],
        idx_labels,
    ),
    "idx names": Target(
        "raw/classes.txt",
        "raw",
        "idx",
        lambda folder: [b"a\nb\nc\n"],
        idx_both,
    ),
    "cifar": Target("raw/data_batch_1.bin", "raw", "auto", lambda folder: [bytes(range(256)) * 12 + b"x"]),
    "cifar names": Target("raw/batches.meta.txt", "raw", "cifar", lambda folder: [b"a\nb\n"], cifar_names),
    "csv": Target("raw/labels.csv", "raw", "auto", csvs),
    "parquet": Target("raw/labels.parquet", "raw", "table", parquets),
}


def prepare(target: Target, folder: Path) -> list[bytes]:
    """Write what belongs to a target, and return its seeds."""
    seeds = target.seeds(folder)
    (folder / target.file).parent.mkdir(parents=True, exist_ok=True)
    if (folder / "raw").is_dir():
        target.around(folder / "raw")
    return seeds


def taste(target: Target, data: bytes, folder: Path) -> str:
    """Read a file as preprocessing does; return what came of it.

    Raises
    ------
    AssertionError
        A message or a reason is not one line, or not the same on every run.
    Exception
        Whatever else the readers let through, a fault of theirs.
    """
    (folder / target.file).write_bytes(data)
    try:
        source = open_source(folder / target.path, target.format)
        results = [result for item in islice(source, MOST_ITEMS) for result in WORK([item])]
    except UserError as error:
        check_line(str(error))
        return "refused"
    for result in [*source.rejected, *results]:
        if isinstance(result, Rejected):
            check_line(result.reason)
            result.source.encode()
    for name in source.classes:
        name.encode()
    return "read"


def check_line(text: str) -> None:
    assert text and "\n" not in text and "object at 0x" not in text and len(text) < 2000, text


# ---- mutations ------------------------------------------------------------------------------------------------------

NUMBERS = [struct.pack(form, value) for form in ("<I", ">I", "<H", ">H") for value in (0, 1, 255, 2**15, 2**16 - 1)]
NUMBERS += [struct.pack(form, value) for form in ("<I", ">I") for value in (2**31 - 1, 2**31, 2**32 - 1)]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Draw a seed with some bytes changed, put in, left out, repeated, or taken from another seed."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(1, 40))
        kind = draw(st.sampled_from(["byte", "number", "insert", "remove", "repeat", "cut", "splice"]))
        if kind == "byte" and place < len(data):
            data[place] = draw(st.integers(0, 255))
        elif kind == "number":
            number = draw(st.sampled_from(NUMBERS))
            data[place : place + len(number)] = number
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=20))
        elif kind == "remove":
            del data[place : place + length]
        elif kind == "repeat":
            data[place:place] = data[place : place + length] * draw(st.integers(1, 30))
        elif kind == "cut":
            del data[place:]
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, len(other)))
            data[place : place + length] = other[start : start + length]
    return bytes(data)
