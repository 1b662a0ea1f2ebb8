"""Schedules: the exact factor of every step of short runs."""

import pytest

from anneal.params import UserError
from anneal.schedules import CURVES, factor, factor_arguments, length_in_steps, scaled_rate


def run(total: int, **arguments: object) -> list[float]:
    return [round(factor(step, total_steps=total, **arguments), 6) for step in range(total)]


def test_constant_with_warmup() -> None:
    factors = run(6, name="constant", warmup_steps=4, warmup_start=0.2)
    assert factors == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_constant_without_warmup_is_one() -> None:
    assert run(4, name="constant") == [1.0] * 4


def test_step() -> None:
    factors = run(8, name="step", arguments={"every": 2, "gamma": 0.1})
    assert factors == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]


def test_step_counts_from_the_end_of_the_warmup_and_stops_at_the_floor() -> None:
    factors = run(8, name="step", warmup_steps=2, floor=0.05, arguments={"every": 2, "gamma": 0.1})
    assert factors == [0.0, 0.5, 1.0, 1.0, 0.1, 0.1, 0.05, 0.05]


def test_cosine() -> None:
    assert run(8, name="cosine") == [1.0, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.03806]


def test_cosine_with_warmup_and_floor() -> None:
    factors = run(6, name="cosine", warmup_steps=2, warmup_start=0.5, floor=0.2)
    assert factors == [0.5, 0.75, 1.0, 0.882843, 0.6, 0.317157]
    assert factor(6, name="cosine", total_steps=6, warmup_steps=2, floor=0.2) == pytest.approx(0.2)
    assert factor(99, name="cosine", total_steps=6, warmup_steps=2, floor=0.2) == pytest.approx(0.2)


@pytest.mark.parametrize("name", CURVES)
def test_every_curve_is_pure_starts_at_its_peak_and_keeps_the_floor(name: str) -> None:
    arguments = {"step": {"every": 3, "gamma": 0.3}}.get(name, {})
    factors = run(20, name=name, warmup_steps=5, warmup_start=0.1, floor=0.05, arguments=arguments)
    assert factors == run(20, name=name, warmup_steps=5, warmup_start=0.1, floor=0.05, arguments=arguments)
    assert factors[5] == 1.0 and max(factors) == 1.0
    assert min(factors[5:]) >= 0.05
    assert factors[:5] == [0.1, 0.28, 0.46, 0.64, 0.82]


def test_lengths() -> None:
    def steps(length: float | str) -> int:
        return length_in_steps(length, total_steps=150, steps_per_epoch=10)

    assert [steps(x) for x in (0, 0.05, 1.0, "5 epochs", "1 epoch", "1.5 epochs", "300 steps", "1 step")] == [
        0,
        8,
        150,
        50,
        10,
        15,
        300,
        1,
    ]


@pytest.mark.parametrize("length", ["5", "five epochs", "-1 epochs", "3 hours", 1.5, -0.1])
def test_a_length_that_is_none_is_refused(length: float | str) -> None:
    with pytest.raises(UserError, match="allowed: a fraction from 0 to 1"):
        length_in_steps(length, total_steps=150, steps_per_epoch=10)


def test_arguments_come_from_the_section() -> None:
    schedule = {
        "name": "step",
        "warmup": {"length": "1 epoch", "start": 0.1},
        "floor": 0.0,
        "step": {"every": 0.4, "gamma": 0.5},
    }
    arguments = factor_arguments(schedule, total_steps=10, steps_per_epoch=2)
    assert [factor(step, **arguments) for step in range(10)] == [0.1, 0.55, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    schedule = {"name": "cosine", "warmup": {"length": "5 epochs", "start": 0.0}, "floor": 0.0}
    with pytest.raises(UserError, match=r"schedule.warmup.length: found 5 epochs, 10 of the run's 10 steps"):
        factor_arguments(schedule, total_steps=10, steps_per_epoch=2)


def test_a_step_every_zero_steps_is_refused() -> None:
    schedule = {
        "name": "step",
        "warmup": {"length": 0, "start": 0.0},
        "floor": 0.0,
        "step": {"every": 0.01, "gamma": 0.5},
    }
    with pytest.raises(UserError, match=r"schedule.step.every: found 0.01"):
        factor_arguments(schedule, total_steps=10, steps_per_epoch=2)


@pytest.mark.parametrize(("scaling", "expected"), [("none", 0.1), ("linear", 0.4), ("sqrt", 0.2)])
def test_rate_by_batch_size(scaling: str, expected: float) -> None:
    assert scaled_rate(0.1, scaling=scaling, size=512, reference_size=128) == pytest.approx(expected)
    assert scaled_rate(0.1, scaling=scaling, size=128, reference_size=128) == 0.1
