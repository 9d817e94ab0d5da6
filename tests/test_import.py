"""The package starts without heavy imports, and PEFT knows its tuners whichever of the two is imported first."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import peft_edge

HEAVY = {"accelerate", "datasets", "matplotlib", "numpy", "pandas", "peft", "sklearn", "timm", "torch", "transformers"}
MODULES = [module.name for module in pkgutil.iter_modules(peft_edge.__path__)]
CHECK = "from peft import PeftType\nassert {'CONV_LORA', 'CONV_ADAPTER'} <= {*PeftType}, sorted(PeftType)\n"


def run(program: str) -> str:
    # Errors of the program stand in the test's own output.
    return subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not HEAVY & {*run("import sys, peft_edge; dir(peft_edge); print(*sys.modules)").split()}


def test_public_names_are_listed_and_found() -> None:
    assert {*peft_edge.__all__} <= {*dir(peft_edge)}
    assert all(getattr(peft_edge, name).__name__ == name for name in peft_edge.__all__)
    with pytest.raises(AttributeError, match="module 'peft_edge' has no attribute 'ConvLora'"):
        peft_edge.ConvLora  # noqa: B018


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, to import torch once")
def test_tuners_are_registered_in_whatever_order_modules_are_imported(tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    statements = [f"import peft_edge.{module}" for module in MODULES]
    statements += [f"from peft_edge import {name}" for name in ("ConvAdapterConfig", "FeatureCache", "load_pretrained")]
    statements += ["import peft_edge", "import peft, peft_edge", "from peft_edge.lean.layers import *"]
    # Each child imports only PEFT and our modules, because its parent has imported all other packages.
    program = f"""
import gc, os, sys, traceback
from contextlib import suppress
from importlib import import_module
import timm, torch, transformers.modeling_utils

def fork(*statements):
    if not (child := os.fork()):
        try:
            for statement in statements:
                exec(statement)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, statements

fork({"; ".join(statements[: len(MODULES)])!r}, f"open({{{str(modules)!r}!r}}, 'w').write(' '.join(sys.modules))")
OURS = "peft", "peft_edge"
for name in open({str(modules)!r}).read().split():
    if name.partition(".")[0] not in OURS and "__" not in name:
        with suppress(ImportError, AttributeError):  # modules that another module generates
            import_module(name)
assert "peft_edge" not in sys.modules
gc.freeze()  # otherwise every child would collect the garbage of all these packages
for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:  # other packages import PEFT
    del sys.modules[name]
for statement in {statements}:
    fork(statement, {CHECK!r})
"""
    run(program)


@pytest.mark.slow
def test_threads_that_import_at_once_register_the_tuners() -> None:
    # Only one imports PEFT, because two threads that import PEFT's modules at once fail without peft_edge, too.
    modules = ["peft", *(f"peft_edge.{name}" for name in ("config", "metrics", "plan", "records"))]
    run(f"""
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
import timm, torch, transformers.modeling_utils
import peft_edge
sys.setswitchinterval(1e-5)
with ThreadPoolExecutor(5) as threads:
    list(threads.map(import_module, {modules}))
{CHECK}""")


@pytest.mark.slow
def test_package_imports_only_what_peft_and_timm_import() -> None:
    program = """
import sys
import peft, timm, wrapt
before = {name.partition(".")[0] for name in sys.modules}
import peft_edge
print(*{name.partition(".")[0] for name in sys.modules} - before)
"""
    assert run(program).split() == ["peft_edge"]
