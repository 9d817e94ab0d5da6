"""Test the split of a model into frozen prefix and tail, and the cache of the prefix's features."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from peft_edge import ConvLoraConfig
from peft_edge.backbones import head_names
from peft_edge.lean import feature_cache
from peft_edge.lean.feature_cache import FeatureCache, FrozenPrefix
from peft_edge.methods import METHODS
from peft_edge.profiling import count_flops

FAMILIES = {
    "mobilenetv1_100": "blocks.4",
    "mobilenetv2_035": "blocks.6",
    "mobilenetv3_small_050": "blocks.5",
    "mobilenetv4_conv_small_035": "blocks.4",
    "ghostnet_050": "blocks.9",
    "resnet10t": "layer4",
    "repvgg_a0": "stages.3",
    "regnetx_002": "s4",
    "convnext_atto": "stages.3.downsample.1",
}


def adapted(
    name: str, *, target: str | list[str] = "last-stage", norm: str = "frozen", **timm_options: float
) -> nn.Module:
    model = timm.create_model(name, num_classes=10, **timm_options)
    # Zero-initialised residual branches would let a cut through a block pass.
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    config = ConvLoraConfig(r=2, target_modules=target, norm=norm, modules_to_save=head_names(model))
    return get_peft_model(model, config)


@pytest.mark.parametrize("name", FAMILIES)
def test_tail_has_the_outputs_and_gradients_of_the_model(name: str) -> None:
    model = adapted(name).train()
    images = torch.randn(4, 3, 32, 32)
    whole, tail = copy.deepcopy(model), FrozenPrefix(model, images)
    assert tail.start == f"base_model.model.{FAMILIES[name]}"
    features = tail.features(images)
    assert torch.equal(tail.tail.eval()(features), whole.eval()(images))

    labels = torch.arange(4)
    for part, inputs in ((tail.tail, features), (whole, images)):
        torch.manual_seed(1)  # for the dropout in front of the head
        F.cross_entropy(part.train()(inputs), labels).backward()
    for (key, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad)


def test_training_the_head_alone_makes_the_rest_the_prefix() -> None:
    model = METHODS["head"].prepare(timm.create_model("mobilenetv3_small_050", num_classes=10), {"norm": "recalibrate"})
    prefix = FrozenPrefix(model, torch.randn(2, 3, 32, 32))
    assert prefix.start == "base_model.model.classifier"
    assert prefix.features(torch.randn(3, 3, 32, 32)).shape == (3, 1024)


def test_frozen_prefix_does_not_change_the_model() -> None:
    model = adapted("mobilenetv2_035", norm="recalibrate").train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    prefix = FrozenPrefix(model, torch.zeros(2, 3, 32, 32))
    prefix.features(torch.zeros(2, 3, 32, 32))
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    # Shared, not copied: training the tail trains the model.
    assert {id(p) for p in prefix.tail.parameters()} < {id(p) for p in model.parameters()}


def all_frozen() -> nn.Module:
    return timm.create_model("mobilenetv2_035").requires_grad_(False)


def in_two_branches() -> nn.Module:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.first.requires_grad_(False)
            self.second.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.third(self.second(x)) + x

    return Branches()


def scaled_in_between() -> nn.Module:
    class Scaled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[1](2 * self[0](x)))

    model = Scaled(*(nn.Conv2d(3, 3, 1) for _ in range(3))).requires_grad_(False)
    model[2].requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (all_frozen, "the model has no trainable parameters"),
        (
            lambda: timm.create_model("mobilenetv2_035"),
            "conv_stem is trainable, and no layer comes before it.*last-stage",
        ),
        (lambda: adapted("mobilenetv2_035", target="all-conv"), "conv_stem is trainable, and no layer comes before it"),
        (in_two_branches, "the trainable third do not form a chain of modules"),
        (scaled_in_between, "the trainable 2 do not form a chain of modules"),
        (
            lambda: adapted("mobilenetv2_035", norm="stats"),
            r"bn1\.lora_norm.*changes with every batch, .*blocks\.6: choose norm=recalibrate or norm=frozen",
        ),
        (
            lambda: adapted("mobilenetv2_035", drop_path_rate=0.9),
            "different outputs in training mode and in eval mode",
        ),
    ],
)
def test_model_that_cannot_be_split_raises(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenPrefix(make(), torch.randn(4, 3, 32, 32))


def test_fingerprint_changes_with_the_prefix_only() -> None:
    images = torch.randn(2, 3, 32, 32)
    model = adapted("mobilenetv3_small_050", norm="recalibrate")
    seen = {FrozenPrefix(model, images).fingerprint}
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save.default.weight.add_(1)
    assert seen == {FrozenPrefix(model, images).fingerprint}
    for change in (
        model.base_model.model.conv_stem.weight.data,
        model.base_model.model.blocks[0][0].bn1.current_state().running_mean,
    ):
        change.add_(1)
        seen.add(FrozenPrefix(model, images).fingerprint)
    model.base_model.model.conv_stem.stride = (1, 1)
    seen.add(FrozenPrefix(model, images).fingerprint)
    assert len(seen) == 4


def test_backpropagation_stops_at_the_prefix_without_a_cache_too() -> None:
    model, images = adapted("mobilenetv3_small_050").train(), torch.randn(2, 3, 32, 32)
    prefix = FrozenPrefix(model, images)
    whole, tail = count_flops(model, images), count_flops(prefix.tail, prefix.features(images))
    assert whole.backward == tail.backward > 0
    assert not any(flops.backward for name, flops in whole.by_module.items() if "blocks.4" in name)
    spared = ("conv_stem", *(f"blocks.{number}" for number in range(5)))
    prefix_forward = sum(whole.by_module[f"base_model.model.{name}"].forward for name in spared)
    assert whole.forward - tail.forward == prefix_forward > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "share"), [("mobilenetv2_100", 0.9), ("mobilenetv3_large_100", 0.95), ("mobilenetv4_conv_small", 0.95)]
)
def test_step_of_the_last_stage_saves_most_flops_of_full_fine_tuning(name: str, share: float) -> None:
    prefix = FrozenPrefix(adapted(name), torch.randn(2, 3, 224, 224))
    features = torch.empty(16, *prefix.features(torch.zeros(1, 3, 224, 224)).shape[1:])
    full = count_flops(timm.create_model(name, num_classes=10), torch.empty(16, 3, 224, 224))
    replay = count_flops(prefix.tail.train(), features)
    assert replay.forward + replay.backward <= (1 - share) * (full.forward + full.backward)


IMAGES = torch.randn(10, 3, 6, 6)
LABELS = torch.arange(10) % 4


def views(number: int) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of view `number`. Each view is brighter than the previous view."""
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
def prefix(model: nn.Module) -> FrozenPrefix:
    return FrozenPrefix(model, IMAGES[:2])


def opened(root: Path, prefix: FrozenPrefix, images: Callable[[int], Any] = views, **options: Any) -> FeatureCache:
    return FeatureCache.open(root, prefix, images, **{"key": "a", "views": 2, **options})


def test_each_epoch_reads_its_view_of_the_requested_images(tmp_path: Path, prefix: FrozenPrefix) -> None:
    cache = opened(tmp_path, prefix)
    assert len(cache) == 10
    batch = cache.__getitems__([(0, 7), (1, 0), (2, 9), (5, 7)])
    seen = torch.stack([IMAGES[7], IMAGES[0] + 1, IMAGES[9], IMAGES[7] + 1])
    torch.testing.assert_close(batch["pixel_values"], prefix.features(seen))
    assert batch["labels"].tolist() == LABELS[[7, 0, 9, 7]].tolist()
    batch["pixel_values"].zero_()
    torch.testing.assert_close(cache.__getitems__([(0, 7)])["pixel_values"], prefix.features(IMAGES[7:8]))


def test_features_keep_their_memory_format(tmp_path: Path, model: nn.Module) -> None:
    for format in (torch.contiguous_format, torch.channels_last):
        prefix = FrozenPrefix(model.to(memory_format=format), IMAGES[:2])
        features = opened(tmp_path, prefix, key=str(format)).__getitems__([(0, 1), (0, 2)])["pixel_values"]
        assert features.is_contiguous(memory_format=format)
        torch.testing.assert_close(features, prefix.features(IMAGES[1:3]))


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_relative_error_of_each_type_is_measured(
    tmp_path: Path, prefix: FrozenPrefix, dtype: str, bytes_each: int
) -> None:
    cache = opened(tmp_path, prefix, dtype=dtype, views=1)
    found = cache.__getitems__([(0, index) for index in range(10)])["pixel_values"]
    wanted = prefix.features(IMAGES)
    error = (found - wanted).norm() / wanted.norm()
    assert cache.info["relative_error"] == pytest.approx(error.item(), rel=1e-3, abs=1e-7)
    # Half a step of 8 bits (int8) and of the 11 bits of a significand (float16).
    step = {"float32": 0.0, "float16": 2**-11, "int8": 0.5 / 127}[dtype]
    assert (found - wanted).abs().amax() <= step * wanted.abs().amax() * 1.001
    assert (cache.info["relative_error"] == 0) == (dtype == "float32")
    values = 10 * 8 * 4 * 4 * bytes_each
    assert values < cache.info["size_bytes"] < values + 4000


def test_vectors_can_be_stored(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    prefix = FrozenPrefix(model, IMAGES[:2])
    found = opened(tmp_path, prefix, dtype="int8").__getitems__([(0, 3)])["pixel_values"]
    assert found.shape == (1, 8)
    torch.testing.assert_close(found, prefix.features(IMAGES[3:4]), atol=1e-2, rtol=1e-2)


def test_fill_flops_are_the_forward_passes_of_the_prefix(tmp_path: Path, prefix: FrozenPrefix) -> None:
    info = opened(tmp_path, prefix).info
    # A multiply-add is two; two views of ten images, 4 x 4 positions, kernels of 3 x 3 x 3, 8 channels.
    assert info["fill_flops"] == 2 * (2 * 10) * (4 * 4) * (3 * 3 * 3) * 8
    assert info["fill_s"] > 0


def test_stored_features_are_reused_unless_stale(tmp_path: Path, prefix: FrozenPrefix) -> None:
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
def test_damaged_cache_is_filled_again(
    tmp_path: Path, prefix: FrozenPrefix, name: str, damage: Callable[[Path], object]
) -> None:
    expected = opened(tmp_path, prefix).__getitems__([(0, 3)])["pixel_values"]
    damage(next(tmp_path.glob(f"*/{name}")))

    assert torch.equal(opened(tmp_path, prefix).__getitems__([(0, 3)])["pixel_values"], expected)


def test_cache_is_read_without_a_lock(tmp_path: Path, prefix: FrozenPrefix, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(tmp_path, prefix)

    def denied(path: Path) -> None:
        raise PermissionError(f"{path}: a file in a read-only folder")

    monkeypatch.setattr(feature_cache, "FileLock", denied)
    again = opened(tmp_path, prefix)
    assert torch.equal(again.__getitems__([(0, 1)])["pixel_values"], first.__getitems__([(0, 1)])["pixel_values"])


def test_interrupted_fill_leaves_no_cache(tmp_path: Path, prefix: FrozenPrefix) -> None:
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
def test_features_that_cannot_be_stored_raise(
    tmp_path: Path, prefix: FrozenPrefix, value: float, dtype: str, message: str
) -> None:
    with torch.no_grad():
        prefix._model[0].bias.fill_(value)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, prefix, dtype=dtype)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_views_with_different_images_raise(tmp_path: Path, prefix: FrozenPrefix) -> None:
    def shorter(number: int) -> Iterator[dict[str, Tensor]]:
        yield from list(views(number))[number:]

    with pytest.raises(ValueError, match=r"expected the same number of images in every view, found \[10, 6\]"):
        opened(tmp_path, prefix, shorter)
    assert not list(tmp_path.glob("*/info.json"))


@pytest.mark.parametrize("index", [-1, 10])
def test_unknown_image_raises_with_its_number(tmp_path: Path, prefix: FrozenPrefix, index: int) -> None:
    with pytest.raises(IndexError, match=f"expected an image number, 0 to 9, found {index}"):
        opened(tmp_path, prefix).__getitems__([(0, 0), (0, index)])


def test_no_images_raise(tmp_path: Path, prefix: FrozenPrefix) -> None:
    with pytest.raises(ValueError, match="there are no images whose features"):
        opened(tmp_path, prefix, lambda number: [])
