"""A grid of experiments through DVC's queue, and what a person sees of it in MLflow."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest

from anneal import tracking
from tests.pipeline.conftest import Clone
from tests.test_browser import browser_page, figure, mlflow_server
from tests.test_tracking import children, client, parents, sqlite

OPTIMIZERS, SCHEDULES = ["SGD", "Adagrad", "RMSprop", "Adam"], ["step", "cosine"]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_grid_of_optimizers_and_schedules(fresh: Clone, tmp_path: Path) -> None:
    fresh.set(data__limit=None)
    fresh.repro()
    fresh.run("git", "add", "-A")
    fresh.run("git", "commit", "-qm", "lock")
    fresh.run(
        "dvc",
        "exp",
        "run",
        "--queue",
        "-S",
        f"optimizer.name={','.join(OPTIMIZERS)}",
        "-S",
        f"schedule.name={','.join(SCHEDULES)}",
        "-S",
        "evaluate.splits=[val]",
        "-S",
        "trainer.epochs=6",
    )
    # The worker would keep a pipe open until the last experiment has ended.
    fresh.run("sh", "-c", "dvc queue start --jobs 1 >/dev/null 2>&1")
    wait_for_the_queue(fresh)

    store = sqlite(fresh.path)
    grid = {
        (run.data.params["optimizer.name"], run.data.params["schedule.name"]): run
        for run in parents(store)
        if run.data.params["evaluate.splits"] == '["val"]'
    }
    assert sorted(grid) == sorted(itertools.product(OPTIMIZERS, SCHEDULES))
    for run in grid.values():
        assert 0.2 < run.data.metrics["val/accuracy"] <= 1  # 8 channels, 6 epochs
        assert not [name for name in run.data.metrics if name.startswith("test/")]
        name = run.data.params["optimizer.name"]
        # Each optimizer with its own block of arguments.
        assert f"optimizer.{name}.lr" in run.data.params
    trained = [run for run in children(store, "train") if run.data.tags.get("DVC_EXP_NAME")]
    assert len(trained) == 8
    for run in trained:
        given = run.data.params
        assert run.data.metrics["peak_lr"] == float(given[f"optimizer.{given['optimizer.name']}.lr"])
    look(store, grid, trained, Path(os.environ.get("ANNEAL_SCREENSHOTS", tmp_path)) / "grid")


def wait_for_the_queue(clone: Clone) -> None:
    end = time.monotonic() + 1500
    while time.monotonic() < end:
        status = clone.run("dvc", "queue", "status").stdout
        assert "Failed" not in status, status
        if not any(word in status for word in ("Queued", "Running")):
            return
        time.sleep(3)
    raise AssertionError("the queue did not end")


def look(store: str, grid: dict, trained: list, folder: Path) -> None:
    """Find every experiment with its figures in the runs table, and overlay the learning curves."""
    folder.mkdir(parents=True, exist_ok=True)
    experiment = client(store).get_experiment(trained[0].info.experiment_id)
    with mlflow_server(store, folder) as (address, _), browser_page() as page:
        page.goto(tracking.ui_page(store, experiment.name, address))
        for column in ("val/accuracy", "optimizer.name", "schedule.name"):
            page.get_by_role("columnheader").filter(has_text=column).first.wait_for()
        for run in grid.values():
            row = page.get_by_role("gridcell").filter(has_text=run.info.run_name).first
            row.wait_for()
            page.get_by_role("gridcell").filter(has_text=figure(run, "val/accuracy")).first.wait_for()
        page.screenshot(path=folder / "table.png")

        ids = ",".join(f'"{run.info.run_id}"' for run in trained)
        page.goto(f'{address}/#/compare-runs?runs=[{ids}]&experiments=["{experiment.experiment_id}"]')
        page.wait_for_timeout(3000)
        page.screenshot(path=folder / "compare.png")
        page.goto(
            f"{address}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"
        )
        page.get_by_placeholder("Search metric charts").fill("curve/val_loss")
        page.wait_for_function("document.querySelectorAll('path.js-line').length >= 8")
        page.wait_for_timeout(1000)
        page.screenshot(path=folder / "curves.png")
