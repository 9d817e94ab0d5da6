from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peft_edge.hub.sharing import shareable
from peft_edge.records import Record


def test_paths_are_cut_and_nothing_else(
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
