"""Commands on one model: import, export, import-state, diff, apply."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

from typer import Argument, Option

from peft_edge.cli.options import (
    BASE_HELP,
    MODEL_HELP,
    STEP_OPTIMIZERS,
    Base,
    choice,
    count,
    load_any_model,
    load_base_model,
    path,
)
from peft_edge.config.schema import Interpolation
from peft_edge.records import Record, read_record

IMAGES_HELP = (
    "one or several folders with one subfolder of images per class; also digits, shapes, or source and target for the "
    "images of the run."
)
MAX_LOSS = 0.02
EXPORT_FORMATS = ("onnx", "torch-export", "executorch")
CHANNELS_HELP = "of input pixels from 0 to 1: one number, or one for each channel. By default timm's."
STEP_FORMATS = ("onnx", "executorch")  # with --train


def import_(
    weights: Annotated[Path, Argument(help="The file with weights: .safetensors, .pth, .pt, .bin, .ckpt or .tar.")],
    model: Annotated[str, Option(help="The timm model that the weights belong to, or the folder of a saved model.")],
    out: Annotated[Path, path("FOLDER", "A new folder. The key backbone.name and other commands accept it.")],
    num_classes: Annotated[
        int | None, count("Replace the head by a new one for this number of classes; by default the head is kept.")
    ] = None,
    mean: Annotated[list[float] | None, Option(metavar="NUMBER ...", help=f"Mean {CHANNELS_HELP}")] = None,
    std: Annotated[list[float] | None, Option(metavar="NUMBER ...", help=f"Standard deviation {CHANNELS_HELP}")] = None,
    interpolation: Annotated[
        str | None, choice(get_args(Interpolation), "The filter for resizing images; by default timm's.")
    ] = None,
    crop_pct: Annotated[
        float | None, Option(help="The fraction of an image's side that the centre crop keeps; by default timm's.")
    ] = None,
    image_size: Annotated[int | None, count("Height and width in pixels; by default timm's.")] = None,
    check: Annotated[
        str | None,
        path(
            "FOLDER",
            "Photographs with one subfolder per class. The weights and the preprocessing are checked on these images.",
        ),
    ] = None,
) -> None:
    """Import weights of another program, and save them as a timm model with its preprocessing.

    Tensors are matched by name or, if the names differ, by order and shape. If one tensor does not fit, nothing is
    written. Code in the file is not executed. Choose the preprocessing with which the weights were trained. In
    train.py, the keys backbone.mean, backbone.std, backbone.interpolation and backbone.crop_pct override the saved
    values.
    """
    import torch
    from timm.data import resolve_model_data_config

    from peft_edge.backbones import import_weights, load_backbone, replace_head, save_backbone, set_preprocessing
    from peft_edge.training.probe import probe_weights

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out: {out} exists already: choose another folder, or delete it")
    backbone = load_backbone(model)
    set_preprocessing(
        backbone,
        mean=mean[0] if mean and len(mean) == 1 else mean,
        std=std[0] if std and len(std) == 1 else std,
        interpolation=interpolation,
        crop_pct=crop_pct,
        image_size=image_size,
    )
    match = import_weights(backbone, weights)
    if num_classes is None and match.num_classes is None:
        raise ValueError(f"{weights} has no head: pass --num-classes, the number of classes of a new head")
    if num_classes is not None:
        replace_head(backbone, num_classes, generator=torch.Generator().manual_seed(0))
    probe = None if check is None else probe_weights(backbone, check)
    save_backbone(backbone, out)
    config = resolve_model_data_config(backbone)
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
    head = "the file's head" if num_classes is None else "a new head"
    print(match)
    if probe is not None:
        print(f"accuracy on {check}\n{probe}")
    print(f"{out}: {head} for {backbone.num_classes:,} classes; {', '.join(f'{key} {config[key]}' for key in keys)}")


def export(
    adapter: Annotated[str, Argument(help=MODEL_HELP)],
    out: Annotated[
        Path,
        path("FILE", "The output file, which ends in .onnx, .pt2 or .pte for the format; with --train, a folder."),
    ],
    format: Annotated[str, choice(EXPORT_FORMATS, "The file format.")] = "onnx",
    image_size: Annotated[
        int | None,
        count("Height and width in pixels; by default those of the run or, without its record, those of timm."),
    ] = None,
    batch_size: Annotated[
        int | None, count("Images per call; by default any number, 1 for ExecuTorch, and 8 with --train.")
    ] = None,
    quantize: Annotated[
        str | None,
        choice(["int8"], "Quantize the ONNX model or, with --train --split, prefix.onnx. Needs --calibration."),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        path("FOLDER ...", f"Images whose training split calibrates the quantization: {IMAGES_HELP}"),
    ] = None,
    test: Annotated[
        list[str] | None,
        path(
            "FOLDER ...",
            "Images whose test split is used to compare the file with the model, and to measure an accuracy for each "
            "folder. The option accepts the same values as --calibration. By default the images of --calibration; "
            "without it, the images of the run; without a record of the run, digits.",
        ),
    ] = None,
    train: Annotated[bool, Option("--train", help="Export a training step instead of the merged network.")] = False,
    optimizer: Annotated[
        str | None, choice(STEP_OPTIMIZERS, "With --train: the optimizer in the step; by default sgd.")
    ] = None,
    momentum: Annotated[
        float | None, Option(min=0, max=1, help="With --train: the momentum of SGD; by default 0.9.")
    ] = None,
    weight_decay: Annotated[float | None, Option(min=0, help="With --train: the weight decay; by default 0.")] = None,
    max_grad_norm: Annotated[
        float | None, Option(min=0, help="With --train: clip the gradients to this total norm.")
    ] = None,
    split: Annotated[
        bool,
        Option(
            "--split",
            help="With --train: export the frozen first layers as prefix.onnx, and a step that trains on their output.",
        ),
    ] = False,
    classes: Annotated[
        list[str],
        Option(metavar="NAME ...", help="With --train: the classes to learn, by default those of the adapter."),
    ] = [],  # noqa: B006
) -> None:
    """Export an adapted model for ONNX Runtime, torch.export or ExecuTorch.

    Merges the adapter, fuses BatchNorm into the convolutions, and compares the outputs of the file with the outputs of
    the PyTorch model. If the outputs of the exported floating-point network differ too much, no file is written.

    With --train, exports a training step of the adapter to a folder. The step consists of the forward pass, the
    gradients and the update by the optimizer. By default, the step is an ONNX file, with which a device can train in
    ONNX Runtime. With --format executorch (experimental), the step is an ExecuTorch program. The step is compared with
    training in PyTorch. If the results differ too much, no folder is written. After training, the device saves its
    state, and `peft-edge import-state` converts this state to an adapter.
    """
    if quantize and not calibration:
        raise ValueError("--quantize needs images for calibration: pass --calibration FOLDER")
    step_options: dict[str, Any] = {
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "split": split or None,
        "classes": classes or None,
    }
    given = {name: value for name, value in step_options.items() if value is not None}
    if not train:
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{names}: only for the export of a training step: pass --train as well")
        _export_network(adapter, out, format, image_size, batch_size, quantize, calibration or [], test or [])
        return
    if format not in STEP_FORMATS:
        raise ValueError(f"--train: expected the format {' or '.join(STEP_FORMATS)}, found {format}")
    if quantize and format != "onnx":
        raise ValueError(f"--quantize: with --train, only for --format onnx, found {format}")
    if optimizer == "adamw" and momentum is not None:
        raise ValueError("--momentum: only for --optimizer sgd")
    if quantize and not split:
        raise ValueError("--quantize: with --train, only the frozen first layers can be int8: pass --split as well")
    if calibration and not quantize:
        raise ValueError("--calibration: with --train, only for an 8-bit prefix: pass --split --quantize int8 as well")
    if test:
        raise ValueError("--test: a training step is compared on random images: leave this option out")
    if out.is_file():
        raise ValueError(f"{out} is a file, but --train writes a folder: choose another name")
    _export_step(adapter, out, image_size, batch_size or 8, calibration or [], given | {"format": format})


def _export_network(
    adapter: str,
    out: Path,
    format: str,
    image_size: int | None,
    batch_size: int | None,
    quantize: str | None,
    calibration: list[str],
    test: list[str],
) -> None:
    import torch

    from peft_edge.export.exporter import export_model
    from peft_edge.export.verification import COMPARISON_SIZE, TEST_SIZE, comparison_table, read_images

    model = load_any_model(adapter)
    record = run_record(Path(adapter))
    run = record.run_info.train_config if record else None
    fingerprint = record.data_fingerprint if record else None
    size = image_size or (run["data"]["image_size"] if run else None)
    names = test or calibration or (["source", "target"] if run else ["digits"])
    most = TEST_SIZE if test else COMPARISON_SIZE
    images = {
        name: read_images(name, model, image_size=size, run=run, fingerprint=fingerprint, comparison_size=most)
        for name in dict.fromkeys([*names, *calibration])
    }
    if unknown := [name for name in test if images[name].labels is None]:
        raise ValueError(
            f"--test: the accuracy on {unknown[0]} cannot be measured, because {adapter} has no class names or lacks a "
            "class of these images"
        )
    labels = [part for name in names if (part := images[name].labels) is not None]
    # Without the record of the run, the default test images may include images that the model was trained on.
    is_measured = len(labels) == len(names) and (run is not None or bool(test))
    compared = export_model(
        model,
        out,
        format=format,
        images=torch.cat([images[name].comparison for name in names]),
        labels=torch.cat(labels) if is_measured else None,
        folders=[name for name in names for _ in images[name].comparison],
        batch_size=batch_size,
        calibration=torch.cat([images[name].calibration for name in calibration]) if quantize else None,
    )
    counts = {name: len(images[name].comparison) for name in names}
    parts = ", ".join(f"{number:,} of {name}" for name, number in counts.items())
    print(f"{out}, compared with {adapter} on {sum(counts.values()):,} images ({parts})")
    print(comparison_table(compared))
    for name, loss in compared[-1].losses.items():
        if loss > MAX_LOSS:
            print(
                f"Warning: {compared[-1].name} loses {100 * loss:.1f} points of accuracy on {name}. Calibrate with "
                "images of every domain that the device sees, or export without --quantize"
            )
    if run is None and is_measured:
        print(f"{adapter} has no record.json of its run, so it may have been trained on some of these images")
    elif run is None and labels:
        print(f"No accuracies: {adapter} has no record.json that says which images it was trained on")


def _export_step(
    adapter: str, out: Path, image_size: int | None, batch_size: int, calibration: list[str], options: dict[str, Any]
) -> None:
    import torch
    from peft import PeftModel

    from peft_edge.export.device import export_train_step
    from peft_edge.export.step_checks import report_lines
    from peft_edge.export.verification import input_config, read_images

    model = load_any_model(adapter)
    if not isinstance(model, PeftModel):
        raise ValueError(f"{adapter} is a whole model: --train needs the folder of an adapter, whose weights it trains")
    model.set_adapter(model.active_adapter)  # makes the adapter trainable
    record = run_record(Path(adapter))
    run = record.run_info.train_config if record else None
    size = image_size or (run["data"]["image_size"] if run else input_config(model, None)["input_size"][-1])
    if calibration:
        fingerprint = record.data_fingerprint if record else None
        images = [read_images(name, model, image_size=size, run=run, fingerprint=fingerprint) for name in calibration]
        options["calibration"] = torch.cat([part.calibration for part in images])
    report = export_train_step(model, out, image_size=size, batch_size=batch_size, **options)
    print(f"{out}: a training step of {adapter}, {batch_size} images of {size} px\n{report_lines(report)}")


def load_states(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="The folder that peft-edge export --train wrote.")],
    states: Annotated[
        list[Path], Argument(metavar="STATE ...", help="The safetensors files that one or several devices saved.")
    ],
    out: Annotated[Path, path("FOLDER", "The folder of the adapter.")],
    weights: Annotated[
        list[float],
        Option(
            metavar="NUMBER ...",
            help="The weight of each state in the average, such as its number of images; by default equal.",
        ),
    ] = [],  # noqa: B006
) -> None:
    """Convert the training states of devices to a PEFT adapter.

    The states of several devices are averaged. The result is an ordinary adapter, which can be loaded, merged, exported
    and published. Its file device_training.json lists the states from which the adapter was computed.
    """
    from peft_edge.export.device_states import import_state

    import_state(folder, states, out, weights=weights or None)
    print(f"{out}: the adapter of {', '.join(str(state) for state in states)}")


def run_record(folder: Path) -> Record | None:
    """Read the file `record.json` of the run that wrote the adapter or model in `folder`, and return the record.

    If `folder` was downloaded from the Hub, `record.json` is in `folder`. If the run wrote `folder` on this machine,
    `record.json` is in the parent folder. Return None if `folder` or `record.json` does not exist.
    """
    for place in (folder, folder.absolute().parent) if folder.is_dir() else ():
        if (record := read_record(place / "record.json", Record)) is not None:
            return record
    return None


def diff(
    adapter: Annotated[str, Option(help=MODEL_HELP)],
    out: Annotated[Path, path("FILE", "The output file (.safetensors).")],
    base: Annotated[str | None, Option(help=f"{BASE_HELP} By default the base that the adapter names.")] = None,
    allow_other_base: Annotated[
        bool, Option("--allow-other-base", help="Accept a base whose weights differ from those in training.")
    ] = False,
) -> None:
    """Write only the weights that an adapter changes.

    The output file contains the tensors of the merged model that differ from the base. On a device that has the base,
    `peft-edge apply` rebuilds the merged model from the base and this file.
    """
    from peft_edge.export.differences import write_diff

    given = None if base is None else load_base_model(base)
    adapted = load_any_model(adapter, given, allow_other_base=allow_other_base)
    base = base or _base_of(Path(adapter))
    model = load_base_model(base)
    changed = write_diff(model, adapted, out)
    size, total = out.stat().st_size, len(model.state_dict())
    print(f"{out}: {size:,} bytes, {len(changed)} of {total} tensors; the base is {base}")


def _base_of(adapter: Path) -> str:
    """Return the base model of an adapter in a local folder, as the path of a folder or the name of a timm model.

    If the adapter's folder has a subfolder `source_model`, this subfolder is the base. Otherwise, the configuration of
    the adapter names the base.
    """
    from peft.utils import CONFIG_NAME

    from peft_edge.hub.adapter_files import SOURCE_NAME, read_configuration

    if (adapter / SOURCE_NAME).is_dir():
        return str(adapter / SOURCE_NAME)
    has_config = (adapter / CONFIG_NAME).exists()
    name = read_configuration(adapter / CONFIG_NAME).base_model_name_or_path if has_config else None
    if not name:
        raise ValueError(f"{adapter} names no base: pass --base, the model that the device has")
    return name


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
