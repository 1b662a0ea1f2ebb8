"""Train one member: data/processed, data/augmented -> models/MEMBER."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anneal import params, tracking
from anneal.environment import torch_build
from anneal.training.interruption import Interrupted
from anneal.training.sections import SECTIONS
from anneal.training.state import Fingerprint, RunState, claimed, fingerprint

DATA = Path("data/processed")
AUGMENTED = Path("data/augmented")
STATE = Path(".anneal/train")
"""Outside the outs, which DVC deletes before a stage runs."""


def main(member: str) -> None:
    """Train ``member`` of ``ensemble.members``."""
    values = params.load()
    merged = params.member(values, member)
    sections = params.parse(merged, SECTIONS)
    from anneal.models.initial_statistics import statistics_panels
    from anneal.training.fit import fit
    from anneal.training.schedule import ScheduleCurve

    out = Path("models") / member
    state = RunState(STATE / member, fingerprint_of(merged))
    with claimed(state.folder, member):
        with tracking.stage_run(values, "train", member=member, outs=[out], resume=state.begin()) as run:
            result = fit(
                name=member,
                store=DATA,
                augmented=AUGMENTED,
                out=out,
                seed=merged["seed"],
                state=state,
                log=run.metrics,
                tell=run.tag,
                callbacks=(ScheduleCurve(run.picture),),
                **sections,
            )
            if result.is_main:
                run.text("environment/torch.txt", torch_build())
                run.metrics(result.facts)
                if result.range_test is not None:
                    run.picture("lr-range.png", result.range_test.panels())
                run.picture("initial.png", statistics_panels(result.initial), "before the first step")
                for key, value in result.tags.items():
                    run.tag(key, value)
                if (start := sections["model"].start_from).path is not None:
                    run.tag("start_from", f"{start.path} {start.sha256[:12]}")
                run.artifact(out / "model.json")
                for table in ("history.csv", "steps.csv", "layers.csv", "initial.csv"):
                    run.artifact(out / table)
        if result.is_main:
            state.forget()


def fingerprint_of(recipe: Mapping[str, Any]) -> Fingerprint:
    """Return a member's fingerprint: over what dvc.yaml has as params and deps of its stage."""
    deps = [Path(dep) for dep in params.read_yaml("dvc.yaml")["stages"]["train"]["do"]["deps"]]
    return fingerprint(
        {key: recipe[key] for key in params.MEMBER_SECTIONS},
        data=[DATA / "dataset.json", AUGMENTED],  # the first has a digest of the whole store
        code=[dep for dep in deps if dep not in (DATA, AUGMENTED)],
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise params.UserError("usage: python -m stages.train MEMBER, one of ensemble.members")
    try:
        main(sys.argv[1])
    except Interrupted as stop:
        print(f"{sys.argv[1]}: stopped; `dvc repro` goes on from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(stop.exit_code)  # at once: to take its modules down takes the interpreter seconds
