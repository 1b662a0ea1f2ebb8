"""One experiment in its checkout, as a process of its own: the stages, the members' predictions, the DVC experiment."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anneal import params
from anneal.experiments.checkout import READY, claim, environment, save
from anneal.experiments.plan import RESULTS, result_files
from anneal.params import UserError
from anneal.processes import end_with_parent
from anneal.store import write_json

STALE = (".dvc/tmp/rwlock", ".dvc/tmp/rwlock.lock", ".dvc/tmp/lock", ".git/index.lock")
"""What a DVC or a git that was killed leaves behind, and the next one stumbles over."""


def main(folder: Path, slot: int, jobs: int) -> None:
    """Run the experiment of a folder, on this job's share of the cores, and keep what it gave."""
    end_with_parent()
    # Processes of a call that was killed still save a checkpoint; the claim passes on to DVC.
    descriptor = claim(folder, patience=60)
    if descriptor is None:
        raise UserError(f"{folder}: processes of an earlier call still run there; stop them, and run this again")
    job = json.loads((folder / READY).read_text(encoding="utf-8"))
    checkout, root = folder.resolve() / "checkout", Path(job["root"])
    for name in STALE:
        (checkout / name).unlink(missing_ok=True)
    share_cores(slot, jobs)
    variables = environment(job["name"], root, checkout)
    began = time.time_ns() // 1_000_000

    def dvc(*arguments: str) -> int:
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(
            command,
            cwd=checkout,
            env=variables,
            stdin=subprocess.DEVNULL,
            check=False,
            pass_fds=(descriptor,),
            preexec_fn=end_with_parent,  # one thread alone runs here
        ).returncode

    dvc("checkout", "--quiet", "--force", "--allow-missing")
    if dvc("repro", "evaluate"):
        raise SystemExit(1)  # the stage, or DVC, has said why
    print("Predicting:", flush=True)
    found = predictions(checkout, job["values"]) if job["keys"] else {}
    metrics = json.loads((checkout / "reports/metrics.json").read_text(encoding="utf-8"))
    times = {"began": began, "ended": time.time_ns() // 1_000_000}
    for name, key in job["keys"].items():
        keep(root, key, found[name], {**times, "member": name, **{k: job[k] for k in ("name", "variant")}})
    write_json(folder / "metrics.json", metrics)
    save(job["name"], checkout)


def predictions(checkout: Path, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by member what it says of ``val``: log-probabilities ``plain`` and ``tta``, float32 (N, K), and ``labels``."""
    import numpy as np

    from anneal import views
    from anneal.predicting import best_device, load_members, predict_split
    from anneal.store import open_store

    store = open_store(checkout / "data/processed")
    tta = values["evaluate"]["tta"]
    parsed = views.parse_views(tta["views"])
    listed = views.resolve(parsed, channels=store.info.channels, seed=values["seed"])
    members = {name: checkout / "models" / name for name in values["ensemble"]["members"]}
    classifiers, _ = load_members(store, members, best_device(values["hardware"]["accelerator"]))
    found = predict_split(classifiers, store.split("val"), views.with_identity(listed), tta["average"], list(members))
    averaged = found.over(listed, tta["average"])
    images = hashlib.sha256("\n".join(found.sources).encode()).hexdigest()
    return {
        name: {
            "plain": found.plain[i].astype(np.float32),
            "tta": averaged[i].astype(np.float32),
            "labels": found.labels,
            "images": np.array(images),
        }
        for i, name in enumerate(members)
    }


def keep(root: Path, key: str, arrays: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Keep a member's predictions, each file whole or not at all."""
    import numpy as np

    (root / RESULTS).mkdir(parents=True, exist_ok=True)
    path, beside = (root / file for file in result_files(key))
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.replace(path)
    write_json(beside, dict(more))


def share_cores(slot: int, jobs: int) -> None:
    """Leave this process, and those that it starts, the cores of one of so many jobs."""
    if jobs > 1 and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) >= jobs:
            os.sched_setaffinity(0, cores[slot::jobs])


if __name__ == "__main__":
    sys.excepthook = params.excepthook
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
