"""Save memory in backward passes: recompute tensors, and overwrite gradients.

- **Recompute.** A convolutional network needs to keep only one feature map per convolution. BatchNorm, activations and
  gates are elementwise, so a backward pass can recompute their outputs. Each function of this package that computes
  such an output attaches a note to the output tensor (`set_recompute`). The note says how to recompute the tensor. A
  later function whose backward pass needs this tensor reads the note (`get_recompute`). Instead of this tensor, the
  later function saves the inputs of the recomputation.
- **Overwrite.** Autograd may pass one gradient to several functions, so a backward pass must normally not change a
  gradient in place. If no other function holds the gradient (`can_overwrite`), overwriting the gradient saves a buffer.
  On a CPU, an elementwise operation in place also takes far less time, because new memory causes page faults.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from peft_edge._compat import AutogradContext, no_dispatch, saved_tensors_hook, use_counts, version_of

# A recomputation runs at most this many convolutions. Two are enough for an inverted residual block, which has two
# cheap convolutions.
_MAX_CONVOLUTIONS = 2

# On a CPU, elementwise operations process at most this many elements at once, so that temporaries stay in the cache.
CACHED_ELEMENTS = 1 << 19


Step = Callable[..., Tensor]
"""One operation of a recomputation: `step(x, *operands, overwrite=...)`.

On a CPU, the result must be bit-identical to that of the forward pass. With `overwrite`, the result may overwrite x.
"""


class Recomputation:
    """Recomputes a tensor in the backward pass.

    The object first recomputes the tensor of `parent`, and then applies `step` to that tensor. Without `parent`,
    nothing is recomputed, and the only input is the tensor itself.

    The object holds no tensors of the forward pass. Each function that uses the object saves the inputs with
    `ctx.save_for_backward`. Therefore, checkpointing, hooks on saved tensors, and autograd's checks of in-place changes
    apply to the inputs.

    The output of a recomputed convolution stays in memory until the last function that called `add_user` has used it.
    All other steps are cheap, and run again for each function that uses the object.
    """

    def __init__(
        self,
        step: Step | None = None,
        parent: Recomputation | None = None,
        *,
        num_inputs: int = 1,
        is_pointwise: bool = False,
        is_convolution: bool = False,
        shrinks: bool = False,
    ) -> None:
        self.step, self.parent = step, parent
        self.num_inputs = num_inputs
        """The number of input tensors, which are the inputs of `parent` and the operands of `step`."""
        self.is_pointwise = is_pointwise
        """Whether `step` may run on parts of a feature map.

        Such a step must be elementwise, and its operands must have one value per channel.
        """
        self.is_convolution = is_convolution
        self.shrinks = shrinks
        """Whether `step` is a convolution whose output has at most as many elements as its input."""
        self.num_convolutions: int = is_convolution + (0 if parent is None else parent.num_convolutions)
        """The number of convolutions that the recomputation runs."""
        self._users = 0
        self._cached: Tensor | None = None
        # Store the autocast settings of the forward pass, because backward passes run without autocast.
        self._autocast = [
            (device, torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
            if is_convolution and torch.is_autocast_enabled(device)
        ]

    @property
    def is_identity(self) -> bool:
        """Whether the only input is the tensor itself, so that nothing is recomputed."""
        return self.parent is None

    @property
    def is_used(self) -> bool:
        """Whether the recomputation can start from a tensor that another function needs anyway.

        If the recomputation runs convolutions, this tensor is the output of its last convolution. Otherwise, it is the
        first input, from which all steps of the recomputation start.
        """
        if self.parent is None or self.is_convolution:
            return self._users > 0
        return self.parent.is_used

    @property
    def inputs_are_saved(self) -> bool:
        """Whether another function already saves the first input, from which all steps of the recomputation start.

        If so, recomputing needs no further feature map in memory.
        """
        return self._users > 0 if self.parent is None else self.parent.inputs_are_saved

    def add_user(self) -> Recomputation:
        """Announce one more call of `value`, `parts` or `batches` in the backward pass, and return this object."""
        if torch.compiler.is_compiling():
            return self  # compilers cannot trace a change of `_users`, and need no cache
        if self.parent is not None and (self._users == 0 or not self.is_convolution):
            self.parent.add_user()
        self._users += 1
        return self

    def value(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the tensor, recomputed from `inputs`.

        The caller must not change the tensor, because later calls may use it. The caller must not keep it either,
        because later calls may overwrite it.
        """
        if torch.compiler.is_compiling():
            return self._compute(inputs)
        may_cache = self.is_convolution and not torch.is_grad_enabled()
        value = self._cached if self._cached is not None and may_cache else self._compute(inputs)
        self._users -= 1
        self._cached = value if self._users > 0 and may_cache else None
        return value

    def _compute(self, inputs: Sequence[Tensor]) -> Tensor:
        parent, step = self.parent, self.step
        if parent is None or step is None:
            return inputs[0]
        inputs, operands = inputs[: parent.num_inputs], inputs[parent.num_inputs :]
        if not self.is_convolution:
            x = parent.value(inputs)
            # If x was recomputed and is not cached, no other object holds x, so `step` may overwrite x.
            is_owned = not (parent.is_identity or parent._cached is not None or torch.is_grad_enabled())
            return step(x, *operands, overwrite=is_owned)
        # Recompute x in batches, so that the whole x need not be in memory. This does not pay if x is smaller than y.
        y, start = None, 0
        for (x,) in parent.batches(inputs) if self.shrinks else [(parent.value(inputs),)]:
            with ExitStack() as stack:
                for device, dtype in self._autocast:
                    stack.enter_context(torch.autocast(device, dtype))
                part = step(x, *operands, overwrite=False)
            if len(x) == len(inputs[0]):
                return part
            if y is None:
                size = len(inputs[0]), *part.shape[1:]
                y = torch.empty(size, dtype=part.dtype, memory_format=memory_format_of(part))
            y[start : start + len(x)] = part
            start += len(x)
        return cast(Tensor, y)

    def parts(self, inputs: Sequence[Tensor], *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the recomputed tensor in parts that fit into the CPU's cache, each with the same part of all `others`.

        The pointwise steps at the end of the recomputation run on one part at a time. `others` must have the shape of
        the recomputed tensor. The docstring of `iter_parts` lists the cases in which there is only one part.
        """
        return self._parts(iter_parts, inputs, *others)

    def batches(self, inputs: Sequence[Tensor], *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the recomputed tensor in batches of samples, each with the same samples of `others`.

        The pointwise steps at the end of the recomputation run on one batch at a time, so the whole tensor need not be
        in memory. There is only one batch if the last step is not pointwise, if gradients are enabled, if a compiler is
        tracing, or in the cases that the docstring of `iter_sample_batches` lists.
        """
        if not self.is_pointwise or torch.is_grad_enabled() or torch.compiler.is_compiling():
            yield self.value(inputs), *others
        else:
            yield from self._parts(iter_sample_batches, inputs, *others)

    def _parts(
        self, split: Callable[..., Iterator[tuple[Tensor, ...]]], inputs: Sequence[Tensor], *others: Tensor
    ) -> Iterator[tuple[Tensor, ...]]:
        node, steps = self, list[tuple[Step, Sequence[Tensor]]]()
        while node.is_pointwise and node.parent is not None and node.step is not None:
            steps.append((node.step, inputs[node.parent.num_inputs : node.num_inputs]))
            node = node.parent
        for part, *rest in split(node.value(inputs[: node.num_inputs]), *others):
            is_owned = False
            for step, operands in reversed(steps):
                part, is_owned = step(part, *operands, overwrite=is_owned), True
            yield part, *rest


class Recompute(NamedTuple):
    """A recomputation, and the inputs from which it recomputes a tensor."""

    node: Recomputation
    inputs: tuple[Tensor | None, ...]

    @property
    def is_identity(self) -> bool:
        """Whether the only input is the tensor itself, so that nothing is recomputed."""
        return self.node.is_identity

    def then(
        self,
        step: Step,
        *operands: Tensor | None,
        is_pointwise: bool = False,
        is_convolution: bool = False,
        shrinks: bool = False,
    ) -> Recompute:
        """Return a `Recompute` that runs this recomputation, and then applies `step` to the result and `operands`."""
        inputs = (*self.inputs, *operands)
        node = Recomputation(
            step,
            self.node,
            num_inputs=len(inputs),
            is_pointwise=is_pointwise,
            is_convolution=is_convolution,
            shrinks=shrinks,
        )
        return Recompute(node, inputs)


class _Note(NamedTuple):
    """A `Recompute` that is stored on a tensor, with the tensor's version and the active hook at the time of storing.

    If nothing is recomputed, the only input would be the tensor itself. In this case, `inputs` is left empty, because
    the tensor holds this note and must not refer to itself.
    """

    node: Recomputation
    inputs: tuple[Tensor | None, ...]
    version: int
    """The version of the tensor, which an operation in place increases."""
    hooks: weakref.ref[Callable[[Tensor], object]] | None
    """The active hook on saved tensors, for example that of gradient checkpointing. None if no hook was active."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # In copies and pickles of the tensor, an empty set replaces this object. `torch.load` with `weights_only=True`
        # accepts sets.
        return set, ()


def set_recompute(tensor: Tensor, recompute: Recompute) -> Tensor:
    """Store `recompute` on a tensor, unless a compiler is tracing, and return the tensor.

    Nothing is stored if the recomputation would run more than two convolutions.
    """
    if not torch.compiler.is_compiling() and recompute.node.num_convolutions <= _MAX_CONVOLUTIONS:
        tensor._recompute = _Note(*recompute, version_of(tensor), saved_tensors_hook())  # type: ignore[attr-defined]
    return tensor


def get_recompute(tensor: Tensor) -> Recompute:
    """Return the `Recompute` that `set_recompute` stored on a tensor.

    If nothing is stored, the result has no steps, and its only input is the tensor itself. The same applies if the
    tensor was made in inference mode, if a compiler is tracing, if the tensor was changed in place after
    `set_recompute`, or if the active hooks on saved tensors have changed since `set_recompute`.
    """
    if torch.compiler.is_compiling() or tensor.is_inference():
        return Recompute(Recomputation(), (tensor,))
    # Gradient checkpointing sets hooks, and repeats a forward pass. In the repeated pass, the inputs may be new tensors
    # without notes. Both passes must save the same tensors, so neither uses notes from outside the checkpointed part.
    state = version_of(tensor), saved_tensors_hook()
    note = getattr(tensor, "_recompute", None)
    if not isinstance(note, _Note) or (note.version, note.hooks) != state:
        # Also store a `Recomputation` without steps, because it counts the functions that save the tensor.
        note = tensor._recompute = _Note(Recomputation(), (), *state)  # type: ignore[attr-defined]
    return Recompute(note.node, note.inputs or (tensor,))


def has_standard_layout(x: Tensor) -> bool:
    """Return whether a tensor is contiguous or channels-last, without gaps between its elements."""
    return x.is_contiguous(memory_format=memory_format_of(x))


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of x: channels-last or contiguous.

    x has the shape (B, C, *size). If x has both formats or neither, the result is the contiguous format.
    """
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is None or x.is_contiguous() or not x.is_contiguous(memory_format=channels_last):
        return torch.contiguous_format
    return channels_last


def fits_cache(x: Tensor) -> bool:
    """Return whether a tensor is so small that elementwise operations need not process it in parts."""
    return x.numel() <= CACHED_ELEMENTS


def iter_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split `tensors`, which all have the shape (B, C, *size), into parts that fit into the cache of a CPU.

    Yield a tuple for each part, with a view of each tensor. A view has the channels in dimension 1. The tensors remain
    in one part if they are small or not on a CPU, if their strides differ, or if they are neither contiguous nor
    channels-last.
    """
    first = tensors[0]
    is_common = has_standard_layout(first) and all(tensor.stride() == first.stride() for tensor in tensors)
    if first.device.type != "cpu" or first.dim() < 2 or fits_cache(first) or not is_common:
        yield tensors
    elif memory_format_of(first) == torch.contiguous_format:
        rows = max(1, CACHED_ELEMENTS // first[0].numel())
        yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    else:
        channels = first.shape[1]
        rows = max(1, CACHED_ELEMENTS // channels)
        for start in range(0, first.numel() // channels, rows):
            size = min(rows, first.numel() // channels - start)
            # View `size` consecutive pixels as an image of one column in channels-last format.
            shape, strides = (1, channels, size, 1), (size * channels, 1, channels, channels)
            yield tuple(
                tensor.as_strided(shape, strides, tensor.storage_offset() + start * channels) for tensor in tensors
            )


def iter_sample_batches(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of shape (B, ...), with the same B, into batches of samples. Yield a tuple of views for each batch.

    A batch of x has at most 2 * `CACHED_ELEMENTS` elements, unless a single sample has more. The tensors remain in one
    batch if x is small, not on a CPU, or smaller than one of `others`.
    """
    # A convolution takes longer per sample in small batches, so batches pay only if x is much larger than the cache.
    if x.device.type != "cpu" or x.numel() <= 4 * CACHED_ELEMENTS or any(x.numel() < each.numel() for each in others):
        yield x, *others
    else:
        samples = max(1, 2 * CACHED_ELEMENTS // x[0].numel())
        yield from zip(*(tensor.split(samples) for tensor in (x, *others)), strict=True)


def can_overwrite(gradient: Tensor) -> bool:
    """Return whether only the caller holds the gradient; False if a compiler is tracing or gradients are enabled.

    The caller must be the `backward` of an autograd function. Any other holder of the gradient increases the
    number of references to the Python object, to the C++ tensor, or to the storage. The function compares these counts
    with the counts in a backward pass without another holder. In versions of torch or Python whose counts do not show
    other holders, the result is always False.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return _reference_counts(gradient) == _counts_of_sole_holder()


def _reference_counts(gradient: Tensor) -> tuple[int, int, int]:
    return sys.getrefcount(gradient), *use_counts(gradient)


@functools.cache
def _counts_of_sole_holder() -> tuple[int, int, int] | None:
    """Return the reference counts of a gradient that is held only by the `backward` function that receives it.

    Return None if these counts vary, or if a further reference to the gradient does not change them.
    """
    held: list[Tensor] = []

    def hold(y: Tensor) -> Tensor:
        y.register_hook(held.append)
        return y

    probe = _Probe.apply
    with_other_holders: list[Callable[[Tensor], Tensor]] = [
        lambda x: probe(x) + probe(x),
        lambda x: torch.cat([probe(x), x]),
        lambda x: hold(probe(x)),
    ]
    sole = _first_counts(probe)
    others = [_first_counts(function) for function in with_other_holders]
    return sole if sole == _first_counts(probe) and sole not in others else None


def _first_counts(function: Callable[[Tensor], Tensor]) -> tuple[int, int, int]:
    """Run `function` and its backward pass, and return the first reference counts that a `_Probe` records."""
    _Probe.counts.clear()
    # Do not call this function at import, because a backward pass starts threads. `no_dispatch` hides the backward pass
    # from FLOP and memory counters.
    with no_dispatch(), torch.enable_grad():
        function(torch.zeros(2, requires_grad=True)).square().sum().backward()
    return _Probe.counts[0]


class _Probe(torch.autograd.Function):
    """Copies its input. `backward` records the reference counts of the gradient that it receives."""

    counts: ClassVar[list[tuple[int, int, int]]] = []

    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> Tensor:
        _Probe.counts.append(_probe(gradient))
        return gradient


def _probe(gradient: Tensor) -> tuple[int, int, int]:
    # The call of this function adds a reference to the gradient, as the call of `can_overwrite` does. The counts in
    # both functions are therefore comparable.
    return _reference_counts(gradient)
