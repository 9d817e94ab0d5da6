from __future__ import annotations

from peft_edge.profiling.tables import cost_table, profile_table, text_table
from peft_edge.records import StepProfile


def test_lines_end_below_one_another() -> None:
    assert text_table([("a", "long"), ("longer", "b")]) == "     a  long\nlonger     b"


def test_columns_that_are_compared_have_one_unit_with_three_digits() -> None:
    costs = {
        "full": StepProfile(
            process_index=0,
            scope="step",
            flops_forward=9_624_000_000,
            flops_backward=18_900_000_000,
            flops_elementwise_forward=600_000_000,
            flops_elementwise_backward=1_200_000_000,
            flops_optimizer=49_000_000,
            memory_peak_bytes=1246 * 2**20,
            memory_peak_phase="backward",
            num_trainable_params=3_500_000,
            memory_gradients_bytes=0,
            adapter_bytes=5 * 2**10,
        ),
        "head": StepProfile(process_index=0, scope="step", flops_forward=10**9, memory_peak_bytes=2**20),
    }
    tables = (table.splitlines() for table in cost_table(costs).split("\n\n"))
    (caption, *arithmetic), (caption_of_memory, *memory) = tables
    assert caption == "arithmetic and time of a training step"
    assert caption_of_memory == "memory when it is at its peak, and the update"
    assert list(map(str.split, arithmetic)) == [
        ["GFLOP"] * 4,
        ["forward", "backward", "elementwise", "optimizer"],
        ["full", "9.62", "18.9", "1.80", "0.05"],
        ["head", "1.00", *"---"],
    ]
    assert list(map(str.split, memory)) == [
        [*["MiB"] * 6, "k", "B"],
        [
            "peak",
            "in",
            "peak",
            "parameters",
            "gradients",
            "activations",
            "temporaries",
            "optimizer",
            "trained",
            "saved",
        ],
        ["full", "backward", "1,246", "-", "0", "-", "-", "-", "3,500", "5,120"],
        ["head", "-", "1.00", *"-------"],
    ]


def test_what_nobody_measured_has_no_column() -> None:
    table = cost_table({"a": StepProfile(process_index=0, scope="step", forward_s=0.0123, samples_per_s=1234.5)})
    units, titles, line = (line.split() for line in table.splitlines()[1:])
    assert units == ["ms", "ms", "ms", "per", "s"]
    assert titles == ["forward", "backward", "optimizer", "samples"]
    assert line == ["a", "12.3", "-", "-", "1,234"]


def test_a_profile_has_a_line_for_each_process_and_rank() -> None:
    rows = [
        StepProfile(process_index=0, scope="step", flops_forward=2),
        StepProfile(process_index=11, scope="layers", lora_rank=4, flops_forward=1),
    ]
    _, unit, title, *lines = profile_table(rows).splitlines()
    assert (unit.split(), title.split()) == (["FLOP"] * 4, ["forward", "backward", "elementwise", "optimizer"])
    assert [line.split("  ")[0].strip() for line in (line.strip() for line in lines)] == [
        "process 0",
        "process 11, layers of rank 4",
    ]
