"""`anneal sync`: send what stages that are gone have left."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import IO

from anneal.tracking.address import ENVIRONMENT, one_line, redact, repository, say, tracking_uri
from anneal.tracking.journal import journals
from anneal.tracking.player import OutOfReach, drain
from anneal.tracking.store import Store, silenced

TIMEOUT = "30"
"""Seconds for a request; nobody trains while this waits."""


def sync(uri: str, root: Path | None = None, *, moved: bool = False) -> int:
    """Send what is kept, a line a run, and return the number of runs that still are.

    A journal goes to the address that its stage had. Where that had a password, which no journal holds, it goes there
    if the present address is the same but for the password.

    Parameters
    ----------
    uri
        Of params.yaml; MLFLOW_TRACKING_URI wins.
    root
        Of the repository.
    moved
        Whether what was meant for other addresses goes to the present one too.
    """
    root, uri = root or repository(), tracking_uri(uri)
    for key, value in {**ENVIRONMENT, "MLFLOW_HTTP_REQUEST_TIMEOUT": TIMEOUT}.items():
        os.environ.setdefault(key, value)
    waiting: Counter[str] = Counter()
    for journal in journals(root):
        if journal.abandoned() and (start := journal.first()):
            waiting[start["params"]["tracking"]["uri"]] += 1
    with silenced() as (errors, answers), open(os.dup(answers.fileno()), "w") as out:
        for address, number in waiting.items():
            place = uri if moved or address == redact(uri) else address
            if place == address and "***" in address:
                what = "set MLFLOW_TRACKING_URI to it with its password, or send them to the present one: --moved"
                say(address, f"{number} runs are kept; {what}", errors, warning=True)
                continue
            store = Store(place, root)
            try:
                store.connect()
                drain(
                    store,
                    address,
                    root,
                    fault=partial(_keeps, place, errors),
                    done=partial(_sends, place, out),
                )
            except Exception as error:  # whatever keeps one address from being reached, others may be
                reason = error.args[0] if isinstance(error, OutOfReach) else error
                say(place, f"{one_line(reason)}; {number} runs are kept", errors, warning=True)
    return sum(journal.abandoned() for journal in journals(root))


def _keeps(uri: str, file: IO[str], title: str, error: BaseException) -> None:
    say(uri, f"{title}: {one_line(error)}", file, warning=True)


def _sends(uri: str, file: IO[str], title: str, calls: int) -> None:
    say(uri, f"sent {title}, {calls} calls", file)
