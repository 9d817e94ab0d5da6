"""Adapt an edge CNN to images that have shifted or to new classes, and show what was gained, lost and spent.

    accelerate launch train.py --config configs/quickstart.yaml
    python train.py --config configs/quickstart.yaml method=dora adapter.r=8 --output_dir runs/dora

Set any key of the configuration as `key=value` or `--key value`. Given several files, a later one overrides an earlier
one. The same command resumes an interrupted run from its newest checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from peft_edge.config import describe_keys, load_config


def main(arguments: Sequence[str]) -> None:
    """Run the configuration, and print a summary."""
    config = load_config(arguments)
    from peft_edge import training  # imports torch, which takes seconds: only once the configuration is valid

    record = training.run(config)
    if is_main_process():
        print(f"\n{training.summary_table(record)}\n\nEverything is in {config.output_dir}.")


def is_main_process() -> bool:
    """Return whether this process prints for all of them."""
    return int(os.environ.get("RANK", "0")) == 0


def command() -> None:
    """Run with the arguments of this process; on a mistake in them, exit with one message and code 2."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{describe_keys()}")
        sys.exit()
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        # Wrong input or a full disk: the message says what to do, and record.json holds the traceback.
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command()
