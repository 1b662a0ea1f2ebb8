"""diagnose: read what the members' training left behind; write what it shows, one table and one picture of the curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anneal import params, tracking
from anneal.diagnosis.curves import read_run, training_words
from anneal.diagnosis.summary import marks, summarize, words
from anneal.reporting.curves import curves_csv, draw_curves, mean_curves
from anneal.reporting.training import initial_csv, rates_csv
from anneal.store import write_json, write_text

DATA = Path("reports/data.json")
OUTS = [
    *(Path("reports/diagnosis.json"), Path("reports/curves.csv"), Path("reports/curves.png")),
    *(Path("reports/initial.csv"), Path("reports/learning_rate.csv")),
]


def trained_on(values: dict[str, Any], name: str) -> str:
    """Return in which ways a member's training figures are measured on other things than validation's."""
    recipe = params.member(values, name)
    return ", ".join(training_words(recipe["augment"]["policy"], recipe["regularization"]))


def main() -> None:
    """Read params.yaml, the tables in models/<member> and reports/data.json; write `OUTS`."""
    values = params.load()
    with tracking.stage_run(values, "diagnose", outs=OUTS) as run:
        data = json.loads(DATA.read_text(encoding="utf-8"))
        runs = {
            name: read_run(Path("models") / name, recipe=params.member(values, name), data=data)
            for name in values["ensemble"]["members"]
        }
        histories = {name: member.history for name, member in runs.items()}
        summary = summarize(runs)
        write_json(OUTS[0], summary)
        write_text(OUTS[1], curves_csv(histories))
        measured_on = {name: trained_on(values, name) for name in runs}
        draw_curves(histories, OUTS[2], measured_on=measured_on, marks=marks(summary))
        write_text(OUTS[3], initial_csv({name: member.initial for name, member in runs.items()}))
        write_text(OUTS[4], rates_csv({name: member.steps for name, member in runs.items()}))
        run.metrics({f"diagnosis/{name}": float(value) for name, value in summary.items() if isinstance(value, int)})
        run.curves(mean_curves(histories))
        found = words(summary)
        run.tag("findings", "; ".join(found))
        for out in OUTS:
            run.artifact(out, "diagnosis")
    print("\n".join(found))


if __name__ == "__main__":
    main()
