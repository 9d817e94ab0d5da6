"""What a training does when the system asks its process to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def termination_deferred(*, is_alone: bool) -> Iterator[Callable[[], bool]]:
    """Lets a process go on when it is terminated (SIGTERM), so that it can save what it has; the second time it ends.

    Args:
        is_alone: Whether it is the run's only process. One of several would wait for others, which may be why it is
            terminated, and so ends at once.

    Yields:
        Whether it has been asked to end.
    """
    if not is_alone or threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may say what a signal does
        return
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGTERM, previous)

    previous = signal.signal(signal.SIGTERM, remember) or signal.SIG_DFL
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, previous)
