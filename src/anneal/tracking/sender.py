"""The process that sends a stage's journal to MLflow: ``python -m anneal.tracking.sender FOLDER``.

Three threads: one reads the pipe from the stage, which wakes, asks and ends; one makes the calls; the first one keeps
to the times that the stage is promised, whatever the calls are stuck in.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from filelock import Timeout

from anneal import environment
from anneal.tracking.address import ENVIRONMENT, one_line, redact, say
from anneal.tracking.journal import FOLDER, Journal, Writer
from anneal.tracking.names import dvc_hash
from anneal.tracking.player import OutOfReach, Player, await_predecessor, drain, end_killed
from anneal.tracking.run import PATIENCE_END, PATIENCE_KILLED
from anneal.tracking.store import Store, process_name, silenced

PATIENCE_CALL = 60.0
"""Seconds that the end of a stage waits for one more call of a store that has answered so far."""

LAST_TRY = 5.0
"""Seconds that a store which was out of reach gets when the stage asks or ends."""

TRIES = 3
"""Failures at one place after which nobody waits for more; a slow one counts as so many."""

PAUSES = (1.0, 30.0)
"""Shortest and longest pause between two attempts, in seconds; each is twice the one before."""

GATHER = 1.0
"""Seconds in which metrics gather for one call."""

MAX_TIMEOUT = 80
"""Seconds that a request gets at most, where shorter ones have timed out."""


class Sender:
    """Sends one journal while its stage runs, and what earlier ones have left before it.

    Parameters
    ----------
    journal
        Claimed by this process.
    uri
        Address of the store.
    root
        Of the repository.
    errors, answers
        Streams for people and for the stage.
    """

    def __init__(self, journal: Journal, uri: str, root: Path, errors: IO[str], answers: IO[bytes]) -> None:
        self.journal, self.uri, self.root = journal, uri, root
        self.errors, self.answers = errors, answers
        self.changed = threading.Condition()
        self.writer = Writer(journal.path)
        self.store = Store(uri, root)
        self.player: Player | None = None
        self.ended = self.closed = self.done = self.crashed = False
        self.questions: dict[int, float] = {}
        self.out_since: float | None = None
        self.stuck: str | None = None
        self.stuck_since = self.failed_at = 0.0
        self.tries = 0
        self.warned = False
        self.moved = time.monotonic()
        self.may_wait = "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)

    def say(self, text: str, *, warning: bool = False) -> None:
        """Print a line for people."""
        say(self.uri, text, self.errors, warning=warning)

    # ---- the pipe ---------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Note what the stage asks, until it closes the pipe or is gone."""
        for line in sys.stdin.buffer:
            with self.changed:
                if line.startswith(b"?"):
                    number, patience = line[1:].split()
                    self.questions[int(number)] = float(patience)
                self.changed.notify_all()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    # ---- the calls --------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Make the calls; whatever goes wrong with that, the journal stays."""
        try:
            self.look_around()
            self.send()
            self.done = True
        except Exception as error:
            self.say(f"{one_line(error)}; the stage goes on without it", warning=True)
            self.crashed = True
        with self.changed:
            self.changed.notify_all()

    def send(self) -> None:
        """Make the calls to the end, and try again where the store is out of reach."""
        import mlflow  # noqa: F401 - takes seconds, and two threads need it

        self.sign()
        threading.Thread(target=self.sample, daemon=True).start()
        store = self.store
        steps = [lambda: self.connect(store), lambda: self.drain(store), lambda: self.open(store)]
        pause = PAUSES[0]
        while not self.done:
            began = time.monotonic()
            try:
                if steps:
                    steps[0]()
                    steps.pop(0)
                else:
                    assert self.player is not None
                    if not self.player.step() and not self.rest():
                        break
            except OutOfReach as error:
                if self.stuck != store.last:  # an attempt that came further than the one before
                    pause = PAUSES[0]
                self.missed(error.args[0], store.last, time.monotonic() - began)
                if self.out_since is None:
                    time.sleep(0.2)
                else:
                    self.wait_after(pause)
                    pause = min(2 * pause, PAUSES[1])
                continue
            self.reached()
            if self.player and self.player.gathering:
                self.gather()

    def look_around(self) -> None:
        """Write down what is true only now: the commit, the machine, the process."""
        start = self.journal.first()
        if (self.journal.folder / "context.json").exists():
            return
        files: dict[str, str] = {}
        try:
            files = environment.capture(Path(start["cwd"]), start["variables"])
        except Exception as error:  # whatever it is, the run matters more
            self.say(f"{one_line(error)}; the run goes without its environment", warning=True)
        git = json.loads(files.get("git.json", "{}"))
        tags = {key: os.environ[key] for key in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV") if os.environ.get(key)}
        if git:
            tags |= {"mlflow.source.git.commit": git["commit"], "git.dirty": str(git["dirty"]).lower()}
        context = {"tags": {**tags, "mlflow.user": user()}, "process": process_name(os.getppid())}
        with suppress(OSError):
            for name, content in files.items():
                self.write("text", file=f"environment/{name}", content=content)
            self.journal.save("context.json", context)

    def write(self, name: str, **arguments: Any) -> None:
        """Append a call of our own to the journal."""
        self.writer.append(name, {**arguments, "time": time.time_ns() // 1_000_000})

    def connect(self, store: Store) -> None:
        """Reach the store."""
        try:
            store.connect()
        except Exception as error:
            raise OutOfReach(error) from error

    def drain(self, store: Store) -> None:
        """Send what earlier stages have left."""
        await_predecessor(self.root, self.journal, PATIENCE_CALL)
        sent: list[str] = []
        kept: set[str] = set()

        def fault(title: str, error: BaseException) -> None:
            if title not in kept:
                self.say(f"{title}: {one_line(error)}", warning=True)
            kept.add(title)

        try:
            drain(
                store,
                redact(self.uri),
                self.root,
                fault=fault,
                done=lambda title, _: sent.append(title),
                sign=self.sign,
                before=self.journal.name,
                stop=lambda: self.done,
            )
        finally:
            if sent:
                self.say(f"sent {len(sent)} run{'s' * (len(sent) > 1)} that earlier stages had kept")

    def open(self, store: Store) -> None:
        """Begin with the journal, where it has been sent to."""
        self.player = Player(self.journal, store, live=True, fault=self.fault)

    def fault(self, error: BaseException) -> None:
        """Say that a call is left out: once, since one is often followed by many of its kind."""
        if not self.warned:
            self.say(f"{one_line(error)}; the stage goes on without it", warning=True)
        self.warned = True

    def rest(self) -> bool:
        """Wait for more to send; False where no more can come."""
        with self.changed:
            if self.closed:  # the last line may have been written after we looked
                return bool(self.player and self.player.left())
            self.changed.wait(GATHER)
            return True

    def gather(self) -> None:
        """Wait a little after metrics, so that many go in one call; the stage's questions and its end do not wait."""
        with self.changed:
            self.changed.wait_for(lambda: self.ended or self.done or bool(self.questions), GATHER)

    def sign(self) -> None:
        """Note that a call has been made."""
        with self.changed:
            self.moved = time.monotonic()
            self.changed.notify_all()

    def reached(self) -> None:
        """Note that a call has been made, and that an outage is over."""
        if self.out_since is not None:
            self.say(f"back after {time.monotonic() - self.out_since:.0f} s; what was kept is being sent")
        self.out_since = self.stuck = None
        self.sign()

    def missed(self, error: BaseException, place: str, took: float) -> None:
        """Note that an attempt has failed at a place.

        A quick first failure is none yet: a connection had been idle too long, or a server starts anew. The next one
        there begins an outage, which is said.
        """
        now = time.monotonic()
        with self.changed:
            if place != self.stuck:
                self.stuck, self.stuck_since, self.tries = place, now, 0
            self.tries += 1 if took < 1.0 or isinstance(error, Timeout) else TRIES  # others may hold the lock for long
            self.failed_at = self.moved = now
            self.changed.notify_all()
        if self.tries > 1 and self.out_since is None:
            text = f"{one_line(error)}; the stage goes on, and what could not be sent is kept in {FOLDER}"
            self.say(text, warning=True)
            self.out_since = now
        timeout = int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
        if self.may_wait and took > 0.9 * timeout:  # slow rather than gone: give it longer
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(min(2 * timeout, MAX_TIMEOUT))

    def gone(self, since: float) -> bool:
        """Say whether to give the store up which somebody has waited for ``since`` then: it fails again at one place."""
        if self.stuck is None:
            return False
        again = self.tries >= TRIES and self.failed_at > since
        return again or time.monotonic() > max(self.stuck_since, since) + LAST_TRY

    def wait_after(self, pause: float) -> None:
        """Wait between two attempts; a question of the stage, or its end, ends the wait."""
        end = time.monotonic() + pause
        with self.changed:
            questions, ended = len(self.questions), self.ended
            while not self.done and len(self.questions) <= questions and self.ended == ended:
                left = end - time.monotonic()
                if left <= 0 or not self.changed.wait(left):
                    break

    def sample(self) -> None:
        """Write CPU, memory, disk, network and GPU into the journal, so that no outage interrupts them."""
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
        from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

        monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        for kind in (GPUMonitor, ROCMMonitor):
            with suppress(Exception):  # no such card, or no library for it
                monitors.append(kind())
                break
        interval = max(1.0, float(os.environ["MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"]))
        while not self.ended and not self.done:
            values: dict[str, float] = {}
            with suppress(Exception):
                for monitor in monitors:
                    monitor.collect_metrics()
            with self.changed:
                if self.changed.wait_for(lambda: self.ended or self.done, interval):
                    break
            with suppress(Exception):
                for monitor in monitors:
                    values |= {f"system/{key}": value for key, value in monitor.aggregate_metrics().items()}
                    monitor.clear_metrics()
                self.write("system", values=values)

    # ---- the times that the stage is promised -----------------------------------------------------------------------

    def run(self) -> None:
        """Serve the stage to its end."""
        threading.Thread(target=self.listen, daemon=True).start()
        worker = threading.Thread(target=self.work, daemon=True)
        worker.start()
        stage = os.getppid()
        asked: dict[int, float] = {}
        with self.changed:
            while not self.ended:
                self.changed.wait(0.5 if self.questions else 2.0)
                self.ended = self.ended or os.getppid() != stage
                self.questions = {
                    number: patience
                    for number, patience in self.questions.items()
                    if not self.answered(number, asked.setdefault(number, time.monotonic()), patience)
                }
        with suppress(OSError):
            end_killed(self.journal)  # where the stage could not say how it ended
        self.finish()

    def answered(self, number: int, since: float, patience: float) -> bool:
        """Answer a question if it is time: its call is made, or will not be in the seconds that the stage waits."""
        known = self.player.answers if self.player else {}
        if number not in known and not self.crashed and not self.gone(since) and time.monotonic() < since + patience:
            return False
        with suppress(OSError):
            self.answers.write(json.dumps({"id": number, "answer": known.get(number)}).encode() + b"\n")
        return True

    def finish(self) -> None:
        """Send what is left for as long as that is worth it, and keep the rest."""
        began = time.monotonic()
        killed = any(line.name == "finish" and line.arguments["status"] == "KILLED" for line in self.journal.tail())
        # Nobody waits for who sends what a stage has left that was killed at once.
        limit = began + (PATIENCE_KILLED if killed and not self.journal.abandoned() else PATIENCE_END)
        with self.changed:
            self.closed = True
            self.changed.notify_all()
            calls = self.store.calls
            while not self.done and not self.crashed and not self.gone(began):
                if calls != self.store.calls:
                    calls, self.moved = self.store.calls, time.monotonic()
                if time.monotonic() > min(limit, max(self.moved, began) + PATIENCE_CALL):
                    break
                self.changed.wait(0.2)
            complete = self.done
            self.done = True
        if complete:
            with suppress(OSError):
                self.journal.remove()
            return
        self.keep()

    def keep(self) -> None:
        """Make the journal independent of the working tree, and say that it is there."""
        offset = self.player.close() if self.player else int(self.journal.load("sent.json").get("offset", 0))
        cwd = self.journal.first().get("cwd", ".")

        def hash_of(path: Path) -> str | None:
            with suppress(OSError, ValueError):
                return dvc_hash(path, cwd)
            return None

        try:
            self.journal.pack(offset, hash_of)
        except OSError as error:
            self.say(f"{one_line(error)}; {self.journal.folder} is kept without its files", warning=True)
        number = sum(1 for _ in self.journal.lines(offset))
        self.say(
            f"{number} calls of this stage are kept; the next stage sends them, and so does `anneal sync`", warning=True
        )


def user() -> str:
    """Return the user's name."""
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def main(folder: str) -> None:
    """Send a journal."""
    journal = Journal(Path(folder))
    with silenced() as (errors, answers), journal.claimed() as mine:
        while not (start := journal.first()):  # the disk is full, and the first line waits
            if select.select([0], [], [], 1.0)[0] and not os.read(0, 4096):
                break
        if mine and start:
            Sender(journal, os.environ["MLFLOW_TRACKING_URI"], Path(start["root"]), errors, answers).run()
        errors.flush()
        os._exit(0)  # mlflow's threads have nothing left to do, and some take a second to find out


if __name__ == "__main__":
    main(sys.argv[1])
