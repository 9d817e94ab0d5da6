from __future__ import annotations

from peft_edge.plan import Candidate, Plan, plan_table
from peft_edge.plan.evidence import Evidence
from peft_edge.records import StepProfile

PROFILE = StepProfile(
    process_index=0,
    scope="step",
    num_trainable_params=12_810,
    flops_forward=10**9,
    flops_optimizer=10**7,
    memory_peak_bytes=200 * 2**20,
    adapter_bytes=2**16,
)
HEAD = Candidate(
    method="head", target_modules=None, lora_rank=None, norm="stats", lean=None, profile=PROFILE, excess=[]
)
LORA = Candidate(
    method="lora",
    target_modules="dense",
    lora_rank=4,
    norm="frozen",
    lean={"fold_norm": True, "masks": "bit"},
    profile=PROFILE,
    excess=["memory 200.0 MiB, 8.0 over", "saved update 64.0 KiB, 4.0 over"],
    evidence=Evidence(accuracy=0.75, runs=3, advantage=0.1),
)


def test_a_line_for_what_fits_and_one_with_reasons_for_what_does_not() -> None:
    lines = plan_table(Plan(fitting=[HEAD], exceeding=[LORA], records=0, is_same_backbone=False)).splitlines()
    assert "nothing is known of their accuracy" in lines[0]
    assert lines[4].split() == ["head", "stats", "off", "200.0", "1.01", "64.0", "12.8", "-"]
    assert lines[-1] == (
        "  lora, dense, rank 4 (norm frozen, lean bit masks, folded norms): memory 200.0 MiB, 8.0 over; "
        "saved update 64.0 KiB, 4.0 over"
    )


def test_the_order_is_explained_where_accuracies_are_known() -> None:
    plan = Plan(fitting=[LORA, HEAD], exceeding=[], records=3, is_same_backbone=True)
    lines = plan_table(plan).splitlines()
    assert "the most accurate first, by 3 runs on this backbone" in lines[0]
    assert lines[4].endswith("0.750 (3)")


def test_that_nothing_fits_is_said() -> None:
    table = plan_table(Plan(fitting=[], exceeding=[LORA], records=0, is_same_backbone=False))
    assert table.startswith("nothing fits\n\nthese do not fit")
