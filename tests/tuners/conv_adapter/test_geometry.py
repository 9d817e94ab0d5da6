"""Where the outputs of a layer lie in its input, against the layer itself."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from peft_edge.tuners.conv_adapter.geometry import Geometry

CONVS = {
    "plain": nn.Conv2d(4, 6, 3, bias=False),
    "padded": nn.Conv2d(4, 6, 5, padding=2, stride=2, bias=False),
    "dilated": nn.Conv2d(4, 6, 3, padding=2, dilation=2, bias=False),
    "even": nn.Conv2d(4, 6, 4, stride=4, bias=False),
    "oblong": nn.Conv2d(4, 6, (1, 5), padding=(1, 0), bias=False),
    "reflected": nn.Conv2d(4, 6, 5, padding=2, padding_mode="reflect", bias=False),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
    "same": nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False),
    "timm's same": Conv2dSame(4, 6, 5, stride=2, bias=False),
}


@pytest.mark.parametrize("size", [16, 17])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", CONVS)
def test_padding_for_a_kernel_of_another_size(kind: str, kernel_size: int, size: int) -> None:
    conv = copy.deepcopy(CONVS[kind])
    geometry = Geometry.of_convolution(conv)
    kernel = torch.randn(6, 4, kernel_size, kernel_size)
    x = torch.randn(2, 4, size, size)

    y = F.conv2d(geometry.pad(x, (kernel_size, kernel_size)), kernel, None, conv.stride, 0, conv.dilation)

    assert y.shape == conv(x).shape
    margins = geometry.margins((kernel_size, kernel_size))
    if min(margins) >= 0:
        # The smaller kernel with zeros around it, in the place of the convolution's own.
        conv.weight.data = F.pad(kernel, margins)
        torch.testing.assert_close(y, conv(x))


@pytest.mark.parametrize("kind", CONVS)
def test_the_output_is_mapped_to_its_own_shape(kind: str) -> None:
    y = CONVS[kind](torch.randn(2, 4, 16, 16))
    geometry = Geometry.of_convolution(CONVS[kind]).of_output()

    for kernel_size in (geometry.kernel_size, (1, 1), (3, 3)):
        assert F.conv2d(geometry.pad(y, kernel_size), torch.ones(6, 1, *kernel_size), groups=6).shape == y.shape


@pytest.mark.parametrize(
    ("backbone", "block", "expected"),
    [
        ("mobilenetv2_035", "blocks.1.0", (8, 8, 2)),
        ("mobilenetv2_035", "blocks.1.1", (8, 8, 1)),
        ("mobilenetv2_035", "blocks", (16, 112, 16)),
        ("resnet10t", "layer2.0", (64, 128, 2)),
        ("mobilenetv4_conv_small", "blocks.2.0", (64, 96, 2)),
        ("tf_mobilenetv3_small_minimal_100", "blocks.1.0", (16, 24, 2)),
    ],
)
def test_blocks(backbone: str, block: str, expected: tuple[int, int, int]) -> None:
    model = timm.create_model(backbone)
    before = copy.deepcopy(model.state_dict())

    geometry = Geometry.of_block(model.get_submodule(block), block)

    assert (geometry.in_channels, geometry.out_channels, geometry.stride) == (*expected[:2], (expected[2],) * 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _Flat(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (nn.ReLU(), "ReLU is no convolution and holds none"),
        (nn.BatchNorm2d(4), "BatchNorm2d is no convolution and holds none"),
        (_Flat(nn.Conv2d(3, 4, 1)), r"maps \(64, 65\) pixels to"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"maps \(64, 65\) pixels to"),
        (nn.Sequential(nn.Linear(3, 3), nn.Conv2d(3, 4, 1)), "found Sequential .*same reduction dim"),
    ],
)
def test_what_is_no_block_is_refused_by_name(block: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"layer 'here'.*{reason}.*exclude_modules=\['here'\]"):
        Geometry.of_block(block, "here")
