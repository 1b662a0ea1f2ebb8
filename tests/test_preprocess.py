from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tracemalloc
import warnings
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anneal import splitting, statistics
from anneal.decoding import RESAMPLING, as_channels, decode, resize
from anneal.params import ParamsError, UserError, parse
from anneal.preprocess import PreprocessConfig, SplitConfig, build_store, planned_classes
from anneal.reporting.preprocessing import draw_preprocessing
from anneal.sources import open_source
from anneal.store import open_store
from tests.raw_data import WRITERS, write_folder, write_idx, write_mnist

ARGUMENTS = {
    "seed": 0,
    "size": 4,
    "fit": "stretch",
    "interpolation": "area",
    "normalize": "standardize",
    "epsilon": 1e-5,
    "val": 0.2,
    "test": 0.2,
}


def planned_counts(source, **arguments) -> dict[str, int]:
    return {split: sum(counts.values()) for split, counts in planned_classes(source, **arguments).items()}


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def noise(seed: int, size: tuple[int, ...] = (6, 5)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, np.uint8))


def images(per_class: int = 10, classes: tuple[str, ...] = ("cat", "dog"), top: str = "", first: int = 0) -> dict:
    return {
        f"{top}{name}/{i:02d}.png": encode(noise(first + 100 * c + i))
        for c, name in enumerate(classes)
        for i in range(per_class)
    }


def build(path: Path, folder: Path, **changes) -> dict:
    folder.mkdir()
    return build_store(open_source(path), folder, **(ARGUMENTS | changes))


def made(tmp_path: Path, files: dict[str, bytes], **changes) -> tuple[dict, dict[str, list[str]]]:
    """Build from a folder; return the report and the source names of each split."""
    report = build(write_folder(tmp_path / "raw", files), tmp_path / "store", **changes)
    store = open_store(tmp_path / "store")
    return report, {name: [s.source for s in store.split(name).samples()] for name in ("train", "val", "test")}


def tree(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# ---- decoding -------------------------------------------------------------------------------------------------------


def test_exif_orientation_is_applied() -> None:
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[:2, :3] = 255
    stored = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for orientation, array in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(Image.fromarray(np.ascontiguousarray(array)), exif=exif)
        assert np.array_equal(decode(data, max_pixels=100), upright), orientation


def test_every_mode_becomes_grey_or_rgb() -> None:
    def one(image: Image.Image, format: str = "PNG", **options) -> list[int]:
        array = decode(encode(image, format, **options), max_pixels=100)
        assert array.dtype == np.uint8 and array.shape[:2] == (2, 2)
        return array[0, 0].tolist()

    assert one(Image.new("1", (2, 2), 1)) == [255]
    assert one(Image.new("L", (2, 2), 7)) == [7]
    assert one(Image.new("RGB", (2, 2), (1, 2, 3))) == [1, 2, 3]
    assert one(Image.new("RGBA", (2, 2), (0, 0, 0, 0))) == [255, 255, 255]
    assert one(Image.new("RGBA", (2, 2), (0, 100, 0, 128))) == [127, 177, 127]
    assert one(Image.new("LA", (2, 2), (0, 0))) == [255]
    assert one(Image.new("LA", (2, 2), (7, 255))) == [7]
    assert one(Image.new("RGB", (2, 2), (9, 9, 9)), transparency=(9, 9, 9)) == [255, 255, 255]
    assert one(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF") == [255, 0, 0]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert one(palette) == [10, 20, 30]
    assert one(palette, transparency=1) == [255, 255, 255]
    palette.putpalette([0, 0, 0, 40, 40, 40])
    assert one(palette) == [40]
    # 16 bits are scaled, not clipped to white.
    deep = Image.fromarray(np.full((2, 2), 32896, np.uint16))
    assert one(deep) == [128]
    assert one(deep, "TIFF") == [128]
    assert one(Image.fromarray(np.full((2, 2), 65535, np.uint16))) == [255]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("L", (2, 2), value) for value in (10, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, max_pixels=4)[0, 0].tolist() == [10]


def test_refusals_of_decode() -> None:
    jpeg = encode(noise(0, (64, 64, 3)), "JPEG")
    with pytest.raises(ValueError, match="truncated"):
        decode(jpeg[: len(jpeg) // 2], max_pixels=10**6)
    png = encode(noise(0, (64, 64)))
    with pytest.raises(ValueError, match="does not decode"):
        decode(png[: len(png) // 2], max_pixels=10**6)
    with pytest.raises(ValueError, match=r"64 x 64 pixels, more than data\.max_pixels \(4095\)"):
        decode(jpeg, max_pixels=4095)
    for data in (b"", b"hello", b"%PDF-1.4", encode(noise(0, (4, 4, 3)), "ICO")):
        with pytest.raises(ValueError, match=r"no image in a known format \(JPEG"):
            decode(data, max_pixels=100)
    for value, dtype in ((0.5, np.float32), (70000, np.int32)):
        with pytest.raises(ValueError, match="no defined range"):
            decode(encode(Image.fromarray(np.full((2, 2), value, dtype)), "TIFF"), max_pixels=100)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_give_a_reason_or_an_image(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    content = bytearray(encode(noise(1, (9, 7, 3)), format))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    image, reason = None, ""
    try:
        image = decode(bytes(content[: data.draw(st.integers(0, len(content)))]), max_pixels=10**6)
    except ValueError as error:
        reason = str(error)
    if image is None:
        assert reason and "\n" not in reason and "0x" not in reason
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] in (1, 3)


# ---- resizing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", RESAMPLING)
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_gives_the_size(interpolation: str, fit: str, channels: int) -> None:
    for height, width in ((7, 13), (13, 7), (1, 40), (5, 5), (2, 3)):
        image = np.full((height, width, channels), 200, np.uint8)
        resized = resize(image, 5, fit, interpolation)
        assert resized.shape == (5, 5, channels) and resized.dtype == np.uint8
        assert (resized == 200).all() if fit != "pad" else set(np.unique(resized)) <= {0, 200}


def test_fits() -> None:
    image = np.zeros((4, 8, 1), np.uint8)
    image[:, :2], image[:, 2:6] = 50, 100
    assert np.unique(resize(image, 4, "crop", "area")).tolist() == [100]
    assert resize(image, 4, "stretch", "area")[0, :, 0].tolist() == [50, 100, 100, 0]
    padded = resize(image, 8, "pad", "nearest")[:, :, 0]
    assert (padded[2:6] == image[:, :, 0]).all() and not padded[:2].any() and not padded[6:].any()


@pytest.mark.parametrize("interpolation", sorted(set(RESAMPLING) - {"nearest"}))
def test_shrinking_is_antialiased(interpolation: str) -> None:
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize(stripes, 8, "stretch", interpolation).astype(int) - 128).max() <= 6
    assert set(np.unique(resize(stripes, 8, "stretch", "nearest"))) <= {0, 255}


def test_channels() -> None:
    grey = np.arange(8, dtype=np.uint8).reshape(2, 4, 1)
    colour = as_channels(grey, 3)
    assert colour.shape == (2, 4, 3) and np.array_equal(as_channels(colour, 1), grey)
    rgb = np.array(noise(0, (5, 5, 3)))
    assert np.array_equal(as_channels(rgb, 1)[..., 0], np.array(Image.fromarray(rgb).convert("L")))


# ---- the split ------------------------------------------------------------------------------------------------------


def test_split_is_stratified_seeded_and_complete() -> None:
    labels = ["a"] * 50 + ["b"] * 20 + ["c"] * 3
    arguments = {"names": ["a", "b", "c"], "val": 0.1, "test": 0.2}
    splits = splitting.assign(labels, [None] * 73, seed=0, **arguments)
    counts = {
        n: [sum(s == n and x == c for s, x in zip(splits, labels, strict=True)) for c in "abc"] for n in set(splits)
    }
    assert counts == {"train": [35, 14, 1], "val": [5, 2, 1], "test": [10, 4, 1]}
    assert splits == splitting.assign(labels, [None] * 73, seed=0, **arguments)
    assert splits != splitting.assign(labels, [None] * 73, seed=1, **arguments)
    # Another class leaves the others where they were.
    more = splitting.assign([*labels, *"ddd"], [None] * 76, seed=0, **arguments | {"names": list("abcd")})
    assert more[:73] == splits


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train": 10, "test": 4}, {"train": 8, "val": 2, "test": 4}),
        ({"train": 10, "val": 4}, {"train": 7, "val": 4, "test": 3}),
        ({"train": 10, "val": 1, "test": 1}, {"train": 10, "val": 1, "test": 1}),
    ],
)
def test_missing_splits_come_from_train(given: dict, expected: dict) -> None:
    splits = [split for split, count in given.items() for _ in range(count)]
    assigned = splitting.assign(["a"] * len(splits), splits, names=["a"], seed=0, val=0.2, test=0.3)
    assert {split: assigned.count(split) for split in expected} == expected
    assert all(new == old for new, old in zip(assigned, splits, strict=True) if old != "train")


def test_small_and_empty_classes_are_named() -> None:
    with pytest.raises(UserError, match=r"needs 3 usable training images.*'b' has 2, 'c' has 0"):
        splitting.assign(["a"] * 5 + ["b"] * 2, [None] * 7, names=["a", "b", "c"], seed=0, val=0.1, test=0.1)
    # A class that only the source's test holds cannot be learnt.
    with pytest.raises(UserError, match=r"needs 2 usable training images.*'b' has 0"):
        splitting.assign(["a", "a", "b"], ["train", "train", "test"], names=["a", "b"], seed=0, val=0.1, test=0.1)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    limit=st.integers(1, 100),
    seed=st.integers(0, 5),
)
def test_limit_is_kept_stratified_and_covers_every_class(sizes: list[int], limit: int, seed: int) -> None:
    labels = [str(c) for c, size in enumerate(sizes) for _ in range(size)]
    if limit < len(sizes) and limit < len(labels):
        with pytest.raises(UserError, match=r"data\.limit"):
            splitting.choose(labels, limit, seed=seed)
        return
    chosen = splitting.choose(labels, limit, seed=seed)
    assert len(set(chosen)) == len(chosen) == min(limit, len(labels)) and chosen == sorted(chosen)
    for c, size in enumerate(sizes):
        count = sum(labels[i] == str(c) for i in chosen)
        exact = min(1, limit / len(labels)) * size
        assert 1 <= count <= size and (count <= exact + 1 or count == 1)


def test_nothing_of_an_image_in_two_splits(tmp_path: Path) -> None:
    files = images(8, top="train/") | images(3, top="val/", first=1000) | images(3, top="test/", first=2000)
    files["train/cat/copy.png"] = files["val/cat/00.png"]  # identical bytes
    files["train/cat/copy.bmp"] = encode(noise(2000), "BMP")  # identical pixels as test/cat/00.png
    files["val/cat/copy.png"] = files["test/cat/01.png"]
    files["train/cat/twin.png"] = files["train/cat/00.png"]  # within one split: stays, counted
    files["train/cat/both.png"] = files["train/dog/00.png"]  # two labels: both go
    report, splits = made(tmp_path, files)
    assert [(d["removed"], d["from"], d["kept"], d["in"]) for d in report["duplicates"]] == [
        ("train/cat/copy.bmp", "train", "test/cat/00.png", "test"),
        ("train/cat/copy.png", "train", "val/cat/00.png", "val"),
        ("val/cat/copy.png", "val", "test/cat/01.png", "test"),
    ]
    assert report["num_duplicates_removed"] == 3
    assert report["num_duplicates_within"] == {"train": 1, "val": 0, "test": 0}
    assert report["conflicting"] == [
        [{"source": "train/cat/both.png", "label": "cat"}, {"source": "train/dog/00.png", "label": "dog"}]
    ]
    assert report["num_conflicting"] == 2
    assert "train/cat/twin.png" in splits["train"] and "train/cat/00.png" in splits["train"]
    assert not {"train/cat/both.png", "train/dog/00.png", "train/cat/copy.png"} & set(splits["train"])
    assert [len(splits[name]) for name in splits] == [report[name] for name in splits] == [16, 6, 6]


def test_a_grey_picture_saved_as_colour_is_a_copy(tmp_path: Path) -> None:
    files = images(4, top="train/") | images(2, top="test/", first=2000)
    files["train/cat/colour.png"] = encode(noise(2000).convert("RGB"))
    report, _ = made(tmp_path, files)
    assert [d["removed"] for d in report["duplicates"]] == ["train/cat/colour.png"]
    assert report["channels"] == 3


def test_a_class_lost_to_duplicates_is_named(tmp_path: Path) -> None:
    files = images(6, top="train/") | images(6, ("cat",), top="test/")
    with pytest.raises(UserError, match="no train image of class 'cat' is left"):
        made(tmp_path, files)


# ---- statistics -----------------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(3).integers(0, 256, (200, 3, 4, 3), np.uint8)
PIXELS[:, :, :, 1] //= 2


def batches(size: int):
    return [PIXELS[start : start + size] for start in range(0, len(PIXELS), size)]


def test_statistics_against_numpy() -> None:
    x = PIXELS / 255
    fit = {kind: statistics.fit_statistics(kind, batches(33)) for kind in statistics.BY_CHANNEL + statistics.BY_PIXEL}
    assert {kind: sorted(arrays) for kind, arrays in fit.items()} == {
        "center": ["mean"],
        "center_image": ["mean"],
        "standardize": ["mean", "std"],
        "standardize_pixel": ["mean", "std"],
    }
    for kind, axes in (("standardize", (0, 1, 2)), ("standardize_pixel", 0)):
        np.testing.assert_allclose(fit[kind]["mean"], x.mean(axis=axes), rtol=1e-12)
        np.testing.assert_allclose(fit[kind]["std"], x.std(axis=axes), rtol=1e-10)
    assert statistics.fit_statistics("none", batches(50)) == statistics.fit_statistics("scale", batches(50)) == {}
    assert all(array.dtype == np.float64 for arrays in fit.values() for array in arrays.values())


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_whitening_gives_the_unit_covariance(kind: str) -> None:
    fitted = statistics.fit_statistics(kind, batches(64), epsilon=1e-12)
    y = statistics.normalize(PIXELS, kind, fitted).reshape(len(PIXELS), -1)
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.eye(36), atol=1e-6)
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-9)
    assert (np.diff(fitted["eigenvalues"]) <= 0).all()
    if kind == "zca":
        np.testing.assert_allclose(fitted["matrix"], fitted["matrix"].T, atol=1e-9)
        assert statistics.normalize(PIXELS, kind, fitted).shape == PIXELS.shape


@pytest.mark.parametrize("kind", [*statistics.BY_CHANNEL, *statistics.BY_PIXEL, *statistics.WHITENING])
def test_statistics_do_not_depend_on_the_blocks(kind: str) -> None:
    small, large = (statistics.fit_statistics(kind, batches(size)) for size in (7, 200))
    assert all(np.array_equal(small[name], large[name]) for name in large)


WHITEN = """
import hashlib, sys
import numpy as np
from anneal import statistics
images = np.random.default_rng(0).integers(0, 256, (600, 20, 20, 1), np.uint8)
images[:, 5:] //= 3
fitted = statistics.fit_statistics(sys.argv[1], [images[:350], images[350:]], epsilon=1e-3)
arrays = [fitted[name] for name in sorted(fitted)] + [statistics.normalize(images, sys.argv[1], fitted)]
print(*(hashlib.sha256(array.tobytes()).hexdigest() for array in arrays))
"""


@pytest.mark.parametrize("kind", statistics.WHITENING)
def test_whitening_does_not_depend_on_the_number_of_threads(kind: str) -> None:
    digests = set()
    for threads in ("1", "2"):
        env = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", WHITEN, kind]
        digests.add(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    assert len(digests) == 1


def test_a_constant_pixel_gets_the_smallest_deviation() -> None:
    flat = np.full((5, 2, 2, 1), 9, np.uint8)
    assert (statistics.fit_statistics("standardize_pixel", [flat])["std"] == 1 / 255).all()
    assert np.isfinite(statistics.normalize(flat, "zca", statistics.fit_statistics("zca", [flat]))).all()


def test_whitening_of_large_images_is_refused_with_the_figure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"64 x 64 x 3 images whitens 12,288 dimensions, allowed: at most 4,096"):
        statistics.check_dimensions("zca", 64, 64, 3)
    values = {
        "preprocess": {k: ARGUMENTS[k] for k in ("fit", "interpolation", "epsilon")} | {"size": 65, "normalize": "pca"}
    }
    with pytest.raises(ParamsError, match=r"yaml: preprocess\.normalize: pca of 65 x 65 x 1 images whitens 4,225 dim"):
        parse(values, {"preprocess": PreprocessConfig})
    colour = {name: encode(Image.open(io.BytesIO(data)).convert("RGB")) for name, data in images(5).items()}
    with pytest.raises(UserError, match="4,800 dimensions"):
        made(tmp_path, colour, size=40, normalize="zca")


def test_statistics_are_of_the_training_split_alone(tmp_path: Path) -> None:
    made(tmp_path, images())
    store = open_store(tmp_path / "store")
    train = store.split("train").take(range(len(store.split("train"))))
    np.testing.assert_allclose(store.statistics()["mean"], train.mean(axis=(0, 1, 2)) / 255)


# ---- the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "folder"])
def test_the_store_is_the_same_from_folder_and_archive_with_any_number_of_workers(kind: str, tmp_path: Path) -> None:
    files = images(70)
    shuffled = dict(sorted(files.items(), key=lambda entry: hashlib.md5(entry[0].encode()).digest()))
    report = build(WRITERS["folder"](tmp_path, files), tmp_path / "one", num_workers=1)
    again = build(WRITERS[kind](tmp_path, shuffled), tmp_path / "two", num_workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert json.dumps(report) == json.dumps(again)


def test_store_of_folder(tmp_path: Path) -> None:
    files = images()
    report, splits = made(tmp_path, files)
    store = open_store(tmp_path / "store")
    assert store.info.classes == ["cat", "dog"] and store.info.counts == {"train": 12, "val": 4, "test": 4}
    assert (store.info.channels, store.info.fit, store.info.interpolation) == (1, "stretch", "area")
    assert sorted(chain(*splits.values())) == sorted(files)
    split = store.split("train")
    for row, sample in enumerate(split.samples()):
        data = files[sample.source]
        assert sample.sha256 == hashlib.sha256(data).hexdigest() and (sample.width, sample.height) == (5, 6)
        assert store.info.classes[sample.label] == sample.source.split("/")[0] and split.labels[row] == sample.label
        assert np.array_equal(split.take([row])[0], resize(decode(data, max_pixels=30), 4, "stretch", "area"))
    assert report["classes"] == [{"name": n, "train": 6, "val": 2, "test": 2} for n in ("cat", "dog")]
    assert not (tmp_path / "store" / "spool").exists()
    planned = planned_counts(open_source(tmp_path / "raw"), val=0.2, test=0.2, limit=5)
    assert planned == {"train": 5, "val": 4, "test": 4}


def test_rejected_files_are_named_and_limited(tmp_path: Path) -> None:
    files = images(20) | {"cat/broken.jpg": b"no image", "dog/large.png": encode(noise(9, (50, 50)))}
    report, splits = made(tmp_path, files, max_pixels=2000, max_rejected=0.05)
    assert [r["source"] for r in report["rejected"]] == ["cat/broken.jpg", "dog/large.png"]
    assert report["num_rejected"] == 2 and "no image in a known format" in report["rejected"][0]["reason"]
    assert not {"cat/broken.jpg", "dog/large.png"} & set(chain(*splits.values()))
    with pytest.raises(
        UserError, match=r"data\.max_rejected: 2 of 42 files \(4\.8%\) cannot be used, allowed: 4\.0%; cat/"
    ):
        build(tmp_path / "raw", tmp_path / "other", max_pixels=2000, max_rejected=0.04)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in"):
        build(tmp_path / "empty", tmp_path / "a")
    with pytest.raises(UserError, match="found one class, 'cat'"):
        build(write_folder(tmp_path / "raw", images(5, ("cat",))), tmp_path / "b")
    (tmp_path / "raw" / "fish").mkdir()
    with pytest.raises(UserError, match="'fish' has 0"):
        build(tmp_path / "raw", tmp_path / "c")


def test_limit_applies_to_training_images_alone(tmp_path: Path) -> None:
    report, splits = made(tmp_path, images(10), limit=6)
    assert (report["train"], report["val"], report["test"], report["num_left_out_by_limit"]) == (6, 4, 4, 6)
    assert report["classes"][0]["train"] == 3 and len(splits["train"]) == 6


@pytest.mark.parametrize("limit", [None, 1000, 13, 5, 3])
def test_what_is_planned_is_what_is_made(limit: int | None, tmp_path: Path) -> None:
    files = images(20, ("cat",)) | images(6, ("dog",), first=500) | images(4, ("eel",), first=900)
    report, _ = made(tmp_path, files, limit=limit)
    source = open_source(tmp_path / "raw")
    planned = planned_classes(source, val=0.2, test=0.2, limit=limit)
    for split in ("train", "val", "test"):
        assert planned[split] == {row["name"]: row[split] for row in report["classes"]}
    assert planned_counts(source, val=0.2, test=0.2, limit=limit) == {s: report[s] for s in ("train", "val", "test")}


def test_a_limit_below_the_number_of_classes_is_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path / "raw", images(10, ("cat", "dog", "eel"))))
    with pytest.raises(UserError, match=r"data\.limit: found 2, allowed: at least one image for each of the 3 classes"):
        planned_counts(source, val=0.2, test=0.2, limit=2)


def test_memory_is_bounded_by_the_shard_and_not_by_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raw").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 128, 128), np.uint8)
    for part in ("train", "t10k"):
        write_idx(tmp_path / "raw" / f"{part}-images-idx3-ubyte", pixels if part == "train" else 255 - pixels[:10])
        count = 2000 if part == "train" else 10
        write_idx(tmp_path / "raw" / f"{part}-labels-idx1-ubyte", (np.arange(count) % 2).astype(np.uint8))
    for name in ("store.SHARD_BYTES", "spooling.CHUNK_BYTES", "preprocess.BLOCK_BYTES", "sources.BLOCK_BYTES"):
        monkeypatch.setattr(f"anneal.{name}", 2**20)
    size = pixels.nbytes
    del pixels
    tracemalloc.start()
    build(tmp_path / "raw", tmp_path / "store", size=128)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 2, f"{peak:,} bytes for {size:,} bytes of images"


def test_shipped_digits(tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parents[1] / "data" / "digits.zip"
    report = build(shipped, tmp_path / "store", size=8)
    assert report["images"] == 1797 and report["num_duplicates_removed"] == report["num_rejected"] == 0
    from sklearn.datasets import load_digits

    digits = load_digits()
    train = open_store(tmp_path / "store").split("train")
    rows = [int(s.source.split("/")[1][:4]) for s in train.samples()]
    assert np.array_equal(train.labels, digits.target[rows])
    assert np.array_equal(train.take(range(len(train)))[..., 0], np.rint(digits.images[rows] * 255 / 16))


def test_idx_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_mnist(tmp_path / "raw", count=20)
    pixels = np.concatenate([pixels, np.random.default_rng(9).integers(0, 256, pixels.shape, np.uint8)])
    write_idx(tmp_path / "raw" / "t10k-images-idx3-ubyte.gz", pixels[20:])
    monkeypatch.setattr("anneal.store.SHARD_BYTES", 5 * 16)
    build(tmp_path / "raw", tmp_path / "store")
    store = open_store(tmp_path / "store")
    test = store.split("test")
    assert len(test) == 20 and [len(shard) for shard in test.shards] == [5, 5, 5, 5]
    assert [s.source for s in test.samples()] == [f"t10k-images-idx3-ubyte.gz#{i}" for i in range(20)]
    expected = np.stack([resize(image[:, :, None], 4, "stretch", "area") for image in pixels[20:]])
    assert np.array_equal(test.take(range(20)), expected)
    assert test.samples()[2].sha256 == hashlib.sha256(pixels[22].tobytes()).hexdigest()


@pytest.mark.parametrize("kind", ["none", "scale", "center_image", "standardize", "pca", "zca"])
def test_pictures_are_the_same_on_every_run(kind: str, tmp_path: Path) -> None:
    """Whatever the user's matplotlibrc says, and whatever is in a class's name."""
    import matplotlib

    made(tmp_path, images(), normalize=kind)
    store = open_store(tmp_path / "store")
    for name, style in (("one", {}), ("two", {"font.size": 20, "axes.grid": True, "savefig.facecolor": "red"})):
        (tmp_path / name).mkdir()
        with matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.simplefilter("error")
            classes = ["$a_\x07", "dog"]
            paths = draw_preprocessing(store.split("train"), classes, kind, store.statistics(), tmp_path / name)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    names = ["images.png", "histograms.png"] + (["spectrum.png"] if kind in statistics.WHITENING else [])
    assert [path.name for path in paths] == names
    for path in paths:
        assert np.array(Image.open(path).convert("L")).std() > 5, "an empty picture"


def test_split_fractions_must_leave_training_data() -> None:
    with pytest.raises(ParamsError, match="nothing is left to train on"):
        parse({"split": {"val": 0.5, "test": 0.5}}, {"split": SplitConfig})


def test_real_sets(shared_data: Path) -> None:
    fashion = open_source(shared_data / "fashion-mnist")
    assert len(fashion) == 70_000 and fashion.classes == [str(i) for i in range(10)]
    clothing = open_source(shared_data / "clothing" / "clothing.tar")
    assert len(clothing) == 2073 and len(clothing.classes) == 10
    assert planned_counts(clothing, val=0.1, test=0.2)["test"] == 372
