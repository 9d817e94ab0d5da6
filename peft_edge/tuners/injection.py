"""How our adapters get into a model."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from peft_edge.tuners.norm import BatchNormLayer, check_batch_norm
from peft_edge.tuners.targets import hint, norm_sites, resolve_roles


class Injection(BaseTuner):
    """PEFT's injection, with layer roles resolved before and BatchNorm layers adapted after it."""

    config_class: type[PeftConfig]
    """The configuration whose adapters are injected so; a mixed model holds others too."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, for roles and norms too.

        PEFT would not know the difference between a layer that the user named and a BatchNorm layer that comes along.

        Raises:
            NoMatchingPeftModuleError: if no module matches.
            ValueError: if a matching module cannot be adapted; nothing is changed then.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, self.config_class):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        # First, so that a configuration without target_modules gets PEFT's defaults for the model, or PEFT's error.
        self._prepare_adapter_config(config, self.get_model_config(model))
        resolve_roles(config, model)
        norms = norm_sites(config, model)
        for site in norms:
            check_batch_norm(site.base, site.name)
        self._check_targets(config, model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(f"{error} {hint(config, model)}") from error
        for site in norms:
            # A norm that the user named has been adapted with the rest.
            layer = getattr(site.parent, site.child_name)
            self._create_and_replace(config, adapter_name, layer, site.child_name, site.parent, current_key=site.name)
            if not isinstance(layer, BatchNormLayer):
                layer = getattr(site.parent, site.child_name)
                layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check_targets(self, config: Any, model: nn.Module) -> None:
        """Checks that every layer that `config` targets can be adapted.

        Raises:
            ValueError: if one cannot, naming it.
        """
        raise NotImplementedError

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, BatchNormLayer):
            # PEFT moves the new layer to its base weight's device, which a BatchNorm may lack; ours is there already.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)
        # A model in eval mode must not start to drop out and to normalise by the batch.
        new_module.train(child.training)
