from __future__ import annotations

from pathlib import Path

import pytest

from peft_edge.bench.results import BenchRecord, BenchRow, PhaseTimes
from peft_edge.records import StepProfile
from peft_edge.report.times import read_bench, times_section


@pytest.fixture
def record() -> BenchRecord:
    profile = StepProfile(process_index=0, scope="step", memory_peak_bytes=3 * 2**20)
    rounds = [PhaseTimes(forward_s=1.0, backward_s=2.0, optimizer_s=0.0)]
    return BenchRecord(
        created_at="",
        setting={"backbone": "net", "batch_size": 16, "image_size": 224, "threads": 1},
        rows=[
            BenchRow(name="full", label="full fine-tuning", profile=profile, rounds=rounds, ratio_median=1.0),
            BenchRow(name="lora", label="our LoRA", profile=profile, rounds=rounds, ratio_median=0.516),
            BenchRow(name="other", label="another package", error="it is not installed\nreally"),
        ],
        total_time=1.0,
        load_average=[0.0, 0.0],
        package_info={},
        system_info={"processor": "a processor", "cores": "2"},
        pytorch_info="",
    )


def test_times_and_peaks_carry_their_record(record: BenchRecord, tmp_path: Path) -> None:
    (tmp_path / "net.json").write_text(record.to_json(), encoding="utf-8")
    text = times_section({f"bench/{name}": one for name, one in read_bench(tmp_path).items()})
    assert "| our LoRA | 0.52 | [@bench/net.json] |" in text
    assert "| our LoRA | 3 | [@bench/net.json] |" in text
    assert "- net, another package: it is not installed" in text
    assert "a processor, 1 thread" in text


def test_a_folder_without_comparisons_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no record of peft-edge bench"):
        read_bench(tmp_path)


def test_another_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"adapter\.json is not a record of peft-edge bench"):
        read_bench(tmp_path)
