from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from peft_edge.backbones import load_backbone
from peft_edge.methods import METHODS, prepare_model

ADAPTER = {"r": 2, "lora_alpha": 4, "target_modules": "all-conv", "norm": "stats"}


@pytest.fixture
def backbone() -> nn.Module:
    return load_backbone("mobilenetv3_small_050", num_classes=5)


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_trains_everything_none_nothing_and_head_the_head(backbone: nn.Module) -> None:
    everything = {name for name, _ in backbone.named_parameters()}
    assert trained_names(prepare_model(copy.deepcopy(backbone), "full", ADAPTER)) == everything
    assert trained_names(prepare_model(copy.deepcopy(backbone), "none", ADAPTER)) == set()
    assert trained_names(prepare_model(copy.deepcopy(backbone), "head", ADAPTER)) == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("lora", {"lora_A", "lora_B"}),
        ("lora-fa", {"lora_B"}),
        ("dora", {"lora_A", "lora_B", "lora_magnitude_vector"}),
    ],
)
def test_adapters_train_their_parts_and_the_head(backbone: nn.Module, method: str, parts: set[str]) -> None:
    model = prepare_model(backbone, method, ADAPTER)
    assert isinstance(model, PeftModel)
    names = trained_names(model)
    head = {name for name in names if ".classifier." in name}
    assert len(head) == 2
    assert {part for name in names - head for part in name.split(".") if part.startswith("lora_")} == parts
    convolutions = sum(isinstance(module, nn.Conv2d) for module in load_backbone("mobilenetv3_small_050").modules())
    assert sum(".lora_B." in name for name in names) == convolutions


@pytest.mark.parametrize("method", METHODS)
def test_training_starts_from_the_source_model(backbone: nn.Module, method: str) -> None:
    images = torch.randn(2, 3, 48, 48)
    expected = backbone.eval()(images)
    prepared = prepare_model(copy.deepcopy(backbone), method, ADAPTER).eval()
    torch.testing.assert_close(prepared(images), expected, atol=1e-5, rtol=1e-5)


def test_unknown_method_names_the_nearest(backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"unknown method 'lorra'; the nearest is 'lora'"):
        prepare_model(backbone, "lorra", ADAPTER)
