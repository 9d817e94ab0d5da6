from __future__ import annotations

import pytest

from peft_edge.report.claims.claim import AGREED, IN_PART, NOT_AGREED, Claim, not_measured, verdict


@pytest.mark.parametrize(("agreeing", "of", "answer"), [(3, 3, AGREED), (1, 3, IN_PART), (0, 3, NOT_AGREED)])
def test_verdicts(agreeing: int, of: int, answer: str) -> None:
    assert verdict(agreeing, of) == answer


def test_a_section_says_what_is_claimed_how_it_was_measured_and_what_was_found() -> None:
    claim = Claim(title="T", source="S.", measured="M.", found="Agreed: F.", more=["table"])
    assert claim.section.splitlines()[::2] == [
        "## T",
        "**What the source says.** S.",
        "**How it was measured.** M.",
        "**What was found.** Agreed: F.",
        "table",
    ]


def test_what_is_missing_comes_with_the_command_that_makes_it() -> None:
    assert not_measured("a step", "costs.yaml") == (
        "Not measured: there is no record of a step; `peft-edge study --grid costs.yaml --output-dir runs` makes them, "
        "in `runs/results`."
    )
