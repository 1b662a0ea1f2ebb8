"""The journal of a stage: whole lines whatever happens, sent exactly once, and what `anneal sync` does with it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from anneal import params, tracking
from anneal.tracking.journal import FOLDER, Journal, Writer, create, journals
from anneal.tracking.player import Player, drain, end_killed
from anneal.tracking.store import Store
from anneal.tracking.sync import sync
from tests.test_tracking import (  # noqa: F401
    children,
    client,
    empty_database,
    free_port,
    fresh,
    parents,
    recipe,
    runs,
    sqlite,
    stage,
    wait_for,
    workspace,
)


def names(journal: Journal, offset: int = 0) -> list[str]:
    return [line.name for line in journal.lines(offset)]


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes: the write that would goes as far as it can, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# ---- the file -------------------------------------------------------------------------------------------------------


def test_lines_that_do_not_fit_wait_and_keep_their_order(tmp_path: Path) -> None:
    journal = create(tmp_path, "train", "a")
    writer = Writer(journal.path)
    writer.append("first", {"n": 0})
    with disk_of(journal.path.stat().st_size + 20):
        for number in (1, 2, 3):
            with pytest.raises(OSError):
                writer.append("more", {"n": number, "text": "x" * 100})
    assert names(journal) == ["first"] and writer.waiting == 3
    writer.append("last", {"n": 4})
    assert [line.arguments["n"] for line in journal.lines()] == [0, 1, 2, 3, 4]
    assert writer.waiting == 0


def test_lines_longer_than_what_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anneal.tracking.journal.CHUNK", 64)
    journal = create(tmp_path, "train", "a")
    writer = Writer(journal.path)
    for number in range(9):
        writer.append("call", {"n": number, "text": "ä\n" * 10 * number})
    with open(journal.path, "ab") as file:
        file.write(b'["half a li')
    lines = list(journal.lines())
    assert [line.arguments["n"] for line in lines] == list(range(9))
    for earlier, later in pairwise(lines):
        assert journal.read(earlier.end)[0] == later
    assert journal.tail()[-1].arguments["n"] == 8


def test_a_stage_holds_its_journal_as_long_as_it_lives_and_its_workers_do_not(tmp_path: Path) -> None:
    code = (
        "import multiprocessing, os, sys, time\n"
        "from pathlib import Path\n"
        "from anneal import params, tracking\n"
        "with tracking.stage_run({'tracking': {'uri': sys.argv[1], 'experiment': 'x'}}, 'train') as run:\n"
        "    worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    worker.start()\n"
        "    print(worker.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / ".dvc").mkdir()
    address = f"http://127.0.0.1:{free_port()}"
    environment = {key: value for key, value in os.environ.items() if key != "DVC_ROOT"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, address],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert process.stdout is not None
    worker = psutil.Process(int(process.stdout.readline()))
    try:
        (journal,) = journals(tmp_path)
        assert not journal.abandoned()
        process.kill()
        process.wait()
        assert journal.abandoned() and worker.is_running()
        wait_for(lambda: "finish" in names(journal))  # and the sender sees the end of its pipe
        assert (
            stat.S_IMODE(journal.folder.stat().st_mode) == stat.S_IMODE(journal.folder.parent.stat().st_mode) == 0o700
        )
    finally:
        worker.kill()
        process.stdout.close()


def test_no_secret_is_in_a_journal_or_a_message(workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:  # noqa: F811
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok3nvalue")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:s3cret@127.0.0.1:{free_port()}")
    values = params.merge(recipe(), {"search": {"storage": "postgresql://me:s3cret@host/db"}})
    with pytest.raises(RuntimeError), tracking.stage_run(values, "train", member="a"):
        raise RuntimeError("refused: token tok3nvalue, http://me:s3cret@host, Authorization: Basic bWU6czNjcmV0")
    (journal,) = journals(workspace)
    errors = capfd.readouterr().err
    for file in journal.folder.rglob("*"):
        if file.is_file():
            text = file.read_text(errors="replace")
            assert not any(secret in text for secret in ("s3cret", "tok3nvalue", "bWU6czNjcmV0")), file
    assert "s3cret" not in errors and "tok3nvalue" not in errors
    assert "me:***@" in journal.first()["params"]["tracking"]["uri"]


def test_what_is_packed_no_longer_needs_the_working_tree(tmp_path: Path) -> None:
    files = [tmp_path / "a.csv", tmp_path / "models" / "a" / "weights"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    journal = create(tmp_path, "train", "a")
    writer = Writer(journal.path)
    writer.append("start", {"cwd": str(tmp_path), "outs": ["models/a"], "time": 1})
    writer.append("artifact", {"path": str(files[0]), "folder": None, "time": 2})
    sent = journal.path.stat().st_size
    writer.append("artifact", {"path": str(tmp_path / "models"), "folder": None, "time": 3})
    writer.append("predictor", {"files": ["models/a/weights", "absent"], "base": str(tmp_path), "time": 4})
    writer.append("link", {"stage": "train", "path": "models/a", "time": 5})
    writer.append("finish", {"status": "FINISHED", "time": 6})
    before = journal.path.read_bytes()[:sent]
    for _ in range(2):  # twice is once
        journal.pack(sent, lambda path: f"hash of {path.relative_to(tmp_path)}")
        assert journal.path.read_bytes()[:sent] == before
        shutil.rmtree(tmp_path / "models", ignore_errors=True)
    artifact, predictor, link, finish = [line.arguments for line in journal.lines(sent)]
    assert (journal.folder / artifact["path"] / "a" / "weights").read_text() == "weights"
    assert predictor["base"] == str(tmp_path)  # one of its files is gone: it is left as it is
    assert link["md5"] == "hash of models/a" and finish["outs"] == {"models/a": "hash of models/a"}


# ---- sent exactly once ----------------------------------------------------------------------------------------------


def shown(uri: str) -> dict[str, Any]:
    """Return all that the store shows of its runs."""
    store, result = client(uri), {}
    for run in runs(uri):
        history = {key: store.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        points = sorted((key, p.step, p.timestamp, str(p.value)) for key, values in history.items() for p in values)
        files = sorted(path.as_posix() for path in Path("mlruns", run.info.run_id).rglob("*"))
        inputs = [entry.dataset.digest for entry in run.inputs.dataset_inputs]
        result[run.info.run_id] = (
            run.info.run_name,
            run.info.status,
            run.info.end_time,
            run.data.tags,
            points,
            files,
            inputs,
        )
    return result


def write_journal(root: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    """Let a stage whose store is out of reach write a journal with calls of all kinds but the predictor."""
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
        out = root / "models" / "a"
        with tracking.stage_run(recipe(), "train", member="a", outs=[Path("models/a")]) as run:
            out.mkdir(parents=True)
            (out / "weights").write_text("w")
            run.metrics({"train/loss": 1.0, "val/loss": float("nan"), "bad name !?": 1.0}, 1)
            run.series((step, {"step/loss": 1 / step}) for step in range(1, 2500))
            run.headline({"test/accuracy": 0.5})
            run.curves({"val/loss": [2.0, float("nan"), 1.0]})
            run.tag("best_epoch", 1)
            run.text("notes/a.txt", "text")
            run.artifact(out, "model")
            run.link("train", Path("models/a"), "a")
            run.data_set("data/processed")
            run.describe("*it*")
    (journal,) = journals(root)
    return journal


def test_each_call_may_be_made_again(workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:  # noqa: F811
    """After each call the process is as good as killed before it could note it, and the next one makes it again."""
    journal = write_journal(workspace, monkeypatch)
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 2 and "anneal sync" in errors[1]
    shutil.rmtree("models")
    uri = sqlite(workspace)
    faults: list[BaseException] = []
    store = Store(uri, workspace)
    store.connect()

    def player() -> Player:
        return Player(journal, store, live=False, fault=faults.append)

    assert player().left() > 10
    while True:
        shutil.rmtree("before", ignore_errors=True)
        shutil.copytree(journal.folder, "before")
        if not player().step():
            break
        once = shown(uri)
        for name in ("sent.json", "lost"):
            (journal.folder / name).unlink(missing_ok=True)
        if Path("before/sent.json").exists():
            shutil.copy("before/sent.json", journal.folder)
        assert player().step()
        assert shown(uri) == once
    (parent,), (child,) = parents(uri), children(uri)
    (finish,) = [line for line in journal.lines() if line.name == "finish"]
    assert (child.info.status, child.info.end_time) == ("FINISHED", finish.arguments["time"])
    assert (parent.info.status, parent.info.end_time) == ("FINISHED", finish.arguments["time"])
    assert child.info.start_time == journal.first()["time"]
    assert child.data.tags["tracking"] == "incomplete" and "bad name !?" in str(faults[0])
    history = client(uri).get_metric_history(child.info.run_id, "step/loss")
    assert [point.step for point in history] == list(range(1, 2500))
    assert child.data.tags["model.md5"].endswith(".dir")
    assert (Path("mlruns") / child.info.run_id / "artifacts/model/weights").read_text() == "w"


def test_a_run_that_was_killed_with_its_sender_goes_on_as_the_same_run(workspace: Path) -> None:  # noqa: F811
    process = stage("for i in range(2, 9): run.metrics({'train/loss': 1 / i}, i)\ntime.sleep(120)")
    uri = sqlite(workspace)
    wait_for(lambda: any(run.data.metrics for run in children(uri)))
    (journal,) = journals(workspace)
    sender = psutil.Process(process.pid).children()
    sender[0].suspend()  # what comes now is in the journal alone
    for part in [*sender, psutil.Process(process.pid)]:
        part.kill()
    process.communicate()
    last = journal.tail()[-1].arguments["time"]
    (before,) = children(uri)
    with tracking.stage_run(recipe(), "train", member="a", resume=True) as run:
        for step in range(5, 12):  # from the last checkpoint
            run.metrics({"train/loss": 1 / step}, step)
    (run,) = children(uri)
    assert run.info.run_id == before.info.run_id
    assert run.info.status == "FINISHED" and run.info.end_time > last
    history = client(uri).get_metric_history(run.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(1, 12))
    assert not journals(workspace)
    keys = [key for key in run.data.metrics if key.startswith("system/")]
    for key in keys:
        steps = Counter(point.step for point in client(uri).get_metric_history(run.info.run_id, key))
        assert max(steps.values()) == 1


def test_a_sender_that_is_killed_is_followed_by_another(workspace: Path) -> None:  # noqa: F811
    process = stage(
        "while not Path('go').exists(): time.sleep(0.1)\nfor i in range(2, 9): run.metrics({'train/loss': 1 / i}, i)"
    )
    uri = sqlite(workspace)
    wait_for(lambda: any(run.data.metrics for run in children(uri)))
    for part in psutil.Process(process.pid).children():
        part.send_signal(signal.SIGKILL)
    Path("go").touch()
    assert process.communicate(timeout=120) == ("trained\n", "")
    (run,) = children(uri)
    history = client(uri).get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, 9))
    assert run.info.status == "FINISHED" and not journals(workspace)


# ---- anneal sync ----------------------------------------------------------------------------------------------------


def keep(root: Path, address: str, experiment: str = "anneal") -> int:
    """Write the journal of a stage that was killed, and return the time of its last call."""
    journal = create(root, "train", "a")
    values = {**recipe(), "tracking": {"uri": address, "experiment": experiment}}
    start = {"stage": "train", "member": "a", "params": values, "root": str(root), "cwd": str(root), "script": "x"}
    began = 1_700_000_000_000 + len(journals(root))
    writer = Writer(journal.path)
    writer.append(
        "start", {**start, "variables": {}, "data": None, "info": None, "outs": [], "resume": False, "time": began}
    )
    writer.append("tag", {"key": "address", "value": address, "time": began + 1000})
    writer.close()
    return began + 1000


def test_sync_goes_to_the_address_of_the_stage_or_where_it_is_told(
    workspace: Path,  # noqa: F811
    monkeypatch: Any,
    capfd: Any,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    uri, down = sqlite(workspace), f"127.0.0.1:{free_port()}"
    for address in (f"http://me:***@{down}", f"http://{down}", uri):
        keep(workspace, address)
    assert sync(uri) == 2
    said = capfd.readouterr()
    assert len(said.err.splitlines()) == 2 and "set MLFLOW_TRACKING_URI" in said.err
    assert said.out == f"MLflow at {uri}: sent train a of 2023-11-14 22:13:20 UTC, 3 calls\n"
    assert [run.data.tags["address"] for run in children(uri)] == [uri]
    assert sync(f"http://me:secret@{down}") == 2  # the same address with its password
    said = capfd.readouterr()
    assert len(said.err.splitlines()) == 2 and "set MLFLOW" not in said.err and "secret" not in said.err
    assert sync(uri, moved=True) == 0
    assert capfd.readouterr().out.count("sent train a") == 2
    assert [run.info.status for run in children(uri)] == ["KILLED"] * 3 and not journals(workspace)


def test_the_command_says_whether_something_is_kept(workspace: Path) -> None:  # noqa: F811
    command = [sys.executable, "-m", "anneal.cli", "sync"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing is kept: MLflow has it all\n", "")
    keep(workspace, f"http://127.0.0.1:{free_port()}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == "" and "1 runs are kept" in done.stderr, done


def test_one_journal_that_cannot_be_sent_holds_up_no_other(workspace: Path) -> None:  # noqa: F811
    uri = sqlite(workspace)
    store = Store(uri, workspace)
    store.connect()
    store.client.delete_experiment(store.client.create_experiment("deleted"))
    keep(workspace, uri, "deleted")
    last = keep(workspace, uri)
    faults: list[str] = []
    sent: list[str] = []
    drain(
        store,
        uri,
        workspace,
        fault=lambda title, error: faults.append(f"{title}: {error}"),
        done=lambda title, calls: sent.append(f"{title}: {calls}"),
    )
    assert len(faults) == 1 and "mlflow experiments restore" in faults[0]
    assert sent == ["train a of 2023-11-14 22:13:20 UTC: 3"]
    (run,) = children(uri)
    assert (run.info.status, run.info.end_time) == ("KILLED", last), "where the stage's last call was"
    assert len(journals(workspace)) == 1


def test_a_journal_ends_once(tmp_path: Path) -> None:
    journal = create(tmp_path, "train", "a")
    writer = Writer(journal.path)
    writer.append("start", {"time": 7})
    for _ in range(2):
        end_killed(journal)
    assert [(line.name, line.arguments["time"]) for line in journal.lines()] == [("start", 7), ("finish", 7)]
    assert json.loads(journal.path.read_text().splitlines()[-1])[1]["status"] == "KILLED"
    assert (tmp_path / FOLDER / ".gitignore").read_text() == "*\n"
