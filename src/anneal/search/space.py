"""What a search varies: dotted keys checked against the schema, which of them apply, and the values of a trial."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from anneal import params
from anneal.params import ParamsError, nearest, schema_faults
from anneal.reference import schema_keys
from anneal.search.config import Range, SearchConfig

if TYPE_CHECKING:
    from optuna.trial import Trial

SECTIONS = ("augment", *(name for name in params.MEMBER_SECTIONS if name != "seed"))
"""Sections whose keys may be searched."""

MADE_BEFORE = (
    "trials train on data/processed, which is made before them; change it in its section and run `dvc repro augment`"
)
NOT_READ = "training does not read it, so that no trial would differ by it"

REFUSED = {
    "seed": "all trials have the same, so that they differ by nothing else; `anneal seeds` compares seeds",
    "data": MADE_BEFORE,
    "split": MADE_BEFORE,
    "preprocess": MADE_BEFORE,
    "augment.copies": "copies are written before the trials; set it and run `dvc repro augment`",
    "ensemble": NOT_READ,
    "evaluate": NOT_READ,
    "registry": NOT_READ,
    "hardware": "it changes no result",
    "tracking": "it changes no result",
    "search": "it changes no result",
}
"""Keys that cannot be searched, and why."""

DIGITS = 4
"""Significant digits of a number that a trial trains with, so that the recipe which is written gives the same run."""


@dataclass(frozen=True)
class Key:
    """A key that a search varies.

    Parameters
    ----------
    name
        With dots.
    kind
        ``int`` and ``float`` lie between ``low`` and ``high``; ``choice`` is one of ``choices``.
    low, high, log, step
        As in params.yaml.
    choices
        JSON texts: what is stored of a choice.
    when
        Pairs of a key that names a choice and the name for which the block with this key applies.
    """

    name: str
    kind: Literal["int", "float", "choice"]
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    choices: tuple[str, ...] = ()
    when: tuple[tuple[str, str], ...] = ()


def search_space(config: SearchConfig, values: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Key]:
    """Check ``search.ranges`` and return its keys, those that name a choice first.

    Parameters
    ----------
    config
        Section ``search``.
    values
        Whole params.
    schema
        JSON schema of params.yaml: every end and every choice must be a valid value of its key.

    Raises
    ------
    ParamsError
        All faults: an unknown key, one that training does not read, a value that the key does not take.
    """
    known = {key: is_block for key, _, is_block in schema_keys(schema)}
    faults, keys = [], []
    for name, values_of in config.ranges.items():
        if fault := name_fault(name, known, config.ranges):
            faults.append(f"search.ranges.{name}: {fault}")
        elif found := value_faults(name, values_of, values, schema):
            faults += found
        else:
            keys.append(_key(name, values_of, values, schema))
    if faults:
        raise ParamsError(faults)
    return sorted(keys, key=lambda key: not key.name.endswith(".name"))


def name_fault(name: str, known: Mapping[str, bool], ranges: Mapping[str, Any]) -> str:
    """Say what is wrong with the name of a key, an empty string where nothing is."""
    section = name.split(".")[0]
    reason = next((why for start, why in REFUSED.items() if f"{name}.".startswith(f"{start}.")), "")
    if reason:
        return f"cannot be searched: {reason}"
    if section not in SECTIONS or "." not in name:
        return f"unknown key{nearest(section, SECTIONS) or '; allowed are keys of ' + ', '.join(SECTIONS)}"
    free = [key for key, is_block in known.items() if not is_block and name.startswith(f"{key}.")]
    if name not in known and not free:
        return f"unknown key{nearest(name, [key for key in known if key.startswith(f'{section}.')])}"
    above = next((other for other in ranges if name.startswith(f"{other}.")), None)
    return f"found beside {above}, which holds it; allowed: one of the two" if above else ""


def value_faults(
    name: str, values_of: Range | list[Any], values: Mapping[str, Any], schema: Mapping[str, Any]
) -> list[str]:
    """Return a fault for each end or choice that the key does not take."""
    ends = {f".{end}": getattr(values_of, end) for end in ("low", "high")} if isinstance(values_of, Range) else None
    tried = ends if ends is not None else {f"[{i}]": value for i, value in enumerate(values_of)}
    faults = []
    for place, value in tried.items():
        for fault in schema_faults(replaced(values, {name: value}), schema):
            text = fault.removeprefix(f"{name}: ") if fault.startswith(f"{name}: ") else fault
            faults.append(f"search.ranges.{name}{place}: {text}")
    if faults or not isinstance(values_of, Range) or values_of.step is None:
        return faults
    if only_whole(name, values_of, values, schema) and not float(values_of.step).is_integer():
        return [
            f"search.ranges.{name}.step: found {values_of.step}, allowed: a whole number, as the key takes no other"
        ]
    return []


def only_whole(name: str, values_of: Range, values: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    """Say whether a key, whose ends are valid, takes no fraction between them."""
    between = values_of.low + (values_of.high - values_of.low) * 0.38196601125
    return bool(schema_faults(replaced(values, {name: between}), schema))


def _key(name: str, values_of: Range | list[Any], values: Mapping[str, Any], schema: Mapping[str, Any]) -> Key:
    when = conditions(name, values, schema)
    if not isinstance(values_of, Range):
        return Key(name, "choice", choices=tuple(json.dumps(value) for value in values_of), when=when)
    low, high, step = values_of.low, values_of.high, values_of.step
    # Of a key that takes fractions, whole ends alone do not mean whole numbers: {low: 1, high: 10} of a learning rate.
    whole = all(isinstance(number, int) for number in (low, high, step))
    whole = whole or only_whole(name, values_of, values, schema)
    return Key(name, "int" if whole else "float", low, high, values_of.log, step, when=when)


def conditions(name: str, values: Mapping[str, Any], schema: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return which names the blocks around a key belong to: ``optimizer.SGD.lr`` applies for ``optimizer.name`` SGD."""
    found, parts = [], name.split(".")
    node: Any = values
    for i, part in enumerate(parts[:-1]):
        node = node.get(part) if isinstance(node, Mapping) else None
        chooser = ".".join([*parts[: i + 1], "name"])
        if isinstance(node, Mapping) and "name" in node and i + 2 < len(parts):
            block = parts[i + 1]
            if not schema_faults(replaced(values, {chooser: block}), schema):
                found.append((chooser, block))
    return tuple(found)


def applies(key: Key, values: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    """Say whether a key has an effect with the names in ``values``, or in ``chosen`` where they are searched."""
    return all(_name(chooser, values, chosen) in (block, "auto") for chooser, block in key.when)


def _name(chooser: str, values: Mapping[str, Any], chosen: Mapping[str, Any]) -> Any:
    return chosen[chooser] if chooser in chosen else value_at(values, chooser)


def never_applies(key: Key, keys: Sequence[Key], values: Mapping[str, Any]) -> bool:
    """Say whether a key has no effect in any trial."""
    choices = {
        other.name: {json.loads(text) for text in other.choices} for other in keys if other.name.endswith(".name")
    }
    return any(not choices.get(chooser, {value_at(values, chooser)}) & {block, "auto"} for chooser, block in key.when)


def suggest(keys: Sequence[Key], trial: Trial, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a trial by dotted key, of those keys that apply; of a trial that is resumed, the same again."""
    chosen: dict[str, Any] = {}
    for key in keys:
        if not applies(key, values, chosen):
            continue
        if key.kind == "choice":
            chosen[key.name] = json.loads(str(trial.suggest_categorical(key.name, list(key.choices))))
        elif key.kind == "int":
            step = 1 if key.step is None else int(key.step)
            chosen[key.name] = trial.suggest_int(key.name, int(key.low), int(key.high), step=step, log=key.log)
        else:
            value = trial.suggest_float(key.name, float(key.low), float(key.high), step=key.step, log=key.log)
            chosen[key.name] = rounded(value, key)
    return chosen


def rounded(value: float, key: Key) -> float:
    """Return a number in `DIGITS` digits, within the range.

    >>> rounded(0.0123456, Key("lr", "float", 0.001, 0.1)), rounded(0.30000000000000004, Key("x", "float", 0.1, 0.5, step=0.1))
    (0.01235, 0.3)
    """
    short = float(f"{value:.{DIGITS if key.step is None else 10}g}")
    return min(max(short, float(key.low)), float(key.high))


def value_at(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a dotted key, None where there is none."""
    node: Any = values
    for part in name.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def replaced(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested params with the values of dotted keys in place of theirs; the input is not changed.

    >>> replaced({"a": {"b": 1, "c": 2}}, {"a.b": 3})
    {'a': {'b': 3, 'c': 2}}
    """
    result = dict(values)
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        below = result.get(first)
        result[first] = replaced(below if isinstance(below, Mapping) else {}, {rest: value}) if rest else value
    return result


def in_words(key: Key) -> str:
    """Return a key and its range on one line.

    >>> in_words(Key("optimizer.SGD.lr", "float", 0.01, 1.0, log=True))
    'optimizer.SGD.lr: 0.01 to 1, by logarithm'
    """
    if key.kind == "choice":
        return f"{key.name}: {', '.join(key.choices)}"
    more = ", by logarithm" if key.log else f", in steps of {key.step:g}" if key.step is not None else ""
    return f"{key.name}: {key.low:g} to {key.high:g}{', whole numbers' if key.kind == 'int' else ''}{more}"


def longest(keys: Sequence[Key], values: Mapping[str, Any]) -> int:
    """Return the most epochs that a trial may have."""
    for key in keys:
        if key.name == "trainer.epochs":
            return max(json.loads(text) for text in key.choices) if key.kind == "choice" else math.floor(key.high)
    return int(values["trainer"]["epochs"])
