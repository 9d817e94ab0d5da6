"""Configuration of bottleneck adapters for convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from peft import PeftConfig, PeftType
from timm.layers import get_act_layer

from peft_edge.roles import ROLES
from peft_edge.tuners.norm import Norm

Placement = Literal["parallel", "sequential"]


@dataclass
class ConvAdapterConfig(PeftConfig):
    """Configuration of residual bottleneck adapters for convolutions and for blocks of convolutions.

    The bottleneck consists of a pointwise, a depthwise and another pointwise convolution. `ConvAdapterLayer` states the
    formula. The bottleneck is a variant of Conv-Adapter (Chen et al. 2022, arXiv 2208.07463). With `kernel_size=1` and
    no activation, it is a low-rank form of the parallel residual adapter of Rebuffi et al. (2018, arXiv 1803.10082).

    Args:
        target_modules: Module names, a regular expression, or role names such as `all-conv`, see `ConvLoraConfig`. The
            name of a block, such as `blocks.2.0`, adds one adapter to the block as a whole. If a model has several PEFT
            adapters, they must all adapt the same blocks.
        exclude_modules: Names or a regular expression of modules to leave out.
        modules_to_save: Names of modules that are trained and saved as a whole, such as a new head.
        reduction: The bottleneck has max(1, C // reduction) channels for an adapter with C input channels.
        kernel_size: Kernel size of the depthwise convolution. 1 leaves out this convolution. None means the kernel size
            of the adapted convolution, or 3 for a block. An adapter whose kernel is larger than the kernel of the
            adapted convolution cannot be merged.
        placement: What the adapter receives as input: the input of the adapted layer (`"parallel"`), or the output of
            the adapted layer (`"sequential"`). In both cases, the adapter's output is added to the layer's output.
        activation: timm's name of the activation, such as `"relu"`. With None, the adapter is linear. A linear adapter
            parallel to an ungrouped convolution can be merged. After merging, it has no cost at inference.
        norm: How the adapter treats the BatchNorm layers. `ConvLoraConfig` describes the values.
        init_weights: If True, the last convolution of the bottleneck is initialised to zero, so that an untrained
            adapter does not change the output. If False, this convolution is initialised randomly, for tests.

    Raises:
        ValueError: If `placement`, `norm` or `activation` is unknown, or if `reduction` or `kernel_size` is not a
            positive integer.

    Example:
        >>> import timm
        >>> from peft import get_peft_model
        >>> from peft_edge import ConvAdapterConfig
        >>> model = timm.create_model("mobilenetv2_035", num_classes=10)
        >>> get_peft_model(model, ConvAdapterConfig(target_modules="project")).print_trainable_parameters()
        trainable params: 171,840 || all params: 580,778 || trainable%: 29.5879
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    reduction: int = 4
    kernel_size: int | None = None
    placement: Placement = "parallel"
    activation: str | None = None
    norm: Norm = "frozen"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["CONV_ADAPTER"]
        if isinstance(self.target_modules, str) and self.target_modules in ROLES:
            self.target_modules = [self.target_modules]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        for name, choices in {"placement": get_args(Placement), "norm": get_args(Norm)}.items():
            if getattr(self, name) not in choices:
                expected = ", ".join(choices)
                raise ValueError(f"ConvAdapterConfig: {name} is {getattr(self, name)!r}, expected one of: {expected}.")
        for name in ("reduction", "kernel_size"):
            value = getattr(self, name)
            if name == "kernel_size" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"ConvAdapterConfig: {name} is {value!r}, expected a positive integer.")
        try:
            get_act_layer(self.activation)
        except KeyError as error:
            raise ValueError(
                f"ConvAdapterConfig: activation is {self.activation!r}, which timm does not know. Expected a name such "
                'as "relu", "relu6", "hard_swish" or "silu", or None for a linear adapter.'
            ) from error
