"""Private interfaces of torch, PEFT and timm that this package uses, in one place.

Each entry says why the public interface is not enough and with which version it was last seen. `tests/test_compat.py`
has a test for each, which fails when an upgrade removes or changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import wraps
from typing import TYPE_CHECKING, Any

import peft.mixed_model
import peft.tuners.mixed
import peft.tuners.mixed.model
import torch
from peft import PeftConfig, PeftType
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils import hotswap
from timm.models._efficientnet_blocks import SqueezeExcite as SqueezeExcite
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import Node
from torch.utils._mode_utils import no_dispatch as no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

if TYPE_CHECKING:
    from datasets import Dataset

# --- functional and lean: tensors, autograd ---------------------------------------------------------------------------

# Imported above: `SqueezeExcite`, the layer of timm's mobile networks, which no public module of timm exports (seen in
# timm 1.0.31), and `no_dispatch`, which hides operators from the dispatch modes that are active (seen in torch 2.14.1).

BatchNorm = nn.modules.batchnorm._BatchNorm
"""Base class of `nn.BatchNorm1d`, `2d`, `3d` and `nn.SyncBatchNorm`; torch has no public one. Seen in torch 2.14.1."""

ConvolutionBase = nn.modules.conv._ConvNd
"""Base class of `nn.Conv1d`, `2d` and `3d`; torch has no public one. Seen in torch 2.14.1."""

leaves = tree_leaves
"""List the leaves of nested tuples, lists and dictionaries; torch has no public function. Seen in torch 2.14.1."""


class AutogradContext(FunctionCtx):
    """The `ctx` of a `torch.autograd.Function`, for type checkers; torch's class declares none of this.

    Seen in torch 2.14.1.
    """

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    if TYPE_CHECKING:
        # A function may save None, and may set any attribute.
        def save_for_backward(self, *tensors: Tensor | None) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: object) -> None: ...


def f_pad_sides(conv: ConvolutionBase) -> tuple[int, ...]:
    """Return the padding of a convolution as `F.pad` takes it, with `padding="same"` resolved to numbers.

    The public `conv.padding` keeps the string. Seen in torch 2.14.1.
    """
    return tuple(conv._reversed_padding_repeated_twice)


def version_of(tensor: Tensor) -> int:
    """Count the in-place changes of a tensor; torch documents this counter only. Seen in torch 2.14.1."""
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Whether autograd tracks a tensor as a view of another one. Seen in torch 2.14.1."""
    return tensor._is_view()


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a transform of `torch.func`, such as `vmap`. Seen in torch 2.14.1."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def use_counts(tensor: Tensor) -> tuple[int, int]:
    """Count the references to the C++ tensor and to its storage; `sys.getrefcount` sees neither.

    Seen in torch 2.14.1.
    """
    storage = tensor.untyped_storage()
    return tensor._use_count(), torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]


def saved_tensors_hooks() -> object:
    """Return the innermost hooks on saved tensors, or None; gradient checkpointing installs such hooks.

    Seen in torch 2.14.1.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks; torch can add and remove them only. Seen in torch 2.14.1."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def map_children(module: nn.Module, function: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return a shallow copy of a module with `function` applied to its children; the module itself if none changes.

    `setattr` on a shallow copy would change the original too, because both share `_modules`. Seen in torch 2.14.1.
    """
    children = {name: child if child is None else function(child) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    mapped = copy(module)
    mapped._modules = children
    return mapped


# --- tuners: PEFT's injection, hotswap, mixed models ------------------------------------------------------------------


def is_excluded(config: PeftConfig, name: str) -> bool:
    """Whether `exclude_modules` of `config` matches a module name.

    PEFT's public `check_target_module_exists` answers "not a target" in the same way for a module that matches nothing.
    Seen in PEFT 0.21.2.
    """
    return isinstance(check_target_module_exists(config, name), _ExcludedModule)


def has_plain_conv_forward(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Whether a convolution inherits torch's `_conv_forward`, which subclasses override to change the weight first.

    Seen in torch 2.14.1.
    """
    return any(type(conv)._conv_forward is cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def is_in_backward() -> bool:
    """Whether autograd is running a backward pass, where gradient checkpointing repeats forward passes.

    Torch has no public equivalent. Seen in torch 2.14.1.
    """
    return torch._C._current_graph_task_id() != -1


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape but no values, as in `peft_edge.profiling`. Seen in torch 2.14.1."""
    return isinstance(tensor, FakeTensor)


def call_without_hooks(step: Callable[[], object]) -> None:
    """Call the `step` of an optimizer's base class without its step hooks.

    Torch wraps the `step` of each optimizer class in a function that runs the hooks, and marks the function as
    `hooked`. A subclass that calls its base class would run them twice. Seen in torch 2.14.1.
    """
    if getattr(step, "hooked", False):
        step.__wrapped__(step.__self__)  # type: ignore[attr-defined]
    else:
        step()


def add_peft_type(name: str) -> PeftType:
    """Add a member to the enumeration `peft.PeftType`, or return the one that it has.

    `register_peft_method` rejects unknown names, and a plain string in place of a member breaks `get_model_status`.
    PEFT has no plugin mechanism. Seen in PEFT 0.21.2.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    # Set the attribute first: once the maps contain the name, the enumeration refuses to set it.
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def allow_mixed(peft_type: PeftType, model_cls: type[MixedModel]) -> None:
    """Let `PeftMixedModel` hold adapters of `peft_type`, with `model_cls` as the base model.

    Registering a PEFT method does not add it to this list of types. Seen in PEFT 0.21.2.
    """
    if peft_type not in peft.tuners.mixed.COMPATIBLE_TUNER_TYPES:
        types = (*peft.tuners.mixed.COMPATIBLE_TUNER_TYPES, peft_type)
        # PEFT reads the tuple from both modules.
        peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = types
        peft.tuners.mixed.model.COMPATIBLE_TUNER_TYPES = types
        peft.mixed_model.MixedModel = model_cls


def allow_hotswap(peft_type: PeftType, config_keys: list[str], pad: Callable[[nn.Module, int], bool]) -> None:
    """Let `hotswap_adapter` and `prepare_model_for_compiled_hotswap` handle adapters of `peft_type`.

    Registering a PEFT method does not reach the hotswap module. Seen in PEFT 0.21.2.

    Args:
        peft_type: Type of the tuner.
        config_keys: Configuration keys, besides those of LoRA, that must agree between two adapters to be swapped.
        pad: Pads the tuner's layers in a model to a rank; returns whether it found any.
    """
    if peft_type in hotswap.CONFIG_KEYS_TO_CHECK:
        return
    hotswap.CONFIG_KEYS_TO_CHECK[peft_type] = hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA] + config_keys
    pad_known_layers = hotswap._pad_lora_weights

    @wraps(pad_known_layers)
    def pad_lora_weights(model: nn.Module, target_rank: int) -> bool:
        found = [pad_known_layers(model, target_rank), pad(model, target_rank)]
        return any(found)

    hotswap._pad_lora_weights = pad_lora_weights


OVERRIDDEN_TUNERS = (
    ("peft.tuners.tuners_utils.BaseTuner", "_create_and_replace", "wraps a layer in a class of ours"),
    ("peft.tuners.tuners_utils.BaseTuner", "_replace_module", "a BatchNorm or a block may have no weight to follow"),
    ("peft.tuners.tuners_utils.BaseTuner", "_unload_and_optionally_merge", "norms inside adapted blocks unload too"),
    ("peft.tuners.tuners_utils.BaseTuner", "_check_target_module_compatiblity", "PEFT checks Mamba for type LORA only"),
    ("peft.tuners.tuners_utils.BaseTunerLayer", "_get_base_layer_device_and_dtype", "a block has no weight"),
    ("peft.tuners.lora.LoraLayer", "_get_in_out_features", "PEFT does not know BatchNorm layers"),
    ("peft.tuners.lora.LoraModel", "_enable_peft_forward_hooks", "passes adapter_names to BatchNorm layers too"),
    ("peft.tuners.lora.LoraModel", "_svd_generalized_task_arithmetic_weighted_adapter", "SVD needs matrices"),
)
"""Private methods of PEFT that the tuners override: class, method, and why. Seen in PEFT 0.21.2."""

CALLED_TUNERS = (
    ("peft.tuners.tuners_utils.BaseTuner", "_prepare_adapter_config", "fills in PEFT's default target_modules"),
    ("peft.tuners.tuners_utils.BaseTunerLayer", "_get_available_adapters", "names of the adapters of any tuner"),
    ("peft.tuners.tuners_utils.BaseTunerLayer", "_move_adapter_to_device_of_base_layer", "as PEFT's own layers do"),
    ("peft.tuners.tuners_utils.BaseTunerLayer", "_freeze_non_trainable_peft_weights", "keeps lora_A frozen (LoRA-FA)"),
    ("peft.tuners.tuners_utils.BaseTunerLayer", "_cast_input_dtype", "as PEFT's own layers do"),
    ("peft.tuners.lora.LoraLayer", "_check_forward_args", "checks adapter_names"),
    ("peft.LoraConfig", "_register_custom_module", "maps layer classes to ours"),
)
"""Private methods of PEFT that the tuners call: class, method, and why. Seen in PEFT 0.21.2."""


# --- profiling: dispatch modes, pytrees, autograd's graph -------------------------------------------------------------

# A dispatch mode sees every operator; hooks see modules and gradients only. torch documents the mode in its notes but
# keeps the module private. Seen in torch 2.14.1.
DispatchMode = TorchDispatchMode

# Fake tensors have a shape and no memory. torch.export is built on them, and no public interface runs a training step
# with them. The exception is raised when a step reads a value. Seen in torch 2.14.1.
FakeMode = FakeTensorMode
FakeValueError = DataDependentOutputException

map_only = tree_map_only
"""Apply a function to the leaves of one type in nested containers. Seen in torch 2.14.1."""

# FlopCounterMode passes shapes to a formula; with this attribute it passes the tensors, which is several times faster.
# torch's decorator `register_flop_formula(get_raw=True)` sets it, too, but registers globally. Seen in torch 2.14.1.
RAW_FORMULA = "_get_raw"


def backward_pass_id() -> int:
    """Return the number of the backward pass that this thread is in, -1 outside of one.

    No public function tells whether the backward pass is running. Seen in torch 2.14.1.
    """
    return torch._C._current_graph_task_id()


def current_node() -> Node | None:
    """Return the autograd node that is being executed, None outside a backward pass.

    Hooks on nodes would have to be registered on each of them. Seen in torch 2.14.1.
    """
    return torch._C._current_autograd_node()


def node_number(node: Node) -> int:
    """Return the number of an autograd node: every thread counts its nodes in the order of creation.

    Seen in torch 2.14.1.
    """
    return node._sequence_nr()


def last_node_number() -> int:
    """Return the number of the autograd node that this thread has created last.

    Seen in torch 2.14.1.
    """
    return torch.autograd._get_sequence_nr() - 1


def operator_names() -> list[str]:
    """Return the names of all operators with their overloads, such as `aten::add.Tensor`.

    `dir(torch.ops.aten)` lists those only that were used before. Seen in torch 2.14.1.
    """
    return torch._C._dispatch_get_all_op_names()


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and values of a sparse tensor; `indices()` and `values()` refuse one with repeated indices.

    Seen in torch 2.14.1.
    """
    return tensor._indices(), tensor._values()


# --- the rest: data, training, hub, export, study ---------------------------------------------------------------------


def dataset_fingerprint(dataset: Dataset) -> str:
    """Return the hash that `datasets` keeps of a dataset's rows and transforms.

    `datasets` documents fingerprints and its cache relies on them, but has no public attribute for them.
    Seen in datasets 5.2.0.
    """
    return dataset._fingerprint


def reset_accelerator() -> None:
    """Discard the process-wide state of Accelerate, so that the next `Accelerator` may have other settings.

    Accelerate has no public function for this: its own tests call this method. Seen in accelerate 1.15.0.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
