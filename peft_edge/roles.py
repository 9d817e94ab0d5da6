"""Layer roles: which convolutions of a network play which part, read from the modules themselves.

timm names the same layer differently in every family (`conv_pw`, `conv_exp`, `conv1`, ...), so a role is decided by
groups, kernel size and channel counts only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

ROLES: dict[str, str] = {
    "all-conv": "every convolution",
    "dense": "convolutions with one group, pointwise ones included",
    "depthwise": "convolutions with one input channel a group",
    "pointwise": "dense convolutions with a 1x1 kernel",
    "expand": "pointwise convolutions with more outputs than inputs, squeeze-excite aside",
    "project": "pointwise convolutions with fewer outputs than inputs, squeeze-excite aside",
    "last-stage": "the last stage's convolutions, and those after it",
}


def is_depthwise(conv: Convolution) -> bool:
    """Whether every input channel has its own kernels (`groups == in_channels > 1`)."""
    return 1 < conv.groups == conv.in_channels


def is_pointwise(conv: Convolution) -> bool:
    """Whether the convolution mixes channels only (one group, a kernel of one tap)."""
    return conv.groups == 1 and all(size == 1 for size in conv.kernel_size)


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children as the unadapted network has them: adapters unwrapped, separately saved modules left out."""
    for name, child in module.named_children():
        while isinstance(base := getattr(child, "base_layer", None), nn.Module):
            child = base
        if not hasattr(child, "original_module"):
            yield name, child


def _squeeze_excite(module: nn.Module) -> tuple[Convolution, ...]:
    """The two convolutions of a squeeze-excite block, which reduce and restore the channels of a pooled map.

    They are the block's only convolutions and mirror each other. Nothing else tells them from a bottleneck's, whose
    block always holds a spatial convolution too.
    """
    convs = [child for _, child in _children(module) if isinstance(child, Convolution)]
    if len(convs) == 2 and all(is_pointwise(conv) for conv in convs):
        reduce, restore = convs
        if reduce.in_channels == restore.out_channels > reduce.out_channels == restore.in_channels:
            return reduce, restore
    return ()


def _last_stage(model: nn.Module, convolutions: Sequence[str]) -> str | None:
    """The name of the last stage: the last part of what holds the last stage that timm declares.

    What timm declares marks where the resolution changes, so that further stages may follow (GhostNet's `blocks.9`
    after `blocks.7`), and is sometimes a norm or an empty place after the stage (DenseNet, RepVGG). Other networks than
    timm's declare nothing, and have no last stage.
    """
    # timm's blocks have a method of that name.
    declarations = ((path, getattr(module, "feature_info", None)) for path, module in model.named_modules())
    path, features = next(((path, info) for path, info in declarations if info and not callable(info)), ("", ()))
    declared = [f"{path}.{entry['module']}".lstrip(".") for entry in getattr(features, "info", features)]
    stages = [stage for stage in declared if any(name.startswith(f"{stage}.") for name in convolutions)]
    if not stages:
        return None
    stack = stages[-1].rpartition(".")[0]
    if not stack:
        return stages[-1]
    last = [name for name in convolutions if name.startswith(f"{stack}.")][-1]
    return ".".join(last.split(".")[: stack.count(".") + 2])


def named_convolutions(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Convolution, frozenset[str]]]:
    """Yields name, module and roles of every convolution, in the model's order.

    Layers that PEFT already wraps appear once, under the name they had before.

    Args:
        model: any module tree, adapted or not.
        prefix: put before every name.
    """
    found = list(_walk(model))
    last_stage, is_reached = _last_stage(model, [name for name, _, _ in found]), False
    for name, conv, roles in found:
        is_reached = is_reached or f"{name}.".startswith(f"{last_stage}.")
        yield f"{prefix}{name}", conv, roles | {"last-stage"} if is_reached else roles


def _walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Convolution, frozenset[str]]]:
    squeeze_excite = _squeeze_excite(model)
    for name, child in _children(model):
        path = f"{prefix}{name}"
        if isinstance(child, Convolution):
            roles = {"all-conv"}
            if child.groups == 1:
                roles.add("dense")
            if is_depthwise(child):
                roles.add("depthwise")
            if is_pointwise(child):
                roles.add("pointwise")
                if child.in_channels != child.out_channels and child not in squeeze_excite:
                    roles.add("expand" if child.out_channels > child.in_channels else "project")
            yield path, child, frozenset(roles)
        else:
            yield from _walk(child, f"{path}.")


def modules_with_role(model: nn.Module, role: str) -> list[str]:
    """Names of the convolutions of `model` that have `role`, in the model's order.

    Raises:
        ValueError: if `role` is not a key of `ROLES`.
    """
    if role not in ROLES:
        raise ValueError(f"Unknown layer role {role!r}, expected one of: {', '.join(ROLES)}.")
    return [name for name, _, roles in named_convolutions(model) if role in roles]
