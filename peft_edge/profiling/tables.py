"""Convert FLOP and memory counts to rows of the type `StepProfile`, and format these rows as text tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_edge.profiling.flops import FlopCount, Flops
from peft_edge.profiling.memory import MEMORY_KINDS, KindBytes, MemoryProfile
from peft_edge.profiling.step import OPTIMIZER
from peft_edge.records import StepProfile


def step_rows(model: nn.Module, flops: FlopCount, memory: MemoryProfile, *, process_index: int) -> list[StepProfile]:
    """Return a row for the whole step, followed by a row for each LoRA rank. All fields for times are None.

    The row for a rank contains the sums over all layers with an active adapter of this rank. `model` is the measured
    model, without the wrapper that distributed training adds.
    """
    layers_of, saved = _lora_layers(model), _saved_bytes(model)
    rows = [
        StepProfile(
            process_index=process_index,
            scope="step",
            lora_rank=next(iter(layers_of)) if len(layers_of) == 1 else None,
            num_trainable_params=_trained([model]),
            **_sums([flops], [memory.peak]),
            flops_optimizer=flops.optimizer,
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
                **_sums(
                    [flops.by_module[layer] for layer in layers if layer in flops.by_module],
                    [memory.peak_by_module[layer] for layer in layers],
                ),
                memory_forward_end_bytes=sum(sum(memory.forward_end_by_module[layer].values()) for layer in layers),
                adapter_bytes=sum(size for name, size in saved if name.startswith(prefixes)),
            )
        )
    return rows


def _trained(modules: list[nn.Module]) -> int:
    trained = {parameter for module in modules for parameter in module.parameters() if parameter.requires_grad}
    return sum(parameter.numel() for parameter in trained)


def _sums(counts: Sequence[Flops], peaks: Sequence[KindBytes]) -> dict[str, Any]:
    # The optimizer updates all parameters at once, so its FLOPs belong to no layer.
    names = [entry.name for entry in fields(Flops) if entry.name != OPTIMIZER]
    flops = {f"flops_{name}": sum(getattr(count, name) for count in counts) for name in names}
    sizes = {f"memory_{kind}_bytes": sum(peak[kind] for peak in peaks) for kind in MEMORY_KINDS}
    return {**flops, "memory_peak_bytes": sum(sizes.values()), **sizes}


def _lora_layers(model: nn.Module) -> dict[int, list[str]]:
    """Return a dict from each LoRA rank to the names of the layers with an active adapter of that rank."""
    found: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for lora_rank in {module.r[adapter] for adapter in module.active_adapters if adapter in module.r}:
                # PEFT wraps a module once for each of its adapted parameters. Only the outermost wrapper counts.
                if not any(name.startswith(f"{layer}.") for layer in found[lora_rank]):
                    found[lora_rank].append(name)
    # Leave out the rank of an adapter that adapts only normalisation layers. The configuration of such an adapter
    # contains a rank, but its layers have no matrices of this rank.
    return {
        lora_rank: layers
        for lora_rank, layers in found.items()
        if any(getattr(model.get_submodule(layer), "lora_A", None) for layer in layers)
    }


def _saved_bytes(model: nn.Module) -> list[tuple[str, int]]:
    """Return (name, bytes) for each saved tensor of the active adapters.

    The list also contains each trainable parameter that is not part of an adapter.
    """
    tensors: list[tuple[str, Tensor]] = []
    adapters: list[str] = []
    if getattr(model, "peft_config", None):
        # `active_adapters` is a property of PEFT models, but a method of transformers models.
        active = model.active_adapters
        adapters = active() if callable(active) else active  # type: ignore[assignment]
        for adapter in adapters:
            # By default (`save_embedding_layers="auto"`), PEFT would request the vocabulary size from the Hub.
            tensors += get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).items()
    saved = {name for name, _ in tensors}
    for name, parameter in model.named_parameters():
        # In the model, the name of an adapter's parameter contains the name of the adapter. In `saved`, it does not.
        if parameter.requires_grad and name not in saved and not set(adapters) & set(name.split(".")):
            tensors.append((name, parameter))
    return [(name, tensor.numel() * tensor.element_size()) for name, tensor in tensors]


_FLOP_UNITS = {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6, "FLOP": 1}
_BYTE_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
_COUNT_UNITS = {"M": 1e6, "k": 1e3, "": 1}
# Each table has a caption and groups of columns. A group is a pair: the units to choose from, and a dict from the title
# of each column to the fields whose sum the column shows. All columns of a group have the same unit: the largest one in
# which the largest value of the group is at least 10. If there is no such unit, they have the smallest unit. A group
# without units contains text. There are two tables, because the lines of a single table would be too long.
_TABLES: Mapping[str, Sequence[tuple[Mapping[str, float], Mapping[str, Sequence[str]]]]] = {
    "arithmetic and time of a training step": (
        (
            _FLOP_UNITS,
            {
                "forward": ["flops_forward"],
                "backward": ["flops_backward"],
                "elementwise": ["flops_elementwise_forward", "flops_elementwise_backward"],
                "optimizer": ["flops_optimizer"],
            },
        ),
        ({"ms": 1e-3}, {"forward": ["forward_s"], "backward": ["backward_s"], "optimizer": ["optimizer_s"]}),
        ({"per s": 1}, {"samples": ["samples_per_s"]}),
    ),
    "memory when it is at its peak, and the update": (
        ({}, {"peak in": ["memory_peak_phase"]}),
        (
            _BYTE_UNITS,
            {
                "peak": ["memory_peak_bytes"],
                "parameters": ["memory_parameters_bytes", "memory_buffers_bytes"],
                **{kind: [f"memory_{kind}_bytes"] for kind in MEMORY_KINDS[2:]},
            },
        ),
        (_COUNT_UNITS, {"trained": ["num_trainable_params"]}),
        (_BYTE_UNITS, {"saved": ["adapter_bytes"]}),
    ),
}


def cost_table(costs: Mapping[str, StepProfile]) -> str:
    """Return two text tables with a line for each name in `costs`.

    The first table has FLOPs and times. The second has the peak memory and the saved bytes. A dash marks a missing
    value. A group of columns (see `_TABLES`) without any value is omitted. A table without any value is omitted too.
    """
    tables = []
    for caption, groups in _TABLES.items():
        columns = [column for units, group in groups for column in _columns(costs.values(), units, group)]
        if columns:
            tables.append(f"{caption}\n{text_table(list(zip(['', '', *costs], *columns, strict=True)))}")
    return "\n\n".join(tables)


def profile_table(rows: Sequence[StepProfile]) -> str:
    """Return the tables of `cost_table` for `rows`.

    The label of a line contains the number of the process. For a row with the scope `layers`, it also contains the LoRA
    rank.
    """
    layers = [f", layers of rank {row.lora_rank}" if row.scope == "layers" else "" for row in rows]
    return cost_table({f"process {row.process_index}{name}": row for row, name in zip(rows, layers, strict=True)})


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows of cells as lines of text, with right-aligned columns that are two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _columns(
    costs: Collection[StepProfile], units: Mapping[str, float], group: Mapping[str, Sequence[str]]
) -> Iterator[list[str]]:
    """Yield the columns of `group`, a group of columns in the table definitions `_TABLES`.

    A column is a list of its unit, its title and a cell for each step. Yield nothing if the group has no values.
    """
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
        yield [unit, title, *("-" if value is None else _three_digits(value / size) for value in values)]


def _sum(cost: StepProfile, names: Sequence[str]) -> float | None:
    known = [value for value in (getattr(cost, name) for name in names) if value is not None]
    return sum(known) if known else None


def _three_digits(value: float) -> str:
    """Format `value` with three digits. A longer integer part keeps all its digits.

    The result is `<0.01` for values between 0 and 0.01.
    """
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:,.{max(0, 3 - len(str(int(value))))}f}" if value else "0"
