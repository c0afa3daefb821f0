"""Peak allocated bytes of real work on the CPU, by the events of torch's memory profiler."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def profiled_peak(work: Callable[[], object]) -> int:
    """Most bytes that are allocated at any time while ``work`` runs, above what was there before.

    Exact and repeatable: every allocation and release of torch's CPU allocator is an event. The
    work runs twice, so that what is allocated once and kept (a library's cache) is not counted.
    It must not release what was allocated before it began.
    """
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler.kineto_results
    live = peak = 0
    for event in results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
