from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from anneal.params import UserError
from anneal.store import Sample, SplitWriter, finish, fresh_folder, open_store, write_json, write_text

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 3, 4, 3), np.uint8)
LABELS = np.arange(11) % 2


def write(folder: Path, classes: tuple[str, ...] = ("a", "b"), **changes) -> None:
    for name, rows in (("train", range(8)), ("val", range(8, 11)), ("test", range(0))):
        writer = SplitWriter(folder / name, 3, 4, 3)
        for i in rows:
            writer.add(IMAGES[i], Sample(f"x/{i}.png", f"{i:064d}", int(LABELS[i]), 40, 30))
        writer.close()
    arguments = {"counts": {"train": 8, "val": 3, "test": 0}, "normalize": "center", "fit": "pad"} | changes
    finish(folder, classes=classes, shape=(3, 4, 3), statistics={"mean": np.zeros(3)}, **arguments)


@pytest.mark.parametrize("shard", [1, 3 * 36, 2**20])
def test_what_is_written_is_read(shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anneal.store.SHARD_BYTES", shard)
    write(tmp_path)
    store = open_store(tmp_path)
    assert store.splits == ["train", "val"]
    assert (store.info.height, store.info.width, store.info.channels, store.info.fit) == (3, 4, 3, "pad")
    train = store.split("train")
    assert len(train) == 8 and len(train.shards) == {1: 8, 108: 3, 2**20: 1}[shard]
    order = [5, 0, 7, 5]
    assert np.array_equal(train.take(order), IMAGES[order])
    assert train.take([]).shape == (0, 3, 4, 3)
    assert np.array_equal(np.concatenate([images for images, _ in train.batches(3)]), IMAGES[:8])
    assert np.array_equal(np.concatenate([labels for _, labels in train.batches(3)]), LABELS[:8])
    assert train.samples()[2] == Sample("x/2.png", f"{2:064d}", 0, 40, 30)
    assert np.array_equal(store.statistics()["mean"], np.zeros(3))
    assert len(store.split("test")) == 0


def test_the_digest_covers_content_and_description(tmp_path: Path) -> None:
    def digest(name: str, **changes) -> str:
        write(tmp_path / name, **changes)
        return open_store(tmp_path / name).info.digest

    first = digest("one")
    assert len(first) == 32 and first == digest("two")
    assert len({first, digest("three", classes=("a", "c")), digest("four", fit="crop")}) == 3
    files = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_shards_are_memory_mapped(tmp_path: Path) -> None:
    write(tmp_path)
    assert isinstance(open_store(tmp_path).split("train").shards[0], np.memmap)


def test_arrays_have_the_bytes_of_numpys_own_writer(tmp_path: Path) -> None:
    write(tmp_path)
    for name, array in (("train/images-00000", IMAGES[:8]), ("train/labels", LABELS[:8]), ("test/labels", LABELS[:0])):
        np.save(tmp_path / "expected.npy", array)
        assert (tmp_path / f"{name}.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Let no file grow above ``size`` bytes: what a full disk does, half-way through a file, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("size", "limit"), [(10, 50_000), (1, 10_000), (1, 20_000)], ids=["shard", "labels", "table"])
def test_a_write_that_fails_says_why(size: int, limit: int, tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path / "train", size, size, 1)
    for i in range(2000):
        writer.add(np.full((size, size, 1), i % 256, np.uint8), Sample(f"x/{i}.png", f"{i:064d}", i % 2, 40, 30))
    with limited_files(limit), pytest.raises(OSError) as error:
        writer.close()
    assert error.value.errno == errno.EFBIG


def test_statistics_that_cannot_be_written_say_why(tmp_path: Path) -> None:
    arguments = {"classes": ["a"], "shape": (1, 1, 1), "counts": {}, "normalize": "zca"}
    with limited_files(20_000), pytest.raises(OSError) as error:
        finish(tmp_path, statistics={"matrix": np.zeros((100, 100)), "mean": np.zeros(3)}, **arguments)
    assert error.value.errno == errno.EFBIG


@pytest.mark.parametrize(
    "content", [b"", b'{"classes": ["a"', b"\xff\xfe", b"[]", b"{}", b'{"classes": []}', b'{"new": 1}', b"null"]
)
def test_a_damaged_description_is_a_users_error(content: bytes, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match=r"dataset\.json is damaged: .*`dvc repro preprocess`") as error:
        open_store(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_store_and_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no processed data here"):
        open_store(tmp_path)
    write(tmp_path)
    with pytest.raises(UserError, match="no split 'valid'; there are train, val"):
        open_store(tmp_path).split("valid")


def test_fresh_folder_replaces_only_on_success(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with fresh_folder(out) as folder:
        (folder / "a").write_text("1")

    def stopped() -> None:
        with fresh_folder(out) as folder:
            (folder / "b").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [path.name for path in out.iterdir()] == ["a"] and list(out.parent.iterdir()) == [out]
    with fresh_folder(out) as folder:
        (folder / "c").write_text("3")
    assert [path.name for path in out.iterdir()] == ["c"]


def test_text_and_json_are_whole_and_canonical(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"b": 1, "a": [0.1, None, "ä"]})
    assert json.loads((tmp_path / "new" / "a.json").read_text("utf-8")) == {"a": [0.1, None, "ä"], "b": 1}
    assert (tmp_path / "new" / "a.json").read_bytes().index(b'"a"') < 10
    with pytest.raises(ValueError):
        write_json(tmp_path / "new" / "a.json", float("nan"))
    write_text(tmp_path / "new" / "b.txt", "x\n")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.json", "b.txt"]
