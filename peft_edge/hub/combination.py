"""Combine the adapters of several devices, trained on the same base model, into one adapter."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from peft_edge.backbones import class_names
from peft_edge.hub.adapter_files import exact_pattern
from peft_edge.hub.pretrained import load_pretrained
from peft_edge.tuners.conv_lora import ConvLoraConfig
from peft_edge.tuners.norm import BatchNormLayer

COMBINED = "combined"
"""The name of the combined adapter in the model that `combine_adapters` returns."""

COMBINATIONS = (
    *("cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
)
"""The values of `combination_type` of PEFT's `add_weighted_adapter`."""


def combine_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    *,
    base: nn.Module | None = None,
    combination: str = "cat",
    svd_rank: int | None = None,
    density: float | None = None,
) -> PeftModel:
    """Load adapters of type `CONV_LORA`, and combine them with `ConvLoraModel.add_weighted_adapter`.

    Weights that add up to 1 give an average. Other weights give task arithmetic (arXiv 2212.04089). The statistics of
    BatchNorm are pooled over the adapters with positive weights (see `BatchNormLayer.pool`). In the pooled statistics,
    each adapter counts by its number of training batches, not by its weight.

    Args:
        adapters: Folders of adapters, or ids of adapters on the Hub.
        weights: A weight for each adapter. By default, each weight is 1 / (number of adapters).
        base: The base model of all adapters. By default, it is the base model that `load_pretrained` loads for the
            first adapter.
        combination: How PEFT combines A and B, one of `COMBINATIONS`. `cat` is exact: the kernel update is the weighted
            sum of the updates, and the rank is the sum of the ranks. `svd` gives the best approximation of this sum
            with rank `svd_rank`. `linear` combines A and B separately. Other names are variants of TIES, DARE and
            magnitude pruning.
        svd_rank: The rank for the combinations with SVD. By default, it is the largest rank of the adapters.
        density: The fraction of values that TIES, DARE and magnitude pruning keep. These combinations require
            `density`.

    Returns:
        The model in eval mode. Its adapters are `adapter_0`, `adapter_1`, ... and the combined adapter. The latter is
        active, and has the name `COMBINED`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If there is no adapter, an adapter cannot be loaded, `weights` or `density` is invalid, or the
            adapters differ in base, type, classes or one of the settings `norm`, `use_dora`, `use_rslora`,
            `lora_bias` and `modules_to_save`.
    """
    if not adapters:
        raise ValueError("adapters: expected at least one adapter, found none")
    weights = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise ValueError(f"weights: expected one weight for each of the {len(adapters)} adapters, found {len(weights)}")
    if not 0 < (1.0 if density is None else density) <= 1:
        raise ValueError(f"density: expected a number above 0 and at most 1, found {density}")
    if density is None and combination.startswith(("ties", "dare", "magnitude")):
        raise ValueError(f"combination {combination!r} needs a density, such as 0.5")
    loaded = [load_pretrained(adapters[0], base=base)]
    plain = copy.deepcopy(loaded[0]).unload()
    loaded += [load_pretrained(adapter, base=plain) for adapter in adapters[1:]]
    for adapter, model in zip(adapters, loaded, strict=True):
        _check_same(adapters[0], loaded[0], adapter, model)

    names = [f"adapter_{number}" for number in range(len(adapters))]
    model = PeftModel(plain, _exact_config(loaded[0]), adapter_name=names[0])
    for name, other in zip(names, loaded, strict=True):
        if name != names[0]:
            model.add_adapter(name, _exact_config(other))
        state = get_peft_model_state_dict(other, adapter_name=other.active_adapter, save_embedding_layers=False)
        set_peft_model_state_dict(model, state, adapter_name=name)
    model.base_model.add_weighted_adapter(
        names, weights, COMBINED, combination_type=combination, svd_rank=svd_rank, density=density
    )
    pooled = [name for name, weight in zip(names, weights, strict=True) if weight > 0]
    for layer in model.modules():
        if isinstance(layer, BatchNormLayer) and pooled:
            layer.pool(pooled, into=COMBINED)
    model.set_adapter(COMBINED)
    return model.eval()


def _check_same(first_name: object, first: PeftModel, name: object, other: PeftModel) -> None:
    """Raise a ValueError if type, settings or classes of `other` and `first` differ.

    `first_name` and `name` occur only in the message.
    """
    config, expected = other.active_peft_config, first.active_peft_config
    if not isinstance(config, ConvLoraConfig):
        raise ValueError(
            f"{name}: expected an adapter of type CONV_LORA (methods lora, lora-fa and dora), found "
            f"{config.peft_type.value}, which cannot be combined"
        )
    settings = ("norm", "use_dora", "use_rslora", "lora_bias", "modules_to_save")
    found = [(key, getattr(config, key), getattr(expected, key)) for key in settings]
    found.append(("classes", class_names(other), class_names(first)))
    for key, value, wanted in found:
        if value != wanted:
            raise ValueError(f"{name}: {key}: expected {wanted!r} as in {first_name}, found {value!r}")


def _exact_config(model: PeftModel) -> ConvLoraConfig:
    """Return a copy of the adapter's configuration in which `target_modules` alone determines the adapted layers.

    When PEFT combines adapters, it joins their `target_modules`, but takes `exclude_modules` from the first adapter.
    """
    config = copy.deepcopy(model.active_peft_config)
    config.target_modules = exact_pattern(model.base_model.targeted_module_names)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config
