"""Compare training runs with claims of the source study (arXiv 2507.23536).

The claims are about accuracy, kernel changes and the choice of a method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from pandas import DataFrame, Series, concat

from peft_edge.report.charts import Grid, Subplot, draw_over_rank, draw_scatter
from peft_edge.report.claims import (
    CSV_NAMES,
    NO_VALUE,
    NOT_MEASURED,
    STUDY_FAMILIES,
    Chart,
    Claim,
    fixed,
    interval,
    mean_and_deviation,
    not_measured,
    short,
    verdict_of,
)
from peft_edge.report.frames import CHANGE_MEASURES, CONTEST, COST_COLUMNS, pooled_frame

_GRID = "configs/study/embedded.yaml"
_COST_UNITS: dict[str, tuple[str, float, str]] = {
    "memory": ("memory", 2**20, "MiB"),
    "flops": ("arithmetic", 1e9, "GFLOP"),
    "shipped": ("bytes to ship", 2**10, "KiB"),
}
_MEASURE_LABELS = {
    "relative_norm": "relative norm of the change [share]",
    "stable_rank": "stable rank of the change [directions]",
}


def accuracy_claim(runs: DataFrame, variants: DataFrame) -> Claim:
    """Compare the scores of all methods and ranks, by differences between runs with the same seed.

    `runs` is the result of `run_frame`, and `variants` is the result of `variant_frame`.
    """
    if runs.empty:
        return not_measured("a run that has succeeded", _GRID)
    trained, charts = variants[variants["trains"]], {}
    if not trained.empty:
        caption = "Score over the rank: mean and standard deviation over seeds, of all methods with trained parameters"
        charts["score_over_rank"] = Chart(caption, partial(_draw_scores, trained))
        caption = "Accuracy lost on the source against accuracy gained on the target; markers grow with the rank"
        charts["forgetting"] = Chart(caption, partial(draw_forgetting, trained))
    columns = ["task", "kind", "backbone", "variant", "seeds", "score", "score_std", "target", "target_std", "source"]
    columns += ["source_std", "gained_points", "lost_points", "is_best", "is_equal"]
    columns += [f"to_{name}_{part}" for name in ("full", "head") for part in ("mean", "error", "pairs", "clear")]
    data = concat([variants, pooled_frame(runs)], ignore_index=True)
    return replace(
        _compare_with_full(variants),
        table=_scores_of_variants(variants),
        data=data[[*columns, "records"]].rename(columns=CSV_NAMES),
        charts=charts,
    )


def _compare_with_full(variants: DataFrame) -> Claim:
    """Compare full fine-tuning with the best of LoRA, DoRA and GaLore at any rank, on each task and network."""
    study = variants[variants["family"].isin(STUDY_FAMILIES)]
    best = study.loc[study.groupby(CONTEST)["score"].idxmax()].dropna(subset="to_full_error")
    if best.empty:
        lacking = f"both full fine-tuning and one of {', '.join(STUDY_FAMILIES)} on two or more common seeds"
        finding = f"No network and task has {lacking}, so there are no paired differences."
        return Claim(verdict=NOT_MEASURED, finding=finding)
    reaching = int(((best["to_full_mean"] >= 0) | ~best["to_full_clear"]).sum())
    means = [
        f"{100 * rows['to_full_mean'].mean():+.1f} points on {kind} networks"
        for kind, rows in best.groupby("kind", sort=False)
    ]
    is_equal = variants.merge(best[CONTEST]).groupby(CONTEST)["is_equal"]
    finding = (
        f"In {reaching} of {len(best)} pairs of network and task, the best of LoRA, DoRA and GaLore scores higher than "
        "full fine-tuning or cannot be distinguished from it."
    )
    details = (
        f"On average the difference is {', '.join(means)}; this compares the best of several ranks with a single "
        f"method. In each pair, {interval(is_equal.sum() - 1)} of {interval(is_equal.size() - 1)} other methods and "
        "ranks cannot be distinguished from the best."
    )
    return Claim(verdict=verdict_of(reaching, len(best)), finding=finding, details=details)


def _scores_of_variants(variants: DataFrame) -> DataFrame:
    """Return a table of scores in %. It has a row for each variant, and a column for each pair of task and network.

    A variant is a method together with its rank, if it has one.

    In each column, the scores that cannot be distinguished from the best score (`is_equal`) are bold. If a variant has
    fewer seeds than another variant of the same task and network, its cell ends with the number of seeds in brackets.
    """
    cells = []
    for row in variants.itertuples():
        seeds = "" if row.seeds == row.full_seeds else f" ({row.seeds})"
        score = mean_and_deviation(row.score, row.score_std) + seeds
        cells.append(f"**{score}**" if row.is_equal else score)
    variants = variants.assign(cell=cells, column=variants["task"] + ": " + variants["backbone"])
    ordered = variants.sort_values(["order", "method", "lora_rank"], na_position="first")
    table = ordered.pivot_table(index="variant", columns="column", values="cell", aggfunc="first", sort=False)
    return table.reindex(columns=variants["column"].unique()).fillna(NO_VALUE).rename_axis("method")


def _draw_scores(variants: DataFrame, path: Path) -> None:
    middle, deviation = 100 * variants["score"], 100 * variants["score_std"].fillna(0)
    points = variants.assign(low=middle - deviation, middle=middle, high=middle + deviation)
    draw_over_rank(_grid(points, lambda rows: _subplot(rows, "rank", rows["score_label"].iloc[0])), path)


def draw_forgetting(variants: DataFrame, path: Path) -> None:
    """Draw the accuracy lost on the source domain over the accuracy gained on the target domain."""
    points = variants.assign(x=variants["gained_points"], y=variants["lost_points"])
    labels = "accuracy gained on the target [points]", "accuracy lost on the source [points]"
    draw_scatter(_grid(points, lambda rows: _subplot(rows, *labels)), path)


def _grid(variants: DataFrame, subplot: Callable[[DataFrame], Subplot]) -> Grid:
    """Return a grid of subplots with a row for each task and a column for each network.

    `subplot` creates a subplot from the variants of one task and network.
    """
    contests = {key: subplot(rows) for key, rows in variants.groupby(CONTEST)}
    backbones = variants["backbone"].unique()
    return [[contests.get((task, backbone)) for backbone in backbones] for task in variants["task"].unique()]


def _subplot(rows: DataFrame, x_label: str, y_label: str) -> Subplot:
    title = f"{rows['task'].iloc[0]}\n{rows['backbone'].iloc[0]}"
    return Subplot(title=title, x_label=x_label, y_label=y_label, data=rows)


def updates_claim(changes: DataFrame) -> Claim:
    """Compare the relative norm and the stable rank of kernel changes across methods and ranks.

    `changes` is the result of `change_frame`.
    """
    if changes.empty:
        return not_measured("the change of a kernel", _GRID)
    groups = changes.groupby(["variant", "layers"], sort=False)
    # Depthwise layers, which only some networks have, come last.
    layers = sorted(changes["layers"].unique(), key=lambda name: (name.startswith("depthwise"), name))
    # Round the quantiles to remove the floating-point error of their interpolation.
    quartiles = groups[CHANGE_MEASURES].quantile([0.25, 0.5, 0.75]).round(12).unstack()
    columns, data = {}, groups.size().rename("changed_layers").to_frame()
    for measure in CHANGE_MEASURES:
        low, middle, high = (quartiles[measure][quantile] for quantile in (0.25, 0.5, 0.75))
        text = middle.map(short) + " [" + low.map(short) + ", " + high.map(short) + "]"
        for name in layers:
            columns[f"{measure.replace('_', ' ')}, {name}"] = text.xs(name, level="layers")
        data = data.assign(**{f"{measure}_lower": low, f"{measure}_median": middle, f"{measure}_upper": high})
    table = DataFrame(columns).reindex(changes["variant"].unique()).fillna(NO_VALUE).rename_axis("method")
    data["records"] = groups["file"].agg(lambda files: " ".join(files.unique()))
    caption = "Relative norm and stable rank of the changes over the rank: median and quartiles"
    return replace(
        _compare_ranks(changes),
        table=table,
        data=data.reset_index().rename(columns=CSV_NAMES),
        charts={"updates": Chart(caption, partial(_draw_updates, changes, layers))},
    )


def _compare_ranks(changes: DataFrame) -> Claim:
    """Compare the kernel changes of dense layers at the lowest and highest rank, for each method with several ranks."""
    dense = changes[changes["layers"].str.startswith("dense")]
    rises, parts = [], []
    for method, rows in dense.groupby("method", sort=False):
        medians = rows.groupby("lora_rank")[CHANGE_MEASURES].median()
        if len(medians) > 1:
            low, high = medians.iloc[0], medians.iloc[-1]
            rises.append(bool(high["stable_rank"] > low["stable_rank"]))
            parts.append(
                f"{method} from {_measures_text(low)} at rank {low.name} to {_measures_text(high)} at rank {high.name}"
            )
    if not rises:
        return Claim(verdict=NOT_MEASURED, finding="No method was run with several ranks.")
    finding = (
        f"The median stable rank of the changes of dense layers rises with the rank for {sum(rises)} of {len(rises)} "
        "methods."
    )
    full = dense.loc[dense["method"] == "full", CHANGE_MEASURES]
    reference = "" if full.empty else f"; full fine-tuning has {_measures_text(full.median())}"
    details = f"In detail, {', '.join(parts)}{reference}."
    return Claim(verdict=verdict_of(sum(rises), len(rises)), finding=finding, details=details)


def _measures_text(medians: Series) -> str:
    return f"{fixed(medians['stable_rank'], 1)} (relative norm {fixed(medians['relative_norm'], 2)})"


def _draw_updates(changes: DataFrame, layers: list[str], path: Path) -> None:
    grid = []
    for measure, label in _MEASURE_LABELS.items():
        row = []
        for name in layers:
            # For methods without a rank, `lora_rank` is missing; `dropna=False` keeps these rows as a group.
            groups = changes[changes["layers"] == name].groupby(["method", "lora_rank"], sort=False, dropna=False)
            points = groups[measure].quantile([0.25, 0.5, 0.75]).unstack().set_axis(["low", "middle", "high"], axis=1)
            title = name.replace(", ", "\n")
            row.append(Subplot(title=title, x_label="rank", y_label=label, data=points.reset_index()))
        grid.append(row)
    draw_over_rank(grid, path)


def choice_claim(variants: DataFrame) -> Claim:
    """Find the methods and ranks that are Pareto-optimal in score, peak memory, FLOPs and saved bytes.

    `variants` is the result of `variant_frame`.
    """
    profiled = variants if variants.empty else variants.dropna(subset=COST_COLUMNS)
    if profiled.empty:
        return not_measured("a run whose steps were profiled", _GRID)
    contests = profiled.groupby(CONTEST)["is_pareto"]
    sizes, several = contests.sum(), int((contests.sum() > 1).sum())
    finding = (
        f"In {several} of {len(sizes)} pairs of network and task no method is best in everything; of "
        f"{interval(contests.size())} methods and ranks, {interval(sizes)} are Pareto-optimal."
    )
    unprofiled = "; ".join(variants.loc[variants["memory"].isna(), "variant"].unique())
    front = profiled[profiled["is_pareto"]].sort_values("score", ascending=False, kind="stable")
    names = front["variant"].where(~front["is_equal"], "**" + front["variant"] + "**")
    table = names.groupby([front["task"], front["backbone"]]).agg("; ".join).reset_index()
    table.columns = ["task", "network", "Pareto-optimal, highest score first"]
    data = profiled.assign(**profiled[COST_COLUMNS].round().astype("Int64"))
    columns = ["task", "kind", "backbone", "variant", "seeds", "score", "score_std", *COST_COLUMNS]
    return Claim(
        verdict=verdict_of(several, len(sizes)),
        finding=finding,
        details=f"Not compared, because no training step was profiled: {unprofiled}." if unprofiled else "",
        table=table.set_index(list(table.columns)),
        data=data[[*columns, "is_pareto", "is_best", "is_equal", "records"]].rename(columns=CSV_NAMES),
        charts={
            f"tradeoff_{number}": Chart(
                f"{task}: score against peak memory and FLOPs of a step; markers grow with the rank",
                partial(_draw_tradeoff, rows),
            )
            for number, (task, rows) in enumerate(profiled.groupby("task"), start=1)
        },
    )


def _draw_tradeoff(variants: DataFrame, path: Path) -> None:
    grid = []
    for _, rows in variants.groupby("backbone"):
        label, scores = rows["score_label"].iloc[0], rows.assign(y=100 * rows["score"])
        memory, flops = scores.assign(x=rows["memory"] / 2**20), scores.assign(x=rows["flops"] / 1e9)
        grid.append(
            [_subplot(memory, "peak memory of a step [MiB]", label), _subplot(flops, "FLOPs of a step [GFLOP]", label)]
        )
    draw_scatter(grid, path, with_front=True)


def decision_table(variants: DataFrame) -> DataFrame | None:
    """Return a table of recommended methods, with a row for each pair of task and network.

    The table has a column for accuracy and one column for each cost: peak memory, FLOPs and saved bytes. The
    column of accuracy holds the variant (method and rank) with the best score. The column of a cost holds the cheapest
    candidate. A candidate is a variant whose costs were measured, and whose score cannot be distinguished from the best
    score (`is_equal`). Pairs of task and network without candidates are omitted. Return None if no pair remains.
    """
    rows = []
    for (task, backbone), contest in variants.groupby(CONTEST) if not variants.empty else ():
        candidates = contest[contest["is_equal"]].dropna(subset=COST_COLUMNS)
        if candidates.empty:
            continue
        best = contest[contest["is_best"]].iloc[0]
        row = {"task": task, "network": backbone}
        row["accuracy"] = f"{best['variant']} ({mean_and_deviation(best['score'], best['score_std'])} %)"
        for column, (name, size, unit) in _COST_UNITS.items():
            cheapest = candidates.loc[candidates[column].idxmin()]
            row[name] = f"{cheapest['variant']} ({short(cheapest[column] / size)} {unit})"
        rows.append(row)
    return DataFrame(rows).set_index(list(rows[0])) if rows else None
