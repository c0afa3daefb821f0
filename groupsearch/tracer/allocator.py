"""How a device's allocator counts: which storages are its own, and what it rounds every one of them up to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groupsearch.cards import Card
from groupsearch.tracer.profiled import allocated_peak

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
