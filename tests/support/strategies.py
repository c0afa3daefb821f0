"""Random but consistent values: traces, groupings of a trace, tables of group costs."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from groupsearch.plan.memory import UNREACHABLE_BYTES, CostTable
from groupsearch.plan.trace import Booked, CrossTerm, Instant, Site, StaticBytes, Trace

Draw = Callable[[int, int], int]


@st.composite
def traces(draw: st.DrawFn, max_sites: int = 12) -> Trace:
    """Traces of 1 to ``max_sites`` sites with small numbers, so that ties are common."""

    def between(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    return make_trace(draw(st.integers(1, max_sites)), between, largest=60)


@st.composite
def boundaries_of(draw: st.DrawFn, trace: Trace) -> tuple[int, ...]:
    """The boundaries of any grouping of a trace."""
    return tuple(b for b in range(1, trace.length) if draw(st.booleans()))


@st.composite
def cost_tables(draw: st.DrawFn, max_sites: int = 12) -> CostTable:
    """Tables without any structure: no grouping is like another, extension may make a group cheaper."""
    length = draw(st.integers(1, max_sites))
    cells = draw(st.lists(st.integers(0, 30), min_size=length * length, max_size=length * length))
    cost = np.array(cells, np.int64).reshape(length, length)
    cost[np.tril_indices(length, -1)] = UNREACHABLE_BYTES
    return CostTable(cost, draw(st.integers(0, 25)))


def random_trace(length: int, seed: int = 0, largest: int = 2**28) -> Trace:
    """A trace as a given seed makes it."""
    return make_trace(length, random.Random(seed).randint, largest)


def make_trace(length: int, between: Draw, largest: int) -> Trace:
    """A trace that keeps what every real one keeps.

    Each site has instants in and after its hook, backward runs from the last site to the first, and
    autograd holds a storage at least until the hook of the last site that books it has ended.
    """
    static = StaticBytes(*(between(0, largest) for _ in range(4)))
    instants: list[Instant] = []
    hook_end: dict[int, int] = {}

    def add(site: int, in_hook: bool, count: int) -> None:
        for _ in range(count):
            forward, transients = between(0, largest), between(0, largest)
            instants.append(Instant(site, in_hook, static.total + forward + transients, forward))

    add(-1, False, between(0, 1))
    for site in reversed(range(length)):
        add(site, True, between(1, 2))
        hook_end[site] = len(instants) - 1
        add(site, False, between(1, 3))
    sites = tuple(_make_site(index, static.total, between, largest) for index in range(length))
    carried_bytes = between(0, largest)
    sums_bytes = carried_bytes + sum(site.gradient_bytes for site in sites)
    return Trace(
        sites=sites,
        instants=tuple(instants),
        booked=tuple(_make_booked(hook_end, len(instants), between, largest) for _ in range(between(0, 4 * length))),
        cross_terms=tuple(_make_cross_terms(length, between, largest)),
        static=static,
        step_bytes=static.total + sums_bytes + between(0, largest // 4),
        nonprivate_peak_bytes=static.total + between(0, 2 * largest),
        batch_size=between(1, 64),
        settings={"model": "random"},
        carried_bytes=carried_bytes,
    )


def _make_site(index: int, static_bytes: int, between: Draw, largest: int) -> Site:
    gradient_bytes = between(0, largest // 8)
    return Site(
        name=f"block.{index // 2}.layer.{index}",
        layer=f"block.{index // 2}.layer.{index}",
        block=f"block.{index // 2}",
        kind="linear",
        method="ghost",
        positions=4,
        inputs=8,
        outputs=8,
        parameters=(f"block.{index // 2}.layer.{index}.weight",),
        parameter_count=max(1, gradient_bytes // 4),
        close_bytes=gradient_bytes + between(0, largest // 4),
        gradient_bytes=gradient_bytes,
        close_live_bytes=static_bytes + between(0, 2 * largest),
    )


def _make_booked(hook_end: dict[int, int], instants: int, between: Draw, largest: int) -> Booked:
    last_site = between(0, len(hook_end) - 1)
    first_site = between(last_site, min(last_site + 3, len(hook_end) - 1))
    released = between(hook_end[last_site] + 1, instants)
    return Booked(between(1, largest // 2), first_site, last_site, released)


def _make_cross_terms(length: int, between: Draw, largest: int) -> list[CrossTerm]:
    terms = []
    for _ in range(between(0, 2) if length > 1 else 0):
        late = between(0, length - 2)
        terms.append(CrossTerm(between(late + 1, length - 1), late, between(0, 2 * largest)))
    return terms
