"""Capture one training step of an adapter as a functional graph of standard operators.

The inputs of the graph are images, labels, a mask, the learning rate, the adapter and the optimizer state. The outputs
are the loss, the number of correct predictions, the new adapter and the new optimizer state. The graph contains the
forward pass, the backward pass and the update. `peft_edge.export.onnx_graph` converts the graph to ONNX, so that an
inference runtime can train the adapter.

The frozen layers before the first trained layer can become a separate graph, called the prefix. Its outputs are called
features. The step then takes features instead of images, and a device computes the features of an image only once.

The graphs are captured in double precision, so that their results can be compared with eager training to 1e-10.
Constants, such as kernels that are scaled by a frozen BatchNorm, are rounded only once, when a file is written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from peft_edge.export.decompositions import decompositions
from peft_edge.functional.convolution import Geometry, convolution, pad
from peft_edge.lean import undo_lean_training
from peft_edge.lean.feature_cache import FrozenPrefix
from peft_edge.lean.prepare import fusable_norms
from peft_edge.tuners.conv_lora.layer import ConvLoraLayer
from peft_edge.tuners.norm import BatchNormLayer

aten = torch.ops.aten

IMAGES, FEATURES, LABELS, MASK, LEARNING_RATE = "images", "features", "labels", "mask", "learning_rate"
LOSS, CORRECT, LOGITS, STEP = "loss", "correct", "logits", "step"
NEW = "new:"  # prefix of output names; the output `new:<name>` replaces the input `<name>` in the next step
PREFIX = "base_model.model."  # prefix of the names in a saved PEFT adapter

_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, kw_only=True)
class StepOptimizer:
    """The optimizer inside a training step: `torch.optim.SGD` or `torch.optim.AdamW`.

    Attributes:
        name: `sgd` or `adamw`.
        momentum: Momentum of SGD. With 0, SGD has no state. AdamW ignores this field.
        weight_decay: SGD adds `weight_decay * parameter` to the gradient. AdamW subtracts
            `lr * weight_decay * parameter` from the parameter.
        betas: Decay rates of AdamW's averages of the gradient and of the squared gradient.
        eps: A small number that AdamW adds to the denominator.
        max_grad_norm: The gradients are clipped to a total norm of at most this value. With None, they are not clipped.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw"):
            raise ValueError(f"optimizer: expected sgd or adamw, found {self.name!r}")
        in_range = {
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": self.weight_decay >= 0,
            "betas": len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "eps": self.eps > 0,
            "max_grad_norm": self.max_grad_norm is None or self.max_grad_norm > 0,
        }
        wrong = [f"{name}={getattr(self, name)!r}" for name, is_valid in in_range.items() if not is_valid]
        if wrong:
            raise ValueError(
                f"optimizer: {', '.join(wrong)}: expected momentum and betas in [0, 1), weight_decay of at least 0, "
                "eps and max_grad_norm above 0"
            )

    @property
    def slots(self) -> tuple[str, ...]:
        """The kinds of state that the optimizer keeps for each tensor of the adapter, such as `exp_avg`."""
        if self.name == "adamw":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum",) if self.momentum else ()

    def initial_state(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state before the first step, in which all values are 0.

        It has tensors `<slot>:<name>` for all `slots` and all names in `adapter`. AdamW also has the counter `step`.
        """
        state = {f"{slot}:{name}": torch.zeros_like(value) for name, value in adapter.items() for slot in self.slots}
        if self.name == "adamw":
            state[STEP] = next(iter(adapter.values())).new_zeros(())
        return state

    def update(
        self, adapter: Mapping[str, Tensor], gradients: Sequence[Tensor], state: Mapping[str, Tensor], lr: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the new adapter and the new state after one step. `gradients` must have the order of `adapter`."""
        if self.max_grad_norm is not None:
            # This is the formula of `torch.nn.utils.clip_grad_norm_`.
            norm = torch.sqrt(torch.stack([gradient.square().sum() for gradient in gradients]).sum())
            factor = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
            gradients = [gradient * factor for gradient in gradients]
        step_values, new_adapter, new_state = [lr], {}, {}
        if self.name == "adamw":
            new_state[STEP] = step = state[STEP] + 1
            first, second = (1 - beta**step for beta in self.betas)
            step_values = [lr, lr / first, torch.sqrt(second)]
        rule = self._adamw if self.name == "adamw" else self._sgd
        for (name, value), gradient in zip(adapter.items(), gradients, strict=True):
            kept = [state[f"{slot}:{name}"] for slot in self.slots]
            new_adapter[name], *kept = rule(value, gradient, *kept, *step_values)
            new_state |= {f"{slot}:{name}": new for slot, new in zip(self.slots, kept, strict=True)}
        return new_adapter, {name: new_state[name] for name in state}

    def _sgd(self, value: Tensor, gradient: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Return the new parameter and the new momentum. With `momentum=0`, return only the new parameter.

        `rest` is (momentum buffer, learning rate). With `momentum=0`, it is only the learning rate.
        """
        *kept, lr = rest
        if self.weight_decay:
            gradient = gradient + self.weight_decay * value
        if not kept:
            return (value - lr * gradient,)
        momentum = self.momentum * kept[0] + gradient
        return value - lr * momentum, momentum

    def _adamw(
        self, value: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, lr: Tensor, rate: Tensor, root: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the new parameter, the new average of the gradient and the new average of the squared gradient.

        `mean` and `square` are the old averages. In step t, `rate` is `lr / (1 - betas[0]**t)`, and `root` is
        `sqrt(1 - betas[1]**t)`.
        """
        if self.weight_decay:
            value = value * (1 - lr * self.weight_decay)
        mean = self.betas[0] * mean + (1 - self.betas[0]) * gradient
        square = self.betas[1] * square + (1 - self.betas[1]) * gradient.square()
        return value - rate * mean / (torch.sqrt(square) / root + self.eps), mean, square


@dataclass(frozen=True, kw_only=True)
class CapturedGraph:
    """An fx graph of ATen operators in double precision, without in-place operators.

    Attributes:
        module: The graph. It maps the input tensors to a tuple of output tensors. Frozen weights are buffers.
        inputs: Names of the inputs, in the order of the arguments.
        outputs: Names of the outputs, in the order of the tuple.
    """

    module: fx.GraphModule
    inputs: list[str]
    outputs: list[str]

    @property
    def input_shapes(self) -> dict[str, list[int]]:
        """A dict from the names of the inputs to their shapes."""
        nodes = self.module.graph.find_nodes(op="placeholder")
        return {name: list(node.meta["val"].shape) for name, node in zip(self.inputs, nodes, strict=True)}

    @property
    def output_shapes(self) -> dict[str, list[int]]:
        """A dict from the names of the outputs to their shapes."""
        nodes: Any = self.module.graph.output_node().args[0]
        return {name: list(node.meta["val"].shape) for name, node in zip(self.outputs, nodes, strict=True)}

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on `values`, a dict with a tensor for each name in `inputs`. Return a dict of the outputs."""
        with torch.no_grad():
            return dict(zip(self.outputs, self.module(*[values[name] for name in self.inputs]), strict=True))


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """The graphs that `capture_train_step` returns.

    Attributes:
        step: The graph of a training step. Its inputs are the images (or the features, if `prefix` is not None), the
            labels, the mask, the learning rate, the adapter and the optimizer state. Its outputs are the loss, the
            number of correct predictions, the new adapter and the new optimizer state.
        predict: The graph that computes the logits from images (features if `prefix` is not None) and the adapter.
        prefix: The graph that computes features from images by the frozen first layers. None if the step is not split.
        start: The name of the first module after the prefix. None if `prefix` is None.
        adapter: A dict from the names in the saved adapter to the initial tensors.
        state: The initial state of the optimizer; see `StepOptimizer.initial_state`.
    """

    step: CapturedGraph
    predict: CapturedGraph
    prefix: CapturedGraph | None
    start: str | None
    adapter: dict[str, Tensor] = field(repr=False)
    state: dict[str, Tensor] = field(repr=False)

    @property
    def data(self) -> str:
        """The name of the first input of `step` and `predict`: `images` if `prefix` is None, otherwise `features`."""
        return IMAGES if self.prefix is None else FEATURES

    def features(self, images: Tensor) -> Tensor:
        """Return the features of `images`, or `images` if `prefix` is None. The graph `step` takes them as input."""
        return images if self.prefix is None else self.prefix.run({IMAGES: images})[FEATURES]

    def initial_tensors(self) -> dict[str, Tensor]:
        """Return the adapter and the optimizer state in single precision."""
        return {name: value.float().contiguous() for name, value in {**self.adapter, **self.state}.items()}


def capture_train_step(model: PeftModel, images: Tensor, optimizer: StepOptimizer, *, split: bool = False) -> TrainStep:
    """Capture two graphs: a training step of the active adapter of `model`, and the computation of the logits.

    BatchNorm uses its stored statistics. The loss is the cross-entropy, averaged over the samples whose mask is 1.
    Samples with mask 0 are padding, and have no effect on the result. If all samples are padding, the loss and all
    gradients are 0. Momentum and weight decay can then still change the adapter.

    Args:
        model: A PEFT model with one active adapter. It is not changed.
        images: Example images (B, C, H, W). Only their shape matters. B becomes the batch size of the step.
        optimizer: The optimizer, whose update is a part of the step.
        split: Whether to capture the frozen layers before the first trained layer as a third graph, the prefix.

    Raises:
        ValueError: If `check_exportable` or `trained_names` rejects the model, or a trained parameter has no effect on
            the loss. If `split` is True and `FrozenPrefix` cannot split the model.
        NotImplementedError: If the step needs the gradient of a transposed convolution, of an average pool with
            padding, or of an average pool whose last window extends beyond the image (`ceil_mode`).
    """
    check_exportable(model)
    names = trained_names(model)
    network = _step_network(model)
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    adapter = {name: tensors[parameter].detach().clone() for name, parameter in names.items()}
    state = optimizer.initial_state(adapter)
    frozen = {name: tensor.detach() for name, tensor in tensors.items() if name not in names.values()}
    images, data, start = images.double(), IMAGES, None
    tail, prefix = network, None
    if split:
        data, start, tail, prefix = FEATURES, *_capture_prefix(network, images, frozen)
        tail_tensors = dict(tail.named_parameters()) | dict(tail.named_buffers())
        frozen = {name: tensor for name, tensor in frozen.items() if name in tail_tensors}

    def forward(x: Tensor, adapter: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> Tensor:
        return functional_call(tail, {**frozen, **{names[key]: value for key, value in adapter.items()}}, (x,))

    def step(values: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        trained = {name: values[name].requires_grad_() for name in adapter}
        logits = forward(values[data], trained, frozen)
        mask = values[MASK].to(logits.dtype)
        # Select log-probabilities by a product with one-hot labels. A product has a simpler gradient than `gather`.
        chosen = values[LABELS].unsqueeze(1) == torch.arange(logits.shape[1])
        losses = -(F.log_softmax(logits, 1) * chosen.to(logits.dtype)).sum(1)
        loss = (losses * mask).sum() / mask.sum().clamp(min=1.0)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        if unused := [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]:
            raise ValueError(f"{unused[0]} is trained, but has no influence on the loss: freeze it")
        with torch.no_grad():
            right = (logits.argmax(1) == values[LABELS]).to(mask.dtype)
            kept = {name: value.detach() for name, value in trained.items()}
            new = optimizer.update(kept, gradients, {name: values[name] for name in state}, values[LEARNING_RATE])
        replaced = {f"{NEW}{name}": value for part in new for name, value in part.items()}
        return {LOSS: loss.detach(), CORRECT: (right * mask).sum(), **replaced}

    examples = images if prefix is None else prefix.run({IMAGES: images})[FEATURES]
    batch = {
        data: examples,
        LABELS: torch.zeros(len(images), dtype=torch.long),
        MASK: torch.ones(len(images), dtype=images.dtype),
        LEARNING_RATE: torch.tensor(0.1, dtype=images.dtype),
    }

    def predict(values: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {LOGITS: forward(values[data], {name: values[name] for name in adapter}, frozen)}

    return TrainStep(
        step=capture_graph(step, {**batch, **adapter, **state}, frozen),
        predict=capture_graph(predict, {data: examples, **adapter}, frozen),
        prefix=prefix,
        start=start,
        adapter=adapter,
        state=state,
    )


def _capture_prefix(
    network: nn.Module, images: Tensor, frozen: Mapping[str, Tensor]
) -> tuple[str, nn.Module, CapturedGraph]:
    """Split the prefix (the frozen layers before the first trained layer) from the network.

    Return the name of the first module after the prefix, the network without the prefix, and the graph of the prefix.

    Raises:
        ValueError: If `FrozenPrefix` cannot split the network.
    """
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, *images.shape[1:], generator=generator, dtype=images.dtype)
    try:
        split = FrozenPrefix(network, example, eval_only=True)
    except ValueError as error:
        raise ValueError(f"the training step cannot be split: {error}") from error

    class Prefix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            return split.features(images)

    prefix = Prefix()

    def features(values: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {f"network.{name}": tensor for name, tensor in frozen.items()}
        return {FEATURES: functional_call(prefix, tensors, (values[IMAGES],))}

    return split.start, split.tail, capture_graph(features, {IMAGES: images}, frozen)


def trained_names(model: PeftModel) -> dict[str, str]:
    """Return a dict from the name of each trained parameter in the saved adapter to its name in the base model.

    Raises:
        ValueError: If no parameter is trainable, or if a trainable parameter is not saved or is saved under two names.
    """
    inner = {id(parameter): name for name, parameter in model.get_base_model().named_parameters()}
    trained = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = get_peft_model_state_dict(
        model, model.state_dict(keep_vars=True), adapter_name=model.active_adapter, save_embedding_layers=False
    )
    names = {name: inner[id(tensor)] for name, tensor in saved.items() if id(tensor) in trained}
    if len(set(names.values())) < len(names):
        raise ValueError('bias="all" saves a bias under two names: adapt with bias="none" or "lora_only"')
    if missing := sorted(set(trained.values()) - {f"{PREFIX}{name}" for name in names.values()}):
        raise ValueError(f"{missing[0]} is trained, but is no part of the adapter {model.active_adapter!r}: freeze it")
    if not names:
        raise ValueError(
            f"the adapter {model.active_adapter!r} has nothing to train: load it with is_trainable=True, or call "
            "model.set_adapter, which makes it trainable"
        )
    return names


def check_exportable(model: PeftModel) -> None:
    """Check that a training step of `model`, in its present mode (training or eval), can be exported.

    The exported step always uses the stored statistics of BatchNorm, and no dropout. This function therefore rejects a
    model whose forward pass uses batch statistics or dropout. An adapter that trains with batch statistics
    (`norm="stats"` or `"affine"`) must be in eval mode. Training on the device does not change the stored statistics.

    Raises:
        ValueError: If a layer uses batch statistics or dropout, the adapter of a convolution is merged, or the number
            of active adapters is not 1. The message names the first three problems.
    """
    problems = []
    if len(model.active_adapters) != 1:
        problems.append(f"expected one active adapter, found {model.active_adapters}")
    inside = set()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BatchNormLayer):
            inside |= set(module.modules())
            if module.uses_batch_statistics:
                norm = module.current_state().norm
                problems.append(
                    f'{name}: norm="{norm}" in training mode uses batch statistics: call model.eval() first'
                )
        elif isinstance(module, _BatchNorm) and module not in inside:
            if module.training or module.running_mean is None:
                problems.append(f"{name}: BatchNorm in training mode uses batch statistics: call model.eval() first")
        elif isinstance(module, nn.Dropout) and module.p and module.training:
            problems.append(f"{name}: dropout is random: call model.eval() first")
        if isinstance(module, ConvLoraLayer) and module.merged:
            problems.append(f"{name}: the adapter is merged: call model.unmerge_adapter() first")
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(f"the training step cannot be exported: {shown}")


# --- the network with forward functions for the capture -----------------------------------------------------------


def _step_network(model: PeftModel) -> nn.Module:
    """Return a copy of the base model in double precision and eval mode. In it, some forward functions are replaced.

    - LoRA runs as a branch parallel to the frozen convolution: y = conv(x; weight) + scaling * lora_B(lora_A(x)). The
      kernel `weight` is then a constant. Grouped convolutions and DoRA instead compute the adapted kernel in each step.
    - A frozen BatchNorm is fused into the convolution before it. This scales the kernel and `lora_B`, and changes the
      bias. If another layer also uses the output of the convolution, the BatchNorm is not fused.
    """
    network = copy.deepcopy(undo_lean_training(copy.deepcopy(model)).get_base_model()).cpu().double().eval()
    network.to(memory_format=torch.contiguous_format)
    norm_of: dict[Any, Any] = {
        conv: norm
        for conv, norm in fusable_norms(network)
        if isinstance(conv, ConvLoraLayer | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and not any(value.requires_grad for value in norm.parameters())
    }
    for conv, norm in norm_of.items():
        norm.forward = partial(_without_norm, _base_layer(norm))
        if not isinstance(conv, ConvLoraLayer):
            conv.forward = partial(_convolve, conv, norm)
    layers: list[Any] = [module for module in network.modules() if isinstance(module, ConvLoraLayer)]
    for layer in layers:
        layer.forward = partial(_lora_convolve, layer, norm_of.get(layer))
    return network


def _base_layer(layer: Any) -> Any:
    """Return the BatchNorm inside a `BatchNormLayer`. Return any other layer unchanged."""
    return layer.get_base_layer() if isinstance(layer, BatchNormLayer) else layer


def _without_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Compute what remains of a BatchNorm after it is fused into a convolution. Used as the `forward` of the norm.

    Apply the dropout and the activation of timm's BatchNormAct2d to x. For any other norm, return x.
    """
    return norm.act(norm.drop(x)) if isinstance(norm, BatchNormAct2d) else x


def _affine(norm: nn.Module | None) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift (C,) of a frozen BatchNorm: y = scale * x + shift. If `norm` is None, return None."""
    if norm is None:
        return None
    base = _base_layer(norm)
    state = norm.current_state() if isinstance(norm, BatchNormLayer) else base
    mean, var, weight, bias = (
        getattr(base, name) if getattr(state, name) is None else getattr(state, name)
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    scale = torch.rsqrt(var + base.eps)
    scale = scale if weight is None else scale * weight
    return scale, -mean * scale if bias is None else bias - mean * scale


def _scaled(kernel: Tensor, bias: Tensor | None, affine: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
    """Return `kernel` and `bias` with a BatchNorm fused into them. `affine` is (scale, shift), or None for no norm."""
    if affine is None:
        return kernel, bias
    scale, shift = affine
    return _scale_rows(kernel, scale), shift if bias is None else bias * scale + shift


def _scale_rows(kernel: Tensor, scale: Tensor) -> Tensor:
    """Multiply each output channel of a kernel (C_out, C_in/g, *size) by its element of `scale`, of shape (C_out,)."""
    return kernel * scale.view(-1, *[1] * (kernel.dim() - 1))


def _convolve(conv: Any, norm: nn.Module | None, x: Tensor) -> Tensor:
    """Compute `conv.forward` of a convolution without an adapter. The BatchNorm `norm` is fused into `conv`."""
    x, geometry = pad(conv, x)
    return convolution(x, *_scaled(conv.weight, conv.bias, _affine(norm)), geometry)


def _lora_convolve(layer: Any, norm: nn.Module | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute `layer.forward` of a `ConvLoraLayer`. If `norm` is not None, this BatchNorm is fused into the layer."""
    conv, affine = layer.get_base_layer(), _affine(norm)
    (adapter,) = layer.active_adapters
    x, geometry = pad(conv, x)
    if geometry.groups > 1 or layer.use_dora[adapter]:
        kernel, bias = layer._compose([adapter])
        return convolution(x, *_scaled(kernel, bias, affine), geometry)
    lora_a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight * layer.scaling[adapter]
    y = convolution(x, *_scaled(conv.weight, layer._add_bias(conv.bias, adapter), affine), geometry)
    ones, zeros = (1,) * len(geometry.stride), (0,) * len(geometry.stride)
    lora_b = lora_b if affine is None else _scale_rows(lora_b, affine[0])
    return y + convolution(convolution(x, lora_a, None, geometry), lora_b, None, Geometry(ones, zeros, ones))


# --- capture ------------------------------------------------------------------------------------------------------


def capture_graph(
    function: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]],
    values: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
) -> CapturedGraph:
    """Trace `function`, and store all values that depend only on frozen tensors as constants in the graph.

    Args:
        function: A function that maps a dict of inputs and a dict of frozen tensors to a dict of outputs.
        values: A dict from the names of the inputs to example tensors, whose shapes and dtypes the inputs will have.
        frozen: A dict from names to tensors. The tensors, or values computed from them, become buffers of the graph.
    """
    outputs: list[str] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = function(
            dict(zip(values, tensors, strict=False)), dict(zip(frozen, tensors[len(values) :], strict=True))
        )
        outputs[:] = results
        return tuple(results.values())

    tensors = [*values.values(), *frozen.values()]
    traced = make_fx(flat, tracing_mode="fake")(*(tensor.detach() for tensor in tensors))
    # `functionalize` removes in-place operators. The second trace replaces backward operators by forward operators.
    functional = functionalize(traced)
    module = make_fx(functional, tracing_mode="fake", decomposition_table=decompositions())(*tensors)
    _remove_copies(module.graph)
    _fold_constants(
        module, dict(zip(module.graph.find_nodes(op="placeholder")[len(values) :], frozen.values(), strict=True))
    )
    _compare_early(module.graph)
    module.graph.lint()
    module.recompile()
    return CapturedGraph(module=module, inputs=list(values), outputs=outputs)


_COPIES = {aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
_RESHAPES = {aten.view.default, aten._unsafe_view.default}
_COMPARISONS = {aten.le.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.gt.Scalar, aten.eq.Scalar, aten.ne.Scalar}
_LOGIC = {aten.bitwise_or.Tensor, aten.logical_or.default, aten.bitwise_and.Tensor, aten.logical_and.default}


def _remove_copies(graph: fx.Graph) -> None:
    """Remove operators that copy a tensor without changing its values, and replace `view` by `reshape`."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _COPIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in _RESHAPES:
            node.target = aten.reshape.default  # `view` may fail if a copy that made a tensor contiguous was removed
    graph.eliminate_dead_code()


def _fold_constants(module: fx.GraphModule, constants: dict[fx.Node, Tensor]) -> None:
    """Compute the nodes that depend only on `constants`. Results that the remaining nodes need become buffers.

    `constants` maps placeholders of the graph to tensors. The placeholders and the computed nodes are removed.
    """
    graph, folded = module.graph, dict(constants)
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and inputs and all(each in folded for each in inputs):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: folded[each])
            with torch.no_grad():
                folded[node] = node.target(*args, **kwargs)
    names: dict[tuple[Any, ...], str] = {}
    for node, value in folded.items():
        if not isinstance(value, Tensor) or all(user in folded for user in node.users):
            continue
        # Values in the same memory share one buffer, for example a kernel that both forward and backward pass use.
        key = (value.data_ptr(), value.shape, value.stride())
        if key not in names:
            names[key] = f"constant_{len(names)}"
            module.register_buffer(names[key], value.contiguous().clone())
        with graph.inserting_before(node):
            buffer = graph.get_attr(names[key])
        buffer.meta = dict(node.meta)
        node.replace_all_uses_with(buffer, delete_user_cb=lambda user: user not in folded)
    for node in reversed(list(folded)):
        graph.erase_node(node)


def _compare_early(graph: fx.Graph) -> None:
    """Move each comparison, such as `x > 0`, to an earlier position, to save memory.

    The comparison then directly follows the last operator that uses x for anything but a comparison. Until the backward
    pass, memory holds the mask (one byte for each element) instead of x. Logical operators on masks move as well.

    The backward pass of a hardtanh (ReLU6) compares the input of the hardtanh with its two limits. In the changed
    graph, it compares the output instead, because the next layer may keep the output in memory anyway.
    """
    for node in graph.find_nodes(op="call_function", target=aten.hardtanh.default):
        for user in list(node.args[0].users):
            if user.target in _COMPARISONS and user.args[1] in node.args[1:3]:
                user.replace_input_with(node.args[0], node)
    nodes = list(graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    masks: set[fx.Node] = set()
    for node in nodes:
        if node.target in _COMPARISONS:
            (source,) = node.all_input_nodes
            last_use = max([order[source], *(order[user] for user in source.users if user.target not in _COMPARISONS)])
            if source.op == "call_function" and last_use < order[node]:
                nodes[last_use].append(node)
            masks.add(node)
        elif node.target in _LOGIC and masks.issuperset(node.all_input_nodes):
            current = {each: index for index, each in enumerate(graph.nodes)}
            max(node.all_input_nodes, key=current.__getitem__).append(node)
            masks.add(node)
