"""The bases: the best of their rank, the same in all processes, and none from a broken gradient."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from peft_edge.optim import GaLoreAdamW
from peft_edge.optim.projector import PROJ_TYPES, new_basis

SIDES = {
    (12, 7): {"std": "right", "reverse_std": "left"},
    (7, 12): {"std": "left", "reverse_std": "right"},
    (9, 9): {"std": "right", "reverse_std": "left"},
}


def low_rank_matrix(rows: int, columns: int) -> Tensor:
    """Singular values of 1, 1/2, 1/4, ..."""
    u, v = (torch.linalg.qr(torch.randn(size, 20)).Q for size in (rows, columns))
    return (u * 0.5 ** torch.arange(20)) @ v.t()


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SIDES)
def test_keeps_what_the_best_approximation_keeps(shape: tuple[int, int], proj_type: str) -> None:
    gradient = torch.randn(shape)

    basis = new_basis(gradient, 3, proj_type)
    projected = basis.project(gradient)

    sides = SIDES[shape].get(proj_type, proj_type)
    assert projected.shape == (shape[0] if sides == "right" else 3, shape[1] if sides == "left" else 3)
    for vectors in (basis.left, None if basis.right is None else basis.right.t()):
        if vectors is not None:
            torch.testing.assert_close(vectors.t() @ vectors, torch.eye(3))
    # Eckart & Young 1936: what is lost are the other singular values.
    lost = (gradient - basis.project_back(projected)).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(gradient)[3:].square().sum())


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
def test_a_large_matrix_is_projected_nearly_as_well(shape: tuple[int, int], proj_type: str) -> None:
    gradient = low_rank_matrix(*shape) + 1e-4 * torch.randn(shape)

    basis = new_basis(gradient, 4, proj_type)

    lost = (gradient - basis.project_back(basis.project(gradient))).square().sum()
    assert lost <= 1.001 * torch.linalg.svdvals(gradient)[4:].square().sum()


def test_a_large_matrix_neither_takes_nor_heeds_random_numbers() -> None:
    gradient, state = low_rank_matrix(300, 400), torch.get_rng_state()
    first = new_basis(gradient, 4, "full")
    assert torch.equal(torch.get_rng_state(), state)

    torch.manual_seed(1)
    second = new_basis(gradient, 4, "full")

    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


def test_a_rank_above_the_shorter_side_keeps_everything() -> None:
    gradient = torch.randn(9, 5)
    basis = new_basis(gradient, 8, "std")

    assert basis.right.shape == (5, 5)
    torch.testing.assert_close(basis.project_back(basis.project(gradient)), gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_basis_has_the_gradients_type(dtype: torch.dtype) -> None:
    gradient = torch.randn(9, 5, dtype=dtype)
    assert new_basis(gradient, 2, "std").project(gradient).dtype == dtype


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [20, 300])
def test_a_gradient_that_is_not_finite_has_no_basis(size: int, value: float) -> None:
    gradient = torch.randn(size, size)
    gradient[1, 2] = value
    assert new_basis(gradient, 4, "std") is None


def _train_in_two_processes(process_index: int, port: int, results: mp.Queue) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=process_index, world_size=2)
    if process_index == 1:
        svd = torch.linalg.svd
        # Another library's vectors: other signs, and another order where singular values are equal.
        torch.linalg.svd = lambda *args, **options: (-svd(*args, **options)[0].flip(1), None, -svd(*args, **options)[2])
    generator = torch.Generator().manual_seed(0)
    small, large = (nn.Parameter(torch.randn(size, size, generator=generator)) for size in (12, 300))
    groups = [
        {"params": [small], "rank": 3, "update_proj_gap": 2},
        {"params": [large], "rank": 3, "update_proj_gap": 2, "proj_type": "full"},
    ]
    optimizer = GaLoreAdamW(groups, lr=1e-2)
    for _ in range(5):
        for weight in (small, large):
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    results.put((process_index, [weight.detach().numpy() for weight in (small, large)]))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_all_processes_use_the_bases_of_the_first() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=_train_in_two_processes, args=(i, port, results)) for i in range(2)]
    for process in processes:
        process.start()
    weights = dict(results.get() for _ in processes)
    for process in processes:
        process.join()

    for first, second in zip(weights[0], weights[1], strict=True):
        assert (first == second).all()
