"""evaluate: predict every split with every member and view, and write the figures and the exported predictor."""

from __future__ import annotations

from pathlib import Path

from anneal import params, tracking
from anneal.ensemble import EnsembleConfig
from anneal.environment import torch_build
from anneal.evaluation import EvaluateConfig, best_device, evaluate, headline, tracked, write_reports
from anneal.inspection import inspect, inspection_metrics, write_inspection
from anneal.store import open_store
from anneal.tracking.split_uses import METRIC, sentence

DATA = Path("data/processed")
REPORTS = Path("reports")
OUTS = [REPORTS / "metrics.json", REPORTS / "predictions.parquet", REPORTS / "evaluation"]


def main() -> None:
    """Read params.yaml, data/processed and the members' models; write `OUTS`."""
    values = params.load()
    sections = params.parse(values, {"evaluate": EvaluateConfig, "ensemble": EnsembleConfig})
    config: EvaluateConfig = sections["evaluate"]
    ensemble: EnsembleConfig = sections["ensemble"]
    device = best_device(values["hardware"]["accelerator"])
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
            select=config.tta.select,
            combine=ensemble.combine,
            calibrate=config.calibration,
            grid=config.grid,
            soups=config.soups,
            num_resamples=config.bootstrap,
            seed=values["seed"],
            device=device,
        )
        run.text("environment/torch.txt", torch_build())
        write_reports(found, REPORTS)
        closer = config.model_dump(include={"mistakes", "label_errors", "near_duplicates", "robustness"})
        inspected = inspect(found, store, members, **closer, seed=values["seed"], device=device)
        write_inspection(inspected, REPORTS / "evaluation")
        metrics = tracked(found.figures)
        run.metrics(metrics | inspection_metrics(inspected))
        run.headline(headline(found.figures))
        run.artifact(REPORTS / "evaluation", "evaluation")
        run.artifact(REPORTS / "metrics.json")
        used = [members[name] for name in found.predictor["members"]]
        files = [folder / name for folder in used for name in ("model.json", "weights.safetensors")]
        of_predictor = {name: value for name, value in metrics.items() if name.count("/") == 1}
        example = store.split("train").take([0, 1])
        uri = run.predictor([REPORTS / "evaluation/predictor.json", *files], example, of_predictor)
        uses = run.test_uses(store.info.digest) if uri and "test" in config.splits else None
        if uses:
            run.headline({METRIC: uses})
    for split, figures in found.figures.items():
        exported = figures["ensemble_tta"]
        low, high = exported["accuracy_ci"]
        print(f"{split}: accuracy {exported['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})")
    if uses:
        print(sentence(uses))


if __name__ == "__main__":
    main()
