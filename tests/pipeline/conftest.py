"""Real `dvc repro` runs in temporary clones of this checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from anneal import params, recipe

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 6
"""Of the run on digits that tests share; the shipped recipe has more."""


@dataclass
class Clone:
    """A clone of the working tree with a git history of one commit and a DVC cache of its own."""

    path: Path

    def run(
        self, *command: str, check: bool = True, timeout: float = 500, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a user would, with this environment's programs first on the PATH."""
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_", "OMP_", "PYTHONDONTWRITE"))
        }
        environment |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "DVC_SITE_CACHE_DIR": str(self.path.parent / "dvc-site"),
            "DVC_NO_ANALYTICS": "1",
        } | env
        done = subprocess.run(
            command, cwd=self.path, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def repro(self, *arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return self.run("dvc", "repro", *arguments, **kwargs)

    def set(self, **changes: Any) -> None:
        """Change params; a double underscore in a name stands for a dot."""
        yaml = YAML()
        file = self.path / "params.yaml"
        tree = yaml.load(file.read_text(encoding="utf-8"))
        for name, value in changes.items():
            *parents, leaf = name.split("__")
            node = tree
            for key in parents:
                node = node[key]
            node[leaf] = value
        with file.open("w", encoding="utf-8") as out:
            yaml.dump(tree, out)
        recipe.validate(params.load(file, ROOT / "params.schema.json"))

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    @property
    def lock(self) -> bytes:
        return (self.path / "dvc.lock").read_bytes()

    def ran(self, done: subprocess.CompletedProcess[str]) -> list[str]:
        """Names of the stages that a `dvc repro` executed."""
        lines = (done.stdout + done.stderr).splitlines()
        return [line.split("'")[1] for line in lines if line.startswith("Running stage '")]


def make_clone(folder: Path) -> Clone:
    """Copy what git tracks or would track, and commit it."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    path = folder / "anneal"
    for name in filter(None, files):
        source = ROOT / os.fsdecode(name)
        if source.is_file():
            target = path / os.fsdecode(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
        subprocess.run(["git", *identity, *command], cwd=path, check=True, capture_output=True)
    for key, value in (("user.name", "tester"), ("user.email", "tester@example.org")):
        subprocess.run(["git", "config", key, value], cwd=path, check=True)
    return Clone(path)


def make_small(clone: Clone) -> Clone:
    """Shrink the recipe until a run takes seconds: one member, two epochs, 200 images."""
    clone.set(
        data__limit=200,
        trainer__epochs=2,
        ensemble__members={"a": {"seed": 0}},
        model__resnet__widths=[8],
        model__resnet__depths=[1],
        evaluate__bootstrap=100,
        evaluate__robustness=None,  # `digits` has it on
        evaluate__label_errors=0,
    )
    return clone


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The shipped recipe, but shorter, after its first `dvc repro`; tests that share it leave its files as they are."""
    clone = make_clone(tmp_path_factory.mktemp("digits"))
    clone.set(trainer__epochs=EPOCHS)
    clone.run("git", "commit", "-qam", "shorter")
    clone.repro()
    return clone


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A small recipe after its first `dvc repro`; a test that changes it puts it back."""
    clone = make_small(make_clone(tmp_path_factory.mktemp("small")))
    clone.repro()
    return clone


@pytest.fixture
def fresh(tmp_path: Path) -> Clone:
    """A small recipe, nothing run yet."""
    return make_small(make_clone(tmp_path))
