"""Commands that measure and predict costs: profile, plan, bench."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from typer import Option

from peft_edge.cli.options import (
    TARGETS_HELP,
    Backbone,
    BatchSize,
    ImageSize,
    Json,
    LoraRanks,
    Methods,
    NumClasses,
    Optimizer,
    Picture,
    choice,
    count,
    limit,
    one_of,
    path,
    role_or_regex,
    show,
)
from peft_edge.plan import (
    BYTES,
    FLOPS,
    LORA_RANKS,
    METHODS_TO_PLAN,
    PLACEMENTS,
    Budget,
    find_plan,
    parse_bytes,
    parse_flops,
    plan_table,
)

Accounting = Literal["exact", "source-study"]
CONTENDERS = [
    *("full", "inference", "peft-lora", "peft-dora", "lycoris-locon", "loralib"),
    *("lora-plain", "lora-dense", "lora-byte", "lora-recompute", "lora-stats", "lora-all-conv", "lora-project"),
    *("lora-fa-project", "dora-dense", "galore"),
]
NORMS = ("frozen", "recalibrate", "stats", "affine")


def profile(
    backbone: Backbone,
    num_classes: NumClasses = None,
    batch_size: BatchSize = 16,
    image_size: ImageSize = 224,
    method: Methods = ["full", "lora"],  # noqa: B006
    lora_rank: LoraRanks = [4],  # noqa: B006
    target_modules: Annotated[
        str | None,
        Option(parser=role_or_regex, metavar="ROLE|REGEX", help=f"{TARGETS_HELP}; by default the method's."),
    ] = None,
    norm: Annotated[str, choice(NORMS, "BatchNorm mode, as in the key norm of train.py.")] = "frozen",
    optimizer: Optimizer = "adamw",
    accounting: Annotated[Accounting, choice(get_args(Accounting), "How to count FLOPs.")] = "exact",
    json: Json = None,
    picture: Picture = None,
) -> None:
    """Print the FLOPs and memory of a training step, without training.

    Prints a row for each method and LoRA rank. The steps run on tensors without values, so the command takes seconds
    and needs memory only for the weights.
    """
    from peft_edge.backbones import load_backbone
    from peft_edge.profiling.analysis import compare_methods
    from peft_edge.profiling.figures import save_cost_figure
    from peft_edge.profiling.tables import cost_table

    model = load_backbone(backbone, num_classes)
    adapter = {"norm": norm} | ({"target_modules": target_modules} if target_modules else {})
    options: dict[str, Any] = {"batch_size": batch_size, "image_size": image_size, "optimizer": optimizer}
    costs = compare_methods(model, method, lora_ranks=lora_rank, adapter=adapter, accounting=accounting, **options)
    setting: dict[str, object] = {"num_classes": model.num_classes, "backbone": backbone}
    setting |= {"target_modules": target_modules, "norm": norm, **options, "accounting": accounting}
    setting["costs"] = {name: cost.model_dump() for name, cost in costs.items()}
    step = f"{backbone}, {model.num_classes} classes, batch {batch_size}, {image_size} px, {optimizer}"
    show(dumps(setting, indent=2) + "\n", f"One training step of {step}\n\n{cost_table(costs)}", json)
    if picture is not None:
        save_cost_figure(costs, picture, title=step)


def plan(
    backbone: Backbone,
    num_classes: NumClasses = None,
    batch_size: BatchSize = 16,
    image_size: ImageSize = 224,
    memory: Annotated[int | None, limit(parse_bytes, BYTES, "256MiB", "the memory of tensors in a step")] = None,
    flops: Annotated[int | None, limit(parse_flops, FLOPS, "3GFLOP", "the FLOPs of a step")] = None,
    adapter_bytes: Annotated[int | None, limit(parse_bytes, BYTES, "200KiB", "the size of the saved update")] = None,
    method: Methods = [*METHODS_TO_PLAN],  # noqa: B006
    target_modules: Annotated[
        list[str],
        Option(parser=role_or_regex, metavar="ROLE|REGEX ...", help=f"{TARGETS_HELP}; one or several."),
    ] = [*PLACEMENTS],  # noqa: B006
    lora_rank: LoraRanks = [*LORA_RANKS],  # noqa: B006
    optimizer: Optimizer = "adamw",
    records: Annotated[
        Path | None, path("FOLDER", "Records of runs. Combinations with runs come first, most accurate first.")
    ] = None,
) -> None:
    """List the methods that fit a budget of memory, FLOPs and update size.

    Prints the combinations of method, target modules and LoRA rank whose training step fits, each with the mildest lean
    setting that is needed. Then prints combinations that do not fit, each with the limits that the step exceeds. If a
    rank does not fit, higher ranks are left out. The steps run on tensors without values.
    """
    from peft_edge.backbones import load_backbone

    budget = Budget(memory_bytes=memory, flops=flops, adapter_bytes=adapter_bytes)
    model = load_backbone(backbone, num_classes)
    options: dict[str, Any] = {"batch_size": batch_size, "image_size": image_size, "optimizer": optimizer}
    found = find_plan(
        model, budget, methods=method, target_modules=target_modules, lora_ranks=lora_rank, records=records, **options
    )
    step = f"{backbone}, {model.num_classes} classes, batch {batch_size}, {image_size} px, {optimizer}"
    print(f"Training steps of {step}; {budget}\n\n{plan_table(found)}")


def bench(
    backbone: Backbone,
    num_classes: Annotated[int, count("Number of classes.")] = 10,
    batch_size: BatchSize = 16,
    image_size: ImageSize = 224,
    methods: Annotated[
        list[str], Option(parser=one_of(CONTENDERS), metavar="METHOD ...", help="Methods to compare with full.")
    ] = CONTENDERS,
    lora_rank: Annotated[int, count("Rank of all adapters.")] = 4,
    rounds: Annotated[int, count("Timed steps of each method.")] = 7,
    threads: Annotated[int, count("CPU threads.")] = 1,
    json: Json = None,
    picture: Picture = None,
) -> None:
    """Measure training steps of peft-edge, PEFT, LyCORIS and loralib on this machine.

    Libraries that are not installed are left out. Prints memory, FLOPs, and the ratio of the step time to the step time
    of full fine-tuning. The methods take turns step by step. The command takes minutes; run no other program meanwhile.
    """
    from peft_edge.bench import bench_table, run_bench, save_bench_figure

    record = run_bench(
        backbone,
        methods,
        num_classes=num_classes,
        batch_size=batch_size,
        image_size=image_size,
        lora_rank=lora_rank,
        rounds=rounds,
        threads=threads,
    )
    show(record.to_json(), bench_table(record), json)
    if picture is not None:
        save_bench_figure(record, picture)
