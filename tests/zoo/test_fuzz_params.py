"""Whatever params.yaml holds, loading and checking it ends well or in faults of one line each."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from anneal import params, recipe
from anneal.params import ParamsError, UserError
from tests.zoo.fuzz import mutated

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "params.yaml"
SCHEMA = ROOT / "params.schema.json"
VALUES = params.load(SHIPPED, SCHEMA)
RULES = recipe.json_schema()

SMALL = """\
seed: 0
data: {path: data/digits.zip, format: auto, limit: null}
ensemble:
  members: &m {a: {seed: 0}, b: {optimizer: {SGD: {lr: 1.0e-2}}}}
  combine: *m
trainer: {epochs: 15, max_steps: -1, x: [1, .inf, 2001-01-01, "a b", 'c', !!float 3]}
"""


def check_lines(error: UserError) -> None:
    lines = str(error).splitlines()
    assert lines and all(line.strip() for line in lines)
    assert "object at 0x" not in str(error)
    assert all(len(line) < 1000 for line in lines), "a fault that fills the screen"
    if isinstance(error, ParamsError):
        assert len(lines) == len(error.faults), lines
        assert all("params" in line.split(": ")[0] for line in lines)
    else:
        assert len(lines) == 1, lines
    assert str(error).isprintable() or all(line.isprintable() for line in lines), "a character that moves the cursor"


def load(path: Path) -> str:
    """Load and check a params file, as `anneal check` does."""
    try:
        recipe.validate(params.load(path, SCHEMA))
    except UserError as error:
        check_lines(error)
        return str(error)
    return ""


def check(values: Any) -> None:
    """Check values, as `load` does after reading."""
    try:
        faults = params.schema_faults(values, RULES) or params.member_faults(values, RULES)
        if faults:
            raise ParamsError(faults)
        recipe.validate(values)
    except UserError as error:
        check_lines(error)


# ---- what YAML can do -----------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [1, 2]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))

HOSTILE = {
    "empty": "",
    "a list": "- 1\n",
    "a word": "hello\n",
    "zero bytes": b"seed: \0\0",
    "not UTF-8": b"seed: \xff\n",
    "UTF-16": "seed: 0\n".encode("utf-16"),
    "a tab": "seed:\n\t- 1\n",
    "twice": "seed: 0\nseed: 1\n",
    "two documents": "seed: 0\n---\nseed: 1\n",
    "deep": "a: " + "[" * 1_000,
    "deep and closed": "a: " + "[" * 600 + "]" * 600,
    "deep mappings": "".join(" " * i + "a:\n" for i in range(600)),
    "an alias of itself": "a: &a [*a]\n",
    "a section that is itself": "data: &d {path: *d}\n",
    "a billion laughs": LAUGHS,
    "an alias of nothing": "a: *b\n",
    "a number of 10,000 digits": "seed: " + "9" * 10_000 + "\n",
    "a number of 10,000 hexadecimal digits": "seed: 0x" + "f" * 10_000 + "\n",
    "an exponent": "seed: 1.0e+99999999\n",
    "base 60": "seed: 99:99:99:99\n",
    "a day that is none": "seed: 2001-99-99\n",
    "a day": "seed: 2001-01-01\n",
    "a time": "seed: 2001-01-01T00:00:00+99:99\n",
    "a tag of Python": "seed: !!python/object/apply:os.system ['true']\n",
    "a tag of nobody": "seed: !mine 1\n",
    "a wrong float": "seed: !!float abc\n",
    "a wrong int": "seed: !!int abc\n",
    "a wrong bool": "seed: !!bool abc\n",
    "a wrong time": "seed: !!timestamp abc\n",
    "wrong base 64": "seed: !!binary '@@@'\n",
    "a set": "seed: !!set {a, b}\n",
    "an ordered mapping": "seed: !!omap [a: 1, b: 2]\n",
    "wrong pairs": "seed: !!pairs [1]\n",
    "a merge of no mapping": "seed: {<<: 1}\n",
    "a key that is a list": "? [a, b]\n: 1\n",
    "a key that is a mapping": "? {a: b}\n: 1\n",
    "a key that is a number": "1: 2\n",
    "a key that is null": "~: 2\n",
    "a key of two lines": '"se\\ned": 2\n',
    "a key of control characters": '"\\e[31mseed\\a": 2\n',
    "a key of a million letters": f'? "{"k" * 10**6}"\n: 1\n',
    "half a surrogate": 'seed: "\\ud800"\n',
    "half a surrogate in a key": '"\\ud800": 1\n',
    "a directive": "%YAML 9.9\n---\nseed: 1\n",
    "a wrong directive": "%YAML x.y\n---\nseed: 1\n",
    "a member of two lines": None,
}


def hostile_text(name: str) -> bytes:
    text = HOSTILE[name]
    if text is None:
        text = SHIPPED.read_text(encoding="utf-8").replace("  members:\n", '  members:\n    "a\\nb": {seed: 9}\n', 1)
        assert "a\\nb" in text
    return text if isinstance(text, bytes) else text.encode()


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(60)
def test_hostile_yaml(name: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(hostile_text(name))
    assert load(tmp_path / "params.yaml")


def test_a_params_file_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").mkdir()
    assert "params.yaml" in load(tmp_path / "params.yaml")
    assert "no such file" in load(tmp_path / "nowhere/params.yaml")


def test_a_file_that_is_too_large_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("# remark\n" * 2_000_000)
    assert "allowed: at most" in load(tmp_path / "params.yaml")


# ---- random trees ---------------------------------------------------------------------------------------------------

WORDS = [
    "",
    "none",
    "SGD",
    "5 epochs",
    "0.5",
    "1e-3",
    "auto",
    "-1 steps",
    "a\nb",
    "\x1b[31m",
    "日本",
    "\ud800",
    "x" * 300,
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**300]),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
    st.dates(),
    st.binary(max_size=3),
)


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all nodes below the root."""
    below = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    found = [(*path, key) for key, _ in below]
    return found + [place for key in found for place in places(at(VALUES, key), key)]


def at(values: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


PLACES = places(VALUES)
KEYS = sorted({str(key) for place in PLACES for key in place})
NAMES = st.one_of(st.sampled_from([*KEYS, "momentun", "a.b", "a\nb", "", "\ud800"]), st.text(max_size=5))
TREES = st.recursive(
    LEAVES,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES | st.integers() | st.none(), below, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the shipped params with one to four nodes replaced, removed, renamed, added, or swapped for another's."""
    values = copy.deepcopy(VALUES)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(PLACES))
        try:
            parent = at(values, place[:-1])
            old = parent[place[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change removed it
        kind = draw(st.sampled_from(["replace", "remove", "rename", "add", "swap", "nudge"]))
        if kind == "replace":
            parent[place[-1]] = draw(TREES)
        elif kind == "remove":
            del parent[place[-1]]
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(NAMES)] = parent.pop(place[-1])
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(NAMES)] = draw(TREES)
        elif kind == "swap":
            parent[place[-1]] = copy.deepcopy(at(VALUES, draw(st.sampled_from(PLACES))))
        elif kind == "nudge" and isinstance(old, int | float):
            parent[place[-1]] = draw(st.sampled_from([-old, old * 1000, old + 0.5, float(old), str(old), old / 1000]))
    return values


def limits(examples: int, repeatable: bool) -> settings:
    return settings(
        max_examples=examples,
        derandomize=repeatable,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


def search(examples: int, repeatable: bool, folder: Path) -> None:
    limits(examples, repeatable)(given(changed())(check))()
    limits(examples, repeatable)(given(TREES)(check))()
    small = [SMALL.encode(), *(path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml")))]
    path = folder / "params.yaml"

    def text(data: st.DataObject) -> None:
        path.write_bytes(data.draw(mutated(small)))
        load(path)

    limits(examples, repeatable)(given(st.data())(text))()


def test_changed_params(tmp_path: Path) -> None:
    search(40, True, tmp_path)


@pytest.mark.long
def test_many_changed_params(tmp_path: Path) -> None:
    search(1000, False, tmp_path)


def test_what_is_written_by_a_round_trip_is_read(tmp_path: Path) -> None:
    """The harness can tell good from bad: the shipped values pass after a trip through YAML."""
    with open(tmp_path / "params.yaml", "w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(VALUES, file)
    assert load(tmp_path / "params.yaml") == ""
    assert isinstance(VALUES["seed"], int) and not isinstance(VALUES["seed"], datetime.date)
