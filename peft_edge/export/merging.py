"""The network that is left when an adapter has gone into its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from peft_edge.lean import undo_lean_training


def merged(model: nn.Module) -> Any:
    """Returns a plain copy of a model in eval mode on the CPU, its active adapters merged with their BatchNorm.

    Args:
        model: A timm model, or a PEFT model of one; left as it is.

    Raises:
        ValueError: An adapter cannot be merged, or its weights are not finite.
    """
    network: Any = copy.deepcopy(model)
    if isinstance(network, PeftModel):
        try:
            network = network.merge_and_unload(safe_merge=True)
        except NotImplementedError as error:
            raise ValueError(
                f"a device runs one plain network, and this adapter cannot become part of one: {error}"
            ) from error
    plain = undo_lean_training(network).cpu().to(memory_format=torch.contiguous_format)
    return plain.eval().requires_grad_(False)
