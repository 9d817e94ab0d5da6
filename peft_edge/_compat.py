"""Private interfaces of torch, PEFT, timm and other libraries that this package uses, in one place.

Each entry says why the public interface is not enough. All entries were checked with torch 2.14.1, PEFT 0.21.2, timm
1.0.31, datasets 5.2.0, accelerate 1.15.0 and ray 2.60.0. `tests/test_compat.py` fails if an upgrade breaks an entry.
"""

from __future__ import annotations

import weakref
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
from timm.models._efficientnet_blocks import EdgeResidual as EdgeResidual
from timm.models._efficientnet_blocks import InvertedResidual as InvertedResidual
from timm.models._efficientnet_blocks import SqueezeExcite as SqueezeExcite
from timm.models._efficientnet_blocks import UniversalInvertedResidual as UniversalInvertedResidual
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import Node
from torch.utils._mode_utils import no_dispatch as no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

if TYPE_CHECKING:
    from datasets import Dataset

# --- functional and lean: tensors, autograd ---------------------------------------------------------------------------

# `SqueezeExcite`, three inverted residual blocks and `no_dispatch` are imported above. `SqueezeExcite` and the blocks
# are layers of timm's mobile networks, and no public module of timm exports them. Inside `with no_dispatch()`, the
# active dispatch modes do not see the operators.

BatchNorm = nn.modules.batchnorm._BatchNorm
"""Base class of `nn.BatchNorm1d`, `2d`, `3d` and `nn.SyncBatchNorm`; torch exports no common base class."""

ConvolutionBase = nn.modules.conv._ConvNd
"""Base class of `nn.Conv1d`, `2d` and `3d`; torch exports no common base class."""

leaves = tree_leaves
"""List the leaves of nested tuples, lists and dictionaries; torch has no public function for this."""


class AutogradContext(FunctionCtx):
    """The `ctx` of a `torch.autograd.Function`, for type checkers; torch's class does not declare these attributes."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    if TYPE_CHECKING:
        # An autograd function may pass None to `save_for_backward`, and may set any attribute of `ctx`.
        def save_for_backward(self, *tensors: Tensor | None) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: object) -> None: ...


def f_pad_sides(conv: ConvolutionBase) -> tuple[int, ...]:
    """Return the padding of a convolution in the format of `F.pad`; the public `conv.padding` may be a string."""
    return tuple(conv._reversed_padding_repeated_twice)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; torch has no public function for this."""
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Return whether autograd tracks a tensor as a view of another tensor; torch has no public function for this."""
    return tensor._is_view()


def is_transformed(tensor: Tensor) -> bool:
    """Return whether a `torch.func` transform such as `vmap` wraps a tensor; torch has no public function for this."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_transforming() -> bool:
    """Return whether a `torch.func` transform or forward-mode AD is running; torch has no public function for this."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def use_counts(tensor: Tensor) -> tuple[int, int]:
    """Return two counts: the references to the C++ tensor, and the references to its storage.

    `sys.getrefcount` counts neither of them. A reference from the Python object of the storage is not counted.
    """
    address = torch._C._storage_address(tensor)  # type: ignore[attr-defined]
    count = torch._C._storage_Use_Count(address)
    if count > 1:
        # A storage may have a Python object, which holds one reference and lives as long as the storage.
        # `untyped_storage` creates this object if it does not exist yet. After this call, the object's reference is
        # always in the count, and is subtracted. If the count was 1, the object does not exist. It must not be created,
        # because autograd accumulates gradients in place only in storages with a single reference.
        tensor.untyped_storage()
        count = torch._C._storage_Use_Count(address) - 1
    return tensor._use_count(), count  # type: ignore[attr-defined]


def saved_tensors_hook() -> weakref.ref[Callable[[Tensor], object]] | None:
    """Return a weak reference to the innermost hook that packs saved tensors, or None if there is no such hook.

    Gradient checkpointing sets such a hook. For the same hook, the function always returns the same reference, so two
    results can be compared with `is`.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else weakref.ref(hooks[0])


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward or backward hooks; torch's public functions only add and remove hooks."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def map_children(module: nn.Module, function: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return a shallow copy of a module, in which `function(child)` replaces each child.

    If `function` returns each child unchanged, return the module itself.
    """
    children = {name: child if child is None else function(child) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    mapped = copy(module)
    # `setattr(mapped, name, child)` would also change `module`, because both share the dict `_modules`.
    mapped._modules = children
    return mapped


# --- tuners: PEFT's injection, hotswap, mixed models ------------------------------------------------------------------


def is_excluded(config: PeftConfig, name: str) -> bool:
    """Return whether `exclude_modules` of `config` matches a module name.

    PEFT's `check_target_module_exists` returns a falsy value both for excluded modules and for modules that match no
    pattern, but the types of the two values differ.
    """
    return isinstance(check_target_module_exists(config, name), _ExcludedModule)


def has_plain_conv_forward(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Return whether a convolution inherits torch's `_conv_forward`; some subclasses override this method."""
    return any(type(conv)._conv_forward is cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def is_in_backward() -> bool:
    """Return whether autograd is running a backward pass.

    The result is also True in a forward pass that gradient checkpointing repeats during the backward pass.
    """
    return backward_pass_id() != -1


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor is a fake tensor, which has a shape but no values; torch's class for it is private."""
    return isinstance(tensor, FakeTensor)


def call_without_hooks(step: Callable[[], object]) -> None:
    """Call `step`, the method of an optimizer's base class, without running the step hooks of the optimizer.

    Torch wraps the method `step` of each optimizer class in a function that runs the hooks, and marks this function as
    `hooked`. If the `step` of a subclass called the wrapped `step` of its base class, the hooks would run twice.
    """
    if getattr(step, "hooked", False):
        step.__wrapped__(step.__self__)  # type: ignore[attr-defined]
    else:
        step()


def add_peft_type(name: str) -> PeftType:
    """Return the member `name` of the enumeration `peft.PeftType`. If the member is missing, add it first.

    PEFT has no plugin mechanism: `register_peft_method` rejects names that are not members of the enumeration, and
    `get_model_status` fails if the type of an adapter is a string.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    # Set the attribute before the maps contain the name, because the enumeration refuses to set existing members.
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def allow_mixed(peft_type: PeftType, model_cls: type[MixedModel]) -> None:
    """Let `PeftMixedModel` hold adapters of `peft_type`, and use `model_cls` in place of PEFT's `MixedModel`.

    PEFT's `register_peft_method` does neither of the two. A second call for the same type has no effect.
    """
    if peft_type not in peft.tuners.mixed.COMPATIBLE_TUNER_TYPES:
        types = (*peft.tuners.mixed.COMPATIBLE_TUNER_TYPES, peft_type)
        # PEFT reads the tuple from both modules.
        peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = types
        peft.tuners.mixed.model.COMPATIBLE_TUNER_TYPES = types
        peft.mixed_model.MixedModel = model_cls


def allow_hotswap(peft_type: PeftType, config_keys: list[str], pad: Callable[[nn.Module, int], bool]) -> None:
    """Let `hotswap_adapter` and `prepare_model_for_compiled_hotswap` handle adapters of `peft_type`.

    PEFT's `register_peft_method` does not do this. `config_keys` are configuration keys whose values must be equal in
    the old and the new adapter, in addition to the keys that PEFT compares for LoRA. `pad(model, rank)` must pad the
    adapters of `peft_type` in `model` to `rank`, and return whether `model` has such adapters. A second call for the
    same type has no effect.
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
    ("peft.tuners.tuners_utils.BaseTuner", "_create_and_replace", "wraps a layer in a class of this package"),
    ("peft.tuners.tuners_utils.BaseTuner", "_replace_module", "a BatchNorm or a block may have no weight to follow"),
    ("peft.tuners.tuners_utils.BaseTuner", "_remap_adapter_state_dict_for_load", "a module may be in several places"),
    ("peft.tuners.tuners_utils.BaseTuner", "_unload_and_optionally_merge", "also unloads norms inside adapted blocks"),
    ("peft.tuners.tuners_utils.BaseTuner", "_check_target_module_compatiblity", "PEFT checks Mamba for type LORA only"),
    ("peft.tuners.tuners_utils.BaseTunerLayer", "_get_base_layer_device_and_dtype", "a block has no weight"),
    ("peft.tuners.lora.LoraLayer", "_get_in_out_features", "PEFT does not know BatchNorm layers"),
    ("peft.tuners.tuners_utils.BaseTuner", "_mark_only_adapters_as_trainable", "also unfreezes a bias with an adapter"),
    ("peft.tuners.lora.LoraModel", "_enable_peft_forward_hooks", "also passes adapter_names to BatchNorm layers"),
    ("peft.tuners.lora.LoraModel", "_check_add_weighted_adapter", "PEFT refuses to combine trained heads"),
    ("peft.tuners.lora.LoraModel", "_svd_generalized_task_arithmetic_weighted_adapter", "SVD needs matrices"),
)
"""Private methods of PEFT that the tuners override. Each entry has the class, the method and the reason."""

CALLED_TUNERS = (
    ("peft.tuners.tuners_utils.BaseTuner", "_prepare_adapter_config", "fills in PEFT's default target_modules"),
    ("peft.tuners.tuners_utils.BaseTunerLayer", "_get_available_adapters", "names of the adapters of any tuner"),
    ("peft.tuners.tuners_utils.BaseTunerLayer", "_move_adapter_to_device_of_base_layer", "as PEFT's own layers do"),
    ("peft.tuners.tuners_utils.BaseTunerLayer", "_freeze_non_trainable_peft_weights", "keeps lora_A frozen (LoRA-FA)"),
    ("peft.tuners.tuners_utils.BaseTunerLayer", "_cast_input_dtype", "as PEFT's own layers do"),
    ("peft.tuners.lora.LoraLayer", "_check_forward_args", "checks adapter_names"),
    ("peft.LoraConfig", "_register_custom_module", "maps layer classes to adapter classes"),
)
"""Private methods of PEFT that the tuners call. Each entry has the class, the method and the purpose."""


# --- profiling: dispatch modes, pytrees, autograd's graph -------------------------------------------------------------

# A dispatch mode sees every operator, whereas hooks see only modules and gradients. The notes of torch document
# `TorchDispatchMode`, but the module that defines it is private.
DispatchMode = TorchDispatchMode

# Fake tensors have a shape, but no values. No public interface of torch runs a training step with fake tensors.
# `FakeValueError` is raised if a step reads a value of a fake tensor.
FakeMode = FakeTensorMode
FakeValueError = DataDependentOutputException

map_only = tree_map_only
"""Apply a function to all leaves of a given type in nested containers."""

# torch's `FlopCounterMode` passes shapes to a FLOP formula. To a formula with the attribute `_get_raw`, the mode passes
# tensors instead, which is several times faster. torch's decorator `register_flop_formula(get_raw=True)` also sets this
# attribute, but registers the formula globally.
RAW_FORMULA = "_get_raw"


def backward_pass_id() -> int:
    """Return the number of the backward pass that this thread is running, or -1 if no backward pass is running.

    torch has no public function for this.
    """
    return torch._C._current_graph_task_id()


def current_node() -> Node | None:
    """Return the autograd node that is being executed, or None; torch has no public function for this."""
    return torch._C._current_autograd_node()


def node_number(node: Node) -> int:
    """Return the number of an autograd node. Each thread numbers its own nodes in the order of their creation."""
    return node._sequence_nr()


def last_node_number() -> int:
    """Return the number of the last autograd node that this thread created."""
    return torch.autograd._get_sequence_nr() - 1


def operator_names() -> list[str]:
    """Return the names of all operators, such as `aten::add.Tensor`.

    `dir(torch.ops.aten)` lists only operators that have been used.
    """
    return torch._C._dispatch_get_all_op_names()


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and values of a sparse tensor; the public methods require coalesced tensors."""
    return tensor._indices(), tensor._values()


# --- other modules: data, training, hub, export, study ----------------------------------------------------------------


def dataset_fingerprint(dataset: Dataset) -> str:
    """Return the hash of a dataset's rows and transforms; `datasets` has no public attribute for the hash."""
    return dataset._fingerprint


def reset_accelerator() -> None:
    """Discard the settings that all instances of `Accelerator` share; Accelerate has no public function for this."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def ray_address(address: str) -> str | None:
    """Return the `HOST:PORT` to which `ray.init(address)` would connect; Ray has no public function for this.

    Return None if `ray.init` would start a new cluster on this machine. The address `auto` means the address in the
    environment variable `RAY_ADDRESS` or, without this variable, the cluster that was started last on this machine.

    Raises:
        ConnectionError: If `address` is `auto` and Ray finds no cluster.
        ValueError: If `address` is neither `HOST:PORT` nor `auto` nor `local`.
    """
    from ray._private.services import canonicalize_bootstrap_address

    return canonicalize_bootstrap_address(address)
