"""Preprocessing, and the reproducibility of batches."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from PIL import ExifTags, Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from peft_edge.data import build_loader, build_transform, load_task
from peft_edge.data import loader as loader_module
from peft_edge.data.loader import typical_size
from peft_edge.data.pixels import open_image, read_rgb, upright_size
from peft_edge.data.sources import read_splits
from tests.data.conftest import ImageFolder


@pytest.fixture
def data_config() -> dict:
    config = resolve_model_data_config(timm.create_model("mobilenetv2_035"))
    return {**config, "input_size": (3, 32, 32)}


def random_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_image_of_the_input_size_is_only_normalised(data_config: dict) -> None:
    image = random_image(32, 32)
    reference = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(data_config["mean"], data_config["std"])]
    )
    transformed = build_transform(data_config, train=False)(image)
    torch.testing.assert_close(transformed, reference(image).as_subclass(torch.Tensor))


@pytest.mark.parametrize("size", [(100, 80), (64, 150), (40, 40)])
def test_photograph_is_resized_and_cropped_as_by_timm(size: tuple[int, int], data_config: dict) -> None:
    image = random_image(*size)
    expected = create_transform(**data_config, is_training=False)(image)
    torch.testing.assert_close(build_transform(data_config, train=False)(image), expected)


@pytest.mark.parametrize("crop_pct", [0.8, 1.0])
def test_photograph_is_squashed_as_by_timm(crop_pct: float, data_config: dict) -> None:
    image, config = random_image(100, 80), {**data_config, "crop_mode": "squash", "crop_pct": crop_pct}
    expected = create_transform(**config, is_training=False)(image)
    torch.testing.assert_close(build_transform(config, train=False)(image), expected)


def test_small_image_is_resized_without_a_crop(data_config: dict) -> None:
    image = Image.new("RGB", (16, 20))
    image.paste((255, 255, 255), (0, 0, 2, 20))
    transformed = build_transform(data_config, train=False)(image)
    assert transformed.shape == (3, 32, 32)
    assert (transformed[:, :, 0] > transformed[:, :, -1]).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_image_of_any_mode_becomes_rgb(mode: str, data_config: dict) -> None:
    transformed = build_transform(data_config, train=False)(random_image(32, 32).convert(mode))
    assert transformed.shape == (3, 32, 32)
    assert transformed.dtype == torch.float32


def test_training_shifts_the_image_by_up_to_an_eighth(data_config: dict) -> None:
    data_config = {**data_config, "mean": (0, 0, 0), "std": (1, 1, 1)}
    image = Image.new("RGB", (32, 32))
    image.putpixel((16, 12), (255, 255, 255))
    transform = build_transform(data_config, train=True)
    moves = [(transform(image)[0].nonzero() - torch.tensor([12, 16])).squeeze(0) for _ in range(300)]
    moves = torch.stack(moves)
    assert moves.min(0).values.tolist() == [-4, -4]
    assert moves.max(0).values.tolist() == [4, 4]
    assert moves.float().mean().abs() < 0.5


def test_shifted_image_repeats_its_edge(data_config: dict) -> None:
    transform = build_transform({**data_config, "mean": (0, 0, 0), "std": (1, 1, 1)}, train=True)
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    assert all((transform(white) == 1).all() for _ in range(20))


def ramp(width: int, height: int) -> Image.Image:
    """Return an image that is dark at the left and bright at the right."""
    return Image.linear_gradient("L").rotate(90).resize((width, height)).convert("RGB")


def views(image: Image.Image, data_config: dict, count: int) -> Tensor:
    torch.manual_seed(0)
    transform = build_transform({**data_config, "mean": (0, 0, 0), "std": (1, 1, 1)}, train=True, augment="photo")
    return torch.stack([transform(image) for _ in range(count)])


def test_photo_flips_half_of_the_views(data_config: dict) -> None:
    found = views(ramp(100, 80), data_config, 300)
    assert found.shape == (300, 3, 32, 32)
    is_flipped = found[:, 0, :, 0].mean(-1) > found[:, 0, :, -1].mean(-1)
    assert 0.4 < is_flipped.float().mean() < 0.6


def test_photo_crops_70_to_100_percent_of_the_area(data_config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crop of a ramp sees a part of its range, as long as colours do not change."""
    monkeypatch.setattr(loader_module, "_COLOURS_AND_SIDES", lambda pixels: pixels)
    found = views(ramp(1000, 1000), data_config, 300)
    widths = found[:, 0, 0].amax(-1) - found[:, 0, 0].amin(-1)
    # The lowest width has 70 % of the area and an aspect ratio of 3 / 4.
    assert (0.7 * 3 / 4) ** 0.5 * 0.9 < widths.min() < 0.85
    assert 0.93 < widths.max() < 1.01


def test_photo_changes_brightness_by_up_to_30_percent(data_config: dict) -> None:
    grey = Image.new("RGB", (50, 50), (100, 100, 100))
    brightness = views(grey, data_config, 300).mean((1, 2, 3)) * 255 / 100
    assert 0.68 < brightness.min() < 0.75
    assert 1.25 < brightness.max() < 1.32


def test_no_augmentation_gives_the_image_of_evaluation(data_config: dict) -> None:
    plain = build_transform(data_config, train=True, augment="none")
    assert torch.equal(plain(ramp(90, 70)), build_transform(data_config, train=False)(ramp(90, 70)))
    with pytest.raises(ValueError, match="augment is 'flip', expected one of none, shift, photo"):
        build_transform(data_config, train=True, augment="flip")


@pytest.mark.parametrize("train", [False, True])
def test_large_jpeg_is_decoded_at_a_reduced_size(train: bool, tmp_path: Path, data_config: dict) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((2000, 1500), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    file = {"path": str(tmp_path / "a.jpg"), "bytes": None}
    whole = open_image(file).convert("RGB")
    assert read_rgb(open_image(file), shrink=16).size == (250, 188)
    assert read_rgb(open_image(file), shrink=3.9).size == whole.size
    transform = build_transform({**data_config, "mean": (0, 0, 0), "std": (1, 1, 1)}, train=train, augment="photo")
    found = []
    for image in (whole, open_image(file)):
        torch.manual_seed(1)
        found.append(transform(image))
    assert (found[0] - found[1]).abs().mean() * 255 < 1
    assert not torch.equal(*found)


@pytest.mark.parametrize("shrink", [1, 8])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photograph_is_upright(orientation: int, shrink: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    ramp(160, 80).save(tmp_path / "a.jpg", exif=exif, quality=95)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    image = open_image({"path": str(tmp_path / "a.jpg"), "bytes": None})
    assert upright_size(image) == expected.size
    found = read_rgb(image, shrink=shrink)
    assert found.size == tuple(side * (4 if shrink == 1 else 1) // 4 for side in expected.size)
    difference = np.asarray(found, int) - np.asarray(expected.resize(found.size), int)
    assert np.abs(difference).mean() < 4


def test_typical_size_is_the_median(tmp_path: Path) -> None:
    for name, sizes in {"a": [(10, 30), (20, 40)], "b": [(12, 300)]}.items():
        (tmp_path / name).mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", size, (number, 0, len(name))).save(tmp_path / name / f"{number}.png")
    assert typical_size(read_splits(str(tmp_path))["train"]) == (12, 40)


Batch = dict[str, Tensor]


def noisy(image: Image.Image) -> Tensor:
    """Add a random number to the pixels, in place of a random augmentation."""
    return F.pil_to_tensor(read_rgb(image)) / 255 + torch.rand(())


@pytest.fixture
def loader(random_images: Callable[..., Dataset]) -> Callable[..., DataLoader]:
    def make(**options: object) -> DataLoader:
        options = {"batch_size": 8, "shuffle": True, "seed": 0} | options
        return build_loader(random_images(50, ["a", "b", "c"]), noisy, **options)

    return make


def epochs(loader: DataLoader, count: int = 2) -> list[Batch]:
    batches = []
    for epoch in range(count):
        (loader if hasattr(loader, "set_epoch") else loader.sampler).set_epoch(epoch)
        batches += list(loader)
    return batches


def assert_same(found: Iterable[Batch], expected: Iterable[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_batches_have_the_documented_shapes_and_dtypes(loader: Callable[..., DataLoader]) -> None:
    batches = list(loader())
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [(8, 3, 16, 16)] * 6
    assert batches[0]["pixel_values"].dtype == torch.float32
    assert batches[0]["labels"].dtype == torch.int64


def test_evaluation_yields_every_image_in_order(
    loader: Callable[..., DataLoader], random_images: Callable[..., Dataset]
) -> None:
    labels = torch.cat([batch["labels"] for batch in loader(shuffle=False)])
    assert labels.tolist() == random_images(50, ["a", "b", "c"])["label"][:]


def test_epoch_yields_each_image_once_in_an_order_of_its_own(
    random_images: Callable[..., Dataset],
) -> None:
    images = random_images(48, ["a", "b"])
    batches = epochs(build_loader(images, F.pil_to_tensor, batch_size=8, shuffle=True, seed=0))
    first, second = (
        [image.numpy().tobytes() for b in part for image in b["pixel_values"]] for part in (batches[:6], batches[6:])
    )
    everything = sorted(F.pil_to_tensor(image).numpy().tobytes() for image in images["image"])
    assert sorted(first) == sorted(second) == everything
    assert first != second


def test_order_and_augmentation_depend_on_the_seed(loader: Callable[..., DataLoader]) -> None:
    torch.manual_seed(1)
    expected = epochs(loader())
    torch.manual_seed(2)
    assert_same(epochs(loader()), expected)
    assert not torch.equal(epochs(loader(seed=1))[0]["labels"], expected[0]["labels"])


def test_augmentation_differs_between_epochs_and_images(loader: Callable[..., DataLoader]) -> None:
    batches = epochs(loader(shuffle=False, batch_size=50))
    offsets = [batch["pixel_values"].flatten(1).min(dim=1).values for batch in batches]
    assert not torch.equal(offsets[0], offsets[1])
    assert offsets[0].std() > 0.1


def test_global_random_state_is_unchanged(loader: Callable[..., DataLoader]) -> None:
    batches = iter(loader())
    state = torch.get_rng_state()
    next(batches)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not hasattr(os, "setpgid"), reason="process groups of POSIX")
def test_signals_to_the_process_group_do_not_reach_the_workers(loader: Callable[..., DataLoader]) -> None:
    own = os.getpgid(0)
    batches = iter(loader(num_workers=1))
    next(batches)  # the worker has started
    (worker,) = batches._workers
    assert os.getpgid(worker.pid) == worker.pid != own


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on a single core
def test_worker_processes_do_not_change_batches(loader: Callable[..., DataLoader]) -> None:
    assert_same(epochs(loader(num_workers=2)), epochs(loader()))


def test_two_processes_divide_the_batches_of_one(loader: Callable[..., DataLoader]) -> None:
    halves = [
        epochs(prepare_data_loader(loader(), num_processes=2, process_index=index, split_batches=True))
        for index in (0, 1)
    ]
    joined = [{key: torch.cat([one[key], other[key]]) for key in one} for one, other in zip(*halves, strict=True)]
    assert_same(joined, epochs(prepare_data_loader(loader(), num_processes=1, split_batches=True)))
    assert_same(joined, epochs(loader()))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_resumed_epoch_yields_the_remaining_batches(num_processes: int, loader: Callable[..., DataLoader]) -> None:
    def prepared() -> DataLoader:
        return prepare_data_loader(loader(), num_processes=num_processes, process_index=0, split_batches=True)

    whole = epochs(prepared())
    resumed = prepared()
    resumed.set_epoch(1)
    assert_same(skip_first_batches(resumed, 4), whole[6 + 4 :])


def test_loader_refuses_fewer_images_than_a_training_batch(loader: Callable[..., DataLoader]) -> None:
    with pytest.raises(ValueError, match="50 images do not fill one batch of 64: lower batch_size"):
        loader(batch_size=64)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # from Pillow, about the damaged file
@pytest.mark.parametrize("shift", ["invert", "gaussian_noise"])
def test_file_with_damaged_pixels_is_named(shift: str, image_folder: ImageFolder) -> None:
    folder = image_folder("pets", ["cat", "dog"], count=20)
    broken = folder / "dog" / "x.jpg"
    Image.radial_gradient("L").save(broken)
    task = load_task(str(folder), shift=shift)
    # The file is cut short after the check at the start. Its header is intact: only decoding the pixels fails.
    broken.write_bytes(broken.read_bytes()[:1500])
    messages = []
    for split in [*vars(task.source).values(), *vars(task.targets[0]).values()]:
        try:
            list(build_loader(split, noisy, batch_size=8, shuffle=False, seed=0))
        except ValueError as error:
            messages.append(str(error))
    assert messages
    assert all(re.search(r"cannot read image \d+, .*dog/x\.jpg: .*truncated", message) for message in messages)
    gc.collect()
