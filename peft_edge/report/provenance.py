"""Where the records come from, and what they cannot say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from peft_edge.records import Archive
from peft_edge.report.contest import contests
from peft_edge.report.markdown import counted, fixed
from peft_edge.report.runs import Run
from peft_edge.report.stats import ERRORS


def machine_section(archive: Archive) -> str:
    """Returns which machines and versions made the records."""
    runs, costs = archive.runs.values(), archive.costs.values()
    machines = Counter(
        ", ".join(
            [
                run.meta_info.system_info.get("system", "unknown system"),
                run.meta_info.system_info.get("machine", "unknown architecture"),
                run.meta_info.system_info.get("processor") or "unknown processor",
                f"accelerator {run.meta_info.system_info.get('accelerator', 'unknown')}",
                f"{counted(run.run_info.train_config['num_threads'], 'CPU thread')} a process",
            ]
        )
        for run in runs
    )
    versions = Counter(
        ", ".join(f"{name.removesuffix('-version')} {version}" for name, version in sorted(block.items()))
        for block in [*(run.meta_info.package_info for run in runs), *(cost.package_info for cost in costs)]
    )
    times = [run.run_info.total_time for run in runs if run.run_info.total_time is not None]
    lines = [f"- {counted(count, 'run')} on {machine}" for machine, count in sorted(machines.items())]
    lines += [f"- {counted(count, 'record')} with {version}" for version, count in sorted(versions.items())]
    if times:
        lines.append(
            f"- {fixed(sum(times) / 60, 0)} minutes in all of the {len(times)} runs that were done in one go, with the "
            "source models that they trained"
        )
    return "\n\n".join(["## Machine and versions", "\n".join(lines)])


def limits_section(runs: Sequence[Run]) -> str:
    """Returns what is not to be concluded."""
    lines = [
        "- Memory is that of tensors: an allocator and a framework take more. Steps that were analysed were not run.",
        "- FLOPs are not time, and no record is from a phone or a board.",
    ]
    if runs:
        seeds = " or ".join(counted(number, "seed") for number in sorted({one.seeds for one in contests(runs)}))
        configs = [run.record.run_info.train_config for run in runs]
        sizes = " or ".join(map(str, sorted({config["data"]["image_size"] for config in configs})))
        lines += [
            f"- There are {seeds} a method. {ERRORS} standard errors are a mild test of so few pairs, and many are "
            "tested: of differences that are not there, some will look clear. Differences that are there may be too "
            "small to show.",
            "- The best of many is chosen by the scores that it is then compared by, which flatters it.",
            f"- Images have {sizes} px, and a run takes one budget and the learning rates in its record: other data, "
            "and longer training, may order the methods otherwise. For those with a network there are "
            "`configs/tasks/cifar10_c.yaml` and `cifar10_new_classes.yaml`.",
        ]
        if not any(config["backbone"].get("pretrained") for config in configs):
            lines.append("- Source models were trained from random weights on the task's own source, not on ImageNet.")
    return "\n\n".join(["## What the records cannot say", "\n".join(lines)])
