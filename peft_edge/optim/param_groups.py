"""Which trainable parameters an optimizer decays, and which it projects.

Updates inside the backward pass, so that no two gradients live at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from peft_edge.roles import ROLES, named_convolutions


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: kernels and matrices are decayed, biases, norms and magnitudes are not.

    Args:
        model: Any, adapted or not.
        weight_decay: Of the first group.

    Returns:
        Groups for any optimizer of torch, in the model's order; one without parameters is left out.
    """
    return _groups(model, frozenset(), {}, weight_decay)


def galore_param_groups(
    model: nn.Module,
    *,
    rank: int,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: str = "std",
    weight_decay: float = 0.0,
    target_modules: str | Sequence[str] = "dense",
) -> list[dict[str, Any]]:
    """The trainable parameters in three groups: projected kernels, and those of `decay_groups` for the rest.

    A kernel (C_out, C_in/g, *kernel) is projected as a matrix (C_out, K) if both sides are larger than the rank: below
    that nothing is saved. Depthwise kernels have at most as many columns as the kernel has taps, and stay as they are
    unless they are named. Weights of other layers, the classifier among them, are not projected.

    Args:
        model: Any, adapted or not.
        rank: Of the projected gradients.
        update_proj_gap: Steps from one basis to the next.
        scale: Factor of the projected updates.
        proj_type: A key of `peft_edge.optim.galore.PROJ_TYPES`.
        weight_decay: Of kernels and matrices, projected or not.
        target_modules: Role of the convolutions that are projected (see `peft_edge.roles`), the name of one, or
            several of them.

    Returns:
        Groups for the optimizers of `peft_edge.optim`, with the keys of galore-torch (Zhao et al. 2024, arXiv
        2403.03507); one without parameters is left out.

    Raises:
        ValueError: A target is neither a role nor a convolution, or no trainable kernel is left to project.
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
            f"no convolution of target_modules={target_modules!r} is trainable: GaLore trains a model's own weights, "
            "which get_peft_model freezes. Pass a model that is not frozen, or choose other target_modules"
        )
    projected = frozenset(weight for weight in trained if min(weight.flatten(1).shape) > rank)
    if not projected:
        raise ValueError(
            f"rank is {rank}, and none of the {len(trained)} trainable convolutions of target_modules="
            f"{target_modules!r} has a kernel with more rows and columns: lower the rank, or choose other "
            "target_modules"
        )
    galore = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
    return _groups(model, projected, galore, weight_decay)


def _groups(
    model: nn.Module, projected: frozenset[Tensor], galore: dict[str, Any], weight_decay: float
) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay, **galore},
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # PEFT keeps DoRA's vector of lengths in the shape of a kernel.
            is_vector = parameter.ndim < 2 or "lora_magnitude_vector" in name
            groups[0 if parameter in projected else 2 if is_vector else 1]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def update_in_backward(optimizer: Optimizer) -> list[RemovableHandle]:
    """Makes the backward pass update each parameter, and drop its gradient, as soon as the gradient is complete.

    The result is that of an ordinary step. There is no moment at which all gradients are there, so they cannot be
    clipped by their common norm; and every backward pass is a step, so nothing is accumulated: a loop with either would
    be another one without an error. It may go on calling `step` and `zero_grad`, which find no gradients, and a
    schedule's `step`.

    Args:
        optimizer: Any of torch or of this package, also as Accelerate has prepared it.

    Returns:
        Handles, one for each parameter; `remove` ends it.

    Raises:
        ValueError: Several processes train, which exchange gradients after this, or Accelerate scales the gradients.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"update_in_backward in {dist.get_world_size()} processes: each would update by its own gradient, before "
            "they are averaged. Train in one process, or leave it out"
        )
    if isinstance(optimizer, AcceleratedOptimizer):
        if optimizer.scaler is not None:
            raise ValueError(
                "update_in_backward with mixed_precision='fp16': the gradients are scaled in the backward pass. Train "
                "with 'bf16' or 'no', or leave it out"
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
