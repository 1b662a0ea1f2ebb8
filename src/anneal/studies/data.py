"""The data that a study runs on: the digits, made once into studies/data, or the pipeline's own."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anneal import params
from anneal.params import UserError
from anneal.store import finish, fresh_folder, open_store, write_text

STUDIES_FOLDER = Path("studies")
DATA = STUDIES_FOLDER / "data"
NORMALIZED = STUDIES_FOLDER / "normalized"
POLICIES = STUDIES_FOLDER / "policies"


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


def normalized(store: Path, *, normalize: str, epsilon: float) -> Path:
    """Return the folder of a store with the same images under another normalisation, made where it is missing.

    It is what `preprocess` would have made with this normalisation, byte for byte, without decoding anything: links to
    the images, and new statistics of the training split.

    Parameters
    ----------
    store
        Folder of the processed data set.
    normalize, epsilon
        Of ``preprocess``.

    Raises
    ------
    UserError
        Whitening of too many dimensions.
    """
    from anneal.preprocess import BLOCK_BYTES
    from anneal.statistics import check_dimensions, fit_statistics

    base = open_store(store)
    info = base.info
    check_dimensions(normalize, info.height, info.width, info.channels)
    folder = NORMALIZED / f"{normalize}-{fingerprint([info.digest, epsilon])}"
    if not folder.exists():
        size = max(1, BLOCK_BYTES // (info.height * info.width * info.channels))
        blocks = (images for images, _ in base.split("train").batches(size))
        statistics = fit_statistics(normalize, blocks, epsilon=epsilon)
        with fresh_folder(folder) as unfinished:
            for split in info.counts:
                shutil.copytree(store / split, unfinished / split, copy_function=_link)
            finish(
                unfinished,
                classes=info.classes,
                shape=(info.height, info.width, info.channels),
                counts=info.counts,
                normalize=normalize,
                statistics=statistics,
                fit=info.fit,
                interpolation=info.interpolation,
            )
    return folder


def _link(source: str, target: str) -> None:
    """Link a file by its content, which stays when the store it came from is made anew; copy across file systems."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def policy_folder(policy: Any, store: Path) -> Path:
    """Return a folder with the policy.json of a policy, compiled for the images of a data set.

    Raises
    ------
    ParamsError
        The policy cannot work on such images.
    """
    from anneal.augment import compile_policy, policy_to_json

    info = open_store(store).info
    text = policy_to_json(compile_policy(policy, height=info.height, width=info.width, channels=info.channels))
    folder = POLICIES / fingerprint(text)
    if not folder.exists():
        with fresh_folder(folder) as unfinished:
            write_text(unfinished / "policy.json", text)
    return folder


def fingerprint(values: Any) -> str:
    """Return 16 hexadecimal digits over plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
