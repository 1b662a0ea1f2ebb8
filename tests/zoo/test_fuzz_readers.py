"""Mutated files never get past the readers: see `tests.zoo.fuzz`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.zoo.fuzz import TARGETS, mutated, prepare, taste

ROOT = Path(__file__).resolve().parents[2]


def search(name: str, folder: Path, examples: int, repeatable: bool) -> None:
    target = TARGETS[name]
    seeds = prepare(target, folder)
    assert {taste(target, seed, folder) for seed in seeds} <= {"read", "refused"}
    assert taste(target, seeds[0], folder) == "read"

    @settings(
        max_examples=examples,
        derandomize=repeatable,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        taste(target, data.draw(mutated(seeds)), folder)

    one()


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files(name: str, tmp_path: Path) -> None:
    search(name, tmp_path, 60, repeatable=True)


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_many_mutated_files(name: str, tmp_path: Path) -> None:
    search(name, tmp_path, 3000, repeatable=False)


@pytest.mark.long
@pytest.mark.parametrize("name", ["image", "tar", "zip", "idx images", "idx gzip", "csv"])
def test_search_guided_by_coverage(name: str, tmp_path: Path) -> None:
    """A minute each; what breaks a promise is printed and left in the folder named."""
    pytest.importorskip("atheris")
    done = subprocess.run(
        [sys.executable, "-m", "tests.zoo.search", name, "60", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    left = [path for path in tmp_path.iterdir() if path.name.startswith(("crash-", "timeout-", "oom-", "leak-"))]
    assert done.returncode == 0 and not left, f"{left}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
