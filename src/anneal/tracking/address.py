"""Where runs go: the address of the store, the environment of what talks to it, the command that shows it."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from anneal import environment
from anneal.params import UserError

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Defaults of the environment of what talks to MLflow, which itself tries again; what the user has set wins."""

VIEW = "headline"
"""Name of the view of the runs table that a new experiment gets."""

SECRET = re.compile(r"(?i)(?:PASSWORD|PASSWD|_PWD|TOKEN|SECRET|ACCESS_KEY|API_KEY)$")
"""Names of environment variables whose values are never printed."""


def repository() -> Path:
    """Return the root of the repository that owns the runs: the real one, in a temporary experiment too."""
    if root := os.environ.get("DVC_ROOT"):  # set by DVC, and names the real one even in .dvc/tmp/exps
        return Path(root).resolve()
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


def tracking_uri(uri: str) -> str:
    """Return the address of the store: MLFLOW_TRACKING_URI or ``uri``, a relative sqlite path made absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or uri
    match = re.fullmatch(r"sqlite:///(?!/)([^?]+)(\?.*)?", uri)
    return f"sqlite:///{repository() / match[1]}{match[2] or ''}" if match else uri


def redact(text: str) -> str:
    """Return ``text`` without the passwords and tokens of the URIs and headers in it, and without those of the environment.

    >>> redact("postgresql://me:secret@host/db"), redact("Authorization: Bearer abcdef012345")
    ('postgresql://me:***@host/db', 'Authorization: Bearer ***')
    """
    text = environment.redact(text)
    text = re.sub(r"(?i)\b(basic|bearer)\s+[\w+/=.~-]{8,}", r"\1 ***", text)
    # Longest first, since one may hold another. Shorter than 4 characters they would take whole words with them.
    secrets = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= 4}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def one_line(error: BaseException | str) -> str:
    """Return a fault as one short line without secrets."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return redact(" ".join(text.split()))[:300]


def say(uri: str, text: str, file: Any, *, warning: bool = False) -> None:
    """Print one line on MLflow at ``uri``; never raises."""
    line = f"{'warning: ' if warning else ''}MLflow at {redact(uri) or 'an unknown address'}: {text}"
    with suppress(OSError, ValueError):
        print(line, file=file, flush=True)


def artifact_root(root: Path) -> str:
    """Return where a store without a server keeps artifacts."""
    return (root / "mlruns").as_uri()


def ui_command(uri: str, port: int = 5000) -> tuple[list[str], dict[str, str]]:
    """Return the command that shows the runs at ``http://127.0.0.1:<port>``, and the variables that it needs.

    Raises
    ------
    UserError
        The runs are on a server, which has its own page.
    """
    uri = tracking_uri(uri)
    if uri.startswith(("http://", "https://")):
        raise UserError(f"tracking.uri: the runs are on a server, open {redact(uri)}")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
    # The store goes by the environment, since a command line with a password in it is everybody's to read.
    return command, {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": artifact_root(repository()),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        **{key: ENVIRONMENT[key] for key in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "GIT_PYTHON_REFRESH")},
    }


def ui_page(uri: str, experiment: str, address: str = "http://127.0.0.1:5000") -> str:
    """Return the address of the experiment's runs table with the headline columns, on the server at ``address``.

    Without it MLflow's page opens on prompts and traces. Takes seconds: it asks the store.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow

    try:
        found = mlflow.MlflowClient(tracking_uri(uri)).get_experiment_by_name(experiment)
    except Exception:  # no store yet, or none that answers: the server will say so
        found = None
    if found is None:
        return address
    view = f"&viewStateShareKey={VIEW}" if f"mlflow.sharedViewState.{VIEW}" in found.tags else ""
    return f"{address}/#/experiments/{found.experiment_id}/runs?workflowType=machine_learning{view}"
