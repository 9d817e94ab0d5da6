from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from peft_edge.backbones import load_backbone
from peft_edge.config import RunConfig
from peft_edge.methods import METHODS, OPTIMIZERS, Method, find_method

PEERS = [name for name in METHODS if name.startswith("peft-")]


@pytest.fixture
def backbone() -> nn.Module:
    return load_backbone("mobilenetv3_small_050", num_classes=5)


def prepared(model: nn.Module, name: str, **changes: Any) -> nn.Module:
    """Return the model that the method `name` prepares with the default options of train.py and `norm="stats"`.

    PEFT's own LoRA and DoRA adapt only dense convolutions.
    """
    method = find_method(name)
    options = RunConfig(output_dir="").options(method.section)
    dense = {"target_modules": "dense"} if name in ("peft-lora", "peft-dora") else {}
    return method.prepare(model, {**options, "norm": "stats", **dense, **changes})


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def unwrapped(names: set[str]) -> set[str]:
    """Return the parameter names without the parts that adapters add."""
    parts = ("base_model", "base_layer", "modules_to_save", "default", "lora_norm")
    return {".".join(part for part in name.split(".") if part not in parts).removeprefix("model.") for name in names}


HEAD = {"classifier.weight", "classifier.bias"}


def test_methods_without_adapted_layers_train_the_parameters_in_their_name(backbone: nn.Module) -> None:
    everything = {name for name, _ in backbone.named_parameters()}
    norms = {
        f"{name}.{part}"
        for name, module in backbone.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    expected = {
        "none": set(),
        "head": HEAD,
        "norm-stats": set(),
        "norm-affine": HEAD | norms,
        "bias": HEAD | {name for name in everything if name.endswith(".bias")},
        "full": everything,
        "galore": everything,
    }
    for method, names in expected.items():
        found = trained_names(prepared(copy.deepcopy(backbone), method))
        assert len(found) == len(names), method
        assert unwrapped(found) == names, method


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("lora", {"lora_A", "lora_B"}),
        ("lora-fa", {"lora_B"}),
        ("dora", {"lora_A", "lora_B", "lora_magnitude_vector"}),
        ("peft-lora", {"lora_A", "lora_B"}),
        ("peft-dora", {"lora_A", "lora_B", "lora_magnitude_vector"}),
    ],
)
def test_adapters_train_their_matrices_and_the_head(backbone: nn.Module, method: str, parts: set[str]) -> None:
    dense_only = method in PEERS
    model = prepared(copy.deepcopy(backbone), method)
    assert isinstance(model, PeftModel)
    names = trained_names(model)
    head = {name for name in names if ".classifier." in name}
    assert len(head) == 2
    assert {part for name in names - head for part in name.split(".") if part.startswith("lora_")} == parts
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    expected = sum(not dense_only or convolution.groups == 1 for convolution in convolutions)
    assert sum(".lora_B." in name for name in names) == expected


@pytest.mark.parametrize("method", METHODS)
def test_training_starts_from_the_source_model(backbone: nn.Module, method: str) -> None:
    images = torch.randn(2, 3, 48, 48)
    expected = backbone.eval()(images)
    model = prepared(copy.deepcopy(backbone), method).eval()
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


TRAINED = [name for name, method in METHODS.items() if method.optimizer is not None]


@pytest.mark.parametrize("norm", ["stats", "affine"])
@pytest.mark.parametrize("method", TRAINED)
def test_every_trained_parameter_has_a_gradient_and_is_in_the_optimizer(
    backbone: nn.Module, method: str, norm: str
) -> None:
    """With several processes, training would hang on a parameter without gradient."""
    model = prepared(backbone, method, norm=norm).train()
    model(torch.randn(4, 3, 48, 48)).square().sum().backward()
    assert trained_names(model) == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    options = RunConfig(output_dir="").options(METHODS[method].section)
    optimizer = METHODS[method].optimizer(model, "adamw", options, lr=1e-2, weight_decay=0.1)
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert {parameter for group in optimizer.param_groups for parameter in group["params"]} == trained


def test_galore_targets_are_names_of_the_backbone(backbone: nn.Module) -> None:
    options = {**RunConfig(output_dir="").options("galore"), "target_modules": ["conv_head"]}
    optimizer = METHODS["galore"].optimizer(prepared(backbone, "galore"), "adamw", options, lr=1e-2, weight_decay=0.0)
    (projected,) = (group["params"] for group in optimizer.param_groups if "rank" in group)
    assert [weight.shape for weight in projected] == [backbone.conv_head.weight.shape]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", ["head", "galore"])
def test_every_optimizer_takes_a_step(backbone: nn.Module, method: str, name: str) -> None:
    model = prepared(backbone, method)
    options = RunConfig(output_dir="").options(METHODS[method].section)
    optimizer = METHODS[method].optimizer(model, name, options, lr=1e-2, weight_decay=0.0)
    weight = next(parameter for parameter in reversed(list(model.parameters())) if parameter.requires_grad)
    before = weight.detach().clone()
    model(torch.randn(4, 3, 48, 48)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("norm", ["frozen", "recalibrate"])
@pytest.mark.parametrize("method", ["full", "lora", "conv-adapter", "head"])
def test_fixed_statistics_are_used_in_train_mode(backbone: nn.Module, method: str, norm: str) -> None:
    images = torch.randn(2, 3, 48, 48)
    model = prepared(backbone, method, norm=norm)
    torch.testing.assert_close(model.train()(images), model.eval()(images))


@pytest.mark.parametrize("method", PEERS)
def test_peft_methods_keep_frozen_statistics(backbone: nn.Module, method: str) -> None:
    images, statistics = torch.randn(2, 3, 48, 48), {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    model = copy.deepcopy(prepared(backbone, method, norm="frozen"))  # as a run copies it
    torch.testing.assert_close(model.train()(images), model.eval()(images))
    model.train()(images).square().sum().backward()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())
    found = dict(model.get_base_model().named_buffers())
    assert all(torch.equal(found[name], value) for name, value in statistics.items() if name in found)
    assert not any("running_mean" in name for name in get_peft_model_state_dict(model, save_embedding_layers=False))


@pytest.mark.parametrize("method", PEERS)
def test_peft_methods_refuse_statistics_of_their_own(backbone: nn.Module, method: str) -> None:
    with pytest.raises(ValueError, match="norm: 'recalibrate' does not work with PEFT's own adapters"):
        prepared(backbone, method, norm="recalibrate")


def test_peft_lora_refuses_depthwise_convolutions_and_names_the_remedy(backbone: nn.Module) -> None:
    message = r"groups=16 and rank 4(?s:.*)adapter\.target_modules=dense"
    with pytest.warns(UserWarning, match="groups > 1"), pytest.raises(ValueError, match=message):
        prepared(backbone, "peft-lora", target_modules="all-conv")


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'lorra': .*; did you mean lora"):
        find_method("lorra")


def test_a_users_own_method_is_found(monkeypatch: pytest.MonkeyPatch, backbone: nn.Module) -> None:
    def last_block(model: nn.Module, options: dict[str, Any]) -> nn.Module:
        model.requires_grad_(False).get_submodule("blocks.5").requires_grad_(True)
        return model

    monkeypatch.setitem(METHODS, "last-block", Method(prepare=last_block, section=None, saves_full_model=True))
    assert all(name.startswith("blocks.5.") for name in trained_names(prepared(backbone, "last-block")))
