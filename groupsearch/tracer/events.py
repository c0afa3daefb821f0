"""Reads the births and deaths of a step out of the log of what was alive."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from groupsearch.events import Close, StepEvents
from groupsearch.tracer.instants import Hook
from groupsearch.tracer.live import LiveBytes

_DEATH, _INSIDE, _LOGGED = -1, 0, 1
"""At one position of the log what an operation had beside its results ends first, then the next one's begins."""


def step_events(live: LiveBytes, passes: Sequence[Sequence[Hook]], private_begin: int) -> StepEvents:
    """The events of a non-private step and the private one after it.

    Args:
        live: the log of both.
        passes: hooks of every micro-batch of the private step, in order of time.
        private_begin: position in the log where the private step begins.
    """
    events = sorted(_events(live))
    keys = [(position, order) for position, order, _ in events]
    sequence = tuple(event for *_, event in events)

    def place(position: int) -> int:
        return bisect_left(keys, (position, _INSIDE))

    begin = place(private_begin)
    closes = tuple(
        Close(
            site=len(hooks) - 1 - step,
            begin=place(hook.closing) - begin,
            end=place(hook.end) - begin,
            booked=hook.storages,
        )
        for hooks in passes
        for step, hook in enumerate(hooks)
    )
    sizes = (*live.sizes, *(size for _, _, size in live.insides))
    return StepEvents(tuple(live.kept), sizes, sequence[begin:], sequence[:begin], closes, dict(live.heirs))


def _events(live: LiveBytes) -> list[tuple[int, int, int]]:
    """(position, order there, event) of every birth and death."""
    births = [(at, _LOGGED, number) for number, at in enumerate(live.births)]
    deaths = [(at, _LOGGED, ~number) for number, at in live.deaths.items()]
    for number, (began, done, _) in enumerate(live.insides, len(live.sizes)):
        births.append((began, _INSIDE, number))
        deaths.append((done, _DEATH, ~number))
    return births + deaths
