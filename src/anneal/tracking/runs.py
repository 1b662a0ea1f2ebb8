"""Runs in MLflow: how they are found, made, continued and ended."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from anneal import params
from anneal.tracking.files import log_data
from anneal.tracking.names import NOTE, PARENT, description, fingerprint, flat_params, recipe_name, tag_name
from anneal.tracking.session import OWNER, Session
from anneal.tracking.split_uses import TAG
from anneal.tracking.store import alive

if TYPE_CHECKING:
    from mlflow.entities import Run as Record


def start(session: Session, *, resume: bool, time: int, **_: Any) -> None:
    """Find or make the run of a stage, and its parent."""
    if session.info is not None:
        with session.store.lock():
            session.parent_id = find_parent(session)
    found = made(session)
    if found:  # this journal has been here before
        run = found[0]
    else:
        earlier = siblings(session)
        ended = [each for each in earlier if not running(each)]
        # Of two machines that train the same, each goes on with its own.
        ended.sort(key=lambda each: each.data.tags.get("process", "").startswith(f"{platform.node()} "))
        # A stage may be killed between the end of its run and its own.
        unfinished = [each for each in ended if each.info.status != "FINISHED"]
        run = (unfinished or ended)[-1] if resume and ended else create_child(session, attempt=len(earlier) + 1)
    session.run_id, session.run_began, session.resumed = (
        run.info.run_id,
        run.info.start_time,
        run.info.start_time != time,
    )
    if session.resumed:
        session.tag_all(session.run_id, {OWNER: session.journal.name, "process": session.process})
        if "error" in run.data.tags:
            session.client.delete_tag(session.run_id, "error")
    elif session.member:
        merged = params.member(session.params, session.member)
        values = flat_params({key: merged[key] for key in params.MEMBER_SECTIONS if key in merged})
        session.log_params(run, values)
    session.client.update_run(session.run_id, status="RUNNING")
    if session.parent_id:
        if session.until is None:  # what has ended long ago must not look as if it ran
            session.client.update_run(session.parent_id, status="RUNNING")
        log_data(session)


def start_study(session: Session, *, study: str, key: str, time: int, kind: str = "study", **_: Any) -> None:
    """Find or make the run of a study."""
    earlier = session.search(f"tags.`study.key` = '{key}'")
    if earlier:
        run = earlier[-1]
        if "error" in run.data.tags:
            session.client.delete_tag(run.info.run_id, "error")
    else:
        tags = {**session.tags, "stage": "study", "study.key": key, OWNER: session.journal.name}
        run = once(session, f"tags.`study.key` = '{key}'", time, tags, f"{kind} {study}")
    session.run_id, session.run_began = run.info.run_id, run.info.start_time
    session.tag_all(session.run_id, {OWNER: session.journal.name, "process": session.process})
    session.client.update_run(session.run_id, status="RUNNING")
    session.log_params(run, flat_params(session.params))


def adopt(session: Session, *, path: str, info: dict[str, Any], **_: Any) -> None:
    """Put the run below the parent of its params and a data set."""
    session.info, session.used = info, path
    with session.store.lock():
        session.parent_id = find_parent(session)
    attempt = len(siblings(session)) + 1
    if session.until is None:
        session.client.update_run(session.parent_id, status="RUNNING")
    session.tag_all(session.run_id, {PARENT: session.parent_id, "attempt": str(attempt)})
    session.client.update_run(session.run_id, name=child_name(session, attempt))
    log_data(session)


def finish(session: Session, *, status: str, reason: str, time: int, outs: dict[str, str | None] | None = None) -> None:
    """End the run, and its parent where nothing else below it runs."""
    session.over = True
    if session.taken():
        return
    if session.lost:
        session.client.set_tag(session.run_id, "tracking", "incomplete")
    if reason:
        session.client.set_tag(session.run_id, "error", reason)
    if status == "FINISHED":
        tag_outs(session, outs if outs is not None else {out: session.hash_of(out) for out in session.outs})
    for extra in made(session):  # by a call whose answer was lost
        if extra.info.run_id != session.run_id:
            session.client.delete_run(extra.info.run_id)
    with session.store.lock():
        session.client.set_terminated(session.run_id, status, time)
        if session.parent_id and not any(
            running(run) for run in children(session) if run.info.run_id != session.run_id
        ):
            parent = session.client.get_run(session.parent_id).info
            if parent.status == "RUNNING" or (parent.end_time or 0) <= time:
                session.client.set_terminated(session.parent_id, status, time)


def made(session: Session) -> list[Record]:
    """Return the run of this journal, and others that it has made where an answer was lost."""
    found = session.search(f"tags.`{OWNER}` = '{session.journal.name}'")
    return [run for run in found if not run.data.tags.keys() & {"fingerprint", "run.part"}]


def find_parent(session: Session) -> str:
    """Return the parent run of these params on this data set, made where there is none; call under the lock."""
    assert session.info is not None
    print_ = fingerprint(session.params, session.info["digest"])
    find = f"tags.fingerprint = '{print_}'"
    found = session.search(find)
    name = f"{recipe_name(session.params)} · {print_[:4]}"
    tags = {
        **session.tags,
        "fingerprint": print_,
        "data.digest": session.info["digest"],
        **{key: session.info[key] for key in (TAG,) if key in session.info},
        NOTE: description(session.params, {}),
        OWNER: session.journal.name,
    }
    parent = found[0] if found else once(session, find, session.began, tags, in_experiment(session, name))
    session.log_params(parent, flat_params(session.params))
    return parent.info.run_id


def once(session: Session, find: str, began: int, tags: dict[str, str], name: str) -> Record:
    """Make a run and return it; the first of its kind, where others made one too, or where an answer was lost."""
    new = session.client.create_run(session.experiment_id, began, tags, name)
    found = session.search(find) or [new]
    for extra in found[1:]:
        if extra.data.tags.get(OWNER) == session.journal.name:
            session.client.delete_run(extra.info.run_id)
    return found[0]


def create_child(session: Session, attempt: int) -> Record:
    """Make the run of a stage."""
    tags = {**session.tags, "stage": session.stage, "attempt": str(attempt), "process": session.process}
    tags |= {"member": session.member} if session.member else {}
    tags |= {PARENT: session.parent_id} if session.parent_id else {}
    find = f"tags.`{OWNER}` = '{session.journal.name}' and tags.stage = '{session.stage}'"
    return once(session, find, session.began, {**tags, OWNER: session.journal.name}, child_name(session, attempt))


def child_name(session: Session, attempt: int) -> str:
    """Return ``train a #2 · tabby-curs``."""
    return in_experiment(
        session, " ".join(filter(None, [session.stage, session.member, f"#{attempt}" if attempt > 1 else None]))
    )


def in_experiment(session: Session, name: str) -> str:
    """Return a name with that of DVC's experiment."""
    return " · ".join(filter(None, [name, session.tags.get("DVC_EXP_NAME")]))


def children(session: Session) -> list[Record]:
    """Return the runs below the parent."""
    return session.search(f"tags.`{PARENT}` = '{session.parent_id}'")


def siblings(session: Session) -> list[Record]:
    """Return earlier runs of this stage and member below the parent; runs whose process is gone end as KILLED."""
    if session.parent_id is None:
        return []
    runs = [run for run in children(session) if run.info.run_id != session.run_id]
    for run in runs:
        if run.info.status == "RUNNING" and not running(run):
            session.client.set_terminated(run.info.run_id, "KILLED")
    mine = {"stage": session.stage, **({"member": session.member} if session.member else {})}
    return [run for run in runs if mine.items() <= run.data.tags.items()]


def tag_outs(session: Session, hashes: dict[str, str | None]) -> None:
    """Tag the run with the hashes of what it wrote."""
    tags = {}
    for out, md5 in hashes.items():
        if md5:
            tags[tag_name("out", out)] = md5
            if out.startswith("models/"):
                tags["model.md5"] = md5
    session.tag_all(session.run_id, tags)


def child(
    session: Session,
    *,
    label: str,
    key: str,
    values: dict[str, Any],
    tags: dict[str, str],
    series: list[dict[str, Any]],
    began: int,
    ended: int,
    status: str = "FINISHED",
    **_: Any,
) -> None:
    """Log a run of a study, whole."""
    from mlflow.entities import Metric

    below = f"tags.`{PARENT}` = '{session.run_id}'"
    if not session.logged:
        session.logged = {run.data.tags.get("run.key", "") for run in session.search(below)}
    if key in session.logged:
        return
    find = f"{below} and tags.`run.part` = '{key}'"
    tags = {
        **session.tags,
        "stage": "study",
        **tags,
        PARENT: session.run_id,
        "run.part": key,
        OWNER: session.journal.name,
    }
    found = session.search(find)
    run = found[0] if found else once(session, find, began, tags, label)
    run_id = run.info.run_id
    session.log_params(run, flat_params(values))
    session.log_points(
        run_id, [Metric(k, float(v), ended, row["step"]) for row in series for k, v in row["values"].items()]
    )
    session.client.set_terminated(run_id, status, ended)
    session.client.set_tag(run_id, "run.key", key)  # last, so that only a whole run counts as logged
    session.logged.add(key)


def running(run: Record) -> bool:
    """Say whether a stage is at work on a run, or may be on another machine."""
    return run.info.status == "RUNNING" and alive(run.data.tags.get("process", ""))
