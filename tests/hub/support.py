"""Create briefly trained adapters, and change JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_edge import ConvLoraConfig


def adapted(base: nn.Module, **options: Any) -> PeftModel:
    """Return an adapted model whose adapter, head and BatchNorm statistics differ from their initial values."""
    config = ConvLoraConfig(
        **{"r": 2, "norm": "stats", "target_modules": "all-conv", "modules_to_save": ["classifier"], **options}
    )
    model = get_peft_model(base, config)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    with torch.enable_grad():
        for _ in range(2):
            model(torch.randn(8, 3, 32, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
