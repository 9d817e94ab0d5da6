"""Train adapters in ONNX Runtime and in PyTorch on the same batches, and record accuracy, time, memory and file sizes.

`python -m peft_edge.study.device_study --out reports/device --work runs/device-study` writes one record for each case
of `CASES` and each seed. A case whose record exists is not run again. `--guide FILE` replaces the table of results in a
Markdown file by a new table. The case `photos to sketches` needs the data set PACS and an imported network. Their paths
are in `configs/tasks/pacs_sketch.yaml`.

Both runtimes train on one thread, each in a process of its own, with the same options of the memory allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import get_peft_model
from safetensors.numpy import load_file
from torch import Tensor, nn

from peft_edge.backbones import head_names, load_backbone, save_backbone
from peft_edge.config import load_config
from peft_edge.data import Domain, build_transform, load_configured_task
from peft_edge.export.device import export_train_step
from peft_edge.export.onnx_steps import open_session
from peft_edge.export.step_checks import MALLOC_TUNABLES
from peft_edge.export.verification import input_config
from peft_edge.files import atomic_write
from peft_edge.hub import load_pretrained
from peft_edge.records import JsonModel, package_info, system_info
from peft_edge.training.source import source_model
from peft_edge.tuners.conv_lora import ConvLoraConfig

BATCH_SIZE, MOMENTUM, LORA_RANK = 8, 0.9, 4


class DeviceCase(NamedTuple):
    """A network, its images and the layers to train.

    If `task` is empty, the images are random, and no accuracy is measured. Otherwise the network comes from the
    configuration that `task` describes, and `network` and `image_size` must match this configuration.
    """

    name: str
    """The name in records and tables."""
    network: str
    """The timm name of the network."""
    image_size: int
    """Height and width of the images in pixels."""
    target_modules: str
    """The convolutions to adapt, as a key of `ROLES`."""
    split: bool = False
    """Whether ONNX Runtime trains on stored features, which are the outputs of the frozen layers before the adapted
    layers."""
    task: tuple[str, ...] = ()
    """Arguments of `load_config`, such as `--config FILE`. They describe the source model and the target images."""
    learning_rate: float = 0.01
    """The learning rate of the first step. It decreases linearly towards 0."""
    epochs: int = 3
    seeds: int = 3

    def file_stem(self, seed: int) -> str:
        """Return the file name, without `.json`, of the record for this case and `seed`."""
        words = self.name, self.network, self.image_size, self.target_modules, seed
        return "_".join(map(str, words)).replace(", ", "-").replace(" ", "-")


_DIGITS = ("--config", "configs/tasks/digits_shift.yaml")
_SHAPES = ("--config", "configs/tasks/shapes_shift.yaml")
_PHOTOS = ("--config", "configs/tasks/pacs_sketch.yaml")
_SMALL, _LITE = "mobilenetv3_small_050", "tf_efficientnet_lite0"

CASES = (
    DeviceCase("digits, blend", _SMALL, 48, "dense", task=_DIGITS),
    DeviceCase("digits, blend", _SMALL, 48, "last-stage", split=True, task=_DIGITS),
    DeviceCase("shapes, rotation", _SMALL, 48, "dense", task=_SHAPES),
    DeviceCase("shapes, rotation", _SMALL, 48, "last-stage", split=True, task=_SHAPES),
    DeviceCase("photos to sketches", _LITE, 128, "dense", task=_PHOTOS, seeds=1),
    DeviceCase("photos to sketches", _LITE, 128, "last-stage", split=True, task=_PHOTOS, seeds=1),
    DeviceCase("random images", _SMALL, 96, "dense", seeds=1),
    DeviceCase("random images", _SMALL, 96, "last-stage", split=True, seeds=1),
    DeviceCase("random images", "mobilenetv2_100", 224, "dense", seeds=1),
)
RANDOM_STEPS = 6


class RuntimeResult(JsonModel):
    """Accuracy, time and memory of the training in one runtime: ONNX Runtime or PyTorch."""

    accuracy: float | None
    """The fraction of the test images that are classified correctly after the training. None for random images."""
    step_cpu_s: float
    """The median CPU time of a step in seconds, on one thread. The first step does not count."""
    peak_bytes: int
    """The peak physical memory of the process in bytes, since the process started."""


class DeviceRecord(JsonModel):
    """The results of one `DeviceCase` with one seed, in ONNX Runtime and in PyTorch."""

    case: str
    network: str
    image_size: int
    batch_size: int
    target_modules: str
    split: bool
    seed: int
    steps: int
    learning_rate: float
    images: int
    """The number of training images."""
    accuracy_before: float | None
    """The accuracy on the test images before training, with the initial adapter. None for random images."""
    onnx: RuntimeResult
    torch: RuntimeResult
    export_s: float
    """Seconds that `export_train_step` took."""
    file_bytes: dict[str, int]
    """The size in bytes of each file in the exported folder, by file name."""
    parameters: int
    """The number of trained parameters."""
    system: dict[str, str]
    packages: dict[str, str | None]


class _Data(NamedTuple):
    """Preprocessed training images (N, C, H, W) and test images (M, C, H, W), with labels (N,) and (M,)."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def run_case(case: DeviceCase, seed: int, work: Path) -> DeviceRecord:
    """Train the network of `case` in ONNX Runtime and in PyTorch, and return the results. Write files to `work`.

    Raises:
        subprocess.CalledProcessError: If a training process fails.
    """
    base, data = _prepare(case, seed, work)
    folder = work / case.file_stem(seed)
    save_backbone(base, folder / "base")
    torch.manual_seed(seed)
    backbone = load_backbone(str(folder / "base"))
    config = ConvLoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules=case.target_modules,
        norm="frozen",
        modules_to_save=head_names(backbone),
    )
    model = get_peft_model(backbone, config).eval()
    start = time.perf_counter()
    report = export_train_step(
        model,
        folder / "step",
        image_size=case.image_size,
        batch_size=BATCH_SIZE,
        momentum=MOMENTUM,
        split=case.split,
    )
    export_s = time.perf_counter() - start

    generator = torch.Generator().manual_seed(seed)
    epochs = case.epochs if case.task else 1
    orders = [torch.randperm(len(data.images), generator=generator).split(BATCH_SIZE) for _ in range(epochs)]
    batches = [rows.tolist() for order in orders for rows in order]
    rates = [case.learning_rate * (1 - step / len(batches)) for step in range(len(batches))]
    job = {
        "folder": str(folder / "step"),
        "onnx_steps": str(Path(sys.modules[open_session.__module__].__file__ or "")),
        "batch_size": BATCH_SIZE,
        "momentum": MOMENTUM,
        "labels": data.labels.tolist(),
        "batches": batches,
        "learning_rates": rates,
    }
    images = _write_rows(data.images, folder / "images.bin") | {"input": "images"}
    features = images
    if case.split:
        prefix = open_session(folder / "step" / "prefix.onnx")
        rows = [prefix.run(None, {"images": part.numpy()})[0] for part in data.images.split(BATCH_SIZE)]
        features = _write_rows(torch.from_numpy(np.concatenate(rows)), folder / "features.bin") | {"input": "features"}
    state, adapter = folder / "state.safetensors", folder / "adapter"
    costs = {
        "onnx": _train_in_process("onnx", {**job, **features, "out": str(state)}, folder),
        "torch": _train_in_process("torch", {**job, **images, "out": str(adapter)}, folder),
    }
    accuracies: dict[str, float | None] = {"before": None, "onnx": None, "torch": None}
    if case.task:
        accuracies = {
            "before": _onnx_accuracy(folder / "step", folder / "step" / "state.safetensors", data),
            "onnx": _onnx_accuracy(folder / "step", state, data),
            "torch": _torch_accuracy(load_pretrained(adapter), data),
        }
    results = {
        name: RuntimeResult(
            accuracy=accuracies[name],
            step_cpu_s=statistics.median(cost["seconds"][1:]),
            peak_bytes=cost["peak_bytes"],
        )
        for name, cost in costs.items()
    }
    files = [file for file in (folder / "step").iterdir() if file.is_file()]
    return DeviceRecord(
        case=case.name,
        network=case.network,
        image_size=case.image_size,
        batch_size=BATCH_SIZE,
        target_modules=case.target_modules,
        split=case.split,
        seed=seed,
        steps=len(batches),
        learning_rate=case.learning_rate,
        images=len(data.images),
        accuracy_before=accuracies["before"],
        export_s=export_s,
        file_bytes={file.name: file.stat().st_size for file in sorted(files)},
        parameters=report.parameters,
        system=system_info(),
        packages=package_info("onnx", "onnxruntime"),
        onnx=results["onnx"],
        torch=results["torch"],
    )


def _prepare(case: DeviceCase, seed: int, work: Path) -> tuple[nn.Module, _Data]:
    """Return the base model and the images of the first target, or random images if `case.task` is empty.

    A target is a set of images to which the model is adapted.
    """
    if not case.task:
        torch.manual_seed(seed)
        base = load_backbone(case.network, 10)
        count = RANDOM_STEPS * BATCH_SIZE
        images = torch.randn(count, 3, case.image_size, case.image_size)
        labels = torch.randint(10, (count,))
        return base, _Data(images, labels, images[:0], labels[:0])
    config = load_config([*case.task, f"seed={seed}", f"output_dir={work / 'run'}", f"cache_dir={work / 'cache'}"])
    task = load_configured_task(config.data.model_dump(), seed=seed)
    base = source_model(config, task, torch.device("cpu")).to(memory_format=torch.contiguous_format).eval()
    return base, _read_images(task.targets[0], base, case.image_size)


def _read_images(domain: Domain, base: nn.Module, image_size: int) -> _Data:
    transform = build_transform(input_config(base, image_size), train=False)
    images = [torch.stack([transform(image) for image in split["image"]]) for split in (domain.train, domain.test)]
    labels = [torch.tensor(split["label"][:]) for split in (domain.train, domain.test)]
    return _Data(images[0], labels[0], images[1], labels[1])


def _write_rows(rows: Tensor, file: Path) -> dict[str, Any]:
    rows.contiguous().numpy().tofile(file)
    return {"data": str(file), "shape": list(rows.shape[1:])}


def _train_in_process(runtime: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    file = folder / f"{runtime}.json"
    file.write_text(json.dumps(job))
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("device_worker.py")), runtime, str(file)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads, "GLIBC_TUNABLES": MALLOC_TUNABLES},
    )
    return json.loads(ended.stdout.splitlines()[-1])


def _onnx_accuracy(folder: Path, state: Path, data: _Data) -> float:
    session, tensors = open_session(folder / "predict.onnx"), load_file(state)
    adapter = {each.name: tensors[each.name] for each in session.get_inputs() if each.name != "images"}
    right = 0
    for images, labels in zip(data.test_images.split(32), data.test_labels.split(32), strict=True):
        (logits,) = session.run(["logits"], {**adapter, "images": images.numpy()})
        right += int((torch.from_numpy(logits).argmax(1) == labels).sum())
    return right / len(data.test_labels)


@torch.no_grad()
def _torch_accuracy(model: nn.Module, data: _Data) -> float:
    logits = torch.cat([model(images) for images in data.test_images.split(32)])
    return (logits.argmax(1) == data.test_labels).float().mean().item()


def read_device_records(folder: Path) -> list[DeviceRecord]:
    """Read all records in `folder`, in the order of their cases in `CASES`.

    Raises:
        ValueError: If a `.json` file in `folder` is not a record, or is the record of a case that `CASES` lacks.
    """
    order = {(case.name, case.network, case.target_modules): index for index, case in enumerate(CASES)}
    records: list[DeviceRecord] = []
    for file in sorted(folder.glob("*.json")):
        record = DeviceRecord.from_json(file.read_bytes())
        case = record.case, record.network, record.target_modules
        if case not in order:
            raise ValueError(
                f"{file} is the record of {', '.join(case)}, which is not in the study: move the file away"
            )
        records.append(record)
    return sorted(records, key=lambda record: (order[record.case, record.network, record.target_modules], record.seed))


def device_table(records: Sequence[DeviceRecord]) -> str:
    """Return a Markdown table with a row for each `DeviceCase`.

    Accuracies and times are means over the seeds, and memory is the maximum over the seeds. The column `largest
    difference` has the largest absolute difference, over the seeds, between the accuracies in ONNX Runtime and in
    PyTorch.
    """
    groups: dict[tuple[object, ...], list[DeviceRecord]] = defaultdict(list)
    for record in records:
        groups[record.case, record.network, record.image_size, record.target_modules].append(record)
    lines = [
        "| images | network | trained layers | accuracy before [%] | ONNX Runtime [%] | PyTorch [%] | largest "
        "difference [points] | CPU time of a step [ms] | PyTorch [ms] | process [MiB] | PyTorch [MiB] | files [KiB] |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for group in groups.values():
        first = group[0]
        pairs = [(record.onnx, record.torch) for record in group]
        cells = [
            first.case,
            f"{first.network}, {first.image_size} px",
            f"{first.target_modules}{', split' if first.split else ''}",
            _percent([record.accuracy_before for record in group]),
            _percent([onnx.accuracy for onnx, _ in pairs]),
            _percent([eager.accuracy for _, eager in pairs]),
            _largest_gap([(onnx.accuracy, eager.accuracy) for onnx, eager in pairs]),
            *(f"{1000 * statistics.fmean(pair[i].step_cpu_s for pair in pairs):,.1f}" for i in (0, 1)),
            *(f"{max(pair[i].peak_bytes for pair in pairs) / 2**20:,.0f}" for i in (0, 1)),
            f"{sum(size for name, size in first.file_bytes.items() if name != 'step.json') / 2**10:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(accuracies: Sequence[float | None]) -> str:
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    return f"{100 * statistics.fmean(known):.1f}" if known else "-"


def _largest_gap(pairs: Sequence[tuple[float | None, float | None]]) -> str:
    gaps = [abs(one - other) for one, other in pairs if one is not None and other is not None]
    return f"{100 * max(gaps):.1f}" if gaps else "-"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all chosen cases that have no record in `--out`. Then print the table, or write it to the file `--guide`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--work", type=Path, required=True, help="folder for source models and exported steps")
    names = sorted({case.name for case in CASES})
    parser.add_argument("--images", nargs="*", choices=names, default=names, help="cases to run, by default all")
    parser.add_argument("--guide", type=Path, help="Markdown file whose table is replaced")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for case in CASES:
        for seed in range(case.seeds if case.name in options.images else 0):
            file = options.out / f"{case.file_stem(seed)}.json"
            if not file.exists():
                record = run_case(case, seed, options.work.absolute())
                with atomic_write(file) as unfinished:
                    unfinished.write_text(record.to_json(), encoding="utf-8")
    table = device_table(read_device_records(options.out))
    if options.guide is None:
        print(table)
        return
    text = options.guide.read_text(encoding="utf-8")
    start = text.index(table.splitlines()[0])
    with atomic_write(options.guide) as unfinished:
        unfinished.write_text(text[:start] + table + text[text.index("\n\n", start) :], encoding="utf-8")


if __name__ == "__main__":
    main()
