"""Fixtures for the tests of exports: a trained network, an adapter, digits to compare them on, and a training step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from peft_edge import ConvLoraConfig
from peft_edge.backbones import load_backbone, save_backbone, set_class_names
from peft_edge.export.device import export_train_step
from peft_edge.export.onnx_steps import run_steps
from peft_edge.export.verification import Images, read_images
from peft_edge.hub import save_adapter
from tests.export.support import IMAGE_SIZE, STEP_BATCH_SIZE, Saved, adapted, randomize, train


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Save a trained base model and an adapter, and return their folders.

    The weights, the head and the BatchNorm statistics of the adapter differ from those of the base model.
    """
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    base = load_backbone("test_efficientnet", 10)
    set_class_names(base, [str(digit) for digit in range(10)])
    train(base, 40, 1e-2)
    save_backbone(base, folder / "base")
    config = ConvLoraConfig(norm="stats", r=2, target_modules="all-conv", modules_to_save=["classifier"])
    adapted = get_peft_model(load_backbone(str(folder / "base")), config)
    train(adapted, 4, 1e-3)
    save_adapter(adapted, folder / "adapter")
    return Saved(folder / "base", folder / "adapter")


@pytest.fixture(scope="session")
def digits(saved: Saved) -> Images:
    return read_images("digits", load_backbone(str(saved.base)), image_size=IMAGE_SIZE)


@pytest.fixture(scope="session")
def device_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("device") / "base"
    network = load_backbone("test_efficientnet", 3)
    set_class_names(network, ["bird", "cat", "dog"])
    save_backbone(network, folder)
    return folder


@pytest.fixture(scope="session")
def step_model(device_base: Path) -> PeftModel:
    torch.manual_seed(1)
    return randomize(adapted(device_base), statistics=False)


@pytest.fixture(scope="session")
def step_folder(step_model: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "step"
    export_train_step(step_model, folder, image_size=IMAGE_SIZE, batch_size=STEP_BATCH_SIZE)
    return folder


@pytest.fixture
def trained(step_folder: Path) -> Callable[[int], dict[str, Tensor]]:
    """Return a function that runs two training steps in ONNX Runtime and returns the state after them.

    The argument of the function is the seed of the random images.
    """

    def train_on_device(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        batches = {"learning_rate": torch.tensor(0.05)}
        for index in range(2):
            batches[f"images.{index}"] = torch.randn(STEP_BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
            batches[f"labels.{index}"] = torch.randint(3, (STEP_BATCH_SIZE,))
            batches[f"mask.{index}"] = torch.ones(STEP_BATCH_SIZE)
        found = run_steps(step_folder, lambda name: batches[name].numpy(), 2)
        return {name: torch.from_numpy(found[name]) for name in load_file(step_folder / "state.safetensors")}

    return train_on_device
