"""What a PEFT user expects of an adapted model besides saving and loading."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_model_status, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn

from peft_edge import ConvLoraLayer
from tests.tuners.support import lora_config, shifted


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_work(adapted: nn.Module, images: Tensor, copied: object) -> None:
    assert torch.equal(copied(adapted)(images), adapted(images))


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
    adapted.add_adapter("dark", lora_config())
    adapted.set_adapter("dark")
    shifted(adapted, images, 0.1)

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


def test_svd_of_small_kernels_is_padded_to_the_rank(tiny_backbone: nn.Module) -> None:
    model = get_peft_model(tiny_backbone, lora_config(target_modules="depthwise", r=6))
    model.add_adapter("other", lora_config(target_modules="depthwise", r=6))

    model.add_weighted_adapter(["default", "other"], [1.0, -0.5], "both", combination_type="svd", svd_rank=16)

    for layer in (module for module in model.modules() if isinstance(module, ConvLoraLayer)):
        assert layer.lora_A["both"].weight.shape[0] == 16
        expected = layer.get_delta_weight("default") - 0.5 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("both"), expected, atol=1e-5, rtol=1e-4)


def test_mixed_model_holds_ours_beside_pefts(tiny_backbone: nn.Module, images: Tensor) -> None:
    expected = tiny_backbone(images)
    model = get_peft_model(tiny_backbone, lora_config(target_modules="depthwise"), mixed=True)
    model.add_adapter("loha", LoHaConfig(target_modules=["conv_pw"], init_weights=False))
    model.set_adapter(["default", "loha"])
    shifted(model, images)
    both = model(images)
    model.set_adapter("default")

    assert not torch.allclose(model(images), both, atol=1e-3)
    assert not torch.allclose(model(images), expected, atol=1e-3)
    model.set_adapter(["default", "loha"])
    torch.testing.assert_close(model.merge_and_unload()(images), both, atol=1e-3, rtol=1e-3)


def _saved(tiny_backbone: nn.Module, images: Tensor, folder: Path, scale: float, **kwargs: object) -> Tensor:
    model = shifted(get_peft_model(copy.deepcopy(tiny_backbone), lora_config(**kwargs)), images, scale)
    model.save_pretrained(folder)
    return model(images)


def test_hotswap_to_another_rank(tiny_backbone: nn.Module, images: Tensor, tmp_path: Path) -> None:
    first = _saved(tiny_backbone, images, tmp_path / "first", 2.0, r=4)
    second = _saved(tiny_backbone, images, tmp_path / "second", 0.1, r=2, lora_alpha=3)
    model = PeftModel.from_pretrained(tiny_backbone, tmp_path / "first").eval()
    torch.testing.assert_close(model(images), first)

    hotswap_adapter(model, tmp_path / "second", "default", torch_device="cpu")
    torch.testing.assert_close(model(images), second, atol=1e-5, rtol=1e-5)
    hotswap_adapter(model, tmp_path / "first", "default", torch_device="cpu")
    torch.testing.assert_close(model(images), first, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
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


def test_hotswap_to_another_norm_is_refused(tiny_backbone: nn.Module, images: Tensor, tmp_path: Path) -> None:
    _saved(tiny_backbone, images, tmp_path / "affine", 2.0, norm="affine")
    model = get_peft_model(tiny_backbone, lora_config())

    with pytest.raises(ValueError, match="incompatible: for norm"):
        hotswap_adapter(model, tmp_path / "affine", "default", torch_device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("use_dora", [False, True])
def test_compiles_as_one_graph_for_training(small: nn.Module, images: Tensor, use_dora: bool) -> None:
    model = get_peft_model(small, lora_config(norm="affine", use_dora=use_dora)).train()
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


def test_gradient_checkpointing_of_timm(tiny_backbone: nn.Module, images: Tensor) -> None:
    model = get_peft_model(tiny_backbone, lora_config(norm="affine")).train()
    plain = copy.deepcopy(model)
    model.base_model.model.set_grad_checkpointing()

    model(images).square().sum().backward()
    plain(images).square().sum().backward()

    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad)
    for got, wanted in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, wanted)
