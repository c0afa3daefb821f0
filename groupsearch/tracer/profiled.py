"""How many bytes a piece of work allocates at its peak, above what was there before: on the CPU, on a CUDA device."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # read by torch's profiler at its first use, or it talks on stderr


def profiled_peak(work: Callable[[], object]) -> int:
    """Most bytes that are allocated on the CPU at any time while ``work`` runs, above what was there before.

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


def allocated_peak(work: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """Run ``work`` once on a CUDA device: its result, and the most bytes that it had asked for at any time.

    The peak statistics of the device start anew. Bytes are those asked for of the caching allocator, before it
    rounds them: how much larger a block it finds for them depends on what was there before.
    """
    torch.cuda.init()  # there are no statistics before
    torch.cuda.reset_peak_memory_stats(device)
    before = _requested(device)["current"]
    result = work()
    return result, _requested(device)["peak"] - before


def _requested(device: torch.device) -> dict[str, int]:
    """Nested as the allocator gives them: one flat dictionary of all statistics takes longer than most operations."""
    requested: dict[str, int] = torch.cuda.memory_stats_as_nested_dict(device)["requested_bytes"]["all"]
    return requested
