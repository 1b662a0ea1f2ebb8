"""Figures against scikit-learn and by hand; intervals by their coverage."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from anneal import metrics


def made(num_images: int = 1002, num_classes: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes, num_images)
    logits = random.normal(size=(num_images, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    p = np.exp(logits)
    return p / p.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_classes", [2, 7])
def test_figures_are_those_of_scikit_learn(num_classes: int, seed: int) -> None:
    p, labels = made(num_classes=num_classes, seed=seed)
    guess = p.argmax(axis=1)
    found = metrics.figures(p, labels)
    classes = np.arange(num_classes)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, guess), abs=1e-12)
    assert found["macro_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, guess), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, guess, average="macro"), abs=1e-12)
    assert found["nll"] == pytest.approx(sk.log_loss(labels, p, labels=classes), abs=1e-12)
    assert found["brier"] == pytest.approx(((p - np.eye(num_classes)[labels]) ** 2).sum(axis=1).mean(), abs=1e-12)
    if num_classes > 2:
        assert found["top5"] == pytest.approx(sk.top_k_accuracy_score(labels, p, k=5, labels=classes), abs=1e-12)
    else:
        assert found["brier"] == pytest.approx(2 * sk.brier_score_loss(labels, p[:, 1]), abs=1e-12)
        assert found["top5"] == 1.0
    np.testing.assert_array_equal(metrics.confusion(p, labels), sk.confusion_matrix(labels, guess))


def test_reliability_bins_are_those_of_scikit_learn() -> None:
    p, labels = made()
    confidence, hit = p.max(axis=1), p.argmax(axis=1) == labels
    # scikit-learn wants a probability of the positive class: "the prediction is right", said with this confidence.
    accuracy, mean = calibration_curve(hit, confidence, n_bins=15, strategy="quantile")
    table = metrics.reliability(p, labels)
    np.testing.assert_allclose([row["accuracy"] for row in table], accuracy, atol=1e-12)
    np.testing.assert_allclose([row["confidence"] for row in table], mean, atol=1e-12)
    counts = np.array([row["count"] for row in table])
    assert counts.sum() == len(labels) and counts.min() >= len(labels) // 15
    assert metrics.ece(p, labels) == pytest.approx((counts * np.abs(accuracy - mean)).sum() / len(labels), abs=1e-12)


def test_calibration_error_by_hand() -> None:
    p = np.array([[0.8, 0.2]] * 10)
    labels = np.array([0] * 6 + [1] * 4)
    assert metrics.ece(p, labels) == pytest.approx(0.2)
    shuffled = np.random.default_rng(0).permutation(10)
    assert metrics.ece(p, labels[shuffled]) == metrics.ece(p, labels)
    assert metrics.ece(np.array([[1.0, 0.0]]), np.array([0])) == 0.0


@pytest.mark.parametrize("num_classes", [2, 7])
def test_bins_of_equal_width_are_those_of_torchmetrics(num_classes: int) -> None:
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

    p, labels = made(num_images=400, num_classes=num_classes)
    tensor, target = torch.from_numpy(p), torch.from_numpy(labels)
    expected = multiclass_calibration_error(tensor, target, num_classes, n_bins=15)
    assert metrics.ece_equal_width(p, labels) == pytest.approx(float(expected), abs=1e-6)
    by_class = [binary_calibration_error(tensor[:, k], (target == k).long(), n_bins=15) for k in range(num_classes)]
    np.testing.assert_allclose(metrics.classwise_ece(p, labels), by_class, atol=1e-6)
    assert metrics.figures(p, labels)["ece_classwise"] == pytest.approx(np.mean(by_class), abs=1e-6)
    certain = np.eye(num_classes)[labels]
    assert metrics.ece_equal_width(certain, labels) == 0 and metrics.classwise_ece(certain, labels).max() == 0


def test_a_class_that_is_absent_and_yet_predicted_is_miscalibrated() -> None:
    errors = metrics.classwise_ece(np.full((4, 2), 0.5), np.zeros(4, np.int64))
    np.testing.assert_allclose(errors, [0.5, 0.5])


def test_risk_coverage_by_definition() -> None:
    p, labels = made(num_images=301)
    confidence, wrong = p.max(axis=1), p.argmax(axis=1) != labels
    order = np.argsort(-confidence)
    by_hand = [wrong[order[:n]].mean() for n in range(1, 302)]
    np.testing.assert_allclose(metrics.risk_coverage(p, labels), by_hand, atol=1e-12)
    found = metrics.figures(p, labels)
    assert found["aurc"] == pytest.approx(np.mean(by_hand), abs=1e-12) == metrics.aurc(p, labels)
    for coverage, most in ((80, 241), (90, 271), (95, 286)):  # rounded up
        threshold = np.sort(confidence)[-most]
        accuracy = sk.accuracy_score(labels[confidence >= threshold], p.argmax(axis=1)[confidence >= threshold])
        assert found[f"accuracy_at_{coverage}"] == pytest.approx(accuracy, abs=1e-12)
        assert metrics.selective_accuracy(p, labels, coverage / 100) == pytest.approx(accuracy, abs=1e-12)
    assert found["accuracy_at_80"] > found["accuracy"]


def test_risk_coverage_takes_no_order_from_equal_confidences() -> None:
    p = np.tile([0.9, 0.1], (10, 1))
    labels = np.array([0] * 7 + [1] * 3)
    np.testing.assert_allclose(metrics.risk_coverage(p, labels), 0.3)
    np.testing.assert_array_equal(metrics.risk_coverage(p, labels[::-1].copy()), metrics.risk_coverage(p, labels))
    assert metrics.selective_accuracy(p[:1], labels[:1], 0.8) == 1.0


def test_absent_classes_do_not_count() -> None:
    p = np.eye(4)[[0, 0, 1, 3]]
    labels = np.array([0, 0, 1, 1])
    # Recall 1 and 1/2; class 2 is nowhere; class 3 is predicted, never present: F1 0, no recall.
    assert metrics.macro_accuracy(p, labels) == pytest.approx(0.75)
    assert metrics.macro_f1(p, labels) == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_ties_in_the_top_go_by_class_order() -> None:
    p = np.full((2, 10), 0.1)
    assert metrics.top_k(p, np.array([4, 5])) == 0.5
    assert metrics.top_k(p, np.array([0, 1]), k=1) == metrics.accuracy(p, np.array([0, 1])) == 0.5


def test_a_wrong_certainty_has_a_finite_likelihood() -> None:
    value = metrics.nll(np.array([[1.0, 0.0]]), np.array([1]))
    assert value == pytest.approx(-np.log(np.finfo(np.float64).eps))


def test_each_resample_is_the_figure_of_the_drawn_images(monkeypatch: pytest.MonkeyPatch) -> None:
    p, labels = made(num_images=60, num_classes=7)
    other, _ = made(num_images=60, num_classes=7, seed=5)
    monkeypatch.setattr(metrics, "CHUNK", 60 * 7)  # several chunks, the last one short
    found = metrics.bootstrap([p, other], labels, num_resamples=20, seed=3)
    counts = np.concatenate(list(metrics.resamples(60, 20, 3)))
    assert counts.shape == (20, 60) and (counts.sum(axis=1) == 60).all()
    for predictor, values in zip((p, other), found, strict=True):
        for b in range(20):
            rows = np.repeat(np.arange(60), counts[b])
            expected = metrics.figures(predictor[rows], labels[rows])
            for name in metrics.RESAMPLED:
                assert values[name][b] == pytest.approx(expected[name], abs=1e-12), name


def test_the_bootstrap_repeats_and_follows_its_seed() -> None:
    p, labels = made(num_images=100)
    first, again, other = (metrics.bootstrap([p], labels, num_resamples=100, seed=s)[0]["nll"] for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("num_images", "truth"), [(300, 0.8), (359, 0.99), (180, 0.97)])
def test_intervals_of_an_accuracy_cover_the_truth_about_95_times_in_100(num_images: int, truth: float) -> None:
    """Near 1 too, where a bootstrap of few mistakes covers it 9 times in 10."""
    hits = np.arange(num_images + 1)
    ends = [
        metrics.with_intervals({"accuracy": n / num_images}, {"accuracy": np.zeros(1)}, num_images)["accuracy_ci"]
        for n in hits
    ]
    covers = [low <= truth <= high for low, high in ends]
    assert 0.94 < binom.pmf(hits, num_images, truth)[covers].sum() < 0.98
    # One mistake more never raises an end.
    assert all(low < more and high <= most for (low, high), (more, most) in pairwise(ends))


def test_wilson_is_that_of_scipy() -> None:
    for hits, num_images in ((0, 1), (1, 1), (3, 10), (355, 359)):
        expected = binomtest(hits, num_images).proportion_ci(method="wilson")
        assert metrics.wilson(hits / num_images, num_images) == pytest.approx((expected.low, expected.high), abs=1e-5)


def test_intervals_stand_beside_their_figures() -> None:
    p, labels = made(num_images=200)
    values = metrics.figures(p, labels)
    result = metrics.with_intervals(values, metrics.bootstrap([p], labels, num_resamples=200, seed=0)[0], 200)
    assert set(values) <= set(result)
    for name in metrics.RESAMPLED:
        low, high = result[f"{name}_ci"]
        assert low <= result[name] <= high and low < high
    assert "ece_ci" not in result


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_a_split_without_a_mistake_leaves_the_accuracy_open_all_the_same(accuracy: float) -> None:
    p, labels = np.tile([accuracy, 1 - accuracy], (30, 1)), np.zeros(30, np.int64)
    resampled = metrics.bootstrap([p], labels, num_resamples=100, seed=0)[0]
    low, high = metrics.with_intervals({"accuracy": accuracy}, resampled, 30)["accuracy_ci"]
    wilson = binomtest(round(30 * accuracy), 30).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((wilson.low, wilson.high), abs=1e-5) and high - low > 0.1


def test_the_mean_over_members_is_taken_resample_by_resample() -> None:
    items = [{"accuracy": np.array([0.0, 1.0])}, {"accuracy": np.array([1.0, 0.0])}]
    np.testing.assert_array_equal(metrics.mean(items)["accuracy"], [0.5, 0.5])
