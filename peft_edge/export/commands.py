"""The commands `peft-edge export`, `diff` and `apply`: arguments and printing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from torch import nn

from peft_edge.backbones import load_backbone
from peft_edge.backbones.loading import CONFIG_NAME
from peft_edge.export.differences import apply_diff, save_result, write_diff
from peft_edge.export.exporter import export_model
from peft_edge.export.formats import FORMATS
from peft_edge.export.verification import comparison_table, read_images
from peft_edge.hub import load_pretrained
from peft_edge.records import Record, read_record

_MODEL = "the folder of an adapter or of a saved model, or the id of an adapter on the Hub"
_BASE = "the model that the devices have: the folder of a saved model, or the id of a timm model on the Hub"


def add_commands(commands: Any) -> None:
    """Adds the commands to those of `peft-edge`."""
    _add_export(commands)
    _add_diff(commands)
    _add_apply(commands)


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="one file of an adapted model for ONNX Runtime, torch.export or ExecuTorch",
        description="Merges the adapter, puts BatchNorm into the convolutions, writes the file, runs it on images, and "
        "prints how it compares with the PyTorch model. A file that computes something else is not left behind.",
    )
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help=_MODEL)
    add("--format", default="onnx", choices=FORMATS, help="by default onnx")
    add(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help=", ".join(sorted(form.suffix for form in FORMATS.values())),
    )
    add(
        "--image-size",
        type=int,
        help="height and width in pixels; by default those of the run that the model is from, else what timm evaluates "
        "it at",
    )
    add("--batch-size", type=int, help="how many images the file takes at once; by default any number, in ExecuTorch 1")
    add("--quantize", choices=["int8"], help="an ONNX file of integers; needs --calibration")
    add(
        "--calibration",
        metavar="FOLDER",
        help="with one subfolder of images for each class (or digits, or shapes): its training images choose the "
        "scales of integers, its test images compare. By default the files are compared on digits",
    )
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    if options.quantize and options.calibration is None:
        raise ValueError("--quantize chooses the scales of integers by images: pass --calibration FOLDER")
    model = _load(options.adapter)
    image_size = _trained_size(Path(options.adapter)) if options.image_size is None else options.image_size
    images = read_images(options.calibration or "digits", model, image_size=image_size)
    compared = export_model(
        model,
        options.out,
        format=options.format,
        images=images.comparison,
        labels=images.labels,
        batch_size=options.batch_size,
        calibration=images.calibration if options.quantize else None,
    )
    print(f"{options.out}, compared with {options.adapter} on {len(images.comparison)} images")
    print(comparison_table(compared))


def _trained_size(folder: Path) -> int | None:
    """The size of the images in the record of the run, which lies in the folder if it was pushed, and else above it."""
    if not folder.is_dir():
        return None
    records = (read_record(path / "record.json", Record) for path in (folder, folder.absolute().parent))
    record = next((record for record in records if record is not None), None)
    return record.run_info.train_config["data"]["image_size"] if record is not None else None


def _add_diff(commands: Any) -> None:
    parser = commands.add_parser(
        "diff",
        help="the weights of a merged model that differ from its base's",
        description="Writes the changed weights alone, for a device that has the base; `peft-edge apply` puts them in "
        "their place there.",
    )
    add = parser.add_argument
    add("--base", required=True, help=_BASE)
    add("--adapter", required=True, help=_MODEL)
    add("--out", required=True, type=Path, metavar="FILE", help="a .safetensors file")
    parser.set_defaults(run=_diff)


def _diff(options: argparse.Namespace) -> None:
    base = _load_base(options.base)
    changed = write_diff(base, _load(options.adapter, base=_load_base(options.base)), options.out)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes, {len(changed)} of {len(base.state_dict())} tensors")


def _add_apply(commands: Any) -> None:
    parser = commands.add_parser(
        "apply",
        help="make of a base and a diff the merged model",
        description="Puts the weights of `peft-edge diff` into the base that they were written against. The result is "
        "the merged model bit for bit, or there is none.",
    )
    add = parser.add_argument
    add("--base", required=True, help=_BASE)
    add("--diff", required=True, type=Path, metavar="FILE", help="written by peft-edge diff")
    add("--out", required=True, type=Path, metavar="FOLDER", help="where to; may be the base's own folder")
    parser.set_defaults(run=_apply)


def _apply(options: argparse.Namespace) -> None:
    save_result(apply_diff(_load_base(options.base), options.diff), options.out)
    print(f"{options.out}: the model of {options.diff}")


def _load(name: str, base: nn.Module | None = None) -> nn.Module:
    folder = Path(name)
    if (folder / CONFIG_NAME).exists() and not (folder / ADAPTER_CONFIG_NAME).exists():
        return load_backbone(name)
    return load_pretrained(name, base=base)


def _load_base(name: str) -> nn.Module:
    return load_backbone(name, pretrained=not Path(name).is_dir())
