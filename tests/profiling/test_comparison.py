from __future__ import annotations

import pytest

from peft_edge.profiling.analysis import OPTIMIZERS, analyse
from peft_edge.profiling.comparison import compare_methods

SMALL = {"batch_size": 2, "image_size": 32}


def test_every_rank_of_a_method_with_ranks_is_analysed() -> None:
    costs = compare_methods("resnet10t", ["peft-loha", "conv-adapter"], lora_ranks=[2, 4], **SMALL)
    assert list(costs) == ["peft-loha, rank 2", "peft-loha, rank 4", "conv-adapter"]
    two, four, _ = (cost.num_trainable_params for cost in costs.values())
    head = 512 * 1000 + 1000
    assert four - head == 2 * (two - head)


def test_methods_with_adapters_are_analysed_at_every_rank_and_others_once() -> None:
    costs = compare_methods("resnet10t", ["head", "lora", "full"], lora_ranks=[1, 3], **SMALL)
    assert list(costs) == ["head", "lora, rank 1", "lora, rank 3", "full"]
    assert [cost.lora_rank for cost in costs.values()] == [None, 1, 3, None]
    alone = analyse("resnet10t", "lora", lora_rank=3, **SMALL).profile[0]
    assert costs["lora, rank 3"] == alone


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 2), ("sgd", 0), ("sgd-momentum", 1)])
def test_the_optimizer_decides_on_the_state(optimizer: str, moments: int) -> None:
    assert optimizer in OPTIMIZERS
    (cost,) = compare_methods("mobilenetv2_035", ["head"], lora_ranks=[1], optimizer=optimizer, **SMALL).values()
    weights = (1280 * 1000 + 1000) * 4
    counters = 8 if optimizer == "adamw" else 0  # of the steps of weight and bias
    assert cost.memory_optimizer_bytes == moments * weights + counters
