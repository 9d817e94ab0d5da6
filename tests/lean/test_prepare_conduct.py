"""Test lean models with checkpointing, autocast, compilers, exporters and intermediate features."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from peft_edge.lean import prepare_model_for_lean_training
from tests.lean.support import MakeBackbone, assert_same, outcome, with_adapter


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool, make_backbone: MakeBackbone) -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    model = with_adapter(make_backbone("mobilenetv2_035").double()).train()
    prepare_model_for_lean_training(model, inplace_norm=True)
    expected = outcome(model, images)

    def forward(images: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, images, use_reentrant=use_reentrant)

    model.zero_grad()
    forward(images).square().sum().backward()

    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert_same({"output": expected["output"], **found}, expected, 1e-12)


def test_autocast_gives_close_gradients(make_backbone: MakeBackbone) -> None:
    images = torch.randn(2, 3, 32, 32)
    plain = with_adapter(make_backbone("mobilenetv2_035"))
    lean = prepare_model_for_lean_training(copy.deepcopy(plain), masks="bit")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = outcome(lean, images), outcome(plain, images)

    assert_same(found, expected, 0.1)


def test_autocast_applies_to_recomputed_tensors(make_backbone: MakeBackbone) -> None:
    images = torch.randn(2, 3, 32, 32)
    plain = with_adapter(make_backbone("mobilenetv2_035"))
    lean = prepare_model_for_lean_training(copy.deepcopy(plain), recompute=True)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = outcome(lean, images), outcome(plain, images)

    assert_same(found, expected, 0.1)


def test_compiled_lean_model_computes_the_same(chain: nn.Module) -> None:
    torch.compiler.reset()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = prepare_model_for_lean_training(with_adapter(chain.double()).train(), inplace_norm=True)
    expected = outcome(model, images)

    found = outcome(torch.compile(model, backend="aot_eager"), images)

    assert_same({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected, 1e-10)


def test_lean_model_can_be_copied_and_exported(make_backbone: MakeBackbone) -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = prepare_model_for_lean_training(make_backbone("mobilenetv2_035").double(), inplace_norm=True)
    copied = copy.deepcopy(model)
    model.bn1.running_mean.add_(1.0)

    assert not torch.allclose(copied(images), model(images))
    program = torch.export.export(copied, (images,))
    torch.testing.assert_close(program.module()(images), copied(images))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_lean_model_can_be_traced(chain: nn.Module, grad_enabled: bool) -> None:
    images, others = torch.randn(2, 3, 9, 9), torch.randn(3, 3, 9, 9)
    model = prepare_model_for_lean_training(with_adapter(chain), inplace_norm=True)

    with torch.set_grad_enabled(grad_enabled):
        traced = torch.jit.trace(model, (images,))

    assert torch.equal(traced(others), model(others))


def test_forward_intermediates_returns_outputs_before_the_norm(make_backbone: MakeBackbone) -> None:
    images = torch.randn(2, 3, 32, 32)
    # Its `forward_intermediates` returns the output of the first convolution, before the norm.
    model = with_adapter(make_backbone("ghostnet_050"))
    expected = model.forward_intermediates(images)[1]

    found = prepare_model_for_lean_training(model, inplace_norm=True).forward_intermediates(images)[1]

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert any("inplace_norm" in vars(module) for module in model.modules())
