"""BatchNorm as part of an adapter.

A shift of the inputs lives in the statistics of BatchNorm as much as in the weights, so an adapter that trains under
batch statistics and is saved without them is another model when it is loaded. Every adapter has its own.

Re-estimation of an adapter's BatchNorm statistics, without gradients.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from peft_edge.functional.batch_norm import frozen_batch_norm, synchronised_batch_norm
from peft_edge.lean.inplace_norm import is_overwritable
from peft_edge.lean.layers import LeanBatchNorm
from peft_edge.tuners.kernel_adapter import check_adapter_names

Norm = Literal["frozen", "recalibrate", "stats", "affine"]

_BatchNorm = nn.modules.batchnorm._BatchNorm
_PLAIN_FORWARDS = {cls.forward for cls in (nn.BatchNorm1d, nn.SyncBatchNorm, BatchNormAct2d, LeanBatchNorm)}
_NAMES = ("weight", "bias", "running_mean", "running_var")


class NormState(nn.Module):
    """What one adapter has of its own in a BatchNorm layer; None is the base layer's.

    Args:
        base: the BatchNorm layer, with C features.
        norm: see `peft_edge.ConvLoraConfig`. All but `"frozen"` hold `running_mean` and `running_var` of shape (C,) and
            `num_batches_tracked`; `"affine"` holds the parameters `weight` and `bias` of shape (C,) too.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor

    def __init__(self, base: _BatchNorm, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        # Running averages in half precision stop moving.
        copies = {
            name: value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
            for name in _NAMES
            if isinstance(value := getattr(base, name), Tensor)
        }
        has_statistics = norm != "frozen"
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, copies[name] if has_statistics else None)
        count = torch.zeros((), dtype=torch.long, device=copies["running_mean"].device) if has_statistics else None
        self.register_buffer("num_batches_tracked", count)
        for name in ("weight", "bias"):
            trains = norm == "affine" and name in copies
            self.register_parameter(name, nn.Parameter(copies[name]) if trains else None)


def check_batch_norm(norm: nn.Module, name: str) -> None:
    """Checks that a layer is batch normalisation and at most an activation.

    Args:
        norm: a BatchNorm layer.
        name: its name in the model.

    Raises:
        ValueError: if it is not, naming it.
    """
    if type(norm).forward not in _PLAIN_FORWARDS:
        raise ValueError(
            f"Cannot adapt layer {name!r}: {type(norm).__name__} is not a plain batch normalisation. "
            f"Leave it out with exclude_modules=[{name!r}]."
        )


def _trains(values: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)


_BASE = NormState(nn.BatchNorm1d(1), "frozen")


class BatchNormLayer(nn.Module, BaseTunerLayer):
    """A BatchNorm layer with statistics, and possibly weight and bias, for each adapter.

    The base layer never changes, also while training with adapters disabled. Statistics do not add up, so of several
    active adapters the last one's are used. Under several processes, batch statistics are those of the whole batch.
    A tuner's own class says in `adapter_layer_names` under which name the adapters' states are saved.

    Args:
        base_layer: `BatchNorm1d`, `2d`, `3d`, `SyncBatchNorm` or timm's `BatchNormAct2d`, with running statistics.
        adapter_name: the first adapter's name.
        config: its configuration, with a `norm`.
        target_name: the layer's name in the model, for error messages.
        **kwargs: for `update_layer`.

    Raises:
        ValueError: if the base layer computes something else than batch normalisation and an activation.
    """

    if TYPE_CHECKING:
        # torch declares every attribute set elsewhere a tensor or a module; PEFT's are dictionaries and methods.
        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: PeftConfig, target_name: str = "", **kwargs: Any
    ) -> None:
        super().__init__()
        self._wrap(base_layer)
        check_batch_norm(self.get_base_layer(), target_name)
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self._active_adapter = adapter_name
        self.estimating = False
        self._unmerged: dict[str, Tensor] | None = None
        self.update_layer(adapter_name, config=config, **kwargs)

    def _wrap(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []

    @property
    def states(self) -> nn.ModuleDict:
        """The `NormState` of every adapter, by its name."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def bias(self) -> None:
        """None: PEFT's `bias="..._only"` trains the biases of adapted layers, and this one's belongs to `norm`."""
        return None

    def update_layer(self, adapter_name: str, *args: Any, config: PeftConfig, **kwargs: Any) -> None:
        """Adds an adapter that starts from the base layer, or starts it anew."""
        state = NormState(self.get_base_layer(), config.norm)
        # The other adapters' requires_grad stays as the user has set it.
        state.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        if state.bias is not None and state.bias.requires_grad:
            # With `bias="all"` PEFT trains it, but it takes no part: several processes would wait for its gradient.
            self.get_base_layer().bias.requires_grad_(False)
        self.states[adapter_name] = state

    def _get(self, state: NormState, name: str) -> Any:
        own = getattr(state, name)
        return getattr(self.get_base_layer(), name) if own is None else own

    def _state(self, adapter: str) -> NormState:
        state = self.states[adapter] if adapter in self.states else _BASE  # noqa: SIM401 (a ModuleDict has no get)
        assert isinstance(state, NormState)
        return state

    def current_state(self) -> NormState:
        """What the layer normalises with now: the last active adapter's state, or an empty one for the base layer's."""
        if self.disable_adapters or self.merged:
            return _BASE
        return next((self._state(name) for name in reversed(self.active_adapters) if name in self.states), _BASE)

    def forward(self, x: Tensor, *, adapter_names: list[str] | None = None) -> Tensor:
        """Maps (B, C, *size) to the same shape.

        Args:
            x: the input.
            adapter_names: one adapter for each sample, `"__base__"` for none (evaluation only).
        """
        check_adapter_names(self, x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        base = self.get_base_layer()
        if adapter_names is not None and not self.disable_adapters:
            x = self._normalise_mixed_batch(x, adapter_names)
        else:
            x = self._normalise(x, self.current_state())
        return base.act(base.drop(x)) if isinstance(base, BatchNormAct2d) else x

    @property
    def keeps_input(self) -> bool:
        """Whether the layer's backward needs its input, as the layer is set now."""
        state = self.current_state()
        return self._is_by_batch(state) or _trains(self._values(state))

    def _is_by_batch(self, state: NormState) -> bool:
        return self.estimating or (self.training and state.norm in ("stats", "affine"))

    def _values(self, state: NormState) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Mean, variance, weight and bias, at the precision of the statistics."""
        mean, var = self._get(state, "running_mean"), self._get(state, "running_var")
        weight, bias = (self._get(state, name) for name in ("weight", "bias"))
        return mean, var, *(None if value is None else value.to(mean.dtype) for value in (weight, bias))

    def _normalise(self, x: Tensor, state: NormState) -> Tensor:
        values = self._values(state)
        base = self.get_base_layer()
        if not self._is_by_batch(state):
            if _trains(values) or torch.compiler.is_compiling():
                return F.batch_norm(x, *values, training=False, eps=base.eps)
            return frozen_batch_norm(x, *values, base.eps, inplace=is_overwritable(x, self))
        momentum = self._count_batch(state)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return synchronised_batch_norm(x, *values, momentum, base.eps)
        return F.batch_norm(x, *values, training=True, momentum=momentum, eps=base.eps)

    def _count_batch(self, state: NormState) -> float:
        """Counts a batch, and returns its share in the running averages."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            # Gradient checkpointing runs the forward again inside the backward: the batch is counted already.
            return 0.0
        state.num_batches_tracked.add_(1)
        momentum = None if self.estimating else self.get_base_layer().momentum
        return 1.0 / float(state.num_batches_tracked) if momentum is None else momentum

    def _normalise_mixed_batch(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        states = [self._state(name) for name in adapter_names]
        mean, var = (torch.stack([self._get(state, name) for state in states]) for name in _NAMES[2:])
        scale = torch.rsqrt(var + self.get_base_layer().eps)
        if self._get(_BASE, "weight") is not None:
            scale = scale * torch.stack([self._get(state, "weight").to(scale.dtype) for state in states])
        shift = -mean * scale
        if self._get(_BASE, "bias") is not None:
            shift = shift + torch.stack([self._get(state, "bias").to(scale.dtype) for state in states])
        shape = (*scale.shape, *[1] * (x.dim() - 2))
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)

    @torch.no_grad()
    def combine(self, adapter_names: list[str], weights: list[float], into: str) -> None:
        """Sets adapter `into` to the base layer plus the weighted changes of others (task arithmetic, 2212.04089)."""
        target = self._state(into)
        changes = [(self._state(name), weight) for name, weight in zip(adapter_names, weights, strict=True)]
        for name in _NAMES:
            own = getattr(target, name)
            if own is not None:
                base = self._get(_BASE, name)
                own.copy_(base + sum(weight * (self._get(state, name) - base) for state, weight in changes))
                if name == "running_var":
                    own.clamp_(min=0.0)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the last named adapter's statistics, weight and bias into the base layer.

        Args:
            safe_merge: check them for NaN and infinity before the base layer changes.
            adapter_names: what to merge, by default the active adapters.

        Raises:
            ValueError: if `safe_merge` finds a value that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.states]
        if not names:
            return
        base, state = self.get_base_layer(), self._state(names[-1])
        values = {name: getattr(state, name) for name in _NAMES if getattr(state, name) is not None}
        for name, value in values.items() if safe_merge else ():
            if not torch.isfinite(value).all():
                raise ValueError(f"NaNs detected in {name} of adapter {names[-1]}, which seems to be broken")
        if self._unmerged is None:
            self._unmerged = {
                name: getattr(base, name).detach().clone() for name in _NAMES if self._get(_BASE, name) is not None
            }
        self._set_base({**self._unmerged, **values})
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the base layer's own values back, bit for bit."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._set_base(self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def _set_base(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            getattr(self.get_base_layer(), name).copy_(value)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
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
            "recalibrate: no active adapter has BatchNorm statistics of its own. Pass a model with BatchNorm layers, "
            'adapted with norm="recalibrate", "stats" or "affine", and not merged.'
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
            raise ValueError("recalibrate: got no batch to estimate statistics from.")
    except BaseException:
        for state, values in zip(states, before, strict=True):
            state.load_state_dict(values)
        raise
    finally:
        for layer in layers:
            layer.estimating = False
        model.train(training)
