from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from peft_edge.profiling.step import fake_copy, meta_copy, take_step


class Tied(nn.Module):
    """Two layers with one weight, and a buffer that is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("whole", torch.ones(8))
        self.register_buffer("part", self.whole[2:6])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + self.part


def test_a_step_is_that_of_a_training_loop() -> None:
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
def test_an_output_without_a_scalar_loss_is_named(output: object, message: str) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return output

    with pytest.raises(ValueError, match=message):
        take_step(Model(), torch.ones(1), None, None)


@pytest.mark.parametrize("inputs", [torch.ones(2, 4), (torch.ones(2, 4),), {"x": torch.ones(2, 4)}])
def test_a_fake_step_leaves_the_originals_as_they_are(inputs: object) -> None:
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
def test_ties_stay_and_meta_tensors_become_cpu_tensors(device: str) -> None:
    with torch.device(device):
        model = Tied()
    _, copy, _, _ = fake_copy(model, None, torch.ones(2, 4))
    assert copy.first.weight is copy.second.weight
    assert {tensor.device.type for tensor in copy.state_dict().values()} == {"cpu"}


def test_a_meta_copy_has_the_same_tensors_without_their_memory() -> None:
    model = Tied()
    model.first.bias.requires_grad_(False)
    copy = meta_copy(model)
    assert {tensor.device.type for tensor in copy.state_dict().values()} == {"meta"}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert copy.first.weight is copy.second.weight
    kinds = [{n: (type(t), t.shape, t.requires_grad) for n, t in m.named_parameters()} for m in (model, copy)]
    assert kinds[0] == kinds[1]


def test_views_stay_views_of_one_storage() -> None:
    _, copy, _, _ = fake_copy(Tied(), None, torch.ones(2, 4))
    assert copy.part.untyped_storage()._cdata == copy.whole.untyped_storage()._cdata


class Slow(torch.optim.SGD):
    """Steps every other time."""

    def __init__(self, parameters: object, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.turn = torch.zeros(2)

    def step(self, closure: None = None) -> None:
        self.turn += 1
        super().step()


def test_attributes_of_an_optimizer_are_copied_too() -> None:
    model = nn.Linear(4, 4)
    optimizer = Slow(model.parameters(), lr=0.1)
    mode, copy, optimizer_copy, x = fake_copy(model, optimizer, torch.ones(2, 4))
    with mode:
        take_step(copy, x, optimizer_copy, None)
    assert torch.equal(optimizer.turn, torch.zeros(2))


def test_the_step_of_a_schedule_is_not_taken() -> None:
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


def test_parameters_outside_the_model_are_named_and_stay_as_they_are() -> None:
    model, loss = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"parameters that are not the model's: .* make the loss a part of the model"):
        fake_copy(model, optimizer, torch.ones(2, 4))
    assert loss.weight.grad is None


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Linear(4, 4)
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Linear and NoneType cannot be copied .* measure a real step"):
        fake_copy(model, None, torch.ones(2, 4))


def test_a_step_that_reads_values_is_named() -> None:
    model = nn.Linear(4, 4)
    mode, copy, optimizer, x = fake_copy(model, torch.optim.Adafactor(model.parameters()), torch.ones(2, 4))
    with pytest.raises(ValueError, match="reads the value of a tensor"), mode:
        take_step(copy, x, optimizer, None)
