from __future__ import annotations

import os
import signal
import threading

import pytest

from peft_edge.training.termination import termination_deferred


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_first_time_is_remembered_and_the_second_has_the_effect_from_before() -> None:
    seen: list[int] = []
    outside = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with termination_deferred(is_alone=True) as is_asked:
            assert not is_asked()
            terminate()
            assert is_asked()
            assert seen == []
            terminate()
            assert seen == [signal.SIGTERM]
        terminate()
        assert seen == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, outside)


def test_one_of_several_processes_is_terminated_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with termination_deferred(is_alone=False) as is_asked:
        assert signal.getsignal(signal.SIGTERM) is before
        assert not is_asked()


def test_another_thread_than_the_main_one_changes_no_signal() -> None:
    found: list[bool] = []

    def enter() -> None:
        with termination_deferred(is_alone=True) as is_asked:
            found.append(is_asked())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


def test_the_handler_from_before_is_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), termination_deferred(is_alone=True):
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before
