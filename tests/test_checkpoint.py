"""Runs that are killed, at any moment and any number of times, end with the bytes of one that was not."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from anneal.params import UserError
from anneal.training import checkpoint
from anneal.training.checkpoint import Position, interval, newest, read
from anneal.training.fit import fit
from anneal.training.state import RunState, changed, claimed, fingerprint
from tests.test_training import sections, write_inputs

PRINT = {"params": "a", "data": "b", "code": "c", "packages": "d"}
EPOCHS = 4
DRAWING = {
    "model": {"name": "resnet", "resnet": {"widths": [8, 8], "depths": [1, 1]}},
    "batch": {"size": 48, "microbatch": 16},
    "regularization": {
        "dropout": 0.2,
        "stochastic_depth": 0.2,
        "mixup": {"alpha": 0.4},
        "cutmix": {"alpha": 1.0},
        "label_smoothing": 0.1,
        "gradient_noise": {"std": 0.01, "decay": 0.55},
        "gradient_clip": 1.0,
    },
    "trainer": {"epochs": EPOCHS, "threads": 1},
}
CASES = {
    "ema": {"averaging": {"name": "ema", "ema": {"decay": 0.8}}, "schedule": {"name": "cosine"}},
    "swa": {
        "averaging": {"name": "swa", "swa": {"start": 0.3, "lr": 0.5}},
        "schedule": {"name": "one_cycle"},
        "optimizer": {"name": "AdamW"},
    },
    "plateau": {
        "schedule": {"name": "plateau", "plateau": {"patience": 1, "cooldown": 0, "gamma": 0.5, "min_delta": 100.0}},
        "trainer": {"epochs": 6, "threads": 1, "early_stopping": {"patience": 3, "min_delta": 100.0}},
        "optimizer": {"name": "Muon"},
    },
    "grown": {
        "batch": {"size": 32, "microbatch": 16, "growth": {"at": [0.5], "factor": 2}, "sampling": "balanced"},
        "schedule": {"name": "step"},
        "optimizer": {"name": "RMSprop"},
    },
    "one step an epoch": {
        "batch": {"size": 150, "microbatch": 150},
        "optimizer": {"name": "LBFGS"},
        "regularization": {"dropout": 0.2, "label_smoothing": 0.1},
    },
    "searched": {"optimizer": {"SGD": {"lr": "auto"}, "sam": {"rho": 0.05}}, "batch": {"size": 30, "microbatch": 30}},
}


class Killed(BaseException):
    """Stands for SIGKILL, which a process sends to itself in tests/pipeline: here nothing is left but the files too."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(
        tmp_path_factory.mktemp("inputs"), policy=[{"HorizontalFlip": {"p": 0.5}}, {"RandomPadCrop": {"padding": 0.2}}]
    )


class Seen(pl.Callback):
    """Counts hooks, and kills at one of them."""

    def __init__(self, hook: str = "", number: int = 0):
        self.left, self.steps, self.points = number, 0, []
        if hook:
            setattr(self, hook, self.count)

    def count(self, *_):
        self.left -= 1
        if self.left < 0:
            raise Killed

    def on_before_optimizer_step(self, *_):
        self.steps += 1


def run(inputs, root: Path, name: str = "ema", callbacks=(), log=None, **overrides):
    options = {**DRAWING, **CASES[name], **overrides}
    hardware = {"accelerator": "cpu", "devices": 1, "num_workers": 0, "checkpoint_every": "1 step"}
    options["hardware"] = hardware | options.get("hardware", {})
    return fit(
        name="a",
        store=inputs[0],
        augmented=inputs[1],
        out=root / "out",
        seed=0,
        state=RunState(root / "state", PRINT),
        callbacks=tuple(callbacks),
        log=log,
        **sections(**options),
    )


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted((root / "out").rglob("*")) if p.is_file()}


HOOKS = (
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_validation_batch_start",
    "on_train_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
)


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(inputs, tmp_path, name, capsys):
    logged: list = []
    whole = run(inputs, tmp_path / "whole", name, log=lambda values, step: logged.append((step, dict(values))))
    draw = random.Random(name)
    points: list = []
    # The last of them has to leave the others something to be killed in.
    for hook in [*draw.sample(HOOKS[:-1], 3), "on_train_end"]:
        killer = Seen(hook, draw.randrange(1 if "one step" in name else 4) if "batch" in hook or "step" in hook else 0)
        with pytest.raises(Killed):
            run(inputs, tmp_path / "killed", name, [killer], lambda values, step: points.append((step, dict(values))))
        assert not (tmp_path / "killed" / "out").exists()
    result = run(inputs, tmp_path / "killed", name, log=lambda values, step: points.append((step, dict(values))))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert result.rows == whole.rows and result.best_epoch == whole.best_epoch
    assert result.range_test == whole.range_test
    # Every figure came at least once, with the same value.
    assert {(step, json.dumps(v, sort_keys=True)) for step, v in points} == {
        (step, json.dumps(v, sort_keys=True)) for step, v in logged
    }
    if name == "plateau":
        assert len(whole.rows) == 4  # of 6: stopped early


class Signalled(pl.Callback):
    """Sends a signal to the loader processes, from another one, as a terminal or a scheduler does to all processes."""

    def __init__(self, signum: int):
        self.signum, self.microbatches = signum, 0

    def on_train_batch_start(self, *_):
        self.microbatches += 1
        if self.microbatches == 3:
            pids = [str(child.pid) for child in multiprocessing.active_children()]
            assert len(pids) == 2
            subprocess.run(["kill", f"-{self.signum}", *pids], check=True)
            time.sleep(0.3)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="signals of POSIX")
def test_loader_processes_outlive_signals_that_the_trainer_gets_too(inputs, tmp_path):
    """They go on until it has finished its step; it would fail for the lack of a batch."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        root = tmp_path / signal.Signals(signum).name
        run(
            inputs,
            root,
            callbacks=[Signalled(signum)],
            hardware={"num_workers": 2},
            trainer={"epochs": 1, "threads": 1},
        )
        assert (root / "out").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_no_step_is_made_twice_after_a_checkpoint(inputs, tmp_path, workers):
    """Killed between two microbatches of step 7, with a checkpoint after each step; an epoch has 4 steps, 10 microbatches."""
    hardware = {"num_workers": workers}
    with pytest.raises(Killed):
        run(inputs, tmp_path / "killed", callbacks=[Seen("on_train_batch_end", 17)], hardware=hardware)
    seen = Seen()
    run(inputs, tmp_path / "killed", callbacks=[seen], hardware=hardware)
    run(inputs, tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert seen.steps == 4 * EPOCHS - 6


def test_a_run_that_is_resumed_says_so(inputs, tmp_path, capsys):
    with pytest.raises(Killed):
        run(inputs, tmp_path, callbacks=[Seen("on_train_batch_end", 6 * 3)])
    run(inputs, tmp_path)
    assert "a: resuming train@a at epoch 2, step 6\n" in capsys.readouterr().err
    run(inputs, tmp_path)
    assert f"a: resuming train@a after the last step, {4 * EPOCHS}\n" in capsys.readouterr().err


def test_another_recipe_starts_anew_and_says_so(inputs, tmp_path, capsys):
    with pytest.raises(Killed):
        run(inputs, tmp_path, callbacks=[Seen("on_train_batch_end", 18)])
    state = RunState(tmp_path / "state", PRINT | {"data": "x", "code": "y"})
    assert state.begun() == ["data", "code"]
    capsys.readouterr()
    assert not state.begin()
    line = "state: data and code changed since the run that was interrupted here: starting anew\n"
    assert capsys.readouterr().err == line
    assert state.begun() == [] and [path.name for path in state.folder.iterdir()] == ["fingerprint.json"]
    # What a run left that was killed while it wrote a checkpoint goes; what it had written stays.
    for name in ("checkpoint-0000000002.tmp", "checkpoint-0000000001.ckpt"):
        (state.folder / name).touch()
    assert state.begin() and capsys.readouterr().err == ""
    assert sorted(path.name for path in state.folder.iterdir()) == ["checkpoint-0000000001.ckpt", "fingerprint.json"]


def test_a_checkpoint_that_cannot_be_read_gives_way_to_the_one_before(inputs, tmp_path, capsys):
    with pytest.raises(Killed):
        run(inputs, tmp_path, callbacks=[Seen("on_train_batch_end", 18)])
    state = RunState(tmp_path / "state", PRINT)
    *_, before, last = sorted(state.folder.glob("*.ckpt"))
    content = last.read_bytes()
    said: list[str] = []
    for damaged in (content[: len(content) // 2], b"", bytes([*content[:2000], content[2000] ^ 255, *content[2001:]])):
        last.write_bytes(damaged)
        found = newest(state, 1, said.append)
        assert found is not None and found.path == before, len(damaged)
    assert len(said) == 3 and all(str(last) in line for line in said)
    run(inputs, tmp_path)
    run(inputs, tmp_path / "whole")
    assert contents(tmp_path) == contents(tmp_path / "whole")


def test_the_newest_and_an_epochs_start_are_kept(inputs, tmp_path):
    with pytest.raises(Killed):
        run(inputs, tmp_path, callbacks=[Seen("on_train_batch_end", 29)])
    state = RunState(tmp_path / "state", PRINT)
    names = sorted(path.name for path in state.folder.iterdir())
    assert names == [
        "checkpoint-0000000008-epoch.ckpt",
        "checkpoint-0000000010.ckpt",
        "checkpoint-0000000011.ckpt",
        "fingerprint.json",
    ]
    said: list[str] = []
    found = newest(state, 2, said.append)
    assert found is not None and found.position == Position(epoch=2, round=0, step=8, world_size=1)
    assert len(said) == 2 and "1 processes, and this run has 2" in said[0]


def test_a_checkpoint_holds_no_pickled_code(inputs, tmp_path):
    with pytest.raises(Killed):
        run(inputs, tmp_path, "swa", callbacks=[Seen("on_train_batch_end", 18)])
    path = sorted((tmp_path / "state").glob("*.ckpt"))[-1]
    assert read(path)["anneal"]["fingerprint"] == PRINT
    evil = tmp_path / "state" / "checkpoint-9999999999.ckpt"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"anneal": Evil()}, evil)
    said: list[str] = []
    found = newest(RunState(tmp_path / "state", PRINT), 1, said.append)
    assert found is not None and found.path == path and str(evil) in said[0]
    assert not (tmp_path / "made").exists()
    # It must not take the place of a good one in the run that goes on.
    with pytest.raises(Killed):
        run(inputs, tmp_path, "swa", callbacks=[Seen("on_train_batch_end", 8)])
    assert not evil.exists() and len(list((tmp_path / "state").glob("*.ckpt"))) >= checkpoint.KEPT


def test_writing_leaves_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-0000000001.ckpt"
    checkpoint.write(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError):
                checkpoint.write(path, {"x": torch.zeros(3)})
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    if Path("/dev/full").exists():
        path.with_suffix(".tmp").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left") as full:
            checkpoint.write(path, {"x": torch.zeros(30_000)})
        assert full.value.errno == errno.ENOSPC and full.value.filename == str(path)
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    checkpoint.write(path, {"x": torch.zeros(3)})
    assert zipfile.is_zipfile(path) and path.read_bytes() != before


def test_a_member_has_one_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr("anneal.training.state.PATIENCE", 0.2)
    with claimed(tmp_path / "a", "a"):
        with claimed(tmp_path / "b", "b"):
            pass
        refused = pytest.raises(UserError, match=rf"train@a: another process \({os.getpid()}\) trains this member")
        with refused, claimed(tmp_path / "a", "a"):
            pass
    with claimed(tmp_path / "a", "a"):
        pass


def test_intervals_and_fingerprints(tmp_path):
    assert interval("60s") == (60.0, None) and interval("2 h") == (7200.0, None) and interval("1 step")[1] == 1
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").write_text("1")
    code = tmp_path / "code.py"
    code.write_text("1")
    first = fingerprint({"a": 1}, [tmp_path / "data"], [code])
    assert changed(first, fingerprint({"a": 1}, [tmp_path / "data"], [code])) == []
    assert changed(first, fingerprint({"a": 2}, [tmp_path / "data"], [code])) == ["params"]
    (tmp_path / "data" / "y").write_text("")
    code.write_text("2")
    assert changed(first, fingerprint({"a": 1}, [tmp_path / "data"], [code])) == ["data", "code"]
