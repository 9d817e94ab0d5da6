"""Adapts an edge CNN to images that have shifted or to new classes; shows what was gained, what was lost, at what cost.

    accelerate launch train.py --config configs/quickstart.yaml
    python train.py --config configs/quickstart.yaml method=dora adapter.r=8 --output_dir runs/dora

Every key of the configuration can be given as `key=value` or `--key value`; of several files, the later ones override
the earlier. A run that was interrupted and is started again goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from peft_edge import training
from peft_edge.config import describe_keys, load_config
from peft_edge.methods import CHOICES


def main(arguments: Sequence[str]) -> None:
    """Runs what the configuration says, and prints what came of it."""
    config = load_config(arguments, choices=CHOICES)
    record = training.run(config)
    if is_main_process():
        print(f"\n{training.table(record)}\n\nEverything is in {config.output_dir}.")


def is_main_process() -> bool:
    """Whether this process speaks for all of them."""
    return int(os.environ.get("RANK", "0")) == 0


def command() -> None:
    """Runs with the arguments of this process, and ends it with one message where they are wrong."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{describe_keys()}")
        sys.exit()
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        # Wrong input and full disks: the message says what to do, and record.json holds the traceback.
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command()
