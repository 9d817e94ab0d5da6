"""A model cut in two: a frozen prefix, whose outputs never change, and the tail that trains on them.

Backpropagation stops at the first layer that trains anything. Where the layers before it are frozen too, what they make
of a training image is the same in every epoch: latent replay (Pellegrini et al., arXiv 1912.01100, section III).

What a prefix makes of every training image, on the disk, as a memory-mapped Hugging Face dataset.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from peft_edge.files import atomic_write, remove


class _Reached(Exception):
    """Stops a forward pass where the tail begins."""


@dataclass
class _Call:
    """A module that a forward pass went through, and the modules that ran inside of it, in their order."""

    module: nn.Module
    calls: list[_Call] = field(default_factory=list)


class FrozenPrefix:
    """The layers of a model before the first one that trains anything.

    Attributes:
        tail: The model without its prefix: it takes what `features` returns, and gives what the model gives. Its
            modules are those of the model, under the same names, so training it trains the model.
        start: The name of the module at which the tail starts.

    Args:
        model: Any model that takes one tensor; its prefix is a chain of modules, as in timm's CNNs.
        images: A batch to check the cut with, (B, 3, H, W) with B > 1, on the model's device.

    Raises:
        ValueError: Nothing trains, nothing comes before what trains, the outputs of the prefix change while training,
            or they are not all that the tail needs.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        training = model.training
        model.eval()
        try:
            self.start, modules, self.tail = _cut(model, images)
            self._start, self._model = model.get_submodule(self.start), model
            self._modules = {name: module for name, module in model.named_modules() if module in modules}
            self._check_constant(images)
        finally:
            model.train(training)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Returns the prefix's outputs in eval mode, (B, *shape), for images of shape (B, 3, H, W)."""
        training = self._model.training
        try:
            device = next(self._model.parameters()).device
            return _input_of(self._start, self._model.eval(), images.to(device))
        finally:
            self._model.train(training)

    @property
    def fingerprint(self) -> str:
        """Changes with the layers of the prefix, their weights and their statistics, and with the place of the cut."""
        digest = hashlib.sha256(self.start.encode())
        for name, module in self._modules.items():
            digest.update(f"{name} {module}\n".encode())
            for key, tensor in module.state_dict().items():
                digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _check_constant(self, images: Tensor) -> None:
        """Checks that the prefix does in training what it does in evaluation, without a trace on the model."""
        model = copy.deepcopy(self._model)
        start, before = model.get_submodule(self.start), dict(self._model.named_buffers())
        with torch.no_grad(), torch.random.fork_rng():
            expected = _input_of(start, model, images)
            found = _input_of(start, model.train(), images)
        moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
        if moved:
            raise ValueError(
                f"nothing can be replayed: {moved[0]} moves with every batch, and stands before the first trained "
                f"layer, {self.start}: choose norm=recalibrate or norm=frozen"
            )
        if not torch.equal(found, expected):
            raise ValueError(
                f"nothing can be replayed: the layers before the first trained one, {self.start}, give something else "
                "in training than in evaluation: leave dropout and drop path out of them"
            )


def _cut(model: nn.Module, images: Tensor) -> tuple[str, set[nn.Module], nn.Module]:
    """Finds the last place in front of what trains where one tensor holds all that the rest needs.

    Returns:
        The name of the module in front of which that is, the modules before, and the tail.
    """
    names = {module: name for name, module in model.named_modules()}
    with torch.no_grad():
        expected, call = _trace(model, images)
    skipped: set[nn.Module] = set()
    cuts: list[tuple[nn.Module, set[nn.Module]]] = []
    while (position := next((i for i, c in enumerate(call.calls) if _trains(c.module)), None)) is not None:
        before = {earlier.module for earlier in call.calls[:position]}
        call = call.calls[position]
        if before - skipped:
            skipped = skipped | before
            cuts.append((call.module, skipped))
    if not _trains(model):
        raise ValueError("nothing can be replayed: nothing in the model is trained by gradients")
    if not _has_weights(skipped):
        first = names[call.module] or type(model).__name__
        raise ValueError(
            f"nothing can be replayed: {first} trains, and no layer comes before it. Train later layers only, for "
            "example with target_modules=last-stage"
        )
    for start, before in reversed(cuts):
        tail = _without(model, before)
        try:
            with torch.no_grad():
                is_same = torch.equal(tail(_input_of(start, model, images)), expected)
        except (RuntimeError, AttributeError, LookupError, TypeError, ValueError):
            # A cut through a block, whose shortcut needs the block's input, may not even run.
            continue
        if is_same and _has_weights(before):
            return names[start], before, tail
    raise ValueError(
        f"nothing can be replayed: {names[call.module]} trains, and what comes before it is no chain of modules, so "
        "that no single tensor holds all that the rest of the model needs. Train without replay"
    )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _has_weights(modules: set[nn.Module]) -> bool:
    return any(True for module in modules for _ in module.parameters())


def _trace(model: nn.Module, images: Tensor) -> tuple[Tensor, _Call]:
    """Returns the model's output, and what ran inside of what."""
    running = [_Call(model)]

    def enter(module: nn.Module, inputs: Any) -> None:
        call = running[0] if module is model else _Call(module)
        if module is not model:
            running[-1].calls.append(call)
        running.append(call)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        return model(images), running[0]
    finally:
        for hook in hooks:
            hook.remove()


def _input_of(start: nn.Module, model: nn.Module, images: Tensor) -> Tensor:
    """Runs the model up to the module `start`, and returns that module's input."""
    found: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _Reached

    hook = start.register_forward_pre_hook(stop, prepend=True)
    try:
        model(images)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0].clone(memory_format=torch.preserve_format)


def _without(module: nn.Module, skipped: set[nn.Module]) -> nn.Module:
    """Returns the module with identities in the place of those that are skipped; what holds none of them is shared."""
    if module in skipped:
        return nn.Identity()
    children = {name: child if child is None else _without(child, skipped) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    view = copy.copy(module)
    view._modules = children
    return view


StoredType = Literal["float32", "float16", "int8"]

Views = Callable[[int], Iterable[Mapping[str, Tensor]]]
"""From the number of a view to batches of `pixel_values` and `labels`: every image once, in the same order."""


class FeatureCache(Dataset[dict[str, Tensor]]):
    """The outputs of a prefix for some views of every image, to train its tail on.

    It yields whole batches for keys of an epoch and the index of an image: epoch `e` sees view `e % views`.
    `pixel_values` is what `FrozenPrefix.tail` takes in the place of images, (B, *shape), in the type and the memory format in
    which the prefix gave it. `FeatureCache.open` makes one.

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
        cls, root: Path, prefix: FrozenPrefix, images: Views, *, key: str, views: int = 1, dtype: StoredType = "float32"
    ) -> FeatureCache:
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
                with atomic_write(folder) as unfinished:
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


def _fill(path: Path, prefix: FrozenPrefix, images: Views, *, views: int, dtype: StoredType) -> dict[str, Any]:
    """Writes a row for each view of each image, all images of the first view first; returns `FeatureCache.info`."""
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
