"""Updates inside the backward pass, so that no two gradients live at a time."""

from __future__ import annotations

import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


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
