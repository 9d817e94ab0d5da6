from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peft_edge.records import SUCCESS, Record

Run = Callable[..., Record]


def test_run_leaves_an_adapter_a_record_and_a_table(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(tmp_path / "run", "training.learning_rate=[1e-3,1e-2]")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"adapter", "config.yaml", "record.json"}
    train = record.train_info
    assert train.status == SUCCESS
    assert train.file_size == (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert [tried["learning_rate"] for tried in train.sweep] == [1e-3, 1e-2]
    # 64 images are 2 steps of 32, and there are 2 epochs.
    assert [entry["step"] for entry in train.metrics] == [2, 4, 4]
    assert train.metrics[-2]["valid accuracy"] == max(tried["valid accuracy"] for tried in train.sweep)
    assert train.checks["reloaded_max_logit_difference"] == 0
    assert train.checks["merged_max_logit_difference"] < 1e-4
    assert [(row.scope, row.lora_rank, row.steps) for row in record.profile] == [("step", 4, 1), ("layers", 4, 1)]
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert record.profile[0].adapter_bytes == sum(tensor.nbytes for tensor in saved.values())
    printed = capsys.readouterr().out
    assert f"{train.num_trainable_params:,}" in printed
    assert f"{train.file_size:,}" in printed
    assert f"{train.metrics[-1]['test accuracy']:.3f}" in printed


@pytest.mark.parametrize("method", ["none", "head", "full"])
def test_methods_without_an_adapter(run: Run, tmp_path: Path, method: str) -> None:
    record = run(tmp_path / "run", f"method={method}")
    results, train = record.train_info.metrics[-1], record.train_info
    assert record.run_info.peft_config is None
    assert (tmp_path / "run" / "model" / "model.safetensors").exists() == (method != "none")
    if method == "none":
        assert results["test accuracy"] == results["test accuracy without update"]
        assert train.num_trainable_params == 0
    if method == "full":
        assert train.num_trainable_params == train.num_total_params
        assert train.checks["reloaded_max_logit_difference"] == 0


def test_wrong_adapter_is_reported_before_anything_is_trained(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_edge.training.source_model", None)
    with pytest.raises(ValueError, match="no_such_layer"):
        run(tmp_path / "run", "adapter.target_modules=[no_such_layer]")


def test_unknown_backbone_names_the_nearest(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mobilenetv3_small_050"):
        run(tmp_path / "run", "backbone.name=mobilenetv3_smal_050")


def test_warm_up_that_takes_all_steps_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.warmup_steps: 4 take all of the 4 steps"):
        run(tmp_path / "run", "training.warmup_steps=4")


def test_finished_run_only_prints_its_table(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path / "run", "method=none")
    capsys.readouterr()
    monkeypatch.setattr("peft_edge.training.source_model", None)
    assert run(tmp_path / "run", "method=none") == first
    assert "holds this run, finished" in capsys.readouterr().out
