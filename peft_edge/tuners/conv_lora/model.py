"""How ConvLoRA adapters get into a model."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from peft import PeftType
from peft.config import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper, _get_submodules
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from peft_edge.roles import ROLES, Convolution, modules_with_role
from peft_edge.tuners.conv_lora.config import ConvLoraConfig
from peft_edge.tuners.conv_lora.layer import ConvLoraLayer, check_convolution, check_rank
from peft_edge.tuners.conv_lora.norm import BatchNormLayer, check_batch_norm


class _ConvLoraInjection(BaseTuner):
    """What ConvLoRA adds to PEFT's injection of LoRA, for models of this tuner alone and for mixed ones."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, with roles resolved before and BatchNorm layers adapted after it.

        PEFT would not know the difference between a layer that the user named and a BatchNorm layer that comes along.

        Raises:
            NoMatchingPeftModuleError: if no module matches.
            ValueError: if a matching module cannot be adapted; nothing is changed then.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, ConvLoraConfig):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        # First, so that a configuration without target_modules gets PEFT's defaults for the model, or PEFT's error.
        self._prepare_adapter_config(config, self.get_model_config(model))
        _resolve_roles(config, model)
        norms = _norm_names(config, model)
        _check_layers(config, model, norms)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(f"{error} {_hint(config, model)}") from error
        for name in norms:
            parent, target, target_name = _get_submodules(model, name)
            is_new = not isinstance(target, BatchNormLayer)
            self._create_and_replace(config, adapter_name, target, target_name, parent, current_key=name)
            if is_new:
                getattr(parent, target_name).set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, BatchNormLayer):
            # PEFT moves the new layer to its base weight's device, which a BatchNorm may lack; ours is there already.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)
        # A model in eval mode must not start to drop out and to normalise by the batch.
        new_module.train(child.training)


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

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As PEFT's; the new adapter's BatchNorm state is the base model's plus the weighted changes."""
        if adapter_name in self.peft_config:
            return
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        for layer in self.modules():
            if isinstance(layer, BatchNormLayer) and adapter_name in layer.lora_norm:
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


def _base_layer(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _norm_names(config: ConvLoraConfig, model: nn.Module) -> list[str]:
    """The BatchNorm layers with running statistics that are neither excluded nor a part of something saved whole."""
    names: list[str] = []
    within: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(within):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            within += (f"{name}.",)
        base = _base_layer(module)
        is_excluded = isinstance(check_target_module_exists(config, name), _ExcludedModule)
        if isinstance(base, nn.modules.batchnorm._BatchNorm) and base.running_mean is not None and not is_excluded:
            names.append(name)
    return names


def _check_layers(config: ConvLoraConfig, model: nn.Module, norms: list[str]) -> None:
    for name, module in model.named_modules():
        base = _base_layer(module)
        if name in norms:
            check_batch_norm(base, name)
        elif isinstance(base, Convolution) and check_target_module_exists(config, name):
            check_convolution(base, name)
            pattern = get_pattern_key(config.rank_pattern.keys(), name)
            check_rank(config.rank_pattern.get(pattern, config.r), name)


def _resolve_roles(config: ConvLoraConfig, model: nn.Module) -> None:
    """Replaces the roles in `config.target_modules` by the names of the modules that have them."""
    keys = [name for name, _ in model.named_modules() if name]
    ends = {key.rpartition(".")[2] for key in keys}
    _refuse_misspelt_roles(config, keys, ends)
    if config.target_modules is None or isinstance(config.target_modules, str):
        return
    roles = set(config.target_modules) & set(ROLES) - ends
    if not roles:
        return
    with_role = {name for role in roles for name in modules_with_role(model, role)}
    if not with_role and roles == set(config.target_modules):
        raise NoMatchingPeftModuleError(
            f"Target modules {sorted(roles)} not found in the base model: {type(model).__name__} has no such "
            "convolution. Choose another role, or name the modules."
        )
    if config.layers_to_transform is not None:
        # PEFT takes a whole name as it is, and looks at the layer's number only where the end of a name matched.
        by_end = [name.rpartition(".")[2] for name in with_role]
        with_role &= set(_matches(replace(config, target_modules=by_end), keys))
    named = [target for target in config.target_modules if target not in roles]
    wanted = with_role.union(_matches(replace(config, target_modules=named), keys))
    config.target_modules = {*named, *with_role}  # type: ignore[assignment]
    if wanted != with_role.union(_matches(config, keys)):
        # A name without a dot, such as `conv1`, is to PEFT also the end of others: then only a pattern is exact.
        config.layers_to_transform = config.layers_pattern = None
        config.target_modules = "|".join(re.escape(name) for name in sorted(wanted))


def _refuse_misspelt_roles(config: ConvLoraConfig, keys: list[str], ends: set[str]) -> None:
    """PEFT passes over a target that matches nothing as long as another one does."""
    if isinstance(config.target_modules, str):
        unknown = set() if _matches(config, keys) else {config.target_modules}
    else:
        unknown = set(config.target_modules or ()) - {*ROLES, *keys, *ends}
    for target in sorted(unknown):
        if close := difflib.get_close_matches(target, ROLES, n=1, cutoff=0.8):
            raise ValueError(f"target_modules: {target!r} is no layer role and no module; did you mean {close[0]!r}?")


def _matches(config: ConvLoraConfig, keys: list[str]) -> list[str]:
    return [key for key in keys if check_target_module_exists(config, key)]


def _hint(config: ConvLoraConfig, model: nn.Module) -> str:
    """What the user may have meant where nothing matched."""
    targets = config.target_modules or []
    names = [name for name, _ in model.named_modules() if name]
    known = [*ROLES, *{name.rpartition(".")[2] for name in names}, *names]
    wanted = [targets] if isinstance(targets, str) else sorted(set(targets) - set(known))
    close = [match for target in wanted for match in difflib.get_close_matches(target, known, n=1)]
    question = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"Found target_modules={config.target_modules}; the layer roles are {', '.join(ROLES)}.{question}"
