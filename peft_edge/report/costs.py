"""Analysed steps, as rows."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from peft_edge.records import Archive, CostRecord
from peft_edge.report.rows import KINDS, disambiguate_labels, method_order

PLAIN, OURS, LEAN, STORED = FORMS = ("as it is", "ours, not lean", "lean", "on stored features")
"""How a method is trained: as autograd and PEFT do it; with our layers, not lean and lean; on stored features."""

_NEEDED = ("memory_peak_bytes", "flops_forward", "flops_backward")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """An analysed step."""

    file: str
    """The file of its record, seen from the page."""

    family: str
    """The method, without the name of the package that it comes from: `lora` is PEFT's as well as ours."""

    form: str
    """How it is trained: `PLAIN` (as autograd and PEFT do it), `LEAN`, `STORED` (features) or `OURS`, which is not
    lean."""

    variant: str
    """The family, and what tells it from others that are trained in the same form."""

    method: str
    """Family and form, and what tells it from others of that name."""

    record: CostRecord
    """All of it."""

    @property
    def network(self) -> str:
        """What was analysed."""
        return self.record.network

    @property
    def kind(self) -> str:
        """`standard`, `depthwise` or `transformer`."""
        return self.record.kind

    @property
    def batch_size(self) -> int:
        """Images or sequences in the step."""
        return self.record.setting["batch_size"]

    @property
    def accounting(self) -> str:
        """How FLOPs were counted."""
        return self.record.setting["accounting"]

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        assert self.record.profile.memory_peak_bytes is not None
        return self.record.profile.memory_peak_bytes

    @property
    def flops(self) -> int:
        """Convolutions and matrix products, forward and backward."""
        assert self.record.profile.flops_forward is not None
        assert self.record.profile.flops_backward is not None
        return self.record.profile.flops_forward + self.record.profile.flops_backward


def cost_rows(archive: Archive, folder: str = "") -> list[Cost]:
    """Returns the analyses by kind, network, batch size, accounting and method; see `run_rows` for the arguments.

    Raises:
        ValueError: One lacks its memory or its FLOPs.
    """
    names, records = list(archive.costs), list(archive.costs.values())
    for name, record in archive.costs.items():
        if lacking := [figure for figure in _NEEDED if getattr(record.profile, figure) is None]:
            raise ValueError(f"{name}: an analysis with {', '.join(lacking)} is expected, they are null: make it anew")
    families = [record.method.removeprefix("peft-") for record in records]
    forms = [_form(record) for record in records]
    methods = disambiguate_labels(
        [
            (record.network, record.setting["batch_size"], record.setting["accounting"], f"{family} ({form})")
            for record, family, form in zip(records, families, forms, strict=True)
        ],
        [record.setting for record in records],
    )
    rows = [
        Cost(
            file=posixpath.join(folder, name),
            family=family,
            form=form,
            variant=family + method.removeprefix(f"{family} ({form})"),
            method=method,
            record=record,
        )
        for name, family, form, method, record in zip(names, families, forms, methods, records, strict=True)
    ]
    return sorted(
        rows,
        key=lambda row: (
            *(KINDS.index(row.kind), row.network, row.batch_size, row.accounting),
            *(FORMS.index(row.form), method_order(row.family), row.method),
        ),
    )


def _form(record: CostRecord) -> str:
    if record.setting.get("replay"):
        return STORED
    if record.setting.get("lean") is not None:
        return LEAN
    is_theirs = record.kind == "transformer" or record.method.startswith("peft-")
    return PLAIN if is_theirs or record.method in ("full", "galore") else OURS
