from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_edge.bench.results import BenchRecord, BenchRow, PhaseTimes, bench_table, save_bench_figure
from peft_edge.records import StepProfile

COMMITTED = Path(__file__).parents[2] / "reports" / "bench"


def row(name: str, *steps: tuple[float, float, float], peak_mib: int = 100, error: str = "") -> BenchRow:
    profile = StepProfile(process_index=0, scope="step", memory_peak_bytes=peak_mib * 2**20, flops_forward=10**9)
    rounds = [PhaseTimes(forward_s=f, backward_s=b, optimizer_s=o) for f, b, o in steps]
    return BenchRow(name=name, label=name, error=error, profile=None if error else profile, rounds=rounds)


@pytest.fixture
def record() -> BenchRecord:
    # In the second round the machine is half as fast.
    full = row("full", (0.1, 0.2, 0.1), (0.2, 0.4, 0.2), (0.1, 0.25, 0.1), peak_mib=1000)
    lora = row("lora", (0.1, 0.1, 0.0), (0.2, 0.2, 0.0), (0.1, 0.17, 0.0), peak_mib=250)
    lora.rss_growth_bytes = 300 * 2**20
    # A compiled step has no tensors that could be counted.
    compiled = row("compiled", *[(0.1, 0.3, 0.0)] * 3)
    compiled.profile, compiled.compile_s = StepProfile(process_index=0, scope="step"), 17.4
    for contender in (full, lora, compiled):
        contender.compare(full.rounds)
    return BenchRecord(
        created_at="2026-01-01T00:00:00+00:00",
        setting={
            "backbone": "net",
            "num_classes": 10,
            "batch_size": 2,
            "image_size": 32,
            "lora_rank": 4,
            "rounds": 3,
            "threads": 1,
        },
        rows=[full, lora, compiled, row("peer", error="No module named 'peer'")],
        total_time=4.0,
        load_average=[0.1, None],
        package_info={},
        system_info={"cores": "2"},
        pytorch_info="",
    )


def test_ratios_compare_steps_of_the_same_round(record: BenchRecord) -> None:
    full, lora, *_ = record.rows
    assert (full.ratio_best, full.ratio_median, full.ratio_lowest, full.ratio_highest) == (1, 1, 1, 1)
    found = (lora.ratio_best, lora.ratio_median, lora.ratio_lowest, lora.ratio_highest)
    assert found == pytest.approx((0.5, 0.5, 0.5, 0.6))


def test_profile_has_median_times_and_none_for_a_missing_phase(record: BenchRecord) -> None:
    profile = record.rows[1].profile
    assert profile is not None
    assert (profile.forward_s, profile.backward_s, profile.optimizer_s) == (0.1, 0.17, None)


def test_table_shows_ratios_and_errors(record: BenchRecord) -> None:
    lines = bench_table(record).splitlines()
    assert lines[0].startswith("One training step of net, 10 classes, batch 2, 32 px, rank 4")
    compared = next(line.split() for line in lines if line.split()[:1] == ["lora"])
    assert compared == ["lora", "250", "4.0", "300", "200", "0.50", "0.50", "0.50-0.60", "-"]
    compared = next(line.split() for line in lines if line.split()[:1] == ["compiled"])
    assert compared == ["compiled", "-", "-", "-", "400", "1.00", "0.89", "0.50-1.00", "17"]
    assert "  peer: No module named 'peer'" in lines
    assert lines[-1].startswith("load average before and after: 0.1, -, on 2 cores")


def test_table_shows_what_the_same_steps_cost_without_huge_pages(record: BenchRecord) -> None:
    full, lora = row("full", *[(0.2, 0.4, 0.2)] * 3), row("lora", *[(0.2, 0.2, 0.0)] * 3)
    lora.rss_growth_bytes = 350 * 2**20
    for contender in (full, lora):
        contender.compare(full.rounds)
    record.rows_without_huge_pages = [full, lora]
    record.system_info["huge_pages"] = "yes"
    lines = bench_table(record).splitlines()
    cells = {line.split()[0]: line.split()[-3:] for line in lines[3:9] if line.split()}
    assert cells["full"] == ["-", "800", "1.00"]
    assert cells["lora"] == ["350", "400", "0.50"]
    assert cells["compiled"] == ["-", "-", "-"]
    assert lines[-1] == "large tensors in huge pages: yes"
    assert BenchRecord.from_json(record.to_json()) == record


def test_json_has_each_round(record: BenchRecord) -> None:
    written = json.loads(record.to_json())
    assert written["rows"][1]["rounds"][2] == {"forward_s": 0.1, "backward_s": 0.17, "optimizer_s": 0.0}
    assert written["rows"][3]["error"] == "No module named 'peer'"
    assert BenchRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize("file", sorted(COMMITTED.glob("*.json")), ids=lambda file: file.stem)
def test_committed_records_keep_their_data(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert BenchRecord.from_json(text).to_json() == text


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"rows": [{"profile": null}]}'])
def test_wrong_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a BenchRecord: "):
        BenchRecord.from_json(text)


def test_figure_shows_the_contenders_that_ran(record: BenchRecord, tmp_path: Path) -> None:
    save_bench_figure(record, tmp_path / "bench.svg")
    text = (tmp_path / "bench.svg").read_text(encoding="utf-8")
    for label in ("net, 10 classes", "lora", "compiled", "[MiB]", "time of a step", "forward", "growth of the process"):
        assert label in text
    assert "peer" not in text
    assert "without huge pages" not in text
    record.rows_without_huge_pages = record.rows
    save_bench_figure(record, tmp_path / "bench.svg")
    assert "without huge pages" in (tmp_path / "bench.svg").read_text(encoding="utf-8")
