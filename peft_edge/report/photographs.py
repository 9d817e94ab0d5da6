"""Compute the section of the report on photographs.

The section covers all runs whose data set is not one of the embedded benchmarks (`EMBEDDED`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pandas import DataFrame, Series, isna

from peft_edge.records import Archive
from peft_edge.report.claims import NO_VALUE, Claim, fixed, percent, short
from peft_edge.report.frames import CONTEST, change_frame, variant_frame
from peft_edge.report.run_claims import accuracy_claim, choice_claim, updates_claim

_ACCURACIES = {"target": "target [%]", "source": "source [%]", "retained": "retained [%]"}
_COSTS: dict[str, tuple[str, float]] = {
    "shipped": ("saved [KiB]", 2**10),
    "memory": ("tensors in a step [MiB]", 2**20),
    "process": ("process [MiB]", 2**20),
    "seconds": ("training [s]", 1),
    "training_flops": ("training [TFLOP]", 1e12),
}


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """The section of the report on runs whose data set is not one of the embedded benchmarks (`EMBEDDED`).

    Attributes:
        claims: A dict from the names of the sections `accuracy`, `updates` and `choice` to their claims. These claims
            are computed only from the runs of this section.
        retention: A text that compares runs with `norm=frozen` and runs with `norm=stats`. It says how much of the
            accuracy on the source domain their updates retain, and how accurate they are on the target domain. The text
            is empty if no method was run with both values of `norm`.
        tables: A dict of tables with a row for each variant (method and rank). The keys have the form
            "<task>, <network>".
        data: A row for each combination of task, network and variant, with means, standard errors and the files of the
            records.
    """

    claims: dict[str, Claim]
    retention: str
    tables: dict[str, DataFrame]
    data: DataFrame


def photographs(archive: Archive, runs: DataFrame) -> Photographs | None:
    """Return the section on the runs for which `is_real` is True, or None if there are no such runs.

    `runs` is the result of `run_frame`. If `is_real` is True, the data set is not one of the embedded benchmarks.
    """
    runs = runs[runs["is_real"]] if not runs.empty else runs
    if runs.empty:
        return None
    variants, compared = variant_frame(runs), _with_one_reference(runs)
    claims = {
        "accuracy": accuracy_claim(compared, variant_frame(compared)),
        "updates": updates_claim(change_frame(archive, runs)),
        "choice": choice_claim(variants),
    }
    data = _summary(runs)
    tables = {
        f"{task}, {backbone}": _table(rows, variants) for (task, backbone), rows in data.groupby(CONTEST, sort=False)
    }
    return Photographs(claims=claims, retention=_retention(runs), tables=tables, data=data)


def _with_one_reference(runs: DataFrame) -> DataFrame:
    """Return a copy of `runs` in which, for each task and network, one variant of full fine-tuning is named `full`.

    The variants of full fine-tuning differ in settings such as `norm`. `accuracy_claim` compares the other methods with
    the variant `full`, so only one variant can have this name. The function gives the name to the variant with the most
    runs. If several variants have equally many runs, the variant with the best mean score gets the name.
    """
    runs = runs.copy()
    for _, rows in runs[runs["family"] == "full"].groupby(CONTEST):
        scores = rows.groupby("variant")["score"].agg(["count", "mean"]).sort_values(["count", "mean"])
        runs.loc[rows.index[rows["variant"] == scores.index[-1]], "variant"] = "full"
    return runs


def _summary(runs: DataFrame) -> DataFrame:
    """Return a row for each combination of task, network and variant (method and rank).

    The row contains means and standard errors over the seeds.

    The standard error is the sample standard deviation divided by the square root of the number of seeds; it is missing
    for a single seed.
    """
    groups = runs.groupby([*CONTEST, "variant"], sort=False)
    columns = ["score", *_ACCURACIES, *_COSTS]
    means, errors = groups[columns].mean(), groups[columns].sem().add_suffix("_error")
    frame = means.join(errors).join(groups.agg(seeds=("seed", "count"), records=("file", " ".join)))
    return frame.reset_index()


def _table(rows: DataFrame, variants: DataFrame) -> DataFrame:
    equal = variants.merge(rows[[*CONTEST, "variant"]]).set_index("variant")["is_equal"]
    labels = short_labels(list(rows["variant"]))
    cells = []
    for label, (_, row) in zip(labels, rows.iterrows(), strict=True):
        cell = {"method": label, "seeds": str(row["seeds"])}
        cell |= {title: _with_error(row, name) for name, title in _ACCURACIES.items()}
        if equal[row["variant"]] and row["seeds"] > 1:
            cell["method"] = f"**{label}**"
        for name, (title, unit) in _COSTS.items():
            cell[title] = NO_VALUE if isna(row[name]) else short(row[name] / unit)
        cells.append(cell)
    return DataFrame(cells).set_index("method")


def _with_error(row: Series, name: str) -> str:
    mean, error = row[name], row[f"{name}_error"]
    if isna(mean):
        return NO_VALUE
    return percent(mean) if isna(error) else f"{percent(mean)} ± {percent(error)}"


_SHORTER = {
    r", lean\.\w+=\w+": "",
    r", training\.replay=False": "",
    r", training\.replay=True": ", replay",
    r", training\.replay_views=(\d+)": r", \1 stored views",
    r", training\.learning_rate=\[([^]]*)\]": r", lr \1",
    r", adapter\.target_modules=": ", ",
    r", data\.augment=": ", augment ",
}


def short_labels(variants: list[str]) -> list[str]:
    """Shorten the names of variants. Such a name contains the method, some settings and the rank.

    If two shortened names would be equal, return `variants` unchanged.

    >>> short_labels(["lora, lean.enabled=True, norm=frozen, training.learning_rate=[0.003], rank 4", "full"])
    ['lora, norm=frozen, lr 0.003, rank 4', 'full']
    """
    labels = []
    for variant in variants:
        # Without `training.replay`, `training.replay_views` has no effect, so it is left out.
        label = variant if "replay=True" in variant else re.sub(r", training\.replay_views=\d+", "", variant)
        for pattern, text in _SHORTER.items():
            label = re.sub(pattern, text, label)
        labels.append(label)
    return labels if len(set(labels)) == len(labels) else variants


def _retention(runs: DataFrame) -> str:
    """Return a text that compares runs with `norm=frozen` to runs with `norm=stats`; see `Photographs.retention`.

    If no method has runs with both values, return `""`. Only variants with the largest number of seeds are compared.
    """
    trained = runs[runs["trains"] & ~runs["family"].isin(["norm-affine", "norm-stats"])]
    seeds = trained.groupby([*CONTEST, "variant"])["seed"].transform("nunique")
    trained = trained[seeds == seeds.max()]
    trained = trained.assign(pair=trained["variant"].str.replace(r", (lean\.\w+|norm)=\w+", "", regex=True))
    means = trained.pivot_table(index=[*CONTEST, "pair"], columns="norm", values=["retained", "target"])
    if not {"frozen", "stats"} <= set(trained["norm"]):
        return ""
    both = means.dropna(subset=[("retained", "frozen"), ("retained", "stats")])
    if both.empty:
        return ""
    kept = {norm: percent(both["retained", norm].mean()) for norm in ("frozen", "stats")}
    gain = 100 * (both["target", "frozen"] - both["target", "stats"]).mean()
    return (
        f"On average over {len(both)} pairs of task and method with {int(seeds.max())} seeds, an update keeps "
        f"{kept['frozen']} % of the accuracy on the source with `norm=frozen`, and {kept['stats']} % with "
        f"`norm=stats`. On the target it is {fixed(abs(gain), 1)} points {'more' if gain >= 0 else 'less'} accurate "
        "with `norm=frozen`."
    )
