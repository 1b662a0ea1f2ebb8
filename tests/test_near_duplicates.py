"""A planted leak is found, and data that are alike by nature are not taken for one."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from anneal import near_duplicates
from anneal.near_duplicates import Copies, find_copies, fingerprints, nearest, verdict
from anneal.store import Images, Split


def split_of(name: str, images: Images) -> Split:
    return Split(Path(name), [images], np.zeros(len(images), np.int64))


def as_jpeg(image: Images, quality: int) -> Images:
    data = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(data, "JPEG", quality=quality)
    return np.asarray(Image.open(data)).reshape(image.shape)


def digits() -> tuple[Images, Images]:
    images = np.round(load_digits().images * 255 / 16).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    return images[order[360:]], images[order[:360]]


def fashion(folder: Path, name: str, count: int) -> Images:
    with gzip.open(folder / "fashion-mnist" / f"{name}-images-idx3-ubyte.gz") as file:
        return np.frombuffer(file.read(16 + count * 784), np.uint8, offset=16).reshape(-1, 28, 28, 1)


def assert_leak_is_found(train: Images, test: Images, qualities: tuple[int, ...]) -> None:
    clean = find_copies(split_of("train", train), split_of("test", test))
    assert len(clean.indices) <= 0.004 * len(test)
    leaked = np.arange(0, len(test), 9)
    copies = np.stack([as_jpeg(test[i], qualities[i % len(qualities)]) for i in leaked])
    order = np.random.default_rng(1).permutation(len(train) + len(copies))
    found = find_copies(split_of("train", np.concatenate([train, copies])[order]), split_of("test", test))
    right = np.isin(found.indices, leaked)
    assert right.sum() >= 0.95 * len(leaked)
    assert set(found.indices[~right]) <= set(clean.indices)
    assert (order[found.train_indices[right]] >= len(train)).all()  # each with the very copy
    assert (np.diff(found.distances) >= 0).all()


def test_leaked_digits_are_found_and_digits_alike_are_not() -> None:
    assert_leak_is_found(*digits(), qualities=(50, 75, 90))


def test_leaked_fashion_images_are_found_and_alike_ones_are_not(shared_data: Path) -> None:
    assert_leak_is_found(
        fashion(shared_data, "train", 12000), fashion(shared_data, "t10k", 600), qualities=(30, 50, 90)
    )


def test_the_same_bytes_twice() -> None:
    train, test = digits()
    train = np.concatenate([train, test[:5]])
    once, again = (find_copies(split_of("train", train), split_of("test", test)) for _ in range(2))
    for name in ("indices", "train_indices", "distances"):
        assert getattr(once, name).tobytes() == getattr(again, name).tobytes()
    assert set(range(5)) <= set(once.indices) and (once.distances[:5] == 0).all()


def test_blocks_do_not_change_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = digits()
    base, queries = fingerprints(train), fingerprints(test[:50])
    whole = nearest(queries, [base])
    monkeypatch.setattr(near_duplicates, "BLOCK", 3000)
    parts = nearest(queries, [base[:3], base[3:700], base[700:]])
    np.testing.assert_allclose(whole[1], parts[1], atol=1e-4)
    np.testing.assert_array_equal(whole[0][:, 0], parts[0][:, 0])
    by_hand = np.sqrt(np.clip(1 - queries @ base.T, 0, 2))
    np.testing.assert_allclose(np.sort(by_hand, axis=1)[:, : whole[1].shape[1]], whole[1], atol=1e-3)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (33, 17, 3), (64, 64, 3)])
def test_fingerprints_are_unit_vectors_whatever_brightness_and_contrast(shape: tuple[int, int, int]) -> None:
    height, width, channels = shape
    random = np.random.default_rng(0).integers(60, 180, (4, 4, 4, channels), np.uint8)
    images = random.repeat(-(-height // 4), axis=1).repeat(-(-width // 4), axis=2)[:, :height, :width]
    vectors = fingerprints(images)
    assert vectors.dtype == np.float32 and vectors.shape[1] <= 256
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    other = fingerprints((images // 2 + 40).astype(np.uint8))
    assert ((vectors * other).sum(axis=1) > 0.999).all()


def test_flat_images_are_like_nothing() -> None:
    flat = np.full((3, 8, 8, 1), 7, np.uint8)
    train, test = digits()
    found = find_copies(
        split_of("train", np.concatenate([train, flat])), split_of("test", np.concatenate([test, flat]))
    )
    assert not set(found.indices) & {360, 361, 362}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_training_split_of_a_few_images(count: int) -> None:
    train, test = digits()
    found = find_copies(split_of("train", train[:count]), split_of("test", np.concatenate([test[:20], train[:1]])))
    assert 20 in found.indices


def test_the_verdict_counts() -> None:
    def copies(count: int, total: int) -> Copies:
        some = np.arange(count)
        return Copies(total, some, some, some * 0.01)

    found = {"val": copies(0, 40), "test": copies(3, 200)}
    assert verdict(found) == "3 of 200 test images (1.5 %) have a near copy in train: test figures are too good"
    found["val"] = copies(4, 40)
    assert verdict(found) == (
        "4 of 40 val images (10.0 %) have a near copy in train, 3 of 200 test images (1.5 %) have a near copy in train: "
        "val and test figures are too good"
    )
    few = {"test": copies(1, 200)}
    assert verdict(few) == "1 of 200 test images (0.50 %) has a near copy in train: too few to matter"
    assert not few["test"].leak and not copies(40, 10000).leak and copies(51, 10000).leak
