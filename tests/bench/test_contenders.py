from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from peft_edge._compat import BatchNorm
from peft_edge.backbones import load_backbone
from peft_edge.bench.contenders import CONTENDERS, REFERENCE
from peft_edge.profiling.analysis import classification_loss
from peft_edge.profiling.memory import track_memory
from peft_edge.roles import modules_with_role

DENSE = ("peft-lora", "peft-lora-eval-checkpoint", "lora-plain", "lora-dense", "lora-stats-recompute", "peft-lora-lean")


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_size(backbone: nn.Module, role: str, rank: int) -> int:
    """Return the number of LoRA parameters: A of shape (r, K) and B of shape (C_out, r) for each layer with `role`."""
    kernels = [backbone.get_submodule(name).weight.flatten(1) for name in modules_with_role(backbone, role)]
    return sum(rank * sum(kernel.shape) for kernel in kernels)


@pytest.mark.parametrize(
    ("name", "role"),
    [*((name, "dense") for name in DENSE), ("lora-project", "project"), ("lora-all-conv", "all-conv")],
)
def test_contenders_train_adapters_of_the_expected_size_and_the_head(
    tiny_backbone: nn.Module, name: str, role: str
) -> None:
    expected = adapter_size(tiny_backbone, role, 2) + 1280 * 10 + 10
    model, optimizer = CONTENDERS[name].build(tiny_backbone, 2)
    assert optimizer is not None
    assert trained(model) == expected


def test_reference_trains_all_parameters_and_inference_none(tiny_backbone: nn.Module) -> None:
    full, optimizer = CONTENDERS[REFERENCE].build(copy.deepcopy(tiny_backbone), 4)
    assert optimizer is not None
    assert trained(full) == sum(parameter.numel() for parameter in full.parameters())
    assert full.training
    assert full.conv_head.weight.is_contiguous(memory_format=torch.channels_last)
    inference, optimizer = CONTENDERS["inference"].build(tiny_backbone, 4)
    assert (optimizer, trained(inference), inference.training) == (None, 0, False)


@pytest.mark.parametrize(("name", "package"), [("lycoris-locon", "lycoris"), ("loralib", "loralib")])
def test_other_packages_train_their_adapters_and_the_head(
    tiny_backbone: nn.Module, images: torch.Tensor, name: str, package: str
) -> None:
    pytest.importorskip(package)
    plain = copy.deepcopy(tiny_backbone).eval()
    model, optimizer = CONTENDERS[name].build(tiny_backbone, 2)
    assert optimizer is not None
    torch.testing.assert_close(model.eval()(images), plain(images), rtol=1e-4, atol=1e-5)
    classification_loss(model.train()(images)).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = adapter_size(plain, "dense", 2)
    # loralib's factors are larger than ours, except for pointwise kernels.
    assert frozen + 12810 <= trained(model) < 2 * (frozen + 12810)


@pytest.mark.parametrize(("name", "package"), [("lycoris-locon", "lycoris"), ("loralib", "loralib")])
def test_missing_package_is_named(
    tiny_backbone: nn.Module, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=package):
        CONTENDERS[name].build(tiny_backbone, 2)


def peak(name: str, backbone: nn.Module) -> int:
    model, optimizer = CONTENDERS[name].build(copy.deepcopy(backbone), 2)
    images = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    return track_memory(model, images, optimizer=optimizer, loss_fn=classification_loss).peak_bytes


@pytest.mark.parametrize(
    ("frugal", "plain"),
    [
        ("full-checkpoint", "full"),
        ("peft-lora-checkpoint", "peft-lora"),
        ("peft-lora-eval-checkpoint", "peft-lora-eval"),
        ("lora-stats-checkpoint", "lora-plain"),
        ("lora-dense", "lora-plain"),
        ("lora-stats", "peft-lora"),
    ],
)
def test_checkpointing_and_lean_training_save_memory(tiny_backbone: nn.Module, frugal: str, plain: str) -> None:
    assert peak(frugal, tiny_backbone) < 0.8 * peak(plain, tiny_backbone)


def test_checkpointing_saves_memory_on_top_of_lean_training(tiny_backbone: nn.Module) -> None:
    assert peak("lora-stats-checkpoint", tiny_backbone) < peak("lora-stats", tiny_backbone)


@pytest.mark.parametrize("name", ["full-eval", "peft-lora-eval", "peft-lora-eval-checkpoint", "peft-lora-eval-compile"])
def test_eval_norms_keep_their_statistics(tiny_backbone: nn.Module, images: torch.Tensor, name: str) -> None:
    model, _ = CONTENDERS[name].build(tiny_backbone, 2)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    before = [norm.running_mean.clone() for norm in norms]
    classification_loss(model(images)).backward()
    assert model.training
    assert norms
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))


def test_each_contender_has_its_own_label() -> None:
    assert len({contender.label for contender in CONTENDERS.values()}) == len(CONTENDERS)


def test_the_label_says_how_our_contenders_are_built() -> None:
    backbone = load_backbone("test_efficientnet", 10)
    for key, contender in CONTENDERS.items():
        if "our" not in contender.label and contender.label not in ("full, lean", "PEFT LoRA, dense, lean"):
            continue
        model, _ = contender.build(copy.deepcopy(backbone), 2)
        is_lean = any(type(module).__module__ == "peft_edge.lean.layers" for module in model.modules())
        assert is_lean == (", lean" in contender.label and "not lean" not in contender.label), key
        before = copy.deepcopy(dict(model.named_buffers()))
        with torch.no_grad():
            model(torch.randn(2, 3, 32, 32))
        is_frozen = all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
        assert is_frozen == ("frozen norms" in contender.label), key
