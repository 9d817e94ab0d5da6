"""Predict the memory of training adapters with ONNX Runtime, and list the adapters that fit a memory budget.

`peft_edge.plan` predicts the memory of the tensors of a training step in PyTorch. This module predicts the memory of
the whole process in which ONNX Runtime runs a step that `peft_edge.export.export_train_step` has written.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_edge.plan import LORA_RANKS, PLACEMENTS

if TYPE_CHECKING:
    from torch import nn

DEVICE_METHODS = ("lora", "lora-fa", "dora")


@dataclass(frozen=True, kw_only=True)
class DeviceOption:
    """An adapter configuration, and the predicted memory of training this adapter on a device."""

    method: str
    """One of `DEVICE_METHODS`."""
    target_modules: str
    """The adapted layers: a layer role such as `all-conv` (see `peft_edge.roles`), or a regular expression."""
    lora_rank: int
    """The rank of the adapters."""
    split: bool
    """Whether the step takes features (stored outputs of the frozen first layers) instead of images."""
    process_bytes: int
    """The predicted peak memory of the process that trains in ONNX Runtime."""
    parameters: int
    """The number of trained parameters. The saved adapter takes four bytes for each parameter."""


def find_device_options(
    backbone: nn.Module,
    *,
    methods: Sequence[str] = DEVICE_METHODS,
    target_modules: Sequence[str] = PLACEMENTS,
    lora_ranks: Sequence[int] = LORA_RANKS,
    batch_size: int = 8,
    image_size: int = 224,
    optimizer: str = "sgd",
) -> list[DeviceOption]:
    """Predict the memory of training on a device for all combinations of method, target modules and rank.

    Return the options in order of decreasing number of trained parameters. BatchNorm is frozen, and the head is always
    trained. If the model can be split before the first trained layer, the list has two options for a combination: one
    that trains on images, and one that trains on stored outputs of the frozen layers (with `split=True`).

    Args:
        backbone: A timm model with the head to be trained. It is not changed.
        methods: Names of methods, all from `DEVICE_METHODS`.
        target_modules: The choices of layers to adapt. Each choice is a layer role such as `all-conv` (see
            `peft_edge.roles`), or a regular expression.
        lora_ranks: Ranks of the adapters.
        batch_size: Images in a step.
        image_size: Height and width of the images in pixels.
        optimizer: `sgd` or `adamw`.

    Raises:
        ValueError: If a method is not one of `DEVICE_METHODS`, or if a step cannot be exported.
        NotImplementedError: If a step needs a gradient that cannot be exported; see `capture_train_step`.
        ImportError: If onnx or onnxruntime is not installed.
    """
    import torch
    from peft import PeftModel
    from tqdm.auto import tqdm

    from peft_edge.export.step_memory import runtime_process_memory
    from peft_edge.export.train_step import StepOptimizer, capture_train_step
    from peft_edge.profiling.analysis import prepare_step

    if unknown := sorted(set(methods) - set(DEVICE_METHODS)):
        raise ValueError(f"only {', '.join(DEVICE_METHODS)} can be exported to devices, found {', '.join(unknown)}")
    images = torch.zeros(batch_size, 3, image_size, image_size)
    step_optimizer = StepOptimizer(name="adamw" if optimizer == "adamw" else "sgd")
    choices = [(method, place, rank) for method in methods for place in target_modules for rank in lora_ranks]
    options: list[DeviceOption] = []
    for method, place, rank in tqdm(choices, unit="adapter", leave=False, disable=None):
        adapter = {"norm": "frozen", "target_modules": place}
        model, _ = prepare_step(copy.deepcopy(backbone), method, lora_rank=rank, adapter=adapter, optimizer=None)
        assert isinstance(model, PeftModel)
        for split in (False, True):
            try:
                step = capture_train_step(model.eval(), images, step_optimizer, split=split)
            except ValueError as error:
                if split and "cannot be split" in str(error):
                    continue
                raise
            options.append(
                DeviceOption(
                    method=method,
                    target_modules=place,
                    lora_rank=rank,
                    split=split,
                    process_bytes=runtime_process_memory(step.step),
                    parameters=sum(value.numel() for value in step.adapter.values()),
                )
            )
    return sorted(options, key=lambda option: (-option.parameters, option.process_bytes))


def device_plan_table(options: Sequence[DeviceOption], memory_bytes: int | None) -> str:
    """Return a text: a table of the options that fit, and then a line for each option that needs too much memory.

    An option fits if its process needs at most `memory_bytes`. If `memory_bytes` is None, all options fit.
    """
    from peft_edge.profiling.tables import text_table

    fitting = [option for option in options if memory_bytes is None or option.process_bytes <= memory_bytes]
    parts = ["nothing fits"]
    if fitting:
        rows = [["", "", "MiB", "KiB", "k"], ["", "step on", "process", "saved", "trained"]]
        rows += [
            [
                _name(option),
                "features" if option.split else "images",
                f"{option.process_bytes / 2**20:,.0f}",
                f"{4 * option.parameters / 2**10:,.1f}",
                f"{option.parameters / 1e3:,.1f}",
            ]
            for option in fitting
        ]
        parts = ["these fit, most trained parameters first", text_table(rows)]
    if memory_bytes is not None and len(fitting) < len(options):
        lines = [
            f"  {_name(option)}, step on {'features' if option.split else 'images'}: "
            f"{option.process_bytes / 2**20:,.0f} MiB, {(option.process_bytes - memory_bytes) / 2**20:,.0f} over"
            for option in options
            if option not in fitting
        ]
        parts.append("\n".join(["these do not fit", *lines]))
    return "\n\n".join(parts)


def _name(option: DeviceOption) -> str:
    return f"{option.method}, {option.target_modules}, rank {option.lora_rank}"
