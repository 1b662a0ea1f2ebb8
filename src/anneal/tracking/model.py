"""The final predictor as a logged model: its files, its signature, its figures, its version in the registry."""

from __future__ import annotations

import base64
import importlib.metadata
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from anneal.tracking.names import at, dvc_hash
from anneal.tracking.session import Session
from anneal.tracking.store import permanent

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

REQUIREMENTS = ("torch", "numpy", "safetensors", "pydantic", "ruamel.yaml", "pillow", "opencv-python-headless")
"""Distributions that the logged predictor needs beside mlflow itself."""


def predictor(
    session: Session,
    *,
    files: list[str],
    base: str,
    shape: list[int],
    pixels: str,
    values: dict[str, float],
    id: int,
    time: int,
) -> str:
    """Log the predictor whose ``files`` are below ``base``, and return its URI; one that has been logged is found again."""
    client = session.client
    example = np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "predictor"
        for name in files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(session.place(Path(base) / name), root / name)
        md5 = str(dvc_hash(root, folder))
        model = find_model(session, {"predictor.md5": md5, "journal": f"{session.journal.name}/{id}"})
        if str(model.status) != "READY":
            try:
                save_model(session, Path(folder), root, example, model.model_id)
                client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
            except Exception as error:
                if permanent(error):
                    client.finalize_logged_model(model.model_id, "FAILED")
                raise
            client.finalize_logged_model(model.model_id, "READY")
    log_figures(session, model.model_id, values, time)
    uri = f"models:/{model.model_id}"
    for run_id in filter(None, [session.run_id, session.parent_id]):
        log_output(session, run_id, model.model_id)
        client.set_tag(run_id, "predictor.uri", uri)
    if registered := at(session.params, "registry", "name"):
        register(session, registered, uri, model.model_id, md5)
    return uri


def find_model(session: Session, tags: dict[str, str]) -> LoggedModel:
    """Return the logged model with these tags, made where there is none; of several the first stays."""
    client, experiment = session.client, session.experiment_id
    find = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    order = [{"field_name": "creation_time", "ascending": True}]

    def search() -> list[LoggedModel]:
        found = client.search_logged_models([experiment], find, order_by=order)
        return [model for model in found if str(model.status) != "FAILED"]

    if found := search():
        return found[0]
    made = client.create_logged_model(experiment, "predictor", session.run_id, tags)
    found = search() or [made]
    for extra in found[1:]:  # made by a call whose answer was lost
        client.delete_logged_model(extra.model_id)
    return found[0]


def log_figures(session: Session, model_id: str, values: dict[str, float], time: int) -> None:
    """Log metrics of the run that are tied to the model and to the data set."""
    from mlflow.entities import Metric

    ties: dict[str, Any] = {"model_id": model_id}
    if (data := session.data()) is not None:
        ties |= {"dataset_name": data.name, "dataset_digest": data.digest}
    known = {metric.key for metric in session.client.get_logged_model(model_id).metrics or []}
    # The run may have them already; with the same time they are the same points.
    times = {
        (m.key, m.value): m.timestamp for m in session.client.get_run(session.run_id).data._metric_objs if m.step == 0
    }
    points = [
        Metric(key, float(value), times.get((key, float(value)), time), 0, **ties)
        for key, value in values.items()
        if key not in known
    ]
    session.log_points(session.run_id, points)


def log_output(session: Session, run_id: str, model_id: str) -> None:
    """Record the model as an output of a run, once."""
    from mlflow.entities import LoggedModelOutput

    outputs = session.client.get_run(run_id).outputs
    if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        session.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def save_model(session: Session, folder: Path, root: Path, example: npt.NDArray[np.uint8], model_id: str) -> None:
    """Write MLflow's form of the predictor to ``folder / "model"``, with a copy of this package as its code."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    assert session.info is not None
    classes = session.info["classes"]
    package = Path(__file__).resolve().parents[1]
    shutil.copytree(package, folder / "anneal", ignore=shutil.ignore_patterns("__pycache__"))
    mlflow.pyfunc.save_model(
        folder / "model",
        mlflow_model=Model(run_id=session.run_id, model_uuid=model_id, model_id=model_id),
        python_model=str(package / "pyfunc.py"),
        artifacts={"root": str(root)},
        code_paths=[str(folder / "anneal")],
        pip_requirements=requirements(),
        input_example=example,
        signature=ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *example.shape[1:]))]),
            outputs=Schema([TensorSpec(np.dtype(np.float64), (-1, len(classes)))]),
        ),
        metadata={"classes": classes},
    )


def requirements() -> list[str]:
    """Return pins of what the predictor needs, without the local part of a version that no index has (``+cpu``)."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


def register(session: Session, name: str, uri: str, model_id: str, md5: str) -> None:
    """Register the model as a new version, unless a version with the same bytes is there."""
    from mlflow.exceptions import MlflowException

    client = session.client
    with session.store.lock():
        with suppress(MlflowException):  # it exists
            client.create_registered_model(name)
        versions = client.search_model_versions(f"name = '{name}'")
        if all(version.tags.get("predictor.md5") != md5 for version in versions):
            client.create_model_version(
                name, uri, session.run_id, tags={"predictor.md5": md5}, await_creation_for=0, model_id=model_id
            )
