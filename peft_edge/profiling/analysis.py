"""What a method costs on a network, from shapes alone: in seconds, and without the memory of a step.

The costs of several methods on one network, side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from peft_edge.backbones import load_backbone
from peft_edge.config import RunConfig
from peft_edge.lean import prepare_model_for_lean_training
from peft_edge.methods import OPTIMIZERS, find_method, training_memory_format
from peft_edge.optim import update_in_backward
from peft_edge.profiling.flops import Accounting, FlopCount, FlopCounter
from peft_edge.profiling.memory import MemoryProfile, MemoryTracker
from peft_edge.profiling.step import Inputs, fake_copy, logits_of, meta_copy, take_step
from peft_edge.profiling.tables import step_rows
from peft_edge.records import StepProfile


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The cost of one training step, and of the update it trains."""

    flops: FlopCount
    """Floating-point operations."""

    memory: MemoryProfile
    """Bytes at the peak and at the end of the forward pass; what only a real process has is None."""

    profile: list[StepProfile]
    """The same as rows of a record: the step, and the layers of each LoRA rank."""

    num_trainable_params: int
    """Parameters that are trained."""

    num_total_params: int
    """Parameters of the network with its adapter."""


def analyse(
    backbone: str | nn.Module,
    method: str | PeftConfig | None,
    *,
    lora_rank: int | None = None,
    batch_size: int = 16,
    image_size: int = 224,
    sequence_length: int = 512,
    optimizer: str | Callable[[list[nn.Parameter]], Optimizer] | None = "adamw",
    adapter: Mapping[str, Any] | None = None,
    lean: Mapping[str, Any] | None = None,
    inputs: Inputs | None = None,
    accounting: Accounting = "exact",
) -> Analysis:
    """Analyses the second training step of a method under fake tensors; the first one allocates the optimizer's state.

    Args:
        backbone: A timm model name; or any model, also one on the meta device, that takes images of shape (B, 3, H, W)
            or, as a transformers text model, tokens. It is left as it is.
        method: A key of `METHODS`, for timm's models; a PEFT configuration, such as PEFT's own `LoraConfig`; or None,
            to train what requires a gradient in the model as it is.
        lora_rank: Rank of the adapters; None for that of train.py's defaults, or of the configuration.
        batch_size: Images or sequences in the step.
        image_size: Height and width in pixels.
        sequence_length: Tokens in a sequence.
        optimizer: A key of `OPTIMIZERS`, for a method given by name in the form that the method trains with; or what
            makes an optimizer of the trained parameters; None for a step without.
        adapter: Options of a method given by name, in the place of train.py's defaults: `norm`, and the keys of the
            method's section of the configuration, or of the adapter's PEFT configuration.
        lean: Options of `prepare_model_for_lean_training`, which then rewrites the model; None to leave it out.
        inputs: What the model is called with, in the place of images or tokens: a tensor or a tuple for positional
            arguments, a mapping for keyword arguments; tensors may be on the meta device.
        accounting: See `FlopCounter`.

    Raises:
        ValueError: The method, the optimizer or the accounting is unknown, the adapter does not fit the network, the
            network cannot run on such inputs, or the step depends on a tensor's values.
        TypeError: A method is given by name, and needs to know the head of a model that is not timm's.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    model, real_optimizer = prepare_step(
        load_backbone(backbone) if isinstance(backbone, str) else meta_copy(backbone),
        method,
        lora_rank=lora_rank,
        optimizer=optimizer,
        adapter=adapter,
        lean=lean,
    )
    if inputs is None:
        inputs = _inputs(model, batch_size, image_size, sequence_length)
    mode, fake_model, fake_optimizer, fake_inputs = fake_copy(model, real_optimizer, inputs)
    if fake_optimizer is not None and _options(method, lora_rank, adapter or {}).get("layerwise"):
        # What the method has registered with the model's own parameters, the copy lacks.
        update_in_backward(fake_optimizer)
    counter = FlopCounter(fake_model, accounting)
    tracker = MemoryTracker(fake_model, fake_optimizer, fake_inputs)
    with _explained(inputs), mode:
        if fake_optimizer is not None:
            take_step(fake_model, fake_inputs, fake_optimizer, classification_loss)
        with counter, tracker:
            take_step(fake_model, fake_inputs, fake_optimizer, classification_loss)
    flops, memory = counter.result(), tracker.result()
    return Analysis(
        flops=flops,
        memory=memory,
        profile=step_rows(model, flops, memory, process_index=0),
        num_trainable_params=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        num_total_params=sum(parameter.numel() for parameter in model.parameters()),
    )


def prepare_step(
    model: nn.Module,
    method: str | PeftConfig | None,
    *,
    lora_rank: int | None = None,
    optimizer: str | Callable[[list[nn.Parameter]], Optimizer] | None = "adamw",
    adapter: Mapping[str, Any] | None = None,
    lean: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Optimizer | None]:
    """Makes of a model what `analyse` analyses, to take such a step with real tensors.

    Args:
        model: Changed in place.
        method: See `analyse`, as for the others.
        lora_rank: Rank of the adapters.
        optimizer: Its name, or what makes it.
        adapter: Options of the method.
        lean: Options of `prepare_model_for_lean_training`.

    Returns:
        The model in train mode, in the memory format that it computes in, and its optimizer; None if nothing is
        trained.

    Raises:
        ValueError: See `analyse`.
    """
    options = _options(method, lora_rank, adapter or {})
    model = _prepare(model, method, options).train()
    if isinstance(method, str):
        model = model.to(memory_format=training_memory_format(model))
    if lean is not None:
        model = prepare_model_for_lean_training(model, **lean)
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    return model, _optimizer(optimizer, model, method, options) if is_trained else None


@contextmanager
def _explained(inputs: Inputs) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        raise ValueError(f"the network cannot take a step on inputs of the shape {shapes}: {error}") from error


def _options(method: str | PeftConfig | None, lora_rank: int | None, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the configuration of a method, or of the adapter."""
    if isinstance(method, str):
        section = find_method(method).section
        rank = {"r": lora_rank, "lora_alpha": 2 * lora_rank} if lora_rank and section == "adapter" else {}
        return {**RunConfig(output_dir="").options(section), **rank, **adapter}
    if adapter:
        raise ValueError(f"adapter ({', '.join(adapter)}) goes with a method's name: set it in the configuration")
    if lora_rank is None:
        return {}
    if method is not None and not hasattr(method, "r"):
        raise ValueError(f"lora_rank is {lora_rank}, and {type(method).__name__} has no rank: leave it out")
    return {"r": lora_rank}


def _prepare(model: nn.Module, method: str | PeftConfig | None, options: Mapping[str, Any]) -> nn.Module:
    if isinstance(method, str):
        try:
            return find_method(method).prepare(model, options)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise ValueError(f"adapter: {error}; {method} has the options {', '.join(options)}") from error
    return model if method is None else get_peft_model(model, dataclasses.replace(method, **options))


def _optimizer(
    optimizer: str | Callable[[list[nn.Parameter]], Optimizer] | None,
    model: nn.Module,
    method: str | PeftConfig | None,
    options: Mapping[str, Any],
) -> Optimizer | None:
    if optimizer is None:
        return None
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}. There are: {', '.join(OPTIMIZERS)}")
    if isinstance(optimizer, str) and isinstance(method, str):
        build = find_method(method).optimizer
        # The rate is a factor: it changes no count.
        return None if build is None else build(model, optimizer, options, lr=1e-3, weight_decay=0.0)
    make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    return make([parameter for parameter in model.parameters() if parameter.requires_grad])


def _inputs(model: nn.Module, batch_size: int, image_size: int, sequence_length: int) -> Inputs:
    if getattr(model, "main_input_name", None) == "input_ids":
        return {"input_ids": torch.empty(batch_size, sequence_length, dtype=torch.long, device="meta")}
    floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    dtype = next(floating, torch.float32)
    return torch.empty(batch_size, 3, image_size, image_size, dtype=dtype, device="meta")


def classification_loss(output: Any) -> Tensor:
    """Cross-entropy of an image's or every token's logits, which is what these networks are trained with."""
    logits = logits_of(output, advice="take a model with a head").float().flatten(0, -2)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def compare_methods(
    backbone: str | nn.Module,
    methods: Sequence[str],
    *,
    lora_ranks: Sequence[int],
    adapter: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    image_size: int = 224,
    optimizer: str = "adamw",
    accounting: Accounting = "exact",
) -> dict[str, StepProfile]:
    """Analyses every method, at every rank where it has one; see `analyse` for the arguments.

    Returns:
        The cost of a step by `method`, or `method, rank r`.

    Raises:
        ValueError: See `analyse`.
    """
    costs: dict[str, StepProfile] = {}
    pairs = [(method, lora_rank) for method in methods for lora_rank in lora_ranks]
    with tqdm(pairs, unit="step", leave=False, disable=None) as bar:
        for method, lora_rank in bar:
            has_rank = find_method(method).section == "adapter"
            name = f"{method}, rank {lora_rank}" if has_rank else method
            if name in costs:
                continue
            bar.set_description(f"analysing {method}")
            analysis = analyse(
                backbone,
                method,
                lora_rank=lora_rank,
                batch_size=batch_size,
                image_size=image_size,
                optimizer=optimizer,
                adapter=adapter,
                accounting=accounting,
            )
            costs[name] = analysis.profile[0]
    return costs
