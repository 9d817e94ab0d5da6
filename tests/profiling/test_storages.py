"""The log of storages against sizes known beforehand."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_edge.profiling.storages import StorageLog, innermost_around


@pytest.fixture
def log() -> StorageLog:
    return StorageLog(set())


def test_views_share_one_storage_and_empty_tensors_have_none(log: StorageLog) -> None:
    whole = torch.zeros(6, 4)

    log.see([whole, (whole[1], whole.t()), torch.zeros(0), 3, None])

    assert log.totals()[-1] == 96


def test_the_end_of_a_storage_is_logged_when_its_last_view_goes(log: StorageLog) -> None:
    whole = torch.zeros(6, 4)
    view = whole[0]
    log.see(whole)
    del whole
    gc.collect()
    assert log.totals()[-1] == 96

    del view
    assert log.totals()[-1] == 0


def test_what_only_autograd_holds_is_alive(log: StorageLog) -> None:
    leaf = torch.zeros(8, requires_grad=True)
    kept = leaf.exp()
    log.see(kept)
    result = kept.sum()
    del kept
    gc.collect()
    assert log.totals()[-1] == 32

    result.backward()
    assert log.totals()[-1] == 0


def test_a_resized_storage_counts_with_its_new_size(log: StorageLog) -> None:
    tensor = torch.zeros(8)
    log.see(tensor)
    log.see(tensor.resize_(20))
    assert log.totals()[-1] == 80

    tensor.untyped_storage().resize_(0)
    log.see(tensor)
    assert log.totals()[-1] == 0


def test_fake_tensors_count_with_the_bytes_that_they_stand_for(log: StorageLog) -> None:
    with FakeTensorMode():
        tensor = torch.zeros(8, dtype=torch.half)
    log.see([tensor, tensor[2:]])

    assert log.totals()[-1] == 16


def test_other_devices_are_left_out() -> None:
    log = StorageLog({torch.device("cpu")})
    with FakeTensorMode():
        log.see([there := torch.zeros(8, device="cuda"), here := torch.zeros(2)])

    assert (there.device.type, here.device.type) == ("cuda", "cpu")
    assert log.totals()[-1] == 8


def test_a_sparse_tensor_does_not_stop_the_step(log: StorageLog) -> None:
    log.see(torch.eye(3).to_sparse())

    assert log.totals() == [0]


def test_a_claim_decides_on_the_kind_and_the_first_one_counts(log: StorageLog) -> None:
    tensor = torch.zeros(8)
    log.module = "a"
    log.see(tensor)
    assert log.alive(1) == {("a", "temporaries"): 32}

    log.end_forward()
    assert log.alive(1) == {("a", "activations"): 32}

    log.claim(tensor, "parameters", "b.c")
    log.claim(tensor, "buffers", "b")
    assert log.alive(1) == {("b.c", "parameters"): 32}

    log.claim(tensor[0], "parameters", "b.d")
    assert log.alive(1) == {("b", "parameters"): 32}


def test_what_the_backward_pass_makes_is_no_activation(log: StorageLog) -> None:
    log.phase = "backward"
    tensor = torch.zeros(8)
    log.see(tensor)
    log.end_forward()

    assert log.alive(1) == {(None, "temporaries"): 32}


@pytest.mark.parametrize(
    ("module", "other", "around"),
    [("a.b", "a.b", "a.b"), ("a.b", "a", "a"), ("a.b.c", "a.d", "a"), ("ab", "a", ""), ("a", None, None)],
)
def test_innermost_module_around_two(module: str | None, other: str | None, around: str | None) -> None:
    assert innermost_around(module, other) == innermost_around(other, module) == around
