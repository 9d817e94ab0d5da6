from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peft_edge import study
from peft_edge.cli import main


def test_study_prints_a_table_and_names_the_log_of_a_failed_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid.yaml").write_text("networks: [resnet18]\ngrid: {method: [full, lora]}\n")
    asked = {}
    monkeypatch.setattr(study, "run_grid", lambda jobs, **options: asked.update(options))
    with pytest.raises(SystemExit) as stop:
        main(["study", "--grid", str(tmp_path / "grid.yaml"), "--output-dir", str(tmp_path / "runs"), "--jobs", "2"])
    assert stop.value.code == 2
    assert asked == {"processes": 2, "results": tmp_path / "runs" / "results", "cluster": None}
    printed = capsys.readouterr()
    assert "0, not run" in printed.out
    assert f"error: 2 of 2 failed: {tmp_path}/runs/resnet18--full" in printed.err


def test_misspelt_grid_key_is_named_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("recipes: [[a.yaml]]\ngrid: {adapter.rank: [4]}\n")
    program = f"""
import sys
from peft_edge.cli import main
try:
    main(["study", "--grid", r"{tmp_path}/grid.yaml", "--output-dir", r"{tmp_path}"])
finally:
    print("torch" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "False\n")
    assert ended.stderr == f"error: {tmp_path}/grid.yaml: grid.adapter.rank: unknown key; did you mean adapter.r?\n"


def test_interrupted_study_ends_with_exit_code_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "read_grid", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["study", "--grid", "grid.yaml", "--output-dir", str(tmp_path)])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "stopped: finished results are kept\n"


def test_options_of_a_cluster_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grid.yaml").write_text("networks: [resnet18]\ngrid: {method: [full]}\n")
    asked = {}
    monkeypatch.setattr(study, "run_grid", lambda jobs, **options: asked.update(options))
    command = ["study", "--grid", str(tmp_path / "grid.yaml"), "--output-dir", str(tmp_path / "runs")]
    options = ["--cluster", "10.0.0.1:6379", "--num-gpus", "0.5", "--memory", "4GiB", "--artifacts", "s3://bucket"]
    with pytest.raises(SystemExit):  # the analysis has not run
        main([*command, *options])
    assert asked["cluster"] == study.Cluster("10.0.0.1:6379", None, 0.5, 4 * 2**30, "s3://bucket")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-gpus", "1"], "--num-gpus: needs --cluster"),
        (["--num-cpus", "0"], "--num-cpus: needs --cluster"),
        (["--memory", "4GiB", "--artifacts", "s3://bucket"], "--memory, --artifacts: needs --cluster"),
        (["--cluster", "auto", "--jobs", "2"], "--jobs and --cluster exclude each other"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["study", "--grid", "grid.yaml", "--output-dir", str(tmp_path), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
