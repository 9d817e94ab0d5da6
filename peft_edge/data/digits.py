"""The default benchmark: scikit-learn's 1,797 handwritten digits, drawn large.

They are the test set of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), 8 x 8 pixels and
17 grey levels, and are installed with scikit-learn, so they need no network.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from torch.nn import functional as F

from peft_edge.data.arrays import dataset_from_arrays
from peft_edge.data.splits import carve
from peft_edge.data.task import Domain

SPLIT_SIZES = {"adaptation": 400, "validation": 150, "test": 547}


def load_digits_domain(*, image_size: int, seed: int) -> tuple[Domain, Dataset]:
    """Splits the digits, stratified by seed: 700 source, 400 adaptation, 150 validation and 547 test images.

    Args:
        image_size: The height and width of the images in pixels.
        seed: Which digit is in which split.

    Returns:
        The source domain, and the adaptation images without their shift.
    """
    digits = load_digits()
    grey = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    large = F.interpolate(grey, size=(image_size, image_size), mode="bicubic", antialias=True)
    images = large.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
    names = [str(digit) for digit in digits.target_names]
    rest = dataset_from_arrays(images, torch.from_numpy(digits.target), names)
    splits = {}
    for name, size in SPLIT_SIZES.items():
        rest, splits[name] = carve(rest, size, seed=seed)
    return Domain(train=rest, validation=splits["validation"], test=splits["test"]), splits["adaptation"]
