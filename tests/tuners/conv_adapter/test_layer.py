"""The bottleneck against its three convolutions, and against its merged self."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from timm.layers import Conv2dSame
from torch import Tensor, nn

from tests.tuners.support import adapter_config

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
def test_the_linear_form_merges_exactly(kind: str, kernel_size: int | None) -> None:
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
def test_parallel_is_added_to_the_output_for_the_same_input(activation: str | None) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2)
    model, x = _adapt(copy.deepcopy(conv), activation=activation, kernel_size=3), _input(conv)
    layer = model.base_model.model.conv
    down, depthwise, up = (getattr(layer, f"conv_adapter_{n}")["default"].weight for n in ("down", "depthwise", "up"))
    assert (down.shape, depthwise.shape, up.shape) == ((2, 4, 1, 1), (2, 1, 3, 3), (6, 2, 1, 1))

    z = F.conv2d(F.conv2d(x, down), depthwise, None, stride=2, padding=2, dilation=2, groups=2)
    expected = conv(x) + F.conv2d(F.relu(z) if activation else z, up)

    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", ["strided", "depthwise"])
def test_sequential_is_added_to_the_output_it_maps(kind: str) -> None:
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


def test_half_precision_model_keeps_its_type() -> None:
    conv = CONVS["strided"]().bfloat16()
    model, x = _adapt(conv), _input(conv, dtype=torch.bfloat16)

    assert {p.dtype for n, p in model.named_parameters() if "conv_adapter" in n} == {torch.float32}
    assert model(x).dtype == torch.bfloat16
    assert model.merge_and_unload()(x).dtype == torch.bfloat16


def test_channels_last_stays() -> None:
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
def test_what_cannot_be_merged_says_why(conv: nn.Module, options: dict[str, Any], reason: str) -> None:
    model = _adapt(conv, **options)

    with pytest.raises(NotImplementedError, match=rf"adapter 'default' into layer 'conv': {reason}"):
        model.merge_adapter()


@pytest.mark.parametrize("kind", ["same", "depthwise"])
def test_compiles_as_one_graph(kind: str) -> None:
    conv = {**CONVS, **GROUPED}[kind]()
    model, x = _adapt(conv, activation="relu"), _input(conv)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    torch.testing.assert_close(compiled(x), model(x))
