"""What differs between two runs: params, data, code, environment, metrics, and the bytes of what they wrote."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from anneal.params import flatten

HEADLINE = ("test/accuracy", "val/accuracy", "test/macro_f1", "test/nll", "test/ece", "val/nll", "val/loss")
"""Metrics that stand first, in this order."""

OF_THE_JOB = ("dvc_lock", "variables.SLURM_JOB_ID", "variables.SLURM_RESTART_COUNT")
"""What differs between any two executions and says nothing about either."""

MAX_ROWS = 20
"""Rows of metrics that are printed."""

WIDTH = 44
"""Characters of a value that are printed."""

BOLD, DIM, RED, GREEN = "\033[1m", "\033[2m", "\033[31m", "\033[32m"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run, as far as two of them can be compared.

    Attributes
    ----------
    id, name, status
        Of the run.
    label
        ``recipe`` for a parent run, else its stage, such as ``train@a`` and ``evaluate``.
    began
        Milliseconds since 1970.
    params
        Dotted key to the value's text.
    data
        Digest, name, counts and sizes of the data set.
    metrics
        Name to last value.
    outs
        Path to the md5 of what the stage wrote there.
    commit, dirty
        The git commit, and whether tracked files differed from it; None where it is not known.
    files
        What `anneal.environment` recorded: file name to content.
    stages
        Of a recipe: label to the newest run of that stage.
    """

    id: str
    name: str
    label: str = "recipe"
    status: str = "FINISHED"
    began: int = 0
    params: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    outs: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    stages: Mapping[str, Record] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """One value in two runs, None where a run has none; ``stages`` are those that it was seen in, () for all."""

    key: str
    a: Any
    b: Any
    stages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two runs and what differs between them.

    ``same`` has what does not: outs, data, the number of metrics; and the stages whose environments could be compared.
    """

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    params: list[Change]
    data: list[Change]
    code: list[Change]
    environment: list[Change]
    metrics: list[Change]
    outs: list[Change]
    same: Mapping[str, Any]
    notes: list[str]

    @property
    def differs(self) -> bool:
        """Whether there is any difference."""
        return any((self.params, self.data, self.code, self.environment, self.metrics, self.outs))


# ---- what differs ---------------------------------------------------------------------------------------------------


def compare(a: Record, b: Record) -> Comparison:
    """Compare two runs; of two recipes also the newest run of each stage that both have.

    >>> one = Record(id="1", name="one", params={"seed": "0", "x": "1"}, outs={"models/a": "m"})
    >>> two = Record(id="2", name="two", params={"seed": "7", "x": "1"}, outs={"models/a": "m"})
    >>> found = compare(one, two)
    >>> found.params, found.same["outs"]
    ([Change(key='seed', a='0', b='7', stages=())], {'models/a': 'm'})
    """
    shared = [label for label in a.stages if label in b.stages]
    pairs = {label: (a.stages[label], b.stages[label]) for label in shared} or {a.label: (a, b)}
    outs_a = {path: md5 for one, _ in pairs.values() for path, md5 in one.outs.items()}
    outs_b = {path: md5 for _, two in pairs.values() for path, md5 in two.outs.items()}
    if a.label != b.label:  # models/a of one member and models/b of another are one place
        outs_a, outs_b = (_without_member(outs, record) for outs, record in ((outs_a, a), (outs_b, b)))
    known = {key: value for key, value in a.metrics.items() if key in b.metrics}
    equal = [key for key, value in known.items() if _equal(value, b.metrics[key])]
    return Comparison(
        a=_head(a),
        b=_head(b),
        params=changes(a.params, b.params),
        data=changes(a.data, b.data),
        code=_seen_in(pairs, code_changes),
        environment=_seen_in(pairs, environment_changes),
        metrics=metric_changes(a.metrics, b.metrics),
        outs=changes(outs_a, outs_b),
        same={
            "outs": {path: md5 for path, md5 in outs_a.items() if outs_b.get(path) == md5},
            "data": dict(a.data) if a.data == b.data else {},
            "metrics": len(equal),
            "environment": [label for label, (one, two) in pairs.items() if one.files and two.files],
        },
        notes=_notes(a, b, pairs),
    )


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    """Return what two mappings differ by, sorted by key.

    >>> changes({"x": "1", "y": "2"}, {"y": "3", "z": "4"})  # doctest: +NORMALIZE_WHITESPACE
    [Change(key='x', a='1', b=None, stages=()), Change(key='y', a='2', b='3', stages=()),
     Change(key='z', a=None, b='4', stages=())]
    """
    return [Change(key, a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def metric_changes(a: Mapping[str, float], b: Mapping[str, float]) -> list[Change]:
    """Return the metrics that differ: the headline first, then by the size of the relative difference, then those of one.

    >>> found = metric_changes({"x": 1.0, "y": 1.0, "test/nll": 0.5}, {"x": 1.1, "y": 2.0, "test/nll": 0.4, "z": 3.0})
    >>> [change.key for change in found]
    ['test/nll', 'y', 'x', 'z']
    """
    differ = [key for key in a if key in b and not _equal(a[key], b[key])]
    differ.sort(key=lambda key: (_rank(key), -_relative(a[key], b[key]), key))
    single = sorted({*a} ^ {*b}, key=lambda key: (key in b, _rank(key), key))
    return [Change(key, a.get(key), b.get(key)) for key in [*differ, *single]]


def _rank(key: str) -> int:
    return HEADLINE.index(key) if key in HEADLINE else len(HEADLINE)


def _equal(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _relative(a: float, b: float) -> float:
    size = abs(b - a) / max(abs(a), abs(b), 1e-300)
    return size if math.isfinite(size) else math.inf


def code_changes(a: Record, b: Record) -> list[Change]:
    """Return what differs in commit and uncommitted changes, with every file whose uncommitted content differs."""
    git_a, git_b = _git(a), _git(b)
    found = changes({"commit": a.commit}, {"commit": b.commit}) if a.commit and b.commit else []
    if a.dirty is not None and b.dirty is not None and a.dirty != b.dirty:
        found.append(Change("uncommitted changes", "yes" if a.dirty else "no", "yes" if b.dirty else "no"))
    if git_a and git_b:
        for key, other in (("changed", "as committed"), ("untracked", "absent")):
            files_a, files_b = git_a.get(key, {}), git_b.get(key, {})
            for change in changes(files_a, files_b):
                found.append(Change(change.key, _file_in_words(change.a, other), _file_in_words(change.b, other)))
    return found


def _file_in_words(value: str | None, other: str) -> str:
    if value is None:
        return other
    if value == "absent":
        return "deleted"
    return f"md5 {value[:8]}" if re.fullmatch(r"[0-9a-f]{32}", value) else value


def environment_changes(a: Record, b: Record) -> list[Change]:
    """Return what differs between two recorded environments: machine, packages (``package NAME``), torch's build."""
    if not a.files or not b.files:
        return []
    found = [change for change in changes(_machine(a), _machine(b)) if change.key not in OF_THE_JOB]
    packages_a, packages_b = (read_packages(each.files.get("packages.txt", "")) for each in (a, b))
    found += [Change(f"package {each.key}", each.a, each.b) for each in changes(packages_a, packages_b)]
    if "torch.txt" in a.files and "torch.txt" in b.files:
        found += changes(*(_read_torch(each.files["torch.txt"]) for each in (a, b)))
    return found


def read_packages(text: str) -> dict[str, str]:
    r"""Return name to version of a packages.txt, with where it is from if that is no index.

    >>> read_packages("numpy==2.1.0\nanneal==0.1.0  # editable file:///x\n")
    {'numpy': '2.1.0', 'anneal': '0.1.0 (editable file:///x)'}
    """
    found = re.findall(r"^(\S+?)==(\S+)(?:[ \t]+# (.*))?$", text, re.M)
    return {name: f"{version} ({origin})" if origin else version for name, version, origin in found}


def _read_torch(text: str) -> dict[str, str]:
    """Return a torch.txt as keys and values; its free lines are keyed by what stands before their numbers."""
    head, _, rest = text.partition("\n\n")
    rows = {f"torch {key}": value for key, value in re.findall(r"^(\w+): (.*)$", head, re.M)}
    for line in map(str.strip, rest.splitlines()):
        if line:
            key, *value = re.split(r"\s*(?<!:):(?!:)\s*", line.removeprefix("- "), maxsplit=1)
            rows[f"torch: {key}"] = value[0] if value else "yes"
    return rows


def _machine(record: Record) -> dict[str, str]:
    return flat_text(_loads(record.files.get("environment.json", "")))


def _git(record: Record) -> dict[str, Any]:
    return _loads(record.files.get("git.json", ""))


def _loads(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def flat_text(values: Mapping[str, Any]) -> dict[str, str]:
    """Return a nested mapping as dotted keys and text, without what is null or empty.

    >>> flat_text({"cpu": {"cores": 2, "flags": ["avx", "fma"]}, "gpu": {"driver": None, "names": []}})
    {'cpu.cores': '2', 'cpu.flags': 'avx fma'}
    """
    flat = {}
    for key, value in flatten(values).items():
        if value is None or value == [] or value == {}:
            continue
        plain = isinstance(value, list) and all(isinstance(item, str) and " " not in item for item in value)
        flat[key] = " ".join(value) if plain else value if isinstance(value, str) else json.dumps(value)
    return flat


def _without_member(outs: Mapping[str, str], record: Record) -> dict[str, str]:
    member = record.label.partition("@")[2]
    return {f"{key[: -len(member)]}*" if member and key.endswith(f"/{member}") else key: outs[key] for key in outs}


def _seen_in(
    pairs: Mapping[str, tuple[Record, Record]], differ: Callable[[Record, Record], list[Change]]
) -> list[Change]:
    """Return the differences of all pairs, each once, with the stages that show it where not all do."""
    seen: dict[tuple[str, Any, Any], list[str]] = {}
    for label, (a, b) in pairs.items():
        for change in differ(a, b):
            seen.setdefault((change.key, change.a, change.b), []).append(label)
    return [
        Change(key, a, b, () if len(labels) == len(pairs) or len(pairs) == 1 else tuple(labels))
        for (key, a, b), labels in seen.items()
    ]


def _notes(a: Record, b: Record, pairs: Mapping[str, tuple[Record, Record]]) -> list[str]:
    notes = []
    for name, record, other in (("A", a, b), ("B", b, a)):
        if single := [label for label in record.stages if label not in other.stages]:
            notes.append(f"only {name} has runs of {', '.join(single)}")
    if lack := [label for label, (one, two) in pairs.items() if not (one.files and two.files)]:
        of = "" if len(lack) == len(pairs) else f" of {', '.join(lack)}"
        notes.append(f"the environment{of} is not on record in both")
    if any(one.dirty and two.dirty and not (_git(one) and _git(two)) for one, two in pairs.values()):
        notes.append("both had uncommitted changes that are not on record, so that their code may differ")
    for name, record in (("A", a), ("B", b)):
        unfinished = [each for each in (record, *record.stages.values()) if each.status != "FINISHED"]
        notes += [f"{name}: {each.label} is {each.status}" for each in unfinished]
    return notes


def _head(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "run": record.label,
        "status": record.status,
        "began": datetime.fromtimestamp(record.began / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "stages": {label: stage.id for label, stage in record.stages.items()},
    }


# ---- in text and JSON -----------------------------------------------------------------------------------------------


def as_json(found: Comparison) -> str:
    """Return a comparison as JSON; numbers that JSON lacks are text: ``"nan"``, ``"inf"``."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps({"differs": found.differs, **plain(asdict(found))}, indent=2, ensure_ascii=False)


def as_text(found: Comparison, *, colour: bool = False) -> str:
    """Return a comparison as aligned columns, a section each, with terminal colours where asked."""

    def painted(text: str, code: str) -> str:
        return f"{code}{text}\033[0m" if colour and text else text

    heads = [_words_of_head(head) for head in (found.a, found.b)]
    widths = _widths(heads)
    rows = ["  ".join(f"{cell:<{width}}" for cell, width in zip(head, widths, strict=True)).rstrip() for head in heads]
    agree, same_data = found.same["outs"], _data_in_words(found.same["data"])
    width = max(map(len, agree), default=0)
    kept = [painted(f"  {path:<{width}}  same bytes, md5 {md5}", DIM) for path, md5 in agree.items()]
    sections = [
        _section("params", found.params, "same", painted),
        _section("data", found.data, f"same  {same_data}" if same_data else "not on record", painted),
        _section("code", found.code, "same", painted),
        _section("environment", found.environment, "same" if found.same["environment"] else "not on record", painted),
        _metrics_section(found, painted),
        [*_section("outs", found.outs, "same bytes" if agree else "none on record", painted), *kept],
        [painted(f"note: {note}", DIM) for note in found.notes],
    ]
    if not found.differs:
        end = f"; the bytes of {len(agree)} out{'s' * (len(agree) > 1)} agree" if agree else ""
        sections.append(["", painted(f"nothing{' on record' if found.notes else ''} differs{end}", BOLD)])
    lines = [painted(f"A  {rows[0]}", RED), painted(f"B  {rows[1]}", GREEN), ""]
    for section in sections:
        lines += ["", *section, ""] if len(section) > 1 else section  # those of one line stand together
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _section(name: str, rows: Sequence[Change], same: str, painted: Callable[[str, str], str]) -> list[str]:
    """Return a heading and a line a change: ``key  old -> new``."""
    count = f"{len(rows)} differ{'s' * (len(rows) == 1)}" if rows else same
    lines = [f"{painted(f'{name:<11}', BOLD)}  {count}"]
    shown = [(row, *around(_text(row.a), _text(row.b))) for row in rows]
    widths = _widths((row.key, a) for row, a, _ in shown)
    for row, a, b in shown:
        where = painted(f"  ({', '.join(row.stages)})", DIM) if row.stages else ""
        lines.append(f"  {row.key:<{widths[0]}}  {painted(f'{a:<{widths[1]}}', RED)} -> {painted(b, GREEN)}{where}")
        if row.key == "commit":
            lines.append(painted(f"  see git diff {row.a[:12]} {row.b[:12]}", DIM))
    return lines


def _metrics_section(found: Comparison, painted: Callable[[str, str], str]) -> list[str]:
    """Return a table of the metrics of both that differ, then the names of those that one has."""
    both = [row for row in found.metrics if row.a is not None and row.b is not None]
    equal = found.same["metrics"]
    rows = [(row.key, number(row.a), number(row.b), number(row.b - row.a, sign=True)) for row in both[:MAX_ROWS]]
    name = painted(f"{'metrics':<11}", BOLD)
    if rows:
        widths = _widths([(" " * 9, "A", "B", "B - A"), *rows])
        titles = (f"{title:>{width}}" for title, width in zip(("A", "B", "B - A"), widths[1:], strict=True))
        lines = ["  ".join([f"{name}{' ' * (widths[0] - 9)}", *titles])]
        for key, a, b, difference in rows:
            cells = (
                painted(f"{a:>{widths[1]}}", RED),
                painted(f"{b:>{widths[2]}}", GREEN),
                f"{difference:>{widths[3]}}",
            )
            lines.append("  ".join([f"  {key:<{widths[0]}}", *cells]))
        counts = ((len(both) - len(rows), "more differ"), (equal, "equal"))
        if more := ", ".join(f"{count} {word}" for count, word in counts if count):
            lines.append(painted(f"  {more}", DIM))
        if any(row.key.startswith(("val/", "test/")) for row in both):
            lines.append(painted("  whether such a difference is real: `anneal compare A B`, image by image", DIM))
    else:
        lines = [f"{name}  {f'same  {equal} of both' if equal else 'none of both'}"]
    for letter, missing in (("A", "b"), ("B", "a")):
        if single := [row.key for row in found.metrics if getattr(row, missing) is None]:
            rest = f" and {len(single) - MAX_ROWS} more" if len(single) > MAX_ROWS else ""
            lines.append(f"  only in {letter}: {', '.join(single[:MAX_ROWS])}{rest}")
    return lines


def _words_of_head(head: Mapping[str, Any]) -> list[str]:
    return [head["name"], head["run"], head["id"][:8], f"{head['began']} UTC", head["status"]]


def number(value: float, *, sign: bool = False) -> str:
    """Return a number as tables show it.

    >>> [number(x) for x in (0.97221, 175258.0, 2.1e-05, 0.0)], number(0.5, sign=True)
    (['0.9722', '175,258', '2.1e-05', '0'], '+0.5000')
    """
    plus = "+" if sign else ""
    if value == int(value) if math.isfinite(value) else False:
        return f"{value:{plus},.0f}"
    return f"{value:{plus}.4f}" if 1e-3 <= abs(value) < 1e6 else f"{value:{plus}.3g}"


def around(a: str, b: str, width: int = WIDTH) -> tuple[str, str]:
    """Return two texts cut to ``width`` around the first place where they differ.

    >>> around("x" * 100 + "a", "x" * 100 + "b", width=10)
    ('...xxxxa', '...xxxxb')
    """
    if max(len(a), len(b)) <= width:
        return a, b
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, first - width // 2 + 1) if first > width - 6 else 0

    def cut(text: str) -> str:
        text = f"...{text[start:]}" if start else text
        return text if len(text) <= width else f"{text[: width - 3]}..."

    return cut(a), cut(b)


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _widths(rows: Iterable[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _data_in_words(data: Mapping[str, str]) -> str:
    short = {"name": "", "digest": "digest ", "classes": "classes "}
    words = [f"{short[key]}{value[:12] if key == 'digest' else value}" for key, value in data.items() if key in short]
    counts = [f"{value} {key.removeprefix('counts.')}" for key, value in data.items() if key.startswith("counts.")]
    return ", ".join([*words, *counts])
