from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from peft_edge import ConvLoraConfig
from peft_edge.backbones import head_names
from peft_edge.lean.prefix import Prefix
from peft_edge.methods import METHODS
from peft_edge.profiling import count_flops

FAMILIES = {
    "mobilenetv1_100": "blocks.4",
    "mobilenetv2_035": "blocks.6",
    "mobilenetv3_small_050": "blocks.5",
    "mobilenetv4_conv_small_035": "blocks.4",
    "ghostnet_050": "blocks.9",
    "resnet10t": "layer4",
    "repvgg_a0": "stages.3",
    "regnetx_002": "s4",
    "convnext_atto": "stages.3.downsample.1",
}


def adapted(
    name: str, *, target: str | list[str] = "last-stage", norm: str = "frozen", **timm_options: float
) -> nn.Module:
    model = timm.create_model(name, num_classes=10, **timm_options)
    # Zero-initialised residual branches would let a cut through a block pass.
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    config = ConvLoraConfig(r=2, target_modules=target, norm=norm, modules_to_save=head_names(model))
    return get_peft_model(model, config)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tail_is_the_model_and_learns_what_it_learns(name: str) -> None:
    model = adapted(name).train()
    images = torch.randn(4, 3, 32, 32)
    whole, tail = copy.deepcopy(model), Prefix(model, images)
    assert tail.start == f"base_model.model.{FAMILIES[name]}"
    features = tail.features(images)
    assert torch.equal(tail.tail.eval()(features), whole.eval()(images))

    labels = torch.arange(4)
    for part, inputs in ((tail.tail, features), (whole, images)):
        torch.manual_seed(1)  # for the dropout in front of the head
        F.cross_entropy(part.train()(inputs), labels).backward()
    for (key, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad)


def test_a_head_alone_has_everything_else_as_its_prefix() -> None:
    model = METHODS["head"].prepare(timm.create_model("mobilenetv3_small_050", num_classes=10), {"norm": "restat"})
    prefix = Prefix(model, torch.randn(2, 3, 32, 32))
    assert prefix.start == "base_model.model.classifier"
    assert prefix.features(torch.randn(3, 3, 32, 32)).shape == (3, 1024)


def test_the_model_stays_as_it_is() -> None:
    model = adapted("mobilenetv2_035", norm="restat").train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    prefix = Prefix(model, torch.zeros(2, 3, 32, 32))
    prefix.features(torch.zeros(2, 3, 32, 32))
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    # Not a copy: what the tail learns, the model knows.
    assert {id(p) for p in prefix.tail.parameters()} < {id(p) for p in model.parameters()}


def all_frozen() -> nn.Module:
    return timm.create_model("mobilenetv2_035").requires_grad_(False)


def in_two_branches() -> nn.Module:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.first.requires_grad_(False)
            self.second.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.third(self.second(x)) + x

    return Branches()


def scaled_in_between() -> nn.Module:
    class Scaled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[1](2 * self[0](x)))

    model = Scaled(*(nn.Conv2d(3, 3, 1) for _ in range(3))).requires_grad_(False)
    model[2].requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (all_frozen, "nothing in the model is trained by gradients"),
        (lambda: timm.create_model("mobilenetv2_035"), "conv_stem trains, and no layer comes before it.*last-stage"),
        (lambda: adapted("mobilenetv2_035", target="all-conv"), "conv_stem trains, and no layer comes before it"),
        (in_two_branches, "third trains, and what comes before it is no chain of modules"),
        (scaled_in_between, "2 trains, and what comes before it is no chain of modules"),
        (
            lambda: adapted("mobilenetv2_035", norm="stats"),
            r"bn1\.lora_norm.*moves with every batch, .*blocks\.6: choose norm=restat or norm=frozen",
        ),
        (lambda: adapted("mobilenetv2_035", drop_path_rate=0.9), "something else in training than in evaluation"),
    ],
)
def test_what_cannot_be_cut_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prefix(make(), torch.randn(4, 3, 32, 32))


def test_the_fingerprint_is_that_of_the_prefix() -> None:
    images = torch.randn(2, 3, 32, 32)
    model = adapted("mobilenetv3_small_050", norm="restat")
    seen = {Prefix(model, images).fingerprint}
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save.default.weight.add_(1)
    assert seen == {Prefix(model, images).fingerprint}
    for change in (
        model.base_model.model.conv_stem.weight.data,
        model.base_model.model.blocks[0][0].bn1.current_state().running_mean,
    ):
        change.add_(1)
        seen.add(Prefix(model, images).fingerprint)
    model.base_model.model.conv_stem.stride = (1, 1)
    seen.add(Prefix(model, images).fingerprint)
    assert len(seen) == 4


def test_backpropagation_ends_where_the_prefix_does_also_without_a_cache() -> None:
    model, images = adapted("mobilenetv3_small_050").train(), torch.randn(2, 3, 32, 32)
    prefix = Prefix(model, images)
    whole, tail = count_flops(model, images), count_flops(prefix.tail, prefix.features(images))
    assert whole.backward == tail.backward > 0
    assert not any(flops.backward for name, flops in whole.by_module.items() if "blocks.4" in name)
    spared = ("conv_stem", *(f"blocks.{number}" for number in range(5)))
    prefix_forward = sum(whole.by_module[f"base_model.model.{name}"].forward for name in spared)
    assert whole.forward - tail.forward == prefix_forward > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "share"), [("mobilenetv2_100", 0.9), ("mobilenetv3_large_100", 0.95), ("mobilenetv4_conv_small", 0.95)]
)
def test_a_step_of_the_last_stage_saves_nearly_all_of_full_fine_tuning(name: str, share: float) -> None:
    prefix = Prefix(adapted(name), torch.randn(2, 3, 224, 224))
    features = torch.empty(16, *prefix.features(torch.zeros(1, 3, 224, 224)).shape[1:])
    full = count_flops(timm.create_model(name, num_classes=10), torch.empty(16, 3, 224, 224))
    replay = count_flops(prefix.tail.train(), features)
    assert replay.forward + replay.backward <= (1 - share) * (full.forward + full.backward)
