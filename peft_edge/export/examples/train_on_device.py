"""Train an exported adapter on a folder of images. Needs only onnxruntime, numpy, safetensors and Pillow.

python train_on_device.py EXPORTED IMAGES STATE [--steps 50] [--learning-rate 0.01] [--seed 0]

EXPORTED is the folder that `export_train_step` wrote. IMAGES is a folder with one subfolder for each class. STATE is
the file for the trained adapter and the optimizer state. If STATE exists, training continues from this file. If
EXPORTED contains `prefix.onnx` (the frozen first layers), this program computes the outputs of these layers only once
for each image.
"""

import argparse
import json
import os
import platform
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from safetensors.numpy import load_file, save_file


def open_file(file: Path) -> onnxruntime.InferenceSession:
    """Open an ONNX file with options that save memory: run nodes in the order of the file, and free tensors early."""
    options = onnxruntime.SessionOptions()
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_mem_pattern = options.enable_mem_reuse = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def read_image(file: Path, preprocessing: dict) -> np.ndarray:
    """Return an image (C, H, W) with the resizing, cropping and normalisation that peft_edge uses for test images."""
    _, height, width = preprocessing["input_size"]
    image = Image.open(file).convert("RGB")
    method = Image.Resampling[preprocessing["interpolation"].upper()]
    if image.width <= width or image.height <= height:
        image = image if image.size == (width, height) else image.resize((width, height), method)
    else:
        size = [int(side / preprocessing["crop_pct"]) for side in (width, height)]
        if preprocessing.get("crop_mode") != "squash":  # keep the aspect ratio
            new, old = max(zip(size, image.size, strict=True), key=lambda sides: sides[0] / sides[1])
            size = [side * new // old for side in image.size]
        image = image.resize(size, method)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    return ((pixels - preprocessing["mean"]) / preprocessing["std"]).astype(np.float32).transpose(2, 0, 1)


def train_from_images() -> None:
    """Train the adapter on the images, and save the trained state."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("exported", "images", "state"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--seed", type=int, help="seed of the order of the images; by default random in each run")
    options = parser.parse_args()

    description = json.loads((options.exported / "step.json").read_text())
    names, batch_size = description["class_names"], description["inputs"]["labels"][0]
    files = [(file, names.index(file.parent.name)) for file in sorted(options.images.glob("*/*"))]
    data, features = "images", None
    if description["prefix"]:
        data, prefix = "features", open_file(options.exported / "prefix.onnx")
        images = (read_image(file, description["preprocessing"]) for file, _ in files)
        features = [prefix.run(["features"], {"images": image[None]})[0][0] for image in images]
        del prefix
    state = load_file(options.state if options.state.exists() else options.exported / "state.safetensors")
    session = open_file(options.exported / "train_step.onnx")
    outputs = [output.name for output in session.get_outputs()]
    random = np.random.default_rng(options.seed)
    for step in range(options.steps):
        batch = random.permutation(len(files))[:batch_size]
        inputs = {name: np.zeros(shape, np.float32) for name, shape in description["inputs"].items()}
        inputs["labels"] = inputs["labels"].astype(np.int64)
        inputs["learning_rate"][...] = options.learning_rate
        for row, index in enumerate(batch):
            file, inputs["labels"][row] = files[index]
            inputs[data][row] = features[index] if features else read_image(file, description["preprocessing"])
            inputs["mask"][row] = 1
        found = dict(zip(outputs, session.run(None, {**state, **inputs}), strict=True))
        state = {name: found[description["new_prefix"] + name] for name in state}
        print(f"step {step + 1}: loss {found['loss']:.4f}, {found['correct']:.0f} of {len(batch)} correct", flush=True)
    unfinished = options.state.with_name(f".{options.state.name}.unfinished")
    origin = {"device": platform.node(), "images": str(len(files)), "steps": str(options.steps)}
    save_file(state, unfinished, metadata={**origin, "runtime": f"onnxruntime {onnxruntime.__version__}"})
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    unfinished.replace(options.state)  # after an interruption, the file has either its old or its new content


if __name__ == "__main__":
    train_from_images()
