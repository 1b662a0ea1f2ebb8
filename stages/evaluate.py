"""evaluate: predict every split with every member and view, and write the figures and the exported predictor."""

from __future__ import annotations

from pathlib import Path

from anneal import params, tracking
from anneal.ensemble import EnsembleConfig
from anneal.environment import torch_build
from anneal.evaluation import EvaluateConfig, best_device, evaluate, headline, tracked, write_reports
from anneal.store import open_store

DATA = Path("data/processed")
REPORTS = Path("reports")
OUTS = [REPORTS / "metrics.json", REPORTS / "predictions.parquet", REPORTS / "evaluation"]


def main() -> None:
    """Read params.yaml, data/processed and the members' models; write `OUTS`."""
    values = params.load()
    sections = params.parse(values, {"evaluate": EvaluateConfig, "ensemble": EnsembleConfig})
    config: EvaluateConfig = sections["evaluate"]
    ensemble: EnsembleConfig = sections["ensemble"]
    members = {name: Path("models") / name for name in ensemble.members}
    with tracking.stage_run(values, "evaluate", data=DATA, outs=OUTS) as run:
        run.link("preprocess", DATA)
        for name, folder in members.items():
            run.link("train", folder, member=name)
        store = open_store(DATA)
        found = evaluate(
            store,
            members,
            splits=config.splits,
            tta_views=config.tta.views,
            average=config.tta.average,
            combine=ensemble.combine,
            calibrate=config.calibration,
            num_resamples=config.bootstrap,
            seed=values["seed"],
            device=best_device(values["hardware"]["accelerator"]),
        )
        run.text("environment/torch.txt", torch_build())
        write_reports(found, REPORTS)
        metrics = tracked(found.figures)
        run.metrics(metrics)
        run.headline(headline(found.figures))
        run.artifact(REPORTS / "evaluation", "evaluation")
        run.artifact(REPORTS / "metrics.json")
        files = [folder / name for folder in members.values() for name in ("model.json", "weights.safetensors")]
        of_predictor = {name: value for name, value in metrics.items() if name.count("/") == 1}
        run.predictor([REPORTS / "evaluation/predictor.json", *files], store.split("train").take([0, 1]), of_predictor)
    for split, figures in found.figures.items():
        exported = figures["ensemble_tta"]
        low, high = exported["accuracy_ci"]
        print(f"{split}: accuracy {exported['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()
