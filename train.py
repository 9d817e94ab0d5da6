"""Adapts an edge CNN to images that have shifted, and shows what was gained, what was lost and what it cost.

    accelerate launch train.py --config configs/quickstart.yaml
    python train.py --config configs/quickstart.yaml method=dora adapter.r=8 --output_dir runs/dora

Every key of the configuration can be given as `key=value` or `--key value`. A run that was interrupted and is started
again goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from peft_edge import training
from peft_edge.config import describe_keys, load_config
from peft_edge.data import load_task
from peft_edge.methods import METHODS


def main(arguments: Sequence[str]) -> None:
    """Makes or finds the source model, adapts it, tests what was saved, and prints one table."""
    started = time.time()
    config = load_config(arguments, choices={"method": METHODS})
    accelerator = training.start(config)
    run = training.open_run(config, accelerator)
    if run.record is not None:
        accelerator.print(f"{run.path} holds this run, finished:\n\n{training.table(run.record)}")
        return

    with training.failure_recorded(config, run, started):
        # Data: a source, a target, and what shifted between them.
        task = load_task(**config.data.model_dump(), seed=config.seed)
        training.check_adaptation(config, task)

        # The source model: trained once, then shared by every run that asks for the same one.
        source = training.source_model(config, task, accelerator.device)
        before = after = training.test_accuracies(source, config, task, accelerator)

        # Adaptation: every learning rate gets the same budget, and the target's validation split chooses.
        training.start_trackers(config, accelerator)
        learning_rates = [] if config.method == "none" else config.training.learning_rate
        candidates = [training.adapt(config, task, source, rate, accelerator, run.path) for rate in learning_rates]
        best = max(candidates, key=lambda candidate: candidate.validation_accuracy, default=None)

        # What users get is what was saved, so that is what is tested.
        update, checks = None, {}
        if best is not None:
            reloaded = training.load_update(best.update, accelerator.device)
            checks = training.check_saved(reloaded, training.first_images(config, source, task), best.logits)
            after = training.test_accuracies(reloaded, config, task, accelerator)
            update = run.publish(best.update)

        record = training.build_record(
            config,
            task,
            source,
            started=started,
            total_time=None if run.is_resumed else time.time() - started,
            before=before,
            after=after,
            candidates=candidates,
            best=best,
            update=update,
            checks=checks,
        )
        run.write_record(record)
    accelerator.print(f"\n{training.table(record)}\n\nEverything is in {run.path}.")
    accelerator.end_training()


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{describe_keys()}")
        sys.exit()
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        # Wrong input and full disks: the message says what to do, and record.json holds the traceback.
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
