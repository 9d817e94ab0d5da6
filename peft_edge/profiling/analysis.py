"""Compute the cost of a training step from tensor shapes alone.

The computation takes seconds, and needs memory only for the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm.auto import tqdm

from peft_edge._compat import leaves
from peft_edge.backbones import load_backbone
from peft_edge.config import RunConfig
from peft_edge.lean import prepare_model_for_lean_training
from peft_edge.methods import OPTIMIZERS, find_method, training_memory_format
from peft_edge.optim import update_in_backward
from peft_edge.profiling.flops import Accounting, FlopCount, FlopCounter
from peft_edge.profiling.memory import MemoryProfile, MemoryTracker
from peft_edge.profiling.step import Inputs, fake_copy, logits_of, take_step
from peft_edge.profiling.tables import step_rows
from peft_edge.records import StepProfile
from peft_edge.roles import meta_copy

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The cost of one training step, returned by `analyse`.

    >>> analysis = analyse("mobilenetv2_035", "head", batch_size=2, image_size=32)
    >>> analysis.num_trainable_params  # the classifier
    1281000
    >>> analysis.flops.backward  # the gradient of its weight
    5120000
    """

    flops: FlopCount
    memory: MemoryProfile
    """Bytes of tensors. `cuda_peak_bytes`, `peak_rss_bytes` and `rss_growth_bytes` are None."""
    profile: list[StepProfile]
    """FLOPs and memory as `StepProfile` rows: first a row for the whole step, then a row for each LoRA rank."""
    num_trainable_params: int
    num_total_params: int


def analyse(
    backbone: str | nn.Module,
    method: str | PeftConfig | None,
    *,
    lora_rank: int | None = None,
    batch_size: int = 16,
    image_size: int = 224,
    sequence_length: int = 512,
    optimizer: str | MakeOptimizer | None = "adamw",
    adapter: Mapping[str, object] | None = None,
    lean: Mapping[str, Any] | None = None,
    inputs: Inputs | None = None,
    accounting: Accounting = "exact",
) -> Analysis:
    """Compute the cost of one training step from shapes alone.

    The step runs on fake tensors. If there is an optimizer, an uncounted first step creates the optimizer's state.

    >>> full, lora = (analyse("mobilenetv2_035", name, batch_size=2, image_size=32) for name in ("full", "lora"))
    >>> lora.num_trainable_params < full.num_trainable_params
    True
    >>> lora.memory.peak["activations"] == full.memory.peak["activations"]  # frozen layers also keep inputs
    True

    Args:
        backbone: The name of a timm model, or a model. The model is not changed and may be on the meta device.
        method: A key of `METHODS` (timm models only), or a PEFT configuration, such as `peft.LoraConfig`. None trains
            the parameters that require a gradient.
        lora_rank: Rank of the adapter. If it is None, a method given by name has the default rank of `train.py`, and a
            PEFT configuration keeps its `r`. If `method` is a name and `lora_rank` is given, `lora_alpha` is
            `2 * lora_rank`. This argument has no effect on methods such as `full`, `conv-adapter` and `galore`, whose
            options are not in the section `adapter` of the configuration of `train.py`.
        batch_size: Images or sequences in the step.
        image_size: Height and width of the images in pixels.
        sequence_length: Tokens in a sequence, for text models of transformers.
        optimizer: A key of `OPTIMIZERS`, or a function that maps the list of trainable parameters to an optimizer. If
            it is None, the step ends without an update.
        adapter: Options of the method, such as `norm`, that replace the defaults of `train.py`. They require that
            `method` is a name.
        lean: Arguments of `prepare_model_for_lean_training`. If it is None, the layers stay as they are.
        inputs: The inputs of the model: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
            Tensors may be on the meta device. None means token ids of shape (batch_size, sequence_length) for text
            models of transformers, and images of shape (batch_size, 3, image_size, image_size) for all other models.
        accounting: See `FlopCounter`.

    Raises:
        ValueError: If an argument is invalid, if the adapter does not fit the network, if the network does not run on
            the inputs, or if the step reads the value of a tensor.
        TypeError: If `method` names a method that needs the classifier, and timm did not create the model.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    network = load_backbone(backbone) if isinstance(backbone, str) else meta_copy(backbone)
    model, real_optimizer = prepare_step(
        network, method, lora_rank=lora_rank, optimizer=optimizer, adapter=adapter, lean=lean
    )
    if inputs is None:
        inputs = _default_inputs(model, batch_size, image_size, sequence_length)
    mode, fake_model, fake_optimizer, fake_inputs = fake_copy(model, real_optimizer, inputs)
    if fake_optimizer is not None and _options(method, lora_rank, adapter or {}).get("layerwise"):
        # Copied parameters lack the hooks that `update_in_backward` registered on the original parameters.
        update_in_backward(fake_optimizer)
    counter = FlopCounter(fake_model, accounting)
    tracker = MemoryTracker(fake_model, fake_optimizer, fake_inputs)
    try:
        with mode:
            if fake_optimizer is not None:
                take_step(fake_model, fake_inputs, fake_optimizer, classification_loss)
            with counter, tracker:
                take_step(fake_model, fake_inputs, fake_optimizer, classification_loss)
    except RuntimeError as error:
        shapes = [tuple(leaf.shape) for leaf in leaves(inputs) if isinstance(leaf, Tensor)]
        raise ValueError(f"the network cannot take a step on inputs of the shape {shapes}: {error}") from error
    flops, memory = counter.result(), tracker.result()
    return Analysis(
        flops=flops,
        memory=memory,
        profile=step_rows(model, flops, memory, process_index=0),
        num_trainable_params=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        num_total_params=sum(parameter.numel() for parameter in model.parameters()),
    )


def compare_methods(
    backbone: str | nn.Module, methods: Sequence[str], *, lora_ranks: Sequence[int], **options: Any
) -> dict[str, StepProfile]:
    """Analyse a step of each method. Methods with a LoRA rank are analysed once for each rank in `lora_ranks`.

    `options` are further arguments of `analyse`. The keys of the returned dict are `<method>, rank <r>` for methods
    with a LoRA rank, and `<method>` for other methods. Each value is a `StepProfile` with the cost of the whole step.

    >>> costs = compare_methods("mobilenetv2_035", ["head", "lora"], lora_ranks=[2, 4], batch_size=2, image_size=32)
    >>> {name: cost.num_trainable_params for name, cost in costs.items()}
    {'head': 1281000, 'lora, rank 2': 1301744, 'lora, rank 4': 1322488}
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
            costs[name] = analyse(backbone, method, lora_rank=lora_rank, **options).profile[0]
    return costs


def prepare_step(
    model: nn.Module,
    method: str | PeftConfig | None,
    *,
    lora_rank: int | None = None,
    optimizer: str | MakeOptimizer | None = "adamw",
    adapter: Mapping[str, object] | None = None,
    lean: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Optimizer | None]:
    """Apply `method` to `model`, and return the resulting model in train mode and its optimizer.

    `model` may be changed in place. The returned optimizer is None if no parameter is trainable, if the argument
    `optimizer` is None, or if the method uses no gradients. See `analyse` for the arguments and errors.
    """
    options = _options(method, lora_rank, adapter or {})
    model = _apply_method(model, method, options).train()
    if isinstance(method, str):
        model = model.to(memory_format=training_memory_format(model))
    if lean is not None:
        model = prepare_model_for_lean_training(model, **lean)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained or optimizer is None:
        return model, None
    if not isinstance(optimizer, str):
        return model, optimizer(trained)
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}. There are: {', '.join(OPTIMIZERS)}")
    if not isinstance(method, str):
        return model, OPTIMIZERS[optimizer](trained)
    build = find_method(method).optimizer
    # The learning rate does not affect FLOPs or memory.
    return model, None if build is None else build(model, optimizer, options, lr=1e-3, weight_decay=0.0)


def classification_loss(output: object) -> Tensor:
    """Return the cross-entropy of the logits, averaged over all images or tokens. Every label is class 0."""
    logits = logits_of(output, advice="take a model with a head").float().flatten(0, -2)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def _options(method: str | PeftConfig | None, lora_rank: int | None, adapter: Mapping[str, object]) -> dict[str, Any]:
    """Return the options for `Method.prepare` if `method` is a name.

    If `method` is a PEFT configuration, return the fields to replace in it. This is `r` if `lora_rank` is given, and
    otherwise no field.
    """
    if isinstance(method, str):
        section = find_method(method).section
        rank = {"r": lora_rank, "lora_alpha": 2 * lora_rank} if lora_rank and section == "adapter" else {}
        return {**RunConfig(output_dir="").options(section), **rank, **adapter}
    if adapter:
        raise ValueError(f"adapter ({', '.join(adapter)}) needs a method name: set it in the PEFT configuration")
    if lora_rank is None:
        return {}
    if method is not None and not hasattr(method, "r"):
        raise ValueError(f"lora_rank is {lora_rank}, but {type(method).__name__} has no rank: leave it out")
    return {"r": lora_rank}


def _apply_method(model: nn.Module, method: str | PeftConfig | None, options: Mapping[str, Any]) -> nn.Module:
    if not isinstance(method, str):
        return model if method is None else get_peft_model(model, dataclasses.replace(method, **options))
    try:
        return find_method(method).prepare(model, options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"adapter: {error}; {method} has the options {', '.join(options)}") from error


def _default_inputs(model: nn.Module, batch_size: int, image_size: int, sequence_length: int) -> Inputs:
    if getattr(model, "main_input_name", None) == "input_ids":
        return {"input_ids": torch.empty(batch_size, sequence_length, dtype=torch.long, device="meta")}
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
    return torch.empty(batch_size, 3, image_size, image_size, dtype=dtype, device="meta")
