from __future__ import annotations

import pytest

from peft_edge.report.markdown import (
    NONE,
    counted,
    difference,
    fixed,
    interval,
    links,
    numbered,
    percent,
    picture,
    short,
    spread,
    table,
)
from peft_edge.report.stats import Difference


@pytest.mark.parametrize(
    ("value", "digits", "text"), [(1234.56, 1, "1,234.6"), (-0.04, 1, "0.0"), (-0.06, 1, "-0.1"), (None, 2, NONE)]
)
def test_fixed(value: float | None, digits: int, text: str) -> None:
    assert fixed(value, digits) == text


@pytest.mark.parametrize(("value", "text"), [(0.123, "0.12"), (1.234, "1.23"), (12.34, "12.3"), (12345.6, "12,346")])
def test_short(value: float, text: str) -> None:
    assert short(value) == text


def test_a_spread_is_the_mean_and_the_sample_deviation() -> None:
    assert spread([0.5, 0.6, 0.7], 3) == "60.0 ± 10.0"
    assert spread([0.5], 1) == "50.0"
    assert spread([0.5, 0.5], 3) == "50.0 ± 0.0 (2)"
    assert spread([]) == NONE


def test_clear_differences_are_bold() -> None:
    assert difference(Difference(mean=0.05, error=0.01, pairs=3)) == "**+5.0 ± 1.0**"
    assert difference(Difference(mean=-0.01, error=0.01, pairs=3)) == "-1.0 ± 1.0"
    assert difference(Difference(mean=-0.01, error=None, pairs=1)) == "-1.0"
    assert difference(None) == NONE


def test_a_file_has_one_number_in_a_page() -> None:
    text = "\n".join([links(["results/a b.json", "c.json", "c.json"]), "[0.1, 0.2]", links(["c.json", "d.json"])])
    assert numbered(text).splitlines() == [
        "[1] [2]",
        "[0.1, 0.2]",
        "[2] [3]",
        "[1]: results/a%20b.json",
        "[2]: c.json",
        "[3]: d.json",
    ]


def test_counts_and_intervals() -> None:
    assert [counted(number, "seed") for number in (1, 3)] == ["1 seed", "3 seeds"]
    assert [interval(numbers) for numbers in ([3, 1, 2], [4, 4])] == ["1 to 3", "4"]


def test_a_table_aligns_its_numbers() -> None:
    text = table(["a", "b", "records"], [["x", percent(0.5), "[1]"]])
    assert text.splitlines() == ["| a | b | records |", "| --- | ---: | --- |", "| x | 50.0 | [1] |"]


def test_a_picture_leads_to_its_large_form() -> None:
    assert picture("name", "Text").startswith("[![Text](figures/name.png)](figures/name.svg)")
