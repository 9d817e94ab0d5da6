"""Configuration of LoRA, LoRA-FA and DoRA for convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from peft import LoraConfig, PeftType
from torch import nn

from peft_edge._compat import BatchNorm
from peft_edge.roles import ROLES
from peft_edge.tuners.conv_lora.layer import ConvLoraLayer, LoraBatchNormLayer
from peft_edge.tuners.norm import Norm


@dataclass
class ConvLoraConfig(LoraConfig):
    """Configuration of LoRA for convolutions: y = conv(x; W + (alpha/r) B A), see `ConvLoraLayer`.

    All arguments of `peft.LoraConfig` are also accepted. Linear layers are adapted with PEFT's LoRA.

    Args:
        target_modules: Module names or a regular expression, as in PEFT, or roles. A role selects convolutions by their
            shape or place: `all-conv`, `dense`, `depthwise`, `pointwise`, `expand`, `project`, `last-stage` (see
            `peft_edge.roles`). A list may contain names and roles. If a module has the name of a role, the name means
            this module. When the adapter is added to a model, module names replace the roles in this configuration.
        norm: How the adapter treats the BatchNorm layers. The BatchNorm tensors of an adapter are saved, merged,
            switched and deleted with the adapter.

            - `"frozen"`: Normalise with the statistics of the base model, also after `model.train()`. The adapter has
              no BatchNorm tensors. The base model must be pretrained, because the statistics of an untrained
              model normalise badly.
            - `"recalibrate"`: Normalise with statistics of the adapter, which only `peft_edge.recalibrate` changes.
            - `"stats"`: Normalise with the batch statistics in training mode, and with running statistics of the
              adapter in eval mode.
            - `"affine"`: Like `"stats"`, and the adapter also has a trainable weight and bias.
        freeze_a: Whether to train only B (LoRA-FA, Zhang et al. 2023, arXiv 2308.03303). For the backward pass of an
            ungrouped convolution, autograd then saves the output of A (r channels) instead of the layer's input.

    Raises:
        ValueError: If `norm` is unknown, or if `peft.LoraConfig` rejects an argument.

    Example:
        >>> import timm
        >>> from peft import get_peft_model
        >>> from peft_edge import ConvLoraConfig
        >>> model = timm.create_model("mobilenetv2_035", num_classes=10)
        >>> config = ConvLoraConfig(r=4, target_modules="depthwise", norm="stats", modules_to_save=["classifier"])
        >>> get_peft_model(model, config).print_trainable_parameters()
        trainable params: 23,854 || all params: 432,792 || trainable%: 5.5117
    """

    target_modules: list[str] | str | None = None
    norm: Norm = "frozen"
    freeze_a: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str) and self.target_modules in ROLES:
            self.target_modules = [self.target_modules]
        super().__post_init__()
        if self.norm not in get_args(Norm):
            raise ValueError(f"ConvLoraConfig: norm is {self.norm!r}, expected one of: {', '.join(get_args(Norm))}.")
        self.peft_type = PeftType["CONV_LORA"]
        # Register the classes here. PEFT does not save the mapping of custom modules, but calls `__post_init__` when it
        # loads a configuration.
        self._register_custom_module(
            dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvLoraLayer) | {BatchNorm: LoraBatchNormLayer}
        )

    @property
    def init_weights(self) -> bool | str:
        """An alias of `init_lora_weights`.

        When PEFT saves a PiSSA adapter as a plain LoRA adapter, it sets `init_lora_weights` only if the type of the
        configuration is LORA. For all other types, it sets `init_weights`.
        """
        return self.init_lora_weights

    @init_weights.setter
    def init_weights(self, value: bool | str) -> None:
        self.init_lora_weights = value
