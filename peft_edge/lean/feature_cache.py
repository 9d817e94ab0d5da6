"""Latent replay: compute the outputs of the frozen first layers once, store them, and train the other layers on them.

Backpropagation stops at the first trainable layer. All earlier layers are frozen, so their outputs for a training image
are the same in every epoch (Pellegrini et al. 2019, arXiv 1912.01100, section III). `FrozenPrefix` splits a model at or
before the first trainable layer. `FeatureCache` stores the outputs of the first part (the features) as a memory-mapped
Hugging Face dataset.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from peft_edge._compat import map_children
from peft_edge.files import atomic_write, remove

if TYPE_CHECKING:
    import pyarrow as pa


class FrozenPrefix:
    """The frozen layers of a model that run before the module `start`.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> frozen = model[0].requires_grad_(False)
    >>> images = torch.randn(2, 3, 8, 8)
    >>> prefix = FrozenPrefix(model, images)
    >>> prefix.start
    '2'
    >>> torch.equal(prefix.tail(prefix.features(images)), model(images))
    True

    Attributes:
        tail: The model without the prefix. It maps `features(images)` to `model(images)`. The tail and the model share
            parameters and parameter names, so training the tail trains the model.
        start: The name of the first trainable layer, or of a block that contains this layer. The module with this name
            receives the output of the prefix.

    Args:
        model: A model that takes one tensor. Its prefix must be a chain of modules, as in timm's CNNs.
        images: A batch with which to check the split, (B, 3, H, W) with B > 1, on the model's device.
        eval_only: Whether the model stays in eval mode during training. If so, the prefix may contain layers that
            behave differently in training mode.

    Raises:
        ValueError: If the model has no trainable parameters, or no layer with weights before the first trainable layer.
            If training mode changes the buffers or outputs of the prefix, unless `eval_only` is set. If the rest of the
            model needs more than one tensor from the frozen layers, wherever the model is split.
    """

    def __init__(self, model: nn.Module, images: Tensor, *, eval_only: bool = False) -> None:
        training = model.training
        model.eval()
        try:
            self.start, modules, self.tail = _split(model, images)
            self._start, self._model = model.get_submodule(self.start), model
            self._modules = {name: module for name, module in model.named_modules() if module in modules}
            if not eval_only:
                self._check_constant(images)
        finally:
            model.train(training)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Run the frozen layers in eval mode on `images` of shape (B, 3, H, W), and return their output."""
        training = self._model.training
        try:
            device = next(self._model.parameters()).device
            return _input_of(self._start, self._model.eval(), images.to(device))
        finally:
            self._model.train(training)

    @property
    def fingerprint(self) -> str:
        """A hash of the frozen layers, of their weights and buffers, and of the attribute `start`."""
        digest = hashlib.sha256(self.start.encode())
        for name, module in self._modules.items():
            digest.update(f"{name} {module}\n".encode())
            for key, tensor in module.state_dict().items():
                digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _check_constant(self, images: Tensor) -> None:
        """Raise a `ValueError` if training mode changes a buffer or an output of the prefix.

        The check runs a copy of the model.
        """
        model = copy.deepcopy(self._model)
        start, before = model.get_submodule(self.start), dict(self._model.named_buffers())
        with torch.no_grad(), torch.random.fork_rng():
            expected = _input_of(start, model, images)
            found = _input_of(start, model.train(), images)
        changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
        if changed:
            raise ValueError(
                f"nothing can be replayed: {changed[0]} changes with every batch, but its layer comes before the first "
                f"trainable layer, {self.start}: choose norm=recalibrate or norm=frozen"
            )
        if not torch.equal(found, expected):
            raise ValueError(
                f"nothing can be replayed: the layers before the first trainable layer, {self.start}, have different "
                "outputs in training mode and in eval mode: remove dropout and drop path from these layers"
            )


def _split(model: nn.Module, images: Tensor) -> tuple[str, set[nn.Module], nn.Module]:
    """Find the last module at which the model can be split.

    All modules that run before this module must be frozen, and the input of this module must suffice to run the rest of
    the model.

    Returns:
        Three values: the name of this module, a set of all modules that run before it, and the rest of the model.

    Raises:
        ValueError: If the model has no trainable parameters, if no layer with weights comes before the first trainable
            layer, or if the model cannot be split at any module.
    """
    names = {module: name for name, module in model.named_modules()}
    with torch.no_grad():
        expected, call = _trace(model, images)
    # Descend from the model to its first trainable layer, and collect at each level the modules that ran earlier.
    before: set[nn.Module] = set()
    splits: list[tuple[nn.Module, set[nn.Module]]] = []
    while (position := next((i for i, inner in enumerate(call.inner) if _trains(inner.module)), None)) is not None:
        earlier = {inner.module for inner in call.inner[:position]}
        call = call.inner[position]
        if earlier - before:
            before = before | earlier
            splits.append((call.module, before))
    if not _trains(model):
        raise ValueError("nothing can be replayed: the model has no trainable parameters")
    if not _has_weights(before):
        first = names[call.module] or type(model).__name__
        raise ValueError(
            f"nothing can be replayed: {first} is trainable, and no layer comes before it. Train only later layers, "
            "for example with target_modules=last-stage"
        )
    for start, prefix in reversed(splits):
        tail = _without(model, prefix)
        try:
            with torch.no_grad():
                is_same = torch.equal(tail(_input_of(start, model, images)), expected)
        except (RuntimeError, AttributeError, LookupError, TypeError, ValueError):
            # A tail that starts inside a block may fail, because the shortcut needs the input of the block.
            continue
        if is_same and _has_weights(prefix):
            return names[start], prefix, tail
    raise ValueError(
        f"nothing can be replayed: the layers before the trainable {names[call.module]} do not form a chain of "
        "modules, so no single feature map suffices to run the rest of the model. Train without replay"
    )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _has_weights(modules: set[nn.Module]) -> bool:
    return any(True for module in modules for _ in module.parameters())


class _Call(NamedTuple):
    """A call of a module, with the calls of its submodules in order."""

    module: nn.Module
    inner: list[_Call]


def _trace(model: nn.Module, images: Tensor) -> tuple[Tensor, _Call]:
    """Run the model, and return its output and the tree of its module calls."""
    root = _Call(model, [])
    running = [root]

    def enter(module: nn.Module, inputs: object) -> None:
        if module is not model:
            running[-1].inner.append(_Call(module, []))
        running.append(root if module is model else running[-1].inner[-1])

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        running.pop()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        return model(images), root
    finally:
        for hook in hooks:
            hook.remove()


class _StopForward(Exception):
    """Raised by a hook to stop a forward pass."""


def _input_of(start: nn.Module, model: nn.Module, images: Tensor) -> Tensor:
    """Run `model` until it calls the module `start`, and return a copy of the input of `start`."""
    found: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _StopForward

    hook = start.register_forward_pre_hook(stop, prepend=True)
    try:
        model(images)
    except _StopForward:
        pass  # `stop` has stored the input, and the layers after `start` need not run
    finally:
        hook.remove()
    return found[0].clone(memory_format=torch.preserve_format)


def _without(module: nn.Module, skipped: set[nn.Module]) -> nn.Module:
    """Return a copy of `module` in which `nn.Identity` replaces the modules `skipped`.

    The copy and `module` share all submodules that contain no skipped module.
    """
    return nn.Identity() if module in skipped else map_children(module, lambda child: _without(child, skipped))


StoredType = Literal["float32", "float16", "int8"]
"""The dtype of stored features. For int8, the cache also stores one scale per image."""

Views = Callable[[int], Iterable[Mapping[str, Tensor]]]
"""A function from the number of a view to batches of `pixel_values` and `labels`.

A view is one augmented version of all training images. All views must contain the images in the same order.
"""


class FeatureCache(Dataset[dict[str, Tensor]]):
    """The stored features of all training images, in one or more augmented versions (views). `open` returns a cache.

    Features are outputs of a `FrozenPrefix`. `__getitems__` takes pairs (epoch, image) and returns a batch of `labels`
    and `pixel_values`. The `pixel_values` are inputs for `FrozenPrefix.tail`, in the dtype and memory format of the
    original features. Epoch e uses view e % `views`, counted from 0.

    >>> from tempfile import TemporaryDirectory
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3).requires_grad_(False), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> prefix = FrozenPrefix(model, torch.randn(2, 3, 8, 8))
    >>> batch = {"pixel_values": torch.randn(5, 3, 8, 8), "labels": torch.arange(5)}
    >>> with TemporaryDirectory() as folder:
    ...     cache = FeatureCache.open(Path(folder), prefix, lambda view: [batch], key="random images", dtype="float16")
    >>> first_epoch = cache.__getitems__([(0, 4), (0, 2)])
    >>> first_epoch["pixel_values"].shape, first_epoch["labels"]
    (torch.Size([2, 8, 6, 6]), tensor([4, 2]))

    Attributes:
        info: A dict with facts about the cache. `start` is `FrozenPrefix.start`. `images` and `views` are the numbers
            of images and views. `dtype` is the dtype of the stored features. `shape`, `computed_dtype` and
            `channels_last` describe the features of one image before they are stored. `relative_error` is the norm of
            the rounding error divided by the norm of the features. `size_bytes` is the size of the file with the
            features. `fill_s` is the number of seconds that filling the cache took. `fill_flops` is the number of FLOPs
            of computing the features. It covers only convolutions and matrix products. A multiply-add is two FLOPs.
    """

    def __init__(self, folder: Path) -> None:
        # Import here, because importing `datasets` takes longer than importing this package.
        from datasets import Dataset as ArrowDataset

        self.info: dict[str, Any] = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        self._rows = ArrowDataset.from_file(str(folder / "features.arrow")).with_format("arrow")

    @classmethod
    def open(
        cls, root: Path, prefix: FrozenPrefix, images: Views, *, key: str, views: int = 1, dtype: StoredType = "float32"
    ) -> FeatureCache:
        """Open the cache for `prefix` and `images`. Fill the cache if it is missing or incomplete.

        The cache is a subfolder of `root`. `images(view)` must return the training images, augmented as in training,
        for each number `view` from 0 to `views - 1`. `key` must identify everything on which the images depend: data,
        transforms, seeds. If several processes open the same cache, one process fills the cache and the others wait.

        Raises:
            ValueError: If `dtype` is unknown, if there are no images, or if views have different numbers of images. If
                a feature is infinite or NaN, or if `dtype` is float16 and a feature exceeds the range of float16.
            OSError: If the disk is full.
        """
        if dtype not in get_args(StoredType):
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(get_args(StoredType))}")
        parts = (prefix.fingerprint, key, str(views), dtype)
        folder = root / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        # A complete cache is read without a lock, because the cache of another user may be read-only.
        if _is_whole(folder):
            return cls(folder)
        root.mkdir(parents=True, exist_ok=True)
        # The operating system releases the lock if the process that holds it dies.
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
        """Return the features and labels for pairs (epoch, image). Epochs and images are counted from 0.

        Raises:
            IndexError: If an image number is out of range.
        """
        info = self.info
        for _, index in keys:
            if not 0 <= index < len(self):
                raise IndexError(f"expected an image number, 0 to {len(self) - 1}, found {index}")
        rows = self._rows[[epoch % info["views"] * len(self) + index for epoch, index in keys]]
        values, scales, labels = (_as_tensor(rows[name]) for name in ("values", "scale", "label"))
        features = values.to(getattr(torch, info["computed_dtype"])).view(len(keys), -1)
        if info["dtype"] == "int8":
            features = features * scales[:, None].to(features.dtype)
        if info["channels_last"]:
            channels, *size = info["shape"]
            features = features.view(-1, *size, channels).movedim(-1, 1)
        return {"pixel_values": features.view(-1, *info["shape"]), "labels": labels}


def _is_whole(folder: Path) -> bool:
    """Return whether `folder` contains a complete cache."""
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        return (folder / "features.arrow").stat().st_size == info["size_bytes"]
    except (OSError, ValueError, KeyError):  # a file is missing or damaged, so the folder must be filled again
        return False


def _as_tensor(column: pa.ChunkedArray) -> Tensor:
    """Return a copy of a column as a tensor. Without a copy, the tensor would be read-only."""
    values = column.combine_chunks()
    return torch.from_numpy(np.array(values.flatten() if hasattr(values, "flatten") else values))


def _fill(path: Path, prefix: FrozenPrefix, images: Views, *, views: int, dtype: StoredType) -> dict[str, object]:
    """Write one row per view and image to `path`, one view after the other. Return the dict for `FeatureCache.info`."""
    import pyarrow as pa
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    started = time.perf_counter()
    rows, flops, squared_error, squared_norm = [0] * views, 0, 0.0, 0.0
    writer: ArrowWriter | None = None
    batches = ((view, batch) for view in range(views) for batch in images(view))
    for view, batch in tqdm(batches, desc="storing features", unit="batch"):
        with FlopCounterMode(display=False) as counter:
            features = prefix.features(batch["pixel_values"]).cpu()
        flops += counter.get_total_flops()
        channels_last = features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last)
        flat = (features.movedim(1, -1) if channels_last else features).flatten(1)
        values, scales = _quantize(flat, dtype)
        squared_norm += flat.double().square().sum().item()
        squared_error += (values.double() * scales[:, None] - flat).square().sum().item()
        size = values.shape[1]
        if writer is None:
            columns = {"values": List(Value(dtype), length=size), "scale": Value("float32"), "label": Value("int64")}
            writer = ArrowWriter(features=Features(columns), path=str(path))
        lists = pa.FixedSizeListArray.from_arrays(values.flatten().numpy(), size)
        writer.write_table(pa.Table.from_arrays([lists, scales.numpy(), batch["labels"].numpy()], schema=writer.schema))
        rows[view] += len(values)
    if writer is None:
        raise ValueError("there are no images whose features could be stored")
    if len(set(rows)) > 1:
        raise ValueError(f"expected the same number of images in every view, found {rows}")
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


def _quantize(features: Tensor, dtype: StoredType) -> tuple[Tensor, Tensor]:
    """Return the values to store, (B, N), and the scale of each image, (B,). The features are about values * scale.

    The scale is 1 unless `dtype` is int8. Raise a ValueError if a feature is not finite, or too large for `dtype`.
    """
    if not features.isfinite().all():
        raise ValueError("the prefix returns values that are not finite: check the weights and the images")
    features, scales = features.float(), torch.ones(len(features), dtype=torch.float32)
    if dtype == "int8":
        scales = features.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        features = (features / scales[:, None]).round()
    values = features.to(getattr(torch, dtype))
    if dtype == "float16" and not values.isfinite().all():
        raise ValueError("the prefix returns values beyond the range of float16: choose float32 or int8")
    return values, scales
