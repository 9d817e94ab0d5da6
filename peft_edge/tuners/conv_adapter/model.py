"""How ConvAdapter adapters get into a model, and out of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from peft_edge.roles import Convolution
from peft_edge.tuners.conv_adapter.config import ConvAdapterConfig
from peft_edge.tuners.conv_adapter.layer import AdapterBatchNormLayer, ConvAdapterLayer, Geometry
from peft_edge.tuners.injection import Injection, TargetModule, iter_target_modules
from peft_edge.tuners.kernel_adapter import adapter_names_for_layers, check_convolution
from peft_edge.tuners.norm import BatchNormLayer


class ConvAdapterModel(Injection):
    """A model with ConvAdapter adapters, as `get_peft_model` and `PeftModel.from_pretrained` build it.

    Args:
        model: the model to adapt.
        peft_config: a `ConvAdapterConfig`, or several by adapter name.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the adapter's weights on the meta device, to be loaded afterwards.

    Raises:
        NoMatchingPeftModuleError: if no module matches `target_modules`.
        ValueError: if a matching one cannot be adapted.
    """

    prefix = "conv_adapter_"
    # Two kinds of layers, convolutions and norms, and nobody else's are in the model.
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    config_class = ConvAdapterConfig

    def _check_targets(self, config: ConvAdapterConfig, model: nn.Module) -> None:
        targets = [site for site in iter_target_modules(model) if check_target_module_exists(config, site.name)]
        names = [site.name for site in targets]
        for inner in names:
            if outer := next((name for name in names if inner.startswith(f"{name}.")), None):
                raise ValueError(f"target_modules: {inner!r} is a part of {outer!r}; adapt one of the two.")
        for site in targets:
            if isinstance(site.base, Convolution):
                check_convolution(site.base, site.name)
            elif site.module is site.base:
                Geometry.of_block(site.base, site.name)
        if len(self.peft_config) > 1:
            self._check_blocks({site.name for site in targets if not isinstance(site.base, Convolution)}, model)

    def _check_blocks(self, blocks: set[str], model: nn.Module) -> None:
        """The names of what an adapter saves hold the blocks that are wrapped, so these cannot differ."""
        wrapped = {site.name for site in iter_target_modules(model) if _is_adapted_block(site)}
        if wrapped != blocks:
            raise ValueError(
                f"target_modules: the adapters of this model adapt the blocks {sorted(wrapped)}, the new one adapts "
                f"{sorted(blocks)}. Adapt the same blocks, or give the new adapter a model of its own."
            )

    def _create_and_replace(
        self,
        peft_config: ConvAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, ConvAdapterLayer | BatchNormLayer):
            target.update_layer(adapter_name, config=peft_config)
            return
        is_norm = isinstance(target, nn.modules.batchnorm._BatchNorm)
        layer_cls = AdapterBatchNormLayer if is_norm else ConvAdapterLayer
        layer = layer_cls(target, adapter_name, config=peft_config, target_name=current_key)
        if adapter_name not in self.active_adapters:
            # Adding an adapter does not start its training.
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT moves the new layer to its base weight's device, which a block lacks; ours is there already.
        setattr(parent, child_name, new_module)
        new_module.train(child.training)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return adapter_names_for_layers(self, kwargs.pop("adapter_names", None))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's.

        Raises:
            NotImplementedError: if an adapter cannot be merged into one of its layers; nothing is changed then.
        """
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        # PEFT does not look inside an adapted layer, and a block holds adapted norms.
        for site in list(iter_target_modules(model)):
            if isinstance(site.module, BatchNormLayer):
                self._replace_module(site.parent, site.child_name, site.base, site.module)
        return model

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        for site in iter_target_modules(self.model):
            if not isinstance(site.module, ConvAdapterLayer):
                continue
            for adapter in names:
                reason = site.module.why_not_mergeable(adapter) if adapter in site.module.placement else None
                if reason is not None:
                    raise NotImplementedError(
                        f"Cannot merge adapter {adapter!r} into layer {site.name!r}: {reason}. Keep the adapter beside "
                        'the layer, or train one with placement="parallel", activation=None and kernel_size=None on '
                        "ungrouped convolutions."
                    )


def _is_adapted_block(site: TargetModule) -> bool:
    return isinstance(site.module, ConvAdapterLayer) and not isinstance(site.base, Convolution)
