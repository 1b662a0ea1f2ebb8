"""The shipped imports of Fashion-MNIST, against a local server instead of the public one."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from anneal.params import UserError
from anneal.sources import open_source
from tests.raw_data import write_mnist

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "data" / "fashion-mnist"
PUBLIC = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
NAMES = [
    f"{part}-ubyte.gz" for part in ("t10k-images-idx3", "t10k-labels-idx1", "train-images-idx3", "train-labels-idx1")
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Give a folder and the address at which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "GIT_"))} | {
        "DVC_NO_ANALYTICS": "1"
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def dvc(folder: Path, *arguments: str) -> str:
    done = run(folder, sys.executable, "-m", "dvc", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def clone(tmp_path: Path, served: tuple[Path, str]) -> Path:
    """A git and DVC repository with the shipped imports, their address turned to the local server."""
    root = tmp_path / "clone"
    data = root / "data" / "fashion-mnist"
    data.mkdir(parents=True)
    for name in ("MD5SUMS", "classes.txt", ".gitignore", *(f"{name}.dvc" for name in NAMES)):
        text = (SHIPPED / name).read_text(encoding="utf-8")
        (data / name).write_text(text.replace(PUBLIC, served[1]), encoding="utf-8")
    assert run(root, "git", "init", "-q").returncode == 0
    dvc(root, "init", "-q")
    return data


def fetch(data: Path) -> None:
    dvc(data, "update", *(f"{name}.dvc" for name in NAMES))


def test_the_shipped_imports_name_the_public_files() -> None:
    assert sorted(path.name for path in SHIPPED.glob("*.dvc")) == [f"{name}.dvc" for name in NAMES]
    for name in NAMES:
        assert f"path: {PUBLIC}/{name}\n" in (SHIPPED / f"{name}.dvc").read_text()
        assert f"/{name}" in (SHIPPED / ".gitignore").read_text().splitlines()
    listed = dict(line.split()[::-1] for line in (SHIPPED / "MD5SUMS").read_text().splitlines())
    assert listed == {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }


def test_what_is_not_fetched_yet_says_how(clone: Path) -> None:
    with pytest.raises(UserError, match="`dvc update`"):
        open_source(clone)


def test_update_fetches_and_the_files_are_verified(clone: Path, served: tuple[Path, str]) -> None:
    images = write_mnist(served[0])
    right = {name: hashlib.md5((served[0] / name).read_bytes()).hexdigest() for name in NAMES}
    # What is served here are not the public files, and so they are refused ...
    fetch(clone)
    with pytest.raises(UserError, match=r"is not the file that .*MD5SUMS lists"):
        open_source(clone)
    # ... until the list says otherwise.
    (clone / "MD5SUMS").write_text("".join(f"{md5}  {name}\n" for name, md5 in right.items()))
    source = open_source(clone)
    assert source.classes == ["T-shirt/top", "Trouser"]
    train = [item.content for item in source if item.split == "train"]
    assert np.array_equal(np.stack(train)[..., 0], images)
    assert run(clone, "git", "status", "--porcelain", "-uall", ".").stdout.count("ubyte.gz\n") == 0, (
        "git ignores the data"
    )
    assert all(right[name] in (clone / f"{name}.dvc").read_text() for name in NAMES), "DVC knows the content"
    # A file that changed on the server is fetched by another update, and refused.
    name = "t10k-labels-idx1-ubyte.gz"
    content = gzip.decompress((served[0] / name).read_bytes())
    (served[0] / name).write_bytes(gzip.compress(content[:-1] + b"\0", mtime=0))
    fetch(clone)
    with pytest.raises(UserError, match=f"{name} is not the file"):
        open_source(clone)


def test_the_real_files(clone: Path, served: tuple[Path, str], shared_data: Path) -> None:
    for name in NAMES:
        shutil.copy(shared_data / "fashion-mnist" / name, served[0] / name)
    fetch(clone)
    source = open_source(clone)
    assert len(source) == 70_000 and "Ankle boot" in source.classes and next(iter(source)).label == "Ankle boot"
