"""Define the contenders, which are our methods and those of other packages, and measure their training steps."""

from __future__ import annotations

import copy
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

from peft_edge.backbones import head_names, load_backbone
from peft_edge.bench.results import BenchRecord, BenchRow, PhaseTimes
from peft_edge.methods import training_memory_format
from peft_edge.profiling.analysis import classification_loss, prepare_step
from peft_edge.profiling.callback import CountedStep
from peft_edge.records import StepProfile, load_average, package_info, system_info
from peft_edge.roles import modules_with_role

Step = tuple[nn.Module, Optimizer | None]
Build = Callable[[nn.Module, int], Step]

LEAN = {"inplace_norm": True, "masks": "bit"}
"""Arguments of `prepare_model_for_lean_training` for a network with frozen BatchNorm."""


@dataclass(frozen=True)
class Contender:
    """A method of this or another package whose step is measured. All contenders except `inference` train the head."""

    label: str
    """Name in tables."""
    build: Build
    """Function that maps a timm model and a LoRA rank to the built model, in train or eval mode, and its optimizer.

    An optimizer of None means no backward pass and no update. `build` may change the timm model in place. In eval mode,
    the built model must have the same output as the timm model, up to rounding. If `build` raises an exception, the
    table shows the message.
    """


def _train(model: nn.Module, lora_rank: int, config: LoraConfig | None = None) -> Step:
    """Prepare to train the parameters that require a gradient or, with `config`, the adapter of PEFT."""
    model, optimizer = prepare_step(model, config)
    return model.to(memory_format=training_memory_format(model)), optimizer


def _inference(model: nn.Module, lora_rank: int) -> Step:
    # Without trainable parameters, autograd keeps no activations.
    return model.requires_grad_(False).eval().to(memory_format=training_memory_format(model)), None


def _peft(model: nn.Module, lora_rank: int, **options: bool) -> Step:
    targets = {"target_modules": modules_with_role(model, "dense"), "modules_to_save": head_names(model)}
    return _train(model, lora_rank, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, **targets, **options))


def _lycoris(model: nn.Module, lora_rank: int) -> Step:
    from lycoris.modules.locon import LoConModule

    for name, conv in _frozen_dense_convolutions(model):
        adapter = LoConModule(name, conv, lora_dim=lora_rank, alpha=2 * lora_rank)
        # `apply_to` replaces `conv.forward`. The model must contain `adapter`, because only its submodules are trained.
        adapter.apply_to()
        model.add_module(f"lycoris_{name.replace('.', '_')}", adapter)
    return _train(model, lora_rank)


def _loralib(model: nn.Module, lora_rank: int) -> Step:
    from loralib import Conv2d

    for name, conv in _frozen_dense_convolutions(model):
        if type(conv) is not nn.Conv2d or len({*conv.kernel_size}) != 1:
            raise ValueError(f"loralib supports only nn.Conv2d with square kernels, and {name} is {conv}")
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size[0]
        layer = Conv2d(*sizes, r=lora_rank, lora_alpha=2 * lora_rank, merge_weights=False)
        layer.conv = conv  # replaces the convolution that the layer created
        model.set_submodule(name, layer)
    return _train(model, lora_rank)


def _frozen_dense_convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    model.requires_grad_(False)
    for name in head_names(model):
        model.get_submodule(name).requires_grad_(True)
    for name in modules_with_role(model, "dense"):
        yield name, model.get_submodule(name)


def _ours(method: str, *, lean: Mapping[str, object] | None = LEAN, norm: str = "frozen", **adapter: str) -> Build:
    return lambda model, lora_rank: prepare_step(
        model, method, lora_rank=lora_rank, adapter={"norm": norm, **adapter}, lean=lean
    )


def _galore(model: nn.Module, lora_rank: int) -> Step:
    return prepare_step(model, "galore", adapter={"rank": lora_rank, "norm": "stats"})


_lora_dense = partial(_ours, "lora", target_modules="dense")

REFERENCE = "full"
"""The contender to which all time ratios refer."""

CONTENDERS: dict[str, Contender] = {
    REFERENCE: Contender("full fine-tuning", _train),
    "inference": Contender("plain inference", _inference),
    "peft-lora": Contender("PEFT LoRA, dense", _peft),
    "peft-dora": Contender("PEFT DoRA, dense", partial(_peft, use_dora=True)),
    "lycoris-locon": Contender("LyCORIS LoCon, dense", _lycoris),
    "loralib": Contender("loralib ConvLoRA, dense", _loralib),
    "lora-plain": Contender("our LoRA, dense, not lean", _lora_dense(lean=None)),
    "lora-dense": Contender("our LoRA, dense", _lora_dense()),
    "lora-byte": Contender("our LoRA, dense, byte masks", _lora_dense(lean={**LEAN, "masks": "byte"})),
    "lora-recompute": Contender("our LoRA, dense, recompute", _lora_dense(lean={**LEAN, "recompute": True})),
    "lora-stats": Contender("our LoRA, dense, norm=stats", _lora_dense(norm="stats", lean={"masks": "bit"})),
    "lora-all-conv": Contender("our LoRA, all convolutions", _ours("lora", target_modules="all-conv")),
    "lora-project": Contender("our LoRA, project", _ours("lora", target_modules="project")),
    "lora-fa-project": Contender("our LoRA-FA, project", _ours("lora-fa", target_modules="project")),
    "dora-dense": Contender("our DoRA, dense", _ours("dora", target_modules="dense")),
    "galore": Contender("our GaLore, dense", _galore),
}
"""Our methods, except GaLore, use lean training with frozen in-place BatchNorm, unless the label says otherwise."""

# Allowed difference of a logit, relative to the largest logit. Contenders execute operations in different orders, so
# rounding errors add up over the layers.
_TOLERANCE = 1e-3


def run_bench(
    backbone: str,
    contenders: Sequence[str] = tuple(CONTENDERS),
    *,
    num_classes: int = 10,
    batch_size: int = 16,
    image_size: int = 224,
    lora_rank: int = 4,
    rounds: int = 7,
    threads: int = 1,
) -> BenchRecord:
    """Measure training steps of several contenders on one network, with random images, on the CPU.

    `backbone` is the name of a timm model, which then has random weights, or the folder of a saved model. `contenders`
    are keys of `CONTENDERS`. Full fine-tuning is always measured.

    Memory and FLOPs come from a step that is not timed. Then each contender takes one step in each round, and the order
    of the contenders is reversed after each round. All models exist at the same time, but memory is measured for each
    model alone. If a contender cannot be built or counted, or its output differs from the network's, its row holds the
    error. Errors of full fine-tuning, and errors in the timed rounds, are raised.

    Raises:
        ValueError: If the network is unknown, or cannot be trained on images of this size.
    """
    created_at, started, load = datetime.now(timezone.utc), time.perf_counter(), load_average()
    network, images = load_backbone(backbone, num_classes), torch.randn(batch_size, 3, image_size, image_size)
    try:
        # Without estimated statistics, activations of random weights would vanish or overflow with frozen norms.
        update_bn([images], network)
    except RuntimeError as error:
        raise ValueError(f"{backbone} cannot be trained on images of {image_size} px: {error}") from error
    names = list(dict.fromkeys([REFERENCE, *contenders]))
    rows = {name: BenchRow(name=name, label=CONTENDERS[name].label) for name in names}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tqdm(total=len(names) * (1 + rounds), unit="step", leave=False, disable=None) as bar:
            _measure(rows, network, images, lora_rank, rounds, bar)
    finally:
        torch.set_num_threads(threads_before)
    return BenchRecord(
        created_at=created_at.isoformat(timespec="seconds"),
        setting={
            "backbone": backbone,
            "num_classes": num_classes,
            "batch_size": batch_size,
            "image_size": image_size,
            "lora_rank": lora_rank,
            "rounds": rounds,
            "threads": threads,
        },
        rows=list(rows.values()),
        total_time=time.perf_counter() - started,
        load_average=[load, load_average()],
        package_info=package_info("lycoris-lora", "loralib"),
        system_info=system_info(cores=str(os.cpu_count())),
        pytorch_info=torch.__config__.show(),
    )


def _measure(
    rows: dict[str, BenchRow], network: nn.Module, images: Tensor, lora_rank: int, rounds: int, bar: tqdm[Any]
) -> None:
    running: dict[str, _Steps] = {}
    for name, row in rows.items():
        bar.set_description(f"counting {name}")
        try:
            steps = _Steps(CONTENDERS[name], network, images, lora_rank)
            row.profile = steps.count()
            running[name] = steps
        except Exception as error:
            # Other packages may raise exceptions of any type.
            row.error = " ".join(str(error).split()) or type(error).__name__
            if name == REFERENCE:
                raise
        bar.update()
    for number in range(rounds):
        bar.set_description(f"round {number + 1} of {rounds}")
        for name in list(running) if number % 2 == 0 else list(reversed(running)):
            # Otherwise Python may collect garbage during a timed step.
            gc.collect()
            rows[name].rounds.append(running[name].time())
            bar.update()
    for name in running:
        rows[name].compare(rows[REFERENCE].rounds)


class _Steps:
    """Build a contender, check its output, and run its steps."""

    def __init__(self, contender: Contender, network: nn.Module, images: Tensor, lora_rank: int) -> None:
        self._model, self._optimizer = contender.build(copy.deepcopy(network), lora_rank)
        is_training = self._model.training
        with torch.no_grad():
            expected, found = network.eval()(images[:2]), self._model.eval()(images[:2])
        self._model.train(is_training)
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        if not difference <= _TOLERANCE:
            raise ValueError(f"its output differs from the network's: by {difference:.0%} of the largest logit")
        self._images = images.to(memory_format=training_memory_format(self._model))

    def count(self) -> StepProfile:
        """Take two steps and return the cost of the second. The first step creates the optimizer's state."""
        self.time()
        with CountedStep(self._model, self._optimizer) as counted:
            self.time()
        return counted.rows(0)[0]

    def time(self) -> PhaseTimes:
        """Take a step and return the time of each phase."""
        start = time.perf_counter()
        loss = classification_loss(self._model(self._images))
        forward = backward = update = time.perf_counter()
        if self._optimizer is not None:
            loss.backward()
            backward = time.perf_counter()
            self._optimizer.step()
            self._optimizer.zero_grad()
            update = time.perf_counter()
        return PhaseTimes(forward_s=forward - start, backward_s=backward - forward, optimizer_s=update - backward)
