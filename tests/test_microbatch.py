import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anneal import params, recipe
from anneal.cli import main
from anneal.microbatch import (
    Finding,
    Trial,
    candidates,
    fastest,
    find_microbatch,
    largest_that_fits,
    measure_rates,
    out_of_memory,
    try_out,
)
from anneal.params import UserError
from anneal.training.noise_scale import NoiseScale
from anneal.training.setup import set_up
from tests.test_training import NO_NORM, sections, write_inputs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def chosen(**overrides):
    values = sections(**overrides)
    return values


def setup_of(inputs, **overrides):
    return set_up(store=inputs[0], augmented=inputs[1], seed=0, **chosen(**overrides))


# ---- which to propose -----------------------------------------------------------------------------------------------


@given(size=st.integers(1, 400), processes=st.integers(1, 4), limit=st.integers(0, 500))
def test_the_largest_divisor_that_fits(size, processes, limit):
    sizes = candidates(size * processes, processes=processes)
    asked = []

    def fits(microbatch):
        asked.append(microbatch)
        return microbatch <= limit

    assert largest_that_fits(sizes, fits) == max((m for m in sizes if m <= limit), default=None)
    # No microbatch twice, and never one beyond the first that failed.
    assert len(asked) == len(set(asked))
    failed = [m for m in asked if m > limit]
    assert failed == sorted(failed, reverse=True)


def test_candidates_divide_the_batch_over_processes():
    assert candidates(32) == [1, 2, 4, 8, 16, 32]
    assert candidates(96, processes=4, smallest=2) == [2, 3, 4, 6, 8, 12, 24]
    assert candidates(96, multiple_of=16) == [16, 32, 48, 96]
    assert candidates(8, multiple_of=16) == []


@pytest.mark.parametrize(
    ("rates", "current", "expected"),
    [
        ({8: 100.0, 16: 200.0, 32: 300.0}, 8, 32),
        ({8: 100.0, 16: 270.0, 32: 300.0}, 8, 16),
        ({8: 290.0, 16: 300.0, 32: 280.0}, 32, 32),
        ({8: 290.0, 16: 200.0, 24: 300.0}, 16, 24),
        ({8: 100.0, 16: 300.0}, 12, 16),
    ],
)
def test_the_fastest_but_for_noise(rates, current, expected):
    assert fastest(rates, current) == expected


def test_rates_are_measured_by_turns():
    calls = []

    def step(name, values):
        found = iter(values)
        return lambda: calls.append(name) or next(found)

    # The first call warms up; what is half as slow as the best is left at one measurement.
    steps = {1: step(1, [99, 40, 40]), 2: step(2, [99, 100, 120, 110]), 4: step(4, [99, 90, 80, 130])}
    assert measure_rates(steps, repeats=3, seconds=9, clock=lambda: 0) == {1: 40, 2: 120, 4: 130}
    assert calls == [1, 2, 4, 1, 2, 4, 2, 4, 2, 4]
    calls.clear()
    times = iter([0, 100])
    steps = {2: step(2, [1, 5, 6]), 4: step(4, [1, 7, 8])}
    assert measure_rates(steps, repeats=3, seconds=9, clock=lambda: next(times)) == {2: 5, 4: 7}
    assert calls == [2, 4, 2, 4]


def test_the_table_says_what_changes():
    trials = [Trial(8, images_per_second=1234.5, peak_bytes=3 * 2**20), Trial(16, fits=False)]
    lines = Finding(trials, 4, 8, "gpu", 1, batch_norm=True).lines()
    assert lines[0].split() == ["microbatch", "images/s", "peak", "memory"]
    assert lines[1].split() == ["8", "1,234", "3", "MiB"]
    assert lines[2].split() == ["16", "does", "not", "fit"]
    assert lines[4] == "proposed: batch.microbatch 8 (the largest that fits)"
    assert "batch normalisation sees it" in lines[5] and "Results change" in lines[5]
    assert Finding(trials, 8, 8, "gpu", 1, batch_norm=False).lines()[-1] == "params.yaml says so already"


# ---- trials ---------------------------------------------------------------------------------------------------------


def real_failure():
    # The allocator's own error on a machine without an accelerator: no machine has 2 to the power of 60 bytes.
    torch.empty(2**60, dtype=torch.uint8)


def accelerator_failure():
    # What CUDA raises; a stand-in, since the tests run without a GPU.
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


SAM = {"optimizer": {"name": "AdamW", "sam": {"rho": 0.05}}}


@pytest.mark.parametrize(("failure", "overrides"), [(real_failure, {}), (accelerator_failure, SAM)])
def test_out_of_memory_is_an_answer(inputs, failure, overrides):
    setup = setup_of(inputs, **overrides)
    noise = NoiseScale(setup.train, num_microbatches=8, microbatch=16, seed=0)

    def beyond_16(module, arguments):
        # A validation batch may be larger than one of training, since it needs no gradients.
        if module.training and len(arguments[0]) > 16:
            failure()

    hook = setup.module.classifier.register_forward_pre_hook(beyond_16)

    def trial(microbatch):
        return try_out(setup, microbatch, context=torch.enable_grad, passes=2, noise=noise)

    trials = {}

    def fits(microbatch):
        trials[microbatch] = trial(microbatch)
        return trials[microbatch].fits

    assert largest_that_fits(candidates(32, smallest=8), fits) == 16
    assert trials[32] == Trial(32, fits=False)
    assert trials[16].images_per_second > 0 and trials[16].peak_bytes is None
    assert all(p.grad is None for p in setup.module.parameters())
    hook.remove()
    assert trial(32).fits


def test_other_errors_are_not_taken_for_memory(inputs):
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    setup = setup_of(inputs)

    def fail(*_):
        raise RuntimeError("shapes cannot be multiplied")

    setup.module.classifier.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes"):
        try_out(setup, 8, context=torch.enable_grad, passes=1)


def test_a_cpu_gets_the_fastest(inputs):
    lines = []
    found = find_microbatch(
        store=inputs[0],
        augmented=inputs[1],
        seed=0,
        **chosen(batch={"size": 32, "microbatch": 8}, optimizer={"SGD": {"lr": "auto"}}),
        report=lines.append,
    )
    assert [trial.microbatch for trial in found.trials] == [2, 4, 8, 16, 32]
    rates = {trial.microbatch: trial.images_per_second for trial in found.trials}
    assert found.proposal == fastest(rates, 8)
    # 16 forward passes instead of one: slower on any machine.
    assert rates[2] < rates[32] and found.proposal != 2
    assert (found.current, found.accelerator, found.processes) == (8, "cpu", 1)
    assert lines == ["timing microbatches of 2, 4, 8, 16, 32 by turns"]


def test_several_processes_and_no_norm(inputs):
    options = NO_NORM | {"batch": {"size": 8, "microbatch": 8}, "hardware": {"devices": 2}}
    found = find_microbatch(store=inputs[0], augmented=inputs[1], seed=0, **chosen(**options))
    assert [trial.microbatch for trial in found.trials] == [1, 2, 4]
    assert found.proposal in (1, 2, 4) and found.processes == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer": {"name": "LBFGS"}}, "LBFGS needs batch.microbatch = batch.size"),
        ({"hardware": {"devices": 3}}, r"batch\.size: found 64, which leaves no microbatch for 3 processes"),
    ],
)
def test_what_leaves_no_choice_is_refused(inputs, overrides, message):
    with pytest.raises(UserError, match=message):
        find_microbatch(store=inputs[0], augmented=inputs[1], seed=0, **chosen(**overrides))


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with params.yaml and a processed data set, as after `dvc repro augment`; there is no test split to read."""
    for name in ("params.yaml", "params.schema.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "data").mkdir()
    write_inputs(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for key, value in (
        ("batch.microbatch", 2),
        ("batch.size", 16),
        ("model.resnet.widths", [8, 8]),
        ("trainer.threads", 1),
        ("hardware.accelerator", "cpu"),
        ("ensemble.members", {"a": {"seed": 0}, "b": {"batch": {"microbatch": 2}}}),
    ):
        recipe.set_value(key, value)
    return tmp_path


class Terminal:
    def __init__(self, stream, answer=""):
        self.stream, self.answer = stream, answer

    def isatty(self):
        return True

    def readline(self):
        return self.answer + "\n"

    def __getattr__(self, name):
        return getattr(self.stream, name)


def proposed(text):
    return int(re.search(r"proposed: batch\.microbatch (\d+)", text)[1])


def test_without_a_terminal_nothing_is_written(project, capsys):
    before = Path("params.yaml").read_bytes()
    files = sorted(path for path in project.rglob("*"))
    assert main(["microbatch"]) == 0
    out, err = capsys.readouterr()
    assert "nothing written; to write it: anneal microbatch --write" in out
    assert proposed(out) > 2 and "timing microbatches of 2, 4, 8, 16" in err
    assert Path("params.yaml").read_bytes() == before
    assert sorted(path for path in project.rglob("*")) == files


@pytest.mark.parametrize(("answer", "written"), [("", False), ("n", False), ("y", True)])
def test_a_terminal_is_asked(project, capsys, monkeypatch, answer, written):
    before = Path("params.yaml").read_text()
    monkeypatch.setattr(sys, "stdin", Terminal(sys.stdin, answer))
    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    assert main(["microbatch"]) == 0
    out = capsys.readouterr().out
    assert "into params.yaml? [y/N]" in out
    after = Path("params.yaml").read_text()
    assert params.load()["batch"]["microbatch"] == (proposed(out) if written else 2)
    if not written:
        assert after == before and "nothing written" in out
        return
    changed = [(a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
    # One line, and its comment stays.
    assert len(changed) == 1 and changed[0][1].split("#")[1] == changed[0][0].split("#")[1]


def test_write_goes_where_the_member_says_it(project, capsys):
    assert main(["microbatch", "--member", "b", "--write"]) == 0
    number = proposed(capsys.readouterr().out)
    values = params.load()
    assert values["batch"]["microbatch"] == 2
    assert values["ensemble"]["members"] == {"a": {"seed": 0}, "b": {"batch": {"microbatch": number}}}


def test_mistakes_are_one_line(project):
    with pytest.raises(UserError, match="no member 'x'; there are a, b"):
        main(["microbatch", "--member", "x"])
    shutil.rmtree("data/processed")
    with pytest.raises(UserError, match=r"data/processed.*dvc repro"):
        main(["microbatch"])
