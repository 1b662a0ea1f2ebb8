"""Does calibration help on other images? Finished runs, their val and test images drawn anew into images to fit and to measure on.

python bench/calibration.py FOLDER...   # each holds data/processed and models/
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from anneal import calibration, metrics, views
from anneal.ensemble import Floats, probability_mean
from anneal.evaluation import load_members, predict_split
from anneal.store import open_store

DRAWS, FITTED_ON = 40, 179
NONE = {"kind": "none"}


def measure(label: str, predictions: Floats, labels: metrics.Integers) -> None:
    """Print the likelihood of each way to calibrate, and how often it was worse than not to."""
    losses: dict[str, list[float]] = {}
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(labels))
        fit, rest = order[:FITTED_ON], order[FITTED_ON:]
        ways = {"none": NONE}
        for kind in ("temperature", "vector"):
            ways[f"{kind}, always"] = calibration.KINDS[kind](predictions[fit], labels[fit])
            ways[f"{kind}, by the rule"], _ = calibration.choose(predictions[fit], labels[fit], kind)
        for name, fitted in ways.items():
            p = np.exp(calibration.apply(predictions[rest], fitted))
            losses.setdefault(name, []).append(metrics.nll(p, labels[rest]))
    for name, values in losses.items():
        worse = int((np.array(values) > np.array(losses["none"]) + 1e-9).sum())
        print(f"{label:>10}  {name:<26} {np.mean(values):.4f}  worse in {worse} of {DRAWS}")


def main() -> None:
    """Measure each folder's first member, and its members together."""
    for folder in map(Path, sys.argv[1:]):
        store = open_store(folder / "data/processed")
        members = {path.parent.name: path.parent for path in sorted(folder.glob("models/*/model.json"))}
        classifiers, _ = load_members(store, members, "cpu")
        found = [
            predict_split(classifiers, store.split(name), [views.IDENTITY], "probability", list(members))
            for name in ("val", "test")
        ]
        plain, labels = (
            np.concatenate([of.plain for of in found], axis=1),
            np.concatenate([of.labels for of in found]),
        )
        print(f"{folder}: {len(labels)} images, {len(members)} members")
        measure("one", plain[0], labels)
        measure("ensemble", probability_mean(plain), labels)


if __name__ == "__main__":
    main()
