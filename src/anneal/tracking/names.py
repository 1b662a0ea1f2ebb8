"""Names, hashes and texts of runs: what they are found by, and what they say."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anneal import params

MAX_PARAM = 6000
"""Longest value of a param in MLflow, in characters."""

PARENT = "mlflow.parentRunId"
NOTE = "mlflow.note.content"


def fingerprint(values: Mapping[str, Any], digest: str) -> str:
    """Return 32 hexadecimal digits over the tracked sections of params and the digest of the processed data."""
    tracked = {key: value for key, value in values.items() if key not in params.UNTRACKED}
    text = json.dumps([tracked, digest], sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def flat_params(values: Mapping[str, Any]) -> dict[str, str]:
    """Return tracked params as MLflow takes them: dotted keys, values as JSON, long ones cut and ended by their hash.

    >>> flat_params({"a": {"b": [1, "x"]}, "tracking": {"uri": "u"}})
    {'a.b': '[1, "x"]'}
    """
    tracked = {key: value for key, value in values.items() if key not in params.UNTRACKED}
    flat = {}
    for key, value in params.flatten(tracked).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=plain)
        if len(text) > MAX_PARAM:
            text = f"{text[: MAX_PARAM - 50]}... md5 {hashlib.md5(text.encode()).hexdigest()}"
        flat[key[:250]] = text
    return flat


def dvc_hash(path: Path | str, root: Path | str = ".") -> str | None:
    """Return the md5 that dvc.lock gives a file or a folder (``.dir``), None where there is nothing at ``path``.

    Parameters
    ----------
    path
        File or folder.
    root
        Root of the DVC repository: its .dvcignore says which files of a folder do not count.
    """
    from dvc.fs import localfs
    from dvc.ignore import DvcIgnoreFilter

    path, root = Path(path).absolute(), Path(root).absolute()
    if path.is_file():
        return _md5(path)
    if not path.is_dir():
        return None
    entries = []
    for folder, _, names in DvcIgnoreFilter(localfs, str(root)).walk(localfs, str(path)):
        for name in names:
            file = Path(folder) / name
            entries.append({"md5": _md5(file), "relpath": file.relative_to(path).as_posix()})
    entries.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def recipe_name(values: Mapping[str, Any]) -> str:
    """Return ``digits resnet SGD cosine``."""
    words = [data_name(values), *(at(values, section, "name") for section in ("model", "optimizer", "schedule"))]
    return " ".join(str(word) for word in words if word is not None)


def data_name(values: Mapping[str, Any]) -> str:
    """Return the data set's name: that of its file or folder, without endings."""
    return Path(str(at(values, "data", "path") or "data")).name.split(".")[0] or "data"


def description(values: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """Return the parent run's text in Markdown: its headline, then the recipe in words."""
    optimizer, schedule = at(values, "optimizer", "name"), at(values, "schedule", "name")
    policy = at(values, "augment", "policy")
    members = at(values, "ensemble", "members") or {}
    rows = {
        "data": f"{at(values, 'data', 'path')}, {at(values, 'preprocess', 'size')} px, "
        f"{at(values, 'preprocess', 'normalize')}",
        "augmentation": policy if isinstance(policy, str) else f"{len(policy or [])} transforms",
        "model": at(values, "model", "name"),
        "optimizer": f"{optimizer}, learning rate {at(values, 'optimizer', str(optimizer), 'lr')}, {schedule} schedule",
        "training": f"{at(values, 'trainer', 'epochs')} epochs, batch {at(values, 'batch', 'size')}",
        "ensemble": f"{', '.join(members)} ({at(values, 'ensemble', 'combine')})",
    }
    lines = [
        "| figure | value |",
        "|---|---|",
        *(f"| {key} | {_figure(key, metrics[key])} |" for key in sorted(metrics)),
        "",
    ]
    return "\n".join(
        [*(lines if metrics else []), "| | |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in rows.items())]
    )


def _figure(key: str, value: float) -> str:
    """Return a metric with as many digits as it has."""
    return f"{value:.0f}" if key.endswith("_recipes") else f"{value:.4f}"


def _cell(value: object) -> str:
    """Return a value as a table of Markdown takes it: a path may hold what tables and markup are made of."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", r"\|")


def at(values: Any, *keys: str) -> Any:
    """Return the value below nested keys, None where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def tag_name(*parts: str | None) -> str:
    """Return the parts, joined by dots, as MLflow takes a tag's name."""
    return re.sub(r"[^\w\-./ ]", "_", ".".join(part for part in parts if part))[:250]


def plain(value: Any) -> Any:
    """Turn what JSON does not know into what it does: numpy numbers, paths."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"{type(value).__name__} is neither a number nor text")
