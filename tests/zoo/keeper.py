"""Takes the bombs of the zoo through preprocessing, each in a process of its own, and measures their memory.

``python -m tests.zoo.keeper FOLDER ID ...`` prints a JSON line for each: what came of it, and its peak memory in bytes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401 - once, and not in each process

from tests.zoo.animals import ZOO, run

MOST_CPU_SECONDS = 120
"""Of one process; it is ended after so long, or by a signal where it sleeps."""


def apart(task: Callable[[], Any]) -> tuple[Any, int, int, float]:
    """Run a task in a forked process; return its value, its exit code, its peak memory in bytes and its CPU time."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(receive)
            resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_SECONDS, MOST_CPU_SECONDS))
            signal.alarm(4 * MOST_CPU_SECONDS)
            with open(send, "w", encoding="utf-8") as file:
                json.dump(task(), file)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(send)
    with open(receive, encoding="utf-8") as file:
        text = file.read()
    _, status, usage = os.wait4(child, 0)
    scale = 1 if sys.platform == "darwin" else 1024
    seconds = usage.ru_utime + usage.ru_stime
    return json.loads(text) if text else None, os.waitstatus_to_exitcode(status), usage.ru_maxrss * scale, seconds


def main(folder: Path, *wanted: str) -> None:
    _, _, idle, _ = apart(lambda: "nothing")
    for number, animal in enumerate(ZOO):
        if animal.id not in wanted:
            continue
        root = folder / str(number)
        root.mkdir()
        path, code, _, making = apart(lambda animal=animal, root=root: os.fspath(animal.make(root)))
        assert code == 0, f"{animal.id} could not be made"
        found, code, peak, seconds = apart(
            lambda animal=animal, root=root, path=path: run(animal, Path(path), root / "store")
        )
        row = {"id": animal.id, "found": found, "code": code, "peak": peak, "idle": idle}
        print(json.dumps(row | {"seconds": seconds, "making": making}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
