from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peft_edge.config import load_config
from peft_edge.training.launch import start, start_trackers


def test_threads_accumulation_and_device_are_those_of_the_configuration() -> None:
    accelerator = start(
        load_config(
            [
                "output_dir=a",
                "data.shift=blend",
                "--cpu",
                "trackers=[]",
                "num_threads=2",
                "training.gradient_accumulation_steps=4",
            ]
        )
    )
    assert torch.get_num_threads() == 2
    assert accelerator.device.type == "cpu"
    assert accelerator.gradient_accumulation_steps == 4


def test_tracker_that_is_not_installed_is_named() -> None:
    with pytest.raises(ValueError, match=r"trackers: wandb is not installed: pip install wandb"):
        start(load_config(["output_dir=a", "data.shift=blend", "--cpu", "trackers=[wandb]"]))


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    start(load_config(["output_dir=a", "data.shift=blend", "--cpu", "trackers=[]"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started and Accelerate sees 1: add --cpu"):
        start(load_config(["output_dir=a", "data.shift=blend", "--cpu", "trackers=[]"]))


def test_processes_that_were_not_started_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.warns(UserWarning, match="starts one process whatever --num_processes says"):
        start(load_config(["output_dir=a", "data.shift=blend", "--cpu", "trackers=[]"]))


def test_trackers_get_figures_under_the_logs_of_the_run(tmp_path: Path) -> None:
    config = load_config([f"output_dir={tmp_path}", "data.shift=blend", "--cpu"])
    accelerator = start(config)
    start_trackers(config, accelerator)
    accelerator.log({"lr_0.01/train loss": 0.5}, step=3)
    accelerator.end_training()
    (event,) = EventAccumulator(str(tmp_path / "logs" / "peft-edge")).Reload().Scalars("lr_0.01/train loss")
    assert (event.step, event.value) == (3, 0.5)
