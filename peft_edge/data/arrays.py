"""Images held as arrays, as the Hugging Face datasets that users of `datasets` expect."""

from __future__ import annotations

import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image
from torch import Tensor


def dataset_from_arrays(images: Tensor, labels: Tensor, class_names: list[str]) -> Dataset:
    """Returns images and labels as a dataset that lives in memory.

    The images are kept as uncompressed PPM files: Pillow reads one in about 30 µs, several times faster than a PNG.

    Args:
        images: (N, H, W, 3), uint8.
        labels: (N,), the index of each image's class.
        class_names: The names of the classes.

    Returns:
        A dataset with the columns `image` and `label`.
    """
    _, height, width, _ = images.shape
    header = f"P6 {width} {height} 255\n".encode()
    encoded = pa.array([header + image.tobytes() for image in images.numpy()], pa.binary())
    features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
    table = pa.table({"image": features["image"].cast_storage(encoded), "label": pa.array(labels.numpy())})
    return Dataset(table.cast(features.arrow_schema))
