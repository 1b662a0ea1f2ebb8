"""Play a journal: make its calls in order, remember how far that went, and tell faults of a call from those of the store."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from anneal.tracking.calls import call
from anneal.tracking.journal import Journal, Line, Writer, journals, locked
from anneal.tracking.session import MAX_POINTS, POINTS, Session
from anneal.tracking.store import Store, permanent

OPENING = ("start", "start_study")

QUESTIONS = ("predictor", "test_uses", "execution")
"""Calls whose answer the stage waits for."""


class OutOfReach(Exception):
    """The store cannot be reached, or not now; the call keeps its place."""


class Player:
    """Makes the calls of a journal that have not been made yet.

    Parameters
    ----------
    journal
        Claimed by this process.
    store
        The connection.
    live
        Whether the stage is still there.
    fault
        Is told of each call that is left out.
    """

    def __init__(self, journal: Journal, store: Store, *, live: bool, fault: Callable[[BaseException], None]) -> None:
        self.journal = journal
        self.fault = fault
        sent = journal.load("sent.json")
        self.offset = self.behind = int(sent.get("offset", 0))
        self.number = 0
        self.closing = threading.Lock()
        self.closed = False
        self.gathering = False
        self.answers: dict[int, Any] = {}
        until = None if live else max((line.arguments.get("time", 0) for line in journal.lines()), default=0)
        self.session = Session(store, journal, until)
        self.session.restore(sent.get("session", {}))
        self.pending: deque[Line] = deque()
        if self.offset:
            for line in journal.lines():
                if line.end > self.offset:
                    break
                self.session.recall(line)

    def step(self) -> bool:
        """Make the next call, or several that log metrics; False where there is none.

        Raises
        ------
        OutOfReach
            Nothing was made for good.
        """
        if not self.pending:
            found = self.journal.read(self.behind)
            if not found:
                return False
            self.pending.extend(found)
            self.behind = found[-1].end
        group, points = [self.pending[0]], list[Any]()
        if group[0].name in POINTS:
            group = []
            for line in self.pending:
                if line.name not in POINTS or len(points) >= MAX_POINTS:
                    break
                group.append(line)
                try:
                    points += self.session.points(line)
                except (TypeError, ValueError) as error:
                    self.refuse(error)
        try:
            if points:
                self.session.log_own(points)
            elif group[0].name and group[0].name not in POINTS:
                answer = call(self.session, group[0])
                if group[0].name in QUESTIONS:
                    self.answers[group[0].arguments["id"]] = answer
        except Exception as error:
            if group[0].name in OPENING or not permanent(error) or not self.session.store.reachable():
                raise OutOfReach(error) from error
            self.refuse(error)
            if group[0].name in QUESTIONS:
                self.answers[group[0].arguments["id"]] = None
        for _ in group:
            self.pending.popleft()
        self.number += sum(bool(line.name) for line in group)
        self.gathering = group[0].name in POINTS
        self.advance(group[-1].end)
        return True

    def refuse(self, error: BaseException) -> None:
        """Leave a call out for good."""
        self.session.lost = True
        self.fault(error)

    def advance(self, offset: int) -> None:
        """Remember what has been made, unless `close` was quicker: made again, the calls change nothing."""
        with self.closing:
            if not self.closed:
                self.offset = offset
                with suppress(OSError):
                    self.journal.save("sent.json", {"offset": offset, "session": self.session.state()})

    def close(self) -> int:
        """Remember nothing more, even of a call that is being made, and return the offset that has been sent."""
        with self.closing:
            self.closed = True
            return self.offset

    def left(self) -> int:
        """Return the number of calls that have not been made."""
        return sum(1 for _ in self.journal.lines(self.offset))


def end_killed(journal: Journal) -> None:
    """Write the end of a stage that could not: at the time of its last call."""
    lines = journal.tail()
    if any(line.name == "finish" for line in lines):
        return
    when = lines[-1].arguments["time"] if lines else time.time_ns() // 1_000_000
    writer = Writer(journal.path)
    try:
        writer.append("finish", {"status": "KILLED", "reason": "", "time": when})
    finally:
        writer.close()


def drain(
    store: Store,
    address: str,
    root: Path,
    *,
    fault: Callable[[str, BaseException], None],
    done: Callable[[str, int], None],
    sign: Callable[[], None] = lambda: None,
    before: str | None = None,
    patience: float = 20.0,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Send what stages that are gone have left for this address, oldest first.

    Parameters
    ----------
    store, address
        The connection, and its address without passwords, as journals name it.
    root
        Of the repository.
    fault
        Is told of each call that is left out, and of each journal that must stay: what it is of, and the reason.
    done
        Is told of each journal that has been sent: what it is of, and the number of its calls.
    sign
        Is called after each call.
    before
        Name of the journal up to which to go; None for all.
    patience
        Seconds to wait for another process that does this.
    stop
        Asked between two calls.

    Raises
    ------
    OutOfReach
        The store is; what has not been sent stays.
    """
    if not journals(root):
        return
    with locked(root / ".anneal" / "tracking" / "drain.lock", patience):
        for journal in journals(root):
            if before is not None and journal.name >= before:
                break
            start = journal.first()
            title = describe(journal)
            if not start or start["params"]["tracking"]["uri"] != address:
                continue
            with journal.claimed() as mine:
                if not mine or not journal.abandoned():
                    continue
                try:
                    end_killed(journal)
                    player = Player(journal, store, live=False, fault=partial(fault, title))
                    while player.step():
                        sign()
                        if stop():
                            return
                except OutOfReach as error:
                    if not store.reachable():
                        raise
                    fault(title, error.args[0])
                    continue
                except OSError as error:  # a full disk, or a folder that somebody removes
                    fault(title, error)
                    continue
                journal.remove()
                done(title, player.number)


def await_predecessor(root: Path, journal: Journal, patience: float) -> None:
    """Wait until nobody sends an earlier journal of the same stage and member: its run may have to be continued."""
    mine, end = journal.first(), time.monotonic() + patience
    for earlier in journals(root):
        if earlier.name >= journal.name or not earlier.abandoned():
            continue
        other = earlier.first()
        if any(other.get(key) != mine.get(key) for key in ("stage", "member", "study")):
            continue
        with locked(earlier.folder / "lock", max(0.0, end - time.monotonic())):
            pass


def describe(journal: Journal) -> str:
    """Return what a journal is of: ``train a of 2026-11-23 02:45:01``."""
    start: dict[str, Any] = journal.first()
    words = ["study", start["study"]] if "study" in start else [start.get("stage", "?"), start.get("member")]
    when = f"{datetime.fromtimestamp(start.get('time', 0) / 1000, UTC):%Y-%m-%d %H:%M:%S}"
    return " ".join([*filter(None, words), "of", when, "UTC"])
