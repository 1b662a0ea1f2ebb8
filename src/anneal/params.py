"""params.yaml: the strict base of every section, loading, and errors written for the person at the keyboard."""

from __future__ import annotations

import difflib
import errno
import json
import math
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

UNTRACKED = ("hardware", "tracking", "search")
"""Sections that no stage lists under ``params:``, since they cannot change a result."""

MEMBER_SECTIONS = (
    "seed",
    "model",
    "init",
    "optimizer",
    "schedule",
    "batch",
    "loss",
    "regularization",
    "averaging",
    "trainer",
)
"""What an entry of ``ensemble.members`` may override: the seed and any training section."""


MAX_BYTES = 2**20
MAX_VALUES = 20_000
MAX_DEPTH = 50
MAX_BITS = 1024
"""What a params file may hold: its size, its values with aliases followed, their nesting, the bits of a whole number."""


class UserError(ValueError):
    """A mistake of the user, or a fault of their machine: printed as it is, without a traceback, exit code 1."""


class ParamsError(UserError):
    """Faults in params.yaml, all reported at once, one line each."""

    def __init__(self, faults: Sequence[str], path: str = "params.yaml") -> None:
        self.faults = list(dict.fromkeys(map(one_line, faults)))
        super().__init__("\n".join(f"{path}: {fault}" for fault in self.faults))


class Strict(BaseModel):
    """Base of every section's class: unknown keys, wrong types and non-finite numbers are faults."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=(), populate_by_name=True
    )


Section = TypeVar("Section", bound=BaseModel)

LENGTH = r"^[0-9]+(\.[0-9]+)? (epochs?|steps?)$"
Length = Annotated[
    Annotated[float, Field(ge=0, le=1)] | Annotated[str, Field(pattern=LENGTH)],
    Field(json_schema_extra={"allowed": "a fraction of the run from 0 to 1 | N epochs | N steps"}),
]
"""A stretch of the run: a fraction of it, or text such as ``5 epochs`` and ``300 steps``."""


def nearest(word: str, words: Iterable[str]) -> str:
    """Return ``; did you mean 'X'?`` for the nearest of ``words``, or an empty string.

    >>> nearest("momentun", ["lr", "momentum"])
    "; did you mean 'momentum'?"
    """
    close = difflib.get_close_matches(str(word), list(words), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML 1.2 mapping, as DVC reads it.

    Raises
    ------
    UserError
        The file is missing, is not YAML, holds a key twice, or is no mapping.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UserError(f"{path}: more than {MAX_BYTES:,} characters, allowed: at most so many")
        yaml = YAML(typ="safe", pure=True)
        node = yaml.compose(text)
        if fault := _extent_fault(node):
            raise UserError(f"{path}: {fault}")
        values = None if node is None else yaml.constructor.construct_document(node)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the folder that holds dvc.yaml") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(error.problem or "not YAML").split())
        raise UserError(f"{path}{where}: {without_addresses(problem)}") from None
    except YAMLError as error:
        raise UserError(f"{path}: {one_line(without_addresses(' '.join(str(error).split()))[:300])}") from None
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{path}: nested too deep, allowed: {MAX_DEPTH} levels") from None
    except Exception as error:  # ruamel raises nearly anything on a value that is not what its form or tag says
        raise UserError(
            f"{path}: a value that is not what it looks like: {one_line(without_addresses(str(error)))[:200]}"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {one_line(_shown(values))}")
    if any(isinstance(value, int) and value.bit_length() > MAX_BITS for value in _leaves(values)):
        raise UserError(f"{path}: a whole number of more than {MAX_BITS} bits")
    return values


def _extent_fault(node: Any) -> str:
    """Say what is too much in a tree of YAML nodes; aliases may make an endless one of a few lines."""
    pending, count = [(node, 0)], 0
    while pending:
        node, depth = pending.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            return f"more than {MAX_VALUES:,} values or {MAX_DEPTH} levels, aliases followed; allowed: at most so many"
        if isinstance(getattr(node, "value", None), list):
            for child in node.value:
                pending.extend((below, depth + 1) for below in (child if isinstance(child, tuple) else (child,)))
    return ""


def _leaves(values: Any) -> Iterator[Any]:
    if isinstance(values, Mapping | list):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _leaves(value)
    else:
        yield values


def one_line(text: str) -> str:
    r"""Return a text with every character that a terminal would not print as its escape.

    >>> one_line("a\nb")
    'a\\nb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def load(path: Path | str = "params.yaml", schema: Path | str = "params.schema.json") -> dict[str, Any]:
    """Read params.yaml and check the whole of it against its JSON schema, without importing any section's class.

    Returns
    -------
    dict
        Section name to plain Python values.

    Raises
    ------
    UserError
        params.yaml cannot be read.
    ParamsError
        It can, and holds faults.
    """
    values = read_yaml(path)
    try:
        rules = json.loads(Path(schema).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{schema}: missing or damaged; `make schema` writes it, git checkout {schema} too") from None
    faults = schema_faults(values, rules) or member_faults(values, rules)
    if faults:
        raise ParamsError(faults, str(path))
    return values


def member_faults(values: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """Check each member's overrides, merged into the recipe, against the JSON schema."""
    found: list[str] = []
    for name in values["ensemble"]["members"]:
        faults = schema_faults(member(values, name), schema)
        found.extend(f"ensemble.members.{name}.{fault}" for fault in faults)
    return found


def parse(values: Mapping[str, Any], classes: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Validate sections with their classes.

    Parameters
    ----------
    values
        Whole params, as `load` returns them.
    classes
        Section name to its class.

    Returns
    -------
    dict
        Section name to an instance of its class.

    Raises
    ------
    ParamsError
        All faults of all sections named.
    """
    faults: list[str] = []
    sections: dict[str, Any] = {}
    for name, cls in classes.items():
        if name not in values:
            faults.append(f"{name}: missing; every section must be present (git checkout params.yaml has it)")
            continue
        try:
            sections[name] = cls.model_validate(values[name])
        except ValidationError as error:
            faults.extend(pydantic_faults(error, cls, values[name], name))
    if faults:
        raise ParamsError(faults)
    return sections


def member(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the params of one ensemble member: the recipe with the member's overrides merged in.

    A mapping merges key by key, anything else replaces.

    Raises
    ------
    ParamsError
        No such member, or an override of a section that members may not change.
    """
    members = values["ensemble"]["members"] or {}
    if name not in members:
        raise ParamsError([f"ensemble.members: no member {name!r}; there are {', '.join(map(str, members))}"])
    overrides = members[name] or {}
    for section in overrides:
        if section not in MEMBER_SECTIONS:
            raise ParamsError(
                [
                    f"ensemble.members.{name}.{section}: a member cannot override this; "
                    f"allowed are {', '.join(MEMBER_SECTIONS)}{nearest(section, MEMBER_SECTIONS)}"
                ]
            )
    return merge(values, overrides)


def merge(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings, ``overrides`` winning; neither input is changed.

    >>> merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    merged = dict(values)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested params as dotted keys; lists stay values, empty mappings too.

    >>> flatten({"a": {"b": 1}, "c": [1]})
    {'a.b': 1, 'c': [1]}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(value: Any) -> str:
    """Show a value as params.yaml would, shortened."""
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    text = without_addresses(json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= 60 else text[:57] + "..."


def without_addresses(text: str) -> str:
    """Return ``text`` with what follows the scheme of an address left out, since it may hold a password.

    >>> without_addresses('found "postgresql://me:secret@host/db"')
    'found "postgresql://..."'
    """
    return re.sub(r"(\w://)[^\s\"']*", r"\1...", text)


def _path(parts: Iterable[Any]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else (f".{_short(part)}" if text else _short(part))
    return text


def _short(part: Any) -> str:
    text = str(part)
    return text if len(text) <= 100 else text[:97] + "..."


# ---- faults found by the JSON schema --------------------------------------------------------------------------------


def schema_faults(values: Any, schema: Mapping[str, Any]) -> list[str]:
    """Check values against a JSON schema and return one line a fault: key, found, allowed, nearest valid key."""
    import jsonschema

    if unquoted := list(_keys_that_are_no_text(values)):
        return [f"{key}: found a name that is no text, allowed: text; quote it" for key in unquoted]
    validator = jsonschema.Draft202012Validator(schema)
    faults = [f"{key}: found {_shown(value)}, allowed: a finite number" for key, value in _not_finite(values)]
    for error in sorted(validator.iter_errors(values), key=lambda e: [str(p) for p in e.absolute_path]):
        faults.extend(_schema_fault(error, schema))
    return faults


def _keys_that_are_no_text(values: Any, path: tuple[Any, ...] = ()) -> Iterator[str]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            here = (*path, str(key))
            if not isinstance(key, str):
                yield _path(here)
            yield from _keys_that_are_no_text(value, here)


def _not_finite(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, float]]:
    if isinstance(values, float) and not math.isfinite(values):
        yield _path(path), values
    elif isinstance(values, Mapping | list):
        for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from _not_finite(value, (*path, key))


def _schema_fault(error: Any, root: Mapping[str, Any]) -> list[str]:
    path = _path(error.absolute_path)
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        extra = [key for key in error.instance if key not in known]
        prefix = f"{path}." if path else ""
        return [_unknown_key(f"{prefix}{_short(key)}", str(key), known) for key in extra]
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        return [
            f"{path}.{key}: missing" if path else f"{key}: missing; every section must be present" for key in missing
        ]
    if "propertyNames" in error.absolute_schema_path:
        pattern = error.schema.get("pattern", "")
        return [f"{path}: found the name {_shown(error.instance)}, allowed: names matching {pattern}"]
    if error.validator == "anyOf" and "allowed" not in error.schema:
        # The branch that got furthest into the value is the one that was meant: {name: x} never meant null.
        deeper = [e for e in error.context if len(e.absolute_path) > len(error.absolute_path)]
        same_kind = [e for e in error.context if e.validator not in ("type", "enum", "const")]
        if deeper:
            return [fault for e in deeper for fault in _schema_fault(e, root)]
        if len(same_kind) == 1 or (same_kind and all(e.validator == "additionalProperties" for e in same_kind)):
            return _schema_fault(same_kind[0], root)
    return [f"{path}: found {_shown(error.instance)}, allowed: {allowed(error.schema, root)}{_near(error, root)}"]


def _near(error: Any, root: Mapping[str, Any]) -> str:
    return nearest(error.instance, _choices(error.schema, root)) if isinstance(error.instance, str) else ""


def _choices(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[str]:
    schema = _resolve(schema, root)
    if "const" in schema:
        return [str(schema["const"])]
    if "enum" in schema:
        return [str(choice) for choice in schema["enum"]]
    return [choice for option in schema.get("anyOf", []) for choice in _choices(option, root)]


def _resolve(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        schema = target
    return schema


def allowed(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """Say in words what a JSON schema allows, e.g. ``a number >= 0 and <= 1``."""
    schema = _resolve(schema, root)
    if "allowed" in schema:
        return str(schema["allowed"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return " | ".join(str(choice) for choice in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(allowed(option, root) for option in schema["anyOf"]))
    words = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "boolean": "true | false",
        "null": "null",
        "array": "a list",
        "object": "a mapping",
    }
    text = words.get(str(schema.get("type")), "another value")
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    if schema.get("type") == "object" and "properties" in schema:
        text = "a mapping with " + ", ".join(schema["properties"])
    if schema.get("type") == "string" and schema.get("minLength"):
        text = "text that is not empty"
    limits += [f"of at least {schema[key]}" for key in ("minItems", "minProperties") if key in schema]
    if "pattern" in schema:
        limits.append(f"matching {schema['pattern']}")
    return text + (" " + " and ".join(limits) if limits else "")


def _unknown_key(path: str, key: str, known: Sequence[str]) -> str:
    return f"{path}: unknown key{nearest(key, known) or '; allowed are ' + ', '.join(known)}"


# ---- faults found by pydantic ---------------------------------------------------------------------------------------


def pydantic_faults(error: ValidationError, cls: type[BaseModel], values: Any, prefix: str) -> list[str]:
    """Return a pydantic error as faults in the words of `schema_faults`, which cover types, ranges and keys.

    What the schema cannot say, conflicts between keys, comes from validators as a ``ValueError`` whose text is
    ``key: what was found, what is allowed``.
    """
    faults = schema_faults(values, cls.model_json_schema())
    if faults:
        return [_joined(prefix, fault) for fault in faults]
    for details in error.errors(include_url=False):
        path = _path((*([prefix] if prefix else []), *details["loc"]))
        reason = details.get("ctx", {}).get("error")
        expected = details["msg"].removeprefix("Input should be ")
        faults.append(
            _joined(path, str(reason)) if reason else f"{path}: found {_shown(details['input'])}, allowed: {expected}"
        )
    return faults


def _joined(prefix: str, fault: str) -> str:
    """Put a key path before a fault, whose own path may be empty."""
    return f"{prefix}{fault}" if fault.startswith((":", "[")) or not prefix else f"{prefix}.{fault}"


# ---- errors on the terminal -----------------------------------------------------------------------------------------


def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception: one line for a user's mistake, a full disk or Ctrl-C, a traceback for our own."""
    if isinstance(error, UserError):
        for line in str(error).splitlines() or ["failed"]:
            print(f"error: {line}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        print(f"error: the disk is full{where}; free some space and run again", file=sys.stderr)
    elif isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError) and error.filename:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    else:
        traceback.print_exception(kind, error, trace)
