"""What is recorded of the environment: complete, the same text twice, and without secrets."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from anneal import environment
from anneal.comparison import read_packages


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with one commit."""
    root = tmp_path / "tree"
    (root / "src").mkdir(parents=True)
    (root / "src" / "model.py").write_text("width = 8\n")
    (root / "params.yaml").write_text("tracking: {uri: x}\n")
    (root / "pixels.bin").write_bytes(bytes(range(256)))
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "start")
    return root


def test_the_machine_is_on_record(tree: Path) -> None:
    (tree / "dvc.lock").write_text("stages: {}\n")
    found = json.loads(environment.capture(tree)["environment.json"])
    assert found["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert found["memory_bytes"] > 1e8 and found["platform"]["kernel"] and found["time_zone"]
    assert found["torch"]["version"] == version("torch") and len(found["torch"]["git_version"]) == 40
    assert found["dvc_lock"] == hashlib.md5(b"stages: {}\n").hexdigest()
    assert set(found["gpu"]) == {"names", "driver"}


def test_two_captures_are_the_same_text_and_need_no_torch(tree: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from anneal.environment import capture; found = capture(Path('.'));"
        "assert not {'torch', 'mlflow', 'numpy', 'pydantic'} & set(sys.modules); import json; print(json.dumps(found))"
    )
    texts = [subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, check=True) for _ in range(2)]
    assert texts[0].stdout == texts[1].stdout
    assert list(json.loads(texts[0].stdout)) == ["environment.json", "packages.txt", "git.json"]


def test_variables_by_an_allow_list(tree: Path) -> None:
    secret = {"AWS_SECRET_ACCESS_KEY": "s3cret", "MLFLOW_TRACKING_PASSWORD": "s3cret", "HOME": "/home/s3cret"}
    harmless = {"OMP_NUM_THREADS": "3", "MKL_CBWR": "COMPATIBLE", "CUDA_VISIBLE_DEVICES": "1", "SLURM_JOB_ID": "7"}
    texts = environment.capture(tree, {**secret, **harmless})
    assert json.loads(texts["environment.json"])["variables"] == harmless
    assert "s3cret" not in "".join(texts.values())


def test_packages_with_their_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str, origin: dict | None) -> None:
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\nName: no\n")
        if origin:
            (folder / "direct_url.json").write_text(json.dumps(origin))

    commit = {"url": "https://token@host/repo.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    installed("From_Git", commit)
    installed("mine", {"url": "file:///mine", "dir_info": {"editable": True}})
    installed("numpy", None)  # stands before the real one on the path, as it would when imported
    monkeypatch.syspath_prepend(str(tmp_path))
    found = read_packages(environment.capture(tmp_path)["packages.txt"])
    assert found["From_Git"] == "1.0 (from https://***@host/repo.git@abc)"
    assert found["mine"] == "1.0 (editable file:///mine)"
    assert found["numpy"] == "1.0" and found["torch"] == version("torch")
    assert list(found) == sorted(found, key=lambda name: name.lower().replace("_", "-").replace(".", "-"))


def test_a_clean_tree_has_no_diff(tree: Path) -> None:
    git(tree, "remote", "add", "origin", "https://me:ghp_s3cret@github.com/me/tree.git")
    texts = environment.capture(tree)
    found = json.loads(texts["git.json"])
    assert "git.diff" not in texts
    assert found == {
        "branch": "main",
        "changed": {},
        "commit": git(tree, "rev-parse", "HEAD"),
        "dirty": False,
        "remote": "https://me:***@github.com/me/tree.git",
        "untracked": {},
    }


def test_the_diff_restores_the_code_that_ran(tree: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(tree), str(clone))
    (tree / "src" / "model.py").write_text("width = 16\n")
    (tree / "pixels.bin").write_bytes(bytes(range(255, -1, -1)))
    (tree / "params.yaml").unlink()
    (tree / "src" / "new.py").write_text("new\n")
    (tree / "notes.txt").write_text("not code\n")
    git(tree, "checkout", "-q", "--detach")
    texts = environment.capture(tree)
    found = json.loads(texts["git.json"])
    assert found["dirty"] is True and found["branch"] is None
    assert list(found["changed"]) == ["params.yaml", "pixels.bin", "src/model.py"]
    assert found["changed"]["params.yaml"] == "absent"
    assert list(found["untracked"]) == ["src/new.py"]
    (tmp_path / "git.diff").write_text(texts["git.diff"])
    git(clone, "apply", str(tmp_path / "git.diff"))
    assert (clone / "src" / "model.py").read_text() == "width = 16\n"
    assert (clone / "pixels.bin").read_bytes() == (tree / "pixels.bin").read_bytes()
    assert not (clone / "params.yaml").exists()


def test_a_password_in_the_diff_is_hidden(tree: Path) -> None:
    (tree / "params.yaml").write_text("tracking: {uri: 'postgresql://me:s3cret@host/db'}\n")
    assert "postgresql://me:***@host/db" in environment.capture(tree)["git.diff"]
    assert "s3cret" not in "".join(environment.capture(tree).values())


def test_a_project_below_the_root_of_its_repository(tree: Path) -> None:
    project = tree / "vision"
    (project / "stages").mkdir(parents=True)
    (project / "stages" / "new.py").write_text("new\n")
    (tree / "src" / "model.py").write_text("width = 16\n")
    found = json.loads(environment.capture(project)["git.json"])
    assert list(found["untracked"]) == ["vision/stages/new.py"] and list(found["changed"]) == ["src/model.py"]
    assert all(len(md5) == 32 for md5 in [*found["untracked"].values(), *found["changed"].values()])


def test_large_changes_are_cut_and_say_so(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "MAX_DIFF", 2000)
    monkeypatch.setattr(environment, "MAX_FILES", 3)
    monkeypatch.setattr(environment, "MAX_HASHED", 5000)
    (tree / "src" / "model.py").write_text("".join(f"width = {i}\n" for i in range(2000)))
    for i in range(5):
        (tree / "src" / f"{i}.py").write_text("x\n")
    texts = environment.capture(tree)
    found = json.loads(texts["git.json"])
    assert texts["git.diff"].endswith("\n# cut after 2,000 bytes; git.json names every changed file with its hash\n")
    assert len(texts["git.diff"]) < 2100
    assert len(found["untracked"]) == 3 and found["untracked_unnamed"] == 2
    assert found["changed"]["src/model.py"] == f"{(tree / 'src' / 'model.py').stat().st_size} bytes"


def test_names_and_links_of_all_kinds(tree: Path) -> None:
    (tree / "src" / "ü \n.py").write_text("x\n")
    (tree / "src" / "loop").symlink_to("loop")
    os.mkfifo(tree / "src" / "pipe.py")
    found = json.loads(environment.capture(tree)["git.json"])["untracked"]
    assert found["src/loop"] == "link to loop" and len(found["src/ü \n.py"]) == 32


def test_outside_git_and_without_git(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "plain").mkdir()
    assert list(environment.capture(tmp_path / "plain")) == ["environment.json", "packages.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "-q")
    assert "git.json" not in environment.capture(empty)
    monkeypatch.setenv("PATH", "")
    assert shutil.which("git") is None
    assert list(environment.capture(tree)) == ["environment.json", "packages.txt"]


def test_cpuinfo_of_other_machines() -> None:
    arm = "processor\t: 0\nFeatures\t: fp asimd sve bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
    found = environment.cpu_in(arm)
    assert found == {"flags": ["asimd", "bf16", "sve"], "model": "implementer 0x41, part 0xd40", "physical_cores": None}
    assert environment.cpu_in("") == {"flags": [], "model": None, "physical_cores": None}


def test_cards_that_only_nvidia_smi_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/proc/driver/nvidia/gpus").is_dir():
        pytest.skip("/proc tells of the cards of this machine")
    program = tmp_path / "nvidia-smi"  # a stand-in: without a card the real one is not there to ask
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 550.54.15'\necho 'NVIDIA H100 80GB HBM3, 550.54.15'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = json.loads(environment.capture(tmp_path)["environment.json"])["gpu"]
    assert found == {"driver": "550.54.15", "names": ["NVIDIA H100 80GB HBM3"] * 2}
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert json.loads(environment.capture(tmp_path)["environment.json"])["gpu"] == {"driver": None, "names": []}


def test_how_torch_was_built() -> None:
    import torch

    text = environment.torch_build()
    rows = dict(line.split(": ", 1) for line in text.partition("\n\n")[0].splitlines())
    assert rows["version"] == torch.__version__ and rows["threads"] == str(torch.get_num_threads())
    assert rows["cpu_capability"] in torch.__config__.show() or rows["cpu_capability"] == "DEFAULT"
    assert "PyTorch built with" in text and "ATen parallel backend" in text
    assert text == environment.torch_build()
