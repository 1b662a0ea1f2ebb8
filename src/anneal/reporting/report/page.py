"""The page: its sections in order, and page.html around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from anneal.reporting.report import closing, data, mistakes, prediction, result, training
from anneal.reporting.report.blocks import Section
from anneal.reporting.report.inputs import Inputs

SECTIONS: tuple[Callable[[Inputs], Section | None], ...] = (
    result.headline,
    result.look_first,
    data.data,
    data.augmentation,
    training.initialization,
    training.training,
    prediction.gains,
    prediction.views,
    prediction.ensemble,
    prediction.calibration,
    prediction.confusion,
    mistakes.mistakes,
    mistakes.label_errors,
    mistakes.near_duplicates,
    mistakes.robustness,
    closing.cost,
    closing.recipe,
    closing.reproduce,
)
"""In the order of the page; a section without what it is made from is None, and left out."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for the page: no script runs, and nothing is fetched, whatever a class is named."""

TEMPLATE = Path(__file__).with_name("page.html")


def render(inputs: Inputs, execution: Mapping[str, Any] | None = None) -> str:
    """Return the page as HTML, a pure function of its arguments.

    Parameters
    ----------
    inputs
        What the stages wrote.
    execution
        What `anneal.reporting.report.closing.this_execution` takes; a section more. None leaves it out.
    """
    import jinja2

    sections = [section for make in SECTIONS if (section := make(inputs)) is not None]
    if execution:
        sections.append(closing.this_execution(inputs, execution))
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    name = Path(str(inputs.recipe["data"]["path"])).name.split(".")[0]
    return template.render(sections=sections, policy=POLICY, name=name) + "\n"
