"""diagnose: read the members' learning curves; write what they show, one table and one picture of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anneal import params, tracking
from anneal.diagnosis import Run, read_history, summarize, training_words
from anneal.reporting.curves import curves_csv, draw_curves, mean_curves
from anneal.store import write_json, write_text

DATA = Path("reports/data.json")
OUTS = [Path("reports/diagnosis.json"), Path("reports/curves.csv"), Path("reports/curves.png")]


def read_run(values: dict[str, Any], name: str, data: dict[str, Any]) -> Run:
    """Return one member's curves with what its recipe says about reading them."""
    recipe = params.member(values, name)
    words = trained_on(values, name)
    return Run(
        read_history(Path("models") / name / "history.csv"),
        num_val=data["val"],
        num_classes=data["num_classes"],
        optimizer=recipe["optimizer"]["name"],
        model=recipe["model"]["name"],
        distorted=set(words) - {"smoothed"} != set(),
        mixed="mixed" in words,
    )


def trained_on(values: dict[str, Any], name: str) -> list[str]:
    """Return in which ways a member's training figures are measured on other things than validation's."""
    recipe = params.member(values, name)
    return training_words(recipe["augment"]["policy"], recipe["regularization"])


def main() -> None:
    """Read params.yaml, models/<member>/history.csv and reports/data.json; write `OUTS`."""
    values = params.load()
    with tracking.stage_run(values, "diagnose", outs=OUTS) as run:
        data = json.loads(DATA.read_text(encoding="utf-8"))
        runs = {name: read_run(values, name, data) for name in values["ensemble"]["members"]}
        histories = {name: member.history for name, member in runs.items()}
        summary = summarize(runs)
        write_json(OUTS[0], summary)
        write_text(OUTS[1], curves_csv(histories))
        draw_curves(histories, OUTS[2], measured_on={name: ", ".join(trained_on(values, name)) for name in runs})
        run.metrics({f"diagnosis/{name}": float(value) for name, value in summary.items() if isinstance(value, int)})
        run.curves(mean_curves(histories))
        for out in OUTS:
            run.artifact(out, "diagnosis")
    for name, member in summary["members"].items():
        found = [f"{finding['name']} ({finding['confidence']} confidence)" for finding in member["findings"]]
        print(f"{name}: {', '.join(found) or 'healthy'}")


if __name__ == "__main__":
    main()
