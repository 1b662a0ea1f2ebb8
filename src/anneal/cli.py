"""The few commands that are not stages: their options, and the few lines that call what does the work."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anneal import params
from anneal.params import ParamsError, UserError

if TYPE_CHECKING:
    from anneal.batching import RunPlan
    from anneal.schedules import Course


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on standard error and exit code 1."""
    sys.excepthook = params.excepthook
    parser = _parser()
    options = parser.parse_args(arguments)
    if "run" not in options:
        parser.print_help()
        return 2
    return options.run(options) or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anneal", description="Train image classifiers by the book; see README.md.")
    parser.add_argument("--version", action="version", version=f"anneal {version('anneal')}")
    commands = parser.add_subparsers(metavar="COMMAND")

    check = commands.add_parser("check", help="validate params.yaml and print what it resolves to, without training")
    check.add_argument("--brief", action="store_true", help="print one line where all is well")
    check.add_argument(
        "--plot",
        nargs="?",
        const="studies/schedule.png",
        metavar="FILE",
        help="draw the learning rate of every step (default studies/schedule.png)",
    )
    check.set_defaults(run=_check)

    recipe = commands.add_parser("recipe", help="list ready-made recipes, or write one into params.yaml")
    recipe.add_argument("name", nargs="?", metavar="NAME", help="the recipe to write")
    recipe.set_defaults(run=_recipe)

    test = commands.add_parser("lr-range", help="find a learning rate by a range test; see docs/learning-rate.md")
    test.add_argument("--member", metavar="NAME", help="of ensemble.members; default the first")
    test.add_argument("--start", type=float, metavar="LR", help="lowest rate, default 1e-5")
    test.add_argument("--stop", type=float, metavar="LR", help="highest rate, default 10")
    test.add_argument("--steps", type=int, metavar="N", help="optimizer steps from the one to the other, default 100")
    test.set_defaults(run=_lr_range)

    find = commands.add_parser("microbatch", help="find the largest microbatch that fits a GPU, or a CPU's fastest")
    find.add_argument("--member", metavar="NAME", help="of ensemble.members; default the first")
    find.add_argument("--write", action="store_true", help="write it into params.yaml without asking")
    find.set_defaults(run=_microbatch)

    study = commands.add_parser("study", help="make a phenomenon of training visible; see docs/studies.md")
    study.add_argument("name", nargs="?", metavar="NAME", help="the study to run; without it they are listed")
    study.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each setting (default 3)")
    study.add_argument(
        "--current", action="store_true", help="vary params.yaml on its own data, not a recipe on digits"
    )
    study.add_argument("--fresh", action="store_true", help="forget the runs of an earlier, interrupted call")
    study.set_defaults(run=_study)

    ablate = commands.add_parser("ablate", help="say what each technique of the recipe earns; see docs/ablation.md")
    ablate.add_argument(
        "techniques", nargs="*", metavar="TECHNIQUE", help="default all that are on; --dry-run lists them"
    )
    ablate.add_argument("--add", action="store_true", help="add each alone to a recipe without any")
    ablate.add_argument("--pairs", action="store_true", help="train without each pair too: their interactions")
    ablate.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each variant (default 3)")
    ablate.set_defaults(run=_ablate)

    seeds = commands.add_parser("seeds", help="train n seeds, and say whether a change is real; see docs/seeds.md")
    seeds.add_argument("number", type=int, metavar="N", help="seeds of the recipe, and of the changed one")
    seeds.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="what to change, as in trainer.epochs=20")
    seeds.set_defaults(run=_seeds)
    for command in (ablate, seeds):
        command.add_argument("--jobs", type=int, metavar="N", help="experiments at once (default: as the cores hold)")
        command.add_argument("--member", metavar="NAME", help="whose recipe, where members differ by more than a seed")
        command.add_argument("--dry-run", action="store_true", help="say what would be trained, and how long it takes")

    search = commands.add_parser("search", help="search hyper-parameters on validation; see docs/search.md")
    search.add_argument("--trials", type=int, metavar="N", help="of the study in all, in place of search.trials")
    search.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at a time (default 1)")
    search.add_argument("--study", metavar="NAME", help="in place of search.study")
    search.add_argument("--fresh", action="store_true", help="forget the trials of an earlier call")
    search.add_argument("--show", action="store_true", help="print what was found so far, and run nothing")
    search.add_argument("--force", action="store_true", help="overwrite a recipe of that name that no search wrote")
    search.set_defaults(run=_search)

    diff = commands.add_parser("diff", help="say what differs between two runs in MLflow: params, data, code, ...")
    for letter in ("A", "B"):
        diff.add_argument(
            f"run_{letter.lower()}",
            metavar=f"RUN_{letter}",
            help="a run's id or name, a DVC experiment, a stage such as train@a, latest, latest~1",
        )
    diff.add_argument("--json", action="store_true", help="print JSON")
    diff.set_defaults(run=_diff)

    compare = commands.add_parser("compare", help="say whether two runs predict differently, with interval and test")
    compare.add_argument("a", metavar="A", help="git revision, DVC experiment, or a predictions.parquet")
    compare.add_argument("b", metavar="B", nargs="?", help="the same; what is in the workspace where none is given")
    compare.set_defaults(run=_compare)

    summary = commands.add_parser("summary", help="print the figures of the last run and what to try next")
    summary.set_defaults(run=_summary)

    prune = commands.add_parser("prune", help="remove models of members that params.yaml no longer names")
    prune.set_defaults(run=_prune)

    predict = commands.add_parser("predict", help="label images with the trained predictor")
    predict.add_argument("paths", nargs="+", metavar="PATH", help="files, folders or archives of images")
    predict.add_argument("--csv", action="store_true", help="print CSV with all probabilities instead of a table")
    predict.add_argument("--top", type=int, default=1, metavar="K", help="labels shown an image (default 1)")
    predict.set_defaults(run=_predict)

    sync = commands.add_parser("sync", help="send to MLflow what stages could not send; see docs/mlflow.md")
    sync.add_argument("--moved", action="store_true", help="send what was meant for other addresses to this one too")
    sync.set_defaults(run=_sync)

    ui = commands.add_parser("ui", help="open MLflow on localhost")
    ui.add_argument("--port", type=int, default=5000, metavar="N", help="default 5000")
    ui.set_defaults(run=_ui)
    return parser


# ---- check ----------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    from anneal import recipe
    from anneal.search.space import search_space

    values = params.load()
    checked = recipe.validate(values)
    search_space(checked.search, values, recipe.json_schema())
    lines, courses = _resolved(values, checked)
    if options.brief:
        print("params.yaml is valid")
    else:
        print("params.yaml is valid. It resolves to:\n")
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            print(f"  {name:<{width}}  {text}")
    if options.plot is not None:
        _plot(courses, Path(options.plot))


def _plot(courses: dict[str, Course], path: Path) -> None:
    from anneal.reporting.lines import draw_panels, from_values
    from anneal.schedules import course_panels

    if path.suffix != ".png":
        raise UserError(f"--plot: found {path}, allowed: a file that ends in .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_panels(from_values(course_panels(courses)), path)
    except OSError as error:
        raise UserError(f"--plot: {path}: {error.strerror}") from None
    print(f"drew {path}")


def _resolved(values: dict[str, Any], recipe: Any) -> tuple[list[tuple[str, str]], dict[str, Course]]:
    """Return the derived values, after the checks that need the data or a library's signatures; and members' schedules."""
    from anneal.conflicts import check_recipe
    from anneal.optimizers.config import schedule_for
    from anneal.preprocess import planned_classes
    from anneal.schedules import Course, factor_arguments, scaled_rate
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
    courses: dict[str, Course] = {}
    for name in recipe.ensemble.members:
        merged = params.member(values, name)
        sections = params.parse(merged, {key: type(getattr(recipe, key)) for key in _TRAINING})
        start = sections["model"].start_from
        if start.path is not None and Path("models").resolve() in Path(start.path).resolve().parents:
            raise UserError(
                f"model.start_from.path of member {name}: found {start.path}, which training writes anew, allowed: a copy "
                f"elsewhere, such as by mkdir -p pretrained && cp -r {start.path} pretrained/{Path(start.path).name}"
            )
        try:
            run = check_recipe(
                **sections,
                preprocess=recipe.preprocess,
                num_train=num_train,
                hardware=recipe.hardware,
            )
        except ParamsError as error:
            changed = tuple(f"{section}." for section in recipe.ensemble.members[name] or {})
            prefix = f"ensemble.members.{name}."
            raise ParamsError([prefix + f if f.startswith(changed) else f for f in error.faults]) from None
        batch, schedule = sections["batch"], sections["schedule"]
        optimizer = sections["optimizer"]
        rate = optimizer.arguments["lr"]
        if rate != "auto":
            scaling = {"scaling": batch.lr_scaling, "size": batch.size, "reference_size": batch.reference_size}
            rate = scaled_rate(rate, **scaling)
        total = run.total_steps
        followed = schedule_for(optimizer.name, schedule.model_dump())
        if followed["name"] == "one_cycle" and not optimizer.has_momentum:
            followed["one_cycle"] = {**followed["one_cycle"], "momentum": None}
        arguments = factor_arguments(
            followed, total_steps=total, steps_per_epoch=run.epoch_steps, swa=sections["averaging"].swa_rate
        )
        courses[name] = Course(arguments, None if rate == "auto" else rate, run.epoch_steps)
        lines.append(
            (
                f"member {name}",
                f"seed {merged['seed']}; {sections['model'].name}; {_batch_in_words(run, devices)}, "
                f"{total:,} steps in all; {optimizer.name}, {_in_words(courses[name])}",
            )
        )
        if start.path is not None:
            lines.append(("", _start_in_words(start, run)))
    return lines, courses


def _batch_in_words(run: RunPlan, devices: int) -> str:
    """Say what makes up a batch, and what it grows to."""
    first = run[0]
    text = f"batch {first.size} = {first.microbatch} x {devices} device{'s' * (devices > 1)} x {first.accumulation} accumulated"
    for epoch in range(1, len(run)):
        if run[epoch] != run[epoch - 1]:
            text += f", {run[epoch].size} from epoch {epoch + 1}"
    steps = dict.fromkeys(run.epoch_steps)
    return f"{text}; {', later '.join(f'{number:,}' for number in steps)} steps an epoch"


def _start_in_words(start: Any, run: RunPlan) -> str:
    """Say which weights a member starts from, and when its layers learn."""
    from anneal.models.transfer import freeze_steps

    text = f"starts from {start.path} ({start.sha256[:12]}); "
    steps = freeze_steps(start.freeze, total_steps=run.total_steps, steps_per_epoch=run.epoch_steps)
    if steps is None:
        return text + "the head alone learns"
    if steps == 0:
        return text + "all layers learn"
    then = f"then one layer more each {steps:,}" if start.unfreeze == "gradually" else "then all layers"
    return text + f"the head learns alone for {steps:,} steps, {then}"


def _in_words(course: Course) -> str:
    """Say what the rate will do."""
    from anneal.schedules import factor, momentum_at

    arguments = course.arguments
    name, total = arguments["name"], arguments["total_steps"]
    text = "peak rate " + ("auto" if course.peak is None else f"{course.peak:g}")
    text += f", warm-up {arguments['warmup_steps']} steps, then {name}"
    if name == "plateau":
        curve = arguments["arguments"]
        return f"{text}: x {curve['gamma']:g} after {curve['patience'] + 1} epochs without a lower validation loss"
    end = factor(total - 1, **arguments)
    text += f" to {end:.2g} x peak" if course.peak is None else f" to {course.peak * end:.2g}"
    if (swa := arguments.get("swa")) is not None:
        text += f" with swa's rate from step {swa['edges'][0]:,} on"
    if (momentum := momentum_at(0, **arguments)) is not None:
        text += f", momentum {momentum:g} to {arguments['arguments']['momentum'][1]:g} and back"
    return text


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


# ---- lr-range -------------------------------------------------------------------------------------------------------


def _lr_range(options: argparse.Namespace) -> int:
    from anneal import recipe, tracking

    values = params.load()
    checked = recipe.validate(values)
    name = options.member or next(iter(values["ensemble"]["members"]))
    merged = params.member(values, name)
    sections = params.parse(merged, {key: type(getattr(checked, key)) for key in (*_TRAINING, "hardware")})
    data, augmented = Path("data/processed"), Path("data/augmented")
    for file in (data / "dataset.json", augmented / "policy.json"):
        if not file.exists():
            raise UserError(f"{file}: no such file; run `dvc repro augment` first")
    chosen = {"start": options.start, "stop": options.stop, "num_steps": options.steps}

    from anneal.reporting.lr_range import in_words, write
    from anneal.training.lr_range import lr_range

    with tracking.stage_run(values, "lr-range", member=name) as run:
        result = lr_range(
            name=name,
            store=data,
            augmented=augmented,
            seed=merged["seed"],
            **sections,
            **{key: value for key, value in chosen.items() if value is not None},
        )
        files = write(result, Path("studies/lr-range"), name)
        for step, (lr, loss, smoothed) in enumerate(zip(result.rates, result.losses, result.smoothed, strict=True), 1):
            run.metrics({"lr": lr, "loss": loss, "smoothed": smoothed}, step)
        if result.suggestion is not None:
            run.metrics({"lr_suggestion": result.suggestion})
        else:
            run.tag("verdict", result.reason)
        run.picture("lr-range.png", result.panels())
        run.artifact(files[1])
    optimizer, batch = sections["optimizer"], sections["batch"]
    print(f"{name}: {optimizer.name}, seed {merged['seed']}")
    lr = optimizer.arguments["lr"]
    print(in_words(result, optimizer=optimizer.name, lr=lr, size=batch.size, scaling=batch.lr_scaling))
    print("  wrote " + ", ".join(map(str, files)))
    return int(result.suggestion is None)


# ---- microbatch -----------------------------------------------------------------------------------------------------


def _microbatch(options: argparse.Namespace) -> None:
    from anneal import recipe

    values = params.load()
    checked = recipe.validate(values)
    members = values["ensemble"]["members"]
    name = options.member or next(iter(members))
    merged = params.member(values, name)
    sections = params.parse(merged, {key: type(getattr(checked, key)) for key in (*_TRAINING, "hardware")})

    from anneal.microbatch import find_microbatch

    found = find_microbatch(
        store=Path("data/processed"),
        augmented=Path("data/augmented"),
        seed=merged["seed"],
        **sections,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print("\n".join(found.lines()))
    if found.proposal == found.current:
        return
    key = "batch.microbatch"
    if "batch" in (members[name] or {}):
        key = f"ensemble.members.{name}.{key}"
    if not options.write:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            more = f" --member {options.member}" if options.member else ""
            print(f"\nnothing written; to write it: anneal microbatch{more} --write, or set {key}: {found.proposal}")
            return
        if input(f"\nwrite {key}: {found.proposal} into params.yaml? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing written")
            return
    print(recipe.set_value(key, found.proposal).rstrip())


# ---- study ----------------------------------------------------------------------------------------------------------


def _study(options: argparse.Namespace) -> None:
    from anneal.studies.catalog import STUDIES, estimate, find

    if options.name is None:
        values = params.load()
        width = max(map(len, STUDIES))
        for name, study in STUDIES.items():
            runs, seconds = estimate(study, values, options.seeds)
            print(f"  {name:<{width}}  {study.question}")
            print(f"  {'':<{width}}  {runs} runs, about {seconds:.0f} s on one core")
        print("\nrun one on digits: anneal study NAME; on your own data and recipe: anneal study NAME --current")
        return
    study, values = find(options.name), params.load()

    from anneal.studies.run import run_study

    for line in run_study(study, values, seeds=options.seeds, current=options.current, fresh=options.fresh):
        print(f"- {line}")
    folder = f"studies/{study.name}{'-current' if options.current else ''}"
    print(f"\nsee {folder}/figure.png, {folder}/results.csv and MLflow's run `study {study.name}`; docs/studies.md")


# ---- ablate, seeds --------------------------------------------------------------------------------------------------


def _ablate(options: argparse.Namespace) -> None:
    from anneal.ablation.run import command

    command(options)


def _seeds(options: argparse.Namespace) -> None:
    from anneal.seeds import command

    command(options)


# ---- search ---------------------------------------------------------------------------------------------------------


def _search(options: argparse.Namespace) -> int:
    from anneal.search.run import command

    return command(options)


# ---- diff -----------------------------------------------------------------------------------------------------------


def _diff(options: argparse.Namespace) -> None:
    from anneal.comparison import as_json, as_text, compare
    from anneal.tracking.records import read_runs

    tracking = params.load()["tracking"]
    found = compare(*read_runs(tracking["uri"], tracking["experiment"], [options.run_a, options.run_b]))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(as_json(found) if options.json else as_text(found, colour=colour))


# ---- compare --------------------------------------------------------------------------------------------------------


def _compare(options: argparse.Namespace) -> None:
    from anneal.paired import as_lines, compare_runs, read_predictions

    a, b = (read_predictions(_predictions(name), name or "the workspace") for name in (options.a, options.b))
    print(f"a: {options.a}", f"b: {options.b or 'this workspace'}", *as_lines(compare_runs(a, b)), sep="\n")


def _predictions(name: str | None) -> bytes:
    """Return a predictions.parquet: a file, or what DVC has at a revision or of an experiment."""
    path = Path(name or "reports/predictions.parquet")
    if path.is_file():
        return path.read_bytes()
    if name is None:
        raise UserError(f"{path}: no such file; train first: make repro, or dvc repro")
    import dvc.api

    try:
        found = dvc.api.read("reports/predictions.parquet", rev=name, mode="rb")
    except Exception as error:  # of git, of DVC, of its remotes
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: neither a file nor a revision with reports/predictions.parquet in DVC's cache ({reason})"
        ) from None
    return bytes(found)


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
    if "test" in metrics and (uses := _test_uses()):
        print(f"\n{uses}")
    print("\nnext: `make ui` opens every run in MLflow; edit params.yaml and `make repro` trains again.")
    print("      reports/report.html is the whole story on one page.")


def _test_uses() -> str | None:
    """Return how often the test split was used, as far as MLflow says so in a few seconds."""
    from anneal.tracking.split_uses import known_uses, sentence

    with suppress(UserError, OSError, ValueError, KeyError):
        digest = json.loads(Path("data/processed/dataset.json").read_text(encoding="utf-8"))["digest"]
        tracking = params.load()["tracking"]
        uses = known_uses(tracking["uri"], tracking["experiment"], digest)
        return sentence(uses) if uses else None
    return None


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


# ---- sync -----------------------------------------------------------------------------------------------------------


def _sync(options: argparse.Namespace) -> int:
    from anneal.tracking import TrackingConfig
    from anneal.tracking.sync import sync

    # What else stands in params.yaml may be at fault by now: what is kept goes out all the same.
    config = params.parse(params.read_yaml("params.yaml"), {"tracking": TrackingConfig})["tracking"]
    kept = sync(config.uri, moved=options.moved)
    if not kept:
        print("nothing is kept: MLflow has it all")
    return int(kept > 0)


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
