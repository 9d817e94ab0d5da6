"""What is compared: ways to train a network, ours and those of other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import LoraConfig
from torch import nn
from torch.optim import Optimizer

from peft_edge.backbones import head_names
from peft_edge.methods import memory_format
from peft_edge.profiling.analysis import prepare_step
from peft_edge.roles import modules_with_role

Step = tuple[nn.Module, Optimizer | None]

FOLDED = {"fold_norm": True, "masks": "bit"}
"""The lean form of a network whose BatchNorm layers are frozen."""


@dataclass(frozen=True)
class Contender:
    """One way to train a network. All train the head, but for `inference`."""

    label: str
    """What it is called in tables."""

    build: Callable[[nn.Module, int], Step]
    """From a timm model, changed in place, and a LoRA rank to the model in the mode that it runs in and its optimizer.

    Its first output is the timm model's. It may raise what it will where it cannot be built.
    """


def _full(model: nn.Module, lora_rank: int) -> Step:
    return _in_its_format(*prepare_step(model, None))


def _inference(model: nn.Module, lora_rank: int) -> Step:
    # Without anything to train, autograd keeps nothing.
    return _in_its_format(model.requires_grad_(False).eval(), None)


def _peft(model: nn.Module, lora_rank: int, **options: Any) -> Step:
    config = LoraConfig(
        r=lora_rank,
        lora_alpha=2 * lora_rank,
        target_modules=modules_with_role(model, "dense"),
        modules_to_save=head_names(model),
        **options,
    )
    return _in_its_format(*prepare_step(model, config))


def _lycoris(model: nn.Module, lora_rank: int) -> Step:
    from lycoris.modules.locon import LoConModule

    for name, conv in _frozen_dense_convolutions(model):
        adapter = LoConModule(name, conv, lora_dim=lora_rank, alpha=2 * lora_rank)
        # It takes the place of the convolution's forward, and the model must hold it to be trained.
        adapter.apply_to()
        model.add_module(f"lycoris_{name.replace('.', '_')}", adapter)
    return _in_its_format(*prepare_step(model, None))


def _loralib(model: nn.Module, lora_rank: int) -> Step:
    from loralib import Conv2d

    for name, conv in _frozen_dense_convolutions(model):
        if type(conv) is not nn.Conv2d or len({*conv.kernel_size}) != 1:
            raise ValueError(f"it has plain convolutions with square kernels only, and {name} is {conv}")
        layer = Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0],
            r=lora_rank,
            lora_alpha=2 * lora_rank,
            merge_weights=False,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
        )
        # It makes a convolution of its own.
        layer.conv = conv
        model.set_submodule(name, layer)
    return _in_its_format(*prepare_step(model, None))


def _frozen_dense_convolutions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    names = modules_with_role(model, "dense")
    model.requires_grad_(False)
    for name in head_names(model):
        model.get_submodule(name).requires_grad_(True)
    for name in names:
        yield name, model.get_submodule(name)


def _in_its_format(model: nn.Module, optimizer: Optimizer | None) -> Step:
    return model.to(memory_format=memory_format(model)), optimizer


def _ours(method: str, *, lean: dict[str, Any] | None = FOLDED, norm: str = "frozen", **adapter: str) -> Any:
    def build(model: nn.Module, lora_rank: int) -> Step:
        return prepare_step(model, method, lora_rank=lora_rank, adapter={"norm": norm, **adapter}, lean=lean)

    return build


def _galore(model: nn.Module, lora_rank: int) -> Step:
    return prepare_step(model, "galore", adapter={"rank": lora_rank})


REFERENCE = "full"
"""What the others' time is a multiple of."""

CONTENDERS: dict[str, Contender] = {
    REFERENCE: Contender("full fine-tuning", _full),
    "inference": Contender("plain inference", _inference),
    "peft-lora": Contender("PEFT LoRA, dense", _peft),
    "peft-dora": Contender("PEFT DoRA, dense", partial(_peft, use_dora=True)),
    "lycoris-locon": Contender("LyCORIS LoCon, dense", _lycoris),
    "loralib": Contender("loralib ConvLoRA, dense", _loralib),
    "lora-plain": Contender("our LoRA, dense, not lean", _ours("lora", target_modules="dense", lean=None)),
    "lora-dense": Contender("our LoRA, dense", _ours("lora", target_modules="dense")),
    "lora-byte": Contender(
        "our LoRA, dense, byte masks", _ours("lora", target_modules="dense", lean={**FOLDED, "masks": "byte"})
    ),
    "lora-recompute": Contender(
        "our LoRA, dense, recompute", _ours("lora", target_modules="dense", lean={**FOLDED, "recompute": True})
    ),
    "lora-stats": Contender(
        "our LoRA, dense, norm=stats", _ours("lora", target_modules="dense", norm="stats", lean={"masks": "bit"})
    ),
    "lora-all-conv": Contender("our LoRA, all convolutions", _ours("lora", target_modules="all-conv")),
    "lora-project": Contender("our LoRA, project", _ours("lora", target_modules="project")),
    "lora-fa-project": Contender("our LoRA-FA, project", _ours("lora-fa", target_modules="project")),
    "dora-dense": Contender("our DoRA, dense", _ours("dora", target_modules="dense")),
    "galore": Contender("our GaLore, dense", _galore),
}
"""By name. Where nothing else is said, ours are lean, with frozen BatchNorm, folded."""
