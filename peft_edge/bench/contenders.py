"""Define the contenders of `peft-edge bench`: our methods, those of other packages, and options of torch and timm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from peft import LoraConfig, PeftModel
from torch import nn
from torch.optim import Optimizer

from peft_edge._compat import BatchNorm
from peft_edge.backbones import head_names
from peft_edge.methods import training_memory_format
from peft_edge.profiling.analysis import prepare_step
from peft_edge.roles import modules_with_role

Step = tuple[nn.Module, Optimizer | None]
Build = Callable[[nn.Module, int], Step]

LEAN = {"masks": "bit"}
"""Arguments of `prepare_model_for_lean_training` for a network whose BatchNorm uses batch statistics."""
LEAN_FROZEN = {**LEAN, "inplace_norm": True}
"""Arguments of `prepare_model_for_lean_training` for a network with frozen BatchNorm."""
LEAN_RECOMPUTE = {**LEAN_FROZEN, "recompute": True}
"""Arguments of `prepare_model_for_lean_training` for any network. With these arguments, the backward pass recomputes
the outputs of cheap convolutions."""
LEAN_SPLIT = {**LEAN_RECOMPUTE, "split_blocks": True}
"""Arguments of `prepare_model_for_lean_training` for a network with frozen BatchNorm. A step takes less memory
than with any of the arguments above."""


@dataclass(frozen=True)
class Contender:
    """A method of this package or of another package, whose training step the bench measures.

    All contenders except `inference` train the head.
    """

    label: str
    """Name in tables."""
    build: Build
    """Function that takes a timm model and a LoRA rank, and returns the model to measure and its optimizer.

    The returned model is in the mode (train or eval) of the measured step. If the returned optimizer is None, the step
    has no backward pass and no update. `build` may change the timm model in place. In eval mode, the returned model
    must have the same output as the unchanged timm model, up to rounding. If `build` raises an exception, the table
    shows the message.
    """
    is_compiled: bool = False
    """Whether the bench compiles the built model with `torch.compile`."""


def _train(model: nn.Module, lora_rank: int, config: LoraConfig | None = None) -> Step:
    """Build a step that trains all parameters that require a gradient.

    If `config` is given, the model first gets a PEFT adapter with this configuration, and only the adapter is trained.
    """
    model, optimizer = prepare_step(model, config)
    return model.to(memory_format=training_memory_format(model)), optimizer


def _inference(model: nn.Module, lora_rank: int) -> Step:
    """Build a step that consists only of a forward pass in eval mode."""
    # Without trainable parameters, autograd keeps no activations.
    return model.requires_grad_(False).eval().to(memory_format=training_memory_format(model)), None


def _peft(model: nn.Module, lora_rank: int, **options: bool) -> Step:
    """Build a step that trains PEFT's LoRA in all dense convolutions. `options` are arguments of `LoraConfig`."""
    targets = {"target_modules": modules_with_role(model, "dense"), "modules_to_save": head_names(model)}
    return _train(model, lora_rank, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, **targets, **options))


def _lycoris(model: nn.Module, lora_rank: int) -> Step:
    """Build a step that trains the adapter LoCon of LyCORIS in all dense convolutions."""
    from lycoris.modules.locon import LoConModule

    for name, conv in _frozen_dense_convolutions(model):
        adapter = LoConModule(name, conv, lora_dim=lora_rank, alpha=2 * lora_rank)
        # `apply_to` replaces `conv.forward`. `_train` trains only submodules of `model`, so `model` must contain
        # `adapter`.
        adapter.apply_to()
        model.add_module(f"lycoris_{name.replace('.', '_')}", adapter)
    return _train(model, lora_rank)


def _loralib(model: nn.Module, lora_rank: int) -> Step:
    """Build a step that trains the LoRA convolution of loralib in place of each dense convolution."""
    from loralib import Conv2d

    for name, conv in _frozen_dense_convolutions(model):
        if type(conv) is not nn.Conv2d or len({*conv.kernel_size}) != 1:
            raise ValueError(f"loralib supports only nn.Conv2d with square kernels, and {name} is {conv}")
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size[0]
        layer = Conv2d(*sizes, r=lora_rank, lora_alpha=2 * lora_rank, merge_weights=False)
        layer.conv = conv  # replaces the new convolution that loralib's layer contains
        model.set_submodule(name, layer)
    return _train(model, lora_rank)


def _frozen_dense_convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Freeze all parameters except those of the head. Yield the name and the module of each dense convolution."""
    model.requires_grad_(False)
    for name in head_names(model):
        model.get_submodule(name).requires_grad_(True)
    for name in modules_with_role(model, "dense"):
        yield name, model.get_submodule(name)


def _checkpointed(build: Build) -> Build:
    """Return a function that calls `build`, and then switches on timm's gradient checkpointing in the built model."""

    def build_checkpointed(model: nn.Module, lora_rank: int) -> Step:
        built, optimizer = build(model, lora_rank)
        backbone = built.get_base_model() if isinstance(built, PeftModel) else built
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
        return built, optimizer

    return build_checkpointed


def _with_eval_norms(build: Build) -> Build:
    """Return a function that calls `build`, and then sets all BatchNorm layers of the built model to eval mode.

    Users of torch usually freeze the statistics of BatchNorm in this way.
    """

    def build_with_eval_norms(model: nn.Module, lora_rank: int) -> Step:
        built, optimizer = build(model, lora_rank)
        for module in built.modules():
            if isinstance(module, BatchNorm):
                module.eval()
        return built, optimizer

    return build_with_eval_norms


def _ours(method: str, lean: Mapping[str, object] | None, norm: str = "stats", **adapter: str) -> Build:
    """Return a `build` function for a training method of this package, such as `lora`.

    `lean` contains the arguments of `prepare_model_for_lean_training`, or is None for a step without lean training.
    `norm` and `adapter` are options of the method. For GaLore, `adapter` is ignored, and the LoRA rank is the rank of
    the projection.
    """

    def build(model: nn.Module, lora_rank: int) -> Step:
        options = {"norm": norm, **({"rank": lora_rank} if method == "galore" else adapter)}
        return prepare_step(model, method, lora_rank=lora_rank, adapter=options, lean=lean)

    return build


def _frozen(method: str, targets: str, lean: Mapping[str, object] | None = LEAN_FROZEN) -> Build:
    return _ours(method, lean, norm="frozen", target_modules=targets)


def _stats(method: str, lean: Mapping[str, object] = LEAN) -> Build:
    return _ours(method, lean, norm="stats", target_modules="dense")


_peft_eval = _with_eval_norms(_peft)

REFERENCE = "full"
"""The contender whose step time is the divisor of all time ratios."""

CONTENDERS: dict[str, Contender] = {
    REFERENCE: Contender("full fine-tuning", _train),
    "full-checkpoint": Contender("full, checkpointed", _checkpointed(_train)),
    "full-compile": Contender("full, compiled", _train, is_compiled=True),
    "full-eval": Contender("full, eval norms", _with_eval_norms(_train)),
    "inference": Contender("plain inference", _inference),
    "peft-lora": Contender("PEFT LoRA, dense", _peft),
    "peft-lora-checkpoint": Contender("PEFT LoRA, dense, checkpointed", _checkpointed(_peft)),
    "peft-lora-compile": Contender("PEFT LoRA, dense, compiled", _peft, is_compiled=True),
    "peft-lora-eval": Contender("PEFT LoRA, dense, eval norms", _peft_eval),
    "peft-lora-eval-checkpoint": Contender("PEFT LoRA, dense, eval norms, checkpointed", _checkpointed(_peft_eval)),
    "peft-lora-eval-compile": Contender("PEFT LoRA, dense, eval norms, compiled", _peft_eval, is_compiled=True),
    "peft-dora": Contender("PEFT DoRA, dense", partial(_peft, use_dora=True)),
    "lycoris-locon": Contender("LyCORIS LoCon, dense", _lycoris),
    "loralib": Contender("loralib ConvLoRA, dense", _loralib),
    "full-lean": Contender("full, lean", _ours("full", LEAN)),
    "full-recompute": Contender("full, lean, recompute", _ours("full", LEAN_RECOMPUTE)),
    "galore": Contender("our GaLore, dense, not lean", _ours("galore", None)),
    "galore-lean": Contender("our GaLore, dense, lean", _ours("galore", LEAN)),
    "galore-recompute": Contender("our GaLore, dense, lean, recompute", _ours("galore", LEAN_RECOMPUTE)),
    "peft-lora-lean": Contender("PEFT LoRA, dense, lean", _stats("peft-lora")),
    "lora-stats": Contender("our LoRA, dense, lean", _stats("lora")),
    "lora-stats-recompute": Contender("our LoRA, dense, lean, recompute", _stats("lora", LEAN_RECOMPUTE)),
    "lora-stats-checkpoint": Contender("our LoRA, dense, lean, checkpointed", _checkpointed(_stats("lora"))),
    "lora-plain": Contender("our LoRA, dense, frozen norms, not lean", _frozen("lora", "dense", None)),
    "lora-compile": Contender(
        "our LoRA, dense, frozen norms, compiled", _frozen("lora", "dense", None), is_compiled=True
    ),
    "lora-dense": Contender("our LoRA, dense, frozen norms, lean", _frozen("lora", "dense")),
    "lora-recompute": Contender(
        "our LoRA, dense, frozen norms, lean, recompute", _frozen("lora", "dense", LEAN_RECOMPUTE)
    ),
    "lora-split": Contender(
        "our LoRA, dense, frozen norms, lean, recompute, split", _frozen("lora", "dense", LEAN_SPLIT)
    ),
    "lora-checkpoint": Contender(
        "our LoRA, dense, frozen norms, lean, checkpointed", _checkpointed(_frozen("lora", "dense"))
    ),
    "lora-all-conv": Contender("our LoRA, all convolutions, frozen norms, lean", _frozen("lora", "all-conv")),
    "lora-all-conv-depthwise": Contender(
        "our LoRA, all convolutions, frozen norms, lean, recompute=depthwise",
        _frozen("lora", "all-conv", {**LEAN_FROZEN, "recompute": "depthwise"}),
    ),
    "lora-all-conv-split": Contender(
        "our LoRA, all convolutions, frozen norms, lean, recompute, split", _frozen("lora", "all-conv", LEAN_SPLIT)
    ),
    "lora-project": Contender("our LoRA, project, frozen norms, lean", _frozen("lora", "project")),
    "lora-fa-project": Contender("our LoRA-FA, project, frozen norms, lean", _frozen("lora-fa", "project")),
    "dora-dense": Contender("our DoRA, dense, frozen norms, lean", _frozen("dora", "dense")),
}
"""A dict from names to contenders. Contenders that do not use this package come first.

In training, BatchNorm uses the statistics of the batch unless the label says otherwise. In labels, `checkpointed` means
timm's gradient checkpointing, `compiled` means `torch.compile`, and `eval norms` means that BatchNorm layers are in
eval mode. `lean` means lean training. `recompute` and `split` mean its options `recompute` and `split_blocks`."""
