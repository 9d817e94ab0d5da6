"""Convert records to pandas frames, and compute the statistics of the report.

`run_frame` returns one row for each run, `change_frame` one for each changed kernel, `cost_frame` one for each analysed
step, and `timing_frame` one for each timed step. Every row names the file of its record. `variant_frame` summarises the
runs over their seeds. `archive_frame` returns one row for each record, with its settings and results.

Paths of files, and the argument `folder` (the folder of the records), are relative to the folder of the report page.
Without records, a frame is empty.
"""

from __future__ import annotations

import json
import posixpath
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from pandas import DataFrame, concat

from peft_edge.bench.results import BenchRecord
from peft_edge.config.reader import flatten
from peft_edge.data.folders import Filter, domain_label
from peft_edge.data.task import EMBEDDED
from peft_edge.methods import METHODS
from peft_edge.records import Archive, CostRecord, Record
from peft_edge.training.evaluation import SOURCE, TARGET, TARGET_BEFORE

NETWORK_KINDS = ("standard", "depthwise", "transformer")
"""The kinds of networks, in the order in which tables list them."""

AS_IS, NOT_LEAN, LEAN, STORED = TRAINING_FORMS = ("as it is", "ours, not lean", "lean", "on stored features")
"""The forms of a training step.

- `AS_IS`: without lean training, if the method is full fine-tuning, GaLore or one of PEFT's own adapters, or if the
  network is a transformer.
- `NOT_LEAN`: without lean training, in all other cases.
- `LEAN`: after `prepare_model_for_lean_training`.
- `STORED`: on stored outputs of the frozen first layers.
"""

MEMORY_PARTS = ["activations", "temporaries", "parameters", "buffers", "gradients", "optimizer"]
"""The kinds of tensors that make up the peak memory of a step."""

CHANGE_MEASURES = ["relative_norm", "stable_rank"]
"""The measures of a changed kernel; see `KernelChange`."""

COST_COLUMNS = ["memory", "flops", "shipped"]
"""The costs of a run: peak bytes of a training step, FLOPs of a step, and bytes of the saved adapter or model."""

CONTEST = ["task", "backbone"]
"""The report compares two variants (method and rank) only if they have the same values in these columns."""

STANDARD_ERRORS = 2
"""The mean of paired differences counts as clear if it is more than this many standard errors from zero."""

_TASK_SETTINGS = ("backbone.", "data.", "source.")
# Settings that belong to the training, although their keys begin with `data.`.
_TRAINING_SETTINGS = ("data.augment",)
# Keys that do not distinguish methods: settings without effect on the result, and the seed, because the report
# averages over seeds.
_NOT_COMPARED = ("model_id", "output_dir", "cache_dir", "trackers", "num_workers", "profiling.", "seed")
# The report compares analysed steps that have the same values in these columns.
_STEP = ["network", "batch_size", "image_size", "sequence_length", "accounting"]


def run_frame(archive: Archive, folder: str = "") -> DataFrame:
    """Return one row for each run that succeeded, sorted by task, network, method, rank and seed.

    Columns:
        name, file: Path of the record. `name` is relative to the folder of the records, and `file` is relative to the
            folder of the report page.
        task: Name of the data set, and what changes in the target domain (the name of the shift, or `new classes`).
            Then follow the settings of the task that differ among runs with the same data set, change and network.
        backbone, kind: Name of the network, and its kind: `depthwise`, `standard` or `unknown`.
        method: Key of `METHODS`, followed by the settings that differ among runs with the same key, rank, task and
            network.
        family: Key of `METHODS` without `peft-`.
        lora_rank: Rank of the adapter or of GaLore's projection; missing for other methods.
        variant: Method and rank. The report compares variants.
        order, seed, trains: Position of the method in `METHODS`, seed, and whether the run has trainable parameters.
        target, target_before: Test accuracy on the target domain (the new images), after and before the update.
        source, forgetting: Test accuracy on the source domain (the old images) after the update, and how much the
            update lowered this accuracy.
        score: With a shift, the same as `target`. With new classes, the harmonic mean of the accuracies on new and old
            classes.
        score_label: Label of the score in figures, with its unit.
        memory, flops, shipped: See `COST_COLUMNS`. If any of these costs was not measured, all three are missing.
        is_real: False for the embedded benchmarks (`EMBEDDED`), which need no download. True for all other data sets.
        norm: Value of the configuration key `norm`.
        retained: Test accuracy on the source domain after the update, divided by the accuracy before the update.
        seconds, training_flops, process: Seconds and FLOPs of the whole training, and peak bytes of the process.

    Raises:
        ValueError: If two records describe the same run.
    """
    configs = [flatten(record.run_info.train_config) for record in archive.finished.values()]
    rows = [_run_row(record, config) for record, config in zip(archive.finished.values(), configs, strict=True)]
    if not rows:
        return DataFrame()
    numbers = [*COST_COLUMNS, "retained", "seconds", "training_flops", "process"]
    frame = DataFrame(rows).astype({"lora_rank": "Int64", **dict.fromkeys(numbers, float)})
    frame["name"] = list(archive.finished)
    frame["file"] = [posixpath.join(folder, name) for name in archive.finished]
    # If a run trains only the head, its record does not contain the kinds of the convolutions. Therefore the kind of a
    # network is found from the records of all its runs.
    kinds = frame.groupby("backbone")["kinds"].agg(lambda of_runs: set().union(*of_runs)).to_dict()
    frame["kind"] = [
        "depthwise" if "depthwise" in kinds[name] else "standard" if kinds[name] else "unknown"
        for name in frame["backbone"]
    ]
    tasks = [
        {key: config[key] for key in config if key.startswith(_TASK_SETTINGS) and key not in _TRAINING_SETTINGS}
        for config in configs
    ]
    frame["task"] += distinguishing_settings(frame[["backbone", "task"]], tasks)
    methods = [{key: config[key] for key in config if not key.startswith(_NOT_COMPARED)} for config in configs]
    frame["method"] += distinguishing_settings(frame[["backbone", "task", "lora_rank", "method"]], methods)
    ranks = ", rank " + frame["lora_rank"].astype(str)
    frame["variant"] = frame["method"] + ranks.where(frame["lora_rank"].notna(), "")
    order = [*CONTEST, "order", "method", "lora_rank", "seed"]
    frame = frame.sort_values(order, na_position="first", ignore_index=True)
    run = [*CONTEST, "variant", "seed"]
    for _, same in frame[frame.duplicated(run, keep=False)].groupby(run):
        raise ValueError(f"{' and '.join(same['file'])} are records of the same run: remove one of them")
    return frame


def _run_row(record: Record, config: Mapping[str, object]) -> dict[str, object]:
    method, results, step = str(config["method"]), record.train_info.metrics[-1], record.step
    whole = record.train_info.costs
    section = METHODS[method].section if method in METHODS else None
    new_classes = bool(config["data.new_classes"])
    costs: list[int | None] = [None, None, None]
    if step is not None:
        costs = [step.memory_peak_bytes, step.flops, record.train_info.file_size]
    name = str(config["data.name"])
    filters = {key: cast(list[Filter], config.get(f"data.{key}_filters", [])) for key in ("source", "shift")}
    change = "new classes" if new_classes else domain_label(str(config["data.shift"] or name), filters["shift"])
    return {
        "task": f"{domain_label(name, filters['source'])}, {change}",
        "backbone": config["backbone.name"],
        "kinds": {change.kind for change in record.train_info.changes.values()},
        "order": _method_order(method),
        "method": method,
        "family": method.removeprefix("peft-"),
        "lora_rank": {"adapter": config.get("adapter.r"), "galore": config.get("galore.rank")}.get(section or ""),
        "seed": config["seed"],
        "trains": record.train_info.num_trainable_params != 0,
        "target": results[TARGET],
        "target_before": results[TARGET_BEFORE],
        "source": results[SOURCE],
        "forgetting": results["forgetting"],
        "score": results["harmonic mean" if new_classes else TARGET],
        "score_label": "harmonic mean of accuracies [%]" if new_classes else "target accuracy [%]",
        **dict(zip(COST_COLUMNS, [None] * 3 if None in costs else costs, strict=True)),
        "is_real": config["data.name"] not in EMBEDDED,
        "norm": config["norm"],
        "retained": results["retention"],
        "seconds": record.train_info.seconds,
        "training_flops": whole and whole.flops,
        "process": whole and whole.process_peak_bytes,
    }


def variant_frame(runs: DataFrame) -> DataFrame:
    """Return one row for each combination of task, network and variant (method and rank).

    A row summarises the runs of this combination over their seeds.

    The rows have the order of `run_frame`. The columns `task`, `backbone`, `kind`, `order`, `method`, `family`,
    `lora_rank`, `variant`, `score_label` and `trains` are those of `run_frame`.

    Further columns:
        seeds, records: Number of runs, and the files of their records, separated by spaces.
        score, target, source: Means over the seeds.
        score_std, target_std, source_std: Sample standard deviations; missing if there is only one seed.
        gained_points, lost_points: How many percentage points of accuracy the update gains on the target domain, and
            how many it loses on the source domain. Means over the seeds.
        memory, flops, shipped: Mean costs; missing if no run of the variant was profiled.
        full_seeds: Largest number of seeds that a variant of the same task and network has.
        is_best: Whether the variant has the highest mean score of all variants with `full_seeds` seeds.
        is_equal: Whether the mean difference from the best variant is not clear (see `paired_differences`). Also True
            if this variant and the best variant have fewer than two seeds in common.
        is_pareto: Whether no other variant dominates this variant in score and costs. False if the costs are missing.
        to_full_..., to_head_...: The columns of `paired_differences`, with the variant `full` or `head` as reference.
    """
    if runs.empty:
        return runs
    gained, lost = 100 * (runs["target"] - runs["target_before"]), 100 * runs["forgetting"]
    groups = runs.assign(gained_points=gained, lost_points=lost).groupby([*CONTEST, "variant"], sort=False)
    shared = groups[["kind", "order", "method", "family", "lora_rank", "score_label", "trains"]].first()
    measures = ["score", "target", "source"]
    means = groups[[*measures, "gained_points", "lost_points", *COST_COLUMNS]].mean()
    # Rounding makes the mean independent of the order of summation.
    means["score"] = means["score"].round(12)
    counts = groups.agg(seeds=("seed", "count"), records=("file", " ".join))
    frame = concat([shared, means, groups[measures].std().add_suffix("_std"), counts], axis=1).reset_index()
    frame["full_seeds"] = frame.groupby(CONTEST)["seeds"].transform("max")
    contests = []
    for key, variants in frame.groupby(CONTEST, sort=False):
        variants = variants.set_index("variant")
        scores = score_table(runs[(runs["task"] == key[0]) & (runs["backbone"] == key[1])])
        best = variants.loc[variants["seeds"] == variants["full_seeds"], "score"].idxmax()
        variants["is_best"] = variants.index == best
        variants["is_equal"] = ~paired_differences(scores, best)["clear"]
        variants = variants.join(_compare_with_references(scores))
        costs = variants[COST_COLUMNS].dropna()
        variants["is_pareto"] = False
        variants.loc[costs.index, "is_pareto"] = pareto_front(costs.assign(score=-variants["score"]).to_numpy())
        contests.append(variants.reset_index())
    return concat(contests, ignore_index=True)


def pooled_frame(runs: DataFrame) -> DataFrame:
    """Return one row for each combination of task, kind of network and variant (method and rank).

    A row summarises paired differences over all networks of this kind and all seeds. The columns `task`, `kind`,
    `variant`, `records`, `to_full_...` and `to_head_...` are those of `variant_frame`. The column `backbone` has texts
    such as `all depthwise networks`. Networks of unknown kind are omitted.
    """
    frames = [DataFrame()]
    for (task, kind), members in runs[runs["kind"] != "unknown"].groupby(["task", "kind"]):
        records = members.groupby("variant", sort=False)["file"].agg(" ".join).rename("records")
        frame = _compare_with_references(score_table(members)).join(records).reset_index()
        frames.append(frame.assign(task=task, kind=kind, backbone=f"all {kind} networks"))
    return concat(frames, ignore_index=True)


def _compare_with_references(scores: DataFrame) -> DataFrame:
    return concat([paired_differences(scores, name).add_prefix(f"to_{name}_") for name in ("full", "head")], axis=1)


def score_table(runs: DataFrame) -> DataFrame:
    """Return a table of scores.

    It has a row for each variant (method and rank), and a column for each pair of network and seed.
    """
    table = runs.pivot(index="variant", columns=["backbone", "seed"], values="score")
    return table.loc[runs["variant"].unique()]


def paired_differences(scores: DataFrame, reference: str) -> DataFrame:
    """Subtract the row `reference` of a `score_table` from every row, and summarise the differences over the columns.

    `scores` has a row for each variant (method and rank), and a column for each pair of network and seed. Runs with the
    same seed start from the same weights, so paired differences have less noise than differences between independent
    runs.

    Returns:
        For each row the `mean` difference, its standard `error`, the number of `pairs`, and whether the difference is
        `clear` (see `STANDARD_ERRORS`). `error` is the sample standard deviation divided by sqrt(pairs). With fewer
        than two pairs, `error` is missing and `clear` is False. The row `reference` has 0 pairs. If `scores` has no row
        `reference`, all rows have 0 pairs.
    """
    differences = scores - scores.loc[reference] if reference in scores.index else scores * np.nan
    differences.loc[differences.index == reference] = np.nan
    pairs = differences.count(axis=1)
    mean, error = differences.mean(axis=1), differences.std(axis=1) / pairs**0.5
    return DataFrame({"mean": mean, "error": error, "pairs": pairs, "clear": mean.abs() > STANDARD_ERRORS * error})


def pareto_front(points: np.ndarray) -> np.ndarray:
    """Return a mask of the points that no other point dominates.

    `points` has shape (points, criteria). In every criterion, smaller is better. A point dominates another point if it
    is at least as good in all criteria and better in at least one.
    """
    no_worse = (points[:, None] <= points[None]).all(axis=2)
    better = (points[:, None] < points[None]).any(axis=2)
    return np.logical_not((no_worse & better).any(axis=0))


def change_frame(archive: Archive, runs: DataFrame) -> DataFrame:
    """Return one row for each pair of a run and a convolution whose kernel the run has changed.

    The rows are sorted by method and rank.

    Columns:
        file, order, method, lora_rank, variant: See `run_frame`.
        layers: Kind of the convolution (`dense`, `depthwise` or `grouped`) and of the network, such as `dense layers,
            standard networks`. Pointwise convolutions are `dense`.
        relative_norm, stable_rank: See `KernelChange`.
    """
    rows = []
    for run in runs.itertuples():
        for change in archive.runs[run.name].train_info.changes.values():
            layers = change.kind if change.kind in ("depthwise", "grouped") else "dense"
            measures = {measure: getattr(change, measure) for measure in CHANGE_MEASURES}
            rows.append({"name": run.name, "layers": f"{layers} layers, {run.kind} networks", **measures})
    if not rows:
        return DataFrame()
    columns = ["name", "file", "order", "method", "lora_rank", "variant"]
    frame = DataFrame(rows).merge(runs[columns], on="name")
    return frame.sort_values(["order", "method", "lora_rank"], na_position="first", kind="stable", ignore_index=True)


def cost_frame(archive: Archive, folder: str = "") -> DataFrame:
    """Return one row for each analysed training step, sorted by kind, network, batch size, accounting, form and method.

    The memory and the FLOPs of an analysed step were computed from tensor shapes.

    Columns:
        file: Path of the record, relative to the folder of the report page.
        kind, network: Fields of the record.
        batch_size, image_size, sequence_length, accounting, lora_rank: Entries of the record's `setting`. The
            accounting is the rule by which FLOPs were counted.
        family: Method without `peft-`, because PEFT's LoRA and our LoRA are the same method.
        form: One of `TRAINING_FORMS`.
        variant: Family, followed by the settings that differ among steps with the same family, form, network, batch
            size and accounting.
        method: Family and form, such as `lora (lean)`, followed by the same settings as in `variant`.
        peak, flops: Bytes of all tensors at the peak of the step, and FLOPs of convolutions and matrix products in the
            forward and backward pass.
        activations, ... optimizer: Bytes of each kind of tensor in `MEMORY_PARTS` at the peak.
        is_reference: Whether the step is full fine-tuning in the form `AS_IS`.
        full_file, full_peak, full_flops: `file`, `peak` and `flops` of the reference with the same network, inputs and
            accounting; missing if this reference was not analysed.
        saved_memory, saved_flops: 1 - peak / full_peak and 1 - flops / full_flops.

    Raises:
        ValueError: If a record has no peak or no FLOPs.
    """
    if not archive.costs:
        return DataFrame()
    frame = DataFrame([_cost_row(posixpath.join(folder, name), record) for name, record in archive.costs.items()])
    frame["method"] = frame["family"] + " (" + frame["form"] + ")"
    settings = [record.setting for record in archive.costs.values()]
    names = distinguishing_settings(frame[["network", "batch_size", "accounting", "method"]], settings)
    frame["method"], frame["variant"] = frame["method"] + names, frame["family"] + names
    orders = {"kind": NETWORK_KINDS.index, "form": TRAINING_FORMS.index, "family": _method_order}
    frame = frame.sort_values(
        ["kind", "network", "batch_size", "accounting", "form", "family", "method"],
        key=lambda column: column.map(orders[column.name]) if column.name in orders else column,
        ignore_index=True,
    )
    frame["is_reference"] = (frame["family"] == "full") & (frame["form"] == AS_IS)
    reference = frame.loc[frame["is_reference"], [*_STEP, "file", "peak", "flops"]].drop_duplicates(_STEP)
    reference = reference.rename(columns={name: f"full_{name}" for name in ("file", "peak", "flops")})
    frame = frame.merge(reference, how="left", on=_STEP)
    frame["saved_memory"] = 1 - frame["peak"] / frame["full_peak"]
    frame["saved_flops"] = 1 - frame["flops"] / frame["full_flops"]
    return frame


def _cost_row(file: str, record: CostRecord) -> dict[str, object]:
    profile, setting = record.profile, record.setting
    forward, backward, peak = profile.flops_forward, profile.flops_backward, profile.memory_peak_bytes
    if forward is None or backward is None or peak is None:
        raise ValueError(
            f"{file}: an analysis needs flops_forward ({forward}), flops_backward ({backward}) and memory_peak_bytes "
            f"({peak}), and one of them is null: delete the record and analyse again"
        )
    is_plain = record.kind == "transformer" or record.method.startswith("peft-") or record.method in ("full", "galore")
    if setting.get("replay"):
        form = STORED
    elif setting.get("lean") is not None:
        form = LEAN
    else:
        form = AS_IS if is_plain else NOT_LEAN
    return {
        "file": file,
        "kind": record.kind,
        "network": record.network,
        **{key: setting.get(key) for key in ("batch_size", "image_size", "sequence_length", "accounting", "lora_rank")},
        "family": record.method.removeprefix("peft-"),
        "form": form,
        "peak": peak,
        "flops": forward + backward,
        **{part: getattr(profile, f"memory_{part}_bytes") or 0 for part in MEMORY_PARTS},
    }


def timing_frame(records: Mapping[str, BenchRecord]) -> DataFrame:
    """Return one row for each contender (measured method) in each record of `peft-edge bench`.

    The keys of `records` are paths.

    Columns:
        network, batch_size, image_size, threads, processor: Values from the record.
        method, record: Label of the contender, and path of the record.
        ratio: Time of a step divided by the time of full fine-tuning in the same round; the median over all rounds.
        lowest, highest: Smallest and largest ratio of all rounds.
        peak_bytes: Memory of tensors at the peak of a step; missing for a compiled step, and if the contender failed.
        error: First line of the error; empty if the contender ran.
        process_bytes: Growth of the physical memory of the contender's process during all rounds.
        compile_s: Seconds of the first step of a compiled contender.
        ratio_without_huge_pages: The same quantity as `ratio`, measured without huge pages.

    Each of the last three columns is omitted if it has no value in any row.
    """
    rows = [
        {
            "network": record.setting["backbone"],
            **{key: record.setting[key] for key in ("batch_size", "image_size", "threads")},
            "processor": record.system_info["processor"],
            "method": row.label,
            "ratio": row.ratio_median,
            "lowest": row.ratio_lowest,
            "highest": row.ratio_highest,
            "peak_bytes": None if row.profile is None else row.profile.memory_peak_bytes,
            "error": row.error.partition("\n")[0],
            "record": file,
            "process_bytes": row.rss_growth_bytes,
            "compile_s": row.compile_s,
            "ratio_without_huge_pages": next(
                (other.ratio_median for other in record.rows_without_huge_pages if other.name == row.name), None
            ),
        }
        for file, record in records.items()
        for row in record.rows
    ]
    if not rows:
        return DataFrame()
    floats = dict.fromkeys(("ratio", "lowest", "highest", "compile_s", "ratio_without_huge_pages"), float)
    frame = DataFrame(rows).astype({**floats, "peak_bytes": "Int64", "process_bytes": "Int64"})
    newer = ("process_bytes", "compile_s", "ratio_without_huge_pages")
    return frame.drop(columns=[name for name in newer if frame[name].isna().all()])


def read_bench(folder: Path) -> dict[str, BenchRecord]:
    """Read the records of `peft-edge bench` in `folder`, without subfolders. Return a dict from file names to records.

    Raises:
        ValueError: If the folder has no JSON files, or a JSON file is not a record of `peft-edge bench`.
    """
    records = {}
    for file in sorted(folder.glob("*.json")):
        try:
            records[file.name] = BenchRecord.from_json(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not a record of peft-edge bench: move it elsewhere ({error})") from error
    if not records:
        raise ValueError(f"{folder} holds no record of peft-edge bench: make one with --json, or omit --bench")
    return records


def archive_frame(archive: Archive, folder: str = "") -> DataFrame:
    """Return a table of settings and results with one row for each record. Records of failed runs are included.

    The row of a training run has the configuration of the run, except `output_dir` and `cache_dir`. It also has the
    test results (the last entry of the run's metrics), the step profile of the run's first process, and the median
    kernel changes for each kind of convolution.
    """
    found = {name: _all_of_run(record) for name, record in archive.runs.items()}
    found |= {name: _all_of_cost(record) for name, record in archive.costs.items()}
    rows = [{"file": posixpath.join(folder, name), **row} for name, row in found.items()]
    columns = ["file", "record", *sorted({key for row in rows for key in row} - {"file", "record"})]
    cells = [[row.get(column) for column in columns] for row in rows]
    cells = [[json.dumps(cell) if isinstance(cell, list) else cell for cell in row] for row in cells]
    # With dtype object, integers stay integers in columns with missing values.
    return DataFrame(cells, columns=columns, dtype=object)


def _all_of_run(record: Record) -> dict[str, object]:
    info, train = record.run_info, record.train_info
    config = {key: value for key, value in info.train_config.items() if key not in ("output_dir", "cache_dir")}
    single = train.model_dump(exclude={"metrics", "sweep", "changes"})
    row: dict[str, object] = {
        "record": "run",
        "total_time": info.total_time,
        **flatten(config, "config."),
        **flatten(single, "train."),
        **flatten(train.metrics[-1] if train.metrics else {}, "result."),
        **flatten({} if record.step is None else vars(record.step), "step."),
    }
    for kind in {change.kind for change in train.changes.values()}:
        for measure in CHANGE_MEASURES:
            values = [getattr(change, measure) for change in train.changes.values() if change.kind == kind]
            row[f"changes.{kind}.{measure}"] = statistics.median(values)
    return row


def _all_of_cost(record: CostRecord) -> dict[str, object]:
    return {
        "record": "cost",
        "network": record.network,
        "kind": record.kind,
        "config.method": record.method,
        **flatten(record.setting, "setting."),
        "train.num_total_params": record.num_total_params,
        **flatten(vars(record.profile), "step."),
    }


def distinguishing_settings(keys: DataFrame, settings: Sequence[Mapping[str, object]]) -> list[str]:
    """Return a text for each row of `keys`. It lists the settings that differ among the rows with the same keys.

    `settings` contains the settings of each row. If no setting differs, the text is empty.

    >>> distinguishing_settings(DataFrame({"method": ["lora", "lora"]}), [{"norm": "stats"}, {"norm": "frozen"}])
    [', norm=stats', ', norm=frozen']
    """
    labels = [""] * len(keys)
    for rows in keys.groupby(list(keys), dropna=False, sort=False).indices.values():
        for name in sorted({name for row in rows for name in settings[row]}):
            values = [settings[row].get(name) for row in rows]
            if len(set(map(json.dumps, values))) > 1:
                for row, value in zip(rows, values, strict=True):
                    labels[row] += f", {name}={value}"
    return labels


def _method_order(name: str) -> int:
    return list(METHODS).index(name) if name in METHODS else len(METHODS)
