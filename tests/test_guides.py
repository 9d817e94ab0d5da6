"""Run the commands and the Python blocks of every guide, in order, in one process and with less to do.

Each guide starts in an empty folder. Commands that install packages, log in or start processes are only looked up.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from timm.models import save_for_hf

import train
from peft_edge import cli
from peft_edge.data import embedded
from peft_edge.study.device_study import device_table, read_device_records
from tests.hub import stand_in

ROOT = Path(__file__).parents[1]
GUIDES = sorted(
    guide.relative_to(ROOT).as_posix()
    for guide in [ROOT / "README.md", ROOT / "configs/README.md", *(ROOT / "peft_edge").rglob("README.md")]
)
PRETRAINED = "timm/mobilenetv3_small_100.lamb_in1k"

# Folders of coloured images, each with its brightness.
PHOTOGRAPHS = {"path/to/photos": 255, "path/to/photos-of-the-new-camera": 150, "PACS/photo": 240, "PACS/sketch": 120}

LESS_TRAINING = [
    "data.image_size=32",
    "source.epochs=1",
    "training.epochs=1",
    "training.warmup_steps=1",
    "training.learning_rate=1e-2",
    "--cpu",
]
LESS_OF = {
    "configs/tasks/image_folder_shift.yaml": [
        "backbone.pretrained=false",
        "source.batch_size=4",
        "training.batch_size=4",
    ],
    "configs/tasks/image_folder_new_classes.yaml": [
        "backbone.pretrained=false",
        "source.batch_size=4",
        "training.batch_size=2",
        "data.rehearsal_size=4",
    ],
    "configs/tasks/pacs_sketch.yaml": ["source.batch_size=4", "training.batch_size=4"],
    "configs/tasks/shapes_shift.yaml": ["data.name=digits", "data.shift=invert", "data.severity=null"],
    "profile": ["--image-size", "64"],
    "plan": ["--image-size", "64", "--method", "lora", "--target-modules", "dense", "--lora-rank", "4"],
    "bench": [
        *("--image-size", "32", "--batch-size", "2", "--rounds", "1", "--methods", "full", "lora-dense"),
        "--huge-pages-only",
    ],
    "study": ["--grid", "small_grid.yaml", "--jobs", "1"],
}
"""Options to add to a command that contains this word."""

pytestmark = [
    # The client of the Hub uploads in a way of which its own HTTP library warns.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    # The Trainer pins memory by default, also where there is no GPU.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache folder that all guides share, so that equal source models are trained only once."""
    return tmp_path_factory.mktemp("sources")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: Path) -> Iterator[Path]:
    """Return a folder like that of the repository. It has the photographs and models that the guides assume."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(embedded, "DIGITS_SPLIT_SIZES", {"adaptation": 64, "validation": 30, "test": 60})
    for name in ("configs", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(sources)
    for number in range(36):
        for folder, light in PHOTOGRAPHS.items():
            file = tmp_path / folder / ("owl", "fox", "hare")[number % 3] / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (light, 5 * number, light * (number % 3) // 2)).save(file)
    for number in range(20):
        file = tmp_path / "path" / "to" / "digits" / str(number % 10) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 12 * number).save(file)
    _save_as_on_the_hub(tmp_path / PRETRAINED)
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save({f"_{name}": tensor for name, tensor in weights.items()}, tmp_path / "weights.pth")
    create_model = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *names, pretrained=False, **options: create_model(*names, **options)
    )
    grid = {"recipes": [["configs/tasks/digits_shift.yaml"], ["configs/methods/head.yaml"]]}
    less = dict(option.split("=") for option in LESS_TRAINING if "=" in option)
    grid["grid"] = {name: [json.loads(value)] for name, value in less.items()}
    (tmp_path / "small_grid.yaml").write_text(json.dumps(grid))
    with stand_in.reachable(tmp_path / "hf_home"):
        yield tmp_path


def _save_as_on_the_hub(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_for_hf(timm.create_model("mobilenetv3_small_100"), folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    del config["model_args"]  # those on the Hub were saved by older versions
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_every_block_runs(guide: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / guide).read_text()
    if "runs/quickstart/adapter" in text:
        _run(["python", "train.py", "--config", "configs/quickstart.yaml"], monkeypatch)
    names: dict[str, Any] = {"__name__": "guide"}
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        file = re.match(r"# (\w+\.py)\b", block)
        if language == "bash":
            for command in _commands(block):
                _run(command, monkeypatch)
        elif file:
            (place / file[1]).write_text(block)
        else:
            exec(compile(block, guide, "exec"), names)


def test_a_guide_has_no_link_to_a_missing_file() -> None:
    missing = [
        f"{guide}: {link}"
        for guide in [*GUIDES, "CONTRIBUTING.md"]
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / guide).read_text())
        if "://" not in link and not (ROOT / guide).parent.joinpath(link).exists()
    ]
    assert missing == []


ROWS_OF_PHOTOGRAPHS = [
    ("none", "none"),
    ("full", "full"),
    ("lora", "lora--norm=stats"),
    ("lora", "lora--norm=frozen"),
    ("lora", "lora-last-stage"),
    ("head", "head-replay"),
]
"""Method and name of the runs in each row of the README's table of photographs."""


def test_the_table_of_the_readme_is_the_record() -> None:
    record = json.loads((ROOT / "reports/bench/mobilenetv2_100.json").read_text())
    measured = {row["label"]: row for row in record["rows"]}
    table = (ROOT / "README.md").read_text().split("saved [KiB] |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert len(table) > 5
    for line in table:
        label, _, memory, time, size = (cell.strip() for cell in line.strip("|").split("|"))
        row = measured[label]
        assert memory == f"{row['profile']['memory_peak_bytes'] / 2**20:,.0f}"
        assert time == f"{row['ratio_median']:.2f}"
        assert size == f"{row['profile']['adapter_bytes'] / 2**10:,.0f}"


CONTENDERS_OF_LEAN_TABLE = [
    ("full", "full-lean", "full-recompute", "", "full-checkpoint"),
    ("galore", "galore-lean", "galore-recompute", "", ""),
    ("peft-lora", "peft-lora-lean", "", "", "peft-lora-checkpoint"),
    ("", "lora-stats", "lora-stats-recompute", "", "lora-stats-checkpoint"),
    ("lora-plain", "lora-dense", "lora-recompute", "lora-split", "lora-checkpoint"),
    ("", "lora-all-conv", "lora-all-conv-depthwise", "lora-all-conv-split", ""),
]
"""Names of the contenders in each row of the table in the guide to lean training."""


def test_the_table_of_the_lean_guide_is_the_record() -> None:
    record = json.loads((ROOT / "reports/bench/mobilenetv2_100.json").read_text())
    measured = {
        row["name"]: f"{(row['profile']['memory_peak_bytes'] or 0) / 2**20:,.0f} MiB, {row['ratio_median']:.2f}"
        for row in record["rows"]
    }
    table = (ROOT / "peft_edge/lean/README.md").read_text().split("| checkpointed |\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")[1:]] for line in table.splitlines()[1:]]
    assert rows == [[measured.get(name, "") for name in names] for names in CONTENDERS_OF_LEAN_TABLE]


def test_the_times_in_sentences_are_of_the_records() -> None:
    records = [json.loads(file.read_text()) for file in (ROOT / "reports/bench").glob("*.json")]
    (record,) = [record for record in records if record["setting"]["backbone"] == "mobilenetv2_100"]
    rows = {row["name"]: row for row in record["rows"]}
    (plain,) = [row for row in record["rows_without_huge_pages"] if row["name"] == "full-lean"]
    seconds = [sum(phases.values()) for phases in rows["full"]["rounds"]]
    names = ("full-lean", "full-recompute", "galore-lean", "galore-recompute", "peft-lora-lean")
    trained = [
        row["ratio_median"]
        for each in records
        for row in each["rows"]
        if row["name"] in (*names, "lora-stats", "lora-stats-recompute")
    ]

    guide = " ".join((ROOT / "peft_edge/lean/README.md").read_text().split())
    assert f"took from {min(seconds):.1f} to {max(seconds):.1f} s in this record" in guide
    assert f"takes {rows['full-lean']['ratio_best']:.2f} of the time if the fastest steps are compared" in guide
    assert f"and {plain['ratio_median']:.2f} without huge pages" in guide
    assert f"lean training took {min(trained):.2f} to {max(trained):.2f} times as long as full fine-tuning" in guide
    assert f"without them, `full, lean` takes {plain['ratio_median']:.2f}" in (ROOT / "README.md").read_text()


def test_the_table_of_allocators_is_of_the_records() -> None:
    wanted: dict[str, list[str]] = {}
    for allocator in ("glibc", "jemalloc"):
        record = json.loads((ROOT / f"reports/bench/allocators/{allocator}.json").read_text())
        for key in ("rows_without_huge_pages", "rows"):
            for row in record[key]:
                fastest = min(sum(phases.values()) for phases in row["rounds"])
                growth = row["rss_growth_bytes"] / 2**20
                wanted.setdefault(row["label"], []).append(f"{1e3 * fastest:,.0f}, {growth:,.0f}")
    table = (ROOT / "peft_edge/lean/README.md").read_text().split("| jemalloc, huge pages |\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    assert len(rows) == 7
    assert {label: cells for label, *cells in rows} == wanted


def test_the_table_of_photographs_is_of_the_records() -> None:
    table = (ROOT / "README.md").read_text().split("| peak memory [MiB] |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert len(table) == len(ROWS_OF_PHOTOGRAPHS)
    for line, (method, name) in zip(table, ROWS_OF_PHOTOGRAPHS, strict=True):
        wanted = []
        for task in ("pacs_sketch", "pacs_art_painting", "pacs_new_classes"):
            records = [
                json.loads((ROOT / f"reports/results/{method}--{task}--{name}--seed={seed}.json").read_text())
                for seed in range(3)
            ]
            for key in ("test accuracy", "source test accuracy"):
                wanted.append(
                    f"{100 * statistics.mean(record['train_info']['metrics'][-1][key] for record in records):.1f}"
                )
        if method != "none":
            peaks = [row["memory_peak_bytes"] for row in records[0]["profile"] if row["scope"] == "step"]
            wanted += [f"{records[0]['train_info']['file_size'] / 2**10:,.0f}", f"{peaks[0] / 2**20:,.3g}"]
        assert [cell.strip() for cell in line.strip("|").split("|")][1 : 1 + len(wanted)] == wanted


def test_the_table_of_the_export_guide_is_made_of_the_records() -> None:
    table = device_table(read_device_records(ROOT / "reports/device"))
    assert f"\n\n{table}\n\n" in (ROOT / "peft_edge/export/README.md").read_text()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def _commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(command, comments=True) for line in lines for command in line.split("&&")]


def _run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    less = [option for word, options in LESS_OF.items() if word in command for option in options]
    match command:
        case ["pip", "install", "-e", what]:
            extra = what.removeprefix(".").strip("[]")
            assert not extra or f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
        case ["hf", "auth", "login"]:
            assert shutil.which("hf")
        case ["pytest" | "ruff" | "mypy", *_]:
            assert shutil.which(command[0])
        case ["accelerate", "launch", *_]:
            assert shutil.which("accelerate")
            _run(["python", *command[command.index("train.py") :]], monkeypatch)
        case ["python", script, *arguments]:
            AcceleratorState._reset_state(reset_partial_state=True)
            is_example = "/examples/" in script  # its path begins in the repository, and it does not run train.py
            if arguments != ["--help"] and not is_example:
                arguments = [*arguments, *less, *LESS_TRAINING]
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            path = str(ROOT / script) if is_example else script
            run = train.command if script == "train.py" else lambda: runpy.run_path(path, run_name="__main__")
            _expect_success(run)
        case ["peft-edge", "study", *_] if "--cluster" in command:
            assert shutil.which("ray")
            _run(command[: command.index("--cluster")], monkeypatch)
        case ["peft-edge", name, *arguments]:
            if name == "apply" and not Path("path/to/deployed").exists():
                _deploy(Path(arguments[arguments.index("--base") + 1]))
            _expect_success(lambda: cli.main([name, *arguments, *less]))
        case _:
            raise AssertionError(f"this test does not know the command: {shlex.join(command)}")


def _expect_success(run: Any) -> None:
    """Call `run`, and fail if it exits with an error code. An exit with code 0, as after `--help`, is accepted."""
    try:
        run()
    except SystemExit as ending:
        if ending.code:
            raise AssertionError("the command has failed") from ending


def _deploy(folder: Path) -> None:
    """Copy the source model of the quickstart to `folder`, where the guide expects the base model of a device."""
    base = json.loads(Path("runs/quickstart/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    shutil.copytree(base, folder)
