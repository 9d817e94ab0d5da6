"""The process that trains an exported folder imports no PyTorch."""

from __future__ import annotations

import subprocess
import sys

from peft_edge.export import onnx_steps


def test_module_imports_no_pytorch() -> None:
    code = f"""
import runpy, sys
runpy.run_path({onnx_steps.__file__!r}, run_name="steps")
assert not {{"torch", "peft", "timm", "peft_edge"}} & sys.modules.keys(), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_of_this_process_is_read() -> None:
    assert 2**26 < onnx_steps.process_peak_bytes() < 2**36
