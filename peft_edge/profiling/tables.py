"""From counts to the rows of a record: one for the step, and one for the layers of each LoRA rank.

Costs as text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_edge.profiling.flops import FlopCount, Flops
from peft_edge.profiling.memory import KINDS, MemoryProfile
from peft_edge.profiling.step import OPTIMIZER
from peft_edge.records import StepProfile


def step_rows(model: nn.Module, flops: FlopCount, memory: MemoryProfile, *, process_index: int) -> list[StepProfile]:
    """Returns a row for the step, and then one for the layers of each LoRA rank; all without times.

    Args:
        model: The one that was measured, not wrapped for several processes.
        flops: Of the step.
        memory: Of the step.
        process_index: Of this process.
    """
    layers_of = _lora_layers(model)
    saved = _saved_bytes(model)
    rows = [
        StepProfile(
            process_index=process_index,
            scope="step",
            lora_rank=next(iter(layers_of)) if len(layers_of) == 1 else None,
            num_trainable_params=_trained([model]),
            **_flops([flops]),
            flops_optimizer=flops.optimizer,
            **_memory([memory.peak]),
            memory_peak_phase=memory.peak_phase,
            memory_forward_end_bytes=memory.forward_end_bytes,
            cuda_peak_bytes=memory.cuda_peak_bytes,
            peak_rss_bytes=memory.peak_rss_bytes,
            adapter_bytes=sum(size for _, size in saved),
        )
    ]
    for lora_rank, layers in sorted(layers_of.items()):
        prefixes = tuple(f"{layer}." for layer in layers)
        rows.append(
            StepProfile(
                process_index=process_index,
                scope="layers",
                lora_rank=lora_rank,
                num_trainable_params=_trained([model.get_submodule(layer) for layer in layers]),
                **_flops([flops.by_module[layer] for layer in layers if layer in flops.by_module]),
                **_memory([memory.peak_by_module[layer] for layer in layers]),
                memory_forward_end_bytes=sum(sum(memory.forward_end_by_module[layer].values()) for layer in layers),
                adapter_bytes=sum(size for name, size in saved if name.startswith(prefixes)),
            )
        )
    return rows


def _trained(modules: list[nn.Module]) -> int:
    trained = {parameter for module in modules for parameter in module.parameters() if parameter.requires_grad}
    return sum(parameter.numel() for parameter in trained)


def _flops(counts: Sequence[Flops]) -> dict[str, Any]:
    # The optimizer works on all parameters in one go, so its operations are of no layer.
    names = [entry.name for entry in fields(Flops) if entry.name != OPTIMIZER]
    return {f"flops_{name}": sum(getattr(count, name) for count in counts) for name in names}


def _memory(peaks: list[dict[str, int]]) -> dict[str, Any]:
    by_kind = {kind: sum(peak[kind] for peak in peaks) for kind in KINDS}
    return {
        "memory_peak_bytes": sum(by_kind.values()),
        **{f"memory_{kind}_bytes": size for kind, size in by_kind.items()},
    }


def _lora_layers(model: nn.Module) -> dict[int, list[str]]:
    """The names of the layers with an active LoRA adapter, by its rank."""
    found: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for lora_rank in {module.r[adapter] for adapter in module.active_adapters if adapter in module.r}:
                # PEFT wraps a module once for each of its parameters that is adapted.
                if not any(name.startswith(f"{layer}.") for layer in found[lora_rank]):
                    found[lora_rank].append(name)
    # Where only norms are adapted, no matrix has the rank that their configuration names.
    return {
        lora_rank: layers
        for lora_rank, layers in found.items()
        if any(getattr(model.get_submodule(layer), "lora_A", None) for layer in layers)
    }


def _saved_bytes(model: Any) -> list[tuple[str, int]]:
    """Name and bytes of each tensor of the active adapters' files, and of each trained parameter of no adapter."""
    tensors: list[tuple[str, Tensor]] = []
    adapters: list[str] = []
    if getattr(model, "peft_config", None):
        # A property of PEFT's models, a method of transformers' ones.
        adapters = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
        for adapter in adapters:
            # Without the last argument, PEFT asks the Hub how large the base model's vocabulary is.
            tensors += get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).items()
    saved = {name for name, _ in tensors}
    for name, parameter in model.named_parameters():
        # An adapter's parameters have its name in theirs.
        if parameter.requires_grad and name not in saved and not set(adapters) & set(name.split(".")):
            tensors.append((name, parameter))
    return [(name, tensor.numel() * tensor.element_size()) for name, tensor in tensors]


_PARAMETERS = {"M": 1e6, "k": 1e3, "": 1}
_FLOPS = {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6, "FLOP": 1}
_BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
_ARITHMETIC = {
    "forward": ["flops_forward"],
    "backward": ["flops_backward"],
    "elementwise": ["flops_elementwise_forward", "flops_elementwise_backward"],
    "optimizer": ["flops_optimizer"],
}
_TIME = {"forward": ["forward_s"], "backward": ["backward_s"], "optimizer": ["optimizer_s"]}
_MEMORY = {
    "peak": ["memory_peak_bytes"],
    "parameters": ["memory_parameters_bytes", "memory_buffers_bytes"],
    "gradients": ["memory_gradients_bytes"],
    "activations": ["memory_activations_bytes"],
    "temporaries": ["memory_temporaries_bytes"],
    "optimizer": ["memory_optimizer_bytes"],
}
# Two tables, one below the other, so that lines are not too long. The columns of a group, which are compared with one
# another, have one unit: the largest in which the largest of them is at least ten. Without units they are words.
_TABLES: Mapping[str, Sequence[tuple[Mapping[str, float], Mapping[str, Sequence[str]]]]] = {
    "arithmetic and time of a training step": (
        (_FLOPS, _ARITHMETIC),
        ({"ms": 1e-3}, _TIME),
        ({"per s": 1}, {"samples": ["samples_per_s"]}),
    ),
    "memory when it is at its peak, and the update": (
        ({}, {"peak in": ["memory_peak_phase"]}),
        (_BYTES, _MEMORY),
        (_PARAMETERS, {"trained": ["num_trainable_params"]}),
        (_BYTES, {"saved": ["adapter_bytes"]}),
    ),
}


def cost_table(costs: Mapping[str, StepProfile]) -> str:
    """Returns what steps cost as lines of text: arithmetic and time, and below memory at the peak and saved bytes.

    Columns of which nothing was measured are left out; in others, a dash stands for what was not.

    Args:
        costs: By the name that heads the line.
    """
    tables = []
    for caption, groups in _TABLES.items():
        columns = [column for units, group in groups for column in _columns(costs.values(), units, group)]
        if columns:
            tables.append(f"{caption}\n{text_table(list(zip(['', '', *costs], *columns, strict=True)))}")
    return "\n\n".join(tables)


def _columns(
    costs: Collection[StepProfile], units: Mapping[str, float], group: Mapping[str, Sequence[str]]
) -> Iterator[list[str]]:
    if not units:
        words = {title: [getattr(cost, name) for cost in costs] for title, (name,) in group.items()}
        yield from (["", title, *(word or "-" for word in column)] for title, column in words.items() if any(column))
        return
    sums = {title: [_sum(cost, names) for cost in costs] for title, names in group.items()}
    largest = max((value for values in sums.values() for value in values if value is not None), default=None)
    if largest is None:
        return
    unit, size = next(((unit, size) for unit, size in units.items() if largest >= 10 * size), [*units.items()][-1])
    for title, values in sums.items():
        yield [unit, title, *("-" if value is None else _short(value / size) for value in values)]


def profile_table(rows: Sequence[StepProfile]) -> str:
    """Returns `cost_table` for the rows of a record: a process's step, and below it the layers of each LoRA rank."""
    return cost_table({_name(row): row for row in rows})


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns lines of text, in which each column of cells is as wide as it must be, and ends at its right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _sum(cost: StepProfile, names: Sequence[str]) -> float | None:
    known = [value for value in (getattr(cost, name) for name in names) if value is not None]
    return sum(known) if known else None


def _short(value: float) -> str:
    """Three digits, or all of those before the point."""
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:,.{max(0, 3 - len(str(int(value))))}f}" if value else "0"


def _name(row: StepProfile) -> str:
    return f"process {row.process_index}" + (f", layers of rank {row.lora_rank}" if row.scope == "layers" else "")
