from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peft_edge import bench, cli, export, methods, plan, roles, study
from peft_edge.backbones import load_backbone
from peft_edge.cli import main
from peft_edge.profiling import figures, flops
from peft_edge.profiling.analysis import analyse
from peft_edge.profiling.tables import cost_table
from peft_edge.records import StepProfile
from peft_edge.tuners.norm import Norm

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


def test_plan_lists_what_fits_and_what_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "head", "lora", "--target-modules", "project", "--lora-rank", "4"]
    main([*PLAN, *options, "--adapter-bytes", "60KiB"])
    printed = capsys.readouterr().out
    assert printed.startswith(
        "Training steps of test_efficientnet, 10 classes, batch 2, 32 px, adamw; at most saved update 60 KiB\n"
    )
    assert "nothing is known of their accuracy" in printed
    assert [line.split()[0] for line in printed.splitlines() if " stats " in line] == ["lora,", "head"]


def test_bench_prints_a_table_and_writes_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    main([*BENCH, "--methods", "inference", "--json", str(json_file), "--picture", str(picture)])
    printed = capsys.readouterr().out
    assert printed.startswith("One training step of test_resnet, 10 classes, batch 2, 32 px, rank 4")
    written = json.loads(json_file.read_text(encoding="utf-8"))
    assert [row["name"] for row in written["rows"]] == ["full", "inference"]
    assert StepProfile(**written["rows"][1]["profile"]).flops_backward == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_study_prints_a_table_and_names_the_log_of_a_failed_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid.yaml").write_text("networks: [resnet18]\ngrid: {method: [full, lora]}\n")
    asked = {}
    monkeypatch.setattr(study, "run_grid", lambda jobs, **options: asked.update(options))
    with pytest.raises(SystemExit) as stop:
        main(["study", "--grid", str(tmp_path / "grid.yaml"), "--output-dir", str(tmp_path / "runs"), "--jobs", "2"])
    assert stop.value.code == 2
    assert asked == {"processes": 2, "results": tmp_path / "runs" / "results"}
    printed = capsys.readouterr()
    assert "0, not run" in printed.out
    assert f"error: 2 of 2 failed: {tmp_path}/runs/resnet18--full" in printed.err


def test_interrupted_study_ends_with_exit_code_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "read_grid", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["study", "--grid", "grid.yaml", "--output-dir", str(tmp_path)])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "stopped: finished results are kept\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "head", "lora", "--lora-rank", "2", "4"],
        ["--method", "head", "--lora-rank", "2", "--method", "lora", "--lora-rank", "4"],
        ["--method=head", "--method=lora", "--lora-rank", "2", "4"],
        ["--meth", "head", "lora", "--lora", "2", "4"],
    ],
)
def test_options_take_several_values_and_can_be_abbreviated(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}

    def find(backbone: object, budget: plan.Budget, **options: object) -> None:
        given.update(options, budget=budget)
        raise ValueError

    monkeypatch.setattr(cli, "find_plan", find)
    with pytest.raises(SystemExit):
        main([*PLAN, *arguments, "--target-modules", "project", "conv.*", "--memory", "1.5 mib"])
    assert given["methods"] == ["head", "lora"]
    assert given["lora_ranks"] == [2, 4]
    assert given["target_modules"] == ["project", "conv.*"]
    assert given["budget"] == plan.Budget(memory_bytes=3 * 2**19)


def test_choices_are_those_of_the_package() -> None:
    assert (*methods.METHODS,) == cli.METHOD_NAMES
    assert (*methods.OPTIMIZERS,) == cli.OPTIMIZER_NAMES
    assert {*cli.ROLE_NAMES} == {*roles.ROLES}
    assert cli.Accounting == flops.Accounting
    assert [*bench.CONTENDERS] == cli.CONTENDERS
    assert (*export.FORMATS,) == cli.EXPORT_FORMATS
    assert Norm.__args__ == cli.NORMS
    assert cli.PICTURE_SUFFIXES == figures.FORMATS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["proflie"], "Did you mean 'profile'?"),
        (["profile"], "--backbone"),
        ([*PROFILE, "--method", "lorra"], "found 'lorra'; did you mean lora?"),
        ([*PROFILE, "--optimizer", "adam"], "found 'adam'; did you mean adamw?"),
        ([*PROFILE, "--lora-ranks", "4"], "No such option: --lora-ranks"),
        ([*PROFILE, "--lora-rank", "0"], "'--lora-rank': Input should be greater than or equal to 1"),
        ([*PROFILE, "--lora-rank", "four"], "'--lora-rank': Input should be a valid integer"),
        ([*PROFILE, "--target-modules", "("], "'(' is neither a role nor a regular expression"),
        ([*PROFILE, "--target-modules", "depth-wise"], "found 'depth-wise'; did you mean depthwise?"),
        ([*PROFILE, "--json", "."], "'.' is a directory"),
        (
            [*PROFILE, "--method", "head", "--picture", "costs.gif"],
            "expected a file that ends in one of .png, .svg, .pdf",
        ),
        ([*PLAN, "--memory", "256"], "'--memory': '256' is not an amount: expected a number and one of B, KB"),
        ([*PLAN, "--memory", "0MiB"], "omit the budget for no limit"),
        ([*PLAN, "--flops", "3GiB"], "such as 3GFLOP"),
        ([*BENCH, "--methods", "lora"], "found 'lora'; did you mean"),
        (["export", "adapter"], "Missing option '--out'"),
        (["export", "adapter", "--out", "x.pt2", "--format", "tflite"], "found 'tflite'"),
        (["export", "adapter", "--out", "x.onnx", "--image-size", "0"], "'--image-size': Input should be greater"),
    ],
)
def test_wrong_arguments_end_with_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "--backbone", "inception_v3", "--image-size", "32", "--method", "head"], "(16, 3, 32, 32)"),
        (["profile", "--backbone", "mobilenet_v2"], "The nearest are"),
        ([*PROFILE, "--method", "head", "--json", "/dev/null/costs.json"], "/dev/null"),
        ([*PLAN, "--records", "/dev/null"], "holds no record"),
        (["study", "--grid", "/dev/null", "--output-dir", "runs"], "expected `recipes`"),
        ([*BENCH, "--backbone", "inception_v3"], "inception_v3 cannot be trained on images of 32 px"),
    ],
)
def test_failure_of_a_command_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--help"], "profile"),
        (["--version"], "peft-edge "),
        (["proflie"], "Did you mean 'profile'?"),
        (["plan", "--help"], "--adapter-bytes 200KiB"),
        ([*PROFILE, "--method", "lorra"], "did you mean lora?"),
        ([*PLAN, "--memory", "256"], "expected a number"),
    ],
)
def test_help_and_wrong_arguments_are_answered_without_torch(arguments: list[str], text: str) -> None:
    program = f"""
import sys
from peft_edge.cli import main
try:
    main({arguments})
finally:
    print(*sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    printed, _, modules = result.stdout.rstrip().rpartition("\n")
    assert text in printed + result.stderr
    assert not {"torch", "peft", "timm", "transformers", "datasets", "numpy"} & {*modules.split()}
