"""Hooks and replaced forward passes of base layers, against a network with the merged weights."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable

import pytest
import timm
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from peft_edge import ConvLoraConfig
from tests.tuners.support import lora_config

Config = Callable[..., PeftConfig]
Observe = Callable[[nn.Module], object]


def _replace_forward(layer: nn.Module) -> None:
    # A method, which a copy of the layer binds to the copy.
    layer.forward = types.MethodType(lambda self, x: 3 * type(self).forward(self, 2 * x), layer)


def _replace_conv_forward(layer: nn.Module) -> None:
    if not isinstance(layer, nn.Conv2d):
        _replace_forward(layer)
        return

    def circular(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
        return nn.functional.conv2d(x, weight, bias, groups=self.groups)

    layer._conv_forward = types.MethodType(circular, layer)


OBSERVERS: dict[str, Observe] = {
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "hook": lambda layer: layer.register_forward_hook(lambda module, args, output: output + args[0].mean()),
    "keyword hook": lambda layer: layer.register_forward_hook(
        lambda module, args, kwargs, output: 2 * output, with_kwargs=True
    ),
    "backward hook": lambda layer: layer.register_full_backward_hook(
        lambda module, grad_input, grad_output: tuple(None if g is None else 2 * g for g in grad_input)
    ),
    "replaced forward": _replace_forward,
    "replaced _conv_forward": _replace_conv_forward,
}


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2)).double()


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_observed_base_layer_equals_a_merged_network(
    config: Config, observer: str, index: int, *, is_first: bool
) -> None:
    options = {"target_modules": ["0"], "kernel_size": 3} if config.__name__ == "adapter_config" else {}
    network, x = _network(), torch.randn(4, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    network[1].running_mean.normal_()
    plain = copy.deepcopy(network)
    if is_first:
        OBSERVERS[observer](network[index])
    model = get_peft_model(network, config(norm="affine", **options)).eval()
    nn.init.normal_(next(p for name, p in model.named_parameters() if "_norm." in name))
    if not is_first:
        layer = model.base_model.model[index]
        OBSERVERS[observer](layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer)
    with model.disable_adapter():
        base_output = model(x)

    output = model(x)
    (gradient,) = torch.autograd.grad(output.square().sum(), x)

    assert not torch.allclose(output, base_output)
    reference = copy.deepcopy(model)
    OBSERVERS[observer](plain[index])
    torch.testing.assert_close(base_output, plain.eval()(x))
    reference.merge_adapter()
    merged = copy.deepcopy(plain)
    state = reference.state_dict()
    for name, tensor in merged.state_dict().items():
        layer, _, leaf = name.partition(".")
        key = f"base_model.model.{layer}.base_layer.{leaf}"
        tensor.copy_(state[key if key in state else f"base_model.model.{name}"])
    torch.testing.assert_close(output, merged(x))
    torch.testing.assert_close(gradient, torch.autograd.grad(merged(x).square().sum(), x)[0])
    model.merge_adapter()
    torch.testing.assert_close(model(x), output)
    model.unmerge_adapter()
    assert torch.equal(model(x), output)


def test_hooks_see_the_adapted_output_in_mixed_batches_and_with_dropout() -> None:
    model = get_peft_model(_network(), lora_config(norm="stats", lora_dropout=0.5)).eval()
    model.add_adapter("other", lora_config(norm="affine"))
    x, seen = torch.randn(3, 3, 9, 9, dtype=torch.float64), []
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = model(x)
    with model.disable_adapter():
        expected["__base__"] = model(x)
    last = model.base_model.model[3].base_layer
    last.register_forward_hook(lambda module, args, output: seen.append(output))
    names = ["other", "__base__", "default"]

    mixed = model(x, adapter_names=names)

    torch.testing.assert_close(mixed, torch.stack([expected[name][row] for row, name in enumerate(names)]))
    assert [output is mixed for output in seen] == [True]
    assert model.train()(x) is seen[-1]


def test_feature_networks_of_timm_find_the_adapted_features(images: Tensor) -> None:
    backbone = timm.create_model("mobilenetv2_035", features_only=True, feature_location="expansion").eval()
    plain = backbone(images)

    model = get_peft_model(backbone, ConvLoraConfig(norm="stats", target_modules="all-conv"))
    features = model.eval()(images)

    assert len(features) == len(plain) == 5
    for ours, theirs in zip(features, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    adapted = model(images)
    assert not torch.allclose(adapted[-1], plain[-1], atol=1e-3)
    model.merge_adapter()
    for ours, theirs in zip(model(images), adapted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_feature_extractor_of_torchvision_is_adapted(images: Tensor) -> None:
    network = resnet18(num_classes=2).eval()
    names = ["layer1.0.conv1", "layer2.0.bn2"]
    reference = get_peft_model(copy.deepcopy(network), lora_config(norm="frozen")).eval()
    expected: dict[str, Tensor] = {}
    for name in names:
        reference.base_model.model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: expected.update({name: output.clone()})
        )
    reference(images)
    extractor = create_feature_extractor(network, names)

    model = get_peft_model(extractor, lora_config(norm="frozen")).eval()
    weights = reference.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})

    for name, features in model(images).items():
        torch.testing.assert_close(features, expected[name])


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"norm": "affine"}, {"norm": "frozen"}])
@pytest.mark.parametrize("is_first", [True, False])
def test_offloaded_weights_compute_the_same(options: dict[str, object], *, is_first: bool) -> None:
    network, x = _network(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    reference = get_peft_model(copy.deepcopy(network), lora_config(**options)).eval()
    if is_first:
        cpu_offload(network, execution_device="cpu")
    model = get_peft_model(network, lora_config(**options)).eval()
    weights = {name: value for name, value in reference.state_dict().items() if ".lora_" in name}
    model.load_state_dict(weights, strict=False)
    if not is_first:
        cpu_offload(model, execution_device="cpu")
    expected = reference(x)

    assert torch.equal(model(x), expected)

    assert network[0].base_layer.weight.device.type == "meta"
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)


def test_offloaded_bottleneck_adapters_compute_the_same(images: Tensor) -> None:
    from tests.tuners.support import adapter_config

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    plain = copy.deepcopy(network)
    cpu_offload(network, execution_device="cpu")
    model = get_peft_model(network, adapter_config()).eval()
    reference = get_peft_model(plain, adapter_config()).eval()
    weights = {name: value for name, value in model.state_dict().items() if ".conv_adapter_" in name}
    reference.load_state_dict(weights, strict=False)

    assert torch.equal(model(images), reference(images))


@pytest.mark.parametrize("config_type", [LoraConfig, ConvLoraConfig])
def test_untrained_adapter_changes_nothing_as_with_peft(config_type: type[LoraConfig]) -> None:
    network, x = _network().eval(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    OBSERVERS["pre-hook"](network[0])
    expected = network(x)

    model = get_peft_model(network, config_type(target_modules=["0"]))

    torch.testing.assert_close(model(x), expected)


def test_hooked_model_compiles(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    OBSERVERS["pre-hook"](network[0])
    model = get_peft_model(network, lora_config()).eval()

    compiled = torch.compile(model, backend="eager")

    torch.testing.assert_close(compiled(images), model(images))
