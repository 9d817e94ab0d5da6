"""Records as pandas frames, and the statistics of the report.

`run_frame`, `change_frame`, `cost_frame` and `timing_frame` have one row for each run, changed kernel, analysed step
and timed step. Every row names the file of its record, so each figure of the report can be traced back to its source.
`variant_frame` summarises the runs over their seeds. `archive_frame` holds every field of every record.
"""

from __future__ import annotations

import json
import posixpath
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pandas import DataFrame, concat

from peft_edge.bench.results import BenchRecord
from peft_edge.methods import METHODS
from peft_edge.records import Archive, CostRecord, Record, StepProfile
from peft_edge.training.evaluation import SOURCE, TARGET, TARGET_BEFORE

NETWORK_KINDS = ("standard", "depthwise", "transformer")
"""The kinds of networks, in the order of tables."""

AS_IS, NOT_LEAN, LEAN, STORED = TRAINING_FORMS = ("as it is", "ours, not lean", "lean", "on stored features")
"""How a step is trained: as autograd and PEFT do it, with our layers before and after
`prepare_model_for_lean_training`, and on stored features."""

MEMORY_PARTS = ("activations", "temporaries", "parameters", "buffers", "gradients", "optimizer")
"""The kinds of tensors that make up the peak memory of a step."""

CHANGE_MEASURES = ("relative_norm", "stable_rank")
"""The measures of a changed kernel, see `KernelChange`."""

COST_COLUMNS = ["memory", "flops", "shipped"]
"""What a run costs: peak bytes and FLOPs of a training step, and bytes of the saved weights."""

STANDARD_ERRORS = 2
"""A paired difference is clear if its mean is more than this many standard errors from zero."""

# Settings that do not change the result, and the seed, over which the report averages.
_NOT_COMPARED = ("model_id", "output_dir", "cache_dir", "trackers", "num_workers", "profiling", "seed")
# Two analysed steps can be compared if these agree.
_STEP = ["network", "batch_size", "image_size", "sequence_length", "accounting"]
_CONTEST = ["task", "backbone"]


def run_frame(archive: Archive, folder: str = "") -> DataFrame:
    """Return one row for each run that succeeded, sorted by task, network, method, rank and seed.

    Columns:
        name, file: Path of the record in the archive, and relative to the page.
        task: Data set, and the shift or `new classes`.
        backbone, kind: Network, and `depthwise`, `standard` or `unknown`.
        method, family: Method with the settings that distinguish it, and its plain name without `peft-`.
        lora_rank: Rank of the adapter or of GaLore's projection; missing for other methods.
        variant: Method and rank: the unit of comparison.
        target, target_before, source, forgetting: Test results.
        score: Accuracy on the target; with new classes, the harmonic mean of new and old accuracy.
        memory, flops, shipped: See `COST_COLUMNS`; all missing if one was not measured.

    Args:
        archive: The records.
        folder: Path of the records, relative to the page.

    Raises:
        ValueError: If two records describe the same run.
    """
    configs = {name: flatten(record.run_info.train_config) for name, record in archive.finished.items()}
    if not configs:
        return DataFrame()
    changed: dict[object, set[str]] = {}
    for name, config in configs.items():
        kinds = {change.kind for change in archive.runs[name].train_info.changes.values()}
        changed.setdefault(config["backbone.name"], set()).update(kinds)
    frame = DataFrame(
        [
            {
                "name": name,
                "file": posixpath.join(folder, name),
                **_run_row(archive.runs[name], config, changed[config["backbone.name"]]),
            }
            for name, config in configs.items()
        ]
    ).astype({"lora_rank": "Int64", **dict.fromkeys(COST_COLUMNS, float)})
    frame["task"] = disambiguate(
        frame[["backbone", "task"]], [_settings_of_task(config) for config in configs.values()]
    )
    methods = frame[["backbone", "task", "lora_rank", "method"]]
    frame["method"] = disambiguate(methods, [_settings_of_method(config) for config in configs.values()])
    ranks = ", rank " + frame["lora_rank"].astype(str)
    frame["variant"] = frame["method"] + ranks.where(frame["lora_rank"].notna(), "")
    frame = frame.sort_values(
        [*_CONTEST, "order", "method", "lora_rank", "seed"], na_position="first", ignore_index=True
    )
    run = [*_CONTEST, "variant", "seed"]
    for _, same in frame[frame.duplicated(run, keep=False)].groupby(run):
        raise ValueError(f"{' and '.join(same['file'])} are records of the same run: remove one of them")
    return frame


def _run_row(record: Record, config: Mapping[str, object], kinds: set[str]) -> dict[str, object]:
    method, results = str(config["method"]), record.train_info.metrics[-1]
    section = METHODS[method].section if method in METHODS else None
    new_classes = bool(config["data.new_classes"])
    step, shipped = record.step, record.train_info.file_size
    costs = (None, None, None) if step is None else (step.memory_peak_bytes, all_flops(step), shipped)
    return {
        "task": f"{config['data.name']}, {'new classes' if new_classes else config['data.shift']}",
        "backbone": config["backbone.name"],
        "kind": "depthwise" if "depthwise" in kinds else "standard" if kinds else "unknown",
        "order": _method_order(method),
        "method": method,
        "family": method.removeprefix("peft-"),
        "lora_rank": {"adapter": config.get("adapter.r"), "galore": config.get("galore.rank")}.get(section or ""),
        "seed": config["seed"],
        "new_classes": new_classes,
        "trains": record.train_info.num_trainable_params != 0,
        "target": results[TARGET],
        "target_before": results[TARGET_BEFORE],
        "source": results[SOURCE],
        "forgetting": results["forgetting"],
        "score": results["harmonic mean" if new_classes else TARGET],
        **dict(zip(COST_COLUMNS, (None, None, None) if None in costs else costs, strict=True)),
    }


def _settings_of_task(config: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if key.startswith(("backbone.", "data.", "source."))}


def _settings_of_method(config: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if key.split(".")[0] not in _NOT_COMPARED}


def all_flops(step: StepProfile) -> int | None:
    """Return the FLOPs of a step, elementwise and optimizer FLOPs included; None if a part was not counted."""
    parts = [value for name, value in vars(step).items() if name.startswith("flops_")]
    return None if None in parts else sum(parts)


def variant_frame(runs: DataFrame) -> DataFrame:
    """Summarise runs over their seeds: one row for each task, network and variant, in the order of `run_frame`.

    The frame is empty without runs.

    Columns, besides those that all runs of a variant share:
        seeds, records: Number of runs and the files of their records.
        score, target, source, and each with `_std`: Means and sample standard deviations.
        gained, forgetting: Mean accuracy gained on the target and lost on the source.
        memory, flops, shipped: Means of the costs; missing if no run of the variant was profiled.
        full_seeds: Largest number of seeds of any variant of the same task and network.
        is_best: Highest mean score of the variants with `full_seeds` seeds.
        is_equal: The best variant, or one without a clear paired difference from it.
        is_pareto: No other variant is at least as good in score and costs, and better in one of them.
        to_full, to_head, and each with `_error` and `_clear`: Paired difference from full fine-tuning and from the head
            alone, see `paired_differences`.
    """
    if runs.empty:
        return runs
    groups = runs.assign(gained=runs["target"] - runs["target_before"]).groupby([*_CONTEST, "variant"], sort=False)
    shared = groups[["kind", "order", "method", "family", "lora_rank", "new_classes", "trains"]].first()
    measures = ["score", "target", "source"]
    # Rounded, so that equal means stay equal in whatever order they are summed.
    means = groups[[*measures, "gained", "forgetting", *COST_COLUMNS]].mean()
    means["score"] = means["score"].round(12)
    counts = groups.agg(seeds=("seed", "count"), records=("file", " ".join))
    frame = concat([shared, means, groups[measures].std().add_suffix("_std"), counts], axis=1).reset_index()
    frame["full_seeds"] = frame.groupby(_CONTEST)["seeds"].transform("max")
    contests = []
    for key, variants in frame.groupby(_CONTEST, sort=False):
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
    """Return the paired differences over the seeds of all networks of a kind, for each task, kind and variant.

    It has the columns of `variant_frame` that apply to several networks. Networks of unknown kind are left out.
    """
    frames = [DataFrame()]
    for (task, kind), members in runs[runs["kind"] != "unknown"].groupby(["task", "kind"]):
        records = members.groupby("variant", sort=False)["file"].agg(" ".join).rename("records")
        frame = _compare_with_references(score_table(members)).join(records).reset_index()
        frames.append(frame.assign(task=task, kind=kind, backbone=f"all {kind} networks"))
    return concat(frames, ignore_index=True)


def _compare_with_references(scores: DataFrame) -> DataFrame:
    found = {name: paired_differences(scores, name) for name in ("full", "head")}
    return DataFrame(
        {
            f"to_{name}{suffix}": differences[column]
            for name, differences in found.items()
            for suffix, column in (("", "mean"), ("_error", "error"), ("_clear", "clear"))
        }
    )


def score_table(runs: DataFrame) -> DataFrame:
    """Return the scores with one row for each variant and one column for each network and seed."""
    table = runs.pivot(index="variant", columns=["backbone", "seed"], values="score")
    return table.loc[runs["variant"].unique()]


def paired_differences(scores: DataFrame, reference: str) -> DataFrame:
    """Compare every row of a score table with one of its rows, paired by column.

    Runs of one seed start from the same source model, so a pair has less noise than two independent runs.

    Args:
        scores: See `score_table`.
        reference: The row that is subtracted. All differences are missing if there is no such row.

    Returns:
        For each row the `mean` difference, its standard `error` (sample standard deviation over the square root of the
        number of pairs; missing for one pair), the number of `pairs`, and whether the difference is `clear`. The row of
        the reference has no pairs.
    """
    differences = scores - scores.loc[reference] if reference in scores.index else scores * np.nan
    differences.loc[differences.index == reference] = np.nan
    pairs = differences.count(axis=1)
    mean, error = differences.mean(axis=1), differences.std(axis=1) / pairs**0.5
    return DataFrame({"mean": mean, "error": error, "pairs": pairs, "clear": mean.abs() > STANDARD_ERRORS * error})


def pareto_front(points: np.ndarray) -> np.ndarray:
    """Return a mask of the points that no other point dominates.

    Args:
        points: Shape (points, criteria); smaller is better in every criterion.
    """
    no_worse = (points[:, None] <= points[None]).all(axis=2)
    better = (points[:, None] < points[None]).any(axis=2)
    return ~(no_worse & better).any(axis=0)


def change_frame(archive: Archive, runs: DataFrame) -> DataFrame:
    """Return one row for each convolution whose kernel a run has changed, in the order of methods and ranks.

    Columns:
        file, order, method, lora_rank, variant: Those of the run.
        layers: `dense`, `depthwise` or `grouped` layers, and the kind of the network.
        relative_norm, stable_rank: See `KernelChange`.

    Args:
        archive: The records.
        runs: Their `run_frame`.
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
    """Return one row for each analysed step, sorted by kind, network, batch size, accounting, form and method.

    Columns:
        file, kind, network, batch_size, image_size, sequence_length, accounting, lora_rank: From the record.
        family: Method without `peft-`: PEFT's LoRA and ours are the same method.
        form: One of `TRAINING_FORMS`.
        variant, method: Family with the settings that distinguish it, and the same with the form: `lora (lean)`.
        peak, flops: Bytes at the peak, and FLOPs of convolutions and matrix products, forward and backward.
        activations, ... optimizer: Bytes of each of `MEMORY_PARTS` at the peak.
        is_reference: Whether this is full fine-tuning as it is.
        full_file, full_peak: Record and peak of the reference of the same step; missing if it was not analysed.
        saved_memory, saved_flops: 1 - the step's / the reference's.

    Args:
        archive: The records.
        folder: Path of the records, relative to the page.

    Raises:
        ValueError: If an analysis has no memory or no FLOPs.
    """
    if not archive.costs:
        return DataFrame()
    frame = DataFrame([_cost_row(name, record, folder) for name, record in archive.costs.items()])
    frame["method"] = frame["family"] + " (" + frame["form"] + ")"
    distinguished = disambiguate(
        frame[["network", "batch_size", "accounting", "method"]], [record.setting for record in archive.costs.values()]
    )
    frame["variant"] = [
        family + label.removeprefix(method)
        for family, label, method in zip(frame["family"], distinguished, frame["method"], strict=True)
    ]
    frame["method"] = distinguished
    orders = {
        "kind": frame["kind"].map(NETWORK_KINDS.index),
        "form": frame["form"].map(TRAINING_FORMS.index),
        "order": frame["family"].map(_method_order),
    }
    names = ["kind", "network", "batch_size", "accounting", "form", "order", "method"]
    frame = frame.loc[frame.assign(**orders).sort_values(names).index].reset_index(drop=True)
    frame["is_reference"] = (frame["family"] == "full") & (frame["form"] == AS_IS)
    reference = frame.loc[frame["is_reference"], [*_STEP, "file", "peak", "flops"]].drop_duplicates(_STEP)
    reference = reference.rename(columns={name: f"full_{name}" for name in ("file", "peak", "flops")})
    frame = frame.merge(reference, how="left", on=_STEP)
    frame["saved_memory"] = 1 - frame["peak"] / frame["full_peak"]
    frame["saved_flops"] = 1 - frame["flops"] / frame["full_flops"]
    return frame


def _cost_row(name: str, record: CostRecord, folder: str) -> dict[str, object]:
    profile, setting = record.profile, record.setting
    forward, backward, peak = profile.flops_forward, profile.flops_backward, profile.memory_peak_bytes
    if forward is None or backward is None or peak is None:
        needed = {"flops_forward": forward, "flops_backward": backward, "memory_peak_bytes": peak}
        missing = ", ".join(key for key, value in needed.items() if value is None)
        raise ValueError(f"{name}: an analysis needs {missing}, which is null: delete the record and analyse again")
    if setting.get("replay"):
        form = STORED
    elif setting.get("lean") is not None:
        form = LEAN
    elif record.kind == "transformer" or record.method.startswith("peft-") or record.method in ("full", "galore"):
        form = AS_IS
    else:
        form = NOT_LEAN
    return {
        "file": posixpath.join(folder, name),
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
    """Return one row for each contender of each comparison.

    Columns:
        network, batch_size, image_size, processor, threads, method: From the record.
        ratio: Median over the rounds of the step time divided by full fine-tuning's time in the same round.
        lowest, highest: Range of these ratios.
        peak_bytes: Memory at the peak of a step.
        error: First line of the reason why it did not run.
        record: Path of the record.

    Args:
        records: Comparisons by their paths, relative to the page.
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
        }
        for file, record in records.items()
        for row in record.rows
    ]
    if not rows:
        return DataFrame()
    return DataFrame(rows).astype({"ratio": float, "lowest": float, "highest": float, "peak_bytes": "Int64"})


def read_bench(folder: Path) -> dict[str, BenchRecord]:
    """Read the comparisons of `peft-edge bench` in a folder, by file name.

    Raises:
        ValueError: If the folder has no comparison, or a JSON file in it is not one.
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
    """Return one row for each record, successful or not, with every setting and every figure.

    A run has its last metrics (the test results), the step profile of the first process, and the median changes of its
    kernels for each kind of layer. Folders of the machine are left out.

    Args:
        archive: The records.
        folder: Path of the records, relative to the page.
    """
    rows = [
        {"file": posixpath.join(folder, name), **row}
        for name, row in [
            *((name, _all_of_run(record)) for name, record in archive.runs.items()),
            *((name, _all_of_cost(record)) for name, record in archive.costs.items()),
        ]
    ]
    columns = ["file", "record", *sorted({key for row in rows for key in row} - {"file", "record"})]
    cells = [[row.get(column) for column in columns] for row in rows]
    cells = [[json.dumps(cell) if isinstance(cell, list) else cell for cell in row] for row in cells]
    # Objects, so that integers stay integers in columns with gaps.
    return DataFrame(cells, columns=columns, dtype=object)


def _all_of_run(record: Record) -> dict[str, object]:
    info, train = record.run_info, record.train_info
    config = {key: value for key, value in info.train_config.items() if key not in ("output_dir", "cache_dir")}
    single = {key: value for key, value in vars(train).items() if key not in ("metrics", "sweep", "changes")}
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


def flatten(block: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the values of nested mappings by dotted keys.

    Unlike `pandas.json_normalize`, this keeps integers beside missing values.

    >>> flatten({"lr": 0.1, "data": {"name": "digits"}})
    {'lr': 0.1, 'data.name': 'digits'}
    """
    flat: dict[str, object] = {}
    for key, value in block.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def disambiguate(keys: DataFrame, settings: Sequence[Mapping[str, object]]) -> list[str]:
    """Return a label for each row: its last column, with the settings appended in which rows of equal keys differ.

    >>> disambiguate(DataFrame({"method": ["lora", "lora"]}), [{"norm": "stats"}, {"norm": "frozen"}])
    ['lora, norm=stats', 'lora, norm=frozen']

    Args:
        keys: What a row belongs to, and its name in the last column.
        settings: The settings of each row.
    """
    labels = keys.iloc[:, -1].tolist()
    for rows in keys.reset_index(drop=True).groupby(list(keys), dropna=False, sort=False).indices.values():
        same = [settings[row] for row in rows]
        names = sorted({name for setting in same for name in setting})
        differing = [name for name in names if len({json.dumps(setting.get(name)) for setting in same}) > 1]
        for row in rows:
            labels[row] += "".join(f", {name}={settings[row].get(name)}" for name in differing)
    return labels


def _method_order(name: str) -> int:
    """Return the position of a method in tables: that in `METHODS`, and behind it for any other."""
    return list(METHODS).index(name) if name in METHODS else len(METHODS)
