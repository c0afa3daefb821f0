"""How a device's allocator counts: which storages are its own, and what it rounds every one of them up to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from groupsearch.plan.cards import Card

# -- How many bytes a piece of work allocates at its peak, above what was there before: on the CPU, on a CUDA device

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


# -- allocator -------------------------------------------------------------------------------------

CUDA_GRANULARITY_BYTES = 512
Watch = Callable[[Callable[[], Any]], tuple[Any, int]]
"""Runs an operation; its results, and the most bytes it had allocated at any time inside, results included."""


@dataclass(frozen=True)
class Allocator:
    """The one place that says how many bytes a tensor takes.

    Attributes:
        granularity_bytes: every storage counts as a multiple of it. The caching allocator of a CUDA device
            hands out multiples of 512 bytes, and that is what ``torch.cuda.memory_allocated`` adds up.
        device_type: storages elsewhere do not count, as the step counters that Adam keeps on the CPU; None
            counts them all.
        watch: where operations can be watched from inside as they run; None where they cannot.
        card: the CUDA device that fake tensors of the CPU stand in for; what torch keeps on the host of such a device
            (the state of its random generator, step counters of optimizers) is not among what is counted.
    """

    granularity_bytes: int = 1
    device_type: str | None = None
    watch: Watch | None = None
    card: Card | None = None

    @classmethod
    def of_card(cls, card: Card) -> Allocator:
        """The allocator of a card that is not there."""
        return cls(CUDA_GRANULARITY_BYTES, card=card)

    @classmethod
    def of(cls, device: torch.device) -> Allocator:
        """The allocator of a device: every byte as asked for on the CPU."""
        if device.type != "cuda":
            return cls()
        return cls(CUDA_GRANULARITY_BYTES, device.type, lambda work: allocated_peak(work, device))

    def counts(self, tensor: Tensor) -> bool:
        """Whether a tensor's storage is one of this allocator's."""
        return has_storage(tensor) and self.device_type in (None, tensor.device.type)

    def bytes_of(self, tensor: Tensor) -> int:
        """What a tensor's storage takes, rounded up; 0 where it is not this allocator's."""
        return self.rounded(tensor.untyped_storage().nbytes()) if self.counts(tensor) else 0

    def rounded(self, size_bytes: int) -> int:
        """A size as it is handed out."""
        return -(-size_bytes // self.granularity_bytes) * self.granularity_bytes

    def to_json(self) -> dict[str, int]:
        """What a trace says of it: nothing where bytes are counted as they were asked for."""
        return {} if self.granularity_bytes == 1 else {"granularity_bytes": self.granularity_bytes}

    def total(self, tensors: Iterable[Tensor]) -> int:
        """What all these tensors take, none of which share a storage."""
        return sum(map(self.bytes_of, tensors))


def has_storage(value: object) -> bool:
    """Whether it is a tensor with a storage of its own: a sparse one is made of others that have."""
    return isinstance(value, Tensor) and value.layout is torch.strided


# -- What libraries of a device keep of its memory from their first call on: found by calling them -


@cache
def workspace_bytes(device: torch.device) -> int:
    """What the libraries of a device keep of its memory once products have been taken there; 0 on the CPU.

    cuBLAS and cuBLASLt each keep a workspace per handle and stream, and a handle is a thread's: the backward
    pass has a thread of its own. What they keep is given up, then found by products in both threads. Where
    torch allocates a workspace anew for every product it is none of this, but inside the operation.
    """
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    _in_both_threads(device, torch._C._cuda_clearCublasWorkspaces)
    before = torch.cuda.memory_allocated(device)
    _in_both_threads(device, lambda: _take_products(device))
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device) - before


def _in_both_threads(device: torch.device, work: Callable[[], object]) -> None:
    """Do it in this thread and in that of the device's backward pass."""

    def there(gradient: Tensor) -> None:
        work()

    work()
    seen = torch.ones((), device=device, requires_grad=True) * 1
    seen.register_hook(there)
    seen.backward()


@torch.no_grad()
def _take_products(device: torch.device) -> None:
    """One product by each of the routines that models take: plain, batched, with a bias added."""
    left, right = torch.ones(2, 128, 128, device=device), torch.ones(2, 128, 128, device=device)
    torch.mm(left[0], right[0])
    torch.bmm(left, right)
    torch.addmm(left[0, 0], left[0], right[0])
