"""Each kind of bad or odd raw data comes to the end that docs/data.md promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anneal import splitting
from anneal.decoding import decode
from anneal.params import UserError
from anneal.preprocess import build_store
from anneal.sources import check_outs, open_source, read_file
from tests.zoo import animals
from tests.zoo.animals import SIZE, ZOO, Animal, run

ROOT = Path(__file__).resolve().parents[2]
LIGHT = [animal for animal in ZOO if not animal.heavy]
HEAVY = [animal for animal in ZOO if animal.heavy and not animal.long]
LONG = [animal for animal in ZOO if animal.long]


def ids(animals: list[Animal]) -> list[str]:
    return [animal.id for animal in animals]


def everything(root: Path) -> list[str]:
    return sorted(os.path.join(folder, name) for folder, folders, files in os.walk(root) for name in folders + files)


def keeps_its_promise(animal: Animal, found: dict[str, Any]) -> None:
    assert "\n" not in found["error"] and len(found["error"]) < 1000, found["error"]
    assert bool(found["error"]) == bool(animal.refused), found["error"]
    assert animal.refused in found["error"], found["error"]
    if animal.refused:
        assert re.match(r"data\.(path|max_rejected)", found["error"])
        return
    if "num_rejected" not in animal.report:
        assert found["rejected"].keys() == animal.rejected.keys(), found["rejected"]
    for name, words in animal.rejected.items():
        reason = found["rejected"][name]
        assert words in reason
        assert "\n" not in reason and "0x" not in reason, "a reason is one line, the same on every run"
    assert found["report"] == json.loads(json.dumps(animal.report))
    assert found["pixels"].keys() == animal.accepted.keys()
    for name, colour in animal.accepted.items():
        expected = np.array(colour)
        if expected.ndim == 2:
            expected = expected[:, :, None]
        pixels = np.array(found["pixels"][name])
        assert pixels.shape[:2] == (SIZE, SIZE)
        assert (pixels == expected).all(), pixels


@pytest.mark.parametrize("animal", LIGHT, ids=ids(LIGHT))
def test_promise(animal: Animal, tmp_path: Path) -> None:
    (tmp_path / "yard").mkdir()
    path = animal.make(tmp_path / "yard")
    before = everything(tmp_path)
    found = run(animal, path, tmp_path / "processed")
    keeps_its_promise(animal, json.loads(json.dumps(found)))
    store = [name for name in everything(tmp_path) if name.startswith(str(tmp_path / "processed"))]
    assert [name for name in everything(tmp_path) if name not in store] == before, "nothing is written elsewhere"
    assert bool(store) == (not animal.refused), "a store is written as a whole or not at all"


def kept(animals: list[Animal], folder: Path) -> dict[str, Any]:
    """Return what came of every bomb, and the memory it took."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.zoo.keeper", str(folder), *ids(animals)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["id"]: row | {"stderr": done.stderr} for row in rows}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return kept(HEAVY, tmp_path_factory.mktemp("bombs"))


def stays_within_bounds(animal: Animal, row: dict[str, Any]) -> None:
    assert row["code"] == 0, f"ended by {row['code']}\n{row['stderr']}"
    keeps_its_promise(animal, row["found"])
    assert row["peak"] < animal.most, f"{row['peak']:,} bytes, {row['idle']:,} of them before it began"


@pytest.mark.parametrize("animal", HEAVY, ids=ids(HEAVY))
def test_bomb(animal: Animal, bombs: dict[str, Any]) -> None:
    """No bomb takes more memory than stated, or a time without bound."""
    stays_within_bounds(animal, bombs[animal.id])


@pytest.mark.long
@pytest.mark.parametrize("animal", LONG, ids=ids(LONG))
def test_large_bomb(animal: Animal, tmp_path: Path) -> None:
    stays_within_bounds(animal, kept([animal], tmp_path)[animal.id])


def test_the_table_of_the_docs_has_every_row() -> None:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    table = text.split("## The zoo", 1)[1].split("\n## ", 1)[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == "what"
    assert sorted(set(rows[1:])) == sorted({animal.row for animal in ZOO})


def test_too_much_that_is_bad_fails_with_the_first_reasons(tmp_path: Path) -> None:
    animal = next(animal for animal in ZOO if animal.id == "text named .png: HTML")
    with pytest.raises(
        UserError, match=r"data\.max_rejected: 1 of 13 files.*cat/odd\.png: no image in a known"
    ) as caught:
        build_store(open_source(animal.make(tmp_path)), tmp_path, **animals.ARGUMENTS | {"max_rejected": 0.05})
    assert "\n" not in "".join(traceback.format_exception_only(caught.value)).strip()


@pytest.mark.parametrize("path", ["loop", "a\0b", "n" * 300])
def test_paths_that_the_system_refuses(path: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"data\.path: "):
        open_source(tmp_path / path)
    if "\0" in path:
        with pytest.raises(UserError, match=r"data\.path: found a null byte"):
            check_outs(tmp_path / path)
    else:
        check_outs(tmp_path / path)


def test_folders_in_place_of_files_stay_open_nowhere(tmp_path: Path) -> None:
    for _ in range(3):
        with pytest.raises(ValueError, match="not a regular file"):
            read_file(tmp_path)
    held = os.listdir("/proc/self/fd")
    assert not any(os.path.realpath(f"/proc/self/fd/{number}") == os.path.realpath(tmp_path) for number in held)


@pytest.mark.timeout(100)
def test_time_does_not_grow_with_the_square_of_the_classes() -> None:
    names = [str(i) for i in range(30_000)]
    splitting.check_classes("train", names, names)
    counts = splitting.limited(dict.fromkeys(names, 1) | {"large": 10**6, "larger": 2 * 10**6}, 30_003)
    assert counts == dict.fromkeys(names, 1) | {"large": 1, "larger": 2}


def test_scans_are_those_of_the_picture() -> None:
    """A thumbnail's, and what phones append to a picture, are not counted."""
    many = animals.scans_bomb(95, side=16)
    for data in (many, many + b"\xff\xda\0\2" * 200, many[:2] + b"\xff\xe1\x03\x22" + b"\xff\xda" * 400 + many[2:]):
        assert decode(data, max_pixels=256).shape == (16, 16, 1)
    with pytest.raises(ValueError, match="more than 100 scans"):
        decode(animals.scans_bomb(120, side=16), max_pixels=256)


# ---- through the stage ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest folder that the stage runs in, with something in it from an earlier run."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "stages").symlink_to(ROOT / "stages")
    for name in ("params.yaml", "params.schema.json"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "data/processed").mkdir(parents=True)
    (folder / "data/processed/dataset.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "archive bomb: tar.gz",
        "text named .png: HTML",
    ],
)
def test_stage_ends_with_one_line(name: str, project: Path, tmp_path: Path) -> None:
    animal = next(animal for animal in ZOO if animal.id == name)
    path = animal.make(tmp_path)
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (project / "params.yaml").write_text(re.sub(r"(?m)^(  path: ).*$", rf"\g<1>{path}", text, count=1))
    before = everything(project / "data")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_"))}
    done = subprocess.run(
        [sys.executable, "-m", "stages.preprocess"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert (animal.refused or "cat/odd.png: no image in a known format") in errors[0]
    assert everything(project / "data") == before, "the earlier outs stay, and nothing is half-written"
    assert not (project / "reports").exists()
