"""ConvAdapterConfig: saving, loading and checks."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftConfig, PeftType

from peft_edge.tuners.conv_adapter import ConvAdapterConfig


def test_saved_and_loaded_config_is_equal(tmp_path: Path) -> None:
    config = ConvAdapterConfig(
        target_modules=["depthwise", "blocks.2.0"],
        reduction=8,
        kernel_size=5,
        placement="sequential",
        activation="relu",
        norm="affine",
    )

    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)

    assert isinstance(loaded, ConvAdapterConfig)
    assert loaded.peft_type is PeftType.CONV_ADAPTER
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"norm": "batch"}, r"norm is 'batch'.*frozen, recalibrate, stats, affine"),
        ({"placement": "before"}, r"placement is 'before'.*parallel, sequential"),
        ({"reduction": 0}, r"reduction is 0, expected a positive integer"),
        ({"reduction": None}, r"reduction is None, expected a positive integer"),
        ({"kernel_size": 2.5}, r"kernel_size is 2.5, expected a positive integer"),
        ({"kernel_size": True}, r"kernel_size is True, expected a positive integer"),
        ({"activation": "relo"}, r"activation is 'relo'.*\"relu\""),
    ],
)
def test_invalid_values_are_rejected_with_the_choices(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvAdapterConfig(target_modules="dense", **wrong)
