"""The calls of a journal, made against MLflow; each may be made again, and then changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from anneal.tracking.execution import execution
from anneal.tracking.files import artifact, data_set, link, picture, text
from anneal.tracking.journal import Line
from anneal.tracking.model import predictor
from anneal.tracking.names import NOTE, description
from anneal.tracking.runs import adopt, child, finish, start, start_study
from anneal.tracking.session import Session
from anneal.tracking.split_uses import recipes_on_test


def tag(session: Session, *, key: str, value: str, **_: Any) -> None:
    """Set a tag of the run."""
    session.client.set_tag(session.run_id, key, value)


def headline(session: Session, *, values: dict[str, float], time: int) -> None:
    """Log metrics of the parent, and renew its description."""
    if session.parent_id:
        from mlflow.entities import Metric

        session.log_points(session.parent_id, [Metric(key, float(value), time, 0) for key, value in values.items()])
        metrics = session.client.get_run(session.parent_id).data.metrics
        known = {key: value for key, value in metrics.items() if not key.startswith("curve/")}
        session.client.set_tag(session.parent_id, NOTE, description(session.params, known))


def curves(session: Session, *, values: dict[str, list[float]], time: int) -> None:
    """Log curves of the parent."""
    from mlflow.entities import Metric

    points = [
        Metric(f"curve/{key}", float(value), time, step)
        for key, curve in values.items()
        for step, value in enumerate(curve, 1)
        if not np.isnan(value)
    ]
    if session.parent_id:
        session.log_points(session.parent_id, points)


def test_uses(session: Session, *, digest: str | None, **_: Any) -> int | None:
    """Return how many recipes of the experiment have figures of a data set's test split."""
    digest = digest or (session.info or {}).get("digest")
    return len(recipes_on_test(session.client, [session.experiment_id], digest)) if digest else None


CALLS: dict[str, Callable[..., Any]] = {
    "start": start,
    "start_study": start_study,
    "adopt": adopt,
    "child": child,
    "tag": tag,
    "headline": headline,
    "curves": curves,
    "artifact": artifact,
    "text": text,
    "picture": picture,
    "data_set": data_set,
    "link": link,
    "predictor": predictor,
    "test_uses": test_uses,
    "execution": execution,
    "finish": finish,
}
"""By the name that a journal has for a call; those in `session.POINTS` are made together."""


def call(session: Session, line: Line) -> Any:
    """Make a call, and return its answer."""
    if line.name in ("start", "start_study"):
        session.recall(line)
    return CALLS[line.name](session, **line.arguments)
