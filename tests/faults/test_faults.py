"""Each fault gives the documented reaction, and loses no more than documented."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from accelerate import Accelerator
from PIL import Image

from peft_edge.profiling.callback import read_profile
from peft_edge.records import DIVERGED, FAILED, SUCCESS, Record
from peft_edge.training import loop
from peft_edge.training.run_folder import Progress
from tests.faults.small_run import (
    FIRST_TRAINING,
    arguments,
    begin,
    completed,
    digest,
    ended,
    log_of,
    steps_saved,
    wait_for,
)
from tests.faults.table import Fault, add

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOTHING = "nothing"


def record_of(run: Path) -> Record:
    return Record.from_json((run / "record.json").read_text())


def error_of(text: str) -> str:
    """Return the first line of the error message in `text`."""
    return text[text.index("error: ") :].splitlines()[0]


def test_sigterm_saves_the_current_step(run: Path, cache: str, whole: str) -> None:
    process = begin(run, cache)
    wait_for(2, run, process)
    process.terminate()
    code, stop_s = ended(process)
    assert code == 128 + signal.SIGTERM
    said = log_of(run).read_text()
    assert "the same command resumes there" in said
    step = int(said.split("terminated: step ")[1].split()[0])
    assert steps_saved(run)[-1] == step
    recover_s = completed(run, cache)
    assert digest(run) == whole
    add(Fault("SIGTERM", "completes its step, saves a checkpoint, and exits with 143", stop_s, recover_s, NOTHING))


def test_a_full_disk_names_the_file_and_the_free_bytes(run: Path, cache: str, whole: str) -> None:
    """The run's folder is a file system with space for two checkpoints, which is enlarged afterwards."""
    run.mkdir()
    command = f"{sys.executable} -m tests.faults.small_run {shlex.join(arguments(run, cache))}"
    script = (
        f"mount -t tmpfs -o size=7500k none {run} && (({command}); echo code $?; ls {run}/checkpoints/*; date +%s.%N; "
        f"mount -o remount,size=64m {run}; {command} && date +%s.%N && cp -r {run}/adapter {run.parent}/adapter)"
    )
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]
    if subprocess.run([*isolated, f"mount -t tmpfs none {run}"], capture_output=True).returncode:
        pytest.skip("this system lets no test mount a file system")
    done = subprocess.run([*isolated, script], cwd=ROOT, capture_output=True, text=True)
    assert "code 2" in done.stdout, done.stderr
    message = r"no space to write \S+step_\d+: [\d,]+ bytes are free there\. Nothing that was saved before is lost"
    assert re.search(message, error_of(done.stderr))
    assert "step_00000002" in done.stdout
    assert done.returncode == 0, done.stderr
    begun, over = [float(line) for line in done.stdout.splitlines() if line.replace(".", "", 1).isdigit()]
    assert digest(run.parent) == whole
    add(
        Fault(
            "a full disk while a checkpoint is written",
            "exits with 2, and says which file does not fit, how many bytes are free, and that no saved file is lost",
            None,
            over - begun,
            "the steps since the checkpoint before",
        )
    )


def test_a_vanished_image_is_named(run: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for number in range(48):
        file = photos / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (5 * number, 100 * (number % 2), 0)).save(file)
    options = [
        f"data.name={photos}",
        "data.shift=invert",
        "source.batch_size=8",
        "training.batch_size=8",
        "training.epochs=40",
    ]
    options += ["training.eval_every_epochs=40", "training.learning_rate=3e-3"]
    completed(tmp_path / "whole" / "run", *options)

    process = begin(run, *options)
    wait_for(2, run, process)
    hidden = shutil.move(photos / "a", tmp_path / "a")
    code, stop_s = ended(process)
    said = error_of(log_of(run).read_text())
    assert code == 2
    assert str(photos / "a") in said
    assert "cannot read image" in said
    assert record_of(run).train_info.status == FAILED
    shutil.move(hidden, photos / "a")
    recover_s = completed(run, *options)
    assert digest(run) == digest(tmp_path / "whole" / "run")
    add(
        Fault(
            "image files that vanish",
            "exits with 2, and names the file",
            stop_s,
            recover_s,
            "the steps since the last checkpoint",
        )
    )


def test_a_nan_loss_stops_training_and_keeps_good_checkpoints(run: Path, cache: str) -> None:
    code, _ = ended(begin(run, cache, "training.learning_rate=1e20", "training.checkpoint_every_steps=1"))
    assert code == 2
    said = error_of(log_of(run).read_text())
    step = int(re.search(r"lr_1e\+20 diverged: the loss at step (\d+) is nan", said).group(1))
    assert "Lower training.learning_rate" in said
    assert all(saved < step - 1 for saved in steps_saved(run, "lr_1e+20"))
    assert record_of(run).train_info.status == DIVERGED
    add(
        Fault(
            "a loss of NaN",
            "exits with 2, and says at which step and which setting to lower; earlier checkpoints are kept",
            None,
            None,
            "the training",
        )
    )


@pytest.mark.distributed
def test_if_one_of_two_processes_is_killed_the_other_ends(run: Path, cache: str) -> None:
    launcher = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "-m", "tests.faults.small_run"]
    long = ["training.epochs=1000", "training.checkpoint_every_steps=10", "profiling.every_n_steps=1000"]
    command = [*launcher, *arguments(run, cache, *long)]
    launched = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    profiles = [run / "profile" / FIRST_TRAINING / f"process_{index}.json" for index in (0, 1)]
    while not steps_saved(run) or not all(is_measured(profile) for profile in profiles):
        assert launched.poll() is None, launched.communicate()[1]
        time.sleep(0.01)
    workers = [
        process for process in psutil.Process(launched.pid).children(recursive=True) if "RANK" in process.environ()
    ]
    started = time.monotonic()
    next(process for process in workers if process.environ()["RANK"] == "1").kill()
    _, errors = launched.communicate(timeout=100)
    stop_s = time.monotonic() - started
    assert launched.returncode == 1
    assert "SIGKILL" in errors
    assert not [process for process in workers if process.is_running()]
    assert steps_saved(run)
    record = record_of(run)
    assert record.train_info.status == FAILED
    (other, _) = (row for row in record.profile if row.scope == "step")
    assert other.process_index == 0
    assert None not in (other.flops_forward, other.forward_s, other.memory_peak_bytes, other.peak_rss_bytes)
    assert read_profile(run / "profile")[0] == other
    add(
        Fault(
            "one of two processes is killed",
            "the other process ends; the launcher exits with 1, and names the killed process and the signal",
            stop_s,
            None,
            "the steps since the last checkpoint",
        )
    )


def is_measured(profile: Path) -> bool:
    return profile.exists() and bool(json.loads(profile.read_text())["times"])


def test_if_an_image_loading_process_is_killed_the_run_ends(run: Path, cache: str) -> None:
    process = begin(run, cache, "num_workers=1", "training.epochs=1000")
    wait_for(4, run, process)
    next(child for child in psutil.Process(process.pid).children()).kill()
    code, stop_s = ended(process)
    assert code == 1
    assert "DataLoader worker" in log_of(run).read_text()
    assert record_of(run).train_info.status == FAILED
    add(
        Fault(
            "a process that reads images is killed",
            "exits with 1, and names the process",
            stop_s,
            None,
            "the steps since the last checkpoint",
        )
    )


def test_durations_stay_right_while_the_clock_jumps(run: Path, cache: str, whole: str) -> None:
    process = begin(run, cache, prepare=_let_the_clock_jump)
    code, seconds = ended(process)
    assert code == 0, log_of(run).read_text()
    record = record_of(run)
    assert digest(run) == whole
    assert 0 < record.train_info.train_time < record.run_info.total_time < seconds
    add(
        Fault("the clock is set back by a day, again and again", "continues; durations stay right", None, None, NOTHING)
    )


def test_a_second_run_in_the_same_folder_is_refused(run: Path, cache: str, whole: str) -> None:
    first = begin(run, cache)
    wait_for(2, run, first)
    second = begin(run, cache)
    code, stop_s = ended(second)
    assert code == 2
    assert "another run is working in" in error_of(log_of(run).read_text())
    assert ended(first)[0] == 0
    assert digest(run) == whole
    add(
        Fault(
            "a second run in the same folder",
            "the second run exits with 2; the first run continues",
            stop_s,
            None,
            NOTHING,
        )
    )


def test_a_damaged_checkpoint_is_named_and_recovery_uses_the_one_before(run: Path, cache: str, whole: str) -> None:
    assert ended(begin(run, cache, prepare=_let_it_die_after_a_second_checkpoint))[0] == -signal.SIGKILL
    newest = run / "checkpoints" / FIRST_TRAINING / f"step_{steps_saved(run)[-1]:08d}"
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, _ = ended(begin(run, cache))
    assert code == 2
    assert f"the checkpoint {newest} is damaged" in error_of(log_of(run).read_text())
    shutil.rmtree(newest)
    recover_s = completed(run, cache)
    assert digest(run) == whole
    add(
        Fault(
            "a damaged checkpoint",
            "exits with 2, and names the checkpoint to delete; the next start then continues from the one before it",
            None,
            recover_s,
            "the steps since the checkpoint before",
        )
    )


def test_a_run_is_complete_when_the_hub_cannot_be_reached(run: Path, cache: str, whole: str) -> None:
    code, _ = ended(begin(run, cache, "hub.repo_id=me/adapter", prepare=_let_the_hub_be_away))
    assert code == 2
    assert "The same command pushes again, without training" in log_of(run).read_text()
    assert record_of(run).train_info.status == SUCCESS
    assert digest(run) == whole
    add(
        Fault(
            "the Hub cannot be reached",
            "completes the run, exits with 2, and says that the same command pushes again",
            None,
            None,
            NOTHING,
        )
    )


def _let_the_clock_jump() -> None:
    now, calls = time.time, iter(range(10**9))
    time.time = lambda: now() - 86_400 * next(calls)


def _let_it_die_after_a_second_checkpoint() -> None:
    save = loop.save_checkpoint

    def save_and_die(accelerator: Accelerator, folder: Path, progress: Progress, *, keep: int) -> None:
        save(accelerator, folder, progress, keep=keep)
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.save_checkpoint = save_and_die


def _let_the_hub_be_away() -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = False
    constants.ENDPOINT = "http://127.0.0.1:9"
    os.environ["HF_TOKEN"] = "hf_none"
