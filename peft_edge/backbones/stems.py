"""The first convolution of a timm model, and the form of it that keeps the resolution of small images."""

from __future__ import annotations

from typing import Any


def stem_names(model: Any) -> tuple[str, ...]:
    """The names of the convolutions that see the image; the branches of a RepVGG stem are two."""
    names = model.pretrained_cfg["first_conv"]
    return (names,) if isinstance(names, str) else tuple(names or ())


def unstride_stem(model: Any) -> None:
    """Sets the stem's stride to 1, and marks the model so that `save_backbone` records it.

    Raises:
        ValueError: The stem has another stride (it cuts the image into patches), or the model's input size is fixed.
    """
    convs = [model.get_submodule(name) for name in stem_names(model)]
    strides = {getattr(conv, "stride", None) for conv in convs}
    if not strides or not strides <= {(1, 1), (2, 2)} or model.pretrained_cfg["fixed_input_size"]:
        raise ValueError(
            f"{model.pretrained_cfg['architecture']} has no form for small images: expected a stem of stride 2 and a "
            f"free image size, found strides {strides} and fixed_input_size="
            f"{model.pretrained_cfg['fixed_input_size']}. Leave small_images out, or choose one of EDGE_FAMILIES."
        )
    for conv in convs:
        conv.stride = (1, 1)
    model.small_images = True
