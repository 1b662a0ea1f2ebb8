"""The table of an ablation: its rows, what each technique earns, what pairs earn beyond their sum; and its words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from anneal import params
from anneal.ablation.effects import Effect, accuracies, effect, in_words, interaction
from anneal.ablation.results import Predictions
from anneal.ablation.techniques import Technique
from anneal.metrics import Floats, nll

FULL, BARE = "full recipe", "bare baseline"
"""Labels of what the others are compared with."""

WORDS = {"better": "helps", "worse": "hurts", "no difference shown": "no difference shown"}
"""An effect's verdict, of a technique."""


@dataclass(frozen=True)
class Row:
    """A technique in the table.

    Parameters
    ----------
    name, title
        Of the technique; ``FULL`` and ``BARE`` have no effect of their own.
    settings
        What switches it off, as lines of params.yaml.
    accuracies
        By seed, of the variant.
    nll
        Mean over seeds.
    effect
        What the technique earns: the full recipe less the one without it, or the baseline with it less the bare one.
    reason
        Why there are no figures.
    """

    name: str
    title: str
    settings: Sequence[str]
    accuracies: Sequence[float] = ()
    nll: float | None = None
    effect: Effect | None = None
    reason: str = ""


@dataclass(frozen=True)
class Ablation:
    """All that an ablation found.

    Parameters
    ----------
    values
        The recipe.
    seeds
        Member to seed.
    add
        Whether techniques were added to a bare baseline.
    rows
        What the others are compared with first, then the techniques by what they earn.
    pairs
        Of two techniques (title to title), what they earn beyond their sum.
    images
        Of ``val``.
    test
        Accuracy of the recipe's exported predictor on ``test`` and its interval; None where the recipe is not for test.
    command
        What was typed.
    """

    values: Mapping[str, Any]
    seeds: Mapping[str, int]
    add: bool
    rows: Sequence[Row]
    pairs: Mapping[tuple[str, str], Effect]
    images: int
    test: tuple[float, float, float] | None
    command: str

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return Path("studies/ablation-add" if self.add else "studies/ablation")


def label_of(*techniques: Technique, add: bool = False) -> str:
    """Return a variant's label, ``no label smoothing``; with ``add`` ``only label smoothing``."""
    return ("only " if add else "no ") + " nor ".join(technique.title for technique in techniques)


def table(
    predictions: Mapping[str, Predictions],
    on: Mapping[str, Technique],
    techniques: Mapping[str, Technique],
    reasons: Mapping[str, str],
    *,
    add: bool,
) -> list[Row]:
    """Return the rows of the table, those of techniques by what they earn, those without figures last.

    Members are judged one by one, over the recipe's views where it has some (in ``add``: where TTA is what is added); what
    ensembling earns is the ensemble of all seeds less the mean of its members.
    """
    views = "tta" in on
    full = predictions[FULL]
    reference = predictions[BARE] if add else full
    rows = [row(FULL, full, views)]
    if add:
        rows.append(row(BARE, reference, views=False))
    base = reference.of(views and not add)
    found = []
    for technique in techniques.values():
        settings = settings_of(technique)
        label = label_of(technique, add=add)
        named = Row(technique.name, technique.title, settings)
        if technique.name == "tta":
            # The same networks with views and without.
            of = row(technique.name, reference, views=add)
            measured = effect(reference.plain, reference.tta, full.labels)
        elif technique.name == "ensemble":
            together = mean_of(base)
            of = row(technique.name, reference, views=views and not add)
            if add:
                of = replace(of, accuracies=tuple(accuracies(together, full.labels)))
            measured = effect(base, together, full.labels, by_seed=False)
        elif label in predictions:
            of = row(technique.name, predictions[label], views=views and not add)
            other = predictions[label].of(views and not add)
            measured = effect(base, other, full.labels) if add else effect(other, base, full.labels)
        else:
            rows.append(replace(named, reason=reasons.get(label, "it was not trained")))
            continue
        found.append(replace(named, accuracies=of.accuracies, nll=of.nll, effect=measured))
    first = 2 if add else 1
    found.sort(key=lambda one: -(one.effect.difference if one.effect else 0.0))
    return [*rows[:first], *found, *rows[first:]]


def row(name: str, found: Predictions, views: bool) -> Row:
    """Return a variant's row, without an effect."""
    predicted = found.of(views)
    losses = [nll(np.exp(member.astype(np.float64)), found.labels) for member in predicted]
    return Row(name, name, [], tuple(map(float, accuracies(predicted, found.labels))), fmean(losses))


def mean_of(predicted: Floats) -> Floats:
    """Return the mean of the members' probabilities as log-probabilities, (1, N, K)."""
    return np.log(np.maximum(np.exp(predicted.astype(np.float64)).mean(axis=0, keepdims=True), 1e-300))


def settings_of(technique: Technique) -> list[str]:
    """Return what switches a technique off, a line a key: ``regularization.label_smoothing: 0.0``."""
    same = {"tta": ["the same networks, the image alone"], "ensemble": ["the same networks, each alone"]}
    if not technique.trains:
        return same[technique.name]
    flat = params.flatten(technique.off)
    return [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in flat.items()]


def interactions(
    predictions: Mapping[str, Predictions], techniques: Mapping[str, Technique]
) -> dict[tuple[str, str], Effect]:
    """Return what each pair of techniques earns beyond the sum of the two; TTA's pairs need no training."""
    full = predictions[FULL]
    found = {}
    for one, other in combinations([each for each in techniques.values() if each.name != "ensemble"], 2):
        a, b, ab = (_without(predictions, each) for each in ([one], [other], [one, other]))
        if a is not None and b is not None and ab is not None:
            found[one.title, other.title] = interaction(full.tta, a, b, ab, full.labels)
    return found


def _without(predictions: Mapping[str, Predictions], techniques: Sequence[Technique]) -> Floats | None:
    trained = [technique for technique in techniques if technique.trains]
    label = label_of(*trained) if trained else FULL
    return predictions[label].of(len(trained) == len(techniques)) if label in predictions else None


def lines(ablation: Ablation) -> Iterator[str]:
    """Yield what an ablation found, a line a technique."""
    for one in ablation.rows:
        title = f"{one.title:<28}"
        if one.reason:
            yield f"{title}  no figures: {one.reason}"
        elif one.effect is None:
            yield f"{title}  accuracy {stated(one.accuracies)}"
        else:
            yield f"{title}  {in_words(one.effect, WORDS)}"
    for (first, second), together in ablation.pairs.items():
        words = {"better": "more together", "worse": "less together", "no difference shown": "no interaction shown"}
        yield f"{first} and {second}: {in_words(together, words)}"
    if ablation.test is not None:
        accuracy, low, high = ablation.test
        yield f"the recipe on test: accuracy {accuracy:.4f} (95 % interval {low:.4f} to {high:.4f})"


def stated(values: Sequence[float]) -> str:
    """Return ``mean +- standard deviation`` of accuracies.

    >>> stated([0.5, 0.6]), stated([0.5])
    ('0.5500 +- 0.0707', '0.5000')
    """
    return f"{fmean(values):.4f}" + (f" +- {stdev(values):.4f}" if len(values) > 1 else "")
