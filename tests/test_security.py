"""What docs/security.md promises: nothing is unpickled, names are only text, secrets stay where they were put."""

from __future__ import annotations

import ast
import base64
import contextlib
import http.server
import io
import json
import os
import pickle
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from anneal import cli, params, tracking
from anneal.augment import compile_policy, policy_from_json, policy_to_json
from anneal.models.transfer import read_member
from anneal.params import UserError
from anneal.preprocess import build_store
from anneal.serving import load_predictor, print_predictions
from anneal.sources import open_source
from anneal.store import SplitWriter, Store, open_store, write_json
from tests.raw_data import png, write_folder, write_tar, write_zip
from tests.test_tracking import FOREIGN, free_port, wait_for
from tests.tiny_project import write_member, write_store

ROOT = Path(__file__).resolve().parents[1]

# ---- the code: nothing that loads code from a file ------------------------------------------------------------------

MODULES = {"cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve", "yaml", "_pickle"}
"""Modules whose loaders run what a file says (yaml: PyYAML; ruamel.yaml's safe and round-trip loaders do not)."""

BUILTINS = {"__import__", "compile", "eval", "exec"}
SHELLS = {"os.system", "os.popen"}

LOADERS = {
    "extractall",
    "import_module",
    "load_from_checkpoint",
    "load_model",
    "read_hdf",
    "read_pickle",
    "unsafe_load",
}
"""Methods and functions of any module that unpickle, import, or unpack to the disk."""

SAFE_ONLY_WITH = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "torch.jit.load": ("never", True),
    "torch.hub.load": ("never", True),
    "torch.export.load": ("never", True),
}
"""Loader to the argument, a literal, that makes it safe."""

ALLOWED = {
    ("src/anneal/spooling.py", "joblib"): "Parallel: its processes send each other their own work, and read no file",
    (
        "src/anneal/models/custom.py",
        "import_module",
    ): "model.name: package.module:callable names code, by the user's word",
}
"""Where one of them stands all the same, and why."""


def unsafe(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of whatever in Python source could run code from a file."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
            found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            found = [str(node.module)]
        else:
            continue
        yield from ((node.lineno, name.split(".")[0]) for name in found if name.split(".")[0] in MODULES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((node.lineno, fault) for fault in unsafe_call(node, names))


def unsafe_call(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    first, *rest = ast.unparse(call.func).split(".")
    name = ".".join([names.get(first, first), *rest])
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    literal = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
    if (name in BUILTINS and first not in names) or name in SHELLS or name.split(".")[-1] in LOADERS:
        yield name.split(".")[-1]
    if name in SAFE_ONLY_WITH:
        argument, value = SAFE_ONLY_WITH[name]
        if argument not in literal or literal[argument] is not value:
            yield name
    if name == "ruamel.yaml.YAML" and literal.get("typ", "safe" if "typ" in given else "rt") not in ("safe", "rt"):
        yield name
    if "ckpt_path" in given and literal.get("ckpt_path", "") is not None and literal.get("weights_only") is not True:
        yield "ckpt_path"
    if "shell" in given and literal.get("shell") is not False:
        yield "shell"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", "pickle"),
        ("from joblib import load", "joblib"),
        ("import yaml\nyaml.safe_load('')", "yaml"),
        ("import torch\ntorch.load(p)", "torch.load"),
        ("import torch\ntorch.load(p, weights_only=False)", "torch.load"),
        ("import torch as t\nt.load(p, weights_only=flag)", "torch.load"),
        ("from torch import load as read\nread(p)", "torch.load"),
        ("import torch\ntorch.jit.load(p)", "torch.jit.load"),
        ("import numpy as np\nnp.load(p)", "numpy.load"),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", "numpy.load"),
        ("from numpy import load\nload(p, None)", "numpy.load"),
        ("import pandas as pd\npd.read_pickle(p)", "read_pickle"),
        ("import mlflow\nmlflow.pyfunc.load_model(u)", "load_model"),
        ("Module.load_from_checkpoint(p)", "load_from_checkpoint"),
        ("trainer.fit(m, ckpt_path=p)", "ckpt_path"),
        ("from ruamel.yaml import YAML\nYAML(typ='unsafe')", "ruamel.yaml.YAML"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("__import__(name)", "__import__"),
        ("import importlib\nimportlib.import_module(name)", "import_module"),
        ("import os\nos.system(text)", "system"),
        ("import subprocess\nsubprocess.run(text, shell=True)", "shell"),
        ("archive.extractall(p)", "extractall"),
    ],
)
def test_the_search_finds_what_loads_code(source: str, found: str) -> None:
    assert [name for _, name in unsafe(source)] == [found]


def test_the_search_passes_what_is_safe() -> None:
    source = """
import os, re, torch, numpy as np
from ruamel.yaml import YAML
torch.load(p, weights_only=True), np.load(p, allow_pickle=False), YAML(typ="safe", pure=True), YAML()
model.eval(), torch.compile(model), re.compile(text), os.execvpe(name, words, environment)
trainer.fit(m, ckpt_path=None), trainer.fit(m, ckpt_path=p, weights_only=True)
"""
    assert not list(unsafe(source))


def test_no_code_is_loaded_from_files() -> None:
    paths = [path for folder in ("src", "stages", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 80
    found = {
        (path.relative_to(ROOT).as_posix(), name): line
        for path in paths
        for line, name in unsafe(path.read_text(encoding="utf-8"))
    }
    strangers = [f"{path}:{line}: {name}" for (path, name), line in found.items() if (path, name) not in ALLOWED]
    assert not strangers, "these could run what a file says; see docs/security.md"
    assert found.keys() >= ALLOWED.keys(), "an exception that no file needs any more"


# ---- the data: a pickle that would leave a trace, in each place that is read ----------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def as_pickle(trap: Trap) -> bytes:
    return pickle.dumps(trap)


def as_torch(trap: Trap) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "anneal": trap}, file)
    return file.getvalue()


def as_old_torch(trap: Trap) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "anneal": trap}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def as_numpy(trap: Trap) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([trap, None], dtype=object), allow_pickle=True)
    return file.getvalue()


def as_npz(trap: Trap) -> bytes:
    file = io.BytesIO()
    np.savez(file, mean=np.array([trap, None], dtype=object), std=np.ones(3))
    return file.getvalue()


FORMS: dict[str, Callable[[Trap], bytes]] = {
    "pickle": as_pickle,
    "torch": as_torch,
    "old torch": as_old_torch,
    "numpy": as_numpy,
    "npz": as_npz,
}


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[Path]:
    """The folder that a trap would make; the test fails where one did."""
    folder = tmp_path / "it-was-unpickled"
    yield folder
    assert not folder.exists(), "something was unpickled"


@pytest.mark.parametrize("form", FORMS)
def test_the_traps_work(form: str, tmp_path: Path) -> None:
    loaders: dict[str, Callable[[io.BytesIO], Any]] = {
        "pickle": pickle.load,
        "torch": lambda file: torch.load(file, weights_only=False),
        "old torch": lambda file: torch.load(file, weights_only=False),
        "numpy": lambda file: np.load(file, allow_pickle=True),
        "npz": lambda file: np.load(file, allow_pickle=True)["mean"],
    }
    folder = tmp_path / "it-was-unpickled"
    loaders[form](io.BytesIO(FORMS[form](Trap(folder))))
    assert folder.is_dir()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's files, as its stages would leave them."""
    root = tmp_path_factory.mktemp("project")
    store = write_store(root)
    write_member(root, store, "a", 0)
    shutil.copytree(root / "models/a", root / "pretrained/a")
    augmented = root / "data/augmented"
    writer = SplitWriter(augmented / "extra", 8, 8, 3)
    train = store.split("train")
    writer.add(train.take([0])[0], train.samples()[0])
    writer.close()
    policy = compile_policy("light", height=8, width=8, channels=3)
    (augmented / "policy.json").write_text(policy_to_json(policy), encoding="utf-8")
    exported = {"members": ["a"], "views": ["identity"], "average": "logit", "combine": "vote", "temperature": 1.0}
    write_json(root / "reports/evaluation/predictor.json", exported)
    figure = {"accuracy": 0.9, "accuracy_ci": [0.8, 1.0], "macro_f1": 0.9, "nll": 0.1, "ece": 0.1}
    write_json(
        root / "reports/metrics.json", {"test": dict.fromkeys(("single", "tta", "ensemble", "ensemble_tta"), figure)}
    )
    return root


def read_train(root: Path) -> None:
    split = open_store(root / "data/processed").split("train")
    images, labels = next(split.batches(4))
    assert images.dtype == np.uint8 and labels.dtype == np.int64, (images.dtype, labels.dtype)


def read_extra(root: Path) -> None:
    split = Store(root / "data/augmented", open_store(root / "data/processed").info).split("extra")
    assert split.take([0]).dtype == np.uint8 and split.labels.dtype == np.int64


def read_statistics(root: Path) -> None:
    assert set(open_store(root / "data/processed").statistics()) == {"mean", "std"}


def read_samples(root: Path) -> None:
    open_store(root / "data/processed").split("train").samples()


def read_policy(root: Path) -> None:
    policy_from_json((root / "data/augmented/policy.json").read_text(encoding="utf-8"))


def read_predictor(root: Path) -> None:
    load_predictor(root)


def read_start(root: Path) -> None:
    read_member(str(root / "pretrained/a"))


def read_summary(root: Path) -> None:
    with contextlib.chdir(root):
        cli.main(["summary"])


PLACES: dict[str, Callable[[Path], None]] = {
    "data/processed/dataset.json": read_train,
    "data/processed/train/images-00000.npy": read_train,
    "data/processed/train/labels.npy": read_train,
    "data/processed/train/samples.parquet": read_samples,
    "data/processed/statistics.npz": read_statistics,
    "data/augmented/policy.json": read_policy,
    "data/augmented/extra/images-00000.npy": read_extra,
    "data/augmented/extra/labels.npy": read_extra,
    "models/a/model.json": read_predictor,
    "models/a/weights.safetensors": read_predictor,
    "pretrained/a/model.json": read_start,
    "pretrained/a/weights.safetensors": read_start,
    "reports/evaluation/predictor.json": read_predictor,
    "reports/metrics.json": read_summary,
}
"""What later stages and commands read of what earlier ones wrote, and how."""

IN_WORDS = ("models/", "pretrained/", "reports/evaluation/", "data/processed/dataset.json")
"""Places where a file that is none is a fault that is said in one line."""


@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_in_place_of_an_out_is_not_loaded(place: str, project: Path, tmp_path: Path, traced: Path) -> None:
    read, root = PLACES[place], tmp_path / "project"
    shutil.copytree(project, root)
    read(root)
    for form, write in FORMS.items():
        (root / place).write_bytes(write(Trap(traced)))
        refusal = UserError if place.startswith(IN_WORDS) else Exception
        with pytest.raises(refusal) as refused:
            read(root)
        assert not traced.exists(), form
        if refusal is UserError:
            (line,) = str(refused.value).splitlines()
            assert "damaged" in line or "cannot be read" in line


def write_extension(path: Path, columns: dict[str, list[str]], trap: Trap) -> None:
    """Write a table whose columns say that they are of a pickled type, which pyarrow once loaded (CVE-2023-47248)."""
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(trap)}
    fields = [pa.field(name, pa.string(), metadata=metadata) for name in columns]
    pa.parquet.write_table(pa.table(list(columns.values()), schema=pa.schema(fields)), path)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_table_with_pickles_in_it_is_text(tmp_path: Path, traced: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(ord(name)))
    path = tmp_path / "labels.parquet"
    write_extension(path, {"path": ["a.png", "b.png"], "label": ["cat", "dog"]}, Trap(traced))
    with contextlib.suppress(UserError):
        assert [item.load() for item in open_source(path)]
    values = pa.array([pickle.dumps(Trap(traced))] * 2, pa.binary())
    pa.parquet.write_table(pa.table({"path": ["a.png", "b.png"], "label": values}), path)
    with contextlib.suppress(UserError):
        assert [item.load() for item in open_source(path)]
    for data in (FORMS[form](Trap(traced)) for form in FORMS):
        path.write_bytes(data)
        with pytest.raises(UserError, match="no Parquet table"):
            open_source(path)


def test_samples_with_a_pickled_type_are_text(project: Path, tmp_path: Path, traced: Path) -> None:
    shutil.copytree(project / "data", tmp_path / "data")
    columns = {name: ["0", "1"] for name in ("source", "sha256", "label", "width", "height")}
    write_extension(tmp_path / "data/processed/train/samples.parquet", columns, Trap(traced))
    with contextlib.suppress(ValueError):
        read_samples(tmp_path)


STORE = {
    **{"seed": 0, "size": 4, "fit": "stretch", "interpolation": "area", "normalize": "scale", "epsilon": 1e-5},
    **{"val": 0.25, "test": 0.25, "max_rejected": 1.0, "num_workers": 1},
}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_pickles_among_images_are_rejected(kind: str, tmp_path: Path, traced: Path) -> None:
    files = {f"{label}/{i}.png": png(20 * i + ord(label)) for label in "ab" for i in range(6)}
    bad = {f"a/{form.replace(' ', '-')}.{end}": form for form in FORMS for end in ("pkl", "png")}
    files |= {name: FORMS[form](Trap(traced)) for name, form in bad.items()}
    if kind == "folder":
        path = write_folder(tmp_path / "images", files)
    elif kind == "zip":
        path = write_zip(tmp_path / "images.zip", files)
    else:
        path = write_tar(tmp_path / "images.tar.gz", files, "w:gz")
    (tmp_path / "store").mkdir()
    report = build_store(open_source(path), tmp_path / "store", **STORE)
    assert report["num_rejected"] == len(bad) and report["train"] > 0


@pytest.mark.parametrize("form", FORMS)
def test_cifar_in_its_python_version_is_refused(form: str, tmp_path: Path, traced: Path) -> None:
    data = FORMS[form](Trap(traced))
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    folder = write_folder(tmp_path / "cifar-10-batches-py", dict.fromkeys(names, data))
    for kind in ("auto", "cifar"):
        with pytest.raises(UserError):
            list(open_source(folder, kind))
    archive = write_tar(tmp_path / "cifar-10-python.tar.gz", {f"{folder.name}/{name}": data for name in names}, "w:gz")
    (tmp_path / "store").mkdir()
    with pytest.raises(UserError):
        build_store(open_source(archive), tmp_path / "store", **STORE)


@pytest.mark.parametrize("form", FORMS)
def test_idx_files_are_not_unpickled(form: str, tmp_path: Path, traced: Path) -> None:
    names = [f"{split}-{what}-ubyte" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    folder = write_folder(tmp_path / "idx", dict.fromkeys(names, FORMS[form](Trap(traced))))
    with pytest.raises(UserError, match="no IDX file"):
        open_source(folder)


class Foreign:
    """A class that a policy may not bring into being."""

    def __init__(self, *_: object, **__: object) -> None:
        raise AssertionError("a policy made an object of a class of its own choice")


@pytest.mark.parametrize(
    "transform",
    [
        {"__class_fullname__": "os.mkdir", "path": "TRACE"},
        {"__class_fullname__": "albumentations.os.mkdir", "path": "TRACE"},
        {"__class_fullname__": "builtins.exec", "source": "import os; os.mkdir('TRACE')"},
        {"__class_fullname__": "subprocess.Popen", "args": ["mkdir", "TRACE"]},
        {"__class_fullname__": f"{__name__}.Foreign"},
        {"__class_fullname__": "Lambda", "name": "mkdir", "image": "os.mkdir"},
        {"__class_fullname__": "albumentations.augmentations.other.lambda_transform.Lambda", "__name__": "os.mkdir"},
    ],
)
def test_a_policy_names_no_class_of_elsewhere(transform: dict[str, Any], traced: Path) -> None:
    written = policy_to_json(compile_policy("light", height=8, width=8, channels=3))
    transform = json.loads(json.dumps(transform).replace("TRACE", str(traced)))
    inner = json.loads(written)
    inner["transform"]["transforms"] = [{"p": 1.0, **transform}]
    for values in (inner, {"transform": {"p": 1.0, **transform}}):
        with pytest.raises(UserError, match="not a policy of this version"):
            policy_from_json(json.dumps(values))
    policy_from_json(written)


# ---- resuming -------------------------------------------------------------------------------------------------------


def test_a_planted_checkpoint_is_passed_over_with_a_word(tmp_path: Path, traced: Path) -> None:
    from anneal.training.checkpoint import newest, write
    from anneal.training.state import RunState

    state = RunState(tmp_path / "a", {"params": "p", "data": "d", "code": "c", "packages": "k"})
    state.begin()
    sound = {
        "fingerprint": state.fingerprint,
        "position": {"epoch": 1, "round": 0, "step": 1, "world_size": 1},
        "peak_rate": 0.1,
        "range_test": None,
    }
    write(state.folder / "checkpoint-0000000001.ckpt", {"anneal": sound})
    planted = {f"checkpoint-{10 + i:010}.ckpt": form(Trap(traced)) for i, form in enumerate(FORMS.values())}
    whole = (state.folder / "checkpoint-0000000001.ckpt").read_bytes()
    planted |= {"checkpoint-0000000098.ckpt": whole[: len(whole) // 2], "checkpoint-0000000099.ckpt": b""}
    for name, data in planted.items():
        (state.folder / name).write_bytes(data)
    file = io.BytesIO()
    torch.save({"anneal": sound, "optimizer_states": Trap(traced)}, file)
    (state.folder / "checkpoint-0000000097.ckpt").write_bytes(file.getvalue())
    # One that holds no pickle, but not what a checkpoint does either.
    write(state.folder / "checkpoint-0000000096.ckpt", {"anneal": {**sound, "fingerprint": None}})
    lacking = {key: value for key, value in sound.items() if key != "fingerprint"}
    write(state.folder / "checkpoint-0000000095.ckpt", {"anneal": lacking})
    said: list[str] = []
    found = newest(state, 1, said.append)
    assert found is not None and found.path.name == "checkpoint-0000000001.ckpt"
    for name in [*planted, *(f"checkpoint-00000000{number}.ckpt" for number in (95, 96, 97))]:
        (line,) = [line for line in said if name in line]
        assert len(line.splitlines()) == 1
    (state.folder / "fingerprint.json").write_bytes(as_pickle(Trap(traced)))
    assert state.begun() is None


# ---- names are only text --------------------------------------------------------------------------------------------

SCRIPT = "<script>alert(1)</script>"
CLASSES = [SCRIPT, "\"><img src=x onerror='alert(2)'>", r"$\frac{", "a$b$", "&amp;\x1b[2J", "=1+1"]


class Page(HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that has run, all stages but train, on classes and files with names that are markup."""
    from stages import augment, evaluate, preprocess, report

    root = tmp_path_factory.mktemp("hostile")
    random = np.random.default_rng(0)
    rows = []
    for i in range(10 * len(CLASSES)):
        name = f"{i}\"'><b onload=alert(3)>$.png"
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(root / name)
        rows.append({"path": name, "label": CLASSES[i % len(CLASSES)]})
    pa.parquet.write_table(pa.Table.from_pylist(rows), root / "labels.parquet")
    values = params.merge(
        params.read_yaml(ROOT / "params.yaml"),
        {
            "data": {"path": "labels.parquet"},
            "preprocess": {"size": 8, "normalize": "standardize"},
            "evaluate": {"bootstrap": 100},
            "hardware": {"num_workers": 1},
        },
    )
    values["ensemble"]["members"] = {"a": {"seed": 0}}
    YAML().dump(values, root / "params.yaml")
    shutil.copy(ROOT / "params.schema.json", root)
    member = {"epochs": 1, "lowest_val_loss_epoch": 1, "findings": []}
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(root):
        patch.setenv("LOCAL_RANK", "1")  # a further process tracks nothing, and this is not about tracking
        preprocess.main()
        augment.main()
        write_member(root, open_store("data/processed"), "a", 0)
        settings = {"size": 8, "fit": "stretch", "interpolation": "area"}
        model = json.loads(Path("models/a/model.json").read_text())
        write_json("models/a/model.json", {**model, "preprocessing": settings})
        evaluate.main()
        write_json("reports/diagnosis.json", {"members": {"a": member}})
        report.main()
    return root


def test_the_report_shows_hostile_names_as_text(hostile: Path) -> None:
    text = (hostile / "reports/report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert not page.tags & {"script", "b", "iframe", "object", "link", "base", "form"}
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert all(str(value).startswith("data:image/png;base64,") for key, value in page.attributes if key == "src")
    for name in CLASSES:
        assert name in page.text
    (policy,) = [str(value) for key, value in page.attributes if key == "content" and "-src" in str(value)]
    assert text.count("Content-Security-Policy") == 1 and "default-src 'none'" in policy and "script-src" not in policy


def test_pictures_are_drawn_of_classes_with_dollar_signs(hostile: Path) -> None:
    for name in ("evaluation/confusion.png", "preprocessing/images.png", "augmentation/overview.png"):
        with Image.open(hostile / "reports" / name) as picture:
            picture.load()
    below = [path.relative_to(hostile) for path in (hostile / "reports/augmentation").iterdir()]
    assert len(below) == 1 + len(CLASSES) and all(str(path).isprintable() for path in below)


def test_names_cannot_command_the_terminal(hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = next(hostile.glob("*.png")).read_bytes()
    path = write_zip(tmp_path / "new.zip", {"\x1b]0;title\x07.png": picture, "\x1b[2Jbad\r.png": b"no image"})
    with pytest.raises(UserError, match="1 of 2 files"), contextlib.chdir(hostile):
        print_predictions(load_predictor("."), [path], top=len(CLASSES))
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert text.count("\n") == 1 and text.replace("\n", "").isprintable()
    assert r"\x1b]0;title\x07.png" in printed.out and r"\x1b[2J" in printed.out and r"\x1b[2Jbad\r.png" in printed.err


# ---- secrets --------------------------------------------------------------------------------------------------------

SECRETS = {
    "password in the address": "pw-Zk3s",
    "token in the address": "tok-Q81x",
    "MLFLOW_TRACKING_PASSWORD": "env-pw-77aB",
    "MLFLOW_TRACKING_TOKEN": "env-tok-Lm52",
}

STAGE = """
import sys, time
from pathlib import Path
from anneal import params, tracking
values = params.load()
address = values["tracking"]["uri"]
with tracking.stage_run(values, "train", member="a", outs=[Path("models/a")]) as run:
    run.metrics({"train/loss": 1.0}, 1)
    run.headline({"test/accuracy": 0.5})
    time.sleep(float(sys.argv[1]))
    raise RuntimeError(f"cannot reach {address}")
"""


def secrets_in(data: bytes) -> list[str]:
    """Return which secrets some bytes hold: as they are, or in the base64 of a header of HTTP."""
    found = [what for what, secret in SECRETS.items() if secret.encode() in data]
    for user in ("me", "env-me"):
        for what, secret in SECRETS.items():
            if base64.b64encode(f"{user}:{secret}".encode()) in data:
                found.append(f"{what}, in base64")
    return found


def leaks(root: Path) -> list[str]:
    """Return where below a folder a secret is, but for params.yaml, which is where the user put it."""
    return [
        f"{path.relative_to(root)}: {what}"
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "params.yaml"
        for what in secrets_in(path.read_bytes())
    ]


def repository_with_secret(root: Path, uri: str, path: str = "data/digits.zip") -> Path:
    """Make a git repository whose params.yaml has since got an address with secrets."""
    root.mkdir(parents=True)
    values = params.read_yaml(ROOT / "params.yaml")
    YAML().dump(values, root / "params.yaml")
    shutil.copy(ROOT / "params.schema.json", root)
    (root / ".dvc").mkdir()
    (root / ".gitignore").write_text("/.anneal/\n/mlflow.db*\n/mlruns/\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(root)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "start"]):
        subprocess.run([*git, *command], check=True)
    values = params.merge(values, {"tracking": {"uri": uri}, "data": {"path": path}})
    YAML().dump(values, root / "params.yaml")
    return root


def start_stage(root: Path, seconds: float = 0.0, **environment: str) -> subprocess.Popen[bytes]:
    clean = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    return subprocess.Popen(
        [sys.executable, "-c", STAGE, str(seconds)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**clean, "MLFLOW_HTTP_REQUEST_TIMEOUT": "2", **environment},
    )


def command_lines(process: subprocess.Popen[bytes]) -> bytes:
    """Return the command lines of a process and of all below it, which anybody on the machine can read."""
    lines = []
    with contextlib.suppress(psutil.Error):
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            lines += one.cmdline()
    return "\0".join(lines).encode()


class Echo(http.server.BaseHTTPRequestHandler):
    """A server that refuses every request, and is so careless as to say with which login."""

    def do_POST(self) -> None:
        login, length = self.headers.get("Authorization", ""), int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        shown = login
        if login.startswith("Basic "):
            shown += " is " + base64.b64decode(login.removeprefix("Basic ")).decode()
        message = f"refused: {login} at {self.path}: {shown}"
        body = json.dumps({"error_code": "UNAUTHENTICATED", "message": message}).encode()
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_store_that_cannot_be_reached_gives_no_secret_away(tmp_path: Path, echo: str) -> None:
    password, token = SECRETS["password in the address"], SECRETS["token in the address"]
    user, key = SECRETS["MLFLOW_TRACKING_PASSWORD"], SECRETS["MLFLOW_TRACKING_TOKEN"]
    cases = {
        "refused": (f"http://me:{password}@127.0.0.1:{free_port()}/?token={token}", {"MLFLOW_TRACKING_TOKEN": key}),
        "echo": (f"http://{echo}", {"MLFLOW_TRACKING_USERNAME": "env-me", "MLFLOW_TRACKING_PASSWORD": user}),
    }
    started = {
        name: start_stage(repository_with_secret(tmp_path / name, uri), 1.5, **environment)
        for name, (uri, environment) in cases.items()
    }
    wait_for(lambda: all(psutil.Process(process.pid).children() for process in started.values()))
    shown = {name: command_lines(process) for name, process in started.items()}
    for name, process in started.items():
        out, errors = process.communicate(timeout=120)
        warnings = [line for line in errors.decode().splitlines() if line.startswith("warning: MLflow at ")]
        assert warnings, errors.decode()
        # The last line is the stage's own, of an error that it raised itself.
        said = errors.replace(errors.splitlines()[-1], b"")
        assert not secrets_in(out + said), (name, said.decode())
        assert not secrets_in(shown[name]), name
    assert leaks(tmp_path) == []


def test_a_run_in_the_store_holds_no_secret(tmp_path: Path) -> None:
    address = f"http://me:{SECRETS['password in the address']}@host/?token={SECRETS['token in the address']}"
    root = repository_with_secret(tmp_path / "work", address, path="data/<script>alert(1)|`x`.zip")
    (root / "data/processed").mkdir(parents=True)
    info = {"classes": ["0"], "height": 8, "width": 8, "channels": 1, "counts": {"train": 4}, "digest": "d" * 32}
    write_json(root / "data/processed/dataset.json", info)
    environment = {name: value for name, value in SECRETS.items() if name.startswith("MLFLOW")}
    process = start_stage(root, MLFLOW_TRACKING_URI="sqlite:///mlflow.db", **environment)
    _, errors = process.communicate(timeout=120)
    assert b"warning" not in errors, errors.decode()
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as store:
        (note,) = store.execute("select value from tags where key = 'mlflow.note.content'").fetchone()
        errors_of = store.execute("select value from tags where key = 'error'").fetchall()
        assert store.execute("select count(*) from runs").fetchone() == (2,)
    assert len(errors_of) == 1 and "cannot reach http://me:***@host" in errors_of[0][0]
    assert leaks(root) == []
    # A path may hold what Markdown and its tables are made of.
    assert "<script>" not in note
    (row,) = [line for line in note.splitlines() if ".zip" in line]
    assert row.replace(r"\|", "").count("|") == 3


@pytest.mark.parametrize(
    "text",
    [
        "at postgresql+psycopg2://me:{}@host:5432/db: refused",
        "at http://me:a/b:{}@host/x",
        "at https://{}@host/x",
        "Max retries exceeded with url: /api?a=1&access_token={}&b=2",
        "sqlite:///x.db?password={}",
        "https://host/x?api_key={}",
        "401: Authorization: Bearer {}",
    ],
)
def test_secrets_are_taken_out_of_any_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = SECRETS["token in the address"]
    clean = tracking.redact(text.format(secret))
    assert secret not in clean and "***" in clean
    # What stands in the environment is known, and goes wherever it stands.
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "in-the-environment")
    assert tracking.redact("user me, password in-the-environment: no") == "user me, password ***: no"
    harmless = "sqlite:////a/b.db at http://host:5000/x, me@host"
    assert tracking.redact(harmless) == harmless


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ({"tracking": "postgresql://me:pw-Zk3s@host/db"}, "tracking: found"),
        ({"tracking": ["http://tok-Q81x@host"]}, "tracking: found"),
        ({"tracking": {"uri": ["http://me:pw-Zk3s@host"], "experiment": "x"}}, "tracking.uri: found"),
        ({"tracking": {"uri": "http://host", "experiment": "x", "uris": "http://me:pw-Zk3s@host"}}, "unknown key"),
    ],
)
def test_check_shows_no_secret(section: dict[str, Any], fault: str, tmp_path: Path) -> None:
    values = {**params.read_yaml(ROOT / "params.yaml"), **section}
    YAML().dump(values, tmp_path / "params.yaml")
    with pytest.raises(UserError) as refused:
        params.load(tmp_path / "params.yaml", ROOT / "params.schema.json")
    assert fault in str(refused.value)
    assert not secrets_in(str(refused.value).encode())


def test_a_key_that_stands_twice_is_shown_without_its_address(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("tracking: {uri: 'http://me:pw-Zk3s@host', uri: 'http://tok-Q81x@host'}\n")
    with pytest.raises(UserError, match="duplicate key") as refused:
        params.read_yaml(tmp_path / "params.yaml")
    assert not secrets_in(str(refused.value).encode())


def test_what_is_in_git_holds_no_secret() -> None:
    values = params.read_yaml(ROOT / "params.yaml")
    assert values["tracking"]["uri"] == "sqlite:///mlflow.db"
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {"/.anneal/", "/mlflow.db*", "/mlruns/"} <= set(ignored)


# ---- the audit ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_audit_that_cannot_be_made_fails_in_one_line(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [
            "make",
            "-s",
            "-o",
            f"{tmp_path}/.installed",
            "audit",
            f"VENV={tmp_path}",
            f"AUDITFLAGS=--cache-dir {tmp_path}",
        ],
        cwd=ROOT,
        env={**os.environ, "HTTPS_PROXY": nowhere, "https_proxy": nowhere, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    line, of_make = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert line.startswith("audit: not done, the database of vulnerabilities gave no answer: ") and "Proxy" in line
    assert re.match(r"make(\[\d+\])?: \*\*\* ", of_make)
