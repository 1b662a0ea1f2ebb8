"""What MLflow knows of when and where a recipe's stages ran."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anneal.tracking.runs import children
from anneal.tracking.session import Session
from anneal.tracking.split_uses import recipes_on_test

if TYPE_CHECKING:
    from mlflow.entities import Run as Record

STAGES = ("preprocess", "augment", "train", "diagnose", "evaluate")
"""Those whose times are told, in the order of the pipeline."""


def execution(session: Session, **_: Any) -> dict[str, Any] | None:
    """Return the newest finished run of each stage of this recipe; see `anneal.tracking.Run.execution`."""
    if session.parent_id is None:
        return None
    parent = session.client.get_run(session.parent_id)
    newest: dict[tuple[str, str], tuple[Record, bool]] = {}
    for key, run_id in sorted(parent.data.tags.items()):
        if key.startswith("linked."):
            run = session.client.get_run(run_id)
            newest[_label(run)] = (run, True)
    for run in children(session):  # oldest first
        if run.info.status == "FINISHED" and run.info.run_id != session.run_id:
            newest[_label(run)] = (run, False)
    order = sorted(newest, key=lambda label: (STAGES.index(label[0]) if label[0] in STAGES else len(STAGES), label))
    stages = [_stage(*newest[label]) for label in order if label[0] in STAGES]
    trained = [run for (stage, _), (run, _) in sorted(newest.items()) if stage == "train"]
    digest = (session.info or {}).get("digest")
    return {
        "stages": stages,
        "environment": _environment(session, trained[-1].info.run_id if trained else session.run_id),
        "commit": session.tags.get("mlflow.source.git.commit"),
        "test_uses": len(recipes_on_test(session.client, [session.experiment_id], digest)) if digest else None,
    }


def _label(run: Record) -> tuple[str, str]:
    return run.data.tags.get("stage", ""), run.data.tags.get("member", "")


def _stage(run: Record, earlier: bool) -> dict[str, Any]:
    began, ended = run.info.start_time, run.info.end_time
    return {
        "stage": run.data.tags.get("stage", ""),
        "member": run.data.tags.get("member"),
        "seconds": (ended - began) / 1000 if began and ended else None,
        "attempt": int(run.data.tags.get("attempt", 1)),
        "earlier": earlier,
    }


def _environment(session: Session, run_id: str) -> dict[str, str]:
    """Return the machine of a run in a few lines; what is not known is left out."""
    machine: dict[str, Any] = {}
    # Artifacts may be on another machine than the runs: whatever it is, the times are told without them.
    with tempfile.TemporaryDirectory() as folder, suppress(Exception):
        path = session.client.download_artifacts(run_id, "environment/environment.json", folder)
        machine = json.loads(Path(path).read_text(encoding="utf-8"))
    return in_words(machine)


def in_words(machine: dict[str, Any]) -> dict[str, str]:
    """Return what environment.json says of the machine in a few lines, without what is not known.

    >>> in_words({"cpu": {"model": "X 9000", "cores": 8}, "memory_bytes": 2**35, "torch": {"version": "2.13.0"}})
    {'processor': 'X 9000, 8 cores', 'memory': '32 GiB', 'torch': '2.13.0'}
    """
    cpu, platform, gpu = (machine.get(key) or {} for key in ("cpu", "platform", "gpu"))
    memory = machine.get("memory_bytes")
    words = {
        "processor": [cpu.get("model"), f"{cpu['cores']} core{'s' * (cpu['cores'] > 1)}" if cpu.get("cores") else None],
        "graphics card": gpu.get("names") or [],
        "memory": [f"{memory / 2**30:.0f} GiB" if memory else None],
        "system": [platform.get("distribution") or platform.get("system"), platform.get("machine")],
        "python": [(machine.get("python") or {}).get("version")],
        "torch": [(machine.get("torch") or {}).get("version")],
    }
    lines = {name: ", ".join(str(part) for part in parts if part) for name, parts in words.items()}
    return {name: line for name, line in lines.items() if line}
