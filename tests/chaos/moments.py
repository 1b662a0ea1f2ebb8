"""Moments of a training run at which it can be killed: each is a call of a named function."""

from __future__ import annotations

from dataclasses import dataclass

STATE = r"\.anneal/train/[^/]+/"
TRAINING = "anneal.training.module:TrainingModule."


@dataclass(frozen=True)
class Moment:
    """A call of a function.

    Parameters
    ----------
    functions
        ``module:attribute``; any of them counts.
    calls
        The call whose turn it is lies between these two, from 1, in the process at hand.
    after
        Whether it is the end of the call; else its beginning.
    path
        Expression that a path among the arguments (the last one, or that of a file descriptor) must match to count.
    in_window
        Whether calls count only within an accumulation window that is still open.
    cut
        Whether the file of the descriptor first loses its second half, as if it was not written yet.
    is_final
        Whether the run trains no more after it.
    """

    functions: tuple[str, ...]
    calls: tuple[int, int] = (1, 1)
    after: bool = False
    path: str = ""
    in_window: bool = False
    cut: bool = False
    is_final: bool = False


MOMENTS = {
    "start": Moment(("anneal.training.fit:set_up",), after=True),
    "mid-batch": Moment((TRAINING + "training_step",), (5, 36), after=True),
    "inside a window": Moment((TRAINING + "on_after_backward",), (4, 26), after=True, in_window=True),
    "before the step": Moment((TRAINING + "on_before_optimizer_step",), (3, 9)),
    "after the step": Moment((TRAINING + "optimizer_step",), (3, 9), after=True),
    "validation": Moment((TRAINING + "validation_step",), (1, 2), after=True),
    "validation's end": Moment((TRAINING + "on_validation_epoch_end",), (1, 2), after=True),
    "epoch's end": Moment(("pytorch_lightning.loops.fit_loop:_FitLoop.on_advance_end",), (1, 2)),
    "epoch's very end": Moment(("pytorch_lightning.loops.fit_loop:_FitLoop.on_advance_end",), (1, 2), after=True),
    "checkpoint half written": Moment(("os:fsync",), (2, 6), path=STATE + r".*\.tmp$", cut=True),
    "checkpoint not renamed": Moment(("os:replace", "os:rename"), (2, 6), path=STATE + r"checkpoint-\d+.*\.ckpt$"),
    "checkpoint renamed": Moment(("os:replace", "os:rename"), (2, 6), after=True, path=STATE + r"checkpoint-.*\.ckpt$"),
    "old checkpoint goes": Moment(("os:unlink", "os:remove"), (1, 4), path=STATE + r"checkpoint-.*\.ckpt$"),
    "after the last step": Moment(("anneal.training.fit:write_member",), is_final=True),
    "weights being written": Moment(("anneal.training.fit:write_json",), is_final=True),
    "outs not renamed": Moment(("os:replace",), path=r"models/[^/]+$", is_final=True),
    "run finished": Moment(("anneal.training.state:RunState.forget",), is_final=True),
    "outs renamed": Moment(("os:replace",), after=True, path=r"models/[^/]+$", is_final=True),
}

WHOM = {
    "trainer": "the training process alone",
    "dvc": "dvc alone, whose trainer is then told by the system",
    "all": "dvc with all its descendants",
}
