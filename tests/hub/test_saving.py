from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import Tensor, nn

from peft_edge import load_backbone, load_pretrained
from peft_edge.hub import save_adapter
from tests.hub.support import adapted


def test_the_card_has_our_tags_and_pefts_version(small_model: PeftModel, tmp_path: Path) -> None:
    save_adapter(small_model, tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert {"peft", "peft-edge", "timm", "lora", "CONV_LORA"} <= set(card.data.tags)
    assert "- PEFT 0.21" in card.text
    assert str(tmp_path) not in str(card)


@torch.no_grad()
def test_a_pattern_that_looks_ahead_is_saved_as_names(tmp_path: Path, batch: Tensor) -> None:
    base: nn.Module = load_backbone("test_efficientnet", num_classes=3)
    pattern = r"(?!conv_stem)(conv.*|blocks\.1.*\.conv\w*)"
    model = adapted(base, target_modules=pattern)
    save_adapter(model, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert "conv_head" in saved
    assert "conv_stem" not in saved
    assert model.peft_config["default"].target_modules == pattern
    fresh = load_backbone("test_efficientnet", num_classes=3)
    fresh.load_state_dict(model.unload().state_dict())
    reloaded = load_pretrained(tmp_path / "adapter", base=fresh)
    assert sorted(reloaded.base_model.targeted_module_names) == sorted(model.base_model.targeted_module_names)
