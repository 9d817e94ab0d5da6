from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from peft_edge.export.comparison import answers
from peft_edge.export.formats import FORMATS
from peft_edge.export.quantization import quantize_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_weights_become_eight_bits_with_a_scale_for_each_output_channel(tmp_path: Path) -> None:
    conv = nn.Conv2d(3, 8, 3).requires_grad_(False)
    conv.weight.mul_(torch.logspace(-3, 3, 8).view(-1, 1, 1, 1))
    images = torch.randn(10, 3, 8, 8)
    floats, integers = tmp_path / "floats.onnx", tmp_path / "integers.onnx"
    FORMATS["onnx"].write(torch.export.export(conv, (images[:4],)), {"peft_edge": "kept"}, floats)
    quantize_onnx(floats, integers, images, batch_size=4)

    model = onnx.load(integers)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert {entry.key: entry.value for entry in model.metadata_props}["peft_edge"] == "kept"
    weights = next(tensor for tensor in tensors.values() if tensor.shape == (8, 3, 3, 3))
    scales = next(tensor for name, tensor in tensors.items() if tensor.shape == (8,) and "weight_scale" in name)
    assert weights.dtype == "int8"
    # Symmetric, in seven bits: a channel's largest weight becomes 64, and its scale is the step between two integers.
    torch.testing.assert_close(torch.from_numpy(scales), conv.weight.abs().amax((1, 2, 3)) / 64, rtol=0.01, atol=0)
    found = answers(FORMATS["onnx"].load(integers), images, 4)
    assert 0 < (found - conv(images)).abs().max() < 0.02 * conv(images).abs().max()
