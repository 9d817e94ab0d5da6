from __future__ import annotations

from peft_edge.methods import METHODS
from peft_edge.report.rows import disambiguate_labels, flat, grouped, method_order


def test_rows_of_one_name_are_told_apart_by_what_differs_in_them() -> None:
    keys = [("net", "lora"), ("net", "lora"), ("other", "lora")]
    settings = [{"norm": "stats", "alpha": 8}, {"norm": "frozen", "alpha": 8}, {"norm": "affine"}]
    assert disambiguate_labels(keys, settings) == ["lora, norm=stats", "lora, norm=frozen", "lora"]


def test_a_setting_that_one_lacks_tells_apart_too() -> None:
    assert disambiguate_labels([("a",), ("a",)], [{}, {"lean": True}]) == ["a, lean=None", "a, lean=True"]


def test_blocks_are_flattened_to_dotted_keys() -> None:
    assert flat({"a": 1, "b": {"c": [2], "d": {"e": None}}}) == {"a": 1, "b.c": [2], "b.d.e": None}


def test_groups_and_members_keep_their_order() -> None:
    groups = grouped([3, 1, 4, 1, 5], lambda number: number % 2)
    assert groups == {1: [3, 1, 1, 5], 0: [4]}
    assert list(groups) == [1, 0]


def test_methods_come_in_the_order_of_the_table_and_others_after_them() -> None:
    assert sorted([*METHODS, "my-own"], key=method_order) == [*METHODS, "my-own"]
