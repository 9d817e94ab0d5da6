"""What an operator costs, in floating-point operations, from the shapes of its tensors.

A multiply-add is two operations. Convolutions, matrix products and attention have torch's own formulas
(`torch.utils.flop_counter`), except for the backward of a convolution, which torch overcounts by the number of groups.
What torch tags as pointwise or as a reduction, and what is listed here, is elementwise: so many operations for each
element of the operator's largest tensor. Moving data (copies, views, indexing, selection) is no arithmetic, and what is
neither tagged nor listed (recurrent layers fused for the CPU, for example) counts none.

Before version 2.15, torch shows the derivatives of SiLU and Mish to whoever looks on as the operations that they are
made of: these count, and so do their results as memory.

Floating-point operations of a training step: counted as torch counts, but right for grouped convolutions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from peft_edge.profiling.step import OPTIMIZER, Inputs, LossFn, StepLocation, ancestors, fake_copy, take_step

aten = torch.ops.aten
Formula = Callable[..., int]


def convolution_backward(
    grad_output: list[int],
    x: list[int],
    kernel: list[int],
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: list[bool],
    out_shape: Any = None,
) -> int:
    """The gradients of the input and of the kernel: each, where it is asked for, costs what the forward costs.

    Every product of an input element and a kernel element in the forward returns once in either gradient, whatever the
    groups, stride, dilation and padding.
    """
    forward = conv_flop_count(x, kernel, grad_output, transposed)
    return forward * (output_mask[0] + output_mask[1])


def _scaled_sum(*arguments: Any, alpha: float = 1, **options: Any) -> int:
    return 1 if alpha == 1 else 2


def _scaled_product(tensor: Any, factor: Any, other: Any, value: Any = 1, **options: Any) -> int:
    return 2 if value == 1 else 3


def _training_flag(position: int, *, training: int, evaluation: int) -> Formula:
    return lambda *arguments, **options: training if arguments[position] else evaluation


def _batch_norm_backward(*arguments: Any, **options: Any) -> int:
    training, (for_input, for_weight, for_bias) = arguments[7], arguments[9]
    # With fixed statistics the layer is x * scale + shift.
    return 10 if training else for_input + 4 * for_weight + for_bias


def _adam(*arguments: Any, weight_decay: float = 0.0, amsgrad: bool = False, decoupled: bool, **options: Any) -> int:
    return 13 + amsgrad + (0 if weight_decay == 0 else 1 if decoupled else 2)


def _sgd(*arguments: Any, weight_decay: float, momentum: float, nesterov: bool, **options: Any) -> int:
    return 2 + 2 * (weight_decay != 0) + 2 * (momentum != 0) + 2 * nesterov


def _vector_product(x: list[int], y: list[int], *arguments: Any, **options: Any) -> int:
    return 2 * prod(x)


def _added_vector_product(total: list[int], x: list[int], y: list[int], *arguments: Any, **options: Any) -> int:
    return 2 * prod(x)


def _added_products(total: list[int], x: list[int], y: list[int], *arguments: Any, **options: Any) -> int:
    return 2 * prod(x) * y[-1]


def _attention(query: list[int], key: list[int], value: list[int], *arguments: Any, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad_output: list[int], query: list[int], key: list[int], value: list[int], *arguments: Any, **options: Any
) -> int:
    return sdpa_backward_flop_count(grad_output, query, key, value)


PRODUCTS: dict[Any, Formula] = {
    aten.mv: _vector_product,
    aten.dot: _vector_product,
    aten.vdot: _vector_product,
    aten.addmv: _added_vector_product,
    aten.addbmm: _added_products,
    # The CPU's attention has none before version 2.15; it is that of other devices.
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Products that torch, or one of its versions, has no formula for."""

NORMALISATIONS: dict[str, int | Formula] = {
    # As fvcore counts them: mean, variance, shift and scale come to five in training.
    "native_batch_norm": _training_flag(5, training=5, evaluation=2),
    "_native_batch_norm_legit": _training_flag(5, training=5, evaluation=2),
    "_native_batch_norm_legit_no_training": 2,
    "_batch_norm_with_update": 5,
    "cudnn_batch_norm": _training_flag(5, training=5, evaluation=2),
    "native_batch_norm_backward": _batch_norm_backward,
    "cudnn_batch_norm_backward": 10,
    "native_group_norm": 5,
    "native_group_norm_backward": 10,
    "native_layer_norm": 5,
    "native_layer_norm_backward": 10,
}

# Operations for each element: what torch does not tag as pointwise or as a reduction, or what does more than one.
_OPERATIONS: dict[str, int | Formula] = {
    "add": _scaled_sum,
    "sub": _scaled_sum,
    "addcdiv": _scaled_product,
    "addcmul": _scaled_product,
    "lerp": 3,
    "std": 3,
    "std_mean": 3,
    "var": 3,
    "var_mean": 3,
    "_softmax": 5,
    "_softmax_backward_data": 4,
    "_log_softmax": 5,
    "_log_softmax_backward_data": 4,
    **dict.fromkeys(
        (
            "_adaptive_avg_pool2d",
            "_adaptive_avg_pool2d_backward",
            "_prelu_kernel",
            "_prelu_kernel_backward",
            "adaptive_max_pool2d",
            "adaptive_max_pool2d_backward",
            "avg_pool2d",
            "avg_pool2d_backward",
            "avg_pool3d",
            "avg_pool3d_backward",
            "binary_cross_entropy",
            "binary_cross_entropy_backward",
            "cumsum",
            "elu_backward",
            "embedding_dense_backward",
            "glu",
            "glu_backward",
            "hardsigmoid_backward",
            "hardswish",
            "hardswish_backward",
            "hardtanh_backward",
            "huber_loss",
            "huber_loss_backward",
            "leaky_relu_backward",
            "log_sigmoid_backward",
            "log_sigmoid_forward",
            "max_pool2d_with_indices",
            "max_pool2d_with_indices_backward",
            "max_pool3d_with_indices",
            "max_pool3d_with_indices_backward",
            "mish_backward",
            "mse_loss",
            "mse_loss_backward",
            "native_dropout",
            "nll_loss_forward",
            "smooth_l1_loss",
            "smooth_l1_loss_backward",
            "softplus_backward",
            "upsample_bicubic2d",
            "upsample_bicubic2d_backward",
            "upsample_bilinear2d",
            "upsample_bilinear2d_backward",
            "upsample_nearest2d_backward",
        ),
        1,
    ),
    **NORMALISATIONS,
}
_FUSED_OPTIMIZERS: dict[str, Formula] = {
    "_fused_adam": functools.partial(_adam, decoupled=False),
    "_fused_adamw": functools.partial(_adam, decoupled=True),
    "_fused_sgd": _sgd,
}
_MOVES = {"clone", "masked_fill", "where"}


@functools.cache
def elementwise_formulas() -> dict[Any, Formula]:
    """Returns the formula of every elementwise operator, in place or not, by its `torch.ops.aten` packet."""
    formulas: dict[Any, Formula] = {}
    for name in sorted({name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}):
        packet = getattr(aten, name.removeprefix("aten::"), None) if name.startswith("aten::") else None
        if packet is None:
            continue
        kind = name.removeprefix("aten::").removesuffix("_")
        if kind in _FUSED_OPTIMIZERS:
            formulas[packet] = _of_lists(_FUSED_OPTIMIZERS[kind])
        elif kind.startswith("_foreach_"):
            if (operations := _operations(kind.removeprefix("_foreach_"))) is not None:
                formulas[packet] = _of_lists(operations)
        elif (operations := _operations(kind)) is not None:
            formulas[packet] = _of_largest(operations)
    return formulas


def _operations(kind: str) -> int | Formula | None:
    """The operations for each element, None where an operator does no arithmetic."""
    if kind in _OPERATIONS:
        return _OPERATIONS[kind]
    packet = getattr(aten, kind, None)
    if packet is None or kind in _MOVES:
        return None
    tags = {tag for overload in packet.overloads() for tag in getattr(packet, overload).tags}
    return 1 if tags & {torch.Tag.pointwise, torch.Tag.reduction} else None


def _of_largest(operations: int | Formula) -> Formula:
    def formula(*arguments: Any, out_val: Any = None, **options: Any) -> int:
        per_element = operations(*arguments, **options) if callable(operations) else operations
        return per_element * max(_sizes((*arguments, out_val)), default=0)

    return _of_tensors(formula)


def _of_lists(operations: int | Formula) -> Formula:
    def formula(tensors: Any, *arguments: Any, out_val: Any = None, **options: Any) -> int:
        per_element = operations(tensors, *arguments, **options) if callable(operations) else operations
        return per_element * sum(_sizes(tensors))

    return _of_tensors(formula)


def _of_tensors(formula: Any) -> Formula:
    # What torch sets on formulas that take tensors, not shapes: taking the shapes out costs more than many operators.
    formula._get_raw = True
    return formula


def _sizes(values: Any) -> list[int]:
    sizes = []
    for value in values:
        if isinstance(value, Tensor):
            sizes.append(value.numel())
        elif isinstance(value, list | tuple):
            sizes += _sizes(value)
    return sizes


Accounting = Literal["exact", "source-study"]
ACCOUNTINGS = get_args(Accounting)
_NORMALISATIONS = {getattr(aten, name) for name in NORMALISATIONS if hasattr(aten, name)}


@dataclass(kw_only=True)
class Flops:
    """Floating-point operations of a step; a multiply-add is two."""

    forward: int = 0
    """Convolutions, matrix products and attention, in the forward pass and the loss."""

    backward: int = 0
    """The same in the backward pass, what checkpointing computes again included."""

    optimizer: int = 0
    """All arithmetic of the update: the optimizer's, and clipping and scaling of gradients."""

    elementwise_forward: int = 0
    """Activations, normalisation, pooling, sums: everything else of the forward pass."""

    elementwise_backward: int = 0
    """The same of the backward pass."""


@dataclass(kw_only=True)
class FlopCount(Flops):
    """Floating-point operations of a step in total, by module and by operator."""

    by_module: dict[str, Flops] = field(default_factory=dict, repr=False)
    """By name in `named_modules`, with what is inside of it; `""` is the model without the loss and the optimizer."""

    by_operator: dict[str, Flops] = field(default_factory=dict, repr=False)
    """By torch's name, such as `aten.convolution_backward`."""


class FlopCounter:
    """Counts the operations inside its `with` block: those of one step, if one step is taken there.

    Args:
        model: Whose modules are told apart.
        accounting: `exact`, or `source-study`, which counts as the profiler of the source study does (arXiv
            2507.23536): with torch's formula for the backward of a convolution, which is the number of groups times
            too high in the gradient of the kernel, and with the batch norms among the convolutions.

    Raises:
        ValueError: The accounting is neither.
    """

    def __init__(self, model: nn.Module, accounting: Accounting = "exact") -> None:
        if accounting not in ACCOUNTINGS:
            raise ValueError(f"accounting is {accounting!r}, expected one of {', '.join(ACCOUNTINGS)}")
        self._is_exact = accounting == "exact"
        corrected = {aten.convolution_backward: convolution_backward} if self._is_exact else {}
        self._mode = FlopCounterMode(display=False, custom_mapping={**elementwise_formulas(), **PRODUCTS, **corrected})
        # It has the interface of torch's tracker, which would not tell the phases apart.
        location: Any = StepLocation(model)
        self._mode.mod_tracker = location
        self._entered = ExitStack()

    def __enter__(self) -> FlopCounter:
        self._entered.enter_context(self._mode)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._entered.close()

    def result(self) -> FlopCount:
        """Returns what has been counted since the block was entered."""
        places: dict[Any, dict[Any, int]] = self._mode.flop_counts
        total = FlopCount()
        by_module: dict[str, Flops] = defaultdict(Flops)
        by_operator: dict[str, Flops] = defaultdict(Flops)
        for (phase, module), by_packet in places.items():
            for packet, flops in by_packet.items():
                is_main = phase == OPTIMIZER or self._is_main(packet)
                column = phase if is_main else f"elementwise_{phase}"
                modules = [by_module[name] for name in ancestors(module)]
                for entry in (total, by_operator[str(packet)], *modules):
                    setattr(entry, column, getattr(entry, column) + flops)
        return dataclasses.replace(total, by_module=dict(by_module), by_operator=dict(by_operator))

    def _is_main(self, packet: Any) -> bool:
        return packet not in elementwise_formulas() or (not self._is_exact and packet in _NORMALISATIONS)


def count_flops(
    model: nn.Module,
    inputs: Inputs,
    *,
    optimizer: Optimizer | None = None,
    loss_fn: LossFn | None = None,
    accounting: Accounting = "exact",
) -> FlopCount:
    """Counts the floating-point operations of one training step, without computing it.

    The step is that of a copy with fake tensors: the model, its statistics and the optimizer stay as they are. What is
    frozen costs no gradient of its kernel, and what comes before the first trained layer none of its input.

    Args:
        model: In the mode that it is trained in; a model without trained parameters has no backward pass.
        inputs: A tensor or a tuple for positional arguments, a mapping for keyword arguments.
        optimizer: Of the model's parameters; None to count none.
        loss_fn: From the model's output to a scalar; by default `output.loss`, or the mean of the output.
        accounting: See `FlopCounter`.

    Raises:
        ValueError: The accounting is unknown, the loss is no scalar, or model or optimizer need a tensor's values.
    """
    mode, model, optimizer, inputs = fake_copy(model, optimizer, inputs)
    counter = FlopCounter(model, accounting)
    with mode:
        if optimizer is not None and not optimizer.state:
            # The first step of many optimizers does less, because there is no state yet.
            take_step(model, inputs, optimizer, loss_fn)
        with counter:
            take_step(model, inputs, optimizer, loss_fn)
    return counter.result()
