"""Which layers an adapter reaches, and what of it is saved and loaded again."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_edge import ConvLoraLayer, ConvLoraModel
from tests.tuners.support import lora_config, shifted


@pytest.mark.slow
def test_reload_in_a_new_process_gives_identical_logits(
    tiny_backbone: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    model = shifted(get_peft_model(copy.deepcopy(tiny_backbone), lora_config()), images)
    model.add_adapter("dark", lora_config(norm="affine", use_dora=True, r=1))
    model.set_adapter("dark")
    shifted(model, images, 0.1)
    expected = {}
    for name in ("default", "dark"):
        model.set_adapter(name)
        expected[name] = model(images)
    assert not torch.allclose(expected["default"], expected["dark"], atol=1e-2)
    model.save_pretrained(tmp_path)
    save_file({"images": images, **expected}, tmp_path / "expected.safetensors")
    save_file(tiny_backbone.state_dict(), tmp_path / "base.safetensors")
    code = """
import sys, timm, torch, peft_edge
from peft import PeftModel
from safetensors.torch import load_file
torch.set_num_threads(1)
base = timm.create_model("mobilenetv2_035", num_classes=10)
base.load_state_dict(load_file("base.safetensors"))
expected = load_file("expected.safetensors")
model = PeftModel.from_pretrained(base, ".").eval()
model.load_adapter("dark", "dark")
for name in ("default", "dark"):
    model.set_adapter(name)
    assert torch.equal(model(expected["images"]), expected[name]), name
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_adapter_opens_in_plain_peft_under_its_type(tiny_backbone: nn.Module, images: Tensor, tmp_path: Path) -> None:
    # In double precision, where rounding does not grow through 52 untrained layers.
    tiny_backbone, images = tiny_backbone.double(), images.double()
    model = get_peft_model(
        copy.deepcopy(tiny_backbone), lora_config(target_modules="dense", norm="frozen", use_dora=True)
    ).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORA"}))

    with pytest.warns(UserWarning, match="Unexpected keyword"):
        plain = PeftModel.from_pretrained(tiny_backbone, tmp_path).eval()

    torch.testing.assert_close(plain(images), model(images))


def test_an_adapter_of_plain_peft_opens_in_ours(tiny_backbone: nn.Module, images: Tensor, tmp_path: Path) -> None:
    tiny_backbone, images = tiny_backbone.double(), images.double()
    targets = {"target_modules": ["conv_pw", "conv_pwl"], "init_lora_weights": False}
    plain = get_peft_model(copy.deepcopy(tiny_backbone), LoraConfig(**targets)).eval()
    plain.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "CONV_LORA", "norm": "frozen"}))

    ours = PeftModel.from_pretrained(tiny_backbone, tmp_path).eval()

    assert isinstance(ours.base_model, ConvLoraModel)
    torch.testing.assert_close(ours(images), plain(images))


def test_linear_layers_keep_pefts_own_lora(tiny_backbone: nn.Module, images: Tensor) -> None:
    model = get_peft_model(tiny_backbone, lora_config(target_modules=["depthwise", "classifier"])).eval()
    expected = model(images)

    assert type(model.base_model.model.classifier) is Linear
    torch.testing.assert_close(model.merge_and_unload()(images), expected, atol=1e-4, rtol=1e-4)


def test_roles_with_exclusion_and_layers(tiny_backbone: nn.Module) -> None:
    targets = lora_config(
        target_modules="depthwise",
        layers_to_transform=[5, 6],
        layers_pattern="blocks",
        exclude_modules=["blocks.5.1.conv_dw"],
        norm="frozen",
    )
    model = get_peft_model(tiny_backbone, targets)

    layers = [name for name, module in model.base_model.model.named_modules() if isinstance(module, ConvLoraLayer)]
    assert layers == ["blocks.5.0.conv_dw", "blocks.5.2.conv_dw", "blocks.6.0.conv_dw"]


def test_rank_and_alpha_patterns(tiny_backbone: nn.Module) -> None:
    targets = lora_config(rank_pattern={"conv_dw": 1}, alpha_pattern={r"blocks\.0\.0\.conv_dw": 3})
    model = get_peft_model(tiny_backbone, targets).base_model.model

    assert model.conv_stem.r["default"] == 2
    assert (model.blocks[0][0].conv_dw.r["default"], model.blocks[0][0].conv_dw.scaling["default"]) == (1, 3.0)
    assert model.blocks[1][0].conv_dw.lora_A["default"].weight.shape == (1, 1, 3, 3)


@pytest.mark.parametrize("rank", [0, True])
def test_a_wrong_rank_of_one_layer_leaves_the_model_as_it_was(tiny_backbone: nn.Module, rank: int) -> None:
    before = list(tiny_backbone.state_dict())

    with pytest.raises(ValueError, match=rf"value passed is {rank} \(layer 'conv_head'\)"):
        get_peft_model(tiny_backbone, lora_config(rank_pattern={"conv_head": rank}))

    assert list(tiny_backbone.state_dict()) == before


def test_layers_that_mamba_would_pass_over_are_refused() -> None:
    model = nn.Sequential()
    model.config = SimpleNamespace(model_type="mamba")
    model.conv1d = nn.Conv1d(4, 4, 3)

    with pytest.raises(ValueError, match="'conv1d' is incompatible with Mamba"):
        get_peft_model(model, lora_config())


def test_a_truncated_adapter_leaves_the_backbone_usable(
    adapted: nn.Module, tiny_backbone: nn.Module, tmp_path: Path
) -> None:
    adapted.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    entries = load_file(weights)
    assert any(key.endswith("lora_norm.running_mean") for key in entries)
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(Exception, match=r"(?i)header|deserializ|incomplete"):
        PeftModel.from_pretrained(tiny_backbone, tmp_path)
