"""Outages of the tracking store, against a real `mlflow server`: the stage goes on, and in the end nothing is lost or double.

Each test runs one fake stage of four parts, with a fault in some of them, and compares what the store shows in the end with
what it shows of the same stage without a fault.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from ruamel.yaml import YAML

from anneal import params, tracking
from anneal.tracking.journal import Journal, Writer
from tests.faulty_proxy import Mode, faulty_proxy
from tests.test_tracking import (
    FOREIGN,
    ROOT,
    client,
    end_group,
    free_port,
    mlflow_server,
    recipe,
    wait_for,
    write_predictor,
    write_store,
)

PARTS = 4
BOUND = 3.0
"""Seconds that a part of the stage's loop, its start or one call may take longer than without an outage, on a busy machine."""

VOLATILE = ("process", "journal", "journal.of")
"""Tags that differ from stage to stage."""

STAGE = """
import json, time
from pathlib import Path
from anneal import params, tracking

def now():
    return time.time_ns() // 1_000_000

def wait(name):
    while not Path(name).exists():
        time.sleep(0.02)

values = params.read_yaml("params.yaml")
model = Path("models/a")
report = {"before": now(), "parts": []}
with tracking.stage_run(values, "train", member="a", outs=[model]) as run:
    report["inside"] = now()
    step = 0
    for part in range(4):
        wait(f"part-{part}")
        began, start = now(), time.perf_counter()
        for _ in range(10):
            time.sleep(0.02)  # the step
            step += 1
            run.metrics({"train/step": step, "train/loss": 1 / step, "train/nan": float("nan")}, step)
        run.metrics({"val/accuracy": part / 4}, step)
        run.headline({"test/accuracy": part / 4})
        run.text(f"part-{part}.txt", "long " * 2000)
        Path(f"table-{part}.csv").write_text(f"part {part}")
        run.artifact(f"table-{part}.csv", "tables")
        run.tag("part", part)
        report["parts"].append([began, now(), time.perf_counter() - start])
        Path(f"done-{part}").touch()
    wait("end")
    model.mkdir(parents=True)
    (model / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    run.artifact(model, "model")
    run.curves({"val/loss": [3.0, 2.0, 1.0]})
    run.describe("*Done.*")
    report["leaving"] = now()
report["after"] = now()
Path("report.json").write_text(json.dumps(report))
"""


NEXT = """
from anneal import params, tracking

with tracking.stage_run(params.read_yaml("params.yaml"), "evaluate") as run:
    run.metrics({"test/accuracy": 0.5})
"""

PREDICTOR = """
from pathlib import Path
import numpy as np
from anneal import params, tracking

values = params.merge(params.read_yaml("params.yaml"), {"registry": {"name": "outage-" + Path.cwd().name}})
with tracking.stage_run(values, "evaluate") as run:
    files = [path for folder in ("models", "reports") for path in sorted(Path(folder).rglob("*.*"))]
    print(run.predictor(files, np.zeros((2, 8, 8, 1), np.uint8), {"test/accuracy": 0.5}))
"""


# ---- a server that can be killed, frozen and started again ----------------------------------------------------------


class Server:
    """A real `mlflow server` over sqlite, with the artifacts in a folder beside it."""

    def __init__(self, uri: str, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.uri, self.process, self.folder = uri, process, folder

    @contextmanager
    def down(self) -> Iterator[None]:
        """Kill it, and start it again in the end."""
        end_group(self.process)
        try:
            yield
        finally:
            self.restart()

    def restart(self) -> None:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                self.process.args, cwd=self.folder, stdout=log, stderr=log, env=environment, start_new_session=True
            )

        def ready() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", urlsplit(self.uri).port)) == 0

        wait_for(ready)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all its processes; their sockets stay open."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(f"sqlite:///{folder}/server.db", folder) as (uri, process):
        client(uri).search_experiments()
        shutil.copy(folder / "server.db", folder / "empty.db")
        running = Server(uri, process, folder)
        try:
            yield running
        finally:
            end_group(running.process)


# ---- a stage that the test leads through its parts ------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What a stage measured: milliseconds since 1970, and for each part its begin, its end and its seconds."""

    before: int
    inside: int
    leaving: int
    after: int
    parts: list[tuple[int, int, float]]


class Stage:
    """A stage in a process of its own, in a repository of its own."""

    def __init__(self, root: Path, uri: str, script: str = STAGE) -> None:
        self.root = root
        (root / ".dvc").mkdir(parents=True)
        YAML().dump(params.merge(recipe(), {"tracking": {"experiment": root.name}}), root / "params.yaml")
        shutil.copy(ROOT / "params.schema.json", root)
        write_store(root)
        (root / "stage.py").write_text(script)
        clean = {k: v for k, v in os.environ.items() if k not in FOREIGN and not k.startswith("MLFLOW_")}
        self.environment = {
            **clean,
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
            "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1",
        }
        with open(root / "stdout", "wb") as out, open(root / "stderr", "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "stage.py"], cwd=root, stdout=out, stderr=err, env=self.environment
            )

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def errors(self) -> list[str]:
        return (self.root / "stderr").read_text().splitlines()

    @property
    def journals(self) -> list[Path]:
        return list(self.root.glob(".anneal/tracking/*/journal.jsonl"))

    def until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Wait until something holds, while the stage runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.errors
            time.sleep(0.1)

    def part(self, number: int) -> None:
        """Let the stage go through one part of its loop, which it must, whatever the store does."""
        (self.root / f"part-{number}").touch()
        self.until((self.root / f"done-{number}").exists, 30)

    def begun(self, faults: int) -> bool:
        """Say whether so many outages have been noticed, and said."""
        return len([line for line in self.errors if "kept in .anneal/tracking" in line]) >= faults

    def end(self) -> Report:
        """Let the stage end, which it must, with exit code 0."""
        (self.root / "end").touch()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert self.process.returncode == 0, self.errors
        assert not any("Traceback" in line for line in self.errors), self.errors
        return Report(**json.loads((self.root / "report.json").read_text()))

    def run(self) -> Report:
        """Let the stage go through all parts to its end."""
        for number in range(PARTS):
            self.part(number)
        return self.end()

    def sync(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "anneal.cli", "sync"],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )


Start = Callable[[str, str], Stage]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a stage in a new repository of that name, with a store at that address."""
    with ExitStack() as stages:
        yield lambda name, uri: stages.enter_context(Stage(tmp_path / name, uri))


# ---- what the store shows -------------------------------------------------------------------------------------------


def records(uri: str, experiment: str) -> list[Any]:
    store = client(uri)
    found = store.get_experiment_by_name(experiment)
    return [] if found is None else list(store.search_runs([found.experiment_id]))


def arrived(uri: str, stage: Stage, part: int) -> bool:
    """Say whether the store has all that the stage logged up to the end of a part."""
    tags = [run.data.tags for run in records(uri, stage.root.name)]
    return any(tag.get("part") == str(part) for tag in tags)


def shown(uri: str, experiment: str, artifacts: Path) -> dict[str, Any]:
    """Return all that the store shows of an experiment's runs by their names, but for ids, times and system metrics."""
    runs = records(uri, experiment)
    names = {run.info.run_id: run.info.run_name for run in runs}
    assert len(set(names.values())) == len(runs), f"a run twice: {sorted(names.values())}"
    result = {}
    for run in runs:
        tags = {key: value if key not in VOLATILE else "" for key, value in run.data.tags.items()}
        if tracking.PARENT in tags:
            tags[tracking.PARENT] = names[tags[tracking.PARENT]]
        place = artifacts / run.info.artifact_uri.split(":", 1)[1].removeprefix("//").lstrip("/")
        files = [path for path in sorted(place.rglob("*")) if path.is_file()]
        contents = {path.relative_to(place).as_posix(): hashlib.md5(path.read_bytes()).hexdigest() for path in files}
        result[run.info.run_name] = {
            "status": run.info.status,
            "params": run.data.params,
            "tags": tags,
            "points": [(point.key, point.step, str(point.value)) for point in points(uri, run)],
            "inputs": [(data.dataset.name, data.dataset.digest) for data in run.inputs.dataset_inputs],
            "artifacts": {name: "" if name.startswith("environment/") else md5 for name, md5 in contents.items()},
        }
    return result


def points(uri: str, run: Any, system: bool = False) -> list[Any]:
    """Return all points of a run's metrics, or all of its system metrics."""
    store = client(uri)
    keys = sorted(key for key in run.data.metrics if key.startswith("system/") == system)
    found = [point for key in keys for point in store.get_metric_history(run.info.run_id, key)]
    return sorted(found, key=lambda point: (point.key, point.step, point.timestamp))


@dataclass(frozen=True)
class Expected:
    """A stage without a fault."""

    shown: dict[str, Any]
    report: Report


@pytest.fixture(scope="module")
def expected(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    with Stage(tmp_path_factory.mktemp("faultless"), server.uri) as stage:
        report = stage.run()
    assert stage.errors == [] and stage.journals == []
    found = shown(server.uri, stage.root.name, server.folder / "artifacts")
    assert sorted(found) == sorted(name for name in found if name == "train a" or " · " in name) and len(found) == 2
    run = found["train a"]
    assert run["status"] == "FINISHED"
    assert len(run["points"]) == PARTS * (3 * 10 + 1)
    assert {"model/weights.safetensors", "part-0.txt", "tables/table-3.csv"} <= set(run["artifacts"])
    assert run["tags"]["model.md5"]
    return Expected(found, report)


def check(uri: str, stage: Stage, report: Report, expected: Expected, artifacts: Path) -> None:
    """Assert that the stage was not held up, and that the store shows its runs as without a fault."""
    usual = max(seconds for *_, seconds in expected.report.parts)
    assert max(seconds for *_, seconds in report.parts) < usual + BOUND
    assert report.inside - report.before < expected.report.inside - expected.report.before + 1000 * BOUND
    found = shown(uri, stage.root.name, artifacts)
    for name, run in expected.shown.items():
        for field, value in run.items():
            assert found[name][field] == value, (name, field)
    assert sorted(found) == sorted(expected.shown)
    assert stage.journals == []

    (run,) = [run for run in records(uri, stage.root.name) if run.info.run_name == "train a"]
    assert report.before <= run.info.start_time <= report.inside
    assert report.leaving <= run.info.end_time <= report.after
    for point in points(uri, run):
        if point.key == "train/step":
            began, ended, _ = report.parts[(point.step - 1) // 10]
            assert began <= point.timestamp <= ended, "the time of the call, not that of its arrival"
    assert all(run.info.start_time <= point.timestamp <= run.info.end_time for point in points(uri, run, system=True))


# ---- the tests ------------------------------------------------------------------------------------------------------


def test_server_that_is_killed_or_frozen(server: Server, expected: Expected, start: Start) -> None:
    stage = start("killed", server.uri)
    stage.part(0)
    stage.until(lambda: arrived(server.uri, stage, 0))

    with server.frozen():
        stage.part(1)
        stage.until(lambda: stage.begun(1))
    stage.until(lambda: arrived(server.uri, stage, 1))  # by itself, while the stage runs

    with server.down():
        stage.part(2)
        stage.until(lambda: stage.begun(2))
    stage.until(lambda: arrived(server.uri, stage, 2))
    stage.part(3)
    report = stage.end()

    check(server.uri, stage, report, expected, server.folder / "artifacts")
    assert len(stage.errors) == 4, "a line as an outage begins, and one when it is over"
    (run,) = [run for run in records(server.uri, "killed") if run.info.run_name == "train a"]
    times = {point.timestamp for point in points(server.uri, run, system=True)}
    begin, end = report.parts[2][0], report.parts[3][0]
    assert any(begin < time < end for time in times), "system metrics of the outage are kept too"


def test_server_that_is_down_from_start_to_end(server: Server, expected: Expected, start: Start) -> None:
    port = free_port()
    stage = start("down", f"http://127.0.0.1:{port}")
    report = stage.run()
    assert stage.begun(1) and "anneal sync" in stage.errors[-1], stage.errors
    (stage.root / "table-0.csv").write_text("of the next run")
    shutil.rmtree(stage.root / "models")
    shutil.rmtree(stage.root / "data")

    done = stage.sync()
    assert done.returncode == 1 and "127.0.0.1" in done.stderr and "Traceback" not in done.stderr, done
    assert len(stage.journals) == 1
    with faulty_proxy(server.uri, port):
        for _ in range(2):  # the second has nothing to do
            done = stage.sync()
            assert done.returncode == 0, done
        check(server.uri, stage, report, expected, server.folder / "artifacts")


def test_stage_that_is_killed_in_an_outage_is_sent_by_the_next_stage(
    server: Server, expected: Expected, start: Start
) -> None:
    port = free_port()
    stage = start("next", f"http://127.0.0.1:{port}")
    stage.part(0)
    stage.until(lambda: stage.begun(1))
    stage.part(1)
    killed = [stage.process, *psutil.Process(stage.process.pid).children()]  # a power cut takes the sender too
    for process in killed:
        process.kill()
    when = time.time_ns() // 1_000_000
    stage.process.wait()
    (stage.root / "stage.py").write_text(NEXT)
    with faulty_proxy(server.uri, port):
        subprocess.run([sys.executable, "stage.py"], cwd=stage.root, env=stage.environment, check=True, timeout=60)
    found = shown(server.uri, "next", server.folder / "artifacts")
    assert sorted(found) == sorted([*expected.shown, "evaluate"])
    assert (found["train a"]["status"], found["evaluate"]["status"]) == ("KILLED", "FINISHED")
    whole = expected.shown["train a"]
    assert found["train a"]["points"] == [point for point in whole["points"] if point[1] <= 20]
    assert found["train a"]["params"] == whole["params"]
    assert {name for name in found["train a"]["artifacts"] if not name.startswith("environment/")} == {
        f"{name}-{part}.{kind}" for name, kind in (("part", "txt"), ("tables/table", "csv")) for part in (0, 1)
    }
    (run,) = [run for run in records(server.uri, "next") if run.info.run_name == "train a"]
    assert run.info.start_time < run.info.end_time <= when, "it ended when it was killed, not when that was sent"
    assert stage.journals == []


def test_server_that_answers_with_errors_or_late(server: Server, expected: Expected, start: Start) -> None:
    modes: list[Mode] = ["refuse", "500", "401"]
    with faulty_proxy(server.uri) as proxy:
        proxy.set("refuse")
        stage = start("errors", proxy.uri)
        for part, mode in enumerate(modes):
            proxy.set(mode)
            stage.part(part)
            stage.until(lambda: stage.begun(part + 1))  # noqa: B023
            assert proxy.faults
            proxy.set("pass")
            stage.until(lambda: arrived(server.uri, stage, part))  # noqa: B023
        assert "401" in stage.errors[4], stage.errors
        proxy.set("delay", seconds=0.4)
        stage.part(3)
        report = stage.end()
        assert proxy.faults and len(stage.errors) == 2 * len(modes), "slow is no fault"
        check(server.uri, stage, report, expected, server.folder / "artifacts")


def test_answers_that_are_lost_after_the_commit(server: Server, expected: Expected, start: Start) -> None:
    with faulty_proxy(server.uri) as proxy:
        proxy.set("lose", only="runs/create|log-inputs", times=2)
        stage = start("lost", proxy.uri)
        stage.part(0)
        stage.until(lambda: arrived(server.uri, stage, 0))
        lost = set(proxy.faults)
        proxy.set("lose")
        for part in range(1, PARTS):
            stage.part(part)
        stage.until(lambda: arrived(server.uri, stage, 3))
        report = stage.end()
        lost |= set(proxy.faults)
        if stage.journals:  # the last answers were lost too
            done = stage.sync()
            assert done.returncode == 0, done
        check(server.uri, stage, report, expected, server.folder / "artifacts")
    for call in ("create", "log-inputs", "log-batch", "set-tag", "update"):
        assert any(kind.startswith("POST") and kind.endswith(f"/runs/{call}") for kind in lost), (call, lost)
    assert any(kind.startswith("PUT") for kind in lost)


@pytest.mark.parametrize("when", ["at the start", pytest.param("for long", marks=pytest.mark.long)])
def test_database_that_is_locked(server: Server, expected: Expected, start: Start, tmp_path: Path, when: str) -> None:
    """By another connection; MLflow itself waits 20 s for a lock, but not for a database to open."""
    folder = tmp_path / "locked"
    folder.mkdir()
    shutil.copy(server.folder / "empty.db", folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db?timeout=1"
    with locked(folder / "mlflow.db"):
        stage = start("locked", uri)
        stage.part(0)
        stage.until(lambda: stage.begun(1))
    stage.until(lambda: arrived(uri, stage, 0))
    with locked(folder / "mlflow.db"):
        stage.part(1)
        if when == "for long":
            stage.until(lambda: stage.begun(2))
    stage.until(lambda: arrived(uri, stage, 1))
    stage.part(2)
    stage.part(3)
    check(uri, stage, stage.end(), expected, Path("/"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB, mounted at .anneal of a repository."""
    folder = tmp_path / "full" / ".anneal"
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], check=False)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs rights that this user lacks")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_disk_of_the_journal_that_is_full(server: Server, expected: Expected, start: Start, small_disk: Path) -> None:
    stage = start("full", server.uri)
    stage.part(0)
    stage.until(lambda: arrived(server.uri, stage, 0))
    fill(small_disk / "ballast")
    stage.part(1)
    stage.until(lambda: stage.errors)
    (small_disk / "ballast").unlink()
    stage.part(2)
    stage.until(lambda: arrived(server.uri, stage, 2))
    stage.part(3)
    check(server.uri, stage, stage.end(), expected, server.folder / "artifacts")


def test_stage_and_sender_lose_no_line_of_each_other_on_a_full_disk(small_disk: Path) -> None:
    """Both append to one file: of a line that did not fit a first part may stay, which must spoil no other."""
    path = small_disk / "journal.jsonl"
    stage, sender = Writer(path, own=True), Writer(path)
    stage.append("first", {})
    fill(small_disk / "ballast")
    with pytest.raises(OSError, match="No space left"):
        sender.append("long", {"text": "x" * 5000})  # begins in what is left of the file's page
    (small_disk / "ballast").unlink()
    for name in ("second", "third"):
        stage.append(name, {})
    sender.append("last", {})
    names = [line.name for line in Journal(small_disk).lines()]
    assert [name for name in names if name != "long"] == ["first", "second", "third", "last"]
    assert "long" in names
    stage.close()
    sender.close()


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Hold a lock that nobody can even read beside."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


def fill(path: Path) -> None:
    """Write a file until its disk is full."""
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    assert shutil.disk_usage(path).free == 0


@pytest.mark.long
@pytest.mark.parametrize("fault", ["lost", "down"])
def test_one_predictor_whatever_happens(server: Server, tmp_path: Path, fault: str) -> None:
    root, port = tmp_path / fault, free_port()
    files = {path: (root / path).read_bytes() for path in write_predictor(root)}
    uri = f"http://127.0.0.1:{port}"
    if fault == "lost":
        with faulty_proxy(server.uri, port) as proxy, Stage(root, uri, PREDICTOR) as stage:
            proxy.set("lose")
            assert stage.process.wait(300) == 0
            assert any(kind.startswith("POST") and kind.endswith("/logged-models") for kind in proxy.faults), (
                proxy.faults
            )
    else:
        with Stage(root, uri, PREDICTOR) as stage:
            assert stage.process.wait(120) == 0
            assert (root / "stdout").read_text() == "None\n"
            shutil.rmtree(root / "models")
            shutil.rmtree(root / "reports")
    if stage.journals:
        with faulty_proxy(server.uri, port):
            done = stage.sync()
            assert done.returncode == 0, done
    (run,) = [run for run in records(server.uri, fault) if run.info.run_name == "evaluate"]
    (model,) = client(server.uri).search_logged_models([run.info.experiment_id])
    assert (str(model.status), [metric.value for metric in model.metrics]) == ("READY", [0.5])
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert run.info.status == "FINISHED" and run.data.metrics["test/accuracy"] == 0.5
    versions = client(server.uri).search_model_versions(f"name = 'outage-{fault}'")
    assert [version.run_id for version in versions] == [run.info.run_id]
    for name, content in files.items():
        (found,) = (server.folder / "artifacts").rglob(f"{model.model_id}/**/{name}")
        assert found.read_bytes() == content
