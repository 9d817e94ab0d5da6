from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_edge.profiling import sampling
from peft_edge.profiling.sampling import TimedStep


class Clock:
    """Stands still but for what is added to `now`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(torch.autograd.Function):
    """Takes so many seconds forward, and ten times as many backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, seconds: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, seconds
        clock.now += seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.now += 10 * ctx.seconds
        return gradient, None, None


class SlowModel(nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.clock = clock

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": Slow.apply(x * self.scale, self.clock, 2.0)}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sampling, "time", clock)
    return clock


def test_phases_are_timed_and_parts_of_a_batch_add_up(clock: Clock) -> None:
    model = SlowModel(clock)
    with TimedStep(model) as step:
        for part in (torch.ones(5, 1), torch.ones(3, 1)):
            clock.now += 100  # of nobody: the batch is fetched
            logits = model(x=part)["logits"]
            loss = Slow.apply(logits.sum(), clock, 0.5)
            loss.backward()
            step.enter("optimizer" if len(part) == 3 else None)
        clock.now += 7
        step.enter(None)
        clock.now += 100
    times = step.times()
    # The gradient of the loss goes by until the model's output has its own.
    assert times.forward_s == 2 * (2 + 0.5 + 5)
    assert times.backward_s == 2 * 20
    assert times.optimizer_s == 7
    assert times.samples_per_s == pytest.approx(8 / (15 + 40 + 7))


def test_what_was_not_seen_is_none(clock: Clock) -> None:
    with TimedStep(SlowModel(clock)) as step:
        clock.now += 1
    times = step.times()
    assert (times.forward_s, times.backward_s, times.optimizer_s, times.samples_per_s) == (None,) * 4


def test_no_hook_stays_behind(clock: Clock) -> None:
    model = SlowModel(clock)
    with TimedStep(model):
        assert model._forward_hooks
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
