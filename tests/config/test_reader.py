from __future__ import annotations

from pathlib import Path

import pytest

from peft_edge.config import ConfigError, describe_keys, load_config, to_yaml


def errors_of(*arguments: str, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments, **kwargs)
    return str(caught.value)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: runs/a\ndata: {shift: blend}\ntraining:\n  epochs: 3\n  learning_rate: 1e-3\n")
    return path


@pytest.mark.parametrize(
    "override", [["training.epochs=5"], ["--training.epochs", "5"], ["--training.epochs=5"]], ids=["bare", "two", "one"]
)
def test_command_line_overrides_the_file_wherever_it_stands(config_file: Path, override: list[str]) -> None:
    for arguments in (["--config", str(config_file), *override], [*override, "--config", str(config_file)]):
        config = load_config(arguments)
        assert config.training.epochs == 5
        assert config.output_dir == "runs/a"
        assert config.training.batch_size == 32


def test_numbers_lists_and_flags_are_read() -> None:
    config = load_config(
        [
            "--cpu",
            "output_dir=a=b",
            "data.shift=blend",
            "training.learning_rate=[1e-3, 0.02]",
            "source.weight_decay=1E-4",
        ]
    )
    assert config.cpu
    assert config.output_dir == "a=b"
    assert config.training.learning_rate == [1e-3, 0.02]
    assert config.source.weight_decay == 1e-4
    assert load_config(
        ["output_dir=a", "data.shift=blend", "--training.learning_rate", "1e-3"]
    ).training.learning_rate == [1e-3]


@pytest.mark.parametrize("word", ["off", "byte"])
def test_off_and_no_are_words(word: str) -> None:
    config = load_config(["output_dir=a", "data.shift=blend", f"lean.masks={word}", "training.mixed_precision=no"])
    assert config.lean.masks == word
    assert config.training.mixed_precision == "no"


def test_every_error_is_reported_with_its_origin(config_file: Path) -> None:
    config_file.write_text(
        "output_dir: 3\ntraining:\n  epochs: 0\n  leraning_rate: 1\nadapter: {r: four}\nsource: 3\n"
        "data: {shift: blend}\n"
    )
    message = errors_of("--config", str(config_file), "seed=true", "norm=batch", "stray", "data.name=[")
    assert message.startswith("9 errors")
    for expected in (
        f"output_dir: should be a valid string, found 3 ({config_file})",
        f"training.epochs: should be greater than or equal to 1, found 0 ({config_file})",
        f"training.leraning_rate: unknown key; did you mean training.learning_rate? ({config_file})",
        f"adapter.r: should be a valid integer, found 'four' ({config_file})",
        f"source: expected a section of keys, found 3 ({config_file})",
        "seed: should be a valid integer, found True (command line)",
        "norm: should be 'frozen', 'recalibrate', 'stats' or 'affine', found 'batch' (command line)",
        "stray: expected key=value or --key value",
        "data.name=[: while parsing",
    ):
        assert expected in message


def test_key_without_its_section_is_pointed_to_the_sections_that_have_it() -> None:
    message = errors_of("output_dir=a", "--epochs", "3")
    assert "epochs: unknown key; did you mean source.epochs or training.epochs? (command line)" in message


def test_a_key_of_the_same_section_is_nearer_than_the_same_key_of_another() -> None:
    assert "adapter.rank: unknown key; did you mean adapter.r?" in errors_of("output_dir=a", "adapter.rank=4")


def test_choices_of_other_modules_are_checked() -> None:
    message = errors_of("output_dir=a", "method=laro", choices={"method": ["full", "lora"]})
    assert "method: expected one of full, lora, found 'laro'; did you mean lora? (command line)" in message


def test_missing_output_dir_and_missing_file_are_named(tmp_path: Path) -> None:
    message = errors_of("--config", str(tmp_path / "none.yaml"))
    assert "none.yaml: No such file" in message
    assert "output_dir: is required (not given)" in message


def test_file_must_hold_keys(config_file: Path) -> None:
    config_file.write_text("- a\n- b\n")
    assert "expected keys and values, found list" in errors_of("--config", str(config_file), "output_dir=a")


def test_resolved_configuration_is_read_back_the_same(config_file: Path, tmp_path: Path) -> None:
    config = load_config(
        ["--config", str(config_file), "adapter.target_modules=[conv_dw, conv_pw]", "training.max_grad_norm=1"]
    )
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(["--config", str(tmp_path / "resolved.yaml")]) == config


def test_every_key_is_described() -> None:
    lines = describe_keys().splitlines()
    assert "training.learning_rate: [0.01]" in lines
    assert "output_dir: required" in lines
    assert not any(line.strip() == "None" for line in lines)
