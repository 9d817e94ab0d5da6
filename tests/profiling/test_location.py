from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peft_edge.profiling.location import BACKWARD, FORWARD, OPTIMIZER, StepLocation, ancestors


class Log(TorchDispatchMode):
    """Notes where each operator runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.location = StepLocation(model)
        self.entries: list[tuple[str, str, str | None]] = []

    def __enter__(self) -> Log:
        self.location.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.location.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.entries.append((func.overloadpacket.__name__, *self.location.locate()))
        return func(*args, **(kwargs or {}))

    def where(self, name: str) -> list[tuple[str, str | None]]:
        return [(phase, module) for operator, phase, module in self.entries if operator == name]


class Net(nn.Module):
    """A frozen layer whose input needs no gradient, a branch beside a trained one, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, 4, 1).requires_grad_(False)
        self.trained = nn.Conv2d(4, 4, 3, padding=1)
        self.twice = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(x)
        x = self.trained(x) + x
        return self.twice(self.twice(x)).mean()


def test_every_convolution_is_found_in_its_module_forward_and_backward() -> None:
    model = Net()
    with Log(model) as log:
        model(torch.ones(2, 3, 8, 8)).backward()
    forward = ["frozen", "trained", "twice.0", "twice.0"]
    assert log.where("convolution") == [(FORWARD, name) for name in forward]
    assert log.where("convolution_backward") == [(BACKWARD, name) for name in reversed(forward[1:])]
    assert log.where("threshold_backward") == [(BACKWARD, "twice.1")] * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_checkpointing_computes_again_belongs_to_the_backward(use_reentrant: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sigmoid()))
    with Log(model) as log:
        x = model[0](torch.ones(2, 3, 8, 8))
        checkpoint(model[1], x, use_reentrant=use_reentrant).mean().backward()
    assert log.where("convolution") == [(FORWARD, "0"), (FORWARD, "1.0"), (BACKWARD, "1.0")]
    assert log.where("sigmoid_backward") == [(BACKWARD, "1.1")]
    assert log.where("convolution_backward") == [(BACKWARD, "1.0"), (BACKWARD, "0")]


def test_after_the_backward_comes_the_update_until_the_next_forward() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Log(model) as log:
        for _ in range(2):
            model(torch.ones(4, 3)).exp().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert log.where("addmm") == [(FORWARD, "")] * 2
    assert log.where("exp") == [(FORWARD, None)] * 2
    assert {phase for phase, _ in log.where("linalg_vector_norm") + log.where("_foreach_norm")} == {OPTIMIZER}
    assert {phase for phase, _ in log.where("add_")} == {OPTIMIZER}


def test_an_update_inside_the_backward_is_the_optimizers() -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight.register_post_accumulate_grad_hook(lambda weight: optimizer.step())
    with Log(model) as log:
        model(torch.ones(4, 3)).mean().backward()
    assert log.where("add_") == [(OPTIMIZER, None)]
    assert {phase for phase, _ in log.where("mm")} == {FORWARD, BACKWARD}


def test_a_step_inside_the_update_keeps_its_phases() -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).mean()
        loss.backward()
        return loss

    with Log(model) as log:
        optimizer.step(closure)
    assert log.where("mm") == [(FORWARD, ""), (BACKWARD, "")]
    assert {phase for phase, _ in log.where("cat")} == {OPTIMIZER}


def test_after_a_gradient_inside_the_forward_it_is_the_forward_still() -> None:
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            (slope,) = torch.autograd.grad((x @ self.weight).sum(), x, create_graph=True)
            return slope.exp()

    model = Force()
    with Log(model) as log:
        model(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert log.where("exp") == [(FORWARD, "")]


def test_gradients_are_added_up_in_the_module_that_holds_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    with Log(model) as log:
        for _ in range(2):
            model(torch.ones(4, 3)).sum().backward()
    assert sorted(log.where("add_")) == [(BACKWARD, "0"), (BACKWARD, "1")]


def test_a_module_that_fails_is_left() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with Log(model) as log:
        with pytest.raises(RuntimeError):
            model(torch.ones(4, 5))
        torch.ones(2).sin()
    assert log.where("sin") == [(FORWARD, None)]


def test_ancestors() -> None:
    assert list(ancestors("blocks.0.conv")) == ["blocks.0.conv", "blocks.0", "blocks", ""]
    assert list(ancestors("")) == [""]
    assert list(ancestors(None)) == []
