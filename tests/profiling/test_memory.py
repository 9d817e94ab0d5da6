"""Memory of training steps against closed formulas, torch's own tracker and figures measured for the design."""

from __future__ import annotations

import copy
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

from peft_edge.profiling import memory
from peft_edge.profiling.memory import (
    MEMORY_KINDS,
    MemoryTracker,
    ProcessPeak,
    StorageLog,
    innermost_around,
    peak_rss_bytes,
    reset_peak_rss,
    track_memory,
)
from peft_edge.profiling.step import take_step
from peft_edge.roles import modules_with_role


@pytest.fixture
def log() -> StorageLog:
    return StorageLog(set())


def module_and_kind(log: StorageLog) -> tuple[str | None, str]:
    """Return the module and the kind of the only storage in the log."""
    ((storage, change, _),) = log.events
    assert change == 32
    return storage.module, storage.kind


def test_views_share_one_storage_and_empty_tensors_count_zero(log: StorageLog) -> None:
    whole = torch.zeros(6, 4)

    log.observe([whole, (whole[1], whole.t()), torch.zeros(0), 3, None])

    assert log.totals()[-1] == 96


def test_storage_is_freed_with_its_last_view(log: StorageLog) -> None:
    whole = torch.zeros(6, 4)
    view = whole[0]
    log.observe(whole)
    del whole
    gc.collect()
    assert log.totals()[-1] == 96

    del view
    assert log.totals()[-1] == 0


def test_tensor_saved_by_autograd_is_alive(log: StorageLog) -> None:
    leaf = torch.zeros(8, requires_grad=True)
    kept = leaf.exp()
    log.observe(kept)
    result = kept.sum()
    del kept
    gc.collect()
    assert log.totals()[-1] == 32

    result.backward()
    assert log.totals()[-1] == 0


def test_resized_storage_counts_its_new_size(log: StorageLog) -> None:
    tensor = torch.zeros(8)
    log.observe(tensor)
    log.observe(tensor.resize_(20))
    assert log.totals()[-1] == 80

    tensor.untyped_storage().resize_(0)
    log.observe(tensor)
    assert log.totals()[-1] == 0


def test_fake_tensor_counts_the_bytes_of_a_real_one(log: StorageLog) -> None:
    with FakeTensorMode():
        tensor = torch.zeros(8, dtype=torch.half)
    log.observe([tensor, tensor[2:]])

    assert log.totals()[-1] == 16


def test_storages_on_other_devices_are_ignored() -> None:
    log = StorageLog({torch.device("cpu")})
    with FakeTensorMode():
        log.observe([there := torch.zeros(8, device="cuda"), here := torch.zeros(2)])

    assert (there.device.type, here.device.type) == ("cuda", "cpu")
    assert log.totals()[-1] == 8


def test_sparse_tensor_is_ignored(log: StorageLog) -> None:
    log.observe(torch.eye(3).to_sparse())

    assert log.totals() == [0]


def test_first_assigned_kind_stays_and_shared_storages_move_to_the_common_module(log: StorageLog) -> None:
    tensor = torch.zeros(8)
    log.observe(tensor, "a")
    assert module_and_kind(log) == ("a", "temporaries")

    log.end_forward()
    assert module_and_kind(log) == ("a", "activations")

    log.assign(tensor, "parameters", "b.c")
    log.assign(tensor, "buffers", "b")
    assert module_and_kind(log) == ("b.c", "parameters")

    log.assign(tensor[0], "parameters", "b.d")
    assert module_and_kind(log) == ("b", "parameters")


def test_tensors_of_the_backward_pass_are_temporaries(log: StorageLog) -> None:
    log.phase = "backward"
    tensor = torch.zeros(8)
    log.observe(tensor)
    log.end_forward()

    assert module_and_kind(log) == (None, "temporaries")


@pytest.mark.parametrize(
    ("module", "other", "around"),
    [("a.b", "a.b", "a.b"), ("a.b", "a", "a"), ("a.b.c", "a.d", "a"), ("ab", "a", ""), ("a", None, None)],
)
def test_innermost_around_returns_the_common_module(module: str | None, other: str | None, around: str | None) -> None:
    assert innermost_around(module, other) == innermost_around(other, module) == around


MIB = 2**20
SIZE = 96 * MIB  # too large for malloc's heap, so that it is returned at once

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and resets the figures")
resettable = pytest.mark.skipif(not reset_peak_rss(), reason="the system does not let the peak be reset")


def touch(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.uint8)


@linux
def test_peak_rss_matches_getrusage() -> None:
    del_me = touch(SIZE)
    del del_me

    assert peak_rss_bytes() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.05)


@resettable
def test_growth_counts_allocations_inside_the_block() -> None:
    kept, before = touch(SIZE), touch(2 * SIZE)
    del before
    with ProcessPeak() as peak:
        inside = touch(SIZE)
        del inside
    after = touch(2 * SIZE)

    assert peak.rss_growth_bytes == pytest.approx(SIZE, rel=0.1)
    assert peak.peak_rss_bytes is not None
    assert peak.peak_rss_bytes > kept.nbytes + SIZE
    assert peak.cuda_peak_bytes is None
    del after


@resettable
def test_peak_of_an_outer_block_survives_the_reset_by_an_inner_block() -> None:
    with ProcessPeak() as outer:
        before = touch(SIZE)
        del before
        with ProcessPeak() as inner:
            pass
        after = inner.peak_rss_bytes
    assert outer.rss_growth_bytes == pytest.approx(SIZE, rel=0.1)
    assert outer.peak_rss_bytes > after + SIZE / 2


def test_growth_is_none_if_the_peak_cannot_be_reset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no folder" / "clear_refs")
    with ProcessPeak() as peak:
        pass

    assert peak.rss_growth_bytes is None
    # Linux counts the pages of each thread in batches, so two readings differ by some pages.
    assert peak.peak_rss_bytes == pytest.approx(peak_rss_bytes(), abs=2**20)


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_peak_rss_without_proc_comes_from_getrusage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, unit: int
) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(sys, "platform", platform)

    assert peak_rss_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_peak_rss_on_windows_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setitem(sys.modules, "resource", None)

    assert peak_rss_bytes() is None


STEP = """
import sys, timm, torch
from peft_edge.profiling.memory import track_memory
torch.set_num_threads(1)
model = timm.create_model(sys.argv[1], num_classes=10).train()
images = torch.randn(int(sys.argv[2]), 3, 160, 160)
profile = track_memory(model, images, optimizer=torch.optim.AdamW(model.parameters()))
print(profile.rss_growth_bytes, profile.peak_bytes - profile.start_bytes)
"""


@linux
@resettable
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "batch_size"), [("mobilenetv2_100", 16), ("mobilenetv3_small_100", 32), ("resnet18", 16)]
)
def test_process_grows_in_a_step_by_the_tracked_bytes(backbone: str, batch_size: int) -> None:
    # In a new process whose malloc returns freed blocks, the growth is that of the tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", STEP, backbone, str(batch_size)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    growth, tracked = map(int, finished.stdout.split())

    assert growth == pytest.approx(tracked, rel=0.15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_counts_allocations_inside_the_block() -> None:
    device = torch.device("cuda", 0)
    before = torch.zeros(4 * MIB, device=device)
    del before
    allocated = torch.cuda.memory_allocated(device)
    with ProcessPeak(device) as peak:
        inside = torch.zeros(MIB, device=device)
        del inside

    assert peak.cuda_peak_bytes == allocated + 4 * MIB


BATCH, WIDTH = 32, 16
MAP = BATCH * WIDTH * 4  # bytes of an activation
LAYER = (WIDTH * WIDTH + WIDTH) * 4  # bytes of a Linear's parameters
SCALARS = 8  # the loss and its gradient


def chain(layers: int = 3, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), activation())))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def small_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=8), nn.Hardswish()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(BATCH, WIDTH)


def test_chain_keeps_its_inputs_and_the_outputs_of_its_activations(inputs: Tensor) -> None:
    model = chain(3)
    profile = track_memory(model, inputs, optimizer=AdamW(model.parameters()))

    # A Linear keeps its input and a ReLU its output, which is the same tensor. AdamW has two averages and counters.
    parts = {"parameters": 3 * LAYER, "optimizer": 2 * 3 * LAYER + 6 * 4, "activations": 4 * MAP + SCALARS}
    assert profile.forward_end == {**dict.fromkeys(MEMORY_KINDS, 0), **parts}
    assert profile.forward_end_bytes == sum(parts.values())
    assert profile.start_bytes == 3 * LAYER + 3 * LAYER + parts["optimizer"] + MAP  # with the first step's gradients


def test_frozen_layers_before_the_first_trained_one_keep_nothing(inputs: Tensor) -> None:
    model = chain(3)
    model[:4].requires_grad_(False)
    profile = track_memory(model, inputs, optimizer=AdamW(model[4:].parameters()))

    assert profile.forward_end["activations"] == 3 * MAP + SCALARS  # inputs, the last layer's, its ReLU's output
    assert profile.forward_end["parameters"] == 3 * LAYER
    assert profile.forward_end["optimizer"] == 2 * LAYER + 2 * 4


@pytest.mark.parametrize(("inplace", "peak_bytes"), [(True, LAYER + 2 * MAP + 4), (False, LAYER + 3 * MAP)])
def test_in_place_activation_needs_no_storage(inputs: Tensor, inplace: bool, peak_bytes: int) -> None:
    model = chain(1, lambda: nn.ReLU(inplace)).requires_grad_(False)

    assert track_memory(model, inputs).peak_bytes == peak_bytes


def test_activations_without_a_backward_pass_are_the_tensors_left_at_the_end(inputs: Tensor) -> None:
    model = chain(3).requires_grad_(False)
    profile = track_memory(model, inputs)
    assert profile.forward_end == {**dict.fromkeys(MEMORY_KINDS, 0), "parameters": 3 * LAYER, "activations": MAP}
    assert profile.peak["temporaries"] == 2 * MAP

    with MemoryTracker(model, inputs=inputs) as tracker:
        output = model(inputs)
    left = tracker.result()
    assert left.forward_end["activations"] == MAP + output.nbytes
    del output
    assert tracker.result() == left


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_keep_only_their_inputs(use_reentrant: bool) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for block in self:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
            return x

    blocks = [chain(4) for _ in range(3)]
    inputs = torch.randn(BATCH, WIDTH, requires_grad=True)
    profile = track_memory(Checkpointed(*blocks), inputs)
    plain = track_memory(nn.Sequential(*blocks), inputs)

    assert profile.forward_end["activations"] == 3 * MAP + SCALARS
    assert plain.forward_end["activations"] == 13 * MAP + SCALARS
    # The recomputed last block and the gradients of its output are temporaries.
    assert profile.peak["temporaries"] >= 4 * MAP
    assert profile.peak_bytes < plain.peak_bytes


class MaskReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        return grad * mask


def test_custom_autograd_function_keeps_its_saved_tensors() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return MaskReLU.apply(x * 2)

    images = torch.randn(BATCH, WIDTH, requires_grad=True)
    profile = track_memory(Masked(), images)

    assert profile.forward_end["activations"] == MAP + MAP // 4 + SCALARS
    assert profile.forward_end_by_module[""]["activations"] == MAP // 4


def test_batch_from_outside_belongs_to_no_module() -> None:
    model = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    with MemoryTracker(model) as tracker:
        model(torch.randn(BATCH, WIDTH))
        batch = torch.from_numpy(np.ones((BATCH, WIDTH), dtype=np.float32))
        outputs = model(batch)
    profile = tracker.result()
    assert profile.forward_end["activations"] == batch.nbytes + outputs.nbytes
    assert profile.forward_end_by_module[""]["activations"] == outputs.nbytes


def test_sparse_gradient_counts_as_gradient() -> None:
    model = nn.Embedding(100, 16, sparse=True)
    with MemoryTracker(model) as tracker:
        model(torch.arange(5)).sum().backward()
        torch.zeros(1000)  # the peak, after the backward pass
    assert tracker.result().peak["gradients"] == 5 * 16 * 4 + 5 * 8


def test_tracker_runs_higher_order_operators() -> None:
    with MemoryTracker(nn.Linear(1, 1)) as tracker:
        sines = torch.cond(torch.tensor(True), torch.sin, torch.cos, (torch.ones(300),))
    assert torch.equal(sines, torch.ones(300).sin())
    assert tracker.result().peak_bytes >= 2 * 300 * 4


def test_tied_and_viewed_parameters_count_once(inputs: Tensor) -> None:
    model = nn.ModuleDict({"a": chain(2), "b": chain(1)})
    model["a"][2].weight = model["a"][0].weight
    weight_bytes = WIDTH * WIDTH * 4
    with MemoryTracker(model) as tracker:
        for _ in range(2):
            (model["a"](inputs) + model["b"](inputs)).sum().backward()
    profile = tracker.result()
    assert profile.start_bytes == 3 * LAYER - weight_bytes
    for kind in ("parameters", "gradients"):
        assert profile.forward_end[kind] == 3 * LAYER - weight_bytes
        assert profile.forward_end_by_module["a"][kind] == 2 * LAYER - weight_bytes
        for layer in ("a.0", "a.2"):
            assert profile.forward_end_by_module[layer][kind] == LAYER - weight_bytes

    flat = torch.randn(2 * WIDTH * WIDTH)
    for layer, part in ((model["a"][0], flat[: WIDTH * WIDTH]), (model["b"][0], flat[WIDTH * WIDTH :])):
        layer.weight = nn.Parameter(part.view(WIDTH, WIDTH))
    with MemoryTracker(model) as tracker:
        pass
    profile = tracker.result()
    assert profile.peak["parameters"] == bytes_of(model.parameters())
    assert profile.peak_by_module["a.0"]["parameters"] == WIDTH * 4


def test_accumulated_gradients_count_in_the_next_forward_pass(inputs: Tensor) -> None:
    model = chain(2)
    model[0].requires_grad_(False)
    with MemoryTracker(model, inputs=inputs) as tracker:
        for part in inputs.chunk(2):
            model(part).mean().backward()
        model.zero_grad()
    profile = tracker.result()

    assert profile.forward_end["gradients"] == LAYER
    # The whole batch, of which the halves are views, and half a batch of two layers' outputs.
    assert profile.forward_end["activations"] == MAP + 2 * MAP // 2 + SCALARS


def test_peak_of_several_steps_is_that_of_the_largest(inputs: Tensor) -> None:
    model = chain(3)
    optimizer = AdamW(model.parameters())
    expected = track_memory(model, inputs, optimizer=optimizer)
    with MemoryTracker(model, optimizer, inputs) as tracker:
        for batch_size in (8, BATCH, 8):
            take_step(model, inputs[:batch_size], optimizer, None)
    profile = tracker.result()

    assert profile.peak == expected.peak
    assert profile.forward_end == expected.forward_end


def test_memory_of_modules_adds_up_to_the_model() -> None:
    model = small_cnn()
    profile = track_memory(model, torch.randn(4, 3, 16, 16), optimizer=AdamW(model.parameters()))

    for total, by_module in (
        (profile.peak, profile.peak_by_module),
        (profile.forward_end, profile.forward_end_by_module),
    ):
        assert by_module.keys() == {name for name, _ in model.named_modules()}
        for kind in MEMORY_KINDS:
            assert by_module[""][kind] == sum(by_module[name][kind] for name, _ in model.named_children())
        for kind in ("parameters", "buffers", "gradients", "optimizer"):
            assert by_module[""][kind] == total[kind]
    assert sum(profile.peak.values()) == profile.peak_bytes
    # The first convolution's output, kept by the BatchNorm that follows it.
    assert profile.forward_end_by_module["0"]["activations"] == 4 * 8 * 14 * 14 * 4


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_peak_of_full_training_matches_torchs_tracker(optimizer: type[SGD] | type[AdamW]) -> None:
    model, images = small_cnn(), torch.randn(8, 3, 32, 32)
    profile = track_memory(model, images, optimizer=optimizer(model.parameters(), lr=0.1))

    theirs = optimizer(model.parameters(), lr=0.1)
    take_step(model, images, theirs, None)
    tracker = MemTracker()
    tracker.track_external(model, theirs, images)
    with tracker:
        take_step(model, images, theirs, None)
    (expected,) = tracker.get_tracker_snapshot("peak").values()

    assert profile.peak_bytes == expected["Total"]
    assert profile.peak["parameters"] == expected["Parameter"]
    assert profile.peak["buffers"] == expected["Buffer"]
    assert profile.peak["optimizer"] == expected["Optstate"]


def test_fake_and_real_steps_have_the_same_memory() -> None:
    model = get_peft_model(small_cnn(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["7"], use_dora=True))
    images = torch.randn(8, 3, 32, 32)
    optimizer = AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    real = track_memory(model, images, optimizer=optimizer)
    fake = track_memory(model, images, optimizer=optimizer, fake=True)

    assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
    assert fake.forward_end == real.forward_end
    assert fake.forward_end_by_module == real.forward_end_by_module
    assert (fake.peak_rss_bytes, fake.rss_growth_bytes, fake.cuda_peak_bytes) == (None, None, None)
    assert real.peak_rss_bytes is not None


def test_failure_inside_the_block_removes_all_hooks(inputs: Tensor) -> None:
    model = chain(2)
    tracker = MemoryTracker(model, inputs=inputs)
    hook = model[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), tracker:
        model(inputs)
    before = tracker.result()
    hook.remove()
    model(inputs).sum().backward()

    assert tracker.result() == before
    assert before.peak_bytes == 2 * LAYER + 3 * MAP
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_track_memory_changes_neither_model_nor_optimizer_nor_random_state() -> None:
    model = nn.Sequential(small_cnn(), nn.Dropout())
    optimizer = AdamW(model.parameters())
    images = torch.randn(4, 3, 16, 16)
    take_step(model, images, optimizer, None)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    random_state = torch.get_rng_state()

    for fake in (False, True):
        track_memory(model, images, optimizer=optimizer, fake=fake)

    after = (model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_other_tensors_count_from_their_first_use(inputs: Tensor) -> None:
    model, labels = chain(1), torch.randn(BATCH, WIDTH)
    profile = track_memory(model, inputs, loss_fn=lambda output: (output * labels).mean())

    assert profile.start_bytes == 2 * LAYER + MAP
    assert profile.forward_end["activations"] == 3 * MAP + SCALARS  # inputs, the ReLU's output, labels


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_allocator_peak_includes_the_tracked_peak() -> None:
    model, images = small_cnn().cuda(), torch.randn(64, 3, 64, 64, device="cuda")
    profile = track_memory(model, images, optimizer=AdamW(model.parameters()))
    on_cpu = track_memory(model.cpu(), images.cpu())

    assert profile.forward_end["activations"] == pytest.approx(on_cpu.forward_end["activations"], rel=0.01)
    assert profile.cuda_peak_bytes is not None
    assert profile.cuda_peak_bytes >= profile.peak_bytes


def mobilenet(method: str) -> nn.Module:
    model = timm.create_model("mobilenetv2_100", num_classes=10)
    if method != "full":
        dense = modules_with_role(model, "dense")
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=dense, use_dora=method == "dora"))
    return model.train()


FIGURES = [("full", 1227), ("lora", 1225), ("dora", 1759)]


@pytest.mark.parametrize(("method", "peak_mib"), FIGURES)
def test_fake_step_has_the_peak_of_the_design(method: str, peak_mib: int) -> None:
    model = mobilenet(method)
    optimizer = AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    profile = track_memory(model, torch.empty(16, 3, 224, 224, device="meta"), optimizer=optimizer, fake=True)

    assert profile.peak_bytes / MIB == pytest.approx(peak_mib, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "peak_mib"), FIGURES)
def test_real_step_has_the_peak_of_the_design(method: str, peak_mib: int) -> None:
    model, images = mobilenet(method), torch.randn(16, 3, 224, 224)
    optimizer = AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    real = track_memory(model, images, optimizer=optimizer)
    fake = track_memory(model, images, optimizer=optimizer, fake=True)

    assert real.peak_bytes / MIB == pytest.approx(peak_mib, rel=0.02)
    assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
