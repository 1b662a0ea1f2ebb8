"""preprocess: decode, resize and split the images, fit the statistics of the training split, draw what that did."""

from __future__ import annotations

from pathlib import Path

from anneal import params, tracking
from anneal.preprocess import PreprocessConfig, SplitConfig, build_store
from anneal.reporting.preprocessing import draw_preprocessing
from anneal.sources import DataConfig, check_outs, open_source
from anneal.store import fresh_folder, open_store, write_json

DATA = Path("data/processed")
REPORT = Path("reports/data.json")
PICTURES = Path("reports/preprocessing")


def main() -> None:
    """Read params.yaml and the raw data; write data/processed, reports/data.json and reports/preprocessing."""
    values = params.load()
    sections = params.parse(values, {"data": DataConfig, "split": SplitConfig, "preprocess": PreprocessConfig})
    data, split, config = sections["data"], sections["split"], sections["preprocess"]
    num_workers = values["hardware"]["num_workers"]
    with tracking.stage_run(values, "preprocess", data=None, outs=[DATA, REPORT, PICTURES]) as run:
        check_outs(data.path)
        source = open_source(data.path, data.format)
        with fresh_folder(DATA) as folder:
            report = build_store(
                source,
                folder,
                seed=values["seed"],
                **config.model_dump(),
                **split.model_dump(),
                **data.model_dump(exclude={"path", "format"}),
                num_workers=None if num_workers == "auto" else num_workers,
            )
        write_json(REPORT, report)
        store = open_store(DATA)
        with fresh_folder(PICTURES) as folder:
            draw_preprocessing(store.split("train"), store.info.classes, config.normalize, store.statistics(), folder)
        run.adopt(DATA)
        run.data_set(DATA)
        run.metrics({f"data/{name}": float(value) for name, value in report.items() if isinstance(value, int)})
        run.artifact(REPORT)
        run.artifact(PICTURES)
    shown = ", ".join(f"{report[name]:,} {name}" for name in ("train", "val", "test"))
    print(f"{shown}; {report['num_classes']} classes; {report['num_rejected']} rejected; see {REPORT}")


if __name__ == "__main__":
    main()
