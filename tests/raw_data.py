"""Writers of raw data in every format, for tests."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def png(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    data = io.BytesIO()
    Image.new("L", size, value).save(data, "PNG")
    return data.getvalue()


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


WRITERS = {
    "folder": lambda root, files: write_folder(root / "images", files),
    "zip": lambda root, files: write_zip(root / "images.zip", files),
    "tar": lambda root, files: write_tar(root / "images.tar", files),
    "tar.gz": lambda root, files: write_tar(root / "images.tar.gz", files, "w:gz"),
}


def write_idx(path: Path, array: np.ndarray) -> None:
    data = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_mnist(root: Path, ending: str = ".gz", count: int = 20) -> np.ndarray:
    root.mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (count, 5, 6), np.uint8)
    labels = (np.arange(count) % 2).astype(np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(root / f"{prefix}-images-idx3-ubyte{ending}", images)
        write_idx(root / f"{prefix}-labels-idx1-ubyte{ending}", labels)
    return images
