"""Predict the memory of a process that trains an exported step in ONNX Runtime."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from peft_edge.export.onnx_graph import write_onnx_graph
from peft_edge.export.step_checks import MALLOC_TUNABLES
from peft_edge.export.train_step import CapturedGraph, capture_graph
from peft_edge.files import requires_extra

# `NODE_BYTES` is the predicted memory of each node of the graph, without the result of the node. For tensors, the
# allocator is predicted to take `ALLOCATOR_FACTOR` times the bytes that `step_memory` returns. With these values, the
# predictions for five exported steps of four networks are within 9 % of the measured peaks, which are 71 to 323 MiB.
NODE_BYTES, ALLOCATOR_FACTOR = 8192, 1.6
# Bytes of an element in the ONNX file, where float64 becomes float32.
_BYTES = {torch.float64: 4, torch.float32: 4, torch.int64: 8, torch.int32: 4, torch.bool: 1}


def step_memory(graph: CapturedGraph) -> tuple[int, int]:
    """Return the bytes of the constants in a graph, and the peak bytes of all other tensors while the graph runs.

    The function assumes that the nodes run in the order of the graph, and that a tensor is freed after its last use.
    It also assumes that an elementwise operator or a reshape overwrites an operand if this operand has the size of the
    result and no later node uses it. The inputs and outputs of the graph stay in memory until the end of the step,
    because the caller holds them.
    """
    nodes = list(graph.module.graph.nodes)
    outputs: Any = graph.module.graph.output_node().args[0]
    kept = {*graph.module.graph.find_nodes(op="placeholder"), *outputs}
    last = {source: node for node in nodes for source in node.all_input_nodes}
    live = peak = sum(_size(node) for node in graph.module.graph.find_nodes(op="placeholder"))
    for node in nodes:
        if node.op != "call_function":
            continue
        freed = [
            _size(source)
            for source in {*node.all_input_nodes, node}
            if source.op == "call_function" and source not in kept and last.get(source, node) is node
        ]
        in_place = _writes_in_place(node) and _size(node) in freed
        peak = max(peak, live + (0 if in_place else _size(node)))
        live += _size(node) - sum(freed)
    constants = sum(value.numel() * _BYTES[value.dtype] for value in graph.module.buffers())
    return constants, peak


def _writes_in_place(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target is torch.ops.aten.reshape.default


def _size(node: fx.Node) -> int:
    """Return the bytes that all result tensors of a node take in ONNX, where float64 becomes float32."""
    values = node.meta["val"]
    values = [values] if isinstance(values, Tensor) else [value for value in values if isinstance(value, Tensor)]
    return sum(value.numel() * _BYTES[value.dtype] for value in values)


@cache
def runtime_memory() -> int:
    """Run a tiny graph in ONNX Runtime in a new Python process, and return that process's peak memory in bytes.

    Raises:
        ImportError: If onnx or onnxruntime is not installed.
    """
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    tiny = capture_graph(lambda values, _: {"y": F.conv2d(values["x"], values["x"]).relu()}, {"x": x}, {})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiny.onnx"
        file.write_bytes(write_onnx_graph(tiny).SerializeToString())
        script = Path(__file__).with_name("onnx_steps.py")
        code = (
            f"import numpy, runpy; names = runpy.run_path({str(script)!r}); "
            f"names['open_session']({str(file)!r}).run(None, {{'x': numpy.zeros((1, 3, 8, 8), 'float32')}}); "
            "print(names['process_peak_bytes']())"
        )
        environment = {**os.environ, "GLIBC_TUNABLES": MALLOC_TUNABLES}
        with requires_extra("onnx"):
            import onnxruntime  # noqa: F401 - raises an error here instead of in the new process
        ended = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
        )
    return int(ended.stdout)


def runtime_process_memory(graph: CapturedGraph) -> int:
    """Predict the peak memory in bytes of a Python process in which ONNX Runtime runs `graph` on this machine.

    Raises:
        ImportError: If onnx or onnxruntime is not installed.
    """
    constants, tensors = step_memory(graph)
    nodes = len(graph.module.graph.nodes)
    return runtime_memory() + NODE_BYTES * nodes + round(ALLOCATOR_FACTOR * (constants + tensors))
