from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms import v2

from peft_edge.data import build_transform


@pytest.fixture
def data_config() -> dict:
    config = resolve_model_data_config(timm.create_model("mobilenetv2_035"))
    return {**config, "input_size": (3, 32, 32)}


def random_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_an_image_of_the_input_size_is_only_normalised(data_config: dict) -> None:
    image = random_image(32, 32)
    reference = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(data_config["mean"], data_config["std"])]
    )
    transformed = build_transform(data_config, train=False)(image)
    torch.testing.assert_close(transformed, reference(image).as_subclass(torch.Tensor))


@pytest.mark.parametrize("size", [(100, 80), (64, 150), (40, 40)])
def test_a_photograph_is_evaluated_as_timm_does(size: tuple[int, int], data_config: dict) -> None:
    image = random_image(*size)
    expected = create_transform(**data_config, is_training=False)(image)
    torch.testing.assert_close(build_transform(data_config, train=False)(image), expected)


def test_a_small_image_is_stretched_whole(data_config: dict) -> None:
    image = Image.new("RGB", (16, 20))
    image.paste((255, 255, 255), (0, 0, 2, 20))
    transformed = build_transform(data_config, train=False)(image)
    assert transformed.shape == (3, 32, 32)
    assert (transformed[:, :, 0] > transformed[:, :, -1]).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_any_mode_becomes_rgb(mode: str, data_config: dict) -> None:
    transformed = build_transform(data_config, train=False)(random_image(32, 32).convert(mode))
    assert transformed.shape == (3, 32, 32)
    assert transformed.dtype == torch.float32


def test_training_moves_the_image_by_up_to_an_eighth(data_config: dict) -> None:
    data_config = {**data_config, "mean": (0, 0, 0), "std": (1, 1, 1)}
    image = Image.new("RGB", (32, 32))
    image.putpixel((16, 12), (255, 255, 255))
    transform = build_transform(data_config, train=True)
    moves = [(transform(image)[0].nonzero() - torch.tensor([12, 16])).squeeze(0) for _ in range(300)]
    moves = torch.stack(moves)
    assert moves.min(0).values.tolist() == [-4, -4]
    assert moves.max(0).values.tolist() == [4, 4]
    assert moves.float().mean().abs() < 0.5


def test_a_moved_image_repeats_its_edge(data_config: dict) -> None:
    transform = build_transform({**data_config, "mean": (0, 0, 0), "std": (1, 1, 1)}, train=True)
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    assert all((transform(white) == 1).all() for _ in range(20))
