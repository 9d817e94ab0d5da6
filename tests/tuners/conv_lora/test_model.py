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
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file, save_file
from timm.layers import StdConv2d
from torch import Tensor, nn

from peft_edge import ConvLoraConfig, ConvLoraLayer, ConvLoraModel
from peft_edge.tuners.conv_lora import BatchNormLayer
from tests.tuners.conv_lora.support import config, shifted


def test_an_untrained_adapter_changes_nothing(tiny_backbone: nn.Module, images: Tensor) -> None:
    model = get_peft_model(copy.deepcopy(tiny_backbone), ConvLoraConfig(target_modules="all-conv")).eval()

    assert torch.equal(model(images), tiny_backbone(images))


def test_reload_in_a_new_process_gives_identical_logits(
    tiny_backbone: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    model = shifted(get_peft_model(copy.deepcopy(tiny_backbone), config()), images)
    model.add_adapter("dark", config(norm="affine", use_dora=True, r=1))
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
        copy.deepcopy(tiny_backbone), config(target_modules="dense", norm="frozen", use_dora=True)
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
    model = get_peft_model(tiny_backbone, config(target_modules=["depthwise", "classifier"])).eval()
    expected = model(images)

    assert type(model.base_model.model.classifier) is Linear
    torch.testing.assert_close(model.merge_and_unload()(images), expected, atol=1e-4, rtol=1e-4)


def test_a_role_never_reaches_a_layer_of_another_role() -> None:
    """PEFT takes the whole name `conv1` also for the end of a name."""
    model = nn.Sequential()
    model.conv1 = nn.Conv2d(3, 8, 3)
    model.block = nn.Sequential()
    model.block.conv1 = nn.Conv2d(8, 8, 3, groups=8)
    model.block.conv2 = nn.Conv2d(8, 8, 1)

    adapted = get_peft_model(model, config(target_modules="dense"))

    assert adapted.base_model.targeted_module_names == ["conv1", "block.conv2"]


def test_roles_with_exclusion_and_layers(tiny_backbone: nn.Module) -> None:
    targets = config(
        target_modules="depthwise",
        layers_to_transform=[5, 6],
        layers_pattern="blocks",
        exclude_modules=["blocks.5.1.conv_dw"],
        norm="frozen",
    )
    model = get_peft_model(tiny_backbone, targets)

    layers = [name for name, module in model.base_model.model.named_modules() if isinstance(module, ConvLoraLayer)]
    assert layers == ["blocks.5.0.conv_dw", "blocks.5.2.conv_dw", "blocks.6.0.conv_dw"]


def test_a_module_of_a_roles_name_goes_before_the_role() -> None:
    model = nn.Sequential()
    model.dense, model.conv = nn.Linear(4, 4), nn.Conv2d(1, 1, 1)

    assert get_peft_model(model, config(target_modules="dense")).base_model.targeted_module_names == ["dense"]


def test_rank_and_alpha_patterns(tiny_backbone: nn.Module) -> None:
    targets = config(rank_pattern={"conv_dw": 1}, alpha_pattern={r"blocks\.0\.0\.conv_dw": 3})
    model = get_peft_model(tiny_backbone, targets).base_model.model

    assert model.conv_stem.r["default"] == 2
    assert (model.blocks[0][0].conv_dw.r["default"], model.blocks[0][0].conv_dw.scaling["default"]) == (1, 3.0)
    assert model.blocks[1][0].conv_dw.lora_A["default"].weight.shape == (1, 1, 3, 3)


@pytest.mark.parametrize("target", ["depthwize", ["depthwize"]])
def test_unknown_role_is_named_with_the_nearest(tiny_backbone: nn.Module, target: str | list[str]) -> None:
    before = [name for name, _ in tiny_backbone.named_modules()]

    with pytest.raises(ValueError, match=r"depthwize.*(?i:did you mean) 'depthwise'"):
        get_peft_model(tiny_backbone, config(target_modules=target))

    assert [name for name, _ in tiny_backbone.named_modules()] == before


def test_a_role_that_the_model_lacks_is_named() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=r"\['depthwise'\] not found.* has no such convolution"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 3, 3)), config(target_modules="depthwise"))


def test_pefts_own_message_where_everything_is_excluded(tiny_backbone: nn.Module) -> None:
    with pytest.raises(NoMatchingPeftModuleError, match="mismatched target modules and excluded modules"):
        get_peft_model(tiny_backbone, config(target_modules=["conv_stem"], exclude_modules=["conv_stem"]))


def test_a_refused_layer_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), StdConv2d(8, 8, 3))

    with pytest.raises(ValueError, match=r"'2': StdConv2d is not a plain convolution"):
        get_peft_model(model, config())

    assert [type(layer) for layer in model] == [nn.Conv2d, nn.BatchNorm2d, StdConv2d]


def test_adding_an_adapter_leaves_the_others_as_frozen_as_they_were(tiny_backbone: nn.Module) -> None:
    model = get_peft_model(tiny_backbone, config(norm="affine"))
    model.set_requires_grad("default", requires_grad=False)

    model.add_adapter("other", config(norm="affine"))

    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


_MODAL = (ConvLoraLayer, BatchNormLayer, nn.Dropout, nn.BatchNorm2d)


@pytest.mark.parametrize("training", [True, False])
def test_layers_are_in_the_mode_of_the_model(tiny_backbone: nn.Module, training: bool) -> None:
    model = get_peft_model(tiny_backbone.train(training), config(lora_dropout=0.5, norm="affine"))
    model.add_adapter("other", config(lora_dropout=0.5))

    assert {module.training for module in model.modules() if isinstance(module, _MODAL)} == {training}


@pytest.mark.parametrize("rank", [0, True])
def test_a_wrong_rank_of_one_layer_leaves_the_model_as_it_was(tiny_backbone: nn.Module, rank: int) -> None:
    before = list(tiny_backbone.state_dict())

    with pytest.raises(ValueError, match=rf"value passed is {rank} \(layer 'conv_head'\)"):
        get_peft_model(tiny_backbone, config(rank_pattern={"conv_head": rank}))

    assert list(tiny_backbone.state_dict()) == before


def test_without_targets_pefts_own_error(tiny_backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(tiny_backbone, ConvLoraConfig())


def test_a_misspelt_role_beside_a_right_one_is_named(tiny_backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match="'all-convs' is no layer role and no module; did you mean 'all-conv'"):
        get_peft_model(tiny_backbone, config(target_modules=["depthwise", "all-convs"]))


def test_layers_that_mamba_would_pass_over_are_refused() -> None:
    model = nn.Sequential()
    model.config = SimpleNamespace(model_type="mamba")
    model.conv1d = nn.Conv1d(4, 4, 3)

    with pytest.raises(ValueError, match="'conv1d' is incompatible with Mamba"):
        get_peft_model(model, config())


def test_modules_to_save_travel_along(tiny_backbone: nn.Module, images: Tensor, tmp_path: Path) -> None:
    model = get_peft_model(copy.deepcopy(tiny_backbone), config(modules_to_save=["classifier"]))
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    expected = shifted(model, images)(images)
    model.save_pretrained(tmp_path)

    assert torch.equal(PeftModel.from_pretrained(tiny_backbone, tmp_path)(images), expected)


@pytest.mark.parametrize("norm", ["stats", "affine"])
def test_low_cpu_mem_usage(tiny_backbone: nn.Module, images: Tensor, tmp_path: Path, norm: str) -> None:
    model = shifted(get_peft_model(copy.deepcopy(tiny_backbone), config(norm=norm)), images)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_backbone, tmp_path, low_cpu_mem_usage=True)

    assert torch.equal(loaded.eval()(images), model(images))


def test_injection_without_a_peft_model(tiny_backbone: nn.Module, adapted: nn.Module, images: Tensor) -> None:
    state = get_peft_model_state_dict(adapted)
    injected = inject_adapter_in_model(config(), tiny_backbone)

    outcome = set_peft_model_state_dict(injected, state)

    assert not outcome.unexpected_keys
    assert torch.equal(injected.eval()(images), adapted(images))


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


def test_saved_configuration_names_modules(adapted: nn.Module, tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]

    assert set(targets) == {"conv_stem", "conv_dw", "conv_pw", "conv_pwl", "conv_head"}
