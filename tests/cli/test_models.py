from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from peft_edge.backbones import fingerprint, load_backbone
from peft_edge.cli import main, models
from peft_edge.data import build_transform, load_task
from peft_edge.export import exporter, formats
from peft_edge.export.exporter import merge_adapters
from peft_edge.export.verification import input_config
from peft_edge.records import Record
from tests.export.support import Saved, require_onnx


def test_imported_weights_are_the_ones_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = timm.create_model("test_efficientnet", num_classes=4)
    weights = {f"net.{name.replace('blocks', 'stages')}": tensor for name, tensor in trained.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "w.pth")
    options = ["--model", "test_efficientnet", "--mean", ".5", "--std", ".5", ".4", ".3"]
    main(["import", str(tmp_path / "w.pth"), *options, "--out", str(tmp_path / "kept")])
    matched, saved = capsys.readouterr().out.splitlines()
    assert matched.startswith(f"{tmp_path / 'w.pth'}: matched all {len(weights)} tensors by order and shape")
    assert saved.startswith(f"{tmp_path / 'kept'}: the file's head for 4 classes; input_size (3, 160, 160), mean (0.5,")
    kept = load_backbone(str(tmp_path / "kept"))
    assert fingerprint(kept) == fingerprint(trained)
    assert kept.pretrained_cfg["std"] == [0.5, 0.4, 0.3]

    # A folder is a model as well, and a new head is the same in every call.
    file = str(tmp_path / "kept" / "model.safetensors")
    for name in ("first", "second"):
        main(["import", file, "--model", str(tmp_path / "kept"), "--num-classes", "7", "--out", str(tmp_path / name)])
    first, second = (load_backbone(str(tmp_path / name)) for name in ("first", "second"))
    assert fingerprint(first) == fingerprint(second) != fingerprint(kept)
    assert first.num_classes == 7
    assert torch.equal(first.conv_stem.weight, kept.conv_stem.weight)


def test_import_checks_the_weights_on_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "w.pth")
    for number in range(24):
        file = tmp_path / "pets" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 99 * (number % 2), 0)).save(file)
    import_ = ["import", str(tmp_path / "w.pth"), "--model", "test_efficientnet", "--image-size", "32"]
    main([*import_, "--out", str(tmp_path / "out"), "--check", str(tmp_path / "pets")])
    _, title, header, imported, *rest = capsys.readouterr().out.splitlines()
    assert title == f"accuracy on {tmp_path / 'pets'}"
    assert header.split()[-1] == "head"
    assert re.fullmatch(r" *as imported +1\.000 \((\d+) of \1\) +-", imported)
    assert "not significantly better than those of random weights" in rest[-2]
    with pytest.raises(SystemExit):
        main([*import_, "--out", str(tmp_path / "new"), "--check", str(tmp_path / "none")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "test_resnet"], "does not fit test_resnet"),
        (["--model", "test_efficientnt"], "The nearest are test_efficientnet"),
        (["--model", "test_efficientnet"], "has no head: pass --num-classes"),
        (
            ["--model", "test_efficientnet", "--num-classes", "3", "--mean", "127"],
            "Divide numbers for pixels up to 255",
        ),
    ],
)
def test_failed_import_writes_nothing(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(timm.create_model("test_efficientnet", num_classes=0).state_dict(), tmp_path / "w.pth")
    with pytest.raises(SystemExit) as stop:
        main(["import", str(tmp_path / "w.pth"), *options, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_import_never_replaces_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "w.pth")
    (tmp_path / "out").mkdir()
    import_ = ["import", str(tmp_path / "w.pth"), "--model", "test_efficientnet", "--out", str(tmp_path / "out")]
    main(import_)
    files = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(SystemExit):
        main([*import_, "--mean", ".5"])
    assert (
        capsys.readouterr().err
        == f"error: --out: {tmp_path / 'out'} exists already: choose another folder, or delete it\n"
    )
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == files


def test_export_compares_the_file_on_real_images(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "digits.pt2"
    main(["export", str(saved.adapter), "--format", "torch-export", "--out", str(file), "--image-size", "32"])
    first, header, row, last = capsys.readouterr().out.splitlines()
    assert first == f"{file}, compared with {saved.adapter} on 256 images (256 of digits)"
    assert header.split("  ")[-1] == "accuracy"
    assert row.split()[:2] == ["torch-export", f"{file.stat().st_size:,}"]
    # No record says which digits the adapter was trained on.
    assert row.split()[-1] == "-"
    assert last.startswith("No accuracies: ")


def test_images_are_those_of_the_run_by_default(
    saved: Saved, tmp_path: Path, record: Callable[..., Record], capsys: pytest.CaptureFixture[str]
) -> None:
    run = record("lora", 0.5)
    run.run_info.train_config |= {"seed": 1, "data": {"name": "digits", "shift": "invert", "image_size": 40}}
    shutil.copytree(saved.adapter, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "record.json").write_text(run.to_json())
    file = tmp_path / "digits.pt2"
    main(["export", str(tmp_path / "run" / "adapter"), "--format", "torch-export", "--out", str(file)])
    *_, images = (node.meta["val"] for node in torch.export.load(file).graph.nodes if node.op == "placeholder")
    assert tuple(images.shape[1:]) == (3, 40, 40)
    _, _, model, row = capsys.readouterr().out.splitlines()
    assert model.split()[0] == "PyTorch"
    assert row.split()[-1] == model.split()[-1] != "-"


def test_export_measures_several_folders_and_warns(
    saved: Saved,
    tmp_path: Path,
    record: Callable[..., Record],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_onnx()
    run, data = record("lora", 0.5), {"name": "digits", "shift": "invert", "image_size": 32}
    run.run_info.train_config |= {"seed": 0, "data": data}
    shutil.copytree(saved.adapter, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "record.json").write_text(run.to_json())
    domains = ["source", "target"]
    options = ["--out", str(tmp_path / "digits.onnx"), "--quantize", "int8", "--calibration", *domains]
    calibrations = []

    def quantize(floats: Path, integers: Path, batches: Iterator[torch.Tensor]) -> None:
        calibrations.append(torch.cat(list(batches)))
        formats.quantize_onnx(floats, integers, iter(calibrations[-1].split(32)))

    monkeypatch.setattr(exporter, "quantize_onnx", quantize)
    monkeypatch.setattr(models, "MAX_LOSS", -1)
    main(["export", str(tmp_path / "run" / "adapter"), *options, "--test", *domains])
    _, header, model, floats, integers, *warnings = capsys.readouterr().out.splitlines()
    assert header.endswith("accuracy on source  accuracy on target")
    task, network = load_task(**data), saved.load().eval()
    for column, domain in enumerate((task.source, task.targets[0]), start=1):
        transform = build_transform(input_config(network, 32), train=False)
        with torch.no_grad():
            found = network(torch.stack([transform(image) for image in domain.test["image"]])).argmax(1)
        accuracy = (found == torch.tensor(domain.test["label"][:])).float().mean().item()
        assert model.split()[column] == floats.split()[-3 + column] == f"{accuracy:.3f}"
    expected = [float(model.split()[column]) - float(integers.split()[-3 + column]) for column in (1, 2)]
    assert [float(line.split(" loses ")[1].split()[0]) for line in warnings] == pytest.approx(
        [100 * loss for loss in expected], abs=0.11
    )
    assert ["on source." in warnings[0], "on target." in warnings[1]] == [True, True]
    inverted = calibrations[0].flatten(1).mean(1) > 0  # digits are dark, inverted digits are bright
    assert inverted.tolist() == [False] * 100 + [True] * 100


def test_accuracy_on_unknown_classes_is_refused(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        file = tmp_path / "pets" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), number).save(file)
    out = tmp_path / "pets.pt2"
    options = ["--format", "torch-export", "--out", str(out), "--test", str(tmp_path / "pets")]
    with pytest.raises(SystemExit):
        main(["export", str(saved.adapter), *options])
    assert "pets cannot be measured, because" in capsys.readouterr().err
    assert not out.exists()


def test_what_is_applied_to_the_base_is_the_merged_model(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, deployed = tmp_path / "diff.safetensors", tmp_path / "deployed"
    main(["diff", "--base", str(saved.base), "--adapter", str(saved.adapter), "--out", str(file)])
    total = len(load_backbone(str(saved.base)).state_dict())
    changed = load_file(file)
    printed = capsys.readouterr().out
    assert printed == (
        f"{file}: {file.stat().st_size:,} bytes, {len(changed)} of {total} tensors; the base is {saved.base}\n"
    )
    main(["diff", "--adapter", str(saved.adapter), "--out", str(file)])  # the adapter names its base
    assert capsys.readouterr().out == printed
    again = load_file(file)
    assert again.keys() == changed.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in changed.items())
    main(["apply", "--base", str(saved.base), "--diff", str(file), "--out", str(deployed)])
    expected = merge_adapters(saved.load()).state_dict()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in load_file(deployed / "model.safetensors").items()
    )

    # A saved model may stand in an adapter's place, and its own diff is empty.
    main(["diff", "--base", str(deployed), "--adapter", str(deployed), "--out", str(file)])
    assert f" 0 of {total} tensors" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["apply", "--base", str(saved.base), "--diff", str(file), "--out", str(tmp_path / "new")])
    assert stop.value.code == 2
    assert "was written against another model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{adapter}", "--out", "x.onnx", "--quantize", "int8"], "pass --calibration FOLDER"),
        (["export", "./no/adapter", "--out", "x.onnx"], "no/adapter"),
        (["diff", "--base", "{base}", "--adapter", "./no/adapter", "--out", "x"], "no/adapter"),
        (["diff", "--adapter", "{base}", "--out", "x"], "names no base: pass --base"),
        (["apply", "--base", "{base}", "--diff", "./no.safetensors", "--out", "x"], "no.safetensors is missing"),
    ],
)
def test_wrong_arguments_end_with_one_message(
    arguments: list[str], message: str, saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"adapter": saved.adapter, "base": saved.base}
    with pytest.raises(SystemExit) as stop:
        main([argument.format(**places) for argument in arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_step_is_exported_and_what_was_learned_comes_home(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--image-size", "32", "--batch-size", "2", "--optimizer", "adamw", "--classes", "0", "7", "x"]
    main(["export", str(saved.adapter), "--train", "--out", str(tmp_path / "step"), *options])
    first, double, *_ = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'step'}: a training step of {saved.adapter}, 2 images of 32 px"
    assert double.startswith("double precision: within ")
    description = json.loads((tmp_path / "step" / "step.json").read_text())
    assert description["class_names"] == ["0", "7", "x"]
    assert description["optimizer"]["name"] == "adamw"
    assert description["inputs"]["images"] == [2, 3, 32, 32]
    state = tmp_path / "step" / "state.safetensors"
    out = tmp_path / "adapter"
    main(["import-state", str(tmp_path / "step"), str(state), str(state), "--weights", "1", "2", "--out", str(out)])
    assert capsys.readouterr().out == f"{out}: the adapter of {state}, {state}\n"
    origin = json.loads((out / "device_training.json").read_text())
    assert [entry["weight"] for entry in origin["states"]] == [1 / 3, 2 / 3]
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (saved.adapter, out))
    assert all(torch.allclose(old[name], value) for name, value in new.items() if "classifier" not in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "--momentum", "0.5"], "--momentum, --split: only for the export of a training step"),
        (["--train", "--format", "torch-export"], "expected the format onnx or executorch, found torch-export"),
        (
            ["--train", "--split", "--format", "executorch", "--quantize", "int8", "--calibration", "digits"],
            "--quantize: with --train, only for --format onnx, found executorch",
        ),
        (["--train", "--optimizer", "adamw", "--momentum", "0.5"], "--momentum: only for --optimizer sgd"),
        (["--train", "--quantize", "int8", "--calibration", "digits"], "pass --split as well"),
        (["--train", "--split", "--calibration", "digits"], "pass --split --quantize int8 as well"),
        (["--train", "--optimizer", "lion"], "expected one of sgd, adamw, found 'lion'"),
        (["--train", "--out", __file__], "is a file, but --train writes a folder"),
    ],
)
def test_options_of_a_step_that_make_no_sense_are_refused_before_loading(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", "./no/adapter", "--out", "x", *options])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_whole_model_has_no_step(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(saved.base), "--train", "--out", str(tmp_path / "step")])
    assert "is a whole model: --train needs the folder of an adapter" in capsys.readouterr().err
