"""The log of storages: when each was made and freed, of how many bytes it was, and what it turned out to be."""

from __future__ import annotations

import weakref
from collections import Counter
from itertools import accumulate
from typing import Any

from torch import Tensor, UntypedStorage

from peft_edge.profiling.location import FORWARD, ancestors

PARAMETERS, BUFFERS, GRADIENTS = "parameters", "buffers", "gradients"
ACTIVATIONS, TEMPORARIES, OPTIMIZER_STATE = "activations", "temporaries", "optimizer"
KINDS = (PARAMETERS, BUFFERS, GRADIENTS, ACTIVATIONS, TEMPORARIES, OPTIMIZER_STATE)


class Storage(weakref.ref[UntypedStorage]):
    """A storage's entry in the log. Being a weak reference, it learns of its storage's end, also inside C++."""

    __slots__ = ("bytes", "key", "kind", "module", "phase")

    bytes: int
    key: int
    kind: str
    module: str | None
    phase: str


class StorageLog:
    """Logs the storages of the tensors that it is shown, by the change in bytes that each event brings.

    A storage that views and tied parameters share is one. Its kind is decided with hindsight: whether it is an
    activation shows when the forward pass has ended, whether it is a gradient when it has become one.

    Attributes:
        phase: The phase that new storages are made in; to be kept up to date.
        module: The module that makes them, or None; likewise.

    Args:
        devices: Storages on other devices are left out; an empty set leaves out none.
    """

    def __init__(self, devices: set[Any]) -> None:
        self.phase = FORWARD
        self.module: str | None = None
        self._devices = devices
        self._live: dict[int, Storage] = {}
        self._events: list[tuple[Storage, int, str]] = []

    def __len__(self) -> int:
        return len(self._events)

    def totals(self) -> list[int]:
        """Returns the bytes alive before the first event and after each."""
        return [0, *accumulate(change for _, change, _ in self._events)]

    def phase_of(self, events: int) -> str:
        """Returns the phase that the last of so many events was in."""
        return self._events[events - 1][2] if events else FORWARD

    def alive(self, events: int) -> Counter[tuple[str | None, str]]:
        """Returns the bytes alive after so many events, by module and kind."""
        alive: Counter[tuple[str | None, str]] = Counter()
        for storage, change, _ in self._events[:events]:
            alive[storage.module, storage.kind] += change
        return alive

    def see(self, value: Any) -> None:
        """Logs the storages of a tensor or of nested lists and tuples of them, where they are new or were resized."""
        if isinstance(value, Tensor):
            self._see_tensor(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.see(item)

    def claim(self, tensor: Tensor, kind: str, owner: str | None) -> None:
        """Says what a tensor is and to which module it belongs; the first claim decides on the kind.

        What several modules own belongs to the innermost module around them.
        """
        storage = self._see_tensor(tensor)
        if storage is None:
            return
        if storage.kind in (ACTIVATIONS, TEMPORARIES):
            storage.kind, storage.module = kind, owner
        elif storage.kind == kind:
            storage.module = innermost_around(storage.module, owner)

    def end_forward(self) -> None:
        """Takes what the forward pass has left behind for activations."""
        for storage in self._live.values():
            if storage.kind == TEMPORARIES and storage.phase == FORWARD:
                storage.kind = ACTIVATIONS

    def _see_tensor(self, tensor: Tensor) -> Storage | None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:
            # A sparse tensor has none of its own; its indices and values have.
            return None
        key, size = id(storage), storage.nbytes()
        entry = self._live.get(key)
        if entry is None:
            # A fake storage is on the meta device, and only the tensor on the one that it stands for.
            if self._devices and tensor.device not in self._devices:
                return None
            entry = self._live[key] = Storage(storage, self._log_death)
            entry.key, entry.bytes, entry.kind = key, 0, TEMPORARIES
            entry.phase, entry.module = self.phase, self.module
        if size != entry.bytes:
            self._events.append((entry, size - entry.bytes, self.phase))
            entry.bytes = size
        return entry

    def _log_death(self, entry: Storage) -> None:
        del self._live[entry.key]
        self._events.append((entry, -entry.bytes, self.phase))


def innermost_around(module: str | None, other: str | None) -> str | None:
    """Returns the innermost module that contains both (or is one of) them; None if either is outside the model."""
    if module == other:
        return module
    around = set(ancestors(other))
    return next((name for name in ancestors(module) if name in around), None)
