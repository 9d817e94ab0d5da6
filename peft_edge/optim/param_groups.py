"""Parameter groups for weight decay and for GaLore, and optimizer steps in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from peft_edge.optim.galore import ParamGroup
from peft_edge.roles import ROLES, named_convolutions


def decay_groups(model: nn.Module, weight_decay: float) -> list[ParamGroup]:
    """Return the trainable parameters in two groups: first with `weight_decay`, then with a weight decay of 0.

    The second group contains the parameters with fewer than two dimensions (biases, weights of norms) and the magnitude
    vectors of DoRA. The first group contains all other parameters. An empty group is left out of the list.

    Example:
        >>> from peft_edge.optim import decay_groups
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> [(group["weight_decay"], len(group["params"])) for group in decay_groups(model, 0.01)]
        [(0.01, 1), (0.0, 3)]
    """
    return _groups(model, weight_decay)


def galore_param_groups(
    model: nn.Module,
    *,
    rank: int,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: str = "std",
    weight_decay: float = 0.0,
    target_modules: str | Sequence[str] = "dense",
) -> list[ParamGroup]:
    """Return the trainable parameters in three groups: kernels to project, other weights, and vectors (biases, norms).

    The first group has the keys `rank`, `update_proj_gap`, `scale` and `proj_type`, which the module docstring of
    `peft_edge.optim.galore` explains. A kernel (C_out, C_in/g, kh, kw) is projected as a matrix with C_out rows and
    C_in/g * kh * kw columns. If this matrix has at most `rank` rows or at most `rank` columns, its projection would
    save no memory, so the kernel is in the second group. The weights of linear layers are never projected. An empty
    group is left out of the list.

    `target_modules` selects the convolutions to project. It is a list of roles (keys of `peft_edge.roles.ROLES`) and
    names of convolutions, or a single role or name. The default, `"dense"`, leaves out grouped and depthwise
    convolutions. The first two groups have the given `weight_decay`, and the third group has a weight decay of 0.

    Raises:
        ValueError: If an entry of `target_modules` is neither a role nor the name of a convolution, or if there is no
            kernel to project.

    Example:
        >>> import timm
        >>> from peft_edge.optim import galore_param_groups
        >>> groups = galore_param_groups(timm.create_model("mobilenetv2_035"), rank=8)
        >>> [(group.get("rank"), len(group["params"])) for group in groups]
        [(8, 29), (None, 24), (None, 105)]
    """
    targets = {target_modules} if isinstance(target_modules, str) else set(target_modules)
    convolutions = list(named_convolutions(model))
    unknown = targets - ROLES.keys() - {name for name, _, _ in convolutions}
    if unknown:
        raise ValueError(
            f"target_modules: {', '.join(map(repr, sorted(unknown)))} is neither a layer role nor a convolution of "
            f"{type(model).__name__}. The roles are: {', '.join(ROLES)}"
        )
    trained = [
        convolution.weight
        for name, convolution, roles in convolutions
        if convolution.weight.requires_grad and targets & {name, *roles}
    ]
    if not trained:
        raise ValueError(
            f"no convolution of target_modules={target_modules!r} is trainable: GaLore updates the weights of the base "
            "model, which get_peft_model freezes. Pass a model that is not frozen, or choose other target_modules"
        )
    projected = frozenset(weight for weight in trained if min(weight.flatten(1).shape) > rank)
    if not projected:
        raise ValueError(
            f"rank is {rank}, and none of the {len(trained)} trainable convolutions of target_modules="
            f"{target_modules!r} has more than {rank} rows and columns: lower the rank, or choose other target_modules"
        )
    galore = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
    return _groups(model, weight_decay, projected, **galore)


def _groups(
    model: nn.Module, weight_decay: float, projected: frozenset[Tensor] = frozenset(), **galore: object
) -> list[ParamGroup]:
    """Return the trainable parameters in three groups: those in `projected`, other weights, and vectors.

    The first group also has the keys and values of `galore`. The weight decay of the vectors is 0. An empty group is
    left out of the list.
    """
    groups: list[ParamGroup] = [
        {"params": [], "weight_decay": weight_decay, **galore},
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Check the name too: for a convolution, PEFT stores DoRA's magnitude vector as a tensor of four dimensions.
            is_vector = parameter.ndim < 2 or "lora_magnitude_vector" in name
            groups[0 if parameter in projected else 2 if is_vector else 1]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def update_in_backward(optimizer: Optimizer) -> list[RemovableHandle]:
    """Register hooks that update each parameter in the backward pass, and free its gradient after the update.

    The updates equal those of `optimizer.step()`, and only one gradient is in memory at a time. The training loop may
    still call `step` and `zero_grad`, which then find no gradients. Two techniques silently stop working. Gradients are
    not accumulated, because every backward pass is a step. Gradients cannot be clipped by their total norm, because
    they are never in memory together. `optimizer` may be an `AcceleratedOptimizer`. To remove the hooks, call
    `remove()` on each returned handle.

    Raises:
        ValueError: If training runs in several processes, because each process would update its parameters before the
            gradients are averaged. If `optimizer` is an `AcceleratedOptimizer` that scales gradients (fp16).

    Example:
        >>> import torch
        >>> from peft_edge.optim import update_in_backward
        >>> model = torch.nn.Linear(4, 2)
        >>> handles = update_in_backward(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> before = model.weight.clone()
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> torch.equal(model.weight, before), model.weight.grad
        (False, None)
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"update_in_backward in {dist.get_world_size()} processes: each process would apply its own gradients "
            "before they are averaged. Train in one process, or leave out update_in_backward"
        )
    if isinstance(optimizer, AcceleratedOptimizer):
        if optimizer.scaler is not None:
            raise ValueError(
                "update_in_backward with mixed_precision='fp16': the gradients are scaled in the backward pass. Train "
                "with 'bf16' or 'no', or leave out update_in_backward"
            )
        optimizer = optimizer.optimizer

    def update(parameter: Tensor, group_index: int) -> None:
        groups = optimizer.param_groups
        optimizer.param_groups = [{**groups[group_index], "params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        parameter.grad = None

    return [
        parameter.register_post_accumulate_grad_hook(lambda parameter, index=index: update(parameter, index))
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if parameter.requires_grad
    ]
