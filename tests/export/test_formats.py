from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.modules.batchnorm import _BatchNorm

from peft_edge import ConvAdapterConfig, prepare_model_for_lean_training
from peft_edge.export import formats
from peft_edge.export.formats import FORMATS, fuse_batch_norms, merged
from peft_edge.export.verification import Images
from peft_edge.lean.layers import PLAIN
from tests.export.support import Saved


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_run_as_it_was_written(name: str, tmp_path: Path, images: torch.Tensor) -> None:
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


def test_a_missing_package_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = torch.export.export(nn.Conv2d(3, 4, 3), (torch.zeros(1, 3, 8, 8),))

    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(formats, "import_module", missing)
    for name, module in {"onnx": "onnxscript", "executorch": r"executorch\.exir"}.items():
        with pytest.raises(ImportError, match=rf'{module} is not installed: pip install "peft-edge\[{name}\]"'):
            FORMATS[name].write(program, {}, tmp_path / "file")
    assert not any(tmp_path.iterdir())


NETWORKS = ["mobilenetv2_035", "tf_mobilenetv3_small_minimal_100", "test_resnet"]


class Awkward(nn.Module):
    """Norms that belong to no convolution alone."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1)
        self.of_images, self.of_shared, self.of_sum = nn.BatchNorm2d(3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.alone = nn.BatchNorm2d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.of_images(x))
        x = self.of_sum(self.conv(x) + self.of_shared(x)[..., 1:-1, 1:-1])
        return self.alone(self.last(x))


def moved(model: nn.Module) -> nn.Module:
    """In eval mode and double precision, with statistics and weights of BatchNorm that are nothing special."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5)
    return model.eval().double().requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_answers_the_same_without_a_single_norm(name: str, images: Tensor) -> None:
    model = moved(timm.create_model(name, num_classes=10))
    images = images.double()
    expected = model(images)
    fuse_batch_norms(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())


@torch.no_grad()
def test_a_norm_stays_unless_it_alone_takes_a_convolutions_output(images: Tensor) -> None:
    model = moved(Awkward())
    expected = model(images.double())
    fuse_batch_norms(model)
    assert [type(norm) for norm in (model.of_images, model.of_shared, model.of_sum)] == [nn.BatchNorm2d] * 3
    assert isinstance(model.alone, nn.Identity)
    torch.testing.assert_close(model(images.double()), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_plain_network_is_left_that_answers_the_same(saved: Saved, digits: Images) -> None:
    model = saved.load().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = merged(prepare_model_for_lean_training(model))
    assert not any(isinstance(module, BaseTunerLayer) or type(module) in PLAIN for module in network.modules())
    assert not any(module.training for module in network.modules())
    torch.testing.assert_close(network(digits.comparison), saved.load()(digits.comparison), rtol=1e-4, atol=1e-5)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_that_is_a_network_of_its_own_is_refused(tiny_backbone: nn.Module) -> None:
    model = get_peft_model(tiny_backbone, ConvAdapterConfig(target_modules="depthwise"))
    with pytest.raises(ValueError, match=r"cannot become part of one: Cannot merge adapter 'default' into layer"):
        merged(model)


@torch.no_grad()
def test_weights_that_are_not_finite_are_refused(saved: Saved) -> None:
    model = saved.load()
    next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        merged(model)
