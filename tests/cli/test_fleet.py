from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from peft_edge.cli import main
from peft_edge.cli.fleet import COMBINATION_NAMES
from peft_edge.config import load_config
from peft_edge.data.embedded import load_digits_domain
from peft_edge.hub.combination import COMBINATIONS
from peft_edge.records import SUCCESS, add_record
from peft_edge.training import new_record
from tests.export.support import IMAGE_SIZE, Saved


def digit_folder(folder: Path) -> Path:
    """Write 60 test images of digits into one subfolder per class, and return `folder`."""
    domain, _ = load_digits_domain(image_size=IMAGE_SIZE, seed=0)
    for number, row in enumerate(domain.test.select(range(60))):
        file = folder / str(row["label"]) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(file)
    return folder


def test_two_adapters_are_combined_and_compared_on_two_folders(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(digit_folder(tmp_path / "digits")), str(tmp_path / "few")]
    for digit in ("3", "8"):
        (tmp_path / "few").mkdir(exist_ok=True)
        (tmp_path / "few" / digit).symlink_to(tmp_path / "digits" / digit)
    command = ["merge-adapters", str(saved.adapter), str(saved.adapter), "--weights", "0.5", "0.5"]
    main([*command, "--out", str(tmp_path / "out"), "--test", *folders, "--image-size", "32"])
    first, header, base, adapter, again, combined = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path}/out: 2 adapters combined, rank 4"
    assert header.split("  ")[-2:] == folders
    # The average of an adapter with itself is this adapter.
    assert adapter.split()[1:] == again.split()[1:] == combined.split()[1:]
    assert base.split()[-2:] != adapter.split()[-2:]
    assert all(0.5 < float(cell) <= 1 for row in (base, adapter) for cell in row.split()[-2:])

    (tmp_path / "few" / "ten").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "few" / "ten" / "a.png")
    with pytest.raises(SystemExit) as stop:
        main([*command, "--out", str(tmp_path / "new"), "--test", folders[1]])
    assert stop.value.code == 2
    assert "few: the classes ten are unknown to the adapters" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_images_that_a_run_may_have_trained_on_are_said(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = digit_folder(tmp_path / "digits")
    adapter = shutil.copytree(saved.adapter, tmp_path / "run" / "adapter")
    config = load_config([f"data.name={digits}", "data.shift=invert", "data.image_size=32", "output_dir=run"])
    add_record(tmp_path / "run", "record", new_record(config, SUCCESS, started=0.0))
    command = ["merge-adapters", str(adapter), str(saved.adapter), "--out", str(tmp_path / "out"), "--test"]

    main([*command, str(digits / ".." / "digits")])
    warning = capsys.readouterr().out.splitlines()[-1]
    assert warning.startswith(f"Warning: {adapter} may have been trained on some of these images of {digits}")

    for split in ("train", "test"):
        shutil.copytree(digits, tmp_path / "split" / split)
    shutil.rmtree(digits)
    (tmp_path / "split").rename(digits)
    main([*command, str(digits)])
    assert "Warning" not in capsys.readouterr().out


def test_combinations_are_those_of_the_package() -> None:
    assert COMBINATION_NAMES == COMBINATIONS


def test_one_adapter_is_refused(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge-adapters", str(saved.adapter), "--out", str(tmp_path / "out")])
    assert "expected at least two adapters" in capsys.readouterr().err
