"""Ctrl-C while operations are watched: held until they are done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Hold an interrupt until what runs inside is done, and handle it then; a second one is handled at once.

    A traced step runs Python from within torch at every operation and every release of a tensor. An
    exception raised there by a signal can be swallowed, as in a weak reference's callback, or end the process, as in a
    destructor of C++. A step takes seconds.

    Outside the main thread, and where interrupts are ignored, nothing is changed.

    Raises:
        KeyboardInterrupt: at the end, when there was one, by Python's own handler.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal held
        if held:
            before(number, frame)
        held = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        before(signal.SIGINT, None)
