"""An interrupt while a step is watched is held until it is done, and never lost."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from groupsearch.tracer.step import held_interrupts


def interrupted(times: int, done: list[str]) -> None:
    with held_interrupts():
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        done.append("all the same")


def failing() -> None:
    with held_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("found")


@pytest.mark.parametrize(("times", "expected"), [(1, ["all the same"]), (2, [])])
def test_the_first_waits_until_what_it_fell_into_is_done_and_the_second_does_not(
    times: int, expected: list[str]
) -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(times, done)
    assert done == expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_one_nothing_is_raised() -> None:
    with held_interrupts():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_inside_comes_out_as_it_is() -> None:
    with pytest.raises(ValueError, match="found"):
        failing()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_ones_own_is_called_at_the_end() -> None:
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with held_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            assert seen == []
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_where_interrupts_are_ignored_they_still_are() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_let_alone() -> None:
    done = []

    def work() -> None:
        with held_interrupts():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]
