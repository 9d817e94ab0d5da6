from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import train


@pytest.mark.parametrize(
    ("argument", "message"),
    [("training.epochs=0", "training.epochs: should be greater"), ("data.shift=blent", "did you mean 'blend'?")],
)
def test_wrong_input_gives_one_message_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argument: str,
    message: str,
) -> None:
    options = [f"output_dir={tmp_path / 'run'}", "data.shift=blend", "trackers=[]", "--cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *options, argument])
    with pytest.raises(SystemExit) as ending:
        train.command()
    assert ending.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors


def test_ctrl_c_ends_with_one_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "main", interrupted)
    with pytest.raises(SystemExit) as ending:
        train.command()
    assert ending.value.code == 130
    assert capsys.readouterr().err == "stopped: the same command resumes from the newest checkpoint\n"


def test_help_into_a_closed_pipe_prints_no_error() -> None:
    """As `train.py --help | head -1` does, once the pipe is full."""
    command = [sys.executable, train.__file__, "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
