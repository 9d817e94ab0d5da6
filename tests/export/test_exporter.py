from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from peft_edge import ConvLoraConfig
from peft_edge.backbones import head_names, load_backbone
from peft_edge.backbones.heads import head_layers
from peft_edge.export import exporter as exporting
from peft_edge.export.exporter import METADATA_KEY, export_model, quantize_onnx
from peft_edge.export.formats import FORMATS
from peft_edge.export.verification import Images, answers, read_images
from tests.export.support import Saved

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


def metadata(file: Path) -> dict[str, Any]:
    import onnxruntime

    return json.loads(onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map[METADATA_KEY])


def test_onnx_file_answers_as_the_model_and_says_how_to_use_it(saved: Saved, digits: Images, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    file, images = tmp_path / "model.onnx", digits.comparison[:100]
    floats, integers = export_model(
        saved.load(), file, format="onnx", images=images, labels=digits.labels[:100], calibration=digits.calibration
    )
    assert floats.largest_difference < 1e-4
    assert floats.same_top1 == 1
    assert floats.accuracy == floats.model_accuracy > 0.8
    assert integers.accuracy > floats.accuracy - 0.1
    assert integers.largest_difference > floats.largest_difference
    assert file.stat().st_size == integers.size_bytes < 0.6 * floats.size_bytes
    found = metadata(file)
    assert found["input_size"] == [3, 32, 32]
    assert found["std"] == [0.229, 0.224, 0.225]
    assert found["class_names"] == [str(digit) for digit in range(10)]


def test_torch_export_file_of_a_fixed_batch_size(saved: Saved, digits: Images, tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    images = digits.comparison[:10]
    (row,) = export_model(saved.load(), file, format="torch-export", images=images, batch_size=4)
    assert (row.same_top1, row.accuracy) == (1, None)
    texts = {METADATA_KEY: ""}
    program = torch.export.load(file, extra_files=texts)
    assert json.loads(texts[METADATA_KEY])["input"] == "images"
    operations = {str(node.target) for node in program.graph.nodes}
    assert not program.example_inputs[0][0].any()  # nobody's images are in the file
    assert not any("batch_norm" in name or "lora" in name for name in operations)
    torch.testing.assert_close(program.module()(images[:4]), saved.load()(images[:4]), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        program.module()(images[:3])


def test_executorch_file_takes_one_image(saved: Saved, digits: Images, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    file = tmp_path / "model.pte"
    (row,) = export_model(saved.load(), file, format="executorch", images=digits.comparison[:10])
    assert row.largest_difference < 1e-4
    assert METADATA_KEY.encode() in file.read_bytes()


@pytest.mark.parametrize("damage", [1.001, float("nan")])
def test_a_file_that_computes_something_else_is_not_left_behind(
    damage: float, saved: Saved, digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.pt2"
    file.write_text("old")
    loaded = FORMATS["torch-export"].load

    def damaged(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        network = loaded(path)
        return lambda images: network(images) * damage

    monkeypatch.setitem(exporting.FORMATS, "torch-export", FORMATS["torch-export"]._replace(load=damaged))
    with pytest.raises(ValueError, match=r"expected the logits of the PyTorch model to .*no file was written"):
        export_model(saved.load(), file, format="torch-export", images=digits.comparison[:4])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "expected one of onnx, torch-export, executorch, found 'tflite'"),
        ({"file": "model.pt"}, r"model\.pt: expected a name that ends in \.pt2 for the format torch-export"),
        ({"batch_size": 0}, "batch_size: expected at least 1, found 0"),
        ({"calibration": torch.zeros(1, 3, 8, 8)}, "only the format onnx can be int8, found 'torch-export'"),
        ({"images": torch.zeros(1, 4, 32, 32)}, r"does not run on images of \(4, 32, 32\)"),
    ],
)
def test_what_cannot_be_exported_is_refused(options: dict[str, Any], message: str, tiny_backbone: nn.Module) -> None:
    given = {"file": "model.pt2", "format": "torch-export", "images": torch.zeros(1, 3, 32, 32), **options}
    with pytest.raises(ValueError, match=message):
        export_model(tiny_backbone, **given)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100", "resnet18"])
def test_whole_networks_answer_real_images_as_the_model_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    base = load_backbone(name, 10)
    images = read_images("digits", base, image_size=96).comparison[:100]
    model = get_peft_model(base, ConvLoraConfig(target_modules="all-conv", modules_to_save=head_names(base)))
    for parameter in (parameter for key, parameter in model.named_parameters() if "lora_B" in key):
        nn.init.normal_(parameter, std=0.01)
    for batch in images.split(25):
        model.train()(batch)
    with torch.no_grad():
        # As large as those of a trained network, or the tolerance would let everything pass.
        scale = 5 / model.eval()(images).abs().max()
        for _, layer in head_layers(model.get_base_model()):
            layer.weight.mul_(scale)
    (row,) = export_model(model, tmp_path / "model.onnx", format="onnx", images=images)
    assert any(isinstance(module, _BatchNorm) for module in model.modules())
    assert row.largest_logit > 4
    assert row.largest_difference < 1e-4
    assert row.same_top1 == 1
    found = answers(FORMATS["onnx"].load(tmp_path / "model.onnx"), images[:1], 1)
    torch.testing.assert_close(found, model.eval()(images[:1]).detach(), rtol=0, atol=1e-4)
