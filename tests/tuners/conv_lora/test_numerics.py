"""Numbers of ConvLoraLayer against PEFT's LoRA: transforms of torch.func, complex and half precision, caches."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.helpers import DoraCaching
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from peft_edge import ConvLoraConfig
from tests.tuners.support import lora_config


def _pair(*layers: nn.Module, **options: object) -> list[nn.Module]:
    """Return two copies of a network with equal weights: one with PEFT's LoRA, and one with ours."""
    options = {"target_modules": ["0"], "init_lora_weights": False, "r": 2, **options}
    network = nn.Sequential(*layers)
    models = [get_peft_model(copy.deepcopy(network), cls(**options)) for cls in (LoraConfig, ConvLoraConfig)]
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    return models


def _transformed(model: nn.Module, name: str) -> object:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, weights, (x[None],)).square().sum()

    if name == "grad":
        return grad(loss)(weights, x[0])
    if name == "per sample":
        return vmap(grad(loss), (None, 0))(weights, x)
    if name == "jvp":
        return jvp(lambda x: loss(weights, x), (x[0],), (x[1],))
    if name == "hessian":
        return hessian(lambda x: loss(weights, F.pad(x, (2, 2, 2, 2))))(x[0, :, :2, :2])
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(weights, forward_ad.make_dual(x[0], x[1]))).tangent


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # forward-mode rules of torch
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", ["grad", "per sample", "jvp", "hessian", "forward"])
def test_transforms_of_torch_func_give_what_pefts_layer_gives(name: str, *, use_dora: bool) -> None:
    models = _pair(nn.Conv2d(3, 4, 3), nn.Flatten(), use_dora=use_dora)

    expected, got = (_transformed(model.double(), name) for model in models)

    torch.testing.assert_close(got, expected)


def test_transforms_work_with_norms_and_grouped_kernels() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU())
    model = get_peft_model(network, lora_config(norm="stats")).eval()
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(3, 4, 6, 6)

    each = vmap(grad(lambda w, x: functional_call(model, w, (x[None],)).sum()), (None, 0))(weights, x)

    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(each[name].sum(0), parameter.grad)


@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
def test_complex_convolution_trains_as_with_peft() -> None:
    models = _pair(nn.Conv2d(2, 3, 3, dtype=torch.complex64))
    x = torch.randn(1, 2, 6, 6, dtype=torch.complex64)
    outputs = [model(x) for model in models]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.abs().sum().backward()
    expected = dict(models[0].named_parameters())
    for name, parameter in models[1].named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad)
    models[1].merge_adapter(safe_merge=True)
    torch.testing.assert_close(models[1](x), outputs[1], atol=1e-4, rtol=1e-4)
    models[1].unmerge_adapter()
    torch.testing.assert_close(models[1](x), outputs[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.1}])
@pytest.mark.parametrize("std", [5e-4, 5e-3])
def test_small_update_of_a_half_precision_base_is_as_exact_as_pefts(
    dtype: torch.dtype, options: dict[str, object], std: float
) -> None:
    models = _pair(nn.Conv2d(16, 16, 3, padding=1).to(dtype), r=4, **options)
    x, errors = torch.randn(4, 16, 8, 8).to(dtype), []
    for parameter in (p for name, p in models[0].named_parameters() if "lora_B" in name):
        nn.init.normal_(parameter, std=std)
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        double = copy.deepcopy(model).double().eval()
        with double.disable_adapter():
            base = double(x.double())
        true = double(x.double()) - base
        with model.eval().disable_adapter():
            rounded = model(x)
        change = model(x).double() - rounded.double()
        errors.append(((change - true).norm() / true.norm()).item())

    assert errors[1] <= 1.02 * errors[0]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_update_under_autocast_is_not_less_exact_than_pefts(
    dtype: torch.dtype, size: float, *, use_dora: bool, merged: bool
) -> None:
    """The error of the change of the output, relative to the change in double precision, for |update| / |W| = size."""
    conv, x, errors = nn.Conv2d(16, 32, 3), torch.randn(4, 16, 12, 12), []
    a, b = torch.randn(4, 16, 3, 3), torch.randn(32, 4, 1, 1)
    b *= size * conv.weight.norm() / (b.flatten(1) @ a.flatten(1)).norm()
    for cls in (LoraConfig, ConvLoraConfig):
        config = cls(target_modules=["0"], r=4, lora_alpha=4, use_dora=use_dora)
        model = get_peft_model(nn.Sequential(copy.deepcopy(conv)), config).eval()
        layer = model.base_model.model[0]
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a.clone(), b.clone()
        double = copy.deepcopy(model).double()
        with double.disable_adapter():
            base = double(x.double())
        true = double(x.double()) - base
        with torch.autocast("cpu", dtype):
            with model.disable_adapter():
                rounded = model(x)
            if merged:
                model.merge_adapter()
            change = model(x).double() - rounded.double()
        errors.append(((change - true).norm() / true.norm()).item())

    assert errors[1] <= 1.02 * errors[0]


def test_half_precision_layer_has_the_gradients_of_pefts_layer() -> None:
    models, x = _pair(nn.Conv2d(8, 8, 3).bfloat16(), lora_bias=False), torch.randn(4, 8, 9, 9).bfloat16()
    for model in models:
        model(x).float().square().mean().backward()
    expected = dict(models[0].named_parameters())
    trained = [(name, p) for name, p in models[1].named_parameters() if p.requires_grad]
    assert len(trained) == 2
    for name, parameter in trained:
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("groups", [1, 2])
def test_dora_caching_fills_the_cache_and_keeps_the_output(groups: int) -> None:
    network, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups)), torch.randn(2, 4, 7, 7)
    model = get_peft_model(network, lora_config(use_dora=True)).eval()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.5)
    magnitude = model.base_model.model[0].lora_magnitude_vector["default"]
    expected = model(x)

    with DoraCaching():
        outputs = [model(x), model(x)]
        assert set(magnitude._dora_cache) == {"weight-norm-default"}
        magnitude._dora_cache["weight-norm-default"].mul_(2)
        halved = model(x)
        model.train()
        assert not magnitude._dora_cache

    for output in outputs:
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    bias = model.base_model.model[0].base_layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(halved - bias, (expected - bias) / 2, atol=1e-5, rtol=1e-5)


def test_mixed_batch_is_exact_at_large_logits() -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 10))
    model = get_peft_model(network, lora_config(target_modules=["0"])).eval()
    model.add_adapter("other", lora_config(target_modules=["0"]))
    x, expected = 1000 * torch.randn(6, 3, 8, 8), {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = model(x)
    names = ["default", "other", "__base__"] * 2

    mixed = model(x, adapter_names=names)

    for row, name in enumerate(names):
        if name != "__base__":
            # 1e-6 of the largest logit; the sum of kernel and update as two outputs was off by 1e-4.
            assert (mixed[row] - expected[name][row]).abs().max() < 1e-6 * expected[name].abs().max()
