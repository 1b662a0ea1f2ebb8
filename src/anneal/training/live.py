"""What is certain while a run goes on, said at once, and where it is asked for the end of the run."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from tqdm import tqdm

from anneal.diagnosis.live import dead_at_start, diverged
from anneal.params import UserError

if TYPE_CHECKING:
    from anneal.models.initial_statistics import LayerStatistics
    from anneal.training.history import Steps
    from anneal.training.module import TrainingModule

Tell = Callable[[str, str], None]
"""Called with a key and words, such as `anneal.tracking.Run.tag`."""

ADVICE = {
    "diverging": "lower optimizer.{optimizer}.lr, lengthen schedule.warmup.length, or set regularization.gradient_clip: 1.0",
    "dead_at_start": "try init.name: kaiming_normal or lsuv, model.norm.name: batch, or model.activation: LeakyReLU",
}


class LiveFindings(pl.Callback):
    """Say the first finding that is certain, on stderr and to ``tell``, and stop the run where `stop_on` names it.

    Reads what is measured anyway: initial statistics before the first step, losses at the end of each epoch, where steps.csv
    gets its rows. Changes nothing of a run that goes on. A loss that is no number never gets here: it stops a run by itself.
    A resumed run does not say again what was said before its checkpoint. One that was stopped has no checkpoint of the epoch
    that stopped it, so that it stops there again if nothing has changed.

    Parameters
    ----------
    name
        Of the member, before the line.
    stop_on
        ``trainer.stop_on``.
    initial
        Of each layer, before the first step.
    steps
        Which collects rows before this callback is called.
    optimizer
        ``optimizer.name``, for the advice.
    chance
        Training loss of a network that knows nothing; infinite where that is not known.
    tell
        Where else the finding goes, as ``live.finding``.
    """

    def __init__(
        self,
        name: str,
        *,
        stop_on: Sequence[str],
        initial: Sequence[LayerStatistics],
        steps: Steps,
        optimizer: str,
        chance: float = math.inf,
        tell: Tell | None = None,
    ) -> None:
        self.name, self.stop_on, self.steps = name, tuple(stop_on), steps
        self.optimizer, self.chance, self.tell = optimizer, chance, tell
        self.initial = [asdict(row) for row in initial]
        self.found: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        """Look at the initial weights."""
        # Where layers were loaded from elsewhere and frozen, no gradient reaches them by design.
        if pl_module.freezing is None:
            self.say(trainer, "dead_at_start", dead_at_start(self.initial), "before the first step")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]  # noqa: ARG002
        """Look at the losses so far."""
        figures = diverged([row.loss for row in self.steps.rows], self.chance)
        if figures is not None and figures["highest_loss_step"] is not None:
            row = self.steps.rows[int(figures["highest_loss_step"]) - 1]
            figures["highest_loss_step"] = float(row.step)
        self.say(trainer, "diverging", figures, f"by the end of epoch {trainer.current_epoch + 1}")

    def say(self, trainer: pl.Trainer, finding: str, figures: Mapping[str, float | None] | None, when: str) -> None:
        """Say a finding if it is the first, and stop the run if it is to."""
        if figures is None:
            return
        seen = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in figures.items() if value is not None)
        advice = ADVICE[finding].format(optimizer=self.optimizer)
        words = f"{finding.replace('_', ' ')}, {when} ({seen}); {advice}"
        if self.found is None and trainer.is_global_zero:
            hint = "" if finding in self.stop_on else f"; trainer.stop_on: [{finding}] stops such a run"
            # Above the progress bar, where there is one.
            tqdm.write(f"{self.name}: warning: {words}{hint}", file=sys.stderr)
            if self.tell is not None:
                self.tell("live.finding", words)
        self.found = self.found or finding
        if finding in self.stop_on:
            raise UserError(f"training stopped by trainer.stop_on: {words}")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: what was found. The losses are in the state of ``steps``."""
        return {"found": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.found = state_dict["found"]
