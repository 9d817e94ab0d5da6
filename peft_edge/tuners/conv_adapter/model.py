"""Model of ConvAdapter: inject adapters into a network, and merge the adapters that can be merged."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from peft_edge._compat import BatchNorm
from peft_edge.roles import is_convolution
from peft_edge.tuners.adapted_layer import AdaptedLayer, check_plain
from peft_edge.tuners.conv_adapter.config import ConvAdapterConfig
from peft_edge.tuners.conv_adapter.layer import AdapterBatchNormLayer, ConvAdapterLayer, ConvSpec
from peft_edge.tuners.injection import Injection, iter_target_modules, pass_adapter_names
from peft_edge.tuners.norm import BatchNormLayer


class ConvAdapterModel(Injection):
    """A network with ConvAdapter adapters, made by `get_peft_model`. The arguments are those of `peft.LoraModel`.

    Raises:
        NoMatchingPeftModuleError: If no module matches `target_modules`.
        ValueError: If a matching module cannot be adapted.

    Example:
        >>> from peft_edge import ConvAdapterConfig, ConvAdapterModel
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> model = ConvAdapterModel(network, ConvAdapterConfig(target_modules="dense", norm="frozen"), "default")
        >>> type(model.model[0]).__name__, type(model.model[1]).__name__
        ('ConvAdapterLayer', 'AdapterBatchNormLayer')
        >>> type(model.merge_and_unload()[0])
        <class 'torch.nn.modules.conv.Conv2d'>
    """

    prefix = "conv_adapter_"
    # This model has no layers of other tuners, so PEFT can find its layers by the base class of all tuner layers.
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    config_class = ConvAdapterConfig

    def _check_targets(self, config: PeftConfig, model: nn.Module) -> None:
        targets = [target for target in iter_target_modules(model) if check_target_module_exists(config, target.name)]
        names = [target.name for target in targets]
        for inner in names:
            if outer := next((name for name in names if inner.startswith(f"{name}.")), None):
                raise ValueError(f"target_modules: {inner!r} is a part of {outer!r}; adapt one of the two.")
        for target in targets:
            if is_convolution(target.base):
                check_plain(target.base, target.name)
            elif target.module is target.base:
                ConvSpec.of_block(target.base, target.name)
        if len(self.peft_config) > 1:
            # An adapted block is wrapped in a layer, which changes the names of all parameters inside the block. If
            # another adapter inside this block were saved under these names, it could not be loaded into a network in
            # which the block is not adapted.
            new = {target.name for target in targets if not is_convolution(target.base)}
            adapted = (target for target in iter_target_modules(model) if isinstance(target.module, ConvAdapterLayer))
            old = {target.name for target in adapted if not is_convolution(target.base)}
            if old != new:
                raise ValueError(
                    f"target_modules: the adapters of this model adapt the blocks {sorted(old)}, the new one adapts "
                    f"{sorted(new)}. Adapt the same blocks, or add the new adapter to another copy of the network."
                )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: object,
    ) -> None:
        if isinstance(target, ConvAdapterLayer | BatchNormLayer):
            target.update_layer(adapter_name, config=peft_config)
            return
        layer_cls = AdapterBatchNormLayer if isinstance(target, BatchNorm) else ConvAdapterLayer
        layer: AdaptedLayer = layer_cls(target, adapter_name, config=peft_config, target_name=current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _enable_peft_forward_hooks(
        self, *args: object, adapter_names: list[str] | None = None, **kwargs: object
    ) -> AbstractContextManager[None]:
        return pass_adapter_names(self, adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        # PEFT does not look inside an adapted block, so it does not find the block's adapted norms.
        for _, parent, child_name, module, base in list(iter_target_modules(model)):
            if isinstance(module, BatchNormLayer):
                self._replace_module(parent, child_name, base, module)
        return model

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        self._check_mergeable(adapter_names)
        super()._check_merge(adapter_names, safe_merge)

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        for target in iter_target_modules(self.model):
            layer = target.module
            if not isinstance(layer, ConvAdapterLayer):
                continue
            for adapter in names:
                reason = layer.why_not_mergeable(adapter) if adapter in layer.placement else None
                if reason is not None:
                    raise NotImplementedError(
                        f"Cannot merge adapter {adapter!r} into layer {target.name!r}: {reason}. Use the adapter "
                        'unmerged, or train an adapter with placement="parallel", activation=None and '
                        "kernel_size=None on ungrouped convolutions."
                    )
