"""Count the floating-point operations of a training step.

A multiply-add is two operations. Convolutions, matrix products and attention use the formulas of
`torch.utils.flop_counter`, except for the backward pass of a convolution, because torch overcounts the gradient of a
grouped kernel by the number of groups. The operators in `_PER_ELEMENT`, and those that torch tags as pointwise or
reduction, are elementwise. The FLOPs of an elementwise operator are a number of operations per element, times the
number of elements of its largest tensor. All other operators count as zero FLOPs. Examples are copies, views, indexing,
selection, and the fused recurrent layers of the CPU, because torch does not tag these layers.

Before torch 2.15, the derivatives of SiLU and Mish run, and are counted, as several operators.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from peft_edge._compat import RAW_FORMULA, operator_names
from peft_edge.profiling.step import OPTIMIZER, Inputs, LossFn, StepLocation, ancestors, fake_copy, take_step

Accounting = Literal["exact", "source-study"]
ACCOUNTINGS = get_args(Accounting)


@dataclass(kw_only=True)
class Flops:
    """Floating-point operations of a step. A multiply-add is two operations.

    >>> layer = nn.Conv2d(3, 8, 3, bias=False)  # 6 x 6 output positions, 8 * 27 multiply-adds each
    >>> count_flops(layer, torch.empty(1, 3, 8, 8)).by_module[""]
    Flops(forward=15552, backward=15552, optimizer=0, elementwise_forward=0, elementwise_backward=0)
    """

    forward: int = 0
    """FLOPs of convolutions, matrix products and attention in the forward pass and the loss."""
    backward: int = 0
    """FLOPs of convolutions, matrix products and attention in the backward pass.

    They include the forward passes that gradient checkpointing repeats there.
    """
    optimizer: int = 0
    """FLOPs of all operators of the update: the optimizer, and the clipping and scaling of gradients."""
    elementwise_forward: int = 0
    """FLOPs of elementwise operators, such as activations, pooling and sums, in the forward pass and the loss."""
    elementwise_backward: int = 0
    """FLOPs of elementwise operators in the backward pass."""


@dataclass(kw_only=True)
class FlopCount(Flops):
    """Floating-point operations of a step in total, by module and by operator.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    >>> counts = count_flops(model, torch.empty(1, 3, 8, 8))
    >>> counts.by_module["2"].backward / counts.by_module["2"].forward
    2.0
    >>> counts.by_operator["aten.convolution"].forward == counts.forward
    True
    """

    by_module: dict[str, Flops] = field(default_factory=dict, repr=False)
    """The FLOPs of each module and its submodules, by module name. Modules without counted operators are missing.

    The entry `""` is the whole model, without the loss and the optimizer.
    """
    by_operator: dict[str, Flops] = field(default_factory=dict, repr=False)
    """The FLOPs of each operator, by names such as `aten.convolution_backward`."""


def count_flops(
    model: nn.Module,
    inputs: Inputs,
    *,
    optimizer: Optimizer | None = None,
    loss_fn: LossFn | None = None,
    accounting: Accounting = "exact",
) -> FlopCount:
    """Count the floating-point operations of one training step from shapes alone.

    The step runs on a copy with fake tensors, so the model, its statistics and the optimizer are unchanged. Gradients
    that autograd does not compute are not counted, such as the gradient of a frozen kernel. If the optimizer has no
    state, an uncounted first step creates the state.

    >>> model = nn.Sequential(nn.Linear(4, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    >>> count_flops(model, torch.empty(5, 4), optimizer=optimizer)
    FlopCount(forward=480, backward=160, optimizer=36, elementwise_forward=50, elementwise_backward=20)

    Args:
        model: The model, in train or eval mode. The backward pass is omitted if the loss requires no gradient.
        inputs: The inputs of the model: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        optimizer: The optimizer of the model's parameters. If it is None, the step ends without an update.
        loss_fn: Function that maps the model's output to a scalar. None means the default loss of `take_step`.
        accounting: See `FlopCounter`.

    Raises:
        ValueError: If the accounting is unknown, if the loss is not a scalar, if the default loss finds no tensor in
            the output, if the step reads the value of a tensor, or if the model or the optimizer cannot be copied.
    """
    mode, model, optimizer, inputs = fake_copy(model, optimizer, inputs)
    counter = FlopCounter(model, accounting)
    with mode:
        if optimizer is not None and not optimizer.state:
            # In the first step, many optimizers have no state yet, so this step needs fewer operations than later ones.
            take_step(model, inputs, optimizer, loss_fn)
        with counter:
            take_step(model, inputs, optimizer, loss_fn)
    return counter.result()


class FlopCounter(FlopCounterMode):
    """Count the floating-point operations inside a `with` block, by phase, module and operator.

    >>> model = nn.Linear(4, 2)
    >>> with FlopCounter(model) as counter:
    ...     model(torch.ones(3, 4)).sum().backward()
    >>> counter.result()
    FlopCount(forward=48, backward=48, optimizer=0, elementwise_forward=6, elementwise_backward=6)

    Args:
        model: The model. `by_module` in the result has an entry for each module that ran operators. Operators outside
            the model count only in the totals and in `by_operator`.
        accounting: `exact` or `source-study`. `exact` follows the rules in the docstring of this module. `source-study`
            follows arXiv 2507.23536, which differs in two rules: the backward pass of a convolution has torch's
            formula, and normalisation counts in `forward` and `backward` instead of the elementwise fields.

    Raises:
        ValueError: If the accounting is unknown.
    """

    def __init__(self, model: nn.Module, accounting: Accounting = "exact") -> None:
        if accounting not in ACCOUNTINGS:
            raise ValueError(f"accounting is {accounting!r}, expected one of {', '.join(ACCOUNTINGS)}")
        self._is_exact = accounting == "exact"
        corrected = {aten.convolution_backward: convolution_backward} if self._is_exact else {}
        super().__init__(display=False, custom_mapping={**elementwise_formulas(), **_PRODUCTS, **corrected})
        # torch's ModuleTracker does not distinguish the forward pass from the update.
        self.mod_tracker = StepLocation(model)  # type: ignore[assignment]

    def result(self) -> FlopCount:
        """Return the operations counted since the start of the block."""
        counts = cast("dict[tuple[str, str | None], dict[object, int]]", self.flop_counts)
        total = FlopCount()
        by_module: dict[str, Flops] = defaultdict(Flops)
        by_operator: dict[str, Flops] = defaultdict(Flops)
        for (phase, module), by_packet in counts.items():
            for packet, flops in by_packet.items():
                is_elementwise = packet in elementwise_formulas() and (
                    self._is_exact or str(packet).removeprefix("aten.") not in _NORMALISATIONS
                )
                column = f"elementwise_{phase}" if is_elementwise and phase != OPTIMIZER else phase
                modules = [by_module[name] for name in ancestors(module)]
                for entry in (total, by_operator[str(packet)], *modules):
                    setattr(entry, column, getattr(entry, column) + flops)
        return dataclasses.replace(total, by_module=dict(by_module), by_operator=dict(by_operator))


# Formulas of convolutions and products. A formula gets the operator's arguments, with a shape in place of each tensor.

aten = torch.ops.aten
Formula = Callable[..., int]


def convolution_backward(gradient: list[int], x: list[int], kernel: list[int], *options: Any, **_: object) -> int:
    """Return the FLOPs of the backward pass of a convolution.

    The gradient of the input and the gradient of the kernel each cost as much as the forward pass, for any groups,
    stride, dilation and padding, because each multiply-add of the forward pass occurs once in each gradient. Only the
    gradients that `output_mask` requests count. The gradient of the bias is not counted.
    """
    _bias_sizes, _stride, _padding, _dilation, transposed, _output_padding, _groups, output_mask = options
    return conv_flop_count(x, kernel, gradient, transposed) * (output_mask[0] + output_mask[1])


_PRODUCTS: dict[object, Formula] = {
    # Not all versions of torch have formulas for these products.
    aten.mv: lambda matrix, *_, **__: 2 * prod(matrix),
    aten.dot: lambda x, *_, **__: 2 * prod(x),
    aten.vdot: lambda x, *_, **__: 2 * prod(x),
    aten.addmv: lambda total, matrix, *_, **__: 2 * prod(matrix),
    aten.addbmm: lambda total, x, y, *_, **__: 2 * prod(x) * y[-1],
    # Before torch 2.15, torch has no formula for attention on the CPU.
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}

# The values of the next dicts are operations per element: a number, or a function that computes this number from the
# operator's arguments. The functions get tensors, whereas the formulas above get shapes.


def _batch_norm(*arguments: object, **_: object) -> int:
    return 5 if arguments[5] else 2  # arguments[5] is `training`


def _batch_norm_backward(*arguments: Any, **_: object) -> int:
    is_training, (for_input, for_weight, for_bias) = arguments[7], arguments[9]
    # With fixed statistics, the layer computes x * scale + shift, so the input's gradient is a single product.
    return 10 if is_training else for_input + 4 * for_weight + for_bias


def _adam(*_: object, weight_decay: float = 0.0, amsgrad: bool = False, decoupled: bool, **__: object) -> int:
    return 13 + amsgrad + (0 if weight_decay == 0 else 1 if decoupled else 2)


def _sgd(*_: object, weight_decay: float, momentum: float, nesterov: bool, **__: object) -> int:
    return 2 + 2 * (weight_decay != 0) + 2 * (momentum != 0) + 2 * nesterov


_NORMALISATIONS: dict[str, int | Formula] = {
    # In training mode, the layer computes the mean and the variance, and shifts and scales. Together, these operations
    # are five per element. fvcore uses the same number.
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_no_training": 2,
    "cudnn_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    **dict.fromkeys(("_batch_norm_with_update", "native_group_norm", "native_layer_norm"), 5),
    **dict.fromkeys(("cudnn_batch_norm_backward", "native_group_norm_backward", "native_layer_norm_backward"), 10),
}
# fmt: off
_UNTAGGED = (
    # pooling and resizing
    "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d", "adaptive_max_pool2d_backward",
    "avg_pool2d", "avg_pool2d_backward", "avg_pool3d", "avg_pool3d_backward", "max_pool2d_with_indices",
    "max_pool2d_with_indices_backward", "max_pool3d_with_indices", "max_pool3d_with_indices_backward",
    "upsample_bicubic2d", "upsample_bicubic2d_backward", "upsample_bilinear2d", "upsample_bilinear2d_backward",
    "upsample_nearest2d_backward",
    # activations
    "_prelu_kernel", "_prelu_kernel_backward", "elu_backward", "glu", "glu_backward", "hardsigmoid_backward",
    "hardswish", "hardswish_backward", "hardtanh_backward", "leaky_relu_backward", "log_sigmoid_backward",
    "log_sigmoid_forward", "mish_backward", "native_dropout", "softplus_backward",
    # losses and sums
    "binary_cross_entropy", "binary_cross_entropy_backward", "cumsum", "embedding_dense_backward", "huber_loss",
    "huber_loss_backward", "mse_loss", "mse_loss_backward", "nll_loss_forward", "smooth_l1_loss",
    "smooth_l1_loss_backward",
)
# fmt: on
_PER_ELEMENT: dict[str, int | Formula] = {
    **dict.fromkeys(("add", "sub"), lambda *_, alpha=1, **__: 1 if alpha == 1 else 2),
    **dict.fromkeys(("addcdiv", "addcmul"), lambda x, y, z, value=1, **_: 2 if value == 1 else 3),
    **dict.fromkeys(("lerp", "std", "std_mean", "var", "var_mean"), 3),
    **dict.fromkeys(("_softmax", "_log_softmax"), 5),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), 4),
    **dict.fromkeys(_UNTAGGED, 1),
    **_NORMALISATIONS,
    "_fused_adam": functools.partial(_adam, decoupled=False),
    "_fused_adamw": functools.partial(_adam, decoupled=True),
    "_fused_sgd": _sgd,
}
_MOVES = {"clone", "masked_fill", "where"}


@functools.cache
def elementwise_formulas() -> dict[object, Formula]:
    """Return a dict from each elementwise operator in `torch.ops.aten`, in-place or not, to its formula."""
    formulas: dict[object, Formula] = {}
    for name in sorted({name.split(".")[0] for name in operator_names() if name.startswith("aten::")}):
        packet = getattr(aten, name.removeprefix("aten::"), None)
        kind = name.removeprefix("aten::").removesuffix("_")
        operations = _operations(kind.removeprefix("_foreach_"))
        if packet is not None and operations is not None:
            formulas[packet] = _formula(operations, is_list=kind.startswith(("_foreach_", "_fused_")))
    return formulas


def _operations(kind: str) -> int | Formula | None:
    """Return the operations per element of the operator that is named `kind`, or a function that computes them.

    Return None if the operator is not elementwise.
    """
    if kind in _PER_ELEMENT:
        return _PER_ELEMENT[kind]
    packet = getattr(aten, kind, None)
    if packet is None or kind in _MOVES:
        return None
    tags = {tag for overload in packet.overloads() for tag in getattr(packet, overload).tags}
    return 1 if tags & {torch.Tag.pointwise, torch.Tag.reduction} else None


def _formula(operations: int | Formula, is_list: bool) -> Formula:
    """Return a formula for an operator. Its result is the number of elements times `operations`.

    If `is_list` is False, the elements are those of the largest tensor among the operator's arguments and result. If
    `is_list` is True, the first argument is a list of tensors, and the elements of all tensors in the list count.
    """

    def formula(*arguments: Any, out_val: object = None, **options: Any) -> int:
        per_element = operations(*arguments, **options) if callable(operations) else operations
        if is_list:
            return per_element * sum(_sizes(arguments[0]))
        return per_element * max(_sizes((*arguments, out_val)), default=0)

    setattr(formula, RAW_FORMULA, True)
    return formula


def _sizes(values: Iterable[object]) -> list[int]:
    sizes = []
    for value in values:
        if isinstance(value, Tensor):
            sizes.append(value.numel())
        elif isinstance(value, list | tuple):
            sizes += _sizes(value)
    return sizes
