"""BatchNorm as part of an adapter: each adapter has its own statistics, and optionally its own weight and bias.

A shift of the input distribution changes the BatchNorm statistics. An adapter that is trained with the new statistics
must be saved with these statistics. Without them, its accuracy after a change of contrast fell from 0.85 to 0.21.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftConfig
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from peft_edge._compat import BatchNorm, is_in_backward
from peft_edge.functional.batch_norm import frozen_batch_norm, synchronised_batch_norm
from peft_edge.lean.inplace_norm import is_overwritable
from peft_edge.tuners.adapted_layer import AdaptedLayer, check_plain, rows_by_adapter

Norm = Literal["frozen", "recalibrate", "stats", "affine"]

_TENSORS = ("running_mean", "running_var", "weight", "bias")


class NormState(nn.Module):
    """The tensors of one adapter that replace those of a BatchNorm layer with C features.

    In all modes `norm` except `"frozen"`, the buffers `running_mean` and `running_var` of shape (C,) and
    `num_batches_tracked` exist. In mode `"affine"`, copies of the layer's parameters `weight` and `bias` also exist. A
    tensor that does not exist is None, and the adapter uses the tensor of the layer.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    num_batches_tracked: Tensor

    def __init__(self, base: BatchNorm, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        # At least float32: running averages in half precision stop moving.
        copies = {
            name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            for name in _TENSORS
            if (tensor := getattr(base, name)) is not None
        }
        has_statistics = norm != "frozen"
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, copies[name] if has_statistics else None)
        count = torch.zeros((), dtype=torch.long, device=copies["running_mean"].device) if has_statistics else None
        self.register_buffer("num_batches_tracked", count)
        for name in ("weight", "bias"):
            is_trained = norm == "affine" and name in copies
            self.register_parameter(name, nn.Parameter(copies[name]) if is_trained else None)


_BASE_STATE = NormState(nn.BatchNorm1d(1), "frozen")  # has no tensors, so those of the base layer are used


class BatchNormLayer(AdaptedLayer):
    """A BatchNorm layer (torch's, or timm's `BatchNormAct2d`) with a `NormState` for each adapter.

    The base layer never changes, not even if the model is trained while its adapters are disabled. If several adapters
    are active, the state of the last one is used. In distributed training, batch statistics are computed over the
    batches of all processes. Each tuner has a subclass that sets `adapter_layer_names`, the key of the saved states.

    Raises:
        ValueError: If the base layer computes more than batch normalisation and an activation.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: PeftConfig, target_name: str = "", **kwargs: object
    ) -> None:
        super().__init__(base_layer)
        check_plain(self.get_base_layer(), target_name)
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self._active_adapter = adapter_name
        self.estimating = False
        self.update_layer(adapter_name, config=config, **kwargs)

    @property
    def states(self) -> nn.ModuleDict:
        """A dict from adapter names to their `NormState`."""
        return self._adapters

    @property
    def bias(self) -> None:
        """None, because PEFT's `bias="lora_only"` would train the bias. Here, `norm` determines the trained tensors."""
        return None

    def update_layer(self, adapter_name: str, *args: object, config: PeftConfig, **kwargs: object) -> None:
        """Add an adapter that starts with the base layer's values, or reset it to them."""
        state = NormState(self.get_base_layer(), config.norm)
        # Set this state only: the user may have changed requires_grad of the others.
        state.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        if state.bias is not None and state.bias.requires_grad:
            # PEFT's `bias="all"` makes the bias of the base layer trainable. That bias is unused, and
            # DistributedDataParallel would wait for its gradient.
            self.get_base_layer().bias.requires_grad_(False)
        self.states[adapter_name] = state

    def forward(self, x: Tensor, *, adapter_names: list[str] | None = None) -> Tensor:
        """Normalise x of shape (B, C, *size).

        `adapter_names` selects one adapter per sample, see `peft_edge.tuners.injection.pass_adapter_names`.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is None or self.disable_adapters:
            y = self._normalise(x, self.current_state())
        else:
            y = torch.empty_like(x)
            for adapter, rows in rows_by_adapter(adapter_names).items():
                y[rows] = self._normalise(x[rows], self._state(adapter))
        base = self.get_base_layer()
        return base.act(base.drop(y)) if isinstance(base, BatchNormAct2d) else y

    def current_state(self) -> NormState:
        """Return the state of the last active adapter, or a state without tensors if no adapter is active."""
        adapters = self._applied_adapters()
        return self._state(adapters[-1]) if adapters else _BASE_STATE

    @property
    def keeps_input(self) -> bool:
        """Whether autograd saves the input for the backward pass, with the present settings."""
        state = self.current_state()
        return self._uses_batch_statistics(state) or _requires_grad(self._tensors(state))

    def _state(self, adapter: str) -> NormState:
        state = self.states[adapter] if adapter in self.states else _BASE_STATE  # noqa: SIM401 (ModuleDict has no get)
        assert isinstance(state, NormState)
        return state

    def _uses_batch_statistics(self, state: NormState) -> bool:
        return self.estimating or (self.training and state.norm in ("stats", "affine"))

    def _tensor(self, state: NormState, name: str) -> Tensor:
        value = getattr(state, name)
        return getattr(self.get_base_layer(), name) if value is None else value

    def _tensors(self, state: NormState) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return mean, variance, weight and bias, the last two in the dtype of the mean."""
        mean, var, *affine = (self._tensor(state, name) for name in _TENSORS)
        weight, bias = (None if tensor is None else tensor.to(mean.dtype) for tensor in affine)
        return mean, var, weight, bias

    def _normalise(self, x: Tensor, state: NormState) -> Tensor:
        tensors, eps = self._tensors(state), self.get_base_layer().eps
        if self._uses_batch_statistics(state):
            momentum = self._count_batch(state)
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                return synchronised_batch_norm(x, *tensors, momentum, eps)
            return F.batch_norm(x, *tensors, training=True, momentum=momentum, eps=eps)
        if _requires_grad(tensors) or torch.compiler.is_compiling():
            return F.batch_norm(x, *tensors, training=False, eps=eps)
        return frozen_batch_norm(x, *tensors, eps, inplace=is_overwritable(x, self))

    def _count_batch(self, state: NormState) -> float:
        """Count a batch, and return its weight in the running averages."""
        if not torch.compiler.is_compiling() and is_in_backward():
            # Gradient checkpointing repeats the forward pass of a batch that has already been counted.
            return 0.0
        state.num_batches_tracked.add_(1)
        momentum = None if self.estimating else self.get_base_layer().momentum
        return 1.0 / float(state.num_batches_tracked) if momentum is None else momentum

    @torch.no_grad()
    def combine(self, adapter_names: list[str], weights: list[float], into: str) -> None:
        """Set adapter `into` to base + sum_i weights_i (adapter_i - base): task arithmetic (arXiv 2212.04089)."""
        target = self._state(into)
        states = [self._state(name) for name in adapter_names]
        for name in _TENSORS:
            if (own := getattr(target, name)) is not None:
                base = self._tensor(_BASE_STATE, name)
                changes = [w * (self._tensor(state, name) - base) for state, w in zip(states, weights, strict=True)]
                own.copy_(base + sum(changes))
        if target.running_var is not None:
            target.running_var.clamp_(min=0.0)

    def _merged_tensors(self, adapters: list[str]) -> dict[str, Tensor]:
        """Return the tensors of the last adapter, because the states of several adapters cannot be added."""
        state = self._state(adapters[-1])
        tensors = {name: self._base_tensor(name) for name in _TENSORS}
        tensors |= {name: tensor for name in _TENSORS if (tensor := getattr(state, name)) is not None}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _requires_grad(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Estimate the BatchNorm statistics of the active adapters on target images, by forward passes alone.

    The statistics become the averages over `batches`, as with `torch.optim.swa_utils.update_bn`. The differences: the
    base layer's statistics stay, weights do not change, dropout is off, and if a batch fails the old statistics are
    restored. With `norm="recalibrate"` the statistics are constant from then on, also in training mode.

    Args:
        model: Model with ConvLoRA or ConvAdapter adapters.
        batches: Inputs of the model, each (B, C, H, W) with B > 1, on the device of the model.

    Raises:
        ValueError: If no active adapter has its own statistics, or there is no batch.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_edge import ConvLoraConfig, recalibrate
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model = get_peft_model(network, ConvLoraConfig(target_modules="dense", norm="recalibrate"))
        >>> recalibrate(model, [torch.randn(4, 3, 8, 8) + 1 for _ in range(3)])
        >>> model.base_model.model[1].states["default"].num_batches_tracked
        tensor(3)
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, BatchNormLayer) and layer.current_state().running_mean is not None
    ]
    if not layers:
        raise ValueError(
            "recalibrate: no active adapter has BatchNorm statistics of its own. Pass an unmerged model with BatchNorm "
            'layers that are adapted with norm="recalibrate", "stats" or "affine".'
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
