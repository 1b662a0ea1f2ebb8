"""What comes out of a study: a figure, two tables, its conclusions, and the words of its MLflow run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anneal import params, tracking
from anneal.reporting.lines import draw_panels
from anneal.store import write_text
from anneal.studies.study import Job, Result, Results, Study, varied


def track(tracked: tracking.Run, job: Job, result: Result, *, keys: Sequence[str], began: int, ended: int) -> None:
    """Log a run below the study's: the params that the study varies, metrics by epoch, the training loss by step."""
    flat = params.flatten(job.recipe)
    series: list[dict[str, Any]] = [
        {"step": int(epoch["step"]), "values": {k: v for k, v in epoch.items() if k not in ("epoch", "step")}}
        for epoch in result.epochs
    ]
    series += [{"step": step, "values": {"step/loss": loss}} for step, _, loss in result.steps]
    tracked.child(
        f"{job.point.label} · seed {result.seed}",
        key=job.key,
        params={"seed": result.seed, **{name: flat[name] for name in keys if name in flat}},
        tags={"point": job.point.label, "diverged": str(result.diverged).lower()},
        series=series,
        began=began,
        ended=ended,
    )


def write_outputs(
    study: Study,
    folder: Path,
    jobs: Sequence[Job],
    results: Results,
    conclusions: Sequence[str],
    base: Mapping[str, Any],
) -> None:
    """Write the figure, the two tables and the conclusions, each whole or not at all."""
    keys = varied(jobs)
    rows = []
    for job, result in zip(jobs, results, strict=True):
        flat = params.flatten(job.recipe)
        rows.append(
            {
                "point": result.point.label,
                "seed": result.seed,
                **{key: flat.get(key) for key in keys},
                "steps": int(result.epochs[-1]["step"]) if result.epochs else "",
                "train_loss": cell(result.final("train/loss")),
                "val_loss": cell(result.final("val/loss")),
                "val_accuracy": cell(result.final("val/accuracy")),
                "best_val_loss": cell(result.best("val/loss")),
                "best_val_accuracy": cell(result.best("val/accuracy")),
                "diverged": str(result.diverged).lower(),
                "images_per_second": round(result.images_per_second) if result.images_per_second else "",
            }
        )
    write_text(folder / "results.csv", table(rows))
    curves = [
        {
            "point": result.point.label,
            "seed": result.seed,
            **{name.replace("/", "_"): value for name, value in epoch.items()},
        }
        for result in results
        for epoch in result.epochs
    ]
    write_text(folder / "curves.csv", table(curves))
    write_text(folder / "conclusions.txt", "\n".join([study.question, "", *conclusions]) + "\n")
    seeds = len({result.seed for result in results})
    networks = " and ".join(dict.fromkeys(job.recipe["model"]["name"] for job in jobs))
    title = (
        f"{study.name}: {study.question}\n{data_name(base)}, {networks}, validation split; "
        f"mean of {seeds} seed{'s' * (seeds > 1)}" + (", band from lowest to highest" if seeds > 1 else "")
    )
    temporary = folder / "figure.png.tmp"
    draw_panels(study.draw(results), temporary, title)
    temporary.replace(folder / "figure.png")


def data_name(base: Mapping[str, Any]) -> str:
    """Return the data's name for a title."""
    return Path(base["data"]["path"]).name.split(".")[0]


def cell(value: float) -> float | str:
    """Return a number for a table, ``inf`` and an empty cell included."""
    return "" if math.isnan(value) else value


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    r"""Return rows as CSV text, with the columns of all of them in the order in which they first come.

    >>> table([{"a": 1}, {"a": 2, "b": None}])
    'a,b\n1,\n2,\n'
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def summary(results: Results) -> dict[str, float]:
    """Return the figures of the study's own run."""
    losses = [loss for result in results if math.isfinite(loss := result.final("val/loss"))]
    found = {"study/runs": float(len(results)), "study/diverged": float(sum(r.diverged for r in results))}
    return found | ({"study/lowest_val_loss": min(losses)} if losses else {})


def describe(study: Study, conclusions: Sequence[str], *, current: bool, seeds: int) -> str:
    """Return the text of the study's run in Markdown."""
    command = f"anneal study {study.name}" + (" --current" if current else "") + f" --seeds {seeds}"
    return "\n".join(
        [f"**{study.question}**", "", f"`{command}`, validation split", "", *(f"- {c}" for c in conclusions)]
    )
