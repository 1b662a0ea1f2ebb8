"""How many recipes have used a test split: counted in a real store, and never waited for."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest

from anneal import cli, params, tracking
from anneal.tracking.run import MARGIN, PATIENCE_USES
from anneal.tracking.split_uses import METRIC, known_uses, recipes_on_test
from tests.test_tracking import (  # noqa: F401
    ROOT,
    client,
    empty_database,
    fresh,
    parents,
    recipe,
    sqlite,
    workspace,
)

DIGEST, OTHER = "d" * 32, "e" * 32


def write_recipes(uri: str) -> None:
    """Make parent runs as earlier recipes have left them."""
    store = client(uri)
    experiment = store.create_experiment("anneal")
    for fingerprint, digest, metric in (
        ("one", DIGEST, "test/accuracy"),
        ("two", DIGEST, "test/accuracy"),
        ("two", DIGEST, "test/accuracy"),
        ("grid", DIGEST, "val/accuracy"),
        ("else", OTHER, "test/accuracy"),
    ):
        run = store.create_run(experiment, tags={"fingerprint": fingerprint, "data.digest": digest})
        store.log_metric(run.info.run_id, metric, 0.0)
    run = store.create_run(experiment, tags={"stage": "evaluate", "data.digest": DIGEST})
    store.log_metric(run.info.run_id, "test/accuracy", 0.5)


def test_recipes_are_counted_once_each_and_those_alone_that_looked(
    workspace: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Longer than a user would wait: importing mlflow takes its time on a busy machine.
    monkeypatch.setattr("anneal.tracking.run.PATIENCE_USES", 100.0)
    monkeypatch.setitem(known_uses.__kwdefaults__, "patience", 100.0)
    write_recipes(sqlite(workspace))
    with tracking.stage_run(recipe(), "evaluate") as run:
        run.headline({"test/accuracy": 0.5})
        assert (run.test_uses(), run.test_uses(OTHER), run.test_uses("0" * 32)) == (3, 1, 0)
        run.headline({METRIC: 3})
    (own,) = [run for run in parents(sqlite(workspace)) if METRIC in run.data.metrics]
    assert own.data.metrics[METRIC] == 3 and f"| {METRIC} | 3 |" in own.data.tags["mlflow.note.content"]

    figure = {"accuracy": 0.5, "accuracy_ci": [0.4, 0.6], "macro_f1": 0.5, "nll": 1.0, "ece": 0.1}
    keys = ("single", "tta", "ensemble", "ensemble_tta")
    (workspace / "reports").mkdir()
    (workspace / "reports/metrics.json").write_text(json.dumps({"test": dict.fromkeys(keys, figure)}))
    shutil.copy(ROOT / "params.schema.json", workspace)
    cli.main(["summary"])
    assert "\ntest set used by 3 recipes\n" in capsys.readouterr().out


def test_the_same_test_images_are_the_same_split_whatever_was_done_to_them(
    workspace: Path,  # noqa: F811
) -> None:
    """Tuning the normalisation by test figures makes them too good as well."""
    store = Path("data/processed")
    values, made = recipe(), {}
    for name, images in (("scaled", b"one"), ("standardized", b"one"), ("another split", b"two")):
        (store / "test").mkdir(parents=True, exist_ok=True)
        (store / "test/samples.parquet").write_bytes(images)
        info = json.loads((store / "dataset.json").read_text())
        made[name] = info["digest"] = f"{name:x<32}"
        (store / "dataset.json").write_text(json.dumps(info))
        with tracking.stage_run(values, "evaluate") as run:
            run.headline({"test/accuracy": 0.5})
    uri = sqlite(workspace)
    experiments = [parents(uri)[0].info.experiment_id]
    counts = {name: len(recipes_on_test(client(uri), experiments, digest)) for name, digest in made.items()}
    assert counts == {"scaled": 2, "standardized": 2, "another split": 1}


def test_without_a_store_nothing_is_said_and_nothing_is_made(fresh: Path) -> None:  # noqa: F811
    began = time.monotonic()
    assert known_uses(sqlite(fresh), "anneal", DIGEST) is None
    assert time.monotonic() - began < 1 and not (fresh / "mlflow.db").exists()


def test_a_store_that_never_answers_costs_a_bounded_wait(
    fresh: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        values = params.merge(recipe(), {"tracking": {"uri": address}})
        with tracking.stage_run(values, "evaluate") as run:
            began = time.monotonic()
            assert run.test_uses() is None
            assert time.monotonic() - began < PATIENCE_USES + MARGIN
        assert known_uses(address, "anneal", DIGEST, patience=0.5) is None
    assert "Traceback" not in capfd.readouterr().err
