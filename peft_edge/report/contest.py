"""What has been tried on one network and task, and which of it cannot be told apart from the best."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from peft_edge.report.rows import grouped
from peft_edge.report.runs import Run
from peft_edge.report.stats import Difference, paired_difference

Panel = TypeVar("Panel")


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All runs on one network and task."""

    backbone: str
    """The network."""

    kind: str | None
    """`depthwise`, `standard`, or None where no record tells."""

    task: str
    """The task."""

    ways: dict[str, list[Run]]
    """The runs of each method and rank, one for each seed, in the order of tables."""

    def scores(self, name: str) -> dict[object, float]:
        """The scores of a way by seed; empty for one that was not tried."""
        return {run.seed: run.score for run in self.ways.get(name, ())}

    def mean(self, name: str) -> float:
        """The mean score of a way over its seeds."""
        return statistics.fmean(run.score for run in self.ways[name])

    def difference(self, name: str, other: str) -> Difference | None:
        """The score of a way minus that of another, paired by seed; None if they have no seed in common."""
        return paired_difference(self.scores(name), self.scores(other))

    @property
    def trained(self) -> list[list[Run]]:
        """The runs of every way that trains something: figures show these, from which the others lie far away."""
        return [runs for runs in self.ways.values() if runs[0].record.train_info.num_trainable_params != 0]

    @property
    def score_label(self) -> str:
        """What the score is."""
        return next(iter(self.ways.values()))[0].score_label

    @property
    def seeds(self) -> int:
        """How many seeds the most complete way has."""
        return max(map(len, self.ways.values()))

    @property
    def best(self) -> str:
        """The highest mean, of the ways with the most seeds."""
        return max((name for name, runs in self.ways.items() if len(runs) == self.seeds), key=self.mean)

    @property
    def equals(self) -> list[str]:
        """The best, and what cannot be told apart from it."""
        best = self.best
        found = {name: self.difference(name, best) for name in self.ways}
        return [name for name, against in found.items() if name == best or against is None or not against.is_clear]

    def best_of(self, chosen: Callable[[Run], bool]) -> str | None:
        """The highest mean of the ways whose runs are chosen; None if there are none."""
        names = [name for name, runs in self.ways.items() if chosen(runs[0])]
        return max(names, key=self.mean, default=None)


def contests(runs: Sequence[Run]) -> list[Contest]:
    """Returns the contests of all runs, by task and network."""
    groups = grouped(sorted(runs, key=lambda run: (run.task, run.backbone)), lambda run: (run.task, run.backbone))
    return [
        Contest(
            backbone=backbone,
            kind=members[0].kind,
            task=task,
            ways=grouped(sorted(members, key=lambda run: (run.order, run.seed)), lambda run: run.way),
        )
        for (task, backbone), members in groups.items()
    ]


def panel_grid(found: Sequence[Contest], panels: Sequence[Panel]) -> list[list[Panel | None]]:
    """Returns the panels of contests, a row for a task and a column for a network; None where there is no contest."""
    backbones = list(dict.fromkeys(contest.backbone for contest in found))
    places = {(contest.task, contest.backbone): panel for contest, panel in zip(found, panels, strict=True)}
    return [
        [places.get((task, name)) for name in backbones] for task in dict.fromkeys(contest.task for contest in found)
    ]
