"""Pushes the result of a run to the Hub."""

from __future__ import annotations

from peft_edge.config import RunConfig
from peft_edge.hub import push_update
from peft_edge.training.run_folder import RunFolder


def push_run(config: RunConfig, run: RunFolder) -> None:
    """Pushes the update of a run that has succeeded, where `hub.repo_id` says so.

    A push that fails leaves the run as it is, a success that lies complete on the disk: what went wrong is printed, and
    the same command pushes again.

    Args:
        config: Of the run; its section `hub` is used.
        run: The run's folder.
    """
    hub = config.hub
    if hub.repo_id is None or not run.accelerator.is_main_process:
        return
    update = next(path for path in (run.path / "adapter", run.path / "model") if path.exists())
    try:
        address = push_update(
            update,
            hub.repo_id,
            record=run.path / "record.json",
            license=hub.license,
            private=hub.private,
            revision=hub.revision,
        )
    except (OSError, ValueError) as error:
        run.accelerator.print(
            f"error: {error}\nThe run has succeeded. The same command trains nothing, and pushes again"
        )
    else:
        run.accelerator.print(f"pushed: {address}")
