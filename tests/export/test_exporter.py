from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from peft_edge import ConvAdapterConfig, ConvLoraConfig, prepare_model_for_lean_training
from peft_edge.backbones import head_names, load_backbone
from peft_edge.backbones.heads import head_layers
from peft_edge.export import exporter
from peft_edge.export.exporter import METADATA_KEY, export_model, fuse_batch_norms, merge_adapters
from peft_edge.export.formats import FORMATS
from peft_edge.export.verification import Images, predict_logits, read_images
from peft_edge.lean.layers import PLAIN
from tests.export.support import Saved, require_onnx


def metadata(file: Path) -> dict[str, Any]:
    import onnxruntime

    return json.loads(onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map[METADATA_KEY])


def test_onnx_file_has_the_same_logits_and_describes_its_input(saved: Saved, digits: Images, tmp_path: Path) -> None:
    require_onnx()
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
    assert not program.example_inputs[0][0].any()  # the file contains no image
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
def test_file_with_other_logits_is_not_kept(
    damage: float, saved: Saved, digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.pt2"
    file.write_text("old")
    loaded = FORMATS["torch-export"].load

    def damaged(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        network = loaded(path)
        return lambda images: network(images) * damage

    monkeypatch.setitem(exporter.FORMATS, "torch-export", FORMATS["torch-export"]._replace(load=damaged))
    with pytest.raises(ValueError, match=r"expected the logits of the PyTorch model within .*no file was written"):
        export_model(saved.load(), file, format="torch-export", images=digits.comparison[:4])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "expected one of onnx, torch-export, executorch, found 'tflite'"),
        ({"file": "model.pt"}, r"model\.pt: expected a name that ends in \.pt2 for the format torch-export"),
        ({"batch_size": 0}, "batch_size: expected at least 1, found 0"),
        (
            {"calibration": torch.zeros(1, 3, 8, 8)},
            "only the format onnx can be quantised to 8 bits, found 'torch-export'",
        ),
        ({"images": torch.zeros(1, 4, 32, 32)}, r"does not run on images of \(4, 32, 32\)"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str, tiny_backbone: nn.Module) -> None:
    given = {"file": "model.pt2", "format": "torch-export", "images": torch.zeros(1, 3, 32, 32), **options}
    with pytest.raises(ValueError, match=message):
        export_model(tiny_backbone, **given)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100", "resnet18"])
def test_exported_networks_have_the_same_logits_on_real_images(name: str, tmp_path: Path) -> None:
    require_onnx()
    base = load_backbone(name, 10)
    images = read_images("digits", base, image_size=96).comparison[:100]
    model = get_peft_model(
        base, ConvLoraConfig(norm="stats", target_modules="all-conv", modules_to_save=head_names(base))
    )
    for parameter in (parameter for key, parameter in model.named_parameters() if "lora_B" in key):
        nn.init.normal_(parameter, std=0.01)
    for batch in images.split(25):
        model.train()(batch)
    with torch.no_grad():
        # Logits as large as those of a trained network, so that the tolerance is meaningful.
        scale = 5 / model.eval()(images).abs().max()
        for _, layer in head_layers(model.get_base_model()):
            layer.weight.mul_(scale)
    (row,) = export_model(model, tmp_path / "model.onnx", format="onnx", images=images)
    assert any(isinstance(module, _BatchNorm) for module in model.modules())
    assert row.largest_logit > 4
    assert row.largest_difference < 1e-4
    assert row.same_top1 == 1
    found = predict_logits(FORMATS["onnx"].load(tmp_path / "model.onnx"), images[:1], 1)
    torch.testing.assert_close(found, model.eval()(images[:1]).detach(), rtol=0, atol=1e-4)


NETWORKS = ["mobilenetv2_035", "tf_mobilenetv3_small_minimal_100", "test_resnet"]


class Awkward(nn.Module):
    """A network with norms that are not the only consumer of a convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1)
        self.of_images, self.of_shared, self.of_sum = nn.BatchNorm2d(3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.alone = nn.BatchNorm2d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.of_images(x))
        x = self.of_sum(self.conv(x) + self.of_shared(x)[..., 1:-1, 1:-1])
        return self.alone(self.last(x))


def randomized(model: nn.Module) -> nn.Module:
    """Return `model` in eval mode and double precision, with random tensors in its BatchNorm layers."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5)
    return model.eval().double().requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_fused_network_has_no_norms_and_the_same_logits(name: str, images: Tensor) -> None:
    model = randomized(timm.create_model(name, num_classes=10))
    images = images.double()
    expected = model(images)
    fuse_batch_norms(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())


class _ReadsValues(nn.Module):
    """A layer that reads a value of its input, so it does not run on the meta device."""

    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x[0, 0, 0, 0] < 1e9) else -x


@torch.no_grad()
def test_norms_remain_if_the_order_of_the_layers_is_unknown(images: Tensor) -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), _ReadsValues()))
    expected = model(images.double())
    fuse_batch_norms(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert torch.equal(model(images.double()), expected)


@torch.no_grad()
def test_norms_with_a_cumulative_average_are_fused(tiny_backbone: nn.Module, images: Tensor) -> None:
    """With `momentum=None`, norms in training mode read the number of batches, which has no value while tracing."""
    model = randomized(tiny_backbone)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
    images = images.double()
    expected = model(images)
    fuse_batch_norms(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())


@torch.no_grad()
def test_norm_is_fused_only_if_it_is_the_only_consumer(images: Tensor) -> None:
    model = randomized(Awkward())
    expected = model(images.double())
    fuse_batch_norms(model)
    assert [type(norm) for norm in (model.of_images, model.of_shared, model.of_sum)] == [nn.BatchNorm2d] * 3
    assert isinstance(model.alone, nn.Identity)
    torch.testing.assert_close(model(images.double()), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_merged_network_is_plain_and_has_the_same_logits(saved: Saved, digits: Images) -> None:
    model = saved.load().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = merge_adapters(prepare_model_for_lean_training(model))
    assert not any(isinstance(module, BaseTunerLayer) or type(module) in PLAIN for module in network.modules())
    assert not any(module.training for module in network.modules())
    torch.testing.assert_close(network(digits.comparison), saved.load()(digits.comparison), rtol=1e-4, atol=1e-5)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_adapter_that_cannot_be_merged_is_refused(tiny_backbone: nn.Module) -> None:
    model = get_peft_model(tiny_backbone, ConvAdapterConfig(norm="stats", target_modules="depthwise"))
    message = "cannot be merged into the weights for a device: Cannot merge adapter 'default' into layer"
    with pytest.raises(ValueError, match=message):
        merge_adapters(model)


@torch.no_grad()
def test_adapter_with_nan_is_not_merged(saved: Saved) -> None:
    model = saved.load()
    next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        merge_adapters(model)
