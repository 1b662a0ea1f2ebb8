"""Test-time augmentation."""

from __future__ import annotations

import albumentations as A
import cv2
import numpy as np
import pytest
import torch

from anneal import transforms
from anneal.ensemble import log_softmax
from anneal.params import UserError
from anneal.views import COVERED_BY, VIEWS, entries_of, make_views, parse_views, predict, uncovered


def images(shape: tuple[int, int, int, int] = (3, 12, 12, 3)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (3, 12, 17, 3), (1, 2, 2, 1)])
def test_every_view_keeps_shape_and_type_and_treats_images_alone(name: str, shape: tuple[int, int, int, int]) -> None:
    batch = images(shape)
    before = batch.copy()
    made = VIEWS[name](batch)
    assert made
    for index, view in enumerate(made):
        assert view.shape == shape and view.dtype == np.uint8
        np.testing.assert_array_equal(view[-1:], VIEWS[name](batch[-1:])[index])
    np.testing.assert_array_equal(batch, before)


@pytest.mark.parametrize("name", VIEWS)
def test_a_flat_image_stays_flat(name: str) -> None:
    for view in VIEWS[name](np.full((1, 9, 9, 3), 200, np.uint8)):
        assert (view == 200).all()


def test_flips() -> None:
    batch = images()
    (mirrored,) = VIEWS["hflip"](batch)
    np.testing.assert_array_equal(mirrored[1], cv2.flip(batch[1], 1))
    (upside_down,) = VIEWS["vflip"](batch)
    np.testing.assert_array_equal(upside_down[1], cv2.flip(batch[1], 0))


def test_shifts_move_by_whole_pixels_and_repeat_the_edge() -> None:
    batch = images()
    up, down, left, right = VIEWS["shifts"](batch, pixels=2)
    np.testing.assert_array_equal(up[:, :-2], batch[:, 2:])
    np.testing.assert_array_equal(up[:, -2:], batch[:, -1:].repeat(2, axis=1))
    np.testing.assert_array_equal(down[:, 2:], batch[:, :-2])
    np.testing.assert_array_equal(left[:, :, :-2], batch[:, :, 2:])
    np.testing.assert_array_equal(right[:, :, 2:], batch[:, :, :-2])
    with pytest.raises(UserError, match=r"shifts.pixels: found 12, allowed: less than 12"):
        VIEWS["shifts"](batch, pixels=12)


def test_crops_are_opencvs_bilinear_enlargement() -> None:
    batch = images((2, 16, 16, 3))
    made = VIEWS["five_crop"](batch, fraction=0.5)
    windows = [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]
    for view, (top, left) in zip(made, windows, strict=True):
        expected = cv2.resize(batch[0, top : top + 8, left : left + 8], (16, 16), interpolation=cv2.INTER_LINEAR)
        # A crop of the larger image sees its neighbours at the window's edge, which an isolated crop cannot.
        np.testing.assert_allclose(view[0, 1:-1, 1:-1].astype(int), expected[1:-1, 1:-1].astype(int), atol=1)


def test_scales_zoom_about_the_centre() -> None:
    batch = images((2, 16, 16, 1))
    small, same, large = VIEWS["scales"](batch, factors=[0.5, 1.0, 2.0])
    np.testing.assert_array_equal(same, batch)
    expected = cv2.resize(batch[0, 4:12, 4:12, 0], (16, 16), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(large[0, 1:-1, 1:-1, 0].astype(int), expected[1:-1, 1:-1].astype(int), atol=1)
    # Halved, the image fills the middle 8 x 8 pixels, its edge repeated around it.
    mean = batch[0, :, :, 0].reshape(8, 2, 8, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(small[0, 4:12, 4:12, 0], mean, atol=0.51)
    assert (small[0, 0] == small[0, 3]).all()


def test_entries_of_params_become_views_and_back() -> None:
    views = parse_views(["identity", {"shifts": {"pixels": 2}}, {"shifts": None}, "scales"])
    assert views == [
        ("identity", {}),
        ("shifts", {"pixels": 2}),
        ("shifts", {"pixels": 1}),
        ("scales", {"factors": [0.9, 1.1]}),
    ]
    assert entries_of(views)[:2] == ["identity", {"shifts": {"pixels": 2}}]
    assert parse_views(entries_of(views)) == views
    assert [name for name, _ in make_views(images(), views)] == ["identity"] + ["shifts"] * 8 + ["scales"] * 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("hflop", "found 'hflop', allowed: identity, .*; did you mean 'hflip'"),
        ({"shifts": {"pixel": 2}}, "shifts.pixel: unknown argument, allowed: pixels; did you mean 'pixels'"),
        ({"hflip": {"p": 1}}, "hflip.p: unknown argument, it takes none"),
        ({"shifts": {"pixels": 1.5}}, r"shifts.pixels: found 1.5, allowed: a whole number >= 1 and <= 64"),
        ({"shifts": {"pixels": 0}}, "shifts.pixels: found 0, allowed: a whole number >= 1"),
        ({"shifts": {"pixels": True}}, "shifts.pixels: found True"),
        ({"five_crop": {"fraction": 1.0}}, "five_crop.fraction: found 1.0, allowed: a number > 0 and < 1"),
        ({"scales": {"factors": []}}, "scales.factors: found .*, allowed: a list of at least 1 of a number >= 0.5"),
        ({"scales": {"factors": [9.0]}}, "scales.factors: found"),
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


def test_covering_transforms_exist() -> None:
    assert set(COVERED_BY) == set(VIEWS) - {"identity"}
    for choices in COVERED_BY.values():
        for name in set().union(*choices):
            assert hasattr(A, name) or hasattr(transforms, name), name


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


@pytest.mark.parametrize("average", ["probability", "logit"])
def test_each_view_is_predicted_once_and_averaged(average: str) -> None:
    batch = images()
    batch.flags.writeable = False
    networks = [Linear(0), Linear(1)]
    views = parse_views(["hflip", "identity", {"shifts": {"pixels": 1}}])
    plain, averaged = predict(networks, batch, views, average)
    assert [network.calls for network in networks] == [6, 6]
    assert plain.shape == averaged.shape == (2, 3, 4) and plain.dtype == np.float64
    for index, network in enumerate(networks):
        logits = [
            network(torch.from_numpy(v.copy())).detach().numpy().astype(np.float64) for _, v in make_views(batch, views)
        ]
        np.testing.assert_allclose(plain[index], log_softmax(logits[1]), atol=1e-6)
        if average == "logit":
            expected = log_softmax(np.mean(logits, axis=0))
        else:
            expected = np.log(np.exp(log_softmax(np.stack(logits))).mean(axis=0))
        np.testing.assert_allclose(averaged[index], expected, atol=1e-6)


def test_plain_predictions_need_no_identity_view() -> None:
    network = Linear(0)
    plain, averaged = predict([network], images(), parse_views(["hflip"]), "probability")
    alone, _ = predict([network], images(), parse_views(["identity"]), "probability")
    np.testing.assert_array_equal(plain, alone)
    assert not np.allclose(plain, averaged)
