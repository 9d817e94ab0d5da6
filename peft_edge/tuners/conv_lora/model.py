"""Models of ConvLoRA: PEFT's `LoraModel` and `MixedModel` with the layers of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftType
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import Tensor, nn

from peft_edge.roles import is_convolution
from peft_edge.tuners.adapted_layer import add_changes, check_plain
from peft_edge.tuners.conv_lora.config import ConvLoraConfig
from peft_edge.tuners.conv_lora.layer import ConvLoraLayer, check_rank
from peft_edge.tuners.injection import Injection, iter_target_modules, pass_adapter_names
from peft_edge.tuners.norm import BatchNormLayer


class _ConvLoraInjection(Injection):
    config_class = ConvLoraConfig

    def _check_targets(self, config: PeftConfig, model: nn.Module) -> None:
        for name, *_, base in iter_target_modules(model):
            if is_convolution(base) and check_target_module_exists(config, name):
                check_plain(base, name)
                pattern = get_pattern_key(config.rank_pattern.keys(), name)
                check_rank(config.rank_pattern.get(pattern, config.r), name)

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        # PEFT rejects layers that Mamba's fused kernels would bypass, but only for LORA and some other PEFT types. Pass
        # the type LORA, so that PEFT also checks the layers of this tuner.
        super()._check_target_module_compatiblity(SimpleNamespace(peft_type=PeftType.LORA), model, target_name)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        # PEFT unfreezes `layer.bias`. If the adapter has `lora_bias=True`, `layer.bias` is a computed copy. Therefore,
        # also unfreeze the bias of the base layer itself.
        if any(getattr(self.peft_config[name], "bias", "none") == "lora_only" for name in self.active_adapters):
            for layer in model.modules():
                if isinstance(layer, ConvLoraLayer) and layer.get_base_layer().bias is not None:
                    layer.get_base_layer().bias.requires_grad_(True)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        *args: object,
        **kwargs: object,
    ) -> None:
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, *args, **kwargs)
        if isinstance(peft_config, ConvLoraConfig) and peft_config.freeze_a:
            layer = getattr(parent, target_name)
            layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: ("lora_A",)}
            layer._freeze_non_trainable_peft_weights(adapter_name)


class ConvLoraModel(_ConvLoraInjection, LoraModel):
    """A network with ConvLoRA adapters, made by `get_peft_model`. It has the methods of `peft.LoraModel`.

    Raises:
        NoMatchingPeftModuleError: If no module matches `target_modules`.
        ValueError: If a matching module cannot be adapted.

    Example:
        >>> from peft_edge import ConvLoraConfig, ConvLoraModel
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8))
        >>> model = ConvLoraModel(network, ConvLoraConfig(r=2, target_modules="depthwise"), "default")
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['model.2.lora_A.default.weight', 'model.2.lora_B.default.weight']
        >>> type(model.merge_and_unload()[2])
        <class 'torch.nn.modules.conv.Conv2d'>
    """

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: object, adapter_names: list[str] | None = None, **kwargs: object
    ) -> Iterator[None]:
        with super()._enable_peft_forward_hooks(*args, **kwargs), pass_adapter_names(self, adapter_names):
            yield

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: object, **kwargs: object
    ) -> None:
        """Combine adapters into a new adapter: A and B with PEFT's method, all other tensors by task arithmetic.

        The other tensors are BatchNorm tensors, DoRA's magnitudes, the biases of B (`lora_bias=True`), and the tensors
        of modules in `modules_to_save`. (PEFT refuses to combine adapters with `modules_to_save`.) Task arithmetic
        (Ilharco et al. 2023, arXiv 2212.04089) sets a tensor to base + the sum of weights[i] * (tensor of adapters[i] -
        base), where base is the tensor of the base model. If `adapter_name` already exists, nothing changes.

        Raises:
            ValueError: If PEFT rejects the arguments, or if the tensors of a module in `modules_to_save` have different
                shapes in different adapters.
        """
        if adapter_name in self.peft_config:
            return
        wrappers = [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]
        for wrapper in wrappers:
            shapes = [
                {key: tuple(tensor.shape) for key, tensor in wrapper.modules_to_save[name].state_dict().items()}
                for name in adapters
                if name in wrapper.modules_to_save
            ]
            if any(other != shapes[0] for other in shapes):
                raise ValueError(
                    f"Cannot combine the adapters {', '.join(adapters)}: their modules in modules_to_save differ in "
                    f"shape: {shapes}. Combine adapters whose heads were trained for the same classes."
                )
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        for layer in self.modules():
            if isinstance(layer, BatchNormLayer) and adapter_name in layer.states:
                layer.combine(adapters, weights, into=adapter_name)
            elif isinstance(layer, LoraLayer) and adapter_name in layer.lora_A:
                _combine_rest(layer, adapters, weights, into=adapter_name)
        for wrapper in wrappers:
            if adapter_name in wrapper.modules_to_save:
                _combine_saved(wrapper, adapters, weights, into=adapter_name)

    def _check_add_weighted_adapter(
        self, adapters: list[str], combination_type: str, svd_rank: int | None
    ) -> tuple[str, int, str]:
        # PEFT's check rejects adapters that have the same module in `modules_to_save`. Call the check with a model that
        # contains no modules, so that it finds none to reject.
        without_modules = SimpleNamespace(peft_config=self.peft_config, modules=tuple)
        return LoraModel._check_add_weighted_adapter(without_modules, adapters, combination_type, svd_rank)

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self, combination_type: str, adapters: list[str], weights: list[float], new_rank: int, target: nn.Module,
        target_lora_A: Tensor, target_lora_B: Tensor, *args: object, **kwargs: object,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        svd = super()._svd_generalized_task_arithmetic_weighted_adapter
        targets = target_lora_A, target_lora_B
        if not isinstance(target, ConvLoraLayer):
            return svd(combination_type, adapters, weights, new_rank, target, *targets, *args, **kwargs)
        # PEFT's SVD would treat a 4-D kernel as a stack of matrices. Pass the kernel update as one matrix, and reshape
        # the results.
        as_matrix = SimpleNamespace(
            lora_A=target.lora_A,
            lora_embedding_A={},
            get_delta_weight=lambda name: target.get_delta_weight(name).flatten(1),
        )
        rank = min(new_rank, *target.get_base_layer().weight.flatten(1).shape)
        lora_a, lora_b = svd(combination_type, adapters, weights, rank, as_matrix, *targets, *args, **kwargs)
        missing = new_rank - rank
        lora_a, lora_b = F.pad(lora_a, (0, 0, 0, missing)), F.pad(lora_b, (0, missing))
        return lora_a.reshape(target_lora_A.shape), lora_b.reshape(target_lora_B.shape)


@torch.no_grad()
def _combine_rest(layer: LoraLayer, adapters: list[str], weights: list[float], into: str) -> None:
    """Complete the adapter `into`, in which PEFT has already combined A and B of `adapters`.

    PEFT has combined A and B as if the scale of `into` were 1. The scale may differ from 1, so this function divides A
    by the scale. It also combines the biases of B and DoRA's magnitudes. Some of `adapters` may not adapt this layer.
    """
    scale, found = (
        layer.scaling[into],
        [(name, w) for name, w in zip(adapters, weights, strict=True) if name in layer.r],
    )
    layer.lora_A[into].weight.div_(scale)  # with `use_rslora`, the scale is the square root of the new rank
    if layer.lora_bias[into]:
        bias = layer.lora_B[into].bias
        changes = (w * layer.scaling[name] * layer.lora_B[name].bias for name, w in found if layer.lora_bias[name])
        bias.copy_(sum(changes, torch.zeros_like(bias)) / scale)
    if into in layer.lora_magnitude_vector:
        magnitudes = layer.lora_magnitude_vector
        base = layer.get_base_layer().weight.flatten(1).norm(dim=1)
        base = base.reshape(magnitudes[into].weight.shape).to(magnitudes[into].weight)
        trained = [(magnitudes[name].weight, w) for name, w in found if name in magnitudes]
        magnitudes[into].weight.copy_(add_changes(base, [value for value, _ in trained], [w for _, w in trained]))


@torch.no_grad()
def _combine_saved(wrapper: ModulesToSaveWrapper, adapters: list[str], weights: list[float], into: str) -> None:
    """Combine copies of a module in `modules_to_save` by task arithmetic.

    Each adapter has its own copy of the module in `wrapper`. The result is written to the copy of the adapter `into`.
    Adapters without a copy are ignored.
    """
    found = [
        (wrapper.modules_to_save[name], w)
        for name, w in zip(adapters, weights, strict=True)
        if name in wrapper.modules_to_save
    ]
    states, own = [module.state_dict() for module, _ in found], wrapper.modules_to_save[into].state_dict()
    for key, base in wrapper.original_module.state_dict().items():
        if base.is_floating_point():
            own[key].copy_(add_changes(base, [state[key] for state in states], [w for _, w in found]))


class ConvLoraMixedModel(_ConvLoraInjection, MixedModel):
    """The `base_model` of a `PeftMixedModel`. It may contain adapters of ConvLoRA and of other PEFT tuners."""
