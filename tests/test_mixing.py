"""Mixup and cutmix: the formula, soft targets, and draws that belong to the technique and the microbatch."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anneal.mixing import choose, cutmix, mix, mixed_share, mixup
from anneal.seeding import generator

N, K, SIZE = 16, 5, 12


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (N, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets() -> torch.Tensor:
    return F.one_hot(torch.arange(N) % K, K).float()


def key(microbatch: int = 0, epoch: int = 0, seed: int = 0) -> dict[str, int]:
    return {"seed": seed, "epoch": epoch, "microbatch": microbatch}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_mixup_is_the_formula(images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> None:
    x = images.to(dtype)
    mixed, soft = mix(x, targets, mixup_alpha=0.4, cutmix_alpha=0.0, **key(3, 2))
    draw = generator(0, "mixup", 2, 3)
    weight, partner = draw.beta(0.4, 0.4), draw.permutation(N)
    assert mixed.dtype == torch.float32
    expected = weight * images.numpy().astype(float) + (1 - weight) * images.numpy()[partner]
    np.testing.assert_allclose(mixed.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(
        soft.numpy(), weight * targets.numpy() + (1 - weight) * targets.numpy()[partner], atol=1e-6
    )


def test_cutmix_pastes_one_rectangle_and_weighs_by_its_area(images: torch.Tensor, targets: torch.Tensor) -> None:
    areas = []
    for microbatch in range(50):
        mixed, soft = mix(images, targets, mixup_alpha=0.0, cutmix_alpha=1.0, **key(microbatch))
        draw = generator(0, "cutmix", 0, microbatch)
        weight, partner = draw.beta(1.0, 1.0), torch.from_numpy(draw.permutation(N))
        assert mixed.dtype == torch.uint8
        pasted = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        pasted |= (mixed != images).any(dim=(0, 3))
        rows, columns = pasted.any(1).nonzero().flatten(), pasted.any(0).nonzero().flatten()
        area = 0.0
        if len(rows):
            box = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert torch.equal(mixed[box], images[partner][box])
            area = len(rows) * len(columns) / SIZE**2
            assert pasted.sum() == len(rows) * len(columns)
        assert area <= 1 - weight + 1e-9
        torch.testing.assert_close(soft, targets.lerp(targets[partner], area), rtol=0, atol=1e-6)
        areas.append(area)
    assert min(areas) < 0.1 and max(areas) > 0.4


def test_targets_stay_distributions(images: torch.Tensor, targets: torch.Tensor) -> None:
    for microbatch in range(20):
        _, soft = mix(images, targets, mixup_alpha=1.0, cutmix_alpha=1.0, **key(microbatch))
        torch.testing.assert_close(soft.sum(1), torch.ones(N))
        assert (soft >= 0).all()


def test_off_returns_the_inputs(images: torch.Tensor, targets: torch.Tensor) -> None:
    mixed, soft = mix(images, targets, mixup_alpha=0.0, cutmix_alpha=0.0, **key())
    assert mixed is images and soft is targets


def test_inputs_are_left_as_they_were(images: torch.Tensor, targets: torch.Tensor) -> None:
    before = images.clone(), targets.clone()
    for technique in (mixup, cutmix):
        technique(images, targets, alpha=1.0, draw=generator(0, "test"))
        assert torch.equal(images, before[0]) and torch.equal(targets, before[1])


def test_one_draw_a_key(images: torch.Tensor, targets: torch.Tensor) -> None:
    def result(**where: int) -> torch.Tensor:
        return mix(images, targets, mixup_alpha=1.0, cutmix_alpha=0.0, **where)[0]

    assert torch.equal(result(**key(1)), result(**key(1)))
    for other in (key(2), key(1, epoch=1), key(1, seed=1)):
        assert not torch.equal(result(**key(1)), result(**other))


def test_both_take_turns_at_random_and_move_no_draw_of_the_other(images: torch.Tensor, targets: torch.Tensor) -> None:
    chosen = [choose(0.3, 1.0, **key(m)) for m in range(2000)]
    assert 900 < chosen.count("mixup") < 1100
    assert chosen.count("mixup") + chosen.count("cutmix") == 2000
    changes = sum(a != b for a, b in itertools.pairwise(chosen))
    assert 900 < changes < 1100
    for microbatch in range(20):
        both = mix(images, targets, mixup_alpha=0.3, cutmix_alpha=1.0, **key(microbatch))
        alone = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}
        technique = f"{chosen[microbatch]}_alpha"
        alone[technique] = {"mixup_alpha": 0.3, "cutmix_alpha": 1.0}[technique]
        one = mix(images, targets, **alone, **key(microbatch))
        assert torch.equal(both[0], one[0]) and torch.equal(both[1], one[1])


def test_weights_follow_the_beta_law(targets: torch.Tensor) -> None:
    x, alpha = torch.zeros(N, 1, 1, 1), 0.5
    x[0] = 255.0
    weights = []
    for microbatch in range(1500):
        _, soft = mix(x, torch.eye(N), mixup_alpha=alpha, cutmix_alpha=0.0, **key(microbatch))
        if soft[0, 0] < 1.0:
            weights.append(float(soft[0, 0]))
    # Beta(0.5, 0.5) has mean 1/2 and variance 1/8; one of 16 permutations leaves the first image with itself.
    assert abs(np.mean(weights) - 0.5) < 0.03
    assert abs(np.var(weights) - 0.125) < 0.01


# ---- how often ------------------------------------------------------------------------------------------------------

BOTH = {"mixup_alpha": 0.3, "cutmix_alpha": 1.0}


def test_always_and_by_halves_are_the_draws_of_a_fair_coin() -> None:
    """The fair draw is a key of its own: a probability of 1 draws nothing more."""
    for m in range(200):
        fair = "mixup" if generator(0, "mixing", 0, m).random() < 0.5 else "cutmix"
        assert choose(**BOTH, **key(m)) == fair
        assert choose(**BOTH, mixup_probability=1.0, cutmix_probability=1.0, cutmix_share=0.5, **key(m)) == fair


@pytest.mark.parametrize(("share", "mixup_p", "cutmix_p"), [(0.2, 0.5, 1.0), (0.5, 0.25, 0.75), (0.9, 1.0, 0.1)])
def test_shares_and_probabilities_are_met(share: float, mixup_p: float, cutmix_p: float) -> None:
    chances = {"mixup_probability": mixup_p, "cutmix_probability": cutmix_p, "cutmix_share": share}
    chosen = [choose(**BOTH, **chances, **key(m)) for m in range(4000)]
    expected = {"mixup": (1 - share) * mixup_p, "cutmix": share * cutmix_p}
    for technique, chance in expected.items():
        # Four standard deviations of a mean of 4000.
        assert chosen.count(technique) / 4000 == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / 4000))
    found = mixed_share(4000, seed=0, epoch=0, **BOTH, **chances)
    assert found == pytest.approx(1 - chosen.count(None) / 4000)


def test_ends_are_exact() -> None:
    chosen = {share: {choose(**BOTH, cutmix_share=share, **key(m)) for m in range(300)} for share in (0.0, 1.0)}
    assert chosen == {0.0: {"mixup"}, 1.0: {"cutmix"}}
    never = {"mixup_alpha": 0.3, "cutmix_alpha": 0.0, "mixup_probability": 0.0}
    assert {choose(**never, **key(m)) for m in range(300)} == {None}
    # A share says nothing where only one is on.
    assert choose(0.3, 0.0, cutmix_share=1.0, **key()) == "mixup"


def test_a_probability_leaves_the_microbatches_that_are_mixed_as_they_were(
    images: torch.Tensor, targets: torch.Tensor
) -> None:
    unmixed = []
    for m in range(40):
        always = mix(images, targets, **BOTH, **key(m))
        often = mix(images, targets, **BOTH, mixup_probability=0.5, cutmix_probability=0.5, **key(m))
        unmixed.append(often[0] is images)
        if unmixed[-1]:
            assert often[1] is targets
        else:
            assert torch.equal(always[0], often[0]) and torch.equal(always[1], often[1])
    assert 10 < sum(unmixed) < 30
    # The larger the chance, the more are mixed: those of a smaller one among them.
    of = [{m for m in range(200) if choose(0.3, 0.0, mixup_probability=p, **key(m))} for p in (0.3, 0.6)]
    assert of[0] < of[1]
