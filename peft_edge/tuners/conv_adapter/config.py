"""The configuration of bottleneck adapters for convolutions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig
from timm.layers import get_act_layer

from peft_edge.roles import ROLES
from peft_edge.tuners.norm import Norm
from peft_edge.tuners.registry import add_peft_type

Placement = Literal["parallel", "sequential"]


@dataclass
class ConvAdapterConfig(PeftConfig):
    """Residual bottleneck adapters for convolutions and for blocks of them, with BatchNorm as part of the adapter.

    A pointwise convolution to fewer channels, a depthwise one, an activation, and a pointwise convolution back, which
    starts at zero, so that an untrained adapter changes nothing. It follows Conv-Adapter (Chen et al. 2022, arXiv
    2208.07463), whose bottleneck is depthwise separable too; with `kernel_size=1` it is the residual adapter of Rebuffi
    et al. (2018, arXiv 1803.10082), factored.

    Args:
        target_modules: what is adapted: module names, a regular expression, or layer roles, as in `ConvLoraConfig`. A
            name may be a convolution's, or that of a block such as `blocks.2.0`, which is then adapted as a whole.
            All adapters of a model adapt the same blocks.
        exclude_modules: names, or a regular expression, of what is left out all the same.
        modules_to_save: names of modules that are trained and saved whole, such as a new head.
        reduction: the bottleneck has max(1, C // reduction) channels for an adapter of C input channels.
        kernel_size: of the depthwise convolution, which takes stride, dilation and padding from the adapted one; 1:
            there is none. None: that of the adapted convolution, and 3 for a block. A larger one than the adapted
            convolution's cannot be merged.
        placement: `"parallel"`: the adapter maps the adapted layer's input, and is added to its output.
            `"sequential"`: it maps the output.
        activation: timm's name of the activation, such as `"relu"`. None: the adapter is linear, the default because
            a linear one in parallel to an ungrouped convolution can be merged, and then costs a device nothing.
        norm: what the adapter does with BatchNorm layers, as in `ConvLoraConfig`.
        init_weights: start as zero; False starts at random, for tests.

    Raises:
        ValueError: if a value is not one of these.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of modules or blocks, a regular expression, or layer roles: " + ", ".join(ROLES)},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "What is left out all the same."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    reduction: int = field(default=4, metadata={"help": "By how much the bottleneck has fewer channels."})
    kernel_size: int | None = field(default=None, metadata={"help": "Kernel size of the depthwise convolution."})
    placement: Placement = field(default="parallel", metadata={"help": "Adapt the input, or the output."})
    activation: str | None = field(default=None, metadata={"help": "timm's name of the activation, None for linear."})
    norm: Norm = field(default="stats", metadata={"help": "What the adapter does with BatchNorm layers."})
    init_weights: bool = field(default=True, metadata={"help": "Start as zero."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("CONV_ADAPTER")
        for name in ("target_modules", "exclude_modules"):
            value: Any = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if isinstance(self.target_modules, str) and self.target_modules in ROLES:
            self.target_modules = {self.target_modules}  # type: ignore[assignment]
        for name, choices in {"placement": get_args(Placement), "norm": get_args(Norm)}.items():
            if getattr(self, name) not in choices:
                expected = ", ".join(choices)
                raise ValueError(f"ConvAdapterConfig: {name} is {getattr(self, name)!r}, expected one of: {expected}.")
        for name in ("reduction", "kernel_size"):
            value = getattr(self, name)
            is_left_open = name == "kernel_size" and value is None
            if not is_left_open and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"ConvAdapterConfig: {name} is {value!r}, expected a positive integer.")
        try:
            get_act_layer(self.activation)
        except KeyError as error:
            raise ValueError(
                f"ConvAdapterConfig: activation is {self.activation!r}, which timm does not know. Expected a name such "
                'as "relu", "relu6", "hard_swish" or "silu", or None for a linear adapter.'
            ) from error
