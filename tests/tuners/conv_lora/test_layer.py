"""ConvLoraLayer against PEFT's LoRA convolution, finite differences, and its merged kernel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from timm.layers import Conv2dSame
from torch import Tensor, nn

from peft_edge import ConvLoraConfig

CONVS = {
    "dense": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "same": lambda: Conv2dSame(4, 6, 3, stride=2),
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "depthwise with multiplier": lambda: nn.Conv2d(4, 8, (1, 5), groups=4, stride=2),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, groups=2, padding="same"),
    "conv3d": lambda: nn.Conv3d(4, 4, (1, 3, 3), groups=4),
}


def _adapt(conv: nn.Module, config_cls: type[LoraConfig] = ConvLoraConfig, **kwargs: Any) -> nn.Module:
    config = config_cls(target_modules=["conv"], init_lora_weights=False, **{"r": 3, "lora_alpha": 5} | kwargs)
    model = get_peft_model(_Model(conv), config)
    if config.use_dora:
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    return model.eval()


class _Model(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _input(conv: Any, size: int = 9, **kwargs: Any) -> Tensor:
    return torch.randn(2, conv.in_channels, *[size] * len(conv.kernel_size), **kwargs)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", ["dense", "strided", "pointwise"])
def test_ungrouped_layer_equals_pefts_layer(kind: str, use_dora: bool) -> None:
    conv = CONVS[kind]()
    ours = _adapt(copy.deepcopy(conv), use_dora=use_dora)
    theirs = _adapt(copy.deepcopy(conv), LoraConfig, use_dora=use_dora)
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict())
    x = _input(conv)

    outputs = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ours.merge_and_unload().conv.weight, theirs.merge_and_unload().conv.weight, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", CONVS)
def test_merging_keeps_the_output_and_unmerging_restores_the_weights(kind: str, use_dora: bool) -> None:
    conv = CONVS[kind]()
    model, x = _adapt(copy.deepcopy(conv), use_dora=use_dora), _input(conv)
    expected = model(x)
    assert not torch.allclose(expected, conv(x), atol=1e-2)

    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    for name, value in conv.state_dict().items():
        assert torch.equal(model.base_model.model.conv.base_layer.state_dict()[name], value)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CONVS)
def test_gradients_equal_finite_differences(kind: str) -> None:
    conv = CONVS[kind]()
    model, x = _adapt(conv).double(), _input(conv, 5, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    assert len(names) == 2

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *parameters))


def test_dora_gradient_treats_the_norm_as_constant() -> None:
    model, x = (
        _adapt(CONVS["depthwise"](), use_dora=True).double(),
        _input(CONVS["depthwise"](), dtype=torch.float64),
    )
    layer = model.base_model.model.conv
    a, b = (layer.get_parameter(f"lora_{name}.default.weight") for name in "AB")
    magnitude = layer.lora_magnitude_vector["default"].weight
    kernel = layer.base_layer.weight + 5 / 3 * (b.flatten(1) @ a.flatten(1)).view(4, 1, 3, 3)
    norm = kernel.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    expected = nn.functional.conv2d(x, magnitude.view(-1, 1, 1, 1) / norm * kernel, layer.base_layer.bias, 1, 1, 1, 4)
    weights = torch.randn_like(expected)

    gradients = [torch.autograd.grad((y * weights).sum(), [a, b, magnitude]) for y in (model(x), expected)]

    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_depthwise_layers_of_mobilenetv2_take_few_parameters(rank: int) -> None:
    model = get_peft_model(
        timm.create_model("mobilenetv2_100"), ConvLoraConfig(norm="stats", r=rank, target_modules="depthwise")
    )

    # r (C + 3 * 3) for each of the 17 layers; the channels are from table 2 of the paper.
    channels = [32, 96, *[144] * 2, *[192] * 3, *[384] * 4, *[576] * 3, *[960] * 3]
    assert model.get_nb_trainable_parameters()[0] == sum(rank * (c + 9) for c in channels) == 7289 * rank


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", ["strided", "depthwise"])
def test_dropout_acts_on_the_adapters_input_only(kind: str, use_dora: bool) -> None:
    conv = CONVS[kind]()
    model, x = _adapt(copy.deepcopy(conv), lora_dropout=0.5, use_dora=use_dora).train(), _input(conv)
    layer = model.base_model.model.conv
    torch.manual_seed(1)
    got = model(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)

    layer.lora_dropout["default"].p = 0.0
    change = copy.deepcopy(conv)
    change.weight.data = model.merge_and_unload().conv.weight - conv.weight
    change.bias = None
    torch.testing.assert_close(got, conv(x) + change(dropped), atol=1e-5, rtol=1e-5)


def test_several_active_adapters_add_up() -> None:
    conv = CONVS["depthwise"]()
    model, x = _adapt(copy.deepcopy(conv)), _input(conv)
    model.add_adapter("other", ConvLoraConfig(r=1, target_modules=["conv"], init_lora_weights=False))
    changes = []
    for name in ("default", "other"):
        model.set_adapter(name)
        changes.append(model(x) - conv(x))

    model.base_model.set_adapter(["default", "other"])

    torch.testing.assert_close(model(x), conv(x) + sum(changes), atol=1e-5, rtol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(x), conv(x) + sum(changes), atol=1e-5, rtol=1e-5)


def test_adapter_of_another_tuner_below_is_applied() -> None:
    conv = CONVS["dense"]()
    x = _input(conv)
    model = get_peft_model(
        _Model(copy.deepcopy(conv)), LoHaConfig(target_modules=["conv"], init_weights=False), mixed=True
    )
    below = model.eval()(x) - conv(x)
    model.add_adapter("ours", ConvLoraConfig(target_modules=["conv"], init_lora_weights=False))
    model.set_adapter("ours")
    ours = model(x) - conv(x)

    model.set_adapter(["default", "ours"])

    assert min(below.abs().max(), ours.abs().max()) > 1e-2
    torch.testing.assert_close(model(x), conv(x) + below + ours, atol=1e-5, rtol=1e-5)


def test_freeze_a_trains_b_only_after_switching_too() -> None:
    model = _adapt(CONVS["depthwise"](), freeze_a=True)
    model.add_adapter("other", ConvLoraConfig(target_modules=["conv"]))
    for name, expected in {"other": {"lora_A.other", "lora_B.other"}, "default": {"lora_B.default"}}.items():
        model.set_adapter(name)
        trained = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"base_model.model.conv.{suffix}" for suffix in expected}


KEPT = {
    # Kind of the layer, options, and whether autograd saves its input.
    "dense": ("dense", {}, True),
    "frozen A": ("dense", {"freeze_a": True}, False),
    "frozen A, grouped": ("depthwise", {"freeze_a": True}, True),
    "frozen A, magnitude": ("dense", {"freeze_a": True, "use_dora": True}, True),
    "frozen A, dropout": ("dense", {"freeze_a": True, "lora_dropout": 0.5}, True),
    "inference": ("depthwise", {"inference_mode": True}, False),
}


@pytest.mark.parametrize("case", KEPT)
def test_keeps_input_tells_what_autograd_saves(case: str) -> None:
    kind, options, expected = KEPT[case]
    conv = CONVS[kind]()
    layer = _adapt(conv, **options).train().base_model.model.conv
    x = _input(conv, requires_grad=True)
    kept = set()

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.add(tensor.data_ptr()) or tensor, lambda t: t):
        layer(x)

    assert layer.keeps_input == expected == (x.data_ptr() in kept)


def test_keeps_input_is_the_base_layers_without_adapters() -> None:
    model = _adapt(CONVS["dense"](), freeze_a=True)
    layer = model.base_model.model.conv
    assert not layer.keeps_input
    with model.disable_adapter():
        assert layer.keeps_input
    layer.base_layer.keeps_input = False
    model.merge_adapter()
    assert not layer.keeps_input


def test_trainable_base_kernel_gets_a_gradient() -> None:
    conv = CONVS["strided"]()
    model, x = _adapt(conv), _input(conv)
    layer = model.base_model.model.conv
    layer.base_layer.weight.requires_grad_()
    assert layer.keeps_input

    model(x).square().sum().backward()

    expected = copy.deepcopy(conv)
    expected.weight.data += layer.get_delta_weight("default")
    expected(x).square().sum().backward()
    torch.testing.assert_close(layer.base_layer.weight.grad, expected.weight.grad, atol=1e-4, rtol=1e-4)


def test_input_without_batch_dimension_works() -> None:
    conv = CONVS["grouped"]()
    model, x = _adapt(conv), _input(conv)

    y = model(x[0])

    torch.testing.assert_close(y, model(x)[0], atol=1e-5, rtol=1e-5)
    y.sum().backward()


def test_lora_bias_is_merged() -> None:
    conv = CONVS["depthwise"]()
    model, x = _adapt(conv, lora_bias=True), _input(conv)
    expected = model(x)

    torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=1e-5, rtol=1e-5)


def test_lora_bias_without_base_bias_cannot_be_merged() -> None:
    with pytest.warns(UserWarning, match=r"Conv2d has no bias.*layer 'conv'"):
        model = _adapt(CONVS["strided"](), lora_bias=True)

    with pytest.raises(RuntimeError, match="base layer has no bias"):
        model.merge_adapter()


@pytest.mark.parametrize("use_dora", [False, True])
def test_half_precision_model_keeps_its_dtype(use_dora: bool) -> None:
    conv = CONVS["depthwise"]().bfloat16()
    model, x = _adapt(conv, use_dora=use_dora), _input(conv, dtype=torch.bfloat16)

    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert model(x).dtype == torch.bfloat16
    assert model.merge_and_unload()(x).dtype == torch.bfloat16


def test_channels_last_is_preserved() -> None:
    conv = CONVS["depthwise"]()
    model = _adapt(conv, use_dora=True).to(memory_format=torch.channels_last)
    x = _input(conv).to(memory_format=torch.channels_last)

    assert model(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_must_be_positive_for_every_adapter(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"positive integer value but the value passed is {rank} \(layer 'conv'\)"):
        _adapt(CONVS["dense"](), r=rank)

    model = _adapt(CONVS["dense"]())
    with pytest.raises(ValueError, match="positive integer"):
        model.add_adapter("second", ConvLoraConfig(r=rank, target_modules=["conv"]))
