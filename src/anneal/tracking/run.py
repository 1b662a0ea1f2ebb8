"""What a stage uses: a run whose calls go into a journal at once, and from there to MLflow by a process of its own.

So importing mlflow and waiting for a server cost the stage nothing, no fault there can stop it, and what could not be
sent is kept. When the stage is killed, even by SIGKILL, that process sees its pipe close and marks the run KILLED.
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anneal import environment
from anneal.tracking.address import one_line, redact, repository, say, tracking_uri
from anneal.tracking.journal import Journal, Writer, create
from anneal.tracking.names import NOTE, plain
from anneal.tracking.split_uses import TAG, split_digest

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""Variables in which launchers give a process its place; only the first process tracks."""

PATIENCE_MODEL = 300.0
"""Seconds that a stage waits for the predictor to be logged, all calls before it included."""

PATIENCE_USES = 10.0
"""Seconds that a stage waits for the number of recipes that have used a test split."""

PATIENCE_EXECUTION = 60.0
"""Seconds that a stage waits for the times of the others: longer, since it asks at once, while mlflow is being imported."""

PATIENCE_END = 300.0
"""Seconds that the end of a stage waits for MLflow to take all that is left."""

PATIENCE_KILLED = 3.0
"""The same where a signal ends the stage: whoever sent it waits ten seconds in all."""

MARGIN = 15.0
"""Seconds that the stage waits for the sender longer than that should take, before it gives it up."""

PROFILE = ("counts", "classes", "height", "width", "channels")
"""What of a data set's description MLflow is told."""

_OPEN: weakref.WeakSet[Run] = weakref.WeakSet()


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

    Nothing in it raises: a fault of the tracking is one line on stderr, and what cannot be sent now is sent by a later
    stage or by ``anneal sync``. Under several processes only the first one of the first node tracks; the others get a
    run that does nothing.

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
        Continue the last run of this stage and member, one that did not finish where there is one; points that it has
        already are not logged twice.
    """
    run = Run()
    run._open(
        values,
        "start",
        stage,
        member,
        data=None if data is None else str(data),
        info=None if data is None else _info(data),
        outs=[Path(out).as_posix() for out in outs],
        resume=resume,
    )
    with _ended(run):
        yield run


@contextmanager
def study_run(values: Mapping[str, Any], study: str, *, key: str, kind: str = "study") -> Iterator[Run]:
    """Give the MLflow run of a study, which `Run.child` puts its runs below; it ends, and is as safe, as `stage_run`.

    Parameters
    ----------
    values
        Whole params that all runs of the study share but for what each changes.
    study
        Name of the study.
    key
        Fingerprint of all its runs: where there is a run of this key already, that one is continued.
    kind
        What it is, in the run's name: ``study lr``, ``search default``.
    """
    run = Run()
    run._open(values, "start_study", "study", None, study=study, key=key, kind=kind)
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
        if isinstance(error.code, int) and error.code > 128:  # by a signal
            status = "KILLED"
        else:
            status, reason = ("FAILED", f"exit code {error.code}") if error.code else ("FINISHED", "")
        raise
    except BaseException as error:
        reason = one_line(error)
        raise
    finally:
        run._close(status, reason)


class Run:
    """One stage execution, or one study, in MLflow; every method returns at once and is safe whatever the state of the store.

    Files that are given to it must stay as they are until the stage ends.
    """

    def __init__(self) -> None:
        self._uri = ""
        self._journal: Journal | None = None
        self._writer: Writer | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._full = False
        self._questions = 0

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of this run in one call: name to finite or non-finite number, at ``step`` (0 where None)."""
        self._send("metrics", values=values, step=step or 0)

    def series(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Log metrics of this run at several steps in one call: pairs of a step and the metrics at it."""
        self._send("series", rows=[[step, values] for step, values in rows])

    def headline(self, values: Mapping[str, float]) -> None:
        """Log metrics on the parent run, which make its row in the runs table, and renew its description."""
        self._send("headline", values=values)

    def curves(self, values: Mapping[str, Sequence[float]]) -> None:
        """Log curves on the parent run as ``curve/<name>``, a value an epoch (NaN: none), so that recipes overlay in one chart."""
        self._send("curves", values=values)

    def tag(self, key: str, value: object) -> None:
        """Set a tag of this run."""
        self._send("tag", key=key, value=str(value))

    def text(self, name: str, content: str) -> None:
        """Write a text into the artifact ``name``, which may stand in folders."""
        self._send("text", file=name, content=content)

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
        self._send("data_set", path=str(path), info=_info(path))

    def adopt(self, path: Path | str) -> None:
        """Put this run below the parent of its params and the data set at ``path``, which it has now written."""
        self._send("adopt", path=str(path), info=_info(path))

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
            The model's URI for ``mlflow.pyfunc.load_model``; None where tracking is off, and where the store is out of
            reach: the model is then logged once it is back.
        """
        assert example.dtype == np.uint8 and example.ndim == 4 and len(example) >= 2, (example.dtype, example.shape)
        self._questions += 1
        self._send(
            "predictor",
            files=[str(path) for path in files],
            base=os.getcwd(),
            shape=example.shape,
            pixels=base64.b64encode(np.ascontiguousarray(example).tobytes()).decode(),
            values=metrics or {},
            id=self._questions,
        )
        uri: str | None = self._ask(PATIENCE_MODEL)
        return uri

    def test_uses(self, digest: str | None = None) -> int | None:
        """Return how many recipes have figures of a data set's test split, this one with them, once its own are logged.

        It waits for the calls before it, a few seconds at most.

        Parameters
        ----------
        digest
            Of the processed data; None for that of this run.

        Returns
        -------
        int or None
            None where tracking is off or the store does not answer in time, and where nobody knows the data.
        """
        self._questions += 1
        self._send("test_uses", digest=digest, id=self._questions)
        uses: int | None = self._ask(PATIENCE_USES)
        return uses

    def execution(self) -> dict[str, Any] | None:
        """Return when and where the stages of this recipe ran, as far as MLflow knows.

        It waits for the calls before it, a minute at most; where the store is out of reach, some seconds.

        Returns
        -------
        dict or None
            ``stages``: the newest finished run of each, a dict of ``stage``, ``member``, ``seconds``, ``attempt`` and
            ``earlier`` (DVC took its outs from the cache; the run is that of another recipe); ``environment``: the machine
            of a member's training, name to text; ``commit``; ``test_uses``: as `test_uses`. None where tracking is off or
            the store does not answer in time.
        """
        self._questions += 1
        self._send("execution", id=self._questions)
        found: dict[str, Any] | None = self._ask(PATIENCE_EXECUTION)
        return found

    def _ask(self, patience: float) -> Any:
        """Return the answer to the call that was just written, None where none comes in so many seconds."""
        self._wake(f"?{self._questions} {patience}\n".encode())
        end = time.monotonic() + patience + MARGIN
        while answer := self._answer(end):
            if answer["id"] == self._questions:
                return answer["answer"]
        return None

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
        status: str = "FINISHED",
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
        status
            How it ended: ``FINISHED`` or ``FAILED``.
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
            status=status,
        )

    # ---- the journal and the process that sends it ------------------------------------------------------------------

    def _open(self, values: Mapping[str, Any], call: str, stage: str, member: str | None, **arguments: Any) -> None:
        if any(os.environ.get(name, "0") not in ("", "0") for name in RANKS):
            return
        try:
            self._uri = tracking_uri(values["tracking"]["uri"])
            # Passwords of stores stay out of the journal; who sends it has the address from where the stage has it.
            where = {**values["tracking"], "uri": redact(self._uri)}
            kept = {name: section for name, section in values.items() if name != "search"}  # whose storage may have one
            root = repository()
            try:
                self._journal = create(root, stage, member)
            except OSError as error:
                self._journal = create(Path(tempfile.mkdtemp(prefix="anneal-")), stage, member)
                say(self._uri, f"{one_line(error)}; its journal is in {self._journal.folder}", sys.stderr, warning=True)
            self._writer = Writer(self._journal.path, own=True)
            _OPEN.add(self)
            common = {"stage": stage, "member": member} if call == "start" else {}
            self._send(
                call,
                **common,
                **arguments,
                params={**kept, "tracking": where},
                root=str(root),
                cwd=os.getcwd(),
                script=os.path.relpath(sys.argv[0]),
                variables=environment.relevant(os.environ),
            )
            self._launch()
        except (OSError, KeyError, TypeError, ValueError) as error:
            say(self._uri, f"{one_line(error)}; the stage goes on without it", sys.stderr, warning=True)

    def _launch(self) -> None:
        """Start the process that sends the journal."""
        assert self._journal is not None
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._starts += 1
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "anneal.tracking.sender", str(self._journal.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={
                "OMP_NUM_THREADS": "1",
                **os.environ,
                "MLFLOW_TRACKING_URI": self._uri,
                "PYTHONPATH": path,
                "CUDA_VISIBLE_DEVICES": "",
            },
            start_new_session=True,  # Ctrl-C in the terminal is for the stage, which then says how its run ended
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def _send(self, name: str, **arguments: Any) -> None:
        """Write a call into the journal, and wake who sends it."""
        if self._writer is None:
            return
        try:
            self._writer.append(name, {**arguments, "time": time.time_ns() // 1_000_000}, plain)
        except OSError as error:
            if not self._full:
                text = f"{one_line(error)}; what cannot be written into its journal waits in memory"
                say(self._uri, text, sys.stderr, warning=True)
            self._full = True
            return
        except (TypeError, ValueError) as error:
            say(self._uri, f"{name}: {one_line(error)}; the stage goes on without it", sys.stderr, warning=True)
            return
        self._wake(b"\n")

    def _wake(self, message: bytes) -> None:
        if self._process is None or self._process.stdin is None:
            return
        try:
            os.write(self._process.stdin.fileno(), message)
        except BlockingIOError:  # it has not read a thousand earlier ones
            pass
        except OSError:  # it is gone; one more may have better luck
            self._process.stdin.close()
            self._process.wait()
            self._process = None
            if self._starts < 2:
                with suppress(OSError):
                    self._launch()

    def _answer(self, end: float) -> dict[str, Any] | None:
        """Return the next line that the process writes; None when it is gone, or silent to the end."""
        if self._process is None or self._process.stdout is None:
            return None
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                say(self._uri, "no answer from the tracking process, which is ended", sys.stderr, warning=True)
                self._process.kill()
                self._starts = 2  # another one would fare no better
                return None
            byte = self._process.stdout.read(1)
            if not byte:
                return None
            line += byte
        try:
            return dict(json.loads(line))
        except ValueError:  # a library has printed something
            return {"id": None}

    def _close(self, status: str, reason: str) -> None:
        _OPEN.discard(self)
        if self._writer is None:
            return
        self._send("finish", status=status, reason=reason)
        if self._writer.waiting:
            say(
                self._uri,
                f"{self._writer.waiting} calls found no room on the disk and are lost",
                sys.stderr,
                warning=True,
            )
        patience = (PATIENCE_KILLED if status == "KILLED" else PATIENCE_END + PATIENCE_KILLED) + MARGIN
        code = self._wait(patience)
        if code != 0 and self._starts < 2 and status != "KILLED":
            with suppress(OSError):
                self._launch()
                code = self._wait(patience)
        self._writer.close()
        if code != 0 and self._journal is not None:
            how = "is gone" if code is None else f"ended with exit code {code}"
            text = f"the process that sends it {how}; what it has not sent is kept in {self._journal.folder}"
            say(self._uri, text, sys.stderr, warning=True)
        self._process = self._writer = None

    def _wait(self, patience: float) -> int | None:
        """Close the pipe, wait for the process to end, and return its exit code."""
        if self._process is None or self._process.stdin is None:
            return None
        self._process.stdin.close()
        end = time.monotonic() + patience
        while self._answer(end):
            pass
        return self._process.wait()

    def _forget(self) -> None:
        """Let go of all in a forked process, a data worker for one: the run belongs to who started it."""
        if self._writer is not None:
            self._writer.close()
        if self._process is not None and self._process.stdin is not None and self._process.stdout is not None:
            self._process.stdin.close()
            self._process.stdout.close()
        self._writer = self._process = None


def _info(data: Path | str) -> dict[str, Any] | None:
    """Return what MLflow is told of a store, None where there is none."""
    with suppress(OSError, ValueError):
        info = dict(json.loads((Path(data) / "dataset.json").read_text(encoding="utf-8")))
        known = {key: info[key] for key in ("digest", *PROFILE) if key in info}
        split = split_digest(Path(data))
        return known | ({TAG: split} if split else {})
    return None


def _forget_all() -> None:
    for run in list(_OPEN):
        run._forget()


os.register_at_fork(after_in_child=_forget_all)
