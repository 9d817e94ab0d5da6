from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from peft_edge.config import ConfigError, RunConfig, load_config
from peft_edge.records import FAILED, SUCCESS
from peft_edge.training.run_folder import (
    Progress,
    last_good_checkpoint,
    load_checkpoint,
    lock_output_dir,
    open_run,
    save_checkpoint,
)
from peft_edge.training.summary import new_record


def config_for(folder: Path, *overrides: str) -> RunConfig:
    return load_config([f"output_dir={folder}", "data.shift=blend", *overrides])


def test_a_run_is_resumed_in_its_folder(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert not open_run(config_for(tmp_path / "run"), accelerator).is_resumed
    run = open_run(config_for(tmp_path / "run"), accelerator)
    assert run.is_resumed
    assert run.record is None


def test_a_run_is_resumed_in_a_moved_folder(tmp_path: Path) -> None:
    open_run(config_for(tmp_path / "run"), Accelerator(cpu=True))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert open_run(config_for(tmp_path / "moved"), Accelerator(cpu=True)).is_resumed


def test_the_folder_of_another_run_is_refused_and_not_changed(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    open_run(config_for(tmp_path / "run", "training.epochs=2"), accelerator)
    (tmp_path / "run" / "checkpoints").mkdir()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="holds another run") as caught:
        open_run(config_for(tmp_path / "run", "training.epochs=3", "seed=1"), accelerator)
    assert "training.epochs is 2 there and 3 here" in str(caught.value)
    assert "seed is 0 there and 1 here" in str(caught.value)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("status", [SUCCESS, FAILED])
def test_another_run_replaces_a_failed_run_but_not_a_run_whose_record_is_its_only_result(
    tmp_path: Path, status: str
) -> None:
    config = config_for(tmp_path / "run", "method=none")
    run = open_run(config, Accelerator(cpu=True))
    run.write_record(record := new_record(config, status, started=0.0))
    other = config_for(tmp_path / "run", "method=none", "seed=1")
    if status == SUCCESS:
        with pytest.raises(ConfigError, match="holds another run") as caught:
            open_run(other, Accelerator(cpu=True))
        assert "seed is 0 there and 1 here" in str(caught.value)
        assert open_run(config, Accelerator(cpu=True)).record == record
    else:
        assert not open_run(other, Accelerator(cpu=True)).is_resumed


def test_the_folder_of_a_run_without_results_is_reused(tmp_path: Path) -> None:
    open_run(config_for(tmp_path / "run", "backbone.name=mistyped"), Accelerator(cpu=True))

    run = open_run(config_for(tmp_path / "run"), Accelerator(cpu=True))

    assert not run.is_resumed
    assert "mistyped" not in (tmp_path / "run" / "config.yaml").read_text()


def test_a_run_killed_while_writing_its_first_file_starts_again(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.unfinished").write_text("output_")

    assert not open_run(config_for(tmp_path), Accelerator(cpu=True)).is_resumed


@pytest.mark.parametrize("content", ["", "- a", "a: [", "\x00"])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)

    with pytest.raises(ConfigError, match=r"config.yaml is damaged"):
        open_run(config_for(tmp_path), Accelerator(cpu=True))


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    run = open_run(config_for(tmp_path), Accelerator(cpu=True))
    (tmp_path / "record.json").write_text('{"run_info"')

    with pytest.raises(ValueError, match=r"record.json is damaged: move it away"):
        _ = run.record


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        open_run(config_for(tmp_path), Accelerator(cpu=True))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_update_is_copied_into_the_run_folder(tmp_path: Path) -> None:
    run = open_run(config_for(tmp_path / "run"), Accelerator(cpu=True))
    (tmp_path / "candidate" / "adapter").mkdir(parents=True)
    (tmp_path / "candidate" / "adapter" / "a").write_text("a")
    published = run.publish(tmp_path / "candidate" / "adapter")
    assert published == tmp_path / "run" / "adapter"
    assert (published / "a").read_text() == "a"


def test_two_runs_cannot_use_one_folder_at_a_time(tmp_path: Path) -> None:
    accelerator, config = Accelerator(cpu=True), config_for(tmp_path / "run")
    with (
        lock_output_dir(config, accelerator),
        pytest.raises(ConfigError, match="another run is working in"),
        lock_output_dir(config, accelerator),
    ):
        pass
    with lock_output_dir(config, accelerator), lock_output_dir(config_for(tmp_path / "other"), accelerator):
        pass


def prepared() -> tuple[Accelerator, nn.Module]:
    accelerator = Accelerator(cpu=True)
    accelerator.free_memory()
    model = nn.Linear(2, 2)
    return accelerator, accelerator.prepare(model, torch.optim.AdamW(model.parameters()))[0]


def test_the_newest_checkpoint_restores_weights_progress_and_random_state(tmp_path: Path) -> None:
    accelerator, model = prepared()
    for step in (9, 10, 11):
        save_checkpoint(accelerator, tmp_path, Progress(1, step, loss_sum=0.1, metrics=[{"step": step}]), keep=2)
    weight, draw = model.weight.detach().clone(), torch.rand(3)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_00000010", "step_00000011"]

    with torch.no_grad():
        model.weight.zero_()
    assert load_checkpoint(accelerator, tmp_path) == Progress(1, 11, loss_sum=0.1, metrics=[{"step": 11}])
    assert torch.equal(model.weight, weight)
    assert torch.equal(torch.rand(3), draw)


def test_without_a_checkpoint_training_starts_at_step_0(tmp_path: Path) -> None:
    accelerator, _ = prepared()
    assert load_checkpoint(accelerator, tmp_path / "none") == Progress(1)


def test_an_unfinished_checkpoint_is_ignored(tmp_path: Path) -> None:
    accelerator, _ = prepared()
    save_checkpoint(accelerator, tmp_path, Progress(1, 3), keep=2)
    (tmp_path / ".step_00000006.unfinished").mkdir()
    assert load_checkpoint(accelerator, tmp_path).step == 3


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    accelerator, _ = prepared()
    save_checkpoint(accelerator, tmp_path, Progress(num_processes=2, step=3), keep=2)
    with pytest.raises(ValueError, match="a run with --num_processes 2, and this one has 1"):
        load_checkpoint(accelerator, tmp_path)


@pytest.mark.parametrize(
    "name", ["progress.json", "sha256.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl"]
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    accelerator, _ = prepared()
    save_checkpoint(accelerator, tmp_path, Progress(1, 3), keep=2)
    file = tmp_path / "step_00000003" / name
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ValueError, match=r"the checkpoint .*step_00000003 is damaged: .*Delete it"):
        load_checkpoint(accelerator, tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000, '{"progress.json": 1}', '{"no_such_file": ""}'])
def test_a_checkpoint_with_invalid_digests_is_damaged(tmp_path: Path, text: str) -> None:
    accelerator, _ = prepared()
    save_checkpoint(accelerator, tmp_path, Progress(1, 3), keep=2)
    (tmp_path / "step_00000003" / "sha256.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(accelerator, tmp_path)


def test_foreign_files_beside_and_in_checkpoints_are_ignored(tmp_path: Path) -> None:
    accelerator, _ = prepared()
    save_checkpoint(accelerator, tmp_path, Progress(1, 3), keep=2)
    (tmp_path / "step_00000003" / ".DS_Store").write_text("")
    for name in ("step_backup", "step_00000009 (copy)"):
        (tmp_path / name).mkdir()
    assert load_checkpoint(accelerator, tmp_path).step == 3
    assert last_good_checkpoint(accelerator, tmp_path, 9) == tmp_path / "step_00000003"


def test_checkpoints_from_the_bad_step_on_are_deleted(tmp_path: Path) -> None:
    accelerator, _ = prepared()
    for step in (4, 5):
        save_checkpoint(accelerator, tmp_path, Progress(1, step), keep=2)
    assert last_good_checkpoint(accelerator, tmp_path, 5) == tmp_path / "step_00000004"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]
    assert last_good_checkpoint(accelerator, tmp_path, 4) is None
    assert list(tmp_path.iterdir()) == []
