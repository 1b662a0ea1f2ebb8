"""Train one member: data/processed, data/augmented -> models/MEMBER."""

import sys
from pathlib import Path

from anneal import params, tracking
from anneal.batching import BatchConfig
from anneal.models.config import InitConfig, ModelConfig
from anneal.optimizers.config import OptimizerConfig
from anneal.params import Strict
from anneal.schedules import ScheduleConfig
from anneal.training.config import (
    AveragingConfig,
    HardwareConfig,
    LossConfig,
    RegularizationConfig,
    TrainerConfig,
)

SECTIONS: dict[str, type[Strict]] = {
    "model": ModelConfig,
    "init": InitConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "batch": BatchConfig,
    "loss": LossConfig,
    "regularization": RegularizationConfig,
    "averaging": AveragingConfig,
    "trainer": TrainerConfig,
    "hardware": HardwareConfig,
}


def main(member: str) -> None:
    """Train ``member`` of ``ensemble.members``."""
    values = params.load()
    merged = params.member(values, member)
    sections = params.parse(merged, SECTIONS)

    from anneal.models.initial_statistics import statistics_panels
    from anneal.training.fit import fit
    from anneal.training.schedule import ScheduleCurve

    out = Path("models") / member
    with tracking.stage_run(values, "train", member=member, outs=[out]) as run:
        result = fit(
            name=member,
            store=Path("data/processed"),
            augmented=Path("data/augmented"),
            out=out,
            seed=merged["seed"],
            log=run.metrics,
            callbacks=(ScheduleCurve(run.picture),),
            **sections,
        )
        if result.is_main:
            run.metrics(result.facts)
            if result.range_test is not None:
                run.picture("lr-range.png", result.range_test.panels())
            run.picture("initial.png", statistics_panels(result.initial), "before the first step")
            run.tag("initial.findings", " | ".join(result.initial_findings) or "none")
            run.tag("train.measured_on", result.measured_on)
            run.tag("weights", result.weights)
            if (start := sections["model"].start_from).path is not None:
                run.tag("start_from", f"{start.path} {start.sha256[:12]}")
            run.tag("threads", result.threads)
            run.tag("devices", f"{result.devices} {result.accelerator}")
            run.artifact(out / "model.json")
            for table in ("history.csv", "steps.csv", "layers.csv", "initial.csv"):
                run.artifact(out / table)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise params.UserError("usage: python -m stages.train MEMBER, one of ensemble.members")
    main(sys.argv[1])
