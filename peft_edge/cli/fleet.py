"""The command `merge-adapters`, which combines the adapters of several devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from peft_edge.cli.models import run_record
from peft_edge.cli.options import choice, count, load_base_model, path

if TYPE_CHECKING:
    from datasets import DatasetDict
    from peft import PeftModel

COMBINATION_NAMES = (
    *("cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
)


def merge_adapters_of_fleet(
    adapters: Annotated[list[str], Argument(help="Folders of adapters, or their ids on the Hub; at least two.")],
    out: Annotated[Path, path("FOLDER", "The output folder of the combined adapter.")],
    weights: Annotated[
        list[float] | None, Option(metavar="WEIGHT ...", help="A weight for each adapter; by default all are equal.")
    ] = None,
    combination: Annotated[str, choice(COMBINATION_NAMES, "How the LoRA matrices are combined; cat is exact.")] = "cat",
    lora_rank: Annotated[
        int | None, count("The rank of the combined adapter, for combinations with svd; by default the largest rank.")
    ] = None,
    density: Annotated[float | None, Option(help="Fraction of values to keep (for ties, dare, pruning).")] = None,
    base: Annotated[str | None, Option(help="The base model; by default the base of the first adapter.")] = None,
    test: Annotated[
        list[str] | None,
        Option(metavar="FOLDER ...", help="Folders with one subfolder of images per class, to compare accuracies."),
    ] = None,
    image_size: Annotated[
        int | None, count("Height and width in pixels; by default those of the run that trained the first adapter.")
    ] = None,
) -> None:
    """Combine the adapters of several devices into one adapter.

    The adapters must be LoRA adapters that were trained on the same base model. Their BatchNorm statistics are pooled.
    With --test, prints the accuracies of the base model, of each adapter and of the combined adapter on each folder.
    """
    from peft_edge.data.sources import read_splits
    from peft_edge.export.verification import is_same_data
    from peft_edge.hub import save_adapter
    from peft_edge.hub.combination import combine_adapters
    from peft_edge.profiling.tables import text_table

    if len(adapters) < 2:
        raise ValueError(f"expected at least two adapters to combine, found {len(adapters)}: {', '.join(adapters)}")
    model = combine_adapters(
        adapters,
        weights,
        base=None if base is None else load_base_model(base),
        combination=combination,
        svd_rank=lora_rank,
        density=density,
    )
    records = [run_record(Path(adapter)) for adapter in adapters]
    runs = {
        name: record.run_info.train_config["data"] for name, record in zip(adapters, records, strict=True) if record
    }
    size = image_size or (runs[adapters[0]]["image_size"] if adapters[0] in runs else None)
    # Read all folders before anything is written.
    splits = {folder: read_splits(folder) for folder in test or ()}
    columns = [(folder, accuracies(model, len(adapters), folder, splits[folder], size)) for folder in test or ()]
    save_adapter(model, out)
    print(f"{out}: {len(adapters)} adapters combined, rank {model.active_peft_config.r}")
    if columns:
        rows = ["no update", *adapters, str(out)]
        table = [[name, *(f"{column[row]:.3f}" for _, column in columns)] for row, name in enumerate(rows)]
        print(text_table([["accuracy on", *(folder for folder, _ in columns)], *table]))
    for folder in test or ():
        used = [
            name
            for name, data in runs.items()
            if any(other and is_same_data(folder, other) for other in (data["name"], data["shift"]))
        ]
        if used and "test" not in splits[folder]:
            print(
                f"Warning: {', '.join(used)} may have been trained on some of these images of {folder}. To measure "
                "accuracies of new images, pass a folder that no run used, or one with a subfolder test"
            )


def accuracies(
    model: PeftModel, num_adapters: int, folder: str, splits: DatasetDict, image_size: int | None
) -> list[float]:
    """Return the accuracies of the base model, of each adapter and of the combined adapter on the images in `folder`.

    `splits` is the result of `read_splits(folder)`. The images of the split `test` are used or, if there is no such
    split, those of the split `train`. If the folder is not divided into splits, `train` contains all images. After the
    call, the combined adapter is active.

    Raises:
        ValueError: If the folder has classes that the model does not know.
    """
    from accelerate import Accelerator

    from peft_edge.backbones import class_names
    from peft_edge.data import build_loader, build_transform
    from peft_edge.export.verification import input_config
    from peft_edge.hub.combination import COMBINED
    from peft_edge.training.evaluation import predict

    images = splits.get("test", splits["train"])
    names = images.features["label"].names
    known = class_names(model) or names
    if unknown := set(names) - set(known):
        raise ValueError(
            f"{folder}: the classes {', '.join(sorted(unknown))} are unknown to the adapters, which know "
            f"{', '.join(known)}"
        )
    accelerator = Accelerator()
    transform = build_transform(input_config(model, image_size), train=False)
    batches = accelerator.prepare_data_loader(build_loader(images, transform, batch_size=64, shuffle=False, seed=0))
    model.to(accelerator.device)

    def accuracy() -> float:
        found = predict(model, batches, accelerator, stage=f"testing {folder}")
        # `references` are indices of the folder's classes, and these classes may be a subset of the model's classes.
        labels = [known.index(names[label]) for label in found.references]
        return sum(map(int.__eq__, found.predictions, labels)) / len(labels)

    with model.disable_adapter():
        measured = [accuracy()]
    for adapter in [*(f"adapter_{number}" for number in range(num_adapters)), COMBINED]:
        model.set_adapter(adapter)
        measured.append(accuracy())
    return measured
