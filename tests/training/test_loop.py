from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_edge.records import FAILED, Record
from peft_edge.training import loop

Run = Callable[..., Record]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_identical(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on_to_the_same_bits(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["adapter.lora_dropout=0.1"]  # so that the state of the random numbers matters too
    run(tmp_path / "whole", *options)
    save_checkpoint = loop.save_checkpoint

    def save_on_a_disk_that_fills_up(accelerator, folder, progress, *, keep) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if progress.step == 1 else 100_000, hard))
        try:
            save_checkpoint(accelerator, folder, progress, keep=keep)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patched:
        patched.setattr(loop, "save_checkpoint", save_on_a_disk_that_fills_up)
        with pytest.raises(OSError, match=r"no space to write .*step_00000002: [\d,]+ bytes"):
            run(tmp_path / "stopped", *options)
    checkpoints = tmp_path / "stopped" / "checkpoints" / "lr_0.01"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000001"]
    failed = Record.from_json((tmp_path / "stopped" / "record.json").read_text())
    assert failed.train_info.status == FAILED
    assert "no space to write" in failed.run_info.error_msg

    steps = []
    step = loop._step
    monkeypatch.setattr(loop, "_step", lambda *arguments: steps.append(1) or step(*arguments))
    record = run(tmp_path / "stopped", *options)
    assert len(steps) == 4 - 1
    assert record.run_info.total_time is None
    assert_identical(adapter_of(tmp_path / "stopped"), adapter_of(tmp_path / "whole"))


def test_accumulation_changes_memory_not_the_result(run: Run, tmp_path: Path) -> None:
    """With frozen norms an image's gradient does not depend on the rest of its batch."""
    frozen = ["adapter.norm=frozen", "training.epochs=1"]
    run(tmp_path / "one", *frozen)
    run(tmp_path / "four", *frozen, "training.gradient_accumulation_steps=4")
    one, four = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "four")
    for name in one:
        torch.testing.assert_close(four[name], one[name], atol=1e-4, rtol=1e-3)
