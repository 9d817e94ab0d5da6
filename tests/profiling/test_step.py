from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peft_edge.profiling.step import (
    BACKWARD,
    FORWARD,
    OPTIMIZER,
    StepLocation,
    ancestors,
    fake_copy,
    take_step,
)
from peft_edge.roles import meta_copy


class Log(TorchDispatchMode):
    """Log the phase and the module in which each operator runs."""

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
    """A network with a frozen first layer, a shortcut around a trained layer, and a block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, 4, 1).requires_grad_(False)
        self.trained = nn.Conv2d(4, 4, 3, padding=1)
        self.twice = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(x)
        x = self.trained(x) + x
        return self.twice(self.twice(x)).mean()


def test_convolutions_are_located_in_their_modules_in_both_passes() -> None:
    model = Net()
    with Log(model) as log:
        model(torch.ones(2, 3, 8, 8)).backward()
    forward = ["frozen", "trained", "twice.0", "twice.0"]
    assert log.where("convolution") == [(FORWARD, name) for name in forward]
    assert log.where("convolution_backward") == [(BACKWARD, name) for name in reversed(forward[1:])]
    assert log.where("threshold_backward") == [(BACKWARD, "twice.1")] * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_of_checkpointing_belongs_to_the_backward_pass(use_reentrant: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sigmoid()))
    with Log(model) as log:
        x = model[0](torch.ones(2, 3, 8, 8))
        checkpoint(model[1], x, use_reentrant=use_reentrant).mean().backward()
    assert log.where("convolution") == [(FORWARD, "0"), (FORWARD, "1.0"), (BACKWARD, "1.0")]
    assert log.where("sigmoid_backward") == [(BACKWARD, "1.1")]
    assert log.where("convolution_backward") == [(BACKWARD, "1.0"), (BACKWARD, "0")]


def test_operators_between_backward_and_forward_belong_to_the_optimizer() -> None:
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


def test_update_inside_the_backward_pass_belongs_to_the_optimizer() -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight.register_post_accumulate_grad_hook(lambda weight: optimizer.step())
    with Log(model) as log:
        model(torch.ones(4, 3)).mean().backward()
    assert log.where("add_") == [(OPTIMIZER, None)]
    assert {phase for phase, _ in log.where("mm")} == {FORWARD, BACKWARD}


def test_closure_of_an_optimizer_keeps_its_phases() -> None:
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


def test_forward_pass_continues_after_a_gradient_inside_it() -> None:
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


def test_gradient_accumulation_belongs_to_the_module_of_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    with Log(model) as log:
        for _ in range(2):
            model(torch.ones(4, 3)).sum().backward()
    assert sorted(log.where("add_")) == [(BACKWARD, "0"), (BACKWARD, "1")]


def test_location_leaves_a_module_that_raises() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with Log(model) as log:
        with pytest.raises(RuntimeError):
            model(torch.ones(4, 5))
        torch.ones(2).sin()
    assert log.where("sin") == [(FORWARD, None)]


def test_ancestors_lists_all_modules_around_one() -> None:
    assert list(ancestors("blocks.0.conv")) == ["blocks.0.conv", "blocks.0", "blocks", ""]
    assert list(ancestors("")) == [""]
    assert list(ancestors(None)) == []


class Tied(nn.Module):
    """Two layers that share a weight, and a buffer that is a view of another buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("whole", torch.ones(8))
        self.register_buffer("part", self.whole[2:6])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + self.part


def test_take_step_equals_a_training_loop() -> None:
    model, x = nn.Linear(3, 1, bias=False), torch.randn(5, 3)
    weight, label = model.weight.detach().clone(), torch.randn(5, 1)
    model.weight.grad = torch.ones(1, 3)
    take_step(model, x, torch.optim.SGD(model.parameters(), lr=0.1), lambda output: (output - label).square().sum())
    gradient = 2 * (x @ weight.T - label).T @ x
    torch.testing.assert_close(model.weight.detach(), weight - 0.1 * gradient)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (SimpleNamespace(hidden=torch.ones(2)), "SimpleNamespace, expected a tensor or logits: pass loss_fn"),
        (SimpleNamespace(loss=torch.ones(2)), r"one element, found \(2,\): pass loss_fn"),
    ],
)
def test_output_without_a_scalar_loss_is_refused(output: object, message: str) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return output

    with pytest.raises(ValueError, match=message):
        take_step(Model(), torch.ones(1), None, None)


@pytest.mark.parametrize("inputs", [torch.ones(2, 4), (torch.ones(2, 4),), {"x": torch.ones(2, 4)}])
def test_fake_step_changes_no_original(inputs: object) -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    take_step(model, torch.ones(2, 4), optimizer, None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = [state["step"].clone() for state in optimizer.state.values()]
    gradients = [parameter.grad for parameter in model.parameters()]

    mode, model_copy, optimizer_copy, inputs_copy = fake_copy(model, optimizer, inputs)
    with mode:
        take_step(model_copy, inputs_copy, optimizer_copy, None)

    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert [state["step"] for state in optimizer.state.values()] == steps
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), gradients, strict=True))
    assert all(isinstance(parameter.grad, FakeTensor) for parameter in model_copy.parameters())
    assert set(optimizer_copy.param_groups[0]["params"]) == set(model_copy.parameters())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fake_copy_keeps_ties_and_moves_meta_tensors_to_the_cpu(device: str) -> None:
    with torch.device(device):
        model = Tied()
    _, copy, _, _ = fake_copy(model, None, torch.ones(2, 4))
    assert copy.first.weight is copy.second.weight
    assert {tensor.device.type for tensor in copy.state_dict().values()} == {"cpu"}


def test_meta_copy_has_the_same_tensors_on_the_meta_device() -> None:
    model = Tied()
    model.first.bias.requires_grad_(False)
    copy = meta_copy(model)
    assert {tensor.device.type for tensor in copy.state_dict().values()} == {"meta"}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert copy.first.weight is copy.second.weight
    kinds = [{n: (type(t), t.shape, t.requires_grad) for n, t in m.named_parameters()} for m in (model, copy)]
    assert kinds[0] == kinds[1]


def test_fake_copy_keeps_views() -> None:
    _, copy, _, _ = fake_copy(Tied(), None, torch.ones(2, 4))
    assert copy.part.untyped_storage()._cdata == copy.whole.untyped_storage()._cdata


class Slow(torch.optim.SGD):
    """An SGD optimizer with a tensor attribute that is not part of its state dict."""

    def __init__(self, parameters: object, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.turn = torch.zeros(2)

    def step(self, closure: None = None) -> None:
        self.turn += 1
        super().step()


def test_fake_copy_copies_attributes_of_the_optimizer() -> None:
    model = nn.Linear(4, 4)
    optimizer = Slow(model.parameters(), lr=0.1)
    mode, copy, optimizer_copy, x = fake_copy(model, optimizer, torch.ones(2, 4))
    with mode:
        take_step(copy, x, optimizer_copy, None)
    assert torch.equal(optimizer.turn, torch.zeros(2))


def test_copied_optimizer_does_not_step_the_schedule() -> None:
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    mode, copy, optimizer_copy, x = fake_copy(model, optimizer, torch.ones(2, 4))
    with mode:
        take_step(copy, x, optimizer_copy, None)
    assert torch.equal(model.weight, before)
    assert not getattr(schedule.optimizer, "_opt_called", False)
    assert optimizer_copy.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_optimizer_of_parameters_outside_the_model_is_refused() -> None:
    model, loss = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"parameters that are not the model's: .* make the loss a part of the model"):
        fake_copy(model, optimizer, torch.ones(2, 4))
    assert loss.weight.grad is None


def test_model_that_cannot_be_copied_is_named() -> None:
    model = nn.Linear(4, 4)
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Linear and NoneType cannot be copied .* measure a real step"):
        fake_copy(model, None, torch.ones(2, 4))


def test_step_that_reads_a_value_is_refused() -> None:
    model = nn.Linear(4, 4)
    mode, copy, optimizer, x = fake_copy(model, torch.optim.Adafactor(model.parameters()), torch.ones(2, 4))
    with pytest.raises(ValueError, match="reads the value of a tensor"), mode:
        take_step(copy, x, optimizer, None)
