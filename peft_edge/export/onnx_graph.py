"""Convert a captured graph to ONNX, with the standard operators of opset 20 and floating-point values in float32.

The ONNX nodes have the order of the fx nodes, except where the module `onnx_order` adds or moves nodes. The dict
`_OPERATORS` maps PyTorch operators to functions. Each function appends the ONNX nodes for one fx node, and returns the
name of the result. Operators that are missing in `_OPERATORS` cause an error.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from peft_edge.export.onnx_order import schedule_masks
from peft_edge.export.train_step import CORRECT, LABELS, CapturedGraph
from peft_edge.files import requires_extra

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET, IR_VERSION = 20, 9

aten = torch.ops.aten

_Node = Any
"""The type of an fx node. It is `Any`, because `fx.Node` types every argument as a union of all argument types."""


def write_onnx_graph(
    graph: CapturedGraph, *, any_batch_size: bool = False, metadata: Mapping[str, str] | None = None
) -> ModelProto:
    """Return a captured graph as an ONNX model. Floating-point values are in single precision.

    Args:
        graph: The graph of ATen operators.
        any_batch_size: Whether to declare the first dimension of the first input and of the first output as dynamic.
            If True, no operator in `graph` except reshapes may have the batch size as an argument. This is not checked.
        metadata: A dict from names to texts, which are stored in the model.

    Raises:
        ValueError: If an operator of the graph has no conversion to ONNX in `_OPERATORS`, or if an average pool has
            `divisor_override`.
        ImportError: If onnx is not installed.
    """
    return _Writer(graph).write(any_batch_size, metadata or {})


def missing_operators(graph: CapturedGraph) -> list[str]:
    """Return the names of the operators in `graph` for which `_OPERATORS` has no conversion to ONNX."""
    targets = {node.target for node in graph.module.graph.nodes if node.op == "call_function"}
    return sorted(str(target) for target in targets if target not in _OPERATORS)


class _Writer:
    """Convert one captured graph to ONNX.

    `nodes` and `initializers` are the nodes and constants of the ONNX graph. `names` maps each fx node to the name of
    its value in the ONNX graph.
    """

    def __init__(self, graph: CapturedGraph) -> None:
        with requires_extra("onnx"):
            import onnx
        self.onnx = onnx
        self.graph = graph
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.names: dict[_Node, str] = {}
        self._constants: dict[tuple[Any, ...], str] = {}

    def write(self, any_batch_size: bool, metadata: Mapping[str, str]) -> ModelProto:
        if missing := missing_operators(self.graph):
            raise ValueError(
                f"the graph cannot be written as ONNX: no standard operator is known for {', '.join(missing)}. Replace "
                "the layer that uses it, or leave its gradient out by adapting later layers only"
            )
        inputs: list[Any] = []
        outputs: list[Any] = []
        names = iter(self.graph.inputs)
        for node in self.graph.module.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = next(names)
                inputs.append(self._value_info(self.names[node], node, any_batch_size and not inputs))
            elif node.op == "get_attr":
                self.names[node] = self.initializer(node.target, self.graph.module.get_buffer(node.target))
            elif node.op == "call_function":
                self.names[node] = _OPERATORS[node.target](self, node)
            else:
                for name, result in zip(self.graph.outputs, node.args[0], strict=True):
                    # An `Identity` node gives a value the name of an output. A value may need several names, because
                    # it may be returned as several outputs, or it may be both an input and an output.
                    self.nodes.append(self.onnx.helper.make_node("Identity", [self.names[result]], [name]))
                    outputs.append(self._value_info(name, result, any_batch_size and not outputs))
        self._rename_outputs()
        if CORRECT in self.graph.outputs:
            self.nodes = schedule_masks(
                self.nodes, self.initializers, batch=self.graph.inputs[0], labels=LABELS, correct=CORRECT
            )
        helper = self.onnx.helper
        written = helper.make_graph(self.nodes, "peft_edge", inputs, outputs, self.initializers)
        model = helper.make_model(
            written, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="peft_edge"
        )
        helper.set_model_props(model, dict(metadata))
        self.onnx.checker.check_model(model)
        return model

    def emit(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Append a node of the ONNX operator `kind`, and return the name of its first output.

        The names of the other outputs are this name with the endings `.1`, `.2`, ...
        """
        name = f"v{len(self.nodes)}"
        results = [name, *(f"{name}.{index}" for index in range(1, outputs))]
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), results, name, **attributes))
        return name

    def initializer(self, name: str, value: Tensor | np.ndarray) -> str:
        """Add the constant `value` to the ONNX graph under `name`, and return `name`. float64 becomes float32."""
        array = value.detach().numpy() if isinstance(value, Tensor) else value
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        self.initializers.append(self.onnx.numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def constant(self, value: Any, dtype: torch.dtype) -> str:
        """Return the name of an initializer that holds `value`. Equal constants share one initializer."""
        key = (str(value), dtype)
        if key not in self._constants:
            array = exact = torch.tensor(value, dtype=dtype).numpy()
            if dtype == torch.float64:
                # `initializer` rounds a double to single precision, where a tiny value may become 0, and a huge value
                # infinity. Limit the magnitude to that of normal float32 numbers, but keep exact zeros and infinities.
                limits = np.finfo(np.float32)
                tiny = (array != 0) & (np.abs(array) < limits.tiny)
                array = np.where(tiny, np.copysign(limits.tiny, array), array).clip(limits.min, limits.max)
                array = np.where(np.isfinite(exact), array, exact)
            self._constants[key] = self.initializer(f"c{len(self._constants)}", array)
        return self._constants[key]

    def integers(self, values: Sequence[int]) -> str:
        return self.constant(list(values), torch.int64)

    def operand(self, value: Any, like: _Node) -> str:
        """Return the ONNX name of `value`.

        If `value` is an fx node, this is the name of its result. If it is a number, this is the name of a constant with
        the dtype of the node `like`.
        """
        return self.names[value] if isinstance(value, fx.Node) else self.constant(value, _type(like))

    def cast(self, node: _Node, dtype: torch.dtype) -> str:
        """Cast the value of `node` to `dtype`, and return the ONNX name of the result."""
        code = self.type_code(dtype)
        same = code == self.type_code(_type(node))
        return self.names[node] if same else self.emit("Cast", self.names[node], to=code)

    def reshape(self, name: str, old: Sequence[int], new: Sequence[int]) -> str:
        """Reshape the ONNX value `name` from the shape `old` to the shape `new`, and return the name of the result."""
        if list(old) == list(new):
            return name
        # In the target shape of an ONNX `Reshape`, 0 means the size of the input in this dimension. With 0 as the first
        # size, the reshape works for every batch size.
        keeps_first = len(old) > 0 and len(new) > 0 and old[0] == new[0] and 0 not in new
        return self.emit("Reshape", name, self.integers([0, *new[1:]] if keeps_first else new))

    def _value_info(self, name: str, node: _Node, is_batch: bool) -> Any:
        shape: list[int | str] = list(_shape(node))
        if is_batch:
            shape[0] = "batch"
        return self.onnx.helper.make_tensor_value_info(name, self.type_code(_type(node)), shape)

    def type_code(self, dtype: torch.dtype) -> int:
        """Return the ONNX code of a dtype. float64 has the code of float32."""
        codes = self.onnx.TensorProto
        return {
            torch.float64: codes.FLOAT,
            torch.float32: codes.FLOAT,
            torch.int64: codes.INT64,
            torch.int32: codes.INT32,
            torch.bool: codes.BOOL,
        }[dtype]

    def _rename_outputs(self) -> None:
        """Remove `Identity` nodes that only give a value the name of an output, and rename the value itself instead.

        An `Identity` node remains if the value that it copies is an input of the graph or an initializer, or already
        has the name of another output.
        """
        made = {name: (node, index) for node in self.nodes for index, name in enumerate(node.output)}
        copies = [node for node in self.nodes if node.op_type == "Identity" and node.output[0] in self.graph.outputs]
        renamed = {}
        for copy in copies:
            source, target = copy.input[0], copy.output[0]
            if source in made and source not in renamed:
                renamed[source] = target
                self.nodes.remove(copy)
        for node in self.nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]


def _value(node: _Node) -> Any:
    return node.meta["val"]


def _shape(node: _Node) -> list[int]:
    return list(_value(node).shape)


def _type(node: _Node) -> torch.dtype:
    return _value(node).dtype


def _argument(node: _Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _axes(node: _Node, index: int, rank: int) -> list[int]:
    """Return the argument `dim` of an fx node as a list of non-negative numbers. Without `dim`, list all dimensions."""
    dims = _argument(node, index, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(rank))
    return [dim % max(rank, 1) for dim in dims]


# --- the table ----------------------------------------------------------------------------------------------------

Entry = Callable[[_Writer, _Node], str]
"""A converter: it appends the ONNX nodes for an fx node to the writer, and returns the name of the result."""


def _unary(*kinds: str, **attributes: Any) -> Entry:
    """Return a converter for fx nodes. It applies the ONNX operators `kinds` to the first argument, in this order."""

    def write(writer: _Writer, node: _Node) -> str:
        name = writer.names[node.args[0]]
        for kind in kinds:
            name = writer.emit(kind, name, **attributes)
        return name

    return write


def _binary(kind: str, *after: str) -> Entry:
    """Return a converter for fx nodes with two arguments. It casts both arguments to their common dtype.

    The converter then applies the ONNX operator `kind` to both arguments, and the operators `after` to the result. If
    the fx node has the argument `alpha`, the second argument is first multiplied by `alpha`.
    """

    def write(writer: _Writer, node: _Node) -> str:
        dtype = torch.result_type(*(_value(each) if isinstance(each, fx.Node) else each for each in node.args[:2]))
        first, second = (
            writer.cast(each, dtype) if isinstance(each, fx.Node) else writer.constant(each, dtype)
            for each in node.args[:2]
        )
        if node.kwargs.get("alpha", 1) != 1:
            second = writer.emit("Mul", second, writer.constant(node.kwargs["alpha"], dtype))
        name = writer.emit(kind, first, second)
        for each in after:
            name = writer.emit(each, name)
        return name

    return write


def _reduction(kind: str) -> Entry:
    """Return a converter for fx nodes such as `sum`. It applies the ONNX operator `kind`, such as `ReduceSum`.

    The ONNX operator reduces the first argument of the fx node over the dimensions that the node's argument `dim`
    lists. If the first argument is a scalar, the converter adds no ONNX node.
    """

    def write(writer: _Writer, node: _Node) -> str:
        source = node.args[0]
        axes = _axes(node, 1, len(_shape(source)))
        if not axes:
            return writer.names[source]
        keep = int(bool(_argument(node, 2, "keepdim", False)))
        return writer.emit(kind, writer.names[source], writer.integers(axes), keepdims=keep)

    return write


def _to_shape(writer: _Writer, node: _Node) -> str:
    return writer.reshape(writer.names[node.args[0]], _shape(node.args[0]), _shape(node))


def _expand(writer: _Writer, node: _Node) -> str:
    old, new = _shape(node.args[0]), _shape(node)
    if old == new:
        return writer.names[node.args[0]]
    return writer.emit("Expand", writer.names[node.args[0]], writer.integers(new))


def _permute(writer: _Writer, node: _Node) -> str:
    rank = len(_shape(node.args[0]))
    order = [dim % rank for dim in node.args[1]]
    if order == list(range(rank)):
        return writer.names[node.args[0]]
    return writer.emit("Transpose", writer.names[node.args[0]], perm=order)


def _slice(writer: _Writer, node: _Node) -> str:
    dim, start, end, step = (
        _argument(node, index, name, default)
        for index, (name, default) in enumerate([("dim", 0), ("start", None), ("end", None), ("step", 1)], start=1)
    )
    bounds = [[start or 0], [2**62 if end is None else min(end, 2**62)], [dim], [step]]
    return writer.emit("Slice", writer.names[node.args[0]], *map(writer.integers, bounds))


def _select(writer: _Writer, node: _Node) -> str:
    source, dim, index = node.args[:3]
    return writer.emit("Gather", writer.names[source], writer.constant(index, torch.int64), axis=dim)


def _flip(writer: _Writer, node: _Node) -> str:
    dims = list(node.args[1])
    bounds = [[-1] * len(dims), [-(2**62)] * len(dims), dims, [-1] * len(dims)]
    return writer.emit("Slice", writer.names[node.args[0]], *map(writer.integers, bounds))


def _concatenate(writer: _Writer, node: _Node) -> str:
    return writer.emit("Concat", *(writer.names[each] for each in node.args[0]), axis=_argument(node, 1, "dim", 0))


def _pad(writer: _Writer, node: _Node) -> str:
    source, pads = node.args[:2]
    before = [0] * (len(_shape(source)) - len(pads) // 2) + list(pads[::2][::-1])
    after = [0] * (len(_shape(source)) - len(pads) // 2) + list(pads[1::2][::-1])
    name = writer.names[source]
    if max(pads) > 0:
        grown = [max(0, p) for p in before], [max(0, p) for p in after]
        value = writer.constant(_argument(node, 2, "value", 0), _type(node))
        name = writer.emit("Pad", name, writer.integers([*grown[0], *grown[1]]), value)
    if min(pads) < 0:  # a negative pad crops the tensor, for example in the gradient of padding
        starts = [max(0, -p) for p in before]
        ends = [start + size for start, size in zip(starts, _shape(node), strict=True)]
        dims = [dim for dim, (p, q) in enumerate(zip(before, after, strict=True)) if min(p, q) < 0]
        bounds = [[starts[dim] for dim in dims], [ends[dim] for dim in dims], dims]
        name = writer.emit("Slice", name, *map(writer.integers, bounds))
    return name


def _fill(writer: _Writer, node: _Node) -> str:
    # The fill value is the last argument that is neither a node nor a shape.
    value = next(arg for arg in reversed(node.args) if not isinstance(arg, fx.Node | list | tuple))
    name = writer.constant(value, _type(node))
    return writer.emit("Expand", name, writer.integers(_shape(node))) if _shape(node) else name


def _arange(writer: _Writer, node: _Node) -> str:
    return writer.constant(node.target(*node.args, **{**node.kwargs, "device": "cpu"}).tolist(), _type(node))


def _cast(writer: _Writer, node: _Node) -> str:
    return writer.cast(node.args[0], _type(node))


def _clamp(writer: _Writer, node: _Node) -> str:
    low, high = (_argument(node, index, name) for index, name in ((1, "min"), (2, "max")))
    limits = ["" if limit is None else writer.operand(limit, node) for limit in (low, high)]
    return writer.emit("Clip", writer.names[node.args[0]], *(limits if limits[1] else limits[:1]))


def _hardtanh(writer: _Writer, node: _Node) -> str:
    low, high = _argument(node, 1, "min_val", -1), _argument(node, 2, "max_val", 1)
    return writer.emit("Clip", writer.names[node.args[0]], writer.operand(low, node), writer.operand(high, node))


def _where(writer: _Writer, node: _Node) -> str:
    condition, *values = node.args
    return writer.emit("Where", writer.names[condition], *(writer.cast(each, _type(node)) for each in values))


def _log_softmax(writer: _Writer, node: _Node) -> str:
    return writer.emit("LogSoftmax", writer.names[node.args[0]], axis=node.args[1])


def _softmax(writer: _Writer, node: _Node) -> str:
    return writer.emit("Softmax", writer.names[node.args[0]], axis=node.args[1])


def _argmax(writer: _Writer, node: _Node) -> str:
    keep = int(bool(_argument(node, 2, "keepdim", False)))
    return writer.emit("ArgMax", writer.names[node.args[0]], axis=_argument(node, 1, "dim"), keepdims=keep)


def _silu(writer: _Writer, node: _Node) -> str:
    name = writer.names[node.args[0]]
    return writer.emit("Mul", name, writer.emit("Sigmoid", name))


def _addmm(writer: _Writer, node: _Node) -> str:
    bias, left, right = (writer.names[each] for each in node.args[:3])
    return writer.emit(
        "Gemm", left, right, bias, alpha=node.kwargs.get("alpha", 1.0), beta=node.kwargs.get("beta", 1.0)
    )


def _convolution(writer: _Writer, node: _Node) -> str:
    x, weight, bias, stride, padding, dilation, transposed, rest, groups = node.args
    dims = len(_shape(weight)) - 2
    stride, padding, dilation, rest = ([*each] * (dims // len(each)) for each in (stride, padding, dilation, rest))
    inputs = [writer.names[each] for each in (x, weight, bias) if each is not None]
    attributes = {"strides": stride, "pads": padding * 2, "dilations": dilation, "group": groups}
    attributes["kernel_shape"] = _shape(weight)[2:]
    if transposed:
        return writer.emit("ConvTranspose", *inputs, output_padding=rest, **attributes)
    return writer.emit("Conv", *inputs, **attributes)


def _pool(writer: _Writer, node: _Node) -> tuple[str, dict[str, Any]]:
    """Return the name of a pooling node's input, and the ONNX attributes for kernel size, stride and padding."""
    kernel = _argument(node, 1, "kernel_size")
    stride = _argument(node, 2, "stride") or kernel
    padding = _argument(node, 3, "padding", [0, 0])
    kernel, stride, padding = ([*each] * (2 // len(each)) for each in (kernel, stride, padding))
    return writer.names[node.args[0]], {"kernel_shape": kernel, "strides": stride, "pads": padding * 2}


def _avg_pool(writer: _Writer, node: _Node) -> str:
    name, attributes = _pool(writer, node)
    if _argument(node, 6, "divisor_override") is not None:
        raise ValueError("the graph cannot be written as ONNX: an average pool with divisor_override")
    attributes["ceil_mode"] = int(_argument(node, 4, "ceil_mode", False))
    attributes["count_include_pad"] = int(_argument(node, 5, "count_include_pad", True))
    return writer.emit("AveragePool", name, **attributes)


def _max_pool(writer: _Writer, node: _Node) -> str:
    name, attributes = _pool(writer, node)
    dilation = _argument(node, 4, "dilation", [1, 1])
    attributes["dilations"] = [*dilation] * (2 // len(dilation))
    attributes["ceil_mode"] = int(_argument(node, 5, "ceil_mode", False))
    return writer.emit("MaxPool", name, outputs=2, **attributes)


def _item(writer: _Writer, node: _Node) -> str:
    source, index = node.args
    return writer.names[source] if index == 0 else f"{writer.names[source]}.{index}"


def _max_pool_backward(writer: _Writer, node: _Node) -> str:
    # `indices` come from ONNX's MaxPool, and are positions in the whole tensor. PyTorch's operator would return
    # positions in one channel.
    grad, x, indices = node.args[0], node.args[1], node.args[-1]
    flat = [int(np.prod(_shape(grad)))]
    size = int(np.prod(_shape(x)))
    zeros = writer.emit("Expand", writer.constant(0.0, _type(x)), writer.integers([size]))
    positions = writer.emit("Reshape", writer.names[indices], writer.integers(flat))
    values = writer.emit("Reshape", writer.names[grad], writer.integers(flat))
    summed = writer.emit("ScatterElements", zeros, positions, values, axis=0, reduction="add")
    return writer.emit("Reshape", summed, writer.integers(_shape(x)))


_OPERATORS: dict[Any, Entry] = {
    aten.add.Tensor: _binary("Add"),
    aten.add.Scalar: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.sub.Scalar: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.mul.Scalar: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.div.Scalar: _binary("Div"),
    aten.pow.Scalar: _binary("Pow"),
    aten.pow.Tensor_Scalar: _binary("Pow"),
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.eq.Tensor: _binary("Equal"),
    aten.eq.Scalar: _binary("Equal"),
    aten.ne.Scalar: _binary("Equal", "Not"),
    aten.le.Scalar: _binary("LessOrEqual"),
    aten.lt.Scalar: _binary("Less"),
    aten.ge.Scalar: _binary("GreaterOrEqual"),
    aten.gt.Scalar: _binary("Greater"),
    aten.bitwise_and.Tensor: _binary("And"),
    aten.bitwise_or.Tensor: _binary("Or"),
    aten.logical_and.default: _binary("And"),
    aten.logical_or.default: _binary("Or"),
    aten.bitwise_not.default: _unary("Not"),
    aten.logical_not.default: _unary("Not"),
    aten.abs.default: _unary("Abs"),
    aten.neg.default: _unary("Neg"),
    aten.exp.default: _unary("Exp"),
    aten.log.default: _unary("Log"),
    aten.sqrt.default: _unary("Sqrt"),
    aten.rsqrt.default: _unary("Sqrt", "Reciprocal"),
    aten.reciprocal.default: _unary("Reciprocal"),
    aten.tanh.default: _unary("Tanh"),
    aten.relu.default: _unary("Relu"),
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.hardswish.default: _unary("HardSwish"),
    aten.hardsigmoid.default: _unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    aten.silu.default: _silu,
    aten.clamp.default: _clamp,
    aten.hardtanh.default: _hardtanh,
    aten.where.self: _where,
    aten._log_softmax.default: _log_softmax,
    aten._softmax.default: _softmax,
    aten.argmax.default: _argmax,
    aten.sum.dim_IntList: _reduction("ReduceSum"),
    aten.sum.default: _reduction("ReduceSum"),
    aten.mean.dim: _reduction("ReduceMean"),
    aten.amax.default: _reduction("ReduceMax"),
    aten.mm.default: _binary("MatMul"),
    aten.bmm.default: _binary("MatMul"),
    aten.addmm.default: _addmm,
    aten.convolution.default: _convolution,
    aten.avg_pool2d.default: _avg_pool,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    operator.getitem: _item,
    aten.reshape.default: _to_shape,
    aten.unsqueeze.default: _to_shape,
    aten.squeeze.dims: _to_shape,
    aten.squeeze.dim: _to_shape,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.flip.default: _flip,
    aten.cat.default: _concatenate,
    aten.constant_pad_nd.default: _pad,
    aten.scalar_tensor.default: _fill,
    aten.full.default: _fill,
    aten.full_like.default: _fill,
    aten.arange.start_step: _arange,
    aten._to_copy.default: _cast,
}
