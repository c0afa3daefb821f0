"""Ctrl-C while a command runs: raised where it can be caught, and never lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# Where Python prints an exception and goes on: destructors, and what a weak reference calls.
_DESTRUCTOR = "__del__"
_WEAK_FILES = ("weakref.py", "_weakrefset.py", "weak.py")
_LATER_SECONDS = 0.01


@contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C, but a moment later where an exception would be swallowed.

    Python calls a signal's handler wherever it is, which may be a destructor, as torch's storages have one:
    an exception that leaves a destructor is printed and forgotten, and the command would go on.

    Outside the main thread, and where interrupts are not raised as KeyboardInterrupt, nothing is changed.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _swallows(frame):
        signal.default_int_handler(number, frame)
    again = threading.Timer(_LATER_SECONDS, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _swallows(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == _DESTRUCTOR or Path(frame.f_code.co_filename).name in _WEAK_FILES:
            return True
        frame = frame.f_back
    return False
