"""Check the structure of the package: layers, sizes, unique names, and a test file for every module."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_edge"
LINE_LIMIT = 600

# The longest entry that matches a file gives its layer. A module may import lower layers, and modules of its own layer
# that are in the same folder.
LAYERS = {
    "peft_edge/_compat.py": 0,
    "peft_edge/allocator.py": 0,
    "peft_edge/files.py": 0,
    "peft_edge/names.py": 0,
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
    "peft_edge/export/device.py": 5,
    "peft_edge/export/device_states.py": 5,
    "peft_edge/export/executorch_step.py": 5,
    "peft_edge/export/step_checks.py": 5,
    "peft_edge/export/step_memory.py": 5,
    "peft_edge/export/__init__.py": 5,  # gathers the names of its folder
    "peft_edge/hub/": 4,
    "peft_edge/methods.py": 4,
    "peft_edge/profiling/callback.py": 4,
    "peft_edge/profiling/analysis.py": 5,
    "peft_edge/profiling/__init__.py": 5,  # gathers the names of its folder
    "peft_edge/bench/": 6,
    "peft_edge/plan.py": 6,
    "peft_edge/training/": 6,
    "peft_edge/device_plan.py": 7,
    "peft_edge/report/": 7,
    "peft_edge/study/": 7,
    "peft_edge/cli/": 8,
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
        raise AssertionError(f"{source} has no layer: add it to LAYERS.")
    return LAYERS[max(entries, key=len)]


def folder_of(source: str) -> str:
    """Return the folder of the package that contains the file `source`.

    If the file is directly in the package, return the file itself.
    """
    return "/".join(source.split("/")[:2])


def source_of(module: str) -> str | None:
    """Return the file of the module with this dotted name. If the name is not that of a module, return None."""
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate.relative_to(ROOT).as_posix()
    return None


def imported_sources(source: str, code: str) -> set[str]:
    """Return the files of this project that `code` imports, also inside functions and TYPE_CHECKING blocks.

    `source` is the file that contains `code`.
    """
    parents = source.removesuffix(".py").split("/")[:-1]
    modules: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            # `from package import module` imports the module; `from module import name` imports `module`.
            modules |= {name if source_of(name) else base for name in names}
    ours = {module for module in modules if module.split(".")[0] in ("peft_edge", "train")}
    return {found for module in ours if (found := source_of(module))}


def violations(source: str, code: str) -> list[str]:
    found = []
    for target in sorted(imported_sources(source, code)):
        if target == "peft_edge/__init__.py":
            if layer_of(source) < 8:
                found.append(f"{source} imports the public interface, which is above it: import the module itself")
        elif layer_of(target) > layer_of(source):
            found.append(f"{source} (layer {layer_of(source)}) imports upwards: {target} (layer {layer_of(target)})")
        elif layer_of(target) == layer_of(source) and folder_of(target) != folder_of(source):
            found.append(f"{source} imports {target} of the same layer ({layer_of(source)}) in another folder")
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_imports_point_downwards(source: str) -> None:
    assert violations(source, (ROOT / source).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", SOURCES)
def test_no_file_is_too_long(source: str) -> None:
    assert len((ROOT / source).read_text(encoding="utf-8").splitlines()) <= LINE_LIMIT


@pytest.mark.parametrize("source", MODULES)
def test_every_module_has_a_test_file(source: str) -> None:
    folder, _, name = source.removeprefix("peft_edge/").rpartition("/")
    stem = name.removesuffix(".py").strip("_")
    assert list((ROOT / "tests" / folder).glob(f"test_{stem}*.py"))


def top_level_imports(source: str) -> set[str]:
    """Return the files of this project that `source` imports at its top level."""
    tree = ast.parse((ROOT / source).read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return imported_sources(source, ast.unparse(tree)) - {source}


def test_no_import_circle() -> None:
    waiting = {source: top_level_imports(source) for source in SOURCES}
    while ready := [source for source, targets in waiting.items() if not targets & waiting.keys()]:
        for source in ready:
            del waiting[source]
    assert waiting == {}


def test_public_names_are_unique() -> None:
    places: dict[str, list[str]] = {}
    for module in MODULES:
        for node in ast.parse((ROOT / module).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_module_names_are_unique() -> None:
    # Every PEFT tuner has a config, a layer and a model.
    names = Counter(Path(module).stem for module in MODULES if Path(module).stem not in ("config", "layer", "model"))
    assert [name for name, count in names.items() if count > 1] == []


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
def test_an_upward_import_is_found(source: str, code: str) -> None:
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
def test_a_downward_import_passes(source: str, code: str) -> None:
    assert violations(source, code) == []


def test_a_file_without_a_layer_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"peft_edge/utils\.py has no layer"):
        layer_of("peft_edge/utils.py")


def silent_handlers(code: str) -> list[int]:
    """Return the lines at which `code` ignores an exception without saying why.

    An exception is ignored if it is not raised again, not used and not logged. A comment counts as an explanation.
    """
    lines, found = code.splitlines(), []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ExceptHandler):
            inner = [child for statement in node.body for child in ast.walk(statement)]
            is_used = any(isinstance(child, ast.Name) and child.id == node.name for child in inner)
            is_silent = not is_used and not any(isinstance(child, ast.Raise) for child in inner)
            first, last = node.lineno - 1, node.end_lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            is_silent, first, last = True, node.lineno - 2, node.lineno
        else:
            continue
        if is_silent and "logger." not in "".join(lines[first:last]) and "#" not in "".join(lines[first:last]):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_no_exception_is_passed_over_without_a_reason(source: str) -> None:
    assert silent_handlers((ROOT / source).read_text(encoding="utf-8")) == []


def test_exceptions_that_are_passed_over_are_found() -> None:
    assert silent_handlers("try:\n    f()\nexcept ValueError:\n    pass") == [3]
    assert silent_handlers("with suppress(OSError):\n    f()") == [1]
    assert not silent_handlers("try:\n    f()\nexcept ValueError:  # f has logged it\n    pass")
    assert not silent_handlers("try:\n    f()\nexcept ValueError as error:\n    print(error)")
