"""The exported predictor: which views, members and calibration it has, all of which is chosen and fitted on validation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from anneal import calibration, tta, views
from anneal.ensemble import COMBINE, FITTED, Floats, combined, probability_mean
from anneal.predicting import Predictions
from anneal.views import View


@dataclass(frozen=True)
class Export:
    """How the members' predictions become one.

    Parameters
    ----------
    views, average
        Parsed views, in order of their choice, and how they are averaged.
    combine, weights
        See `anneal.ensemble.combined`; a weight a member.
    calibration, why
        As `anneal.calibration.choose` returns them.
    """

    views: list[View]
    average: str
    combine: str
    weights: list[float] | None
    calibration: dict[str, Any]
    why: dict[str, Any]

    @property
    def is_calibrated(self) -> bool:
        """Whether some calibration was kept."""
        return bool(self.calibration["kind"] != "none")

    def uncalibrated(self, found: Predictions) -> Floats:
        """Return what it says before calibration: log-probabilities, float64 (N, K)."""
        return combined(found.averaged, self.combine, self.weights)

    def described(self, members: Sequence[str]) -> dict[str, Any]:
        """Return what reports/evaluation/predictor.json says; members without weight are not in it."""
        used = [index for index in range(len(members)) if self.weights is None or self.weights[index]]
        return {
            "members": [members[index] for index in used],
            "combine": self.combine,
            **({} if self.weights is None else {"weights": [self.weights[index] for index in used]}),
            "views": views.entries_of(self.views),
            "average": self.average,
            "temperature": self.calibration.get("temperature", 1.0),
            "calibration": {**self.why, **self.calibration},
        }


def needs_val(*, combine: str, calibrate: str, select: str) -> bool:
    """Say whether anything of the exported predictor is chosen or fitted."""
    return calibrate != "none" or select == "greedy" or combine in FITTED


def choose(
    val: Predictions | None, listed: Sequence[View], *, average: str, combine: str, calibrate: str, select: str
) -> Export:
    """Choose views, then fit the members' weights, then the calibration.

    Parameters
    ----------
    val
        What the members predict of the validation split, under the identity and all of ``listed``; None where `needs_val`
        says that nothing is fitted.
    listed
        The views of ``evaluate.tta.views``.
    average, combine, calibrate, select
        As for `anneal.evaluation.evaluate`.
    """
    kept = list(listed)
    if select == "greedy":
        assert val is not None
        shown = views.with_identity(listed)
        # Weights of members are fitted once the views are known.
        simple = COMBINE.get(combine, probability_mean)
        arguments = tta_arguments(shown, val.size, average, simple)
        chosen = tta.select_greedy(val.by_view[:, : len(shown)], val.labels, calibrate=calibrate != "none", **arguments)
        kept = [shown[index] for index in chosen]
        print(f"views chosen on val: {', '.join(views.label_of(view) for view in kept)}", file=sys.stderr)
    weights = None
    calibrated, why = {"kind": "none"}, {"asked": "none", "kind": "none"}
    if val is not None:
        val = replace(val, averaged=val.over(kept, average))
        weights = weigh(val, combine)
        if calibrate != "none":
            together = combined(val.averaged, combine, weights)
            calibrated, why = calibration.choose(together, val.labels, calibrate)
            if calibrated["kind"] == "none":
                print(f"calibration: {calibrate} does not help on val, and is left out", file=sys.stderr)
    return Export(kept, average, combine, weights, calibrated, why)


def weigh(val: Predictions | None, combine: str, indices: Sequence[int] | None = None) -> list[float] | None:
    """Return the weights of all members or of those with these indices, fitted on validation; None where ``combine`` has none."""
    if combine not in FITTED:
        return None
    assert val is not None
    return FITTED[combine](val.averaged if indices is None else val.averaged[list(indices)], val.labels)


def tta_arguments(shown: Sequence[View], size: tuple[int, int], average: str, combine: tta.Combine) -> dict[str, Any]:
    """Return what `anneal.tta.select_greedy` and `anneal.tta.table` want to know of the views."""
    return {
        "weights": views.num_images(shown, *size),
        "costs": views.passes(shown, *size),
        "average": average,
        "combine": combine,
        "start": list(shown).index(views.IDENTITY),
    }
