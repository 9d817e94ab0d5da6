"""The choice: which method to take, by accuracy, memory, arithmetic and bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from peft_edge.report.claims.claim import Claim, Picture, not_measured, verdict
from peft_edge.report.contest import Contest, contests
from peft_edge.report.figures.scatter import ScatterPanel, save_scatter
from peft_edge.report.markdown import fixed, interval, links, picture, short, spread, table
from peft_edge.report.rows import grouped
from peft_edge.report.runs import Run
from peft_edge.report.stats import pareto

TITLE = "Which method to take"
SOURCE = (
    "The choice of a method depends on the constraints of the hardware, on the performance that is asked for, and on "
    "the application."
)
MEASURED = (
    "Of the same runs: the score, the bytes of tensors at the peak of a training step, all the arithmetic of that step "
    "(forward, backward, elementwise and optimizer, counted exactly), and the bytes that are shipped. Each is a mean "
    "over seeds. A method is Pareto-optimal if no other is at least as good in all four and better in one."
)


def choice_claim(runs: Sequence[Run]) -> Claim:
    """Returns the section on the choice."""
    found = [contest for contest in contests(runs) if _costs(contest)]
    if not found:
        lacking = not_measured("a run whose steps were profiled", "configs/study/embedded.yaml")
        return Claim(title=TITLE, source=SOURCE, measured=MEASURED, found=lacking)
    pictures: dict[str, Picture] = {}
    texts = []
    for number, (task, members) in enumerate(grouped(found, lambda contest: contest.task).items(), start=1):
        key = f"tradeoff_{number}"
        pictures[key] = partial(_draw, members)
        texts.append(picture(key, f"{task}: score against peak memory and FLOPs of a step; markers grow with the rank"))
    return Claim(
        title=TITLE,
        source=SOURCE,
        measured=MEASURED,
        found=_sentence(found),
        more=[
            *texts,
            "The Pareto-optimal methods; bold where the score is not told apart from the best:",
            _fronts(found),
            *_left_out(found),
        ],
        pictures=pictures,
    )


def decision_table(runs: Sequence[Run]) -> str | None:
    """Returns what to take for each network and task, by what is short; None where no run was profiled."""
    rows = []
    for contest in contests(runs):
        costs = _costs(contest)
        equals = [name for name in contest.equals if name in costs]
        if not equals:
            continue
        chosen = [_cheapest(equals, costs, column) for column in range(len(_UNITS))]
        best = contest.best
        texts = [
            f"{best} ({spread(list(contest.scores(best).values()), contest.seeds)} %)",
            *(f"{name} ({_UNITS[column](costs[name][column])})" for column, name in enumerate(chosen)),
        ]
        files = [run.file for name in (best, *chosen) for run in contest.ways[name]]
        rows.append([contest.task, contest.backbone, *texts, links(files)])
    head = ["task", "network", "accuracy", "memory", "arithmetic", "bytes to ship", "records"]
    return table(head, rows, words=6) if rows else None


_UNITS: tuple[Callable[[float], str], ...] = (
    lambda value: f"{short(value / 2**20)} MiB",
    lambda value: f"{short(value / 1e9)} GFLOP",
    lambda value: f"{short(value / 2**10)} KiB",
)


def _costs(contest: Contest) -> dict[str, tuple[float, ...]]:
    """The means of `Run.costs` of the ways that have them."""
    found = {name: [run.costs for run in runs if run.costs is not None] for name, runs in contest.ways.items()}
    return {
        name: tuple(statistics.fmean(column) for column in zip(*costs, strict=True))
        for name, costs in found.items()
        if costs
    }


def _cheapest(names: Sequence[str], costs: dict[str, tuple[float, ...]], column: int) -> str:
    return min(names, key=lambda name: costs[name][column])


def _front(contest: Contest) -> list[str]:
    costs = _costs(contest)
    chosen = pareto([(-contest.mean(name), *values) for name, values in costs.items()])
    return [name for name, is_best in zip(costs, chosen, strict=True) if is_best]


def _sentence(found: Sequence[Contest]) -> str:
    sizes = [len(_front(contest)) for contest in found]
    several = sum(size > 1 for size in sizes)
    tried = interval([len(_costs(contest)) for contest in found])
    return (
        f"{verdict(several, len(found))}: in {several} of {len(found)} pairs of network and task no method is best in "
        f"everything; of {tried} methods and ranks, {interval(sizes)} are Pareto-optimal."
    )


def _fronts(found: Sequence[Contest]) -> str:
    rows = []
    for contest in found:
        costs, equals = _costs(contest), contest.equals
        for name in sorted(_front(contest), key=contest.mean, reverse=True):
            score = spread(list(contest.scores(name).values()), contest.seeds)
            memory, flops, size = costs[name]
            cells = [fixed(memory / 2**20, 1), short(flops / 1e9), short(size / 2**10)]
            score = f"**{score}**" if name in equals else score
            row = [contest.task, contest.backbone, name, score, *cells, links(run.file for run in contest.ways[name])]
            rows.append(row)
    head = ["task", "network", "method", "score [%]", "peak [MiB]", "GFLOP a step", "shipped [KiB]", "records"]
    return table(head, rows, words=3)


def _left_out(found: Sequence[Contest]) -> list[str]:
    names = dict.fromkeys(name for contest in found for name in contest.ways if name not in _costs(contest))
    return [f"Without a profiled training step, and so not compared by cost: {'; '.join(names)}."] if names else []


def _draw(found: Sequence[Contest], path: Path) -> None:
    panels = []
    for contest in found:
        costs = _costs(contest)
        row = []
        for column, (across, unit) in enumerate(
            (("peak memory of a step [MiB]", 2**20), ("FLOPs of a step [GFLOP]", 1e9))
        ):
            series: dict[str, list[tuple[float, float]]] = {}
            for name, values in costs.items():
                method = contest.ways[name][0].method
                series.setdefault(method, []).append((values[column] / unit, 100 * contest.mean(name)))
            title = f"{contest.task}\n{contest.backbone}"
            row.append(
                ScatterPanel(title=title, across=across, up=f"{contest.score_label} [%]", series=series, has_front=True)
            )
        panels.append(row)
    save_scatter(panels, path)
