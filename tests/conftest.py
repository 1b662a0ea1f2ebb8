"""Fixtures for all tests: where real data is, and real pipelines in temporary clones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
# Tests run beside each other, and small tensors only lose by sharing cores; clones do not inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Torch's threads wait actively for each other: two runs of two threads each on two cores take many times as long.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    number, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    if cores and count > 1:
        os.sched_setaffinity(0, cores[number::count] or [cores[number % len(cores)]])

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real image sets; a user's machine has none."""
    if not SHARED.is_dir():
        pytest.skip("no folder of real image sets beside this checkout")
    return SHARED


SLOWEST = [
    "test_tracking",
    "test_outages",
    "test_devices",
    "test_evaluation",
    "test_journal",
    "test_zoo",
    "test_checkpoint",
]
"""Files whose groups take minutes: begun late, one of them would run alone at the end. Real pipelines come first anyway."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep on one worker what shares a pipeline that has run, or servers and stores of one file; begin with the slowest."""
    items.sort(key=lambda item: (item.path.parent.name != "pipeline", item.path.stem not in SLOWEST))
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        shared = next((name for name in ("digits", "small") if name in fixtures), None)
        if shared or "fresh" not in fixtures or item.path.parent.name != "pipeline":
            item.add_marker(pytest.mark.xdist_group(shared or item.path.stem))
