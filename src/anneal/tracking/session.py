"""A journal's run as MLflow has it: what is known of it, and the ways to log that its calls share."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anneal.tracking.journal import Journal, Line
from anneal.tracking.names import data_name, dvc_hash
from anneal.tracking.run import PROFILE
from anneal.tracking.store import Store

if TYPE_CHECKING:
    from mlflow.entities import Dataset, Metric
    from mlflow.entities import Run as Record

POINTS = ("metrics", "series", "system")
"""Calls that log metrics of the run, and are made together."""

MAX_POINTS = 1000
"""Metrics that MLflow takes in a call."""

MAX_PARAMS = 100
"""Params that MLflow takes in a call."""

MAX_BYTES = 800_000
"""Bytes that a call with params may have; MLflow takes a million."""

OWNER = "journal"
"""Tag of a run: the journal that made it, or that goes on with it."""


class Session:
    """One stage execution, or one study, as MLflow is told of it.

    Parameters
    ----------
    store
        The connection.
    journal
        Whose calls are made.
    until
        Where the stage is gone: the time of its last call. What has changed since then is not what it wrote.
    """

    def __init__(self, store: Store, journal: Journal, until: int | None = None) -> None:
        self.store = store
        self.journal = journal
        self.until = until
        self.context = journal.load("context.json")
        self.run_id, self.run_began = "", 0
        self.parent_id: str | None = None
        self.resumed = False
        self.lost = self.over = False
        self.stage, self.member = "", None
        self.info: dict[str, Any] | None = None
        self.used: str | None = None
        self.logged: set[str] = set()
        self._seen: set[tuple[str, int]] | None = None

    def state(self) -> dict[str, Any]:
        """Return what a later process needs to go on."""
        keys = ("run_id", "parent_id", "run_began", "resumed", "lost", "over")
        return {key: getattr(self, key) for key in keys}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        for key, value in state.items():
            setattr(self, key, value)

    def recall(self, line: Line) -> None:
        """Take from a call that has been made what later ones need."""
        if line.name in ("start", "start_study"):
            given = line.arguments
            self.params, self.cwd = given["params"], given["cwd"]
            self.began, self.outs = given["time"], given.get("outs", [])
            self.stage, self.member = given.get("stage", "study"), given.get("member")
            self.info, self.used = given.get("info"), given.get("data")
            tags = {
                "mlflow.source.name": given["script"],
                "mlflow.source.type": "LOCAL",
                **self.context.get("tags", {}),
            }
            self.tags = {**tags, **({"study": given["study"]} if "study" in given else {})}
            self.process = self.context.get("process") or f"{platform.node()} 0 gone"
        elif line.name in ("adopt", "data_set"):
            self.info, self.used = line.arguments["info"], line.arguments["path"]

    @property
    def client(self) -> Any:
        """MLflow's client."""
        return self.store.client

    @property
    def experiment_id(self) -> str:
        """Id of the experiment, which is made where there is none."""
        return self.store.experiment(self.params["tracking"]["experiment"])

    def search(self, text: str) -> list[Record]:
        """Return the experiment's runs that a filter finds, oldest first."""
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        return list(self.client.search_runs([self.experiment_id], text, order_by=order))

    # ---- params, tags, metrics --------------------------------------------------------------------------------------

    def log_params(self, run: Record, values: dict[str, str]) -> None:
        """Log those params that a run lacks, in as many calls as MLflow's limits ask for."""
        from mlflow.entities import Param

        batch: list[Param] = []
        size = 0
        for key, value in values.items():
            if key in run.data.params:
                continue
            length = len(json.dumps([key, value])) + 30
            if batch and (len(batch) == MAX_PARAMS or size + length > MAX_BYTES):
                self.client.log_batch(run.info.run_id, params=batch)
                batch, size = [], 0
            batch, size = [*batch, Param(key, value)], size + length
        if batch:
            self.client.log_batch(run.info.run_id, params=batch)

    def tag_all(self, run_id: str, tags: dict[str, str]) -> None:
        """Set tags of a run."""
        from mlflow.entities import RunTag

        items = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(items), MAX_PARAMS):
            self.client.log_batch(run_id, tags=items[start : start + MAX_PARAMS])

    def points(self, line: Line) -> list[Metric]:
        """Return what a call of `POINTS` logs."""
        from mlflow.entities import Metric

        arguments = line.arguments
        if line.name == "metrics":
            rows = [(arguments["step"], arguments["values"])]
        elif line.name == "series":
            rows = arguments["rows"]
        elif self.over:  # taken while the stage wrote its last line
            rows = []
        else:  # seconds, so that a continued run counts on
            rows = [(max(0, arguments["time"] - self.run_began) // 1000, arguments["values"])]
        return [
            Metric(key, float(value), arguments["time"], step) for step, values in rows for key, value in values.items()
        ]

    def log_own(self, points: list[Metric]) -> None:
        """Log metrics of this run, but those that a continued run has already."""
        if self._seen is None:
            again = self.resumed or (self.until is not None and self.taken())
            self._seen = self.history() if again else set()
        self.log_points(self.run_id, [point for point in points if (point.key, point.step) not in self._seen])

    def history(self) -> set[tuple[str, int]]:
        """Return the metrics' names and steps that the run has already."""
        keys = self.client.get_run(self.run_id).data.metrics
        return {(key, point.step) for key in keys for point in self.client.get_metric_history(self.run_id, key)}

    def log_points(self, run_id: str, points: Iterable[Metric]) -> None:
        """Log metrics in as few calls as MLflow's limit allows; of those that it refuses the others are kept.

        Raises
        ------
        Exception
            Of the last one that was refused, or of a call that may be made again.
        """
        todo, refused = list(points), None
        batches = [todo[start : start + MAX_POINTS] for start in range(0, len(todo), MAX_POINTS)][::-1]
        while batches:
            batch = batches.pop()
            try:
                self.client.log_batch(run_id, metrics=batch)
            except Exception as error:
                if not _at_fault(error):
                    raise
                if len(batch) > 1:
                    middle = len(batch) // 2
                    batches += [batch[middle:], batch[:middle]]
                else:
                    refused = error
        if refused is not None:
            raise refused

    def taken(self) -> bool:
        """Say whether a later stage goes on with the run, and so ends it."""
        return bool(self.client.get_run(self.run_id).data.tags.get(OWNER) != self.journal.name)

    # ---- files ------------------------------------------------------------------------------------------------------

    def place(self, path: str | Path) -> Path:
        """Return where a file that a call names is, in the working tree or in the journal's folder.

        Raises
        ------
        FileNotFoundError
            It is gone, or has been written anew after the stage.
        """
        found = self.journal.folder / path
        if self.until is not None and Path(path).is_absolute() and _changed(found) > self.until / 1000 + 2:
            raise FileNotFoundError(f"{found}: written anew since")
        return found

    def hash_of(self, path: str) -> str | None:
        """Return the hash that dvc.lock gives a path of the stage, None where that is no longer what the stage wrote."""
        here = Path(self.cwd) / path
        try:
            return dvc_hash(self.place(here), self.cwd)
        except (OSError, ValueError):
            return None

    def data(self) -> Dataset | None:
        """Return the data set that the run uses, as MLflow has it."""
        from mlflow.entities import Dataset

        if self.info is None or self.used is None:
            return None
        source = json.dumps({"uri": str((Path(self.cwd) / self.used).absolute())})
        profile = json.dumps({key: self.info[key] for key in PROFILE if key in self.info})
        return Dataset(data_name(self.params), self.info["digest"], "local", source, profile=profile)


def _at_fault(error: Exception) -> bool:
    """Say whether it is what a call holds that a store refuses."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def _changed(path: Path) -> float:
    """Return when a file, or the newest of a folder, was written."""
    newest = path.stat().st_mtime
    for each in path.rglob("*") if path.is_dir() else ():
        with suppress(OSError):
            newest = max(newest, each.stat().st_mtime)
    return newest
