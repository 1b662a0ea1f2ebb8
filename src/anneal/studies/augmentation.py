"""Study of the training transforms: `augmentation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from anneal.augment import PRESETS
from anneal.reporting.heat_maps import HeatMap
from anneal.reporting.lines import Panel
from anneal.studies.label_change import Change, Reading, as_readings, changes, read_under
from anneal.studies.study import Job, Point, Results, Study, by_seed, change_panel, differs, grouped, mean_of, stated

TRANSFORMS: dict[str, dict[str, dict[str, Any]]] = {
    "RandomPadCrop": {"RandomPadCrop": {"padding": 0.125}},
    "HorizontalFlip": {"HorizontalFlip": {"p": 0.5}},
    "VerticalFlip": {"VerticalFlip": {"p": 0.5}},
    "Rotate 15": {"Rotate": {"limit": [-15, 15], "p": 0.5}},
    "Rotate 180": {"Rotate": {"limit": [180, 180], "p": 0.5}},
    "RandomRotate90": {"RandomRotate90": {"p": 0.5}},
    "Affine scale": {"Affine": {"scale": [0.8, 1.2], "p": 0.5}},
    "Affine shear": {"Affine": {"shear": [-15, 15], "p": 0.5}},
    "Cutout": {"Cutout": {"size": 0.25, "p": 0.5}},
    "Erasing": {"Erasing": {"p": 0.5}},
    "RandomBrightnessContrast": {"RandomBrightnessContrast": {"p": 0.5}},
    "GaussNoise": {"GaussNoise": {"std_range": [0.05, 0.15], "p": 0.5}},
    "GaussianBlur": {"GaussianBlur": {"sigma_limit": [0.3, 0.8], "p": 0.5}},
    "InvertImg": {"InvertImg": {"p": 0.5}},
}
"""Name in the figure to what stands in ``augment.policy``: those that are usual, and some that are usually wrong."""

NONE, WHOLE = "none", "your policy"

HARM = 1.5
"""Training under a transform is dear where the validation loss is more than so many times that without."""

MOST_CLASSES = 12
"""Most classes whose accuracies are drawn."""


def own_transforms(policy: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the transforms of ``augment.policy``, of a preset or a list, each by a name of its own.

    >>> list(own_transforms(["HorizontalFlip", {"Cutout": {"size": 0.2}}, {"Cutout": None}]))
    ['your HorizontalFlip', 'your Cutout', 'your Cutout 2']
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in PRESETS[policy] if isinstance(policy, str) else policy:
        name, arguments = (entry, None) if isinstance(entry, str) else next(iter(entry.items()))
        label, number = f"your {name}", 1
        while label in found:
            number += 1
            label = f"your {name} {number}"
        found[label] = {name: dict(arguments or {})}
    return found


def always(entry: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a transform with probability 1.

    >>> always({"HorizontalFlip": {"p": 0.5}})
    {'HorizontalFlip': {'p': 1.0}}
    """
    return {name: {**arguments, "p": 1.0} for name, arguments in entry.items()}


def augmentation_grid(recipe: Mapping[str, Any], _num_train: int) -> list[Point]:
    """Return no transform, each of the recipe's own alone and all of them together, and each of `TRANSFORMS` alone."""
    own = own_transforms(recipe["augment"]["policy"])
    entries = own | {name: entry for name, entry in TRANSFORMS.items() if entry not in own.values()}
    asked = {name: [always(entry)] for name, entry in entries.items()}
    points = [Point(NONE, policy_of([]), {"transform": NONE}, asks=asked)]
    if len(own) > 1:
        points.append(Point(WHOLE, policy_of(recipe["augment"]["policy"]), {"transform": WHOLE}))
    for name, entry in entries.items():
        points.append(Point(name, policy_of([entry]), {"transform": name}, optional=True))
    return points


def policy_of(policy: Any) -> dict[str, Any]:
    """Return the overrides for a policy, which no extra copies go with."""
    return {"augment": {"policy": policy or "none", "copies": {"balance": False}}}


def ask(job: Job, member: Path, store: Path) -> dict[str, Any]:
    """Ask the network that was trained without any transform how it reads validation images under each."""
    return read_under(member, store, job.point.asks, job.recipe["seed"])


def readings_of(results: Results) -> tuple[list[str], dict[str, list[Reading]]]:
    """Return the classes, and by transform how each network that never saw it reads images under it."""
    classes: list[str] = []
    found: dict[str, list[Reading]] = {}
    for result in results:
        if result.answers:
            classes = list(result.answers["classes"])
            for name, one in as_readings(result.answers).items():
                found.setdefault(name, []).append(one)
    return classes, found


def draw_augmentation(results: Results) -> list[Panel | HeatMap]:
    """Draw what training under each transform changed, and how a network without it reads the images of each class."""
    groups = grouped(results, "transform")
    others = {name: group for name, group in groups.items() if name != NONE}
    panels: list[Panel | HeatMap] = [
        change_panel(
            {name: (by_seed(group, metric), by_seed(groups[NONE], metric)) for name, group in others.items()},
            f"{word}, trained under it",
            f"change of validation {word} against none",
        )
        for word, metric in (("accuracy", "val/accuracy"), ("loss", "val/loss"))
    ]
    classes, found = readings_of(results)
    if found:
        shown = range(min(len(classes), MOST_CLASSES))
        panels.append(
            HeatMap(
                [[fmean(one.by_class[c] for one in several) for c in shown] for several in found.values()],
                list(found),
                [classes[c][:8] for c in shown],
                "accuracy under it, if never seen",
                "class",
            )
        )
    return panels


def conclude_augmentation(results: Results) -> list[str]:
    """Say of each transform what training under it changed, and whether it seems to change the label."""
    groups = grouped(results, "transform")
    classes, found = readings_of(results)
    plain = groups[NONE]
    lines = [
        f"none: validation accuracy {stated([r.final('val/accuracy') for r in plain])}, "
        f"loss {stated([r.final('val/loss') for r in plain])}"
    ]
    flags = []
    for name, group in groups.items():
        if name == NONE:
            continue
        accuracy = differs(by_seed(group, "val/accuracy"), by_seed(plain, "val/accuracy"))
        loss = differs(by_seed(group), by_seed(plain))
        text = f"{name}: training under it, accuracy {accuracy}, loss {loss}"
        if several := found.get(name):
            text += f"; networks that never saw it read {stated([one.accuracy for one in several])} rightly under it"
        lines.append(text)
        if changed := changes(found.get(name, [])):
            words = [f"{classes[c.a]} as {classes[c.b]} in {stated(c.shares, 2)}" for c in changed]
            harmed = loss.startswith("higher") and mean_of(group) > HARM * mean_of(plain)
            flags.append(f"{name}: {verdict(changed, harmed)}; networks that never saw it read {'; '.join(words)}")
    if found and not flags:
        flags = ["no transform makes networks that never saw it take one class for another"]
    return lines + flags


def verdict(changed: Sequence[Change], harmed: bool) -> str:
    """Return what it means that networks which never saw a transform take classes for others under it.

    By itself little: a boot that looks the other way is like nothing in the training split, and may be read as a bag.
    It is a change of the label where two classes change places, or where training under the transform, which
    settles the case of the boot, is dear.

    Parameters
    ----------
    changed
        From `anneal.studies.label_change.changes`.
    harmed
        Whether training under it is shown to raise the validation loss, to more than `HARM` times that without.
    """
    pairs = {(change.a, change.b) for change in changed}
    if any((b, a) in pairs for a, b in pairs):
        return "CHANGES THE LABEL, since two classes change places"
    if harmed:
        return "CHANGES THE LABEL, by all signs, since training under it is dear as well"
    return "not shown to change the label, since training under it is not dear; look at its pictures"


AUGMENTATION = Study(
    "augmentation",
    "Which training transforms help, which hurt, and which change the label?",
    augmentation_grid,
    draw_augmentation,
    conclude_augmentation,
    # A rate that ends at 0, since at a constant one the last epoch is a matter of luck.
    base={"trainer": {"epochs": 16}, "schedule": {"name": "linear"}},
    ask=ask,
)
