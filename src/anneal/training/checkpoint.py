"""Checkpoints that an interrupted run goes on from, with the bytes of a run that was not."""

from __future__ import annotations

import os
import re
import signal
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from anneal.training.interruption import Interrupted, Interruptions
from anneal.training.lr_curve import LRRange
from anneal.training.state import RunState

if TYPE_CHECKING:
    from anneal.training.data import Batch, StoreDataModule
    from anneal.training.module import TrainingModule

KEPT = 2
"""Newest checkpoints that are kept: where the newest cannot be read there is the one before."""

EPOCH_END = 0.1
"""Part of the interval after which an epoch's end is worth a checkpoint: short epochs would do little else."""

UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}

GO_ON, SAVE, STOP = 0, 1, 2
"""What processes agree on after an optimizer step; the largest wins."""


@dataclass(frozen=True)
class Position:
    """Where in a run a checkpoint was written.

    Parameters
    ----------
    epoch
        That the next forward pass belongs to, from 0.
    round
        Forward passes of it that each process has made; 0 at an epoch's start.
    step
        Optimizer steps made.
    world_size
        Processes.
    """

    epoch: int
    round: int
    step: int
    world_size: int

    def fits(self, world_size: int) -> bool:
        """Return whether a run of so many processes can go on here: of another number only at an epoch's start."""
        return self.round == 0 or self.world_size == world_size


@dataclass(frozen=True)
class Found:
    """A checkpoint that can be gone on from.

    Parameters
    ----------
    path
        Of the file.
    position
        See `Position`.
    peak_rate
        Learning rate at factor 1 of the schedule.
    range_test
        What found it; None where params.yaml gave a number.
    """

    path: Path
    position: Position
    peak_rate: float
    range_test: LRRange | None


def interval(text: str) -> tuple[float, int | None]:
    """Return ``hardware.checkpoint_every`` as seconds and optimizer steps, of which one is set.

    >>> interval("60s"), interval("5 min"), interval("200 steps")
    ((60.0, None), (300.0, None), (inf, 200))
    """
    number, unit = re.fullmatch(r"([0-9]+) ?([a-z]+)", text).groups()  # type: ignore[union-attr]
    return (float(number) * UNITS[unit], None) if unit in UNITS else (float("inf"), int(number))


def newest(state: RunState, world_size: int, say: Callable[[str], None]) -> Found | None:
    """Return the newest checkpoint of a run that can be read and fits; None where there is none.

    Parameters
    ----------
    state
        Of the run.
    world_size
        Processes of the run that is to go on.
    say
        Called with a line on each that is passed over.
    """
    for path in sorted(state.folder.glob("checkpoint-*.ckpt"), reverse=True):
        try:
            content = read(path)
            ours = content["anneal"]
            position = Position(**ours["position"])
            test = ours["range_test"]
            found = Found(path, position, float(ours["peak_rate"]), None if test is None else _range_test(test))
        except Exception as error:  # whatever is in the file: it is only a shortcut
            say(f"{path} cannot be read ({type(error).__name__}: {_one_line(error)}); taking the one before")
            continue
        if ours.get("fingerprint") != state.fingerprint:
            say(f"{path} is of other params, data or code; passing it over")
        elif not position.fits(world_size):
            say(
                f"{path} was written within an epoch by {position.world_size} processes, and this run has {world_size}; "
                f"taking one at an epoch's start"
            )
        else:
            return found
    return None


def read(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, tensors and plain values; no pickled code is run.

    Raises
    ------
    Exception
        It is no checkpoint, is cut short, or its checksums do not agree.
    """
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} differs")
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def _range_test(values: dict[str, Any]) -> LRRange:
    return LRRange(**{**values, "descent": None if values["descent"] is None else tuple(values["descent"])})


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]


def write(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, flush it to the disk, and rename it.

    Raises
    ------
    OSError
        Such as for a full disk, with the name of the file; there is no new one then.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch hides what the system says behind a RuntimeError of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    # The name too has to outlive a power cut. Not every system lets a folder be opened.
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class WholeFiles(TorchCheckpointIO):
    """Have Lightning write checkpoints by `write`; its own way goes through the system's folder of temporary files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ARG002
        """Write a checkpoint to ``path``."""
        write(Path(path), checkpoint)


class Checkpoints(Checkpoint):
    """Write a checkpoint every so often after an optimizer step or an epoch's validation, and before a signal ends the run.

    Never inside an accumulation window, for gradients are in no checkpoint, and never between an epoch's last step and the
    end of its validation. Being a `Checkpoint`, it comes after all other callbacks.

    Parameters
    ----------
    state
        Of the run.
    every
        ``hardware.checkpoint_every``.
    interruptions
        Signals.
    range_test
        What found the learning rate; None where params.yaml gave a number.
    clock
        Seconds of a monotonic clock.
    """

    def __init__(
        self,
        state: RunState,
        every: str,
        *,
        interruptions: Interruptions,
        range_test: LRRange | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = state
        self.seconds, self.steps = interval(every)
        self.interruptions = interruptions
        self.range_test = range_test
        self.clock = clock
        self.saved_at = 0.0
        self.saved_step = 0
        self.stopped = False
        self.position: Position | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]  # noqa: ARG002
        """Start the clock; take over signals from Lightning, which has handlers of its own by now."""
        self.saved_at, self.saved_step = self.clock(), trainer.global_step
        self.interruptions.wait_for_step()
        if self.stopped:  # by early stopping, before the run was killed
            trainer.should_stop = True

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: pl.Trainer,
        pl_module: TrainingModule,
        outputs: Any,  # noqa: ARG002
        batch: Batch,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Save, and stop where a signal came, if this microbatch ended a step that is not the epoch's last."""
        epoch = trainer.current_epoch
        plan = pl_module.plan[epoch]
        if (batch_idx + 1) % plan.accumulation or plan.ends_epoch(batch_idx):
            return
        self._act(trainer, epoch, batch_idx + 1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]  # noqa: ARG002
        """Save after the epoch's validation, if it is worth it, and stop where a signal came."""
        self._act(trainer, trainer.current_epoch + 1, 0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]  # noqa: ARG002
        """Let signals end the process at once again."""
        self.interruptions.end()

    def on_exception(self, trainer: pl.Trainer, pl_module: TrainingModule, exception: BaseException) -> None:  # type: ignore[override]  # noqa: ARG002
        """Let signals end the process at once again."""
        self.interruptions.end()

    def _act(self, trainer: pl.Trainer, epoch: int, number: int) -> None:
        action = self._agreed(trainer, at_epoch_end=number == 0)
        if action == GO_ON:
            return
        self.save(trainer, Position(epoch, number, trainer.global_step, trainer.world_size))
        if action == STOP:
            # Another process may be the one that got it.
            self.interruptions.signum = self.interruptions.signum or signal.SIGTERM
            raise Interrupted(self.interruptions.signum)

    def _agreed(self, trainer: pl.Trainer, at_epoch_end: bool) -> int:
        """Return what is to be done now, the same in all processes."""
        steps_over = self.steps is not None and (at_epoch_end or trainer.global_step - self.saved_step >= self.steps)
        # Clocks differ: that of the first process counts.
        elapsed = self.clock() - self.saved_at if trainer.is_global_zero else 0.0
        time_over = elapsed >= self.seconds * (EPOCH_END if at_epoch_end else 1.0)
        action = SAVE if steps_over or time_over else GO_ON
        if self.interruptions.signum is not None:
            action = STOP
        if trainer.world_size > 1:
            wanted = torch.tensor(action, device=trainer.strategy.root_device)
            action = int(trainer.strategy.all_gather(wanted).max())
        return action

    def save(self, trainer: pl.Trainer, position: Position) -> None:
        """Write a checkpoint, and delete those that are no longer needed; every process takes part."""
        self.stopped, self.position = trainer.should_stop, position
        data: StoreDataModule = trainer.datamodule  # type: ignore[attr-defined]
        data.position = (position.epoch, position.round)
        kind = "-epoch" if position.round == 0 else ""
        trainer.save_checkpoint(self.state.folder / f"checkpoint-{position.step:010}{kind}.ckpt")
        if trainer.is_global_zero:
            self._clean(position.step)
        self.saved_at, self.saved_step = self.clock(), position.step

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: TrainingModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]  # noqa: ARG002
        """Add what `newest` reads."""
        assert self.position is not None
        if self.position.round == 0:
            _end_epoch(checkpoint["loops"]["fit_loop"])
        checkpoint["anneal"] = {
            "fingerprint": dict(self.state.fingerprint),
            "position": asdict(self.position),
            "peak_rate": pl_module.peak_rate,
            "range_test": None if self.range_test is None else asdict(self.range_test),
        }

    def _clean(self, step: int) -> None:
        """Delete all but the newest, and the newest of an epoch's start, where any number of processes can go on.

        Those of later steps are what `newest` passed over: they would take the place of good ones.
        """
        found = sorted(self.state.folder.glob("checkpoint-*.ckpt"), reverse=True)
        made = [path for path in found if path.name < f"checkpoint-{step + 1:010}"]
        starts = [path for path in made if path.stem.endswith("-epoch")]
        for path in found:
            if path not in made[:KEPT] and path not in starts[:1]:
                path.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """Return whether the run was about to end early."""
        return {"stopped": self.stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.stopped = state_dict["stopped"]


def _end_epoch(fit_loop: dict[str, Any]) -> None:
    """Set the progress of Lightning's loops, as it is in the hook after an epoch, to what it will be a moment later.

    A run then goes on as one that had ended here, with a new epoch. From the progress as it is, Lightning would go once
    more through the hooks of the old epoch's end, without the figures that these read.
    """
    epochs = fit_loop["epoch_progress"]
    for progress in (epochs["total"], epochs["current"]):
        progress["completed"] = progress["processed"]
    batches = fit_loop["epoch_loop.batch_progress"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
