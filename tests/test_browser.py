"""What a person sees in MLflow's page after a run, in a real headless Chromium."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from anneal import params, tracking
from tests.test_tracking import ROOT, client, fresh, mlflow_server, parents, runs, sqlite  # noqa: F401

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NOISE_OF_MLFLOW = (
    "the server responded with a status of 404",  # what its own features ask for, which a plain server has not
    "ResizeObserver loop",
)
CHART_OF_LEGEND_HAS_POINTS = """([legend, count]) => {
    let card = legend;
    while (card && !card.querySelector(".js-plotly-plot")) card = card.parentElement;
    return card && [...card.querySelectorAll("path.js-line")].some(
        // Plotly leaves out points that lie on a line between others.
        (line) => (line.getAttribute("d") || "").split("L").length >= count / 2);
}"""


@contextmanager
def browser_page() -> Iterator[Page]:
    """Give a page of a headless Chromium; skip where there is none, fail where CI should have had one."""
    if not Path(CHROMIUM).exists():
        reason = f"{CHROMIUM} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}, and CI has to look at the page")
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1700, "height": 1000})
            page.set_default_timeout(60_000)
            wrong: list[str] = []
            page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            yield page
        finally:
            browser.close()
    assert [text for text in wrong if not any(known in text for known in NOISE_OF_MLFLOW)] == []


def check_pages(store: str, folder: Path, *, headline: str, child: str, curve: str, preview: str) -> None:
    """Look at a store through MLflow's page, and assert that a person finds what a run should show.

    Parameters
    ----------
    store
        Address of a database of MLflow with one parent run.
    folder
        Takes the screenshots and the server's log.
    headline
        Metric of the parent that its row in the runs table must show, such as ``test/accuracy``.
    child
        Name of a child run that has the learning curve.
    curve
        Metric of that child with several steps.
    preview
        Path of a picture among a child's artifacts.
    """
    (parent,) = parents(store)
    name = client(store).get_experiment(parent.info.experiment_id).name
    children = [run for run in runs(store) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    trained = next(run for run in children if run.info.run_name == child)
    drawn = next(run for run in children if has_artifact(store, run.info.run_id, preview))
    with mlflow_server(store, folder) as (address, _), browser_page() as page:
        page.goto(tracking.ui_page(store, name, address))
        check_table(page, parent, headline, [run.info.run_name for run in children])
        page.screenshot(path=folder / "runs.png")

        one = f"{address}/#/experiments/{parent.info.experiment_id}/runs"
        page.goto(f"{one}/{parent.info.run_id}")
        page.get_by_role("link", name=child).wait_for()
        page.get_by_role("row").filter(has_text=headline).filter(has_text=figure(parent, headline)).first.wait_for()
        page.screenshot(path=folder / "parent.png")

        page.goto(f"{one}/{trained.info.run_id}/model-metrics")
        page.get_by_placeholder("Search metric charts").fill(curve)
        legend = page.get_by_text(f"{child} ({curve})").first
        legend.wait_for()
        steps = len(client(store).get_metric_history(trained.info.run_id, curve))
        assert steps > 1
        page.wait_for_function(CHART_OF_LEGEND_HAS_POINTS, arg=[legend.element_handle(), steps])
        page.screenshot(path=folder / "curve.png")

        page.goto(f"{one}/{drawn.info.run_id}/artifacts")
        for part in preview.split("/"):
            page.get_by_text(part, exact=True).first.click()
        picture = page.locator("img[src^='blob:']").first  # what the page fetched, not one of its own
        picture.wait_for()
        page.wait_for_function("picture => picture.complete && picture.naturalWidth > 1", arg=picture.element_handle())
        page.screenshot(path=folder / "preview.png")


def check_table(page: Page, parent: Any, headline: str, children: list[str]) -> None:
    """Assert that the runs table has one row, the parent's, with its figure, and opens on the children."""
    page.get_by_role("columnheader").filter(has_text=headline).first.wait_for()
    page.get_by_role("gridcell").filter(has_text=parent.info.run_name).first.wait_for()
    page.get_by_role("gridcell").filter(has_text=figure(parent, headline)).first.wait_for()
    assert not page.get_by_role("link", name=children[0], exact=True).count()
    page.get_by_role("gridcell").filter(has_text=parent.info.run_name).get_by_role("button").first.click()
    for name in children:
        page.get_by_role("link", name=name, exact=True).first.wait_for()


def figure(run: Any, metric: str) -> str:
    """Return a metric as MLflow's page shows it, without the digits that it may round."""
    return f"{run.data.metrics[metric]:.5f}"[:5]


def has_artifact(store: str, run: str, path: str) -> bool:
    return path in [item.path for item in client(store).list_artifacts(run, str(Path(path).parent))]


@pytest.mark.long
def test_a_person_finds_the_run_its_curve_and_its_preview(fresh: Path) -> None:  # noqa: F811
    from PIL import Image

    values = params.read_yaml(ROOT / "params.yaml")
    Path("reports/augmentation").mkdir(parents=True)
    Image.radial_gradient("L").save("reports/augmentation/preview.png")
    with tracking.stage_run(values, "augment") as run:
        run.artifact("reports/augmentation/preview.png", "augmentation")
    with tracking.stage_run(values, "train", member="a") as run:
        for epoch in range(1, 6):
            run.metrics({"train/loss": 2 / epoch, "val/loss": 2.2 / epoch, "val/accuracy": 1 - 0.5 / epoch}, epoch)
    with tracking.stage_run(values, "evaluate") as run:
        run.headline({"test/accuracy": 0.9861, "val/accuracy": 0.9833})
    out = Path(os.environ.get("ANNEAL_SCREENSHOTS", fresh / "screenshots"))
    out.mkdir(parents=True, exist_ok=True)
    check_pages(
        sqlite(fresh),
        out,
        headline="test/accuracy",
        child="train a",
        curve="val/loss",
        preview="augmentation/preview.png",
    )
