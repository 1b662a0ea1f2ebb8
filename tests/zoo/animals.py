"""Every kind of bad or odd raw data, each with what docs/data.md promises for it.

An animal is written by its `make` function from nothing: no file of the zoo lies in the repository.
"""

from __future__ import annotations

import bz2
import gzip
import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anneal.params import UserError
from anneal.preprocess import build_store
from anneal.sources import open_source
from anneal.store import fresh_folder, open_store
from tests.raw_data import write_folder, write_idx, write_mnist, write_tar, write_zip

SIZE = 4
ARGUMENTS: dict[str, Any] = {
    "seed": 0,
    "size": SIZE,
    "fit": "stretch",
    "interpolation": "area",
    "normalize": "standardize",
    "epsilon": 1e-5,
    "val": 0.2,
    "test": 0.2,
    "max_rejected": 1.0,
    "max_pixels": 50_000_000,
    "num_workers": 1,
}

Colour = int | tuple[int, int, int]


@dataclass(frozen=True)
class Animal:
    """One case of the zoo.

    Parameters
    ----------
    row
        First cell of its row in docs/data.md.
    name
        Which of the row's cases it is.
    make
        Writes the raw data below a folder, and returns ``data.path``.
    accepted
        Source name of an image to its stored pixels: one colour, or a (4, 4) or (4, 4, 3) array.
    rejected
        Source name to words of the reason; all that is left out.
    refused
        Words of the one line that ends the stage; "" where the store is built.
    report
        Entries of reports/data.json.
    heavy
        A bomb: run in a process of its own, whose memory and time are bounded.
    most
        Memory that it may take in bytes, the libraries included.
    long
        Takes minutes on a busy machine.
    """

    row: str
    name: str
    make: Callable[[Path], Path]
    accepted: Mapping[str, Any] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)
    heavy: bool = False
    most: int = 512 * 2**20
    long: bool = False

    @property
    def id(self) -> str:
        return f"{self.row}: {self.name}" if self.name else self.row


def run(animal: Animal, path: Path, store: Path) -> dict[str, Any]:
    """Take an animal's raw data through the real preprocessing; return what came of it, as values for JSON."""
    found: dict[str, Any] = {"error": "", "rejected": {}, "report": {}, "pixels": {}}
    try:
        source = open_source(path)
        with fresh_folder(store) as folder:
            report = build_store(source, folder, **ARGUMENTS)
    except UserError as error:
        return found | {"error": str(error)}
    found["rejected"] = {entry["source"]: entry["reason"] for entry in report["rejected"]}
    found["report"] = {key: report[key] for key in animal.report}
    opened = open_store(store)
    for name in opened.splits:
        split = opened.split(name)
        for row, sample in enumerate(split.samples()):
            if sample.source in animal.accepted:
                found["pixels"][sample.source] = split.take([row])[0].tolist()
    return found


# ---- pictures -------------------------------------------------------------------------------------------------------


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def noise(seed: int, size: tuple[int, ...] = (SIZE, SIZE)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, np.uint8))


def good(count: int = 6, classes: tuple[str, ...] = ("cat", "dog"), top: str = "") -> dict[str, bytes]:
    return {f"{top}{name}/{i}.png": encode(noise(1000 * c + i)) for c, name in enumerate(classes) for i in range(count)}


def flat(colour: Any, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (SIZE, SIZE), colour)


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(width: int, height: int, rows: bytes, *extra: bytes) -> bytes:
    """Return a grey PNG from compressed rows, which need not fit the size it claims."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def raw_zeros(size: int) -> bytes:
    """Return a deflate stream of zeros, made of one block again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = packer.compress(bytes(size % 2**20)) + packer.flush()
    return block * (size // 2**20) + rest


def zeros(size: int) -> bytes:
    """Return zeros as zlib compresses them."""
    return b"\x78\xda" + raw_zeros(size) + struct.pack(">I", size % 65521 << 16 | 1)


def tiff_file(entries: Mapping[int, tuple[int, int, int]], content: bytes) -> bytes:
    """Return a little-endian TIFF: tag to (type, count, value); the content stands at offset 8."""
    rows = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(entries)) + rows + bytes(4)


def tiled_bomb() -> bytes:
    """Return a TIFF of one pixel in a tile of 30,000 x 30,000."""
    content = zeros(30_000 * 30_000)
    entries = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: 30_000, 323: 30_000, 324: 8, 325: len(content)}
    return tiff_file({tag: (4, 1, value) for tag, value in entries.items()}, content)


def scans_bomb(scans: int = 20_000, side: int = 2_000) -> bytes:
    """Return a progressive JPEG that passes over the whole picture again and again."""
    data = encode(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    starts = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    return data[: starts[-1]] + data[starts[-1] : -2] * scans + data[-2:]


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((SIZE, SIZE), np.uint8)
    upright[:2] = 255
    return encode(Image.fromarray(np.ascontiguousarray(np.rot90(upright))), exif=exif)


UPPER_HALF = [[255] * SIZE] * 2 + [[0] * SIZE] * 2


def palette_with_alpha() -> bytes:
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([0, 0, 0, 0, 100, 0])
    return encode(image, transparency=bytes([255, 128]))


def animation(format: str) -> bytes:
    return encode(flat(10, "L"), format, save_all=True, append_images=[flat(200, "L")], lossless=True)


# ---- one odd file in a folder of good ones --------------------------------------------------------------------------


def beside(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], Path]:
    """Return a maker of a folder of good images with one file more, ``cat/<name>``."""

    def make(root: Path) -> Path:
        data = content() if callable(content) else content
        return write_folder(root / "raw", good() | {f"cat/{name}": data})

    return make


def takes(row: str, name: str, file: str, content: Any, colour: Any) -> Animal:
    return Animal(row, name, beside(file, content), accepted={f"cat/{file}": colour})


def leaves(row: str, name: str, file: str, content: Any, reason: str, heavy: bool = False) -> Animal:
    return Animal(row, name, beside(file, content), rejected={f"cat/{file}": reason}, heavy=heavy)


PIXELS = "pixels, more than data.max_pixels"
JPEG = encode(noise(7, (64, 64, 3)), "JPEG")
PNG = encode(noise(7, (64, 64)))

IMAGES = [
    leaves("truncated image", "JPEG", "odd.jpg", JPEG[: len(JPEG) // 2], "does not decode: image file is truncated"),
    leaves("truncated image", "PNG", "odd.png", PNG[: len(PNG) // 2], "does not decode"),
    leaves("truncated image", "header alone", "odd.png", PNG[:20], "does not decode"),
    leaves("file of zero bytes", "", "odd.jpg", b"", "no image in a known format"),
    takes("wrong extension", "PNG named .jpg", "odd.jpg", encode(flat((9, 8, 7))), (9, 8, 7)),
    takes("wrong extension", "GIF named .png", "odd.png", encode(flat(77, "L"), "GIF"), 77),
    leaves("text named .png", "", "odd.png", b"not a picture\n" * 9, "no image in a known format"),
    leaves("text named .png", "HTML", "odd.png", b"<!DOCTYPE html><title>404</title>", "no image in a known format"),
    leaves("text named .png", "SVG", "odd.png", b'<?xml version="1.0"?><svg/>', "no image in a known format"),
    takes("CMYK", "TIFF", "odd.tif", encode(flat((0, 255, 255, 0), "CMYK"), "TIFF"), (255, 0, 0)),
    takes("CMYK", "JPEG", "odd.jpg", encode(flat((0, 0, 0, 255), "CMYK"), "JPEG", quality=100), (0, 0, 0)),
    takes("1-bit", "PNG", "odd.png", encode(flat(1, "1")), 255),
    takes("1-bit", "TIFF, CCITT", "odd.tif", encode(flat(0, "1"), "TIFF", compression="group4"), 0),
    takes("16-bit", "PNG", "odd.png", encode(Image.fromarray(np.full((4, 4), 32896, np.uint16))), 128),
    takes("16-bit", "PGM", "odd.pgm", b"P5 4 4 65535\n" + b"\x80\x80" * 16, 128),
    leaves("32-bit or floating point", "", "odd.tif", encode(flat(0.5, "F"), "TIFF"), "no defined range"),
    takes("palette with alpha", "", "odd.png", palette_with_alpha(), (127, 177, 127)),
    takes("animation", "GIF", "odd.gif", lambda: animation("GIF"), 10),
    takes(
        "animation", "PNG", "odd.png", lambda: encode(flat(10, "L"), save_all=True, append_images=[flat(9, "L")]), 10
    ),
    takes("animation", "WebP", "odd.webp", lambda: animation("WEBP"), 10),
    takes("EXIF-rotated", "", "odd.png", rotated, UPPER_HALF),
    takes("EXIF-rotated", "damaged EXIF", "odd.png", lambda: encode(flat(6, "L"), exif=b"Exif\0\0garbage"), 6),
    takes("1 x 1", "", "odd.png", encode(Image.new("L", (1, 1), 77)), 77),
    takes("1 x 1", "1 x 5000", "odd.png", encode(Image.new("L", (1, 5000), 78)), 78),
    leaves("decompression bomb", "PNG", "odd.png", lambda: png_file(20_000, 20_000, zeros(400_020_000)), PIXELS, True),
    leaves("decompression bomb", "JPEG", "odd.jpg", lambda: resized_jpeg(65_500), PIXELS, True),
    leaves("decompression bomb", "GIF", "odd.gif", lambda: resized_gif(65_535), PIXELS, True),
    leaves("decompression bomb", "BMP", "odd.bmp", lambda: resized_bmp(2**24), PIXELS, True),
    leaves("decompression bomb", "WebP", "odd.webp", lambda: resized_webp(16_383), PIXELS, True),
    leaves("decompression bomb", "TIFF", "odd.tif", tiled_bomb, "30000 x 30000", True),
    leaves(
        "decompression bomb",
        "text in a PNG",
        "odd.png",
        lambda: png_file(4, 4, zeros(20), chunk(b"zTXt", b"Comment\0\0" + zeros(2**30))),
        "does not decode",
        True,
    ),
    leaves("decompression bomb", "scans of a JPEG", "odd.jpg", scans_bomb, "scans", True),
]


def resized_jpeg(side: int) -> bytes:
    data = bytearray(encode(flat(128, "L"), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def resized_gif(side: int) -> bytes:
    data = bytearray(encode(flat(128, "L"), "GIF"))
    data[6:10] = struct.pack("<HH", side, side)
    return bytes(data)


def resized_bmp(side: int) -> bytes:
    data = bytearray(encode(flat(128, "L"), "BMP"))
    data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


def resized_webp(side: int) -> bytes:
    data = bytearray(encode(flat((1, 2, 3)), "WEBP", lossless=True))
    place = data.index(b"VP8L") + 9
    data[place : place + 4] = struct.pack("<I", side - 1 | (side - 1) << 14)
    return bytes(data)


# ---- names, links and folders ---------------------------------------------------------------------------------------

NAMES = ["ß é 日本 🐈.png", "e\u0301.png", "a'b\"c$(d);e|f&.png", "<script>.png", " .png", "-rf.png", "new\nline.png"]
LONG = "é" * 125 + ".png"


def odd_names(root: Path) -> Path:
    files = {f"{label}/{name}": encode(flat(i + 1, "L")) for i, name in enumerate([*NAMES, LONG]) for label in ["日本"]}
    return write_folder(root / "raw", good() | files)


def odd_members(write: Callable[[Path, dict[str, bytes]], Path], ending: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        files = {f"cat/{name}": encode(flat(i + 1, "L")) for i, name in enumerate([*NAMES, LONG])}
        return write(root / f"raw.{ending}", good() | files)

    return make


def long_member(write: Callable[[Path, dict[str, bytes]], Path], ending: str, name: str) -> Callable[[Path], Path]:
    return lambda root: write(root / f"raw.{ending}", good() | {name: encode(flat(1, "L"))})


def symlink_loops(root: Path) -> Path:
    raw = write_folder(root / "raw", good())
    (raw / "cat/itself.png").symlink_to("itself.png")
    (raw / "cat/one.png").symlink_to("two.png")
    (raw / "cat/two.png").symlink_to("one.png")
    (raw / "cat/up").symlink_to("..")
    return raw


def path_is_a_loop(root: Path) -> Path:
    (root / "raw").symlink_to("raw")
    return root / "raw"


def links_out(root: Path) -> Path:
    raw = write_folder(root / "raw", good())
    write_folder(root / "elsewhere", {"secret.png": encode(flat(66, "L"))})
    (raw / "cat/out.png").symlink_to(root / "elsewhere/secret.png")
    (raw / "cat/relative.png").symlink_to("../../elsewhere/secret.png")
    (raw / "cat/folder").symlink_to(root / "elsewhere")
    (raw / "cat/broken.png").symlink_to("nothing.png")
    (raw / "cat/device.png").symlink_to("/dev/zero")
    (raw / "cat/inside.png").symlink_to("../dog/0.png")
    return raw


def hidden(root: Path) -> Path:
    junk = ("cat/Thumbs.db", "cat/.DS_Store", "cat/desktop.ini", "cat/._1.png", ".git/config", "__MACOSX/cat/._1.png")
    return write_folder(root / "raw", good() | dict.fromkeys(junk, b"junk"))


def nested(root: Path) -> Path:
    return write_folder(root / "raw", good() | {f"cat/{'deeper/' * 40}odd.png": encode(flat(5, "L"))})


def nested_beyond_any_path(root: Path) -> Path:
    """A folder whose path is longer than the system takes at once."""
    raw = write_folder(root / "raw", good())
    here = os.open(raw / "cat", os.O_RDONLY)
    try:
        for _ in range(20):
            os.mkdir("d" * 250, dir_fd=here)
            below = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        file = os.open("odd.png", os.O_WRONLY | os.O_CREAT, dir_fd=here)
        os.write(file, encode(flat(5, "L")))
        os.close(file)
    finally:
        os.close(here)
    return raw


def not_files(root: Path) -> Path:
    raw = write_folder(root / "raw", good())
    os.mkfifo(raw / "cat/pipe.png")
    return raw


def folder_with(root: Path, **sizes: int) -> Path:
    raw = write_folder(root / "raw", good())
    for name, count in sizes.items():
        (raw / name).mkdir()
        write_folder(raw / name, {f"{i}.png": encode(noise(5000 + i)) for i in range(count)})
    return raw


TWIN = encode(noise(0))

FOLDERS = [
    Animal(
        "unicode and very long names",
        "folder",
        odd_names,
        accepted={f"日本/{name}": i + 1 for i, name in enumerate([*NAMES, LONG])},
    ),
    *(
        Animal(
            "unicode and very long names",
            ending,
            odd_members(write, ending),
            accepted={f"cat/{name}": i + 1 for i, name in enumerate([*NAMES, LONG])},
        )
        for ending, write in (("zip", write_zip), ("tar", write_tar))
    ),
    Animal(
        "unicode and very long names",
        "not UTF-8",
        lambda root: not_utf8(root),
        accepted={"cat/\\xff\\xfe.png": 4},
    ),
    Animal(
        "unicode and very long names",
        "a tar member of 2 million folders",
        lambda root: long_member(write_tar, "tar.gz", "cat/" + "d/" * 2_000_000 + "odd.png")(root),
        refused="is damaged",
        heavy=True,
    ),
    Animal(
        "unicode and very long names",
        "a zip member of 30,000 folders",
        long_member(write_zip, "zip", "cat/" + "d/" * 30_000 + "odd.png"),
        rejected={"cat/" + "d/" * 30_000 + "odd.png": "a name of 60,011 characters"},
        heavy=True,
    ),
    Animal(
        "symlink loop",
        "",
        symlink_loops,
        rejected=dict.fromkeys(["cat/itself.png", "cat/one.png", "cat/two.png"], "not a regular file")
        | {"cat/up": "a link out of the data folder"},
    ),
    Animal("symlink loop", "data.path", path_is_a_loop, refused="raw does not exist"),
    Animal(
        "link out of the data folder",
        "",
        links_out,
        accepted={},
        rejected=dict.fromkeys(
            ["cat/out.png", "cat/relative.png", "cat/folder", "cat/device.png"], "a link out of the data folder"
        )
        | {"cat/broken.png": "not a regular file"},
        report={"num_conflicting": 2},
    ),
    Animal("pipe or device", "", not_files, rejected={"cat/pipe.png": "not a regular file"}),
    Animal("pipe or device", "data.path", lambda root: pipe(root / "raw.csv"), refused="is no data set"),
    Animal("pipe or device", "labels.csv", lambda root: pipe(root / "raw/labels.csv"), refused="not a regular file"),
    Animal("pipe or device", "IDX", lambda root: idx_pipe(root), refused="not a regular file"),
    Animal("hidden files, Thumbs.db", "", hidden, report={"images": 12, "num_rejected": 0}),
    Animal("nested folders", "", nested, accepted={f"cat/{'deeper/' * 40}odd.png": 5}),
    Animal(
        "nested folders",
        "longer than any path",
        nested_beyond_any_path,
        report={"images": 12, "num_rejected": 1},
    ),
    Animal("empty class", "", lambda root: folder_with(root, fish=0), refused="'fish' has 0"),
    Animal("class of one", "", lambda root: folder_with(root, fish=1), refused="needs 3 usable training images"),
    Animal(
        "class of one",
        "in archives",
        lambda root: write_zip(root / "raw.zip", good() | {"fish/1.png": encode(flat(4, "L"))}),
        refused="'fish' has 1",
    ),
    Animal(
        "duplicates inside a split",
        "",
        lambda root: write_folder(root / "raw", split_folder() | {"train/cat/twin.png": TWIN}),
        report={"num_duplicates_within": {"train": 1, "val": 0, "test": 0}, "num_duplicates_removed": 0},
    ),
    Animal(
        "duplicates across splits",
        "",
        lambda root: write_folder(root / "raw", split_folder() | {"test/cat/twin.bmp": encode(noise(0), "BMP")}),
        report={
            "num_duplicates_removed": 1,
            "duplicates": [
                {"removed": "train/cat/0.png", "from": "train", "kept": "test/cat/twin.bmp", "in": "test"},
            ],
        },
    ),
    Animal(
        "one image under two labels",
        "",
        beside("twin.png", encode(noise(1000))),
        report={
            "num_conflicting": 2,
            "conflicting": [
                [{"source": "cat/twin.png", "label": "cat"}, {"source": "dog/0.png", "label": "dog"}],
            ],
        },
    ),
]


def split_folder() -> dict[str, bytes]:
    held_out = {f"test/{name}/{i}.png": encode(noise(9000 + i)) for i, name in enumerate(("cat", "dog"))}
    return good(top="train/") | held_out


def pipe(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    return path.parent if path.name == "labels.csv" else path


def idx_pipe(root: Path) -> Path:
    write_mnist(root / "raw", "")
    (root / "raw/train-labels-idx1-ubyte").unlink()
    os.mkfifo(root / "raw/train-labels-idx1-ubyte")
    return root / "raw"


def not_utf8(root: Path) -> Path:
    raw = write_folder(root / "raw", good())
    with open(os.fsencode(raw) + b"/cat/\xff\xfe.png", "wb") as file:
        file.write(encode(flat(4, "L")))
    return raw


# ---- archives -------------------------------------------------------------------------------------------------------


def tar_with(name: str, **fields: Any) -> Callable[[Path], Path]:
    """Return a maker of a tar of good images with one member more."""

    def make(root: Path) -> Path:
        path = write_tar(root / "raw.tar", good())
        with tarfile.open(path, "a") as archive:
            member = tarfile.TarInfo(name)
            for key, value in fields.items():
                setattr(member, key, value)
            content = TWIN if member.isreg() else b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return path

    return make


def zip_with(name: str, mode: int = 0o100644) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        path = write_zip(root / "raw.zip", good())
        with zipfile.ZipFile(path, "a") as archive:
            info = zipfile.ZipInfo("placeholder")
            info.filename, info.create_system, info.external_attr = name, 3, mode << 16
            archive.writestr(info, TWIN)
        return path

    return make


def blocks(size: int) -> int:
    return -(-size // 512) * 512


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def good_tar() -> bytes:
    """Return the good images as a tar without its end mark."""
    data = b""
    for name, content in good().items():
        data += tar_header(name, len(content)) + content + bytes(blocks(len(content)) - len(content))
    return data


def gz_bomb(root: Path) -> Path:
    """Write a tar.gz of 4 MB that holds 4 GiB."""
    size = 4 * 2**30
    block = gzip.compress(bytes(2**26), 9, mtime=0)
    path = root / "raw.tar.gz"
    with open(path, "wb") as file:
        file.write(gzip.compress(good_tar() + tar_header("cat/bomb.png", size), mtime=0))
        for _ in range(size // 2**26):
            file.write(block)
        file.write(gzip.compress(bytes(1024), mtime=0))
    return path


def tail_bomb(root: Path) -> Path:
    """Write a tar.bz2 with 32 GiB of zeros after its end mark."""
    block = bz2.compress(bytes(2**24))
    path = root / "raw.tar.bz2"
    path.write_bytes(bz2.compress(good_tar() + bytes(1024)) + block * 2048)
    return path


def zip_bomb(root: Path) -> Path:
    """Write a zip of 4 MB that holds 2 GiB, a member of 128 MiB after the other."""
    path = write_zip(root / "raw.zip", good())
    block = bytes(2**20)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("cat/bomb0.png", "w") as file:
            for _ in range(128):
                file.write(block)
        first = archive.getinfo("cat/bomb0.png")
        for i in range(1, 16):  # all at the same place in the file
            info = zipfile.ZipInfo(f"cat/bomb{i}.png")
            for key in ("compress_type", "compress_size", "file_size", "CRC", "header_offset", "flag_bits"):
                setattr(info, key, getattr(first, key))
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info
    return path


def lying_zip(method: int, packed: Callable[[], bytes]) -> Callable[[Path], Path]:
    """Return a maker of a zip with a member that says it holds 1,000 bytes, and holds a GiB."""

    def make(root: Path) -> Path:
        path = write_zip(root / "raw.zip", good())
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("cat/bomb.png", packed(), zipfile.ZIP_STORED)
            info = archive.getinfo("cat/bomb.png")
            info.compress_type, info.file_size = method, 1000
        local = path.read_bytes().rindex(b"PK\3\4", 0, path.stat().st_size)
        return changed(path, local + 8, struct.pack("<H", method))

    return make


def negative_tar(root: Path) -> Path:
    """Write a tar with a member of negative size, after which a reader would come by it again and again."""
    header = bytearray(tar_header("cat/odd.png", 0))
    header[124:136] = b"\xff" * 10 + struct.pack(">h", -512)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = root / "raw.tar"
    path.write_bytes(good_tar() + bytes(header) + bytes(1024))
    return path


def first_pax_bomb(root: Path) -> Path:
    """Write a tar.gz that begins with such a header."""
    return pax_bomb(root, b"")


def pax_bomb(root: Path, before: bytes | None = None) -> Path:
    """Write a tar.gz whose extended header claims a GiB."""
    size = 2**30
    path = root / "raw.tar.gz"
    block = gzip.compress(bytes(2**26), 9, mtime=0)
    head = gzip.compress((good_tar() if before is None else before) + tar_header("pax", size, tarfile.XHDTYPE), mtime=0)
    path.write_bytes(head + block * (size // 2**26) + gzip.compress(bytes(1024), mtime=0))
    return path


def chain_of_headers(root: Path) -> Path:
    """Write a tar of ten thousand extended headers in a row, which readers follow by recursion."""
    record = b"12 comment=\n"
    header = tar_header("pax", len(record), tarfile.XHDTYPE) + record + bytes(512 - len(record))
    path = root / "raw.tar"
    path.write_bytes(good_tar() + header * 10_000 + bytes(1024))
    return path


def streams_of(write: Callable[[bytes], bytes], ending: str) -> Callable[[Path], Path]:
    """Return a maker of a compressed tar in two streams, as pbzip2 and `cat a.gz b.gz` write it."""

    def make(root: Path) -> Path:
        data = good_tar() + bytes(1024)
        path = root / f"raw.tar.{ending}"
        path.write_bytes(write(data[:3072]) + write(data[3072:]))
        return path

    return make


def changed(path: Path, place: int, data: bytes) -> Path:
    content = path.read_bytes()
    place = place if place >= 0 else len(content) + place
    path.write_bytes(content[:place] + data + content[place + len(data) :])
    return path


def zip_of_bad_names(root: Path) -> Path:
    """Write a zip that calls a name UTF-8 which is none."""
    path = write_zip(root / "raw.zip", good() | {"cat/é.png": TWIN})
    data = path.read_bytes()
    path.write_bytes(data.replace("é".encode(), b"\xff\xff"))
    return path


OUT = "leads out of the archive"
ARCHIVES = [
    *(
        Animal(row, f"{name} in a {kind}", make(member), rejected={member: OUT})
        for row, member, name in (
            ("archive member with ..", "../evil.png", "first"),
            ("archive member with ..", "cat/../../evil.png", "inside"),
            ("archive member with an absolute name", "/tmp/evil.png", "absolute"),
        )
        for kind, make in (("zip", zip_with), ("tar", tar_with))
    ),
    Animal("archive member with ..", "backslashes", zip_with("..\\evil.png"), rejected={"..\\evil.png": OUT}),
    Animal(
        "archive member with an absolute name",
        "of Windows",
        zip_with("C:\\evil.png"),
        rejected={"C:\\evil.png": OUT},
    ),
    *(
        Animal("archive member that is no file", name, make, rejected={f"cat/{file}": "not a regular file"})
        for name, file, make in (
            ("device", "odd.png", tar_with("cat/odd.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
            ("pipe", "odd.png", tar_with("cat/odd.png", type=tarfile.FIFOTYPE)),
            ("link", "odd.png", tar_with("cat/odd.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
            ("hard link", "odd.png", tar_with("cat/odd.png", type=tarfile.LNKTYPE, linkname="/etc/passwd")),
            ("zip's link", "odd.png", zip_with("cat/odd.png", 0o120777)),
            ("zip's device", "odd.png", zip_with("cat/odd.png", 0o020666)),
        )
    ),
    Animal("archive bomb", "tar.gz", gz_bomb, refused="expands to more than", heavy=True),
    Animal("archive bomb", "after the end of a tar.bz2", tail_bomb, refused="expands to more than", heavy=True),
    Animal("archive bomb", "zip", zip_bomb, refused="expands to more than", heavy=True),
    Animal(
        "archive bomb",
        "zip that lies about its size",
        lying_zip(zipfile.ZIP_DEFLATED, lambda: raw_zeros(2**30)),
        rejected={"cat/bomb.png": "cannot be read from the archive"},
        heavy=True,
    ),
    Animal(
        "archive bomb",
        "bzip2 in a zip",
        lying_zip(zipfile.ZIP_BZIP2, lambda: bz2.compress(bytes(2**28))),
        rejected={"cat/bomb.png": "cannot be read from the archive"},
        heavy=True,
    ),
    Animal("archive bomb", "extended header of a tar", pax_bomb, refused="is damaged", heavy=True),
    Animal("archive bomb", "header at the beginning of a tar", first_pax_bomb, refused="is no data set", heavy=True),
    Animal("damaged archive", "negative size", negative_tar, refused="is damaged", heavy=True),
    Animal("damaged archive", "chain of headers", chain_of_headers, refused="is damaged", heavy=True),
    Animal(
        "damaged archive",
        "zip's name",
        zip_of_bad_names,
        refused="is damaged",
    ),
    Animal(
        "damaged archive",
        "cut zip",
        lambda root: changed(write_zip(root / "raw.zip", good()), -22, b"    "),
        refused="is no data set",
    ),
    Animal(
        "archive in several streams",
        "gzip",
        streams_of(lambda data: gzip.compress(data, mtime=0), "gz"),
        report={"images": 12},
    ),
    Animal("archive in several streams", "bzip2", streams_of(bz2.compress, "bz2"), report={"images": 12}),
    Animal(
        "archive within an archive",
        "",
        lambda root: write_tar(root / "raw.tar", good() | {"z.zip": write_zip(root / "z.zip", good()).read_bytes()}),
        report={"images": 12},
    ),
]


# ---- IDX ------------------------------------------------------------------------------------------------------------


def idx(change: Callable[[Path], Any], ending: str = "") -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        write_mnist(root / "raw", ending)
        change(root / "raw")
        return root / "raw"

    return make


NONE = {
    f"{split}-{kind}": rank
    for split in ("train", "t10k")
    for kind, rank in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1))
}
IMAGES_FILE, LABELS_FILE = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx_bomb(root: Path) -> Path:
    """Write IDX files whose headers promise four billion images, and a gzip of zeros that would give them."""
    raw = root / "raw"
    raw.mkdir()
    count = 2**32 - 1
    block = gzip.compress(bytes(2**26), 9, mtime=0)
    for name, shape in ((IMAGES_FILE, (count, 1, 1)), (LABELS_FILE, (count,))):
        header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
        (raw / f"{name}.gz").write_bytes(gzip.compress(header, mtime=0) + block * 64)
    return raw


def idx_claims(root: Path) -> Path:
    """Write small IDX files whose headers promise four billion images."""
    raw = root / "raw"
    raw.mkdir()
    for name, shape in ((IMAGES_FILE, (2**32 - 1, 28, 28)), (LABELS_FILE, (2**32 - 1,))):
        (raw / name).write_bytes(struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + bytes(1000))
    return raw


def idx_large_image(root: Path) -> Path:
    """Write an IDX file with one image of 8,000 x 8,000 in each class."""
    raw = root / "raw"
    write_mnist(raw, "")
    header = struct.pack(">BBBBIII", 0, 0, 8, 3, 2, 8_000, 8_000)
    with gzip.open(raw / "t10k-images-idx3-ubyte.gz", "wb", 1) as file:
        file.write(header)
        for _ in range(128):
            file.write(bytes(10**6))
    (raw / "t10k-images-idx3-ubyte").unlink()
    write_idx(raw / "t10k-labels-idx1-ubyte", np.array([0, 1], np.uint8))
    return raw


IDX = [
    Animal(
        "IDX file with a wrong count",
        "none",
        idx(lambda raw: [write_idx(raw / f, np.zeros((0, 5, 6)[:n], np.uint8)) for f, n in NONE.items()]),
        refused="there are no images in",
    ),
    Animal(
        "IDX file with a wrong count",
        "more promised",
        idx(lambda raw: changed(raw / IMAGES_FILE, 4, struct.pack(">I", 21))),
        refused="holds 21 images, train-labels-idx1-ubyte 20 labels",
    ),
    Animal(
        "IDX file with a wrong count",
        "both promise more",
        idx(lambda raw: [changed(raw / name, 4, struct.pack(">I", 21)) for name in (IMAGES_FILE, LABELS_FILE)]),
        refused="is truncated",
    ),
    Animal(
        "IDX file with a wrong count",
        "less promised",
        idx(lambda raw: [changed(raw / name, 4, struct.pack(">I", 19)) for name in (IMAGES_FILE, LABELS_FILE)]),
        refused="goes on after the 19 rows",
    ),
    Animal(
        "IDX file with a wrong count",
        "no width",
        idx(lambda raw: changed(raw / IMAGES_FILE, 12, bytes(4))),
        refused="says its shape is 20 x 5 x 0",
    ),
    Animal("IDX file with a wrong count", "four billion", idx_claims, refused="is truncated", heavy=True),
    Animal("IDX file with a wrong count", "four billion zipped", idx_bomb, refused="expands to more than", heavy=True),
    Animal(
        "IDX file with a wrong count",
        "gigantic image",
        idx_large_image,
        rejected=dict.fromkeys(["t10k-images-idx3-ubyte.gz#0", "t10k-images-idx3-ubyte.gz#1"], "8000 x 8000 pixels"),
        heavy=True,
    ),
    Animal(
        "IDX file with a wrong magic number",
        "of 16-bit values",
        idx(lambda raw: changed(raw / IMAGES_FILE, 2, b"\x0b")),
        refused="is no IDX file of bytes",
    ),
    Animal(
        "IDX file with a wrong magic number",
        "labels for images",
        idx(lambda raw: (raw / IMAGES_FILE).write_bytes((raw / LABELS_FILE).read_bytes())),
        refused="is no IDX file of bytes with 3 or 4 dimensions",
    ),
    Animal(
        "IDX file with a wrong magic number",
        "gzip under the plain name",
        idx(lambda raw: (raw / IMAGES_FILE).write_bytes(gzip.compress(b"x" * 99))),
        refused="is no IDX file of bytes",
    ),
    Animal(
        "IDX file with a wrong magic number",
        "plain under the name of gzip",
        idx(lambda raw: (raw / f"{IMAGES_FILE}.gz").write_bytes(b"x" * 99), ".gz"),
        refused="is damaged: Not a gzipped file",
    ),
    Animal(
        "IDX file with a wrong magic number",
        "a folder",
        idx(lambda raw: [(raw / IMAGES_FILE).unlink(), (raw / IMAGES_FILE).mkdir()]),
        refused="not a regular file",
    ),
    Animal(
        "names of classes that are no text",
        "IDX",
        idx(lambda raw: (raw / "classes.txt").write_bytes(b"\xff\xfe\n\xff\n")),
        refused="classes.txt: not UTF-8 text",
    ),
    Animal(
        "names of classes that are no text",
        "checksums",
        idx(lambda raw: (raw / "MD5SUMS").write_bytes(b"\xff\xfe\n\xff\n")),
        refused="MD5SUMS: not UTF-8 text",
    ),
]


# ---- tables ---------------------------------------------------------------------------------------------------------


def table(text: str | bytes, name: str = "labels.csv") -> Callable[[Path], Path]:
    """Return a maker of a table beside the good images, whose rows stand at ``{rows}``."""

    def make(root: Path) -> Path:
        files = good()
        rows = "".join(f"{file},{file.split('/')[0]}\n" for file in files).encode()
        data = (text if isinstance(text, bytes) else text.encode()).replace(b"{rows}", rows)
        return write_folder(root / "raw", files | {name: data})

    return make


def ids_for_labels(count: int) -> Callable[[Path], Path]:
    """Return a maker of a table with as many classes as rows, as when a column of ids was taken for the labels."""

    def make(root: Path) -> Path:
        raw = write_folder(root / "raw", good())
        with open(raw / "labels.csv", "w", encoding="utf-8") as file:
            file.write("path,label\n")
            file.writelines(f"cat/{i % 6}.png,id-{i}\n" for i in range(count))
        return raw

    return make


def many_classes(root: Path) -> Path:
    """Write a table of 15,000 rows in 5,000 classes, none an image that is there."""
    raw = write_folder(root / "raw", good())
    with open(raw / "labels.csv", "w", encoding="utf-8") as file:
        file.write("path,label\n")
        file.writelines(f"none/{i}.png,id-{i // 3}\n" for i in range(15_000))
    return raw


def parquet_bomb(root: Path) -> Path:
    """Write a Parquet table of 52 million rows in a few kilobytes."""
    import pyarrow as pa
    import pyarrow.parquet

    (root / "raw").mkdir()
    schema = pa.schema(
        [("path", pa.dictionary(pa.int32(), pa.string())), ("label", pa.dictionary(pa.int32(), pa.string()))]
    )
    word = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2 * 10**6, np.int32)), ["x"])
    group = pa.table({"path": word, "label": word}, schema=schema)
    with pyarrow.parquet.ParquetWriter(root / "raw/labels.parquet", schema) as writer:
        for _ in range(26):
            writer.write_table(group)
    return root / "raw"


def parquet_not_utf8(root: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    raw = write_folder(root / "raw", good())
    names = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 6)), pa.py_buffer(b"\xff\xfe.png")]
    )
    pyarrow.parquet.write_table(pa.table({"path": names, "label": ["cat"]}), raw / "labels.parquet")
    return raw


TABLES = [
    Animal(
        "CSV with missing files",
        "one",
        table("path,label\n{rows}nowhere.png,cat\n"),
        rejected={"nowhere.png": "cannot be read: No such file or directory"},
    ),
    Animal(
        "CSV with missing files",
        "a folder for a file",
        table("path,label\n{rows}dog,cat\n"),
        rejected={"dog": "not a regular file"},
    ),
    Animal(
        "CSV with missing files",
        "out of the table's folder",
        table("path,label\n{rows}../secret.png,cat\n/etc/passwd,dog\n"),
        rejected=dict.fromkeys(["../secret.png", "/etc/passwd"], "outside the table's folder"),
    ),
    Animal(
        "CSV with missing files",
        "a name longer than any",
        table("path,label\n{rows}" + "n" * 300 + ".png,cat\n"),
        rejected={"n" * 300 + ".png": "File name too long"},
    ),
    Animal(
        "CSV with blank labels",
        "",
        table("path,label\n{rows}cat/0.png,\ncat/1.png,  \ndog/0.png\n,cat\n"),
        rejected=dict.fromkeys(["cat/0.png", "cat/1.png", "dog/0.png"], "no label") | {"labels.csv, row 17": "no path"},
        report={"images": 12},
    ),
    Animal("CSV with a BOM", "", table(b"\xef\xbb\xbfpath,label\r\n{rows}"), report={"images": 12}),
    Animal("CSV with a BOM", "UTF-16", table("path,label\n".encode("utf-16")), refused="is no CSV table in UTF-8"),
    Animal("CSV with a BOM", "field without end", table(b'path,label\n"' + b"x" * 200_000), refused="is no CSV table"),
    Animal(
        "label column of a million classes",
        "a million",
        ids_for_labels(1_000_000),
        most=1536 * 2**20,
        long=True,
        refused="'id-0' has 1, 'id-1' has 1, 'id-10' has 1, 'id-100' has 1, 'id-1000' has 1, and 999995 more",
        heavy=True,
    ),
    Animal(
        "label column of a million classes",
        "a tenth of it",
        ids_for_labels(100_000),
        refused="'id-0' has 1, 'id-1' has 1, 'id-10' has 1, 'id-100' has 1, 'id-1000' has 1, and 99995 more",
        heavy=True,
    ),
    Animal(
        "label column of a million classes",
        "few images a class",
        many_classes,
        refused="data.max_rejected: 15000 of 15000 files",
    ),
    Animal("damaged table", "rows of a Parquet file", parquet_bomb, refused="52,000,000 rows", heavy=True),
    Animal("damaged table", "Parquet that is not UTF-8", parquet_not_utf8, refused="is no Parquet table"),
    Animal(
        "damaged table", "Parquet that is none", table(b"PAR1nonsense", "labels.parquet"), refused="is no Parquet table"
    ),
]

ZOO = [*IMAGES, *FOLDERS, *ARCHIVES, *IDX, *TABLES]
