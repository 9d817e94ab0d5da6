"""Adapt the source model to one target. Train one candidate per learning rate, all for the same number of epochs.

The source model is the network that was trained on the source domain. A candidate is a model that `Method.prepare`
returned and that was then trained with one learning rate. The part of a candidate that is saved is called its update.
It is the whole model if `Method.saves_full_model` is True, otherwise an adapter.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from peft import PeftModel
from peft.utils import CONFIG_NAME
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import get_cosine_schedule_with_warmup

from peft_edge.backbones import grow_head, load_backbone, save_backbone, set_class_names
from peft_edge.backbones.heads import as_timm_model, head_layers
from peft_edge.config import RunConfig
from peft_edge.data import Domain, Task
from peft_edge.files import atomic_write, remove
from peft_edge.hub import load_pretrained, save_adapter
from peft_edge.lean import prepare_model_for_lean_training, undo_lean_training
from peft_edge.methods import Method, Options, find_method, training_memory_format
from peft_edge.profiling.memory import ProcessPeak
from peft_edge.records import StepProfile, TrainingCosts
from peft_edge.training.batches import (
    evaluation_batches,
    frozen_prefix,
    open_replay,
    training_batches,
    with_whole_update,
)
from peft_edge.training.evaluation import eval_logits, first_images, predict
from peft_edge.training.loop import DivergedError, train
from peft_edge.training.run_folder import ActiveRun, Progress
from peft_edge.training.source import new_backbone
from peft_edge.tuners.norm import recalibrate

logger = logging.getLogger(__name__)


def check_adaptation(config: RunConfig, task: Task) -> None:
    """Check that the configuration fits the targets and the backbone, before the source model is trained.

    If training on a target takes fewer than 2 * `training.warmup_steps` steps, log a warning that the warm-up will be
    shorter than configured.

    Raises:
        ValueError: If the method or `training.replay` does not fit the backbone. If a target has fewer training images
            than `training.batch_size`. If `Method.prepare` returns no PEFT model, although `Method.saves_full_model` is
            False. The last two errors are not raised for `method="none"`.
    """
    method, settings = find_method(config.method), config.training
    backbone = new_backbone(config, task.source.num_classes)
    fewest_images = min(len(target.train) for target in task.targets)
    if config.method != "none" and fewest_images < settings.batch_size:
        raise ValueError(
            f"training.batch_size is {settings.batch_size}, and there are {fewest_images} images to adapt with: lower "
            "it, or add images (for a corruption of your own images, a quarter of the training images is held out)"
        )
    model = method.prepare(backbone, config.options(method.section))
    if config.method != "none" and not (method.saves_full_model or isinstance(model, PeftModel)):
        raise ValueError(
            f"method: {config.method!r} returns no PEFT model and is not registered with saves_full_model=True, so "
            "there would be nothing to save: return a PEFT model, or register it with saves_full_model=True"
        )
    if settings.replay:
        frozen_prefix(config, model)  # raises a ValueError if replay does not fit the model
    if method.optimizer is None:
        return
    _optimizer(config, model, settings.learning_rate[0])
    steps = settings.epochs * (fewest_images // settings.batch_size)
    if _warmup_steps(config, steps) < settings.warmup_steps:
        logger.warning(
            f"warm-up takes {_warmup_steps(config, steps)} instead of {settings.warmup_steps} steps, because "
            f"{fewest_images} images in batches of {settings.batch_size} make only {steps} steps in {settings.epochs} "
            "epochs. For more steps, lower training.batch_size or raise training.epochs"
        )


def _warmup_steps(config: RunConfig, total_steps: int) -> int:
    return min(config.training.warmup_steps, total_steps // 2)


class TrainedCandidate(BaseModel):
    """The results of training on one target with one learning rate, as stored in `candidate.json` in `folder`."""

    model_config = ConfigDict(frozen=True)

    folder: Path = Field(exclude=True)  # with `logits.safetensors`, `candidate.json`, and either `adapter` or `model`
    learning_rate: float | None  # None if `Method.optimizer` is None
    validation_accuracy: float  # measured after the last optimizer step
    num_trainable_params: int
    train_time: float  # seconds in optimizer steps; if `learning_rate` is None, in estimating BatchNorm statistics
    costs: TrainingCosts
    metrics: list[dict[str, int | float | None]]  # one dict per epoch: loss, accuracy and time
    profile: list[StepProfile]  # the step profiles of all processes; empty if no step was profiled
    replay: dict[str, object] | None  # size and cost of the stored features; None if `training.replay` is False

    @property
    def update(self) -> Path:
        """The folder with the saved adapter or model: `folder / "adapter"` or `folder / "model"`."""
        return next(path for path in (self.folder / "adapter", self.folder / "model") if path.exists())

    @property
    def logits(self) -> Tensor:
        """Logits (B, num_classes) of the trained model for the target's first test images (see `first_images`)."""
        return load_file(self.folder / "logits.safetensors")["logits"]


def sweep(
    run: ActiveRun, target: Domain, source: nn.Module, *, increment: int | None = None, previous: Path | None = None
) -> tuple[list[TrainedCandidate], list[dict[str, object]]]:
    """Train a model (a candidate) for every learning rate of the configuration.

    `source` is the network before adaptation. It does not change. A method without gradients has a single candidate,
    whose learning rate is None. `increment` is the position of `target` among several targets, counted from 1, or None
    if there is only one target. `previous` is the folder of the adapter or model that was saved for the previous
    target, or None for the first target. Candidates that an interrupted run has already finished are read from their
    folders and not trained again.

    Returns:
        The candidates that did not diverge, and one dict for each learning rate. Each dict contains the learning rate.
        It also contains the validation accuracy or, if training diverged, the message of the `DivergedError`. The
        record of the run contains these dicts in `TrainInfo.sweep`.

    Raises:
        DivergedError: If every candidate diverges. The attribute `tried` of the error contains the dicts described
            above.
        OSError: If a checkpoint or a result cannot be written.
    """
    method = find_method(run.config.method)
    rates: Sequence[float | None] = run.config.training.learning_rate if method.optimizer else [None]
    candidates: list[TrainedCandidate] = []
    tried: list[dict[str, object]] = []
    error = None
    for rate in rates:
        entry: dict[str, object] = {"learning_rate": rate, "valid accuracy": None}
        name = f"lr_{rate}" if rate else "statistics"
        if increment is not None:
            entry, name = {"increment": increment, **entry}, f"increment_{increment}/{name}"
        try:
            candidate = _adapt(run, target, source, rate, name, previous)
        except DivergedError as diverged:
            error = diverged
            # Without this call, checkpoints of the next candidate would also contain the objects of this candidate.
            run.accelerator.free_memory()
            if run.accelerator.is_main_process and (candidates or rate != rates[-1]):
                logger.warning("\n%s", diverged)
            tried.append({**entry, "diverged": str(diverged)})
        else:
            candidates.append(candidate)
            tried.append({**entry, "valid accuracy": candidate.validation_accuracy})
    if error is not None and not candidates:
        error.tried = tried
        raise error
    return candidates, tried


def _adapt(
    run: ActiveRun, target: Domain, source: nn.Module, learning_rate: float | None, name: str, previous: Path | None
) -> TrainedCandidate:
    """Train a candidate (a model for one target and one learning rate), save its update, and return its results.

    The update is the adapter or the whole model. `name` is the name of the candidate's folder. If there are checkpoints
    of this candidate, training continues from the newest one. If the candidate's folder already exists, an interrupted
    run has finished this candidate, so its results are read from the folder and nothing is trained.
    """
    config, accelerator = run.config, run.accelerator
    method, folder = find_method(config.method), run.path / "candidates" / name
    if not folder.exists():
        with ProcessPeak() as process:
            trained = _train_candidate(run, target, source, learning_rate, name, previous)
        costs = trained.costs(process.peak_rss_bytes)
        final_accuracy = trained.progress.metrics[-1]["valid accuracy"]
        assert final_accuracy is not None  # `train` always evaluates the last epoch
        if accelerator.is_main_process:
            undo_lean_training(trained.model)
            candidate = TrainedCandidate(
                folder=folder,
                learning_rate=learning_rate,
                validation_accuracy=final_accuracy,
                num_trainable_params=trained.num_trainable_params,
                train_time=trained.progress.train_time,
                costs=costs,
                metrics=trained.progress.metrics,
                profile=trained.profile,
                replay=trained.replay,
            )
            with atomic_write(folder) as unfinished:
                unfinished.mkdir()
                logits = eval_logits(trained.model, first_images(config, source, target))
                save_file({"logits": logits}, unfinished / "logits.safetensors")
                save_update(trained.model, unfinished, saves_full_model=method.saves_full_model)
                (unfinished / "candidate.json").write_text(candidate.model_dump_json(), encoding="utf-8")
            remove(run.path / "checkpoints" / name)
        accelerator.free_memory()
    accelerator.wait_for_everyone()
    return TrainedCandidate(folder=folder, **json.loads((folder / "candidate.json").read_text(encoding="utf-8")))


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """The result of `_train_candidate`, in one process."""

    model: nn.Module
    num_trainable_params: int
    progress: Progress
    profile: list[StepProfile]  # of all processes; empty if no step was profiled
    replay: dict[str, Any] | None  # size and cost of the stored features; None if `training.replay` is False
    statistics_s: float  # seconds of estimating BatchNorm statistics on target images; 0 if not estimated
    statistics_flops: int  # FLOPs of this estimation in this process; 0 if not estimated

    def costs(self, process_peak_bytes: int | None) -> TrainingCosts:
        """Return the costs of this training run. All processes must call this method.

        The argument `process_peak_bytes` is the peak memory of the calling process, or None if it is unknown. In the
        result, `process_peak_bytes` is the maximum over all processes, and `flops` is the sum over all processes. The
        times are those of the calling process, except that `storing_s` is the time of the process that stored the
        features for latent replay. `flops` includes the FLOPs of estimating BatchNorm statistics and of storing
        features. `flops` is None if optimizer steps were taken but none was profiled, or if a step profile has no
        FLOPs.
        """
        progress, step_flops = self.progress, [row.flops for row in self.profile if row.scope == "step"]
        measured = gather_object([(process_peak_bytes, self.statistics_flops)])
        storing_s, flops = 0.0, sum(flops for _, flops in measured)
        if self.replay is not None:
            storing_s, flops = self.replay["fill_s"], flops + self.replay["fill_flops"]
        flops += progress.step * sum(filter(None, step_flops))
        step_s = progress.train_time if progress.step else 0.0
        return TrainingCosts(
            total_s=step_s + progress.loading_time + storing_s + self.statistics_s,
            step_s=step_s,
            loading_s=progress.loading_time,
            storing_s=storing_s,
            statistics_s=self.statistics_s,
            validation_s=progress.validation_time,
            flops=flops if not progress.step or (step_flops and None not in step_flops) else None,
            process_peak_bytes=max((peak for peak, _ in measured if peak is not None), default=None),
        )


def _train_candidate(
    run: ActiveRun, target: Domain, source: nn.Module, learning_rate: float | None, name: str, previous: Path | None
) -> _Trained:
    config, settings, accelerator = run.config, run.config.training, run.accelerator
    set_seed(config.seed)
    model = new_learner(config, find_method(config.method), source, target, previous)
    num_trainable_params = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    batches = training_batches(config, source, target.train, batch_size=settings.batch_size)
    validation = evaluation_batches(config, source, target.validation)

    statistics_s, counter = 0.0, FlopCounterMode(display=False)
    if isinstance(model, PeftModel) and getattr(model.active_peft_config, "norm", None) == "recalibrate":
        started = time.perf_counter()
        loader = accelerator.prepare_data_loader(batches)  # gives each process a part of the images
        with counter:
            recalibrate(model, (batch["pixel_values"] for batch in loader), synchronise=True)
        statistics_s = time.perf_counter() - started
    if config.lean.enabled:
        _make_lean(model, config)
    replay = open_replay(run, model, source, target) if settings.replay else None

    profile: list[StepProfile] = []
    if learning_rate is None:
        started = time.perf_counter()
        loader = accelerator.prepare_data_loader(validation)
        accuracy = predict(model, loader, accelerator, stage="validating").accuracy
        validation_s = time.perf_counter() - started
        epoch = {"step": 0, "train loss": None, "valid accuracy": accuracy, "train time": statistics_s}
        progress = Progress(
            accelerator.num_processes, train_time=statistics_s, validation_time=validation_s, metrics=[epoch]
        )
    else:
        optimizer = _optimizer(config, model, learning_rate)
        trained, batches = (model, batches) if replay is None else (replay.tail, replay.batches)
        total_steps = settings.epochs * len(batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, _warmup_steps(config, total_steps), total_steps)
        prepared = accelerator.prepare(trained, optimizer, schedule, batches, validation)
        evaluated = prepared[0] if replay is None else model
        progress, profile = train(*prepared, evaluated=evaluated, run=run, name=name)
        model = accelerator.unwrap_model(evaluated, keep_fp32_wrapper=False)
        profile = profile if replay is None else with_whole_update(profile, model)
    return _Trained(
        model=model,
        num_trainable_params=num_trainable_params,
        progress=progress,
        profile=profile,
        replay=None if replay is None else replay.info,
        statistics_s=statistics_s,
        statistics_flops=counter.get_total_flops(),
    )


def _make_lean(model: nn.Module, config: RunConfig) -> None:
    options = config.lean.model_dump(exclude={"enabled", "inplace_norm"})
    inplace_norm = config.lean.inplace_norm
    if inplace_norm is None:
        with suppress(ValueError):  # if the model does not run on the meta device, leave out `inplace_norm`
            prepare_model_for_lean_training(model, inplace_norm=True, **options)
            return
    prepare_model_for_lean_training(model, inplace_norm=bool(inplace_norm), **options)


def _optimizer(config: RunConfig, model: nn.Module, learning_rate: float) -> Optimizer:
    method, settings = find_method(config.method), config.training
    assert method.optimizer is not None
    options = config.options(method.section)
    return method.optimizer(model, settings.optimizer, options, lr=learning_rate, weight_decay=settings.weight_decay)


def new_learner(
    config: RunConfig, method: Method, source: nn.Module, target: Domain, previous: Path | None
) -> nn.Module:
    """Return a model for training on `target`.

    The model starts from the adapter or model that is saved in the folder `previous`, or from `source` if `previous` is
    None. `source` does not change. If the method uses gradients and `target` has more classes than the model, the head
    gets rows for the new classes. In this case, the head rows of earlier classes are frozen if `data.rehearsal_size`
    is 0.

    Raises:
        ValueError: If the method does not fit the model.
    """
    options = config.options(method.section)
    if previous is None:
        model = method.prepare(copy.deepcopy(source), options)
    else:
        model = continue_update(previous, source, method, options)
    model = model.to(memory_format=training_memory_format(model))
    base = model.get_base_model() if isinstance(model, PeftModel) else as_timm_model(model)
    known = base.num_classes
    if method.optimizer is not None and target.num_classes > known:
        grow_head(model, target.num_classes)
        set_class_names(base, target.class_names)
        if not config.data.rehearsal_size:
            # Freeze the head rows of earlier classes, because training without images of these classes would degrade
            # the rows.
            for parameter in (p for _, layer in head_layers(base) for p in layer.parameters() if p.requires_grad):
                parameter.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:known]), grad[known:]]))
    return model


def continue_update(folder: Path, source: nn.Module, method: Method, options: Options) -> nn.Module:
    """Return a trainable model that starts from the adapter or model saved in `folder`. `source` does not change.

    If `folder` contains an adapter, `Method.prepare` is called on a copy of `source`, and the weights of the adapter
    are loaded into the model that `Method.prepare` returns. If `folder` contains a whole model, `Method.prepare` is
    called on this model.
    """
    updated = load_update(folder, next(source.parameters()).device)
    if not isinstance(updated, PeftModel):
        return method.prepare(updated, options)
    base = copy.deepcopy(source)
    grow_head(base, updated.get_base_model().num_classes)
    model = method.prepare(base, options)
    assert isinstance(model, PeftModel)
    model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    return model


def save_update(model: nn.Module, folder: Path, *, saves_full_model: bool) -> None:
    """Write the adapter of `model` to `folder/adapter` or, if `saves_full_model`, the whole model to `folder/model`.

    If `saves_full_model` is True and `model` is a PEFT model, its adapter is first merged in place.
    """
    if saves_full_model:
        save_backbone(model.merge_and_unload() if isinstance(model, PeftModel) else model, folder / "model")
    else:
        save_adapter(model, folder / "adapter")


def load_update(folder: Path, device: torch.device) -> nn.Module:
    """Load the adapted model from `folder`, and return it on `device`.

    `folder` is the folder `adapter` or the folder `model` that `save_update` wrote.
    """
    model = load_pretrained(folder) if (folder / CONFIG_NAME).exists() else load_backbone(str(folder))
    return model.to(device).to(memory_format=training_memory_format(model))


def merged_copy(model: nn.Module) -> nn.Module | None:
    """Return a copy of `model` with the adapter merged. If `model` is not a PEFT model, return `model` itself.

    Return None if the adapter cannot be merged. Examples are a non-linear adapter, and PEFT's LoRA of a grouped
    convolution.
    """
    if not isinstance(model, PeftModel):
        return model
    with suppress(NotImplementedError):  # PEFT raises this error for adapters that it cannot merge
        return copy.deepcopy(model).merge_and_unload(safe_merge=True)
    return None
