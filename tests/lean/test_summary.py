"""The summary says of every layer what it keeps."""

from __future__ import annotations

from peft import get_peft_model
from torch import nn

from peft_edge import ConvLoraConfig
from peft_edge.lean import lean_summary, prepare_model_for_lean_training


def lines(model: nn.Module) -> list[str]:
    return [" ".join(line.split()) for line in lean_summary(model).splitlines()]


def test_a_plain_model_is_what_torch_makes_of_it(chain: nn.Module) -> None:
    assert lines(chain) == [
        "1 BatchNorm2d what torch keeps, such as 1",
        "2 Conv2d what torch keeps, such as 0",
        "1 ReLU6 what torch keeps, such as 2",
    ]


def test_a_lean_model(chain: nn.Module) -> None:
    chain.append(nn.Flatten())
    prepare_model_for_lean_training(chain, masks="bit")
    assert lines(chain) == [
        "1 BatchNorm2d nothing of its input",
        "2 Conv2d nothing of its input",
        "1 Flatten what torch keeps, such as 4",
        "1 ReLU6 a bit for each element",
    ]

    chain[3].requires_grad_(True)
    prepare_model_for_lean_training(chain, fold_norm=True)
    assert lines(chain) == [
        "1 BatchNorm2d nothing, and works in place",
        "1 Conv2d its input",
        "1 Conv2d nothing of its input",
        "1 Flatten what torch keeps, such as 4",
        "1 ReLU6 its output",
    ]


def test_an_adapted_model(chain: nn.Module) -> None:
    model = get_peft_model(chain, ConvLoraConfig(target_modules=["3"], norm="stats")).train()
    prepare_model_for_lean_training(model)

    assert lines(model) == [
        "1 BatchNorm2d in LoraBatchNormLayer its input",
        "1 Conv2d nothing of its input",
        "1 Conv2d in ConvLoraLayer its input",
        "1 ReLU6 its output",
    ]
