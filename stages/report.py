"""report: put the figures, the pictures and the recipe on one self-contained page."""

from __future__ import annotations

import io
from pathlib import Path
from tempfile import TemporaryDirectory

from ruamel.yaml import YAML

from anneal import params, tracking
from anneal.reporting.report.inputs import read_inputs
from anneal.reporting.report.page import render
from anneal.store import write_text

REPORTS = Path("reports")
OUT = REPORTS / "report.html"
SECTIONS = (
    *("seed", "data", "split", "preprocess", "augment", "model", "init", "optimizer", "schedule", "batch", "loss"),
    *("regularization", "averaging", "trainer", "ensemble", "evaluate"),
)
"""What of params.yaml is printed."""


def main() -> None:
    """Read params.yaml and what the other stages reported; write reports/report.html."""
    values = params.load()
    recipe, text, yaml = {name: values[name] for name in SECTIONS}, io.StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = None, 100
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(recipe, text)
    # The folder goes once all of the run is sent.
    with TemporaryDirectory() as folder, tracking.stage_run(values, "report", outs=[OUT]) as run:
        inputs = read_inputs(REPORTS, recipe, text.getvalue())
        write_text(OUT, render(inputs))
        run.link("augment", REPORTS / "augmentation")
        # When and where it ran is no part of an out, but a section more of MLflow's copy.
        copy = Path(folder) / OUT.name
        write_text(copy, render(inputs, run.execution()))
        run.artifact(copy)
    print(f"see {OUT}")


if __name__ == "__main__":
    main()
