"""A trained member as the start of another: what it must be, and its weights; to check it imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anneal.models.config import is_custom
from anneal.params import UserError, nearest
from anneal.schedules import length_in_steps

if TYPE_CHECKING:
    from torch import nn

FREE = frozenset(
    {"num_classes", "height", "width", "dropout", "stochastic_depth", "spatial_dropout"}
    | {"arguments.block_dropout", "arguments.num_classes", "arguments.pretrained", "arguments.weights"}
    | {"norm_arguments.momentum", "norm_arguments.ghost", "norm_arguments.sync", "norm_arguments.frozen"}
)
"""Of an architecture, what may differ: it changes how a network is trained, or its head alone, but not what it computes."""


def start_faults(
    path: str,
    sha256: str | None,
    *,
    architecture: Mapping[str, Any],
    normalize: str,
) -> list[str]:
    """Say why a run cannot start from a trained member, one line each; an empty list where it can.

    Parameters
    ----------
    path, sha256
        ``model.start_from``: the member's folder, and the hash of its weights.safetensors in hexadecimal digits.
    architecture
        Arguments of `anneal.models.build.build_network` of the network to be trained; what is left out is not checked.
    normalize
        ``preprocess.normalize`` of its data.
    """
    try:
        model, weights = read_member(path)
    except UserError as error:
        return [str(error)]
    if fault := _hash_fault(sha256, weights, path):
        return [fault]
    return [
        f"{key}: found {_shown(found)}, allowed: {_shown(wanted)}, as the network of model.start_from.path {path} has"
        for key, found, wanted in _differences(architecture, model["architecture"])
    ] + _normalization_faults(normalize, model["normalization"]["kind"], path)


def read_member(path: str) -> tuple[dict[str, Any], bytes]:
    """Read a trained member's folder.

    Returns
    -------
    tuple
        The values of model.json, and the bytes of weights.safetensors.

    Raises
    ------
    UserError
        There is no such folder or file, or one that is damaged.
    """
    from safetensors import SafetensorError, deserialize

    folder = Path(path)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        raise UserError(
            f"model.start_from.path: found {path}, {what}, allowed: a folder with the weights.safetensors and model.json of "
            f"a trained member, such as a copy of models/a{_neighbour(folder)}"
        )
    try:
        text = (folder / "model.json").read_text(encoding="utf-8")
        weights = (folder / "weights.safetensors").read_bytes()
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise UserError(
            f"model.start_from.path: found {path}, which holds no {missing}, allowed: a folder with the weights.safetensors "
            f"and model.json of a trained member"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.start_from.path: {path} cannot be read ({_reason(error)})") from None
    damaged = f"model.start_from.path: {path}/{{}} is damaged ({{}}), allowed: the file as training wrote it"
    try:
        model = json.loads(text)
        kinds = model["architecture"]["name"], model["normalization"]["kind"], model["classes"]
        if [type(kind) for kind in kinds] != [str, str, list]:
            raise TypeError("not the values of a classifier")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(damaged.format("model.json", _reason(error))) from None
    try:
        deserialize(weights)
    except SafetensorError as error:
        raise UserError(damaged.format("weights.safetensors", _reason(error))) from None
    return model, weights


def load_start(network: nn.Module, head: set[str], path: str, sha256: str | None, classes: Sequence[str]) -> bool:
    """Give a network the weights of a trained member, by name and shape; nothing is changed where they do not fit.

    Running statistics are among them; those that images are normalised by are not, since they belong to the data.

    Parameters
    ----------
    network
        Freshly built and initialised.
    head
        Names of its classifier's parameters: kept as they are unless the member's classes are the same, in the same order.
    path, sha256
        ``model.start_from``.
    classes
        Of the data to be trained on.

    Returns
    -------
    bool
        Whether the head came along.

    Raises
    ------
    UserError
        The member cannot be read, has another hash, or a weight is missing, left over or of another shape.
    """
    from safetensors.torch import load

    model, data = read_member(path)
    if fault := _hash_fault(sha256, data, path):
        raise UserError(fault)
    prefix = "network."
    found = {name.removeprefix(prefix): t for name, t in load(data).items() if name.startswith(prefix)}
    with_head = list(model["classes"]) == list(classes)
    wanted = {name: tensor for name, tensor in network.state_dict().items() if with_head or name not in head}
    kept = found if with_head else {name: tensor for name, tensor in found.items() if name not in head}
    where = f"model.start_from.path: the network of {path}"
    for name in [*wanted, *kept]:
        if name not in kept or name not in wanted:
            here, there = ("none", "one") if name not in kept else ("one", "none")
            raise UserError(
                f"{where} has {here} for the weight {name} and the one to be trained {there}, allowed: equal networks"
            )
        shapes = tuple(kept[name].shape), tuple(wanted[name].shape)
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{where} has the weight {name} as {shapes[0]}, allowed: {shapes[1]}, as the one to be trained"
            )
    for name, tensor in wanted.items():
        tensor.copy_(kept[name])  # a tensor of a state dict is the network's own, detached
    return with_head


def freeze_steps(freeze: float | str, *, total_steps: int, steps_per_epoch: int | Sequence[int]) -> int | None:
    """Return how many optimizer steps the head learns alone: 0 for none, None for all of the run.

    Parameters
    ----------
    freeze
        ``model.start_from.freeze``.
    total_steps, steps_per_epoch
        As for `anneal.schedules.length_in_steps`.

    Examples
    --------
    >>> [freeze_steps(freeze, total_steps=30, steps_per_epoch=10) for freeze in (0.0, "1 epochs", "60 steps", 1.0)]
    [0, 10, None, None]
    """
    steps = length_in_steps(freeze, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    return steps if steps < total_steps else None


def _hash_fault(sha256: str | None, weights: bytes, path: str) -> str:
    found = hashlib.sha256(weights).hexdigest()
    if found == sha256:
        return ""
    if sha256 is None:
        return (
            f"model.start_from.sha256: found null, allowed: the hash of {path}/weights.safetensors, so that params.yaml says "
            f"which weights they were; write sha256: {found}"
        )
    return (
        f"model.start_from.sha256: found {sha256[:12]}..., but {path}/weights.safetensors has {found[:12]}..., allowed: the "
        f"weights that were meant, or for these write sha256: {found}"
    )


def _normalization_faults(normalize: str, member: str, path: str) -> list[str]:
    if normalize == member:
        return []
    return [
        f"preprocess.normalize: found {normalize}, allowed: {member}, which the network of model.start_from.path {path} "
        f"learned from"
    ]


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield params key, our value and theirs of each argument that differs and may not."""
    name = ours["name"]
    if name != theirs["name"]:
        # The arguments of another architecture say nothing more.
        yield "model.name", name, theirs["name"]
        return
    free = FREE - {"height"} if name == "mlp" else FREE
    # activation and norm do not apply to a network by import path.
    used = {"in_channels", "arguments"} if is_custom(name) else set(ours)
    for argument in ours:
        if argument not in used or argument in free:
            continue
        a, b = ours[argument], theirs.get(argument)
        if argument == "norm_arguments" and ours.get("norm") != theirs.get("norm"):
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for part in dict.fromkeys([*a, *b]):
                if a.get(part) != b.get(part) and f"{argument}.{part}" not in free:
                    yield f"{_key(argument, ours)}.{part}", a.get(part), b.get(part)
        elif a != b:
            yield _key(argument, ours), a, b


def _key(argument: str, architecture: Mapping[str, Any]) -> str:
    """Return where params.yaml says what an argument of `build_network` is."""
    name = architecture["name"]
    keys = {
        "arguments": "model.custom" if is_custom(name) else f"model.{name}",
        "activation": "model.activation",
        "norm": "model.norm.name",
        "norm_position": "model.norm.position",
        "norm_arguments": f"model.norm.{architecture.get('norm')}",
        "in_channels": "data.path: channels of an image",
        "height": "preprocess.size",
    }
    return keys.get(argument, f"model: {argument}")


def _neighbour(folder: Path) -> str:
    try:
        return nearest(folder.name, [entry.name for entry in folder.parent.iterdir() if entry.is_dir()])
    except OSError:
        return ""


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
