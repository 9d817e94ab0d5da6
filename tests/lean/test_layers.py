"""Test each lean layer against the plain one: outputs, gradients, and what it saves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoKrConfig, get_peft_model
from timm.layers import BatchNormAct2d, Conv2dSame, DropPath, SEModule
from timm.models._efficientnet_blocks import EdgeResidual, InvertedResidual, SqueezeExcite, UniversalInvertedResidual
from torch import Tensor, nn

from peft_edge import ConvLoraConfig
from peft_edge.lean import layers, prepare_model_for_lean_training, undo_lean_training
from peft_edge.lean.layers import LEAN, layer_keeps_input
from peft_edge.profiling import track_memory

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
    "InvertedResidual": (lambda: InvertedResidual(4, 4, exp_ratio=2.0), (2, 4, 5, 5)),
    "UniversalInvertedResidual": (lambda: UniversalInvertedResidual(4, 6, stride=2, exp_ratio=2.0), (2, 4, 6, 6)),
    "EdgeResidual": (lambda: EdgeResidual(4, 4, exp_ratio=2.0), (2, 4, 5, 5)),
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


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "InvertedResidual": lambda: InvertedResidual(
        16, 16, exp_ratio=6.0, act_layer=nn.ReLU6, se_layer=partial(SqueezeExcite, rd_ratio=0.25)
    ),
    "UniversalInvertedResidual": lambda: UniversalInvertedResidual(16, 24, stride=2, exp_ratio=6.0),
    "EdgeResidual": lambda: EdgeResidual(16, 16, exp_ratio=6.0),
}
SIZE = (9, 16, 80, 80)  # expanded to 9 * 96 * 80 * 80 = 5.5 million elements, in two parts


def large_block(name: str = "InvertedResidual") -> nn.Module:
    """Return a frozen block, prepared with `split_blocks=True`, whose first convolution is trainable."""
    torch.manual_seed(0)
    block = BLOCKS[name]().requires_grad_(False).eval()
    for key, buffer in block.named_buffers():
        if "running" in key:
            nn.init.uniform_(buffer, 0.5, 1.5)
    next(module for module in block.modules() if isinstance(module, nn.Conv2d)).requires_grad_(True)
    return prepare_model_for_lean_training(block, recompute=True, split_blocks=True, masks="bit")


def batch_sizes(block: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of samples in each call of the block's last convolution."""
    last = [module for module in block.modules() if isinstance(module, nn.Conv2d)][-1]
    sizes: list[int] = []
    original = layers.lean_convolution

    def record(x: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if weight is last.weight:
            sizes.append(len(x))
        return original(x, weight, *arguments, **options)

    monkeypatch.setattr(layers, "lean_convolution", record)
    block(x)
    return sizes


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["last", "contiguous"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_on_parts_of_the_batch_equals_the_plain_block(
    name: str, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = large_block(name).to(memory_format=memory_format)
    plain = undo_lean_training(copy.deepcopy(block))
    x = torch.randn(SIZE).contiguous(memory_format=memory_format)
    seed = torch.randn(plain(x).shape)

    (output, *found), (expected_output, *expected) = outcome(block, x, seed), outcome(plain, x, seed)

    torch.testing.assert_close(output, expected_output, rtol=1e-5, atol=1e-6)
    assert output.stride() == expected_output.stride()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert batch_sizes(block, x, monkeypatch) == [5, 4]


def test_temporaries_of_a_block_are_those_of_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(16, 16, 80, 80)  # expanded to 9.8 million elements: parts of 6, 5 and 5 samples

    def peak_bytes() -> int:
        model = nn.Sequential(large_block(), nn.Flatten())
        return track_memory(model, images, loss_fn=lambda output: output.square().mean()).peak_bytes

    in_parts = peak_bytes()
    monkeypatch.setattr(layers, "_MAX_BLOCK_ELEMENTS", images.numel() * 6)
    whole = peak_bytes()

    # Both peaks include the images, the block's output, and the gradient of this output. The rest is proportional to
    # the largest part: 6 of 16 samples.
    common = 3 * images.nbytes
    assert in_parts - common < 6.5 / 16 * (whole - common)


def _train_norms(block: nn.Module) -> None:
    block.train()


def _drop_path(block: nn.Module) -> None:
    block.drop_path = DropPath(0.5).train()


def _random_activation(block: nn.Module) -> None:
    block.bn1.act = nn.RReLU().train()


def _random_adapter(block: nn.Module) -> None:
    config = LoKrConfig(target_modules=["conv_pw"], module_dropout=0.5, init_weights=False)
    get_peft_model(nn.Sequential(block), config).eval()
    block.conv_pw.train()


def _random_norm_with_adapter(block: nn.Module) -> None:
    block.bn1.drop = nn.Dropout(0.5)
    get_peft_model(nn.Sequential(block), ConvLoraConfig(target_modules=["conv_pw"], norm="frozen")).train()
    assert not block.bn1.uses_batch_statistics


def _hook(block: nn.Module) -> None:
    block.conv_pw.register_forward_hook(lambda *arguments: None)


def _batch_statistics(block: nn.Module) -> None:
    block.bn1.running_mean = block.bn1.running_var = None


def _without_the_setting(block: nn.Module) -> None:
    prepare_model_for_lean_training(block, recompute=True)


CHANGES = [
    *(_train_norms, _drop_path, _random_activation, _random_adapter, _random_norm_with_adapter),
    *(_hook, _batch_statistics, _without_the_setting),
]


@pytest.mark.parametrize("change", CHANGES)
def test_block_runs_on_the_whole_batch_if_parts_could_differ(
    change: Callable[[nn.Module], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = large_block()
    change(block)

    assert batch_sizes(block, torch.randn(SIZE), monkeypatch) == [9]


def test_parameter_named_p_is_no_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    block = large_block()
    block.se.p = nn.Parameter(torch.ones(3))
    block.se.train()

    assert batch_sizes(block, torch.randn(SIZE), monkeypatch) == [5, 4]


def test_block_runs_on_the_whole_batch_if_it_is_small_or_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    block = large_block()

    assert batch_sizes(block, torch.randn(6, *SIZE[1:]), monkeypatch) == [6]
    with torch.no_grad():
        assert batch_sizes(block, torch.randn(SIZE), monkeypatch) == [9]


@pytest.mark.parametrize(("norm", "sizes"), [("frozen", [5, 4]), ("stats", [9])])
def test_norm_of_an_adapter_decides_whether_its_block_runs_on_parts(
    norm: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = large_block()
    config = ConvLoraConfig(target_modules=["conv_pw"], norm=norm, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(block), config).train()

    assert batch_sizes(model, torch.randn(SIZE), monkeypatch) == sizes
