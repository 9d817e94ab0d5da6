"""Base layers that change between merging and unmerging, and merges that the base layer's type cannot hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.ao.nn.qat as nnqat
import torch.ao.nn.quantized as nnq
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules, get_default_qat_qconfig
from torch.nn.utils import parametrize, prune

from peft_edge import ConvLoraConfig
from tests.tuners.support import adapter_config, lora_config, shifted

Config = Callable[..., PeftConfig]


class _Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def _prune(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


COMPUTED: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "pruned": (_prune, lambda layer: prune.remove(layer, "weight")),
    "parametrised": (
        lambda layer: parametrize.register_parametrization(layer, "weight", _Half()),
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weight_is_adapted_but_not_merged(config: Config, kind: str) -> None:
    compute, remove = COMPUTED[kind]
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), config()).eval()
    x = torch.randn(2, 3, 9, 9)
    compute(model.base_model.model[1].base_layer)
    expected, before = model(x), copy.deepcopy(model.state_dict())

    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"Cannot merge layer '1': .*computes its weight"):
            merge()

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(x), expected)
    remove(model.base_model.model[1].base_layer)
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", COMPUTED)
def test_weight_computed_since_the_merge_is_not_unmerged(config: Config, kind: str) -> None:
    compute, remove = COMPUTED[kind]
    model, x = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), config()).eval(), torch.randn(2, 3, 9, 9)
    layer = model.base_model.model[0]
    model.merge_adapter()
    compute(layer.base_layer)
    expected = model(x)

    with pytest.raises(ValueError, match="Cannot unmerge layer '0'"):
        model.unmerge_adapter()

    torch.testing.assert_close(model(x), expected)
    remove(layer.base_layer)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def _step(layer: nn.Module, x: Tensor) -> None:
    layer.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([layer.weight], lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    layer.weight.requires_grad_(False)


CHANGES: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "step": _step,
    "data": lambda layer, x: layer.weight.data.mul_(0.5),
    "loaded": lambda layer, x: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "nothing": lambda layer, x: None,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_changes_of_the_base_layer_survive_unmerging(change: str, *, use_dora: bool) -> None:
    conv, x = nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    models = [
        get_peft_model(
            nn.Sequential(copy.deepcopy(conv)), cls(target_modules=["0"], init_lora_weights=False, use_dora=use_dora)
        )
        for cls in (LoraConfig, ConvLoraConfig)
    ]
    models[1].load_state_dict(models[0].state_dict())
    weights = []
    for model in models:
        model.merge_adapter()
        layer = model.base_model.model[0].base_layer
        merged = layer.weight.detach().clone()
        CHANGES[change](layer, x)
        step = layer.weight.detach() - merged
        model.unmerge_adapter()
        weights.append(layer.weight.detach() - (0 if use_dora else step))
        if isinstance(model.peft_config["default"], ConvLoraConfig):
            torch.testing.assert_close(layer.weight.detach(), conv.weight + step)

    torch.testing.assert_close(weights[1], conv.weight.detach() + (step if use_dora else 0))
    if not use_dora:
        torch.testing.assert_close(*weights)


def test_unmerging_after_a_move_to_another_type_restores_the_weights(config: Config) -> None:
    conv = nn.Conv2d(3, 4, 3)
    model = get_peft_model(nn.Sequential(copy.deepcopy(conv), nn.BatchNorm2d(4)), config())
    model.merge_adapter()

    model.double().unmerge_adapter()

    assert torch.equal(model.base_model.model[0].base_layer.weight, conv.weight.double())


@pytest.mark.parametrize("part", ["kernel", "running_var", "running_mean"])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_what_the_type_cannot_hold(config: Config, part: str, method: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).half()
    model = get_peft_model(network, config())
    layer = model.base_model.model[1]
    if part == "kernel":
        for name in layer.adapter_layer_names:
            for parameter in getattr(layer, name).parameters():
                nn.init.constant_(parameter, 1e3)
    else:
        getattr(model.base_model.model[2].states["default"], part).fill_(1e5)
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(ValueError, match=f"{'weight' if part == 'kernel' else part} of layer '[12]'.*float16"):
        getattr(model, method)(safe_merge=True)

    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(getattr(module, "merged_adapters", None) for module in model.modules())


def test_bias_without_base_bias_leaves_the_other_layers_unmerged() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, bias=False))
    before = network[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="has no bias"):
        model = get_peft_model(network, lora_config(lora_bias=True))

    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
        model.merge_adapter()

    assert torch.equal(model.base_model.model[0].base_layer.weight, before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_statistics_are_those_that_were_saved(
    config: Config, tmp_path: Path, dtype: torch.dtype, *, low_cpu_mem_usage: bool
) -> None:
    network, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(dtype), torch.randn(8, 3, 9, 9).to(dtype)
    base = copy.deepcopy(network)
    model = shifted(get_peft_model(network, config(norm="affine")), x, scale=3.3)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()

    for name, value in model.state_dict().items():
        other = loaded.state_dict()[name]
        assert (other.dtype, other.device) == (value.dtype, value.device)
        assert torch.equal(other, value)
    assert loaded.base_model.model[1].states["default"].running_mean.dtype == torch.float32
    assert torch.equal(loaded(x), model(x))


def test_code_that_reads_the_base_layer_is_refused(config: Config) -> None:
    """Reparametrising, as `fuse` of timm's RepVGG does, reads kernel and statistics, and would lose the adapter."""
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), config())

    for index, name in ((0, "stride"), (0, "in_channels"), (1, "running_mean"), (1, "eps")):
        with pytest.raises(AttributeError, match=rf"layer '{index}' is adapted.*{name}.*merge_and_unload"):
            getattr(model.base_model.model[index], name)
        assert not hasattr(model.base_model.model[index], name)


# Fusing needs norms in eval mode, whose statistics do not change.
excluded_norms = pytest.mark.filterwarnings("ignore:The running statistics of:UserWarning")


def _excluded_norm(config: Config, **options: object) -> PeftModel:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    network[1].running_mean.normal_()
    network[1].running_var.uniform_(1, 2)
    return get_peft_model(network, config(target_modules=["0"], exclude_modules=["1"], **options)).eval()


@excluded_norms
@pytest.mark.parametrize("state", ["active", "disabled", "merged", "two"])
def test_fusing_by_weight_and_bias_keeps_the_adapter(config: Config, state: str) -> None:
    """`fuse_conv_bn_weights` of torch, and timm's FastViT, read only weight and bias of the convolution."""
    options = {"lora_bias": True} if config is lora_config else {}
    model, x = _excluded_norm(config, **options), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    if state == "two":
        model.add_adapter("other", config(target_modules=["0"], exclude_modules=["1"]))
        model.base_model.set_adapter(["default", "other"])
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    if state == "merged":
        model.merge_adapter()
    conv, norm = model.base_model.model
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias

    fused = nn.utils.fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)

    torch.testing.assert_close(nn.functional.conv2d(x, *fused), model(x))


@excluded_norms
def test_fusing_timms_network_keeps_the_adapter() -> None:
    model = timm.create_model("fastvit_t8", num_classes=2, embed_dims=(8, 8, 8, 8), layers=(1, 1, 1, 1))
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    adapted = get_peft_model(model, lora_config(exclude_modules=norms)).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = adapted(x)
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(x), expected, atol=1e-4)

    torch.testing.assert_close(reparameterize_model(adapted.base_model.model)(x), expected, atol=1e-5, rtol=1e-5)


def test_weight_of_an_adapter_that_cannot_be_merged_is_refused() -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), adapter_config())

    with pytest.raises(AttributeError, match=r"layer '0' has no 'weight' with its adapter 'default': .*2 groups"):
        model.base_model.model[0].weight  # noqa: B018


def _fuse_inside(model: nn.Module) -> None:
    fuse_modules(model, [["0.base_layer", "1"]])


@excluded_norms
@pytest.mark.parametrize("fuse", [lambda model: nn.utils.fuse_conv_bn_eval(*model), _fuse_inside])
def test_assigning_what_fusing_computes_is_refused(config: Config, fuse: Callable[[nn.Module], object]) -> None:
    model, x = _excluded_norm(config), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected = model(x)

    with pytest.raises((AttributeError, ValueError), match=r"'0'.*Call merge_and_unload\(\)"):
        fuse(model.base_model.model)

    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("is_active", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_pruning_an_adapted_layer_is_refused(config: Config, name: str, *, is_active: bool) -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), config(target_modules=["0"]))
    if not is_active:
        model.base_model.disable_adapter_layers()
    before = [*model.state_dict()]

    with pytest.raises(AttributeError, match=rf"'0' is adapted: its {name} cannot.*pruning.*get_base_layer\(\)"):
        prune.l1_unstructured(model.base_model.model[0], name, 0.5)

    assert [*model.state_dict()] == before
    prune.l1_unstructured(model.base_model.model[0].get_base_layer(), name, 0.5)


@pytest.mark.parametrize("index", [0, 1])
def test_quantised_base_layer_is_refused(index: int) -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), lora_config())
    layer = (nnqat.Conv2d(3, 4, 3, qconfig=get_default_qat_qconfig()), nnq.BatchNorm2d(4))[index]
    # `torch.ao.quantization.convert` replaces modules in this way.
    model.base_model.model[index]._modules["base_layer"] = layer

    for call in (lambda: model(torch.randn(1, 3, 9, 9)), model.merge_adapter):
        with pytest.raises(ValueError, match=rf"'{index}' was replaced by torch.ao.nn.q.*merge_and_unload"):
            call()


@pytest.mark.parametrize("lora_bias", [False, True])
def test_bias_of_the_base_layer_trains_as_in_peft(*, lora_bias: bool) -> None:
    options = {"target_modules": ["0"], "bias": "lora_only", "lora_bias": lora_bias}
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    models = [get_peft_model(copy.deepcopy(network), cls(**options)) for cls in (LoraConfig, ConvLoraConfig)]

    theirs, ours = ({name for name, p in model.named_parameters() if p.requires_grad} for model in models)

    assert theirs == ours
    assert any(name.endswith("base_layer.bias") for name in ours)
