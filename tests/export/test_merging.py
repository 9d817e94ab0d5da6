from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_edge import ConvAdapterConfig, prepare_model_for_lean_training
from peft_edge.export.images import Images
from peft_edge.export.merging import merged
from peft_edge.lean.layers import PLAIN
from tests.export.support import Saved


@torch.no_grad()
def test_a_plain_network_is_left_that_answers_the_same(saved: Saved, digits: Images) -> None:
    model = saved.load().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = merged(prepare_model_for_lean_training(model))
    assert not any(isinstance(module, BaseTunerLayer) or type(module) in PLAIN for module in network.modules())
    assert not any(module.training for module in network.modules())
    torch.testing.assert_close(network(digits.comparison), saved.load()(digits.comparison), rtol=1e-4, atol=1e-5)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_that_is_a_network_of_its_own_is_refused(tiny_backbone: nn.Module) -> None:
    model = get_peft_model(tiny_backbone, ConvAdapterConfig(target_modules="depthwise"))
    with pytest.raises(ValueError, match=r"cannot become part of one: Cannot merge adapter 'default' into layer"):
        merged(model)


@torch.no_grad()
def test_weights_that_are_not_finite_are_refused(saved: Saved) -> None:
    model = saved.load()
    next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        merged(model)
