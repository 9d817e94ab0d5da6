"""A plan as text."""

from __future__ import annotations

from peft_edge.plan.budget import step_flops
from peft_edge.plan.search import Candidate, Plan
from peft_edge.profiling.tables import text_table


def plan_table(plan: Plan) -> str:
    """Returns what fits, a line for each, on what its order is based, and why the others do not fit."""
    parts = [_order_of(plan)] if plan.fitting else ["nothing fits"]
    if plan.fitting:
        parts.append(_table(plan))
    if plan.exceeding:
        lines = [
            f"  {candidate.name} ({_setting(candidate)}): {'; '.join(candidate.excess)}" for candidate in plan.exceeding
        ]
        parts.append("\n".join(["these do not fit, nor with a higher rank, in the most frugal setting", *lines]))
    return "\n\n".join(parts)


def _order_of(plan: Plan) -> str:
    what = "these fit, each in the mildest setting that does"
    if any(candidate.evidence is not None for candidate in plan.fitting):
        where = "this backbone" if plan.is_same_backbone else "other backbones"
        return (
            f"{what}; the most accurate first, by {plan.records} runs on {where}, and those without accuracy by the "
            "number of trained parameters"
        )
    return f"{what}; nothing is known of their accuracy, so they are ordered by the number of trained parameters"


def _table(plan: Plan) -> str:
    rows = [["", "", "", "MiB", "GFLOP", "KiB", "k", "test"]]
    rows.append(["", "norm", "lean", "peak", "a step", "saved", "trained", "accuracy"])
    for candidate in plan.fitting:
        profile, known = candidate.profile, candidate.evidence
        rows.append(
            [
                candidate.name,
                candidate.norm,
                _lean(candidate),
                f"{(profile.memory_peak_bytes or 0) / 2**20:,.1f}",
                f"{step_flops(profile) / 1e9:,.2f}",
                f"{(profile.adapter_bytes or 0) / 2**10:,.1f}",
                f"{(profile.num_trainable_params or 0) / 1e3:,.1f}",
                "-" if known is None else f"{known.accuracy:.3f} ({known.runs})",
            ]
        )
    return text_table(rows)


def _setting(candidate: Candidate) -> str:
    return f"norm {candidate.norm}, lean {_lean(candidate)}"


def _lean(candidate: Candidate) -> str:
    if candidate.lean is None:
        return "off"
    return f"{candidate.lean['masks']} masks{', folded norms' if candidate.lean.get('fold_norm') else ''}"
