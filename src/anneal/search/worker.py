"""The process that trains: it takes trials from its standard input and answers on its output, one JSON text a line.

A training that brings its process down, such as by taking all memory, so costs a trial and not the search; and one whose
search is killed sees its input close, writes its checkpoint and leaves.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import anneal
from anneal.params import MEMBER_SECTIONS, UserError
from anneal.recipe import Recipe
from anneal.store import fresh_folder, open_store, write_text
from anneal.studies.run import TRAINING
from anneal.training.fit import fit
from anneal.training.history import Epoch, History
from anneal.training.interruption import Interrupted
from anneal.training.state import RunState, claimed, fingerprint

Report = Callable[[int, Mapping[str, float]], bool]
"""Called with an epoch's number, from 1, and its figures; returns whether the training is to end there."""

CODE = (
    *(
        "augment.py",
        "batching.py",
        "diagnosis/live.py",
        "mixing.py",
        "models",
        "optimizers",
        "params.py",
        "processes.py",
    ),
    *("schedules.py", "seeding.py", "store.py", "training", "transforms.py"),
)
"""What of this package has a part in a training: a run goes on from a checkpoint of the same alone."""

DIVERGED = ("training diverged", "training stopped by trainer.stop_on")
"""How the faults begin that say something of the settings and nothing else."""

FIGURES = ("train_loss", "val_loss", "val_accuracy", "val_average_loss", "val_average_accuracy")
"""Columns of history.csv that a trial keeps."""


class Reporter(History):
    """Report each epoch once its validation is over and before a checkpoint of it is written.

    Parameters
    ----------
    report
        See `Report`.
    """

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Report the newest row of a run that goes on once more: whoever was told may have been gone."""
        if self.rows and self.report(self.rows[-1].epoch, figures(self.rows[-1])):
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Report the newest row, and end the training where that is the answer."""
        row = self.rows[-1]
        if self.report(row.epoch, figures(row)):
            trainer.should_stop = True


def figures(row: Epoch) -> dict[str, float]:
    """Return the figures of an epoch by their names in MLflow, without those that were not measured."""
    values = asdict(row)
    return {"/".join(name.rsplit("_", 1)): values[name] for name in FIGURES if values[name] is not None}


def train(job: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Train a member as a trial, on from its checkpoint where it has one, and return how it ended, as plain values.

    Parameters
    ----------
    job
        ``number`` and ``folder`` of the trial, its whole params as ``recipe``, ``store`` and ``augmented``, folders, and
        ``policy``: whether the trial's own policy takes the place of the one in ``augmented``.
    report
        See `Report`.

    Raises
    ------
    Interrupted
        By a signal; a checkpoint was written.
    """
    recipe, folder, store = job["recipe"], Path(job["folder"]), Path(job["store"])
    name = f"trial {job['number']}"
    reporter = Reporter(report)
    end: dict[str, Any] = {}
    try:
        sections = Recipe.model_validate(recipe)
        augmented = own_policy(recipe, store, folder / "augmented") if job["policy"] else Path(job["augmented"])
        package = Path(anneal.__file__).parent
        state = RunState(
            folder / "state",
            fingerprint(
                {key: recipe[key] for key in MEMBER_SECTIONS},
                data=[store / "dataset.json", augmented],
                code=[package / name for name in CODE],
            ),
        )
        with claimed(state.folder, name):
            result = fit(
                name=name,
                store=store,
                augmented=augmented,
                out=folder / "member",
                seed=recipe["seed"],
                state=state,
                callbacks=(reporter,),
                **{section: getattr(sections, section) for section in TRAINING},
            )
        end = {"end": "complete", "best_epoch": result.best_epoch, "weights": result.weights}
    except UserError as error:
        text = str(error)
        end = {"end": "diverged" if text.startswith(DIVERGED) else "failed", "reason": text}
    return {**end, "epochs": [{"epoch": row.epoch, "step": row.step, **figures(row)} for row in reporter.rows]}


def own_policy(recipe: Mapping[str, Any], store: Path, folder: Path) -> Path:
    """Write the compiled policy of a trial, as stage `augment` would, and return its folder."""
    from anneal.augment import compile_policy, policy_to_json

    info = open_store(store).info
    policy = recipe["augment"]["policy"]
    text = policy_to_json(compile_policy(policy, height=info.height, width=info.width, channels=info.channels))
    with fresh_folder(folder) as unfinished:
        write_text(unfinished / "policy.json", text)
    return folder


# ---- the two pipes --------------------------------------------------------------------------------------------------


class Pipes:
    """The lines to and from the search."""

    def __init__(self, source: TextIO, sink: TextIO) -> None:
        self.source, self.sink = source, sink
        self.lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.busy = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.source:
            self.lines.put(json.loads(line))
        if self.busy:  # the search is gone: the run ends as by a scheduler's signal, with a checkpoint
            os.kill(os.getpid(), signal.SIGTERM)
        self.lines.put(None)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message."""
        try:
            print(json.dumps(message), file=self.sink, flush=True)
        except OSError:  # `_listen` sees that the search is gone, too
            pass

    def ask(self, epoch: int, values: Mapping[str, float]) -> bool:
        """Report an epoch and return the answer."""
        self.send({"epoch": epoch, "values": dict(values)})
        answer = self.lines.get()
        return answer is not None and bool(answer["stop"])


def main() -> None:
    """Train what comes until the input closes."""
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    pipes = Pipes(sys.stdin, sink)
    pipes.send({"ready": True})  # what comes before took seconds that belong to no trial
    while (job := pipes.lines.get()) is not None:
        with open(job["log"], "ab") as log:
            os.dup2(log.fileno(), 2)
            os.dup2(log.fileno(), 1)
        pipes.busy = True
        try:
            answer = train(job, pipes.ask)
        except Interrupted as stop:
            os._exit(stop.exit_code)
        except Exception as error:  # of a model or an augmentation that a user wrote, for one
            traceback.print_exc()
            sys.stderr.flush()
            answer = {
                "end": "failed",
                "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                "epochs": [],
            }
        pipes.busy = False
        pipes.send(answer)


if __name__ == "__main__":
    main()
