from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peft_edge.config import load_config
from peft_edge.config.schema import METHOD_NAMES, OPTIMIZER_NAMES, ROLE_NAMES
from peft_edge.methods import METHODS, OPTIMIZERS, Method
from peft_edge.roles import ROLES

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
REPLAY, FROZEN = CONFIGS / "lean" / "replay.yaml", CONFIGS / "lean" / "frozen.yaml"
VARIANTS = {"lora-frozen": "lora", "lora-last-stage": "lora", "head-replay": "head"}  # recipes for photographs
TASKS, METHOD_RECIPES = (sorted((CONFIGS / folder).glob("*.yaml")) for folder in ("tasks", "methods"))
NEW = "data.new_classes=[a, b]"
ErrorsOf = Callable[..., str]


def test_the_names_repeated_here_are_those_of_the_registries() -> None:
    assert (tuple(METHODS), tuple(OPTIMIZERS), tuple(ROLES)) == (METHOD_NAMES, OPTIMIZER_NAMES, ROLE_NAMES)


def test_a_users_own_method_is_accepted(monkeypatch: pytest.MonkeyPatch, errors_of: ErrorsOf) -> None:
    monkeypatch.setitem(METHODS, "last-block", Method(prepare=lambda model, options: model))
    assert load_config(["output_dir=a", "data.shift=blend", "method=last-block"]).method == "last-block"
    assert "did you mean last-block?" in errors_of("output_dir=a", "data.shift=blend", "method=last-blok")


def test_impossible_combinations_are_reported_together_with_other_errors(errors_of: ErrorsOf) -> None:
    message = errors_of(
        "output_dir=a",
        "adapter.r=0",
        "backbone.pretrained=true",
        "backbone.checkpoint=b",
        "training.batch_size=30",
        "training.gradient_accumulation_steps=4",
        "data.shift=blend",
        "training.mixed_precision=fp16",
        "adapter.target_modules=all-convs",
        "--cpu",
    )
    assert message.startswith("5 errors")
    for key in (
        "adapter.r",
        "backbone.checkpoint",
        "training.batch_size",
        "training.mixed_precision",
        "target_modules",
    ):
        assert f"{key}: " in message


def test_an_untrained_source_is_refused_but_a_pretrained_one_is_not(errors_of: ErrorsOf) -> None:
    untrained = ["output_dir=a", "data.shift=blend", "source.epochs=0"]
    assert "source.epochs: is 0" in errors_of(*untrained)
    assert load_config([*untrained, "backbone.pretrained=true"]).source.epochs == 0
    assert load_config([*untrained, f"backbone.name={CONFIGS}"]).source.epochs == 0  # the folder of a saved model


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ([], "data.shift: expected a shift or data.new_classes, found neither"),
        (
            ["data.shift=blend", NEW, "data.rehearsal_size=4"],
            "data.shift: expected a shift or data.new_classes, found both",
        ),
        ([NEW, "training.weight_decay=0.1"], "training.weight_decay: would shrink the old classes' frozen rows"),
        (
            ["data.shift=blend", "method=galore", "galore.layerwise=true", "training.max_grad_norm=1"],
            "training.max_grad_norm: needs all gradients at once",
        ),
        (
            ["data.shift=blend", "norm=stats", "lean.split_blocks=true"],
            "lean.split_blocks: needs frozen BatchNorm, and norm is stats",
        ),
        (
            ["data.shift=blend", "norm=stats", "lean.inplace_norm=true"],
            "lean.inplace_norm: needs frozen BatchNorm, and norm is stats",
        ),
        (
            ["data.shift=blend", "conv_adapter.target_modules=("],
            "conv_adapter.target_modules: '(' is not a regular expression",
        ),
        (
            ["data.shift=blend", "backbone.mean=[.5, .5]"],
            "backbone.mean: expected one or three numbers between 0 and 1",
        ),
        (
            ["data.shift=blend", "backbone.std=127"],
            "backbone.std: expected one or three numbers",
        ),
        (
            [NEW, "data.shift_filters=[[domain, ==, sketch]]"],
            "data.shift: expected a shift or data.new_classes, found both",
        ),
        (["data.shift=blend", "training.optimizer=adam"], "training.optimizer: expected one of adamw, sgd"),
        (["data.shift=blend", "method=none", "hub.repo_id=me/a"], "hub.repo_id: is set, and method none produces"),
        (["data.shift=blend", "hub.repo_id=adapter"], "hub.repo_id: expected owner/name, found 'adapter'"),
        (["data.shift=blend", "hub.repo_id=me/an/adapter"], "hub.repo_id: Repo id must be"),
    ],
)
def test_an_impossible_combination_is_named_by_its_key(arguments: list[str], key: str, errors_of: ErrorsOf) -> None:
    message = errors_of("output_dir=a", *arguments)
    assert message.startswith("1 error ")
    assert key in message


@pytest.mark.parametrize(
    "arguments",
    [
        [NEW],
        ["data.shift=blend", r"conv_adapter.target_modules=blocks\.[1-3]\.\d"],
        ["data.shift=blend", "hub.repo_id=me/adapter"],
        [NEW, "data.increments=2", "data.rehearsal_size=4", "training.weight_decay=0.1"],
        ["data.shift=blend", "method=lora", "galore.layerwise=true", "training.max_grad_norm=1"],
    ],
)
def test_a_possible_combination_passes(arguments: list[str]) -> None:
    assert load_config(["output_dir=a", *arguments]).output_dir == "a"


def test_classes_may_be_numbers() -> None:
    assert load_config(["output_dir=a", "data.new_classes=[6, '7']"]).data.new_classes == ["6", "7"]


def test_the_quickstart_is_valid() -> None:
    assert load_config(["--config", str(CONFIGS / "quickstart.yaml")]).output_dir == "runs/quickstart"


@pytest.mark.parametrize("task", TASKS, ids=lambda path: path.stem)
def test_every_task_combines_with_every_method(task: Path) -> None:
    for recipe in METHOD_RECIPES:
        config = load_config(["--config", str(task), "--config", str(recipe), "output_dir=a"])
        assert config.method == VARIANTS.get(recipe.stem, recipe.stem)


@pytest.mark.parametrize("task", TASKS, ids=lambda path: path.stem)
def test_replay_combines_with_every_task_and_with_methods_for_single_layers(task: Path) -> None:
    for method in ("head", "lora", "lora-fa", "dora"):
        recipes = (task, CONFIGS / "methods" / f"{method}.yaml", REPLAY)
        config = load_config([*(f"--config={path}" for path in recipes), "output_dir=a"])
        assert (config.method, config.adapter.target_modules, config.training.replay) == (method, "last-stage", True)


@pytest.mark.parametrize("recipe", METHOD_RECIPES, ids=lambda path: path.stem)
def test_frozen_norms_combine_with_every_method_of_our_own(recipe: Path) -> None:
    if not recipe.stem.startswith("peft-"):
        config = load_config([*(f"--config={path}" for path in (recipe, FROZEN)), "data.shift=blend", "output_dir=a"])
        assert (config.norm, config.lean.enabled, config.lean.inplace_norm) == ("frozen", True, True)


def test_lora_frozen_is_lora_with_frozen_norms_and_lower_learning_rates() -> None:
    options, lora = (
        ["data.shift=blend", "output_dir=a", "training.learning_rate=[1e-3,3e-3]"],
        CONFIGS / "methods" / "lora.yaml",
    )
    combined = load_config([f"--config={lora}", f"--config={FROZEN}", *options])
    assert load_config([f"--config={CONFIGS / 'methods' / 'lora-frozen.yaml'}", *options[:2]]) == combined


def test_there_is_a_recipe_for_every_method_and_no_other_file() -> None:
    assert {path.stem for path in METHOD_RECIPES} == {*METHODS, *VARIANTS}
    # tests/study/ reads them.
    folders = ("backbones", "networks", "ranks", "study")
    of_studies = [file for folder in folders for file in (CONFIGS / folder).iterdir()]
    expected = {
        *TASKS,
        *METHOD_RECIPES,
        *of_studies,
        REPLAY,
        FROZEN,
        CONFIGS / "quickstart.yaml",
        CONFIGS / "README.md",
    }
    assert expected == set(CONFIGS.rglob("*.*"))
