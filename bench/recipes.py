"""Measure a recipe: accuracy of single members over seeds, of the whole pipeline, and minutes; the figures of docs/recipes.md.

    python bench/recipes.py NAME [--seeds 0 1 2] [--data PATH] [--keep FOLDER]
    python bench/recipes.py --table

The recipe runs in a clone of this checkout's last commit: first its own pipeline, stage after stage, so that each member
has the machine to itself; then further members, one for each of ``--seeds`` that it lacks, for the mean and the spread of
single members. Every finished step is kept in FOLDER (below the temporary folder unless given): killed and started
again, the script goes on with the step that was running. The result is bench/results/recipes/NAME.json; ``--table``, and
every run at its end, writes the table of all results into docs/recipes.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anneal import params
from anneal.params import UserError
from anneal.store import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "recipes"
PAGE = ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- measured: bench/recipes.py writes this -->\n", "<!-- end -->\n"
FIGURES = ("accuracy", "macro_accuracy")
KINDS = ("tta", "ensemble", "ensemble_tta")


# ---- the clone ------------------------------------------------------------------------------------------------------


def command(clone: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the clone, with the clone's code, this environment's programs and no settings from outside."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_", "OMP_", "PYTHON"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(clone / "src"),
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(clone.parent / "dvc-site"),
    }
    # Progress goes to the terminal; what DVC says it ran is read.
    done = subprocess.run(words, cwd=clone, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(words)} in {clone} ended with {done.returncode}\n{done.stdout}")
    return done


def make_clone(folder: Path) -> Path:
    """Return the clone in ``folder``, made of this checkout's last commit where there is none yet."""
    clone = folder / "anneal"
    if clone.is_dir():
        heads = [
            subprocess.run(["git", "rev-parse", "HEAD"], cwd=at, capture_output=True, text=True, check=True).stdout
            for at in (clone, ROOT)
        ]
        if heads[0] != heads[1]:
            print(
                f"warning: {folder} goes on with commit {heads[0][:12]}; remove it to measure {heads[1][:12]}",
                file=sys.stderr,
            )
        return clone
    half = folder / "anneal.half"
    shutil.rmtree(half, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(half)], check=True)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if changed.stdout:
        print("warning: changes that are not committed are not measured", file=sys.stderr)
    half.rename(clone)
    return clone


def set_value(clone: Path, key: str, value: Any) -> None:
    """Write one value into the clone's params.yaml."""
    code = "import json, sys; from anneal.recipe import set_value; set_value(sys.argv[1], json.loads(sys.argv[2]))"
    command(clone, "python", "-c", code, key, json.dumps(value))


def point_to_data(clone: Path, data: str | None) -> None:
    """Set ``data.path``: to ``data``, or to this checkout's own folder where git does not bring it."""
    path = params.read_yaml(clone / "params.yaml")["data"]["path"]
    if data is None and (clone / path).is_file():
        return
    found = Path(data) if data is not None else ROOT / path
    if not found.exists():
        raise UserError(f"{found}: no such data; name it: --data PATH")
    set_value(clone, "data.path", str(found.resolve()))


# ---- steps ----------------------------------------------------------------------------------------------------------


def run_stage(clone: Path, stage: str) -> float:
    """Run one stage and return its seconds; a stage that had finished before its time was kept runs again."""
    for force in ([], ["--force"]):
        start = time.perf_counter()
        done = command(clone, "dvc", "repro", "--single-item", *force, stage)
        if f"Running stage '{stage}'" in done.stdout:
            return time.perf_counter() - start
    raise AssertionError(f"{stage} did not run")


def further_members(values: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Return a member for each seed that none of the recipe's has; otherwise like its first.

    >>> further_members({"seed": 0, "ensemble": {"members": {"a": None, "b": {"seed": 1}}}}, [0, 1, 2])
    {'seed2': {'seed': 2}}
    """
    members = values["ensemble"]["members"]
    own = {(overrides or {}).get("seed", values["seed"]) for overrides in members.values()}
    first = next(iter(members.values())) or {}
    return {f"seed{seed}": {**first, "seed": seed} for seed in seeds if seed not in own}


def measure(name: str, *, seeds: Sequence[int], data: str | None, folder: Path) -> dict[str, Any]:
    """Run what has not run yet, and return what bench/results/recipes/NAME.json holds."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "steps.json"

    def keep() -> None:
        # Not write_json, which sorts keys: the order of the members is the recipe's.
        write_text(kept, json.dumps(state, indent=2) + "\n")

    state: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"seconds": {}}
    seconds: dict[str, float] = state["seconds"]
    clone = make_clone(folder)
    file = clone / "params.yaml"

    def step(stage: str, label: str | None = None) -> None:
        label = label or stage
        if label not in seconds:
            seconds[label] = run_stage(clone, stage)
            keep()
            print(f"{name}: {label} took {seconds[label] / 60:.2f} minutes", flush=True)

    if "values" not in state:
        command(clone, "git", "checkout", "--quiet", "--", "params.yaml")
        command(clone, "anneal", "recipe", name)
        point_to_data(clone, data)
        state["values"] = params.read_yaml(file)
        keep()
    values = state["values"]
    if data is not None and values["data"]["path"] != str(Path(data).resolve()):
        raise UserError(
            f"--data: found {data}, but {folder} was begun with {values['data']['path']}; remove the folder"
        )
    members = values["ensemble"]["members"]
    pipeline = ["preprocess", "augment", *(f"train@{m}" for m in members), "diagnose", "evaluate", "report"]
    if "figures" not in state:
        set_value(clone, "ensemble.members", members)
        for stage in pipeline:
            step(stage)
        state["figures"] = json.loads((clone / "reports/metrics.json").read_text(encoding="utf-8"))
        keep()
    singles = state["figures"]["test"]["members"]
    further = further_members(values, seeds)
    if further:
        set_value(clone, "ensemble.members", {**members, **further})
        for member in further:
            step(f"train@{member}")
        label = f"evaluate with {', '.join(further)}"
        step("evaluate", label)
        evaluated = state.setdefault("singles", {})
        if label not in evaluated:
            figures = json.loads((clone / "reports/metrics.json").read_text(encoding="utf-8"))
            evaluated[label] = figures["test"]["members"]
            keep()
        singles = evaluated[label]
    commit = command(clone, "git", "rev-parse", "--short=12", "HEAD").stdout.strip()
    return summary(name, state["figures"]["test"], singles, seconds, pipeline) | {
        "commit": commit,
        "machine": machine(),
    }


def summary(
    name: str,
    figures: Mapping[str, Any],
    singles: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
    pipeline: Sequence[str],
) -> dict[str, Any]:
    """Return the result without where it was measured.

    Parameters
    ----------
    name
        Of the recipe.
    figures
        Of the test split after the recipe's own pipeline: ``single``, ``tta``, ``ensemble``, ``ensemble_tta``.
    singles
        Member to figures of the test split, those of further seeds too.
    seconds
        Of each step.
    pipeline
        Steps of the recipe's own pipeline.
    """
    of_members = {
        member: {figure: round(found[figure], 5) for figure in FIGURES}
        | {"minutes": round(seconds[f"train@{member}"] / 60, 2)}
        for member, found in singles.items()
    }
    columns = {key: [row[key] for row in of_members.values()] for key in (*FIGURES, "minutes")}
    return {
        "recipe": name,
        "members": of_members,
        "single": {"n": len(of_members)}
        | {key: round(statistics.mean(column), 5) for key, column in columns.items()}
        | {
            f"{key}_std": round(statistics.stdev(column), 5) if len(column) > 1 else None
            for key, column in columns.items()
        },
        "pipeline": {"members": sum(step.startswith("train@") for step in pipeline)}
        | {"minutes": round(sum(seconds[step] for step in pipeline) / 60, 2)}
        | {
            kind: {figure: round(figures[kind][figure], 5) for figure in FIGURES}
            | {"accuracy_ci": [round(bound, 5) for bound in figures[kind]["accuracy_ci"]]}
            for kind in KINDS
        },
    }


def machine() -> dict[str, Any]:
    """Return what a time depends on."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cores": cores, "processor": platform.machine(), "torch": torch.__version__}


# ---- the table ------------------------------------------------------------------------------------------------------


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return results as the Markdown table of docs/recipes.md."""
    lines = [
        "| recipe | single member | TTA | ensemble | ensemble + TTA | its macro accuracy | minutes a member | minutes, pipeline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        single, pipeline, cores = result["single"], result["pipeline"], result["machine"]["cores"]
        std = f" ± {single['accuracy_std']:.4f}" if single["accuracy_std"] is not None else ""
        low, high = pipeline["ensemble_tta"]["accuracy_ci"]
        one = pipeline["members"] == 1
        cells = [
            f"`{result['recipe']}` ({pipeline['members']} member{'' if one else 's'})",
            f"{single['accuracy']:.4f}{std} (n = {single['n']})",
            f"{pipeline['tta']['accuracy']:.4f}",
            "" if one else f"{pipeline['ensemble']['accuracy']:.4f}",
            f"{pipeline['ensemble_tta']['accuracy']:.4f} ({low:.4f} to {high:.4f})",
            f"{pipeline['ensemble_tta']['macro_accuracy']:.4f}",
            f"{single['minutes']:.1f}",
            f"{pipeline['minutes']:.1f} ({cores} core{'' if cores == 1 else 's'})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return all results, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def with_table(page: str, rows: str) -> str:
    """Return docs/recipes.md with another table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{rows}{END}{after}"


def main() -> None:
    sys.excepthook = params.excepthook
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("name", nargs="?", help="a recipe, as in recipes/NAME.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of single members; default 0 1 2")
    parser.add_argument("--data", help="its images, where data.path of the recipe is not theirs")
    parser.add_argument("--keep", type=Path, help="folder of the clone and of what has been measured; to go on later")
    parser.add_argument("--table", action="store_true", help="write the table of docs/recipes.md and stop")
    options = parser.parse_args()
    if options.name is None and not options.table:
        parser.error("name a recipe, or --table")
    if options.name is not None and not options.table:
        folder = options.keep or Path(tempfile.gettempdir()) / "anneal-recipes" / options.name
        found = measure(options.name, seeds=options.seeds, data=options.data, folder=folder.resolve())
        write_json(RESULTS / f"{options.name}.json", found)
        print(f"{options.name}: measured at commit {found['commit']}; the clone is {folder / 'anneal'}")
    rows = table(results())
    write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), rows))
    print(rows, end="")


if __name__ == "__main__":
    main()
