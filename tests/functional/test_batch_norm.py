"""Test frozen and synchronised batch normalisation against torch's."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from peft_edge.functional import recompute
from peft_edge.functional.activations import silu_gradient, smooth_activation
from peft_edge.functional.batch_norm import batch_norm, frozen_batch_norm
from tests.processes import FORK_OF_SERVER


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("shape", "memory_format", "dtype"),
    [
        ((3, 12), torch.contiguous_format, torch.float32),
        ((2, 12, 7), torch.contiguous_format, torch.float64),
        ((2, 12, 7, 5), torch.contiguous_format, torch.float32),
        ((2, 12, 7, 5), torch.channels_last, torch.float32),
        ((2, 12, 7, 5), torch.channels_last, torch.bfloat16),
        ((2, 12, 3, 4, 5), torch.channels_last_3d, torch.float32),
    ],
)
def test_frozen_batch_norm_is_bit_identical_to_torch(
    shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype, affine: bool, inplace: bool
) -> None:
    # Half precision uses statistics in full precision, as under autocast.
    precise = torch.float32 if dtype == torch.bfloat16 else dtype
    mean, var, weight, bias = torch.randn(4, 12, dtype=precise)
    values = mean, var.abs(), *((weight, bias) if affine else (None, None))
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    outcomes = []
    for ours in (True, False):
        leaf = x.clone().requires_grad_()
        taken = leaf * 1
        y = frozen_batch_norm(taken, *values, 1e-5, inplace=inplace) if ours else F.batch_norm(leaf, *values)
        y.square().sum().backward()
        assert not ours or inplace == (y is taken)
        outcomes += [y, leaf.grad]

    assert torch.equal(outcomes[0], outcomes[2])
    torch.testing.assert_close(outcomes[1], outcomes[3])


LAYOUTS = [
    ((3, 12), torch.contiguous_format),
    ((2, 12, 70), torch.contiguous_format),
    ((2, 12, 7, 5), torch.contiguous_format),
    ((2, 12, 7, 5), torch.channels_last),
    ((2, 12, 3, 4, 5), torch.channels_last_3d),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("shape", "memory_format"), LAYOUTS)
def test_trained_batch_norm_equals_torch(
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    affine: bool,
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recompute, "CACHED_ELEMENTS", 100)  # several parts
    values = torch.randn(4, 12, dtype=torch.float64)
    x = (3 * torch.randn(shape, dtype=torch.float64) + 5).contiguous(memory_format=memory_format)
    seed = torch.randn(shape, dtype=torch.float64)  # contiguous, even if x is channels-last
    outcomes = []
    for function in (batch_norm, F.batch_norm):
        mean, var, weight, bias = values[0].clone(), values[1].abs(), *values[2:].clone().requires_grad_()
        leaf = x.clone().requires_grad_()
        parameters = (weight, bias) if affine else (None, None)
        y = function(leaf * 1, mean, var, *parameters, training=training, momentum=0.3, eps=1e-5)
        gradients = torch.autograd.grad((y * seed).sum(), [leaf, *parameters] if affine else [leaf])
        outcomes.append((y, mean, var, gradients))
    (y, mean, var, gradients), expected = outcomes

    assert all(torch.equal(*pair) for pair in zip((y, mean, var), expected[:3], strict=True))
    torch.testing.assert_close(gradients, expected[3], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "memory_format"), LAYOUTS[1:])
def test_recomputed_output_is_bit_identical(
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    training: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mean, var, weight, bias = torch.rand(4, 12, dtype=dtype)
    x = (3 * torch.randn(shape, dtype=dtype) + 5).contiguous(memory_format=memory_format).requires_grad_()
    y = batch_norm(x, mean, var, weight, bias, training=training, momentum=0.3, eps=1e-5)
    mean.add_(1.0)

    node, inputs = recompute.get_recompute(y)

    with torch.no_grad():
        assert inputs[0] is x
        assert torch.equal(node.value(inputs), y)
        monkeypatch.setattr(recompute, "CACHED_ELEMENTS", 100)
        parts = list(node.parts(inputs, y))
    assert len(parts) > 1
    assert all(torch.equal(part, expected) for part, expected in parts)


@pytest.mark.parametrize("training", [True, False])
def test_trained_batch_norm_has_second_derivatives(training: bool) -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    weight, bias = torch.randn(2, 2, dtype=torch.float64).requires_grad_()

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = batch_norm(x, mean, var, weight, bias, training=training, momentum=0.0, eps=1e-5)
        return smooth_activation(y, F.silu, silu_gradient).square()

    assert torch.autograd.gradgradcheck(function, (x, weight.clone(), bias.clone()))


def test_batch_norm_saves_only_its_input_and_values_per_channel() -> None:
    x = torch.randn(4, 8, 5, 5, requires_grad=True)
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)

    y = batch_norm(x, None, None, weight, bias, training=True, momentum=0.1, eps=1e-5)

    assert [tensor.data_ptr() for tensor in y.grad_fn.saved_tensors if tensor.numel() > 8] == [x.data_ptr()]


def test_single_value_per_channel_raises() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(torch.ones(1, 3, 1, 1, requires_grad=True), *[None] * 4, training=True, momentum=0.1, eps=1e-5)


def _batch_norm_in_two_processes(
    rank: int, port: int, x: torch.Tensor, target: torch.Tensor, results: mp.Queue
) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, target = x.split([5, 3])[rank].clone().requires_grad_(), target.split([5, 3])[rank]
    mean, var = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    weight = torch.arange(1.0, 5.0, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(4, dtype=x.dtype, requires_grad=True)
    y = batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3, eps=1e-5, synchronise=True)
    (y * target).sum().backward()
    results.put((rank, [t.detach().numpy() for t in (y, x.grad, weight.grad, bias.grad, mean, var)]))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_normalise_like_one_with_the_whole_batch() -> None:
    # A mean much larger than the deviation reveals lost digits.
    x = torch.randn(8, 4, 3, 3, dtype=torch.float64) + 1e3
    target = torch.randn_like(x)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = FORK_OF_SERVER.SimpleQueue()
    processes = [
        FORK_OF_SERVER.Process(target=_batch_norm_in_two_processes, args=(rank, port, x, target, results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    parts = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    y, x_grad = (torch.cat([torch.from_numpy(parts[rank][i]) for rank in range(2)]) for i in range(2))
    weight_grad, bias_grad = (sum(torch.from_numpy(parts[rank][i]) for rank in range(2)) for i in (2, 3))

    whole = x.clone().requires_grad_()
    mean, var = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    weight = torch.arange(1.0, 5.0, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(4, dtype=x.dtype, requires_grad=True)
    expected = F.batch_norm(whole, mean, var, weight, bias, training=True, momentum=0.3)
    (expected * target).sum().backward()

    torch.testing.assert_close(y, expected.detach())
    torch.testing.assert_close(x_grad, whole.grad)
    torch.testing.assert_close(weight_grad, weight.grad)
    torch.testing.assert_close(bias_grad, bias.grad)
    for rank in range(2):
        torch.testing.assert_close(torch.from_numpy(parts[rank][4]), mean)
        torch.testing.assert_close(torch.from_numpy(parts[rank][5]), var)
