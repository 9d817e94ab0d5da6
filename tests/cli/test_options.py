from __future__ import annotations

import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from peft_edge import bench, export, methods, plan, roles
from peft_edge.backbones.loading import INTERPOLATIONS
from peft_edge.cli import costs, main, models, options
from peft_edge.config.schema import Interpolation
from peft_edge.export.train_step import StepOptimizer
from peft_edge.profiling import figures, flops
from peft_edge.tuners.norm import Norm

PLAN = ["plan", "--backbone", "test_efficientnet", "--batch-size", "2", "--image-size", "32", "--num-classes", "10"]
BENCH = ["bench", "--backbone", "test_resnet", "--batch-size", "2", "--image-size", "32", "--rounds", "1"]
PROFILE = ["profile", "--backbone", "mobilenetv2_035", "--batch-size", "2", "--image-size", "32", "--num-classes", "10"]


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

    monkeypatch.setattr(costs, "find_plan", find)
    with pytest.raises(SystemExit):
        main([*PLAN, *arguments, "--target-modules", "project", "conv.*", "--memory", "1.5 mib"])
    assert given["methods"] == ["head", "lora"]
    assert given["lora_ranks"] == [2, 4]
    assert given["target_modules"] == ["project", "conv.*"]
    assert given["budget"] == plan.Budget(memory_bytes=3 * 2**19)


def test_choices_are_those_of_the_package() -> None:
    assert (*methods.METHODS,) == options.METHOD_NAMES
    assert (*methods.OPTIMIZERS,) == options.OPTIMIZER_NAMES
    assert {*options.ROLE_NAMES} == {*roles.ROLES}
    assert costs.Accounting == flops.Accounting
    assert [*bench.CONTENDERS] == costs.CONTENDERS
    assert (*export.FORMATS,) == models.EXPORT_FORMATS
    assert get_args(get_type_hints(StepOptimizer)["name"]) == options.STEP_OPTIMIZERS
    assert Norm.__args__ == costs.NORMS
    assert get_args(Interpolation) == INTERPOLATIONS
    assert options.PICTURE_SUFFIXES == figures.FORMATS


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
