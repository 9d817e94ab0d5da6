"""Define the configuration keys of a run (types, ranges, defaults, descriptions), and check their combinations.

This module does not import torch, so that errors in a configuration are reported in a fraction of a second. The
methods, the optimizers, the roles (groups of layers, such as `all-conv`) and the keys of cost analyses are defined in
modules that import torch, so their names are repeated here. Tests compare the names with `METHODS`, `OPTIMIZERS`,
`ROLES` and `CostSetting`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from peft_edge.names import did_you_mean, may_be_on_hub, missing_folder, problem_of_data, problem_of_shift

METHOD_NAMES = (
    *("none", "head", "norm-stats", "norm-affine", "bias", "full"),
    *("lora", "lora-fa", "dora", "conv-adapter", "galore"),
    *("peft-lora", "peft-dora", "peft-loha", "peft-lokr"),
)
OPTIMIZER_NAMES = ("adamw", "sgd", "sgd-momentum", "adafactor")
COST_KEYS = (
    *("method", "lora_rank", "batch_size", "image_size", "sequence_length", "target_modules", "norm", "lean"),
    *("inplace_norm", "replay", "accounting"),
)
"""The keys of a cost analysis in the grid file of a study. They are the attributes of `CostSetting`."""
ROLE_NAMES = ("all-conv", "dense", "depthwise", "pointwise", "expand", "project", "last-stage")


def _registered(registry: str, names: tuple[str, ...]) -> AfterValidator:
    def check(name: str) -> str:
        # Do not import peft_edge.methods here, because that would import torch. If a program has registered methods of
        # its own, it has already imported peft_edge.methods.
        known = list(getattr(sys.modules.get("peft_edge.methods"), registry, names))
        if name not in known:
            raise ValueError(f"expected one of {', '.join(known)}, found {name!r}{did_you_mean(name, known)}")
        return name

    return AfterValidator(check)


def _check_targets(target: str | list[str]) -> str | list[str]:
    if isinstance(target, str):
        if re.fullmatch("[a-z]+(-[a-z]+)+", target) and target not in ROLE_NAMES:
            raise ValueError(f"{target!r} is not a role; the roles are {', '.join(ROLE_NAMES)}")
        try:
            re.compile(target)
        except re.error as error:
            raise ValueError(f"{target!r} is not a regular expression: {error}") from error
    return target


def _check_repo_id(repo_id: str) -> str:
    from huggingface_hub.utils import validate_repo_id

    if "/" not in repo_id:
        raise ValueError(f"expected owner/name, found {repo_id!r}")
    validate_repo_id(repo_id)
    return repo_id


def _as_names(value: object) -> object:
    # YAML reads the class name 7 as a number.
    return [str(item) if type(item) is int else item for item in value] if isinstance(value, list) else value


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _as_channels(value: object) -> object:
    numbers = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(numbers, list) or len(numbers) != 3 or not all(map(_is_fraction, numbers)):
        raise ValueError(f"expected one or three numbers between 0 and 1, found {value!r}")
    return numbers


Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Channels = Annotated[list[float], BeforeValidator(_as_channels)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Targets = Annotated[str | list[str], AfterValidator(_check_targets)]


class Section(BaseModel):
    """A group of configuration keys. Unknown keys are errors.

    Values must have the declared type; an int is also a valid float.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class BackboneConfig(Section):
    """The network and its initial weights."""

    name: str = "mobilenetv3_small_050"
    """A timm model name, the id of a timm model on the Hub, or the folder of a saved or imported model."""
    pretrained: bool = False
    """Start from pretrained weights, which are read from the Hub or its local cache. Recommended for photographs."""
    checkpoint: str | None = None
    """Start from the weights at this path: a folder that `save_backbone` wrote, or a .safetensors, .pth, .pt, .bin,
    .ckpt or .tar file of another program. The tensors in a file of another program are matched by name or, if the names
    differ, by order and shape."""
    small_images: bool = False
    """Set the stride of the first convolution from 2 to 1. Recommended for images of about 32 to 64 pixels."""
    mean: Channels | None = None
    """Mean that is subtracted from pixels between 0 and 1: one number, or a list of three. By default, the value in
    timm's configuration of the weights. Use the value with which the weights were trained."""
    std: Channels | None = None
    """Standard deviation by which pixels are divided after the mean is subtracted: one number, or a list of three. By
    default, the value in timm's configuration of the weights."""
    interpolation: Interpolation | None = None
    """Filter for resizing images. By default, the filter in timm's configuration of the weights."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of a resized image's side that the centre crop keeps. By default, the value in timm's configuration of
    the weights."""


class DataConfig(Section):
    """The task: source images to train the source model on, and target images with a shift or with new classes."""

    name: str = "digits"
    """`digits`, `shapes`, an image dataset of the Hugging Face Hub, or a folder with one subfolder per class."""
    source_filters: list[list[str | int | float | list[str]]] = []
    """Conditions `[column, operator, value]`. Only rows of `name` that meet all conditions are read. `name` must be a
    Hugging Face dataset, or a folder with one subfolder per domain, such as photo and sketch. In a condition on such a
    folder, the column is `domain`, and the value is the name of a subfolder: `[[domain, "==", photo]]`. The subfolder
    of a domain must contain one subfolder per class."""
    shift: str | None = None
    """Shift of the target images. This is either the name of a corruption (such as fog), which is applied to images of
    `name`, or the name of shifted data: another split of `name`, another dataset, or another folder."""
    severity: Annotated[int, Field(ge=1, le=5)] | None = None
    """Severity of the corruption, from 1 (mild) to 5 (strong); by default 5. Some corruptions have no severities, and
    do not accept this key."""
    shift_filters: list[list[str | int | float | list[str]]] = []
    """Conditions as in `source_filters`. Only rows of `shift` that meet all conditions are read. If conditions are
    given and `shift` is not, the rows are read from `name`."""
    new_classes: Annotated[list[str], BeforeValidator(_as_names)] = []
    """Classes that the source model does not know, in the order in which the model learns them. Set either
    `new_classes` or `shift`."""
    increments: PositiveCount = 1
    """Number of increments, which are groups of new classes. The model is adapted to one increment after another."""
    rehearsal_size: Count = 0
    """Maximum number of images of earlier classes that are added to the training images of each increment. The maximum
    applies to all earlier classes together. 0: use no images of earlier classes, and freeze the rows of the head that
    belong to these classes."""
    image_size: PositiveCount = 48
    """Height and width of the network's input, in pixels."""
    adaptation_size: PositiveCount | None = None
    """Maximum number of training images of the target. By default, all are used. With new classes, the maximum applies
    to each increment, and does not count rehearsal images. If `shift` is a corruption and `name` is a dataset or a
    folder, the target gets at most a quarter of the source's training images, even without this key."""
    augment: Literal["none", "shift", "photo", "auto"] = "auto"
    """Augmentation of training images. none: no change. shift: move the image by up to an eighth of its sides. photo:
    random crop, flip and colour changes. auto: shift for `digits`, `shapes`, and images whose median width or height is
    below 128 pixels; photo for all other images. Choose shift for text, signs and other images that must not be
    flipped."""
    subset: str | None = None
    """Name of a configuration (subset) of a Hugging Face dataset."""
    train_split: str = "train"
    """Name of the split that contains the training images."""
    image_column: str | None = None
    """Column with the images. Required if a dataset has several image columns."""
    label_column: str | None = None
    """Column with the classes. Required if a dataset has several class columns."""


class AdapterConfig(Section):
    """Options of the low-rank methods, named as in `ConvLoraConfig`."""

    r: PositiveCount = 4
    """Rank, usually 4 to 16. A higher rank adapts better to a strong shift, but makes the saved adapter larger."""
    lora_alpha: Positive = 8
    """The low-rank update of a kernel is multiplied by lora_alpha / r. A good first value is 2 * r."""
    lora_dropout: Fraction = 0.0
    """Probability with which elements of the adapter's input are dropped. In methods peft-loha and peft-lokr, this key
    is PEFT's `rank_dropout`, which drops output channels of the update. A value above 0 makes training slower."""
    target_modules: Targets = "all-conv"
    """Layers to adapt: a role, a list of module names, or a regular expression. A role is the name of a group of
    layers. The roles are all-conv, dense, depthwise, pointwise, expand, project and last-stage."""


class ConvAdapterOptions(Section):
    """Options of method conv-adapter, named as in `ConvAdapterConfig`."""

    reduction: PositiveCount = 4
    """The bottleneck has max(1, C // reduction) channels, where C is the number of the adapter's input channels."""
    kernel_size: PositiveCount | None = None
    """Kernel size of the adapter's depthwise convolution. By default, the kernel size of the adapted layer, or 3 if a
    block is adapted. 1: no depthwise convolution."""
    placement: Literal["parallel", "sequential"] = "parallel"
    """Input of the bottleneck: the input of the adapted layer (parallel), or the output of this layer (sequential)."""
    activation: str | None = None
    """timm's name of the bottleneck's activation, such as relu. By default, there is no activation. An adapter with an
    activation cannot be merged."""
    target_modules: Targets = "dense"
    """Layers or blocks to adapt: a role such as `dense`, a list of module names, or a regular expression."""


class GaloreOptions(Section):
    """Options of method galore, named as in galore-torch. The defaults suit short training."""

    rank: PositiveCount = 8
    """Rank of the projected gradients."""
    update_proj_gap: PositiveCount = 50
    """Optimizer steps between updates of the projection. galore-torch's default of 200 suits long training."""
    scale: Positive = 1.0
    """Factor by which the update of projected convolutions is multiplied. galore-torch's default is 0.25."""
    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """Side on which the gradient matrix is projected: left, right, both (full), the shorter side (std), or the longer
    side (reverse_std)."""
    target_modules: str | list[str] = "dense"
    """Convolutions whose gradients are projected: a role such as `dense`, a module name, or a list of roles and module
    names."""
    layerwise: bool = False
    """Update each parameter during the backward pass, so that only one gradient is in memory at a time."""


class SourceConfig(Section):
    """Training of the source model (the network before adaptation), by SGD with a one-cycle schedule."""

    epochs: Count = 12
    """Passes over the training images of the source. 0: do not train the backbone, but use its initial weights."""
    batch_size: PositiveCount = 32
    """Images per optimizer step."""
    learning_rate: Positive = 0.1
    """Peak learning rate of the one-cycle schedule. 0.1 suits random weights, 0.01 suits pretrained weights."""
    momentum: Fraction = 0.9
    """Nesterov momentum of SGD. 0: SGD without momentum."""
    weight_decay: NonNegative = 5e-4
    """Weight decay of convolution and linear weights. It does not apply to norms and biases."""


class TrainingConfig(Section):
    """Training on the target images, with linear warm-up and a cosine schedule."""

    epochs: PositiveCount = 10
    """Passes over the target's training images."""
    batch_size: PositiveCount = 32
    """Images per optimizer step, summed over all processes and accumulation steps."""
    learning_rate: Annotated[
        list[Positive],
        BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
        Field(min_length=1),
    ] = [3e-3]
    """Peak learning rate, or a list of rates to try. The rate with the best accuracy on the target's validation split
    is chosen. Usual values: 1e-3 to 3e-3 for adapters of pretrained networks, 3e-3 to 1e-2 for adapters of small
    networks that were trained from scratch, and a third of these values for full fine-tuning."""
    optimizer: Annotated[str, _registered("OPTIMIZERS", OPTIMIZER_NAMES)] = "adamw"
    """Optimizer: adamw, sgd, sgd-momentum or adafactor. Method galore uses the GaLore variant of this optimizer."""
    weight_decay: NonNegative = 0.0
    """Weight decay of all trainable weights except norms and biases. 0 is usual for adapters."""
    warmup_steps: Count = 10
    """Optimizer steps of linear warm-up. Warm-up takes at most half of all optimizer steps."""
    max_grad_norm: Positive | None = None
    """Maximum total norm of all gradients. By default, gradients are not clipped. Try 1 if training diverges."""
    gradient_accumulation_steps: PositiveCount = 1
    """Number of parts into which each batch is split to save memory."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast dtype of training and evaluation: no (float32 without autocast), fp16 (GPU only) or bf16."""
    eval_batch_size: PositiveCount = 128
    """Images per evaluation step, summed over all processes."""
    eval_every_epochs: PositiveCount = 1
    """Epochs between evaluations on the validation split. The last epoch is always evaluated."""
    checkpoint_every_steps: PositiveCount = 50
    """Optimizer steps between checkpoints. An interrupted run repeats at most this number of steps."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Number of newest checkpoints to keep. At least 2, because the newest may contain weights that have diverged."""
    replay: bool = False
    """Use latent replay: store the outputs of the frozen layers before the first trainable layer, and train the later
    layers on these outputs. Requires `norm=frozen` or `norm=recalibrate`."""
    replay_views: PositiveCount = 1
    """With `replay`, the number of augmented views that are stored for each image. Each epoch uses the next view."""
    replay_dtype: Literal["float32", "float16", "int8"] = "float32"
    """Dtype of the outputs that `replay` stores: float32, float16, or int8 with one scale per image."""


class LeanConfig(Section):
    """Lean training, in which layers save only what the backward pass needs. Gradients change only by rounding."""

    enabled: bool = True
    """Use lean layers during training. The format of the saved adapter or model does not depend on this key."""
    inplace_norm: bool | None = None
    """Let a BatchNorm overwrite the output of the convolution before it, if no other layer uses this output. Requires
    `norm=frozen`, `norm=recalibrate` or `recompute`. A run on torch's meta device finds the layers that use an output.
    The default is true if the model can run on this device. Otherwise, the default is false."""
    masks: Literal["byte", "bit", "off"] = "bit"
    """What ReLU and similar activations save for the backward pass: a mask of bytes or bits, or the output (off)."""
    recompute: bool | Literal["depthwise"] = False
    """Convolutions whose outputs are not saved in the forward pass, but recomputed in the backward pass. true: all
    cheap convolutions, which have at most 100 products per output element. depthwise: only depthwise convolutions.
    false: no convolutions."""
    split_blocks: bool = False
    """Run inverted residual blocks with large feature maps on a few samples at a time. Requires `norm=frozen` or
    `norm=recalibrate`. This saves memory. Outputs change by rounding."""
    checkpoint: bool = False
    """Switch on timm's gradient checkpointing. The backward pass then runs the forward pass of each block again."""


class ProfilingConfig(Section):
    """Measurement of the FLOPs, memory and time of some training steps, for `record.json` and the trackers."""

    every_n_steps: Count = 1000
    """Number of optimizer steps from one measurement to the next. The first measurement covers steps 2 and 3. 0: no
    measurements."""
    trace: bool = False
    """Write a torch.profiler trace of one step to output_dir/traces, for each process."""


class HubConfig(Section):
    """Upload of the trained adapter or model, the run's record and a model card, with the token of `hf auth login`."""

    repo_id: Annotated[str, AfterValidator(_check_repo_id)] | None = None
    """Repository to upload to, `owner/name`. By default nothing is uploaded."""
    private: bool = False
    """Make the repository private if the upload creates it."""
    revision: str | None = None
    """Branch to upload to; main by default."""
    license: str | None = None
    """License in the model card, as an identifier of the Hub such as apache-2.0. If the run used pretrained weights of
    timm, the default is their license. Otherwise, the card names no license by default."""


class RunConfig(Section):
    """The configuration of a run. A run adapts a source model to one or several targets with one method.

    The source model is trained on the source images of `data`. A target consists of shifted images or of new classes.
    """

    output_dir: str
    """Folder of the adapter, the results (record.json), checkpoints and logs."""
    method: Annotated[str, _registered("METHODS", METHOD_NAMES)] = "lora"
    """Adaptation method: none, head, norm-stats, norm-affine, bias, full, lora, lora-fa, dora, conv-adapter or
    galore; or PEFT's peft-lora, peft-dora, peft-loha or peft-lokr."""
    norm: Literal["frozen", "recalibrate", "stats", "affine"] = "frozen"
    """How BatchNorm normalises in training. frozen: with the running statistics of the source model. recalibrate: with
    statistics that are estimated once on target images. stats: with batch statistics. affine: with batch statistics,
    and BatchNorm's weight and bias are trained. Choose frozen if the model must stay accurate on source images. Methods
    none, norm-stats and norm-affine ignore this key. Methods whose names begin with peft- do not accept recalibrate.
    Methods full and galore always train BatchNorm's weight and bias."""
    seed: Count = 0
    """Seed of the splits, the initial weights, the augmentations and the order of the images."""
    cache_dir: str | None = None
    """Folder in which runs share source models and stored features; by default `cache` in the parent folder of
    output_dir."""
    cpu: bool = False
    """Use the CPU even if there is a GPU."""
    num_threads: PositiveCount = 1
    """CPU threads per process. The number of threads changes rounding, so runs with different numbers of threads do not
    share a source model."""
    num_workers: Count | None = None
    """Number of worker processes that load images, for each training process. 0: the training process loads the images.
    The number does not change the batches. The default is the number of CPU cores per training process minus
    num_threads, but at least 0 and at most 4. The default is always 0 in a study, for `digits` and `shapes`, for images
    whose median width or height is below 128 pixels, and on systems where Python does not start processes by fork."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    """Tools that receive the training curves: any of tensorboard, wandb and trackio."""

    backbone: BackboneConfig = BackboneConfig()
    data: DataConfig = DataConfig()
    adapter: AdapterConfig = AdapterConfig()
    conv_adapter: ConvAdapterOptions = ConvAdapterOptions()
    galore: GaloreOptions = GaloreOptions()
    source: SourceConfig = SourceConfig()
    training: TrainingConfig = TrainingConfig()
    lean: LeanConfig = LeanConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    hub: HubConfig = HubConfig()

    def options(self, section: str | None) -> dict[str, object]:
        """Return the options for `Method.prepare`.

        The options are `norm` and, if `section` is not None, all keys of the section with this name.

        >>> RunConfig(output_dir="runs/a").options("adapter")
        {'norm': 'frozen', 'r': 4, 'lora_alpha': 8, 'lora_dropout': 0.0, 'target_modules': 'all-conv'}
        """
        return {"norm": self.norm, **(getattr(self, section).model_dump() if section is not None else {})}


def conflicts(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield a pair (key, error message) for each combination of values that cannot work."""
    backbone, data, training, lean = config.backbone, config.data, config.training, config.lean
    if backbone.pretrained and backbone.checkpoint is not None:
        yield "backbone.checkpoint", "cannot be used together with backbone.pretrained: choose one"
    has_weights = backbone.pretrained or backbone.checkpoint is not None or Path(backbone.name).is_dir()
    if config.source.epochs == 0 and not has_weights:
        yield "source.epochs", "is 0 and the weights are random: raise it, or set backbone.pretrained or .checkpoint"
    has_shift = data.shift is not None or bool(data.shift_filters)
    if has_shift == bool(data.new_classes):
        found = "both" if has_shift else "neither"
        yield "data.shift", f"expected a shift or data.new_classes, found {found}: set exactly one of them"
    if data.new_classes and not data.rehearsal_size and training.weight_decay:
        yield (
            "training.weight_decay",
            "would shrink the old classes' frozen rows: set it to 0, or set data.rehearsal_size",
        )
    if training.batch_size % training.gradient_accumulation_steps:
        steps = training.gradient_accumulation_steps
        yield "training.batch_size", f"expected a multiple of training.gradient_accumulation_steps, which is {steps}"
    if training.mixed_precision == "fp16" and config.cpu:
        yield "training.mixed_precision", "fp16 needs a GPU: use bf16, or leave cpu out"
    if config.method == "galore" and config.galore.layerwise:
        for key, is_set in (
            ("training.max_grad_norm", training.max_grad_norm is not None),
            ("training.gradient_accumulation_steps", training.gradient_accumulation_steps > 1),
            ("training.mixed_precision", training.mixed_precision == "fp16"),
        ):
            if is_set:
                yield key, "needs all gradients at once, and galore.layerwise keeps only one: unset one of the two"
    if lean.enabled and lean.inplace_norm and not lean.recompute and config.norm in ("stats", "affine"):
        advice = "set it to frozen or recalibrate, or set lean.recompute"
        yield "lean.inplace_norm", f"needs frozen BatchNorm, and norm is {config.norm}: {advice}"
    if lean.enabled and lean.split_blocks and config.norm in ("stats", "affine"):
        advice = "set it to frozen or recalibrate, or unset lean.split_blocks"
        yield "lean.split_blocks", f"needs frozen BatchNorm, and norm is {config.norm}: {advice}"
    if config.hub.repo_id is not None and config.method == "none":
        yield "hub.repo_id", "is set, and method none produces nothing to push: unset it, or choose a method"


def missing_files(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield a pair (key, error message) for each key that names a missing file or folder, without asking the Hub."""
    data, backbone = config.data, config.backbone
    if problem := problem_of_data(data.name):
        yield "data.name", problem
    if data.shift is not None and (problem := problem_of_shift(data.shift, data.name)):
        yield "data.shift", problem
    if backbone.checkpoint is not None and not Path(backbone.checkpoint).exists():
        yield "backbone.checkpoint", f"there is no file or folder {backbone.checkpoint!r}"
    # A name without a slash is the name of a timm model, which only timm can check.
    if "/" in backbone.name and not backbone.name.startswith("timm/") and not Path(backbone.name).is_dir():
        if not may_be_on_hub(backbone.name):
            yield "backbone.name", f"unknown model {backbone.name!r}: {missing_folder(backbone.name)}"
        elif not backbone.pretrained:
            advice = "for a model on the Hub, set backbone.pretrained=true"
            yield "backbone.name", f"there is no folder {backbone.name!r}; {advice}"
