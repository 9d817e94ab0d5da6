from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_edge.lean.prefix import Prefix
from peft_edge.lean.prefix_cache import PrefixCache

IMAGES = torch.randn(10, 3, 6, 6)
LABELS = torch.arange(10) % 4


def views(number: int) -> Iterator[dict[str, Tensor]]:
    """Three batches; each view is brighter than the one before."""
    for images, labels in zip(IMAGES.split(4), LABELS.split(4), strict=True):
        yield {"pixel_values": images + number, "labels": labels}


def unseen(number: int) -> Iterator[dict[str, Tensor]]:
    raise AssertionError("the images are read although their features are stored")


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model[0].requires_grad_(False)
    return model


@pytest.fixture
def prefix(model: nn.Module) -> Prefix:
    return Prefix(model, IMAGES[:2])


def opened(root: Path, prefix: Prefix, images: Callable[[int], Any] = views, **options: Any) -> PrefixCache:
    return PrefixCache.open(root, prefix, images, **{"key": "a", "views": 2, **options})


def test_an_epoch_sees_its_view_of_the_images_that_are_asked_for(tmp_path: Path, prefix: Prefix) -> None:
    cache = opened(tmp_path, prefix)
    assert len(cache) == 10
    batch = cache.__getitems__([(0, 7), (1, 0), (2, 9), (5, 7)])
    seen = torch.stack([IMAGES[7], IMAGES[0] + 1, IMAGES[9], IMAGES[7] + 1])
    torch.testing.assert_close(batch["pixel_values"], prefix.features(seen))
    assert batch["labels"].tolist() == LABELS[[7, 0, 9, 7]].tolist()
    batch["pixel_values"].zero_()
    torch.testing.assert_close(cache.__getitems__([(0, 7)])["pixel_values"], prefix.features(IMAGES[7:8]))


def test_features_come_back_as_they_lay_in_memory(tmp_path: Path, model: nn.Module) -> None:
    for format in (torch.contiguous_format, torch.channels_last):
        prefix = Prefix(model.to(memory_format=format), IMAGES[:2])
        features = opened(tmp_path, prefix, key=str(format)).__getitems__([(0, 1), (0, 2)])["pixel_values"]
        assert features.is_contiguous(memory_format=format)
        torch.testing.assert_close(features, prefix.features(IMAGES[1:3]))


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_the_error_of_a_type_is_measured(tmp_path: Path, prefix: Prefix, dtype: str, bytes_each: int) -> None:
    cache = opened(tmp_path, prefix, dtype=dtype, views=1)
    found = cache.__getitems__([(0, index) for index in range(10)])["pixel_values"]
    wanted = prefix.features(IMAGES)
    error = (found - wanted).norm() / wanted.norm()
    assert cache.info["relative_error"] == pytest.approx(error.item(), rel=1e-3, abs=1e-7)
    # Half a step of 8 bits, and of the 11 bits of a half's mantissa.
    step = {"float32": 0.0, "float16": 2**-11, "int8": 0.5 / 127}[dtype]
    assert (found - wanted).abs().amax() <= step * wanted.abs().amax() * 1.001
    assert (cache.info["relative_error"] == 0) == (dtype == "float32")
    values = 10 * 8 * 4 * 4 * bytes_each
    assert values < cache.info["size_bytes"] < values + 4000


def test_a_vector_can_be_stored_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    prefix = Prefix(model, IMAGES[:2])
    found = opened(tmp_path, prefix, dtype="int8").__getitems__([(0, 3)])["pixel_values"]
    assert found.shape == (1, 8)
    torch.testing.assert_close(found, prefix.features(IMAGES[3:4]), atol=1e-2, rtol=1e-2)


def test_filling_costs_the_forward_passes_of_the_prefix(tmp_path: Path, prefix: Prefix) -> None:
    info = opened(tmp_path, prefix).info
    # A multiply-add is two; two views of ten images, 4 x 4 positions, kernels of 3 x 3 x 3, 8 channels.
    assert info["fill_flops"] == 2 * (2 * 10) * (4 * 4) * (3 * 3 * 3) * 8
    assert info["fill_s"] > 0


def test_what_is_stored_is_used_again_and_never_when_it_is_stale(tmp_path: Path, prefix: Prefix) -> None:
    first = opened(tmp_path, prefix)
    assert opened(tmp_path, prefix, unseen).info == first.info
    for change in ({"key": "b"}, {"views": 3}, {"dtype": "int8"}):
        with pytest.raises(AssertionError, match="the images are read"):
            opened(tmp_path, prefix, unseen, **change)
    with torch.no_grad():
        prefix._model[0].bias.add_(1)
    moved = opened(tmp_path, prefix).__getitems__([(0, 0)])["pixel_values"]
    assert not torch.allclose(moved, first.__getitems__([(0, 0)])["pixel_values"])


@pytest.mark.parametrize("name", ["features.arrow", "info.json"])
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-9]), Path.unlink])
def test_a_damaged_one_is_filled_again(
    tmp_path: Path, prefix: Prefix, name: str, damage: Callable[[Path], object]
) -> None:
    expected = opened(tmp_path, prefix).__getitems__([(0, 3)])["pixel_values"]
    damage(next(tmp_path.glob(f"*/{name}")))

    assert torch.equal(opened(tmp_path, prefix).__getitems__([(0, 3)])["pixel_values"], expected)


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, prefix: Prefix) -> None:
    def broken(number: int) -> Iterator[dict[str, Tensor]]:
        yield from views(number)
        raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged"):
        opened(tmp_path, prefix, broken)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    folder = next(path for path in tmp_path.iterdir()).with_suffix("")
    assert len(opened(tmp_path, prefix)) == 10
    assert json.loads((folder / "info.json").read_text())["images"] == 10


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), "float32", "values that are not finite"),
        (1e6, "float16", "beyond the range of float16: choose float32 or int8"),
        (0.0, "float64", "dtype is 'float64', expected one of float32, float16, int8"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    tmp_path: Path, prefix: Prefix, value: float, dtype: str, message: str
) -> None:
    with torch.no_grad():
        prefix._model[0].bias.fill_(value)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, prefix, dtype=dtype)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_views_of_different_images_are_refused(tmp_path: Path, prefix: Prefix) -> None:
    def shorter(number: int) -> Iterator[dict[str, Tensor]]:
        yield from list(views(number))[number:]

    with pytest.raises(ValueError, match=r"expected the same images in every view, found \[10, 6\] of them"):
        opened(tmp_path, prefix, shorter)
    assert not list(tmp_path.glob("*/info.json"))


@pytest.mark.parametrize("index", [-1, 10])
def test_an_image_that_is_not_there_is_named(tmp_path: Path, prefix: Prefix, index: int) -> None:
    with pytest.raises(IndexError, match=f"expected the number of an image, 0 to 9, found {index}"):
        opened(tmp_path, prefix).__getitems__([(0, 0), (0, index)])


def test_no_images_are_an_error(tmp_path: Path, prefix: Prefix) -> None:
    with pytest.raises(ValueError, match="there are no images to store"):
        opened(tmp_path, prefix, lambda number: [])
