"""The keys of a run: their types, ranges, defaults and meaning.

Values that are valid each for itself and cannot work, as far as that shows without data and network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from peft_edge.roles import ROLES

Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]

METHOD_NAMES = (
    *("none", "head", "norm-stats", "norm-affine", "bias", "full"),
    *("lora", "lora-fa", "dora", "conv-adapter", "galore"),
    *("peft-lora", "peft-dora", "peft-loha", "peft-lokr"),
)
OPTIMIZER_NAMES = ("adamw", "sgd", "sgd-momentum", "adafactor")
ROLE_NAMES = ("all-conv", "dense", "depthwise", "pointwise", "expand", "project", "last-stage")


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _as_names(value: Any) -> Any:
    """YAML takes a class called 7 for a number."""
    return [str(item) if type(item) is int else item for item in value] if isinstance(value, list) else value


class Section(BaseModel):
    """A group of keys; unknown keys are errors, and a value is never converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class BackboneConfig(Section):
    """The network and the weights it starts from."""

    name: str = "mobilenetv3_small_050"
    """A timm model name, or the id of a timm model on the Hub."""

    pretrained: bool = False
    """Start from timm's pretrained weights."""

    checkpoint: str | None = None
    """Start from these weights: a folder written by `save_backbone`, or a .safetensors file."""

    small_images: bool = False
    """Keep more resolution in the network, for images of about 32 to 64 pixels."""


class DataConfig(Section):
    """The task: images of a source, images of a target, and what shifted between them."""

    name: str = "digits"
    """`digits`, `shapes`, a Hugging Face dataset, or a folder with one subfolder a class."""

    shift: str | None = None
    """What makes the target differ: a corruption, another split of the data set, or another data set or folder."""

    severity: Annotated[int, Field(ge=1, le=5)] | None = None
    """How strong the corruption is, 1 to 5, where it comes in degrees; 5 by default."""

    shift_filters: list[list[str | int | float]] = []
    """Which rows to read of a data set that is the shift: `[column, operator, value]` each."""

    new_classes: Annotated[list[str], BeforeValidator(_as_names)] = []
    """Instead of a shift: classes that the source model does not know, in the order in which they arrive."""

    increments: PositiveCount = 1
    """In how many parts, one after another, the new classes arrive."""

    rehearsal_size: Count = 0
    """Images of the classes before that are trained on again, of all of them together; with 0, their rows of the head
    are frozen."""

    image_size: PositiveCount = 48
    """Height and width in pixels of what the network sees."""

    adaptation_size: PositiveCount = 512
    """The largest number of images to adapt with."""

    subset: str | None = None
    """The configuration of a Hugging Face dataset."""

    train_split: str = "train"
    """The split to train on."""

    image_column: str | None = None
    """The column of images, where there are several."""

    label_column: str | None = None
    """The column of classes, where there are several."""


class AdapterConfig(Section):
    """The low-rank adapter, for the methods that have one; the names are those of `ConvLoraConfig`."""

    r: PositiveCount = 4
    """Rank."""

    lora_alpha: Positive = 8
    """The update is scaled by lora_alpha / r."""

    lora_dropout: Share = 0.0
    """Share of the adapter's input that is dropped in training."""

    target_modules: str | list[str] = "all-conv"
    """The adapted layers: a role (`all-conv`, `dense`, `depthwise`, ...), a list of names, or a regular expression."""


class ConvAdapterOptions(Section):
    """The bottleneck of method conv-adapter; the names are those of `ConvAdapterConfig`."""

    reduction: PositiveCount = 4
    """The bottleneck has this many times fewer channels than the adapted layer's input."""

    kernel_size: PositiveCount | None = None
    """Height and width of the bottleneck's depthwise convolution: by default the adapted convolution's; 1 for none."""

    placement: Literal["parallel", "sequential"] = "parallel"
    """Beside the adapted layer, or after it."""

    activation: str | None = None
    """timm's name of the bottleneck's non-linearity, such as relu; without one, a parallel adapter merges."""

    target_modules: str | list[str] = "dense"
    """The adapted layers or blocks: a role, a list of names, or a regular expression."""


class GaloreOptions(Section):
    """The projection of method galore; the names are those of galore-torch, gap and scale are for short trainings."""

    rank: PositiveCount = 8
    """Rank of the projected gradients."""

    update_proj_gap: PositiveCount = 50
    """Optimizer steps between two projections."""

    scale: Positive = 1.0
    """The projected update is scaled by this."""

    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """Which sides of the gradient are projected: std, reverse_std, right, left or full."""

    target_modules: str | list[str] = "dense"
    """The convolutions with projected gradients: a role or a list of names."""

    layerwise: bool = False
    """Update each layer during the backward pass, so that only one gradient is in memory at a time."""


class SourceConfig(Section):
    """Training of the source model: SGD with Nesterov momentum, a one-cycle schedule, no decay of norms and biases."""

    epochs: Count = 12
    """Passes over the source images; 0 takes the backbone's weights as they are."""

    batch_size: PositiveCount = 32
    """Images per step."""

    learning_rate: Positive = 0.1
    """The peak of the one-cycle schedule."""

    momentum: Share = 0.9
    """Nesterov momentum."""

    weight_decay: NonNegative = 5e-4
    """Decay of the weights of convolutions and linear layers."""


class TrainingConfig(Section):
    """Adaptation to the target: warm-up and a cosine schedule."""

    epochs: PositiveCount = 10
    """Passes over the target's training images."""

    batch_size: PositiveCount = 32
    """Images per optimizer step, over all processes and accumulation steps together."""

    learning_rate: Annotated[list[Positive], BeforeValidator(_as_list), Field(min_length=1)] = [1e-2]
    """A number, or a list: each is tried with the whole budget, and the target's validation split chooses."""

    optimizer: str = "adamw"
    """adamw, sgd, sgd-momentum or adafactor; for the method galore, its form of that optimizer."""

    weight_decay: NonNegative = 0.0
    """Decay of all weights but those of norms and biases, as the optimizer defines it."""

    warmup_steps: Count = 10
    """Optimizer steps until the learning rate is reached."""

    max_grad_norm: Positive | None = None
    """Gradients are clipped to this norm."""

    gradient_accumulation_steps: PositiveCount = 1
    """A batch is worked off in this many parts, to save memory."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Type of the activations in training and evaluation: no, fp16 or bf16."""

    eval_batch_size: PositiveCount = 128
    """Images per evaluation step, over all processes."""

    eval_every_epochs: PositiveCount = 1
    """Epochs from one evaluation on the validation split to the next; the last epoch always ends with one."""

    checkpoint_every_steps: PositiveCount = 50
    """Optimizer steps between checkpoints; a run that dies loses at most these."""

    replay: bool = False
    """Train on stored outputs of the frozen layers before the first trained one, which are computed only once; the
    BatchNorm layers among them must be frozen or recalibrate."""

    replay_views: PositiveCount = 1
    """How many augmented views of each image are stored; an epoch sees one of them, in turn."""

    replay_dtype: Literal["float32", "float16", "int8"] = "float32"
    """Type of the stored values: float32, float16 or int8, which has a scale for each image."""

    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """How many of the newest checkpoints stay on the disk; at least two, since training may diverge after the last."""


class LeanConfig(Section):
    """What is frozen keeps only what the backward pass needs: the same results in less memory."""

    enabled: bool = False
    """Train in the lean form; what is saved is the plain one."""

    inplace_norm: bool = False
    """Let frozen BatchNorm layers work in place on the outputs of the convolutions before them."""

    masks: Literal["byte", "bit", "off"] = "byte"
    """What ReLU and its kin keep: a byte or a bit for each value, or, with off, the values."""

    recompute: bool = False
    """Make the output of adapted convolutions that cost little again, instead of keeping it."""


class ProfilingConfig(Section):
    """What adaptation costs: FLOPs, memory and seconds of a sample of its steps, in the record and the trackers."""

    every_n_steps: Count = 1000
    """Optimizer steps from one sample to the next, beginning with the second step; 0 for no samples."""

    trace: bool = False
    """Write torch.profiler's trace of one step of each process to output_dir/traces."""


class HubConfig(Section):
    """Where the update goes when the run is over, with its record and a card; the token is that of `hf auth login`."""

    repo_id: str | None = None
    """`owner/name` on the Hub; without it, nothing leaves this machine."""

    private: bool = False
    """Only the owner sees the repository, if it is made here."""

    revision: str | None = None
    """The branch to push to; by default main."""

    license: str | None = None
    """The Hub's identifier of a license, for the card; by default that of timm's pretrained weights."""


class RunConfig(Section):
    """One run: adapt a source model to a target with one method."""

    output_dir: str
    """Where everything goes: the adapter, the record, checkpoints and logs."""

    method: str = "lora"
    """How the model is adapted: none, head, norm-stats, norm-affine, bias, full, lora, lora-fa, dora, conv-adapter,
    galore; or PEFT's own peft-lora, peft-dora, peft-loha, peft-lokr."""

    norm: Literal["frozen", "recalibrate", "stats", "affine"] = "stats"
    """What a method changes in the BatchNorm layers: frozen, recalibrate, stats or affine. Methods that are called after
    norms have their own, those that ship the model train weight and bias always, and PEFT's know stats and affine."""

    seed: Count = 0
    """Seed of the splits, the weights and the order of the images."""

    cache_dir: str | None = None
    """Where source models are kept for other runs; by default `cache` beside output_dir."""

    cpu: bool = False
    """Stay on the CPU even where there is a GPU."""

    num_threads: PositiveCount = 1
    """CPU threads of each process. Another number gives other rounding, and so another source model."""

    num_workers: Count = 0
    """Processes that read images, for each training process."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    """Where curves are sent: any of tensorboard, wandb and trackio."""

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

    def options(self, section: str | None) -> dict[str, Any]:
        """The options of a method whose section is called so; without a section it has one, `norm`."""
        return {"norm": self.norm} | (getattr(self, section).model_dump() if section is not None else {})


Problem = tuple[str, str]
"""A key, and what is wrong with it."""


def conflicts(config: RunConfig) -> Iterator[Problem]:
    """Yields what cannot work in `config`."""
    yield from _source(config)
    yield from _task(config)
    yield from _training(config)
    yield from _lean(config)
    yield from _hub(config)
    for section in ("adapter", "conv_adapter"):
        yield from _targets(f"{section}.target_modules", getattr(config, section).target_modules)


def _source(config: RunConfig) -> Iterator[Problem]:
    backbone = config.backbone
    if backbone.pretrained and backbone.checkpoint is not None:
        yield "backbone.checkpoint", "cannot be given together with backbone.pretrained: choose one"
    if config.source.epochs == 0 and not (backbone.pretrained or backbone.checkpoint is not None):
        yield (
            "source.epochs",
            "is 0 and the weights are random: set backbone.pretrained or backbone.checkpoint, or train the source",
        )


def _task(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if (data.shift is None) == (not data.new_classes):
        found = "neither" if data.shift is None else "both"
        yield "data.shift", f"expected a shift or data.new_classes, found {found}: give one of them"
    if data.new_classes and not data.rehearsal_size and config.training.weight_decay:
        yield (
            "training.weight_decay",
            "would shrink the old classes' rows of the head, which are frozen where data.rehearsal_size is 0: set it "
            "to 0, or rehearse",
        )


def _training(config: RunConfig) -> Iterator[Problem]:
    training = config.training
    if training.batch_size % training.gradient_accumulation_steps:
        yield (
            "training.batch_size",
            f"({training.batch_size}) cannot be divided into training.gradient_accumulation_steps "
            f"({training.gradient_accumulation_steps}) equal parts",
        )
    if training.mixed_precision == "fp16" and config.cpu:
        yield "training.mixed_precision", "fp16 needs a GPU: use bf16, or leave cpu out"
    if config.method == "galore" and config.galore.layerwise:
        whole = {
            "training.max_grad_norm": training.max_grad_norm is not None,
            "training.gradient_accumulation_steps": training.gradient_accumulation_steps > 1,
            "training.mixed_precision": training.mixed_precision == "fp16",
        }
        for key, needs_all_gradients in whole.items():
            if needs_all_gradients:
                yield key, "needs all gradients at once, of which galore.layerwise keeps one: leave one of them out"


def _lean(config: RunConfig) -> Iterator[Problem]:
    if config.lean.enabled and config.lean.inplace_norm and config.norm in ("stats", "affine"):
        yield (
            "lean.inplace_norm",
            f"folds frozen BatchNorm, and norm is {config.norm}: set norm to frozen or recalibrate",
        )


def _hub(config: RunConfig) -> Iterator[Problem]:
    if config.hub.repo_id is None:
        return
    if config.method == "none":
        yield "hub.repo_id", "is given and the method none makes nothing to push: leave one of them out"
    if "/" not in config.hub.repo_id:
        yield "hub.repo_id", f"expected owner/name, found {config.hub.repo_id!r}"
    try:
        validate_repo_id(config.hub.repo_id)
    except HFValidationError as error:
        yield "hub.repo_id", str(error)


def _targets(key: str, target: str | list[str]) -> Iterator[Problem]:
    if not isinstance(target, str):
        return
    if re.fullmatch("[a-z]+(-[a-z]+)+", target) and target not in ROLES:
        yield key, f"{target!r} is no role; the roles are {', '.join(ROLES)}"
    try:
        re.compile(target)
    except re.error as error:
        yield key, f"{target!r} is no regular expression: {error}"
