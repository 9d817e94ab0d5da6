from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from peft_edge.export.fusion import fuse_batch_norms

NETWORKS = ["mobilenetv2_035", "tf_mobilenetv3_small_minimal_100", "test_resnet"]


class Awkward(nn.Module):
    """Norms that belong to no convolution alone."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1)
        self.of_images, self.of_shared, self.of_sum = nn.BatchNorm2d(3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.alone = nn.BatchNorm2d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.of_images(x))
        x = self.of_sum(self.conv(x) + self.of_shared(x)[..., 1:-1, 1:-1])
        return self.alone(self.last(x))


def moved(model: nn.Module) -> nn.Module:
    """In eval mode and double precision, with statistics and weights of BatchNorm that are nothing special."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5)
    return model.eval().double().requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_answers_the_same_without_a_single_norm(name: str, images: Tensor) -> None:
    model = moved(timm.create_model(name, num_classes=10))
    images = images.double()
    expected = model(images)
    fuse_batch_norms(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())


@torch.no_grad()
def test_a_norm_stays_unless_it_alone_takes_a_convolutions_output(images: Tensor) -> None:
    model = moved(Awkward())
    expected = model(images.double())
    fuse_batch_norms(model)
    assert [type(norm) for norm in (model.of_images, model.of_shared, model.of_sum)] == [nn.BatchNorm2d] * 3
    assert isinstance(model.alone, nn.Identity)
    torch.testing.assert_close(model(images.double()), expected, rtol=1e-12, atol=1e-12)
