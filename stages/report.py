"""report: put the figures, the pictures and the recipe on one self-contained page."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from anneal import params, tracking
from anneal.reporting.html import render
from anneal.store import write_text

REPORTS = Path("reports")
OUT = REPORTS / "report.html"
PICTURES = {
    "augmentation": REPORTS / "augmentation/overview.png",
    "curves": REPORTS / "curves.png",
    "confusion": REPORTS / "evaluation/confusion.png",
}
SECTIONS = (
    *("seed", "data", "split", "preprocess", "augment", "model", "init", "optimizer", "schedule", "batch", "loss"),
    *("regularization", "averaging", "trainer", "ensemble", "evaluate"),
)
"""What of params.yaml is printed."""


def read(name: str) -> Any:
    """Return a JSON file below reports/."""
    try:
        return json.loads((REPORTS / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise params.UserError(f"{REPORTS / name}: no such file; run `dvc repro report`") from None
    except ValueError as error:
        raise params.UserError(f"{REPORTS / name} is damaged ({error}); run `dvc checkout`") from None


def main() -> None:
    """Read params.yaml and what the other stages reported; write reports/report.html."""
    values = params.load()
    recipe, yaml = io.StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = None, 100
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump({name: values[name] for name in SECTIONS}, recipe)
    with tracking.stage_run(values, "report", outs=[OUT]) as run:
        page = render(
            metrics=read("metrics.json"),
            data=read("data.json"),
            diagnosis=read("diagnosis.json"),
            warnings=read("evaluation/warnings.json"),
            recipe=recipe.getvalue(),
            pictures={name: path.read_bytes() for name, path in PICTURES.items() if path.exists()},
        )
        write_text(OUT, page)
        run.link("augment", REPORTS / "augmentation")
        run.artifact(OUT)
    print(f"see {OUT}")


if __name__ == "__main__":
    main()
