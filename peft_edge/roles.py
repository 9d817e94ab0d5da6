"""Layer roles: names such as `depthwise` that select convolutions in any network.

timm names the same layer differently in each family of networks (`conv_pw`, `conv_exp`, `conv1`). All roles except
`last-stage` therefore depend on groups, kernel size and channels instead of names. Importing this module does not
import torch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from torch import nn

    from peft_edge._compat import ConvolutionBase

    Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

ROLES: dict[str, str] = {
    "all-conv": "all convolutions",
    "dense": "convolutions with one group, pointwise ones included",
    "depthwise": "convolutions with one group per input channel",
    "pointwise": "convolutions with one group and a 1x1 kernel",
    "expand": "pointwise convolutions with more outputs than inputs, except in squeeze-excite",
    "project": "pointwise convolutions with fewer outputs than inputs, except in squeeze-excite",
    "last-stage": "the convolutions of the last stage, and those after it",
}


def is_convolution(module: nn.Module) -> TypeGuard[Convolution]:
    """Return whether the module is a `Conv1d`, `Conv2d` or `Conv3d`."""
    from torch import nn

    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_depthwise(conv: ConvolutionBase) -> bool:
    """Return whether each input channel has its own kernels (`groups == in_channels > 1`)."""
    return 1 < conv.groups == conv.in_channels


def is_pointwise(conv: Convolution) -> bool:
    """Return whether the convolution has one group and a 1x1 kernel."""
    return conv.groups == 1 and all(size == 1 for size in conv.kernel_size)


def named_convolutions(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Convolution, frozenset[str]]]:
    """Yield the name, module and roles of every convolution in model order. `prefix` is prepended to each name.

    If the model has adapters, the names and modules are those of the model without adapters. Layers in
    `modules_to_save` are left out. In a network without timm's `feature_info`, no convolution has the role
    `last-stage`.
    """
    convolutions = list(_walk(model))
    last_stage, is_reached = _last_stage(model, [name for name, _, _ in convolutions]), False
    for name, conv, roles in convolutions:
        is_reached = is_reached or f"{name}.".startswith(f"{last_stage}.")
        yield f"{prefix}{name}", conv, roles | {"last-stage"} if is_reached else roles


def modules_with_role(model: nn.Module, role: str) -> list[str]:
    """Return the names of the convolutions that have a role, in model order.

    >>> import timm
    >>> modules_with_role(timm.create_model("mobilenetv2_035"), "depthwise")[:2]
    ['blocks.0.0.conv_dw', 'blocks.1.0.conv_dw']

    Raises:
        ValueError: If `role` is not a key of `ROLES`.
    """
    if role not in ROLES:
        raise ValueError(f"Unknown layer role {role!r}, expected one of: {', '.join(ROLES)}.")
    return [name for name, _, roles in named_convolutions(model) if role in roles]


def _walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Convolution, frozenset[str]]]:
    squeeze_excite = _squeeze_excite(model)
    for name, child in _children(model):
        if not is_convolution(child):
            yield from _walk(child, f"{prefix}{name}.")
            continue
        roles = {"all-conv"}
        if child.groups == 1:
            roles.add("dense")
        if is_depthwise(child):
            roles.add("depthwise")
        if is_pointwise(child):
            roles.add("pointwise")
            if child.in_channels != child.out_channels and child not in squeeze_excite:
                roles.add("expand" if child.out_channels > child.in_channels else "project")
        yield f"{prefix}{name}", child, frozenset(roles)


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, child) for each child of a module, except layers in `modules_to_save`.

    If a child is an adapted layer, yield its base layer instead.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for name, child in module.named_children():
        # Check the type instead of the name, because timm's DLA has a child that is named `base_layer`.
        while isinstance(child, BaseTunerLayer):
            child = child.base_layer
        if not isinstance(child, AuxiliaryTrainingWrapper):
            yield name, child


def _squeeze_excite(module: nn.Module) -> list[Convolution]:
    """Return the two convolutions of a module if the module is a squeeze-excite block, and otherwise an empty list.

    A squeeze-excite block has exactly two convolutions. Both are pointwise. The first reduces the number of channels,
    and the second restores it. A bottleneck block also reduces and restores the number of channels, but it has a third
    convolution with a larger kernel.
    """
    convs = [child for _, child in _children(module) if is_convolution(child)]
    if len(convs) != 2 or not all(is_pointwise(conv) for conv in convs):
        return []
    reduce, restore = convs
    is_mirrored = reduce.in_channels == restore.out_channels > reduce.out_channels == restore.in_channels
    return convs if is_mirrored else []


def _last_stage(model: nn.Module, convolutions: list[str]) -> str | None:
    """Return the name of the last stage, or None if timm's `feature_info` is missing or lists no stages.

    timm lists only stages after which the resolution changes, so stages that are not listed may follow the last listed
    stage. In GhostNet, for example, the last listed stage is `blocks.7`, and `blocks.8` and `blocks.9` follow. If the
    last listed stage is inside another module, such as `blocks`, the result is the last child of that module that
    contains convolutions. Otherwise, the result is the last listed stage itself.
    """
    found = ((path, getattr(module, "feature_info", None)) for path, module in model.named_modules())
    # timm's blocks have a method `feature_info`, whereas networks have an attribute of this name.
    path, features = next(((path, info) for path, info in found if info and not callable(info)), ("", ()))
    listed = [f"{path}.{entry['module']}".lstrip(".") for entry in getattr(features, "info", features)]
    # Some entries of `feature_info` are norms or empty modules after the stage (DenseNet, RepVGG).
    stages = [stage for stage in listed if any(name.startswith(f"{stage}.") for name in convolutions)]
    if not stages:
        return None
    stack = stages[-1].rpartition(".")[0]
    if not stack:
        return stages[-1]
    last = [name for name in convolutions if name.startswith(f"{stack}.")][-1]
    return ".".join(last.split(".")[: stack.count(".") + 2])


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a module on the meta device, which needs no memory. Tied parameters stay tied."""
    from torch import nn

    # deepcopy treats tensors in the memo as already copied.
    memo: dict[int, object] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)
