"""The C++ example: built against ONNX Runtime, it trains without Python. Both examples survive being killed."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from peft_edge import load_pretrained
from peft_edge.export.device_states import import_state

EXAMPLES = Path(__file__).parents[3] / "peft_edge/export/examples"
HEADER = "onnxruntime_c_api.h"
PLACES = [os.environ.get("ONNXRUNTIME_INCLUDE", ""), "/usr/local/include", "/usr/include"]


@pytest.fixture(scope="module")
def native(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the exported step, and with the images as PPM files in the size of the network's input."""
    folder = tmp_path_factory.mktemp("native")
    shutil.copytree(place / "step", folder / "step")
    for file in (place / "images").glob("*/*.png"):
        (folder / "images" / file.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((32, 32)).save(folder / "images" / file.parent.name / f"{file.stem}.ppm")
    return folder


@pytest.fixture
def one_image(native: Path, tmp_path: Path) -> Path:
    """Return a folder with one image, so that every run of the program takes the same steps."""
    images = tmp_path / "one"
    for folder in (native / "images").iterdir():
        (images / folder.name).mkdir(parents=True)
    shutil.copy(native / "images" / "green" / "0.ppm", images / "green")
    return images


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    compiler = shutil.which("c++")
    includes = [
        path for root in PLACES for path in (Path(root), Path(root) / "onnxruntime") if (path / HEADER).is_file()
    ]
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"), None)
    if not (compiler and includes and library):
        pytest.skip(f"needs a C++ compiler, {HEADER} (set ONNXRUNTIME_INCLUDE to its folder) and libonnxruntime.so")
    folder = tmp_path_factory.mktemp("build")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    source, binary = EXAMPLES / "train_on_device.cpp", folder / "train_on_device"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    libraries = [f"-L{folder}", "-lonnxruntime", f"-Wl,-rpath,{folder}"]
    command = [compiler, "-std=c++17", "-O1", *warnings, str(source), f"-I{includes[0]}", *libraries, "-o", str(binary)]
    subprocess.run(command, check=True)
    return [str(binary)]


def arguments(native: Path, state: Path, *options: object) -> list[str]:
    return [str(native / "step"), str(native / "images"), str(state), *map(str, options)]


def test_native_program_learns_goes_on_and_comes_home(program: list[str], native: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    ended = subprocess.run(program + arguments(native, state, 50, 0.001, 0), check=True, capture_output=True, text=True)
    losses = [float(loss) for loss in re.findall(r"loss (-?[\d.]+)", ended.stdout)]
    assert len(losses) == 50
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])
    once = load_file(state)
    subprocess.run(program + arguments(native, state, 1, 0), check=True, capture_output=True)
    again = load_file(state)
    name = next(name for name in once if name.endswith("classifier.weight") and ":" not in name)
    assert torch.equal(once[name], again[name])  # it went on from the state that was saved
    assert again["step"] == once["step"] + 1 == 51
    import_state(native / "step", state, tmp_path / "adapter")
    assert torch.equal(load_pretrained(tmp_path / "adapter").get_base_model().classifier.weight, once[name])


def test_native_program_computes_what_onnxruntime_computes_in_python(
    program: list[str], native: Path, one_image: Path, tmp_path: Path
) -> None:
    folders = [str(native / "step"), str(one_image)]
    subprocess.run([*program, *folders, str(tmp_path / "native"), "1", "0.01"], check=True, capture_output=True)
    python = [sys.executable, str(EXAMPLES / "train_on_device.py"), *folders, str(tmp_path / "python")]
    subprocess.run([*python, "--steps", "1", "--learning-rate", "0.01"], check=True, capture_output=True)
    one, other = load_file(tmp_path / "native"), load_file(tmp_path / "python")
    assert one.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda place: (place / "images" / "red" / "0.ppm").write_bytes(b"P6 16 16 255\n" + bytes(768)),
            "0.ppm: expected",
        ),
        (lambda place: shutil.rmtree(place / "images" / "red"), "red: expected a folder with PPM images"),
        (lambda place: (place / "state").write_bytes(b"short"), "state is damaged"),
        (lambda place: (place / "step" / "step.json").unlink(), "step.json: cannot be opened"),
    ],
)
def test_native_program_names_what_is_wrong(
    program: list[str], native: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    copied = shutil.copytree(native, tmp_path / "native")
    change(copied)
    ended = subprocess.run(program + arguments(copied, copied / "state"), capture_output=True, text=True)
    assert ended.returncode == 1
    assert message in ended.stderr


def test_native_program_is_short() -> None:
    lines = (EXAMPLES / "train_on_device.cpp").read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


def kill_often(command: list[str], kills: int, folder: Path, *steps: str) -> None:
    """Kill a program `kills` times, during its second step or while it saves.

    After each kill, check that the saved state equals the state that an uninterrupted program has after the same number
    of steps.
    """
    chosen, known = random.Random(0), {}
    state, reference = folder / "state", folder / "reference"
    subprocess.run([*command, str(state), *steps], check=True, capture_output=True)  # the first old state
    for _ in range(kills):
        child = subprocess.Popen([*command, str(state), *steps], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(chosen.randint(1, 2)):  # the program saves after the line about its second step
            assert child.stdout.readline()
        time.sleep(0.01 * chosen.random())
        child.kill()
        child.communicate()
        saved = load_file(state)
        count = int(saved["step"])
        while count not in known:  # the same steps without interruption
            subprocess.run([*command, str(reference), *steps], check=True, capture_output=True)
            whole = load_file(reference)
            known[int(whole["step"])] = whole
        assert saved.keys() == known[count].keys()
        assert all(torch.equal(saved[name], value) for name, value in known[count].items())


@pytest.mark.slow
def test_a_killed_python_program_leaves_a_whole_state(native: Path, one_image: Path, tmp_path: Path) -> None:
    script = str(EXAMPLES / "train_on_device.py")
    kill_often([sys.executable, script, str(native / "step"), str(one_image)], 10, tmp_path, "--steps", "2")


@pytest.mark.slow
def test_a_killed_native_program_leaves_a_whole_state(
    program: list[str], native: Path, one_image: Path, tmp_path: Path
) -> None:
    kills = int(os.environ.get("PEFT_EDGE_KILLS", "20"))
    kill_often([*program, str(native / "step"), str(one_image)], kills, tmp_path, "2")
