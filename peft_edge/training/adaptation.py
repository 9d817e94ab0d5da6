"""The adaptation stage: one candidate for each learning rate, all with the same budget."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import get_cosine_schedule_with_warmup

from peft_edge.config import RunConfig
from peft_edge.data import Task
from peft_edge.files import remove, written_whole
from peft_edge.methods import prepare_model
from peft_edge.records import StepProfile
from peft_edge.training.evaluation import first_images, logits, save_update
from peft_edge.training.images import evaluation_batches, training_batches
from peft_edge.training.loop import train
from peft_edge.training.source import new_backbone
from peft_edge.tuners.conv_lora import restat


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A finished training, as it lies on the disk."""

    folder: Path
    """Holds the update, the trained model's logits and these figures."""

    learning_rate: float
    """The highest of the schedule."""

    validation_accuracy: float
    """On the target's validation split, after the last step."""

    num_trainable_params: int
    """Parameters that were trained."""

    train_time: float
    """Seconds of optimizer steps, evaluation excluded."""

    metrics: list[dict[str, Any]]
    """One entry an epoch."""

    profile: list[StepProfile]
    """What a step cost, for each process and each LoRA rank."""

    @property
    def update(self) -> Path:
        """The folder of the adapter, or of the model where the method has no adapter."""
        return next(path for path in (self.folder / "adapter", self.folder / "model") if path.exists())

    @property
    def logits(self) -> Tensor:
        """What the trained model answered to `first_images`."""
        return load_file(self.folder / "logits.safetensors")["logits"]


def check_adaptation(config: RunConfig, task: Task) -> None:
    """Tries what the adaptation needs, so that a mistake shows before the source model is trained.

    Raises:
        ValueError: The adapter does not fit the backbone, there are fewer images than one batch, or the warm-up takes
            all the steps.
    """
    model = prepare_model(new_backbone(config, task.num_classes), config.method, config.adapter.model_dump())
    settings = config.training
    batches = training_batches(config, model, task.target.train, batch_size=settings.batch_size)
    steps, images = settings.epochs * len(batches), len(task.target.train)
    if config.method != "none" and settings.warmup_steps >= steps:
        raise ValueError(
            f"training.warmup_steps: {settings.warmup_steps} take all of the {steps} steps that {images} images in "
            f"batches of {settings.batch_size} make in {settings.epochs} epochs: lower training.warmup_steps or "
            "training.batch_size, or raise training.epochs"
        )


def adapt(
    config: RunConfig, task: Task, source: nn.Module, learning_rate: float, accelerator: Accelerator, run: Path
) -> Candidate:
    """Trains one candidate, from its last checkpoint if it has one; one that is finished is only read.

    Args:
        config: The run's configuration; its own list of learning rates is not looked at.
        task: Whose target is adapted to.
        source: The source model, on the accelerator's device; left as it is.
        learning_rate: The highest of the schedule.
        accelerator: The run's.
        run: The run's folder.

    Raises:
        ValueError: The adapter does not fit the backbone.
        OSError: A checkpoint or the result cannot be written.
    """
    name = f"lr_{learning_rate}"
    folder = run / "candidates" / name
    if not folder.exists():
        set_seed(config.seed)
        model = prepare_model(copy.deepcopy(source), config.method, config.adapter.model_dump())
        num_trainable_params = sum(parameter.numel() for parameter in _trainable(model))
        settings = config.training
        batches = training_batches(config, source, task.target.train, batch_size=settings.batch_size)
        validation = evaluation_batches(config, source, task.target.validation)
        if isinstance(model, PeftModel) and config.adapter.norm == "restat":
            restat(model, (batch["pixel_values"].to(accelerator.device) for batch in batches))
        optimizer = AdamW(_trainable(model), lr=learning_rate, weight_decay=settings.weight_decay)
        total_steps = settings.epochs * len(batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, total_steps)
        prepared = accelerator.prepare(model, optimizer, schedule, batches, validation)
        progress, profile = train(*prepared, config=config, accelerator=accelerator, run=run, name=name)
        figures = {
            "learning_rate": learning_rate,
            "validation_accuracy": progress.metrics[-1]["valid accuracy"],
            "num_trainable_params": num_trainable_params,
            "train_time": progress.train_time,
            "metrics": progress.metrics,
            "profile": [asdict(row) for row in profile],
        }
        if accelerator.is_main_process:
            trained = accelerator.unwrap_model(prepared[0], keep_fp32_wrapper=False)
            _save(trained, first_images(config, source, task), figures, folder)
            remove(run / "checkpoints" / name)
        accelerator.free_memory()
    accelerator.wait_for_everyone()
    figures = json.loads((folder / "candidate.json").read_text(encoding="utf-8"))
    profile = [StepProfile(**row) for row in figures.pop("profile", [])]
    return Candidate(folder=folder, profile=profile, **figures)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _save(model: nn.Module, images: Tensor, figures: dict[str, Any], folder: Path) -> None:
    with written_whole(folder) as unfinished:
        unfinished.mkdir()
        save_update(model, unfinished / ("adapter" if isinstance(model, PeftModel) else "model"))
        save_file({"logits": logits(model, images)}, unfinished / "logits.safetensors")
        (unfinished / "candidate.json").write_text(json.dumps(figures), encoding="utf-8")
