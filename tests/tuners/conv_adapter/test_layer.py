"""ConvSpec against the layers it describes, and ConvAdapterLayer against its formula and its merged kernel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from peft import get_peft_model
from timm.layers import Conv2dSame
from torch import Tensor, nn

from peft_edge.tuners.conv_adapter.layer import ConvSpec
from tests.tuners.support import adapter_config

SPEC_CONVS = {
    "plain": nn.Conv2d(4, 6, 3, bias=False),
    "padded": nn.Conv2d(4, 6, 5, padding=2, stride=2, bias=False),
    "dilated": nn.Conv2d(4, 6, 3, padding=2, dilation=2, bias=False),
    "even": nn.Conv2d(4, 6, 4, stride=4, bias=False),
    "oblong": nn.Conv2d(4, 6, (1, 5), padding=(1, 0), bias=False),
    "reflected": nn.Conv2d(4, 6, 5, padding=2, padding_mode="reflect", bias=False),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
    "same": nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False),
    "timm's same": Conv2dSame(4, 6, 5, stride=2, bias=False),
}


@pytest.mark.parametrize("size", [16, 17])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", SPEC_CONVS)
def test_padding_for_another_kernel_size_keeps_the_output_size(kind: str, kernel_size: int, size: int) -> None:
    conv = copy.deepcopy(SPEC_CONVS[kind])
    spec = ConvSpec.of_convolution(conv)
    kernel = torch.randn(6, 4, kernel_size, kernel_size)
    x = torch.randn(2, 4, size, size)

    y = F.conv2d(spec.pad(x, (kernel_size, kernel_size)), kernel, None, conv.stride, 0, conv.dilation)

    assert y.shape == conv(x).shape
    margins = spec.margins((kernel_size, kernel_size))
    if min(margins) >= 0:
        # Pad the smaller kernel with zeros and put it into the convolution.
        conv.weight.data = F.pad(kernel, margins)
        torch.testing.assert_close(y, conv(x))


@pytest.mark.parametrize("kind", SPEC_CONVS)
def test_spec_of_the_output_keeps_its_shape(kind: str) -> None:
    y = SPEC_CONVS[kind](torch.randn(2, 4, 16, 16))
    spec = ConvSpec.of_convolution(SPEC_CONVS[kind]).of_output()

    for kernel_size in (spec.kernel_size, (1, 1), (3, 3)):
        assert F.conv2d(spec.pad(y, kernel_size), torch.ones(6, 1, *kernel_size), groups=6).shape == y.shape


@pytest.mark.parametrize(
    ("backbone", "block", "expected"),
    [
        ("mobilenetv2_035", "blocks.1.0", (8, 8, 2)),
        ("mobilenetv2_035", "blocks.1.1", (8, 8, 1)),
        ("mobilenetv2_035", "blocks", (16, 112, 16)),
        ("resnet10t", "layer2.0", (64, 128, 2)),
        ("mobilenetv4_conv_small", "blocks.2.0", (64, 96, 2)),
        ("tf_mobilenetv3_small_minimal_100", "blocks.1.0", (16, 24, 2)),
    ],
)
def test_spec_of_a_block_has_its_channels_and_stride(backbone: str, block: str, expected: tuple[int, int, int]) -> None:
    model = timm.create_model(backbone)
    before = copy.deepcopy(model.state_dict())

    spec = ConvSpec.of_block(model.get_submodule(block), block)

    assert (spec.in_channels, spec.out_channels, spec.stride) == (*expected[:2], (expected[2],) * 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _Flat(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (nn.ReLU(), "ReLU is no convolution and holds none"),
        (nn.BatchNorm2d(4), "BatchNorm2d is no convolution and holds none"),
        (_Flat(nn.Conv2d(3, 4, 1)), r"maps \(64, 65\) pixels to"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"maps \(64, 65\) pixels to"),
        (nn.Sequential(nn.Linear(3, 3), nn.Conv2d(3, 4, 1)), "found Sequential .*same reduction dim"),
    ],
)
def test_module_that_is_no_block_is_rejected_by_name(block: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"layer 'here'.*{reason}.*exclude_modules=\['here'\]"):
        ConvSpec.of_block(block, "here")


CONVS = {
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    "pointwise": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "same": lambda: Conv2dSame(4, 6, 3, stride=2),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, padding="same"),
    "conv3d": lambda: nn.Conv3d(4, 4, (1, 3, 3)),
}
GROUPED = {
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2, padding=1),
}


def _adapt(conv: nn.Module, **kwargs: Any) -> nn.Module:
    model = nn.Sequential()
    model.conv = conv
    return get_peft_model(model, adapter_config(**{"reduction": 2, **kwargs})).eval()


def _input(conv: nn.Module, size: int = 9, **kwargs: Any) -> Tensor:
    return torch.randn(2, 4, *[size] * len(conv.kernel_size), **kwargs)


@pytest.mark.parametrize("kernel_size", [None, 1])
@pytest.mark.parametrize("kind", CONVS)
def test_linear_parallel_adapter_merges_exactly(kind: str, kernel_size: int | None) -> None:
    conv = CONVS[kind]()
    model, x = _adapt(copy.deepcopy(conv), kernel_size=kernel_size), _input(conv)
    expected = model(x)
    assert not torch.allclose(expected, conv(x), atol=1e-2)

    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    for name, value in conv.state_dict().items():
        assert torch.equal(model.base_model.model.conv.base_layer.state_dict()[name], value)
    merged = model.merge_and_unload()
    assert type(merged.conv) is type(conv)
    torch.testing.assert_close(merged(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_parallel_adapter_maps_the_input(activation: str | None) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2)
    model, x = _adapt(copy.deepcopy(conv), activation=activation, kernel_size=3), _input(conv)
    layer = model.base_model.model.conv
    down, depthwise, up = (getattr(layer, f"conv_adapter_{n}")["default"].weight for n in ("down", "depthwise", "up"))
    assert (down.shape, depthwise.shape, up.shape) == ((2, 4, 1, 1), (2, 1, 3, 3), (6, 2, 1, 1))

    z = F.conv2d(F.conv2d(x, down), depthwise, None, stride=2, padding=2, dilation=2, groups=2)
    expected = conv(x) + F.conv2d(F.relu(z) if activation else z, up)

    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", ["strided", "depthwise"])
def test_sequential_adapter_maps_the_output(kind: str) -> None:
    conv = {**CONVS, **GROUPED}[kind]()
    model, x = _adapt(copy.deepcopy(conv), placement="sequential", activation="hard_swish"), _input(conv)
    layer = model.base_model.model.conv
    down, depthwise, up = (getattr(layer, f"conv_adapter_{n}")["default"].weight for n in ("down", "depthwise", "up"))

    y = conv(x)
    z = F.conv2d(F.conv2d(y, down), depthwise, padding=1, groups=len(down))

    torch.testing.assert_close(model(x), y + F.conv2d(F.hardswish(z), up))


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize("kernel_size", [None, 1, 2, 5])
@pytest.mark.parametrize("kind", [*CONVS, *GROUPED])
def test_gradients_equal_finite_differences(kind: str, kernel_size: int | None, placement: str) -> None:
    conv = {**CONVS, **GROUPED}[kind]()
    model = _adapt(conv, kernel_size=kernel_size, placement=placement).double()
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    assert {name.split(".")[-3] for name in names} <= {f"conv_adapter_{n}" for n in ("down", "depthwise", "up")}

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    x = _input(conv, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (x, *parameters), fast_mode=True)


def test_the_bottleneck_has_at_least_one_channel() -> None:
    model = _adapt(nn.Conv2d(4, 6, 1), reduction=100)

    # 4 -> 1 -> 6, without a depthwise convolution.
    assert model.get_nb_trainable_parameters()[0] == 4 + 6


def test_several_active_adapters_add_up() -> None:
    conv = CONVS["strided"]()
    model, x = _adapt(copy.deepcopy(conv)), _input(conv)
    model.add_adapter("other", adapter_config(placement="sequential", activation="relu", kernel_size=5))
    changes = []
    for name in ("default", "other"):
        model.set_adapter(name)
        changes.append(model(x) - conv(x))

    model.base_model.set_adapter(["default", "other"])

    torch.testing.assert_close(model(x), conv(x) + sum(changes), atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(x), conv(x))


def test_half_precision_model_keeps_its_dtype() -> None:
    conv = CONVS["strided"]().bfloat16()
    model, x = _adapt(conv), _input(conv, dtype=torch.bfloat16)

    assert {p.dtype for n, p in model.named_parameters() if "conv_adapter" in n} == {torch.float32}
    assert model(x).dtype == torch.bfloat16
    assert model.merge_and_unload()(x).dtype == torch.bfloat16


def test_channels_last_is_preserved() -> None:
    conv = CONVS["strided"]()
    model = _adapt(conv).to(memory_format=torch.channels_last)

    assert model(_input(conv).to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("conv", "options", "reason"),
    [
        (nn.Conv2d(4, 6, 3), {"activation": "relu"}, "it is not linear, its activation is ReLU"),
        (nn.Conv2d(4, 6, 3), {"placement": "sequential"}, "it is in sequence"),
        (nn.Conv2d(4, 6, 3, groups=2), {}, "it mixes all channels, and the convolution has 2 groups"),
        (nn.Conv2d(4, 6, 1), {"kernel_size": 3}, r"its kernel, \(3, 3\), is larger than the convolution's, \(1, 1\)"),
    ],
)
def test_merge_error_gives_the_reason(conv: nn.Module, options: dict[str, Any], reason: str) -> None:
    model = _adapt(conv, **options)

    with pytest.raises(NotImplementedError, match=rf"adapter 'default' into layer 'conv': {reason}"):
        model.merge_adapter()


@pytest.mark.parametrize("kind", ["same", "depthwise"])
def test_compiles_as_one_graph(kind: str) -> None:
    conv = {**CONVS, **GROUPED}[kind]()
    model, x = _adapt(conv, activation="relu"), _input(conv)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    torch.testing.assert_close(compiled(x), model(x))
