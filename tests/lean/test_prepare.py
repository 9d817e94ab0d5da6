"""Test lean models against plain ones (outputs, gradients, adapters, memory), the traced consumers, and the summary."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_edge import ConvAdapterConfig, ConvLoraConfig, recalibrate
from peft_edge.lean import lean_summary, prepare_model_for_lean_training, undo_lean_training
from peft_edge.lean.layers import LEAN
from peft_edge.lean.prepare import FUNCTION, PRODUCT, find_consumers
from peft_edge.profiling import count_flops, track_memory
from tests.lean.support import MakeBackbone, assert_same, outcome, with_adapter


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.gate, self.last = nn.Sigmoid(), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        x = x * self.gate(x.mean((2, 3), keepdim=True))
        return self.last(x) + x


def test_find_consumers_distinguishes_layers_products_and_functions() -> None:
    assert find_consumers(_Branches()) == {
        "conv": ["norm"],
        "norm": ["act"],
        "act": [FUNCTION, PRODUCT],
        "gate": [PRODUCT],
        "last": [FUNCTION],
    }


def test_find_consumers_does_not_change_the_model() -> None:
    model = _Branches()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    find_consumers(model)

    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_activation_inside_a_norm_counts_instead_of_the_norm() -> None:
    found = find_consumers(timm.create_model("mobilenetv2_035"))

    assert found["conv_stem"] == ["bn1"]
    assert found["bn1.act"] == ["blocks.0.0.conv_dw"]
    assert found["blocks.1.0.conv_pwl"] == ["blocks.1.0.bn3"]
    assert found["blocks.1.0.bn3"] == ["blocks.1.1.conv_pw", FUNCTION]  # the residual sum
    assert "bn1" not in found


@pytest.mark.parametrize("norm", ["frozen", "stats"])
def test_adapted_layer_counts_instead_of_its_base_layer(norm: str) -> None:
    model = timm.create_model("mobilenetv2_035")
    plain = find_consumers(model)

    adapted = find_consumers(get_peft_model(model, ConvLoraConfig(target_modules="dense", norm=norm)))

    def original(name: str) -> str:
        return name.removeprefix("base_model.model.").replace(".base_layer", "")

    assert {original(name): [original(taker) for taker in takers] for name, takers in adapted.items()} == plain


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet10t", "regnetx_002", "ghostnet_050"])
def test_find_consumers_lists_every_convolution(name: str, make_backbone: Callable[[str], nn.Module]) -> None:
    model = make_backbone(name)

    found = find_consumers(model)

    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert set(convolutions) <= set(found)


NETWORKS = [
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "efficientnet_lite0",
    "resnet18",
    "resnet10t",
    "mobilenetv3_small_050",
    "tf_mobilenetv3_small_minimal_100",
    "test_efficientnet",
    "ghostnet_050",
]


DTYPES = {
    "single": (torch.float32, torch.channels_last, 1e-5),
    "double": (torch.float64, torch.contiguous_format, 1e-10),
}


@pytest.mark.parametrize(
    ("name", "inplace_norm", "precision"),
    # Each network meets both precisions and both values of inplace_norm, and each precision meets both values.
    [
        (name, (number + place) % 2 == 0, precision)
        for number, name in enumerate(NETWORKS)
        for place, precision in enumerate(DTYPES)
    ],
)
def test_outputs_and_gradients_equal_the_plain_model(
    name: str, inplace_norm: bool, precision: str, make_backbone: MakeBackbone
) -> None:
    dtype, memory_format, tolerance = DTYPES[precision]
    images = torch.randn(2, 3, 64, 64, dtype=dtype).contiguous(memory_format=memory_format)
    model = with_adapter(make_backbone(name)).to(dtype=dtype, memory_format=memory_format)
    for training, recompute in ((True, False), (False, True)):
        expected = outcome(undo_lean_training(model).train(training), images)
        prepare_model_for_lean_training(model, inplace_norm=inplace_norm, masks="bit", recompute=recompute)
        found = outcome(model, images)
        # A different rounding could cross an activation's kink and change the gradient.
        assert torch.equal(found["output"], expected["output"])
        assert_same(found, expected, tolerance)


@pytest.mark.parametrize("norm", ["stats", "affine", "recalibrate"])
def test_adapted_norms_compute_the_same_in_a_lean_model(norm: str, make_backbone: MakeBackbone) -> None:
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    plain = with_adapter(make_backbone("mobilenetv2_035").double(), norm=norm).train()
    lean = prepare_model_for_lean_training(copy.deepcopy(plain), inplace_norm=True)
    expected = outcome(plain, images)

    assert_same(outcome(lean, images), expected, 1e-10)
    state = lean.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items() if "running" in name)


def test_preparing_before_and_after_adapting_is_the_same(make_backbone: MakeBackbone) -> None:
    images = torch.randn(2, 3, 32, 32)
    model = make_backbone("mobilenetv2_035")

    after = prepare_model_for_lean_training(with_adapter(copy.deepcopy(model)), inplace_norm=True)
    before = with_adapter(prepare_model_for_lean_training(model, inplace_norm=True))

    found, expected = outcome(before, images), outcome(after, images)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_lean_training_saves_activation_memory(make_backbone: MakeBackbone) -> None:
    images = torch.empty(8, 3, 96, 96, device="meta")
    plain = with_adapter(make_backbone("mobilenetv2_035"), target_modules="project").train()

    def kept(model: nn.Module) -> int:
        return track_memory(model, images, fake=True).forward_end["activations"]

    before = kept(plain)
    byte, bit = (kept(prepare_model_for_lean_training(plain, masks=m, inplace_norm=True)) for m in ("byte", "bit"))

    assert bit < byte < before
    assert bit < before / 3


def test_recomputed_outputs_are_not_saved(make_backbone: MakeBackbone) -> None:
    images = torch.empty(8, 3, 96, 96, device="meta")
    model = with_adapter(make_backbone("mobilenetv2_035"), target_modules="all-conv").train()

    def step(**options: Any) -> tuple[int, int]:
        prepare_model_for_lean_training(model, masks="bit", inplace_norm=True, **options)
        return track_memory(model, images, fake=True).forward_end["activations"], count_flops(model, images).forward

    (kept, forward), (some, same_forward), (fewest, _) = step(), step(recompute="depthwise"), step(recompute=True)

    assert fewest < 0.8 * some < 0.7 * kept
    assert same_forward == forward


def test_undo_restores_classes_and_attributes(make_backbone: MakeBackbone) -> None:
    model = make_backbone("mobilenetv3_small_050")
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    prepare_model_for_lean_training(model, inplace_norm=True, masks="bit")
    assert {type(module) for module in model.modules()} & set(LEAN.values())
    undo_lean_training(model)

    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_preparing_again_changes_the_settings(make_backbone: MakeBackbone) -> None:
    images = torch.randn(2, 3, 32, 32)
    model = prepare_model_for_lean_training(make_backbone("mobilenetv2_035"), inplace_norm=True)
    expected = model(images)

    prepare_model_for_lean_training(model, masks="bit")

    assert not any("inplace_norm" in vars(module) for module in model.modules())
    assert torch.equal(model(images), expected)


def test_lean_checkpoint_equals_the_plain_one(make_backbone: MakeBackbone) -> None:
    model = make_backbone("mobilenetv2_035")
    keys = list(model.state_dict())

    assert list(prepare_model_for_lean_training(model, inplace_norm=True).state_dict()) == keys


def test_adapters_switch_mix_and_merge_in_a_lean_model(
    make_backbone: MakeBackbone, images: Tensor, tmp_path: Any
) -> None:
    base = make_backbone("mobilenetv2_035").double()
    images = images.double()
    plain = with_adapter(copy.deepcopy(base), norm="stats")
    plain.add_adapter("other", ConvLoraConfig(target_modules="all-conv", norm="affine", init_lora_weights=False, r=2))
    recalibrate(plain, [images, images.flip(3)])
    lean = prepare_model_for_lean_training(copy.deepcopy(plain), inplace_norm=True)

    def check(step: Callable[[PeftModel], Any] = lambda model: None, **options: Any) -> None:
        for model in (plain, lean):
            step(model)
        torch.testing.assert_close(lean(images, **options), plain(images, **options), rtol=1e-9, atol=1e-9)

    for model in (plain, lean):
        model.eval()
    check()
    check(adapter_names=["default", "other", "__base__", "default"])
    check(lambda model: model.set_adapter("other"))
    check(lambda model: model.train())
    check(lambda model: model.eval())
    check(lambda model: model.merge_adapter())
    check(lambda model: model.unmerge_adapter())
    check(lambda model: model.delete_adapter("default"))
    with plain.disable_adapter(), lean.disable_adapter():
        check()
    lean.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "other").eval()
    torch.testing.assert_close(reloaded(images), plain(images), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lean.merge_and_unload()(images), plain(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=r".*conv_pwl?", init_lora_weights=False),
        LoraConfig(target_modules=r".*conv_pwl?", modules_to_save=["bn1"]),
        ConvAdapterConfig(target_modules="dense", norm="frozen"),
    ],
    ids=["PEFT's LoRA", "saved modules", "ConvAdapter"],
)
def test_other_adapters_work_on_a_lean_model(config: Any, make_backbone: MakeBackbone) -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = make_backbone("mobilenetv2_035").double()
    expected = outcome(with_adapter(copy.deepcopy(model), config).eval(), images)

    after = prepare_model_for_lean_training(with_adapter(copy.deepcopy(model), config).eval(), inplace_norm=True)
    before = with_adapter(prepare_model_for_lean_training(model, inplace_norm=True), config).eval()

    assert_same(outcome(after, images), expected, 1e-10)
    assert_same(outcome(before, images), expected, 1e-10)


def test_statistics_may_change_before_outputs_are_recomputed(make_backbone: MakeBackbone) -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = with_adapter(make_backbone("mobilenetv2_035").double()).eval()
    expected = outcome(model, images)
    prepare_model_for_lean_training(model, recompute=True)

    model.zero_grad()
    output = model(images)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.mul_(2)
    output.square().sum().backward()

    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert_same({"output": output.detach(), **found}, expected, 1e-10)


def test_parametrised_weight_gets_gradients(chain: nn.Module) -> None:
    prepare_model_for_lean_training(chain, inplace_norm=True)
    torch.nn.utils.parametrizations.weight_norm(chain[0]).requires_grad_(True)

    chain(torch.randn(2, 3, 9, 9)).sum().backward()

    assert all(parameter.grad is not None for parameter in chain[0].parameters())


def test_unknown_settings_raise(chain: nn.Module) -> None:
    with pytest.raises(ValueError, match="masks is 'bits', expected one of: byte, bit, off"):
        prepare_model_for_lean_training(chain, masks="bits")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recompute is 'all', expected one of: False, True, 'depthwise'"):
        prepare_model_for_lean_training(chain, recompute="all")  # type: ignore[arg-type]


def test_model_that_does_not_run_on_the_meta_device_raises() -> None:
    model = timm.create_model("mobilenetv2_035", in_chans=4).eval().requires_grad_(False)
    model.pretrained_cfg = {"input_size": (3, 224, 224)}

    with pytest.raises(ValueError, match=r"inplace_norm=True needs to see .* leave inplace_norm out"):
        prepare_model_for_lean_training(model, inplace_norm=True)

    assert not {type(module) for module in model.modules()} & set(LEAN.values())
    assert {type(module) for module in prepare_model_for_lean_training(model).modules()} & set(LEAN.values())


def lines(model: nn.Module) -> list[str]:
    return [" ".join(line.split()) for line in lean_summary(model).splitlines()]


def test_lean_summary_of_a_plain_model(chain: nn.Module) -> None:
    assert lines(chain) == [
        "1 BatchNorm2d what torch keeps, such as 1",
        "2 Conv2d what torch keeps, such as 0",
        "1 ReLU6 what torch keeps, such as 2",
    ]


def test_lean_summary_of_a_lean_model(chain: nn.Module) -> None:
    chain.append(nn.Flatten())
    prepare_model_for_lean_training(chain, masks="bit")
    assert lines(chain) == [
        "1 BatchNorm2d nothing of its input",
        "2 Conv2d nothing of its input",
        "1 Flatten what torch keeps, such as 4",
        "1 ReLU6 a bit for each element",
    ]

    chain[3].requires_grad_(True)
    prepare_model_for_lean_training(chain, inplace_norm=True)
    assert lines(chain) == [
        "1 BatchNorm2d nothing, and works in place",
        "1 Conv2d its input",
        "1 Conv2d nothing of its input",
        "1 Flatten what torch keeps, such as 4",
        "1 ReLU6 its output",
    ]


def test_lean_summary_of_an_adapted_model(chain: nn.Module) -> None:
    model = get_peft_model(chain, ConvLoraConfig(target_modules=["3"], norm="stats")).train()
    prepare_model_for_lean_training(model)

    assert lines(model) == [
        "1 BatchNorm2d in LoraBatchNormLayer its input",
        "1 Conv2d nothing of its input",
        "1 Conv2d in ConvLoraLayer its input",
        "1 ReLU6 its output",
    ]
