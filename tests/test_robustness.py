"""Corruptions grow with their severity, belong to (seed, corruption, index), and the table says what they cost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.datasets import load_digits

from anneal.metrics import Floats
from anneal.robustness import CORRUPTIONS, SEVERITIES, RobustnessConfig, corrupt, drawn, robustness_table
from anneal.store import Images


def pictures(side: int, channels: int, count: int = 6) -> Images:
    """Smooth gradients with a sharp edge, mid grey on the whole, so that every corruption has something to change."""
    rows, columns = np.mgrid[0:side, 0:side] / side
    random = np.random.default_rng(0)
    out = np.empty((count, side, side, channels))
    for image in out:
        for channel in range(channels):
            a, b, c = random.uniform(0.3, 1.0, 3)
            image[..., channel] = 60 + 60 * a * rows + 40 * b * columns + 60 * c * (rows + columns > 1)
    return out.astype(np.uint8)


def corrupted(images: Images, name: str, severity: int, **changes: Any) -> Images:
    arguments: dict[str, Any] = {"seed": 0, "indices": range(len(images)), **changes}
    return corrupt(images, name, severity, **arguments)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("side", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3), (128, 1)])
def test_a_corruption_grows_with_its_severity(name: str, side: int, channels: int) -> None:
    images = pictures(side, channels)
    before = images.copy()
    far = []
    for severity in SEVERITIES:
        made = corrupted(images, name, severity)
        assert made.shape == images.shape and made.dtype == np.uint8
        far.append(np.abs(made.astype(float) - images).mean())
    np.testing.assert_array_equal(images, before)
    assert far[0] > 0 and far[-1] > 1.1 * far[0]
    assert all(b >= 0.95 * a for a, b in pairwise(far)), far


def test_strengths_are_those_of_the_paper() -> None:
    images = np.full((4, 128, 128, 3), 120, np.uint8)
    assert corrupted(images, "noise", 1).std() == pytest.approx(0.08 * 255, rel=0.02)
    np.testing.assert_allclose(corrupted(images, "brightness", 3).astype(float), 120 + 0.3 * 255, atol=1)
    halves = images.copy()
    halves[:, 64:] = 60  # mean 90
    np.testing.assert_allclose(corrupted(halves, "contrast", 1)[:, ::64, 0, 0].astype(float), [[102, 78]] * 4, atol=1)
    small = halves[:, ::4, ::4]
    np.testing.assert_allclose(corrupted(small, "contrast", 1)[:, ::16, 0, 0].astype(float), [[112, 67]] * 4, atol=1)


def test_draws_belong_to_seed_corruption_and_index() -> None:
    images = pictures(28, 1)
    whole = corrupted(images, "noise", 2)
    np.testing.assert_array_equal(corrupted(images, "noise", 2), whole)
    some = [4, 1]
    np.testing.assert_array_equal(corrupted(images[some], "noise", 2, indices=some), whole[some])
    same = np.repeat(images[:1], 6, axis=0)
    noise = corrupted(same, "noise", 2)
    assert len({image.tobytes() for image in noise}) == 6
    assert (corrupted(images, "noise", 2, seed=1) != whole).any()
    # The same draws at every severity: the stronger noise is the weaker one, scaled.
    grey = np.full((1, 28, 28, 1), 128, np.uint8)
    weak, strong = (corrupted(grey, "noise", severity).astype(float) - 128 for severity in (1, 5))
    assert np.corrcoef(weak.ravel(), strong.ravel())[0, 1] > 0.99


def test_images_are_drawn_by_the_seed() -> None:
    np.testing.assert_array_equal(drawn(5, 10, 0), np.arange(5))
    some = drawn(1000, 50, 0)
    assert len(set(some)) == 50 and (np.diff(some) > 0).all()
    np.testing.assert_array_equal(drawn(1000, 50, 0), some)
    assert (drawn(1000, 50, 1) != some).any()


# ---- the table ----------------------------------------------------------------------------------------------------------


def nearest_mean(images: Images, labels: np.ndarray) -> Any:
    means = np.stack([images[labels == k].reshape(-1, 64).mean(axis=0) for k in range(10)])

    def predict(batch: Images) -> Floats:
        distance = ((batch.reshape(-1, 1, 64).astype(float) - means) ** 2).sum(axis=2) / 1e4
        p = np.exp(-distance)
        return p / p.sum(axis=1, keepdims=True)

    return predict


def test_the_table_of_digits() -> None:
    data = load_digits()
    images, labels = np.round(data.images * 255 / 16).astype(np.uint8)[..., None], data.target.astype(np.int64)
    predict = nearest_mean(images[:1000], labels[:1000])
    arguments: dict[str, Any] = {"corruptions": ["contrast", "jpeg"], "seed": 0, "indices": np.arange(300)}
    rows = robustness_table("test", predict, images[1000:1300], labels[1000:1300], **arguments)
    assert [(r["corruption"], r["severity"]) for r in rows] == [(c, s) for c in ("contrast", "jpeg") for s in range(6)]
    assert list(rows[0]) == [
        *("split", "corruption", "severity", "images", "accuracy", "accuracy_low", "accuracy_high"),
        *("change", "change_low", "change_high", "mcnemar_p", "verdict"),
    ]
    assert {row["verdict"] for row in rows if row["mcnemar_p"] >= 0.05} == {"no difference shown"}
    assert rows[0]["mcnemar_p"] == 1 and rows[5]["verdict"] == "worse"
    clean = (predict(images[1000:1300]).argmax(axis=1) == labels[1000:1300]).mean()
    for row in rows:
        assert row["split"] == "test" and row["images"] == 300
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
        assert row["change"] == pytest.approx(row["accuracy"] - clean)
        assert row["change_low"] <= row["change"] <= row["change_high"]
    strongest = rows[5]
    assert (strongest["corruption"], strongest["severity"]) == ("contrast", 5) and strongest["change_high"] < 0
    assert rows == robustness_table("test", predict, images[1000:1300], labels[1000:1300], **arguments)


def test_settings() -> None:
    RobustnessConfig(corruptions=[], images=10)
    for faulty in ({"corruptions": ["fog"]}, {"corruptions": ["noise", "noise"]}, {"images": 5}):
        with pytest.raises(ValidationError):
            RobustnessConfig(**{"corruptions": ["noise"], "images": 100, **faulty})
