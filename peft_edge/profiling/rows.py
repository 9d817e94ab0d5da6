"""From counts to the rows of a record: one for the step, and one for the layers of each LoRA rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_edge.profiling.flops import FlopCount, Flops
from peft_edge.profiling.location import OPTIMIZER
from peft_edge.profiling.memory import KINDS, MemoryProfile
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
