"""Test that every method trains lean: outputs, gradients, statistics and memory, against the plain model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_edge import ConvAdapterConfig, ConvLoraConfig
from peft_edge.functional import lowrank, recompute
from peft_edge.lean import layers, prepare_model_for_lean_training, undo_lean_training
from peft_edge.profiling import track_memory
from tests.lean.support import outcome

NETWORKS = [
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "efficientnet_lite0",
    "mobilenetv4_conv_small",
    "resnet18",
]
SMALL = ["mobilenetv3_small_050", "resnet10t"]


def _full(model: nn.Module) -> nn.Module:
    """Return `model` unchanged. All its parameters are trainable, as in full fine-tuning and GaLore."""
    return model


def _norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module.requires_grad_(isinstance(module, nn.BatchNorm2d))
    return model


def _biases(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def _full_with_frozen_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True: None  # type: ignore[method-assign, assignment]
            nn.Module.train(module, False)
    return model


def _adapted(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: get_peft_model(model, ConvLoraConfig(init_lora_weights=False, **options))


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full": _full,
    "full, frozen statistics": _full_with_frozen_statistics,
    "norm": _norms,
    "bias": _biases,
    "lora dense stats": _adapted(target_modules="dense", norm="stats"),
    "lora all affine": _adapted(target_modules="all-conv", norm="affine"),
    "dora frozen": _adapted(target_modules="all-conv", norm="frozen", use_dora=True),
    "conv-adapter": lambda model: get_peft_model(model, ConvAdapterConfig(target_modules="dense", norm="stats")),
    "PEFT lora": lambda model: get_peft_model(
        model,
        LoraConfig(
            target_modules=[name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1],
            init_lora_weights=False,
        ),
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "lean": {"masks": "bit"},
    "recompute": {"recompute": True, "inplace_norm": True},
    "depthwise": {"recompute": "depthwise", "inplace_norm": True},
    "checkpoint": {"checkpoint": True},
    "split": {"recompute": True, "inplace_norm": True, "split_blocks": True},
    "all": {"recompute": True, "inplace_norm": True, "split_blocks": True, "checkpoint": True, "masks": "bit"},
}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `split_blocks` split the small feature maps of these tests."""
    monkeypatch.setattr(layers, "_MAX_BLOCK_ELEMENTS", 1 << 14)


def network(name: str) -> nn.Module:
    model = timm.create_model(name, num_classes=10, drop_rate=0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "running" in name or "num_batches" in name}


def check_exact(name: str, method: str, setting: str, memory_format: torch.memory_format) -> None:
    torch.manual_seed(1)
    plain = METHODS[method](network(name)).double().to(memory_format=memory_format).train()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=memory_format)
    lean = prepare_model_for_lean_training(copy.deepcopy(plain), **SETTINGS[setting])
    expected = outcome(undo_lean_training(plain), images)

    found = outcome(lean, images)

    assert torch.equal(found["output"], expected["output"])
    assert found.keys() == expected.keys()
    # Train-mode norms make some gradients zero, such as those of a bias before a norm. What is left is rounding.
    floor = 1e-4 * max(value.abs().max() for key, value in expected.items() if key != "output")
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 1e-10 * value.abs().max().clamp_min(floor), key
    statistics = state(lean)
    assert all(torch.equal(value, statistics[key]) for key, value in state(plain).items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exact(method: str) -> None:
    index = list(METHODS).index(method)
    # Each method meets three of the settings, and every setting both memory formats.
    for number, setting in enumerate(list(SETTINGS)[index % 2 :: 2]):
        memory_format = list(FORMATS.values())[(index // 2 + number) % 2]
        check_exact(SMALL[(index + number) % 2], method, setting, memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("method", "route"), [("full", None), ("lora dense stats", "full_kernel"), ("lora dense stats", "low_rank")]
)
def test_recomputation_in_batches_is_exact(
    method: str, route: str | None, memory_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "CACHED_ELEMENTS", 1000)
    monkeypatch.setattr(lowrank, "choose_gradient_route", lambda *arguments: route)
    split = Mock(wraps=recompute.iter_sample_batches)
    monkeypatch.setattr(recompute, "iter_sample_batches", split)

    check_exact("mobilenetv3_small_050", method, "recompute", FORMATS[memory_format])

    assert split.called


# Every network meets every method, and each of both meets every setting and memory format, and so do the settings.
NETWORK_CASES = [
    (name, method, list(SETTINGS)[(row + column) % 5], list(FORMATS)[(row + column // 2) % 2])
    for row, name in enumerate(NETWORKS)
    for column, method in enumerate(["full", "lora dense stats", "lora all affine", "dora frozen", "PEFT lora"])
]


def test_cases_of_networks_have_every_pair_of_values() -> None:
    for first, second in itertools.combinations(range(4), 2):
        values = [{case[column] for case in NETWORK_CASES} for column in (first, second)]
        assert {(case[first], case[second]) for case in NETWORK_CASES} == {*itertools.product(*values)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "setting", "memory_format"), NETWORK_CASES)
def test_networks_are_exact(name: str, method: str, setting: str, memory_format: str) -> None:
    check_exact(name, method, setting, FORMATS[memory_format])


def _kept_and_convolutions(model: nn.Module, **options: Any) -> tuple[int, int]:
    """Return two numbers of bytes: of the activations at the end of the forward pass, and of all convolution outputs.

    The activations are those of the model after `prepare_model_for_lean_training`.
    """
    images = torch.empty(8, 3, 96, 96, device="meta")
    sizes: list[int] = []
    hooks = [
        module.register_forward_hook(lambda module, args, y: sizes.append(4 * y.numel()))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        copy.deepcopy(model).to("meta")(images)
    for hook in hooks:
        hook.remove()
    prepare_model_for_lean_training(model, masks="bit", **options)
    return track_memory(model, images, fake=True).forward_end["activations"], sum(sizes)


@pytest.mark.parametrize("method", ["full", "norm", "lora dense stats", "PEFT lora"])
def test_one_map_per_convolution_is_kept(method: str) -> None:
    model = METHODS[method](timm.create_model("mobilenetv2_035", num_classes=10)).train()

    kept, convolutions = _kept_and_convolutions(model)

    # Besides the maps: the images, and the sums of the residual connections.
    assert kept < 1.15 * convolutions


@pytest.mark.parametrize("method", ["full", "lora dense stats"])
def test_recompute_keeps_a_third_of_the_maps(method: str) -> None:
    model = METHODS[method](timm.create_model("mobilenetv2_035", num_classes=10)).train()

    # Methods that do not save the inputs of blocks have nothing to recompute the first convolution of a block from.
    kept, convolutions = _kept_and_convolutions(model, recompute=True, inplace_norm=True)

    assert kept < 0.35 * convolutions


def test_checkpointing_is_switched_on_and_off() -> None:
    model = timm.create_model("mobilenetv2_035")

    assert prepare_model_for_lean_training(model, checkpoint=True).grad_checkpointing
    assert not prepare_model_for_lean_training(model).grad_checkpointing
    model.set_grad_checkpointing()
    assert undo_lean_training(prepare_model_for_lean_training(model, checkpoint=True)).grad_checkpointing


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 4, 1)), timm.create_model("ghostnet_050")])
def test_network_without_checkpointing_raises(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(model, "set_grad_checkpointing"):

        def refuse(self: nn.Module, enable: bool = True) -> None:
            assert not enable, "gradient checkpointing not supported"

        monkeypatch.setattr(type(model), "set_grad_checkpointing", refuse)

    with pytest.raises(ValueError, match=r"(?s)checkpoint=True needs a network .* leave checkpoint out"):
        prepare_model_for_lean_training(model, checkpoint=True)

    assert type(next(m for m in model.modules() if isinstance(m, nn.Conv2d))) is nn.Conv2d


def test_parameter_changed_before_the_backward_pass_raises() -> None:
    model = prepare_model_for_lean_training(timm.create_model("mobilenetv2_035").train(), recompute=True)
    loss = model(torch.randn(2, 3, 32, 32)).sum()
    with torch.no_grad():
        model.conv_stem.weight.mul_(2)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_backward_passes_over_one_graph_give_the_same_gradients() -> None:
    model = prepare_model_for_lean_training(network("mobilenetv3_small_050").double().train(), recompute=True)
    loss = model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum()
    parameters = list(model.parameters())

    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    # A pass that stops early does not release the recomputed maps of the layers before.
    torch.autograd.grad(loss, parameters[-4:], retain_graph=True)
    second = torch.autograd.grad(loss, parameters)

    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_compiled_trained_model_computes_the_same(chain: nn.Module) -> None:
    torch.compiler.reset()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = prepare_model_for_lean_training(chain.double().requires_grad_(True).train(), recompute=True)
    expected = outcome(copy.deepcopy(model), images)

    found = outcome(torch.compile(model, backend="aot_eager"), images)

    for name, value in expected.items():
        torch.testing.assert_close(found.get(name, found.get(f"_orig_mod.{name}")), value)


def test_autocast_gives_close_gradients_with_norms_in_training_mode() -> None:
    images = torch.randn(8, 3, 32, 32)
    plain = network("resnet10t").train()
    lean = prepare_model_for_lean_training(copy.deepcopy(plain), recompute=True)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = outcome(lean, images), outcome(plain, images)

    torch.testing.assert_close(found["output"], expected["output"])
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 0.1 * value.norm() + 1e-3, name
