"""Networks beside the members that could stand in their place: averages of a run's weights, its snapshots, and soups."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anneal import metrics, views
from anneal.breakdown import MEANS, Candidate
from anneal.params import UserError
from anneal.predicting import Predictions, predict_split
from anneal.store import Store
from anneal.views import View

if TYPE_CHECKING:
    import torch

Models = Mapping[str, Mapping[str, Any]]
"""Member to what its model.json says."""

Found = dict[str, Predictions]
"""Split to predictions."""

Predict = Callable[[Sequence["torch.nn.Module"], Sequence[str]], Found]
"""Networks and their names to what they predict."""


def beside(
    kinds: Sequence[str],
    folders: Mapping[str, Path],
    models: Models,
    store: Store,
    *,
    splits: Sequence[str],
    val: Predictions | None,
    sets: Mapping[str, Sequence[View]],
    average: str,
    device: str,
) -> tuple[dict[str, list[Candidate]], dict[str, Any]]:
    """Predict with averages of the members' weights, with their snapshots, and with soups.

    Parameters
    ----------
    kinds
        Of soups; see `soups`.
    folders, models
        Member to its folder, and to what its model.json says.
    store
        The processed data.
    splits
        That are predicted.
    val
        What the members predict of the validation split; for a greedy soup.
    sets
        Label to views that are averaged.
    average
        As in ``evaluate.tta``.
    device
        In torch's words.

    Returns
    -------
    tuple
        Split to the lines of the grid, and what soups.json says.
    """
    shown = views.with_identity(views.union(sets.values()))

    def predict(networks: Sequence[torch.nn.Module], names: Sequence[str]) -> Found:
        return {name: predict_split(networks, store.split(name), shown, average, names) for name in splits}

    def taste(network: torch.nn.Module) -> float:
        found = predict_split([network], store.split("val"), [views.IDENTITY], average, ["soup"])
        return metrics.accuracy(found.plain[0], found.labels)

    further: dict[str, list[Candidate]] = {name: [] for name in splits}

    def add(kind: str, names: Sequence[str], found: Found, groups: list[list[int]] | None = None) -> None:
        for name in splits:
            further[name].append(as_candidate(kind, names, found[name], sets, groups))

    for kind, (names, of_average) in averages(folders, models, predict, device).items():
        add(kind, names, of_average)
    if (taken := snapshots(folders, predict, device)) is not None:
        add("snapshots", *taken)
    accuracy: dict[str, float] = {}
    if val is not None:
        accuracy = {name: metrics.accuracy(p, val.labels) for name, p in zip(folders, val.plain, strict=True)}
    said, mixed = soups(kinds, folders, models, store, accuracy=accuracy, taste=taste, predict=predict, device=device)
    for kind, of_soup in mixed.items():
        add(f"soup_{kind}", said[kind]["members"], of_soup)
    return further, said


def as_candidate(
    name: str,
    members: Sequence[str],
    found: Predictions,
    sets: Mapping[str, Sequence[View]],
    groups: list[list[int]] | None = None,
) -> Candidate:
    """Return predictions as a kind of the grid: without views, and averaged over each set of views in every way.

    Parameters
    ----------
    name, members
        See `Candidate`.
    found
        Predictions of its networks, under the identity and all views of ``sets``.
    sets
        Label to views.
    groups
        See `Candidate`; None where each network stands alone.
    """
    averaged = {label: {way: found.over(chosen, way) for way in MEANS} for label, chosen in sets.items()}
    costs = {label: sum(views.passes(chosen, *found.size)) for label, chosen in sets.items()}
    alone = [[index] for index in range(len(found.plain))]
    return Candidate(name, list(members), groups or alone, found.plain, averaged, costs)


def averages(
    folders: Mapping[str, Path], models: Models, predict: Predict, device: str
) -> dict[str, tuple[list[str], Found]]:
    """Predict with the averages that training wrote beside the exported weights.

    Returns
    -------
    dict
        Kind, such as ``ema``, to the members that have such an average, and to what they predict. A kind is not there where
        it is what every one of them exports.
    """
    from anneal.models.build import load_classifier

    kinds = sorted({path.stem for folder in folders.values() for path in folder.glob("averages/*.safetensors")})
    found = {}
    for kind in kinds:
        file = f"averages/{kind}.safetensors"
        names = [name for name, folder in folders.items() if (folder / file).exists()]
        if not all(models[name].get("weights") == kind for name in names):
            networks = [load_classifier(folders[name], folded=True, file=file)[0].to(device) for name in names]
            found[kind] = names, predict(networks, [f"{name}/{file}" for name in names])
    return found


def snapshots(
    folders: Mapping[str, Path], predict: Predict, device: str
) -> tuple[list[str], Found, list[list[int]]] | None:
    """Predict with the snapshots that training wrote, which make an ensemble of one run (Huang et al. 2017).

    Returns
    -------
    tuple or None
        The members that have two or more, what all their snapshots predict, and the indices of each member's. None where no
        member has any.
    """
    from anneal.models.build import load_classifier

    files = {
        name: sorted(folder.glob("snapshots/*.safetensors"), key=lambda path: (len(path.stem), path.stem))
        for name, folder in folders.items()
    }
    names = [name for name, found in files.items() if len(found) > 1]
    if not names:
        return None
    of_all = [(name, f"snapshots/{path.name}") for name in names for path in files[name]]
    networks = [load_classifier(folders[name], folded=True, file=file)[0].to(device) for name, file in of_all]
    groups = [[index for index, (of, _) in enumerate(of_all) if of == name] for name in names]
    return names, predict(networks, [f"{name}/{file}" for name, file in of_all]), groups


def soups(
    kinds: Sequence[str],
    folders: Mapping[str, Path],
    models: Models,
    store: Store,
    *,
    accuracy: Mapping[str, float],
    taste: Callable[[torch.nn.Module], float],
    predict: Predict,
    device: str,
) -> tuple[dict[str, Any], dict[str, Found]]:
    """Mix the weights of the members and predict with the soups.

    Parameters
    ----------
    kinds
        Of ``uniform``, all members, and ``greedy``: the best of them on the validation split, and each next one that does
        not lower its accuracy there.
    folders, models, store, predict, device
        As for `beside`.
    accuracy
        Of each member alone on the validation split, without views; for ``greedy``.
    taste
        Returns that of a network; for ``greedy``.

    Returns
    -------
    tuple
        What reports/evaluation/soups.json says: kind to its ``members``, or to the reason why there is none, ``omitted``;
        and kind to what the soup predicts. A greedy soup of one member, which is that member, has no prediction of its own,
        nor has one that is the uniform soup.
    """
    from anneal import soups as recipes

    def mix(names: Sequence[str]) -> torch.nn.Module:
        return recipes.soup([states[name] for name in names], models[names[0]], store, device)

    def tasted(names: Sequence[str]) -> float:
        try:
            return taste(mix(names))
        except UserError:  # it predicts NaN
            return -1.0

    if not kinds:
        return {}, {}
    reason = recipes.apart(models)
    if reason is not None:
        return {kind: {"omitted": reason} for kind in kinds}, {}
    states = {name: recipes.load_weights(folder / "weights.safetensors") for name, folder in folders.items()}
    said: dict[str, Any] = {}
    found: dict[str, Found] = {}
    for kind in sorted(kinds, reverse=True):  # uniform first
        chosen = list(folders)
        if kind == "greedy":
            chosen = recipes.greedy(list(folders), accuracy, tasted)
        said[kind] = {"members": chosen}
        if kind == "greedy" and (len(chosen) == 1 or (set(chosen) == set(folders) and "uniform" in found)):
            continue
        try:
            found[kind] = predict([mix(chosen)], [f"soup_{kind}"])
        except UserError:
            said[kind] = {"omitted": "it predicts NaN or infinity"}
            print(f"soup {kind}: {said[kind]['omitted']}", file=sys.stderr)
    return said, found
