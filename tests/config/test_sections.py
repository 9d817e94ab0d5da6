from __future__ import annotations

from pathlib import Path

import pytest

from peft_edge.config import ConfigError, RunConfig, load_config

ROOT = Path(__file__).parents[2]


def errors_of(*arguments: str, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments, **kwargs)
    return str(caught.value)


def test_impossible_combinations_are_reported_together_with_other_errors() -> None:
    message = errors_of(
        "output_dir=a",
        "adapter.r=0",
        "backbone.pretrained=true",
        "backbone.checkpoint=b",
        "training.batch_size=30",
        "training.gradient_accumulation_steps=4",
        "training.mixed_precision=fp16",
        "adapter.target_modules=all-convs",
        "--cpu",
    )
    assert message.startswith("5 errors")
    for key in (
        "adapter.r",
        "backbone.checkpoint",
        "training.batch_size",
        "training.mixed_precision",
        "target_modules",
    ):
        assert f"{key}: " in message


def test_untrained_source_is_refused_but_pretrained_is_not() -> None:
    assert "source.epochs: is 0" in errors_of("output_dir=a", "source.epochs=0")
    assert load_config(["output_dir=a", "source.epochs=0", "backbone.pretrained=true"]).source.epochs == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = load_config(["--config", str(path)])
    assert isinstance(config, RunConfig)
    assert config.output_dir == f"runs/{path.stem}"
