"""A connection to MLflow, and what its faults mean: whether to try again, or to leave a call out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from anneal.tracking.address import VIEW, artifact_root

if TYPE_CHECKING:
    from mlflow import MlflowClient

PATIENCE_LOCK = 48.0
"""Seconds that a step waits for another process of this machine."""

COLUMNS = (
    "metrics.`test/accuracy`",
    "metrics.`val/accuracy`",
    "params.`model.name`",
    "params.`optimizer.name`",
    "params.`schedule.name`",
    "params.`augment.policy`",
    "attributes.`Models`",
)
"""Columns of the view of a new experiment; of itself MLflow's table shows no metric."""


class Store:
    """A store of runs: a server, or a database.

    Parameters
    ----------
    uri
        Its address.
    root
        Root of the repository, which has the artifacts of a store without a server.
    """

    def __init__(self, uri: str, root: Path) -> None:
        self.uri = uri
        self.root = root
        self.client: Any = None
        self.last = ""
        self.calls = 0
        self._experiments: dict[str, str] = {}
        self._lock: Any = None

    def connect(self) -> None:
        """Reach the store, and make it where it is a sqlite database that is not there yet."""
        import mlflow

        self.last = "connect"
        before = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(self.uri)  # which sets the variable too
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before
        with self.lock():
            self._open_database()
        self.client = _Watched(mlflow.MlflowClient(self.uri), self)
        self.client.search_experiments(max_results=1)

    def reachable(self) -> bool:
        """Say whether the store answers."""
        try:
            self.client.client.search_experiments(max_results=1)
        except Exception:
            return False
        return True

    def lock(self) -> Any:
        """Return a file lock that all processes of this machine share which use the same store."""
        from filelock import FileLock

        if self._lock is not None:  # one object, so that a step may take it twice
            return self._lock
        if match := re.match(r"sqlite:///([^?]+)", self.uri):
            path = Path(f"{match[1]}.lock")
        elif (self.root / ".dvc").is_dir():
            path = self.root / ".dvc" / "tmp" / "mlflow.lock"
        else:
            path = Path(tempfile.gettempdir()) / f"mlflow-{hashlib.md5(self.uri.encode()).hexdigest()}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # says at once what the lock would find out at its timeout
            pass
        self._lock = FileLock(path, timeout=PATIENCE_LOCK)
        return self._lock

    def _open_database(self) -> None:
        """Reach the database once, since mlflow would try for a minute, and make a missing sqlite one.

        It is made beside its place, then renamed, so that nobody ever opens half of one.
        """
        import mlflow
        import sqlalchemy

        if not re.match(r"sqlite|postgresql|mysql|mssql", self.uri):
            return
        match = re.match(r"sqlite:///([^?]+)", self.uri)
        missing = match[1] if match and not Path(match[1]).exists() else None
        if missing:
            Path(f"{missing}.new").unlink(missing_ok=True)
        uri = f"sqlite:///{missing}.new" if missing else self.uri
        limit = {"connect_timeout": 10} if re.match(r"postgresql|mysql", uri) else {}
        with sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, connect_args=limit).connect() as connection:
            connection.execute(sqlalchemy.text("BEGIN IMMEDIATE" if uri.startswith("sqlite") else "SELECT 1"))
        if missing:
            mlflow.MlflowClient(uri).search_experiments(max_results=1)
            os.replace(f"{missing}.new", missing)

    def experiment(self, name: str) -> str:
        """Return the id of an experiment, which is made where there is none."""
        if name not in self._experiments:
            with self.lock():
                self._experiments[name] = self._find_experiment(name)
        return self._experiments[name]

    def _find_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            # A store without a server keeps artifacts where its first user stood, unless told.
            place = None if self.uri.startswith("http") else artifact_root(self.root)
            try:
                view = {f"mlflow.sharedViewState.{VIEW}": json.dumps({"selectedColumns": COLUMNS})}
                return self.client.create_experiment(name, place, view)
            except MlflowException:  # another machine was first
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise RuntimeError(
                f"experiment {name!r} is deleted; `mlflow experiments restore -x {experiment.experiment_id}` restores it"
            )
        return experiment.experiment_id


class _Watched:
    """A client that notes in ``store`` which of its methods was called last, and how many have been."""

    def __init__(self, client: MlflowClient, store: Store) -> None:
        self.client, self.store = client, store

    def __getattr__(self, name: str) -> Any:
        self.store.last = name
        self.store.calls += 1
        return getattr(self.client, name)


def permanent(error: BaseException) -> bool:
    """Say whether a call would fail as often as it is made: it is at fault itself, and not what it was sent to."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        return _refused(error.get_http_status_code())
    if isinstance(error, RequestException):
        return error.response is not None and _refused(error.response.status_code)
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return isinstance(
        error, TypeError | ValueError | LookupError | AttributeError | AssertionError | ArithmeticError | ImportError
    )


def _refused(status: int) -> bool:
    return 400 <= status < 500 and status not in (401, 403, 408, 429)


def alive(name: str) -> bool:
    """Say whether a process named by `process_name` may still run; one of another machine may."""
    host, pid, _ = [*name.split(), "", "", ""][:3]
    return host != platform.node() or (pid.isdigit() and process_name(int(pid)) == name)


def process_name(pid: int) -> str:
    """Return host, number and start of a process, by which it is known again."""
    import psutil

    try:
        return f"{platform.node()} {pid} {psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        return f"{platform.node()} {pid} gone"


@contextmanager
def silenced() -> Iterator[tuple[IO[str], IO[bytes]]]:
    """Give streams to standard error and output, which take nothing in the block: mlflow, alembic and git print much."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.dup(2), "w") as errors, open(os.dup(1), "wb", buffering=0) as answers:
        if not os.environ.get("MLFLOW_LOGGING_LEVEL"):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            os.close(nowhere)
        try:
            yield errors, answers
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(answers.fileno(), 1)
            os.dup2(errors.fileno(), 2)
