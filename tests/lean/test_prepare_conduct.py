"""Test lean models with checkpointing, autocast, compilers, exporters and intermediate features."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize("norm", ["frozen", "stats"])
@pytest.mark.parametrize(
    ("hooks", "whole", "passes"),
    [(save_on_cpu(), False, 1), (nullcontext(), True, 1), (nullcontext(), False, 2)],
    ids=["offloading", "nested", "two backward passes"],
)
def test_checkpointing_inside_hooks_on_saved_tensors_gives_the_same_gradients(
    hooks: AbstractContextManager[None], whole: bool, passes: int, norm: str, make_backbone: MakeBackbone
) -> None:
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    plain = with_adapter(make_backbone("mobilenetv3_small_050").double(), norm=norm).train()
    lean = copy.deepcopy(plain)
    prepare_model_for_lean_training(lean, inplace_norm=True, recompute=True, checkpoint=True)
    expected = outcome(plain, images)

    with hooks:
        output = checkpoint(lean, images, use_reentrant=False) if whole else lean(images)
    for _ in range(passes):
        lean.zero_grad()
        output.square().sum().backward(retain_graph=True)

    gradients = {name: value.grad for name, value in lean.named_parameters() if value.requires_grad}
    assert_same({"output": output.detach(), **gradients}, expected, 1e-8)


def test_checkpointed_norms_without_a_backward_pass_count_each_batch_once(make_backbone: MakeBackbone) -> None:
    model = make_backbone("mobilenetv2_035").train().requires_grad_(False)
    model.blocks[2][1].conv_pwl.requires_grad_(True)
    prepare_model_for_lean_training(model, checkpoint=True)

    outcome(model, torch.randn(2, 3, 64, 64))

    counts = {name: int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert {*counts.values()} == {1}, counts


def test_images_without_a_batch_dimension_give_the_same_gradients() -> None:
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 1),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, groups=8),
    ]
    plain, image = nn.Sequential(*layers), torch.randn(3, 16, 16)
    lean = copy.deepcopy(plain)
    prepare_model_for_lean_training(lean, recompute=True)

    assert_same(outcome(lean, image), outcome(plain, image), 0)


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
