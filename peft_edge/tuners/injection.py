"""Which layers of a model an adapter reaches: names, patterns and layer roles.

How our adapters get into a model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from peft_edge.roles import ROLES, modules_with_role
from peft_edge.tuners.norm import BatchNormLayer, check_batch_norm


class TargetModule(NamedTuple):
    """A module of the unadapted network, and where it hangs in the adapted one."""

    name: str
    """Its name in the unadapted network."""

    parent: nn.Module
    child_name: str

    module: nn.Module
    """What hangs there now: the module, or a tuner's layer around it."""

    base: Any
    """The module itself."""


def iter_target_modules(model: nn.Module, prefix: str = "") -> Iterator[TargetModule]:
    """Yields the modules of the unadapted network; what is saved whole, such as a new head, is left out.

    Args:
        model: any module tree, adapted or not.
        prefix: put before every name.
    """
    for child_name, child in model.named_children():
        if isinstance(child, AuxiliaryTrainingWrapper):
            continue
        base = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        yield TargetModule(f"{prefix}{child_name}", model, child_name, child, base)
        yield from iter_target_modules(base, f"{prefix}{child_name}.")


def iter_target_norms(config: PeftConfig, model: nn.Module) -> list[TargetModule]:
    """The BatchNorm layers with running statistics that `config` does not exclude."""
    return [
        site
        for site in iter_target_modules(model)
        if isinstance(site.base, nn.modules.batchnorm._BatchNorm)
        and site.base.running_mean is not None
        and not isinstance(check_target_module_exists(config, site.name), _ExcludedModule)
    ]


def resolve_roles(config: PeftConfig, model: nn.Module) -> None:
    """Replaces the roles in `config.target_modules` by the names of the modules that have them.

    Raises:
        NoMatchingPeftModuleError: if the model has no module of these roles.
        ValueError: if a target is a misspelt role.
    """
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
    by_layer = getattr(config, "layers_to_transform", None) is not None
    if by_layer:
        # PEFT takes a whole name as it is, and looks at the layer's number only where the end of a name matched.
        by_end = [name.rpartition(".")[2] for name in with_role]
        with_role &= set(_matches(replace(config, target_modules=by_end), keys))
    named = [target for target in config.target_modules if target not in roles]
    wanted = with_role.union(_matches(replace(config, target_modules=named), keys))
    config.target_modules = {*named, *with_role}
    if wanted != with_role.union(_matches(config, keys)):
        # A name without a dot, such as `conv1`, is to PEFT also the end of others: then only a pattern is exact.
        if by_layer:
            config.layers_to_transform = config.layers_pattern = None
        config.target_modules = "|".join(re.escape(name) for name in sorted(wanted))


def _refuse_misspelt_roles(config: PeftConfig, keys: list[str], ends: set[str]) -> None:
    """PEFT passes over a target that matches nothing as long as another one does."""
    if isinstance(config.target_modules, str):
        unknown = set() if _matches(config, keys) else {config.target_modules}
    else:
        unknown = set(config.target_modules or ()) - {*ROLES, *keys, *ends}
    for target in sorted(unknown):
        if close := difflib.get_close_matches(target, ROLES, n=1, cutoff=0.8):
            raise ValueError(f"target_modules: {target!r} is no layer role and no module; did you mean {close[0]!r}?")


def _matches(config: PeftConfig, keys: list[str]) -> list[str]:
    return [key for key in keys if check_target_module_exists(config, key)]


def hint(config: PeftConfig, model: nn.Module) -> str:
    """What the user may have meant where nothing matched."""
    targets = config.target_modules or []
    names = [name for name, _ in model.named_modules() if name]
    known = [*ROLES, *{name.rpartition(".")[2] for name in names}, *names]
    wanted = [targets] if isinstance(targets, str) else sorted(set(targets) - set(known))
    close = [match for target in wanted for match in difflib.get_close_matches(target, known, n=1)]
    question = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"Found target_modules={config.target_modules}; the layer roles are {', '.join(ROLES)}.{question}"


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
        norms = iter_target_norms(config, model)
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
