from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from peft_edge.backbones import load_backbone, set_class_names
from peft_edge.export.verification import (
    Images,
    compare_logits,
    comparison_table,
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
            Image.new("RGB", (40, 30), name).save(folder / name / f"{number}.png")
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
