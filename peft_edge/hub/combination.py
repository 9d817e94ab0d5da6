"""Combine adapters, which several devices have trained on the same base model, into one adapter."""

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
"""The values that PEFT's `add_weighted_adapter` accepts for its argument `combination_type`."""


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
    BatchNorm are pooled over the adapters with positive weights (see `BatchNormLayer.pool`). In the pool, an adapter
    counts in proportion to its batch counter `num_batches_tracked`, not in proportion to its weight.

    Args:
        adapters: Folders of adapters, or ids of adapters on the Hub.
        weights: A weight for each adapter. By default, each weight is 1 / (number of adapters).
        base: The base model of all adapters. By default, it is the base model that `load_pretrained` loads for the
            first adapter.
        combination: How PEFT combines the matrices A and B of the adapters: one of `COMBINATIONS`. With `cat`, the
            combined kernel update is exactly the weighted sum of the adapters' updates, and its rank is the sum of
            their ranks. `svd` gives the best approximation of the weighted sum with rank `svd_rank`. `linear` adds up
            the weighted matrices A, and separately the weighted matrices B. The other names select variants of TIES,
            DARE and magnitude pruning.
        svd_rank: The rank of the combined adapter if the name of the combination ends in `svd`. By default, it is the
            largest rank of the adapters.
        density: The fraction of values that TIES, DARE and magnitude pruning keep. It is required for combinations
            that use one of these three methods, and ignored by `cat`, `svd` and `linear`.

    Returns:
        The model in eval mode. It has the loaded adapters with the names `adapter_0`, `adapter_1`, ..., and the
        combined adapter with the name `COMBINED`. The combined adapter is active.

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
    """Raise a ValueError if `other` is not of type `CONV_LORA`, or differs from `first` in settings or classes.

    `first_name` and `name` are the folders or Hub ids of the two adapters. Only the message uses them.
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

    When PEFT combines adapters, it joins their `target_modules`, but copies `exclude_modules` from the first adapter.
    Modules that only the first adapter excludes would then be missing in the combined adapter. Therefore
    `target_modules` of the copy matches exactly the names of the adapted layers, and its `exclude_modules` is None.
    """
    config = copy.deepcopy(model.active_peft_config)
    config.target_modules = exact_pattern(model.base_model.targeted_module_names)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config
