"""`anneal diff`: what differs between two runs, and which runs a name names."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from anneal import cli, comparison
from anneal.comparison import Record, as_json, as_text, compare
from anneal.params import UserError

ROOT = Path(__file__).resolve().parents[1]
COMMITS = ("a" * 40, "b" * 40)
MD5 = {name: name * 16 for name in ("0a", "1b", "2c", "3d")}


def environment(
    *, numpy: str = "2.1.0", cores: int = 2, changed: dict[str, str] | None = None, **variables: str
) -> dict[str, str]:
    machine = {"cpu": {"cores": cores, "flags": ["avx2", "fma"]}, "variables": variables, "dvc_lock": str(variables)}
    code = {"changed": changed or {}, "untracked": {}, "commit": COMMITS[0], "dirty": bool(changed)}
    return {
        "environment.json": json.dumps(machine),
        "packages.txt": f"anneal==0.1.0  # editable file:///x\nnumpy=={numpy}\n",
        "git.json": json.dumps(code),
    }


def stage(label: str, **given: Any) -> Record:
    return Record(**{"id": label * 4, "name": label, "label": label, "files": environment(), **given})


def recipe(*stages: Record, **given: Any) -> Record:
    return Record(**{"id": "recipe", "name": "digits", "stages": {each.label: each for each in stages}, **given})


def rows(found: list[comparison.Change]) -> dict[str, tuple[Any, Any]]:
    return {change.key: (change.a, change.b) for change in found}


# ---- pure functions -------------------------------------------------------------------------------------------------


def test_the_same_recipe_twice() -> None:
    a = recipe(stage("train@a", outs={"models/a": MD5["0a"]}), params={"seed": "0"}, metrics={"test/nll": math.nan})
    found = compare(a, replace(a, id="other"))
    assert not found.differs and found.same["metrics"] == 1 and not found.notes
    assert as_text(found).endswith("nothing differs; the bytes of 1 out agree")
    assert json.loads(as_json(found))["differs"] is False


def test_params_of_members() -> None:
    a = recipe(params={"optimizer.SGD.lr": "0.1", "ensemble.members.b.seed": "1", "seed": "0"})
    b = recipe(params={"optimizer.SGD.lr": "0.2", "ensemble.members.b.optimizer.name": "AdamW", "seed": "0"})
    assert rows(compare(a, b).params) == {
        "ensemble.members.b.optimizer.name": (None, "AdamW"),
        "ensemble.members.b.seed": ("1", None),
        "optimizer.SGD.lr": ("0.1", "0.2"),
    }


def test_environment_by_stage() -> None:
    a = recipe(stage("train@a"), stage("train@b"), stage("evaluate"))
    b = recipe(
        stage("train@a", files=environment(numpy="2.2.0", cores=4, SLURM_JOB_ID="8")),
        stage("train@b", files=environment(numpy="2.2.0", SLURM_JOB_ID="9")),
        stage("evaluate", files=environment(numpy="2.2.0")),
    )
    found = compare(a, b).environment
    assert rows(found) == {"cpu.cores": ("2", "4"), "package numpy": ("2.1.0", "2.2.0")}
    assert {change.key: change.stages for change in found} == {"cpu.cores": ("train@a",), "package numpy": ()}
    lines = [line.split() for line in as_text(compare(a, b)).splitlines()]
    assert ["cpu.cores", "2", "->", "4", "(train@a)"] in lines and ["package", "numpy", "2.1.0", "->", "2.2.0"] in lines


def test_torch_builds() -> None:
    one = "threads: 2\nversion: 2.13.0\n\nPyTorch built with:\n  - GCC 13.3\n\nATen/Parallel:\n\tat::get_num_threads() : 2\n"
    two = one.replace("threads: 2", "threads: 4").replace("() : 2", "() : 4").replace("13.3", "14.1")
    a, b = (stage("evaluate", files={**environment(), "torch.txt": text}) for text in (one, two))
    assert rows(compare(a, b).environment) == {
        "torch threads": ("2", "4"),
        "torch: at::get_num_threads()": ("2", "4"),
        "torch: GCC 13.3": ("yes", None),
        "torch: GCC 14.1": (None, "yes"),
    }


def test_uncommitted_changes_are_compared_by_content() -> None:
    same, other, deleted = {"src/x.py": MD5["0a"]}, {"src/x.py": MD5["1b"]}, {"src/x.py": "absent"}
    clean = stage("train@a", commit=COMMITS[0], dirty=False)

    def dirty(files: dict[str, str]) -> Record:
        return replace(clean, dirty=True, files=environment(changed=files))

    assert not compare(dirty(same), dirty(same)).differs
    assert rows(compare(dirty(same), dirty(other)).code) == {"src/x.py": ("md5 0a0a0a0a", "md5 1b1b1b1b")}
    assert rows(compare(clean, dirty(deleted)).code) == {
        "uncommitted changes": ("no", "yes"),
        "src/x.py": ("as committed", "deleted"),
    }
    text = as_text(compare(clean, replace(clean, commit=COMMITS[1])))
    assert f"commit  {'a' * 40} -> {'b' * 40}" in text and "see git diff aaaaaaaaaaaa bbbbbbbbbbbb" in text


def test_bytes_that_agree_and_differ() -> None:
    a = recipe(stage("train@a", outs={"models/a": MD5["0a"]}), stage("train@b", outs={"models/b": MD5["1b"]}))
    b = recipe(stage("train@a", outs={"models/a": MD5["0a"]}), stage("train@b", outs={"models/b": MD5["2c"]}))
    found = compare(a, b)
    assert found.same["outs"] == {"models/a": MD5["0a"]} and rows(found.outs) == {"models/b": (MD5["1b"], MD5["2c"])}
    text = as_text(found)
    assert f"models/b  {MD5['1b']} -> {MD5['2c']}" in text and f"models/a  same bytes, md5 {MD5['0a']}" in text


def test_two_members_wrote_one_model() -> None:
    a, b = (stage(f"train@{name}", outs={f"models/{name}": MD5["0a"]}) for name in "ab")
    assert compare(a, b).same["outs"] == {"models/*": MD5["0a"]}


def test_metrics_in_a_table() -> None:
    shared = {f"layer/{i}": float(i) for i in range(1, 30)}
    a = recipe(metrics={"test/accuracy": 0.97, "curve/loss": 1.0, "only/a": 1.0, "same": 3.0, **shared})
    moved = {key: value * 1.5 for key, value in shared.items()}
    b = recipe(metrics={"test/accuracy": 0.975, "curve/loss": 3.0, "only/b": 1.0, "same": 3.0, **moved})
    lines = as_text(compare(a, b)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("metrics"))
    assert lines[start].split() == ["metrics", "A", "B", "B", "-", "A"]
    assert lines[start + 1].split() == ["test/accuracy", "0.9700", "0.9750", "+0.0050"]
    assert lines[start + 2].split() == ["curve/loss", "1", "3", "+2"]
    assert len({line.rindex(line.split()[-1]) + len(line.split()[-1]) for line in lines[start : start + 21]}) == 1
    assert lines[start + 21 : start + 25] == [
        "  11 more differ, 1 equal",
        "  whether such a difference is real: `anneal compare A B`, image by image",
        "  only in A: only/a",
        "  only in B: only/b",
    ]


def test_what_is_not_on_record_is_said() -> None:
    a = recipe(stage("train@a", files={}), stage("evaluate", status="FAILED"))
    b = recipe(stage("train@a"), stage("evaluate"), stage("train@b", outs={"models/b": MD5["0a"]}))
    assert not compare(a, b).outs
    assert compare(a, b).notes == [
        "only B has runs of train@b",
        "the environment of train@a is not on record in both",
        "A: evaluate is FAILED",
    ]


def test_no_claim_about_what_is_not_on_record() -> None:
    a = stage("train@a", files={}, dirty=True, commit=COMMITS[0])
    found = compare(a, a)
    assert found.notes == [
        "the environment is not on record in both",
        "both had uncommitted changes that are not on record, so that their code may differ",
    ]
    assert "environment  not on record" in as_text(found)


def test_colours_only_where_asked() -> None:
    found = compare(recipe(params={"x": "1"}), recipe(params={"x": "2"}))
    plain, painted = as_text(found), as_text(found, colour=True)
    assert "\033" not in plain and "\033[31m1\033[0m -> \033[32m2\033[0m" in painted
    assert comparison.re.sub(r"\033\[\d+m", "", painted) == plain


def test_json_has_no_numbers_that_json_lacks() -> None:
    found = compare(recipe(metrics={"x": 1.0, "y": math.inf}), recipe(metrics={"x": math.nan}))
    assert json.loads(as_json(found), parse_constant=pytest.fail)["metrics"] == [
        {"key": "x", "a": 1.0, "b": "nan", "stages": []},
        {"key": "y", "a": "inf", "b": None, "stages": []},
    ]


# ---- runs of a real store -------------------------------------------------------------------------------------------


@dataclass
class Store:
    """Two recipes in a sqlite store, each with runs of train@a and evaluate, as tracking writes them."""

    root: Path
    ids: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.ids[name]


def fill(root: Path) -> dict[str, str]:
    import mlflow
    from mlflow.entities import Dataset, DatasetInput, Metric, Param

    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.create_experiment("anneal", (root / "mlruns").as_uri())
    ids: dict[str, str] = {}

    def write(key: str, name: str, began: int, tags: dict[str, str], values: dict[str, str], **metrics: float) -> None:
        git = {"mlflow.source.git.commit": COMMITS[0], "git.dirty": "false"}
        run_id = client.create_run(experiment, began, {**git, **tags}, name).info.run_id
        points = [Metric(metric.replace("__", "/"), number, began, 0) for metric, number in metrics.items()]
        client.log_batch(run_id, points, [Param(key, value) for key, value in values.items()])
        client.set_terminated(run_id, tags.get("status", "FINISHED"))
        ids[key] = run_id

    def child(
        key: str, parent: str, began: int, stage: str, files: dict[str, str], tags: dict[str, str], **values: str
    ) -> None:
        name, _, member = stage.partition("@")
        tags = {"stage": name, "mlflow.parentRunId": ids[parent], **({"member": member} if member else {}), **tags}
        write(key, " ".join([name, member]).strip(), began, tags, values)
        for file, text in files.items():
            client.log_text(ids[key], text, f"environment/{file}")

    for key, lr, accuracy, began in (("one", "0.1", 0.96, 1000), ("two", "0.2", 0.97, 2000)):
        exp = {"DVC_EXP_NAME": "tabby-curs"} if key == "two" else {}
        values = {"optimizer.SGD.lr": lr, "seed": "0", "evaluate.bootstrap": "9", "split.test": "0.2"}
        tags = {"fingerprint": {"one": "abcdef01", "two": "abcdef02"}[key] * 4, **exp}
        write(key, f"digits {key}", began, tags, values, test__accuracy=accuracy)
        profile = json.dumps({"counts": {"train": 1259}, "classes": ["0", "1"]})
        data = Dataset("digits", "d" * 32, "local", "{}", profile=profile)
        client.log_inputs(ids[key], [DatasetInput(data, [])])
    for number, (key, md5) in enumerate((("one", "0a"), ("two", "1b")), 1):
        out = {"out.models/a": MD5[md5], "model.md5": MD5[md5]}
        values = {"optimizer.SGD.lr": f"0.{number}", "seed": "0"}
        child(f"{key}.train", key, 100 * number, "train@a", environment(cores=number), out, **values)
    same = {"out.reports/metrics.json": MD5["3d"]}
    child("one.evaluate", "one", 500, "evaluate", environment(), same)
    child("two.evaluate", "two", 600, "evaluate", environment(), {**same, "DVC_EXP_NAME": "tabby-curs"})
    # the first recipe ran last, by a stage that failed and a command that is no stage
    child("one.failed", "one", 700, "evaluate", {}, {"status": "FAILED"})
    child("one.range", "one", 800, "lr-range@a", {}, {})
    # a third recipe, whose only stage DVC took from its cache, and an experiment that repeated the first
    write("three", "digits three", 3000, {"fingerprint": "f" * 32, "linked.train.a": ids["one.train"]}, {"seed": "0"})
    child("one.again", "one", 450, "evaluate", environment(numpy="9.9.9"), {**same, "DVC_EXP_NAME": "sooty-toes"})
    return ids


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("store")
    (root / ".dvc").mkdir()
    for name in ("params.yaml", "params.schema.json"):
        shutil.copy(ROOT / name, root / name)
    return Store(root, fill(root))


@pytest.fixture
def store(filled: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(filled.root)
    return filled


def read(*names: str) -> list[Record]:
    from anneal.tracking.records import read_runs

    return read_runs("sqlite:///mlflow.db", "anneal", names)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("latest", "one"),
        ("latest~1", "two"),
        ("train@a", "two.train"),
        ("train@a~1", "one.train"),
        ("train", "two.train"),
        ("evaluate~1", "two.evaluate"),
        ("digits two", "two"),
        ("abcdef02", "two"),
        ("tabby-curs", "two"),
        ("sooty-toes", "one"),
        ("lr-range", "one.range"),
    ],
)
def test_names_of_runs(store: Store, name: str, key: str) -> None:
    assert read(name)[0].id == store[key]


def test_ids_and_their_first_digits(store: Store) -> None:
    for key in ("one", "two.train"):
        assert [record.id for record in read(store[key], store[key][:12])] == [store[key]] * 2


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (
            "tabby-cur",
            "'tabby-cur': no such run, allowed: a run's id or its first digits, .*; did you mean 'tabby-curs'?",
        ),
        ("train@b", "'train@b': no such run, .*; did you mean 'train@a'?"),
        ("latest~9", "'latest~9': no such run; there are 2"),
        ("train@a~2", "'train@a~2': no such run; there are 2"),
        (
            "abcdef0",
            r"'abcdef0' begins the ids of 2 runs, newest first: \w{8} \(recipe\), \w{8} \(recipe\); give more of an id",
        ),
        ("train a", r"'train a' names 2 runs, newest first: \w{8} \(train@a\), \w{8} \(train@a\); give more of an id"),
        ("f" * 32, "no such run, allowed"),
        ("'; \"drop", "no such run, allowed"),
        ("%", "no such run, allowed"),
        ("", "no such run, allowed"),
    ],
)
def test_names_of_no_run(store: Store, name: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault.replace("?", r"\?")) as caught:
        read(name)
    assert "\n" not in str(caught.value)


def test_a_recipe_with_its_stages(store: Store) -> None:
    one, two, three = read("digits one", "digits two", "digits three")
    assert list(one.stages) == ["train@a", "evaluate"]
    assert one.stages["evaluate"].id == store["one.evaluate"]  # not the newer one that failed
    assert three.stages["train@a"].id == store["one.train"]
    found = compare(one, two)
    assert rows(found.params) == {"optimizer.SGD.lr": ("0.1", "0.2")}
    assert rows(found.metrics) == {"test/accuracy": (0.96, 0.97)}
    assert rows(found.environment) == {"cpu.cores": ("1", "2")} and found.environment[0].stages == ("train@a",)
    assert rows(found.outs) == {"models/a": (MD5["0a"], MD5["1b"])}
    assert found.same["outs"] == {"reports/metrics.json": MD5["3d"]}
    assert found.same["data"] == {
        "name": "digits",
        "digest": "d" * 32,
        "counts.train": "1259",
        "classes": "2",
        "class names": "0 1",
    }
    assert not found.code and not found.data


def test_an_experiment_that_repeated_a_recipe(store: Store) -> None:
    found = compare(*read("digits one", "sooty-toes"))
    assert found.a["id"] == found.b["id"]
    assert rows(found.environment) == {"package numpy": ("2.1.0", "9.9.9")}


def test_a_recipe_and_a_stage(store: Store) -> None:
    assert [record.id for record in read("digits one", "train@a")] == [store["one.train"], store["two.train"]]
    with pytest.raises(UserError, match="digits three: this recipe has no run of evaluate to compare; it has train@a"):
        read("digits three", "evaluate~1")


def test_params_of_a_stage(store: Store) -> None:
    train, evaluate = read("train@a", "evaluate~1")
    assert train.params == {"optimizer.SGD.lr": "0.2", "seed": "0", "split.test": "0.2"}
    assert evaluate.params["evaluate.bootstrap"] == "9"


def test_the_command(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diff", "latest~1", "latest"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"A  digits two  recipe  {store['two'][:8]}") and "\033" not in text
    assert "optimizer.SGD.lr  0.2 -> 0.1" in text
    assert cli.main(["diff", "train@a", "train@a"]) == 0
    assert "nothing differs; the bytes of 1 out agree" in capsys.readouterr().out
    assert cli.main(["diff", "--json", "train@a~1", "train@a"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] == [
        {"key": "optimizer.SGD.lr", "a": "0.1", "b": "0.2", "stages": []}
    ]


def test_a_store_that_is_not_there(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anneal.tracking.records import read_runs

    with pytest.raises(UserError, match=r"none\.db: no such file, so there are no runs yet; train first: make repro"):
        read_runs(f"sqlite:///{tmp_path}/none.db", "anneal", ["latest", "latest~1"])
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(UserError, match=r"tracking\.experiment: found 'other', which has no runs at sqlite:"):
        read_runs("sqlite:///mlflow.db", "other", ["latest", "latest~1"])
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"cannot read the runs at http://me:\*\*\*@127.0.0.1:9: ") as caught:
        read_runs("http://me:s3cret@127.0.0.1:9", "anneal", ["latest", "latest~1"])
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "text.db").write_text("no database, and more than sixteen bytes of it\n" * 100)
    with pytest.raises(UserError, match="cannot read the runs at sqlite:"):
        read_runs(f"sqlite:///{tmp_path}/text.db", "anneal", ["latest", "latest~1"])


def test_an_environment_whose_files_are_lost(store: Store) -> None:
    folder = store.root / "mlruns" / store["one.evaluate"] / "artifacts" / "environment"
    away = folder.rename(folder.with_name("away"))
    try:
        assert read(store["one.evaluate"])[0].files == {}
    finally:
        away.rename(folder)
