"""How long a stage took when it last ran, read back from MLflow."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from anneal.tracking.address import ENVIRONMENT, tracking_uri


def last_seconds(uri: str, experiment: str, stage: str, member: str) -> tuple[float, int | None] | None:
    """Return the seconds of a member's newest finished run of a stage, and its epochs where it says so.

    Parameters
    ----------
    uri, experiment
        As in section ``tracking``.
    stage, member
        As the run's tags have them.

    Returns
    -------
    tuple or None
        None where there is no such run, or the store is out of reach.
    """
    address = tracking_uri(uri)
    file = re.match(r"sqlite:///([^?]+)", address)
    if file and not Path(file[1]).exists():  # mlflow would make one
        return None
    for key, value in {**ENVIRONMENT, "MLFLOW_LOGGING_LEVEL": "ERROR"}.items():
        os.environ.setdefault(key, value)
    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import mlflow

    try:
        client = mlflow.MlflowClient(address)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return None
        text = f"tags.stage = '{stage}' and tags.member = '{member}' and attributes.status = 'FINISHED'"
        runs = client.search_runs([found.experiment_id], text, max_results=1, order_by=["attributes.start_time DESC"])
    except Exception:  # whatever a store, a server or the network raises: an estimate is worth no fault
        return None
    if not runs or not runs[0].info.end_time:
        return None
    epochs = runs[0].data.params.get("trainer.epochs", "")
    return (runs[0].info.end_time - runs[0].info.start_time) / 1000, int(epochs) if epochs.isdigit() else None
