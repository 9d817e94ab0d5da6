from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft_edge.backbones import class_names, load_backbone
from peft_edge.config import RunConfig, load_config
from peft_edge.methods import METHODS
from peft_edge.training.learner import new_learner

TARGET = SimpleNamespace(num_classes=5, class_names=["a", "b", "c", "d", "e"])


def config_for(method: str, *overrides: str) -> RunConfig:
    return load_config(["output_dir=a", f"method={method}", "data.new_classes=[d, e]", *overrides])


@pytest.fixture
def source() -> nn.Module:
    return load_backbone("mobilenetv3_small_050", num_classes=3).eval()


@pytest.mark.parametrize("method", ["head", "full", "lora", "conv-adapter", "peft-loha"])
def test_the_head_grows_and_the_old_classes_are_answered_as_before(source: nn.Module, method: str) -> None:
    images = torch.randn(2, 3, 48, 48)
    model = new_learner(config_for(method), METHODS[method], source, TARGET, None).eval()
    torch.testing.assert_close(model(images)[:, :3], source(images), atol=1e-5, rtol=1e-5)
    assert model(images).shape == (2, 5)
    assert class_names(model) == TARGET.class_names
    assert source.num_classes == 3


def test_a_method_that_trains_nothing_learns_no_class(source: nn.Module) -> None:
    assert new_learner(config_for("norm-stats"), METHODS["norm-stats"], source, TARGET, None).num_classes == 3


@pytest.mark.parametrize("rehearses", [True, False])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_without_rehearsal_the_old_rows_get_no_gradient(source: nn.Module, method: str, rehearses: bool) -> None:
    config = config_for(method, "data.rehearsal_size=6") if rehearses else config_for(method)
    model = new_learner(config, METHODS[method], source, TARGET, None).train()
    model(torch.randn(4, 3, 48, 48)).square().sum().backward()
    (weight,) = (
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith("classifier.weight") or name.endswith("classifier.modules_to_save.default.weight")
    )
    assert (weight.grad[3:] != 0).any()
    assert (weight.grad[:3] != 0).any() == rehearses
