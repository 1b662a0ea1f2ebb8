"""Planted label noise is found, by image and by share; clean labels raise no alarm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from anneal import label_errors
from anneal.label_errors import EXPORTED, examine, examine_train, last_features, neighbours_say, verdict
from anneal.metrics import Floats, Integers
from anneal.models.build import NETWORKS, build_classifier
from anneal.params import read_yaml
from anneal.store import Sample, SplitWriter, Store, finish, open_store

BLOCKS = read_yaml(Path(__file__).resolve().parents[1] / "params.yaml")["model"]


def noisy(labels: Integers, share: float, num_classes: int = 10) -> Integers:
    random = np.random.default_rng(0)
    wrong = random.choice(len(labels), round(share * len(labels)), replace=False)
    changed = labels.copy()
    changed[wrong] = (labels[wrong] + random.integers(1, num_classes, len(wrong))) % num_classes
    return changed


def digits(root: Path, share: float) -> tuple[Store, Integers]:
    """Write a store of digits with this share of wrong labels in every split; return it and the true labels of train."""
    data = load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    parts = {"train": order[:1200], "val": order[1200:1440], "test": order[1440:]}
    labels = {name: data.target[chosen].astype(np.int64) for name, chosen in parts.items()}
    for name, chosen in parts.items():
        writer = SplitWriter(root / name, 8, 8, 1)
        for index, label in zip(chosen, noisy(labels[name], share), strict=True):
            writer.add(images[index], Sample(f"{index}.png", "0" * 64, int(label), 8, 8))
        writer.close()
    counts = {name: len(chosen) for name, chosen in parts.items()}
    classes = [str(k) for k in range(10)]
    finish(root, classes=classes, shape=(8, 8, 1), counts=counts, normalize="none", statistics={})
    return open_store(root), labels["train"]


class Network(nn.Module):
    """Two layers on pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 128), nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(images.flatten(1).float() / 255).relu())


class Pixels(nn.Module):
    """Images as rows of numbers."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float()


def trained(store: Store, steps: int) -> nn.Module:
    torch.manual_seed(0)
    split, network = store.split("train"), Network()
    images, labels = torch.from_numpy(split.take(np.arange(len(split)))), torch.from_numpy(split.labels)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Integers]:
    return digits(tmp_path_factory.mktemp("noisy") / "store", 0.05)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Integers]:
    return digits(tmp_path_factory.mktemp("clean") / "store", 0.0)


# 60 steps leave the wrong labels unlearnt, 400 learn nearly all of them by heart.
@pytest.mark.parametrize(("steps", "least", "most"), [(60, 0.9, 0.97), (400, 0.985, 1.0)])
def test_noise_in_train_is_found_even_where_the_network_has_learnt_it(
    planted: tuple[Store, Integers], steps: int, least: float, most: float
) -> None:
    store, truth = planted
    network = trained(store, steps)
    labels = store.split("train").labels
    with torch.no_grad():
        images = torch.from_numpy(store.split("train").take(np.arange(len(labels))))
        assert least <= (network(images).argmax(dim=1).numpy() == labels).mean() <= most
    found, indices = examine_train(store, [network], most=10**6, seed=0)
    assert found is not None and found.images == len(indices) == len(labels)
    wrong = labels != truth
    hits = wrong[found.suspects].sum()
    assert hits >= 0.9 * wrong.sum() and hits >= 0.85 * len(found.suspects)
    assert (found.suggested == truth[found.suspects]).mean() > 0.8
    assert found.low < 0.05 < found.high and found.shown
    assert "of the train labels look wrong" in verdict({"train": found})


def test_clean_labels_raise_no_alarm(clean: tuple[Store, Integers]) -> None:
    store, _ = clean
    for steps in (60, 400):
        found, _ = examine_train(store, [trained(store, steps)], most=10**6, seed=0)
        assert found is not None and not found.shown and found.share < 0.01 and len(found.suspects) < 10
        assert verdict({"train": found}) == "no label errors shown"


def test_features_of_the_members_judge_where_pixels_cannot(
    planted: tuple[Store, Integers], clean: tuple[Store, Integers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_errors, "AS_GOOD", -1.0)
    store, truth = planted
    found, _ = examine_train(store, [trained(store, 60), trained(store, 60)], most=10**6, seed=0)
    assert found is not None and found.shown and found.method == "neighbours by the members' features"
    wrong = store.split("train").labels != truth
    assert wrong[found.suspects].mean() > 0.85 and wrong[found.suspects].sum() > 0.7 * wrong.sum()
    found, _ = examine_train(clean[0], [trained(clean[0], 60)], most=10**6, seed=0)
    assert found is not None and not found.shown


def test_a_limit_bounds_the_images_and_the_result_repeats(planted: tuple[Store, Integers]) -> None:
    store, _ = planted
    network = trained(store, 60)
    once, indices = examine_train(store, [network], most=700, seed=1)
    again, _ = examine_train(store, [network], most=700, seed=1)
    assert once is not None and again is not None
    assert once.images == len(set(indices)) == 700
    assert once.share == again.share and once.self_confidence.tobytes() == again.self_confidence.tobytes()
    np.testing.assert_array_equal(once.suspects, again.suspects)
    assert once.shown


# ---- held-out splits ----------------------------------------------------------------------------------------------------


def predictions(count: int, accuracy: float) -> tuple[Floats, Integers]:
    """Return calibrated probabilities of a predictor that is sure of some images and less so of others, and labels."""
    random = np.random.default_rng(3)
    confidence = np.clip(1 - random.exponential(1 - accuracy, count), 0.2, 0.9999)
    probabilities = np.tile((1 - confidence)[:, None] / 9, (1, 10))
    guesses = random.integers(0, 10, count)
    probabilities[np.arange(count), guesses] = confidence
    right = random.random(count) < confidence
    return probabilities, np.where(right, guesses, (guesses + random.integers(1, 10, count)) % 10)


@pytest.mark.parametrize("accuracy", [0.99, 0.93, 0.85, 0.75])
def test_hard_images_are_not_taken_for_wrong_labels(accuracy: float) -> None:
    probabilities, labels = predictions(4000, accuracy)
    found = examine(probabilities, labels, EXPORTED)
    assert found is not None and not found.shown
    changed = noisy(labels, 0.05)
    found = examine(probabilities, changed, EXPORTED)
    assert found is not None and found.shown and found.low < 0.05 < found.high + 0.03


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_classes_that_overlap_are_not_taken_for_wrong_labels(share: float, tmp_path: Path) -> None:
    """Of two classes ten neighbours often agree where the classes still mix; a hundred do not."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 3000)
    places = random.normal(size=(3000, 4)) * 20 + np.array([[108.0], [132.0]])[labels]
    labels = noisy(labels, share, 2)
    for name, rows in {"train": slice(0, 2600), "val": slice(2600, 3000)}.items():
        writer = SplitWriter(tmp_path / name, 2, 2, 1)
        for place, label in zip(places[rows], labels[rows], strict=True):
            image = np.clip(np.round(place), 0, 255).astype(np.uint8).reshape(2, 2, 1)
            writer.add(image, Sample("x.png", "0" * 64, int(label), 2, 2))
        writer.close()
    counts = {"train": 2600, "val": 400}
    finish(tmp_path, classes=["a", "b"], shape=(2, 2, 1), counts=counts, normalize="none", statistics={})
    network = nn.Sequential(Pixels(), nn.Linear(4, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]))
        network[1].bias.copy_(torch.tensor([480.0, -480.0]))
    found, _ = examine_train(open_store(tmp_path), [network], most=10**6, seed=0)
    assert found is not None and found.shown == bool(share)
    assert not share or found.low < 1.5 * share < found.high


def test_a_predictor_that_errs_too_often_does_not_judge() -> None:
    probabilities, labels = predictions(2000, 0.2)
    assert examine(probabilities, labels, EXPORTED) is None
    # Three of ten wrong is little among ten classes, and near guessing among two.
    guesses, labels = np.arange(300) % 2, (np.arange(300) % 2) ^ (np.arange(300) % 10 < 3)
    assert examine(np.eye(2)[guesses] * 0.8 + 0.1, labels, EXPORTED) is None
    assert examine(np.eye(10)[guesses] * 0.8 + 0.02, labels, EXPORTED) is not None
    assert verdict({"test": None}) == "no label errors shown (too many mistakes to judge the labels of test)"


@pytest.mark.parametrize("count", [6, 12, 30])
def test_one_confident_mistake_of_a_small_split_is_no_label_noise(count: int) -> None:
    probabilities, labels = np.tile([0.995, 0.005], (count, 1)), np.zeros(count, np.int64)
    probabilities[0], labels[0] = [0.9999, 0.0001], 1
    found = examine(probabilities, labels, EXPORTED)
    assert found is not None and found.contradicted == 1 and not found.shown
    assert found.suspects.tolist() == [0]
    assert verdict({"val": found}) == "no label errors shown"


def test_a_single_training_image_has_no_neighbours_to_judge_it(clean: tuple[Store, Integers]) -> None:
    found, indices = examine_train(clean[0], [trained(clean[0], 1)], most=1, seed=0)
    assert found is None and len(indices) == 1


def test_one_class_and_few_images() -> None:
    alone = examine(np.array([[0.9, 0.1]] * 3), np.zeros(3, np.int64), EXPORTED)
    assert alone is not None and not alone.shown and not len(alone.suspects)
    single = examine(np.array([[0.9, 0.1]]), np.zeros(1, np.int64), EXPORTED)
    assert single is not None and not single.shown


# ---- parts --------------------------------------------------------------------------------------------------------------


def test_neighbours_leave_the_image_itself_out() -> None:
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(200, 5)), random.integers(0, 3, 200)
    said = neighbours_say(features, labels, 3, count=1)
    distances = np.linalg.norm(features[:, None] - features, axis=2)
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_array_equal(said.argmax(axis=1), labels[distances.argmin(axis=1)])
    asked = neighbours_say(features, labels, 3, count=1, queries=features)
    np.testing.assert_array_equal(asked.argmax(axis=1), labels)


class Functional(nn.Module):
    """A network whose last layer with weights does not make the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 20)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1).float())[:, :10]


@pytest.mark.parametrize("name", [*NETWORKS, "functional"])
def test_last_features_of_every_architecture(name: str, clean: tuple[Store, Integers]) -> None:
    split = clean[0].split("val")
    indices = np.array([3, 0, 7])
    network: nn.Module = Functional()
    if name != "functional":
        geometry = {"height": 8, "width": 8}
        architecture = {"name": name, "arguments": BLOCKS[name], "num_classes": 10, "in_channels": 1, **geometry}
        network = build_classifier(architecture, {"kind": "none", "channels": 1, **geometry}, {}).eval()
    features, probabilities = last_features([network, network], split, indices, 10)
    with torch.no_grad():
        expected = network(torch.from_numpy(split.take(indices))).softmax(dim=1).numpy()
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert features.dtype == np.float32 and len(features) == 3 and np.isfinite(features).all()
    half = features.shape[1] // 2
    np.testing.assert_array_equal(features[:, :half], features[:, half:])
    assert half == 10 if name == "functional" else half > 10
