"""The example program learns from a folder of images, in a process without PyTorch."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file

from peft_edge import ConvLoraConfig, load_pretrained
from peft_edge.backbones import load_backbone
from peft_edge.data import build_transform
from peft_edge.export.device import export_train_step
from peft_edge.export.device_states import import_state

PROGRAM = Path(__file__).parents[3] / "peft_edge/export/examples/train_on_device.py"
# Runs the program, and fails if anything in it imports PyTorch.
RUN = """
import runpy, sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "peft", "timm", "peft_edge"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(place: Path, *options: str, step: str = "step", state: str = "state") -> str:
    command = [sys.executable, "-c", RUN, str(PROGRAM), *(str(place / name) for name in (step, "images", state))]
    return subprocess.run([*command, *options], check=True, capture_output=True, text=True).stdout


def test_program_learns_goes_on_and_comes_home(place: Path) -> None:
    printed = run(place, "--steps", "40", "--learning-rate", "0.001", "--seed", "0")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])
    once = load_file(place / "state")
    run(place, "--steps", "1", "--learning-rate", "0")
    again = load_file(place / "state")
    name = next(name for name in once if name.endswith("classifier.weight") and ":" not in name)
    assert torch.equal(once[name], again[name])  # it went on from the state that was saved
    assert not torch.equal(once[f"exp_avg:{name}"], again[f"exp_avg:{name}"])
    import_state(place / "step", place / "state", place / "adapter")
    (origin,) = json.loads((place / "adapter" / "device_training.json").read_text())["states"]
    assert origin["metadata"].keys() == {"device", "images", "steps", "runtime"}
    assert (origin["metadata"]["images"], origin["metadata"]["steps"]) == ("12", "1")
    assert torch.equal(load_pretrained(place / "adapter").get_base_model().classifier.weight, once[name])


def test_program_learns_from_stored_features(place: Path) -> None:
    config = ConvLoraConfig(r=2, target_modules="last-stage", norm="frozen", modules_to_save=["classifier"])
    model = get_peft_model(load_backbone(str(place / "base")), config).eval()
    export_train_step(model, place / "split", image_size=32, batch_size=4, split=True)
    printed = run(place, "--steps", "30", "--learning-rate", "0.01", "--seed", "0", step="split", state="features")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_images_are_preprocessed_as_in_training(place: Path) -> None:
    read_image = runpy.run_path(str(PROGRAM), run_name="program")["read_image"]
    preprocessing = json.loads((place / "step" / "step.json").read_text())["preprocessing"]
    sizes, crop_modes = ((3, 32, 32), (3, 48, 64), (3, 40, 52)), ("center", "squash")
    for size, crop_mode in itertools.product(sizes, crop_modes):
        config = {**preprocessing, "input_size": size, "crop_mode": crop_mode}
        for file in (place / "images").glob("*/*"):
            expected = build_transform(config, train=False)(Image.open(file))
            torch.testing.assert_close(torch.from_numpy(read_image(file, config)), expected, rtol=1e-5, atol=1e-5)


def test_program_is_short() -> None:
    assert len(PROGRAM.read_text().splitlines()) <= 95
