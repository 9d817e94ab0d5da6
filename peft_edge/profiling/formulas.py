"""What an operator costs, in floating-point operations, from the shapes of its tensors.

A multiply-add is two operations. Convolutions, matrix products and attention have torch's own formulas
(`torch.utils.flop_counter`), except for the backward of a convolution, which torch overcounts by the number of groups.
What torch tags as pointwise or as a reduction, and what is listed here, is elementwise: so many operations for each
element of the operator's largest tensor. Moving data (copies, views, indexing, selection) is no arithmetic, and what is
neither tagged nor listed (recurrent layers fused for the CPU, for example) counts none.

Before version 2.15, torch shows the derivatives of SiLU and Mish to whoever looks on as the operations that they are
made of: these count, and so do their results as memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

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
