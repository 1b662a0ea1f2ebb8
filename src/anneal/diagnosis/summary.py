"""What was found in all members: the content of reports/diagnosis.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from anneal.diagnosis.curves import Run
from anneal.diagnosis.rules import RULES, diagnose


def summarize(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Return reports/diagnosis.json: counts of findings at the top, for each member its figures and findings."""
    members: dict[str, Any] = {}
    for name, run in runs.items():
        loss, accuracy = run.curve("val_loss"), run.curve("val_accuracy")
        finite = np.where(np.isfinite(loss), loss, np.inf)
        members[name] = {
            "epochs": len(loss),
            "lowest_val_loss": _number(finite.min()),
            "lowest_val_loss_epoch": int(finite.argmin()) + 1,
            "last_val_loss": _number(loss[-1]),
            "last_val_accuracy": _number(accuracy[-1]),
            "last_gap": _number(run.gap),
            "findings": [
                {
                    "name": finding.name,
                    "confidence": finding.confidence,
                    "evidence": finding.evidence,
                    "change": [{"key": key, "try": advice} for key, advice in finding.change.items()],
                    "epochs": list(finding.epochs) if finding.epochs else None,
                }
                for finding in diagnose(run)
            ],
        }
    found = [finding["name"] for member in members.values() for finding in member["findings"]]
    counts = {name: found.count(name) for name in RULES}
    return {**counts, "healthy": sum(not member["findings"] for member in members.values()), "members": members}


def marks(summary: Mapping[str, Any]) -> list[tuple[str, str, int, int]]:
    """Return member, finding, first and last epoch of each finding that curves show, in the order of `RULES`."""
    found = [
        (name, finding["name"], *finding["epochs"])
        for name, member in summary["members"].items()
        for finding in member["findings"]
        if finding["epochs"]
    ]
    return sorted(found, key=lambda mark: list(RULES).index(mark[1]))


def words(summary: Mapping[str, Any]) -> list[str]:
    """Return a line a member, such as ``a: overfitting (high confidence)``, or ``b: healthy``."""
    found = {
        name: ", ".join(f"{finding['name']} ({finding['confidence']} confidence)" for finding in member["findings"])
        for name, member in summary["members"].items()
    }
    return [f"{name}: {line or 'healthy'}" for name, line in found.items()]


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
