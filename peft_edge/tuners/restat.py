"""Re-estimation of an adapter's BatchNorm statistics, without gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from peft_edge.tuners.norm import BatchNormLayer


@torch.no_grad()
def restat(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Re-estimates the active adapters' BatchNorm statistics as averages over `batches`, by forward passes alone.

    Every batch counts alike. Dropout is off meanwhile, and weights do not change.

    Args:
        model: a model with ConvLoRA or ConvAdapter adapters.
        batches: inputs of the model, each (B, C, H, W) with B > 1, on the model's device.

    Raises:
        ValueError: if no active adapter has statistics of its own, or there is no batch.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, BatchNormLayer) and layer.current_state().running_mean is not None
    ]
    if not layers:
        raise ValueError(
            "restat: no active adapter has BatchNorm statistics of its own. Pass a model with BatchNorm layers, "
            'adapted with norm="restat", "stats" or "affine", and not merged.'
        )
    training = model.training
    states = [layer.current_state() for layer in layers]
    before = [copy.deepcopy(state.state_dict()) for state in states]
    model.eval()
    try:
        for layer, state in zip(layers, states, strict=True):
            layer.estimating = True
            state.num_batches_tracked.zero_()
        for batch in batches:
            model(batch)
        if not states[0].num_batches_tracked:
            raise ValueError("restat: got no batch to estimate statistics from.")
    except BaseException:
        for state, values in zip(states, before, strict=True):
            state.load_state_dict(values)
        raise
    finally:
        for layer in layers:
            layer.estimating = False
        model.train(training)
