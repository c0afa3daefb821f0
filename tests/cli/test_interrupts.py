"""Ctrl-C is raised where it can be caught, also when it falls into what swallows exceptions."""

from __future__ import annotations

import os
import signal
import time
import weakref

import pytest

from groupsearch.cli import no_interrupt_lost


class Falling:
    """Is interrupted while it is destroyed."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10):
            pass


class Plain:
    """Nothing happens to it."""


def in_a_destructor() -> None:
    Falling()


def in_a_weak_references_callback() -> None:
    watched = Plain()
    weakref.finalize(watched, os.kill, os.getpid(), signal.SIGINT)
    del watched


def anywhere_else() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def run(fall) -> None:
    with no_interrupt_lost():
        fall()
        time.sleep(10)


@pytest.mark.parametrize("fall", [in_a_destructor, in_a_weak_references_callback, anywhere_else])
def test_an_interrupt_is_raised_wherever_it_falls(fall) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(fall)
    assert signal.getsignal(signal.SIGINT) is before


def test_where_interrupts_are_ignored_they_still_are() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with no_interrupt_lost():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
