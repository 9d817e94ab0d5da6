from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_edge.hub.card import CardSubject, adapter_card, shareable
from peft_edge.records import Record, StepProfile


def test_shareable_shortens_local_paths_only(
    record: Callable[..., Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    made = record("lora", 0.5)
    config = made.run_info.train_config
    config |= {"output_dir": "runs/mine", "cache_dir": "shared/cache"}
    config["data"] |= {"name": "owner/pets", "shift": "photos/cats"}
    config["backbone"]["checkpoint"] = "~/weights/start.safetensors"
    made.meta_info.dataset_info = {str(tmp_path / "photos"): {"sha": "1"}}
    made.run_info.peft_config = {"base_model_name_or_path": str(tmp_path), "target_modules": [r"blocks\.1"]}
    found = shareable(made)
    shared = found.run_info.train_config
    assert (shared["output_dir"], shared["cache_dir"]) == ("mine", "cache")
    assert (shared["data"]["name"], shared["data"]["shift"]) == ("owner/pets", "cats")
    assert shared["backbone"]["checkpoint"] == "start.safetensors"
    assert found.meta_info.dataset_info == {"photos": {"sha": "1"}}
    assert found.run_info.peft_config == {"base_model_name_or_path": tmp_path.name, "target_modules": [r"blocks\.1"]}
    assert found.train_info == made.train_info


SUBJECT = CardSubject(
    base="/somewhere/base", architecture="mobilenetv2_035", peft_type="CONV_LORA", source="me/adapter"
)


@pytest.fixture
def full_record(record: Callable[..., Record]) -> Record:
    """Return the record of a run that adapted pretrained weights to a dataset on the Hub."""
    made = record("dora", 0.75, num_trainable_params=1234, num_total_params=5678, file_size=99, train_time=1.5)
    made.run_info.train_config |= {
        "model_id": "mobilenetv2_100",
        "backbone": {"name": "mobilenetv2_100", "pretrained": True},
        "data": {"name": "owner/pets", "shift": None, "severity": None, "new_classes": ["owl", "7"], "image_size": 32},
    }
    made.profile = [StepProfile(process_index=0, scope="step", steps=1, flops_forward=10**9, memory_peak_bytes=2**25)]
    return made


def metadata(record: Record | None, **changes: Any) -> dict[str, Any]:
    return adapter_card(CardSubject(**{**vars(SUBJECT), **changes}), record).data.to_dict()


def test_metadata_describe_the_run(full_record: Record) -> None:
    found = metadata(full_record)
    assert found["base_model"] == "timm/mobilenetv2_100.ra_in1k"
    assert found["license"] == "apache-2.0"
    assert found["datasets"] == ["owner/pets"]
    assert {"dora", "lora", "CONV_LORA"} <= set(found["tags"])
    (result,) = found["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "accuracy", "value": 0.75, "name": "test accuracy"}


def test_domain_of_a_dataset_is_named(full_record: Record) -> None:
    rows = {key: [["domain", "==", name]] for key, name in (("source_filters", "photo"), ("shift_filters", "sketch"))}
    full_record.run_info.train_config["data"] |= {"name": "owner/pacs", "new_classes": [], **rows}
    (result,) = metadata(full_record)["model-index"][0]["results"]
    assert result["dataset"]["name"] == "owner/pacs (photo), owner/pacs (sketch)"


def test_backbone_that_is_not_on_the_hub_is_not_in_the_metadata() -> None:
    found = metadata(None)
    assert {"base_model", "datasets", "license", "model-index"}.isdisjoint(found)
    assert metadata(None, base="timm/a.b", license="mit") == found | {"base_model": "timm/a.b", "license": "mit"}


def test_text_has_the_adaptation_the_accuracy_and_the_cost(full_record: Record) -> None:
    text = adapter_card(SUBJECT, full_record).text
    assert "adapted from `owner/pets` to new classes owl, 7 with the method `dora`" in text
    assert "target       -  0.750" in text
    assert "trained parameters  1,234" in text
    assert "arithmetic and time of a training step" in text
    assert "/somewhere" not in text
    assert "cost.png" not in text


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")
def test_figure_is_saved_beside_the_card(full_record: Record, tmp_path: Path) -> None:
    assert "](cost.png)" in adapter_card(SUBJECT, full_record, tmp_path).text
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_python_blocks_of_a_card_compile() -> None:
    for peft_type in ("CONV_LORA", None):
        text = adapter_card(CardSubject(**{**vars(SUBJECT), "peft_type": peft_type})).text
        blocks = text.split("```python\n")[1:]
        assert blocks
        for block in blocks:
            compile(block.split("```")[0], "card", "exec")
