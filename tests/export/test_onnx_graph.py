"""ONNX files of captured graphs: run by ONNX Runtime, against the graph; operators without an entry."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peft_edge.export.onnx_graph import missing_operators, write_onnx_graph
from peft_edge.export.train_step import CapturedGraph, capture_graph


def captured(function: Callable[..., Tensor], *inputs: Tensor) -> CapturedGraph:
    values = {f"x{index}": value for index, value in enumerate(inputs)}
    return capture_graph(lambda values, _: {"y": function(*values.values())}, values, {})


def run(graph: CapturedGraph, *inputs: Tensor, **options: bool) -> Tensor:
    model = write_onnx_graph(graph, **options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = {f"x{index}": single(value).numpy() for index, value in enumerate(inputs)}
    return torch.from_numpy(np.asarray(session.run(["y"], values)[0]))


def single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


aten = torch.ops.aten
X, Y = torch.linspace(-4, 4, 96).double().view(2, 3, 4, 4), torch.linspace(3, -2, 96).double().view(2, 3, 4, 4)
W = torch.linspace(-1, 1, 27).double().view(3, 1, 3, 3)
M = torch.arange(12).double().view(3, 4)

CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "add with a factor": (lambda x, y: torch.add(x, y, alpha=3), (X, Y)),
    "sub of a number": (lambda x: x - 2, (X,)),
    "mul by a row": (lambda x, y: x * y, (X, Y[:1, :1])),
    "div": (lambda x, y: x / (y + 10), (X, Y)),
    "pow": (lambda x: (x + 5) ** 3, (X,)),
    "pow of a number": (lambda x: aten.pow.Scalar(0.9, x), (X,)),
    "maximum, minimum": (lambda x, y: torch.maximum(x, y) - torch.minimum(x, -y), (X, Y)),
    "comparisons": (lambda x: ((x < 1) & (x >= -1)) | (x > 3) | (x <= -3), (X,)),
    "eq, ne, not": (lambda x: torch.logical_not((x == 1) | (x != 2)), (torch.arange(4),)),
    "eq of tensors": (lambda x, y: x.unsqueeze(1) == y, (torch.arange(4), torch.arange(3))),
    "unary": (lambda x: x.abs().add(1).log().exp().sqrt().rsqrt().reciprocal().neg().tanh(), (X,)),
    "activations": (lambda x: F.relu(x) + torch.sigmoid(x) + F.hardswish(x) + F.hardsigmoid(x) + F.silu(x), (X,)),
    "hardtanh, clamp": (lambda x: F.hardtanh(x, 0, 3) + x.clamp(min=-1) + x.clamp(max=2) + x.clamp(0, 1), (X,)),
    "where": (lambda x, y: torch.where(x > 1, x, 0.5) + torch.where(x < 0, y, x), (X, Y)),
    "softmax": (lambda x: F.log_softmax(x, 1) + F.softmax(x, -1), (M,)),
    "argmax": (lambda x: x.argmax(1), (M * torch.tensor([1.0, 3, -1, 2]).double(),)),
    "sums": (lambda x: x.sum() + x.sum(1, keepdim=True) + x.mean((2, 3), keepdim=True) + x.amax(1, keepdim=True), (X,)),
    "matrix products": (lambda x, y: torch.addmm(y[0], x, y), (M, M.reshape(4, 3))),
    "bmm": (lambda x, y: torch.bmm(x[0], y[1]), (X, Y)),
    "mm": (lambda x: x @ x.t(), (M,)),
    "shapes": (
        lambda x: x.reshape(2, -1).unsqueeze(1).squeeze(1).expand(2, 48).reshape(2, 6, 8).permute(0, 2, 1),
        (X,),
    ),
    "slices": (lambda x: x[1:, :, ::2, 1:-1].flip([2]) + x[0, :2, 0, 0].sum(), (X,)),
    "cat": (lambda x, y: torch.cat([x, y], 1), (X, Y)),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1), value=2.0), (X,)),
    "negative pad": (lambda x: F.pad(x, (-1, 1, -2, 0)), (X,)),
    "constants": (lambda x: x + torch.full_like(x, 2) + torch.full((4,), 3.0) + torch.arange(4), (X,)),
    "copy": (lambda x: x.new_empty(2, 3, 4, 4).copy_(x[:1].relu()), (X,)),
    "cast": (lambda x: (x > 0).to(x.dtype) * x.to(torch.float64), (X,)),
    "convolution": (lambda x, w: F.conv2d(x, w, None, 2, 1, 1, 3), (X, W)),
    "convolution with bias": (lambda x, w: F.conv2d(x, w, w[:, 0, 0, 0], 1, 2, 2), (X, W.reshape(1, 3, 3, 3))),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1), (X, W)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, False, False) + F.avg_pool2d(x, 2, 2), (X,)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), (X,)),
}


@pytest.mark.parametrize("name", CASES)
def test_entry_of_the_table_computes_what_pytorch_does(name: str) -> None:
    function, inputs = CASES[name]
    expected = single(function(*inputs))
    torch.testing.assert_close(run(captured(function, *inputs), *inputs), expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_max_pool() -> None:
    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad((F.max_pool2d(x, 3, 1, 1) * torch.arange(4)).sum(), x)[0]

    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)  # windows overlap: some elements win several times
    torch.testing.assert_close(run(captured(gradient, x), x), gradient(x).float())


def test_batch_size_is_free_where_the_graph_allows() -> None:
    graph = captured(lambda x: x.relu().reshape(2, -1) @ torch.ones(48, 5, dtype=torch.float64), X)
    x = torch.randn(7, 3, 4, 4)
    assert run(graph, x, any_batch_size=True).shape == (7, 5)
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run(graph, x)


def test_limits_of_double_precision_stay_limits() -> None:
    tiny = torch.finfo(torch.float64).tiny
    zeros = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(run(captured(lambda x: x / x.clamp(min=tiny), zeros), zeros), zeros.float())
    assert run(captured(lambda x: x + float("inf"), zeros), zeros).isinf().all()
    assert run(captured(lambda x: x + 1e300, zeros), zeros).isfinite().all()


def test_an_output_may_be_an_input_or_occur_twice() -> None:
    def function(values: dict[str, Tensor], _: dict[str, Tensor]) -> dict[str, Tensor]:
        more = values["x"] + 1
        return {"same": values["x"], "one": more, "two": more}

    model = write_onnx_graph(capture_graph(function, {"x": X}, {}))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    same, one, two = session.run(None, {"x": X.float().numpy()})
    assert np.array_equal(same, X.float())
    assert np.array_equal(one, two)
    assert [output.name for output in session.get_outputs()] == ["same", "one", "two"]


def test_operators_without_an_entry_are_refused_by_name() -> None:
    graph = captured(lambda x: torch.erf(x).cumsum(0), X)
    assert missing_operators(graph) == ["aten.cumsum.default", "aten.erf.default"]
    with pytest.raises(
        ValueError, match=r"no standard operator is known for aten\.cumsum\.default, aten\.erf\.default"
    ):
        write_onnx_graph(graph)


def test_file_has_standard_operators_of_one_version_and_its_metadata() -> None:
    model = write_onnx_graph(captured(lambda x: x.relu(), X), metadata={"made": "here"})
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""}
    assert {each.key: each.value for each in model.metadata_props} == {"made": "here"}
