"""Re-estimated statistics against torch's own re-estimation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim.swa_utils import update_bn

from peft_edge import restat

Adapt = Callable[..., nn.Module]


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return [torch.randn(6, 3, 32, 32) * 0.3 + 0.5 for _ in range(3)]


@pytest.fixture
def adapt(config_cls: type[PeftConfig]) -> Adapt:
    return lambda model, norm="restat": get_peft_model(model, config_cls(target_modules="depthwise", norm=norm))


def test_equals_update_bn_of_torch(adapt: Adapt, tiny_backbone: nn.Module, batches: list[torch.Tensor]) -> None:
    reference = copy.deepcopy(tiny_backbone)
    model = adapt(tiny_backbone).train()

    restat(model, batches)
    update_bn(batches, reference)

    assert model.training
    # An untrained adapter changes nothing, so what differs from the reference could only be the statistics.
    torch.testing.assert_close(model.eval()(batches[0]), reference.eval()(batches[0]))


def test_statistics_are_then_frozen_and_travel_with_the_adapter(
    adapt: Adapt, tiny_backbone: nn.Module, batches: list[torch.Tensor], tmp_path: object
) -> None:
    fresh = copy.deepcopy(tiny_backbone)
    model = adapt(tiny_backbone)
    restat(model, batches)
    expected = model.eval()(batches[0])

    model.train()(batches[1])
    model.eval().save_pretrained(tmp_path)

    assert torch.equal(model(batches[0]), expected)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(batches[0]), expected)


def test_a_failing_batch_leaves_the_statistics_as_they_were(
    adapt: Adapt, tiny_backbone: nn.Module, batches: list[torch.Tensor]
) -> None:
    model = adapt(tiny_backbone)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(RuntimeError, match="expected input"):
        restat(model, [*batches, torch.zeros(2, 7, 8, 8)])

    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_nothing_to_estimate_is_an_error(adapt: Adapt, tiny_backbone: nn.Module, batches: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="no active adapter has BatchNorm statistics"):
        restat(adapt(tiny_backbone, "frozen"), batches)
    with pytest.raises(ValueError, match="no active adapter"):
        restat(timm.create_model("mobilenetv2_035"), batches)


def test_no_batch_is_an_error(adapt: Adapt, tiny_backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match="got no batch"):
        restat(adapt(tiny_backbone), [])
