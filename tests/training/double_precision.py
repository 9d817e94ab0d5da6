"""Run train.py in double precision, where two equal runs differ by less than 1e-9."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
torch.set_default_dtype(torch.float64)


def _in_double(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(item.double() if torch.is_tensor(item) and item.is_floating_point() else item for item in inputs)


nn.modules.module.register_module_forward_pre_hook(_in_double)

if __name__ == "__main__":
    import train

    train.main(sys.argv[1:])
