from __future__ import annotations

import pytest

from peft_edge.config import ConfigError, load_config

NEW = "data.new_classes=[a, b]"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ([], "data.shift: expected a shift or data.new_classes, found neither"),
        (
            ["data.shift=blend", NEW, "data.rehearsal_size=4"],
            "data.shift: expected a shift or data.new_classes, found both",
        ),
        ([NEW, "training.weight_decay=0.1"], "training.weight_decay: would shrink the old classes' rows"),
        (
            ["data.shift=blend", "method=galore", "galore.layerwise=true", "training.max_grad_norm=1"],
            "training.max_grad_norm: needs all gradients at once",
        ),
        (
            ["data.shift=blend", "lean.enabled=true", "lean.fold_norm=true"],
            "lean.fold_norm: folds frozen BatchNorm, and norm is stats",
        ),
        (
            ["data.shift=blend", "conv_adapter.target_modules=("],
            "conv_adapter.target_modules: '(' is no regular expression",
        ),
        (["data.shift=blend", "method=none", "hub.repo_id=me/a"], "hub.repo_id: is given and the method none makes"),
        (["data.shift=blend", "hub.repo_id=adapter"], "hub.repo_id: expected owner/name, found 'adapter'"),
        (["data.shift=blend", "hub.repo_id=me/an/adapter"], "hub.repo_id: Repo id must be"),
    ],
)
def test_each_is_named_by_its_key(arguments: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["output_dir=a", *arguments])
    message = str(caught.value)
    assert message.startswith("1 error ")
    assert key in message


@pytest.mark.parametrize(
    "arguments",
    [
        [NEW],
        ["data.shift=blend", r"conv_adapter.target_modules=blocks\.[1-3]\.\d"],
        ["data.shift=blend", "hub.repo_id=me/adapter"],
        [NEW, "data.increments=2", "data.rehearsal_size=4", "training.weight_decay=0.1"],
        ["data.shift=blend", "method=lora", "galore.layerwise=true", "training.max_grad_norm=1"],
    ],
)
def test_what_can_work_passes(arguments: list[str]) -> None:
    assert load_config(["output_dir=a", *arguments]).output_dir == "a"


def test_classes_may_be_numbers() -> None:
    assert load_config(["output_dir=a", "data.new_classes=[6, '7']"]).data.new_classes == ["6", "7"]
