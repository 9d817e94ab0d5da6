from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peft_edge.methods import METHODS, Method
from peft_edge.records import DIVERGED, Record
from peft_edge.training.loop import DivergedError

Run = Callable[..., Record]


def test_warm_up_that_takes_all_steps_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.warmup_steps: 4 take all of the 4 steps"):
        run(tmp_path / "run", "training.warmup_steps=4")


def test_diverged_training_keeps_the_last_good_checkpoint_and_says_so(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"lr_1000.0 diverged: the loss at step \d .*Lower training.learning_rate"):
        run(tmp_path / "run", "training.learning_rate=1e3", "training.epochs=4")
    record = Record.from_json((tmp_path / "run" / "record.json").read_text())
    assert record.train_info.status == DIVERGED
    assert [entry["learning_rate"] for entry in record.train_info.sweep] == [1e3]
    assert "last good checkpoint" in record.run_info.error_msg
    (checkpoint,) = (tmp_path / "run" / "checkpoints" / "lr_1000.0").iterdir()
    weights = load_file(checkpoint / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_last_step_that_goes_wrong_is_found_too(run: Run, tmp_path: Path, method: str) -> None:
    one_step = ["training.batch_size=64", "training.epochs=1", "training.warmup_steps=0"]
    with pytest.raises(DivergedError, match="the loss at step 1 is nan"):
        run(tmp_path / "run", f"method={method}", "training.learning_rate=1e30", *one_step)


def test_fewer_images_than_a_batch_are_counted(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.batch_size is 128, and there are 64 images to adapt with"):
        run(tmp_path / "run", "training.batch_size=128")


def test_a_method_with_nothing_to_save_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "mine", Method(prepare=lambda model, options: model))
    with pytest.raises(ValueError, match="'mine' makes no PEFT model, and is not registered with ships_model=True"):
        run(tmp_path / "run", "method=mine")


def test_one_diverged_learning_rate_does_not_end_the_sweep(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(tmp_path / "run", "training.learning_rate=[1e3,1e-2]", "training.epochs=4")
    failed, kept = record.train_info.sweep
    assert failed["valid accuracy"] is None
    assert "diverged" in failed["diverged"]
    assert kept["valid accuracy"] == record.train_info.metrics[-2]["valid accuracy"]
    assert "learning rate 1000: diverged" in capsys.readouterr().out
