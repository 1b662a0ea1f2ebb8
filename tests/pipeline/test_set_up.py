"""Setting up: the Makefile and the wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipeline.conftest import ROOT, Clone


def with_venv(clone: Clone) -> None:
    """Give the clone this environment as its .venv, stamped as installed; CI itself goes through the real set-up."""
    venv = clone.path / ".venv"
    if venv.exists():
        return
    (venv / "bin").mkdir(parents=True)
    for program in Path(sys.executable).parent.iterdir():
        (venv / "bin" / program.name).symlink_to(program)
    later = time.time() + 60
    (venv / ".installed").touch()
    os.utime(venv / ".installed", (later, later))


def test_make_repro_prints_the_figures_and_then_does_nothing(small: Clone) -> None:
    with_venv(small)
    small.run("make", "repro")
    done = small.run("make", "repro")
    assert small.ran(done) == []
    assert "installing" not in done.stdout
    assert "up to date" in done.stdout + done.stderr
    accuracy = small.json("reports/metrics.json")["test"]["ensemble_tta"]["accuracy"]
    assert f"{accuracy:.4f}" in done.stdout
    assert "make ui" in done.stdout
    assert "params.yaml" in done.stdout


def test_make_repro_stops_at_a_fault_in_params(small: Clone) -> None:
    with_venv(small)
    file = small.path / "params.yaml"
    before = file.read_text(encoding="utf-8")
    try:
        file.write_text(before.replace("bootstrap:", "bootstrp:"), encoding="utf-8")
        done = small.run("make", "repro", check=False)
        assert done.returncode == 2
        assert "evaluate.bootstrp: unknown key; did you mean 'bootstrap'?" in done.stderr
        assert "Running stage" not in done.stdout
    finally:
        file.write_text(before, encoding="utf-8")


def test_make_alone_is_help(small: Clone) -> None:
    out = small.run("make").stdout
    for target in ("repro", "test", "ui", "lint", "bench"):
        assert f"make {target}" in out


def test_readme_names_the_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert readme.index("make repro") < readme.index("make test") < readme.index("python3 -m venv")
    for target in ("repro", "test", "ui", "help"):
        assert f"make {target}" in readme
        assert f"\n{target}:" in makefile
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme, f"README.md does not link docs/{page.name}"
    for name in re.findall(r"\]\((docs/[a-z-]+\.md)\)", readme):
        assert (ROOT / name).exists(), f"README.md links {name}, which does not exist"


def test_the_lock_pins_everything() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert all("==" in line for line in lines if line.strip())
    assert "torch==2.13.0" in lines
    assert not any(line.startswith(("torchvision", "lightning==")) for line in lines)


def test_the_wheel_works_without_the_checkout(small: Clone, tmp_path: Path) -> None:
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(small.path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if build.returncode and "setuptools" in build.stderr and "Could not find" in build.stderr:
        pytest.skip("the package registry is out of reach, and building a wheel needs it")
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("anneal-*.whl")
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import anneal.serving as s; "
        "assert s.__file__.startswith(sys.argv[1]), s.__file__; from pathlib import Path; "
        "p = s.load_predictor(Path(sys.argv[2])); print(len(p.classes))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(target), str(small.path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "10", done.stderr


def test_make_ui_serves_on_localhost_alone(small: Clone) -> None:
    import socket
    import urllib.request

    with_venv(small)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "anneal.cli", "ui", "--port", str(port)],
        cwd=small.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        shown = "".join(process.stdout.readline() for _ in range(3))
        assert f"http://127.0.0.1:{port}/#/experiments/" in shown
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                time.sleep(1)
        else:
            raise AssertionError("the page did not come up")
        foreign = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Host": "evil.example.org"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(foreign, timeout=10)
        assert refused.value.code == 403
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)
