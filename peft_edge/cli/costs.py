"""Commands that measure and predict costs: profile, plan, bench."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from typer import Option

from peft_edge.cli.options import (
    STEP_OPTIMIZERS,
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
    library_memory,
    parse_bytes,
    parse_flops,
    plan_table,
)

Accounting = Literal["exact", "source-study"]
CONTENDERS = [
    *("full", "full-checkpoint", "full-compile", "full-eval", "inference"),
    *("peft-lora", "peft-lora-checkpoint", "peft-lora-compile"),
    *("peft-lora-eval", "peft-lora-eval-checkpoint", "peft-lora-eval-compile"),
    *("peft-dora", "lycoris-locon", "loralib"),
    *("full-lean", "full-recompute", "galore", "galore-lean", "galore-recompute", "peft-lora-lean"),
    *("lora-stats", "lora-stats-recompute", "lora-stats-checkpoint"),
    *("lora-plain", "lora-compile", "lora-dense", "lora-recompute", "lora-split", "lora-checkpoint"),
    *("lora-all-conv", "lora-all-conv-depthwise", "lora-all-conv-split"),
    *("lora-project", "lora-fa-project", "dora-dense"),
]
NORMS = ("frozen", "recalibrate", "stats", "affine")
RUNTIMES = ("torch", "onnx")


def profile(
    backbone: Backbone,
    num_classes: NumClasses = None,
    batch_size: BatchSize = 16,
    image_size: ImageSize = 224,
    method: Methods = ["full", "lora"],  # noqa: B006
    lora_rank: LoraRanks = [4],  # noqa: B006
    target_modules: Annotated[
        str | None,
        Option(parser=role_or_regex, metavar="ROLE|REGEX", help=f"{TARGETS_HELP}. The default depends on the method."),
    ] = None,
    norm: Annotated[str, choice(NORMS, "How BatchNorm layers are treated, as in the key norm of train.py.")] = "frozen",
    optimizer: Optimizer = "adamw",
    accounting: Annotated[Accounting, choice(get_args(Accounting), "How to count FLOPs.")] = "exact",
    json: Json = None,
    picture: Picture = None,
) -> None:
    """Print the FLOPs and memory of a training step, without training.

    Prints a row for each method and LoRA rank. The steps run on fake tensors, which have shapes but no values. The
    command therefore takes seconds, and needs memory only for the weights.
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
    memory: Annotated[int | None, limit(parse_bytes, BYTES, "256MiB", "Limit on the tensors in a step")] = None,
    flops: Annotated[int | None, limit(parse_flops, FLOPS, "3GFLOP", "Limit on the FLOPs of a step")] = None,
    adapter_bytes: Annotated[int | None, limit(parse_bytes, BYTES, "200KiB", "Limit on the saved update")] = None,
    method: Methods = [*METHODS_TO_PLAN],  # noqa: B006
    target_modules: Annotated[
        list[str],
        Option(parser=role_or_regex, metavar="ROLE|REGEX ...", help=f"{TARGETS_HELP}; one or several."),
    ] = [*PLACEMENTS],  # noqa: B006
    lora_rank: LoraRanks = [*LORA_RANKS],  # noqa: B006
    norm: Annotated[
        str, choice(NORMS, "How BatchNorm is treated. The methods norm-affine, galore and full always use stats.")
    ] = "frozen",
    optimizer: Optimizer = "adamw",
    records: Annotated[
        Path | None,
        path("FOLDER", "Records of runs. Combinations that have records come first, the most accurate at the top."),
    ] = None,
    runtime: Annotated[
        str, choice(RUNTIMES, "The runtime for training. With onnx, --memory limits the memory of the whole process.")
    ] = "torch",
) -> None:
    """List the methods that fit a budget of memory, FLOPs and update size.

    Prints a table of the combinations of method, target modules and LoRA rank whose training step fits. Each row shows
    the fewest memory-saving options with which the step fits, and the predicted memory of the whole process. After the
    table, prints the combinations that do not fit, each with the limits that the step exceeds. If a rank does not fit,
    higher ranks are left out. The steps run on fake tensors, which have shapes but no values.

    With --runtime onnx, lists the training steps of `peft-edge export --train`, each with the predicted memory of the
    whole process. These steps train the adapters lora, lora-fa and dora with frozen norms.
    """
    from peft_edge.backbones import load_backbone

    if runtime == "onnx":
        if flops or adapter_bytes or records:
            raise ValueError("--runtime onnx: only --memory can be limited, and records are not used")
        _plan_device(
            backbone, num_classes, memory, method, target_modules, lora_rank, batch_size, image_size, optimizer
        )
        return
    budget = Budget(memory_bytes=memory, flops=flops, adapter_bytes=adapter_bytes)
    model = load_backbone(backbone, num_classes)
    options: dict[str, Any] = {"batch_size": batch_size, "image_size": image_size, "optimizer": optimizer}
    options |= {"norm": norm, "library_bytes": library_memory()}
    found = find_plan(
        model, budget, methods=method, target_modules=target_modules, lora_ranks=lora_rank, records=records, **options
    )
    step = f"{backbone}, {model.num_classes} classes, batch {batch_size}, {image_size} px, {optimizer}"
    print(f"Training steps of {step}; {budget}\n\n{plan_table(found)}")


def _plan_device(
    backbone: str,
    num_classes: int | None,
    memory: int | None,
    methods: list[str],
    target_modules: list[str],
    lora_ranks: list[int],
    batch_size: int,
    image_size: int,
    optimizer: str,
) -> None:
    from peft_edge.device_plan import DEVICE_METHODS, device_plan_table, find_device_options

    if optimizer not in STEP_OPTIMIZERS:
        raise ValueError(
            f"--optimizer: with --runtime onnx, expected {' or '.join(STEP_OPTIMIZERS)}, found {optimizer}"
        )
    from peft_edge.backbones import load_backbone

    model = load_backbone(backbone, num_classes)
    found = find_device_options(
        model,
        methods=[*DEVICE_METHODS] if methods == [*METHODS_TO_PLAN] else methods,
        target_modules=target_modules,
        lora_ranks=lora_ranks,
        batch_size=batch_size,
        image_size=image_size,
        optimizer=optimizer,
    )
    limit = "no limit" if memory is None else f"the whole process at most {memory / 2**20:,g} MiB"
    step = f"{backbone}, {model.num_classes} classes, batch {batch_size}, {image_size} px, {optimizer}"
    print(f"Training steps of {step} in ONNX Runtime; {limit}\n\n{device_plan_table(found, memory)}")


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
    huge_pages_only: Annotated[bool, Option("--huge-pages-only", help="Omit the steps without huge pages.")] = False,
    json: Json = None,
    picture: Picture = None,
) -> None:
    """Measure training steps of peft-edge, PEFT, timm, LyCORIS and loralib on this machine.

    Prints memory, FLOPs, and the ratio of the step time to the step time of full fine-tuning. If the library of a
    method is not installed, the method is listed with the error. Steps are measured with huge pages for torch's memory
    and, unless --huge-pages-only is given, also without huge pages. In each round, one step of each method is timed.
    Methods whose names end in -compile take minutes to compile. Close other programs first, because they change the
    times.
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
        without_huge_pages=not huge_pages_only,
    )
    show(record.to_json(), bench_table(record), json)
    if picture is not None:
        save_bench_figure(record, picture)
