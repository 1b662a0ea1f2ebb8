"""Runs read back from MLflow by whatever names them, as `anneal.comparison.Record`."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anneal.comparison import Record, flat_text
from anneal.params import UserError, nearest
from anneal.tracking.address import ENVIRONMENT, one_line, redact, tracking_uri
from anneal.tracking.names import PARENT

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

OF_DATA = ("data", "split", "preprocess", "augment")
"""Sections whose params a member's run takes from its recipe's; its own run has those that training reads."""

COMMANDS = ("lr-range", "study")
"""Runs below a recipe's that no stage made."""

NEWEST_FIRST = ["attributes.start_time DESC", "attributes.run_id ASC"]

ALLOWED = "a run's id or its first digits, a run's name, a DVC experiment, a stage such as train@a, latest, latest~1"


def read_runs(uri: str, experiment: str, names: Sequence[str]) -> list[Record]:
    """Read the runs that ``names`` name, with the newest run of each stage below those of recipes.

    A name is a run's id or its first digits, the first digits of a recipe's fingerprint, a run's name, a DVC
    experiment's, a stage (``evaluate``, ``train@a``: its newest run) or ``latest``, the recipe that ran last; ``~1``
    behind the last two is the one before, and so on. Where one of two is a recipe and the other a stage's run, the
    recipe's newest run of that stage is taken.

    Raises
    ------
    UserError
        There is no store, it cannot be read, or a name names no run or several.
    """
    address = tracking_uri(uri)
    file = re.match(r"sqlite:///([^?]+)", address)
    if file and not Path(file[1]).exists():  # mlflow would make one
        raise UserError(f"tracking.uri: {file[1]}: no such file, so there are no runs yet; train first: make repro")
    quiet = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_LOGGING_LEVEL": "ERROR"}
    for key, value in {**ENVIRONMENT, **quiet}.items():
        os.environ.setdefault(key, value)
    for name in ("mlflow", "alembic", "urllib3"):  # what they would warn of becomes one line below
        logging.getLogger(name).setLevel(logging.ERROR)
    import mlflow

    try:
        client = mlflow.MlflowClient(address)  # not mlflow.set_tracking_uri, which sets MLFLOW_TRACKING_URI
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise UserError(f"tracking.experiment: found {experiment!r}, which has no runs at {redact(address)}")
        reader = _Reader(client, found.experiment_id)
        records = [reader.record(*reader.find(name)) for name in names]
    except UserError:
        raise
    except Exception as error:  # whatever a store, a server or the network raises
        raise UserError(f"tracking.uri: cannot read the runs at {redact(address)}: {one_line(error)}") from None
    return _level(names, records)


def _level(names: Sequence[str], records: list[Record]) -> list[Record]:
    """Take a recipe's newest run of a stage where another record is that stage's."""
    labels = {record.label for record in records if not record.stages}
    if len(labels) != 1 or labels == {"recipe"}:
        return records
    (label,) = labels
    for index, record in enumerate(records):
        if record.stages:
            if label not in record.stages:
                known = ", ".join(record.stages)
                raise UserError(f"{names[index]}: this recipe has no run of {label} to compare; it has {known}")
            records[index] = record.stages[label]
    return records


class _Reader:
    """Finds runs of one experiment and reads them."""

    def __init__(self, client: MlflowClient, experiment_id: str) -> None:
        self.client = client
        self.experiment_id = experiment_id
        self.parents: dict[str, Run | None] = {}

    def search(self, text: str, limit: int = 1000) -> list[Run]:
        """Return runs that a filter matches, newest first."""
        return list(self.client.search_runs([self.experiment_id], text, max_results=limit, order_by=NEWEST_FIRST))

    def get(self, run_id: str | None) -> Run | None:
        """Return a run that was not deleted, None where there is none of this id."""
        from mlflow.exceptions import MlflowException

        if not run_id:
            return None
        if run_id not in self.parents:
            try:
                run = self.client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                run = None
            self.parents[run_id] = run if run and run.info.lifecycle_stage == "active" else None
        return self.parents[run_id]

    # ---- what a name names ----

    def find(self, name: str) -> tuple[Run, str | None]:
        """Return the run that a name names, and the DVC experiment whose stage runs are meant, if it is one's.

        Raises
        ------
        UserError
            None is named so, or several.
        """
        base, back = name, 0
        if match := re.fullmatch(r"(.+)~([0-9]{1,6})", name):
            base, back = match[1], int(match[2])
        if base == "latest":
            return self.nth(name, self.recipes(back), back), None
        if runs := self.of_stage(base):
            return self.nth(name, runs, back), None
        if re.fullmatch(r"[0-9a-f]{32}", name) and (run := self.get(name)):
            return run, None
        if runs := self.search(f"attributes.run_name = {_quoted(name)}"):
            return self.only(name, runs, "names"), None
        if run := self.of_experiment(name):
            return run, name
        if re.fullmatch(r"[0-9a-f]{1,31}", name):
            for text in (f"attributes.run_id LIKE '{name}%'", f"tags.fingerprint LIKE '{name}%'"):
                if runs := self.search(text, 10):
                    return self.only(name, runs, "begins the ids of"), None
        raise UserError(f"{name!r}: no such run, allowed: {ALLOWED}{nearest(name, self.names())}")

    def nth(self, name: str, runs: Sequence[Run], back: int) -> Run:
        if back >= len(runs):
            raise UserError(f"{name!r}: no such run; there {'is 1' if len(runs) == 1 else f'are {len(runs)}'}")
        return runs[back]

    def only(self, name: str, runs: Sequence[Run], verb: str) -> Run:
        if len(runs) > 1:
            listed = ", ".join(f"{run.info.run_id[:8]} ({_label(run)})" for run in runs[:5])
            more = ", ..." if len(runs) > 5 else ""
            raise UserError(f"{name!r} {verb} {len(runs)} runs, newest first: {listed}{more}; give more of an id")
        return runs[0]

    def recipes(self, back: int) -> list[Run]:
        """Return parent runs, at least ``back + 1`` of them where there are so many, the one that last ran a stage first."""
        found: dict[str, Run] = {}
        token = None
        while len(found) <= back:
            page = self.client.search_runs(
                [self.experiment_id],
                f"tags.`{PARENT}` LIKE '%'",
                max_results=100,
                order_by=NEWEST_FIRST,
                page_token=token,
            )
            for run in page:
                parent = self.get(run.data.tags[PARENT])
                if parent and "fingerprint" in parent.data.tags:
                    found[parent.info.run_id] = parent
            token = page.token
            if not token:
                break
        return list(found.values())

    def of_stage(self, text: str) -> list[Run]:
        match = re.fullmatch(r"([\w-]+)(?:@([\w-]+))?", text)
        if match is None:
            return []
        member = f" AND tags.member = '{match[2]}'" if match[2] else ""
        return self.search(f"tags.stage = '{match[1]}'{member}")

    def of_experiment(self, name: str) -> Run | None:
        """Return the recipe's run of a DVC experiment, also where the recipe had run before under another name."""
        for run in self.search(f"tags.DVC_EXP_NAME = {_quoted(name)}"):
            parent = run if "fingerprint" in run.data.tags else self.get(run.data.tags.get(PARENT))
            if parent is not None:
                return parent
        return None

    def names(self) -> Iterable[str]:
        """Return what the newest runs can be named by."""
        for run in self.search("", 500):
            yield from filter(None, (_label(run), run.info.run_name, run.data.tags.get("DVC_EXP_NAME")))
            yield run.info.run_id[:8]

    # ---- a run as a record ----

    def record(self, run: Run, experiment: str | None = None) -> Record:
        """Return a run's record, of a recipe with the newest run of each stage, those of a DVC experiment first."""
        tags, parent = run.data.tags, self.get(run.data.tags.get(PARENT))
        params = dict(run.data.params)
        if parent is not None:
            whole = parent.data.params
            kept = {key: whole[key] for key in whole if "member" not in tags or key.partition(".")[0] in OF_DATA}
            params = kept | params
        dirty = tags.get("git.dirty")
        return Record(
            id=run.info.run_id,
            name=run.info.run_name or "",
            label=_label(run),
            status=run.info.status,
            began=run.info.start_time or 0,
            params=params,
            data=_data(run) or (_data(parent) if parent else {}),
            metrics={key: value for key, value in run.data.metrics.items() if not key.startswith("system/")},
            outs={key.removeprefix("out."): value for key, value in sorted(tags.items()) if key.startswith("out.")},
            commit=tags.get("mlflow.source.git.commit"),
            dirty=None if dirty is None else dirty == "true",
            files=self.environment(run.info.run_id) if "stage" in tags else {},
            stages=self.stages(run, experiment) if "fingerprint" in tags else {},
        )

    def stages(self, recipe: Run, experiment: str | None) -> dict[str, Record]:
        """Return label to newest run: a finished one where there is any; one that DVC's cache stands for last."""
        runs = self.search(f"tags.`{PARENT}` = '{recipe.info.run_id}'")
        for key, run_id in recipe.data.tags.items():
            if key.startswith("linked.") and (run := self.get(run_id)):
                runs.append(run)
        runs.sort(key=lambda run: (run.data.tags.get("DVC_EXP_NAME") != experiment, run.info.status != "FINISHED"))
        newest: dict[str, Run] = {}
        for run in runs:
            if run.data.tags.get("stage", COMMANDS[0]) not in COMMANDS:
                newest.setdefault(_label(run), run)
        order = sorted(newest, key=lambda label: (newest[label].info.start_time, label))
        return {label: self.record(newest[label]) for label in order}

    def environment(self, run_id: str) -> dict[str, str]:
        """Return the text files below the run's ``environment/``, none where they are out of reach."""
        entries = [entry for entry in self.client.list_artifacts(run_id, "environment") if not entry.is_dir]
        if not entries:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(self.client.download_artifacts(run_id, "environment", folder))
            return {file.name: file.read_text(encoding="utf-8", errors="replace") for file in sorted(path.iterdir())}


def _label(run: Run) -> str:
    tags = run.data.tags
    if "fingerprint" in tags:
        return "recipe"
    return "@".join(filter(None, [tags.get("stage", "run"), tags.get("member")]))


def _data(run: Run) -> dict[str, str]:
    """Return name, digest, counts and sizes of a run's data set."""
    inputs: Any = run.inputs.dataset_inputs if run.inputs else []
    if not inputs:
        digest = run.data.tags.get("data.digest")
        return {"digest": digest} if digest else {}
    data = inputs[0].dataset
    profile = json.loads(data.profile or "{}")
    classes = profile.pop("classes", None)
    known = {"name": data.name, "digest": data.digest, **flat_text(profile)}
    if classes is not None:
        known |= {"classes": str(len(classes)), "class names": " ".join(map(str, classes))}
    return known


def _quoted(text: str) -> str:
    """Return text as a literal of MLflow's filters, which know no escapes."""
    return f'"{text.replace(chr(34), "")}"' if "'" in text else f"'{text}'"
