"""The rules of the architecture, kept by walking the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("*.py") if path.stem != "__init__")
EXEMPT = {"anneal", "anneal.environment", "anneal.tracking", "stages"}
"""Modules that cannot change an out: dvc.yaml does not name them, and what they import is not followed."""

LAYERS = [
    {"params", "seeding", "progress", "processes"},
    {"store"},
    {"sources", "decoding", "splitting", "spooling", "statistics", "preprocess"},
    {"models", "optimizers", "schedules", "batching", "augment", "transforms", "mixing", "diagnosis"},
    {"training"},
    {
        *("views", "tta", "ensemble", "soups", "calibration", "metrics", "significance", "paired", "microbatch"),
        *("predicting", "export", "candidates", "breakdown", "figures", "baselines", "cost"),
        *("mistakes", "saliency", "label_errors", "near_duplicates", "robustness"),
    },
    {"reporting", "serving", "evaluation", "inspection"},
    {"environment", "comparison"},
    {"tracking", "pyfunc"},
    {"conflicts", "recipe", "reference", "studies", "search", "experiments", "ablation", "seeds", "cli"},
]
"""Imports run from a later line to an earlier one, or within a line."""


def file_of(module: str) -> Path | None:
    base = ROOT if module.split(".")[0] == "stages" else SRC
    path = base.joinpath(*module.split("."))
    if path.with_suffix(".py").exists():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").exists() else None


def type_checking_only(tree: ast.AST) -> set[ast.AST]:
    guarded: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            guarded.update(child for statement in node.body for child in ast.walk(statement))
    return guarded


def direct_imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, those for type checkers alone left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = type_checking_only(tree)
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def modules_of(stage: str) -> tuple[set[Path], set[str]]:
    """Files of this checkout that a stage imports, transitively, and the outside packages that they import."""
    files: set[Path] = set()
    outside: set[str] = set()
    todo = [f"stages.{stage}"]
    seen: set[str] = set()
    while todo:
        module = todo.pop()
        if module in seen or module in EXEMPT or module.startswith("anneal.tracking."):
            continue
        seen.add(module)
        path = file_of(module)
        if path is None:
            if module.split(".")[0] not in ("anneal", "stages"):
                outside.add(module.split(".")[0])
            continue
        # A package's __init__.py runs too, but no code that affects a result may stand in one.
        if path.name != "__init__.py":
            files.add(path)
        todo.extend(direct_imports(path))
    return files, outside


def blocks() -> dict[str, dict]:
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {name: block.get("do", block) for name, block in stages.items()}


def code_deps(stage: str) -> set[Path]:
    files: set[Path] = set()
    for dep in blocks()[stage]["deps"]:
        path = ROOT / dep
        if dep.startswith("src/") and path.is_dir():
            files.update(p for p in path.rglob("*.py") if p.name != "__init__.py")
        elif dep.endswith(".py"):
            assert path.exists(), f"dvc.yaml: {stage} names {dep}, which does not exist"
            files.add(path)
    return files


def test_every_stage_has_a_block_and_a_description() -> None:
    assert sorted(blocks()) == STAGES
    for name, block in blocks().items():
        assert block["desc"], name
        assert block["cmd"].startswith(f"exec python -m stages.{name}")


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_imports(stage: str) -> None:
    imported, _ = modules_of(stage)
    named = code_deps(stage)
    missing = sorted(p.relative_to(ROOT).as_posix() for p in imported - named)
    extra = sorted(p.relative_to(ROOT).as_posix() for p in named - imported)
    assert not missing, f"dvc.yaml: deps of {stage} lack {missing}"
    assert not extra, f"dvc.yaml: deps of {stage} name {extra}, which it does not import"


def test_templates_are_deps_of_the_stage_that_fills_them_in() -> None:
    templates = {path for path in (SRC / "anneal").rglob("*") if path.suffix in (".html", ".css", ".j2")}
    assert templates
    for stage in STAGES:
        beside = {path.parent for path in modules_of(stage)[0]}
        needed = {path.relative_to(ROOT).as_posix() for path in templates if path.parent in beside}
        assert needed <= set(blocks()[stage]["deps"]), stage


@pytest.mark.parametrize("stage", ["preprocess", "augment", "diagnose", "report"])
def test_no_torch_where_none_is_needed(stage: str) -> None:
    _, outside = modules_of(stage)
    assert not outside & {"torch", "pytorch_lightning", "torchmetrics"}


def test_evaluate_needs_no_lightning() -> None:
    assert "pytorch_lightning" not in modules_of("evaluate")[1]


def sources() -> list[Path]:
    return sorted((SRC / "anneal").rglob("*.py"))


def test_only_training_imports_lightning_and_only_tracking_mlflow() -> None:
    for path in [*sources(), *(ROOT / "stages").glob("*.py")]:
        packages = {name.split(".")[0] for name in direct_imports(path)}
        relative = path.relative_to(ROOT).as_posix()
        if "pytorch_lightning" in packages:
            assert relative.startswith("src/anneal/training/"), f"{relative} imports pytorch_lightning"
        if "mlflow" in packages:
            # pyfunc.py is the script that MLflow itself runs to build the logged model.
            ours = relative.startswith("src/anneal/tracking/") or relative == "src/anneal/pyfunc.py"
            assert ours, f"{relative} imports mlflow"
        assert "lightning" not in packages, f"{relative} imports the other Lightning package"
        assert "torchvision" not in packages, f"{relative} imports torchvision"
        # tracking tags a run with the hash that dvc.lock gives its outs, cli.py mends dvc.lock, plan.py asks where the cache is.
        of_dvc = ("src/anneal/tracking/names.py", "src/anneal/cli.py", "src/anneal/experiments/plan.py")
        assert "dvc" not in packages or relative in of_dvc, relative


def layer(module: str) -> int:
    part = module.split(".")[1]
    for number, names in enumerate(LAYERS):
        if part in names:
            return number
    raise AssertionError(f"{module} stands in no layer: add it to LAYERS")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def test_imports_run_downward() -> None:
    faults = []
    for path in sources():
        module = module_of(path)
        if module == "anneal" or module.endswith(".config"):
            continue
        for name in direct_imports(path):
            ours = name.startswith("anneal.") and file_of(name) and not name.endswith(".config")
            if ours and layer(name) > layer(module):
                faults.append(f"{module} imports {name}")
    assert not faults


def test_no_import_cycles() -> None:
    graph = {
        module_of(path): {n for n in direct_imports(path) if n.startswith("anneal.") and file_of(n)}
        for path in sources()
    }
    state: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != 1, " -> ".join((*trail, module))
        if state.get(module) == 2:
            return
        state[module] = 1
        for name in sorted(graph.get(module, ())):
            if name != module:
                visit(name, (*trail, module))
        state[module] = 2

    for module in graph:
        visit(module, ())


def test_init_files_hold_no_code() -> None:
    for path in [p for p in sources() if p.name == "__init__.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.parent.name == "tracking":  # which no stage's deps name: its __init__.py may give its names
            tree.body = [n for n in tree.body if not isinstance(n, ast.ImportFrom | ast.Assign)]
        assert all(isinstance(n, ast.Expr) for n in tree.body), f"{path} holds code"


def test_no_pickle_and_no_shell() -> None:
    for path in [*sources(), *(ROOT / "stages").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                text = ast.unparse(node)
                assert "shell=True" not in text, f"{path}:{node.lineno}"
                assert not text.startswith(("pickle.load", "joblib.load", "yaml.load(")), f"{path}:{node.lineno}"
                assert "allow_pickle=True" not in text, f"{path}:{node.lineno}"
                if text.startswith("torch.load"):
                    assert "weights_only=True" in text, f"{path}:{node.lineno}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_only_wires(stage: str) -> None:
    assert len((ROOT / "stages" / f"{stage}.py").read_text(encoding="utf-8").splitlines()) <= 80
