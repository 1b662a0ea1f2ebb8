"""The whole of params.yaml as one class: its JSON schema, ready-made recipes, and what it resolves to."""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from anneal import views
from anneal.augment import AugmentConfig
from anneal.batching import BatchConfig
from anneal.ensemble import EnsembleConfig
from anneal.evaluation import EvaluateConfig
from anneal.models.config import InitConfig, ModelConfig
from anneal.optimizers.config import OptimizerConfig
from anneal.params import ParamsError, Strict, UserError, member, nearest, pydantic_faults, read_yaml
from anneal.preprocess import PreprocessConfig, SplitConfig
from anneal.schedules import ScheduleConfig
from anneal.search.config import SearchConfig
from anneal.sources import DataConfig
from anneal.store import write_text
from anneal.tracking import RegistryConfig, TrackingConfig
from anneal.training.config import (
    AveragingConfig,
    HardwareConfig,
    LossConfig,
    RegularizationConfig,
    TrainerConfig,
)


class Recipe(Strict):
    """params.yaml."""

    seed: Annotated[int, Field(ge=0)]
    data: DataConfig
    split: SplitConfig
    preprocess: PreprocessConfig
    augment: AugmentConfig
    model: ModelConfig
    init: InitConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    batch: BatchConfig
    loss: LossConfig
    regularization: RegularizationConfig
    averaging: AveragingConfig
    trainer: TrainerConfig
    ensemble: EnsembleConfig
    evaluate: EvaluateConfig
    registry: RegistryConfig
    hardware: HardwareConfig
    tracking: TrackingConfig
    search: SearchConfig


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of params.yaml, with the hints that editors show."""
    schema = _without_titles(Recipe.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "anneal params.yaml", **schema}


def _without_titles(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        # A title is text; a property that happens to be called title is a mapping.
        items = ((key, value) for key, value in schema.items() if key != "title" or not isinstance(value, str))
        return {key: _without_titles(value) for key, value in items}
    return [_without_titles(item) for item in schema] if isinstance(schema, list) else schema


def schema_text() -> str:
    """Return params.schema.json as it should be, byte for byte."""
    return json.dumps(json_schema(), indent=2) + "\n"


def validate(values: Mapping[str, Any]) -> Recipe:
    """Check every section with its class, and the sections of every member with its overrides merged in.

    Raises
    ------
    ParamsError
        All faults found, one line each.
    """
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise ParamsError(pydantic_faults(error, Recipe, values, "")) from None
    faults: list[str] = []
    of_views: dict[str, list[str]] = {}
    for name in recipe.ensemble.members:
        merged = member(values, name)
        try:
            checked = Recipe.model_validate(merged)
        except ValidationError as error:
            found = pydantic_faults(error, Recipe, merged, "")
            faults.extend(f"ensemble.members.{name}.{fault}" for fault in found)
        else:
            for fault in _view_faults(checked):
                of_views.setdefault(fault, []).append(name)
    for fault, names in of_views.items():
        everyone = len(names) == len(recipe.ensemble.members)
        faults.extend([fault] if everyone else [f"ensemble.members.{name}.{fault}" for name in names])
    if faults:
        raise ParamsError(faults)
    return recipe


def _view_faults(recipe: Recipe) -> list[str]:
    """Say which views of ``evaluate`` the network of a recipe, or of a member, or the size of the images does not allow."""
    return views.conflicts(
        recipe.evaluate.tta.views,
        grid=recipe.evaluate.grid,
        model=recipe.model.name,
        normalize=recipe.preprocess.normalize,
        size=recipe.preprocess.size,
    )


def shipped(folder: Path | str = "recipes") -> dict[str, str]:
    """Return the names of the recipes in a folder, each with its first comment line.

    Raises
    ------
    UserError
        There is no such folder.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}/: no such folder; run from the folder that holds dvc.yaml")
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.yaml"))}
    return {name: text.splitlines()[0].removeprefix("#").strip() if text else "" for name, text in texts.items()}


def apply(name: str, params: Path | str = "params.yaml", folder: Path | str = "recipes") -> str:
    """Write a recipe's values into params.yaml, keeping its comments and all other keys.

    ``ensemble.members`` is replaced as a whole, everything else key by key.

    Returns
    -------
    str
        The unified diff of params.yaml, empty where nothing changed.

    Raises
    ------
    UserError
        No such recipe, or its values do not pass the schema; params.yaml is then left as it was.
    """
    names = shipped(folder)
    if name not in names:
        raise UserError(f"recipe {name!r}: not in {folder}/; there are {', '.join(names)}{nearest(name, names)}")
    path = Path(folder) / f"{name}.yaml"
    read_yaml(path)

    def edit(tree: Any, round_trip: Any) -> None:
        _assign(tree, round_trip.load(path.read_text(encoding="utf-8")))

    return _rewrite(params, f"{params} with {name}", edit)


def set_value(key: str, value: Any, params: Path | str = "params.yaml") -> str:
    """Write one value into params.yaml, keeping its comments and all other keys.

    Parameters
    ----------
    key
        Its place with dots, e.g. ``batch.microbatch``; the mapping that holds it has to exist.
    value
        A plain value.
    params
        The file.

    Returns
    -------
    str
        The unified diff of params.yaml, empty where nothing changed.

    Raises
    ------
    UserError
        The value does not pass the schema; params.yaml is then left as it was.
    """

    def edit(tree: Any, _: Any) -> None:
        *parents, leaf = key.split(".")
        for name in parents:
            tree = tree[name]
        tree[leaf] = value

    return _rewrite(params, f"{params} with {key}: {value}", edit)


def _rewrite(params: Path | str, label: str, edit: Callable[[Any, Any], None]) -> str:
    """Edit params.yaml as a tree, check the whole and write it; return the unified diff."""
    from ruamel.yaml import YAML

    round_trip = YAML()
    round_trip.preserve_quotes = True
    round_trip.width = 4096
    round_trip.representer.add_representer(
        type(None), lambda dump, _: dump.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    read_yaml(params)  # says in our words what is wrong with the file
    old = Path(params).read_text(encoding="utf-8")
    tree = round_trip.load(old)
    edit(tree, round_trip)
    buffer = io.StringIO()
    round_trip.dump(tree, buffer)
    new = buffer.getvalue()
    validate(YAML(typ="safe", pure=True).load(new))
    diff = difflib.unified_diff(old.splitlines(keepends=True), new.splitlines(keepends=True), str(params), label, n=1)
    text = "".join(diff)
    if text:
        write_text(params, new)
    return text


def _assign(tree: Any, values: Mapping[str, Any], path: tuple[str, ...] = ()) -> None:
    """Set leaves in place, so that every comment and every other key stays."""
    if path == ("ensemble", "members"):
        for name in [name for name in tree if name not in values]:
            del tree[name]
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), Mapping):
            _assign(tree[key], value, (*path, key))
        elif key not in tree or tree[key] != value:
            tree[key] = value


if __name__ == "__main__":
    write_text("params.schema.json", schema_text())
