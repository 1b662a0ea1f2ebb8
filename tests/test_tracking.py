"""Tracking against real stores: sqlite, an `mlflow server` over HTTP with sqlite and with PostgreSQL behind it."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from anneal import params, tracking
from anneal.params import UserError

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "DVC_STAGE", *tracking.RANKS)


def recipe() -> dict[str, Any]:
    """Return params.yaml, with what these tests name held fixed."""
    named = {
        "data": {"path": "data/digits.zip"},
        "model": {"name": "resnet"},
        "optimizer": {"name": "SGD", "SGD": {"lr": 0.1}},
        "schedule": {"name": "cosine"},
    }
    return params.merge(params.read_yaml(ROOT / "params.yaml"), named)


def write_store(root: Path, digest: str = "d" * 32) -> None:
    info = {"classes": ["0", "1"], "height": 8, "width": 8, "channels": 1, "counts": {"train": 4}, "digest": digest}
    folder = root / "data" / "processed"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(info))


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, copied where a test is not about making one, which takes seconds."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def workspace(empty_database: Path, fresh: Path) -> Path:
    """A repository with a processed data set and an empty store, as the working directory."""
    shutil.copy(empty_database, fresh)
    return fresh


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a processed data set, as the working directory."""
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".dvc").mkdir()
    YAML().dump(recipe(), tmp_path / "params.yaml")
    write_store(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def client(uri: str) -> Any:
    import mlflow

    return mlflow.MlflowClient(uri)


def runs(uri: str, text: str = "") -> list[Any]:
    """Return the runs of the store, oldest first."""
    store = client(uri)
    experiments = [experiment.experiment_id for experiment in store.search_experiments()]
    return list(store.search_runs(experiments, text, order_by=["attributes.start_time ASC"]))


def parents(uri: str) -> list[Any]:
    return [run for run in runs(uri) if "fingerprint" in run.data.tags]


def children(uri: str, stage: str | None = None) -> list[Any]:
    return [run for run in runs(uri) if run.data.tags.get("stage") and stage in (None, run.data.tags["stage"])]


def sqlite(root: Path) -> str:
    return f"sqlite:///{root}/mlflow.db"


STAGE = """
import os, sys, time
from pathlib import Path
from anneal import params, tracking
values = params.read_yaml("params.yaml")
with tracking.stage_run(values, "train", member=sys.argv[1], outs=[Path("models") / sys.argv[1]]) as run:
    run.metrics({{"train/loss": 1.0}}, 1)
{body}
    folder = Path("models") / sys.argv[1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.safetensors").write_text("weights " + sys.argv[1])
    print("trained")
"""


def stage(body: str = "", member: str = "a", **kwargs: Any) -> subprocess.Popen[str]:
    """Start a stage in a process of its own."""
    lines = "\n".join("    " + line for line in body.splitlines())
    code = STAGE.format(body=lines)
    return subprocess.Popen(
        [sys.executable, "-c", code, member], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def mlflow_server(store: str, folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run `mlflow server` over a store; gives its address and its process, the leader of a group of its own."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:

        def ready() -> bool:
            assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", port)) == 0

        wait_for(ready, 120)
        yield f"http://127.0.0.1:{port}", process
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[Any], number: int = signal.SIGKILL) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
    process.wait()


@pytest.fixture(scope="module")
def sqlite_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(f"sqlite:///{folder}/server.db", folder) as (uri, _):
        yield uri


@pytest.fixture(scope="module")
def postgresql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An `mlflow server` over a PostgreSQL of its own, which runs as a user that is not root."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = str(found[-1]) if found else shutil.which("initdb")
    if initdb is None:
        pytest.skip("PostgreSQL is not installed")
    binaries = Path(initdb).resolve().parent
    identity: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("postgresql")
    if os.geteuid() == 0:
        names = {entry.pw_name: entry for entry in pwd.getpwall()}
        owner = names.get("postgres") or names["nobody"]
        identity = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        home = Path("/tmp") / f"anneal-postgresql-{os.getpid()}"  # pytest's folders are closed to other users
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        os.chown(home, owner.pw_uid, owner.pw_gid)
    else:
        home = folder
    cluster, port = home / "cluster", free_port()
    password = home / "password"
    password.write_text("secret")
    password.chmod(0o644)
    command = [str(binaries / "initdb"), "-D", str(cluster), "-U", "anneal", "--auth=scram-sha-256"]
    subprocess.run(
        [*command, f"--pwfile={password}", "--no-sync"], check=True, cwd=home, capture_output=True, **identity
    )
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(home), "-c", "fsync=off"]
    process = subprocess.Popen(
        [str(binaries / "postgres"), "-D", str(cluster), *options],
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **identity,
    )
    try:
        import psycopg2

        address = {"host": "127.0.0.1", "port": port, "user": "anneal", "password": "secret", "dbname": "postgres"}

        def ready() -> bool:
            try:
                psycopg2.connect(**address).close()
            except psycopg2.OperationalError:
                return False
            return True

        wait_for(ready)
        store = f"postgresql+psycopg2://anneal:secret@127.0.0.1:{port}/postgres"
        with mlflow_server(store, folder) as (uri, _):
            yield uri
    finally:
        end_group(process)
        if os.geteuid() == 0:
            shutil.rmtree(home, ignore_errors=True)


# ---- names, addresses, hashes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql://me:s3cret@host/db", "postgresql://me:***@host/db"),
        ("http://me:s3@cret@host", "http://me:***@host"),
        (
            "cannot reach postgresql+psycopg2://me:s3cret@host:5432/db now",
            "cannot reach postgresql+psycopg2://me:***@host:5432/db now",
        ),
        ("https://host/?user=me&password=s3cret&x=1", "https://host/?user=me&password=***&x=1"),
        ("sqlite:////a/mlflow.db", "sqlite:////a/mlflow.db"),
        ("http://127.0.0.1:5000/x", "http://127.0.0.1:5000/x"),
    ],
)
def test_no_password_is_shown(text: str, clean: str) -> None:
    assert tracking.redact(text) == clean


def test_the_address_of_the_store(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.tracking_uri("sqlite:///mlflow.db") == sqlite(workspace)
    assert tracking.tracking_uri("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert tracking.tracking_uri("sqlite:///b.db?timeout=5") == f"sqlite:///{workspace}/b.db?timeout=5"
    assert tracking.tracking_uri("http://host:5000") == "http://host:5000"
    experiment = workspace / ".dvc" / "tmp" / "exps" / "x"
    (experiment / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(experiment)
    assert tracking.tracking_uri("sqlite:///mlflow.db") == sqlite(experiment)
    monkeypatch.setenv("DVC_ROOT", str(workspace))
    assert tracking.tracking_uri("sqlite:///mlflow.db") == sqlite(workspace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:1")
    assert tracking.tracking_uri("sqlite:///mlflow.db") == "http://other:1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert tracking.tracking_uri("sqlite:///mlflow.db") == f"sqlite:///{workspace}/other.db"


def test_the_ui_is_on_this_machine_alone_and_hides_the_password(workspace: Path) -> None:
    command, environment = tracking.ui_command("postgresql://me:secret@host/db", port=5001)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "5001"
    assert "secret" not in " ".join(command)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:secret@host/db"
    with pytest.raises(UserError, match=r"open http://me:\*\*\*@host:5000"):
        tracking.ui_command("http://me:secret@host:5000")


def test_fingerprint_follows_tracked_params_and_data_alone() -> None:
    values = recipe()
    same = params.merge(values, {"hardware": {"num_workers": 7}, "tracking": {"uri": "x", "experiment": "y"}})
    other = params.merge(values, {"optimizer": {"name": "AdamW"}})
    first = tracking.fingerprint(values, "d")
    assert first == tracking.fingerprint(same, "d")
    assert len({first, tracking.fingerprint(other, "d"), tracking.fingerprint(values, "e")}) == 3


def test_params_are_flat_and_long_values_tell_that_they_are_cut() -> None:
    flat = tracking.flat_params(
        {"augment": {"policy": ["ä" * 7000]}, "a": {"b": None, "c": {}, "d": True, "e": 5e-4}, "hardware": {"x": 1}}
    )
    assert flat["a.b"] == "null" and flat["a.c"] == "{}" and flat["a.d"] == "true" and flat["a.e"] == "0.0005"
    assert not any(key.startswith("hardware") for key in flat)
    long = flat["augment.policy"]
    other = tracking.flat_params({"augment": {"policy": ["ä" * 7001]}})["augment.policy"]
    assert len(long) <= tracking.MAX_PARAM and long != other and "... md5 " in long


def test_hashes_are_those_of_dvc_lock(tmp_path: Path) -> None:
    (tmp_path / "write.py").write_text(
        "import pathlib\n"
        "out = pathlib.Path('out'); (out / 'b' / '__pycache__').mkdir(parents=True)\n"
        "for name in ['b.txt', 'b/a', 'b/ü.txt', 'a-', 'z.tmp', 'b/__pycache__/x.pyc', '.gitignore']:\n"
        "    (out / name).write_text(name + '\\r\\n')\n"
        "pathlib.Path('file.txt').write_bytes(b'one\\r\\ntwo')\n"
    )
    (tmp_path / ".dvcignore").write_text("__pycache__/\n.gitignore\n*.tmp\n")
    (tmp_path / "dvc.yaml").write_text(
        f"stages: {{write: {{cmd: {sys.executable} write.py, deps: [write.py], outs: [out, file.txt]}}}}\n"
    )
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "-q", "-f"], cwd=tmp_path, check=True)
    (tmp_path / ".dvcignore").write_text("__pycache__/\n.gitignore\n*.tmp\n")
    subprocess.run([*dvc, "repro", "-q"], cwd=tmp_path, check=True)
    lock = YAML(typ="safe").load(tmp_path / "dvc.lock")["stages"]["write"]
    assert len(lock["outs"]) == 2 and (tmp_path / "out" / "z.tmp").exists()
    for out in [*lock["outs"], *lock["deps"]]:
        assert tracking.dvc_hash(tmp_path / out["path"], tmp_path) == out["md5"]
    assert tracking.dvc_hash(tmp_path / "absent", tmp_path) is None


# ---- runs in the sqlite store ---------------------------------------------------------------------------------------


def test_a_stage_is_a_child_of_the_recipe_on_its_data(workspace: Path) -> None:
    values = recipe()
    model = Path("models/a")
    with tracking.stage_run(values, "train", member="a", outs=[model, Path("absent")]) as run:
        for epoch in (1, 2, 3):
            run.metrics({"train/loss": np.float32(1 / epoch), "val/accuracy": 0.5, "val/loss": float("nan")}, epoch)
        model.mkdir(parents=True)
        (model / "weights.safetensors").write_text("w")
        Path("preview.txt").write_text("picture")
        run.artifact("preview.txt", "previews")
        run.artifact(model, "model")
        run.tag("best_epoch", 3)
        run.headline({"test/accuracy": 0.75})
    uri = sqlite(workspace)
    (parent,), (child,) = parents(uri), children(uri)
    assert parent.info.run_name == f"digits resnet SGD cosine · {parent.data.tags['fingerprint'][:4]}"
    assert child.info.run_name == "train a"
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    tags = child.data.tags
    assert tags["mlflow.parentRunId"] == parent.info.run_id
    assert (tags["stage"], tags["member"], tags["attempt"], tags["best_epoch"]) == ("train", "a", "1", "3")
    assert tags["out.models/a"] == tags["model.md5"] == tracking.dvc_hash(model)
    assert "out.absent" not in tags
    history = client(uri).get_metric_history(child.info.run_id, "train/loss")
    assert [(point.step, round(point.value, 4)) for point in history] == [(1, 1.0), (2, 0.5), (3, 0.3333)]
    assert parent.data.metrics == {"test/accuracy": 0.75}
    assert "| test/accuracy | 0.7500 |" in parent.data.tags["mlflow.note.content"]
    assert parent.data.params == tracking.flat_params(values)
    assert parent.data.params["optimizer.SGD.lr"] == "0.1" and "tracking.uri" not in parent.data.params
    assert child.data.params["seed"] == "0" and "data.path" not in child.data.params
    for record in (parent, child):
        (entry,) = record.inputs.dataset_inputs
        assert (entry.dataset.name, entry.dataset.digest) == ("digits", "d" * 32)
    assert [item.path for item in client(uri).list_artifacts(child.info.run_id, "previews")] == ["previews/preview.txt"]
    assert (workspace / "mlruns" / child.info.run_id / "artifacts/model/weights.safetensors").read_text() == "w"


def test_a_rerun_adds_an_attempt_and_another_recipe_a_parent(workspace: Path) -> None:
    for member in ("a", "a", "b"):
        with tracking.stage_run(recipe(), "train", member=member):
            pass
    with tracking.stage_run(params.merge(recipe(), {"trainer": {"epochs": 1}}), "train", member="a"):
        pass
    uri = sqlite(workspace)
    assert [run.info.run_name for run in children(uri)] == ["train a", "train a #2", "train b", "train a"]
    first, second = parents(uri)
    owners = [run.data.tags["mlflow.parentRunId"] for run in children(uri)]
    assert owners == [first.info.run_id] * 3 + [second.info.run_id]


def test_preprocess_finds_its_parent_once_the_store_is_written(workspace: Path) -> None:
    shutil.rmtree("data")
    for _ in range(2):
        with tracking.stage_run(recipe(), "preprocess", data=None, outs=[Path("data/processed")]) as run:
            write_store(workspace)
            run.adopt(Path("data/processed"))
            run.metrics({"images": 4})
    uri = sqlite(workspace)
    (parent,) = parents(uri)
    assert [run.info.run_name for run in children(uri)] == ["preprocess", "preprocess #2"]
    for number, run in enumerate(children(uri), 1):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["attempt"] == str(number)
        assert run.data.tags["out.data/processed"] == tracking.dvc_hash("data/processed")
        assert run.inputs.dataset_inputs[0].dataset.digest == "d" * 32


def test_a_stage_that_failed_before_its_data_is_there_has_no_parent(workspace: Path) -> None:
    shutil.rmtree("data")
    with pytest.raises(UserError), tracking.stage_run(recipe(), "augment"):
        raise UserError("data/processed: no processed data here")
    uri = sqlite(workspace)
    (run,) = children(uri)
    assert run.info.status == "FAILED" and not parents(uri)


def test_a_cached_stage_is_linked_and_never_logged_twice(workspace: Path) -> None:
    def train(values: dict[str, Any], text: str) -> None:
        with tracking.stage_run(values, "train", member="a", outs=[Path("models/a")]):
            Path("models/a").mkdir(parents=True, exist_ok=True)
            Path("models/a/weights").write_text(text)

    uri = sqlite(workspace)
    first, second = recipe(), params.merge(recipe(), {"evaluate": {"bootstrap": 10}})
    train(first, "other bytes")
    train(first, "bytes")
    with pytest.raises(UserError), tracking.stage_run(first, "train", member="a", outs=[Path("models/a")]):
        raise UserError("a failed run wrote nothing that counts")
    for values in (first, second, second):  # the second recipe differs in evaluate alone: train comes from the cache
        with tracking.stage_run(values, "evaluate") as run:
            run.link("train", Path("models/a"), "a")
            run.link("preprocess", Path("data/processed"))
            run.link("train", Path("models/absent"), "absent")
    one, two = parents(uri)
    assert not [key for key in one.data.tags if key.startswith("linked.")]
    linked = {key: value for key, value in two.data.tags.items() if key.startswith("linked.")}
    assert linked == {"linked.train.a": children(uri, "train")[1].info.run_id}
    assert len(children(uri, "train")) == 3


def test_an_interrupted_run_can_be_continued(workspace: Path) -> None:
    def interrupted() -> None:
        with tracking.stage_run(recipe(), "train", member="a") as run:
            run.metrics({"val/loss": 2.0}, 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for resume in (True, True, False):  # a stage may be killed between the end of its run and its own
        with tracking.stage_run(recipe(), "train", member="a", resume=resume) as run:
            run.metrics({"val/loss": 1.0}, 2)
    uri = sqlite(workspace)
    first, second = children(uri)
    assert [point.step for point in client(uri).get_metric_history(first.info.run_id, "val/loss")] == [1, 2]
    assert (first.info.status, second.info.status) == ("FINISHED", "FINISHED")
    assert second.data.tags["attempt"] == "2"


def test_more_params_than_mlflow_takes_in_one_call(workspace: Path) -> None:
    values = params.merge(recipe(), {"wide": {f"key{i}": i for i in range(250)}})
    with tracking.stage_run(values, "augment") as run:
        run.metrics({f"class/{i}": i for i in range(1500)})
    (parent,), (child,) = parents(sqlite(workspace)), children(sqlite(workspace))
    assert parent.data.params["wide.key249"] == "249"
    assert len(child.data.metrics) == 1500


def test_system_metrics_are_sampled(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")
    uri = sqlite(workspace)
    with tracking.stage_run(recipe(), "train", member="a"):
        wait_for(
            lambda: (
                Path("mlflow.db").exists()
                and any("system/cpu_utilization_percentage" in run.data.metrics for run in children(uri))
            )
        )


def test_only_the_first_process_tracks(workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with tracking.stage_run(recipe(), "train", member="a") as run:
        run.metrics({"train/loss": 1.0}, 1)
    assert not children(sqlite(workspace))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with tracking.stage_run(recipe(), "train", member="a"):
        pass
    assert len(children(sqlite(workspace))) == 1
    assert capfd.readouterr() == ("", "")  # and mlflow's own chatter is kept to itself


def test_many_processes_on_a_fresh_store_share_one_parent(fresh: Path) -> None:
    members = "abcd"
    values = params.merge(recipe(), {"ensemble": {"members": {name: {} for name in members}}})
    YAML().dump(values, fresh / "params.yaml")
    code = STAGE.format(body="")
    started = [
        subprocess.Popen([sys.executable, "-c", code, name], stderr=subprocess.PIPE, text=True) for name in members
    ]
    assert [process.communicate()[1] for process in started] == [""] * len(members)
    uri = sqlite(fresh)
    (parent,) = parents(uri)
    assert sorted(run.data.tags["member"] for run in children(uri)) == list(members)
    for run in children(uri):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id and run.info.status == "FINISHED"
    assert parent.info.status == "FINISHED"
    assert parent.data.params == tracking.flat_params(values)


# ---- how a run ends -------------------------------------------------------------------------------------------------


def test_an_exception_marks_the_run_failed_and_passes(workspace: Path) -> None:
    with pytest.raises(ZeroDivisionError), tracking.stage_run(recipe(), "train", member="a"):
        1 / 0  # noqa: B018
    (run,), (parent,) = children(sqlite(workspace)), parents(sqlite(workspace))
    assert (run.info.status, parent.info.status) == ("FAILED", "FAILED")
    assert run.data.tags["error"] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_stage_is_marked_killed(workspace: Path, number: int) -> None:
    process = stage("time.sleep(120)", start_new_session=True)
    uri = sqlite(workspace)
    wait_for(lambda: any(run.data.metrics for run in children(uri)))
    os.killpg(process.pid, number)  # as Ctrl-C does: the whole group
    process.communicate()
    assert process.returncode != 0
    wait_for(lambda: children(uri)[0].info.status == "KILLED")
    wait_for(lambda: parents(uri)[0].info.status == "KILLED")


def test_a_run_whose_processes_are_gone_ends_with_the_next_stage(workspace: Path) -> None:
    process = stage("time.sleep(120)")
    uri = sqlite(workspace)
    wait_for(lambda: any(run.data.metrics for run in children(uri)))
    import psutil

    for part in [*psutil.Process(process.pid).children(), psutil.Process(process.pid)]:
        part.kill()  # a power cut
    process.communicate()
    assert children(uri)[0].info.status == "RUNNING"
    with tracking.stage_run(recipe(), "evaluate"):
        pass
    assert [run.info.status for run in children(uri)] == ["KILLED", "FINISHED"]
    assert parents(uri)[0].info.status == "FINISHED"


# ---- faults ---------------------------------------------------------------------------------------------------------


@pytest.fixture(
    params=[
        "folder",
        "garbage",
        "unwritable",
        "refused",
        "silent",
        "no database server",
        "file store",
        "unknown scheme",
    ]
)
def bad_store(request: Any, tmp_path: Path) -> Iterator[str]:
    """Addresses of stores that cannot work."""
    if request.param == "folder":
        (tmp_path / "there.db").mkdir()
        yield f"sqlite:///{tmp_path}/there.db"
    elif request.param == "garbage":
        (tmp_path / "garbage.db").write_text("this is no database, and long enough to be seen as none" * 50)
        yield f"sqlite:///{tmp_path}/garbage.db"
    elif request.param == "unwritable":
        yield "sqlite:////proc/mlflow.db"
    elif request.param == "refused":
        yield f"http://me:secret@127.0.0.1:{free_port()}"
    elif request.param == "no database server":
        yield f"postgresql+psycopg2://me:secret@127.0.0.1:{free_port()}/db"
    elif request.param == "silent":
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield f"http://me:secret@127.0.0.1:{server.getsockname()[1]}"
    else:
        yield {"file store": str(tmp_path / "mlruns"), "unknown scheme": "gopher://me:secret@host/x"}[request.param]


def test_a_store_that_does_not_work_is_said_once_and_stops_nothing(
    workspace: Path, bad_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bad_store)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    process = stage("run.headline({'x': 1.0})\nrun.artifact('absent')\nrun.link('train', 'data/processed')")
    output, errors = process.communicate(timeout=120)  # mlflow's defaults take 8 minutes
    assert (process.returncode, output) == (0, "trained\n")
    assert Path("models/a/weights.safetensors").exists()
    first, last = errors.splitlines()
    for line in (first, last):
        assert line.startswith(f"warning: MLflow at {tracking.redact(bad_store)}: ")
    assert first.endswith("the stage goes on, and what could not be sent is kept in .anneal/tracking")
    assert last.endswith("are kept; the next stage sends them, and so does `anneal sync`")
    assert "secret" not in errors


def test_a_fault_of_one_call_leaves_the_others(workspace: Path, capfd: Any) -> None:
    with tracking.stage_run(recipe(), "train", member="a") as run:
        run.artifact("absent.png")
        run.metrics({"train/loss": "many"}, 1)  # type: ignore[dict-item]
        run.metrics({"val/loss": object()}, 1)  # type: ignore[dict-item]
        run.metrics({"train/loss": 0.5}, 2)
    (child,) = children(sqlite(workspace))
    assert child.info.status == "FINISHED" and child.data.metrics == {"train/loss": 0.5}
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 2 and any("absent.png" in line for line in errors)


def test_a_folder_that_dvc_would_refuse_does_not_leave_the_run_running(workspace: Path, capfd: Any) -> None:
    (workspace / ".dvcignore").write_bytes(b"\xff\xfe not text")
    with tracking.stage_run(recipe(), "train", member="a", outs=[Path("data/processed")]) as run:
        run.metrics({"bad name !?": 1.0}, 1)
    (child,) = children(sqlite(workspace))
    assert child.info.status == "FINISHED" and "out.data/processed" not in child.data.tags
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_deleted_experiment_is_said_with_its_remedy(workspace: Path, capfd: Any) -> None:
    store = client(sqlite(workspace))
    store.delete_experiment(store.create_experiment("anneal"))
    with tracking.stage_run(recipe(), "train", member="a"):
        pass
    assert "mlflow experiments restore" in capfd.readouterr().err


def test_params_that_lack_the_section_stop_nothing(workspace: Path, capfd: Any) -> None:
    with tracking.stage_run({"seed": 0}, "train", member="a") as run:
        run.metrics({"train/loss": 1.0})
    assert "KeyError" in capfd.readouterr().err


def test_a_server_that_dies_in_mid_run_stops_nothing(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mlflow_server(f"sqlite:///{tmp_path}/server.db", tmp_path) as (uri, server):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        process = stage("while not Path('go').exists(): time.sleep(0.1)\nfor i in range(9): run.metrics({'x': 1.0}, i)")
        wait_for(lambda: any(run.data.metrics for run in children(uri)))
        end_group(server)
        Path("go").touch()
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (0, "trained\n")
    assert len(errors.splitlines()) == 2
    for line in errors.splitlines():
        assert line.startswith(f"warning: MLflow at {uri}: ") and "kept" in line


# ---- servers, experiments of DVC ------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["sqlite_server", pytest.param("postgresql_server", marks=pytest.mark.long)])
def test_a_server_over_http(workspace: Path, server: str, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = request.getfixturevalue(server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    processes = [stage("run.headline({'test/accuracy': 0.5})\nrun.artifact('data')", name) for name in "abc"]
    for process in processes:
        assert process.communicate() == ("trained\n", "")
    with tracking.stage_run(params.merge(recipe(), {"registry": {"name": None}}), "evaluate") as run:
        run.link("train", "models/a", "a")
    (parent,) = parents(uri)
    assert sorted(run.info.run_name for run in children(uri)) == ["evaluate", "train a", "train b", "train c"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children(uri)} == {parent.info.run_id}
    assert parent.info.status == "FINISHED" and parent.data.metrics == {"test/accuracy": 0.5}
    train = children(uri, "train")[0]
    assert train.data.tags["model.md5"] == tracking.dvc_hash(f"models/{train.data.tags['member']}")
    names = [item.path for item in client(uri).list_artifacts(train.info.run_id, "processed")]
    assert names == ["processed/dataset.json"]
    assert train.inputs.dataset_inputs[0].dataset.digest == "d" * 32
    assert not runs(sqlite(workspace)) and not (workspace / "mlruns").exists()


@pytest.mark.long
def test_experiments_of_dvc_write_to_the_store_of_the_repository(fresh: Path) -> None:
    (fresh / "stage.py").write_text(STAGE.format(body=""))
    (fresh / ".gitignore").write_text("/mlflow.db*\n/mlruns\n/models\n")
    (fresh / "dvc.yaml").write_text(
        f"stages: {{train: {{cmd: {sys.executable} stage.py a, deps: [stage.py, data/processed], "
        "params: [trainer], outs: [models/a]}}\n"
    )
    shutil.rmtree(".dvc")

    def call(*command: str) -> None:
        # The queue's worker is the `dvc` on the path.
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(command, check=True, capture_output=True, cwd=fresh, env=environment, timeout=300)

    dvc = (sys.executable, "-m", "dvc")
    call("git", "init", "-q")
    call(*dvc, "init", "-q")
    call(*dvc, "config", "core.analytics", "false")
    call("git", "add", ".")
    call("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "start")
    call(*dvc, "exp", "run", "-n", "here", "-S", "trainer.epochs=1")
    call(*dvc, "exp", "run", "--temp", "-n", "aside", "-S", "trainer.epochs=2")
    call(*dvc, "exp", "run", "--queue", "-n", "queued", "-S", "trainer.epochs=3")
    call(*dvc, "exp", "run", "--run-all")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    uri = sqlite(fresh)
    assert [run.data.tags["DVC_EXP_NAME"] for run in children(uri)] == ["here", "aside", "queued"]
    assert [run.info.run_name for run in children(uri)] == ["train a · here", "train a · aside", "train a · queued"]
    assert [run.info.run_name.split(" · ")[-1] for run in parents(uri)] == ["here", "aside", "queued"]
    for run in children(uri):
        assert run.data.tags["DVC_EXP_BASELINE_REV"] == head
        assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    lock = YAML(typ="safe").load(fresh / "dvc.lock")["stages"]["train"]
    assert children(uri)[0].data.tags["model.md5"] == lock["outs"][0]["md5"]
    place = client(uri).get_experiment_by_name("anneal").artifact_location
    assert place == (fresh / "mlruns").as_uri()


# ---- the predictor --------------------------------------------------------------------------------------------------


def write_predictor(root: Path) -> list[Path]:
    """Write two untrained members and reports/evaluation/predictor.json; return the files, relative to ``root``."""
    import torch
    from safetensors.torch import save_file

    from anneal.models.build import build_classifier

    architecture = {
        "name": "mlp",
        "arguments": {"hidden": [4]},
        "num_classes": 2,
        "in_channels": 1,
        "height": 8,
        "width": 8,
        "norm": "none",
    }
    normalization = {"kind": "scale", "height": 8, "width": 8, "channels": 1}
    preprocessing = {"size": 8, "fit": "stretch", "interpolation": "area"}
    files = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        classifier = build_classifier(architecture, normalization, None)
        folder = root / "models" / name
        folder.mkdir(parents=True)
        model = {
            "architecture": architecture,
            "normalization": normalization,
            "classes": ["0", "1"],
            "preprocessing": preprocessing,
            "num_parameters": 0,
            "best_epoch": 1,
            "augmentation": [],
        }
        (folder / "model.json").write_text(json.dumps(model))
        save_file({k: v.contiguous() for k, v in classifier.state_dict().items()}, folder / "weights.safetensors")
        files += [Path("models", name, "model.json"), Path("models", name, "weights.safetensors")]
    path = root / "reports" / "evaluation" / "predictor.json"
    path.parent.mkdir(parents=True)
    exported = {"members": ["a", "b"], "combine": "probability_mean", "views": ["identity"], "average": "probability"}
    path.write_text(json.dumps({**exported, "temperature": 1.5}))
    return [path.relative_to(root), *files]


def test_the_predictor_loads_back_from_mlflow_and_gives_the_same_probabilities(workspace: Path, tmp_path: Path) -> None:
    from anneal.serving import load_predictor

    files = write_predictor(workspace)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    expected = load_predictor(workspace).predict(images)
    assert expected.std() > 0.01
    values = params.merge(recipe(), {"registry": {"name": "digits"}})
    uris = []
    for _ in range(2):
        with tracking.stage_run(values, "evaluate") as run:
            uris.append(run.predictor(files, images[:2], {"test/accuracy": 0.5}))
    uri = sqlite(workspace)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    np.save(elsewhere / "images.npy", images)
    code = (
        "import sys, os\n"
        "import numpy as np, mlflow\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model(sys.argv[2])\n"
        "np.save('probabilities.npy', model.predict(np.load('images.npy')))\n"
        "import anneal; print(anneal.__file__)\n"
        "print(model.metadata.signature)\n"
        "try: model.predict(np.zeros((2, 9, 9, 1), np.uint8))\n"
        "except Exception as error: print('refused', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, uri, str(uris[0])], cwd=elsewhere, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(elsewhere / "probabilities.npy"), expected, rtol=0, atol=1e-12)
    where, *signature = done.stdout.splitlines()
    assert not where.startswith(str(ROOT))  # the code that was logged, not this checkout's
    assert "uint8" in "".join(signature) and "refused" in "".join(signature)

    store = client(uri)
    model = store.get_logged_model(str(uris[0]).removeprefix("models:/"))
    assert str(model.status) == "READY"
    (metric,) = model.metrics
    assert (metric.key, metric.value, metric.dataset_digest) == ("test/accuracy", 0.5, "d" * 32)
    folder = Path(model.artifact_location.removeprefix("file://"))
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt"))]
    assert {"weights.safetensors", "model.json", "predictor.json", "serving.py"} <= set(names)
    requirements = (folder / "requirements.txt").read_text()
    assert "torch==2" in requirements and "+cpu" not in requirements and "mlflow==" in requirements
    (version,) = store.search_model_versions("name = 'digits'")  # the second time brought nothing new
    assert version.run_id == children(uri)[0].info.run_id
    (parent,) = parents(uri)
    assert parent.data.tags["predictor.uri"] == uris[1]
    assert {output.model_id for output in parent.outputs.model_outputs} == {
        str(one).removeprefix("models:/") for one in uris
    }


# ---- studies --------------------------------------------------------------------------------------------------------


def log_child(run: tracking.Run, name: str) -> None:
    series = [{"step": step, "values": {"val/loss": 1.0 / step, "lr": 0.1}} for step in range(1, 600)]
    run.child(
        f"point {name}",
        key=f"key {name}",
        params={"seed": 3, "optimizer.SGD.lr": 0.1},
        tags={"point": name},
        series=series,
        began=1_700_000_000_000,
        ended=1_700_000_005_000,
    )


def test_a_study_is_a_run_with_its_runs_below_it(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    uri = sqlite(workspace)

    def broken() -> None:
        with tracking.study_run(recipe(), "lr", key="k") as run:
            log_child(run, "a")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        broken()
    (parent,) = runs(uri, "tags.`study.key` = 'k'")
    assert parent.info.run_name == "study lr"
    assert parent.info.status == "FAILED"
    assert "in the middle" in parent.data.tags["error"]

    with tracking.study_run(recipe(), "lr", key="k") as run:
        log_child(run, "a")
        log_child(run, "b")
        run.metrics({"study/runs": 2.0})
        run.describe("It shows *this*.")
    with tracking.study_run(recipe(), "lr", key="other"):
        pass
    (parent,) = runs(uri, "tags.`study.key` = 'k'")
    assert len(runs(uri, "tags.`study.key` = 'other'")) == 1
    assert parent.info.status == "FINISHED"
    assert parent.data.tags[tracking.NOTE] == "It shows *this*."
    assert "error" not in parent.data.tags
    assert parent.data.metrics == {"study/runs": 2.0}
    assert parent.data.params["optimizer.name"] == "SGD"
    found = runs(uri, f"tags.`{tracking.PARENT}` = '{parent.info.run_id}'")
    assert sorted(run.data.tags["point"] for run in found) == ["a", "b"], "what is there is not logged again"
    for child in found:
        assert child.info.status == "FINISHED"
        assert (child.info.start_time, child.info.end_time) == (1_700_000_000_000, 1_700_000_005_000)
        assert {"stage": "study", "study": "lr"}.items() <= child.data.tags.items()
        assert child.data.params == {"seed": "3", "optimizer.SGD.lr": "0.1"}
        history = client(uri).get_metric_history(child.info.run_id, "val/loss")
        assert [(m.step, m.value) for m in history] == [(step, 1.0 / step) for step in range(1, 600)]
    assert capfd.readouterr().err == ""
    assert not parents(uri), "a study is nobody's recipe"
