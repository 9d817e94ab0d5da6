"""GaLore against galore-torch and torch's optimizers, its bases, and its state."""

from __future__ import annotations

import copy
import io
import socket
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from transformers.optimization import Adafactor

from peft_edge.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreSGD
from peft_edge.optim.galore import PROJ_TYPES, new_basis
from tests.processes import FORK_OF_SERVER

SIDES = {
    (12, 7): {"std": "right", "reverse_std": "left"},
    (7, 12): {"std": "left", "reverse_std": "right"},
    (9, 9): {"std": "right", "reverse_std": "left"},
}


def low_rank_matrix(rows: int, columns: int) -> Tensor:
    """Return a matrix with the singular values 1, 1/2, 1/4, ..."""
    u, v = (torch.linalg.qr(torch.randn(size, 20)).Q for size in (rows, columns))
    return (u * 0.5 ** torch.arange(20)) @ v.t()


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SIDES)
def test_basis_gives_the_best_low_rank_approximation(shape: tuple[int, int], proj_type: str) -> None:
    gradient = torch.randn(shape)

    basis = new_basis(gradient, 3, proj_type)
    projected = basis.project(gradient)

    sides = SIDES[shape].get(proj_type, proj_type)
    assert projected.shape == (shape[0] if sides == "right" else 3, shape[1] if sides == "left" else 3)
    for vectors in (basis.left, None if basis.right is None else basis.right.t()):
        if vectors is not None:
            torch.testing.assert_close(vectors.t() @ vectors, torch.eye(3))
    # Eckart & Young 1936: the squared error is the sum of the other squared singular values.
    lost = (gradient - basis.project_back(projected)).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(gradient)[3:].square().sum())


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
def test_basis_of_a_large_matrix_is_nearly_the_best(shape: tuple[int, int], proj_type: str) -> None:
    gradient = low_rank_matrix(*shape) + 1e-4 * torch.randn(shape)

    basis = new_basis(gradient, 4, proj_type)

    lost = (gradient - basis.project_back(basis.project(gradient))).square().sum()
    assert lost <= 1.001 * torch.linalg.svdvals(gradient)[4:].square().sum()


def test_basis_of_a_large_matrix_is_independent_of_the_global_generator() -> None:
    gradient, state = low_rank_matrix(300, 400), torch.get_rng_state()
    first = new_basis(gradient, 4, "full")
    assert torch.equal(torch.get_rng_state(), state)

    torch.manual_seed(1)
    second = new_basis(gradient, 4, "full")

    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


def test_rank_above_the_shorter_side_loses_nothing() -> None:
    gradient = torch.randn(9, 5)
    basis = new_basis(gradient, 8, "std")

    assert basis.right.shape == (5, 5)
    torch.testing.assert_close(basis.project_back(basis.project(gradient)), gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_basis_has_the_gradients_dtype(dtype: torch.dtype) -> None:
    gradient = torch.randn(9, 5, dtype=dtype)
    assert new_basis(gradient, 2, "std").project(gradient).dtype == dtype


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [20, 300])
def test_gradient_that_is_not_finite_has_no_basis(size: int, value: float) -> None:
    gradient = torch.randn(size, size)
    gradient[1, 2] = value
    assert new_basis(gradient, 4, "std") is None


def _train_in_two_processes(process_index: int, port: int, results: mp.Queue) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=process_index, world_size=2)
    if process_index == 1:
        svd = torch.linalg.svd
        # As another LAPACK could return: other signs, and another order of vectors.
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
def test_all_processes_use_the_bases_of_process_0() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = FORK_OF_SERVER.SimpleQueue()
    processes = [FORK_OF_SERVER.Process(target=_train_in_two_processes, args=(i, port, results)) for i in range(2)]
    for process in processes:
        process.start()
    weights = dict(results.get() for _ in processes)
    for process in processes:
        process.join()

    for first, second in zip(weights[0], weights[1], strict=True):
        assert (first == second).all()


OPTIMIZERS = {"adamw": GaLoreAdamW, "sgd": GaLoreSGD, "adafactor": GaLoreAdafactor}
NEXT_CLASSES = {
    "adamw": partial(AdamW, eps=1e-6),
    "sgd": partial(SGD, momentum=0.9),
    "adafactor": partial(Adafactor, scale_parameter=False, relative_step=False),
}
KERNELS = {
    "dense": (12, 6, 3, 3),
    "channels_last": (12, 6, 3, 3),
    "pointwise": (6, 12, 1, 1),
    "grouped": (12, 3, 5, 5),
    "depthwise": (16, 1, 3, 3),
    "one-dimensional": (8, 6, 3),
    "three-dimensional": (8, 4, 3, 3, 3),
}


def matrices() -> list[nn.Parameter]:
    """Return three weight matrices: with more rows than columns, square, and with more columns than rows."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(24, 10), (24, 24), (6, 24)]
    return [nn.Parameter(torch.randn(shape, generator=generator) / shape[1] ** 0.5) for shape in shapes]


def train(weights: list[nn.Parameter], step: Callable[[], Any], steps: int = 50) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        hidden = torch.randn(16, 10, generator=generator)
        target = hidden[:, :6].sin()
        for weight in weights[:-1]:
            hidden = F.linear(hidden, weight).tanh()
        loss = F.mse_loss(F.linear(hidden, weights[-1]), target)
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        step()


def assert_equal_training(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for weight, expected, start in zip(ours, theirs, matrices(), strict=True):
        assert (weight - start).abs().max() > 1e-2
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)


def projected(params: list[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
    return [{"params": params, "rank": 4, "update_proj_gap": 20, "scale": 0.5, **options}]


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_equals_galore_torch_over_two_refreshes(name: str, proj_type: str, galore_torch: SimpleNamespace) -> None:
    ours, theirs = matrices(), matrices()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = OPTIMIZERS[name](projected(ours, proj_type=proj_type), **options)
    groups = projected(theirs, proj_type=proj_type)
    if name == "adamw":
        oracle = galore_torch.AdamW(groups, no_deprecation_warning=True, **options)
    else:
        oracle = galore_torch.Adafactor(groups, scale_parameter=False, relative_step=False, **options)

    train(ours, optimizer.step)
    train(theirs, oracle.step)

    assert_equal_training(ours, theirs)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_sgd_equals_momentum_in_the_subspace_of_galore_torch(proj_type: str, galore_torch: SimpleNamespace) -> None:
    ours, theirs = matrices(), matrices()
    optimizer = GaLoreSGD(projected(ours, proj_type=proj_type), lr=0.1, momentum=0.8)
    projectors = [galore_torch.Projector(4, update_proj_gap=20, scale=0.5, proj_type=proj_type) for _ in theirs]
    sums: list[Any] = [0.0] * len(theirs)
    numbers = iter(range(50))

    @torch.no_grad()
    def step() -> None:
        number = next(numbers)
        for i, (weight, projector) in enumerate(zip(theirs, projectors, strict=True)):
            sums[i] = 0.8 * sums[i] + projector.project(weight.grad, number)
            weight -= 0.1 * projector.project_back(sums[i])

    train(ours, optimizer.step)
    train(theirs, step)

    assert_equal_training(ours, theirs)


def test_adafactor_averages_updates_as_galore_torch(galore_torch: SimpleNamespace) -> None:
    ours, theirs = matrices(), matrices()
    groups = projected(theirs, proj_type="std")
    optimizer = GaLoreAdafactor(projected(ours), lr=1e-2, beta1=0.9)
    oracle = galore_torch.Adafactor(groups, lr=1e-2, beta1=0.9, scale_parameter=False, relative_step=False)

    train(ours, optimizer.step)
    train(theirs, oracle.step)

    assert_equal_training(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_without_rank_are_trained_by_the_plain_optimizer(name: str) -> None:
    ours, theirs = matrices(), matrices()

    train(ours, OPTIMIZERS[name](ours, lr=1e-2, weight_decay=0.1).step)
    train(theirs, NEXT_CLASSES[name](theirs, lr=1e-2, weight_decay=0.1).step)

    assert_equal_training(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_with_and_without_rank_train_together(name: str) -> None:
    ours, theirs, apart = matrices(), matrices(), matrices()
    make = partial(OPTIMIZERS[name], lr=1e-2)

    train(ours, make([*projected(ours[1:]), {"params": ours[:1]}]).step)
    first, others = make(theirs[:1]), make(projected(theirs[1:]))
    train(theirs, lambda: (first.step(), others.step()))
    train(apart, make(apart).step)

    assert_equal_training(ours, theirs)
    assert not torch.allclose(ours[1], apart[1], atol=1e-3)


def test_sgd_at_full_rank_and_scale_1_is_plain_sgd() -> None:
    ours, theirs = matrices(), matrices()

    train(ours, GaLoreSGD(projected(ours, rank=24, scale=1.0, update_proj_gap=100), lr=0.1, weight_decay=0.01).step)
    train(theirs, SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01).step)

    for weight, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_kernel_is_trained_as_its_matrix(name: str, kind: str) -> None:
    shape, memory_format = KERNELS[kind], torch.channels_last if kind == "channels_last" else torch.contiguous_format
    kernel = nn.Parameter(torch.randn(shape).contiguous(memory_format=memory_format))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    optimizers = [OPTIMIZERS[name](projected([p], rank=2, update_proj_gap=2), lr=0.1) for p in (kernel, matrix)]

    for _ in range(3):
        kernel.grad = torch.randn(shape).contiguous(memory_format=memory_format)
        matrix.grad = kernel.grad.flatten(1)
        before = matrix.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(kernel.flatten(1), matrix)
        assert torch.linalg.matrix_rank(matrix - before, rtol=1e-3) == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resuming_a_saved_state_gives_the_same_bits(name: str) -> None:
    def make(weights: list[nn.Parameter]) -> Optimizer:
        groups = [*projected(weights[1:], update_proj_gap=4, weight_decay=0.1), {"params": weights[:1]}]
        return OPTIMIZERS[name](groups, lr=1e-2)

    whole = matrices()
    optimizer = make(whole)
    train(whole, optimizer.step, steps=6)
    saved, weights = io.BytesIO(), copy.deepcopy(whole)
    torch.save(optimizer.state_dict(), saved)
    train(whole, optimizer.step, steps=6)

    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    resumed = make(weights)
    resumed.load_state_dict(state)
    train(weights, resumed.step, steps=6)

    values = [value for entries in state["state"].values() for value in entries.values()]
    assert all(isinstance(value, torch.Tensor | int) for value in values)
    assert all(torch.equal(ours, expected) for ours, expected in zip(weights, whole, strict=True))


def test_state_has_the_size_of_the_rank() -> None:
    weight = nn.Parameter(torch.randn(64, 16, 3, 3))
    optimizer = GaLoreAdamW(projected([weight]))
    weight.grad = torch.randn_like(weight)
    optimizer.step()

    # The basis of the 64 rows, two averages with 144 columns, and the step.
    size = sum(value.untyped_storage().nbytes() for value in optimizer.state[weight].values())
    assert size == 4 * (4 * 64 + 2 * 4 * 144 + 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradient_that_is_not_finite_postpones_the_new_basis(name: str, value: float) -> None:
    weight, other = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6, 8))
    optimizer = OPTIMIZERS[name](projected([weight, other], update_proj_gap=2), lr=0.1)

    def step(gradient: torch.Tensor) -> None:
        weight.grad, other.grad = gradient, torch.randn_like(other)
        optimizer.step()

    def broken() -> torch.Tensor:
        gradient = torch.randn_like(weight)
        gradient[2, 3] = value
        return gradient

    start = weight.detach().clone()
    with pytest.warns(UserWarning, match=r"1 projected weights.*\(8, 6\)"):
        step(broken())
    assert torch.equal(weight, start)
    step(torch.randn_like(weight))
    step(torch.randn_like(weight))
    before, state = weight.detach().clone(), copy.deepcopy(optimizer.state[weight])
    others = other.detach().clone()
    with pytest.warns(UserWarning, match="not finite"):
        step(broken())
    assert torch.equal(weight, before)
    assert not torch.equal(other, others)
    assert all(torch.equal(optimizer.state[weight][key], entry) for key, entry in state.items())

    step(torch.randn_like(weight))
    assert weight.isfinite().all()
    assert not torch.equal(optimizer.state[weight]["basis_right"], state["basis_right"])


def test_parameter_without_gradient_is_unchanged() -> None:
    weights = [nn.Parameter(torch.ones(8, 6)) for _ in range(2)]
    optimizer = GaLoreAdamW(projected(weights, weight_decay=0.1))
    weights[0].grad = torch.randn(8, 6)
    optimizer.step()

    assert torch.equal(weights[1], torch.ones(8, 6))
    assert not torch.equal(weights[0], torch.ones(8, 6))


def test_hooks_are_called_once_a_step() -> None:
    weights, calls = matrices(), []
    AdamW(matrices())  # torch wraps the step of a class when it creates the first instance
    optimizer = GaLoreAdamW([*projected(weights[1:]), {"params": weights[:1]}])
    optimizer.register_step_post_hook(lambda *arguments: calls.append(len(optimizer.param_groups)))

    train(weights, optimizer.step, steps=3)

    assert calls == [2, 2, 2]


def test_step_calls_the_closure() -> None:
    weight = nn.Parameter(torch.randn(8, 6))
    optimizer = GaLoreSGD(projected([weight], update_proj_gap=1), lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(30)]
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0, expected an integer"),
        ({"rank": 2.5}, r"rank is 2\.5"),
        ({"update_proj_gap": 0}, "update_proj_gap is 0"),
        ({"proj_type": "sdt"}, "proj_type is 'sdt', expected one of: std, "),
    ],
)
def test_invalid_group_is_rejected(options: dict[str, Any], message: str) -> None:
    optimizer = GaLoreAdamW(matrices())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(projected([nn.Parameter(torch.ones(3, 3))], **options)[0])
    assert len(optimizer.param_groups) == 1


def test_vector_in_a_group_with_rank_is_rejected() -> None:
    optimizer = GaLoreAdamW(matrices())
    with pytest.raises(ValueError, match=r"shapes \[\(3,\)\], expected two dimensions"):
        optimizer.add_param_group(projected([nn.Parameter(torch.ones(3))])[0])
    assert len(optimizer.param_groups) == 1
