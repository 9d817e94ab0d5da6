from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from peft_edge.backbones import load_backbone, save_backbone
from peft_edge.config import RunConfig
from peft_edge.methods import METHODS
from peft_edge.training.updates import continue_update, load_update, save_update

METHOD_NAMES = ["head", "norm-affine", "bias", "full", "lora", "conv-adapter", "peft-lora"]
CPU = torch.device("cpu")
IMAGES = torch.randn(8, 3, 48, 48)


def prepared(model: nn.Module, name: str) -> nn.Module:
    return METHODS[name].prepare(model, options(name))


def options(name: str) -> dict:
    dense = {"target_modules": "dense"} if name == "peft-lora" else {}
    return {**RunConfig(output_dir="").options(METHODS[name].section), **dense}


@pytest.fixture
def source(tmp_path: Path) -> nn.Module:
    save_backbone(load_backbone("mobilenetv3_small_050", num_classes=5), tmp_path / "source")
    return load_backbone(str(tmp_path / "source")).to(memory_format=torch.channels_last)


def train_a_little(model: nn.Module) -> torch.Tensor:
    """Returns what the model answers afterwards."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(IMAGES).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval()(IMAGES)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_what_is_loaded_is_what_was_saved_and_can_be_trained_on(source: nn.Module, tmp_path: Path, name: str) -> None:
    model = prepared(load_backbone(str(tmp_path / "source")), name)
    answers = train_a_little(model)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    save_update(model, tmp_path / "update", ships_model=METHODS[name].ships_model)
    (folder,) = (tmp_path / "update").iterdir()
    assert folder.name == ("model" if METHODS[name].ships_model else "adapter")
    with torch.no_grad():
        torch.testing.assert_close(load_update(folder, CPU).eval()(IMAGES), answers, atol=1e-5, rtol=1e-5)

    continued = continue_update(folder, source, METHODS[name], options(name))
    assert {key for key, parameter in continued.named_parameters() if parameter.requires_grad} == trained
    with torch.no_grad():
        torch.testing.assert_close(continued.eval()(IMAGES), answers, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(train_a_little(continued), answers, atol=1e-3)
