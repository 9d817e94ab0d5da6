from __future__ import annotations

import pytest
import torch

from peft_edge.export.comparison import answers, compare, comparison_table


@pytest.mark.parametrize(("batch_size", "sizes"), [(3, [3, 3]), (1, [1] * 5), (8, [8]), (None, [5])])
def test_every_image_is_answered_in_batches_of_the_size_that_is_taken(batch_size: int | None, sizes: list[int]) -> None:
    seen = []

    def network(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return images.flatten(1)

    images = torch.randn(5, 3, 2, 2)
    assert torch.equal(answers(network, images, batch_size), images.flatten(1))
    assert seen == sizes


def test_figures_are_those_of_the_logits() -> None:
    expected = torch.tensor([[1.0, 2.0], [4.0, 3.0], [-5.0, 0.0], [1.0, 0.0]])
    found = torch.tensor([[1.0, 2.5], [3.0, 4.0], [-5.0, 0.0], [1.0, 0.0]])
    row = compare("onnx", 1234, found, expected, torch.tensor([1, 0, 0, 0]))
    assert (row.largest_logit, row.largest_difference, row.same_top1) == (5.0, 1.0, 0.75)
    assert (row.accuracy, row.model_accuracy) == (0.5, 0.75)
    assert comparison_table([row]).splitlines() == [
        "         bytes  largest difference of a logit  same top-1  accuracy",
        "PyTorch                                                       0.750",
        "   onnx  1,234                        1.0e+00       0.750     0.500",
    ]
    table = comparison_table([compare("onnx", 1, found, expected, None)])
    assert "PyTorch" not in table
    assert table.endswith("0.750         -")
