"""The data that a study runs on: the digits, made once into studies/data, or the pipeline's own."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anneal import params
from anneal.params import UserError
from anneal.store import fresh_folder, open_store, write_text

STUDIES_FOLDER = Path("studies")
DATA = STUDIES_FOLDER / "data"


def digits_data(recipe: Mapping[str, Any]) -> tuple[Path, Path]:
    """Return the folders of the processed digits and of their policy, made where they are missing or out of date.

    Raises
    ------
    UserError
        data/digits.zip is missing.
    """
    from anneal.augment import AugmentConfig, compile_policy, policy_to_json
    from anneal.preprocess import PreprocessConfig, SplitConfig, build_store
    from anneal.sources import DataConfig, open_source

    path = Path(recipe["data"]["path"])
    if not path.is_file():
        raise UserError(f"{path}: no such file, but studies run on it; git checkout {path}, or anneal study --current")
    sections: dict[str, Any] = params.parse(
        {name: recipe[name] for name in ("data", "split", "preprocess", "augment")},
        {"data": DataConfig, "split": SplitConfig, "preprocess": PreprocessConfig, "augment": AugmentConfig},
    )
    made_from = fingerprint([hashlib.sha256(path.read_bytes()).hexdigest(), {k: recipe[k] for k in sections}])
    mark = DATA / "made_from.txt"
    if not mark.exists() or mark.read_text(encoding="utf-8") != made_from:
        print(f"data: {path} -> {DATA}", file=sys.stderr)
        mark.unlink(missing_ok=True)
        source = open_source(sections["data"].path, sections["data"].format)
        with fresh_folder(DATA / "processed") as folder, contextlib.redirect_stderr(io.StringIO()):
            build_store(
                source,
                folder,
                seed=recipe["seed"],
                **sections["preprocess"].model_dump(),
                **sections["split"].model_dump(),
                **sections["data"].model_dump(exclude={"path", "format"}),
                num_workers=0,
            )
        info = open_store(DATA / "processed").info
        compose = compile_policy(
            sections["augment"].policy, height=info.height, width=info.width, channels=info.channels
        )
        with fresh_folder(DATA / "augmented") as folder:
            write_text(folder / "policy.json", policy_to_json(compose))
        write_text(mark, made_from)
    return DATA / "processed", DATA / "augmented"


def current_data() -> tuple[Path, Path]:
    """Return the folders of the pipeline's own data.

    Raises
    ------
    UserError
        They are missing.
    """
    store, augmented = Path("data/processed"), Path("data/augmented")
    for path in (store / "dataset.json", augmented / "policy.json"):
        if not path.exists():
            raise UserError(f"{path}: no such file; run `dvc repro augment` first, or leave --current out for digits")
    return store, augmented


def fingerprint(values: Any) -> str:
    """Return 16 hexadecimal digits over plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
