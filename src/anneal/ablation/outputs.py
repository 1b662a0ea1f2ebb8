"""The files of an ablation: a table as CSV and JSON, a plot, a page."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from anneal import params
from anneal.ablation.table import WORDS, Ablation, Row, stated
from anneal.reporting.ablation import page, plot
from anneal.reporting.report.words import chance
from anneal.store import write_json, write_text
from anneal.studies.outputs import data_name, table


def write_outputs(ablation: Ablation) -> None:
    """Write ``ablation.csv``, ``ablation.json``, ``ablation.png`` and ``ablation.html``, each whole or not at all."""
    folder = ablation.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "ablation.csv", table([as_columns(row) for row in ablation.rows]))
    pairs = [{"first": first, "second": second, **found.as_dict()} for (first, second), found in ablation.pairs.items()]
    write_json(
        folder / "ablation.json",
        {
            "command": ablation.command,
            "split": "val",
            "images": ablation.images,
            "seeds": list(ablation.seeds.values()),
            "rows": [as_columns(row) for row in ablation.rows],
            "pairs": pairs,
            "test": None
            if ablation.test is None
            else dict(zip(("accuracy", "low", "high"), ablation.test, strict=True)),
        },
    )
    rows = [
        (row.title, row.effect.difference, row.effect.interval, row.effect.verdict)
        for row in ablation.rows
        if row.effect is not None
    ]
    few = len(ablation.seeds)
    how = f"{few} seed{'s' * (few > 1)}, 95 % interval over {'seeds' if few > 1 else 'images'}"
    title = "What each technique adds to a bare recipe" if ablation.add else "What the recipe loses without each"
    plot(rows, folder / "ablation.png", f"{title}\n{data_name(ablation.values)}, validation split, {how}")
    text = page(
        name=f"{data_name(ablation.values)} {folder.name}",
        title=title,
        intro=intro(ablation),
        header=["technique", "accuracy" if ablation.add else "accuracy without", "earns (points)",
                "95 % over seeds", "95 % over images", "McNemar p", "verdict"],
        rows=[as_cells(row) for row in ablation.rows],
        pairs=[[f"{one} and {other}", *effect_cells(found.as_dict())] for (one, other), found in ablation.pairs.items()],
        settings=[[row.title, "; ".join(row.settings)] for row in ablation.rows if row.settings],
        picture=(folder / "ablation.png").read_bytes(),
        alt="; ".join(f"{name}: {100 * value:+.2f} points" for name, value, _, _ in rows),
        recipe=recipe_text(ablation.values),
        command=ablation.command,
    )  # fmt: skip
    write_text(folder / "ablation.html", text)


def as_columns(row: Row) -> dict[str, Any]:
    """Return a row of the table as plain values."""
    found = row.effect.as_dict() if row.effect is not None else {}
    return {
        "technique": row.name,
        "title": row.title,
        "accuracy": fmean(row.accuracies) if row.accuracies else None,
        "accuracy_sd": stdev(row.accuracies) if len(row.accuracies) > 1 else None,
        "nll": row.nll,
        "contribution": found.get("difference"),
        "seeds": found.get("seeds", len(row.accuracies)),
        "contribution_sd": found.get("spread"),
        **{key: found.get(key) for key in ("seeds_low", "seeds_high", "images_low", "images_high", "p")},
        "verdict": WORDS[found["verdict"]] if found else "",
        "by_seed": " ".join(f"{value:.6f}" for value in row.accuracies),
        "settings": "; ".join(row.settings),
        "reason": row.reason,
    }


def as_cells(row: Row) -> list[Any]:
    """Return a row of the page's table."""
    if row.reason:
        return [row.title, None, None, None, None, None, f"no figures: {row.reason}"]
    accuracy = stated(row.accuracies).replace("+-", "\u00b1")
    if row.effect is None:
        return [row.title, accuracy, None, None, None, None, "what the others are compared with"]
    return [row.title, accuracy, *effect_cells(row.effect.as_dict(), WORDS)]


def effect_cells(found: Mapping[str, Any], words: Mapping[str, str] | None = None) -> list[Any]:
    """Return an effect as cells: the difference, its intervals, p, and its verdict."""

    def interval(kind: str) -> str | None:
        low, high = found[f"{kind}_low"], found[f"{kind}_high"]
        return None if low is None else f"{100 * low:+.2f} to {100 * high:+.2f}"

    named = words or {
        "better": "more together",
        "worse": "less together",
        "no difference shown": "no interaction shown",
    }
    p = None if found["p"] is None else chance(found["p"])
    return [f"{100 * found['difference']:+.2f}", interval("seeds"), interval("images"), p, named[found["verdict"]]]


def intro(ablation: Ablation) -> list[str]:
    """Return what the page says before its table."""
    seeds = ", ".join(map(str, ablation.seeds.values()))
    what = "added alone to a recipe that has none of them" if ablation.add else "switched off alone, all else as it is"
    said = [
        f"Each technique of the recipe, {what}; trained with the seeds {seeds}, the same in every variant, and judged on "
        f"the {ablation.images:,} images of the validation split.",
        "The rate and all other settings stay as they are, so a figure says what the technique earns in this recipe, not "
        "what the best recipe without it would reach.",
        "A difference counts as shown where both its intervals leave 0 out: that over seeds (other trainings) and that over "
        "images (other validation images), and McNemar's test agrees.",
    ]
    if len(ablation.seeds) == 1:
        said.append("One seed says nothing of other trainings: its verdicts are of these networks alone.")
    if ablation.test is not None:
        accuracy, low, high = ablation.test
        said.append(
            f"The recipe itself, as exported, on test: {accuracy:.2%} (95 % interval {low:.2%} to {high:.2%}). No variant "
            f"was shown test."
        )
    return said


def recipe_text(values: Mapping[str, Any]) -> str:
    """Return the recipe as params.yaml has it, without what no result depends on."""
    import io

    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 120
    buffer = io.StringIO()
    yaml.dump({key: value for key, value in values.items() if key not in params.UNTRACKED}, buffer)
    return buffer.getvalue()
