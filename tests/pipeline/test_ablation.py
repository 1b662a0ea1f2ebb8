"""`anneal ablate` and `anneal seeds` as a user runs them, and after a kill."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from anneal.experiments.plan import FOLDER, RESULTS
from tests.pipeline.conftest import Clone
from tests.test_tracking import children, client, parents, sqlite


def rows(clone: Clone) -> dict[str, dict[str, str]]:
    with (clone.path / "studies/ablation/ablation.csv").open(encoding="utf-8") as file:
        return {row["technique"]: row for row in csv.DictReader(file)}


def experiments(clone: Clone) -> list[str]:
    listed = clone.run("git", "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps").stdout.split()
    return sorted(name.rsplit("-", 1)[0] for name in listed)


def trained(clone: Clone) -> int:
    """Trainings that ran, and were not taken from a cache."""
    return len(children(sqlite(clone.path), "train"))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_an_ablation_from_the_first_training_to_the_page(fresh: Clone) -> None:
    """Twice: the second time nothing is trained; then once more with another technique, which trains that alone."""
    fresh.repro()
    fresh.run("git", "add", "-A")
    fresh.run("git", "commit", "-qm", "lock")
    (fresh.path / "README.md").write_text("changed and not committed\n")
    before = fresh.run("git", "status", "--porcelain").stdout

    command = ["anneal", "ablate", "label_smoothing", "ensemble", "--seeds", "2", "--jobs", "2"]
    planned = fresh.run(*command, "--dry-run").stdout
    assert (
        "2 variants x 2 seeds = 4 trainings, 1 in DVC's cache; 3 to train in 2 experiments, 2 at once: about" in planned
    )
    assert not (fresh.path / FOLDER).exists()
    done = fresh.run(*command)
    assert "2 of 2: " in done.stderr
    assert trained(fresh) == 4
    table = rows(fresh)
    assert list(table) == [
        "full recipe",
        *sorted(("label_smoothing", "ensemble"), key=lambda k: -float(table[k]["contribution"])),
    ]
    assert table["label_smoothing"]["settings"] == "regularization.label_smoothing: 0.0"
    assert len(table["full recipe"]["by_seed"].split()) == 2
    # The seed that the workspace had trained already, to the digit.
    member = fresh.json("reports/metrics.json")["val"]["members"]["a"]["accuracy"]
    assert float(table["full recipe"]["by_seed"].split()[0]) == pytest.approx(member, abs=1e-6)
    assert "the recipe on test: accuracy" in done.stdout

    # DVC experiments, on val alone, which leave the workspace as it was.
    assert experiments(fresh) == ["full-recipe", "no-label-smoothing"]
    shown = fresh.run("dvc", "exp", "show", "--csv", "--drop", ".*test.*").stdout
    assert "no-label-smoothing" in shown
    assert fresh.run("git", "status", "--porcelain").stdout == before
    assert not [path for path in (fresh.path / FOLDER).iterdir() if path.name not in ("results", "lock")]

    # One parent with a child a variant and seed, which lead to the recipe and to the experiment.
    store = sqlite(fresh.path)
    experiment = client(store).get_experiment_by_name("anneal").experiment_id
    found = client(store).search_runs([experiment], "tags.study = 'ablation'")
    (study,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    below = client(store).search_runs([study.info.experiment_id], f"tags.`mlflow.parentRunId` = '{study.info.run_id}'")
    assert len(below) == 4 and {run.data.tags["variant"] for run in below} == {"full recipe", "no label smoothing"}
    recipe = next(run for run in parents(store) if "test/accuracy" in run.data.metrics)
    assert {run.data.tags["recipe.fingerprint"] for run in below} == {recipe.data.tags["fingerprint"]}
    assert sum("regularization.label_smoothing" in run.data.params for run in below) == 2
    assert {item.path for item in client(store).list_artifacts(study.info.run_id)} >= {"ablation.html", "ablation.csv"}

    again = fresh.run(*command)
    assert "4 of them with results from before: nothing to train" in again.stdout
    assert trained(fresh) == 4 and rows(fresh) == table

    seeds = fresh.run("anneal", "seeds", "2", "regularization.label_smoothing=0.0", "trainer.epochs=2").stdout
    assert "nothing to train" in seeds and "recipe: accuracy" in seeds and "with 2 seeds" in seeds
    assert trained(fresh) == 4


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_what_was_killed_or_failed_goes_on(fresh: Clone) -> None:
    """Ctrl-C and SIGKILL stop a training in the middle, which goes on from its checkpoint; what fails is named."""
    fresh.set(trainer__epochs=40, hardware__checkpoint_every="20 steps")
    fresh.run("git", "add", "-A")
    fresh.run("git", "commit", "-qm", "longer")
    fresh.run("dvc", "repro", "augment")  # dvc.lock is there, no training is

    command = ["anneal", "ablate", "label_smoothing", "--seeds", "1", "--jobs", "1"]
    process = start(fresh, command)
    kept = "*/checkout/.anneal/train/a/*.ckpt"
    found = wait_for(lambda: list((fresh.path / FOLDER).glob(kept)), process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert "ablate: stopping; the same command goes on from here" in said and process.returncode != 0
    assert found[0].exists() and not (fresh.path / RESULTS).exists()
    until_none_runs(fresh)

    process = start(fresh, command)
    wait_for(lambda: list((fresh.path / FOLDER).glob("no-label*/checkout/.anneal/train/a/*.ckpt")), process)
    os.killpg(process.pid, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert "full recipe: a: resuming train@a" in said and "1 of 2: full recipe done" in said
    until_none_runs(fresh)

    done = fresh.run(*command)
    assert "1 of them with results from before" in done.stdout
    assert "no label smoothing: a: resuming train@a" in done.stderr
    assert trained(fresh) == 2  # a run that is gone on with is the same run
    # The workspace has no figures on test, so the recipe is evaluated there, once, from the trainings of the cache.
    assert experiments(fresh) == ["full-recipe", "no-label-smoothing", "recipe"]
    assert "the recipe on test: accuracy" in done.stdout

    failed = fresh.run("anneal", "seeds", "1", "optimizer.SGD.lr=1.0e+12", check=False)
    assert failed.returncode == 1
    assert re.search(r"error: the changed recipe could not be trained: training diverged", failed.stderr), failed.stderr


def start(clone: Clone, command: list[str]) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_", "PYTHONDONTWRITE"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_SITE_CACHE_DIR": str(clone.path.parent / "dvc-site"),
    }
    return subprocess.Popen(
        command,
        cwd=clone.path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for(found: Any, process: subprocess.Popen[str]) -> Any:
    end = time.monotonic() + 900
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        if result := found():
            return result
        time.sleep(0.05)
    raise AssertionError("it did not come")


def until_none_runs(clone: Clone) -> None:
    end = time.monotonic() + 60
    while found := running(clone):
        assert time.monotonic() < end, found
        time.sleep(0.2)


def running(clone: Clone) -> list[str]:
    """Processes that still run below a clone, the one that sends to MLflow left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if Path(os.readlink(folder / "cwd")).is_relative_to(clone.path) and "anneal.tracking" not in command:
                found.append(command)
        except OSError:
            continue
    return found
