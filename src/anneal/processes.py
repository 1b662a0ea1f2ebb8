"""Which of several processes this is, and when it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""Variables in which launchers give a process its place."""

PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


def is_first_process() -> bool:
    """Return whether no launcher has made this process a further one."""
    return all(os.environ.get(name, "0") in ("", "0") for name in RANKS)


def end_with_parent(signum: int = signal.SIGTERM) -> None:
    """Have this process sent a signal when its parent ends, however it ends; on Linux alone, elsewhere nothing happens.

    So a stage does not outlive a ``dvc`` that was killed, and a loader process not its trainer.

    Parameters
    ----------
    signum
        The signal: SIGTERM lets a process leave in order.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signum))
