"""The study of training in ONNX Runtime: one case from beginning to end, and the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_edge.study import device_study
from peft_edge.study.device_study import DeviceCase, DeviceRecord, RuntimeResult, device_table, read_device_records

CASE = DeviceCase("digits, blend", "test_efficientnet", 32, "last-stage", split=True)
TASK = (
    "data.name=digits",
    "data.shift=blend",
    "data.image_size=32",
    "data.adaptation_size=20",
    "backbone.name=test_efficientnet",
    "source.epochs=1",
)


def record(seed: int, onnx: float | None, torch: float | None, peak: int) -> DeviceRecord:
    costs = {"step_cpu_s": 0.01 * (seed + 1), "peak_bytes": peak}
    return DeviceRecord(
        case=CASE.name,
        network=CASE.network,
        image_size=32,
        batch_size=8,
        target_modules=CASE.target_modules,
        split=True,
        seed=seed,
        steps=3,
        learning_rate=0.1,
        images=20,
        accuracy_before=None if onnx is None else 0.5,
        onnx=RuntimeResult(accuracy=onnx, **costs),
        torch=RuntimeResult(accuracy=torch, **costs),
        export_s=1.0,
        file_bytes={"train_step.onnx": 2048, "prefix.onnx": 1024, "step.json": 7},
        parameters=5,
        system={},
        packages={},
    )


def test_table_has_a_row_for_each_case() -> None:
    records = [record(0, 0.5, 0.75, 2**20), record(1, 0.75, 0.625, 3 * 2**20)]
    *_, row = device_table(records).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        *("digits, blend", "test_efficientnet, 32 px", "last-stage, split"),
        *("50.0", "62.5", "68.8", "25.0", "15.0", "15.0", "3", "3", "3"),
    ]
    *_, row = device_table([record(0, None, None, 2**20)]).splitlines()
    assert [cell.strip() for cell in row.strip("|").split("|")][3:7] == ["-", "-", "-", "-"]


def test_records_keep_what_the_guide_promises() -> None:
    for each in read_device_records(Path(__file__).parents[2] / "reports/device"):
        if each.onnx.accuracy is not None:
            assert abs(each.onnx.accuracy - each.torch.accuracy) <= 0.005
        assert each.onnx.step_cpu_s <= each.torch.step_cpu_s
        assert each.onnx.peak_bytes < 0.5 * each.torch.peak_bytes
        if each.network == "mobilenetv3_small_050":
            assert each.onnx.peak_bytes <= (80 if each.split else 150) * 2**20


def test_record_of_a_case_that_left_the_study_is_named(tmp_path: Path) -> None:
    other = record(0, None, None, 2**20).model_copy(update={"case": "letters"})
    (tmp_path / "letters.json").write_text(other.to_json())
    with pytest.raises(ValueError, match=r"letters\.json is the record of letters, test_efficientnet, .*: move"):
        read_device_records(tmp_path)


@pytest.mark.slow
def test_case_is_trained_in_both_runtimes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_study, "CASES", (CASE._replace(task=TASK, epochs=1, seeds=1),))
    arguments = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    device_study.main(arguments)
    (found,) = read_device_records(tmp_path / "out")
    assert (found.steps, found.images, found.split) == (3, 20, True)
    assert found.accuracy_before is not None
    assert abs(found.onnx.accuracy - found.torch.accuracy) < 0.02
    assert found.onnx.peak_bytes < 0.3 * found.torch.peak_bytes
    assert {"prefix.onnx", "predict.onnx", "state.safetensors", "train_step.onnx"} <= found.file_bytes.keys()
    assert capsys.readouterr().out == f"{device_table([found])}\n"

    # What has a record is not run again. The old table of a guide is replaced.
    monkeypatch.setattr(device_study, "run_case", lambda *_: pytest.fail("ran again"))
    old = device_table([found]).splitlines()
    guide = tmp_path / "guide.md"
    guide.write_text("\n".join(["before", "", *old[:2], "| an old row |", "", "after", ""]))
    device_study.main([*arguments, "--guide", str(guide)])
    assert guide.read_text() == f"before\n\n{device_table([found])}\n\nafter\n"
