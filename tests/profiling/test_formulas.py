from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_edge.profiling.flops import FlopCount, FlopCounter

SIZE = 3 * 4 * 5 * 6

# Before torch 2.15, a mode that looks on is shown what the derivative is made of.
SILU_DERIVATIVE = SIZE if torch.__version__ >= (2, 15) else 6 * SIZE


def count(function: Any, *shapes: tuple[int, ...]) -> FlopCount:
    tensors = [torch.rand(shape, requires_grad=True) for shape in shapes]
    with FlopCounter(nn.Identity()) as counter:
        output = function(*tensors)
        if output.requires_grad:
            output.backward(torch.ones_like(output))
    return counter.result()


@pytest.mark.parametrize(
    ("function", "forward", "backward"),
    [
        (torch.relu, SIZE, SIZE),
        (F.hardswish, SIZE, SIZE),
        (F.hardsigmoid, SIZE, SIZE),
        (F.silu, SIZE, SILU_DERIVATIVE),
        (lambda x: x.clone().transpose(1, 2).contiguous()[:1], 0, 0),
        (lambda x: torch.add(x, x.detach(), alpha=2), 2 * SIZE, 0),
        (lambda x: torch.addcmul(x.detach(), x.detach(), x.detach(), value=0.5), 3 * SIZE, 0),
        (lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True), 5 * SIZE, 10 * SIZE),
        (lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)), 2 * SIZE, SIZE),
        (lambda x: F.layer_norm(x, (6,)), 5 * SIZE, 10 * SIZE),
        (lambda x: F.group_norm(x, 2), 5 * SIZE, 10 * SIZE),
        (lambda x: F.softmax(x, -1), 5 * SIZE, 4 * SIZE),
    ],
)
def test_elementwise_operators_cost_so_much_an_element(function: Any, forward: int, backward: int) -> None:
    counted = count(function, (3, 4, 5, 6))
    assert (counted.forward, counted.backward) == (0, 0)
    assert (counted.elementwise_forward, counted.elementwise_backward) == (forward, backward)


@pytest.mark.parametrize(
    ("function", "shapes", "products"),
    [
        (torch.mv, [(7, 5), (5,)], 7 * 5),
        (torch.dot, [(7,), (7,)], 7),
        (torch.addmv, [(7,), (7, 5), (5,)], 7 * 5),
        (torch.addbmm, [(7, 6), (3, 7, 5), (3, 5, 6)], 3 * 7 * 5 * 6),
    ],
)
def test_products_cost_their_multiply_adds(function: Any, shapes: list[tuple[int, ...]], products: int) -> None:
    assert count(lambda *tensors: function(*tensors).detach(), *shapes).forward == 2 * products


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.adaptive_max_pool2d(x, 2),
        lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=0.5, mode="bicubic"),
        lambda x: F.mse_loss(x, torch.zeros_like(x)),
        lambda x: F.smooth_l1_loss(x, torch.zeros_like(x)),
        F.mish,
        F.logsigmoid,
        lambda x: F.prelu(x, torch.ones(1)),
        lambda x: F.dropout(x, 0.5),
    ],
)
def test_both_passes_read_or_write_every_element(function: Any) -> None:
    counted = count(function, (3, 4, 5, 6))
    assert counted.elementwise_forward >= SIZE
    assert counted.elementwise_backward >= SIZE


def test_a_sum_reads_its_input_and_a_broadcast_writes_its_output() -> None:
    assert count(lambda x: x.detach().sum(), (7, 5)).elementwise_forward == 35
    assert count(lambda x, y: x.detach() * y.detach(), (7, 1), (1, 5)).elementwise_forward == 35


def test_the_update_of_an_affine_map_with_fixed_statistics_costs_what_is_trained() -> None:
    norm = nn.BatchNorm2d(4).eval()
    x = torch.rand(3, 4, 5, 6)
    for trained, cost in (((), 1), (("weight",), 5), (("bias",), 2), (("weight", "bias"), 6)):
        norm.zero_grad()
        for name, parameter in norm.named_parameters():
            parameter.requires_grad_(name in trained)
        with FlopCounter(norm) as counter:
            norm(x.clone().requires_grad_()).backward(x)
        assert counter.result().elementwise_backward == cost * SIZE


OPTIMIZERS = [
    # A parameter with weight decay: decay, two moments of (3, 4), root, correction, epsilon, step of 3.
    (torch.optim.AdamW, {}, 14),
    (torch.optim.AdamW, {"weight_decay": 0.0}, 13),
    (torch.optim.Adam, {"weight_decay": 0.1}, 15),
    (torch.optim.SGD, {}, 2),
    (torch.optim.SGD, {"momentum": 0.9}, 4),
    (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}, 8),
]


@pytest.mark.parametrize("implementation", ["loop", "foreach", "fused"])
@pytest.mark.parametrize(("kind", "options", "cost"), OPTIMIZERS)
def test_every_implementation_of_an_optimizer_costs_the_same(
    kind: Any, options: dict[str, Any], cost: int, implementation: str
) -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50))
    chosen = {"foreach": implementation == "foreach", "fused": implementation == "fused"}
    optimizer = kind(model.parameters(), lr=0.1, **options, **chosen)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    with FlopCounter(model) as counter:
        optimizer.step()
    size = sum(parameter.numel() for parameter in model.parameters())
    counted = counter.result()
    # Step counters are scalars, a few to each parameter.
    assert cost * size <= counted.optimizer <= cost * size + 4 * len(list(model.parameters()))
    assert counted.forward == counted.elementwise_forward == 0
