from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_edge.config import ConfigError, check_grid_keys, describe_keys, load_config, to_yaml

ROOT = Path(__file__).parents[2]
ErrorsOf = Callable[..., str]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: runs/a\ndata: {shift: blend}\ntraining:\n  epochs: 3\n  learning_rate: 1e-3\n")
    return path


@pytest.mark.parametrize(
    "override", [["training.epochs=5"], ["--training.epochs", "5"], ["--training.epochs=5"]], ids=["bare", "two", "one"]
)
def test_command_line_overrides_the_file_in_any_order(config_file: Path, override: list[str]) -> None:
    for arguments in (["--config", str(config_file), *override], [*override, "--config", str(config_file)]):
        config = load_config(arguments)
        assert config.training.epochs == 5
        assert config.output_dir == "runs/a"
        assert config.training.batch_size == 32


def test_numbers_lists_and_flags_are_read() -> None:
    required = ["output_dir=a=b", "data.shift=blend"]
    config = load_config(["--cpu", *required, "training.learning_rate=[1e-3, 0.02]", "source.weight_decay=1E-4"])
    assert config.cpu
    assert config.output_dir == "a=b"
    assert config.training.learning_rate == [1e-3, 0.02]
    assert config.source.weight_decay == 1e-4
    assert load_config([*required, "--training.learning_rate", "1e-3"]).training.learning_rate == [1e-3]


@pytest.mark.parametrize("word", ["off", "byte"])
def test_off_and_no_are_words(word: str) -> None:
    config = load_config(["output_dir=a", "data.shift=blend", f"lean.masks={word}", "training.mixed_precision=no"])
    assert config.lean.masks == word
    assert config.training.mixed_precision == "no"


def test_every_error_is_reported_with_its_origin(config_file: Path, errors_of: ErrorsOf) -> None:
    config_file.write_text(
        "output_dir: 3\ntraining:\n  epochs: 0\n  leraning_rate: 1\nadapter: {r: four}\nsource: 3\n"
        "data: {shift: blend}\n"
    )
    message = errors_of(
        "--config", str(config_file), "seed=true", "norm=restat", "method=lorra", "stray", "data.name=["
    )
    assert message.startswith("10 errors")
    for expected in (
        f"output_dir: should be a valid string, found 3 ({config_file})",
        f"training.epochs: should be greater than or equal to 1, found 0 ({config_file})",
        f"training.leraning_rate: unknown key; did you mean training.learning_rate? ({config_file})",
        f"adapter.r: should be a valid integer, found 'four' ({config_file})",
        f"source: expected a section of keys, found 3 ({config_file})",
        "seed: should be a valid integer, found True (command line)",
        "norm: should be 'frozen', 'recalibrate', 'stats' or 'affine', found 'restat' (command line)",
        "found 'lorra'; did you mean lora? (command line)",
        "stray: expected key=value or --key value",
        "data.name=[: while parsing",
    ):
        assert expected in message


def test_a_key_without_its_section_names_the_sections_that_have_it(errors_of: ErrorsOf) -> None:
    message = errors_of("output_dir=a", "--epochs", "3")
    assert "epochs: unknown key; did you mean source.epochs or training.epochs? (command line)" in message


def test_an_unknown_key_without_a_similar_key_names_the_keys_of_its_section(errors_of: ErrorsOf) -> None:
    assert "adapter.xyz: unknown key; the section adapter has r, lora_alpha, " in errors_of("adapter.xyz=1")
    assert "foo: unknown key (" in errors_of("foo=1")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("adapter.rank=4", "adapter.r"),
        ("lean.fold_norm=true", "lean.inplace_norm"),
        ("training.momentum=0", "source.momentum"),
    ],
)
def test_an_unknown_or_old_key_names_the_nearest_of_its_section(errors_of: ErrorsOf, key: str, nearest: str) -> None:
    assert f"{key.partition('=')[0]}: unknown key; did you mean {nearest}?" in errors_of("output_dir=a", key)


def test_an_unknown_section_names_the_nearest_section(errors_of: ErrorsOf) -> None:
    message = errors_of("output_dir=a", "traning.epochs=3")
    assert "traning: unknown key; did you mean training? (command line)" in message


def test_a_missing_output_dir_is_named(errors_of: ErrorsOf) -> None:
    assert "output_dir: is required (not given)" in errors_of("data.shift=blend")


@pytest.mark.parametrize("name", ["none.yaml", "notes.txt", "photo.png", "folder"])
def test_an_unreadable_file_is_the_only_error(name: str, tmp_path: Path, errors_of: ErrorsOf) -> None:
    """Without the file, `output_dir` and `data.shift` are missing, too."""
    (tmp_path / "notes.txt").write_text("some notes")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "folder").mkdir()
    message = errors_of("--config", str(tmp_path / name), "training.epochs=3")
    assert message.startswith("1 error in the configuration:\n  --config: ")
    assert str(tmp_path / name) in message


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("configs/quikstart.yaml", "configs/quickstart.yaml"),
        ("quickstart.yaml", "configs/quickstart.yaml"),
        ("config/quickstart.yml", "configs/quickstart.yaml"),
        ("configs/lora.yaml", "configs/methods/lora.yaml"),
        ("configs/methods/tflite.yaml", None),
    ],
)
def test_a_misspelt_file_names_the_nearest_file(
    given: str, nearest: str | None, errors_of: ErrorsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    end = f"; did you mean {nearest}?" if nearest else ""
    assert errors_of("--config", given).endswith(f"cannot read {given}: there is no such file in {ROOT}{end}")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["data.shfit=fog"], "data.shfit: unknown key; did you mean data.shift?"),
        (["data.new_classes=3"], "data.new_classes: should be a valid list"),
        (["data.shift=["], "data.shift=[: while parsing"),
        (["data.shift=fog", "output_dir=["], "output_dir=[: while parsing"),
    ],
)
def test_a_mistake_has_no_second_error_as_its_consequence(
    arguments: list[str], error: str, errors_of: ErrorsOf
) -> None:
    message = errors_of("output_dir=a", *arguments)
    assert message.startswith(f"1 error in the configuration:\n  {error}")


def test_missing_folders_are_reported_with_all_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    missing = ["data.name=path/to/photos", "data.shift=./night", "backbone.name=models/lite0", "output_dir=a"]
    assert load_config(missing).data.name == "path/to/photos"  # a study may start on a machine without the data
    with pytest.raises(ConfigError) as caught:
        load_config([*missing, "training.epochs=0"], check_files=True)
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 errors in the configuration:"
    for line, (key, part) in zip(
        lines[1:],
        [
            ("training.epochs", "greater than or equal to 1"),
            ("data.name", "unknown data 'path/to/photos': there is no such folder (command line)"),
            ("data.shift", "unknown shift './night': there is no such folder (command line)"),
            ("backbone.name", "there is no folder 'models/lite0'; for a model on the Hub"),
        ],
        strict=True,
    ):
        assert line.startswith(f"  {key}: ")
        assert part in line
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "record.json").touch()
    assert load_config(missing, check_files=True).output_dir == "a"  # prints its summary without the data


def test_a_file_without_keys_is_refused(config_file: Path, errors_of: ErrorsOf) -> None:
    config_file.write_text("- a\n- b\n")
    assert "expected keys and values, found list" in errors_of("--config", str(config_file), "output_dir=a")


def test_the_resolved_configuration_reads_back_the_same(config_file: Path, tmp_path: Path) -> None:
    config = load_config(
        ["--config", str(config_file), "adapter.target_modules=[conv_dw, conv_pw]", "training.max_grad_norm=1"]
    )
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(["--config", str(tmp_path / "resolved.yaml")]) == config


def test_every_key_is_described() -> None:
    keys = [key.splitlines() for key in describe_keys().split("\n\n")]
    titles = [title for title, *_ in keys]
    assert "training.learning_rate: [0.003]" in titles
    assert "output_dir: required" in titles
    assert all(description.startswith("    ") and description.strip() for _, description, *_ in keys)


HEAVY = "torch peft timm transformers accelerate datasets huggingface_hub"
PROGRAM = f"""
import sys
import train
sys.argv = ["train.py", *sys.argv[1:]]
try:
    train.command()
except SystemExit as ending:
    imported = {{name.partition(".")[0] for name in sys.modules}} & {{*"{HEAVY}".split()}}
    print("exit code", ending.code, "after importing", sorted(imported))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], None),
        (["adapter.rr=3"], 2),
        (["method=laro", "training.optimizer=adam"], 2),
        (["data.name=path/to/photos"], 2),
    ],
)
def test_help_and_mistakes_are_answered_before_torch_is_imported(arguments: list[str], code: int | None) -> None:
    quickstart = ["--config", "configs/quickstart.yaml"]
    command = [sys.executable, "-c", PROGRAM, *quickstart, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.endswith(f"exit code {code} after importing []\n"), result
    assert bool(result.stderr) == (code == 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipes: [[a.yaml]]\ngrid: {seed: [0], adapter.rank: [4]}", "grid.adapter.rank: unknown key; did you mean a"),
        ("recipes: [[a.yaml]]\ngrid: {sead: [0]}", "grid.sead: unknown key; did you mean seed?"),
        ("networks: [resnet18]\ngrid: {batchsize: [1]}", "grid.batchsize: unknown key; did you mean batch_size?"),
        ("- recipes: [[a.yaml]]\n- networks: [resnet18]\n  grid: {metod: [full]}", "did you mean method?"),
    ],
)
def test_misspelt_keys_of_a_grid_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        check_grid_keys(file)
    assert str(error.value).startswith(f"{file}: grid.")


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[1]", "grid: 3"),
        "recipes: [[a.yaml]]\ngrid: {adapter: [{r: 4}], seed: [0]}",
        "networks: [a]\ngrid: {norm: [null]}",
    ],
)
def test_other_mistakes_in_a_grid_file_are_left_to_the_study(tmp_path: Path, text: str) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    check_grid_keys(tmp_path / "grid.yaml")


def test_shipped_grids_have_known_keys() -> None:
    for file in (Path(__file__).parents[2] / "configs" / "study").glob("*.yaml"):
        check_grid_keys(file)
