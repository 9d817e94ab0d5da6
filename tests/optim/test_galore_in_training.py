"""GaLore in a training loop of Accelerate, and in an analysis on fake tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from timm.layers import ConvNormAct
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from peft_edge.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreSGD, galore_param_groups
from peft_edge.profiling import analyse

OPTIMIZERS = {"adamw": GaLoreAdamW, "sgd": GaLoreSGD, "adafactor": GaLoreAdafactor}


@pytest.fixture
def network() -> nn.Module:
    return nn.Sequential(
        ConvNormAct(3, 16, 3, stride=2),
        ConvNormAct(16, 16, 3, groups=16),
        ConvNormAct(16, 24, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 3, 12, 12), torch.randint(5, (8,))) for _ in range(6)]


class Training:
    """A training run in bfloat16 with a schedule, gradient clipping and gradient accumulation."""

    def __init__(self, model: nn.Module, optimizer: Callable[..., Optimizer]) -> None:
        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        groups = galore_param_groups(model, rank=4, update_proj_gap=2, weight_decay=0.1)
        plain = optimizer(groups, lr=1e-2)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, plain, CosineAnnealingLR(plain, 12))

    def run(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        for images, labels in batches:
            for part in zip(images.chunk(2), labels.chunk(2), strict=True):
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(F.cross_entropy(self.model(part[0]), part[1]))
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resuming_a_checkpoint_of_accelerate_gives_the_same_bits(
    name: str, network: nn.Module, batches: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    start, whole = copy.deepcopy(network), Training(copy.deepcopy(network), OPTIMIZERS[name])
    whole.run(batches[:3])
    whole.accelerator.save_state(str(tmp_path))
    whole.run(batches[3:])

    resumed = Training(network, OPTIMIZERS[name])
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(batches[3:])

    for ours, expected, before in zip(network.parameters(), whole.model.parameters(), start.parameters(), strict=True):
        assert torch.equal(ours, expected)
        assert not torch.equal(ours, before)


def test_gradient_accumulation_equals_the_whole_batch(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    network.eval()
    other = copy.deepcopy(network)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    parts, whole = (GaLoreSGD(galore_param_groups(model, rank=4), lr=0.1) for model in (network, other))
    model, optimizer = accelerator.prepare(network, parts)
    for images, labels in batches[:2]:
        for part in zip(images.chunk(2), labels.chunk(2), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(part[0]), part[1]))
                optimizer.step()
                optimizer.zero_grad()
        F.cross_entropy(other(images), labels).backward()
        whole.step()
        whole.zero_grad()

    for ours, expected in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def by_shape(optimizer: Callable[..., Optimizer], parameters: list[nn.Parameter]) -> Optimizer:
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    return optimizer([{"params": matrices, "rank": 4}, {"params": vectors}], lr=1e-2)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_analysis_predicts_the_state_of_a_real_step(name: str, size: str, network: nn.Module) -> None:
    if size == "large":
        network = nn.Sequential(nn.Conv2d(3, 300, 1), nn.Conv2d(300, 280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    make: Any = partial(by_shape, OPTIMIZERS[name])

    analysis = analyse(network, None, optimizer=make, batch_size=2, image_size=12)

    optimizer = make(list(network.parameters()))
    network(torch.randn(2, 3, 12, 12)).sum().backward()
    optimizer.step()
    state = [value for entries in optimizer.state.values() for value in entries.values() if isinstance(value, Tensor)]
    assert analysis.memory.peak["optimizer"] == sum(value.untyped_storage().nbytes() for value in state)
    assert analysis.flops.optimizer > 0
