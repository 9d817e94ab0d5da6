"""Load batches of images that are preprocessed for a backbone, and batches of stored features for latent replay.

Latent replay stores the outputs of the frozen first layers once, and trains the later layers on the stored outputs.
"""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass
from typing import cast

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader

from peft_edge.backbones import set_preprocessing
from peft_edge.config import RunConfig
from peft_edge.data import Domain, Task, build_loader, build_transform, load_batches
from peft_edge.data.loader import Augmentation, EpochSampler, has_larger_image, typical_size
from peft_edge.data.task import EMBEDDED
from peft_edge.lean.feature_cache import FeatureCache, FrozenPrefix
from peft_edge.records import StepProfile
from peft_edge.training.run_folder import ActiveRun, cache_folder, cache_key

PHOTOGRAPH_SIZE = 128
"""Images are treated as photographs if their median width and their median height are at least this number of pixels.

The images of the built-in datasets `digits` and `shapes` are never treated as photographs.
"""


def training_batches(config: RunConfig, backbone: nn.Module, images: Dataset, *, batch_size: int) -> DataLoader:
    """Return shuffled batches of augmented images, without an incomplete last batch.

    `batch_size` counts the images of all processes.
    """
    return _batches(config, backbone, images, train=True, shuffle=True, batch_size=batch_size)


def evaluation_batches(config: RunConfig, backbone: nn.Module, images: Dataset) -> DataLoader:
    """Return all images in order and without augmentation, in batches of `training.eval_batch_size`."""
    return _batches(config, backbone, images, train=False, shuffle=False, batch_size=config.training.eval_batch_size)


def _batches(
    config: RunConfig, backbone: nn.Module, images: Dataset, *, train: bool, shuffle: bool, batch_size: int
) -> DataLoader:
    augment = augmentation_of(config, images) if train else "none"
    transform = build_transform(timm_config(config, backbone), train=train, augment=augment)
    workers = _num_workers(config, images)
    return build_loader(
        images, transform, batch_size=batch_size, shuffle=shuffle, seed=config.seed, num_workers=workers
    )


def augmentation_of(config: RunConfig, images: Dataset) -> Augmentation:
    """Return the augmentation that `data.augment` names. If `data.augment` is `auto`, choose `photo` or `shift`.

    With `auto`, the result is `photo` if the images are photographs (see `PHOTOGRAPH_SIZE`), otherwise `shift`.
    """
    if config.data.augment != "auto":
        return config.data.augment
    return "photo" if _are_photographs(config, images) else "shift"


def _are_photographs(config: RunConfig, images: Dataset) -> bool:
    return config.data.name not in EMBEDDED and min(typical_size(images)) >= PHOTOGRAPH_SIZE


def _num_workers(config: RunConfig, images: Dataset) -> int:
    """Return the number of worker processes: `config.num_workers` or, if this is None, a default from 0 to 4.

    The default is the number of CPU cores for this process minus `config.num_threads`, at least 0 and at most 4. In
    each of the following cases, the default is 0:

    - The images are not photographs (see `PHOTOGRAPH_SIZE`). Decoding small images takes little time.
    - This process is a child process of a study. The study uses the other cores for other runs.
    - Processes do not start by fork. Each worker process would first have to import torch.
    - The number of cores is unknown.
    """
    if config.num_workers is not None:
        return config.num_workers
    is_in_study = multiprocessing.parent_process() is not None
    if is_in_study or multiprocessing.get_start_method() != "fork" or not hasattr(os, "sched_getaffinity"):
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = min(4, cores - config.num_threads)
    return free if free > 0 and _are_photographs(config, images) else 0


def augmentation_key(config: RunConfig, images: Dataset) -> dict[str, object]:
    """Return the part of a cache key that identifies the augmentation. For the augmentation `shift`, return {}.

    Earlier versions had only the augmentation `shift`, and their cache keys did not contain it. Because `shift` still
    adds nothing to the key, the cache entries of these versions remain valid.
    """
    augment = augmentation_of(config, images)
    return {} if augment == "shift" else {"augment": augment}


def timm_config(config: RunConfig, backbone: nn.Module) -> dict[str, object]:
    """Return timm's data configuration of the backbone, with `data.image_size` as the height and width."""
    size = config.data.image_size
    return {**resolve_model_data_config(backbone), "input_size": (3, size, size)}


def set_run_preprocessing(config: RunConfig, backbone: nn.Module, task: Task) -> None:
    """Set `pretrained_cfg` of the backbone, in place, to the preprocessing with which the run tests models.

    Adapters and models are saved with this preprocessing, so that timm's `create_transform` prepares further images in
    the same way. If no test image is both higher and wider than the input, `build_transform` resizes the test images
    without a crop. In this case, the crop mode is set to `squash`. With another crop mode, timm would enlarge and crop
    even an image that already has the size of the input.
    """
    size = config.data.image_size
    set_preprocessing(backbone, image_size=size)
    if not any(has_larger_image(domain.test, size) for domain in (task.source, *task.targets)):
        set_preprocessing(backbone, crop_mode="squash", crop_pct=1.0)


def set_epoch(batches: DataLoader, epoch: int) -> None:
    """Set the epoch, which determines the order of the images and their augmentation.

    `batches` must be a plain `DataLoader`. If Accelerate has prepared a loader, call the loader's method `set_epoch`
    instead.
    """
    cast(EpochSampler, batches.sampler).set_epoch(epoch)


@dataclass(frozen=True)
class Replay:
    """The trainable part of a model (the tail), and batches of stored features that are the inputs of the tail.

    The features are the outputs of the frozen layers before the tail.
    """

    tail: nn.Module  # maps stored features to logits; shares its modules with the model
    batches: DataLoader  # stored features under the key `pixel_values`, and `labels`
    info: dict[str, object]  # `FeatureCache.info`: number, size and dtype of the features, and the cost of storing


def frozen_prefix(config: RunConfig, model: nn.Module) -> FrozenPrefix:
    """Return the frozen layers of `model` before its first trainable layer.

    Raises:
        ValueError: If the model has no trainable layer, or no frozen layer before the first trainable layer. If
            training mode changes the outputs or the buffers of the frozen layers. If the model cannot be split, because
            later layers need more than one output of the frozen layers.
    """
    size, generator = config.data.image_size, torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, size, size, generator=generator).to(next(model.parameters()).device)
    try:
        return FrozenPrefix(model, images)
    except ValueError as error:
        raise ValueError(f"training.replay: {error}") from error


def open_replay(run: ActiveRun, model: nn.Module, source: nn.Module, target: Domain) -> Replay:
    """Prepare latent replay: store the outputs of the frozen first layers for the training images of `target`.

    The frozen first layers are the layers of `model` before its first trainable layer. If an earlier run has stored the
    same outputs, these outputs are reused. The images are preprocessed for the source model `source`. If the
    configuration key `norm` is `recalibrate`, the caller must call `recalibrate` on `model` before this function.

    Raises:
        ValueError: If `frozen_prefix` raises a ValueError. If an output is not finite, or too large for
            `training.replay_dtype`.
        OSError: If the outputs cannot be written, for example because the disk is full.
    """
    config, settings, accelerator = run.config, run.config.training, run.accelerator
    loader = _batches(config, source, target.train, train=True, shuffle=False, batch_size=settings.eval_batch_size)

    def view(number: int) -> DataLoader:
        set_epoch(loader, number)
        return loader

    key = cache_key(
        config,
        accelerator.device.type,
        images=target.fingerprint,
        transform=timm_config(config, source),
        **augmentation_key(config, target.train),
        mixed_precision=settings.mixed_precision,
    )
    with accelerator.autocast():
        prefix = frozen_prefix(config, model)
        root, views, dtype = cache_folder(config) / "features", settings.replay_views, settings.replay_dtype
        cache = FeatureCache.open(root, prefix, view, key=key, views=views, dtype=dtype)
    batches = load_batches(
        cache, batch_size=settings.batch_size, shuffle=True, seed=config.seed, num_workers=config.num_workers or 0
    )
    return Replay(prefix.tail, batches, cache.info)


def with_whole_update(profile: list[StepProfile], model: nn.Module) -> list[StepProfile]:
    """Return a copy of `profile` in which `adapter_bytes` is the size of the whole adapter of `model`.

    `profile` was measured on `Replay.tail`, the part of `model` after the frozen layers. The saved adapter also
    contains BatchNorm statistics of the frozen layers, so `adapter_bytes` in `profile` is too small. Only the profiles
    of scope `step` are corrected. If `model` is not a PEFT model, return `profile` unchanged.
    """
    if not isinstance(model, PeftModel):
        return profile
    # Without `save_embedding_layers=False`, PEFT asks the Hub for the size of the base model's vocabulary.
    saved = get_peft_model_state_dict(model, save_embedding_layers=False).values()
    whole = {"adapter_bytes": sum(tensor.nbytes for tensor in saved)}
    return [StepProfile(**{**vars(row), **whole}) if row.scope == "step" else row for row in profile]
