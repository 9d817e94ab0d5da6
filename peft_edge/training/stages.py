"""A whole run, stage by stage: from a configuration to an update and a record."""

from __future__ import annotations

import time

from accelerate import Accelerator

from peft_edge.config import RunConfig
from peft_edge.data import load_task
from peft_edge.records import Record
from peft_edge.training.adaptation import check_adaptation, sweep
from peft_edge.training.changes import kernel_changes
from peft_edge.training.evaluation import answers_on_tests, check_saved, first_images
from peft_edge.training.launch import start, start_trackers
from peft_edge.training.publishing import push_run
from peft_edge.training.run_folder import claimed, open_run
from peft_edge.training.source import source_model
from peft_edge.training.summary import build_record, failure_recorded
from peft_edge.training.updates import load_update, merged_copy


def run(config: RunConfig) -> Record:
    """Makes or finds the source model, adapts it, and tests what was saved.

    `config.output_dir` then holds the update and the record, and with `hub.repo_id` the Hub does too. A run that was
    interrupted goes on from its last checkpoint, and one that is finished is only read.

    Args:
        config: From `load_config`.

    Raises:
        ValueError: The configuration does not fit the data or the network; the message says what to change.
        DivergedError: Training diverged at every learning rate.
        OSError: A file cannot be read or written.
    """
    accelerator = start(config)
    with claimed(config, accelerator):
        return _run(config, accelerator)


def _run(config: RunConfig, accelerator: Accelerator) -> Record:
    started, clock = time.time(), time.perf_counter()
    folder = open_run(config, accelerator)
    if (finished := folder.record) is not None:
        accelerator.print(f"{folder.path} holds this run, finished:")
        push_run(config, folder)
        return finished

    with failure_recorded(config, folder, started):
        # Data: a source, what the model must learn, and what changed between them.
        task = load_task(**config.data.model_dump(), seed=config.seed)
        check_adaptation(config, task)

        # The source model: trained once, then shared by every run that asks for the same one.
        source = source_model(config, task, accelerator.device)
        answers = [answers_on_tests(source, config, task, accelerator)]

        # Adaptation: every learning rate gets the same budget, and the target's validation split chooses.
        start_trackers(config, accelerator)
        chosen, tried, checks, changes, update = [], [], {}, {}, None
        for number, target in enumerate(task.targets if config.method != "none" else (), start=1):
            increment = number if len(task.targets) > 1 else None
            candidates, entries = sweep(
                config, target, source, accelerator, folder.path, increment=increment, previous=update
            )
            best = max(candidates, key=lambda candidate: candidate.validation_accuracy)
            chosen.append(best)
            tried += entries

            # What users get is what was saved, so that is what is tested.
            update = best.update
            reloaded = load_update(update, accelerator.device)
            merged = merged_copy(reloaded)
            checks = check_saved(reloaded, merged, first_images(config, source, target), best.logits)
            changes = {} if merged is None else kernel_changes(source, merged)
            answers.append(answers_on_tests(reloaded, config, task, accelerator))

        record = build_record(
            config,
            task,
            source,
            started=started,
            # The time of the day may jump.
            total_time=None if folder.is_resumed else time.perf_counter() - clock,
            answers=answers,
            chosen=chosen,
            tried=tried,
            update=folder.publish(update) if update is not None else None,
            checks=checks,
            changes=changes,
        )
        folder.write_record(record)
    push_run(config, folder)
    accelerator.end_training()
    return record
