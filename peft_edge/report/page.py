"""The page: every section, put together from records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft_edge.bench.results import BenchRecord
from peft_edge.records import Archive
from peft_edge.report.claims.accuracy import accuracy_claim
from peft_edge.report.claims.arithmetic import arithmetic_claim
from peft_edge.report.claims.choice import choice_claim, decision_table
from peft_edge.report.claims.claim import Claim
from peft_edge.report.claims.memory import memory_claim
from peft_edge.report.claims.updates import updates_claim
from peft_edge.report.costs import Cost
from peft_edge.report.markdown import links, numbered, table
from peft_edge.report.provenance import limits_section, machine_section
from peft_edge.report.runs import Run
from peft_edge.report.savings import not_compared
from peft_edge.report.times import times_section


@dataclass(frozen=True, kw_only=True)
class Rows:
    """All that a page is made from, but for times."""

    archive: Archive
    """The records."""

    folder: str
    """Where they lie, seen from the page."""

    runs: list[Run]
    """The runs that have succeeded."""

    costs: list[Cost]
    """The analyses."""


def claims_of(rows: Rows) -> list[Claim]:
    """Returns the sections on the claims of the source study, in their order."""
    return [
        memory_claim(rows.costs),
        arithmetic_claim(rows.costs),
        accuracy_claim(rows.runs),
        updates_claim(rows.runs),
        choice_claim(rows.runs),
    ]


def page(rows: Rows, claims: Sequence[Claim], measured: Mapping[str, BenchRecord], command: str) -> str:
    """Returns the page in Markdown.

    Args:
        rows: The records.
        claims: From `claims_of`.
        measured: Comparisons of `peft-edge bench` by their files, seen from the page.
        command: With which the page is made.
    """
    archive = rows.archive
    decisions = decision_table(rows.runs)
    sections = [
        "# The study",
        "The findings of *From LLMs to Edge: Parameter-Efficient Fine-Tuning on Edge Devices* "
        f"([arXiv 2507.23536](https://arxiv.org/abs/2507.23536)), measured again from {len(archive.runs)} runs and "
        f"{len(archive.costs)} analyses. This page is made from their records alone:",
        f"```bash\n{command}\n```",
        "Rows of tables end in the numbers of the records that they come from, which lead there; "
        "[data.csv](data.csv) has a row for each record.",
        "## Summary",
        "\n".join(f"- **{claim.title}.** {claim.found}" for claim in claims),
    ]
    if decisions is not None:
        sections += [
            "## In short: what to take",
            "For each task and network: the best score; and, of what cannot be told apart from it, what takes the "
            "least memory in training, what the least arithmetic, and what ships the fewest bytes.",
            decisions,
        ]
    sections += [claim.section for claim in claims]
    if measured:
        sections.append(times_section(measured))
    sections += [machine_section(archive), limits_section(rows.runs)]
    sections += _unfinished(rows)
    if alone := not_compared(rows.costs):
        files = links(cost.file for cost in alone)
        sections.append(f"{len(alone)} analyses have no full fine-tuning to be compared with: {files}.")
    return numbered("\n\n".join(sections) + "\n")


def _unfinished(rows: Rows) -> list[str]:
    """What has failed, diverged or been canceled."""
    lines = []
    for name, run in rows.archive.runs.items():
        if name in rows.archive.finished:
            continue
        config = run.run_info.train_config
        reason = (run.run_info.error_msg.strip().splitlines() or ["no reason given"])[-1].replace("|", "\\|")
        cells = [config["method"], config["backbone"]["name"], str(config.get("seed")), run.train_info.status, reason]
        lines.append([*cells, links([f"{rows.folder}/{name}"])])
    head = ["method", "network", "seed", "status", "reason", "record"]
    return ["## What did not succeed", table(head, lines, words=5)] if lines else []
