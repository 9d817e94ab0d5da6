"""Every private interface in `peft_edge/_compat.py` is still there and still does what it is used for."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from pkgutil import resolve_name

import peft.tuners.mixed.model
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.mixed import COMPATIBLE_TUNER_TYPES
from peft.utils import hotswap
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_edge.tuners.conv_adapter
import peft_edge.tuners.conv_lora
from peft_edge import ConvAdapterConfig, ConvAdapterModel, ConvLoraConfig, ConvLoraModel, _compat

# --- functional and lean: tensors, autograd ---------------------------------------------------------------------------


# --- tuners: PEFT's injection, hotswap, mixed models ------------------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_batch_norm_is_the_base_class_of_torchs_layers(cls: type[nn.Module]) -> None:
    assert issubclass(cls, _compat.BatchNorm)
    assert not issubclass(nn.InstanceNorm2d, _compat.BatchNorm)


def test_is_excluded_distinguishes_excluded_from_unmatched_modules() -> None:
    config = LoraConfig(target_modules=["a", "b"], exclude_modules=["b"])

    assert [_compat.is_excluded(config, name) for name in "abc"] == [False, True, False]


def test_has_plain_conv_forward_is_false_for_an_override() -> None:
    class Scaled(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight * 2, bias)

    assert _compat.has_plain_conv_forward(nn.Conv2d(1, 1, 1))
    assert not _compat.has_plain_conv_forward(Scaled(1, 1, 1))


def test_f_pad_sides_are_those_that_f_pad_takes() -> None:
    assert _compat.f_pad_sides(nn.Conv2d(1, 1, (3, 5), padding=(1, 2))) == (2, 2, 1, 1)
    assert _compat.f_pad_sides(nn.Conv1d(1, 1, 4, padding="same")) == (1, 2)


def test_is_in_backward_within_the_backward_pass_only() -> None:
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(_compat.is_in_backward()))
    seen.append(_compat.is_in_backward())
    y.backward()

    assert seen == [False, True]


def test_is_fake_for_fake_tensors_only() -> None:
    with FakeTensorMode():
        fake = torch.ones(1)

    assert (_compat.is_fake(fake), _compat.is_fake(torch.ones(1))) == (True, False)


def test_call_without_hooks_skips_the_hooks_of_step() -> None:
    parameter, calls = nn.Parameter(torch.ones(1)), []
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
    parameter.grad = torch.ones(1)

    _compat.call_without_hooks(optimizer.step)

    assert calls == []
    assert parameter.item() == pytest.approx(0.9)


@pytest.mark.parametrize("name", ["CONV_LORA", "CONV_ADAPTER"])
def test_added_peft_type_is_a_member_of_the_enumeration(name: str) -> None:
    member = PeftType[name]

    assert _compat.add_peft_type(name) is member
    assert member is PeftType(name) is getattr(PeftType, name)
    assert isinstance(member, PeftType)
    assert member == name
    assert member in list(PeftType)
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member


def test_peft_finds_the_tuners() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CONV_ADAPTER] is ConvAdapterConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.CONV_ADAPTER] is ConvAdapterModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.CONV_ADAPTER] == "conv_adapter_"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CONV_LORA] is ConvLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.CONV_LORA] is ConvLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.CONV_LORA] == "lora_"
    assert PeftType.CONV_LORA in COMPATIBLE_TUNER_TYPES


def test_registering_the_tuners_again_changes_nothing() -> None:
    def registered() -> tuple[object, ...]:
        mappings = dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(hotswap.CONFIG_KEYS_TO_CHECK)
        return list(PeftType), *mappings, hotswap._pad_lora_weights, peft.tuners.mixed.model.COMPATIBLE_TUNER_TYPES

    before = registered()

    importlib.reload(peft_edge.tuners.conv_lora)
    importlib.reload(peft_edge.tuners.conv_adapter)

    assert registered() == before


@pytest.mark.slow
def test_plain_peft_does_not_know_the_tuners() -> None:
    """If this fails, PEFT finds plugins, and the card of an adapter need not tell users to import peft_edge."""
    code = "from peft import PeftType; import sys; sys.exit('CONV_LORA' in PeftType.__members__)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("path", "method", "reason"), [*_compat.OVERRIDDEN_TUNERS, *_compat.CALLED_TUNERS])
def test_private_method_of_peft_exists(path: str, method: str, reason: str) -> None:
    assert callable(getattr(resolve_name(path), method)), reason


# --- profiling: dispatch modes, pytrees, autograd's graph -------------------------------------------------------------


# --- the rest: data, training, hub, export, study ---------------------------------------------------------------------


def test_dataset_fingerprint_depends_on_rows_and_transforms() -> None:
    rows, other = Dataset.from_dict({"a": [1, 2]}), Dataset.from_dict({"a": [1, 3]})
    prints = [_compat.dataset_fingerprint(dataset) for dataset in (rows, other, rows.with_transform(dict))]
    assert len(set(prints)) == 3
    assert _compat.dataset_fingerprint(Dataset.from_dict({"a": [1, 2]})) == prints[0]


def test_reset_accelerator_allows_other_settings() -> None:
    Accelerator(cpu=True, mixed_precision="bf16")
    _compat.reset_accelerator()
    assert Accelerator(cpu=True).mixed_precision == "no"
