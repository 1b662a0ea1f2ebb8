"""A Lightning logger that hands metrics to a function, so that Lightning meets the tracking server nowhere."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

Write = Callable[[dict[str, float], int], None]
"""Takes metrics by name and the number of optimizer steps behind them."""


class FunctionLogger(Logger):
    """Log by calling ``write(metrics, step)`` on the first process.

    Parameters
    ----------
    write
        Called once an epoch.
    """

    def __init__(self, write: Write) -> None:
        super().__init__()
        self._write = write

    @property
    def name(self) -> str:
        """Name that Lightning uses for folders; there are none."""
        return "anneal"

    @property
    def version(self) -> str:
        """Version that Lightning uses for folders; there are none."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Pass metrics on."""
        self._write(dict(metrics), int(step or 0))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the stage logs the params, once."""
