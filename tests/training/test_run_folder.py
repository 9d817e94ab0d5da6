from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator

from peft_edge.config import ConfigError, RunConfig, load_config
from peft_edge.training.run_folder import claimed, open_run


def config_for(folder: Path, *overrides: str) -> RunConfig:
    return load_config([f"output_dir={folder}", "data.shift=blend", *overrides])


def test_a_run_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert not open_run(config_for(tmp_path / "run"), accelerator).is_resumed
    run = open_run(config_for(tmp_path / "run"), accelerator)
    assert run.is_resumed
    assert run.record is None


def test_a_folder_may_be_moved(tmp_path: Path) -> None:
    open_run(config_for(tmp_path / "run"), Accelerator(cpu=True))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert open_run(config_for(tmp_path / "moved"), Accelerator(cpu=True)).is_resumed


def test_folder_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    open_run(config_for(tmp_path / "run", "training.epochs=2"), accelerator)
    (tmp_path / "run" / "checkpoints").mkdir()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="holds another run") as caught:
        open_run(config_for(tmp_path / "run", "training.epochs=3", "seed=1"), accelerator)
    assert "training.epochs is 2 there and 3 here" in str(caught.value)
    assert "seed is 0 there and 1 here" in str(caught.value)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_folder_of_a_run_that_has_left_nothing_is_taken_over(tmp_path: Path) -> None:
    open_run(config_for(tmp_path / "run", "backbone.name=mistyped"), Accelerator(cpu=True))

    run = open_run(config_for(tmp_path / "run"), Accelerator(cpu=True))

    assert not run.is_resumed
    assert "mistyped" not in (tmp_path / "run" / "config.yaml").read_text()


def test_run_killed_while_it_wrote_its_first_file_starts_again(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.unfinished").write_text("output_")

    assert not open_run(config_for(tmp_path), Accelerator(cpu=True)).is_resumed


@pytest.mark.parametrize("content", ["", "- a", "a: [", "\x00"])
def test_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)

    with pytest.raises(ConfigError, match=r"config.yaml is damaged"):
        open_run(config_for(tmp_path), Accelerator(cpu=True))


def test_damaged_record_is_named(tmp_path: Path) -> None:
    run = open_run(config_for(tmp_path), Accelerator(cpu=True))
    (tmp_path / "record.json").write_text('{"run_info"')

    with pytest.raises(ValueError, match=r"record.json is damaged: delete it"):
        _ = run.record


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        open_run(config_for(tmp_path), Accelerator(cpu=True))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_update_is_published_whole(tmp_path: Path) -> None:
    run = open_run(config_for(tmp_path / "run"), Accelerator(cpu=True))
    (tmp_path / "candidate" / "adapter").mkdir(parents=True)
    (tmp_path / "candidate" / "adapter" / "a").write_text("a")
    published = run.publish(tmp_path / "candidate" / "adapter")
    assert published == tmp_path / "run" / "adapter"
    assert (published / "a").read_text() == "a"


def test_two_runs_do_not_work_in_one_folder(tmp_path: Path) -> None:
    accelerator, config = Accelerator(cpu=True), config_for(tmp_path / "run")
    with (
        claimed(config, accelerator),
        pytest.raises(ConfigError, match="another run is working in"),
        claimed(config, accelerator),
    ):
        pass
    with claimed(config, accelerator), claimed(config_for(tmp_path / "other"), accelerator):
        pass
