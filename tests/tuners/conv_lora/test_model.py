"""What a PEFT user expects of an adapted model, on a timm backbone."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_edge import ConvLoraConfig, ConvLoraLayer, ConvLoraModel


def _config(**kwargs: object) -> ConvLoraConfig:
    return ConvLoraConfig(**{"r": 2, "target_modules": "all-conv", "init_lora_weights": False, **kwargs})


def _shifted(model: nn.Module, images: Tensor, scale: float = 2.0) -> nn.Module:
    """The model after its statistics moved to differently lit images."""
    model.train()
    for _ in range(3):
        model(images * scale)
    return model.eval()


@pytest.fixture
def base() -> nn.Module:
    """A second copy of `tiny_backbone`: the seed is the same."""
    torch.manual_seed(0)
    return timm.create_model("mobilenetv2_035", num_classes=10).eval()


@pytest.fixture
def small() -> nn.Module:
    """timm's smallest mobile network, where compiling would take half a minute otherwise."""
    return timm.create_model("test_efficientnet", num_classes=10).eval()


@pytest.fixture
def adapted(base: nn.Module, images: Tensor) -> nn.Module:
    return _shifted(get_peft_model(copy.deepcopy(base), _config()), images)


def test_an_untrained_adapter_changes_nothing(base: nn.Module, images: Tensor) -> None:
    model = get_peft_model(copy.deepcopy(base), ConvLoraConfig(target_modules="all-conv")).eval()

    assert torch.equal(model(images), base(images))


def test_reload_in_a_new_process_gives_identical_logits(base: nn.Module, images: Tensor, tmp_path: Path) -> None:
    model = _shifted(get_peft_model(copy.deepcopy(base), _config()), images)
    model.add_adapter("dark", _config(norm="affine", use_dora=True, r=1))
    model.set_adapter("dark")
    _shifted(model, images, 0.1)
    expected = {}
    for name in ("default", "dark"):
        model.set_adapter(name)
        expected[name] = model(images)
    assert not torch.allclose(expected["default"], expected["dark"], atol=1e-2)
    model.save_pretrained(tmp_path)
    save_file({"images": images, **expected}, tmp_path / "expected.safetensors")
    save_file(base.state_dict(), tmp_path / "base.safetensors")
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


def test_adapter_opens_in_plain_peft_under_its_type(base: nn.Module, images: Tensor, tmp_path: Path) -> None:
    # In double precision, where rounding does not grow through 52 untrained layers.
    base, images = base.double(), images.double()
    model = get_peft_model(copy.deepcopy(base), _config(target_modules="dense", norm="frozen", use_dora=True)).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORA"}))

    with pytest.warns(UserWarning, match="Unexpected keyword"):
        plain = PeftModel.from_pretrained(base, tmp_path).eval()

    torch.testing.assert_close(plain(images), model(images))


def test_an_adapter_of_plain_peft_opens_in_ours(base: nn.Module, images: Tensor, tmp_path: Path) -> None:
    base, images = base.double(), images.double()
    targets = {"target_modules": ["conv_pw", "conv_pwl"], "init_lora_weights": False}
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(**targets)).eval()
    plain.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "CONV_LORA", "norm": "frozen"}))

    ours = PeftModel.from_pretrained(base, tmp_path).eval()

    assert isinstance(ours.base_model, ConvLoraModel)
    torch.testing.assert_close(ours(images), plain(images))


def test_linear_layers_keep_pefts_own_lora(base: nn.Module, images: Tensor) -> None:
    from peft.tuners.lora import Linear

    model = get_peft_model(base, _config(target_modules=["depthwise", "classifier"])).eval()
    expected = model(images)

    assert type(model.base_model.model.classifier) is Linear
    torch.testing.assert_close(model.merge_and_unload()(images), expected, atol=1e-4, rtol=1e-4)


def test_saved_configuration_names_modules(adapted: nn.Module, tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]

    assert set(targets) == {"conv_stem", "conv_dw", "conv_pw", "conv_pwl", "conv_head"}


def test_a_role_never_reaches_a_layer_of_another_role() -> None:
    """PEFT takes the whole name `conv1` also for the end of a name."""
    model = nn.Sequential()
    model.conv1 = nn.Conv2d(3, 8, 3)
    model.block = nn.Sequential()
    model.block.conv1 = nn.Conv2d(8, 8, 3, groups=8)
    model.block.conv2 = nn.Conv2d(8, 8, 1)

    adapted = get_peft_model(model, _config(target_modules="dense"))

    assert adapted.base_model.targeted_module_names == ["conv1", "block.conv2"]


def test_roles_with_exclusion_and_layers(base: nn.Module) -> None:
    config = _config(
        target_modules="depthwise",
        layers_to_transform=[5, 6],
        layers_pattern="blocks",
        exclude_modules=["blocks.5.1.conv_dw"],
        norm="frozen",
    )
    model = get_peft_model(base, config)

    layers = [name for name, module in model.base_model.model.named_modules() if isinstance(module, ConvLoraLayer)]
    assert layers == ["blocks.5.0.conv_dw", "blocks.5.2.conv_dw", "blocks.6.0.conv_dw"]


def test_a_module_of_a_roles_name_goes_before_the_role() -> None:
    model = nn.Sequential()
    model.dense, model.conv = nn.Linear(4, 4), nn.Conv2d(1, 1, 1)

    assert get_peft_model(model, _config(target_modules="dense")).base_model.targeted_module_names == ["dense"]


def test_rank_and_alpha_patterns(base: nn.Module) -> None:
    config = _config(rank_pattern={"conv_dw": 1}, alpha_pattern={r"blocks\.0\.0\.conv_dw": 3})
    model = get_peft_model(base, config).base_model.model

    assert model.conv_stem.r["default"] == 2
    assert (model.blocks[0][0].conv_dw.r["default"], model.blocks[0][0].conv_dw.scaling["default"]) == (1, 3.0)
    assert model.blocks[1][0].conv_dw.lora_A["default"].weight.shape == (1, 1, 3, 3)


@pytest.mark.parametrize("target", ["depthwize", ["depthwize"]])
def test_unknown_role_is_named_with_the_nearest(base: nn.Module, target: str | list[str]) -> None:
    before = [name for name, _ in base.named_modules()]

    with pytest.raises(ValueError, match=r"depthwize.* not found.*all-conv, dense.*did you mean 'depthwise'"):
        get_peft_model(base, _config(target_modules=target))

    assert [name for name, _ in base.named_modules()] == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_work(adapted: nn.Module, images: Tensor, copied: object) -> None:
    assert torch.equal(copied(adapted)(images), adapted(images))


def test_modules_to_save_travel_along(base: nn.Module, images: Tensor, tmp_path: Path) -> None:
    model = get_peft_model(copy.deepcopy(base), _config(modules_to_save=["classifier"]))
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    expected = _shifted(model, images)(images)
    model.save_pretrained(tmp_path)

    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(images), expected)


@pytest.mark.parametrize("norm", ["stats", "affine"])
def test_low_cpu_mem_usage(base: nn.Module, images: Tensor, tmp_path: Path, norm: str) -> None:
    model = _shifted(get_peft_model(copy.deepcopy(base), _config(norm=norm)), images)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)

    assert torch.equal(loaded.eval()(images), model(images))


def test_injection_without_a_peft_model(base: nn.Module, adapted: nn.Module, images: Tensor) -> None:
    state = get_peft_model_state_dict(adapted)
    injected = inject_adapter_in_model(_config(), base)

    outcome = set_peft_model_state_dict(injected, state)

    assert not outcome.unexpected_keys
    assert torch.equal(injected.eval()(images), adapted(images))


def test_model_status(adapted: nn.Module) -> None:
    status = get_model_status(adapted)

    assert status.peft_types == {"default": "CONV_LORA"}
    assert (status.enabled, status.active_adapters, status.requires_grad) == (True, ["default"], {"default": True})


COMBINATIONS = {
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
    "magnitude_prune", "magnitude_prune_svd",
}  # fmt: skip


@pytest.mark.parametrize("combination", sorted(COMBINATIONS))
def test_weighted_adapters(adapted: nn.Module, images: Tensor, combination: str) -> None:
    adapted.add_adapter("dark", _config())
    adapted.set_adapter("dark")
    _shifted(adapted, images, 0.1)

    adapted.add_weighted_adapter(["default", "dark"], [0.7, 0.3], "both", combination_type=combination, density=0.9)
    adapted.set_adapter("both")

    norm = adapted.base_model.model.bn1
    means = {name: state.running_mean for name, state in norm.lora_norm.items()}
    torch.testing.assert_close(means["both"], 0.7 * means["default"] + 0.3 * means["dark"])
    assert adapted(images).isfinite().all()
    if combination == "cat":
        for layer in (module for module in adapted.modules() if isinstance(module, ConvLoraLayer)):
            got, first, second = (layer.get_delta_weight(name) for name in ("both", "default", "dark"))
            torch.testing.assert_close(got, 0.7 * first + 0.3 * second, atol=1e-5, rtol=1e-4)


def test_svd_of_small_kernels_is_padded_to_the_rank(base: nn.Module) -> None:
    model = get_peft_model(base, _config(target_modules="depthwise", r=6))
    model.add_adapter("other", _config(target_modules="depthwise", r=6))

    model.add_weighted_adapter(["default", "other"], [1.0, -0.5], "both", combination_type="svd", svd_rank=16)

    for layer in (module for module in model.modules() if isinstance(module, ConvLoraLayer)):
        assert layer.lora_A["both"].weight.shape[0] == 16
        expected = layer.get_delta_weight("default") - 0.5 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("both"), expected, atol=1e-5, rtol=1e-4)


def test_mixed_model_holds_ours_beside_pefts(base: nn.Module, images: Tensor) -> None:
    expected = base(images)
    model = get_peft_model(base, _config(target_modules="depthwise"), mixed=True)
    model.add_adapter("loha", LoHaConfig(target_modules=["conv_pw"], init_weights=False))
    model.set_adapter(["default", "loha"])
    _shifted(model, images)
    both = model(images)
    model.set_adapter("default")

    assert not torch.allclose(model(images), both, atol=1e-3)
    assert not torch.allclose(model(images), expected, atol=1e-3)
    model.set_adapter(["default", "loha"])
    torch.testing.assert_close(model.merge_and_unload()(images), both, atol=1e-3, rtol=1e-3)


def _saved(base: nn.Module, images: Tensor, folder: Path, scale: float, **kwargs: object) -> Tensor:
    model = _shifted(get_peft_model(copy.deepcopy(base), _config(**kwargs)), images, scale)
    model.save_pretrained(folder)
    return model(images)


def test_hotswap_to_another_rank(base: nn.Module, images: Tensor, tmp_path: Path) -> None:
    first = _saved(base, images, tmp_path / "first", 2.0, r=4)
    second = _saved(base, images, tmp_path / "second", 0.1, r=2, lora_alpha=3)
    model = PeftModel.from_pretrained(base, tmp_path / "first").eval()
    torch.testing.assert_close(model(images), first)

    hotswap_adapter(model, tmp_path / "second", "default", torch_device="cpu")
    torch.testing.assert_close(model(images), second, atol=1e-5, rtol=1e-5)
    hotswap_adapter(model, tmp_path / "first", "default", torch_device="cpu")
    torch.testing.assert_close(model(images), first, atol=1e-5, rtol=1e-5)


def test_hotswap_of_a_compiled_model_does_not_recompile(small: nn.Module, images: Tensor, tmp_path: Path) -> None:
    first = _saved(small, images, tmp_path / "first", 2.0, r=2)
    second = _saved(small, images, tmp_path / "second", 0.1, r=5, lora_alpha=3)
    model = PeftModel.from_pretrained(small, tmp_path / "first").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), first, atol=1e-4, rtol=1e-4)
        hotswap_adapter(compiled, tmp_path / "second", "default", torch_device="cpu")
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(images), second, atol=1e-4, rtol=1e-4)


def test_hotswap_to_another_norm_is_refused(base: nn.Module, images: Tensor, tmp_path: Path) -> None:
    _saved(base, images, tmp_path / "affine", 2.0, norm="affine")
    model = get_peft_model(base, _config())

    with pytest.raises(ValueError, match="incompatible: for norm"):
        hotswap_adapter(model, tmp_path / "affine", "default", torch_device="cpu")


@pytest.mark.parametrize("use_dora", [False, True])
def test_compiles_as_one_graph_for_training(small: nn.Module, images: Tensor, use_dora: bool) -> None:
    model = get_peft_model(small, _config(norm="affine", use_dora=use_dora)).train()
    plain = copy.deepcopy(model)

    torch.compile(model, backend="aot_eager", fullgraph=True)(images).square().sum().backward()
    plain(images).square().sum().backward()

    for (name, got), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad, atol=1e-3, rtol=1e-3, msg=name)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], value)


def test_autocast(adapted: nn.Module, images: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted.train()(images)
        y.float().square().sum().backward()

    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)


def test_gradient_checkpointing_of_timm(base: nn.Module, images: Tensor) -> None:
    model = get_peft_model(base, _config(norm="affine")).train()
    plain = copy.deepcopy(model)
    model.base_model.model.set_grad_checkpointing()

    model(images).square().sum().backward()
    plain(images).square().sum().backward()

    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad)
    for got, wanted in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_truncated_adapter_leaves_the_backbone_usable(adapted: nn.Module, base: nn.Module, tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    entries = load_file(weights)
    assert any(key.endswith("lora_norm.running_mean") for key in entries)
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(Exception, match=r"(?i)header|deserializ|incomplete"):
        PeftModel.from_pretrained(base, tmp_path)
