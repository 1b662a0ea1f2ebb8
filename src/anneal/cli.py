"""The few commands that are not stages: check, recipe, summary, prune, predict, ui."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anneal import params
from anneal.params import ParamsError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on standard error and exit code 1."""
    sys.excepthook = params.excepthook
    parser = _parser()
    options = parser.parse_args(arguments)
    if "run" not in options:
        parser.print_help()
        return 2
    options.run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anneal", description="Train image classifiers by the book; see README.md.")
    parser.add_argument("--version", action="version", version=f"anneal {version('anneal')}")
    commands = parser.add_subparsers(metavar="COMMAND")

    check = commands.add_parser("check", help="validate params.yaml and print what it resolves to, without training")
    check.add_argument("--brief", action="store_true", help="print one line where all is well")
    check.set_defaults(run=_check)

    recipe = commands.add_parser("recipe", help="list ready-made recipes, or write one into params.yaml")
    recipe.add_argument("name", nargs="?", metavar="NAME", help="the recipe to write")
    recipe.set_defaults(run=_recipe)

    summary = commands.add_parser("summary", help="print the figures of the last run and what to try next")
    summary.set_defaults(run=_summary)

    prune = commands.add_parser("prune", help="remove models of members that params.yaml no longer names")
    prune.set_defaults(run=_prune)

    predict = commands.add_parser("predict", help="label images with the trained predictor")
    predict.add_argument("paths", nargs="+", metavar="PATH", help="files, folders or archives of images")
    predict.add_argument("--csv", action="store_true", help="print CSV with all probabilities instead of a table")
    predict.add_argument("--top", type=int, default=1, metavar="K", help="labels shown an image (default 1)")
    predict.set_defaults(run=_predict)

    ui = commands.add_parser("ui", help="open MLflow on localhost")
    ui.add_argument("--port", type=int, default=5000, metavar="N", help="default 5000")
    ui.set_defaults(run=_ui)
    return parser


# ---- check ----------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    from anneal import recipe

    values = params.load()
    checked = recipe.validate(values)
    lines = _resolved(values, checked)
    if options.brief:
        print("params.yaml is valid")
    else:
        print("params.yaml is valid. It resolves to:\n")
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            print(f"  {name:<{width}}  {text}")


def _resolved(values: dict[str, Any], recipe: Any) -> list[tuple[str, str]]:
    """Return the derived values, after the checks that need the data or a library's signatures."""
    from anneal.batching import plan_run
    from anneal.conflicts import check_recipe
    from anneal.preprocess import planned_classes
    from anneal.schedules import length_in_steps, scaled_rate
    from anneal.sources import check_outs, open_source

    if not isinstance(recipe.augment.policy, str):
        from anneal.augment import check_policy

        check_policy(recipe.augment.policy)
    check_outs(recipe.data.path)
    source = open_source(recipe.data.path, recipe.data.format)
    planned = planned_classes(source, val=recipe.split.val, test=recipe.split.test, limit=recipe.data.limit)
    counts = {split: sum(classes.values()) for split, classes in planned.items()}
    devices = recipe.hardware.devices if isinstance(recipe.hardware.devices, int) else 1
    num_train, num_classes = counts["train"], len(source.classes)
    if recipe.augment.copies.balance:
        num_train = num_classes * max(planned["train"].values())
    lines = [
        ("data", f"{recipe.data.path} ({source.format}): {_counted(counts)}; {num_classes} classes"),
        ("images", f"{recipe.preprocess.size} x {recipe.preprocess.size}, {recipe.preprocess.normalize}"),
    ]
    for name in recipe.ensemble.members:
        merged = params.member(values, name)
        sections = params.parse(merged, {key: type(getattr(recipe, key)) for key in _TRAINING})
        try:
            check_recipe(
                model=sections["model"],
                schedule=sections["schedule"],
                batch=sections["batch"],
                regularization=sections["regularization"],
                trainer=sections["trainer"],
                preprocess=recipe.preprocess,
                num_train=num_train,
                hardware=recipe.hardware,
            )
        except ParamsError as error:
            changed = tuple(f"{section}." for section in recipe.ensemble.members[name] or {})
            prefix = f"ensemble.members.{name}."
            raise ParamsError([prefix + f if f.startswith(changed) else f for f in error.faults]) from None
        batch, schedule = sections["batch"], sections["schedule"]
        run = plan_run(
            size=batch.size,
            microbatch=batch.microbatch,
            devices=devices,
            num_nodes=recipe.hardware.num_nodes,
            num_samples=num_train,
            epochs=sections["trainer"].epochs,
            growth_at=batch.growth.at,
            growth_factor=batch.growth.factor,
        )
        optimizer = sections["optimizer"]
        rate = optimizer.arguments["lr"]
        if rate != "auto":
            scaling = {"scaling": batch.lr_scaling, "size": batch.size, "reference_size": batch.reference_size}
            rate = f"{scaled_rate(rate, **scaling):g}"
        total = run.total_steps
        warmup = length_in_steps(schedule.warmup.length, total_steps=total, steps_per_epoch=run.epoch_steps)
        lines.append(
            (
                f"member {name}",
                f"seed {merged['seed']}; {sections['model'].name}; batch {batch.size} = {batch.microbatch} x {devices} "
                f"device{'s' * (devices > 1)} x {run[0].accumulation} accumulated; {run[0].steps_per_epoch:,} steps an epoch, "
                f"{total:,} steps in all; {optimizer.name}, peak rate {rate}, warm-up {warmup} steps, then {schedule.name}",
            )
        )
    return lines


_TRAINING = [name for name in params.MEMBER_SECTIONS if name != "seed"]


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


# ---- recipe ---------------------------------------------------------------------------------------------------------


def _recipe(options: argparse.Namespace) -> None:
    from anneal import recipe

    if options.name is None:
        found = recipe.shipped()
        width = max(map(len, found), default=0)
        for name, text in found.items():
            print(f"  {name:<{width}}  {text}")
        print("\nwrite one into params.yaml: anneal recipe NAME")
        return
    diff = recipe.apply(options.name)
    print(diff.rstrip() or f"params.yaml already says what recipe {options.name} says")
    path = params.read_yaml("params.yaml")["data"]["path"]
    if not Path(path).exists():
        print(f"\nnext: put your images at {path}, or set data.path; docs/data.md says how")


# ---- summary --------------------------------------------------------------------------------------------------------

_FIGURES = {
    "single": "one member, mean",
    "tta": "one member, TTA, mean",
    "ensemble": "ensemble",
    "ensemble_tta": "exported: ensemble, TTA",
}


def _summary(_: argparse.Namespace) -> None:
    try:
        metrics = json.loads(Path("reports/metrics.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("reports/metrics.json: no such file; train first: make repro, or dvc repro") from None
    for split, figures in metrics.items():
        print(f"\n{split:<26}  accuracy  95 % interval    macro F1     NLL     ECE")
        for key, label in _FIGURES.items():
            figure = figures[key]
            low, high = figure["accuracy_ci"]
            print(
                f"  {label:<24}    {figure['accuracy']:.4f}  {low:.4f}-{high:.4f}"
                f"      {figure['macro_f1']:.4f}  {figure['nll']:.4f}  {figure['ece']:.4f}"
            )
    print("\nnext: `make ui` opens every run in MLflow; edit params.yaml and `make repro` trains again.")
    print("      reports/report.html is the whole story on one page.")


# ---- prune ----------------------------------------------------------------------------------------------------------


def _prune(_: argparse.Namespace) -> None:
    """Remove what `dvc.lock` records of former members; what DVC's cache does not hold in the same bytes stays."""
    from anneal.tracking import dvc_hash

    members = params.load()["ensemble"]["members"]
    lock = Path("dvc.lock")
    recorded = params.read_yaml(lock).get("stages", {}) if lock.exists() else {}
    former = [name for name in recorded if name.startswith("train@") and name.removeprefix("train@") not in members]
    if not former:
        return
    from dvc.utils.serialize import modify_yaml

    with modify_yaml("dvc.lock") as values:
        for name in former:
            for out in recorded[name].get("outs", []):
                path, md5 = Path(out["path"]), out["md5"]
                if not path.exists():
                    continue
                if dvc_hash(path) != md5 or not Path(".dvc/cache/files/md5", md5[:2], md5[2:]).exists():
                    print(f"kept {path}: ensemble.members no longer names it, but DVC's cache does not hold it")
                    continue
                shutil.rmtree(path)
                print(f"removed {path}: ensemble.members no longer names it; DVC's cache still has it")
            del values["stages"][name]


# ---- predict --------------------------------------------------------------------------------------------------------


def _predict(options: argparse.Namespace) -> None:
    from anneal.serving import load_predictor, print_predictions

    if options.top < 1:
        raise UserError(f"--top: found {options.top}, allowed: a whole number >= 1")
    limit = params.load()["data"]["max_pixels"]
    print_predictions(load_predictor(Path(".")), options.paths, csv=options.csv, top=options.top, max_pixels=limit)


# ---- ui -------------------------------------------------------------------------------------------------------------


def _ui(options: argparse.Namespace) -> None:
    from anneal.tracking import ui_command, ui_page

    tracking = params.load()["tracking"]
    command, environment = ui_command(tracking["uri"], port=options.port)
    page = ui_page(tracking["uri"], tracking["experiment"], f"http://127.0.0.1:{options.port}")
    print(f"MLflow starts (Ctrl-C stops it); open\n\n  {page}\n", flush=True)
    os.execvpe(command[0], command, {**os.environ, **environment})


if __name__ == "__main__":
    sys.exit(main())
