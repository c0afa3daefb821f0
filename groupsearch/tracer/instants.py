"""Cuts the log of one step into the instants of a Trace."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from groupsearch.trace import Instant
from groupsearch.tracer.live import LiveBytes

FORWARD_PIECES = 60


@dataclass
class Hook:
    """Where in the log one site's hook began, closed its group and ended, and what it told.

    Attributes:
        sums_before: bytes of clipped sums when it began.
        close_live: bytes alive when sums began to be formed, clipped sums left out.
        close_peak: the most alive until they were formed, earlier clipped sums left out.
        gradient_bytes: bytes of the sums it left.
        storages: numbers of the storages the site books.
    """

    begin: int
    closing: int = 0
    end: int = 0
    sums_before: int = 0
    close_live: int = 0
    close_peak: int = 0
    gradient_bytes: int = 0
    storages: tuple[int, ...] = ()


class _Segment(NamedTuple):
    site: int
    in_hook: bool
    begin: int
    end: int
    sums_bytes: int


def cut_instants(
    live: LiveBytes, hooks: Sequence[Hook], span: tuple[int, int], booked: Iterable[int]
) -> tuple[tuple[Instant, ...], dict[int, int]]:
    """Cut time at hooks and wherever a booked storage is released.

    Args:
        live: the log.
        hooks: in order of time.
        span: positions in the log between which forward and backward lie.
        booked: numbers of the storages that sites book.

    Returns:
        The instants (live bytes without static ones and clipped sums), and for every booked
        storage the index of the first instant at which it is released.
    """
    start, end = span
    log = np.asarray(live.log, dtype=np.int64)
    forward = _forward_bytes(live, (start, hooks[0].begin), len(log))
    deaths = sorted({live.deaths[n] for n in booked if n in live.deaths})
    cuts = [d for d, following in zip(deaths, [*deaths[1:], -1], strict=True) if following != d + 1]
    instants: list[Instant] = []
    begins: list[int] = []
    for segment in _segments(hooks, start, end):
        inside = cuts[bisect_left(cuts, segment.begin + 1) : bisect_left(cuts, segment.end)]
        if segment.site < 0:
            inside = [int(x) for x in np.linspace(segment.begin, segment.end, FORWARD_PIECES + 1)[1:-1]]
        edges = [segment.begin, *inside, segment.end]
        for piece, (low, high) in enumerate(pairwise(edges)):
            # a piece after a release begins with what is alive then; a segment, with what was alive before it
            first = low if piece and segment.site >= 0 else max(low - 1, 0)
            values = log[first : max(high, first + 1)]
            top = first + int(values.argmax())
            begins.append(low)
            instants.append(
                Instant(segment.site, segment.in_hook, int(log[top]) - segment.sums_bytes, int(forward[top]))
            )
    released = {n: _released(live.deaths.get(n), end, begins, hooks) for n in booked}
    return tuple(instants), released


def _segments(hooks: Sequence[Hook], start: int, end: int) -> Iterable[_Segment]:
    yield _Segment(-1, False, start, hooks[0].begin, hooks[0].sums_before)
    for step, hook in enumerate(hooks):
        site = len(hooks) - 1 - step
        yield _Segment(site, True, hook.begin, hook.closing, hook.sums_before)
        following = hooks[step + 1].begin if site else end
        yield _Segment(site, False, hook.end, following, hook.sums_before + hook.gradient_bytes)


def _released(death: int | None, end: int, begins: Sequence[int], hooks: Sequence[Hook]) -> int:
    if death is None or death >= end:
        return len(begins)
    return bisect_left(begins, death)


def _forward_bytes(live: LiveBytes, span: tuple[int, int], length: int) -> npt.NDArray[np.int64]:
    """Per position of the log the bytes alive that the forward pass and the loss allocated."""
    changes = np.zeros(length + 1, dtype=np.int64)
    for number, birth in enumerate(live.births):
        if span[0] <= birth < span[1]:
            changes[birth] += live.sizes[number]
            changes[live.deaths.get(number, length)] -= live.sizes[number]
    return np.cumsum(changes)[:length]
