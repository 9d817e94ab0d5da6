from __future__ import annotations

import numpy as np
import torch
from datasets import ClassLabel, Features, Image
from PIL import ImageOps

from peft_edge.data.arrays import dataset_from_arrays, read_into_memory


def test_images_and_labels_come_back_as_they_were() -> None:
    images = torch.randint(256, (5, 6, 9, 3), dtype=torch.uint8)
    dataset = dataset_from_arrays(images, torch.tensor([1, 0, 1, 1, 0]), ["no", "yes"])
    assert dataset.features == Features({"image": Image(), "label": ClassLabel(names=["no", "yes"])})
    assert dataset["label"][:] == [1, 0, 1, 1, 0]
    assert all(image.mode == "RGB" for image in dataset["image"])
    assert np.array_equal(np.stack([np.asarray(image) for image in dataset["image"]]), images.numpy())


def test_the_fingerprint_follows_the_contents() -> None:
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    changed = images.clone()
    changed[1, 2, 3, 0] = 1
    first, again, other = (dataset_from_arrays(part, torch.arange(2), ["a", "b"]) for part in (images, images, changed))
    assert first._fingerprint == again._fingerprint != other._fingerprint


def test_a_transformed_data_set_is_read_once() -> None:
    images, labels = torch.randint(256, (4, 5, 6, 3), dtype=torch.uint8), torch.tensor([1, 0, 1, 1])
    reads = []

    def inverted(batch: dict) -> dict:
        reads.extend(batch["image"])
        return {**batch, "image": [ImageOps.invert(image) for image in batch["image"]]}

    held = read_into_memory(dataset_from_arrays(images, labels, ["a", "b"]).with_transform(inverted))
    for _ in range(2):
        assert np.array_equal([np.asarray(image) for image in held["image"]], 255 - images.numpy())
    assert len(reads) == 4
    assert held["label"][:] == labels.tolist()
    assert held.features["label"].names == ["a", "b"]
