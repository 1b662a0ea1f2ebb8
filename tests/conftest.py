"""Fixtures for all tests: where real data is, and real pipelines in temporary clones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real image sets; a user's machine has none."""
    if not SHARED.is_dir():
        pytest.skip("no folder of real image sets beside this checkout")
    return SHARED
