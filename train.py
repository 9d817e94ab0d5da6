"""Adapt an edge CNN to shifted images or to new classes, and print accuracies, sizes and times.

    accelerate launch train.py --config configs/quickstart.yaml
    python train.py --config configs/quickstart.yaml method=dora adapter.r=8 --output_dir runs/dora

Set any key of the configuration as `key=value` or `--key value`. If `--config` is given several times, a later file
overrides an earlier file. The same command resumes an interrupted run from its newest checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from peft_edge.allocator import use_huge_pages

# Import other modules inside the functions. Ctrl-C during these imports then prints one line instead of a traceback.


def main(arguments: Sequence[str]) -> None:
    """Run the configuration that `arguments` describe, and print a summary on the main process."""
    from peft_edge.config import load_config

    config = load_config(arguments, check_files=True)
    from peft_edge import training  # after the configuration is checked, because importing torch takes seconds

    record = training.run(config)
    if is_main_process():
        print(f"\n{training.summary_table(record)}\n\nEverything is in {config.output_dir}.")


def is_main_process() -> bool:
    """Return whether this is the process of rank 0, which alone prints the summary and the errors."""
    return int(os.environ.get("RANK", "0")) == 0


def print_help() -> None:
    """Print how to use this program, and all configuration keys."""
    from peft_edge.config import describe_keys

    try:
        print(f"{__doc__}\n{describe_keys()}", flush=True)
    except BrokenPipeError:
        # The program that reads the output has ended, for example `head` in `train.py --help | head`. Redirect the
        # output. Otherwise, Python would print another error when it flushes the output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command() -> None:
    """Call `main` with the arguments in `sys.argv`, or print the help if they contain `-h` or `--help`.

    After a ValueError, OSError or ImportError, print the message of the error, and exit with code 2. After Ctrl-C, exit
    with code 130.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print_help()
        sys.exit()
    use_huge_pages()
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        # The message says what to do. If the run has started, record.json contains the traceback.
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # exit code 130 tells a launcher that Ctrl-C ended the program
        if is_main_process():
            print("stopped: the same command resumes from the newest checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command()
