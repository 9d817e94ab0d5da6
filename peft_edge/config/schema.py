"""The keys of a run with their types, ranges, defaults and descriptions, and the combinations that cannot work.

This module does not import torch, so that errors in a configuration are reported in a fraction of a second. Therefore
it repeats the names of methods, optimizers and layer roles. Tests compare them with `METHODS`, `OPTIMIZERS`, `ROLES`.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

METHOD_NAMES = (
    *("none", "head", "norm-stats", "norm-affine", "bias", "full"),
    *("lora", "lora-fa", "dora", "conv-adapter", "galore"),
    *("peft-lora", "peft-dora", "peft-loha", "peft-lokr"),
)
OPTIMIZER_NAMES = ("adamw", "sgd", "sgd-momentum", "adafactor")
ROLE_NAMES = ("all-conv", "dense", "depthwise", "pointwise", "expand", "project", "last-stage")


def _registered(registry: str, names: tuple[str, ...]) -> AfterValidator:
    def check(name: str) -> str:
        # Importing peft_edge.methods here would import torch. A program with its own methods has imported it already.
        known = list(getattr(sys.modules.get("peft_edge.methods"), registry, names))
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"expected one of {', '.join(known)}, found {name!r}; did you mean {nearest}?")
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


Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Targets = Annotated[str | list[str], AfterValidator(_check_targets)]


class Section(BaseModel):
    """A group of keys. Unknown keys are errors, and no value is converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class BackboneConfig(Section):
    """The network and its initial weights."""

    name: str = "mobilenetv3_small_050"
    """A timm model name, or the id of a timm model on the Hub."""
    pretrained: bool = False
    """Start from timm's pretrained weights, from the Hub or its local cache. Recommended for photographs."""
    checkpoint: str | None = None
    """Start from the weights in this folder, written by `save_backbone`, or in this .safetensors file."""
    small_images: bool = False
    """Remove the stride of the stem. Recommended for images of about 32 to 64 pixels."""


class DataConfig(Section):
    """The task: source images, target images, and the difference between them."""

    name: str = "digits"
    """`digits`, `shapes`, an image dataset of the Hugging Face Hub, or a folder with one subfolder per class."""
    shift: str | None = None
    """The target images: a corruption of the source, another split of the dataset, or another dataset or folder."""
    severity: Annotated[int, Field(ge=1, le=5)] | None = None
    """Severity of a corruption that has levels, 1 to 5; 5 by default."""
    shift_filters: list[list[str | int | float]] = []
    """Conditions `[column, operator, value]` on the rows to read. Only for a shift that is a Hugging Face dataset."""
    new_classes: Annotated[list[str], BeforeValidator(_as_names)] = []
    """Classes that the source model does not know, in order of arrival. Set this or `shift`."""
    increments: PositiveCount = 1
    """Number of groups of new classes to add one after another."""
    rehearsal_size: Count = 0
    """Total number of images of earlier classes to train on again, e.g. 10 per class. 0: freeze their head rows."""
    image_size: PositiveCount = 48
    """Height and width of the network's input, in pixels."""
    adaptation_size: PositiveCount = 512
    """Maximum number of images to adapt with; for new classes, in each increment."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    train_split: str = "train"
    """Split to train on."""
    image_column: str | None = None
    """Image column, for a dataset with several."""
    label_column: str | None = None
    """Class column, for a dataset with several."""


class AdapterConfig(Section):
    """Options of the low-rank methods, named as in `ConvLoraConfig`."""

    r: PositiveCount = 4
    """Rank, usually 4 to 16. A higher rank adapts better to a strong shift, and the saved adapter is larger."""
    lora_alpha: Positive = 8
    """The update is scaled by lora_alpha / r. Twice the rank is a good start."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input, or on the rank for peft-loha and peft-lokr. Above 0, training takes longer."""
    target_modules: Targets = "all-conv"
    """Layers to adapt: a role (`all-conv`, `dense`, `depthwise`, ...), a list of names, or a regular expression."""


class ConvAdapterOptions(Section):
    """Options of method conv-adapter, named as in `ConvAdapterConfig`."""

    reduction: PositiveCount = 4
    """Number of input channels of the adapted layer per channel of the bottleneck."""
    kernel_size: PositiveCount | None = None
    """Kernel size of the depthwise convolution; by default that of the adapted layer. 1: no depthwise convolution."""
    placement: Literal["parallel", "sequential"] = "parallel"
    """Where the bottleneck runs: parallel to the adapted layer, or after it."""
    activation: str | None = None
    """timm's name of the bottleneck's activation, such as relu. Parallel adapters without activation can be merged."""
    target_modules: Targets = "dense"
    """Layers or blocks to adapt: a role, a list of names, or a regular expression."""


class GaloreOptions(Section):
    """Options of method galore, named as in galore-torch. The defaults of gap and scale suit short training."""

    rank: PositiveCount = 8
    """Rank of the projected gradients."""
    update_proj_gap: PositiveCount = 50
    """Optimizer steps between updates of the projection. galore-torch's default of 200 suits long training."""
    scale: Positive = 1.0
    """Factor of the projected update. galore-torch's default is 0.25."""
    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """Sides of the gradient to project: left, right, both (full), the shorter (std) or the longer (reverse_std)."""
    target_modules: str | list[str] = "dense"
    """Convolutions with projected gradients: a role or a list of names."""
    layerwise: bool = False
    """Update each layer during the backward pass, so that only one gradient is in memory at a time."""


class SourceConfig(Section):
    """Training of the source model, by SGD with Nesterov momentum and a one-cycle schedule."""

    epochs: Count = 12
    """Passes over the source images. 0: use the backbone's weights unchanged."""
    batch_size: PositiveCount = 32
    """Images per step."""
    learning_rate: Positive = 0.1
    """Peak of the one-cycle schedule: 0.1 for random weights, 0.01 for pretrained weights."""
    momentum: Fraction = 0.9
    """Nesterov momentum."""
    weight_decay: NonNegative = 5e-4
    """Weight decay of convolution and linear weights. Norms and biases have none."""


class TrainingConfig(Section):
    """Adaptation to the target, with linear warm-up and a cosine schedule."""

    epochs: PositiveCount = 10
    """Passes over the target's training images."""
    batch_size: PositiveCount = 32
    """Images per optimizer step, summed over all processes and accumulation steps."""
    learning_rate: Annotated[
        list[Positive],
        BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
        Field(min_length=1),
    ] = [1e-2]
    """A number, or a list from which the target's validation split chooses. 3e-3 to 1e-2 for adapters, 1e-3 to 3e-3
    for full fine-tuning."""
    optimizer: Annotated[str, _registered("OPTIMIZERS", OPTIMIZER_NAMES)] = "adamw"
    """adamw, sgd, sgd-momentum or adafactor. Method galore uses the GaLore variant of it."""
    weight_decay: NonNegative = 0.0
    """Weight decay of all weights except norms and biases. 0 is usual for adapters."""
    warmup_steps: Count = 10
    """Optimizer steps of linear warm-up."""
    max_grad_norm: Positive | None = None
    """Clip gradients to this norm. Try 1 when training diverges."""
    gradient_accumulation_steps: PositiveCount = 1
    """Split each batch into this many parts, to save memory."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast dtype of training and evaluation: no (float32), fp16 (GPU only) or bf16."""
    eval_batch_size: PositiveCount = 128
    """Images per evaluation step, summed over all processes."""
    eval_every_epochs: PositiveCount = 1
    """Epochs between evaluations on the validation split. The last epoch is always evaluated."""
    checkpoint_every_steps: PositiveCount = 50
    """Optimizer steps between checkpoints. An interrupted run repeats at most this number of steps."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Number of newest checkpoints to keep. At least 2, because training may diverge right after a checkpoint."""
    replay: bool = False
    """Latent replay: run the frozen layers before the first trainable one only once, and train on their stored outputs.
    `norm` must be frozen or recalibrate."""
    replay_views: PositiveCount = 1
    """Number of augmented views to store per image. The epochs use the views in turn."""
    replay_dtype: Literal["float32", "float16", "int8"] = "float32"
    """Dtype of the stored outputs: float32, float16, or int8 with one scale per image."""


class LeanConfig(Section):
    """Lean training: frozen layers save only what the backward pass needs. Results do not change."""

    enabled: bool = False
    """Replace layers by lean ones during training. The saved update does not depend on it."""
    inplace_norm: bool = False
    """Let frozen BatchNorm layers overwrite the output of the convolution before them."""
    masks: Literal["byte", "bit", "off"] = "byte"
    """What ReLU and similar activations save for the backward pass: a byte or a bit per value, or the values (off)."""
    recompute: bool = False
    """Recompute the outputs of cheap adapted convolutions in the backward pass instead of saving them."""


class ProfilingConfig(Section):
    """Measurement of FLOPs, memory and times of some steps, for the record and the trackers."""

    every_n_steps: Count = 1000
    """Optimizer steps between two measurements; the first measures steps 2 and 3. 0 turns profiling off."""
    trace: bool = False
    """Write torch.profiler's trace of one step per process to output_dir/traces."""


class HubConfig(Section):
    """Upload of the update, its record and a model card to the Hub, with the token of `hf auth login`."""

    repo_id: Annotated[str, AfterValidator(_check_repo_id)] | None = None
    """Repository to upload to, `owner/name`. By default nothing is uploaded."""
    private: bool = False
    """Create a new repository as private."""
    revision: str | None = None
    """Branch to push to; main by default."""
    license: str | None = None
    """License identifier of the Hub for the model card; by default that of timm's pretrained weights."""


class RunConfig(Section):
    """One run: adapt a source model to a target with one method."""

    output_dir: str
    """Folder of the adapter, the record, checkpoints and logs."""
    method: Annotated[str, _registered("METHODS", METHOD_NAMES)] = "lora"
    """Adaptation method: none, head, norm-stats, norm-affine, bias, full, lora, lora-fa, dora, conv-adapter or
    galore; or PEFT's peft-lora, peft-dora, peft-loha or peft-lokr."""
    norm: Literal["frozen", "recalibrate", "stats", "affine"] = "stats"
    """BatchNorm in training: frozen (source statistics), recalibrate (statistics estimated once on target images),
    stats (batch statistics) or affine (batch statistics; weight and bias are trained). norm-stats and norm-affine
    ignore this key. PEFT's methods accept only stats and affine. full and galore always train weight and bias."""
    seed: Count = 0
    """Seed of the splits, the weights and the order of the images."""
    cache_dir: str | None = None
    """Folder of source models and stored features, which runs share; by default `cache` next to output_dir."""
    cpu: bool = False
    """Use the CPU even if there is a GPU."""
    num_threads: PositiveCount = 1
    """CPU threads per process. Their number changes rounding, so each number has its own source model."""
    num_workers: Count = 0
    """Image-loading processes per training process."""
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
        """Return `norm` and the keys of a method's section, the options of `Method.prepare`.

        >>> RunConfig(output_dir="runs/a").options("adapter")
        {'norm': 'stats', 'r': 4, 'lora_alpha': 8, 'lora_dropout': 0.0, 'target_modules': 'all-conv'}
        """
        return {"norm": self.norm, **(getattr(self, section).model_dump() if section is not None else {})}


def conflicts(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the key and the error message of each combination of values that cannot work."""
    backbone, data, training, lean = config.backbone, config.data, config.training, config.lean
    if backbone.pretrained and backbone.checkpoint is not None:
        yield "backbone.checkpoint", "cannot be used together with backbone.pretrained: choose one"
    if config.source.epochs == 0 and not backbone.pretrained and backbone.checkpoint is None:
        yield "source.epochs", "is 0 and the weights are random: raise it, or set backbone.pretrained or .checkpoint"
    if (data.shift is None) == (not data.new_classes):
        found = "neither" if data.shift is None else "both"
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
    if lean.enabled and lean.inplace_norm and config.norm in ("stats", "affine"):
        yield "lean.inplace_norm", f"needs frozen BatchNorm, and norm is {config.norm}: set it to frozen or recalibrate"
    if config.hub.repo_id is not None and config.method == "none":
        yield "hub.repo_id", "is set, and method none produces nothing to push: unset it, or choose a method"
