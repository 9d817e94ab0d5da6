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
import timm
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.mixed import COMPATIBLE_TUNER_TYPES
from peft.utils import hotswap
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import peft_edge.tuners.conv_adapter
import peft_edge.tuners.conv_lora
from peft_edge import ConvAdapterConfig, ConvAdapterModel, ConvLoraConfig, ConvLoraModel, _compat

# --- functional and lean: tensors, autograd ---------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolution_base_is_the_base_class_of_torchs_layers(cls: type[nn.Module]) -> None:
    assert issubclass(cls, _compat.ConvolutionBase)
    assert not issubclass(nn.Linear, _compat.ConvolutionBase)


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_batch_norm_is_the_base_class_of_torchs_layers(cls: type[nn.Module]) -> None:
    assert issubclass(cls, _compat.BatchNorm)
    assert not issubclass(nn.InstanceNorm2d, _compat.BatchNorm)


def test_squeeze_excite_is_the_layer_of_timms_mobile_networks() -> None:
    model = timm.create_model("mobilenetv3_small_050")

    assert any(type(module) is _compat.SqueezeExcite for module in model.modules())


def test_leaves_lists_nested_values() -> None:
    assert _compat.leaves((1, [2], {"a": (3, None)})) == [1, 2, 3, None]


def test_is_transforming_within_transforms_and_forward_mode() -> None:
    seen: list[bool] = []

    def record(x: Tensor) -> Tensor:
        seen.append(_compat.is_transforming())
        return x.sum()

    x = torch.ones(2)
    record(x)
    torch.func.grad(record)(x)
    torch.func.vmap(record)(x)
    with torch.autograd.forward_ad.dual_level():
        record(x)
    record(x)

    assert seen == [False, True, True, True, False]


def test_f_pad_sides_are_those_that_f_pad_takes() -> None:
    assert _compat.f_pad_sides(nn.Conv2d(1, 1, (3, 5), padding=(1, 2))) == (2, 2, 1, 1)
    assert _compat.f_pad_sides(nn.Conv1d(1, 1, 4, padding="same")) == (1, 2)


def test_no_dispatch_hides_operators_from_active_modes() -> None:
    with FlopCounterMode(display=False) as counter:
        with _compat.no_dispatch():
            torch.ones(2, 2) @ torch.ones(2, 2)
        hidden = counter.get_total_flops()
        torch.ones(2, 2) @ torch.ones(2, 2)

    assert (hidden, counter.get_total_flops()) == (0, 16)


def test_autograd_context_declares_what_a_function_finds() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: _compat.AutogradContext, x: Tensor) -> Tensor:
            ctx.save_for_backward(x, None)
            ctx.factor = 2
            return ctx.factor * x

        @staticmethod
        def backward(ctx: _compat.AutogradContext, gradient: Tensor) -> Tensor:
            assert ctx.needs_input_grad == (True,)
            assert len(ctx.saved_tensors) == 2
            return ctx.factor * gradient

    x = torch.ones(1, requires_grad=True)
    assert torch.autograd.grad(Double.apply(x), x)[0] == 2


def test_version_of_counts_in_place_changes() -> None:
    x = torch.zeros(2)
    before = _compat.version_of(x)
    x.add_(1)

    assert _compat.version_of(x) == before + 1


def test_is_view_and_is_transformed_recognise_such_tensors() -> None:
    x, transformed = torch.zeros(2), []
    torch.vmap(lambda row: transformed.append(_compat.is_transformed(row)) or row)(x)

    assert (_compat.is_view(x), _compat.is_view(x[:1])) == (False, True)
    assert (_compat.is_transformed(x), transformed) == (False, [True])


def test_use_counts_rise_with_views_and_with_saved_tensors() -> None:
    x = torch.zeros(2, requires_grad=True)
    tensor_count, storage_count = _compat.use_counts(x)
    view, square = x.detach(), x.square()

    assert _compat.use_counts(x)[1] > storage_count, view
    assert _compat.use_counts(x)[0] > tensor_count, square


def test_saved_tensors_hook_is_seen_while_active() -> None:
    assert _compat.saved_tensors_hook() is None
    with torch.autograd.graph.save_on_cpu():
        assert _compat.saved_tensors_hook() is not None


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_has_hooks_sees_every_kind(register: str) -> None:
    module = nn.Identity()
    assert not _compat.has_hooks(module)

    handle = getattr(module, f"register_{register}")(lambda *arguments: None)

    assert _compat.has_hooks(module)
    handle.remove()
    assert not _compat.has_hooks(module)


def test_map_children_changes_a_copy_and_shares_the_rest() -> None:
    module = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))

    mapped = _compat.map_children(module, lambda child: nn.Identity() if isinstance(child, nn.ReLU) else child)

    assert [type(child) for child in mapped] == [nn.Identity, nn.Linear]
    assert [type(child) for child in module] == [nn.ReLU, nn.Linear]
    assert mapped[1] is module[1]
    assert _compat.map_children(module, lambda child: child) is module


# --- tuners: PEFT's injection, hotswap, mixed models ------------------------------------------------------------------


def test_is_excluded_distinguishes_excluded_from_unmatched_modules() -> None:
    config = LoraConfig(target_modules=["a", "b"], exclude_modules=["b"])

    assert [_compat.is_excluded(config, name) for name in "abc"] == [False, True, False]


def test_has_plain_conv_forward_is_false_for_an_override() -> None:
    class Scaled(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight * 2, bias)

    assert _compat.has_plain_conv_forward(nn.Conv2d(1, 1, 1))
    assert not _compat.has_plain_conv_forward(Scaled(1, 1, 1))


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


def test_a_dispatch_mode_sees_the_operators_of_both_passes() -> None:
    class Log(_compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Log():
        torch.ones(2, requires_grad=True).exp().sum().backward()
    assert names.index("exp") < names.index("sum") < names.index("mul")


def test_fake_tensors_have_shapes_and_refuse_values() -> None:
    with _compat.FakeMode(allow_non_fake_inputs=True) as mode:
        product = mode.from_tensor(torch.ones(3, 4), static_shapes=True) @ torch.ones(4, 2)
        assert product.shape == (3, 2)
        with pytest.raises(_compat.FakeValueError):
            product.sum().item()


def test_containers_of_tensors_are_walked() -> None:
    nested = {"a": [torch.ones(1), 2], "b": (torch.ones(3),)}
    assert [type(leaf) for leaf in _compat.leaves(nested)] == [torch.Tensor, int, torch.Tensor]
    doubled = _compat.map_only(torch.Tensor, lambda tensor: 2 * tensor, nested)
    assert (doubled["a"][0].item(), doubled["a"][1]) == (2, 2)


def test_a_raw_formula_gets_tensors() -> None:
    def formula(*arguments, out_val=None):
        return isinstance(arguments[0], torch.Tensor) and 7

    setattr(formula, _compat.RAW_FORMULA, True)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.exp: formula}) as counter:
        torch.ones(2).exp()
    assert counter.get_total_flops() == 7


def test_nodes_are_numbered_in_the_order_of_creation_and_known_in_the_backward_pass() -> None:
    seen: list[tuple[int, int]] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append((_compat.backward_pass_id(), _compat.node_number(_compat.current_node())))
            return gradient

    x = Probe.apply(torch.ones(2, requires_grad=True))
    first = _compat.last_node_number()
    y = Probe.apply(x)
    second = _compat.last_node_number()
    assert (_compat.backward_pass_id(), _compat.current_node()) == (-1, None)
    y.sum().backward()
    assert [number for _, number in seen] == [second, first]
    assert all(backward_pass >= 0 for backward_pass, _ in seen)
    assert first < second


def test_operator_names_include_operators_that_were_not_used() -> None:
    names = _compat.operator_names()
    assert {"aten::add.Tensor", "aten::_fused_adamw_"} <= set(names)


def test_parts_of_a_sparse_gradient_with_repeated_indices_are_read() -> None:
    layer = nn.Embedding(10, 4, sparse=True)
    layer(torch.tensor([3, 3])).sum().backward()
    indices, values = _compat.sparse_parts(layer.weight.grad)
    assert (indices.tolist(), values.shape) == ([[3, 3]], (2, 4))


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


def test_ray_address_resolves_what_ray_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert _compat.ray_address("auto") == "10.0.0.1:6379"
    assert _compat.ray_address("10.0.0.2:6379") == "10.0.0.2:6379"
    assert _compat.ray_address("local") is None
    with pytest.raises(ValueError, match="Invalid address format: head"):
        _compat.ray_address("head")
