"""Run train.py in double precision, where two equal runs differ by less than 1e-9."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn


def _in_double(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(item.double() if torch.is_tensor(item) and item.is_floating_point() else item for item in inputs)


# pytest imports this file to look for examples, which must not change its process.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import train

    torch.set_default_dtype(torch.float64)
    nn.modules.module.register_module_forward_pre_hook(_in_double)
    train.main(sys.argv[1:])
