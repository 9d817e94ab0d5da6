"""What a prefix makes of every training image, on the disk, as a memory-mapped Hugging Face dataset."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from peft_edge.files import remove, written_whole
from peft_edge.lean.prefix import Prefix

StoredType = Literal["float32", "float16", "int8"]

Views = Callable[[int], Iterable[Mapping[str, Tensor]]]
"""From the number of a view to batches of `pixel_values` and `labels`: every image once, in the same order."""


class PrefixCache(Dataset[dict[str, Tensor]]):
    """The outputs of a prefix for some views of every image, to train its tail on.

    It yields whole batches for keys of an epoch and the index of an image: epoch `e` sees view `e % views`.
    `pixel_values` is what `Prefix.tail` takes in the place of images, (B, *shape), in the type and the memory format in
    which the prefix gave it. `PrefixCache.open` makes one.

    Attributes:
        info: What is stored, and what that took: `start` (where the tail starts), `images`, `views`, `dtype`, `shape`,
            `relative_error` (the norm of what storing changed, by the norm of all), `size_bytes`, `fill_flops`
            (convolutions and matrix products, a multiply-add is two) and `fill_s`.

    Args:
        folder: One that `open` has written.
    """

    def __init__(self, folder: Path) -> None:
        # Here and below, because importing it takes longer than importing all of this package.
        from datasets import Dataset as ArrowDataset

        self.info: dict[str, Any] = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        self._rows = ArrowDataset.from_file(str(folder / "features.arrow")).with_format("arrow")

    @classmethod
    def open(
        cls, root: Path, prefix: Prefix, images: Views, *, key: str, views: int = 1, dtype: StoredType = "float32"
    ) -> PrefixCache:
        """Opens the cache in `root` that belongs to a prefix and its images, and fills it first if there is none.

        It is written whole or not at all, by one of the processes that ask for it at the same time. One whose files are
        gone or cut short is filled again.

        Args:
            root: The folder of all caches.
            prefix: What is computed once.
            images: The training images, augmented as in training: from the number of a view to batches of
                `pixel_values` and `labels`, every image once, in the same order.
            key: Names everything that `images` depends on: data, transforms, seeds.
            views: How many views of each image are stored.
            dtype: Type of the stored values. `int8` has a scale for each image.

        Raises:
            ValueError: The type is unknown, there are no images, views have different ones, or a value is not
                finite or too large for the type.
            OSError: The disk is full.
        """
        if dtype not in get_args(StoredType):
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(get_args(StoredType))}")
        parts = (prefix.fingerprint, key, str(views), dtype)
        folder = root / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        root.mkdir(parents=True, exist_ok=True)
        # A lock of the system's: it is free again when its process dies.
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not _is_whole(folder):
                remove(folder)
                with written_whole(folder) as unfinished:
                    unfinished.mkdir()
                    info = _fill(unfinished / "features.arrow", prefix, images, views=views, dtype=dtype)
                    (unfinished / "info.json").write_text(json.dumps(info), encoding="utf-8")
        return cls(folder)

    def __len__(self) -> int:
        return self.info["images"]

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Reads features and labels: each key is the number of an epoch, from 0 on, and that of an image."""
        info = self.info
        for _, index in keys:
            if not 0 <= index < len(self):
                raise IndexError(f"expected the number of an image, 0 to {len(self) - 1}, found {index}")
        rows = self._rows[[epoch % info["views"] * len(self) + index for epoch, index in keys]]
        values, scales, labels = (_tensor(rows[name]) for name in ("values", "scale", "label"))
        features = values.to(getattr(torch, info["computed_dtype"])).view(len(keys), -1)
        if info["dtype"] == "int8":
            features = features * scales[:, None].to(features.dtype)
        if info["channels_last"]:
            channels, *size = info["shape"]
            features = features.view(-1, *size, channels).movedim(-1, 1)
        return {"pixel_values": features.view(-1, *info["shape"]), "labels": labels}


def _is_whole(folder: Path) -> bool:
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        return (folder / "features.arrow").stat().st_size == info["size_bytes"]
    except (OSError, ValueError, KeyError):
        return False


def _tensor(column: Any) -> Tensor:
    """Copies a column of an Arrow table, since what is mapped from the disk cannot be written to."""
    values = column.combine_chunks()
    return torch.from_numpy(np.array(values.flatten() if hasattr(values, "flatten") else values))


def _fill(path: Path, prefix: Prefix, images: Views, *, views: int, dtype: StoredType) -> dict[str, Any]:
    """Writes a row for each view of each image, all images of the first view first; returns `PrefixCache.info`."""
    import pyarrow as pa
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    started = time.perf_counter()
    rows, flops, squared_error, squared_norm = [0] * views, 0, 0.0, 0.0
    writer: Any = None
    for view, batch in tqdm(_all(images, views), desc="storing features", unit="batch"):
        with FlopCounterMode(display=False) as counter:
            features = prefix.features(batch["pixel_values"]).cpu()
        flops += counter.get_total_flops()
        channels_last = features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last)
        flat = (features.movedim(1, -1) if channels_last else features).flatten(1)
        values, scales = _stored(flat, dtype)
        squared_norm += flat.double().square().sum().item()
        squared_error += (values.double() * scales[:, None] - flat).square().sum().item()
        if writer is None:
            size = values.shape[1]
            columns = {"values": List(Value(dtype), length=size), "scale": Value("float32"), "label": Value("int64")}
            writer = ArrowWriter(features=Features(columns), path=str(path))
        lists = pa.FixedSizeListArray.from_arrays(values.flatten().numpy(), size)
        writer.write_table(pa.Table.from_arrays([lists, scales.numpy(), batch["labels"].numpy()], schema=writer.schema))
        rows[view] += len(values)
    if writer is None:
        raise ValueError("there are no images to store features of")
    if len(set(rows)) > 1:
        raise ValueError(f"expected the same images in every view, found {rows} of them")
    writer.finalize()
    return {
        "start": prefix.start,
        "images": rows[0],
        "views": views,
        "dtype": dtype,
        "shape": list(features.shape[1:]),
        "computed_dtype": str(features.dtype).removeprefix("torch."),
        "channels_last": channels_last,
        "relative_error": (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0,
        "size_bytes": path.stat().st_size,
        "fill_flops": flops,
        "fill_s": time.perf_counter() - started,
    }


def _all(images: Views, views: int) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
    for view in range(views):
        for batch in images(view):
            yield view, batch


def _stored(features: Tensor, dtype: StoredType) -> tuple[Tensor, Tensor]:
    """Returns the values to store, (B, N), and the scale of each image, (B,), by which they are multiplied again."""
    if not features.isfinite().all():
        raise ValueError("the prefix gives values that are not finite: look at the weights and the images")
    features, scales = features.float(), torch.ones(len(features), dtype=torch.float32)
    if dtype == "int8":
        scales = features.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        features = (features / scales[:, None]).round()
    values = features.to(getattr(torch, dtype))
    if dtype == "float16" and not values.isfinite().all():
        raise ValueError("the prefix gives values beyond the range of float16: choose float32 or int8")
    return values, scales
