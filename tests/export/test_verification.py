from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from peft_edge.backbones import load_backbone, set_class_names
from peft_edge.data import build_transform, load_task
from peft_edge.export.verification import (
    Images,
    _load_task,
    compare_logits,
    comparison_table,
    input_config,
    predict_logits,
    read_images,
)


def test_digits_are_preprocessed_for_the_model(digits: Images) -> None:
    assert digits.calibration.shape == (100, 3, 32, 32)
    assert digits.comparison.shape == (256, 3, 32, 32)
    black = (torch.zeros(3) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(digits.comparison.amin((0, 2, 3)), black)
    assert digits.labels is not None
    assert digits.labels.unique().tolist() == list(range(10))


def folder_of_colours(folder: Path) -> Path:
    for name in ("red", "blue"):
        (folder / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (40, 30 + number), name).save(folder / name / f"{number}.png")
    return folder


def test_labels_are_matched_to_the_classes_of_the_model_by_name(tmp_path: Path) -> None:
    folder, model = str(folder_of_colours(tmp_path)), load_backbone("test_efficientnet", 3)
    set_class_names(model, ["red", "green", "blue"])
    found = read_images(folder, model, image_size=16)
    is_blue = found.comparison[:, 2].mean((1, 2)) > found.comparison[:, 0].mean((1, 2))
    assert found.labels is not None
    assert torch.equal(found.labels, is_blue * 2)
    assert found.labels.unique().tolist() == [0, 2]
    assert found.comparison.shape[1:] == (3, 16, 16)
    set_class_names(model, ["red", "green", "yellow"])
    assert read_images(folder, model, image_size=16).labels is None


def images_of(tensor: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in tensor}


@pytest.fixture
def noise(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that creates a folder with 60 random images of each class."""

    def make(name: str, classes: str = "ab") -> Path:
        for label in classes:
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(60):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                    tmp_path / name / label / f"{number}.png"
                )
        return tmp_path / name

    rng = np.random.default_rng(0)
    return make


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("digits", {"shift": "invert"}),
        ("digits", {"new_classes": ["8", "9"], "rehearsal_size": 80}),
        ("folder", {"shift": "contrast"}),
        ("folder", {"new_classes": ["c"]}),
        ("folder", {"shift": "other"}),
        ("copy", {"shift": "contrast"}),
        ("other", {"shift": "other"}),
        ("source", {"shift": "other"}),
        ("target", {"shift": "other"}),
    ],
)
def test_no_image_is_compared_that_the_run_trained_on(
    name: str, change: dict, seed: int, noise: Callable[..., Path]
) -> None:
    folder, other = noise("folder", "abc"), noise("other", "abc")
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    if change.get("shift") == "other":
        change = {"shift": str(other)}
    data = {"name": name if name == "digits" else str(folder), **change}
    model = load_backbone("test_efficientnet", 3)
    named = {"digits": "digits", "folder": f"{folder}/../folder", "copy": str(copy), "other": str(other)}.get(
        name, name
    )
    found = read_images(named, model, image_size=16, run={"seed": seed, "data": data})
    task = load_task(**{**data, "image_size": 16}, seed=seed)
    transform = build_transform(input_config(model, 16), train=False)

    def pixels(*splits: Dataset) -> set[bytes]:
        return {transform(image).numpy().tobytes() for split in splits for image in split.with_format(None)["image"]}

    domains = (task.source, *task.targets)
    assert not images_of(found.comparison) & pixels(*(domain.train for domain in domains))
    if name in ("source", "target"):
        assert images_of(found.comparison) == pixels({"source": task.source, "target": task.targets[0]}[name].test)
    if name != "copy":
        assert images_of(found.comparison) <= pixels(*(domain.test for domain in domains))
    # With another seed, the same folder is divided otherwise, and training images are among those compared.
    if name == "folder" and seed and change == {"shift": "contrast"}:
        assert images_of(read_images(named, model, image_size=16).comparison) & pixels(task.source.train)


@pytest.mark.parametrize("name", ["source", "target", "folder"])
def test_images_that_changed_since_the_run_are_refused(name: str, noise: Callable[..., Path]) -> None:
    folder = noise("folder")
    run = {"seed": 1, "data": {"name": str(folder), "shift": "contrast"}}
    fingerprint = load_task(**run["data"], seed=1).fingerprint
    model, wanted = load_backbone("test_efficientnet", 2), str(folder) if name == "folder" else name
    read_images(wanted, model, run=run, fingerprint=fingerprint)
    Image.new("RGB", (16, 16), "red").save(folder / "a" / "new.png")
    _load_task.cache_clear()
    with pytest.raises(ValueError, match=r"trained on cannot be excluded.*its images have changed since"):
        read_images(wanted, model, run=run, fingerprint=fingerprint)


def test_data_of_the_run_that_is_missing_is_named(noise: Callable[..., Path]) -> None:
    data = {"name": "./nowhere", "shift": "contrast"}
    with pytest.raises(ValueError, match=r"trained on cannot be excluded, because its data './nowhere'"):
        read_images(str(noise("folder")), load_backbone("test_efficientnet", 2), run={"seed": 0, "data": data})


def test_invalid_size_and_missing_folder_are_refused(tmp_path: Path) -> None:
    model = load_backbone("test_efficientnet", 3)
    with pytest.raises(ValueError, match="image_size: expected at least 1, found 0"):
        read_images("digits", model, image_size=0)
    with pytest.raises(ValueError, match="expected a folder with one subfolder of images for each class"):
        read_images(str(tmp_path / "none"), model)


@pytest.mark.parametrize(("batch_size", "sizes"), [(3, [3, 3]), (1, [1] * 5), (8, [8]), (None, [5])])
def test_logits_are_computed_in_batches_of_the_given_size(batch_size: int | None, sizes: list[int]) -> None:
    seen = []

    def network(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return images.flatten(1)

    images = torch.randn(5, 3, 2, 2)
    assert torch.equal(predict_logits(network, images, batch_size), images.flatten(1))
    assert seen == sizes


def test_accuracy_of_each_folder() -> None:
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])]
    found, labels = logits.clone(), torch.tensor([0, 1, 2, 1, 0])
    found[:2] = found[:2].flip(0)
    row = compare_logits("onnx int8", 10, found, logits, labels, ["photo", "photo", "photo", "sketch", "sketch"])
    assert row.model_accuracies == {"photo": 1.0, "sketch": 0.0}
    assert row.accuracies == pytest.approx({"photo": 1 / 3, "sketch": 0.0})
    assert row.losses == pytest.approx({"photo": 2 / 3, "sketch": 0.0})
    assert row.accuracy == pytest.approx(1 / 5)
    header, model, file = comparison_table([row]).splitlines()
    assert header.endswith("accuracy on photo  accuracy on sketch")
    assert (model.split(), file.split()[-2:]) == (["PyTorch", "1.000", "0.000"], ["0.333", "0.000"])


def test_comparison_of_known_logits() -> None:
    expected = torch.tensor([[1.0, 2.0], [4.0, 3.0], [-5.0, 0.0], [1.0, 0.0]])
    found = torch.tensor([[1.0, 2.5], [3.0, 4.0], [-5.0, 0.0], [1.0, 0.0]])
    row = compare_logits("onnx", 1234, found, expected, torch.tensor([1, 0, 0, 0]))
    assert (row.largest_logit, row.largest_difference, row.same_top1) == (5.0, 1.0, 0.75)
    assert (row.accuracy, row.model_accuracy) == (0.5, 0.75)
    assert comparison_table([row]).splitlines() == [
        "         bytes  largest difference of a logit  same top-1  accuracy",
        "PyTorch                                                       0.750",
        "   onnx  1,234                        1.0e+00       0.750     0.500",
    ]
    table = comparison_table([compare_logits("onnx", 1, found, expected, None)])
    assert "PyTorch" not in table
    assert table.endswith("0.750         -")
