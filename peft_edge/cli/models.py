"""Commands on one adapted model: export, diff, apply."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from peft_edge.cli.options import (
    MODEL_HELP,
    Base,
    choice,
    count,
    load_any_model,
    load_base_model,
    path,
)
from peft_edge.records import JsonObject, Record, read_record

EXPORT_FORMATS = ("onnx", "torch-export", "executorch")


def export(
    adapter: Annotated[str, Argument(help=MODEL_HELP)],
    out: Annotated[Path, path("FILE", "The output file, with the ending of the format: .onnx, .pt2 or .pte.")],
    format: Annotated[str, choice(EXPORT_FORMATS, "The file format.")] = "onnx",
    image_size: Annotated[
        int | None,
        count("Height and width in pixels. By default as in the run, or without a record as in timm."),
    ] = None,
    batch_size: Annotated[int | None, count("Images per call; by default any number, or 1 for ExecuTorch.")] = None,
    quantize: Annotated[str | None, choice(["int8"], "Quantize the ONNX model; needs --calibration.")] = None,
    calibration: Annotated[
        str | None,
        path(
            "FOLDER",
            "A folder with one subfolder of images per class, or digits, or shapes. Its training images calibrate the "
            "quantization. The file is compared with the model on its test images, by default on those of digits.",
        ),
    ] = None,
) -> None:
    """Export an adapted model for ONNX Runtime, torch.export or ExecuTorch.

    Merges the adapter, fuses BatchNorm into the convolutions, and compares the outputs of the file with the outputs of
    the PyTorch model. If the outputs of the exported floating-point network differ too much, no file is written.
    """
    from peft_edge.export.exporter import export_model
    from peft_edge.export.verification import comparison_table, read_images

    if quantize and calibration is None:
        raise ValueError("--quantize needs images for calibration: pass --calibration FOLDER")
    model = load_any_model(adapter)
    run = run_config(Path(adapter))
    size = image_size or (run["data"]["image_size"] if run else None)
    images = read_images(calibration or "digits", model, image_size=size, run=run)
    compared = export_model(
        model,
        out,
        format=format,
        images=images.comparison,
        # Without the record of the run, the test images may include images that the model was trained on.
        labels=images.labels if run else None,
        batch_size=batch_size,
        calibration=images.calibration if quantize else None,
    )
    print(f"{out}, compared with {adapter} on {len(images.comparison)} images")
    print(comparison_table(compared))
    if run is None and images.labels is not None:
        print(f"No accuracies: {adapter} has no record.json of its run, which tells what images it was trained on")


def run_config(folder: Path) -> JsonObject | None:
    """Return the configuration of the run that wrote `folder`, or None if there is no record.

    `record.json` is in `folder` if it was pushed to the Hub and downloaded, and otherwise in the parent of `folder`.
    """
    for place in (folder, folder.absolute().parent) if folder.is_dir() else ():
        if (record := read_record(place / "record.json", Record)) is not None:
            return record.run_info.train_config
    return None


def diff(
    base: Base,
    adapter: Annotated[str, Option(help=MODEL_HELP)],
    out: Annotated[Path, path("FILE", "The output file (.safetensors).")],
    allow_other_base: Annotated[
        bool, Option("--allow-other-base", help="Accept a base whose weights differ from those in training.")
    ] = False,
) -> None:
    """Write only the weights that an adapter changes.

    Writes the tensors of the merged model that differ from the base. On a device that has the base, `peft-edge apply`
    rebuilds the merged model from this file.
    """
    from peft_edge.export.differences import write_diff

    model = load_base_model(base)
    changed = write_diff(model, load_any_model(adapter, load_base_model(base), allow_other_base=allow_other_base), out)
    print(f"{out}: {out.stat().st_size:,} bytes, {len(changed)} of {len(model.state_dict())} tensors")


def apply(
    base: Base,
    diff: Annotated[Path, path("FILE", "The file that peft-edge diff wrote.")],
    out: Annotated[Path, path("FOLDER", "The output folder; may be the folder of the base.")],
) -> None:
    """Rebuild the merged model from its base and a diff.

    The result is bit-identical to the merged model. If the diff was written for another base, nothing is written.
    """
    from peft_edge.export.differences import apply_diff, save_result

    save_result(apply_diff(load_base_model(base), diff), out)
    print(f"{out}: the model of {diff}")
