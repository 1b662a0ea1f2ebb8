"""Schedules: the exact factor of every step of short runs, torch's schedulers, units, and what is refused."""

import json
import math
import random
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.optim import lr_scheduler

from anneal import params
from anneal.params import ParamsError, UserError
from anneal.reporting.lines import draw_panels, from_values
from anneal.schedules import (
    CURVES,
    LIFTED,
    Course,
    ScheduleConfig,
    course_panels,
    factor,
    factor_arguments,
    length_in_steps,
    momentum_at,
    plateau_factor,
    scaled_rate,
    schedule_faults,
)

NAMES = get_args(ScheduleConfig.model_fields["name"].annotation)
SECTION = params.read_yaml(Path(__file__).parents[1] / "params.yaml")["schedule"]


def run(total: int, **arguments: Any) -> list[float]:
    return [factor(step, total_steps=total, **arguments) for step in range(total)]


def section(name: str, **overrides: Any) -> dict[str, Any]:
    return params.merge({**SECTION, "name": name, "warmup": {"length": 0, "start": 0.1, "shape": "linear"}}, overrides)


# ---- every step of a run of 8 ---------------------------------------------------------------------------------------

EXPECTED: dict[str, tuple[dict[str, Any], list[float]]] = {
    "constant": ({}, [1, 1, 1, 1, 1, 1, 1, 1]),
    "step": ({"every": 2, "gamma": 0.1}, [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]),
    "multistep": ({"milestones": [2, 5], "gamma": 0.5}, [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]),
    "exponential": (
        {"every": 2, "gamma": 0.25},
        [1, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125],
    ),
    "inverse_time": ({"timescale": 2}, [1, 2 / 3, 1 / 2, 2 / 5, 1 / 3, 2 / 7, 1 / 4, 2 / 9]),
    "inverse_sqrt": ({"timescale": 1}, [1, 0.707107, 0.57735, 0.5, 0.447214, 0.408248, 0.377964, 0.353553]),
    "linear": ({}, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    "polynomial": ({"power": 2.0}, [1, 0.765625, 0.5625, 0.390625, 0.25, 0.140625, 0.0625, 0.015625]),
    "cosine": ({}, [1, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.03806]),
    "cosine_restarts": (
        {"cycle": 2.0, "multiplier": 2.0, "decay": 0.5},
        [1, 0.5, 0.5, 0.426777, 0.25, 0.073223, 0.25, 0.240485],
    ),
    "one_cycle": (
        {"rise": 0.25, "start": 0.2, "end": 0.0, "shape": "cosine", "momentum": [0.95, 0.85]},
        [0.2, 0.6, 1, 0.933013, 0.75, 0.5, 0.25, 0.066987],
    ),
    "cyclic": ({"cycle": 4.0, "low": 0.2, "decay": 0.5}, [0.2, 0.6, 1, 0.6, 0.2, 0.4, 0.6, 0.4]),
    "trapezoid": ({"decay": 4, "shape": "linear"}, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    "plateau": ({"patience": 1, "cooldown": 1, "gamma": 0.5, "min_delta": 0.0}, [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25]),
}
LOSSES = [3.0, 2.0, 2.0, 2.1, 2.1, 2.1, 2.1, 2.1]
"""One epoch a step: falls, stalls twice (x 0.5), rests once, stalls twice (x 0.5)."""


def run_of_8(name: str, **options: Any) -> list[float]:
    arguments, _ = EXPECTED[name]
    warmup = options.get("warmup_steps", 0)
    total = 8 + warmup
    return [
        factor(s, LOSSES[: max(0, s - warmup)], name=name, total_steps=total, arguments=arguments, **options)
        for s in range(total)
    ]


def test_every_schedule_is_listed() -> None:
    assert set(EXPECTED) == set(NAMES) == {*CURVES, "plateau"}
    assert set(CURVES) >= LIFTED


@pytest.mark.parametrize("name", NAMES)
def test_every_step(name: str) -> None:
    assert run_of_8(name) == pytest.approx(EXPECTED[name][1], abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_after_a_warmup(name: str) -> None:
    expected = EXPECTED[name][1]
    first = expected[0]
    factors = run_of_8(name, warmup_steps=4, warmup_start=0.2)
    assert factors == pytest.approx([0.2 * first, 0.4 * first, 0.6 * first, 0.8 * first, *expected], abs=1e-6)
    factors = run_of_8(name, warmup_steps=2, warmup_start=0.01, warmup_shape="exponential")
    assert factors == pytest.approx([0.01 * first, 0.1 * first, *expected], abs=1e-6)


WITH_FLOOR = {
    "constant": [1, 1, 1, 1, 1, 1, 1, 1],
    "step": [1, 1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
    "multistep": [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25],
    "exponential": [1, 0.5, 0.25, 0.2, 0.2, 0.2, 0.2, 0.2],
    "inverse_time": [1, 2 / 3, 1 / 2, 2 / 5, 1 / 3, 2 / 7, 1 / 4, 2 / 9],
    "inverse_sqrt": [1, 0.707107, 0.57735, 0.5, 0.447214, 0.408248, 0.377964, 0.353553],
    "linear": [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],
    "polynomial": [1, 0.8125, 0.65, 0.5125, 0.4, 0.3125, 0.25, 0.2125],
    "cosine": [1, 0.969552, 0.882843, 0.753073, 0.6, 0.446927, 0.317157, 0.230448],
    "cosine_restarts": [1, 0.6, 0.6, 0.541421, 0.4, 0.258579, 0.4, 0.392388],
    "one_cycle": [0.36, 0.68, 1, 0.94641, 0.8, 0.6, 0.4, 0.25359],
    "cyclic": [0.2, 0.6, 1, 0.6, 0.2, 0.4, 0.6, 0.4],
    "trapezoid": [1, 1, 1, 1, 1, 0.8, 0.6, 0.4],
    "plateau": [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25],
}


@pytest.mark.parametrize("name", NAMES)
def test_every_step_over_a_floor(name: str) -> None:
    assert run_of_8(name, floor=0.2) == pytest.approx(WITH_FLOOR[name], abs=1e-6)
    with_warmup = run_of_8(name, floor=0.2, warmup_steps=2, warmup_start=0.5)
    expected = [0.5 * WITH_FLOOR[name][0], 0.75 * WITH_FLOOR[name][0], *WITH_FLOOR[name]]
    assert with_warmup == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("trapezoid", {"decay": 4, "shape": "cosine"}, [1, 1, 1, 1, 1, 0.853553, 0.5, 0.146447]),
        ("trapezoid", {"decay": 4, "shape": "sqrt"}, [1, 1, 1, 1, 1, 0.5, 0.292893, 0.133975]),
        ("trapezoid", {"decay": 8, "shape": "linear"}, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (
            "one_cycle",
            {"rise": 0.25, "start": 0.2, "end": 0.4, "shape": "linear"},
            [0.2, 0.6, 1, 0.9, 0.8, 0.7, 0.6, 0.5],
        ),
        ("cosine_restarts", {"cycle": 2.5, "multiplier": 1.0, "decay": 1.0}, None),
        ("cyclic", {"cycle": 8.0, "low": 0.0, "decay": 1.0}, [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
    ],
)
def test_other_shapes(name: str, arguments: dict[str, Any], expected: list[float] | None) -> None:
    if expected is None:  # cycles that do not begin on a step: 0, 2.5, 5, 7.5
        positions = [0, 1, 2, 0.5, 1.5, 0, 1, 2]
        expected = [(1 + math.cos(math.pi * p / 2.5)) / 2 for p in positions]
    assert run(8, name=name, arguments=arguments) == pytest.approx(expected, abs=1e-6)


def test_beyond_the_run_a_curve_stays_at_its_end() -> None:
    for name, end in {"linear": 0.2, "polynomial": 0.2, "cosine": 0.2, "one_cycle": 0.2, "trapezoid": 0.2}.items():
        arguments = EXPECTED[name][0]
        assert factor(8, name=name, total_steps=8, floor=0.2, arguments=arguments) == pytest.approx(end)
        assert factor(99, name=name, total_steps=8, floor=0.2, arguments=arguments) == pytest.approx(end)


# ---- rules that hold for all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(3, 7), (20, 5), (1, 40)])
def test_the_shipped_arguments_give_a_pure_bounded_curve(name: str, epochs: int, steps_per_epoch: int) -> None:
    total = epochs * steps_per_epoch
    schedule = {**SECTION, "name": name, "floor": 0.01}
    arguments = factor_arguments(schedule, total_steps=total, steps_per_epoch=steps_per_epoch)
    losses = [1.0] * epochs

    def at(step: int) -> float:
        return factor(step, losses[: step // steps_per_epoch], **arguments)

    forward = [at(step) for step in range(total)]
    assert forward == [at(step) for step in reversed(range(total))][::-1]
    warmup = arguments["warmup_steps"]
    assert 0 < warmup < total
    assert all(0.01 <= value <= 1 for value in forward[warmup:])
    assert all(0 <= value <= forward[warmup] for value in forward[:warmup])
    assert forward[:warmup] == sorted(forward[:warmup])
    assert max(forward) > 0.9
    json.dumps(arguments)


def test_the_shipped_cycles_end_with_the_run() -> None:
    # However long the run and its warm-up: no cycle begins anew in the last steps.
    for name in ("cosine_restarts", "cyclic"):
        for total in range(30, 400, 7):
            for length in (0, 0.05, 0.1):
                schedule = section(name, warmup={"length": length})
                arguments = factor_arguments(schedule, total_steps=total, steps_per_epoch=total)
                last = factor(total - 1, **arguments)
                assert last < 0.45
                assert factor(total - 2, **arguments) > last


# ---- torch's schedulers ---------------------------------------------------------------------------------------------


def of_torch(number: int, make: Any, *, key: str = "lr") -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = make(optimizer)
        values = []
        for _ in range(number):
            values.append(float(optimizer.param_groups[0][key]))
            optimizer.step()
            scheduler.step()
    return values


N = 61
CYCLE = {"cycle_momentum": False, "base_lr": 0.1, "max_lr": 1.0, "step_size_up": 6}
MATCHED: dict[str, tuple[str, dict[str, Any], Any]] = {
    "StepLR": ("step", {"every": 7, "gamma": 0.3}, lambda o: lr_scheduler.StepLR(o, 7, 0.3)),
    "MultiStepLR": (
        "multistep",
        {"milestones": [5, 20, 33], "gamma": 0.3},
        lambda o: lr_scheduler.MultiStepLR(o, [5, 20, 33], 0.3),
    ),
    "ExponentialLR": ("exponential", {"every": 1, "gamma": 0.93}, lambda o: lr_scheduler.ExponentialLR(o, 0.93)),
    "LinearLR": ("linear", {}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=N)),
    "PolynomialLR": ("polynomial", {"power": 1.7}, lambda o: lr_scheduler.PolynomialLR(o, total_iters=N, power=1.7)),
    "CosineAnnealingLR": ("cosine", {}, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=N)),
    "CosineAnnealingWarmRestarts": (
        "cosine_restarts",
        {"cycle": 9.0, "multiplier": 2.0, "decay": 1.0},
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=9, T_mult=2),
    ),
    "CosineAnnealingWarmRestarts, equal": (
        "cosine_restarts",
        {"cycle": 9.0, "multiplier": 1.0, "decay": 1.0},
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=9),
    ),
    "CyclicLR, triangular": (
        "cyclic",
        {"cycle": 12.0, "low": 0.1, "decay": 1.0},
        lambda o: lr_scheduler.CyclicLR(o, mode="triangular", **CYCLE),
    ),
    "CyclicLR, triangular2": (
        "cyclic",
        {"cycle": 12.0, "low": 0.1, "decay": 0.5},
        lambda o: lr_scheduler.CyclicLR(o, mode="triangular2", **CYCLE),
    ),
    "CyclicLR, by a function": (
        "cyclic",
        {"cycle": 12.0, "low": 0.1, "decay": 0.8},
        lambda o: lr_scheduler.CyclicLR(o, scale_fn=lambda cycle: 0.8 ** (cycle - 1), scale_mode="cycle", **CYCLE),
    ),
}


@pytest.mark.parametrize("name", MATCHED)
def test_as_torch_has_it(name: str) -> None:
    ours, arguments, make = MATCHED[name]
    assert run(N, name=ours, arguments=arguments) == pytest.approx(of_torch(N, make), abs=1e-9)


@pytest.mark.parametrize(("shape", "strategy"), [("cosine", "cos"), ("linear", "linear")])
def test_one_cycle_as_torch_has_it(shape: str, strategy: str) -> None:
    # torch reaches the peak and the end one step before its shares of the run say, ours when they say.
    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.OneCycleLR:
        return lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=1.0,
            total_steps=N,
            pct_start=0.3,
            anneal_strategy=strategy,
            div_factor=25.0,
            final_div_factor=1e3,
            base_momentum=0.85,
            max_momentum=0.95,
        )

    arguments = {"rise": (0.3 * N - 1) / (N - 1), "start": 0.04, "end": 0.04e-3, "shape": shape}
    arguments["momentum"] = [0.95, 0.85]
    options = {"name": "one_cycle", "total_steps": N - 1, "arguments": arguments}
    assert [factor(step, **options) for step in range(N - 1)] == pytest.approx(of_torch(N - 1, make), abs=1e-9)
    momenta = [momentum_at(step, **options) for step in range(N - 1)]
    assert momenta == pytest.approx(of_torch(N - 1, make, key="momentum"), abs=1e-9)


def test_the_warmup_as_torch_has_it() -> None:
    factors = run(N, name="constant", warmup_steps=13, warmup_start=0.1)
    assert factors == pytest.approx(of_torch(N, lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=13)), abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_plateau_is_torchs_to_the_bit(seed: int) -> None:
    draw = random.Random(seed)
    losses = [round(2 / (1 + 0.2 * epoch) + draw.uniform(-0.3, 0.3), draw.choice([1, 2, 6])) for epoch in range(60)]
    options = {"patience": draw.randrange(0, 4), "cooldown": draw.randrange(0, 4), "gamma": draw.uniform(0.1, 0.9)}
    min_delta, floor = draw.choice([0.0, 0.01, 0.2]), draw.choice([0.0, 0.05])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer,
        factor=options["gamma"],
        patience=options["patience"],
        cooldown=options["cooldown"],
        threshold=min_delta,
        threshold_mode="abs",
        min_lr=floor,
        eps=0.0,
    )
    arguments = {**options, "min_delta": min_delta}
    fell = False
    for epoch, loss in enumerate(losses):
        scheduler.step(loss)
        ours = factor(
            epoch,
            losses[: epoch + 1],
            name="plateau",
            total_steps=99,
            floor=floor,
            arguments={"min_delta": 0, **arguments},
        )
        assert ours == optimizer.param_groups[0]["lr"]
        fell |= ours < 1
    assert fell


def test_plateau_by_hand() -> None:
    def at(losses: list[float], **options: float) -> float:
        return plateau_factor(losses, **{"patience": 2, "cooldown": 0, "gamma": 0.1, **options})

    assert at([]) == at([1.0]) == at([1.0, 1.0, 1.0]) == 1.0
    assert at([1.0] * 4) == at([1.0] * 6) == 0.1
    assert at([1.0] * 7) == pytest.approx(0.01)
    assert at([1.0] * 7, cooldown=1) == 0.1
    assert at([1.0, 0.95, 0.90, 0.85], min_delta=0.2) == 0.1
    assert at([1.0, 0.95, 0.90, 0.75], min_delta=0.2) == 1.0


# ---- momentum -------------------------------------------------------------------------------------------------------


def test_momentum_at_every_step() -> None:
    options = {"name": "one_cycle", "total_steps": 10, "warmup_steps": 2, "arguments": EXPECTED["one_cycle"][0]}
    expected = [0.95, 0.95, 0.95, 0.9, 0.85, 0.856699, 0.875, 0.9, 0.925, 0.943301]
    assert [momentum_at(step, **options) for step in range(10)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_only_one_cycle_moves_the_momentum(name: str) -> None:
    arguments = factor_arguments({**SECTION, "name": name}, total_steps=60, steps_per_epoch=10)
    assert (momentum_at(5, **arguments) is None) == (name != "one_cycle")
    still = params.merge(SECTION, {"name": name, "one_cycle": {"momentum": None}})
    arguments = factor_arguments(still, total_steps=60, steps_per_epoch=10)
    assert momentum_at(5, **arguments) is None
    assert 0 <= factor(5, **arguments) <= 1


# ---- lengths --------------------------------------------------------------------------------------------------------


def test_lengths() -> None:
    lengths = [0, 0.05, 1.0, "5 epochs", "1 epoch", "1.5 epochs", "300 steps", "1 step"]
    steps = [length_in_steps(x, total_steps=150, steps_per_epoch=10) for x in lengths]
    assert steps == [0, 8, 150, 50, 10, 15, 300, 1]


def test_epochs_of_different_lengths() -> None:
    lengths = ["1 epoch", "2 epochs", "2.5 epochs", "4 epochs", "6 epochs", 0.5]
    steps = [length_in_steps(x, total_steps=30, steps_per_epoch=[10, 10, 5, 5]) for x in lengths]
    assert steps == [10, 20, 23, 30, 40, 15]


@pytest.mark.parametrize("length", ["5", "five epochs", "-1 epochs", "3 hours", 1.5, -0.1])
def test_a_length_that_is_none_is_refused(length: float | str) -> None:
    with pytest.raises(UserError, match="allowed: a fraction from 0 to 1"):
        length_in_steps(length, total_steps=150, steps_per_epoch=10)


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("step", {"every": "2 epochs"}, {"every": 10}),
        ("exponential", {"every": 0.25}, {"every": 25}),
        ("inverse_time", {"timescale": "7 steps"}, {"timescale": 7}),
        ("inverse_sqrt", {"timescale": 0.125}, {"timescale": 12.5}),
        # From the start of the run in params.yaml, from the end of the warm-up for the curve.
        ("multistep", {"milestones": [0.5, "12 epochs", "75 steps"]}, {"milestones": [40, 50, 65]}),
        ("trapezoid", {"decay": 0.3}, {"decay": 30}),
        # Unrounded, of the 90 steps after the warm-up.
        ("cosine_restarts", {"cycle": 0.25}, {"cycle": 22.5}),
        ("cyclic", {"cycle": "1.5 epochs"}, {"cycle": 7.5}),
    ],
)
def test_lengths_become_steps(name: str, block: dict[str, Any], expected: dict[str, Any]) -> None:
    schedule = section(name, warmup={"length": 0.1}, **{name: block})
    arguments = factor_arguments(schedule, total_steps=100, steps_per_epoch=5)
    assert arguments["warmup_steps"] == 10
    assert {key: arguments["arguments"][key] for key in expected} == expected


def test_milestones_count_from_the_start_of_the_run() -> None:
    schedule = section("multistep", warmup={"length": "2 steps"}, multistep={"milestones": ["4 steps", 0.75]})
    arguments = factor_arguments(schedule, total_steps=8, steps_per_epoch=2)
    factors = [factor(step, **arguments) for step in range(8)]
    assert factors == pytest.approx([0.1, 0.55, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_run_of_one_step() -> None:
    arguments = factor_arguments({**SECTION, "name": "cosine"}, total_steps=1, steps_per_epoch=1)
    assert factor(0, **arguments) == 1.0


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "cosine",
            {"warmup": {"length": "5 epochs"}},
            "schedule.warmup.length: found 5 epochs, 10 of the run's 10 steps, allowed: less than the run",
        ),
        (
            "step",
            {"step": {"every": 0.01}},
            "schedule.step.every: found 0.01, 0 of the run's 10 steps, allowed: at lea",
        ),
        ("exponential", {"exponential": {"every": 0}}, "schedule.exponential.every: found 0, 0 of"),
        ("inverse_time", {"inverse_time": {"timescale": "0 steps"}}, "schedule.inverse_time.timescale: found 0 steps"),
        ("inverse_sqrt", {"inverse_sqrt": {"timescale": 0.0}}, "schedule.inverse_sqrt.timescale: found 0.0, 0 of"),
        ("cosine_restarts", {"cosine_restarts": {"cycle": 0}}, "cycle: found 0, 0 of the run's 10 steps, allowed: at"),
        ("cyclic", {"cyclic": {"cycle": "1 step"}}, "cyclic.cycle: found 1 step, 1 of the run's 10 steps, allowed: at"),
        ("trapezoid", {"trapezoid": {"decay": 0}}, "schedule.trapezoid.decay: found 0, 0 of the run's 10 steps"),
        (
            "trapezoid",
            {"trapezoid": {"decay": "9 steps"}, "warmup": {"length": 0.2}},
            "decay: found 9 steps, 9 steps, but the warm-up leaves 8 of the run's 10, allowed: at most 8 steps",
        ),
        (
            "multistep",
            {"multistep": {"milestones": [0.5, "5 steps"]}},
            r"schedule.multistep.milestones\[1\]: found 5 steps, step 5 of the run's 10, allowed: after milestone 1 \(step",
        ),
        (
            "multistep",
            {"multistep": {"milestones": [0.5, 1.0]}},
            r"milestones\[1\]: found 1.0, step 10 .* before the end",
        ),
        (
            "multistep",
            {"multistep": {"milestones": [0.2]}, "warmup": {"length": 0.3}},
            r"milestones\[0\]: found 0.2, step 2 of the run's 10, allowed: after the warm-up \(step 3\)",
        ),
        (
            "one_cycle",
            {"one_cycle": {"rise": 0.05}},
            "schedule.one_cycle.rise: found 0.05, 0.5 of the 10 steps that the",
        ),
        ("one_cycle", {"one_cycle": {"rise": 0.95}}, "schedule.one_cycle.rise: found 0.95, 9.5 of the 10 steps"),
    ],
)
def test_nonsense_is_refused(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message) as caught:
        factor_arguments(section(name, **overrides), total_steps=10, steps_per_epoch=2)
    assert len(caught.value.faults) == 1
    assert schedule_faults(section(name, **overrides), total_steps=10, steps_per_epoch=2) == caught.value.faults


def test_a_step_that_never_comes_is_allowed() -> None:
    for name in ("step", "exponential", "cosine_restarts", "cyclic"):
        key = "every" if name in ("step", "exponential") else "cycle"
        schedule = section(name, **{name: {key: "900 steps"}})
        assert schedule_faults(schedule, total_steps=10, steps_per_epoch=2) == []


def test_the_section_refuses_what_no_run_can_use() -> None:
    for overrides, message in (
        (
            {"warmup": {"start": 0.0, "shape": "exponential"}},
            "start: found 0 with shape exponential, allowed: a number > 0",
        ),
        (
            {"one_cycle": {"momentum": [0.85, 0.95]}},
            r"one_cycle.momentum: found \[0.85, 0.95\], allowed: \[at the low rate",
        ),
        ({"one_cycle": {"momentum": [0.9, 0.0]}}, r"one_cycle.momentum"),
        ({"cyclic": {"decay": 0.0}}, "cyclic.decay"),
    ):
        with pytest.raises(ParamsError, match=message):
            params.parse({"schedule": params.merge(SECTION, overrides)}, {"schedule": ScheduleConfig})


def test_a_scaled_rate_needs_a_warmup() -> None:
    def faults(length: object, **options: Any) -> list[str]:
        batch = {"scaling": "linear", "size": 256, "reference_size": 32, **options}
        return schedule_faults(
            section("cosine", warmup={"length": length}), total_steps=100, steps_per_epoch=10, **batch
        )

    (fault,) = faults(0)
    assert fault.startswith("batch.lr_scaling: found linear, which makes the rate of batch.size 256 8 times that of")
    assert "schedule.warmup.length 0.05 or '5 epochs'" in fault and "Goyal" in fault
    assert len(faults(0.001)) == 1  # rounds to no step
    assert faults("1 step") == faults(0, scaling="sqrt") == faults(0, size=32) == faults(0, size=16) == []


def test_stopping_before_a_plateau_is_of_use_is_refused() -> None:
    def faults(stopping: int | None, name: str = "plateau") -> list[str]:
        schedule = section(name, plateau={"patience": 3})
        return schedule_faults(schedule, total_steps=100, steps_per_epoch=10, early_stopping=stopping)

    assert faults(5) == faults(None) == faults(2, name="cosine") == []
    (fault,) = faults(4)
    assert fault.startswith("trainer.early_stopping.patience: found 4") and fault.endswith("allowed: at least 5")


# ---- batch size -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scaling", "expected"), [("none", 0.1), ("linear", 0.4), ("sqrt", 0.2)])
def test_rate_by_batch_size(scaling: str, expected: float) -> None:
    assert scaled_rate(0.1, scaling=scaling, size=512, reference_size=128) == pytest.approx(expected)
    assert scaled_rate(0.1, scaling=scaling, size=128, reference_size=128) == 0.1


# ---- the picture ----------------------------------------------------------------------------------------------------


def course(name: str, peak: float | None = 0.2, epochs: int = 3, steps: int = 10) -> Course:
    arguments = factor_arguments({**SECTION, "name": name}, total_steps=epochs * steps, steps_per_epoch=steps)
    return Course(arguments, peak, [steps] * epochs)


def test_panels_of_one_member() -> None:
    (panel,) = course_panels({"a": course("cosine")})
    (line,) = panel["lines"]
    assert line["label"] == "" and list(line["x"]) == list(range(30))
    assert line["y"] == [0.2 * factor(step, **course("cosine").arguments) for step in range(30)]
    assert panel["x_label"] == "optimizer step (10 an epoch)" and panel["y_label"] == "learning rate"


def test_members_that_are_alike_share_a_line(tmp_path: Path) -> None:
    members = {"a": course("cosine"), "b": course("one_cycle", steps=20), "c": course("cosine")}
    panels = course_panels(members)
    assert [[line["label"] for line in panel["lines"]] for panel in panels] == [["a, c", "b"], ["b"]]
    assert panels[0]["x_label"] == "optimizer step"
    assert min(panels[1]["lines"][0]["y"]) == pytest.approx(0.85, abs=1e-3)
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        draw_panels(from_values(json.loads(json.dumps(panels))), path)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_long_run_is_thinned_to_500_points_with_both_ends() -> None:
    for steps in (499, 500, 501, 12345):
        (panel,) = course_panels({"a": course("linear", epochs=1, steps=steps)})
        x = panel["lines"][0]["x"]
        assert x[0] == 0 and x[-1] == steps - 1 and len(x) == min(500, steps) and x == sorted(set(x))


def test_unknown_rates_and_plateau_say_so() -> None:
    (panel,) = course_panels({"a": course("plateau", peak=None), "b": course("cosine", peak=0.3)})
    assert panel["y_label"] == "learning rate / peak rate"
    assert panel["title"] == "plateau, as if the validation loss kept falling, cosine"
    assert max(panel["lines"][1]["y"]) == 1.0
