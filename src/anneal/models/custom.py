"""Networks from elsewhere, by import path; imports no torch, so that checking params is quick."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from anneal.params import UserError, nearest

PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$"
"""``package.module:callable``."""


def import_callable(path: str) -> Callable[..., Any]:
    """Import what ``package.module:callable`` names: a function or a class. To import a module is to run its code.

    Modules are looked for in the current folder first, which for the pipeline is the repository, as Python itself does for
    ``python -m``, then where Python looks.

    Raises
    ------
    UserError
        The path has another form, there is no such module or name, or importing it fails.
    """
    if not re.fullmatch(PATTERN, path):
        raise UserError(f"model.name: found {path}, allowed: package.module:callable")
    module_name, _, name = path.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = str(error.name or "")
        if f"{module_name}.".startswith(f"{missing}."):
            raise UserError(
                f"model.name: found {path}, but there is no module {missing}; it must be installed, or lie in the "
                f"folder that holds dvc.yaml"
            ) from None
        raise UserError(f"model.name: {module_name} imports {missing}, which is not installed") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"model.name: importing {module_name} failed: {_reason(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"model.name: found {path}, but {module_name} has no callable {name}{nearest(name, names)}")
    return function


def call_arguments(
    path: str, arguments: Mapping[str, Any], *, num_classes: int = 0, in_channels: int = 0
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return a custom network's callable and what it is called with.

    ``num_classes``, ``in_chans`` and ``in_channels`` are added where its signature names them and ``arguments`` does not.

    Parameters
    ----------
    path
        ``package.module:callable``.
    arguments
        ``model.custom``.
    num_classes, in_channels
        Number of logits, channels of the image.

    Raises
    ------
    UserError
        The callable cannot be imported, has no such argument, or needs one that is not given.
    """
    function = import_callable(path)
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):  # Some callables written in C have none.
        return function, dict(arguments)
    kinds = {parameter.kind for parameter in known.values()}
    by_name = {
        name: parameter
        for name, parameter in known.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for name in arguments:
            if name not in by_name:
                hint = nearest(name, by_name) or f"; {path} takes {', '.join(by_name) or 'none'}"
                raise UserError(f"model.custom.{name}: unknown argument{hint}")
    ours = {"num_classes": num_classes, "in_chans": in_channels, "in_channels": in_channels}
    given = {**{name: value for name, value in ours.items() if name in by_name}, **arguments}
    for name, parameter in by_name.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            raise UserError(f"model.custom.{name}: missing; {path} needs it")
    return function, given


def construct(path: str, arguments: Mapping[str, Any], *, num_classes: int, in_channels: int) -> Any:
    """Call what ``package.module:callable`` names; see `call_arguments`.

    Raises
    ------
    UserError
        Beside the faults of `call_arguments`: the call fails.
    """
    function, given = call_arguments(path, arguments, num_classes=num_classes, in_channels=in_channels)
    try:
        return function(**given)
    except (Exception, SystemExit) as error:
        raise UserError(f"model.name: {path} failed: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Say in one line what was raised and where: the code is the user's own, and they will want to look there."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"
