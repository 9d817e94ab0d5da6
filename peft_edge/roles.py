"""Layer roles: which convolutions of a network play which part, read from the modules themselves.

timm names the same layer differently in every family (`conv_pw`, `conv_exp`, `conv1`, ...), so a role is decided by
groups, kernel size and channel counts only.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

ROLES: dict[str, str] = {
    "all-conv": "every convolution",
    "dense": "convolutions with one group, pointwise ones included",
    "depthwise": "convolutions with one input channel a group",
    "pointwise": "dense convolutions with a 1x1 kernel",
    "expand": "pointwise convolutions with more outputs than inputs, squeeze-excite aside",
    "project": "pointwise convolutions with fewer outputs than inputs, squeeze-excite aside",
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


def named_convolutions(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Convolution, frozenset[str]]]:
    """Yields name, module and roles of every convolution, in the model's order.

    Layers that PEFT already wraps appear once, under the name they had before.

    Args:
        model: any module tree, adapted or not.
        prefix: put before every name.
    """
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
            yield from named_convolutions(child, f"{path}.")


def modules_with_role(model: nn.Module, role: str) -> list[str]:
    """Names of the convolutions of `model` that have `role`, in the model's order.

    Raises:
        ValueError: if `role` is not a key of `ROLES`.
    """
    if role not in ROLES:
        raise ValueError(f"Unknown layer role {role!r}, expected one of: {', '.join(ROLES)}.")
    return [name for name, _, roles in named_convolutions(model) if role in roles]
