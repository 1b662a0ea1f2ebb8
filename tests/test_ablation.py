"""What is on in a recipe, what switches it off, and what differences between variants show."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from anneal import params, recipe
from anneal.ablation import effects, results, table
from anneal.ablation.effects import Effect, effect, interaction, seeds_needed, t_interval
from anneal.ablation.outputs import write_outputs
from anneal.ablation.run import check, typed, variants
from anneal.ablation.table import BARE, FULL, Ablation, Row
from anneal.ablation.techniques import TECHNIQUES, chosen, possible, techniques_on, without
from anneal.params import UserError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """params.yaml as shipped."""
    return params.load(ROOT / "params.yaml", ROOT / "params.schema.json")


def with_recipe(values: dict[str, Any], name: str) -> dict[str, Any]:
    merged = params.merge(values, params.read_yaml(ROOT / "recipes" / f"{name}.yaml"))
    merged["ensemble"] = {**merged["ensemble"], **params.read_yaml(ROOT / f"recipes/{name}.yaml")["ensemble"]}
    return merged


# ---- techniques -----------------------------------------------------------------------------------------------------


def test_what_is_on_in_the_shipped_recipe(values: dict[str, Any]) -> None:
    assert list(techniques_on(values)) == [
        *("augmentation", "input_normalization", "init", "norm", "momentum", "nesterov", "schedule", "warmup"),
        *("weight_decay", "label_smoothing", "ensemble"),
    ]


SWITCHES = [
    ("augmentation", {"augment": {"policy": "standard"}}, {"augment.policy": "none"}),
    ("augmentation", {"augment": {"policy": [{"HorizontalFlip": {"p": 0.5}}]}}, {"augment.policy": "none"}),
    ("balanced_copies", {"augment": {"copies": {"balance": True}}}, {"augment.copies.balance": False}),
    ("input_normalization", {"preprocess": {"normalize": "zca"}}, {"preprocess.normalize": "scale"}),
    ("init", {"init": {"name": "orthogonal"}}, {"init.name": "normal", "init.normal.std": 0.01}),
    ("zero_last", {"init": {"zero_last": True}}, {"init.zero_last": False}),
    ("whiten_first", {"init": {"whiten_first": True}}, {"init.whiten_first": False}),
    ("norm", {"init": {"zero_last": True}}, {"model.norm.name": "none", "init.zero_last": False}),
    ("momentum", {"optimizer": {"name": "Adam"}}, {"optimizer.Adam.betas": [0.0, 0.999]}),
    (
        "momentum",
        {"optimizer": {"name": "Muon"}},
        {
            "optimizer.Muon.momentum": 0.0,
            "optimizer.Muon.nesterov": False,
            "optimizer.Muon.rest.betas": [0.0, 0.999],
        },
    ),
    (
        "momentum",
        {"schedule": {"name": "one_cycle"}},
        {
            "optimizer.SGD.momentum": 0.0,
            "optimizer.SGD.nesterov": False,
            "schedule.one_cycle.momentum": None,
        },
    ),
    ("nesterov", {}, {"optimizer.SGD.nesterov": False}),
    ("sam", {"optimizer": {"sam": {"rho": 0.05}}}, {"optimizer.sam.rho": 0.0}),
    (
        "layer_rates",
        {"optimizer": {"lr_factors": {"head": 2.0}}},
        {f"optimizer.lr_factors.{key}": 1.0 for key in ("first", "head", "layer_decay")},
    ),
    ("schedule", {"schedule": {"name": "step"}}, {"schedule.name": "constant"}),
    ("warmup", {"schedule": {"warmup": {"length": "5 epochs"}}}, {"schedule.warmup.length": 0.0}),
    ("batch_growth", {"batch": {"growth": {"at": [0.5]}}}, {"batch.growth.at": []}),
    ("balanced_sampling", {"batch": {"sampling": "balanced"}}, {"batch.sampling": "shuffle"}),
    ("loss", {"loss": {"name": "focal"}}, {"loss.name": "cross_entropy"}),
    ("class_weights", {"loss": {"class_weights": "balanced"}}, {"loss.class_weights": "none"}),
    (
        "weight_decay",
        {"optimizer": {"name": "Muon"}},
        {"optimizer.Muon.weight_decay": 0.0, "optimizer.Muon.rest.weight_decay": 0.0},
    ),
    ("l1", {"regularization": {"l1": 1e-5}}, {"regularization.l1": 0.0}),
    ("l2", {"regularization": {"l2": 1e-5}}, {"regularization.l2": 0.0}),
    ("max_norm", {"regularization": {"max_norm": 3.0}}, {"regularization.max_norm": None}),
    ("label_smoothing", {}, {"regularization.label_smoothing": 0.0}),
    ("dropout", {"regularization": {"dropout": 0.5}}, {"regularization.dropout": 0.0}),
    ("spatial_dropout", {"regularization": {"spatial_dropout": 0.1}}, {"regularization.spatial_dropout": 0.0}),
    (
        "block_dropout",
        {"model": {"name": "wide_resnet", "wide_resnet": {"block_dropout": 0.1}}},
        {"model.wide_resnet.block_dropout": 0.0},
    ),
    ("stochastic_depth", {"regularization": {"stochastic_depth": 0.1}}, {"regularization.stochastic_depth": 0.0}),
    ("mixup", {"regularization": {"mixup": {"alpha": 0.2}}}, {"regularization.mixup.alpha": 0.0}),
    ("cutmix", {"regularization": {"cutmix": {"alpha": 1.0}}}, {"regularization.cutmix.alpha": 0.0}),
    ("input_noise", {"regularization": {"input_noise": 0.1}}, {"regularization.input_noise": 0.0}),
    (
        "gradient_noise",
        {"regularization": {"gradient_noise": {"std": 0.1}}},
        {"regularization.gradient_noise.std": 0.0},
    ),
    ("gradient_clip", {"regularization": {"gradient_clip": 1.0}}, {"regularization.gradient_clip": None}),
    (
        "gradient_clip_value",
        {"regularization": {"gradient_clip_value": 1.0}},
        {"regularization.gradient_clip_value": None},
    ),
    (
        "gradient_clip_adaptive",
        {"regularization": {"gradient_clip_adaptive": 0.01}},
        {"regularization.gradient_clip_adaptive": None},
    ),
    ("averaging", {"averaging": {"name": "ema"}}, {"averaging.name": "none"}),
]


@pytest.mark.parametrize(("name", "changes", "off"), SWITCHES, ids=[f"{i}-{one[0]}" for i, one in enumerate(SWITCHES)])
def test_what_switches_a_technique_off(
    values: dict[str, Any], name: str, changes: dict[str, Any], off: dict[str, Any]
) -> None:
    changed = params.merge(values, changes)
    found = techniques_on(changed)[name]
    assert params.flatten(found.off) == off
    without_it = without(changed, [found])
    recipe.validate(without_it)
    assert name not in techniques_on(without_it)
    others = set(techniques_on(changed)) - {name, "zero_last" if name == "norm" else "", "nesterov"}
    assert others <= set(techniques_on(without_it))
    # Nothing but what the technique names has changed.
    before, after = params.flatten(changed), params.flatten(without_it)
    assert {key for key in after if after[key] != before.get(key)} <= set(off)


def test_every_technique_is_tested() -> None:
    named = {name for name, *_ in SWITCHES}
    assert set(TECHNIQUES) - named == {"transfer", "tta", "ensemble"}  # tested below


def test_what_is_off_or_has_no_part(values: dict[str, Any]) -> None:
    start = {"path": "pretrained/a", "sha256": "0" * 64, "freeze": 0.5}
    found = techniques_on(params.merge(values, {"model": {"start_from": start}}))
    assert "init" not in found  # the weights come with the member that it starts from
    assert params.flatten(found["transfer"].off)["model.start_from.path"] is None
    for changes, name in (
        ({"regularization": {"mixup": {"alpha": 0.4, "probability": 0.0}}}, "mixup"),
        ({"model": {"wide_resnet": {"block_dropout": 0.3}}}, "block_dropout"),  # resnet has none
        ({"schedule": {"warmup": {"length": "0 epochs"}}}, "warmup"),
        ({"augment": {"policy": []}}, "augmentation"),
        ({"init": {"name": "zeros"}}, "init"),
        ({"model": {"name": "my.module:build"}}, "norm"),
        ({"optimizer": {"name": "Adagrad"}}, "momentum"),
    ):
        assert name not in techniques_on(params.merge(values, changes)), name


def test_tta_and_ensembling_need_no_training(values: dict[str, Any]) -> None:
    found = techniques_on(params.merge(values, {"evaluate": {"tta": {"views": ["identity", "hflip"]}}}))
    assert [name for name, technique in found.items() if not technique.trains] == ["tta", "ensemble"]
    labels = variants(values, found, found, add=False, pairs=False)
    assert len(labels) == 1 + len(found) - 2


def test_a_technique_that_is_off_or_unknown_is_refused(values: dict[str, Any]) -> None:
    on = techniques_on(values)
    assert list(chosen(on, ["warmup", "augmentation", "warmup"])) == ["augmentation", "warmup"]
    with pytest.raises(UserError, match="no technique 'label_smothing'; did you mean 'label_smoothing'"):
        chosen(on, ["label_smothing"])
    with pytest.raises(UserError, match=r"mixup is off in this recipe.*on are augmentation"):
        chosen(on, ["mixup"])


@pytest.mark.parametrize("name", RECIPES)
def test_every_variant_of_the_shipped_recipes_can_be_trained(values: dict[str, Any], name: str) -> None:
    """But for those that the recipe's own rules refuse, which are named with the reason."""
    full = with_recipe(values, name)
    on = techniques_on(full)
    for add in (False, True):
        found, refused = possible(
            variants(full, on, on, add=add, pairs=False), lambda given: check(given, num_train=1000)
        )
        assert FULL in found and (BARE in found or not add)
        allowed = {"only Nesterov's momentum"} if add else set()
        assert set(refused) <= allowed, refused


def test_the_same_recipe_is_not_trained_under_two_names(values: dict[str, Any]) -> None:
    on = techniques_on(values)
    two = chosen(on, ["momentum", "nesterov"])
    for add, expected in (
        (True, {"only Nesterov's momentum": "the same recipe as bare baseline"}),
        (False, {"no momentum nor Nesterov's momentum": "the same recipe as no momentum"}),
    ):
        _, refused = possible(variants(values, on, two, add=add, pairs=not add), lambda _: None)
        assert refused == expected


def test_pairs(values: dict[str, Any]) -> None:
    on = techniques_on(values)
    few = chosen(on, ["warmup", "momentum", "label_smoothing"])
    found = variants(values, on, few, add=False, pairs=True)
    assert list(found) == [
        FULL,
        *("no momentum", "no warm-up", "no label smoothing"),
        *("no momentum nor warm-up", "no momentum nor label smoothing", "no warm-up nor label smoothing"),
    ]
    both = found["no momentum nor warm-up"]
    assert both["optimizer"]["SGD"]["momentum"] == 0 and both["schedule"]["warmup"]["length"] == 0


def test_the_bare_baseline_has_nothing_on_but_what_cannot_be_off(values: dict[str, Any]) -> None:
    on = techniques_on(values)
    found = variants(values, on, on, add=True, pairs=False)
    assert set(techniques_on(found[BARE])) == {"ensemble"}
    for technique in on.values():
        if technique.trains and technique.name != "nesterov":
            only = set(techniques_on(found[f"only {technique.title}"])) - {"ensemble"}
            assert only == {technique.name}


# ---- differences ----------------------------------------------------------------------------------------------------

LABELS = np.zeros(200, np.int64)


def predicted(*rights: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Log-probabilities (M, N, 2) of predictors that are right on these images."""
    hits = np.stack([np.asarray(right, dtype=bool) for right in rights])
    chance = np.where(hits, 0.9, 0.2)
    return np.log(np.stack([chance, 1 - chance], axis=2))


def right(count: int, total: int = 200) -> npt.NDArray[np.bool_]:
    return np.arange(total) < count


def test_the_interval_over_seeds_is_students() -> None:
    found = effect(predicted(right(150), right(152), right(149)), predicted(right(160), right(161), right(162)), LABELS)
    differences = np.array([10, 9, 13]) / 200
    expected = stats.t.interval(0.95, 2, loc=differences.mean(), scale=stats.sem(differences))
    assert found.seeds == 3 and found.difference == pytest.approx(differences.mean())
    assert (found.seeds_low, found.seeds_high) == pytest.approx(expected)
    assert found.spread == pytest.approx(differences.std(ddof=1))
    paired = stats.ttest_rel([160, 161, 162], [150, 152, 149])
    assert (paired.pvalue < 0.05) == (found.seeds_low > 0)
    assert found.verdict == "better"


def test_seeds_that_agree_by_chance_are_not_taken_for_certain() -> None:
    """Two seeds that differ by exactly the same few images, which happens often on few images, have no interval of width 0."""
    found = effect(predicted(*[right(150)] * 2), predicted(*[right(158)] * 2), LABELS)
    assert found.images_low > 0 and found.p < 0.05 and found.spread == 0
    assert found.seeds_low < 0 and found.verdict == "no difference shown"


def test_a_difference_is_shown_only_where_seeds_and_images_agree() -> None:
    # Clear over images, but one seed says the opposite.
    a, b = [right(100), right(100), right(160)], [right(140), right(140), right(150)]
    found = effect(predicted(*a), predicted(*b), LABELS)
    assert found.images_low > 0 and found.p < 0.05 and found.seeds_low < 0
    assert found.verdict == "no difference shown"
    # Clear over seeds, but by three images in 200.
    found = effect(predicted(*[right(150)] * 3), predicted(*[right(153)] * 3), LABELS)
    assert found.seeds_low > 0 and found.p > 0.05 and found.verdict == "no difference shown"
    assert effect(predicted(*[right(150)] * 3), predicted(*[right(110)] * 3), LABELS).verdict == "worse"


def test_one_seed_is_judged_by_its_images() -> None:
    found = effect(predicted(right(100)), predicted(right(140)), LABELS)
    assert found.seeds_low is None and found.spread is None and found.verdict == "better"
    assert found.interval == (found.images_low, found.images_high)
    assert found.p == pytest.approx(stats.binomtest(0, 40).pvalue)


def test_equal_predictions_show_nothing() -> None:
    same = predicted(right(150), right(140))
    found = effect(same, same, LABELS)
    assert (found.difference, found.p, found.verdict) == (0, 1, "no difference shown")


def test_an_interaction_is_what_is_left_of_the_sum() -> None:
    rng = np.random.default_rng(0)
    full, one, other, both = (predicted(*(rng.random((3, 200)) < rate)) for rate in (0.9, 0.8, 0.7, 0.65))
    found = interaction(full, one, other, both, LABELS)
    f, a, b, ab = (effects.accuracies(each, LABELS) for each in (full, one, other, both))
    by_seed = (f - ab) - (f - a) - (f - b)
    assert found.difference == pytest.approx(by_seed.mean())
    assert (found.seeds_low, found.seeds_high) == pytest.approx(
        stats.t.interval(0.95, 2, loc=by_seed.mean(), scale=stats.sem(by_seed))
    )
    assert found.images_low < found.difference < found.images_high
    # Techniques that do the same: without either nothing is lost, without both much is.
    same = interaction(*(predicted(*[right(count)] * 3) for count in (180, 180, 180, 120)), LABELS)
    assert same.difference == pytest.approx(0.3) and same.verdict == "better"


def test_seeds_needed_gives_the_power_that_it_promises() -> None:
    rng = np.random.default_rng(1)
    needed = seeds_needed(0.01, 0.015)
    assert needed is not None
    drawn = rng.normal(0.01, 0.015, (4000, needed))
    shown = stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05
    assert 0.77 < shown.mean() < 0.83
    assert seeds_needed(0.01, 0.0) == 2
    assert seeds_needed(0.0001, 1.0) is None
    assert t_interval([1.0]) is None


# ---- the table ------------------------------------------------------------------------------------------------------


def as_predictions(*counts: int, views: int = 0) -> results.Predictions:
    """Predictions of seeds that are right on so many images, on some more with views."""
    runs = [{"name": f"exp-{i}", "began": 1, "ended": 2} for i in range(len(counts))]
    plain, tta = predicted(*map(right, counts)), predicted(*(right(count + views) for count in counts))
    return results.Predictions(plain, tta, LABELS, "images", runs)


def test_the_table_of_techniques(values: dict[str, Any]) -> None:
    full = params.merge(values, {"evaluate": {"tta": {"views": ["identity", "hflip"]}}})
    on = techniques_on(full)
    few = chosen(on, ["tta", "ensemble", "label_smoothing", "warmup", "momentum"])
    found = {
        FULL: as_predictions(150, 152, 149, views=8),
        "no momentum": as_predictions(100, 101, 99, views=8),
        "no label smoothing": as_predictions(151, 150, 150, views=8),
    }
    rows = table.table(found, on, few, {"no warm-up": "training diverged"}, add=False)
    by_name = {row.name: row for row in rows}
    assert [row.name for row in rows] == [FULL, "momentum", "tta", "label_smoothing", "ensemble", "warmup"]
    assert by_name[FULL].accuracies == pytest.approx([158 / 200, 160 / 200, 157 / 200])
    assert by_name["momentum"].accuracies == pytest.approx([108 / 200, 109 / 200, 107 / 200])
    assert by_name["momentum"].effect.difference == pytest.approx(51 / 200 - 1 / 600, abs=2e-3)
    assert by_name["momentum"].effect.verdict == "better"
    assert by_name["tta"].effect.difference == pytest.approx(8 / 200)
    assert by_name["tta"].accuracies == pytest.approx([150 / 200, 152 / 200, 149 / 200])
    assert by_name["label_smoothing"].effect.verdict == "no difference shown"
    assert by_name["ensemble"].effect.seeds_low is None  # of one ensemble
    assert by_name["warmup"].effect is None and by_name["warmup"].reason == "training diverged"


def test_the_table_of_additions(values: dict[str, Any]) -> None:
    full = params.merge(values, {"evaluate": {"tta": {"views": ["identity", "hflip"]}}})
    on = techniques_on(full)
    few = chosen(on, ["tta", "momentum"])
    found = {
        FULL: as_predictions(190, 191, views=5),
        BARE: as_predictions(100, 102, views=4),
        "only momentum": as_predictions(140, 150, views=4),
    }
    rows = {row.name: row for row in table.table(found, on, few, {}, add=True)}
    assert list(rows) == [FULL, BARE, "momentum", "tta"]
    assert rows[BARE].accuracies == pytest.approx([0.5, 0.51])
    assert rows["momentum"].effect.difference == pytest.approx((40 + 48) / 400)
    assert rows["tta"].effect.difference == pytest.approx(4 / 200)
    assert rows["tta"].accuracies == pytest.approx([104 / 200, 106 / 200])


def test_interactions_of_the_table(values: dict[str, Any]) -> None:
    full = params.merge(values, {"evaluate": {"tta": {"views": ["identity", "hflip"]}}})
    on = techniques_on(full)
    few = chosen(on, ["tta", "warmup", "momentum"])
    found = {
        FULL: as_predictions(150, 151, views=10),
        "no momentum": as_predictions(120, 121, views=20),
        "no warm-up": as_predictions(140, 141, views=10),
        "no momentum nor warm-up": as_predictions(100, 101, views=10),
    }
    pairs = table.interactions(found, few)
    expected = {
        ("momentum", "warm-up"): 140 + 150 - 160 - 110,
        ("momentum", "TTA"): 140 + 150 - 160 - 120,  # without TTA: the same networks, plain
        ("warm-up", "TTA"): 150 + 150 - 160 - 140,
    }
    assert set(pairs) == set(expected)
    for pair, images in expected.items():
        assert pairs[pair].difference == pytest.approx(images / 200), pair


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ablation(values: dict[str, Any]) -> Ablation:
    better = Effect(0.0123, 3, 0.001, 0.008, 0.016, 500, 0.004, 0.02, 0.001, "better")
    unseen = Effect(-0.001, 3, 0.004, -0.01, 0.008, 500, -0.006, 0.004, 0.6, "no difference shown")
    hostile = values | {"data": {**values["data"], "path": "data/<script>alert(1)</script>.zip"}}
    rows = [
        Row(FULL, FULL, [], (0.91, 0.92, 0.915), 0.3),
        Row("momentum", "momentum", ["optimizer.SGD.momentum: 0.0"], (0.90, 0.90, 0.91), 0.35, better),
        Row("warmup", "warm-up", ["schedule.warmup.length: 0.0"], (0.91, 0.92, 0.92), 0.3, unseen),
        Row("norm", "normalisation layers", ["model.norm.name: none"], reason="<b>training diverged</b>"),
    ]
    return Ablation(
        hostile,
        {"a": 0, "b": 1, "c": 2},
        False,
        rows,
        {("momentum", "warm-up"): unseen},
        500,
        (0.9, 0.88, 0.92),
        typed([], seeds=3, add=False, pairs=True, member=None),
    )


def test_the_files_of_an_ablation(ablation: Ablation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_outputs(ablation)
    folder = tmp_path / "studies/ablation"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"ablation.{end}" for end in ("csv", "html", "json", "png")
    ]
    said = json.loads((folder / "ablation.json").read_text())
    assert said["seeds"] == [0, 1, 2] and said["test"]["accuracy"] == 0.9 and len(said["pairs"]) == 1
    assert [row["verdict"] for row in said["rows"]] == ["", "helps", "no difference shown", ""]
    lines = (folder / "ablation.csv").read_text().splitlines()
    assert lines[0].startswith("technique,title,accuracy,accuracy_sd,nll,contribution,seeds")
    assert len(lines) == 1 + len(ablation.rows)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_outputs(ablation)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_the_page_of_an_ablation(ablation: Ablation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_outputs(ablation)
    page = (tmp_path / "studies/ablation/ablation.html").read_text()
    assert "<script" not in page and "<b>training" not in page and "&lt;b&gt;training diverged" in page
    assert "http://" not in page and "https://" not in page
    assert "prefers-color-scheme: dark" in page
    assert 'alt="What the recipe loses without each. momentum: +1.23 points; warm-up: -0.10 points."' in page
    for words in ("+0.80 to +1.60", "+0.40 to +2.00", "no difference shown", "no interaction shown", "90.00%"):
        assert words in page, words
    assert "anneal ablate --seeds 3 --pairs" in page and "optimizer.SGD.momentum: 0.0" in page


def test_lines_on_the_terminal(ablation: Ablation) -> None:
    said = list(table.lines(ablation))
    assert said[0].endswith("accuracy 0.9150 +- 0.0050")
    assert "helps: +1.23 points (95 % intervals +0.80 to +1.60 over 3 seeds; +0.40 to +2.00 over 500 images" in said[1]
    assert "no difference shown: -0.10 points" in said[2]
    assert "no figures: <b>training diverged</b>" in said[3]
    assert said[-1] == "the recipe on test: accuracy 0.9000 (95 % interval 0.8800 to 0.9200)"


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> Path:
    """A repository whose dvc.lock says that one member was trained and evaluated; small files stand for the outs."""
    from anneal import tracking
    from anneal.tracking.names import at

    given = values | {"ensemble": {**values["ensemble"], "members": {"a": {"seed": 0}}}}
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").mkdir()
    stages = params.read_yaml(ROOT / "dvc.yaml")["stages"]
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    for path in ("data/processed/x", "data/augmented/x", "models/a/x", "reports/metrics.json"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('{"test": {}}')
    inputs = results.Inputs(tmp_path)
    lock = {}
    for stage, outs in (
        ("preprocess", ["data/processed"]),
        ("augment", ["data/augmented"]),
        ("train", ["models/a"]),
        ("evaluate", ["reports/metrics.json"]),
    ):
        member = "a" if stage == "train" else ""
        names = [name.replace("${key}", member) for name in stages[stage].get("do", stages[stage])["params"]]
        deps = {path: md5 or tracking.dvc_hash(path) for path, md5 in inputs.deps(stage, given, member).items()}
        lock[f"train@{member}" if member else stage] = {
            "deps": [{"path": path, "md5": md5} for path, md5 in deps.items()],
            "params": {"params.yaml": {name: at(given, *name.split(".")) for name in names}},
            "outs": [{"path": path, "md5": tracking.dvc_hash(path)} for path in outs],
        }
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": lock}))
    (tmp_path / "given.json").write_text(json.dumps(given))
    return tmp_path


@pytest.mark.parametrize("stale", [None, "models/a/x", "reports/metrics.json", "params", "train"])
def test_test_figures_are_quoted_only_where_they_are_of_this_recipe(trained: Path, stale: str | None) -> None:
    given = json.loads((trained / "given.json").read_text())
    if stale == "params":
        given["evaluate"]["bootstrap"] += 1
    elif stale == "train":  # trained anew and not yet evaluated: dvc repro train@a
        from anneal import tracking

        lock = json.loads((trained / "dvc.lock").read_text())
        (trained / "models/a/x").write_text("other weights")
        lock["stages"]["train@a"]["outs"][0]["md5"] = tracking.dvc_hash("models/a")
        (trained / "dvc.lock").write_text(json.dumps(lock))
    elif stale:
        (trained / stale).write_text('{"test": {"other": 1}}')
    assert results.recorded(given) == (None if stale else {"test": {}})


def test_what_the_recipe_is_on_test_depends_on_all_that_evaluate_reads(trained: Path) -> None:
    given = json.loads((trained / "given.json").read_text())
    name = results.whole_recipe(given).name
    member = {"ensemble": {"members": {"a": {"optimizer": {"name": "AdamW"}}}}}
    for changes in ({"ensemble": {"combine": "vote"}}, {"evaluate": {"calibration": "none"}}, member):
        assert results.whole_recipe(params.merge(given, changes)).name != name, changes
    assert results.whole_recipe(params.merge(given, {"hardware": {"num_workers": 3}})).name == name


def test_damaged_results_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anneal.experiments.plan import Plan, has_result, result_files

    monkeypatch.chdir(tmp_path)
    for path in result_files("0" * 16):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    with pytest.raises(UserError, match="damaged, and removed; run the same command again"):
        results.read(Plan({FULL: {"a": "0" * 16}}, {"a": 0}, []), FULL)
    assert not has_result("0" * 16)


def test_labels_are_names_of_experiments_of_their_own(values: dict[str, Any]) -> None:
    from anneal.experiments.plan import experiment_name

    on = techniques_on(values)
    labels = [table.label_of(*pair) for pair in itertools.combinations(on.values(), 2)]
    names = {experiment_name(label, {"a": "0"}) for label in labels}
    assert len(names) == len(labels)
