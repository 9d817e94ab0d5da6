"""Test each lean layer against the plain one: outputs, gradients, and what it saves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from peft_edge.lean.layers import LEAN, layer_keeps_input

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, bias=False), (2, 4, 9, 7)),
    "Conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same"), (2, 4, 9, 7)),
    "Conv2d, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9, 7)),
    "Conv2dSame": (lambda: Conv2dSame(4, 6, 3, stride=2), (2, 4, 9, 8)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 3), (2, 2, 5, 5, 5)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (3, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4, affine=False), (2, 4, 5, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (2, 4, 3, 3, 3)),
    "BatchNormAct2d": (lambda: BatchNormAct2d(4), (2, 4, 5, 5)),
    "ReLU": (lambda: nn.ReLU(), (2, 4, 5, 5)),
    "ReLU6": (lambda: nn.ReLU6(inplace=True), (2, 4, 5, 5)),
    "Hardswish": (lambda: nn.Hardswish(inplace=True), (2, 4, 5, 5)),
    "SiLU": (lambda: nn.SiLU(inplace=True), (2, 4, 5, 5)),
    "MaxPool2d": (lambda: nn.MaxPool2d(3, 2, padding=(1, 0), ceil_mode=True), (2, 4, 9, 8)),
    "SqueezeExcite": (lambda: SqueezeExcite(16, act_layer=nn.SiLU, gate_layer="hard_sigmoid"), (2, 16, 5, 5)),
    "SEModule": (lambda: SEModule(16, rd_channels=4, add_maxpool=True), (2, 16, 5, 5)),
}


def layer_of(name: str) -> tuple[nn.Module, Tensor]:
    make, size = LAYERS[name]
    layer = make()
    for key, buffer in layer.named_buffers():
        if "running" in key:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return layer, 4 * torch.randn(size)


def lean(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    for module in layer.modules():
        if type(module) in LEAN:
            module.__class__ = LEAN[type(module)]
    return layer


def outcome(layer: nn.Module, x: Tensor, seed: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x * 1)
    (y * seed).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters()), *layer.buffers()]


def test_every_lean_class_is_covered() -> None:
    assert {type(layer_of(name)[0]) for name in LAYERS} == set(LEAN)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_outputs_gradients_and_statistics_equal_the_plain_layer(name: str, training: bool, trained: bool) -> None:
    layer, x = layer_of(name)
    layer.train(training).requires_grad_(trained)
    seed = torch.randn(layer(x.clone()).shape)
    found, expected = lean(layer), layer

    for ours, theirs in zip(outcome(found, x, seed), outcome(expected, x, seed), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in LAYERS if "Conv" in name or "BatchNorm" in name])
def test_frozen_layer_saves_nothing_of_the_size_of_its_input(name: str) -> None:
    layer, x = layer_of(name)
    layer = lean(layer.eval().requires_grad_(False))
    if isinstance(layer, BatchNormAct2d):
        layer.act = nn.Identity()
    kept: list[Tensor] = []

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x.requires_grad_())

    parameters = {parameter.data_ptr() for parameter in layer.parameters()}
    assert all(tensor.data_ptr() in parameters or tensor.numel() <= x.shape[1] for tensor in kept)


def test_no_mask_is_computed_without_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = lean(nn.ReLU())
    monkeypatch.setattr("peft_edge.lean.layers.clipped_activation", None)

    assert torch.equal(layer(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
    with torch.no_grad():
        layer(torch.ones(2, requires_grad=True))


def test_layer_keeps_input_knows_trained_layers_and_pools() -> None:
    conv = nn.Conv2d(3, 3, 1)

    assert layer_keeps_input(conv)
    assert layer_keeps_input(lean(conv))
    assert not layer_keeps_input(conv.requires_grad_(False))
    assert not layer_keeps_input(lean(conv))
    assert layer_keeps_input(nn.MaxPool2d(2))
    assert not layer_keeps_input(nn.Flatten())


@pytest.mark.parametrize("name", ["Conv2d", "Conv2dSame", "BatchNormAct2d", "ReLU6", "SiLU", "SEModule"])
def test_compiled_layers_compute_the_same_gradients(name: str) -> None:
    torch.compiler.reset()
    layer, x = layer_of(name)
    layer = lean(layer.eval().requires_grad_(False))
    seed = torch.randn(layer(x.clone()).shape)

    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (function(leaf) * seed).sum().backward()
        return leaf.grad

    found = gradient(torch.compile(lambda x: layer(x * 1), backend="aot_eager", fullgraph=True))

    torch.testing.assert_close(found, gradient(lambda x: layer(x * 1)), rtol=1e-5, atol=1e-6)
