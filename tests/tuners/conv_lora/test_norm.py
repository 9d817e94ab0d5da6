"""Adapters of norms and head alone: `target_modules=DUMMY_TARGET_MODULES`, PEFT's word for no target."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from peft_edge import ConvLoraConfig, restat
from tests.tuners.support import shifted


def _adapt(model: nn.Module, norm: str, bias: str = "none") -> PeftModel:
    config = ConvLoraConfig(target_modules=DUMMY_TARGET_MODULES, norm=norm, bias=bias, modules_to_save=["classifier"])
    return get_peft_model(model, config)


def _moved(model: nn.Module, images: Tensor) -> nn.Module:
    """The model after all that it trains has moved."""
    model.train()(images).square().mean().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            parameter.data.add_(torch.randn_like(parameter) / 10)
    return shifted(model, images)


def test_names_of_what_is_saved(small: nn.Module) -> None:
    """Adapters that are on the Hub must load for ever."""
    saved = get_peft_model_state_dict(_adapt(small, "affine"))

    assert {key.partition("bn1.")[2] for key in saved if key.startswith("base_model.model.bn1.")} == {
        f"lora_norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("norm", ["frozen", "restat", "stats", "affine"])
def test_saved_loaded_and_merged(small: nn.Module, images: Tensor, tmp_path: Path, norm: str, bias: str) -> None:
    model = _moved(_adapt(copy.deepcopy(small), norm, bias), images)
    expected = model(images)
    assert not torch.allclose(expected, small(images), atol=1e-2)

    model.save_pretrained(tmp_path)

    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(small), tmp_path)(images), expected)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == small.state_dict().keys()
    torch.testing.assert_close(merged(images), expected)


@pytest.mark.parametrize(
    ("norm", "bias", "ends"),
    [
        ("stats", "none", {"classifier.modules_to_save.default"}),
        ("affine", "none", {"classifier.modules_to_save.default", "lora_norm.default"}),
        ("stats", "all", {"classifier.modules_to_save.default", "base_layer"}),
        ("affine", "all", {"classifier.modules_to_save.default", "lora_norm.default"}),
    ],
)
def test_what_is_trained(tiny_backbone: nn.Module, norm: str, bias: str, ends: set[str]) -> None:
    trained = [name for name, p in _adapt(tiny_backbone, norm, bias).named_parameters() if p.requires_grad]

    assert {end for end in ends if any(end in name for name in trained)} == ends
    assert all(any(end in name for end in ends) for name in trained)
    # MobileNetV2 has no biases but those of its 52 norms and of the head.
    assert sum(name.endswith(".bias") for name in trained) == (1 if (norm, bias) == ("stats", "none") else 53)


def test_statistics_alone_are_re_estimated(tiny_backbone: nn.Module, images: Tensor) -> None:
    reference = copy.deepcopy(tiny_backbone)
    model = _adapt(tiny_backbone, "restat")

    restat(model, [images, images * 2])
    update_bn([images, images * 2], reference)

    torch.testing.assert_close(model(images), reference.eval()(images))


def test_several_adapters(small: nn.Module, images: Tensor) -> None:
    model = _moved(_adapt(small, "affine"), images)
    first = model(images)
    model.add_adapter(
        "dark",
        ConvLoraConfig(target_modules=DUMMY_TARGET_MODULES, norm="stats", modules_to_save=["classifier"]),
    )
    model.set_adapter("dark")
    second = shifted(model, images, 0.1)(images)

    mixed = model(images, adapter_names=["default", "dark", "dark", "default"])
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1], second[2], first[3]]), atol=1e-4, rtol=1e-4)
    model.set_adapter("default")
    model.delete_adapter("dark")
    assert torch.equal(model(images), first)


_TWO_PROCESSES = """
import copy
import sys
import timm
import torch
import torch.distributed as dist
from peft import get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch.nn.parallel import DistributedDataParallel
from peft_edge import ConvLoraConfig

torch.set_num_threads(1)
torch.manual_seed(0)
config = ConvLoraConfig(
    target_modules=DUMMY_TARGET_MODULES, norm="affine", bias="all", modules_to_save=["classifier"]
)
model = get_peft_model(timm.create_model("test_efficientnet", num_classes=10), config).double().train()
images = torch.randn(8, 3, 32, 32, dtype=torch.float64) + 1


def train(model, batch):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


whole = copy.deepcopy(model)
train(whole, images)
dist.init_process_group("gloo")
train(DistributedDataParallel(model, broadcast_buffers=False), images.chunk(2)[dist.get_rank()])
for (name, got), wanted in zip(model.state_dict().items(), whole.state_dict().values()):
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9, msg=name)
dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(_TWO_PROCESSES)
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
    ]

    subprocess.run([sys.executable, *launcher, str(script)], check=True, timeout=200)
