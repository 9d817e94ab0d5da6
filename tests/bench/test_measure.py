from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from peft_edge.backbones import load_backbone
from peft_edge.bench import measure, run_bench
from peft_edge.bench.measure import CONTENDERS, REFERENCE, Contender
from peft_edge.profiling.analysis import analyse, classification_loss
from peft_edge.records import StepProfile
from peft_edge.roles import modules_with_role

DENSE = ("peft-lora", "lora-plain", "lora-dense", "lora-byte", "lora-stats")


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_size(backbone: nn.Module, role: str, rank: int) -> int:
    """Return the parameters of LoRA: A of shape (r, K) and B of shape (C_out, r) for each layer."""
    kernels = [backbone.get_submodule(name).weight.flatten(1) for name in modules_with_role(backbone, role)]
    return sum(rank * sum(kernel.shape) for kernel in kernels)


@pytest.mark.parametrize(
    ("name", "role"),
    [*((name, "dense") for name in DENSE), ("lora-project", "project"), ("lora-all-conv", "all-conv")],
)
def test_contenders_train_adapters_of_the_expected_size_and_the_head(
    tiny_backbone: nn.Module, name: str, role: str
) -> None:
    expected = adapter_size(tiny_backbone, role, 2) + 1280 * 10 + 10
    model, optimizer = CONTENDERS[name].build(tiny_backbone, 2)
    assert optimizer is not None
    assert trained(model) == expected


def test_reference_trains_all_parameters_and_inference_none(tiny_backbone: nn.Module) -> None:
    full, optimizer = CONTENDERS[REFERENCE].build(copy.deepcopy(tiny_backbone), 4)
    assert optimizer is not None
    assert trained(full) == sum(parameter.numel() for parameter in full.parameters())
    assert full.training
    assert full.conv_head.weight.is_contiguous(memory_format=torch.channels_last)
    inference, optimizer = CONTENDERS["inference"].build(tiny_backbone, 4)
    assert (optimizer, trained(inference), inference.training) == (None, 0, False)


@pytest.mark.parametrize(("name", "package"), [("lycoris-locon", "lycoris"), ("loralib", "loralib")])
def test_other_packages_train_their_adapters_and_the_head(
    tiny_backbone: nn.Module, images: torch.Tensor, name: str, package: str
) -> None:
    pytest.importorskip(package)
    plain = copy.deepcopy(tiny_backbone).eval()
    model, optimizer = CONTENDERS[name].build(tiny_backbone, 2)
    assert optimizer is not None
    torch.testing.assert_close(model.eval()(images), plain(images), rtol=1e-4, atol=1e-5)
    classification_loss(model.train()(images)).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = adapter_size(plain, "dense", 2)
    # loralib's factors are larger than ours, except for pointwise kernels.
    assert frozen + 12810 <= trained(model) < 2 * (frozen + 12810)


@pytest.mark.parametrize(("name", "package"), [("lycoris-locon", "lycoris"), ("loralib", "loralib")])
def test_missing_package_is_named(
    tiny_backbone: nn.Module, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=package):
        CONTENDERS[name].build(tiny_backbone, 2)


SMALL = {"batch_size": 2, "image_size": 64, "rounds": 2}


def without_times(profile: StepProfile | None) -> dict[str, object]:
    measured = ("_s", "peak_rss_bytes", "steps")
    return {name: value for name, value in vars(profile).items() if not name.endswith(measured)}


def test_real_step_costs_as_much_as_the_analysis() -> None:
    record = run_bench("mobilenetv2_035", ["lora-project"], **SMALL)
    full, project = record.rows
    backbone = load_backbone("mobilenetv2_035", 10)
    size = {"batch_size": 2, "image_size": 64}
    adapter = {"norm": "frozen", "target_modules": "project"}
    lean = analyse(backbone, "lora", lora_rank=4, adapter=adapter, lean=measure.LEAN, **size).profile[0]
    assert without_times(project.profile) == without_times(lean)
    assert without_times(full.profile) == without_times(analyse(backbone, None, **size).profile[0])
    assert [len(row.rounds) for row in record.rows] == [2, 2]
    assert all(times.step_s > 0 for row in record.rows for times in row.rounds)
    assert record.setting["threads"] == 1


def test_failing_contender_has_the_reason_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module, lora_rank: int) -> tuple[nn.Module, None]:
        raise AttributeError("no\nsuch attribute")

    def change(model: nn.Module, lora_rank: int) -> tuple[nn.Module, None]:
        model.get_submodule("fc").bias.data += 10
        return model.requires_grad_(False).eval(), None

    monkeypatch.setitem(CONTENDERS, "fails", Contender("fails", fail))
    monkeypatch.setitem(CONTENDERS, "changes", Contender("changes", change))
    threads = torch.get_num_threads()
    rows = run_bench("test_resnet", ["fails", "changes", "inference"], **SMALL).rows
    assert [row.name for row in rows] == ["full", "fails", "changes", "inference"]
    assert rows[1].error == "no such attribute"
    assert rows[2].error.startswith("its output differs from the network's: by ")
    assert (rows[1].rounds, rows[1].profile, rows[3].error) == ([], None, "")
    assert rows[3].rounds[0].backward_s == rows[3].rounds[0].optimizer_s == 0
    assert torch.get_num_threads() == threads


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="inception_v3 cannot be trained on images of 32 px: "):
        run_bench("inception_v3", ["inference"], batch_size=2, image_size=32, rounds=1)
