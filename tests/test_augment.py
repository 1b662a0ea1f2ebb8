"""The policy: what is refused, what it draws, and what the stage writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anneal import augment
from anneal.augment import (
    PRESETS,
    apply_policy,
    check_policy,
    compile_policy,
    policy_from_json,
    policy_to_json,
    seed_policy,
    transform_names,
    write_copies,
)
from anneal.params import UserError
from anneal.reporting.augmentation import draw_preview
from anneal.store import Sample, Split, SplitWriter, Store, finish
from anneal.transforms import Cutout, RandomPadCrop

ROOT = Path(__file__).resolve().parents[1]
GREY = {"height": 8, "width": 8, "channels": 1}
COLOUR = {"height": 32, "width": 32, "channels": 3}
FLIPS: list[Any] = [{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}]


def noise(n: int, height: int = 32, width: int = 32, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def write_split(folder: Path, labels: list[int], shape: tuple[int, int, int]) -> Split:
    writer = SplitWriter(folder, *shape)
    for i, (image, label) in enumerate(zip(noise(len(labels), *shape), labels, strict=True)):
        writer.add(image, Sample(f"{label}/{i}.png", f"{i:064x}", label, shape[1], shape[0]))
    writer.close()
    return Store(folder.parent, None).split(folder.name)  # type: ignore[arg-type]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "fault"),
    [
        ("lite", "augment.policy: found 'lite', allowed: none | light | standard | strong"),
        (["HorizontalFlp"], "augment.policy[0].HorizontalFlp: no such transform; did you mean 'HorizontalFlip'?"),
        (
            [{"RandomCrop": {"heigth": 3, "width": 3}}],
            "[0].RandomCrop.heigth: unknown argument; did you mean 'height'?",
        ),
        ([{"HorizontalFlip": {"chance": 1}}], "[0].HorizontalFlip.chance: unknown argument; allowed: p"),
        ([{"RandomCrop": {"height": 3}}], "augment.policy[0].RandomCrop.width: missing"),
        ([{"HorizontalFlip": {"p": 2}}], "HorizontalFlip.p: found 2, allowed: a number >= 0 and <= 1"),
        ([{"GaussianBlur": {"sigma_limit": "x"}}], 'GaussianBlur.sigma_limit: found "x", allowed: '),
        ([{"MedianBlur": {"blur_limit": "x"}}], 'MedianBlur.blur_limit: found "x", allowed: '),
        ([{"Cutout": {"size": 2}}], "Cutout.size: found 2, allowed: a number less than or equal to 1"),
        ([{"RandomPadCrop": {"border": "wrap"}}], 'RandomPadCrop.border: found "wrap", allowed: '),
        ([{"OneOf": {"transforms": ["HorizontalFlip", "Rotat"]}}], "OneOf.transforms[1].Rotat: no such transform"),
        ([{"OneOf": None}], "augment.policy[0].OneOf.transforms: missing or empty"),
        (
            [{"SomeOf": {"n": 3, "transforms": ["Transpose"]}}],
            "SomeOf.n: found 3, allowed: a whole number >= 1 and <= 1",
        ),
        ([{"HorizontalFlip": None, "VerticalFlip": None}], "augment.policy[0]: found "),
        (["Normalize"], "Normalize: the model's first layer does this; choose it with preprocess.normalize"),
        (["MixUp"], "MixUp: it mixes a batch; set regularization.mixup.alpha"),
        (["FDA"], "FDA: it needs fda_metadata beside the image"),
    ],
)
def test_a_wrong_policy_is_refused_by_name(policy: Any, fault: str) -> None:
    with pytest.raises(UserError) as caught:
        check_policy(policy)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        check_policy(["HorizontalFlp", {"RandomCrop": {"height": 1.5}}, "VerticalFlip", "CLAHEE"])
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("policy", "geometry", "fault"),
    [
        ([{"RandomCrop": {"height": 40, "width": 40}}], COLOUR, "RandomCrop: fails on images of 32x32x3: Crop size"),
        ([{"CenterCrop": {"height": 24, "width": 24}}], COLOUR, "CenterCrop: images come out of the policy as 24x24x3"),
        ([{"PadIfNeeded": {"min_height": 40, "min_width": 40, "p": 0.001}}], COLOUR, "PadIfNeeded: images come out"),
        (
            [{"OneOf": {"transforms": ["Transpose", {"Resize": {"height": 9, "width": 9}}]}}],
            GREY,
            "Resize: images come",
        ),
        ([{"OneOf": {"p": 0.01, "transforms": ["Transpose", "RandomFog"]}}], GREY, "transforms[1].RandomFog: fails on"),
        (["ToFloat"], COLOUR, "ToFloat: images stay uint8"),
        (["HueSaturationValue"], GREY, "HueSaturationValue: fails on images of 8x8x1: HueSaturationValue: hue_shift"),
        (["ColorJitter"], GREY, "ColorJitter.hue: grey images have none"),
        (["ChannelShuffle"], GREY, "ChannelShuffle: changes nothing on images of 8x8x1"),
        (["Affine"], COLOUR, "Affine: changes nothing on images of 32x32x3"),
    ],
)
def test_a_policy_that_cannot_work_on_the_data_is_refused(policy: Any, geometry: dict[str, int], fault: str) -> None:
    with pytest.raises(UserError) as caught:
        compile_policy(policy, **geometry)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_crop_that_is_padded_or_resized_back_is_fine() -> None:
    policy = [{"Pad": {"padding": 4}}, {"RandomCrop": {"height": 32, "width": 32}}]
    compile_policy(policy, **COLOUR)
    compile_policy([{"RandomCrop": {"height": 6, "width": 6}}, {"Resize": {"height": 8, "width": 8}}], **GREY)
    compile_policy([{"ColorJitter": {"hue": 0, "saturation": 0}}], **GREY)


def test_every_transform_works_or_says_why_not() -> None:
    worked, refused = 0, []
    for name in augment._transforms():
        if name in ("Superpixels", "PiecewiseAffine"):  # seconds each
            continue
        try:
            compose = compile_policy([name], height=16, width=16, channels=3)
        except UserError as error:
            refused.append((name, str(error)))
            continue
        worked += 1
        assert transform_names(compose) == [name]
    assert worked > 60
    for name, reason in refused:
        assert reason.startswith(f"params.yaml: augment.policy[0].{name}")


# ---- what a policy does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "geometry", [GREY, COLOUR, {"height": 28, "width": 28, "channels": 1}, {**COLOUR, "width": 20}]
)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_work_on_any_geometry_and_survive_json(name: str, geometry: dict[str, int]) -> None:
    compose = compile_policy(name, **geometry)
    images = noise(16, **geometry)
    before = images.copy()
    results = []
    for policy in (compose, policy_from_json(policy_to_json(compose))):
        seed_policy(policy, 0, 1, 2)
        results.append(apply_policy(policy, images))
    assert np.array_equal(*results)
    assert results[0].shape == images.shape and results[0].dtype == np.uint8
    assert np.array_equal(images, before)
    assert np.array_equal(results[0], images) == (name == "none")
    assert policy_to_json(policy_from_json(policy_to_json(compose))) == policy_to_json(compose)


def test_presets_fit_digits_and_grey() -> None:
    assert transform_names(compile_policy("light", **GREY)) == ["RandomPadCrop"]
    grey, colour = (transform_names(compile_policy("strong", **g)) for g in (GREY, COLOUR))
    assert set(colour) - set(grey) == {"HueSaturationValue"}


def test_names_of_nested_transforms() -> None:
    policy = [{"SomeOf": {"n": 1, "transforms": ["ColorJitter", {"Sequential": {"transforms": ["VerticalFlip"]}}]}}]
    assert transform_names(compile_policy(policy, **COLOUR)) == ["ColorJitter", "VerticalFlip"]


def test_a_damaged_policy_file_is_refused() -> None:
    text = policy_to_json(compile_policy("light", **GREY))
    for damaged in (text[:-9], text.replace("RandomPadCrop", "Gone"), "[]"):
        with pytest.raises(UserError, match="run the augment stage again"):
            policy_from_json(damaged)


def one_by_one(transform: Any, images: np.ndarray) -> np.ndarray:
    return np.stack([transform(image=image)["image"] for image in images])


def as_batch(transform: Any, images: np.ndarray) -> np.ndarray:
    return transform.apply_batch(images)


BOTH_WAYS = pytest.mark.parametrize("way", [one_by_one, as_batch])


def seeded(transform: Any) -> Any:
    seed_policy(transform, 0, "test")
    return transform


@BOTH_WAYS
def test_pad_crop_is_a_uniform_shift(way: Callable[..., np.ndarray]) -> None:
    image = noise(1, 16, 12, 1)[0]
    transform = seeded(RandomPadCrop(padding=0.125))  # 2 pixels down, 2 (1.5 rounded) across
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    expected = {padded[y : y + 16, x : x + 12].tobytes(): (y, x) for y in range(5) for x in range(5)}
    shifted = way(transform, np.repeat(image[None], 5000, axis=0))
    drawn = Counter(expected[result.tobytes()] for result in shifted)
    assert len(drawn) == 25
    assert max(abs(count - 200) for count in drawn.values()) < 5 * np.sqrt(200)


@BOTH_WAYS
@pytest.mark.parametrize(("border", "mode"), [("edge", "edge"), ("reflect", "reflect"), ("constant", "constant")])
def test_pad_crop_borders(border: str, mode: Any, way: Callable[..., np.ndarray]) -> None:
    image = noise(1, 8, 8)[0]
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode=mode)
    allowed = {padded[y : y + 8, x : x + 8].tobytes() for y in range(5) for x in range(5)}
    shifted = way(seeded(RandomPadCrop(padding=0.25, border=border)), np.repeat(image[None], 500, axis=0))
    assert {result.tobytes() for result in shifted} == allowed


@BOTH_WAYS
def test_cutout_blanks_one_square_that_may_stick_out(way: Callable[..., np.ndarray]) -> None:
    images = np.zeros((2000, 32, 32, 3), np.uint8)
    transform = seeded(Cutout(size=0.5, fill=200))
    areas = []
    for result in way(transform, images):
        rows, columns = np.nonzero(result[..., 0])
        assert set(np.unique(result)) == {0, 200}
        areas.append(len(rows))
        assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert not images.any()
    assert max(areas) == 256 and min(areas) >= 64
    assert np.count_nonzero(transform.apply(images[0], row=0, column=0)[..., 0]) == 64
    assert np.mean(areas) == pytest.approx(14.0**2, rel=0.05)  # sides: (8 + ... + 15 + 17 x 16 + 15 + ... + 9) / 32


@BOTH_WAYS
@pytest.mark.parametrize("transform", [RandomPadCrop(padding=1.0, p=0.25), Cutout(size=1.0, p=0.25)])
def test_own_transforms_keep_their_probability(transform: Any, way: Callable[..., np.ndarray]) -> None:
    images = noise(1, 16, 16)[[0] * 4000]
    changed = (way(seeded(transform), images) != images).any(axis=(1, 2, 3)).sum()
    assert abs(changed - 1000) < 5 * np.sqrt(750)


@pytest.mark.parametrize(("fill", "colours"), [(255, 1), ("random_uniform", 1), ("random", 64)])
@pytest.mark.parametrize("geometry", [GREY | {"height": 32, "width": 32}, COLOUR])
def test_random_erasing_fills_one_rectangle_inside_the_image(geometry: Any, fill: Any, colours: int) -> None:
    """Zhong et al. 2020, as albumentations has it: area and aspect ratio uniform, anywhere in the image, by our seeds."""
    compose = compile_policy(
        [{"Erasing": {"scale": [0.1, 0.3], "ratio": [0.5, 2.0], "fill": fill, "p": 0.5}}], **geometry
    )
    images = np.zeros((600, 32, 32, geometry["channels"]), np.uint8)

    def erased(*key: int) -> np.ndarray:
        seed_policy(compose, 0, *key)
        return apply_policy(compose, images)

    first = erased(1, 2)
    assert first.dtype == np.uint8 and first.shape == images.shape and not images.any()
    assert np.array_equal(erased(1, 2), first) and not np.array_equal(erased(1, 3), first)
    changed = first[first.any(axis=(1, 2, 3))]
    assert abs(len(changed) - 300) < 5 * np.sqrt(150)
    areas, tops, lefts = [], [], []
    for image in changed:
        rows, columns = np.nonzero(image.any(-1))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        inside = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert len(np.unique(inside.reshape(-1, geometry["channels"]), axis=0)) >= min(colours, height * width // 2)
        assert colours > 1 or len(rows) == height * width
        assert 0.4 < width / height < 2.5
        areas.append(height * width / 32**2)
        tops.append(rows.min() / (32 - height))
        lefts.append(columns.min() / (32 - width))
    assert min(areas) > 0.08 and max(areas) < 0.33
    assert np.mean(areas) == pytest.approx(0.2, abs=0.015)
    assert np.mean(tops) == pytest.approx(0.5, abs=0.08) and np.mean(lefts) == pytest.approx(0.5, abs=0.08)


def test_own_transforms_follow_a_random_size() -> None:
    policy = [{"RandomScale": {"scale_limit": 0.3, "p": 1}}, "Cutout", {"Resize": {"height": 8, "width": 8}}]
    compose = compile_policy(policy, **GREY)
    assert apply_policy(compose, noise(16, **GREY)).shape == (16, 8, 8, 1)


# ---- randomness -----------------------------------------------------------------------------------------------------


def drawn_flips(epoch: int, microbatch: int, n: int, seed: int = 0) -> list[tuple[bool, bool]]:
    compose = compile_policy(FLIPS, height=2, width=2, channels=1)
    image = np.array([[1, 2], [3, 4]], np.uint8)[..., None]
    seed_policy(compose, seed, epoch, microbatch)
    corner = apply_policy(compose, np.repeat(image[None], n, axis=0))[:, 0, 0, 0]
    return [((value - 1) % 2 == 1, value > 2) for value in corner]


def test_transforms_draw_independently_of_each_other() -> None:
    n = 4000
    counts = Counter(flips for microbatch in range(8) for flips in drawn_flips(0, microbatch, n // 8))
    expected = n / 4
    chi_square = sum((counts[h, v] - expected) ** 2 / expected for h in (False, True) for v in (False, True))
    assert chi_square < 16.27  # 3 degrees of freedom, one in a thousand


def test_draws_belong_to_seed_epoch_and_microbatch() -> None:
    draws = {key: tuple(drawn_flips(*key[1:], n=64, seed=key[0])) for key in np.ndindex(2, 3, 3)}
    assert len(set(draws.values())) == len(draws)
    assert draws == {key: tuple(drawn_flips(*key[1:], n=64, seed=key[0])) for key in draws}


def test_batches_do_not_depend_on_loader_processes(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    from anneal.batching import MicrobatchSampler, plan_run
    from anneal.training.data import MicrobatchDataset

    split = write_split(tmp_path / "train", [0, 1] * 20, (8, 8, 3))
    compose = compile_policy("strong", height=8, width=8, channels=3)
    epochs: dict[int, list[bytes]] = {}
    for workers in (0, 2):
        sampler = MicrobatchSampler(
            plan_run(size=8, microbatch=8, devices=1, num_nodes=1, num_samples=len(split), epochs=1), 0
        )
        loader = DataLoader(
            MicrobatchDataset([split], compose, 0),
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=lambda batch: batch,
            num_workers=workers,
            persistent_workers=bool(workers),
        )
        seen = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            seen.append(b"".join(batch.images.numpy().tobytes() for batch in loader))
        epochs[workers] = seen
    assert epochs[0] == epochs[2]
    assert epochs[0][0] != epochs[0][1]


# ---- what is written ------------------------------------------------------------------------------------------------


def test_copies_balance_the_classes(tmp_path: Path) -> None:
    split = write_split(tmp_path / "train", [0] * 7 + [1] * 3 + [3] * 5, (8, 8, 1))
    compose = compile_policy("light", **GREY)
    for folder in ("a", "b"):
        copies = write_copies(compose, split, tmp_path / folder, num_classes=4, seed=0)
    assert copies == {1: 4, 3: 2}
    extra = Store(tmp_path, None).split("a")  # type: ignore[arg-type]
    assert np.bincount(np.concatenate([split.labels, extra.labels])).tolist() == [7, 7, 0, 7]
    sources = [sample.source for sample in extra.samples()]
    assert len(set(sources)) == 6
    originals = [source.split("#")[0] for source in sources if source.startswith("1/")]
    assert len(set(originals)) == 3  # each of the three once before one comes twice
    for name in ("images-00000.npy", "labels.npy", "samples.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_equal_classes_get_no_copies(tmp_path: Path) -> None:
    split = write_split(tmp_path / "train", [0, 1, 0, 1], (8, 8, 1))
    assert write_copies(compile_policy("light", **GREY), split, tmp_path / "x", num_classes=2, seed=0) == {}
    assert not (tmp_path / "x").exists()


def test_preview_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    split = write_split(tmp_path / "train", [label for label in range(23) for _ in range(2)], (8, 6, 3))
    compose = compile_policy("strong", height=8, width=6, channels=3)
    names = ["a/b c", "../x", *(f"class {i}" for i in range(21))]
    pictures = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths = draw_preview(compose, split, names, tmp_path / name, seed=0)
        assert sorted(paths) == sorted((tmp_path / name).iterdir())
        pictures.append([path.read_bytes() for path in paths])
    assert pictures[0] == pictures[1]
    assert len(paths) == 21  # the overview and at most twenty classes
    with Image.open(paths[1]) as row:
        assert row.size == (8 * (48 + 4) + 8, 64)
        pixels = np.asarray(row)
    assert np.array_equal(pixels[::8, :48:8], split.take([0])[0])  # the original stands first, pixel by pixel
    assert len({pixels[:, 52 * i + 8 : 52 * i + 56].tobytes() for i in range(1, 8)}) == 7


def run_stage(folder: Path, policy: str) -> subprocess.CompletedProcess[str]:
    from anneal.recipe import schema_text

    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    text = re.sub(r"policy: light", f"policy: {policy}", text)
    (folder / "params.yaml").write_text(text.replace("balance: false", "balance: true"), encoding="utf-8")
    (folder / "params.schema.json").write_text(schema_text(), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    command = [sys.executable, "-m", "stages.augment"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_stage_writes_policy_copies_and_preview(tmp_path: Path) -> None:
    data = tmp_path / "data" / "processed"
    write_split(data / "train", [0] * 5 + [1] * 3, (8, 8, 1))
    geometry: dict[str, Any] = {"shape": (8, 8, 1), "counts": {"train": 8}, "normalize": "none", "statistics": {}}
    finish(data, classes=["x", "y"], **geometry)

    refused = run_stage(tmp_path, "[{RandomCrop: {height: 28, width: 28}}]")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: params.yaml: augment.policy[0].RandomCrop: fails on images of 8x8x1")
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "data" / "augmented").exists() and not (tmp_path / "reports").exists()

    done = run_stage(tmp_path, "strong")
    assert done.returncode == 0, done.stderr
    policy = (tmp_path / "data" / "augmented" / "policy.json").read_text(encoding="utf-8")
    expected = ["Cutout", "HorizontalFlip", "RandomBrightnessContrast", "RandomPadCrop"]
    assert transform_names(policy_from_json(policy)) == expected
    assert Store(tmp_path / "data" / "augmented", None).split("extra").labels.tolist() == [1, 1]  # type: ignore[arg-type]
    written = sorted(path.name for path in (tmp_path / "reports" / "augmentation").iterdir())
    assert written == ["000-x.png", "001-y.png", "overview.png"]


def test_the_policy_needs_no_torch() -> None:
    code = """
import sys
from anneal.augment import *
compose = compile_policy("strong", height=8, width=8, channels=3)
policy_from_json(policy_to_json(compose))
import anneal.reporting.augmentation
assert "albumentations" in sys.modules and "torch" not in sys.modules
import albumentations.pytorch  # still there for whoever wants it
assert albumentations.pytorch.ToTensorV2
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)
