from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from peft_edge.export.formats import FORMATS, quantize_onnx
from peft_edge.export.verification import iter_batches, predict_logits


@pytest.mark.parametrize("name", FORMATS)
def test_written_file_computes_the_same(name: str, tmp_path: Path, images: torch.Tensor) -> None:
    if name != "torch-export":
        pytest.importorskip({"onnx": "onnxscript", "executorch": "executorch"}[name])
    form, conv = FORMATS[name], nn.Conv2d(3, 4, 3)
    shapes = ({0: Dim("batch")},) if form.any_batch_size else None
    file = tmp_path / f"conv{form.suffix}"
    form.write(torch.export.export(conv, (images,), dynamic_shapes=shapes), {"text": "{}"}, file)
    network = form.load(file)
    for size in (4, 1, 3) if form.any_batch_size else (4,):
        first = network(images[:size])
        network(torch.zeros(size, 3, 32, 32))
        torch.testing.assert_close(first, conv(images[:size]), rtol=1e-5, atol=1e-6)


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = torch.export.export(nn.Conv2d(3, 4, 3), (torch.zeros(1, 3, 8, 8),))
    for name, module in {"onnx": "onnxscript", "executorch": "executorch"}.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf'{module}.* is not installed: pip install "peft-edge\[{name}\]"'):
            FORMATS[name].write(program, {}, tmp_path / "file")
    assert not any(tmp_path.iterdir())


def test_quantized_weights_have_a_scale_per_output_channel(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    conv = nn.Conv2d(3, 8, 3).requires_grad_(False)
    conv.weight.mul_(torch.logspace(-3, 3, 8).view(-1, 1, 1, 1))
    images = torch.randn(10, 3, 8, 8)
    floats, integers = tmp_path / "floats.onnx", tmp_path / "integers.onnx"
    FORMATS["onnx"].write(torch.export.export(conv, (images[:4],)), {"peft_edge": "kept"}, floats)
    quantize_onnx(floats, integers, iter_batches(images, 4))

    model = onnx.load(integers)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert {entry.key: entry.value for entry in model.metadata_props}["peft_edge"] == "kept"
    weights = next(tensor for tensor in tensors.values() if tensor.shape == (8, 3, 3, 3))
    scales = next(tensor for name, tensor in tensors.items() if tensor.shape == (8,) and "weight_scale" in name)
    assert weights.dtype == "int8"
    # Symmetric, in 7 bits: the largest weight of a channel becomes 64, and the scale is the step between two integers.
    torch.testing.assert_close(torch.from_numpy(scales), conv.weight.abs().amax((1, 2, 3)) / 64, rtol=0.01, atol=0)
    found = predict_logits(FORMATS["onnx"].load(integers), images, 4)
    assert 0 < (found - conv(images)).abs().max() < 0.02 * conv(images).abs().max()
