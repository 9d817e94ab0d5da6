"""How ConvLoRA adapters get into a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from peft import PeftType
from peft.config import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from peft_edge.roles import Convolution
from peft_edge.tuners.conv_lora.config import ConvLoraConfig
from peft_edge.tuners.conv_lora.layer import ConvLoraLayer, check_rank
from peft_edge.tuners.injection import Injection, iter_target_modules
from peft_edge.tuners.kernel_adapter import adapter_names_for_layers, check_convolution
from peft_edge.tuners.norm import BatchNormLayer


class _ConvLoraInjection(Injection):
    """What ConvLoRA adds to PEFT's injection of LoRA, for models of this tuner alone and for mixed ones."""

    config_class = ConvLoraConfig

    def _check_targets(self, config: ConvLoraConfig, model: nn.Module) -> None:
        for site in iter_target_modules(model):
            if isinstance(site.base, Convolution) and check_target_module_exists(config, site.name):
                check_convolution(site.base, site.name)
                pattern = get_pattern_key(config.rank_pattern.keys(), site.name)
                check_rank(config.rank_pattern.get(pattern, config.r), site.name)

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        # PEFT knows by the type which tuners Mamba's fused layers would pass over.
        as_lora = SimpleNamespace(peft_type=PeftType.LORA)
        super()._check_target_module_compatiblity(as_lora, model, target_name)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(
            peft_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )
        if isinstance(peft_config, ConvLoraConfig) and peft_config.freeze_a:
            layer = getattr(parent, target_name)
            layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: ("lora_A",)}
            layer._freeze_non_trainable_peft_weights(adapter_name)


class ConvLoraModel(_ConvLoraInjection, LoraModel):
    """A model with ConvLoRA adapters, as `get_peft_model` and `PeftModel.from_pretrained` build it.

    Args:
        model: the model to adapt.
        peft_config: a `ConvLoraConfig`, or several by adapter name.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the adapter's weights on the meta device, to be loaded afterwards.

    Raises:
        NoMatchingPeftModuleError: if no module matches `target_modules`.
        ValueError: if a matching one cannot be adapted.
    """

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        with super()._enable_peft_forward_hooks(*args, **kwargs), adapter_names_for_layers(self, adapter_names):
            yield

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As PEFT's; the new adapter's BatchNorm state is the base model's plus the weighted changes."""
        if adapter_name in self.peft_config:
            return
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        for layer in self.modules():
            if isinstance(layer, BatchNormLayer) and adapter_name in layer.states:
                layer.combine(adapters, weights, into=adapter_name)

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self,
        combination_type: str,
        adapters: list[str],
        weights: list[float],
        new_rank: int,
        target: nn.Module,
        target_lora_A: Tensor,
        target_lora_B: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(target, ConvLoraLayer):
            return super()._svd_generalized_task_arithmetic_weighted_adapter(
                combination_type, adapters, weights, new_rank, target, target_lora_A, target_lora_B, *args, **kwargs
            )
        # PEFT factors matrices; it would take a kernel for a stack of them.
        matrices = SimpleNamespace(
            lora_A=target.lora_A,
            lora_embedding_A={},
            get_delta_weight=lambda name: target.get_delta_weight(name).flatten(1),
        )
        rank = min(new_rank, *target.weight.flatten(1).shape)
        lora_a, lora_b = super()._svd_generalized_task_arithmetic_weighted_adapter(
            combination_type, adapters, weights, rank, matrices, target_lora_A, target_lora_B, *args, **kwargs
        )
        missing = new_rank - rank
        lora_a, lora_b = F.pad(lora_a, (0, 0, 0, missing)), F.pad(lora_b, (0, missing))
        return lora_a.reshape(target_lora_A.shape), lora_b.reshape(target_lora_B.shape)


class ConvLoraMixedModel(_ConvLoraInjection, MixedModel):
    """The base of a `PeftMixedModel` that may hold ConvLoRA adapters beside PEFT's own."""
