"""The range test: how a curve is read, what the trial run does, and that it leaves nothing behind."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from anneal import cli, params
from anneal.batching import epoch_order
from anneal.conflicts import check_recipe
from anneal.models.build import load_classifier
from anneal.optimizers.config import EXTRA, NO_RATE
from anneal.params import ParamsError, UserError
from anneal.preprocess import PreprocessConfig
from anneal.reporting.lines import from_values
from anneal.reporting.lr_range import in_words, write
from anneal.store import open_store
from anneal.training.lr_curve import LRRange, exponential_rates, noise, read_curve, smooth, smoothing_weight, valley
from anneal.training.lr_range import BLOW_UP, NUM_STEPS, START, STOP, Sweep, at_rate_one, lr_range
from anneal.training.setup import set_up
from tests.test_training import PLAIN, flipped, inputs, sections, train  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
RATES = exponential_rates(1e-5, 10.0, 100)


def curve(flat: float = 2.3, low: float = 1.0, falls: float = 0.4, rises: float = 0.8) -> np.ndarray:
    """Flat, then falling in a straight line by log rate, then rising again: positions as parts of the test."""
    at = np.linspace(0, 1, 100)
    return np.interp(at, [0, falls, rises, 1.0], [flat, flat, low, 2 * flat])


def sweep(inputs, *, seed=0, start=1e-4, stop=10.0, num_steps=40, name="a", **overrides):  # noqa: F811
    chosen = sections(**overrides)
    return lr_range(
        name=name,
        store=inputs[0],
        augmented=inputs[1],
        seed=seed,
        start=start,
        stop=stop,
        num_steps=num_steps,
        **chosen,
    )


# ---- reading the curve ----------------------------------------------------------------------------------------------


def longest_falls(losses) -> list[tuple[int, ...]]:
    """All longest strictly falling subsequences, by trying every one."""
    for length in range(len(losses), 0, -1):
        found = [
            places
            for places in itertools.combinations(range(len(losses)), length)
            if all(losses[a] > losses[b] for a, b in itertools.pairwise(places))
        ]
        if found:
            return found
    raise AssertionError


def test_valley_is_that_of_brute_force():
    draw = np.random.default_rng(0)
    for _ in range(300):
        losses = draw.integers(0, 8, draw.integers(3, 10)).tolist()
        falls = longest_falls(losses)
        end, length = min(places[-1] for places in falls), len(falls[0])
        third = length / 3
        expected = 0 if length == 1 else max(0, end - length + int(third) + int(third / 2))
        assert valley(losses) == expected, losses


@pytest.mark.parametrize(
    ("losses", "index"),
    [
        ([1.0], 0),
        ([1.0, 1.0, 1.0], 0),
        ([1.0, 2.0, 3.0], 0),
        # 60 flat, 30 falling, 10 rising: the valley has 31 points and ends at 89; 89 - 31 + 10 + 5.
        ([3.0] * 60 + [3.0 - 0.1 * i for i in range(1, 31)] + [float(i) for i in range(1, 11)], 73),
        # Of two equally long ones the first to end.
        ([5.0, 4.0, 3.0, 9.0, 8.0, 7.0], 0),
    ],
)
def test_valley_on_closed_forms(losses, index):
    assert valley(losses) == index


def test_smoothing_is_the_weighted_mean_of_the_past():
    losses = np.random.default_rng(0).normal(size=30)
    for weight in (0.0, 0.9, 0.98):
        past = [weight ** np.arange(i, -1, -1) for i in range(30)]
        expected = [w @ losses[: len(w)] / w.sum() for w in past]
        np.testing.assert_allclose(smooth(losses.tolist(), weight), expected)
    np.testing.assert_allclose(smooth([2.0] * 20, 0.95), 2.0)
    assert [smoothing_weight(n) for n in (40, 100, 500)] == [0.75, 0.9, 0.98]


def test_noise_is_that_about_the_trend():
    draw = np.random.default_rng(0).normal(0.0, 0.2, 4000)
    assert noise((np.linspace(9, 1, 4000) + draw).tolist()) == pytest.approx(0.2, rel=0.05)


def test_a_clear_valley_is_read():
    losses = curve() + np.random.default_rng(0).normal(0, 0.05, 100)
    found = read_curve(RATES, losses.tolist(), 100)
    assert found.reason == ""
    low, high = found.descent
    # It falls from 40 % of the test on, and smoothing over a tenth is at most so late.
    assert RATES[38] < low < RATES[60] and RATES[79] <= high <= RATES[92]
    assert low < found.suggestion < RATES[79] and low <= found.steepest < high
    assert found.suggestion == float(f"{found.suggestion:.3g}")
    kept = found.smoothed[10:-5]
    assert found.suggestion == float(f"{RATES[10 + valley(kept)]:.3g}")


def test_noise_alone_is_no_descent():
    draw = np.random.default_rng(0)
    verdicts = [read_curve(RATES, draw.normal(2.3, 0.1, 100).tolist(), 100) for _ in range(1000)]
    refused = [found for found in verdicts if found.suggestion is None]
    assert len(refused) >= 995
    assert sum("never descends" in found.reason for found in refused) >= 990


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([2.3] * 100, "never descends"),
        (np.linspace(2.3, 4.0, 100).tolist(), "never descends"),
        (
            np.interp(range(100), [40, 99], [2.3, 1.0]).tolist(),
            "still falls at the highest rates, up to 10; stop higher",
        ),
        (curve(falls=0.0, rises=0.3).tolist(), "falls already at the lowest rates, from 1e-05 on; start lower"),
        ([2.3, 2.4, 9.0, 80.0], "blew up at a rate of 1.52e-05, 4 of 100 steps into it; start lower"),
        ([], "blew up at the first step"),
    ],
)
def test_curves_without_a_suggestion(losses, reason):
    found = read_curve(RATES[: len(losses)], losses, 100)
    assert found.suggestion is None and reason in found.reason
    assert len(from_values(found.panels())[0].lines) == 2
    assert "no suggestion" in in_words(found, optimizer="SGD", lr=0.1, size=32, scaling="none")


def test_a_blow_up_after_the_descent_is_no_edge():
    losses = curve()[:90].tolist()
    assert read_curve(RATES[:90], losses, 100).suggestion is not None


# ---- the trial run --------------------------------------------------------------------------------------------------


def test_losses_are_those_of_plain_sgd_at_rising_rates(inputs):  # noqa: F811
    found = sweep(inputs, start=1e-3, stop=1.0, **PLAIN)
    assert found.rates == pytest.approx([1e-3 * 1e3 ** (i / 39) for i in range(40)], rel=1e-12)
    store = open_store(inputs[0])
    split = store.split("train")
    chosen = sections(**PLAIN)
    classifier = set_up(store=inputs[0], augmented=inputs[1], seed=0, **chosen).module.classifier
    images, labels = torch.from_numpy(split.take(range(len(split)))), torch.from_numpy(split.labels)
    losses: list[float] = []
    for epoch in range(14):  # 150 = 64 + 64 + 22: three steps an epoch, so that the test needs 14
        order = epoch_order(len(split), 0, epoch)
        for begin in range(0, len(order), 64):
            if len(losses) == 40:
                break
            index = order[begin : begin + 64]
            loss = F.cross_entropy(classifier(images[index]), labels[index])
            classifier.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in classifier.parameters():
                    parameter -= found.rates[len(losses)] * parameter.grad
            losses.append(loss.item())
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4)


def test_accumulation_does_not_show(inputs):  # noqa: F811
    whole = sweep(inputs, start=1e-3, stop=1.0, **PLAIN, batch={"size": 64, "microbatch": 64})
    parts = sweep(inputs, start=1e-3, stop=1.0, **PLAIN, batch={"size": 64, "microbatch": 16})
    np.testing.assert_allclose(whole.losses, parts.losses, rtol=1e-4)
    assert whole.rates == parts.rates


def test_neither_rate_nor_schedule_nor_growth_matter(inputs):  # noqa: F811
    plain = sweep(inputs)
    momentum = {"name": "one_cycle", "one_cycle": {"momentum": [0.95, 0.5]}, "warmup": {"length": 0.5, "start": 0.0}}
    other = sweep(
        inputs,
        optimizer={"SGD": {"lr": 7.0}},
        schedule=momentum,
        batch={"lr_scaling": "linear", "reference_size": 8, "growth": {"at": [0.5]}},
        trainer={"epochs": 4},
    )
    assert other.losses == plain.losses and other.rates == plain.rates


def test_it_ends_where_the_loss_blows_up(inputs):  # noqa: F811
    found = sweep(inputs, stop=1e6, num_steps=60)
    assert len(found.losses) < 60
    assert found.smoothed[-1] > BLOW_UP * min(found.smoothed)
    assert all(x <= BLOW_UP * min(found.smoothed[: i + 1]) for i, x in enumerate(found.smoothed[:-1]))
    assert all(map(math.isfinite, found.losses))


@pytest.mark.parametrize("microbatch", [64, 16])
def test_it_ends_without_an_error_where_the_loss_is_not_finite(inputs, microbatch):  # noqa: F811
    batch = {"size": 64, "microbatch": microbatch}
    found = sweep(inputs, start=1.0, stop=1e38, **PLAIN, batch=batch)
    assert len(found.losses) < 40 and all(map(math.isfinite, found.losses))
    assert found.suggestion is None and "start lower" in found.reason


def test_it_leaves_nothing_behind(flipped):  # noqa: F811
    torch.use_deterministic_algorithms(False)
    before = torch.get_rng_state(), np.random.get_state()[1], torch.get_num_threads()  # noqa: NPY002
    files = {path: path.read_bytes() for path in flipped[0].parent.rglob("*") if path.is_file()}
    torch.set_num_threads(1)
    first = sweep(flipped, trainer={"threads": 2, "deterministic": True})
    assert torch.get_num_threads() == 1 and not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    torch.set_num_threads(before[2])
    assert {path: path.read_bytes() for path in flipped[0].parent.rglob("*") if path.is_file()} == files
    assert first == sweep(flipped, trainer={"threads": 2, "deterministic": True})


@pytest.mark.parametrize("name", sorted(NO_RATE))
def test_optimizers_without_one_rate_are_refused(inputs, name):  # noqa: F811
    with pytest.raises(UserError, match=rf"optimizer\.name: found {name}.*no one rate to test"):
        sweep(inputs, optimizer={"name": name, **({name: {"lr": 1.0}} if name in EXTRA else {})})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.0, "stop": 0.1}, "found 1 to 0.1, allowed: 0 < start < stop"),
        ({"start": 0.0}, "allowed: 0 < start"),
        ({"stop": math.inf}, "start < stop"),
        ({"num_steps": 7}, "found 7, allowed: at least 40"),
    ],
)
def test_a_range_that_is_none(inputs, options, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        sweep(inputs, **options)


def test_the_rate_of_the_chosen_block_is_one():
    chosen = sections(optimizer={"name": "AdamW"})["optimizer"]
    changed = at_rate_one(chosen)
    assert changed.arguments == chosen.arguments | {"lr": 1.0} and chosen.arguments["lr"] != 1.0
    assert changed.SGD == chosen.SGD


def test_progress_is_said(inputs, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("anneal.training.lr_range.LINE_EVERY", 0.0)
    steps = len(sweep(inputs, stop=0.1, name="b").rates)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == steps == 40
    assert lines[-1].startswith("b: range test  step 40/40  rate 1.00e-01  loss ")


# ---- lr: auto -------------------------------------------------------------------------------------------------------


AUTO = {"optimizer": {"name": "AdamW", "AdamW": {"lr": "auto"}}, "batch": {"size": 32, "microbatch": 16}}


def every_file(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_auto_is_the_same_run_as_the_number(flipped, tmp_path, capsys):  # noqa: F811
    mixed = {**AUTO, "regularization": {"dropout": 0.2, "mixup": {"alpha": 0.4}}}
    found = train(flipped, tmp_path / "auto", **mixed)
    assert f"a: learning rate {found.peak_rate:g} from a range test over " in capsys.readouterr().err
    assert found.range_test.suggestion == found.peak_rate and START < found.peak_rate < STOP
    assert found.range_test.num_steps == NUM_STEPS
    assert json.loads((tmp_path / "auto/model.json").read_text())["lr"] == found.peak_rate
    number = params.merge(mixed, {"optimizer": {"AdamW": {"lr": found.peak_rate}}})
    given = train(flipped, tmp_path / "number", **number)
    assert given.range_test is None and given.peak_rate == found.peak_rate
    assert "range test" not in capsys.readouterr().err
    assert every_file(tmp_path / "number") == every_file(tmp_path / "auto")
    train(flipped, tmp_path / "workers", **mixed, hardware={"num_workers": 2})
    assert every_file(tmp_path / "workers") == every_file(tmp_path / "auto")
    other = train(flipped, tmp_path / "seed", seed=1, **mixed)
    assert other.range_test.losses != found.range_test.losses


def test_the_recorded_rate_is_the_scaled_one(inputs, tmp_path):  # noqa: F811
    batch = {"size": 64, "microbatch": 64, "lr_scaling": "linear", "reference_size": 32}
    result = train(inputs, tmp_path / "a", batch=batch, optimizer={"SGD": {"lr": 0.05}})
    assert json.loads((tmp_path / "a/model.json").read_text())["lr"] == result.peak_rate == 0.1


def test_auto_without_a_descent_stops_before_training(inputs, tmp_path):  # noqa: F811
    with pytest.raises(
        UserError, match=r"^params\.yaml: optimizer\.SGD\.lr of member a: found auto, but .* never descends.*allowed"
    ):
        train(
            inputs,
            tmp_path / "a",
            optimizer={"SGD": {"lr": "auto", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}},
            regularization={"gradient_clip": 1e-12},
        )
    assert list(tmp_path.iterdir()) == []


def test_auto_with_a_scaled_rate_is_refused(inputs, tmp_path):  # noqa: F811
    overrides = {"optimizer": {"SGD": {"lr": "auto"}}, "batch": {"lr_scaling": "sqrt"}}
    message = r"optimizer\.SGD\.lr: found auto with batch\.lr_scaling sqrt.*allowed: a number, or lr_scaling: none"
    with pytest.raises(ParamsError, match=message):
        train(inputs, tmp_path / "a", **overrides)
    chosen = sections(**overrides)
    chosen = {key: chosen[key] for key in params.MEMBER_SECTIONS[1:]}
    preprocess = params.parse(params.read_yaml(ROOT / "params.yaml"), {"preprocess": PreprocessConfig})
    with pytest.raises(ParamsError, match=message):
        check_recipe(**chosen, **preprocess, num_train=150)


class Groups(pl.Callback):
    """Write which rates a process trains with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        rates = [pl_module.peak_rate, *(group["initial_lr"] for group in trainer.optimizers[0].param_groups)]
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(rates))


PROCESSES = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.test_lr_range import AUTO, Groups
from tests.test_training import train
out = Path(sys.argv[1])
train((Path({store!r}), Path({augmented!r})), out / "a", callbacks=(Groups(out),), **AUTO, hardware=dict(devices=2))
"""


@pytest.mark.long
def test_two_processes_take_the_rate_of_the_first(inputs, tmp_path):  # noqa: F811
    one = sweep(inputs, start=START, stop=STOP, num_steps=NUM_STEPS, **AUTO)
    script = tmp_path / "script.py"
    script.write_text(PROCESSES.format(root=str(ROOT), store=str(inputs[0]), augmented=str(inputs[1])))
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, check=True, timeout=300, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.count("from a range test") == 1
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert {rate for rates in ranks for rate in rates} == {one.suggestion}
    assert load_classifier(tmp_path / "a")[1]["lr"] == one.suggestion


# ---- the command ----------------------------------------------------------------------------------------------------


def test_files_and_words(tmp_path):
    found = read_curve(RATES, curve().tolist(), 100)
    picture, table = write(found, tmp_path / "lr-range", "a")
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line.split(",") for line in table.read_text().splitlines()]
    assert rows[0] == ["step", "lr", "loss", "smoothed"] and len(rows) == 101
    assert [float(v) for v in rows[7]] == [7, found.rates[6], found.losses[6], found.smoothed[6]]
    assert write(found, tmp_path / "again", "a")[0].read_bytes() == picture.read_bytes()
    text = in_words(found, optimizer="SGD", lr="auto", size=48, scaling="none")
    assert f"optimizer.SGD.lr: {found.suggestion:g}  (found at batch.size 48)" in text
    scaled = in_words(found, optimizer="SGD", lr=0.1, size=48, scaling="linear")
    assert f"optimizer.SGD.lr: {found.suggestion:g}, with batch.reference_size: 48" in scaled


def test_help_states_the_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["lr-range", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"default {START:.0e}".replace("e-05", "e-5") in text
    assert f"default {STOP:g}" in text and f"default {NUM_STEPS}" in text


def test_the_curve_of_no_steps_can_be_drawn(tmp_path):
    write(LRRange([], [], [], 100, reason="blew up"), tmp_path, "a")


def test_a_terminal_gets_one_line(monkeypatch):
    class Terminal:
        text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    stream = Terminal()
    shown = Sweep("a", 100, stream)
    shown.next_line, shown.rates, shown.steps = 0.0, [0.1], 3
    shown.show(2.0)
    shown.close()
    assert "\n" not in stream.text and "step 3/100" in stream.text and stream.text.endswith("\033[K")
