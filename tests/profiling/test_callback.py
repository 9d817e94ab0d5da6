from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from peft_edge.config import RunConfig
from peft_edge.profiling import callback
from peft_edge.profiling.callback import ProfilingCallback, TimedStep, read_profile
from peft_edge.profiling.tables import profile_table
from peft_edge.records import StepProfile


class Clock:
    """A replacement for the module `time`. Its clock advances only when a test adds to `now`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(torch.autograd.Function):
    """The identity function. It advances a clock by `seconds` in the forward pass.

    In the backward pass, it advances the clock by ten times `seconds`.
    """

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
    monkeypatch.setattr(callback, "time", clock)
    return clock


def test_times_of_gradient_accumulation_add_up(clock: Clock) -> None:
    model = SlowModel(clock)
    with TimedStep(model) as step:
        for part in (torch.ones(5, 1), torch.ones(3, 1)):
            clock.now += 100  # outside the phases: the batch is loaded
            logits = model(x=part)["logits"]
            loss = Slow.apply(logits.sum(), clock, 0.5)
            loss.backward()
            step.enter("optimizer" if len(part) == 3 else None)
        clock.now += 7
        step.enter(None)
        clock.now += 100
    times = step.times()
    # The forward pass lasts until the gradient reaches the model's output.
    assert times.forward_s == 2 * (2 + 0.5 + 5)
    assert times.backward_s == 2 * 20
    assert times.optimizer_s == 7
    assert times.samples_per_s == pytest.approx(8 / (15 + 40 + 7))


def test_phases_that_did_not_run_have_no_time(clock: Clock) -> None:
    with TimedStep(SlowModel(clock)) as step:
        clock.now += 1
    times = step.times()
    assert (times.forward_s, times.backward_s, times.optimizer_s, times.samples_per_s) == (None,) * 4


def test_timed_step_removes_its_hooks(clock: Clock) -> None:
    model = SlowModel(clock)
    with TimedStep(model):
        assert model._forward_hooks
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2))


def train(
    callback: ProfilingCallback,
    steps: int,
    *,
    model: nn.Module | None = None,
    done: int = 0,
    sizes: Sequence[int] = (6,),
) -> list[str]:
    """Send the events that `Trainer` sends for a training run, and return one letter for each step.

    The letter is `c` if the callback counted FLOPs in the step, `t` if it timed the step, and `-` otherwise.
    """
    model = model or network()
    optimizer: Optimizer = SGD(model.parameters(), lr=0.1)
    state, control = TrainerState(global_step=done), TrainerControl()
    kinds = []

    def tell(event: str) -> None:
        getattr(callback, event)(None, state, control, model=model, optimizer=optimizer)

    with closing(callback):
        tell("on_train_begin")
        for state.global_step in range(done + 1, steps + 1):
            tell("on_step_begin")
            kinds.append("c" if _get_current_dispatch_mode_stack() else "t" if model._forward_hooks else "-")
            size = sizes[(state.global_step - 1) % len(sizes)]
            F.mse_loss(model(torch.randn(size, 4)), torch.randn(size, 2)).backward()
            tell("on_pre_optimizer_step")
            optimizer.step()
            tell("on_optimizer_step")
            optimizer.zero_grad()
            tell("on_step_end")
        tell("on_train_end")
    return kinds


@pytest.mark.parametrize(
    ("every_n_steps", "kinds"), [(5, "-ct---ct---c"), (2, "-ctctctctctc"), (1, "-ctctctctctc"), (0, "-" * 12)]
)
def test_callback_measures_two_steps_in_each_interval(tmp_path: Path, every_n_steps: int, kinds: str) -> None:
    callback = ProfilingCallback(every_n_steps, output_dir=tmp_path)
    assert "".join(train(callback, 12)) == kinds
    assert [row.steps for row in callback.rows] == [kinds.count("c")] * (every_n_steps > 0)


def test_default_interval_is_that_of_the_configuration() -> None:
    default = inspect.signature(ProfilingCallback).parameters["every_n_steps"].default
    assert default == RunConfig(output_dir="a").profiling.every_n_steps


def test_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps is -1"):
        ProfilingCallback(-1)


def test_trained_weights_are_bit_identical_with_the_callback(tmp_path: Path) -> None:
    trained = []
    for every_n_steps in (0, 1):
        torch.manual_seed(0)
        model = network()
        train(ProfilingCallback(every_n_steps, output_dir=tmp_path), 6, model=model)
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_files_and_printed_table_hold_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = ProfilingCallback(output_dir=tmp_path, name="lr_0.01")
    train(callback, 3)
    (row,) = callback.rows
    # The input of the first layer needs no gradient.
    assert (row.flops_forward, row.flops_backward) == (2 * 6 * (12 + 6), 2 * 6 * (12 + 6 + 6))
    assert None not in (row.forward_s, row.backward_s, row.optimizer_s, row.samples_per_s)
    assert read_profile(tmp_path) == [row]
    whole = json.loads((tmp_path / "profile" / "lr_0.01.json").read_text())
    assert [StepProfile(**entry) for entry in whole] == [row]
    assert {path.name for path in tmp_path.rglob("*.json")} == {"lr_0.01.json", "process_0.json"}
    assert profile_table([row]) in capsys.readouterr().out


def test_rows_have_median_times_and_the_highest_memory_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = ProfilingCallback(1, output_dir=tmp_path)
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(callback, "_log", logged.append)
    # Every second step is counted.
    train(callback, 7, sizes=[1, 2, 1, 6, 1, 4, 1])
    (row,) = callback.rows
    assert row.steps == 3
    assert [entry["profile/flops_forward"] for entry in logged] == [36 * 2, 36 * 6, 36 * 4]
    assert row.flops_forward == 36 * 6
    assert row.memory_peak_bytes == max(entry["profile/memory_peak_bytes"] for entry in logged)
    assert row.forward_s == sorted(entry["profile/forward_s"] for entry in logged)[1]


def test_resumed_training_continues_its_figures_and_a_new_one_starts_over(tmp_path: Path) -> None:
    train(ProfilingCallback(output_dir=tmp_path), 3)
    (tmp_path / "profile" / "process_1.json").write_text("of a process of the earlier training")
    resumed = ProfilingCallback(output_dir=tmp_path)
    train(resumed, 6, done=3)
    assert [row.steps for row in resumed.rows] == [2]
    assert len(json.loads((tmp_path / "profile" / "process_0.json").read_text())["times"]) == 2

    fresh = ProfilingCallback(output_dir=tmp_path)
    train(fresh, 3)
    assert [row.steps for row in fresh.rows] == [1]
    assert [row.process_index for row in read_profile(tmp_path)] == [0]


def test_damaged_figures_are_ignored_with_a_warning(tmp_path: Path) -> None:
    train(ProfilingCallback(output_dir=tmp_path), 3)
    (tmp_path / "profile" / "process_1.json").write_text('{"rows": [{"unknown": 1}], "times": []}')
    with pytest.warns(UserWarning, match=r"process_1\.json is damaged"):
        assert [row.process_index for row in read_profile(tmp_path)] == [0]
    (tmp_path / "profile" / "process_0.json").write_text("")
    resumed = ProfilingCallback(output_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"process_0\.json is damaged"):
        train(resumed, 6, done=3)
    assert [row.steps for row in resumed.rows] == [1]


def test_planned_measurements_do_not_pile_up(tmp_path: Path) -> None:
    callback = ProfilingCallback(1, output_dir=tmp_path)
    train(callback, 12)
    assert len(callback._planned) <= 1


def test_short_training_deletes_the_figures_of_an_earlier_one(tmp_path: Path) -> None:
    train(ProfilingCallback(output_dir=tmp_path), 3)
    train(ProfilingCallback(output_dir=tmp_path), 1)
    assert not list(tmp_path.rglob("*.json"))


def test_failed_training_leaves_no_dispatch_mode_entered(tmp_path: Path) -> None:
    failing = network()
    failing.register_forward_hook(lambda *arguments: 1 / 0 if _get_current_dispatch_mode_stack() else None)
    with pytest.raises(ZeroDivisionError):
        train(ProfilingCallback(output_dir=tmp_path), 3, model=failing)
    assert not _get_current_dispatch_mode_stack()


def test_nothing_is_measured_after_close(tmp_path: Path) -> None:
    callback, model = ProfilingCallback(output_dir=tmp_path), network()
    state, control = TrainerState(), TrainerControl()
    callback.on_train_begin(None, state, control)
    for _ in range(2):
        callback.on_step_begin(None, state, control, model=model)
    assert callback.is_measuring
    callback.close()  # as after an error in the step
    assert not callback.is_measuring


def test_trace_is_written_if_requested(tmp_path: Path) -> None:
    train(ProfilingCallback(output_dir=tmp_path, name="a", trace=True), 4)
    trace = json.loads((tmp_path / "traces" / "a" / "process_0.json").read_text())
    assert any(event.get("name") == "aten::linear" for event in trace["traceEvents"])


class RegressionTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return F.mse_loss(model(inputs["x"]), inputs["y"])


@pytest.fixture
def trainer(trainer_arguments: Callable[..., TrainingArguments]) -> Trainer:
    arguments = trainer_arguments(per_device_train_batch_size=6, logging_steps=1)
    data = [{"x": torch.randn(4), "y": torch.randn(2)} for _ in range(18)]
    return RegressionTrainer(network(), arguments, train_dataset=data)


def test_trainer_logs_the_profile_and_its_own_figures(trainer: Trainer, tmp_path: Path) -> None:
    callback = ProfilingCallback(log=trainer.log)
    trainer.add_callback(callback)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
    (figures,) = (entry for entry in trainer.state.log_history if "profile/forward_s" in entry)
    assert figures["step"] == 3
    assert figures["profile/flops_forward"] == callback.rows[0].flops_forward == 2 * 6 * (12 + 6)
    assert json.loads((tmp_path / "profile.json").read_text())[0]["process_index"] == 0


def test_training_after_a_failed_trainer_is_measured(trainer: Trainer, tmp_path: Path) -> None:
    trainer.add_callback(ProfilingCallback())
    handle = trainer.model.register_forward_hook(
        lambda *arguments: 1 / 0 if _get_current_dispatch_mode_stack() else None
    )
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    handle.remove()
    assert _get_current_dispatch_mode_stack()
    assert train(ProfilingCallback(output_dir=tmp_path), 3) == ["-", "c", "t"]


def test_training_inside_a_measured_step_discards_the_sample(tmp_path: Path) -> None:
    """Its operations would count as those of the outer step. The outer training goes on with its next sample."""
    outer, model = ProfilingCallback(3, output_dir=tmp_path / "outer"), network()

    def train_inside(*arguments: object) -> None:
        if outer.is_measuring:
            train(ProfilingCallback(output_dir=tmp_path / "inner"), 1)

    handle = model.register_forward_hook(train_inside)
    train(outer, 3, model=model)
    assert not outer.rows
    handle.remove()
    train(outer, 3, model=model)
    assert outer.rows


def test_training_in_another_thread_leaves_the_measurement_open(tmp_path: Path) -> None:
    alone = ProfilingCallback(output_dir=tmp_path / "alone")
    train(alone, 3)
    model, callback = network(), ProfilingCallback(output_dir=tmp_path / "here")

    def other() -> None:
        thread = threading.Thread(target=train, args=(ProfilingCallback(output_dir=tmp_path / "there"), 3))
        thread.start()
        thread.join()

    model.register_forward_hook(lambda *arguments: other() if callback.is_measuring else None)
    train(callback, 3, model=model)
    assert callback.rows[0].flops_forward == alone.rows[0].flops_forward
