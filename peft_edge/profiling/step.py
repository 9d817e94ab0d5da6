"""One training step of a model, on its own tensors or on fake ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
LossFn = Callable[[Any], Tensor]


def take_step(model: nn.Module, inputs: Inputs, optimizer: Optimizer | None, loss_fn: LossFn | None) -> None:
    """Takes one step: gradients dropped, forward, backward where something is trained, and the optimizer.

    Args:
        model: In the mode (train or eval) that it shall run in.
        inputs: A tensor or a tuple for positional arguments, a mapping for keyword arguments.
        optimizer: None to stop after the backward pass.
        loss_fn: From the model's output to a scalar. By default `output.loss` where it is set, and otherwise the mean
            of the output (of `output.logits`), whose gradient costs the model what any loss's does.

    Raises:
        ValueError: The loss is no scalar, or the output holds nothing that a loss could be made of.
    """
    model.zero_grad()
    loss = (loss_fn or _default_loss)(_call(model, inputs))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss must be a tensor of one element, found {found}: pass loss_fn")
    if loss.requires_grad:
        loss.backward()
    if optimizer is not None:
        optimizer.step()


def _call(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _default_loss(output: Any) -> Tensor:
    if getattr(output, "loss", None) is not None:
        return output.loss
    return logits_of(output, advice="pass loss_fn").float().mean()


def logits_of(output: Any, *, advice: str) -> Tensor:
    """Returns the model's output, or the logits in it.

    Raises:
        ValueError: It is neither; the message ends with the advice.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model returns {type(output).__name__}, expected a tensor or logits: {advice}")
    return logits


class _FakeMode(FakeTensorMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.rand.default and list(args[0]) == [1]:
            # Methods of PEFT draw one number and look at it, to drop a module now and then: here none is dropped.
            with self:
                return torch.tensor([1.0])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, DataDependentOutputException):
            raise ValueError(
                f"the step reads the value of a tensor ({error.func}), as some optimizers do, and an analysis has only "
                "shapes: choose others, or measure a real step by FlopCounter and MemoryTracker"
            ) from error


def fake_copy(
    model: nn.Module, optimizer: Optimizer | None, inputs: Inputs
) -> tuple[FakeTensorMode, nn.Module, Optimizer | None, Inputs]:
    """Copies model, optimizer and inputs, with fake tensors, which have a shape but no memory, in the place of theirs.

    Tied parameters stay tied and views stay views of one storage. Tensors on the meta device become fake CPU tensors,
    so that they run through the operators of a real model.

    Returns:
        The mode to run the copies in, and the copies. The originals are left as they are.
    """
    mode = _FakeMode(allow_non_fake_inputs=True)
    state = [] if optimizer is None else tree_leaves(list(optimizer.state.values()))
    # What deepcopy finds in its memo it does not copy.
    memo: dict[int, Any] = {id(leaf): _fake_state(leaf, mode) for leaf in state if isinstance(leaf, Tensor)}
    memo |= {id(tensor): _fake(tensor, mode) for tensor in [*model.parameters(), *model.buffers()]}
    model_copy, optimizer_copy = copy_together(model, optimizer, memo)
    # A tokenizer's mapping is no dict, and torch would not look inside.
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return mode, model_copy, optimizer_copy, tree_map_only(Tensor, lambda tensor: _fake(tensor, mode), inputs)


def copy_together(
    model: nn.Module, optimizer: Optimizer | None, memo: dict[int, Any]
) -> tuple[nn.Module, Optimizer | None]:
    """Copies a model and the optimizer of its parameters.

    Args:
        model: To be copied.
        optimizer: To be copied, with those of its attributes that torch's optimizers do not have.
        memo: As `copy.deepcopy` takes it: what is not to be copied, by identity.

    Raises:
        ValueError: The optimizer trains parameters that are not the model's, or one of the two cannot be copied.
    """
    parameters = set(model.parameters())
    groups = [] if optimizer is None else optimizer.param_groups
    if any(parameter not in parameters for group in groups for parameter in group["params"]):
        raise ValueError(
            "the optimizer trains parameters that are not the model's: if they are those of the loss, make the loss a "
            "part of the model"
        )
    try:
        model_copy, optimizer_copy = copy.deepcopy((model, optimizer), memo)
        if optimizer_copy is not None:
            # torch pickles its own attributes only. A schedule sets one, `step`, that would step the original.
            missing = vars(optimizer).keys() - vars(optimizer_copy).keys() - {"step"}
            vars(optimizer_copy).update(copy.deepcopy({name: vars(optimizer)[name] for name in missing}, memo))
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} and {type(optimizer).__name__} cannot be copied ({error}): measure a real step of "
            "them, inside of FlopCounter and MemoryTracker"
        ) from error
    return model_copy, optimizer_copy


def meta_copy(model: nn.Module) -> nn.Module:
    """Returns a copy on the meta device, which takes no memory; tied parameters stay tied."""
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _fake_state(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    if tensor.dim() or not tensor.is_cpu:
        return _fake(tensor, mode)
    # Optimizers read their number of steps: made of a number, a fake tensor keeps its value.
    value = tensor.item()
    with mode:
        return torch.tensor(value, dtype=tensor.dtype)


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    if not tensor.is_meta:
        return mode.from_tensor(tensor, static_shapes=True)
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake
