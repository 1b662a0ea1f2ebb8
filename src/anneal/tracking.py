"""MLflow: one parent run for a recipe on a data set, one child run a stage execution; and the runs of a study.

A stage talks to MLflow through a process of its own, which `stage_run` starts and feeds one JSON line a call. So
importing mlflow and waiting for a server cost the stage nothing, no fault there can stop it, and when the stage is
killed, even by SIGKILL, that process sees its pipe close and marks the run KILLED.
"""

from __future__ import annotations

import base64
import getpass
import hashlib
import importlib.metadata
import json
import os
import platform
import queue
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from anneal import params
from anneal.params import Strict, UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric
    from mlflow.entities import Run as Record

PATIENCE = 60.0
"""Seconds that the end of a stage waits for MLflow to finish one more call before it gives up."""

PATIENCE_MODEL = 300.0
"""Seconds that a stage waits for the predictor to be logged, all calls before it included."""

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "OMP_NUM_THREADS": "1",
}
"""Defaults of the environment of the tracking process; what the user has set wins."""

REQUIREMENTS = ("torch", "numpy", "safetensors", "pydantic", "ruamel.yaml", "pillow", "opencv-python-headless")
"""Distributions that the logged predictor needs beside mlflow itself."""

MAX_PARAM = 6000
"""Longest value of a param in MLflow, in characters."""

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""Variables in which launchers give a process its place; only the first process tracks."""

PARENT = "mlflow.parentRunId"
NOTE = "mlflow.note.content"

VIEW = "headline"
"""Name of the view of the runs table that a new experiment gets."""

COLUMNS = (
    "metrics.`test/accuracy`",
    "metrics.`val/accuracy`",
    "params.`model.name`",
    "params.`optimizer.name`",
    "params.`schedule.name`",
    "params.`augment.policy`",
    "attributes.`Models`",
)
"""Columns of that view; of itself MLflow's table shows no metric."""


class TrackingConfig(Strict):
    """Section ``tracking``: where runs go; tracked by no stage."""

    uri: Annotated[str, Field(min_length=1)]
    experiment: Annotated[str, Field(min_length=1)]


class RegistryConfig(Strict):
    """Section ``registry``: the registered model's name, or null to register nothing."""

    name: Annotated[str, Field(min_length=1)] | None


# ---- what a stage uses ----------------------------------------------------------------------------------------------


@contextmanager
def stage_run(
    values: Mapping[str, Any],
    stage: str,
    *,
    member: str | None = None,
    data: Path | None = Path("data/processed"),
    outs: Sequence[Path] = (),
    resume: bool = False,
) -> Iterator[Run]:
    """Give the MLflow run of one stage execution, which ends as the block ends: FINISHED, FAILED or KILLED.

    Nothing in it raises: a fault of the tracking is one line on stderr, and the stage goes on untracked. Under several
    processes only the first one of the first node tracks; the others get a run that does nothing.

    Parameters
    ----------
    values
        Whole params, as `params.load` returns them.
    stage, member
        Name of the stage, and of the ensemble member that it trains.
    data
        The processed data set, which with the tracked params names the parent run; None starts the run without a
        parent, until `Run.adopt`.
    outs
        Files and folders that the stage writes; their DVC hashes become tags ``out.<path>``.
    resume
        Continue the last run of this stage and member that did not finish, where there is one.
    """
    run = Run()
    run._open(
        values,
        "start",
        stage=stage,
        member=member,
        data=None if data is None else str(data),
        outs=[Path(out).as_posix() for out in outs],
        resume=resume,
    )
    with _ended(run):
        yield run


@contextmanager
def study_run(values: Mapping[str, Any], study: str, *, key: str) -> Iterator[Run]:
    """Give the MLflow run of a study, which `Run.child` puts its runs below; it ends, and is as safe, as `stage_run`.

    Parameters
    ----------
    values
        Whole params that all runs of the study share but for what each changes.
    study
        Name of the study.
    key
        Fingerprint of all its runs: where there is a run of this key already, that one is continued.
    """
    run = Run()
    run._open(values, "start_study", study=study, key=key)
    with _ended(run):
        yield run


@contextmanager
def _ended(run: Run) -> Iterator[None]:
    """End a run as the block ends: FINISHED, FAILED or KILLED."""
    status, reason = "FAILED", ""
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except SystemExit as error:
        status, reason = ("FAILED", f"exit code {error.code}") if error.code else ("FINISHED", "")
        raise
    except BaseException as error:
        reason = _one_line(error)
        raise
    finally:
        run._close(status, reason)


class Run:
    """One stage execution, or one study, in MLflow; every method returns at once and is safe whatever the state of the store.

    Files that are given to it must stay as they are until the stage ends.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._uri = ""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of this run in one call: name to finite or non-finite number, at ``step`` (0 where None)."""
        self._send("metrics", values=values, step=step or 0, time=_now())

    def headline(self, values: Mapping[str, float]) -> None:
        """Log metrics on the parent run, which make its row in the runs table, and renew its description."""
        self._send("headline", values=values, time=_now())

    def curves(self, values: Mapping[str, Sequence[float]]) -> None:
        """Log curves on the parent run as ``curve/<name>``, a value an epoch (NaN: none), so that recipes overlay in one chart."""
        self._send("curves", values=values, time=_now())

    def tag(self, key: str, value: object) -> None:
        """Set a tag of this run."""
        self._send("tag", key=key, value=str(value))

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Upload a file, or all files of a folder, into the run's artifacts (below ``folder``)."""
        self._send("artifact", path=str(Path(path).absolute()), folder=folder)

    def picture(self, name: str, panels: Sequence[Mapping[str, Any]], title: str = "") -> None:
        """Draw line plots into the artifact ``name`` (a ``.png``), in the tracking process, not in the stage's.

        Each panel is what `anneal.reporting.lines.as_values` gives, or the part of it that differs from the defaults.
        """
        self._send("picture", file=name, panels=list(panels), title=title)

    def data_set(self, path: Path | str) -> None:
        """Record a processed data set as an input of this run and of its parent, with its digest."""
        self._send("data_set", path=str(path))

    def adopt(self, path: Path | str) -> None:
        """Put this run below the parent of its params and the data set at ``path``, which it has now written."""
        self._send("adopt", path=str(path))

    def link(self, stage: str, path: Path | str, member: str | None = None) -> None:
        """Record on the parent which earlier run wrote ``path``, where DVC took that stage from its cache.

        The tag is ``linked.<stage>[.<member>]``, its value the run's id. Nothing is recorded where a run of this
        parent wrote those bytes, or none did that MLflow knows of.
        """
        self._send("link", stage=stage, path=str(path), member=member)

    def predictor(
        self, files: Iterable[Path | str], example: npt.NDArray[np.uint8], metrics: Mapping[str, float] | None = None
    ) -> str | None:
        """Log the final predictor as one MLflow model, and register it where ``registry.name`` says so.

        Parameters
        ----------
        files
            What ``serving.load_predictor`` reads, relative to the repository, which the model's folder mirrors.
        example
            uint8 (N, H, W, C), at least two images.
        metrics
            Its figures, which MLflow ties to the model and to the data set.

        Returns
        -------
        str or None
            The model's URI for ``mlflow.pyfunc.load_model``; None where tracking is off.
        """
        assert example.dtype == np.uint8 and example.ndim == 4 and len(example) >= 2, (example.dtype, example.shape)
        self._send(
            "predictor",
            files=[str(path) for path in files],
            shape=example.shape,
            pixels=base64.b64encode(np.ascontiguousarray(example).tobytes()).decode(),
            values=metrics or {},
            time=_now(),
        )
        answer = self._answer(PATIENCE_MODEL)
        return json.loads(answer) if answer and answer != b"\n" else None

    def describe(self, text: str) -> None:
        """Set the text of this run's page, in Markdown."""
        self.tag(NOTE, text)

    def child(
        self,
        label: str,
        *,
        key: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        series: Sequence[Mapping[str, Any]],
        began: int,
        ended: int,
    ) -> None:
        """Log a run of a study, which has ended, below the study's run; once where the study is continued.

        Parameters
        ----------
        label
            Name of the run.
        key
            Its fingerprint, by which it is known again.
        params, tags
            Of the run.
        series
            Mappings with ``step`` and ``values`` (metrics by name).
        began, ended
            Milliseconds since 1970.
        """
        self._send(
            "child",
            label=label,
            key=key,
            values=params,
            tags=tags,
            series=list(series),
            began=began,
            ended=ended,
        )

    def _open(self, values: Mapping[str, Any], call: str, **arguments: Any) -> None:
        if any(os.environ.get(name, "0") not in ("", "0") for name in RANKS):
            return
        try:
            self._start(values, call, **arguments)
        except (OSError, KeyError, TypeError, ValueError) as error:
            self._fault(error)

    def _start(self, values: Mapping[str, Any], call: str, **arguments: Any) -> None:
        self._uri = tracking_uri(values["tracking"]["uri"])
        source = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from anneal.tracking import _serve; _serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**ENVIRONMENT, **os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # Ctrl-C in the terminal is for the stage, which then says how its run ended
        )
        self._send(
            call,
            params=values,
            uri=self._uri,
            root=str(repository()),
            **arguments,
            script=os.path.relpath(sys.argv[0]),
            pid=os.getpid(),
            time=_now(),
        )

    def _send(self, name: str, **arguments: Any) -> None:
        if self._process is None or self._process.stdin is None:
            return
        try:
            line = json.dumps([name, arguments], default=_plain) + "\n"
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError as error:  # the process is gone
            self._fault(error)
            self._process = None
        except (TypeError, ValueError) as error:
            self._fault(error)

    def _answer(self, patience: float) -> bytes | None:
        """Return the next line that the process writes; None when it is gone, or silent for so many seconds."""
        if self._process is None or self._process.stdout is None:
            return None
        stream = self._process.stdout
        if not select.select([stream], [], [], patience)[0]:
            self._fault(f"no answer in {patience:.0f} s")
            self._process.kill()
            self._process = None
            return None
        return stream.readline() or None

    def _close(self, status: str, reason: str) -> None:
        self._send("finish", status=status, reason=reason, time=_now())
        process, count = self._process, 0
        if process is None or process.stdin is None:
            return
        with suppress(OSError):
            process.stdin.close()
        while self._answer(PATIENCE):
            count += 1
        if self._process is not None and process.wait() and not count:
            self._fault(f"its process ended with exit code {process.returncode}")
        self._process = None

    def _fault(self, reason: BaseException | str) -> None:
        _warn(self._uri, reason, sys.stderr)


# ---- where runs go --------------------------------------------------------------------------------------------------


def repository() -> Path:
    """Return the root of the repository that owns the runs: the real one, in a temporary experiment too."""
    if root := os.environ.get("DVC_ROOT"):  # set by DVC, and names the real one even in .dvc/tmp/exps
        return Path(root).resolve()
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


def tracking_uri(uri: str) -> str:
    """Return the address of the store: MLFLOW_TRACKING_URI or ``uri``, a relative sqlite path made absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or uri
    match = re.fullmatch(r"sqlite:///(?!/)([^?]+)(\?.*)?", uri)
    return f"sqlite:///{repository() / match[1]}{match[2] or ''}" if match else uri


def redact(text: str) -> str:
    """Return ``text`` without the passwords of the URIs in it.

    >>> redact("postgresql://me:secret@host/db")
    'postgresql://me:***@host/db'
    """
    text = re.sub(r"(\w://[^:/@\s]*):[^/\s]*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&](?:password|passwd|pwd|token|secret)=)[^&\s]*", r"\1***", text)


def ui_command(uri: str, port: int = 5000) -> tuple[list[str], dict[str, str]]:
    """Return the command that shows the runs at ``http://127.0.0.1:<port>``, and the variables that it needs.

    Raises
    ------
    UserError
        The runs are on a server, which has its own page.
    """
    uri = tracking_uri(uri)
    if uri.startswith(("http://", "https://")):
        raise UserError(f"tracking.uri: the runs are on a server, open {redact(uri)}")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
    # The store goes by the environment, since a command line with a password in it is everybody's to read.
    return command, {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": _artifact_root(repository()),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        **{key: ENVIRONMENT[key] for key in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "GIT_PYTHON_REFRESH")},
    }


def ui_page(uri: str, experiment: str, address: str = "http://127.0.0.1:5000") -> str:
    """Return the address of the experiment's runs table with the headline columns, on the server at ``address``.

    Without it MLflow's page opens on prompts and traces. Takes seconds: it asks the store.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow

    try:
        found = mlflow.MlflowClient(tracking_uri(uri)).get_experiment_by_name(experiment)
    except Exception:  # no store yet, or none that answers: the server will say so
        found = None
    if found is None:
        return address
    view = f"&viewStateShareKey={VIEW}" if f"mlflow.sharedViewState.{VIEW}" in found.tags else ""
    return f"{address}/#/experiments/{found.experiment_id}/runs?workflowType=machine_learning{view}"


# ---- names and hashes -----------------------------------------------------------------------------------------------


def fingerprint(values: Mapping[str, Any], digest: str) -> str:
    """Return 32 hexadecimal digits over the tracked sections of params and the digest of the processed data."""
    tracked = {key: value for key, value in values.items() if key not in params.UNTRACKED}
    text = json.dumps([tracked, digest], sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def flat_params(values: Mapping[str, Any]) -> dict[str, str]:
    """Return tracked params as MLflow takes them: dotted keys, values as JSON, long ones cut and ended by their hash.

    >>> flat_params({"a": {"b": [1, "x"]}, "tracking": {"uri": "u"}})
    {'a.b': '[1, "x"]'}
    """
    tracked = {key: value for key, value in values.items() if key not in params.UNTRACKED}
    flat = {}
    for key, value in params.flatten(tracked).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)
        if len(text) > MAX_PARAM:
            text = f"{text[: MAX_PARAM - 50]}... md5 {hashlib.md5(text.encode()).hexdigest()}"
        flat[key[:250]] = text
    return flat


def dvc_hash(path: Path | str, root: Path | str = ".") -> str | None:
    """Return the md5 that dvc.lock gives a file or a folder (``.dir``), None where there is nothing at ``path``.

    Parameters
    ----------
    path
        File or folder.
    root
        Root of the DVC repository: its .dvcignore says which files of a folder do not count.
    """
    from dvc.fs import localfs
    from dvc.ignore import DvcIgnoreFilter

    path, root = Path(path).absolute(), Path(root).absolute()
    if path.is_file():
        return _md5(path)
    if not path.is_dir():
        return None
    entries = []
    for folder, _, names in DvcIgnoreFilter(localfs, str(root)).walk(localfs, str(path)):
        for name in names:
            file = Path(folder) / name
            entries.append({"md5": _md5(file), "relpath": file.relative_to(path).as_posix()})
    entries.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _recipe_name(values: Mapping[str, Any]) -> str:
    """Return ``digits resnet SGD cosine``."""
    words = [_data_name(values), *(_at(values, section, "name") for section in ("model", "optimizer", "schedule"))]
    return " ".join(str(word) for word in words if word is not None)


def _data_name(values: Mapping[str, Any]) -> str:
    return Path(str(_at(values, "data", "path") or "data")).name.split(".")[0] or "data"


def _description(values: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """Return the parent run's text in Markdown: its headline, then the recipe in words."""
    optimizer, schedule = _at(values, "optimizer", "name"), _at(values, "schedule", "name")
    policy = _at(values, "augment", "policy")
    members = _at(values, "ensemble", "members") or {}
    rows = {
        "data": f"{_at(values, 'data', 'path')}, {_at(values, 'preprocess', 'size')} px, "
        f"{_at(values, 'preprocess', 'normalize')}",
        "augmentation": policy if isinstance(policy, str) else f"{len(policy or [])} transforms",
        "model": _at(values, "model", "name"),
        "optimizer": f"{optimizer}, learning rate {_at(values, 'optimizer', str(optimizer), 'lr')}, {schedule} schedule",
        "training": f"{_at(values, 'trainer', 'epochs')} epochs, batch {_at(values, 'batch', 'size')}",
        "ensemble": f"{', '.join(members)} ({_at(values, 'ensemble', 'combine')})",
    }
    lines = ["| figure | value |", "|---|---|", *(f"| {key} | {metrics[key]:.4f} |" for key in sorted(metrics)), ""]
    return "\n".join([*(lines if metrics else []), "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _at(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _tag_name(*parts: str | None) -> str:
    return re.sub(r"[^\w\-./ ]", "_", ".".join(part for part in parts if part))[:250]


def _plain(value: Any) -> Any:
    """Turn what JSON does not know into what it does: numpy numbers, paths."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"{type(value).__name__} is neither a number nor text")


def _now() -> int:
    return time.time_ns() // 1_000_000


def _one_line(error: BaseException | str) -> str:
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return redact(" ".join(text.split()))[:300]


def _warn(uri: str, reason: BaseException | str, file: Any) -> None:
    line = (
        f"warning: MLflow at {redact(uri) or 'an unknown address'}: {_one_line(reason)}; the stage goes on without it"
    )
    with suppress(OSError, ValueError):
        print(line, file=file, flush=True)


def _artifact_root(root: Path) -> str:
    return (root / "mlruns").as_uri()


# ---- the process that talks to MLflow -------------------------------------------------------------------------------


def _serve() -> None:
    """Carry out the calls that come in on stdin, one JSON line each, until a ``finish`` or the end of the pipe."""
    errors, answers = open(os.dup(2), "w"), open(os.dup(1), "wb", buffering=0)  # noqa: SIM115
    if not os.environ.get("MLFLOW_LOGGING_LEVEL"):  # mlflow, alembic and git print much that nobody asked for
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    calls: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
    ending = threading.Event()

    def read() -> None:  # in a thread, so that the stage never waits for room in the pipe
        for line in sys.stdin.buffer:
            name, arguments = json.loads(line)
            if name == "finish":
                ending.set()
            calls.put((name, arguments))
        if not ending.is_set():  # the stage died without a word
            calls.put(("finish", {"status": "KILLED", "reason": "", "time": _now()}))

    threading.Thread(target=read, daemon=True).start()
    session = _Session(calls, errors)
    name = ""
    while name != "finish":
        name, arguments = calls.get()
        answer = session.call(name, arguments)
        if name == "predictor" or ending.is_set():  # the stage is waiting, for this answer or for a sign of life
            with suppress(OSError):
                answers.write((json.dumps(answer) if answer else "").encode() + b"\n")
    errors.flush()
    os._exit(0)  # mlflow's threads have nothing left to do, and some take a second to find out


class _Session:
    """One stage execution, or one study, seen from the process that talks to MLflow."""

    def __init__(self, calls: queue.SimpleQueue[tuple[str, dict[str, Any]]], errors: Any) -> None:
        self.calls = calls
        self.errors = errors
        self.uri = ""
        self.run_id = ""
        self.parent_id: str | None = None
        self.broken = False
        self.warned = False
        self.monitor: Any = None
        self.inputs: dict[str, DatasetInput] = {}
        self.waiting: list[Metric] = []
        self.logged: set[str] = set()

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Carry out one call; a fault is said once, and ends the tracking where the store is out of reach."""
        if self.waiting and name != "metrics":
            self.guarded(self.flush)
        if self.broken and name != "finish":
            return None
        return self.guarded(getattr(self, name), **arguments)

    def guarded(self, function: Callable[..., Any], **arguments: Any) -> Any:
        try:
            return function(**arguments)
        except Exception as error:  # whatever it is, it must not reach the stage
            if not self.warned:
                _warn(self.uri, error, self.errors)
            self.warned = True
            self.broken = self.broken or not self.reachable()
            return None

    def reachable(self) -> bool:
        try:
            return bool(self.run_id and self.client.get_run(self.run_id))
        except Exception:
            return False

    def start(
        self,
        params: dict[str, Any],
        uri: str,
        root: str,
        stage: str,
        member: str | None,
        data: str | None,
        outs: list[str],
        resume: bool,
        script: str,
        pid: int,
        time: int,
    ) -> None:
        self.stage, self.member, self.outs = stage, member, outs
        self.connect(params, uri, root, script, pid, time)
        earlier: list[Record] = []
        if data is not None and (Path(data) / "dataset.json").is_file():
            self.info = json.loads((Path(data) / "dataset.json").read_text(encoding="utf-8"))
            with self.lock():
                self.parent_id = self.find_parent()
            earlier = self.siblings()
        unfinished = [run for run in earlier if run.info.status != "FINISHED"]
        if resume and unfinished:
            self.run_id = unfinished[-1].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
            self.client.set_tag(self.run_id, "process", self.process)
        else:
            self.run_id = self.create_child(attempt=len(earlier) + 1)
        if self.parent_id:
            self.client.update_run(self.parent_id, status="RUNNING")
            self.data_set(str(data))
        self.start_monitor()

    def start_study(
        self, params: dict[str, Any], uri: str, root: str, study: str, key: str, script: str, pid: int, time: int
    ) -> None:
        self.stage, self.member, self.outs = "study", None, []
        self.connect(params, uri, root, script, pid, time)
        self.tags |= {"stage": "study", "study": study}
        earlier = self.search(f"tags.`study.key` = '{key}'")
        if earlier:
            self.run_id = earlier[-1].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
            self.client.set_tag(self.run_id, "process", self.process)
            if "error" in earlier[-1].data.tags:
                self.client.delete_tag(self.run_id, "error")
            self.logged = {
                run.data.tags.get("run.key", "") for run in self.search(f"tags.`{PARENT}` = '{self.run_id}'")
            }
            return
        tags = {**self.tags, "study.key": key, "process": self.process}
        self.run_id = self.client.create_run(self.experiment_id, time, tags, f"study {study}").info.run_id
        self.log_params(self.run_id, flat_params(params))

    def connect(self, params: dict[str, Any], uri: str, root: str, script: str, pid: int, time: int) -> None:
        self.uri, self.root, self.params = uri, Path(root), params
        self.began, self.process = time, _process_name(pid)
        import mlflow

        mlflow.set_tracking_uri(uri)
        with self.lock():
            self.open_database()
            self.client: MlflowClient = mlflow.MlflowClient()
            self.experiment_id = self.find_experiment(params["tracking"]["experiment"])
        self.tags = {**_git_tags(), **_dvc_tags(), "mlflow.user": _user(), "mlflow.source.name": script}
        self.tags["mlflow.source.type"] = "LOCAL"

    def lock(self) -> Any:
        """Return a file lock that all processes of this machine share which use the same store."""
        from filelock import FileLock

        if match := re.match(r"sqlite:///([^?]+)", self.uri):
            path = Path(f"{match[1]}.lock")
        elif (self.root / ".dvc").is_dir():
            path = self.root / ".dvc" / "tmp" / "mlflow.lock"
        else:
            path = Path(tempfile.gettempdir()) / f"mlflow-{hashlib.md5(self.uri.encode()).hexdigest()}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # says at once what the lock would find out at its timeout
            pass
        return FileLock(path, timeout=PATIENCE * 0.8)

    def open_database(self) -> None:
        """Reach the database once, since mlflow would try for a minute, and make a missing sqlite one.

        It is made beside its place, then renamed, so that nobody ever opens half of one.
        """
        import mlflow
        import sqlalchemy

        if not re.match(r"sqlite|postgresql|mysql|mssql", self.uri):
            return
        match = re.match(r"sqlite:///([^?]+)", self.uri)
        missing = match[1] if match and not Path(match[1]).exists() else None
        if missing:
            Path(f"{missing}.new").unlink(missing_ok=True)
        uri = f"sqlite:///{missing}.new" if missing else self.uri
        limit = {"connect_timeout": 10} if re.match(r"postgresql|mysql", uri) else {}
        with sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, connect_args=limit).connect() as connection:
            connection.execute(sqlalchemy.text("BEGIN IMMEDIATE" if uri.startswith("sqlite") else "SELECT 1"))
        if missing:
            mlflow.MlflowClient(uri).search_experiments(max_results=1)
            os.replace(f"{missing}.new", missing)

    def find_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            # A store without a server keeps artifacts where its first user stood, unless told.
            place = None if self.uri.startswith("http") else _artifact_root(self.root)
            try:
                view = {f"mlflow.sharedViewState.{VIEW}": json.dumps({"selectedColumns": COLUMNS})}
                return self.client.create_experiment(name, place, view)
            except MlflowException:  # another machine was first
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise RuntimeError(
                f"experiment {name!r} is deleted; `mlflow experiments restore -x {experiment.experiment_id}` restores it"
            )
        return experiment.experiment_id

    def find_parent(self) -> str:
        """Return the parent run of these params on this data set, made where there is none; call under the lock."""
        print_ = fingerprint(self.params, self.info["digest"])
        if found := self.search(f"tags.fingerprint = '{print_}'"):
            return found[0].info.run_id
        name = f"{_recipe_name(self.params)} · {print_[:4]}"
        parent = self.client.create_run(
            self.experiment_id,
            start_time=self.began,
            run_name=" · ".join(filter(None, [name, self.tags.get("DVC_EXP_NAME")])),
            tags={
                **self.tags,
                "fingerprint": print_,
                "data.digest": self.info["digest"],
                NOTE: _description(self.params, {}),
            },
        )
        first = self.search(f"tags.fingerprint = '{print_}'")[0].info.run_id
        if first != parent.info.run_id:  # the lock does not reach other machines
            self.client.delete_run(parent.info.run_id)
            return first
        self.log_params(first, flat_params(self.params))
        return first

    def search(self, text: str) -> list[Record]:
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        return list(self.client.search_runs([self.experiment_id], text, order_by=order))

    def children(self) -> list[Record]:
        return self.search(f"tags.`{PARENT}` = '{self.parent_id}'")

    def siblings(self) -> list[Record]:
        """Return earlier runs of this stage and member below the parent; runs whose process is gone end as KILLED."""
        runs = [run for run in self.children() if run.info.run_id != self.run_id]
        for run in runs:
            if run.info.status == "RUNNING" and not _alive(run.data.tags.get("process", "")):
                self.client.set_terminated(run.info.run_id, "KILLED")
        mine = {"stage": self.stage, **({"member": self.member} if self.member else {})}
        return [run for run in runs if mine.items() <= run.data.tags.items()]

    def create_child(self, attempt: int) -> str:
        tags = {**self.tags, "stage": self.stage, "attempt": str(attempt), "process": self.process}
        if self.member:
            tags["member"] = self.member
        if self.parent_id:
            tags[PARENT] = self.parent_id
        run = self.client.create_run(self.experiment_id, self.began, tags, self.child_name(attempt))
        if self.member:
            mine = params.member(self.params, self.member)
            self.log_params(
                run.info.run_id, flat_params({key: mine[key] for key in params.MEMBER_SECTIONS if key in mine})
            )
        return run.info.run_id

    def child_name(self, attempt: int) -> str:
        name = " ".join(filter(None, [self.stage, self.member, f"#{attempt}" if attempt > 1 else None]))
        return " · ".join(filter(None, [name, self.tags.get("DVC_EXP_NAME")]))

    def start_monitor(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.monitor = SystemMetricsMonitor(self.run_id, tracking_uri=self.uri, resume_logging=True)
        self.monitor.start()

    def log_params(self, run_id: str, values: dict[str, str]) -> None:
        from mlflow.entities import Param

        items = [Param(key, value) for key, value in values.items()]
        for start in range(0, len(items), 100):  # MLflow's limit a call
            self.client.log_batch(run_id, params=items[start : start + 100])

    def log_metrics(self, run_id: str, values: dict[str, float], step: int, time: int, **ties: Any) -> None:
        from mlflow.entities import Metric

        self.log_points(run_id, [Metric(key, float(value), time, step, **ties) for key, value in values.items()])

    def log_points(self, run_id: str, points: list[Metric]) -> None:
        for start in range(0, len(points), 1000):  # MLflow's limit a call
            self.client.log_batch(run_id, metrics=points[start : start + 1000])

    def metrics(self, values: dict[str, float], step: int, time: int) -> None:
        from mlflow.entities import Metric

        self.waiting += [Metric(key, float(value), time, step) for key, value in values.items()]
        if self.calls.empty() or len(self.waiting) >= 1000:
            self.flush()

    def flush(self) -> None:
        """Log the metrics that came in while the store was slow, in as few calls as MLflow's limit allows."""
        waiting, self.waiting = self.waiting, []
        self.log_points(self.run_id, waiting)

    def headline(self, values: dict[str, float], time: int) -> None:
        if self.parent_id:
            self.log_metrics(self.parent_id, values, 0, time)
            metrics = self.client.get_run(self.parent_id).data.metrics
            known = {key: value for key, value in metrics.items() if not key.startswith("curve/")}
            self.client.set_tag(self.parent_id, NOTE, _description(self.params, known))

    def curves(self, values: dict[str, list[float]], time: int) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(f"curve/{key}", float(value), time, step)
            for key, curve in values.items()
            for step, value in enumerate(curve, 1)
            if not np.isnan(value)
        ]
        if self.parent_id:
            self.log_points(self.parent_id, points)

    def child(
        self,
        label: str,
        key: str,
        values: dict[str, Any],
        tags: dict[str, str],
        series: list[dict[str, Any]],
        began: int,
        ended: int,
    ) -> None:
        from mlflow.entities import Metric

        if key in self.logged:
            return
        run = self.client.create_run(self.experiment_id, began, {**self.tags, **tags, PARENT: self.run_id}, label)
        run_id = run.info.run_id
        self.log_params(run_id, flat_params(values))
        metrics = [Metric(k, float(v), ended, row["step"]) for row in series for k, v in row["values"].items()]
        self.log_points(run_id, metrics)
        self.client.set_terminated(run_id, "FINISHED", ended)
        self.client.set_tag(run_id, "run.key", key)  # last, so that only a whole run counts as logged

    def tag(self, key: str, value: str) -> None:
        self.client.set_tag(self.run_id, key, value)

    def artifact(self, path: str, folder: str | None) -> None:
        if Path(path).is_dir():
            self.client.log_artifacts(self.run_id, path, folder)
        else:
            self.client.log_artifact(self.run_id, path, folder)

    def picture(self, file: str, panels: list[dict[str, Any]], title: str) -> None:
        from anneal.reporting.lines import draw_panels, from_values

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file
            draw_panels(from_values(panels), path, title)
            self.client.log_artifact(self.run_id, str(path))

    def data_set(self, path: str) -> None:
        from mlflow.data.dataset_source_registry import resolve_dataset_source
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        info = json.loads((Path(path) / "dataset.json").read_text(encoding="utf-8"))
        source = resolve_dataset_source(str(Path(path).absolute()))
        described = MetaDataset(  # type: ignore[abstract]
            source, name=_data_name(self.params), digest=info["digest"]
        ).to_dict()
        profile = {key: info[key] for key in ("counts", "classes", "height", "width", "channels") if key in info}
        data = Dataset(**{**described, "profile": json.dumps(profile)})
        entry = DatasetInput(
            data, [InputTag("mlflow.data.context", "evaluation" if self.stage == "evaluate" else "training")]
        )
        with self.lock():  # two first uses of a data set at once: the server's answer to the second is a fault
            for run_id in filter(None, [self.run_id, self.parent_id]):
                try:
                    self.client.log_inputs(run_id, [entry])
                except MlflowException:  # the first was on another machine
                    self.client.log_inputs(run_id, [entry])
        self.inputs[path] = entry
        self.info = info

    def adopt(self, path: str) -> None:
        self.info = json.loads((Path(path) / "dataset.json").read_text(encoding="utf-8"))
        with self.lock():
            self.parent_id = self.find_parent()
        attempt = len(self.siblings()) + 1
        self.client.update_run(self.parent_id, status="RUNNING")
        self.client.set_tag(self.run_id, PARENT, self.parent_id)
        self.client.set_tag(self.run_id, "attempt", str(attempt))
        self.client.update_run(self.run_id, name=self.child_name(attempt))
        self.data_set(path)

    def link(self, stage: str, path: str, member: str | None) -> None:
        md5 = dvc_hash(path)
        if md5 is None or self.parent_id is None:
            return
        wrote = f"tags.`{_tag_name('out', Path(path).as_posix())}` = '{md5}' and tags.stage = '{stage}'"
        found = self.search(f"{wrote} and attributes.status = 'FINISHED'")
        if found and all(run.data.tags.get(PARENT) != self.parent_id for run in found):
            self.client.set_tag(self.parent_id, _tag_name("linked", stage, member), found[0].info.run_id)

    def predictor(self, files: list[str], shape: list[int], pixels: str, values: dict[str, float], time: int) -> str:
        from mlflow.entities import LoggedModelOutput

        example = np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(shape)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "predictor"
            for name in files:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(name, root / name)
            md5 = str(dvc_hash(root, folder))
            tags = {"predictor.md5": md5}
            model = self.client.create_logged_model(self.experiment_id, "predictor", self.run_id, tags)
            try:
                self.save_model(Path(folder), root, example, model.model_id)
                self.client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
            except BaseException:
                self.client.finalize_logged_model(model.model_id, "FAILED")
                raise
        self.client.finalize_logged_model(model.model_id, "READY")
        ties: dict[str, Any] = {"model_id": model.model_id}
        if self.inputs:
            data = next(iter(self.inputs.values())).dataset
            ties |= {"dataset_name": data.name, "dataset_digest": data.digest}
        self.log_metrics(self.run_id, values, 0, time, **ties)
        uri = f"models:/{model.model_id}"
        for run_id in filter(None, [self.run_id, self.parent_id]):
            self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
            self.client.set_tag(run_id, "predictor.uri", uri)
        if name := _at(self.params, "registry", "name"):
            self.register(name, uri, model.model_id, md5)
        return uri

    def save_model(self, folder: Path, root: Path, example: npt.NDArray[np.uint8], model_id: str) -> None:
        """Write MLflow's form of the predictor to ``folder / "model"``, with a copy of this package as its code."""
        import mlflow.pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema, TensorSpec

        classes = self.info["classes"]
        shutil.copytree(Path(__file__).parent, folder / "anneal", ignore=shutil.ignore_patterns("__pycache__"))
        mlflow.pyfunc.save_model(
            folder / "model",
            mlflow_model=Model(run_id=self.run_id, model_uuid=model_id, model_id=model_id),
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"root": str(root)},
            code_paths=[str(folder / "anneal")],
            pip_requirements=_requirements(),
            input_example=example,
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *example.shape[1:]))]),
                outputs=Schema([TensorSpec(np.dtype(np.float64), (-1, len(classes)))]),
            ),
            metadata={"classes": classes},
        )

    def register(self, name: str, uri: str, model_id: str, md5: str) -> None:
        """Register the model as a new version, unless a version with the same bytes is there."""
        from mlflow.exceptions import MlflowException

        with self.lock():
            with suppress(MlflowException):  # it exists
                self.client.create_registered_model(name)
            versions = self.client.search_model_versions(f"name = '{name}'")
            if all(version.tags.get("predictor.md5") != md5 for version in versions):
                self.client.create_model_version(
                    name, uri, self.run_id, tags={"predictor.md5": md5}, await_creation_for=0, model_id=model_id
                )

    def finish(self, status: str, reason: str, time: int) -> None:
        if not self.run_id:
            return
        if self.broken:  # the store may be back by now: one attempt, and no second word
            self.client.set_tag(self.run_id, "tracking", "incomplete")
        if self.monitor is not None:
            self.monitor.finish()
        if reason:
            self.client.set_tag(self.run_id, "error", reason)
        if status == "FINISHED":
            self.guarded(self.tag_outs)
        with self.lock():
            self.client.set_terminated(self.run_id, status, time)
            if self.parent_id and not any(_alive(run.data.tags.get("process", "")) for run in self.running()):
                self.client.set_terminated(self.parent_id, status, time)

    def tag_outs(self) -> None:
        for out in self.outs:
            if md5 := dvc_hash(out):
                self.tag(_tag_name("out", out), md5)
                if out.startswith("models/"):
                    self.tag("model.md5", md5)

    def running(self) -> list[Record]:
        return [run for run in self.children() if run.info.status == "RUNNING" and run.info.run_id != self.run_id]


def _git_tags() -> dict[str, str]:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {
        **({"mlflow.source.git.commit": commit} if commit else {}),
        **({"git.dirty": str(bool(changes)).lower()} if changes is not None else {}),
    }


def _dvc_tags() -> dict[str, str]:
    return {key: os.environ[key] for key in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV") if os.environ.get(key)}


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _requirements() -> list[str]:
    """Return pins of what the predictor needs, without the local part of a version that no index has (``+cpu``)."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


def _process_name(pid: int) -> str:
    import psutil

    with suppress(psutil.Error):
        return f"{platform.node()} {pid} {psutil.Process(pid).create_time():.2f}"
    return f"{platform.node()} {pid} gone"


def _alive(name: str) -> bool:
    """Say whether a process named by `_process_name` may still run; one of another machine may."""
    host, pid, _ = [*name.split(), "", "", ""][:3]
    return host != platform.node() or (pid.isdigit() and _process_name(int(pid)) == name)
