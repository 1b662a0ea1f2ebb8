"""Test-time augmentation."""

from __future__ import annotations

import hashlib
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch

from anneal import seeding, transforms, views
from anneal.ensemble import log_softmax
from anneal.models.build import NETWORKS, build_classifier
from anneal.params import UserError
from anneal.views import (
    AVERAGE,
    COVERED_BY,
    VIEWS,
    average_views,
    check_sizes,
    conflicts,
    entries_of,
    label_of,
    make_views,
    num_images,
    parse_views,
    passes,
    predict,
    predict_images,
    predict_views,
    resolve,
    uncovered,
)


def images(shape: tuple[int, int, int, int] = (3, 12, 12, 3)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def made(batch: np.ndarray, name: str, **arguments: Any) -> list[np.ndarray]:
    """Return one view's images."""
    (found,) = make_views(torch.from_numpy(batch), parse_views([{name: arguments}]))
    return [image.numpy() for image in found[1]]


def sampled(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return an image at places between its pixels, by another library in float64, not rounded."""
    places = np.stack(np.broadcast_arrays(rows, columns))
    channels = np.moveaxis(image.astype(np.float64), 2, 0)
    return np.stack([scipy.ndimage.map_coordinates(c, places, order=1, mode="nearest") for c in channels], axis=2)


def assert_rounded(view: np.ndarray, exact: np.ndarray) -> None:
    """Each pixel is a nearest whole number; ties go either way."""
    assert np.abs(view - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (3, 12, 17, 3), (1, 2, 2, 1)])
def test_every_view_treats_images_alone(name: str, shape: tuple[int, int, int, int]) -> None:
    batch = images(shape)
    before = batch.copy()
    found = made(batch, name)
    view = parse_views([name])
    assert [len(found)] == num_images(view, *shape[1:3])
    assert passes(view, *shape[1:3]) == [pytest.approx(sum(v.size for v in found) / batch.size)]
    for index, image in enumerate(found):
        assert image.dtype == np.uint8 and len(image) == len(batch) and image.shape[3] == shape[3]
        for one in range(len(batch)):
            np.testing.assert_array_equal(image[one : one + 1], made(batch[one : one + 1], name)[index])
        np.testing.assert_array_equal(image[::-1], made(batch[::-1].copy(), name)[index])
    np.testing.assert_array_equal(batch, before)


@pytest.mark.parametrize("name", sorted(set(VIEWS) - {"augment"}))
def test_a_flat_image_stays_flat(name: str) -> None:
    for view in made(np.full((1, 9, 9, 3), 200, np.uint8), name):
        assert (view == 200).all()


def test_flips() -> None:
    batch = images()
    (mirrored,) = made(batch, "hflip")
    np.testing.assert_array_equal(mirrored[1], cv2.flip(batch[1], 1))
    (upside_down,) = made(batch, "vflip")
    np.testing.assert_array_equal(upside_down[1], cv2.flip(batch[1], 0))


@pytest.mark.parametrize("arguments", [{"pixels": 2}, {"fraction": 0.15}])
def test_shifts_move_by_whole_pixels_and_repeat_the_edge(arguments: dict[str, Any]) -> None:
    batch = images()
    up, down, left, right = made(batch, "shifts", **arguments)
    np.testing.assert_array_equal(up[:, :-2], batch[:, 2:])
    np.testing.assert_array_equal(up[:, -2:], batch[:, -1:].repeat(2, axis=1))
    np.testing.assert_array_equal(down[:, 2:], batch[:, :-2])
    np.testing.assert_array_equal(left[:, :, :-2], batch[:, :, 2:])
    np.testing.assert_array_equal(right[:, :, 2:], batch[:, :, :-2])


def test_shifts_stay_within_the_image() -> None:
    with pytest.raises(UserError, match=r"shifts.pixels: found 12, allowed: less than 12"):
        made(images(), "shifts", pixels=12)
    with pytest.raises(UserError, match=r"shifts.fraction: found 0.99, allowed: less than 12"):
        made(images(), "shifts", fraction=0.99)
    up, _, left, _ = made(images((1, 40, 10, 1)), "shifts", fraction=0.01)
    np.testing.assert_array_equal(up[:, :-1], images((1, 40, 10, 1))[:, 1:])
    np.testing.assert_array_equal(left[:, :, :-1], images((1, 40, 10, 1))[:, :, 1:])


def test_crops_are_opencvs_bilinear_enlargement() -> None:
    batch = images((2, 16, 16, 3))
    found = made(batch, "five_crop", fraction=0.5)
    windows = [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]
    for view, (top, left) in zip(found, windows, strict=True):
        expected = cv2.resize(batch[0, top : top + 8, left : left + 8], (16, 16), interpolation=cv2.INTER_LINEAR)
        # A crop of the larger image sees its neighbours at the window's edge, which an isolated crop cannot.
        np.testing.assert_allclose(view[0, 1:-1, 1:-1].astype(int), expected[1:-1, 1:-1].astype(int), atol=1)


def test_crops_of_any_fraction() -> None:
    batch = images((2, 11, 14, 3))
    found = made(batch, "five_crop", fraction=0.8)
    corners = [(0.0, 0.0), (0.0, 0.2), (0.2, 0.0), (0.2, 0.2), (0.1, 0.1)]
    for view, (top, left) in zip(found, corners, strict=True):
        rows = top * 11 + (np.arange(11)[:, None] + 0.5) * 0.8 - 0.5
        columns = left * 14 + (np.arange(14)[None, :] + 0.5) * 0.8 - 0.5
        assert_rounded(view[1], sampled(batch[1], rows, columns))


def test_crops_as_small_as_they_are() -> None:
    batch = images((2, 8, 12, 3))
    found = made(batch, "five_crop", fraction=0.75, resize=False)
    for view, (top, left) in zip(found, [(0, 0), (0, 3), (2, 0), (2, 3), (1, 1)], strict=True):
        np.testing.assert_array_equal(view, batch[:, top : top + 6, left : left + 9])
    assert passes(parse_views([{"five_crop": {"fraction": 0.75, "resize": False}}]), 8, 12) == [5 * 0.75**2]


@pytest.mark.parametrize("resize", [True, False])
def test_ten_crops_are_five_and_their_mirror_images(resize: bool) -> None:
    batch = images((2, 8, 12, 3))
    five, ten = (made(batch, name, fraction=0.7, resize=resize) for name in ("five_crop", "ten_crop"))
    for index, view in enumerate(five):
        np.testing.assert_array_equal(ten[index], view)
        np.testing.assert_array_equal(ten[5 + index], view[:, :, ::-1])


def test_scales_zoom_about_the_centre() -> None:
    batch = images((2, 16, 16, 1))
    small, same, large = made(batch, "scales", factors=[0.5, 1.0, 2.0])
    np.testing.assert_array_equal(same, batch)
    expected = cv2.resize(batch[0, 4:12, 4:12, 0], (16, 16), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(large[0, 1:-1, 1:-1, 0].astype(int), expected[1:-1, 1:-1].astype(int), atol=1)
    # Halved, the image fills the middle 8 x 8 pixels, its edge repeated around it.
    mean = batch[0, :, :, 0].reshape(8, 2, 8, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(small[0, 4:12, 4:12, 0], mean, atol=0.51)
    assert (small[0, 0] == small[0, 3]).all()


def test_rotations_turn_counter_clockwise_about_the_centre() -> None:
    batch = images((2, 11, 11, 3))
    back, same, quarter, half = made(batch, "rotations", degrees=[-90.0, 0.0, 90.0, 180.0])
    np.testing.assert_array_equal(same, batch)
    for turns, view in ((-1, back), (1, quarter), (2, half)):
        np.testing.assert_array_equal(view, np.rot90(batch, turns, axes=(1, 2)))
    batch = images((2, 9, 14, 3))
    for angle, view in zip((-17.0, 30.0), made(batch, "rotations", degrees=[-17.0, 30.0]), strict=True):
        # OpenCV's matrix takes (column, row) of the turned image's source to it.
        turn = cv2.invertAffineTransform(cv2.getRotationMatrix2D((6.5, 4.0), angle, 1.0))
        columns, rows = np.meshgrid(np.arange(14), np.arange(9))
        source = turn @ np.stack([columns.ravel(), rows.ravel(), np.ones(columns.size)])
        exact = sampled(batch[1], source[1].reshape(9, 14), source[0].reshape(9, 14))
        assert_rounded(view[1], exact)


def test_dense_views_are_the_whole_image_enlarged() -> None:
    batch = images((2, 10, 13, 3))
    a_half, double = made(batch, "dense", factors=[1.5, 2.0])
    assert a_half.shape == (2, 15, 20, 3) and double.shape == (2, 20, 26, 3)
    for view in (a_half, double):
        height, width = view.shape[1:3]
        expected = cv2.resize(batch[1], (width, height), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_allclose(view[1].astype(int), expected.astype(int), atol=1)
    assert passes(parse_views([{"dense": {"factors": [2.0]}}, "hflip"]), 10, 13) == [4.0, 1.0]


# ---- policies ---------------------------------------------------------------------------------------------------------


def test_draws_of_a_policy_belong_to_the_pixels() -> None:
    policy = ["HorizontalFlip", {"RandomBrightnessContrast": {"p": 1.0}}]
    batch = images((4, 8, 8, 3))
    batch[3] = batch[0]
    found = made(batch, "augment", policy=policy, n=5, seed=3)
    np.testing.assert_array_equal(found[1][0], found[1][3])
    assert not np.array_equal(found[0], found[1])
    fewer = made(batch, "augment", policy=policy, n=2, seed=3)
    for index in range(2):
        np.testing.assert_array_equal(fewer[index], found[index])
    assert not np.array_equal(made(batch, "augment", policy=policy, n=1, seed=4)[0], found[0])


def test_draws_of_a_policy_are_albumentations_own_under_the_seeding_rule() -> None:
    batch = images((2, 8, 8, 3))
    compose = A.Compose([A.RandomBrightnessContrast(p=1.0)])
    for number, view in enumerate(
        made(batch, "augment", policy=[{"RandomBrightnessContrast": {"p": 1.0}}], n=3, seed=7)
    ):
        for index, image in enumerate(batch):
            key = ("tta", hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest(), number)
            draws = random.Random(seeding.seed_for(7, "augment", "python", *key))
            compose.set_random_state(seeding.generator(7, "augment", *key), draws)
            np.testing.assert_array_equal(view[index], compose.transforms[0](image=image)["image"])


def test_threads_do_not_share_draws(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    batch = images((8, 8, 8, 3))
    policy = [{"RandomBrightnessContrast": {"p": 1.0}}]
    expected = made(batch, "augment", policy=policy, n=4)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: made(batch, "augment", policy=policy, n=4), range(8)):
            np.testing.assert_array_equal(found, expected)


def test_nothing_is_left_open_in_a_resolved_policy() -> None:
    parsed = parse_views(["hflip", "augment", {"augment": {"policy": "strong", "n": 2, "seed": 9}}])
    assert parsed[1] == ("augment", {"policy": "light", "n": 4})
    _, light, grey = resolve(parsed, channels=1, seed=5)
    assert light == ("augment", {"policy": [{"RandomPadCrop": {"padding": 0.125}}], "n": 4, "seed": 5})
    assert grey[1]["seed"] == 9 and not any("HueSaturationValue" in entry for entry in grey[1]["policy"])
    assert parse_views(entries_of([light, grey])) == [light, grey]
    assert any("HueSaturationValue" in entry for entry in resolve(parsed, channels=3, seed=5)[2][1]["policy"])


# ---- params.yaml ------------------------------------------------------------------------------------------------------


def test_entries_of_params_become_views_and_back() -> None:
    views = parse_views(
        ["identity", {"shifts": {"pixels": 2}}, {"shifts": None}, {"shifts": {"fraction": 0.1}}, "scales"]
    )
    assert views == [
        ("identity", {}),
        ("shifts", {"pixels": 2}),
        ("shifts", {"pixels": 1}),
        ("shifts", {"fraction": 0.1}),
        ("scales", {"factors": [0.9, 1.1]}),
    ]
    assert entries_of(views)[:2] == ["identity", {"shifts": {"pixels": 2}}]
    assert parse_views(entries_of(views)) == views
    assert [name for name, _ in make_views(torch.from_numpy(images()), views)] == [name for name, _ in views]
    assert num_images(views, 12, 12) == [1, 4, 4, 4, 2]
    labels = ["identity", "shifts pixels=2", "shifts", "shifts fraction=0.1", "scales"]
    assert [label_of(view) for view in views] == labels
    policy = {"policy": [{"OneOf": {"transforms": ["VerticalFlip", {"Rotate": {"limit": 5}}]}}], "n": 2}
    assert label_of(parse_views([{"augment": policy}])[0]) == "augment policy=Rotate+VerticalFlip n=2"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("hflop", "found 'hflop', allowed: identity, .*; did you mean 'hflip'"),
        ({"shifts": {"pixel": 2}}, "shifts.pixel: unknown argument, allowed: pixels, fraction; did you mean 'pixels'"),
        ({"hflip": {"p": 1}}, "hflip.p: unknown argument, it takes none"),
        ({"shifts": {"pixels": 1.5}}, r"shifts.pixels: found 1.5, allowed: a whole number >= 1 and <= 64"),
        ({"shifts": {"pixels": 0}}, "shifts.pixels: found 0, allowed: a whole number >= 1"),
        ({"shifts": {"pixels": True}}, "shifts.pixels: found True"),
        ({"shifts": {"pixels": 1, "fraction": 0.1}}, "shifts: found pixels and fraction, allowed: one of them"),
        ({"five_crop": {"fraction": 1.0}}, "five_crop.fraction: found 1.0, allowed: a number > 0 and < 1"),
        ({"ten_crop": {"resize": 0}}, "ten_crop.resize: found 0, allowed: true | false"),
        ({"scales": {"factors": []}}, "scales.factors: found .*, allowed: a list of at least 1 of a number >= 0.5"),
        ({"scales": {"factors": [9.0]}}, "scales.factors: found"),
        ({"rotations": {"degrees": [200.0]}}, "rotations.degrees: found .*, allowed: .* >= -180 and <= 180"),
        (
            {"dense": {"factors": [1.0]}},
            "dense.factors: found .*, allowed: a list of at least 1 of a number > 1 and <= 4",
        ),
        ({"augment": {"policy": "lite"}}, "augment.policy: found 'lite', allowed: none | light"),
        ({"augment": {"policy": ["HorizontalFlop"]}}, "augment.policy.0..HorizontalFlop: no such transform"),
        ({"augment": {"policy": 3}}, "augment.policy: found 3, allowed: none | light .* a list of transforms"),
        ({"augment": {"n": 0}}, "augment.n: found 0, allowed: a whole number >= 1"),
        ({"scales": [1.0]}, "scales: found .*, allowed: a mapping"),
        ({"hflip": {}, "vflip": {}}, "allowed: a view's name, or one name"),
    ],
)
def test_a_wrong_entry_is_named(entry: object, message: str) -> None:
    with pytest.raises(UserError, match=r"^evaluate.tta.views\[1\].*" + message):
        parse_views(["identity", entry])  # type: ignore[list-item]


def test_a_view_stands_once() -> None:
    with pytest.raises(UserError, match=r"evaluate.tta.views\[1\]: found shifts twice"):
        parse_views(["shifts", {"shifts": {"pixels": 1}}])


def test_views_that_training_never_showed_are_warned_about() -> None:
    views = parse_views(["identity", "hflip", "shifts"])
    assert uncovered(views, {"a": ["HorizontalFlip", "RandomPadCrop"]}) == []
    (warning,) = uncovered(views, {"a": ["RandomPadCrop"], "b": ["Affine"]})
    assert "hflip: no member" in warning and "HorizontalFlip" in warning
    (warning,) = uncovered(views, {"a": ["D4", "Affine"], "b": ["Affine"]})
    assert "hflip: not every member (not b)" in warning
    assert uncovered(parse_views(["identity"]), {"a": []}) == []
    (warning,) = uncovered(parse_views(["ten_crop"]), {"a": ["Affine"], "b": ["Affine", "HorizontalFlip"]})
    assert "ten_crop: not every member (not a)" in warning and "train with Affine + HorizontalFlip or" in warning
    policies = parse_views(["augment", {"augment": {"policy": "standard"}}])
    (warning,) = uncovered(policies, {"a": ["RandomPadCrop"]})
    assert "augment policy=standard: no member" in warning and "HorizontalFlip + RandomPadCrop" in warning


def test_covering_transforms_exist() -> None:
    assert set(COVERED_BY) == set(VIEWS) - {"identity", "augment"}
    for choices in COVERED_BY.values():
        for name in set().union(*choices):
            assert hasattr(A, name) or hasattr(transforms, name), name


def test_the_page_has_a_row_for_every_choice() -> None:
    text = (Path(__file__).parents[1] / "docs/tta.md").read_text(encoding="utf-8")
    for name in [*VIEWS, *AVERAGE]:
        assert f"\n| `{name}` |" in text, name


# ---- predictions ------------------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """Counts its calls; logits are a fixed linear map of the pixels."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(12 * 12 * 3, 4, generator=random) / 2000)
        self.calls = 0

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return batch.flatten(1).float() @ self.weight


@pytest.mark.parametrize("average", AVERAGE)
def test_each_image_of_each_view_is_predicted_once_and_counts_once(average: str) -> None:
    batch = images()
    batch.flags.writeable = False
    networks = [Linear(0), Linear(1)]
    views = parse_views(["hflip", "identity", {"shifts": {"pixels": 1}}])
    averaged = predict(networks, batch, views, average)
    assert [network.calls for network in networks] == [6, 6]
    assert averaged.shape == (2, 3, 4) and averaged.dtype == np.float64
    by_view = predict_views(networks, batch, views, average)
    by_image = predict_images(networks, batch, views)
    assert by_view.shape == (2, 3, 3, 4) and [found.shape[1] for found in by_image] == [1, 1, 4]
    for index, network in enumerate(networks):
        made = [image for _, of_view in make_views(torch.from_numpy(batch.copy()), views) for image in of_view]
        logits = [network(image).detach().numpy().astype(np.float64) for image in made]
        np.testing.assert_allclose(by_view[index, 1], log_softmax(logits[1]), atol=1e-6)
        flat = np.concatenate([found[index] for found in by_image])
        np.testing.assert_allclose(flat, [log_softmax(values) for values in logits], atol=1e-6)
        if average == "probability":
            expected = np.log(np.exp(log_softmax(np.stack(logits))).mean(axis=0))
        elif average == "logit":
            expected = log_softmax(np.mean(logits, axis=0))
        else:
            product = np.exp(log_softmax(np.stack(logits))).prod(axis=0) ** (1 / 6)
            expected = np.log(product / product.sum(axis=1, keepdims=True))
        np.testing.assert_allclose(averaged[index], expected, atol=1e-6)


def test_the_mean_of_logits_is_the_geometric_mean() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5, 7, 4))
    for weights in ([1] * 5, [1, 4, 1, 2, 10]):
        shares = np.array(weights)[:, None, None] / sum(weights)
        mean = log_softmax((logits * shares).sum(axis=0))
        for average in ("logit", "log_probability"):
            np.testing.assert_allclose(average_views(log_softmax(logits), weights, average), mean, atol=1e-12)
        arithmetic = np.log((np.exp(log_softmax(logits)) * shares).sum(axis=0))
        np.testing.assert_allclose(average_views(log_softmax(logits), weights, "probability"), arithmetic, atol=1e-12)


def classifier(name: str = "convnet", kind: str = "standardize", **arguments: Any) -> torch.nn.Module:
    """Return a small network for images of 16 x 16 x 3, in evaluation mode."""
    small = {
        "convnet": {"widths": [8, 8], "depth": 1},
        "airbench": {"widths": [8, 8]},
        "mlp": {"hidden": [8]},
        "wide_resnet": {"depth": 10, "width": 1},
        "convnext": {"widths": [8], "depths": [1], "stem": 2},
    }
    architecture = {"name": name, "arguments": arguments or small.get(name, {"widths": [8, 8], "depths": [1, 1]})}
    shape = (3,) if kind == "standardize" else (16, 16, 3)
    statistics = {"mean": np.linspace(0.3, 0.5, int(np.prod(shape))).reshape(shape), "std": np.full(shape, 0.2)}
    normalization = {"kind": kind, "height": 16, "width": 16, "channels": 3}
    torch.manual_seed(0)
    architecture |= {"num_classes": 4, "in_channels": 3, "height": 16, "width": 16}
    built = build_classifier(architecture, normalization, statistics)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built.eval()


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"mlp"}))
def test_fully_convolutional_networks_take_images_of_any_size(name: str) -> None:
    network = classifier(name)
    sizes = parse_views(["identity", "dense", {"five_crop": {"fraction": 0.75, "resize": False}}])
    check_sizes(sizes, {"a": network}, (16, 16, 3))
    batch = images((5, 16, 16, 3))
    _, larger, crops = predict_images([network], batch, sizes)
    # Another way to the same: normalised by hand, then the network itself.
    for found, view in ((larger[0, 0], made(batch, "dense")[0]), (crops[0, 4], batch[:, 2:14, 2:14])):
        normalised = (view / 255.0 - np.linspace(0.3, 0.5, 3)) / 0.2
        logits = network.network(torch.from_numpy(normalised).float().permute(0, 3, 1, 2))  # type: ignore[operator]
        np.testing.assert_allclose(found, log_softmax(logits.detach().numpy()), atol=1e-4)


def test_other_sizes_are_refused_with_the_reason() -> None:
    same, other = parse_views(["rotations", "ten_crop"]), parse_views(["identity", {"dense": {"factors": [1.5]}}])
    for network, reason in (
        (classifier("mlp"), "mat1 and mat2 shapes"),
        (classifier(kind="standardize_pixel"), "preprocess.normalize standardize_pixel has statistics for each pixel"),
    ):
        check_sizes(same, {"a": network}, (16, 16, 3))
        pattern = rf"dense factors=\[1.5\]: member b cannot take images of 24 x 24, only of 16 x 16 \(.*{reason}"
        with pytest.raises(UserError, match=pattern):
            check_sizes(other, {"a": classifier(), "b": network}, (16, 16, 3))
    flattens = classifier()
    flattens.network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 16, 8), torch.nn.Flatten())
    with pytest.raises(UserError, match=r"it makes \(1, 16\) of it, not \(1, 4\)"):
        check_sizes(other, {"a": flattens}, (16, 16, 3))


def test_conflicts_are_found_without_networks() -> None:
    entries: list[Any] = ["hflip", "dense", {"five_crop": {"resize": False}}, "rotations", "augment"]
    assert conflicts(entries, model="resnet", normalize="standardize", size=8) == []
    first, second = conflicts(entries, model="mlp", normalize="standardize", size=8)
    assert first == (
        "model.name: found mlp, which has a weight for each pixel, allowed with evaluate.tta.views dense: "
        "a fully convolutional network"
    )
    assert "five_crop resize=False" in second
    found = conflicts(["dense", {"shifts": {"pixels": 8}}], model="convnet", normalize="zca", size=8)
    assert "preprocess.normalize: found zca" in found[0] and found[1].startswith(
        "evaluate.tta.views: shifts.pixels: found 8"
    )
    grid: list[Any] = ["hflip", ["dense", {"shifts": {"pixels": 8}}]]
    found = conflicts(["identity"], grid=grid, model="mlp", normalize="standardize", size=8)
    assert "evaluate.grid dense: a fully" in found[0] and found[1].startswith("evaluate.grid: shifts.pixels: found 8")
    assert len(conflicts(["dense"], grid=[["dense"]], model="mlp", normalize="standardize", size=8)) == 1


def test_a_policy_that_cannot_work_on_the_images_is_refused() -> None:
    views = parse_views([{"augment": {"policy": [{"RandomCrop": {"height": 20, "width": 20}}]}}])
    with pytest.raises(UserError, match=r"^evaluate.tta.views: augment.policy\[0\].RandomCrop: fails on images"):
        check_sizes(views, {}, (16, 16, 3))


def test_the_batch_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    network = classifier()
    every = resolve(parse_views([*VIEWS]), channels=3, seed=0)
    batch = images((5, 16, 16, 3))
    whole = predict([network], batch, every, "probability")
    order = [3, 0, 4, 2, 1]
    parts = [predict([network], batch[order[i : i + 2]], every, "probability") for i in (0, 2, 4)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole[:, order], atol=1e-6)
    monkeypatch.setattr(views, "batch_size", lambda *_: 2)
    np.testing.assert_allclose(predict([network], batch, every, "probability"), whole, atol=1e-6)
