"""augment: compile the policy, try it on the data's geometry, draw what it does, write extra copies of small classes."""

from __future__ import annotations

from pathlib import Path

from anneal import params, tracking
from anneal.augment import AugmentConfig, compile_policy, policy_to_json, transform_names, write_copies
from anneal.reporting.augmentation import draw_preview
from anneal.store import fresh_folder, open_store, write_text

DATA = Path("data/processed")
AUGMENTED = Path("data/augmented")
PREVIEW = Path("reports/augmentation")


def main() -> None:
    """Read params.yaml and data/processed; write data/augmented and reports/augmentation."""
    values = params.load()
    config: AugmentConfig = params.parse(values, {"augment": AugmentConfig})["augment"]
    seed = values["seed"]
    store = open_store(DATA)
    info, train = store.info, store.split("train")
    compose = compile_policy(config.policy, height=info.height, width=info.width, channels=info.channels)
    with tracking.stage_run(values, "augment", data=DATA, outs=[AUGMENTED, PREVIEW]) as run:
        with fresh_folder(AUGMENTED) as folder:
            write_text(folder / "policy.json", policy_to_json(compose))
            if config.copies.balance:
                copies = write_copies(compose, train, folder / "extra", num_classes=len(info.classes), seed=seed)
                run.metrics({"augment/copies": float(sum(copies.values()))})
                print(f"copies: {sum(copies.values())} of {len(copies)} classes, up to the largest")
        with fresh_folder(PREVIEW) as folder:
            draw_preview(compose, train, info.classes, folder, seed=seed)
        run.artifact(AUGMENTED / "policy.json", "augmentation")
        run.artifact(PREVIEW / "overview.png", "augmentation")
    print(f"policy: {', '.join(transform_names(compose)) or 'none'}; preview in {PREVIEW}/overview.png")


if __name__ == "__main__":
    main()
