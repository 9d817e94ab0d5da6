"""The package is layered: imports point only downwards, files stay short, and every module has its test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_edge"
LINE_LIMIT = 600

# A file belongs to the longest entry that it is, or lies under. A module imports lower layers, and its own layer only
# within its own folder of the package.
LAYERS = {
    "peft_edge/_compat.py": 0,
    "peft_edge/files.py": 0,
    "peft_edge/functional/": 1,
    "peft_edge/roles.py": 1,
    "peft_edge/records.py": 1,
    "peft_edge/backbones/": 2,
    "peft_edge/data/": 2,
    "peft_edge/lean/": 2,
    "peft_edge/metrics.py": 2,
    "peft_edge/optim/": 2,
    "peft_edge/profiling/": 2,
    "peft_edge/tuners/": 3,
    "peft_edge/config/": 4,
    "peft_edge/export/": 4,
    "peft_edge/hub/": 4,
    "peft_edge/methods.py": 4,
    "peft_edge/profiling/callback.py": 4,
    "peft_edge/profiling/analysis.py": 5,
    "peft_edge/profiling/__init__.py": 5,  # gathers the names of its folder
    "peft_edge/bench/": 6,
    "peft_edge/plan.py": 6,
    "peft_edge/training/": 6,
    "peft_edge/report/": 7,
    "peft_edge/study/": 7,
    "peft_edge/export/commands.py": 7,
    "peft_edge/cli.py": 8,
    "train.py": 8,
}

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*PACKAGE.rglob("*.py"), ROOT / "train.py"]
    if path.exists() and path != PACKAGE / "__init__.py"  # the public interface gathers names from every layer
)
MODULES = [source for source in SOURCES if source.startswith("peft_edge/") and not source.endswith("/__init__.py")]


def layer_of(source: str) -> int:
    entries = [entry for entry in LAYERS if source == entry or (entry.endswith("/") and source.startswith(entry))]
    if not entries:
        raise AssertionError(f"{source} is not in the table of layers: give it a line in LAYERS.")
    return LAYERS[max(entries, key=len)]


def folder_of(source: str) -> str:
    """The folder of the package that `source` lies in, or the file itself directly under the package."""
    return "/".join(source.split("/")[:2])


def source_of(module: str) -> str | None:
    """The file of a dotted module name, None if there is no such module (then it is a name inside one)."""
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate.relative_to(ROOT).as_posix()
    return None


def imported_sources(source: str, code: str) -> set[str]:
    """The files of this project that `code` imports, anywhere in it, functions and TYPE_CHECKING blocks included."""
    parents = source.removesuffix(".py").split("/")[:-1]
    modules: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            # `from package import module` reaches the module, `from module import name` only the module.
            modules |= {name if source_of(name) else base for name in names}
    ours = {module for module in modules if module.split(".")[0] in ("peft_edge", "train")}
    return {found for module in ours if (found := source_of(module))}


def violations(source: str, code: str) -> list[str]:
    found = []
    for target in sorted(imported_sources(source, code)):
        if target == "peft_edge/__init__.py":
            if layer_of(source) < 8:
                found.append(f"{source} imports the public interface, which stands above it: import the module itself")
        elif layer_of(target) > layer_of(source):
            found.append(f"{source} (layer {layer_of(source)}) imports upwards: {target} (layer {layer_of(target)})")
        elif layer_of(target) == layer_of(source) and folder_of(target) != folder_of(source):
            found.append(f"{source} imports {target}, which is of its own layer ({layer_of(source)})")
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_imports_point_downwards(source: str) -> None:
    assert violations(source, (ROOT / source).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", SOURCES)
def test_files_stay_short(source: str) -> None:
    assert len((ROOT / source).read_text(encoding="utf-8").splitlines()) <= LINE_LIMIT


@pytest.mark.parametrize("source", MODULES)
def test_every_module_has_its_test(source: str) -> None:
    folder, _, name = source.removeprefix("peft_edge/").rpartition("/")
    assert (ROOT / "tests" / folder / f"test_{name}").is_file()


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("peft_edge/roles.py", "import peft_edge.backbones.heads"),
        ("peft_edge/roles.py", "from peft_edge.backbones import heads"),
        ("peft_edge/roles.py", "from .backbones.heads import head_names"),
        ("peft_edge/roles.py", "def f():\n    from peft_edge.backbones import load_backbone"),
        ("peft_edge/roles.py", "from peft_edge import ConvLoraConfig"),
        ("peft_edge/data/sources.py", "from ..backbones import heads"),
    ],
)
def test_a_wrong_import_is_found(source: str, code: str) -> None:
    assert len(violations(source, code)) == 1


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("peft_edge/backbones/loading.py", "from peft_edge.backbones.heads import head_names"),
        ("peft_edge/backbones/loading.py", "from . import heads"),
        ("peft_edge/backbones/loading.py", "from peft_edge.roles import ROLES"),
        ("peft_edge/hub/push.py", "from peft_edge.backbones import load_backbone"),
        ("train.py", "import torch\nfrom peft_edge import ConvLoraConfig"),
    ],
)
def test_a_right_import_passes(source: str, code: str) -> None:
    assert violations(source, code) == []


def test_a_file_outside_the_table_is_found() -> None:
    with pytest.raises(AssertionError, match=r"peft_edge/utils\.py is not in the table"):
        layer_of("peft_edge/utils.py")
