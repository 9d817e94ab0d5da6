"""Updates on the disk: an adapter, or the whole model where the method trains the model's own weights.

The model that learns: a copy of the source model, as a method prepares it, with rows for the classes to come.

The adaptation to one target domain: a candidate for each learning rate, all with the same budget.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from peft_edge.backbones import grow_head, load_backbone, save_backbone, set_class_names
from peft_edge.backbones.heads import head_layers
from peft_edge.config import RunConfig
from peft_edge.data import Domain, Task
from peft_edge.files import atomic_write, remove
from peft_edge.hub import load_pretrained, save_adapter
from peft_edge.lean import prepare_model_for_lean_training, undo_lean_training
from peft_edge.methods import Method, Options, find_method, memory_format
from peft_edge.records import StepProfile
from peft_edge.training.batches import (
    check_replay,
    evaluation_batches,
    open_replay,
    training_batches,
    with_whole_update,
)
from peft_edge.training.evaluation import first_images, logits, predict
from peft_edge.training.loop import DivergedError, train
from peft_edge.training.run_folder import Progress
from peft_edge.training.source import new_backbone
from peft_edge.tuners.norm import recalibrate


def save_update(model: Any, folder: Path, *, saves_full_model: bool) -> None:
    """Writes the update to `folder/adapter`, or the merged model to `folder/model`.

    Args:
        model: From `Method.prepare`, and trained; it is not to be used any more.
        folder: Where to.
        saves_full_model: See `Method`.
    """
    if saves_full_model:
        save_backbone(model.merge_and_unload() if isinstance(model, PeftModel) else model, folder / "model")
    else:
        save_adapter(model, folder / "adapter")


def load_update(folder: Path, device: torch.device) -> nn.Module:
    """Loads what `save_update` wrote into a fresh model.

    Args:
        folder: That of the adapter or of the model.
        device: Where to.
    """
    model = load_pretrained(folder) if (folder / CONFIG_NAME).exists() else load_backbone(str(folder))
    return model.to(device).to(memory_format=memory_format(model))


def merged_copy(model: nn.Module) -> nn.Module | None:
    """Returns a copy of what `load_update` gave, with its adapter merged; None where that is impossible.

    A non-linear adapter never merges, PEFT's own LoRA not where there are groups.
    """
    if not isinstance(model, PeftModel):
        return model
    with suppress(NotImplementedError):
        return copy.deepcopy(model).merge_and_unload(safe_merge=True)
    return None


def continue_update(folder: Path, source: nn.Module, method: Method, options: Options) -> Any:
    """Prepares a model that starts from a saved update, to be trained on.

    Args:
        folder: That of the adapter or of the model.
        source: The source model that the adapter belongs to; left as it is.
        method: The update's method.
        options: Its options.
    """
    updated: Any = load_update(folder, next(source.parameters()).device)
    if method.saves_full_model:
        return method.prepare(updated, options)
    base = copy.deepcopy(source)
    grow_head(base, updated.get_base_model().num_classes)
    model: Any = method.prepare(base, options)
    model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    return model


def new_learner(config: RunConfig, method: Method, source: nn.Module, target: Domain, previous: Path | None) -> Any:
    """Prepares a model for the training on one target.

    Args:
        config: The run's configuration.
        method: Its method.
        source: The source model; left as it is.
        target: The domain to adapt to. If it has more classes, the head grows, except where nothing trains it.
        previous: The update that adapted the source to the target before this one, which is trained on; None at first.

    Raises:
        ValueError: The method does not fit the model.
    """
    options = config.options(method.section)
    model: Any
    if previous is None:
        model = method.prepare(copy.deepcopy(source), options)
    else:
        model = continue_update(previous, source, method, options)
    model = model.to(memory_format=memory_format(model))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = base.num_classes
    if method.optimizer is not None and target.num_classes > known:
        grow_head(model, target.num_classes)
        set_class_names(base, target.class_names)
        if not config.data.rehearsal_size:
            _freeze_rows(base, known)
    return model


def make_lean(config: RunConfig, model: nn.Module) -> None:
    """Lets the model's frozen layers keep less for the backward pass, if the configuration says so."""
    if config.lean.enabled:
        prepare_model_for_lean_training(model, **config.lean.model_dump(exclude={"enabled"}))


def _freeze_rows(model: nn.Module, count: int) -> None:
    """Keeps the first rows of the head as they are: without images of their classes they would only be unlearned."""

    def without_first_rows(gradient: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(gradient[:count]), gradient[count:]])

    for _, layer in head_layers(model):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.register_hook(without_first_rows)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A finished training, as it lies on the disk."""

    folder: Path
    """Holds the update, the trained model's logits and these figures."""

    learning_rate: float | None
    """The highest of the schedule; None for a method that trains nothing by gradients."""

    validation_accuracy: float
    """On the target's validation split, after the last step."""

    num_trainable_params: int
    """Parameters that were trained."""

    train_time: float
    """Seconds of optimizer steps, or of estimating statistics; evaluation excluded."""

    metrics: list[dict[str, Any]]
    """One entry an epoch."""

    profile: list[StepProfile]
    """What a step cost, for each process and each LoRA rank."""

    replay: dict[str, Any] | None
    """What was stored of the images, see `FeatureCache`; None where the images themselves were trained on."""

    @property
    def update(self) -> Path:
        """The folder of the adapter, or of the model where the method trains the model's own weights."""
        return next(path for path in (self.folder / "adapter", self.folder / "model") if path.exists())

    @property
    def logits(self) -> Tensor:
        """What the trained model answered to `first_images`."""
        return load_file(self.folder / "logits.safetensors")["logits"]


def check_adaptation(config: RunConfig, task: Task) -> None:
    """Tries what the adaptation needs, so that a mistake shows before the source model is trained.

    Raises:
        ValueError: The method does not fit the backbone, there are fewer images than one batch, or the warm-up takes
            all the steps.
    """
    method, settings = find_method(config.method), config.training
    backbone = new_backbone(config, task.source.num_classes)
    fewest_images = min(len(target.train) for target in task.targets)
    if method.optimizer is not None and fewest_images < settings.batch_size:
        raise ValueError(
            f"training.batch_size is {settings.batch_size}, and there are {fewest_images} images to adapt with: lower "
            "it, or add images (for a corruption of your own images, a quarter of the training images is kept apart)"
        )
    batches = [
        training_batches(config, backbone, target.train, batch_size=settings.batch_size) for target in task.targets
    ]
    model = method.prepare(backbone, config.options(method.section))
    if config.method != "none" and not (method.saves_full_model or isinstance(model, PeftModel)):
        raise ValueError(
            f"method: {config.method!r} makes no PEFT model, and is not registered with saves_full_model=True: without one "
            "or the other, there is nothing to save"
        )
    if settings.replay:
        check_replay(config, model)
    if method.optimizer is None:
        return
    _optimizer(method, config, model, settings.learning_rate[0])
    fewest = min(batches, key=len)
    steps = settings.epochs * len(fewest)
    if settings.warmup_steps >= steps:
        raise ValueError(
            f"training.warmup_steps: {settings.warmup_steps} take all of the {steps} steps that "
            f"{len(fewest.dataset)} images in batches of {settings.batch_size} make in {settings.epochs} epochs: lower "  # type: ignore[arg-type]
            "training.warmup_steps or training.batch_size, or raise training.epochs"
        )


def sweep(
    config: RunConfig,
    target: Domain,
    source: nn.Module,
    accelerator: Accelerator,
    run: Path,
    *,
    increment: int | None = None,
    previous: Path | None = None,
) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """Trains a candidate for every learning rate of the configuration.

    Args:
        config: The run's configuration.
        target: The domain to adapt to.
        source: The source model, on the accelerator's device; left as it is.
        accelerator: The run's.
        run: The run's folder.
        increment: Which of several targets this is, counted from 1; None for the only one.
        previous: The update that adapted the source to the target before this one.

    Returns:
        The candidates that did not diverge, and what was tried: learning rate and validation accuracy of each.

    Raises:
        DivergedError: Every candidate has diverged.
        OSError: A checkpoint or a result cannot be written.
    """
    method = find_method(config.method)
    rates: Sequence[float | None] = config.training.learning_rate if method.optimizer else [None]
    place = {} if increment is None else {"increment": increment}
    candidates: list[Candidate] = []
    tried: list[dict[str, Any]] = []
    error = None
    for rate in rates:
        entry: dict[str, Any] = {**place, "learning_rate": rate, "valid accuracy": None}
        name = "/".join([*(f"increment_{number}" for number in place.values()), f"lr_{rate}" if rate else "statistics"])
        try:
            candidate = _adapt(config, method, target, source, rate, accelerator, run, name, previous)
        except DivergedError as diverged:
            error = diverged
            # The next candidate's checkpoints must not hold this one.
            accelerator.free_memory()
            if candidates or rate != rates[-1]:
                # Else it is the error that ends all of this.
                accelerator.print(f"\n{diverged}")
            tried.append({**entry, "diverged": str(diverged)})
        else:
            candidates.append(candidate)
            tried.append({**entry, "valid accuracy": candidate.validation_accuracy})
    if error is not None and not candidates:
        error.tried = tried
        raise error
    return candidates, tried


def _adapt(
    config: RunConfig,
    method: Method,
    target: Domain,
    source: nn.Module,
    learning_rate: float | None,
    accelerator: Accelerator,
    run: Path,
    name: str,
    previous: Path | None,
) -> Candidate:
    """Trains one candidate, from its last checkpoint if it has one; one that is finished is only read."""
    folder = run / "candidates" / name
    if not folder.exists():
        set_seed(config.seed)
        model = new_learner(config, method, source, target, previous)
        num_trainable_params = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        batches = training_batches(config, source, target.train, batch_size=config.training.batch_size)
        validation = evaluation_batches(config, source, target.validation)
        started = time.perf_counter()
        if _estimates_statistics(model):
            recalibrate(model, (batch["pixel_values"] for batch in accelerator.prepare_data_loader(batches)))
        seconds = time.perf_counter() - started
        make_lean(config, model)
        replay = open_replay(config, model, source, target, accelerator) if config.training.replay else None
        trained = model if replay is None else replay.tail
        profile: list[StepProfile] = []
        if learning_rate is None:
            progress = _untrained(accelerator, model, validation, seconds)
        else:
            optimizer = _optimizer(method, config, model, learning_rate)
            batches = batches if replay is None else replay.batches
            total_steps = config.training.epochs * len(batches)
            schedule = get_cosine_schedule_with_warmup(optimizer, config.training.warmup_steps, total_steps)
            prepared = accelerator.prepare(trained, optimizer, schedule, batches, validation)
            evaluated = prepared[0] if replay is None else model
            progress, profile = train(
                *prepared, evaluated=evaluated, config=config, accelerator=accelerator, run=run, name=name
            )
            model = accelerator.unwrap_model(evaluated, keep_fp32_wrapper=False)
            profile = profile if replay is None else with_whole_update(profile, model)
        figures = {
            "learning_rate": learning_rate,
            "validation_accuracy": progress.metrics[-1]["valid accuracy"],
            "num_trainable_params": num_trainable_params,
            "train_time": progress.train_time,
            "metrics": progress.metrics,
            "profile": [row.model_dump() for row in profile],
            "replay": None if replay is None else replay.info,
        }
        if accelerator.is_main_process:
            undo_lean_training(model)
            _save(method, model, first_images(config, source, target), figures, folder)
            remove(run / "checkpoints" / name)
        accelerator.free_memory()
    accelerator.wait_for_everyone()
    figures = json.loads((folder / "candidate.json").read_text(encoding="utf-8"))
    profile = [StepProfile(**row) for row in figures.pop("profile")]
    return Candidate(folder=folder, profile=profile, **figures)


def _optimizer(method: Method, config: RunConfig, model: nn.Module, learning_rate: float) -> Any:
    assert method.optimizer is not None
    return method.optimizer(
        model,
        config.training.optimizer,
        config.options(method.section),
        lr=learning_rate,
        weight_decay=config.training.weight_decay,
    )


def _estimates_statistics(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and getattr(model.active_peft_config, "norm", None) == "recalibrate"


def _untrained(accelerator: Accelerator, model: nn.Module, validation: DataLoader, seconds: float) -> Progress:
    valid_accuracy = predict(model, accelerator.prepare_data_loader(validation), accelerator).accuracy
    figures = {"step": 0, "train loss": None, "valid accuracy": valid_accuracy, "train time": seconds}
    return Progress(accelerator.num_processes, train_time=seconds, metrics=[figures])


def _save(method: Method, model: nn.Module, images: Tensor, figures: dict[str, Any], folder: Path) -> None:
    with atomic_write(folder) as unfinished:
        unfinished.mkdir()
        save_file({"logits": logits(model, images)}, unfinished / "logits.safetensors")
        save_update(model, unfinished, saves_full_model=method.saves_full_model)
        (unfinished / "candidate.json").write_text(json.dumps(figures), encoding="utf-8")
