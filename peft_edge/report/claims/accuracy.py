"""Accuracy under a shift and for unseen classes, for each method and rank."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from peft_edge.report.claims.claim import NOT_MEASURED, Claim, Picture, not_measured, verdict
from peft_edge.report.contest import Contest, contests, panel_grid
from peft_edge.report.figures.ranks import Range, RankPanel, save_over_rank
from peft_edge.report.figures.scatter import ScatterPanel, save_scatter
from peft_edge.report.markdown import NONE, counted, difference, interval, links, picture, spread, table
from peft_edge.report.rows import KINDS, grouped
from peft_edge.report.runs import Run
from peft_edge.report.savings import SOURCE_FAMILIES
from peft_edge.report.stats import ERRORS, Difference, paired_difference
from peft_edge.training.evaluation import SOURCE as OLD
from peft_edge.training.evaluation import TARGET, TARGET_BEFORE

TITLE = "Accuracy under a shift and for unseen classes"
SOURCE = (
    "LoRA, DoRA and GaLore are evaluated as updates of standard and depthwise convolutional networks, for distribution "
    "shifts and for unseen classes, against traditional fine-tuning. The abstract names no figure; what is tested here "
    "is that they reach full fine-tuning."
)
MEASURED = (
    "Every run adapts a source model to the target and tests the saved update. The score is the accuracy on the "
    "target's test images; with unseen classes, the harmonic mean of the accuracies on new and on old classes. Means "
    "and standard deviations are over seeds. Methods are compared by paired differences, since on one seed all start "
    f"from the same source model: they are told apart where the mean difference is more than {ERRORS} standard errors "
    "from zero."
)
REFERENCES = ("full", "head")
"""What differences are taken against."""

_CAPTIONS = {
    "score_over_rank": "Score over the rank, mean and standard deviation over seeds, of all that train something",
    "forgetting": "Accuracy lost on the source against what is gained on the target, mean over seeds; markers grow "
    "with the rank",
}


def accuracy_claim(runs: Sequence[Run]) -> Claim:
    """Returns the section on accuracy."""
    found = contests(runs)
    if not found:
        lacking = not_measured("a run that has succeeded", "configs/study/embedded.yaml")
        return Claim(title=TITLE, source=SOURCE, measured=MEASURED, found=lacking)
    drawn = [contest for contest in found if contest.trained]
    pictures: dict[str, Picture] = {}
    if drawn:
        pictures = {"score_over_rank": partial(_draw_ranks, drawn), "forgetting": partial(_draw_forgetting, drawn)}
    tasks = grouped(found, lambda contest: contest.task)
    return Claim(
        title=TITLE,
        source=SOURCE,
        measured=MEASURED,
        found=_sentence(found),
        more=[
            "The best of each network and task, and what cannot be told apart from it:",
            _bests(found),
            *(picture(name, _CAPTIONS[name]) for name in pictures),
            *(text for task, members in tasks.items() for text in _scores(task, members)),
            *(text for task, members in tasks.items() for text in _differences(task, members)),
        ],
        pictures=pictures,
    )


def _sentence(found: Sequence[Contest]) -> str:
    compared = [
        (contest, against)
        for contest in found
        if (best := contest.best_of(lambda run: run.family in SOURCE_FAMILIES)) is not None
        and (against := contest.difference(best, "full")) is not None
        and against.error is not None
    ]
    if not compared:
        return (
            f"{NOT_MEASURED}: no network and task has both full fine-tuning and one of {', '.join(SOURCE_FAMILIES)} on "
            "two seeds or more, without which there are no paired differences."
        )
    reaching = sum(against.mean >= 0 or not against.is_clear for _, against in compared)
    means = [
        f"{100 * statistics.fmean(against.mean for _, against in members):+.1f} points on {kind or 'other'} networks"
        for kind, members in grouped(compared, lambda pair: pair[0].kind).items()
    ]
    equals = [len(contest.equals) - 1 for contest, _ in compared]
    return (
        f"{verdict(reaching, len(compared))}: in {reaching} of {len(compared)} pairs of network and task the best of "
        "LoRA, DoRA and GaLore scores higher than full fine-tuning or is not told apart from it (on average "
        f"{', '.join(means)}, the best of several ranks against one); from the best of all, {interval(equals)} of "
        f"{interval([len(contest.ways) - 1 for contest, _ in compared])} other methods and ranks are not told apart."
    )


def _bests(found: Sequence[Contest]) -> str:
    rows = []
    for contest in found:
        equals = [name for name in contest.equals if name != contest.best]
        files = [run.file for name in contest.equals for run in contest.ways[name]]
        score = spread(list(contest.scores(contest.best).values()), contest.seeds)
        words = [
            contest.task,
            contest.backbone,
            contest.kind or "unknown",
            contest.best,
            "; ".join(equals) or "nothing",
        ]
        rows.append([*words, f"{len(equals)} of {len(contest.ways) - 1}", score, links(files)])
    head = ["task", "network", "kind", "best", "not told apart from it", "which are", "score [%]", "records"]
    return table(head, rows, words=5)


def _scores(task: str, found: Sequence[Contest]) -> list[str]:
    """The scores of all ways on a task."""
    has_new_classes = next(iter(found[0].ways.values()))[0].has_new_classes
    names = ("mean", "new", "old") if has_new_classes else ("target", "source")
    rows = []
    for name in _ways(found):
        cells, files = [], []
        for contest in found:
            runs = contest.ways.get(name, [])
            files += [run.file for run in runs]
            columns = [[run.score for run in runs]] if has_new_classes else []
            columns += [[run.results[key] for run in runs] for key in (TARGET, OLD)]
            cells += [spread(values, contest.seeds) for values in columns]
        rows.append([name, *cells, links(files)])
    head = ["method", *(f"{contest.backbone}, {name}" for contest in found for name in names), "records"]
    what = (
        "harmonic mean of the accuracies on new and old classes, and both"
        if has_new_classes
        else "accuracy on the target, and on the source"
    )
    return [
        f"**{task}**: {what}, in %, mean ± standard deviation over {counted(found[0].seeds, 'seed')}:",
        table(head, rows),
    ]


def _differences(task: str, found: Sequence[Contest]) -> list[str]:
    """Paired differences against the references, over all networks of a kind."""
    kinds = [kind for kind in KINDS if any(contest.kind == kind for contest in found)]
    if not kinds:
        return []
    rows = []
    for name in _ways(found):
        members = [contest for contest in found if name in contest.ways]
        cells = [difference(_pooled(members, kind, name, other)) for kind in kinds for other in REFERENCES]
        compared = [run for contest in members for way in (name, *REFERENCES) for run in contest.ways.get(way, ())]
        if any(cell != NONE for cell in cells):
            rows.append([name, *cells, links(run.file for run in compared)])
    head = ["method", *(f"{kind}, less {other}" for kind in kinds for other in REFERENCES), "records"]
    text = (
        f"**{task}**: paired differences in points ± standard error, over the seeds of all networks of a kind; bold "
        "where they are clear:"
    )
    return [text, table(head, rows)] if rows else []


def _pooled(found: Sequence[Contest], kind: str, name: str, other: str) -> Difference | None:
    if name == other:
        return None
    scores: list[dict[object, float]] = [
        {
            (contest.backbone, seed): score
            for contest in found
            if contest.kind == kind
            for seed, score in contest.scores(way).items()
        }
        for way in (name, other)
    ]
    return paired_difference(*scores)


def _ways(found: Sequence[Contest]) -> list[str]:
    """Those of all contests, in the order of the longest, to which the others add theirs."""
    longest = sorted(found, key=lambda contest: -len(contest.ways))
    return list(dict.fromkeys(name for contest in longest for name in contest.ways))


def _draw_ranks(found: Sequence[Contest], path: Path) -> None:
    def panel(contest: Contest) -> RankPanel:
        series: dict[str, dict[int | None, Range]] = {}
        for runs in contest.trained:
            scores = [100 * run.score for run in runs]
            mean, deviation = statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
            series.setdefault(runs[0].method, {})[runs[0].lora_rank] = (mean - deviation, mean, mean + deviation)
        title = f"{contest.task}\n{contest.backbone}"
        return RankPanel(title=title, label=f"{contest.score_label} [%]", series=series)

    save_over_rank(panel_grid(found, [panel(contest) for contest in found]), path)


def _draw_forgetting(found: Sequence[Contest], path: Path) -> None:
    def panel(contest: Contest) -> ScatterPanel:
        series: dict[str, list[tuple[float, float]]] = {}
        for runs in contest.trained:
            gain = statistics.fmean(100 * (run.results[TARGET] - run.results[TARGET_BEFORE]) for run in runs)
            forgotten = statistics.fmean(100 * run.results["forgetting"] for run in runs)
            series.setdefault(runs[0].method, []).append((gain, forgotten))
        return ScatterPanel(
            title=f"{contest.task}\n{contest.backbone}",
            across="accuracy gained on the target [points]",
            up="accuracy lost on the source [points]",
            series=series,
        )

    save_scatter(panel_grid(found, [panel(contest) for contest in found]), path)
