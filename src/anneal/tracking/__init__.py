"""MLflow: one parent run for a recipe on a data set, one child run a stage execution; and the runs of a study.

A call of a stage is a line in a journal (`journal`), written by the stage (`run`) and sent by a process of its own
(`sender`), which alone imports mlflow. What cannot be sent stays, and is sent by a later stage or by `anneal sync`.
"""

from anneal.tracking.address import redact, repository, tracking_uri, ui_command, ui_page
from anneal.tracking.config import RegistryConfig, TrackingConfig
from anneal.tracking.names import MAX_PARAM, NOTE, PARENT, dvc_hash, fingerprint, flat_params
from anneal.tracking.run import RANKS, Run, stage_run, study_run

__all__ = [
    "MAX_PARAM",
    "NOTE",
    "PARENT",
    "RANKS",
    "RegistryConfig",
    "Run",
    "TrackingConfig",
    "dvc_hash",
    "fingerprint",
    "flat_params",
    "redact",
    "repository",
    "stage_run",
    "study_run",
    "tracking_uri",
    "ui_command",
    "ui_page",
]
