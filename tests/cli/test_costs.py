from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_edge.backbones import load_backbone
from peft_edge.cli import costs, main
from peft_edge.profiling.analysis import analyse
from peft_edge.profiling.tables import cost_table
from peft_edge.records import StepProfile

PLAN = ["plan", "--backbone", "test_efficientnet", "--batch-size", "2", "--image-size", "32", "--num-classes", "10"]
BENCH = ["bench", "--backbone", "test_resnet", "--batch-size", "2", "--image-size", "32", "--rounds", "1"]
PROFILE = ["profile", "--backbone", "mobilenetv2_035", "--batch-size", "2", "--image-size", "32", "--num-classes", "10"]


def test_profile_prints_and_writes_a_line_for_each_method_and_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_file, picture = tmp_path / "costs.json", tmp_path / "costs.png"
    ranks = ["--lora-rank", "2", "4", "--target-modules", "conv_head"]
    main([*PROFILE, "--method", "head", "lora", *ranks, "--json", str(json_file), "--picture", str(picture)])
    printed = capsys.readouterr().out
    assert printed.startswith("One training step of mobilenetv2_035, 10 classes, batch 2, 32 px, adamw\n")

    written = json.loads(json_file.read_text(encoding="utf-8"))
    costs = {name: StepProfile(**cost) for name, cost in written["costs"].items()}
    assert list(costs) == ["head", "lora, rank 2", "lora, rank 4"]
    assert cost_table(costs) in printed
    analysed = analyse(load_backbone("mobilenetv2_035", 10), "head", batch_size=2, image_size=32).profile[0]
    assert costs["head"] == analysed
    assert (written["backbone"], written["batch_size"], written["accounting"]) == ("mobilenetv2_035", 2, "exact")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_profile_prints_json_and_the_source_study_counts_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    backward = []
    for accounting in ("exact", "source-study"):
        main([*PROFILE, "--method", "full", "--json", "-", "--accounting", accounting])
        backward.append(json.loads(capsys.readouterr().out)["costs"]["full"]["flops_backward"])
    assert backward[1] > 4 * backward[0]


def test_json_is_written_to_a_device_and_through_a_link(tmp_path: Path) -> None:
    head = [*PROFILE, "--method", "head", "--json"]
    main([*head, "/dev/null"])
    assert Path("/dev/null").is_char_device()
    (tmp_path / "link.json").symlink_to(tmp_path / "costs.json")
    main([*head, str(tmp_path / "link.json")])
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "costs.json").read_text(encoding="utf-8"))["num_classes"] == 10


@pytest.fixture
def known_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace `library_memory` by a constant, because it starts a process that imports torch, which takes seconds."""
    monkeypatch.setattr(costs, "library_memory", lambda: 500 * 2**20)


@pytest.mark.usefixtures("known_libraries")
def test_plan_lists_what_fits_and_what_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "head", "lora", "--target-modules", "project", "--lora-rank", "4"]
    main([*PLAN, *options, "--adapter-bytes", "60KiB"])
    printed = capsys.readouterr().out
    assert printed.startswith(
        "Training steps of test_efficientnet, 10 classes, batch 2, 32 px, adamw; at most saved update 60 KiB\n"
    )
    assert "nothing is known of their accuracy" in printed
    assert [line.split()[0] for line in printed.splitlines() if " frozen " in line] == ["lora,", "head"]


@pytest.mark.usefixtures("quick_workers")
def test_bench_prints_a_table_and_writes_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    main([*BENCH, "--methods", "inference", "--huge-pages-only", "--json", str(json_file), "--picture", str(picture)])
    printed = capsys.readouterr().out
    assert printed.startswith("One training step of test_resnet, 10 classes, batch 2, 32 px, rank 4")
    written = json.loads(json_file.read_text(encoding="utf-8"))
    assert [row["name"] for row in written["rows"]] == ["full", "inference"]
    assert StepProfile(**written["rows"][1]["profile"]).flops_backward == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plan_for_onnx_runtime_lists_whole_processes(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", "--backbone", "test_efficientnet", "--num-classes", "3", "--batch-size", "2", "--image-size", "32"]
    options = ["--runtime", "onnx", "--method", "lora", "--target-modules", "last-stage", "--lora-rank", "2"]
    main([*plan, *options, "--optimizer", "sgd", "--memory", "1GiB"])
    first, _, order, *rows = capsys.readouterr().out.splitlines()
    assert first.endswith("batch 2, 32 px, sgd in ONNX Runtime; the whole process at most 1,024 MiB")
    assert order == "these fit, most trained parameters first"
    assert [row.split()[4] for row in rows[3:]] == ["features", "images"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flops", "1GFLOP"], "--runtime onnx: only --memory can be limited"),
        (["--optimizer", "adafactor"], "with --runtime onnx, expected sgd or adamw, found adafactor"),
        (["--method", "full"], "only lora, lora-fa, dora can be exported to devices, found full"),
    ],
)
def test_plan_for_onnx_runtime_refuses_what_it_cannot_do(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--backbone", "test_efficientnet", "--num-classes", "3", "--runtime", "onnx", *options])
    assert message in " ".join(capsys.readouterr().err.split())
