from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from anneal.params import UserError
from anneal.sources import OUTS, Source, check_outs, open_source
from tests.raw_data import WRITERS, png, write_folder, write_idx, write_mnist, write_tar, write_zip

FILES = {
    "cat/a.png": png(1),
    "cat/deep/b.png": png(2),
    "dog/c.png": png(3),
    "dog/.hidden.png": png(4),
    "dog/Thumbs.db": b"x",
    "README.md": b"about",
}
SEEN = {("cat/a.png", None, "cat"), ("cat/deep/b.png", None, "cat"), ("dog/c.png", None, "dog")}


def seen(source: Source) -> set[tuple[str, str | None, str]]:
    return {(item.name, item.split, item.label) for item in source}


@pytest.mark.parametrize("kind", WRITERS)
def test_class_folders(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path, FILES)
    before = sorted(tmp_path.rglob("*"))
    source = open_source(path)
    assert source.format == ("folder" if kind == "folder" else "archive")
    assert source.classes == ["cat", "dog"]
    assert seen(source) == SEEN and len(source) == 3
    assert {item.name: item.load() for item in source} == {name: FILES[name] for name, _, _ in SEEN}
    assert not source.rejected
    assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked to disk"


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("top", ["", "clothing/"])
def test_split_folders_below_a_lone_top_folder(kind: str, top: str, tmp_path: Path) -> None:
    files = {f"{top}{split}/{label}/1.png": png(1) for split in ("train", "test") for label in ("cat", "dog")}
    source = open_source(WRITERS[kind](tmp_path, files))
    assert source.classes == ["cat", "dog"]
    assert seen(source) == {(f"{top}{s}/{c}/1.png", s, c) for s in ("train", "test") for c in ("cat", "dog")}


def test_unknown_folder_beside_splits_is_refused(tmp_path: Path) -> None:
    files = {f"{split}/cat/1.png": png(1) for split in ("train", "test", "validation")}
    with pytest.raises(UserError, match="'validation' stands beside test, train"):
        open_source(write_folder(tmp_path, files))


@pytest.mark.parametrize(
    ("tops", "words"),
    [
        (("Training", "Testing"), "rename Testing to test, Training to train"),
        (("Train", "Test"), "rename Test to test, Train to train"),
        (("TRAIN", "VAL"), "rename TRAIN to train, VAL to val"),
        (("training", "validation", "eval"), "rename eval to val or test, training to train, validation to val"),
        (("top/Train", "top/dev"), "rename Train to train, dev to val"),
    ],
)
def test_splits_under_other_names_are_no_classes(tops: tuple[str, ...], words: str, tmp_path: Path) -> None:
    files = {f"{top}/{label}/1.png": png(1) for top in tops for label in ("cat", "dog")}
    with pytest.raises(UserError, match=rf"data\.path: .*; {words}$"):
        open_source(write_folder(tmp_path / "raw", files | {f"{tops[0]}/README.md": b"about"}))
    shallow = open_source(write_folder(tmp_path / "shallow", {f"{top}/1.png": png(1) for top in ("Train", "Bus")}))
    assert shallow.classes == ["Bus", "Train"]


def test_a_class_may_be_named_like_a_split(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, {"train/1.png": png(1), "bus/1.png": png(2)}))
    assert source.classes == ["bus", "train"] and all(item.split is None for item in source)


def test_empty_class_folder_is_a_class(tmp_path: Path) -> None:
    (tmp_path / "fish").mkdir()
    assert open_source(write_folder(tmp_path, {"cat/a.png": png(1)})).classes == ["cat", "fish"]


def test_image_in_no_class_folder_is_rejected(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, FILES | {"stray.png": png(9)}))
    assert [(r.source, r.reason) for r in source.rejected] == [("stray.png", "in no class folder")]


def test_links_pipes_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", FILES)
    (tmp_path / "outside.png").write_bytes(png(7))
    (root / "cat" / "out.png").symlink_to(tmp_path / "outside.png")
    (root / "cat" / "in.png").symlink_to(root / "dog" / "c.png")
    (root / "cat" / "loop").symlink_to(root / "cat")
    os.mkfifo(root / "cat" / "pipe.jpg")
    with open(os.fsencode(root) + b"/cat/\xff.png", "wb") as file:
        file.write(png(8))
    source = open_source(root)
    names = {item.name for item in source}
    assert "cat/in.png" in names and "cat/\\xff.png" in names
    assert {r.source: r.reason for r in source.rejected} == {
        "cat/out.png": "a link out of the data folder",
        "cat/loop": "not a regular file",
        "cat/pipe.jpg": "not a regular file",
    }
    json.dumps(sorted(names), ensure_ascii=False).encode()
    # A file that turns into a pipe between listing and reading must not hang.
    (root / "cat" / "a.png").unlink()
    os.mkfifo(root / "cat" / "a.png")
    with pytest.raises(ValueError, match="not a regular file"):
        next(item for item in source if item.name == "cat/a.png").load()


@pytest.mark.parametrize("compression", ["w", "w:gz"])
def test_tar_members_that_lead_out_or_are_no_files(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(path, compression) as archive:
        for name in ("../evil.png", "/etc/evil.png", "./cat/a.png", "dog/b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png(1))
            archive.addfile(member, io.BytesIO(png(1)))
        link = tarfile.TarInfo("cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = open_source(path)
    assert seen(source) == {("cat/a.png", None, "cat"), ("dog/b.png", None, "dog")}
    assert {r.source: r.reason for r in source.rejected} == {
        "../evil.png": "leads out of the archive",
        "/etc/evil.png": "leads out of the archive",
        "cat/link.png": "not a regular file",
    }


def test_zip_members_that_lead_out_or_are_no_files(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../evil.png", "/etc/evil.png", "C:\\evil.png", "cat\\a.png", "dog/b.png"):
            archive.writestr(zipfile.ZipInfo(name), png(1))
        link = zipfile.ZipInfo("cat/link.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    source = open_source(path)
    assert {item.label for item in source} == {"cat", "dog"}
    assert len(source.rejected) == 4


def test_damaged_archives(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "images.tar.gz", {f"c{i % 2}/{i}.png": os.urandom(5000) for i in range(20)}, "w:gz")
    tar.write_bytes(tar.read_bytes()[:-20000])
    with pytest.raises(UserError, match="damaged"):
        open_source(tar)
    path = write_zip(tmp_path / "images.zip", {"cat/a.png": b"a" * 5000, "dog/b.png": b"b" * 5000})
    data = bytearray(path.read_bytes())
    data[40:48] = b"\xff" * 8
    path.write_bytes(data)
    items = {item.name: item for item in open_source(path)}
    with pytest.raises(ValueError, match="cannot be read from the archive"):
        items["cat/a.png"].load()
    assert items["dog/b.png"].load() == b"b" * 5000


MEMBER = 512 + 5120
"""Bytes of a tar's member of 5,000 bytes: its header, and its content in whole blocks."""


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
@pytest.mark.parametrize("size", [12 * MEMBER, 12 * MEMBER + 100])
def test_a_tar_cut_between_two_members_ends_too_soon(ending: str, size: int, tmp_path: Path) -> None:
    files = {f"c{i % 2}/{i:02d}.png": os.urandom(5000) for i in range(20)}
    whole = write_tar(tmp_path / "whole.tar", files).read_bytes()
    path = tmp_path / f"images.{ending}"
    pack = gzip.compress if ending == "tar.gz" else bytes
    path.write_bytes(pack(whole[: 20 * MEMBER + 512]))  # a lone zero block: nothing is missing
    assert len(open_source(path)) == 20
    path.write_bytes(pack(whole[:size]))
    with pytest.raises(UserError, match=r"images\.tar.* is damaged: .*ends too soon"):
        open_source(path)


def test_a_tar_with_a_header_that_is_none(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "images.tar", {f"c{i % 2}/{i:02d}.png": os.urandom(5000) for i in range(20)})
    data = bytearray(path.read_bytes())
    data[12 * MEMBER : 12 * MEMBER + 512] = b"x" * 512
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        open_source(path)


def opened(path: Path, format: str) -> str:
    try:
        return f"{len(open_source(path, format))} images"
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_every_damaged_byte_of_a_compressed_tar_is_a_users_error(mode: str, tmp_path: Path) -> None:
    files = {f"c{i % 2}/{i}.png": os.urandom(300) for i in range(4)}
    path = write_tar(tmp_path / f"images.tar.{mode}", files, f"w:{mode}")
    data = path.read_bytes()
    for place in [*range(0, len(data), 97), len(data) - 20, len(data) - 8, len(data) - 5]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        for format in ("auto", "archive"):
            found = opened(path, format)
            assert found == "4 images" or "\n" not in found
    path.write_bytes(data[:-8] + bytes(byte ^ 0x55 for byte in data[-8:]))  # the checksum, or what follows it
    with pytest.raises(UserError, match=r"is damaged|is no data set"):
        open_source(path)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_table(ending: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    write_folder(tmp_path / "data", {"x/a.png": png(1), "x/b.png": png(2)})
    (tmp_path / "secret.png").write_bytes(png(3))
    table = pa.table(
        {
            "path": ["x/b.png", "x/a.png", "../secret.png", "x/a.png"],
            "label": ["dog", "cat", "cat", None],
            "split": ["train", "val", "train", "train"],
        }
    )
    path = tmp_path / "data" / f"labels.{ending}"
    (pyarrow.parquet.write_table if ending == "parquet" else pyarrow.csv.write_csv)(table, path)
    for where in (path, tmp_path / "data"):
        source = open_source(where)
        assert source.format == "table" and source.classes == ["cat", "dog"]
        assert [(i.name, i.split, i.label) for i in source] == [("x/a.png", "val", "cat"), ("x/b.png", "train", "dog")]
        assert [i.load() for i in source] == [png(1), png(2)]
        reasons = {(r.source, r.reason) for r in source.rejected}
        assert reasons == {("../secret.png", "outside the table's folder"), ("x/a.png", "no label")}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,label\na,b\n", "no column 'path', its columns are file, label"),
        ("path,label,split\na.png,cat,vall\n", "row 2: split is 'vall', allowed: train, val, test; did you mean 'val'"),
        ("path,label,split\na.png,cat,val\nb.png,cat,\n", "1 rows have no split"),
        ("", "no column 'path'"),
        ("path,label\n", r"t\.csv has no rows"),
    ],
)
def test_table_faults(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=reason):
        open_source(tmp_path / "t.csv")


def test_a_path_with_a_null_byte_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "t.csv").write_bytes(b"path,label\na.png,cat\na\0b.png,dog\n")
    source = open_source(tmp_path / "t.csv")
    assert [item.name for item in source] == ["a.png"]
    assert [(r.source, r.reason) for r in source.rejected] == [("a\\0b.png", "a null byte in the path")]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx(ending: str, tmp_path: Path) -> None:
    images = write_mnist(tmp_path, ending)
    source = open_source(tmp_path)
    items = list(source)
    assert source.format == "idx" and source.classes == ["0", "1"] and len(items) == len(source) == 40
    train = [item for item in items if item.split == "train"]
    assert train[3].name == f"train-images-idx3-ubyte{ending}#3" and train[3].label == "1"
    assert np.array_equal(np.stack([item.content for item in train])[..., 0], images)
    (tmp_path / "classes.txt").write_text("shirt\nbag\n")
    assert open_source(tmp_path).classes == ["bag", "shirt"]
    assert next(iter(open_source(tmp_path))).label == "shirt"


def test_idx_checksums(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    name = "t10k-images-idx3-ubyte.gz"
    right = hashlib.md5((tmp_path / name).read_bytes()).hexdigest()
    (tmp_path / "MD5SUMS").write_text(f"{right}  {name}\n")
    assert len(open_source(tmp_path)) == 40
    (tmp_path / "MD5SUMS").write_text(f"{'0' * 32} *{name}\n")
    with pytest.raises(UserError, match=f"{name} is not the file that .*MD5SUMS lists: its MD5 is {right}"):
        open_source(tmp_path)


def test_idx_faults(tmp_path: Path) -> None:
    def broken(change) -> str:
        root = tmp_path / "mnist"
        write_mnist(root, "")
        change(root)
        with pytest.raises(UserError) as error:
            list(open_source(root))
        return str(error.value)

    images, labels = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
    assert "truncated: 20 rows promised, 19 there" in broken(
        lambda root: (root / images).write_bytes((root / images).read_bytes()[:-1])
    )
    assert "goes on after" in broken(lambda root: (root / images).write_bytes((root / images).read_bytes() + b"x"))
    assert "is no IDX file" in broken(lambda root: (root / images).write_bytes(b"\x1f\x8b hello"))
    assert "holds 20 images" in broken(lambda root: write_idx(root / labels, np.zeros(19, np.uint8)))
    assert "no such file" in broken(lambda root: (root / labels).unlink())


def test_idx_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz.dvc").write_text("frozen: true\n")
    with pytest.raises(UserError, match="`dvc update`"):
        open_source(tmp_path)


@pytest.mark.parametrize("fine", [False, True])
def test_cifar(fine: bool, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), np.uint8)
    labels = np.array([0, 1, 2, 0, 1, 2], np.uint8)
    head = np.stack([labels * 0 + 9, labels], 1) if fine else labels[:, None]
    records = np.concatenate([head, pixels.reshape(6, -1)], 1)
    for name in ("train.bin", "test.bin") if fine else ("data_batch_1.bin", "test_batch.bin"):
        records.tofile(tmp_path / name)
    (tmp_path / ("fine_label_names.txt" if fine else "batches.meta.txt")).write_text("airplane\nbird\ncar\n\n")
    source = open_source(tmp_path)
    items = [item for item in source if item.split == "train"]
    assert source.format == "cifar" and source.classes == ["airplane", "bird", "car"] and len(source) == 12
    assert [item.label for item in items] == ["airplane", "bird", "car"] * 2
    assert np.array_equal(np.stack([item.content for item in items]), pixels.transpose(0, 2, 3, 1))
    (tmp_path / "test.bin").write_bytes(b"123")
    with pytest.raises(UserError, match=r"CIFAR-100|no whole number"):
        open_source(tmp_path)


def test_nothing_there_or_not_understood(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "nothing")
    (tmp_path / "images.dvc").touch()
    with pytest.raises(UserError, match=r"`dvc pull .*images\.dvc`"):
        open_source(tmp_path / "images")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match="is no data set"):
        open_source(tmp_path / "a.txt")
    with pytest.raises(UserError, match="no column 'path'"):
        open_source(tmp_path / "a.txt", "table")
    with pytest.raises(UserError, match="idx does not fit"):
        open_source(tmp_path / "a.txt", "idx")


def test_data_may_not_overlap_an_out(tmp_path: Path) -> None:
    check_outs(tmp_path / "data" / "images", [tmp_path / "data" / "processed"])
    for path in ("data", "data/processed", "data/processed/raw"):
        with pytest.raises(UserError, match="overlaps"):
            check_outs(tmp_path / path, [tmp_path / "data" / "processed"])


def test_data_may_not_overlap_an_out_of_any_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_outs("data/images")
    check_outs("models.zip")
    for path in ("data", "data/augmented", "models", "models/a", "reports/raw", "mlruns", "."):
        with pytest.raises(UserError, match=r"overlaps .*, which the pipeline writes"):
            check_outs(path)
    stages = YAML(typ="safe").load((Path(__file__).resolve().parents[1] / "dvc.yaml").read_text("utf-8"))["stages"]
    blocks = [block.get("do", block) for block in stages.values()]
    written = [Path(out) for block in blocks for out in [*block.get("outs", []), *block.get("metrics", [])]]
    assert written and all(any(out.is_relative_to(folder) for folder in OUTS) for out in written)
