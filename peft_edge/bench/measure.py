"""What is compared: ways to train a network, ours and those of other packages.

The measuring: every contender once in every round, so that all see the same machine.
"""

from __future__ import annotations

import copy
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
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

FOLDED = {"inplace_norm": True, "masks": "bit"}
"""The lean form of a network whose BatchNorm layers are frozen."""


@dataclass(frozen=True)
class Contender:
    """One way to train a network. All train the head, but for `inference`."""

    label: str
    """What it is called in tables."""

    build: Callable[[nn.Module, int], Step]
    """From a timm model, changed in place, and a LoRA rank to the model in the mode that it runs in and its optimizer.

    Its first output is the timm model's. It may raise what it will where it cannot be built.
    """


def _full(model: nn.Module, lora_rank: int) -> Step:
    return _in_its_format(*prepare_step(model, None))


def _inference(model: nn.Module, lora_rank: int) -> Step:
    # Without anything to train, autograd keeps nothing.
    return _in_its_format(model.requires_grad_(False).eval(), None)


def _peft(model: nn.Module, lora_rank: int, **options: Any) -> Step:
    config = LoraConfig(
        r=lora_rank,
        lora_alpha=2 * lora_rank,
        target_modules=modules_with_role(model, "dense"),
        modules_to_save=head_names(model),
        **options,
    )
    return _in_its_format(*prepare_step(model, config))


def _lycoris(model: nn.Module, lora_rank: int) -> Step:
    from lycoris.modules.locon import LoConModule

    for name, conv in _frozen_dense_convolutions(model):
        adapter = LoConModule(name, conv, lora_dim=lora_rank, alpha=2 * lora_rank)
        # It takes the place of the convolution's forward, and the model must hold it to be trained.
        adapter.apply_to()
        model.add_module(f"lycoris_{name.replace('.', '_')}", adapter)
    return _in_its_format(*prepare_step(model, None))


def _loralib(model: nn.Module, lora_rank: int) -> Step:
    from loralib import Conv2d

    for name, conv in _frozen_dense_convolutions(model):
        if type(conv) is not nn.Conv2d or len({*conv.kernel_size}) != 1:
            raise ValueError(f"it has plain convolutions with square kernels only, and {name} is {conv}")
        layer = Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0],
            r=lora_rank,
            lora_alpha=2 * lora_rank,
            merge_weights=False,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
        )
        # It makes a convolution of its own.
        layer.conv = conv
        model.set_submodule(name, layer)
    return _in_its_format(*prepare_step(model, None))


def _frozen_dense_convolutions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    names = modules_with_role(model, "dense")
    model.requires_grad_(False)
    for name in head_names(model):
        model.get_submodule(name).requires_grad_(True)
    for name in names:
        yield name, model.get_submodule(name)


def _in_its_format(model: nn.Module, optimizer: Optimizer | None) -> Step:
    return model.to(memory_format=training_memory_format(model)), optimizer


def _ours(method: str, *, lean: dict[str, Any] | None = FOLDED, norm: str = "frozen", **adapter: str) -> Any:
    def build(model: nn.Module, lora_rank: int) -> Step:
        return prepare_step(model, method, lora_rank=lora_rank, adapter={"norm": norm, **adapter}, lean=lean)

    return build


def _galore(model: nn.Module, lora_rank: int) -> Step:
    return prepare_step(model, "galore", adapter={"rank": lora_rank})


REFERENCE = "full"
"""What the others' time is a multiple of."""

CONTENDERS: dict[str, Contender] = {
    REFERENCE: Contender("full fine-tuning", _full),
    "inference": Contender("plain inference", _inference),
    "peft-lora": Contender("PEFT LoRA, dense", _peft),
    "peft-dora": Contender("PEFT DoRA, dense", partial(_peft, use_dora=True)),
    "lycoris-locon": Contender("LyCORIS LoCon, dense", _lycoris),
    "loralib": Contender("loralib ConvLoRA, dense", _loralib),
    "lora-plain": Contender("our LoRA, dense, not lean", _ours("lora", target_modules="dense", lean=None)),
    "lora-dense": Contender("our LoRA, dense", _ours("lora", target_modules="dense")),
    "lora-byte": Contender(
        "our LoRA, dense, byte masks", _ours("lora", target_modules="dense", lean={**FOLDED, "masks": "byte"})
    ),
    "lora-recompute": Contender(
        "our LoRA, dense, recompute", _ours("lora", target_modules="dense", lean={**FOLDED, "recompute": True})
    ),
    "lora-stats": Contender(
        "our LoRA, dense, norm=stats", _ours("lora", target_modules="dense", norm="stats", lean={"masks": "bit"})
    ),
    "lora-all-conv": Contender("our LoRA, all convolutions", _ours("lora", target_modules="all-conv")),
    "lora-project": Contender("our LoRA, project", _ours("lora", target_modules="project")),
    "lora-fa-project": Contender("our LoRA-FA, project", _ours("lora-fa", target_modules="project")),
    "dora-dense": Contender("our DoRA, dense", _ours("dora", target_modules="dense")),
    "galore": Contender("our GaLore, dense", _galore),
}
"""By name. Where nothing else is said, ours are lean, with frozen BatchNorm, folded."""


_PEERS = ("lycoris-lora", "loralib")
# Of the largest logit: rounding, through some fifty layers, in another order.
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
    """Measures training steps of several contenders on one network, with random images and the CPU.

    Memory and FLOPs are those of a step that is not timed. Then come rounds, in each of which every contender takes one
    step, in an order that turns round from one to the next. All models are there at once, which is little beside what
    one step takes, and memory is counted for each model alone.

    Args:
        backbone: A timm model name, or the folder of a saved model; weights of a name are random.
        contenders: Keys of `CONTENDERS`; the reference is measured in any case.
        num_classes: Outputs of the head.
        batch_size: Images in the step.
        image_size: Height and width in pixels.
        lora_rank: Rank of the adapters.
        rounds: Timed steps of each contender.
        threads: Of the CPU.

    Raises:
        ValueError: The network is unknown, or cannot be trained on such images. What other contenders raise, and
            whether they compute something else than the network, is said in their rows.
    """
    created_at, started, load = datetime.now(timezone.utc), time.perf_counter(), load_average()
    network, images = load_backbone(backbone, num_classes), torch.randn(batch_size, 3, image_size, image_size)
    try:
        # Frozen norms need statistics that keep a network of random weights from fading away or overflowing.
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
        package_info=package_info(*_PEERS),
        system_info=system_info(cores=str(os.cpu_count())),
        pytorch_info=torch.__config__.show(),
    )


class _Steps:
    """A contender that takes steps."""

    def __init__(self, contender: Contender, network: nn.Module, images: Tensor, lora_rank: int) -> None:
        self._model, self._optimizer = contender.build(copy.deepcopy(network), lora_rank)
        _check_output(self._model, network, images[:2])
        self._images = images.to(memory_format=training_memory_format(self._model))

    def count(self) -> StepProfile:
        """Takes two steps, of which the first makes the optimizer's state, and returns what the second one costs."""
        self.time()
        with CountedStep(self._model, self._optimizer) as counted:
            self.time()
        return counted.rows(0)[0]

    def time(self) -> PhaseTimes:
        """Takes a step."""
        started = time.perf_counter()
        loss = classification_loss(self._model(self._images))
        forward_end = backward_end = optimizer_end = time.perf_counter()
        if self._optimizer is not None:
            loss.backward()
            backward_end = time.perf_counter()
            self._optimizer.step()
            self._optimizer.zero_grad()
            optimizer_end = time.perf_counter()
        return PhaseTimes(
            forward_s=forward_end - started,
            backward_s=backward_end - forward_end,
            optimizer_s=optimizer_end - backward_end,
        )


def _check_output(model: nn.Module, network: nn.Module, images: Tensor) -> None:
    is_training = model.training
    with torch.no_grad():
        expected, found = network.eval()(images), model.eval()(images)
    model.train(is_training)
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"it computes something else than the network: logits differ by {difference:.0%} of the largest"
        )


def _measure(
    rows: dict[str, BenchRow], network: nn.Module, images: Tensor, lora_rank: int, rounds: int, bar: tqdm
) -> None:
    running: dict[str, _Steps] = {}
    for name, row in rows.items():
        bar.set_description(f"counting {name}")
        try:
            steps = _Steps(CONTENDERS[name], network, images, lora_rank)
            row.profile = steps.count()
            running[name] = steps
        except Exception as error:
            # Others' packages raise what they will.
            row.error = " ".join(str(error).split()) or type(error).__name__
            if name == REFERENCE:
                raise
        bar.update()
    for number in range(rounds):
        bar.set_description(f"round {number + 1} of {rounds}")
        for name in list(running) if number % 2 == 0 else list(reversed(running)):
            # A collection would fall into the step of whom it happens to.
            gc.collect()
            rows[name].rounds.append(running[name].time())
            bar.update()
    for name in running:
        rows[name].compare(rows[REFERENCE].rounds)
