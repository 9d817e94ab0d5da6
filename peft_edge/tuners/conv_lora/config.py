"""The configuration of LoRA and DoRA for convolutions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from peft import LoraConfig
from torch import nn

from peft_edge.roles import ROLES
from peft_edge.tuners.conv_lora.layer import ConvLoraLayer, LoraBatchNormLayer
from peft_edge.tuners.norm import Norm
from peft_edge.tuners.registry import add_peft_type


@dataclass
class ConvLoraConfig(LoraConfig):
    """Low-rank adapters for convolutions of any kind, with BatchNorm as part of the adapter.

    Everything that `peft.LoraConfig` takes keeps its meaning. `target_modules` also takes layer roles, alone or in a
    list beside module names: `all-conv`, `dense`, `depthwise`, `pointwise`, `expand`, `project` (see
    `peft_edge.roles`). A module of that very name goes before the role. Roles are replaced by module names when the
    adapter is added, so a saved configuration names modules. Linear layers keep PEFT's own LoRA.

    Args:
        norm: what the adapter does with BatchNorm layers. `"frozen"`: the base model's statistics, also while
            training. `"recalibrate"`: statistics of its own that only `peft_edge.recalibrate` estimates. `"stats"`: normalises
            by the batch while training and keeps running statistics of its own. `"affine"`: that, with weight and
            bias of its own trained too. Whatever changes is saved, merged, switched and deleted with the adapter.
        freeze_a: train B alone (LoRA-FA, Zhang et al. 2023, arXiv 2308.03303).

    Raises:
        ValueError: if `norm` is unknown, or as `peft.LoraConfig` does.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Module names, a regular expression, or layer roles: " + ", ".join(ROLES) + "."},
    )
    norm: Literal["frozen", "recalibrate", "stats", "affine"] = field(
        default="stats", metadata={"help": "What the adapter does with BatchNorm layers."}
    )
    freeze_a: bool = field(default=False, metadata={"help": "Train lora_B alone (LoRA-FA)."})

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str) and self.target_modules in ROLES:
            self.target_modules = [self.target_modules]
        super().__post_init__()
        if self.norm not in get_args(Norm):
            raise ValueError(f"ConvLoraConfig: norm is {self.norm!r}, expected one of: {', '.join(get_args(Norm))}.")
        self.peft_type = add_peft_type("CONV_LORA")
        # PEFT does not serialise the mapping, but runs this method again on load.
        self._register_custom_module(
            {
                nn.Conv1d: ConvLoraLayer,
                nn.Conv2d: ConvLoraLayer,
                nn.Conv3d: ConvLoraLayer,
                nn.modules.batchnorm._BatchNorm: LoraBatchNormLayer,
            }
        )

    @property
    def init_weights(self) -> bool | str:
        """`init_lora_weights` under the name that PEFT's conversion on saving writes for every type but LORA."""
        return self.init_lora_weights

    @init_weights.setter
    def init_weights(self, value: bool | str) -> None:
        self.init_lora_weights = value
