"""The memory of one grouping, replayed event by event: slow, literal, and written without the table."""

from __future__ import annotations

from collections.abc import Sequence

from groupsearch.plan.trace import Booked, Trace


def replay(trace: Trace, boundaries: Sequence[int]) -> list[int]:
    """Live bytes at every event of one step, in order of time."""
    first_of_group = {b - 1 for b in boundaries} | {trace.length - 1}
    closes_at = {0, *boundaries}
    events: list[int] = []
    group: list[int] = []
    book: set[int] = set()
    sums = trace.carried_bytes

    def only_in_book(t: int) -> int:
        return sum(trace.booked[u].size_bytes for u in book if trace.booked[u].released <= t)

    for t, instant in enumerate(trace.instants):
        site = instant.site
        before = trace.instants[t - 1] if t else None
        if instant.in_hook and (before is None or before.site != site):
            if site in first_of_group:
                group, book = [], set()
            group.append(site)
            book |= {u for u, storage in enumerate(trace.booked) if site in _bookers(storage)}
        events.append(instant.live_bytes + only_in_book(t) + sums)
        hook_ends = instant.in_hook and not trace.instants[t + 1].in_hook
        if not hook_ends:
            continue
        alive = trace.sites[site].close_live_bytes
        for term in trace.cross_terms:
            if term.late == site and term.early in group:
                events.append(alive + only_in_book(t) + sums + term.transient_bytes)
        if site in closes_at:
            for k in group:
                events.append(alive + only_in_book(t) + sums + trace.sites[k].close_bytes)
                sums += trace.sites[k].gradient_bytes
                book -= {u for u in book if trace.booked[u].last_site == k}
            book = set()
    events.append(trace.step_bytes)
    return events


def _bookers(storage: Booked) -> set[int]:
    return {storage.first_site, storage.last_site}
