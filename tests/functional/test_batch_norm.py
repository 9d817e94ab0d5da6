"""Test frozen and synchronised batch normalisation against torch's."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from peft_edge.functional.batch_norm import frozen_batch_norm, synchronised_batch_norm


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


def _batch_norm_in_two_processes(
    rank: int, port: int, x: torch.Tensor, target: torch.Tensor, results: mp.Queue
) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, target = x.split([5, 3])[rank].clone().requires_grad_(), target.split([5, 3])[rank]
    mean, var = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    weight = torch.arange(1.0, 5.0, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(4, dtype=x.dtype, requires_grad=True)
    y = synchronised_batch_norm(x, mean, var, weight, bias, momentum=0.3, eps=1e-5)
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
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_batch_norm_in_two_processes, args=(rank, port, x, target, results)) for rank in range(2)
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
