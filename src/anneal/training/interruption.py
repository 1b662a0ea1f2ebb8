"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, write a checkpoint, and leave; at once where that takes too long."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What ends a run: the keyboard, a preempting scheduler, and Slurm's warning ahead of its time limit."""

GRACE = 6.0
"""Seconds for the step at hand and its checkpoint; schedulers and people wait ten before they kill."""


ECHO = 0.5
"""Seconds in which the same signal once more is no second one: a launcher passes on what its group has got anyway."""


class Interrupted(KeyboardInterrupt):
    """A signal has ended the run.

    Parameters
    ----------
    signum
        Its number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What shells show for a process that a signal has ended: 128 + its number."""
        return 128 + self.signum


class Interruptions:
    """The signal that a run has got, if any.

    Until `wait_for_step` a signal ends the run where it stands; from then on it is noted, so that the run can finish its
    step; a second one, or `GRACE` seconds, end it where it stands after all.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.noted_at = 0.0
        self.waits = False

    def wait_for_step(self) -> None:
        """Note signals from now on, whoever has handled them before."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)
        self.waits = True

    def end(self) -> None:
        """Let signals end the run where it stands from now on."""
        self.waits = False

    def _note(self, signum: int, frame: Any) -> None:  # noqa: ARG002
        if self.signum is not None and time.monotonic() - self.noted_at < ECHO:
            return
        if self.signum is not None or not self.waits:
            self._leave(signum)
        self.signum, self.noted_at = signum, time.monotonic()
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, lambda *_: self._leave(signum))
            signal.setitimer(signal.ITIMER_REAL, GRACE)

    def _leave(self, signum: int) -> None:
        self.signum = self.signum or signum
        raise Interrupted(self.signum)


@contextmanager
def interruptible() -> Iterator[Interruptions]:
    """Let `SIGNALS` come out of the block as `Interrupted`: Lightning would turn a KeyboardInterrupt into a SystemExit."""
    found = Interruptions()
    in_main = threading.current_thread() is threading.main_thread()
    watched = [*SIGNALS, *([signal.SIGALRM] if hasattr(signal, "SIGALRM") else [])]
    old = {number: signal.getsignal(number) for number in watched} if in_main else {}
    if in_main:
        for number in SIGNALS:
            signal.signal(number, found._note)
    try:
        yield found
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise Interrupted(found.signum or signal.SIGINT) from None
        raise
    finally:
        if in_main and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in old.items():
            signal.signal(number, handler)
