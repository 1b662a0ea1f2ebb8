"""Calls with files: artifacts, pictures, the data set, and where a cached stage's outs came from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anneal.tracking.names import PARENT, tag_name
from anneal.tracking.session import Session
from anneal.tracking.store import permanent


def artifact(session: Session, *, path: str, folder: str | None, **_: Any) -> None:
    """Upload a file, or all files of a folder."""
    found = session.place(path)
    if found.is_dir():
        session.client.log_artifacts(session.run_id, str(found), folder)
    else:
        session.client.log_artifact(session.run_id, str(found), folder)


def text(session: Session, *, file: str, content: str, **_: Any) -> None:
    """Upload a text."""
    write(session, file, lambda path: path.write_text(content, encoding="utf-8"))


def picture(session: Session, *, file: str, panels: list[dict[str, Any]], title: str, **_: Any) -> None:
    """Draw and upload line plots."""
    from anneal.reporting.lines import draw_panels, from_values

    write(session, file, lambda path: draw_panels(from_values(panels), path, title))


def write(session: Session, file: str, fill: Callable[[Path], object]) -> None:
    """Upload an artifact that ``fill`` writes."""
    *folders, name = Path(file).parts
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder) / name)
        session.client.log_artifact(session.run_id, str(Path(folder) / name), "/".join(folders) or None)


def data_set(session: Session, *, path: str, info: dict[str, Any] | None, **_: Any) -> None:
    """Record a data set as an input."""
    session.info, session.used = info, path
    log_data(session)


def log_data(session: Session) -> None:
    """Record the data set as an input of the run and of its parent."""
    from mlflow.entities import DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    data = session.data()
    if data is None:
        raise FileNotFoundError(f"{session.used}: no dataset.json there")
    use = "evaluation" if session.stage == "evaluate" else "training"
    entry = DatasetInput(data, [InputTag("mlflow.data.context", use)])
    with session.store.lock():  # two first uses of a data set at once: the server's answer to the second is a fault
        for run_id in filter(None, [session.run_id, session.parent_id]):
            try:
                session.client.log_inputs(run_id, [entry])
            except MlflowException as error:
                if not permanent(error):
                    raise
                session.client.log_inputs(run_id, [entry])  # the first was on another machine


def link(session: Session, *, stage: str, path: str, member: str | None, md5: str | None = None, **_: Any) -> None:
    """Tag the parent with the earlier run that wrote a path, where there is one."""
    md5 = md5 or session.hash_of(path)
    if md5 is None or session.parent_id is None:
        return
    wrote = f"tags.`{tag_name('out', Path(path).as_posix())}` = '{md5}' and tags.stage = '{stage}'"
    found = session.search(f"{wrote} and attributes.status = 'FINISHED'")
    if found and all(run.data.tags.get(PARENT) != session.parent_id for run in found):
        session.client.set_tag(session.parent_id, tag_name("linked", stage, member), found[0].info.run_id)
