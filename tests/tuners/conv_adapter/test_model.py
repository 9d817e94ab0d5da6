"""ConvAdapterModel: which layers and blocks it adapts, and what PEFT users expect of it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
from peft import PeftModel, get_model_status, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_edge import recalibrate
from peft_edge.tuners.conv_adapter import ConvAdapterConfig, ConvAdapterLayer
from peft_edge.tuners.norm import BatchNormLayer
from tests.processes import run_program
from tests.tuners.support import adapter_config, shifted

BLOCKS = r"blocks\.[1-3]\.\d"
FORMS = {
    "parallel": {},
    "activation": {"activation": "relu", "kernel_size": 3},
    "sequential": {"placement": "sequential", "kernel_size": 1},
    "blocks": {"target_modules": BLOCKS, "norm": "affine"},
    "blocks in sequence": {"target_modules": ["blocks.2.0", "conv_stem"], "placement": "sequential"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "tf_mobilenetv3_small_minimal_100", "resnet10t"])
def test_untrained_adapter_keeps_the_output(backbone: str, form: str, images: Tensor) -> None:
    base = timm.create_model(backbone, num_classes=10).eval()
    options = dict(FORMS[form])
    if backbone == "resnet10t" and "target_modules" in options:
        options["target_modules"] = r"layer\d\.0"

    model = get_peft_model(
        copy.deepcopy(base), ConvAdapterConfig(**{"norm": "stats", "target_modules": "all-conv", **options})
    ).eval()

    assert any(isinstance(module, ConvAdapterLayer) for module in model.modules())
    torch.testing.assert_close(model(images), base(images))


@pytest.mark.parametrize("form", FORMS)
def test_reload_gives_identical_logits_and_unload_the_base_model(
    tiny_backbone: nn.Module, images: Tensor, tmp_path: Path, form: str
) -> None:
    config = adapter_config(**FORMS[form], modules_to_save=["classifier"])
    model = get_peft_model(copy.deepcopy(tiny_backbone), config)
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    expected = shifted(model, images)(images)
    assert not torch.allclose(expected, tiny_backbone(images), atol=1e-2)

    model.save_pretrained(tmp_path)

    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(tiny_backbone), tmp_path)(images), expected)
    unloaded = model.unload()
    assert not [module for module in unloaded.modules() if isinstance(module, ConvAdapterLayer | BatchNormLayer)]
    unloaded.classifier = tiny_backbone.classifier
    assert torch.equal(unloaded(images), tiny_backbone(images))


@pytest.mark.slow
def test_reload_in_a_new_process_gives_identical_logits(small: nn.Module, images: Tensor, tmp_path: Path) -> None:
    save_file(small.state_dict(), tmp_path / "base.safetensors")
    model = shifted(get_peft_model(small, adapter_config(activation="relu")), images)
    model.save_pretrained(tmp_path)
    save_file({"images": images, "logits": model(images)}, tmp_path / "expected.safetensors")
    program = """
import timm, torch, peft_edge.tuners.conv_adapter
from peft import PeftModel
from safetensors.torch import load_file
torch.set_num_threads(1)
base = timm.create_model("test_efficientnet", num_classes=10)
base.load_state_dict(load_file("base.safetensors"))
expected = load_file("expected.safetensors")
model = PeftModel.from_pretrained(base, ".").eval()
assert torch.equal(model(expected["images"]), expected["logits"])
"""
    run_program(program, tmp_path)


def test_merged_network_gives_the_same_output(tiny_backbone: nn.Module, images: Tensor) -> None:
    # In double precision: 52 untrained layers amplify rounding errors.
    tiny_backbone, images = tiny_backbone.double(), images.double()
    keys = tiny_backbone.state_dict().keys()
    model = shifted(get_peft_model(tiny_backbone, adapter_config(target_modules="dense", norm="affine")), images)
    expected = model(images)

    merged = model.merge_and_unload()

    assert merged.state_dict().keys() == keys
    torch.testing.assert_close(merged(images), expected)


@pytest.mark.parametrize("form", ["blocks", "activation"])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_rejected_merge_leaves_the_model_unchanged(small: nn.Module, images: Tensor, method: str, form: str) -> None:
    model = shifted(get_peft_model(small, adapter_config(**FORMS[form])), images)
    before = copy.deepcopy(model.state_dict())
    expected = model(images)

    message = r"Cannot merge adapter 'default' into layer '.*': .*placement=\"parallel\""
    with pytest.raises(NotImplementedError, match=message):
        getattr(model, method)()

    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(images), expected)


def test_mergeable_adapter_merges_beside_an_unmergeable_one(small: nn.Module, images: Tensor) -> None:
    model = get_peft_model(small, adapter_config(target_modules="dense", activation="relu"))
    model.add_adapter("linear", adapter_config(target_modules="dense"))
    model.set_adapter("linear")
    expected = shifted(model, images)(images)

    torch.testing.assert_close(model.merge_and_unload(adapter_names=["linear"])(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_adapters_are_added_switched_disabled_and_deleted(small: nn.Module, images: Tensor, form: str) -> None:
    base = small(images)
    model = shifted(get_peft_model(small, adapter_config(**FORMS[form])), images)
    first = model(images)
    model.add_adapter("dark", adapter_config(**FORMS[form] | {"reduction": 2}))
    assert torch.equal(model(images), first)
    model.set_adapter("dark")
    second = shifted(model, images, 0.1)(images)
    assert not torch.allclose(first, second, atol=1e-2)
    status = get_model_status(model)
    assert status.peft_types == {"default": "CONV_ADAPTER", "dark": "CONV_ADAPTER"}
    assert (status.active_adapters, status.requires_grad) == (["dark"], {"default": False, "dark": True})

    with model.disable_adapter():
        assert torch.equal(model(images), base)
    mixed = model(images, adapter_names=["default", "__base__", "dark", "default"])
    torch.testing.assert_close(mixed, torch.stack([first[0], base[1], second[2], first[3]]), atol=1e-4, rtol=1e-4)
    model.set_adapter("default")
    model.delete_adapter("dark")

    assert torch.equal(model(images), first)
    assert not [name for name in model.state_dict() if "dark" in name]


def test_adapter_of_other_blocks_is_rejected(small: nn.Module, images: Tensor) -> None:
    model = get_peft_model(small, adapter_config(target_modules=["blocks.1.0"])).eval()
    expected = model(images)

    with pytest.raises(ValueError, match=r"adapt the blocks \['blocks.1.0'\], the new one adapts \['blocks.2.0'\]"):
        model.add_adapter("other", adapter_config(target_modules=["blocks.2.0"]))

    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["blocks.2.0", "conv_stem", "blocks.2.0.conv_pw"], "'blocks.2.0.conv_pw' is a part of 'blocks.2.0'"),
        (["conv_stem", "classifier"], "'classifier': Linear is no convolution and holds none"),
        (["conv_stem", "bn1"], "BatchNormAct2d is no convolution and holds none"),
    ],
)
def test_invalid_targets_leave_the_model_unchanged(tiny_backbone: nn.Module, targets: list[str], message: str) -> None:
    before = list(tiny_backbone.state_dict())

    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_backbone, adapter_config(target_modules=targets))

    assert list(tiny_backbone.state_dict()) == before


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_and_channels_last_give_the_same_gradients(tiny_backbone: nn.Module, form: str) -> None:
    # With smaller images, the last norms divide by the deviation of a few values, which amplifies rounding errors.
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    model = get_peft_model(tiny_backbone.double(), adapter_config(**FORMS[form])).train()
    plain = copy.deepcopy(model)
    model.base_model.model.set_grad_checkpointing()
    model.to(memory_format=torch.channels_last)

    model(images.to(memory_format=torch.channels_last)).square().sum().backward()
    plain(images).square().sum().backward()

    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) == (wanted.grad is None) == (not wanted.requires_grad)
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad)


def test_autocast_trains_with_finite_gradients(small: nn.Module, images: Tensor) -> None:
    model = get_peft_model(small, adapter_config(activation="relu", norm="affine")).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images)
    y.float().square().sum().backward()

    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_give_the_same_output(small: nn.Module, images: Tensor, copied: object) -> None:
    model = shifted(get_peft_model(small, adapter_config(**FORMS["blocks"])), images)

    assert torch.equal(copied(model)(images), model(images))


def test_statistics_within_blocks_are_recalibrated(small: nn.Module, images: Tensor) -> None:
    model = get_peft_model(small, adapter_config(target_modules=BLOCKS, norm="recalibrate")).eval()
    before = model(images)

    recalibrate(model, [images * 3])

    assert not torch.allclose(model(images), before, atol=1e-2)
